//! A store that others hold, and a destination that fails beside it: what must not happen then.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rusqlite::Connection;

use crate::support::destination::{Answer, Destination, Seen};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Setup, wait_until};
use crate::support::store;

/// Keeps the program from writing to its queue, until dropped.
struct Held(Connection);

impl Held {
    fn hold(setup: &Setup) -> Held {
        let store = Connection::open(setup.path("queue.sqlite")).expect("open");
        store.busy_timeout(PATIENCE).expect("timeout");
        store.execute_batch("BEGIN IMMEDIATE").expect("lock");
        Held(store)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.execute_batch("COMMIT").expect("unlock");
    }
}

fn attempts_of(number: usize, seen: &[Arc<Seen>]) -> Vec<u32> {
    let of = seen.iter().filter(|seen| seen.number() == number);
    of.map(|seen| seen.attempt()).collect()
}

/// A store that answers fast that it is held.
fn impatient(destination: &Destination) -> Setup {
    Setup::new(&destination.url()).set("db.timeout", "200ms")
}

#[test]
fn at_a_shutdown_what_exists_nowhere_else_is_stored_before_leases_are_given_back() {
    let destination = Destination::answering(|_| Answer::hang());
    let stored = impatient(&destination)
        .set("server.shutdown_timeout", "100ms")
        .set("server.enqueue_rate", 0);
    let proxy = stored.start();
    proxy.accept(0..4);
    proxy.stop();
    let setup = stored.set("server.enqueue_rate", 1000);
    let mut proxy = setup.start();
    metrics::wait_for(&proxy, "4 leased rows", |metrics| {
        metrics.rows("leased") == 4.0
    });
    proxy.accept(4..12);
    metrics::wait_for(&proxy, "8 in flight", |metrics| {
        metrics.get("asyncproxy_in_flight") == 8.0
    });
    let held = Held::hold(&setup);
    proxy.sigterm();
    proxy.wait_for_log("storing what is left");
    // The fault lasts for a while, in which the leases alone would be tried.
    thread::sleep(Duration::from_secs(3));
    drop(held);
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    destination.answer(|_| Answer::ok());
    let proxy = setup.start();
    destination.wait_until(PATIENCE, "the direct ones", |seen| {
        (4..12).all(|number| attempts_of(number, seen).len() > 1)
    });
    proxy.kill9();
}

#[test]
fn a_shutdown_ends_in_time_though_the_store_stays_held_and_names_what_is_lost() {
    let destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url())
        .set("server.shutdown_timeout", "100ms")
        // Room for all, however late the workers come.
        .set("proxy.num_clients", 400)
        .set("db.timeout", "2s");
    let mut proxy = setup.start();
    proxy.accept(0..350);
    let _held = Held::hold(&setup);
    proxy.sigterm();
    // Within the patience of the test, where each request took its own time before.
    assert_eq!(proxy.wait().code(), Some(1));
    assert!(proxy.log().contains("lost=350"), "{}", proxy.log());
    let named = proxy
        .log()
        .matches("lost: neither delivered nor stored")
        .count();
    assert_eq!(named, 350);
}

#[test]
fn the_store_is_used_again_though_every_queue_worker_hangs() {
    let destination = Destination::answering(|_| Answer::hang());
    let setup = impatient(&destination)
        .set("server.enqueue_rate", 0)
        .set("server.shutdown_timeout", 0)
        .set("queue.workers", 2);
    let proxy = setup.start();
    proxy.accept(0..4);
    metrics::wait_for(&proxy, "no room to claim", |metrics| {
        metrics.rows("leased") == 4.0
    });
    let held = Held::hold(&setup);
    proxy.accept(4..5);
    proxy.wait_for_log("store does not work");
    drop(held);
    wait_until("/readyz without a fault", || {
        http::get(proxy.control, "/readyz").text() == "ok\n"
    });
    let before = proxy
        .metrics()
        .get("asyncproxy_requests_total{admission=\"stored\"}");
    proxy.accept(5..10);
    let after = proxy
        .metrics()
        .get("asyncproxy_requests_total{admission=\"stored\"}");
    assert_eq!(after - before, 5.0);
    proxy.stop();
}

#[test]
fn what_is_given_up_is_not_sent_again_while_the_store_is_held() {
    let destination = Destination::answering(|_| Answer::status(410));
    let setup = impatient(&destination).set("queue.give_up_statuses", "[410]");
    let proxy = setup.start();
    proxy.wait_for_store();
    let held = Held::hold(&setup);
    proxy.accept(0..1);
    proxy.wait_for_log("neither delivered nor stored");
    metrics::wait_for(&proxy, "several tries to store", |metrics| {
        metrics.get("asyncproxy_store_errors_total") >= 4.0
    });
    assert_eq!(destination.seen().len(), 1);
    drop(held);
    metrics::wait_for(&proxy, "a dead letter", |metrics| {
        metrics.rows("dead") == 1.0
    });
    assert_eq!(destination.seen().len(), 1);
    assert_eq!(store::dead(&setup).len(), 1);
    proxy.stop();
}

#[test]
fn what_waits_in_memory_is_stored_before_its_backoff_is_over() {
    let destination = Destination::down();
    let setup = impatient(&destination)
        .set("queue.backoff_min", "10m")
        .set("queue.backoff_max", "10m");
    let proxy = setup.start();
    proxy.wait_for_store();
    let held = Held::hold(&setup);
    proxy.accept(0..1);
    proxy.wait_for_log("neither delivered nor stored");
    drop(held);
    let metrics = metrics::wait_for(&proxy, "a waiting row", |metrics| {
        metrics.rows("waiting") == 1.0 && metrics.get("asyncproxy_in_flight") == 0.0
    });
    assert_eq!(metrics.attempts("later"), 1.0);
    proxy.stop();
}

#[test]
fn claims_stay_within_the_memory_limit_and_leave_room_for_senders() {
    const MIB: usize = 1 << 20;
    let destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("server.memory_limit", "8MiB")
        .set("server.max_body_size", "4MiB")
        .set("proxy.request_timeout", "2s")
        .set("queue.workers", 30);
    let proxy = setup.start();
    let large = |number: usize| {
        let id = format!("X-Id: {number}");
        http::request("POST", "/hook", &[&id], &vec![b'x'; MIB])
    };
    for number in 0..40 {
        assert_eq!(proxy.send(&large(number)).status, 200);
    }
    let rounds = std::cell::Cell::new(0);
    metrics::wait_for(&proxy, "several claims", |metrics| {
        let held = metrics.get("asyncproxy_held_bytes");
        assert!(held <= 8.0 * MIB as f64, "{held} bytes are held");
        rounds.set(rounds.get() + 1);
        rounds.get() > 50 && metrics.get("asyncproxy_batch_rows_count{op=\"claim\"}") > 1.0
    });
    assert_eq!(proxy.send(&http::numbered(40)).status, 200);
    destination.answer(|_| Answer::ok());
    destination.wait_for_numbers(41, PATIENCE);
    metrics::assert_settled(&proxy, 41);
    proxy.stop();
}

#[test]
fn a_connection_that_breaks_late_is_a_failed_attempt_and_not_sent_on_again() {
    let destination = Destination::answering(|seen| match (seen.number(), seen.attempt()) {
        (1, 1) => Answer::reset().delay(Duration::from_millis(1500)),
        _ => Answer::ok(),
    });
    let setup = Setup::new(&destination.url()).set("proxy.num_clients", 1);
    let proxy = setup.start();
    proxy.accept(0..2);
    metrics::assert_settled(&proxy, 2);
    assert_eq!(attempts_of(1, &destination.seen()), [1, 2]);
    proxy.stop();
}

#[test]
fn a_sender_whose_place_is_needed_is_told_to_come_again() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url()).set("server.max_connections", 1);
    let proxy = setup.start();
    let mut slow = http::Connection::open(proxy.intake);
    slow.send(b"POST /hook HTTP/1.1\r\nHost: hooks.example\r\nContent-Length: 9\r\n\r\nhalf");
    wait_until("the request has begun", || proxy.usage().threads > 0);
    assert_eq!(proxy.send(&http::numbered(0)).status, 200);
    let answer = slow.response().expect("an answer");
    assert_eq!(answer.status, 503);
    assert!(answer.field("retry-after").is_some());
    assert_eq!(proxy.metrics().refused("overloaded"), 1.0);
    proxy.stop();
}
