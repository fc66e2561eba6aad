//! Few open files: what is said of it, what still works, and what comes back.

use std::net::TcpStream;

use crate::support::crowd::{Crowd, Manner};
use crate::support::destination::Destination;
use crate::support::http;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::usage::raise_own_descriptor_limit;

/// Starts the program with a hard limit of open files.
fn start_limited(setup: &Setup, descriptors: usize) -> Proxy {
    let script = format!("ulimit -n {descriptors} && exec \"$0\"");
    Proxy::of(Process::spawn(&mut setup.shell(&script)))
}

fn few_workers(destination: &Destination) -> Setup {
    Setup::new(&destination.url())
        .set("proxy.num_clients", 2)
        .set("queue.workers", 2)
        .set("server.idle_timeout", "10m")
}

/// Idle senders must not take what the store and the destinations need.
#[test]
fn a_low_limit_of_open_files_is_not_used_up_by_senders() {
    let destination = Destination::start();
    let setup = few_workers(&destination);
    let proxy = start_limited(&setup, 64);
    let crowd = Crowd::gather(proxy.intake, &[(Manner::Idle, 128)]);
    wait_until("all to come", || crowd.rounds() >= 3);
    for number in 0..20 {
        assert_eq!(proxy.send(&http::numbered(number)).status, 200);
    }
    destination.wait_for_numbers(20, PATIENCE);
    assert!(
        !proxy.log().contains("Too many open files"),
        "{}",
        proxy.log()
    );
}

#[test]
fn descriptors_run_out_and_come_back() {
    const LIMIT: usize = 32;
    let destination = Destination::start();
    let setup = few_workers(&destination);
    let mut proxy = start_limited(&setup, LIMIT);
    proxy.accept(0..1);
    destination.wait_for_numbers(1, PATIENCE);
    proxy.wait_for_store();
    let before = proxy.usage();
    // On both ports: those of either leave something.
    let crowd: Vec<_> = (0..2 * LIMIT)
        .flat_map(|_| [proxy.intake, proxy.control])
        .map(|to| TcpStream::connect(to).expect("connect"))
        .collect();
    let line = proxy.wait_for_log("no connection can be accepted at the moment");
    assert!(line.contains("level=error"), "{line}");
    assert!(line.contains("open files"), "{line}");
    drop(crowd);
    wait_until("descriptors as before", || {
        proxy.usage().descriptors <= before.descriptors + 4
    });
    // What is set aside by threads that wait for connections does not show among descriptors.
    proxy.accept(1..50);
    destination.wait_for_numbers(50, PATIENCE);
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    // However many threads fail however often: one line in ten seconds.
    let log = proxy.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("accepted at the moment"));
    assert!(lines.count() <= 3, "{log}");
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_said_at_the_start() {
    let setup = Setup::new("http://127.0.0.1:1");
    let proxy = start_limited(&setup, 256);
    let line = proxy.wait_for_log("the limit of open files");
    assert!(line.contains("level=warn"), "{line}");
    for part in [
        "limit=256",
        "server.max_connections",
        "proxy.num_clients",
        "queue.workers",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    // With what fits there is nothing to say.
    let setup = setup.set("server.max_connections", 16);
    let mut proxy = start_limited(&setup, 256);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(
        !proxy.log().contains("limit of open files"),
        "{}",
        proxy.log()
    );
}

/// What it is given it takes: no soft limit is in the way of the default settings.
#[test]
fn the_soft_limit_of_open_files_is_raised_to_what_the_settings_need() {
    raise_own_descriptor_limit();
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let script = "ulimit -Sn 64 && exec \"$0\"";
    let proxy = Proxy::of(Process::spawn(&mut setup.shell(script)));
    let crowd = Crowd::gather(proxy.intake, &[(Manner::Idle, 900)]);
    wait_until("900 connections", || proxy.usage().descriptors > 900);
    proxy.accept(0..10);
    assert_eq!(crowd.closed(), 0);
    assert!(!proxy.log().contains("no connection can be accepted"));
}
