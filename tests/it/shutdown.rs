//! Told to stop: what is finished, what is stored, and what senders meet meanwhile.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::http::{self, Connection};
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::{metrics, store};

/// Longer than any test: a row that arrives sooner was given back, not left to its lease.
const LONG: &str = "10m";

/// Starts the program again; all numbers below `n` must arrive, and nothing must be left.
fn assert_all_arrive_after_restart(setup: &Setup, destination: &mut Destination, n: usize) {
    assert_eq!(store::leased(setup), 0, "leases are given back");
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    let before = destination.seen().len();
    let proxy = setup.start();
    destination.wait_until(PATIENCE, &format!("numbers 0..{n} again"), |seen| {
        let arrived = |number: usize| seen[before..].iter().any(|seen| seen.number() == number);
        (0..n).all(arrived)
    });
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("asyncproxy_store_up") == 1.0 && metrics.get("queue_total_size") == 0.0
    });
    proxy.stop();
    assert_eq!(store::rows(setup), 0);
    assert_eq!(destination.seen().len(), before + n);
}

fn wait_until_refused(proxy: &Proxy) {
    wait_until("refused connections", || {
        TcpStream::connect(proxy.intake).is_err()
    });
}

#[test]
fn an_idle_program_ends_at_once_on_either_signal() {
    let setup = Setup::new("http://127.0.0.1:1").set("server.shutdown_timeout", LONG);
    let mut proxy = setup.start();
    proxy.sigint();
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    let mut proxy = setup.start();
    // An idle sender holds nothing up.
    let _idle = Connection::open(proxy.intake);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    proxy.wait_for_log("msg=\"stopping\"");
    proxy.wait_for_log("msg=\"stopped\"");
}

fn what_is_in_flight_is_finished(route: Route) {
    let destination = Destination::answering(|_| Answer::ok().delay(Duration::from_millis(700)));
    let setup = route.to(&destination).set("server.shutdown_timeout", LONG);
    let proxy = setup.start();
    proxy.accept(0..8);
    destination.wait_for(8, PATIENCE);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
    let seen = destination.seen();
    assert_eq!(seen.len(), 8);
    assert!(seen.iter().all(|seen| seen.attempt() == 1));
}
on_routes!(what_is_in_flight_is_finished);

fn what_outlives_the_deadline_is_stored(route: Route) {
    let mut destination = Destination::answering(|_| Answer::hang());
    let setup = route
        .to(&destination)
        .set("proxy.num_clients", 8)
        .set("proxy.request_timeout", LONG)
        .set("server.shutdown_timeout", "200ms");
    let mut proxy = setup.start();
    // Eight with the workers, the rest behind them.
    proxy.accept(0..8);
    destination.wait_for(8, PATIENCE);
    proxy.accept(8..14);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    assert_eq!(store::rows(&setup), 14);
    let begun = destination.seen().len();
    assert_eq!(begun, 8);
    assert_all_arrive_after_restart(&setup, &mut destination, 14);
    for seen in &destination.seen()[begun..] {
        let first = destination.seen()[..begun]
            .iter()
            .find(|first| first.number() == seen.number())
            .map(|first| first.id().to_owned());
        // An attempt that was begun counts; the destination may have done its work.
        let attempt = if first.is_some() { 2 } else { 1 };
        assert_eq!(seen.attempt(), attempt, "request {}", seen.number());
        assert!(first.is_none_or(|id| id == seen.id()));
    }
}
on_routes!(what_outlives_the_deadline_is_stored);

fn a_second_signal_ends_the_wait_but_stores(route: Route) {
    let mut destination = Destination::answering(|_| Answer::hang());
    let setup = route
        .to(&destination)
        .set("proxy.request_timeout", LONG)
        .set("server.shutdown_timeout", LONG);
    let mut proxy = setup.start();
    proxy.accept(0..8);
    destination.wait_for(8, PATIENCE);
    proxy.sigterm();
    wait_until_refused(&proxy);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    assert_eq!(store::rows(&setup), 8);
    assert_all_arrive_after_restart(&setup, &mut destination, 8);
}
on_routes!(a_second_signal_ends_the_wait_but_stores: direct Direct, sqlite Sqlite, postgres Postgres);

fn senders_are_told_to_close(acceptor: &str) {
    let mut destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url())
        .set("server.acceptor", acceptor)
        .set("server.read_timeout", "1m")
        .set("proxy.request_timeout", LONG)
        .set("server.shutdown_timeout", LONG);
    let mut proxy = setup.start();
    let mut kept_open = Connection::open(proxy.intake);
    let answer = kept_open.exchange(&http::numbered(0));
    assert_eq!(answer.status, 200);
    assert_ne!(answer.field("connection"), Some("close"));
    // In the middle of the next request when the signal comes.
    let request = http::numbered(1);
    let (begun, rest) = request.split_at(request.len() / 2);
    kept_open.send(begun);
    destination.wait_for(1, PATIENCE);
    proxy.sigterm();
    wait_until_refused(&proxy);
    let ready = http::get(proxy.control, "/readyz");
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("shutting down"), "{}", ready.text());
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    // Still answered, still accepted, and then the connection is over.
    kept_open.send(rest);
    let answer = kept_open.response().expect("an answer");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.field("connection"), Some("close"));
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    assert_all_arrive_after_restart(&setup, &mut destination, 2);
}

#[test]
fn senders_are_told_to_close_by_the_builtin_acceptor() {
    senders_are_told_to_close("builtin");
}

#[test]
fn senders_are_told_to_close_by_tiny_http() {
    senders_are_told_to_close("tiny_http");
}

/// Its beginning may be with the front, on its way to a thread, or not noticed at all: wherever it
/// is when the signal comes, the rest is waited for.
#[test]
fn a_request_that_has_begun_is_not_cut_off_by_the_stop() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url())
        .set("server.read_timeout", LONG)
        .set("server.shutdown_timeout", LONG);
    let mut number = 0;
    for _ in 0..8 {
        let mut proxy = setup.start();
        let mut senders: Vec<_> = (0..16).map(|_| Connection::open(proxy.intake)).collect();
        for sender in &mut senders {
            assert_eq!(sender.exchange(&http::numbered(number)).status, 200);
            number += 1;
        }
        let mut rests = Vec::new();
        for sender in &mut senders {
            let request = http::numbered(number);
            let (begun, rest) = request.split_at(request.len() / 2);
            sender.send(begun);
            rests.push(rest.to_vec());
            number += 1;
        }
        proxy.sigterm();
        wait_until_refused(&proxy);
        for (sender, rest) in senders.iter_mut().zip(rests) {
            sender.send(&rest);
            assert_eq!(sender.response().expect("an answer").status, 200);
        }
        assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    }
    destination.wait_for_numbers(number, PATIENCE);
}

#[test]
fn a_loss_is_not_passed_over_in_silence() {
    let destination = Destination::answering(|_| Answer::hang());
    let cluster = DedicatedCluster::create();
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", cluster.url())
        .set("server.shutdown_timeout", "100ms");
    let mut proxy = setup.start();
    proxy.accept(0..1);
    let id = destination.wait_for(1, PATIENCE)[0].id().to_owned();
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(1));
    proxy.wait_for_log(&format!("id={id}"));
    proxy.wait_for_log("asyncproxy: 1 acknowledged request");
}

#[test]
fn a_database_that_comes_back_in_time_saves_the_rest() {
    let mut destination = Destination::answering(|_| Answer::hang());
    let mut cluster = DedicatedCluster::create();
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", cluster.url())
        .set("server.shutdown_timeout", "100ms");
    let mut proxy = setup.start();
    proxy.accept(0..4);
    destination.wait_for(4, PATIENCE);
    proxy.sigterm();
    proxy.wait_for_log("storing what is left");
    cluster.start();
    assert_eq!(proxy.wait().code(), Some(0));
    assert_all_arrive_after_restart(&setup, &mut destination, 4);
}

/// Nobody knows when it will answer, or whether: `db.timeout` is longer than anybody waits here.
#[test]
fn a_store_that_never_answers_does_not_hold_up_the_stop() {
    let destination = Destination::answering(|_| Answer::hang());
    let mut cluster = DedicatedCluster::create();
    cluster.start();
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", cluster.url())
        .set("db.timeout", LONG)
        .set("server.shutdown_timeout", "1s");
    let mut proxy = setup.start();
    proxy.wait_for_log("store is ready");
    cluster.freeze();
    proxy.accept(0..1);
    let id = destination.wait_for(1, PATIENCE)[0].id().to_owned();
    let told = Instant::now();
    proxy.sigterm();
    let code = proxy.wait().code();
    let took = told.elapsed();
    cluster.thaw();
    assert_eq!(code, Some(1), "{}", proxy.log());
    assert!(took < Duration::from_secs(11), "{took:?}");
    proxy.wait_for_log(&format!(
        "msg=\"lost: neither delivered nor stored\" id={id}"
    ));
}
