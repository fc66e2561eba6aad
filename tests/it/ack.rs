//! `server.ack: stored`: answered once committed, sent all the same without waiting for a claim.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::http::{self, Connection};
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Setup, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::store;

/// Longer than any test: who waits for a lease to end waits in vain.
const LONG: &str = "10m";

#[test]
fn there_is_no_answer_before_the_commit() {
    let destination = Destination::start();
    let setup = Route::SqliteFirst.to(&destination).set("db.timeout", "30s");
    let proxy = setup.start();
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    let other = rusqlite::Connection::open(setup.path("queue.sqlite")).expect("open");
    other.busy_timeout(PATIENCE).expect("timeout");
    other.execute_batch("BEGIN IMMEDIATE").expect("lock");
    let mut sender = Connection::open(proxy.intake);
    sender.send(&http::numbered(1));
    wait_until("a request in progress", || {
        proxy
            .metrics()
            .get("asyncproxy_threads_busy{pool=\"intake\"}")
            == 1.0
    });
    thread::sleep(Duration::from_millis(200));
    assert_eq!(destination.seen().len(), 1, "sent before the commit");
    let answered = proxy.metrics().accepted();
    assert_eq!(answered, 1.0);
    other.execute_batch("COMMIT").expect("unlock");
    assert_eq!(sender.response().expect("an answer").status, 200);
    destination.wait_for_numbers(2, PATIENCE);
    metrics::assert_settled(&proxy, 2);
}

fn a_row_is_leased_when_its_answer_comes(route: Route) {
    // The first attempts fail once what is in the store has been looked at.
    let is_seen = Arc::new(Barrier::new(4));
    let destination = Destination::answering({
        let is_seen = Arc::clone(&is_seen);
        move |seen| {
            if seen.attempt() > 1 {
                return Answer::ok();
            }
            is_seen.wait();
            Answer::status(500)
        }
    });
    let setup = route.to(&destination).set("proxy.request_timeout", LONG);
    let proxy = setup.start();
    proxy.accept(0..3);
    assert_eq!((store::rows(&setup), store::leased(&setup)), (3, 3));
    let seen = destination.wait_for(3, PATIENCE);
    assert!(seen.iter().all(|seen| seen.attempt() == 1));
    is_seen.wait();
    let seen = destination.wait_for(6, PATIENCE);
    assert!(seen[3..].iter().all(|seen| seen.attempt() == 2));
    let metrics = metrics::assert_settled(&proxy, 3);
    assert_eq!(metrics.get(route.admission()), 3.0);
    assert_eq!(metrics.get("asyncproxy_stale_settlements_total"), 0.0);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
    assert_eq!(destination.seen().len(), 6);
}
on_routes!(a_row_is_leased_when_its_answer_comes: sqlite SqliteFirst, postgres PostgresFirst);

fn many_are_delivered_once_each(route: Route) {
    let destination = Destination::start();
    let setup = route.to(&destination);
    let proxy = setup.start();
    let statuses = http::load(proxy.intake, 16, 50, http::numbered);
    assert!(statuses.iter().all(|status| *status == 200));
    destination.wait_for_numbers(800, PATIENCE);
    metrics::assert_settled(&proxy, 800);
    proxy.stop();
    assert_eq!(destination.seen().len(), 800);
    assert_eq!(store::rows(&setup), 0);
}
on_routes!(many_are_delivered_once_each: sqlite SqliteFirst, postgres PostgresFirst);

/// What finds no worker waits in the store, whether the queue is used for others or not.
fn there_is_no_place_for_all(is_enqueued: bool) {
    let mut destination = Destination::answering(|_| Answer::hang());
    let setup = Route::SqliteFirst
        .to(&destination)
        .set("server.enqueue_enabled", is_enqueued)
        .set("proxy.request_timeout", LONG)
        .set("proxy.num_clients", 2)
        .set("queue.workers", 1);
    let proxy = setup.start();
    proxy.accept(0..10);
    assert_eq!(store::rows(&setup), 10);
    // Two are with the workers and two behind them; the one of the queue has claimed two.
    wait_until("all that can be leased", || store::leased(&setup) == 6);
    destination.wait_for(3, PATIENCE);
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    destination.wait_for_numbers(10, PATIENCE);
    metrics::assert_settled(&proxy, 10);
    proxy.stop();
}

#[test]
fn there_is_no_place_for_all_with_a_queue() {
    there_is_no_place_for_all(true);
}

#[test]
fn there_is_no_place_for_all_without_a_queue() {
    there_is_no_place_for_all(false);
}

#[test]
fn without_a_store_nothing_is_acknowledged() {
    let destination = Destination::start();
    let mut cluster = DedicatedCluster::create();
    let setup = Setup::new(&destination.url())
        .set("server.ack", "stored")
        .set("db.connection_string", cluster.url());
    let proxy = setup.start();
    proxy.wait_for_log("store does not work");
    for number in 0..5 {
        let refused = proxy.send(&http::numbered(number));
        assert_eq!(refused.status, 503);
        assert!(refused.field("retry-after").is_some());
    }
    assert_eq!(http::get(proxy.control, "/readyz").status, 503);
    assert_eq!(proxy.metrics().accepted(), 0.0);
    assert_eq!(proxy.metrics().refused("overloaded"), 5.0);
    cluster.start();
    wait_until("readiness", || {
        http::get(proxy.control, "/readyz").status == 200
    });
    proxy.accept(5..10);
    destination.wait_until(PATIENCE, "those acknowledged", |seen| seen.len() == 5);
    assert!(destination.seen().iter().all(|seen| seen.number() >= 5));
    metrics::assert_settled(&proxy, 5);
    proxy.stop();
}
