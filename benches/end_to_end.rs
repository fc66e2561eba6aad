//! Requests a second from the sender's first byte to the destination's answer: direct, direct but
//! stored before they are answered, and through the queue; on SQLite and on Postgres. Drives the
//! real program; senders, destination and database share the machine with it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a benchmark"
)]

mod support;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use support::criteria::{self, sample_min};
use support::load::Senders;
use support::pipeline::{Measured, Pipeline};
use support::program::postgres;
use support::program::proxy::Setup;
use support::report::{self, Aside};
use support::table::{Cell, Table};

const STORES: [&str; 2] = ["sqlite", "postgres"];
const BODIES: [(&str, usize); 2] = [("100B", 100), ("8.9KB", 8900)];
const CONNECTIONS: usize = 64;
const THREADS: usize = 64;

/// What is between the sender and the destination.
struct Way {
    name: &'static str,
    settings: &'static [(&'static str, &'static str)],
    /// Requests under way at most: for those that go direct, the channel is half full then.
    window: usize,
}

const WAYS: [Way; 3] = [
    Way {
        name: "direct",
        settings: &[("server.enqueue_enabled", "false")],
        window: THREADS + THREADS / 2,
    },
    Way {
        name: "ack_stored",
        settings: &[("server.ack", "stored"), ("server.enqueue_rate", "1000000")],
        window: THREADS + THREADS / 2,
    },
    Way {
        name: "queued",
        settings: &[("server.enqueue_rate", "0")],
        window: 1024,
    },
];

fn main() {
    let mut criterion = criteria::criterion();
    let aside = Aside::take("end_to_end");
    let columns = WAYS.map(|way| way.name.to_owned());
    let title = format!("Delivered a second, {CONNECTIONS} connections");
    let mut table = Table::new(&title, "store/body", columns.into());
    for store in STORES {
        if store == "postgres" && postgres::find_server_program("initdb").is_none() {
            eprintln!("Postgres is left out: it is not installed (no initdb was found)");
            continue;
        }
        end_to_end(&mut criterion, store, &mut table);
    }
    criterion.final_summary();
    if let Some(aside) = aside {
        let said = aside.put_back();
        table.print(false);
        report::print_where(&[], &said);
    }
}

fn end_to_end(criterion: &mut Criterion, store: &str, table: &mut Table) {
    for (size, body_bytes) in BODIES {
        let name = format!("{store}/{size}");
        let mut group = criteria::group(criterion, &name);
        group.throughput(Throughput::Elements(1));
        let cells = WAYS.map(|way| {
            let mut pipeline = None;
            let mut measured = Measured::default();
            group.bench_function(BenchmarkId::from_parameter(way.name), |bencher| {
                let pipeline = pipeline.get_or_insert_with(|| start(store, &way, body_bytes));
                bencher.iter_custom(|requests| {
                    let (count, time) = pipeline.deliver(requests, sample_min(), u64::MAX);
                    measured.add(count, time);
                    Measured::new(count, time).time_for(requests)
                });
            });
            pipeline.map(|_| Cell {
                per_second: measured.per_second(),
                note: String::new(),
            })
        });
        table.row(name, cells.into());
    }
}

fn start(store: &str, way: &Way, body_bytes: usize) -> Pipeline {
    let senders = Senders {
        connections: CONNECTIONS,
        window: way.window,
        body_bytes,
    };
    let configure = |setup: Setup| {
        let setup = setup
            .set("proxy.num_clients", THREADS)
            .set("queue.workers", THREADS)
            .set("queue.handle_per_second", 1_000_000);
        let setup = match store {
            "postgres" => {
                let database = postgres::cluster().database();
                setup
                    .set("db.connection_string", database.url())
                    .keep(database)
            }
            // As it is.
            _ => setup,
        };
        let settings = way.settings.iter();
        settings.fold(setup, |setup, (key, value)| setup.set(key, value))
    };
    let pipeline = Pipeline::start(Duration::ZERO, configure, Some(senders));
    pipeline.warm_up(10 * way.window as u64);
    pipeline
}
