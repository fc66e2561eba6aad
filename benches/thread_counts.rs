//! How many threads are enough: deliveries a second by `proxy.num_clients` and `queue.workers`, to
//! destinations that take 0, 5 and 50 ms to answer. Drives the real program, on SQLite; senders
//! and destination share the machine with it.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "a benchmark")]

mod support;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{AxisScale, BenchmarkGroup, BenchmarkId, Criterion, PlotConfiguration};
use support::criteria::{self, sample_min};
use support::load::Senders;
use support::pipeline::{Measured, Pipeline};
use support::plot::{Line, Plot};
use support::program::proxy::Setup;
use support::program::{http, store, usage};
use support::report::{self, Aside, is_test};
use support::table::{Cell, Table};

const NUM_CLIENTS: [usize; 5] = [1, 8, 32, 128, 700];
const WORKERS: [usize; 5] = [1, 8, 32, 120, 700];
const LATENCIES_MS: [u64; 3] = [0, 5, 50];

const BODY_BYTES: usize = 2000;
const CONNECTIONS: usize = 16;

/// By threads and latency.
type Results = HashMap<(usize, u64), Cell>;

fn main() {
    // One for each thread's connection.
    usage::raise_own_descriptor_limit();
    let mut criterion = criteria::criterion();
    let aside = Aside::take("thread_counts");
    let direct = direct(&mut criterion);
    let drained = drain(&mut criterion);
    criterion.final_summary();
    let Some(aside) = aside else { return };
    let said = aside.put_back();
    print(
        "Direct: delivered a second, and in what time 99 % of the senders had their answer",
        "proxy.num_clients",
        &NUM_CLIENTS,
        &direct,
    );
    print(
        "Drained from the queue: delivered a second",
        "queue.workers",
        &WORKERS,
        &drained,
    );
    let plots = [
        plot("Direct", "proxy.num_clients", &NUM_CLIENTS, &direct),
        plot("Drain", "queue.workers", &WORKERS, &drained),
    ];
    let plots: Vec<_> = plots.into_iter().flatten().collect();
    report::print_where(&plots, &said);
}

fn destination(latency: u64) -> String {
    format!("answers in {latency} ms")
}

fn print(title: &str, setting: &str, threads: &[usize], results: &Results) {
    let mut table = Table::new(title, setting, LATENCIES_MS.map(destination).into());
    for threads in threads {
        let cells = LATENCIES_MS.map(|latency| results.get(&(*threads, latency)).cloned());
        table.row(threads, cells.into());
    }
    table.print(true);
}

/// Returns where the picture is, if there was something to draw.
fn plot(title: &str, setting: &str, threads: &[usize], results: &Results) -> Option<PathBuf> {
    let line = |latency| {
        let point = |threads: &usize| {
            let cell = results.get(&(*threads, latency))?;
            Some((*threads as f64, cell.per_second))
        };
        Line {
            name: destination(latency),
            points: threads.iter().filter_map(point).collect(),
        }
    };
    let plot = Plot {
        title: &format!("{title}: deliveries a second by {setting}"),
        threads: &format!("{setting} (threads)"),
        lines: LATENCIES_MS.map(line).into(),
    };
    let path = report::directory().join(format!("thread_counts-{}.svg", title.to_lowercase()));
    let is_drawn = plot.write(&path).unwrap();
    is_drawn.then_some(path)
}

/// Criterion plots it as a line for each latency, over the number of threads. With a throughput,
/// it would not take that for the x axis.
fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criteria::group(criterion, name);
    let plot = PlotConfiguration::default().summary_scale(AxisScale::Logarithmic);
    group.plot_config(plot);
    group
}

/// Criterion sorts its legend by name: the figures are of the same length.
fn id(latency: u64, threads: usize) -> BenchmarkId {
    BenchmarkId::new(format!("{latency:02}ms"), threads)
}

fn direct(criterion: &mut Criterion) -> Results {
    let mut results = Results::new();
    let mut group = group(criterion, "direct");
    for latency in LATENCIES_MS {
        for threads in NUM_CLIENTS {
            let mut pipeline = None;
            let mut measured = Measured::default();
            let id = id(latency, threads);
            group.bench_function(id, |bencher| {
                let pipeline = pipeline.get_or_insert_with(|| start_direct(threads, latency));
                bencher.iter_custom(|requests| {
                    let (count, time) = pipeline.deliver(requests, sample_min(), u64::MAX);
                    measured.add(count, time);
                    Measured::new(count, time).time_for(requests)
                });
            });
            if let Some(p99) = pipeline.and_then(|pipeline| pipeline.p99()) {
                let cell = Cell {
                    per_second: measured.per_second(),
                    note: format!("{:>8.1} ms", p99.as_secs_f64() * 1e3),
                };
                results.insert((threads, latency), cell);
            }
        }
    }
    results
}

/// Nothing is stored, and all workers have something to do: the destination is what limits, until
/// the machine does.
fn start_direct(threads: usize, latency: u64) -> Pipeline {
    let senders = Senders {
        connections: CONNECTIONS,
        // Beside those with the workers, the channel is half full. Were it full, a request would
        // often come before a worker has taken the next one, and be refused.
        window: threads + threads.div_ceil(2),
        body_bytes: BODY_BYTES,
    };
    let configure = |setup: Setup| {
        setup
            .set("server.enqueue_enabled", false)
            .set("proxy.num_clients", threads)
            .set("queue.workers", 1)
    };
    let pipeline = Pipeline::start(Duration::from_millis(latency), configure, Some(senders));
    pipeline.warm_up(2 * threads as u64);
    pipeline
}

fn drain(criterion: &mut Criterion) -> Results {
    let mut results = Results::new();
    let mut group = group(criterion, "drain");
    let mut stored = None;
    for latency in LATENCIES_MS {
        for threads in WORKERS {
            let mut drain = None;
            let id = id(latency, threads);
            group.bench_function(id, |bencher| {
                let stored = stored.get_or_insert_with(Stored::fill);
                let drain = drain.get_or_insert_with(|| Drain::new(threads, latency));
                bencher.iter_custom(|rows| drain.deliver(stored, rows));
            });
            if let Some(drain) = drain {
                let cell = Cell {
                    per_second: drain.measured.per_second(),
                    note: String::new(),
                };
                results.insert((threads, latency), cell);
            }
        }
    }
    results
}

/// A full store, which each drain gets a copy of.
struct Stored {
    setup: Setup,
    rows: u64,
}

impl Stored {
    fn fill() -> Stored {
        // Enough to begin and to end with, for the most threads.
        let rows = if is_test() { 3000 } else { 20_000 };
        let idle = support::destination::Destination::start(Duration::ZERO, Default::default());
        let setup = Setup::new(&idle.url())
            .set("server.enqueue_rate", 0)
            // As little as it can be told to send.
            .set("queue.handle_per_second", 1);
        let proxy = setup.start();
        let body = [b'x'; BODY_BYTES];
        let statuses = http::load(proxy.intake, CONNECTIONS, rows / CONNECTIONS, |_| {
            http::request("POST", "/hook", &[], &body)
        });
        assert!(statuses.iter().all(|status| *status == 200), "not stored");
        proxy.stop();
        let rows = store::rows(&setup).unsigned_abs();
        Stored { setup, rows }
    }

    fn copy_to(&self, setup: &Setup) {
        for name in ["queue.sqlite", "queue.sqlite-wal"] {
            // Stopped in order, it leaves no log behind.
            if self.setup.path(name).exists() {
                std::fs::copy(self.setup.path(name), setup.path(name)).unwrap();
            }
        }
    }
}

/// Drains one store after the other.
struct Drain {
    threads: usize,
    latency: u64,
    pipeline: Option<Pipeline>,
    measured: Measured,
}

impl Drain {
    fn new(threads: usize, latency: u64) -> Drain {
        Drain {
            threads,
            latency,
            pipeline: None,
            measured: Measured::default(),
        }
    }

    /// The time `rows` take.
    fn deliver(&mut self, stored: &Stored, rows: u64) -> Duration {
        // From there on some workers have nothing to do.
        let last = stored.rows - self.threads as u64;
        let mut sample = Measured::default();
        while sample.delivered < rows || sample.elapsed < sample_min() {
            // One that is empty ends before the next begins.
            let running = self.pipeline.take();
            let pipeline = running
                .filter(|pipeline| pipeline.delivered() < last)
                .unwrap_or_else(|| self.start(stored));
            let (count, time) = pipeline.deliver(
                rows.saturating_sub(sample.delivered),
                sample_min().saturating_sub(sample.elapsed),
                last,
            );
            sample.add(count, time);
            self.pipeline = Some(pipeline);
        }
        self.measured.add(sample.delivered, sample.elapsed);
        sample.time_for(rows)
    }

    fn start(&self, stored: &Stored) -> Pipeline {
        let configure = |setup: Setup| {
            stored.copy_to(&setup);
            setup
                .set("queue.workers", self.threads)
                .set("queue.handle_per_second", 1_000_000)
                .set("proxy.num_clients", 1)
        };
        let pipeline = Pipeline::start(Duration::from_millis(self.latency), configure, None);
        pipeline.warm_up(2 * self.threads as u64);
        pipeline
    }
}
