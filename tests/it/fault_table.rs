//! What senders and destinations see of each fault: the table in the README.
//!
//! `cargo test --release --test it fault_table:: -- --nocapture --test-threads 1` prints its rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination, Seen};
use crate::support::disk::Disk;
use crate::support::load::{Ledger, Load, Told};
use crate::support::metrics;
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::cluster;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::store;

const SENDERS: usize = 8;
const PAUSE: Duration = Duration::from_millis(4);
/// How long a fault lasts that is not over by itself.
const FAULT: Duration = Duration::from_secs(3);
/// Requests acknowledged before the fault, and after it.
const AROUND: usize = 200;

/// Sends without end while `fault` runs, and counts what became of each request.
fn observe(name: &str, proxy: &Proxy, ledger: &Ledger, fault: impl FnOnce()) -> Told {
    let load = Load::start(SENDERS, PAUSE);
    load.send_to(proxy.intake, 0);
    let some_more = || {
        let enough = load.acknowledged() + AROUND;
        wait_until("acknowledgements", || load.acknowledged() >= enough);
    };
    some_more();
    fault();
    some_more();
    let told = load.stop();
    let deadline = Instant::now() + 2 * PATIENCE;
    while Instant::now() < deadline && !ledger.missing(&told).is_empty() {
        thread::sleep(Duration::from_millis(50));
    }
    let (p99, slowest) = told.p99_and_slowest();
    let lost = ledger.missing(&told).len();
    eprintln!(
        "| {name} | {} | {:.1} ms | {:.0} ms | {} | {lost} | {} |",
        told.acknowledged.len(),
        p99.as_secs_f64() * 1e3,
        slowest.as_secs_f64() * 1e3,
        told.refused,
        ledger.doubled(),
    );
    assert_eq!(lost, 0, "{name}");
    assert_eq!(told.unanswered, 0, "{name}");
    // The books are right after each fault: nothing is counted twice, and nothing left out.
    metrics::assert_settled(proxy, told.acknowledged.len());
    told
}

/// A destination that takes all.
fn taking(ledger: &Ledger) -> Destination {
    let ledger = ledger.clone();
    Destination::answering(move |seen| {
        ledger.take(seen.number());
        Answer::ok()
    })
}

fn setup(destination: &Destination) -> Setup {
    Setup::new(&destination.url())
        .set("proxy.request_timeout", "1s")
        .set("proxy.breaker_failures", 10)
}

/// Half of what comes is stored, half goes direct, with a spool for the time without Postgres.
fn through_postgres(destination: &Destination, url: &str) -> Setup {
    setup(destination)
        .set("db.connection_string", url)
        .set("db.spool", "sqlite:spool.sqlite")
        .set("server.enqueue_rate", 500)
}

/// Runs a fault of a Postgres server of its own; nobody may be refused.
fn postgres_fault(name: &str, fault: impl FnOnce(&mut DedicatedCluster)) {
    let ledger = Ledger::default();
    let destination = taking(&ledger);
    let mut cluster = DedicatedCluster::create();
    cluster.start();
    let setup = through_postgres(&destination, &cluster.url());
    let proxy = setup.start();
    proxy.wait_for_store();
    let told = observe(name, &proxy, &ledger, || fault(&mut cluster));
    assert_eq!(told.refused, 0, "{name}");
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}

#[test]
fn postgres_crashes() {
    postgres_fault("Postgres crashes (immediate stop), 3 s", |cluster| {
        cluster.crash();
        thread::sleep(FAULT);
        cluster.start();
    });
}

#[test]
fn postgres_hangs() {
    postgres_fault("Postgres hangs (SIGSTOP), 10 s", |cluster| {
        cluster.freeze();
        thread::sleep(Duration::from_secs(10));
        cluster.thaw();
    });
}

#[test]
fn postgres_restarts() {
    postgres_fault("Postgres is restarted", |cluster| {
        cluster.stop();
        cluster.start();
    });
}

#[test]
fn connections_are_terminated() {
    postgres_fault("connections terminated, each second, 5 times", |cluster| {
        for _ in 0..5 {
            cluster.terminate_connections();
            thread::sleep(Duration::from_secs(1));
        }
    });
}

#[test]
fn the_disk_of_postgres_is_full() {
    let disk = Disk::mount("160m");
    let ledger = Ledger::default();
    let destination = taking(&ledger);
    let mut cluster = DedicatedCluster::create_in(disk.path("cluster"));
    cluster.start();
    let setup = through_postgres(&destination, &cluster.url());
    let proxy = setup.start();
    proxy.wait_for_store();
    let told = observe("the disk of Postgres is full, 3 s", &proxy, &ledger, || {
        let filler = disk.fill("filler");
        proxy.wait_for_log("store does not work");
        thread::sleep(FAULT);
        std::fs::remove_file(filler).expect("make room");
        if !cluster.is_running() {
            // It ends itself when it cannot write its log.
            cluster.start();
        }
    });
    assert_eq!(told.refused, 0);
    proxy.stop();
}

#[test]
fn pgbouncer_is_restarted() {
    let ledger = Ledger::default();
    let destination = taking(&ledger);
    let database = cluster().database();
    let mut bouncer = Pgbouncer::start(&database);
    let setup = through_postgres(&destination, &bouncer.url());
    let proxy = setup.start();
    proxy.wait_for_store();
    let told = observe("PgBouncer is restarted, 3 times", &proxy, &ledger, || {
        for _ in 0..3 {
            bouncer.restart();
            thread::sleep(Duration::from_secs(1));
        }
    });
    assert_eq!(told.refused, 0);
    proxy.stop();
}

/// Runs a fault of the destination: while it lasts, requests are answered by `answer`.
fn destination_fault(
    name: &str,
    answer: impl Fn(&Ledger, &Seen) -> Answer + Send + Sync + 'static,
) {
    let ledger = Ledger::default();
    let is_faulty = Arc::new(AtomicBool::new(false));
    let destination = Destination::answering({
        let (ledger, is_faulty) = (ledger.clone(), Arc::clone(&is_faulty));
        move |seen| {
            if is_faulty.load(Ordering::Relaxed) {
                return answer(&ledger, seen);
            }
            ledger.take(seen.number());
            Answer::ok()
        }
    });
    let setup = setup(&destination);
    let proxy = setup.start();
    proxy.wait_for_store();
    let told = observe(name, &proxy, &ledger, || {
        is_faulty.store(true, Ordering::Relaxed);
        thread::sleep(FAULT);
        is_faulty.store(false, Ordering::Relaxed);
    });
    assert_eq!(told.refused, 0, "{name}");
    assert_eq!(store::dead(&setup), []);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}

#[test]
fn the_destination_refuses() {
    let ledger = Ledger::default();
    let mut destination = taking(&ledger);
    let setup = setup(&destination);
    let proxy = setup.start();
    proxy.wait_for_store();
    let told = observe("destination refuses, 3 s", &proxy, &ledger, || {
        destination.refuse();
        thread::sleep(FAULT);
        destination.open();
    });
    assert_eq!(told.refused, 0);
    proxy.stop();
}

#[test]
fn the_destination_hangs() {
    destination_fault("destination hangs, 3 s", |_, _| Answer::hang());
}

#[test]
fn the_destination_resets() {
    destination_fault("destination resets after the request, 3 s", |_, _| {
        Answer::reset()
    });
}

#[test]
fn the_destination_answers_500() {
    destination_fault("destination answers 500, 3 s", |_, _| Answer::status(500));
}

#[test]
fn the_destination_answers_429() {
    destination_fault("destination answers 429, Retry-After: 1, 3 s", |_, _| {
        Answer::status(429).line("Retry-After: 1")
    });
}

#[test]
fn the_destination_redirects() {
    destination_fault("destination answers 301, 3 s", |_, _| {
        Answer::status(301).line("Location: /elsewhere")
    });
}

#[test]
fn the_destination_closes_connections() {
    destination_fault(
        "destination closes kept-alive connections, 3 s",
        |ledger, seen| {
            ledger.take(seen.number());
            Answer::ok().closing()
        },
    );
}

#[test]
fn the_destination_answers_too_late() {
    // It has taken them: these are the doubled ones.
    destination_fault(
        "destination answers after the timeout, 3 s",
        |ledger, seen| {
            ledger.take(seen.number());
            Answer::ok().delay(Duration::from_millis(1500))
        },
    );
}

#[test]
fn the_destination_does_not_end_its_answers() {
    destination_fault("destination sends an endless body, 3 s", |ledger, seen| {
        ledger.take(seen.number());
        Answer::endless()
    });
}
