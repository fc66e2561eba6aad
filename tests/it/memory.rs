//! What the program takes of the machine's memory, and that it gives it back.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::cgroup::Cgroup;
use crate::support::destination::{Answer, Destination};
use crate::support::http::{self, Connection};
use crate::support::metrics;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};

const MB: usize = 1_000_000;
const LIMIT_BYTES: usize = 128 << 20;
/// What the program may take beyond its limit.
const BESIDE_BYTES: usize = 64 * MB;
/// What it may keep of a burst.
const KEPT_BYTES: usize = 32 * MB;

/// Large requests from many senders at once.
struct Burst {
    senders: usize,
    /// Requests of each sender.
    each: usize,
    /// Sizes of the bodies, in turn.
    body_bytes: Vec<usize>,
}

/// What its senders were told: numbers acknowledged, and how many were refused with 503.
#[derive(Debug, Default)]
struct Told {
    acknowledged: Vec<usize>,
    refused: usize,
}

impl Burst {
    /// Sends all of it; whoever is refused goes on with the next.
    fn send(&self, to: SocketAddr) -> Told {
        let (told, next) = (Mutex::new(Told::default()), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..self.senders {
                scope.spawn(|| {
                    for _ in 0..self.each {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let status = self.send_one(to, number);
                        let mut told = told.lock().expect("lock");
                        match status {
                            200 => told.acknowledged.push(number),
                            503 => told.refused += 1,
                            other => panic!("request {number}: {other}"),
                        }
                    }
                });
            }
        });
        told.into_inner().expect("lock")
    }

    fn send_one(&self, to: SocketAddr, number: usize) -> u16 {
        let id = format!("X-Id: {number}");
        let body = vec![b'x'; self.body_bytes[number % self.body_bytes.len()]];
        let mut connection = Connection::open(to);
        connection.send(&http::request("POST", "/hook", &[&id], &body));
        connection.response().expect("an answer").status
    }
}

/// However slow the machine is, nobody is given up for being late.
fn patient(setup: Setup) -> Setup {
    setup
        .set("server.read_timeout", "60s")
        .set("db.timeout", "30s")
}

/// Waits until all of those acknowledged have arrived and nothing is held any more.
fn wait_until_delivered(proxy: &Proxy, destination: &Destination, told: &Told) {
    destination.wait_until(PATIENCE, "all that were acknowledged", |seen| {
        let arrived: HashSet<_> = seen.iter().map(|seen| seen.number()).collect();
        let mut acknowledged = told.acknowledged.iter();
        acknowledged.all(|number| arrived.contains(number))
    });
    metrics::wait_for(proxy, "nothing held", |metrics| {
        metrics.get("asyncproxy_held_bytes") == 0.0 && metrics.get("queue_total_size") == 0.0
    });
}

/// Checks the most that was taken, and waits until little more is left than at rest.
fn check_usage(proxy: &Proxy, rest_bytes: usize) {
    let peak = proxy.usage().peak_bytes;
    assert!(peak <= LIMIT_BYTES + BESIDE_BYTES, "{} MB", peak / MB);
    wait_until("the memory to be given back", || {
        proxy.usage().resident_bytes <= rest_bytes + KEPT_BYTES
    });
}

fn a_burst_of_large_bodies_stays_within_the_limit_and_is_given_back(route: Route) {
    // Slow, so that bodies pile up.
    let destination = Destination::answering(|_| Answer::ok().delay(Duration::from_millis(300)));
    destination.forget_bodies();
    let setup = patient(route.to(&destination))
        .set("server.memory_limit", LIMIT_BYTES)
        .set("proxy.num_clients", 32)
        .set("queue.workers", 16);
    let proxy = setup.start();
    proxy.accept(0..16);
    destination.wait_for_numbers(16, PATIENCE);
    let rest = proxy.usage().resident_bytes;
    let burst = Burst {
        senders: 64,
        each: 2,
        body_bytes: (1..=10).map(|mb| mb * MB).collect(),
    };
    let told = burst.send(proxy.intake);
    assert!(told.refused > 0, "no more than there was room for");
    wait_until_delivered(&proxy, &destination, &told);
    check_usage(&proxy, rest);
    proxy.stop();
}
on_routes!(a_burst_of_large_bodies_stays_within_the_limit_and_is_given_back: direct Direct, sqlite Sqlite, postgres Postgres, sqlite_first SqliteFirst, postgres_first PostgresFirst);

/// What is too small for a mapping of its own lies among what is still needed.
#[test]
fn a_burst_of_small_bodies_is_given_back() {
    const WORKERS: usize = 700;
    let destination = Destination::answering(|_| Answer::hang());
    destination.forget_bodies();
    let setup = patient(Route::Direct.to(&destination))
        .set("server.memory_limit", LIMIT_BYTES)
        .set("proxy.request_timeout", "10s")
        .set("proxy.num_clients", WORKERS);
    let proxy = setup.start();
    let burst = |body_bytes| Burst {
        senders: 64,
        each: 20,
        body_bytes,
    };
    // The first time all workers touch their stacks, which is not what this is about.
    let told = burst(vec![1]).send(proxy.intake);
    destination.wait_for(WORKERS, PATIENCE);
    let rest = proxy.usage().resident_bytes;
    destination.answer(|_| Answer::ok());
    wait_until_delivered(&proxy, &destination, &told);
    destination.answer(|_| Answer::hang());
    let told = burst((1..=12).map(|n| n * 10_000).collect()).send(proxy.intake);
    let held = proxy.usage().resident_bytes;
    assert!(
        held > rest + 2 * KEPT_BYTES,
        "{} MB are no burst",
        held / MB
    );
    destination.answer(|_| Answer::ok());
    wait_until_delivered(&proxy, &destination, &told);
    check_usage(&proxy, rest);
    proxy.stop();
}

const SMALL_MACHINE_BYTES: usize = 64 << 20;

fn large_bodies_do_not_kill_it_in_a_small_machine(route: Route) {
    let destination = Destination::answering(|_| Answer::ok().delay(Duration::from_millis(50)));
    destination.forget_bodies();
    let setup = patient(route.to(&destination))
        .set("server.memory_limit", "16MiB")
        .set("proxy.num_clients", 16)
        .set("queue.workers", 4);
    // Where there can be no such machine, what it takes tells all the same.
    let machine = Cgroup::with_memory(SMALL_MACHINE_BYTES);
    let enter = machine.as_ref().map_or_else(String::new, Cgroup::enter);
    let script = format!("{enter}\nexec \"$0\"");
    let proxy = Proxy::of(Process::spawn(&mut setup.shell(&script)));
    let burst = Burst {
        senders: 64,
        each: 4,
        body_bytes: vec![MB],
    };
    let told = burst.send(proxy.intake);
    assert!(told.refused > 0, "no more than there was room for");
    assert!(!told.acknowledged.is_empty());
    wait_until_delivered(&proxy, &destination, &told);
    let peak = proxy.usage().peak_bytes;
    assert!(peak <= SMALL_MACHINE_BYTES, "{} MB", peak / MB);
    proxy.stop();
}
on_routes!(large_bodies_do_not_kill_it_in_a_small_machine: direct Direct, sqlite Sqlite, postgres Postgres, postgres_first PostgresFirst);

/// Rows that were stored when there was more memory are claimed all the same.
#[test]
fn rows_larger_than_the_limit_are_delivered_one_at_a_time() {
    let mut destination = Destination::down();
    destination.forget_bodies();
    let setup = patient(Route::Sqlite.to(&destination));
    let proxy = setup.start();
    let burst = Burst {
        senders: 4,
        each: 3,
        body_bytes: vec![5 * MB, 1],
    };
    let told = burst.send(proxy.intake);
    assert_eq!(told.refused, 0);
    proxy.stop();
    let setup = setup
        .set("server.max_body_size", "1KiB")
        .set("server.memory_limit", "2MiB");
    let proxy = setup.start();
    destination.open();
    wait_until_delivered(&proxy, &destination, &told);
    let peak = proxy.usage().peak_bytes;
    assert!(peak <= BESIDE_BYTES, "{} MB", peak / MB);
    proxy.stop();
}

/// A sender is held to what it has sent, not to what it says that it will.
#[test]
fn what_is_announced_takes_no_memory() {
    let destination = Destination::start();
    let setup = patient(Setup::new(&destination.url()))
        .set("server.max_body_size", "8MiB")
        .set("server.memory_limit", "8MiB");
    let proxy = setup.start();
    let trickling: Vec<_> = (0..16)
        .map(|_| {
            let mut connection = Connection::open(proxy.intake);
            connection.send(b"POST /hook HTTP/1.1\r\nHost: h\r\nContent-Length: 8000000\r\n\r\nx");
            connection
        })
        .collect();
    metrics::wait_for(&proxy, "all to be read", |metrics| {
        metrics.get("asyncproxy_held_bytes") >= 16.0
    });
    let held = proxy.metrics().get("asyncproxy_held_bytes");
    assert!(
        held < 16.0 * 1024.0,
        "{held} bytes for what is only announced"
    );
    let burst = Burst {
        senders: 1,
        each: 4,
        body_bytes: vec![4 * MB],
    };
    let told = burst.send(proxy.intake);
    assert!(told.acknowledged.contains(&0), "{told:?}");
    drop(trickling);
    wait_until_delivered(&proxy, &destination, &told);
    proxy.stop();
}

fn check_config(command: &mut Command) -> String {
    let Output { status, stdout, .. } = command.output().expect("run");
    assert!(status.success());
    String::from_utf8(stdout).expect("UTF-8")
}

#[test]
fn the_automatic_limit_is_shown_and_follows_the_cgroup() {
    let setup = Setup::new("http://127.0.0.1:1");
    let shown = check_config(setup.command().arg("--check-config"));
    assert!(shown.contains("  memory_limit: auto # "), "{shown}");
    for (machine_mib, limit_mib) in [(32, 16), (64, 16), (400, 100)] {
        let Some(machine) = Cgroup::with_memory(machine_mib << 20) else {
            eprintln!("not tried: no control group with memory can be made here");
            return;
        };
        let script = format!("{}\nexec \"$0\" --check-config", machine.enter());
        let shown = check_config(&mut setup.shell(&script));
        let expected = format!("  memory_limit: auto # {limit_mib}MiB\n");
        assert!(shown.contains(&expected), "{shown}");
    }
    let setup = setup.set("server.memory_limit", "20MiB");
    let shown = check_config(setup.command().arg("--check-config"));
    assert!(shown.contains("  memory_limit: 20MiB\n"), "{shown}");
}
