//! How Criterion measures a running pipeline: few samples, of a fixed time each.

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode};

use super::report::is_test;

/// Of one sample, at least: deliveries come in bursts, as many at once as there are threads.
const SAMPLE: Duration = Duration::from_millis(100);

/// Ten samples, with the options of the command line. What Criterion takes for the time of one
/// iteration has the start of the program and a whole sample in it, so it asks for few iterations
/// and is through long before the time given here.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        // It is the pipelines that warm up.
        .warm_up_time(Duration::from_millis(10))
        .measurement_time(Duration::from_secs(5))
        .nresamples(10_000)
        .configure_from_args()
}

/// A group in which an iteration is a request.
pub fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat);
    group
}

/// How long a sample takes at least.
pub fn sample_min() -> Duration {
    if is_test() { Duration::ZERO } else { SAMPLE }
}
