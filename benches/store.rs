//! What the two stores do: rows a second appended, claimed and settled, by batch, number of
//! senders and size of the body. Bare loops over the same tables are the yardstick.
//!
//! Both stores keep their files in cargo's target directory, or in `STORE_BENCH_DIR`: a good part
//! of what is measured is how fast a commit is on that disk.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a benchmark"
)]

#[path = "support/bare.rs"]
mod bare;
#[allow(dead_code, reason = "made for the tests")]
#[path = "../tests/it/support/postgres.rs"]
mod cluster;
#[path = "support/figures.rs"]
mod figures;
#[path = "support/queue.rs"]
mod queue;
#[path = "support/report.rs"]
mod report;
#[path = "support/rows.rs"]
mod rows;

use std::cell::OnceCell;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use asyncproxy::metrics::Metrics;
use asyncproxy::queue::NewRow;
use asyncproxy::queue::health::StoreHealth;
use asyncproxy::queue::poller::Wake;
use asyncproxy::queue::writer::{Place, Writer};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};

use bare::{CLAIM_ROWS, Database};
use figures::Figures;
use queue::{Disk, Kind, Queue, TIMEOUT, settlements};
use report::Aside;
use rows::Body;

/// What is compared with a bare loop.
const APPEND_ROWS: u64 = 200;
const WAITING_ROWS: u64 = 10_000;
/// Between two pauses of the clock, in which the queue gets its rows back. At least a batch.
const CHUNK_ROWS: u64 = 1000;

/// What is measured, and for how many rows at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Append(u64),
    /// So many threads that append a row each and wait for its commit, through the writer.
    Senders(u64),
    Claim(u64),
    Settle(u64),
    ClaimSettle,
    BareAppend,
    BareClaimSettle,
}

const GROUPS: [(&str, &[What]); 5] = [
    (
        "append",
        &[
            What::Append(1),
            What::Append(10),
            What::Append(100),
            What::Append(APPEND_ROWS),
            What::BareAppend,
            What::Append(500),
        ],
    ),
    (
        "senders",
        &[
            What::Senders(1),
            What::Senders(8),
            What::Senders(64),
            What::Senders(256),
        ],
    ),
    (
        "claim",
        &[What::Claim(1), What::Claim(10), What::Claim(100)],
    ),
    (
        "settle",
        &[What::Settle(1), What::Settle(10), What::Settle(100)],
    ),
    ("claim+settle", &[What::ClaimSettle, What::BareClaimSettle]),
];

fn main() {
    let waiting = if report::is_test() {
        CLAIM_ROWS
    } else {
        WAITING_ROWS
    };
    let mut criterion = Criterion::default().configure_from_args();
    let aside = Aside::take("store");
    let mut figures = Figures::default();
    let bodies = [Body::new("2KB", 2000), Body::new("8.9KB", 8900)];
    let directory = queue::choose_directory();
    let disk = Disk::open(&directory);
    let queues: Vec<_> = queue::installed(&directory)
        .into_iter()
        .map(|kind| (kind, OnceCell::new()))
        .collect();
    for body in &bodies {
        for (name, whats) in GROUPS {
            // One store right after the other: a shared disk may be slower a minute later.
            for (kind, queue) in &queues {
                let open = || queue.get_or_init(|| Queue::open(*kind, &directory, waiting));
                let name = format!("{kind}/{name}/{}", body.name);
                let mut group = criterion.benchmark_group(name);
                for what in whats.iter().filter(|what| what.is_there(*kind)) {
                    measure(&mut group, &mut figures, (*what, body), &open, &disk);
                }
            }
        }
    }
    criterion.final_summary();
    if let Some(aside) = aside {
        let said = aside.put_back();
        print!("{figures}");
        report::print_where(&[], &said);
    }
}

fn measure<'a>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    figures: &mut Figures,
    (what, body): (What, &Body),
    open: &dyn Fn() -> &'a Queue,
    disk: &Disk,
) {
    group
        .throughput(Throughput::Elements(what.rows()))
        .sample_size(figures::SAMPLES)
        .sampling_mode(SamplingMode::Flat)
        .nresamples(5000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    group.bench_function(what.id(), |bencher| {
        let queue = open();
        if what.needs_rows() {
            // Before the clock runs that tells criterion how much it can measure in the time.
            queue.fill(body);
        }
        figures.add_sync(disk.sync());
        bencher.iter_custom(|times| {
            let took = run(what, queue, body, times);
            let name = (queue.kind, what, body.name);
            figures.add(name, what.rows() * times, took);
            if let Some(ours) = what.ours() {
                let took_ours = run(ours, queue, body, times);
                // Takes the place of what was measured a while ago.
                figures.add(
                    (queue.kind, ours, body.name),
                    what.rows() * times,
                    took_ours,
                );
                figures.compare(name, took_ours, took);
            }
            took
        });
    });
}

impl What {
    /// Rows in one iteration.
    fn rows(self) -> u64 {
        match self {
            What::Append(rows) | What::Claim(rows) | What::Settle(rows) => rows,
            What::Senders(_) => 1,
            What::ClaimSettle | What::BareClaimSettle => CLAIM_ROWS,
            What::BareAppend => APPEND_ROWS,
        }
    }

    fn id(self) -> BenchmarkId {
        match self {
            What::Senders(senders) => BenchmarkId::from_parameter(senders),
            What::BareAppend | What::BareClaimSettle => BenchmarkId::new("bare", self.rows()),
            _ => BenchmarkId::from_parameter(self.rows()),
        }
    }

    fn needs_rows(self) -> bool {
        !matches!(self, What::Append(_) | What::Senders(_) | What::BareAppend)
    }

    /// What a bare loop is compared with, in turns.
    fn ours(self) -> Option<What> {
        match self {
            What::BareAppend => Some(What::Append(APPEND_ROWS)),
            What::BareClaimSettle => Some(What::ClaimSettle),
            _ => None,
        }
    }

    fn is_there(self, kind: Kind) -> bool {
        self != What::BareClaimSettle || kind == Kind::Postgres
    }
}

/// Does it so many times; the time that took, without what puts the queue back as it was.
fn run(what: What, queue: &Queue, body: &Body, times: u64) -> Duration {
    match what {
        What::Append(rows) => append(queue, body, (rows, times), |rows| {
            queue.store.append(rows).unwrap();
        }),
        What::BareAppend => append(queue, body, (APPEND_ROWS, times), |rows| {
            queue.database().append(rows);
        }),
        What::Senders(senders) => send(queue, body, senders, times),
        What::Claim(rows) => claim(queue, rows, times),
        What::Settle(rows) => settle(queue, body, rows, times),
        What::ClaimSettle => take(queue, body, times, || {
            let claimed = queue.claim(CLAIM_ROWS);
            queue.settle(&settlements(&claimed));
            // Dropped when the clock does not run.
            claimed
        }),
        What::BareClaimSettle => take(queue, body, times, || match &mut *queue.database() {
            Database::Sqlite { .. } => unreachable!("see `What::is_there`"),
            Database::Postgres(bare) => bare.claim_and_delete(),
        }),
    }
}

/// Splits `times` iterations, of `rows` each, into chunks.
fn chunks(times: u64, rows: u64) -> impl Iterator<Item = u64> {
    let each = (CHUNK_ROWS / rows).max(1);
    (0..times)
        .step_by(usize::try_from(each).unwrap())
        .map(move |done| each.min(times - done))
}

fn append(
    queue: &Queue,
    body: &Body,
    (rows, times): (u64, u64),
    append: impl Fn(&[NewRow]),
) -> Duration {
    let chunk = |times| {
        queue.make_room(times * rows);
        let batches: Vec<_> = (0..times).map(|_| body.rows(rows)).collect();
        let started = Instant::now();
        batches.iter().for_each(|rows| append(rows));
        started.elapsed()
    };
    chunks(times, rows).map(chunk).sum()
}

fn send(queue: &Queue, body: &Body, senders: u64, rows: u64) -> Duration {
    // A few for each, or starting together would be what is measured.
    let each = rows.div_ceil(senders).max(4);
    queue.make_room(senders * each);
    let (writer, appender) = Writer::new(
        Arc::clone(&queue.store),
        None,
        Arc::new(StoreHealth::default()),
        Arc::new(Metrics::new(1).unwrap()),
        Wake::new().0,
        TIMEOUT,
    );
    let together = Barrier::new(usize::try_from(senders).unwrap());
    let took = std::thread::scope(|scope| {
        scope.spawn(|| writer.run());
        let start = |rows: Vec<NewRow>| {
            let (appender, together) = (appender.clone(), &together);
            scope.spawn(move || {
                together.wait();
                let started = Instant::now();
                for row in rows {
                    assert_eq!(appender.append(row), Ok(Place::Store));
                }
                (started, Instant::now())
            })
        };
        let running: Vec<_> = (0..senders).map(|_| start(body.rows(each))).collect();
        let times: Vec<_> = running.into_iter().map(|it| it.join().unwrap()).collect();
        // The last one: the writer ends.
        drop(appender);
        let first = times.iter().map(|(started, _)| *started).min().unwrap();
        let last = times.iter().map(|(_, ended)| *ended).max().unwrap();
        last - first
    });
    took.mul_f64(rows as f64 / (senders * each) as f64)
}

fn claim(queue: &Queue, rows: u64, times: u64) -> Duration {
    let chunk = |times| {
        let started = Instant::now();
        let claimed: Vec<_> = (0..times).map(|_| queue.claim(rows)).collect();
        let took = started.elapsed();
        queue.release(&claimed.concat());
        took
    };
    chunks(times, rows).map(chunk).sum()
}

fn settle(queue: &Queue, body: &Body, rows: u64, times: u64) -> Duration {
    let chunk = |times| {
        let batches = (0..times).map(|_| settlements(&queue.claim(rows)));
        let batches: Vec<_> = batches.collect();
        let started = Instant::now();
        batches.iter().for_each(|batch| queue.settle(batch));
        let took = started.elapsed();
        queue.replace(body, times * rows);
        took
    };
    chunks(times, rows).map(chunk).sum()
}

/// Claims and deletes `CLAIM_ROWS` at a time.
fn take<T>(queue: &Queue, body: &Body, times: u64, take: impl Fn() -> T) -> Duration {
    let chunk = |times| {
        let started = Instant::now();
        let taken: Vec<T> = (0..times).map(|_| take()).collect();
        let took = started.elapsed();
        drop(taken);
        queue.replace(body, times * CLAIM_ROWS);
        took
    };
    chunks(times, CLAIM_ROWS).map(chunk).sum()
}
