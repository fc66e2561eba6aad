//! The control port under load and beside stores that do not answer: who asks for health is always
//! answered.

use std::io::Write;
use std::thread;
use std::time::Duration;

use crate::support::crowd::{Crowd, Manner};
use crate::support::destination::Destination;
use crate::support::http::{self, Connection};
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::usage::raise_own_descriptor_limit;

/// Asks as an orchestrator and as Prometheus do, each time on a connection of its own.
fn ask(proxy: &Proxy, times: usize) {
    for number in 0..times {
        for target in ["/healthz", "/readyz", "/status", "/metrics"] {
            let answer = http::get(proxy.control, target);
            assert_eq!(answer.status, 200, "{target}, {number}: {answer:?}");
        }
    }
}

#[test]
fn health_is_told_beside_any_number_of_slow_heads() {
    raise_own_descriptor_limit();
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let before = proxy.usage();
    for count in [64, 500] {
        let crowd = Crowd::gather(proxy.control, &[(Manner::Head, count)]);
        ask(&proxy, 50);
        wait_until("slow ones that were closed", || crowd.closed() >= count);
        ask(&proxy, 50);
        // They keep no thread: those that are here now have served the scrapes.
        let threads = proxy.usage().threads;
        assert!(threads <= before.threads + 32, "{threads} threads");
    }
    wait_until("descriptors as before", || {
        proxy.usage().descriptors <= before.descriptors + 8
    });
    proxy.accept(0..1);
    proxy.stop();
}

#[test]
fn health_is_told_beside_connections_that_say_nothing_or_send_bodies() {
    let setup = Setup::new("http://127.0.0.1:1");
    let proxy = setup.start();
    let manners = [
        (Manner::Idle, 100),
        (Manner::Body, 100),
        (Manner::Head, 100),
    ];
    let crowd = Crowd::gather(proxy.control, &manners);
    ask(&proxy, 50);
    drop(crowd);
    proxy.stop();
}

#[test]
fn a_slow_head_is_ended_after_a_second_and_leaves_the_others_alone() {
    let setup = Setup::new("http://127.0.0.1:1");
    let proxy = setup.start();
    let mut kept = Connection::open(proxy.control);
    let health = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n";
    assert_eq!(kept.exchange(health).status, 200);
    let mut slow = Connection::open(proxy.control);
    slow.send(b"GET /healthz HTTP/1.1\r\nHo");
    let mut trickle = slow.sender();
    let trickling = thread::spawn(move || {
        // However it trickles on: only a whole head counts.
        while trickle.write_all(b"s").is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    let answer = slow.response().expect("an answer");
    assert_eq!(answer.status, 408);
    assert_eq!(kept.exchange(health).status, 200);
    drop(slow);
    trickling.join().expect("the trickling thread");
    proxy.stop();
}

/// Nothing on the control port asks the store, which may be frozen.
#[test]
fn health_is_told_while_the_store_is_frozen() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("db.timeout", "30s");
    let proxy = setup.start();
    proxy.accept(0..1);
    // While others write to the store, nobody else can.
    let store = rusqlite::Connection::open(setup.path("queue.sqlite")).expect("open");
    store.busy_timeout(PATIENCE).expect("timeout");
    store.execute_batch("BEGIN IMMEDIATE").expect("lock");
    let mut waiting = Connection::open(proxy.intake);
    waiting.send(&http::numbered(1));
    metrics::wait_for(&proxy, "a sender that waits", |metrics| {
        metrics.get("asyncproxy_threads_busy{pool=\"intake\"}") == 1.0
    });
    ask(&proxy, 20);
    store.execute_batch("COMMIT").expect("unlock");
    assert_eq!(waiting.response().expect("an answer").status, 200);
    destination.wait_for_numbers(2, PATIENCE);
    proxy.stop();
}
