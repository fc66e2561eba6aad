//! Requests that fail, beside others that do not: they get half of the rate at most, and never stop
//! the others.

use std::sync::Arc;

use crate::support::destination::{Answer, Destination, Seen};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup};
use crate::support::route::{Route, on_routes};

const BAD: &str = "/bad";

/// Answers `bad` to all that goes to [`BAD`].
fn failing(bad: Answer) -> Destination {
    Destination::answering(move |seen| match is_bad(seen) {
        true => bad.clone(),
        false => Answer::ok(),
    })
}

fn is_bad(seen: &Seen) -> bool {
    seen.target == BAD.as_bytes()
}

fn bad(seen: &[Arc<Seen>]) -> impl Iterator<Item = &Arc<Seen>> {
    seen.iter().filter(|seen| is_bad(seen))
}

fn good(seen: &[Arc<Seen>]) -> usize {
    seen.iter().filter(|seen| !is_bad(seen)).count()
}

fn accept_bad(proxy: &Proxy, count: usize) {
    let mut connection = http::Connection::open(proxy.intake);
    for number in 0..count {
        let number = format!("X-Id: {number}");
        let request = http::request("POST", BAD, &[&number], b"bad");
        assert_eq!(connection.exchange(&request).status, 200);
    }
}

/// At a rate of 30 a second each claim is of one token.
fn refused_requests_leave_fresh_ones_half_of_the_rate(setup: Setup, destination: &Destination) {
    const REFUSED: usize = 60;
    /// More than what was never tried may have in advance, for the second attempts before.
    const FRESH: usize = 180;
    let setup = setup.set("queue.handle_per_second", 30);
    let proxy = setup.start();
    accept_bad(&proxy, REFUSED);
    // From now on enough of them are due at any time to take all tokens.
    destination.wait_until(PATIENCE, "all to be refused twice", |seen| {
        bad(seen).filter(|seen| seen.attempt() == 2).count() == REFUSED
    });
    proxy.accept(0..FRESH);
    let before = destination.seen().len();
    let seen = destination.wait_until(PATIENCE, "all fresh ones", |seen| good(seen) == FRESH);
    let refused = bad(&seen[before..]).count();
    // A few are on their way at the beginning.
    assert!(refused <= FRESH + 10, "{refused} beside {FRESH} fresh ones");
    assert!(refused >= FRESH / 3, "they are tried as well: {refused}");
}

fn refused_requests_leave_fresh_ones_half(route: Route) {
    let destination = failing(Answer::status(400));
    let setup = route.to(&destination);
    refused_requests_leave_fresh_ones_half_of_the_rate(setup, &destination);
}
on_routes!(refused_requests_leave_fresh_ones_half: sqlite Sqlite, postgres Postgres);

#[test]
fn refused_requests_leave_fresh_ones_half_of_a_rate_that_instances_share() {
    let destination = failing(Answer::status(400));
    let setup = Route::Postgres
        .to(&destination)
        .set("queue.rate_scope", "cluster");
    refused_requests_leave_fresh_ones_half_of_the_rate(setup, &destination);
}

/// Whoever knows a path that the application cannot bear must not stop all others with it.
fn one_path_that_fails_stops_nobody(route: Route, answer: Answer) {
    const BROKEN: usize = 60;
    const FINE: usize = 450;
    let destination = failing(answer);
    let setup = route
        .to(&destination)
        .set("proxy.breaker_failures", 10)
        .set("queue.handle_per_second", 200);
    let proxy = setup.start();
    accept_bad(&proxy, BROKEN);
    destination.wait_until(PATIENCE, "all to fail", |seen| {
        bad(seen).filter(|seen| seen.attempt() == 2).count() == BROKEN
    });
    proxy.accept(0..FINE);
    let before = destination.seen().len();
    let seen = destination.wait_until(PATIENCE, "all others", |seen| good(seen) >= FINE);
    if route != Route::Direct {
        let failed = bad(&seen[before..]).count();
        // A second's tokens may have been there for them before the others came.
        assert!(failed <= FINE + 200, "{failed} beside {FINE}");
    }
    let metrics = metrics::wait_for(&proxy, "all others to be counted", |metrics| {
        metrics.get("asyncproxy_delivered_total") == FINE as f64
    });
    assert_eq!(metrics.get("asyncproxy_breaker_opened_total"), 0.0);
}

fn a_path_that_is_answered_500(route: Route) {
    one_path_that_fails_stops_nobody(route, Answer::status(500));
}
on_routes!(a_path_that_is_answered_500: direct Direct, sqlite Sqlite, postgres Postgres);

fn a_path_that_is_answered_503(route: Route) {
    one_path_that_fails_stops_nobody(route, Answer::status(503));
}
on_routes!(a_path_that_is_answered_503: sqlite Sqlite);

fn a_path_whose_connection_is_reset(route: Route) {
    one_path_that_fails_stops_nobody(route, Answer::reset());
}
on_routes!(a_path_whose_connection_is_reset: direct Direct, sqlite Sqlite);

/// Many in a row may open the breaker; then those behind them are found.
fn probes_find_what_the_destination_takes(route: Route) {
    const POISON: usize = 80;
    const FINE: usize = 40;
    let destination = failing(Answer::reset());
    let setup = route
        .to(&destination)
        // Sixty different ones open it.
        .set("proxy.breaker_failures", 3)
        .set("queue.backoff_max", "2s");
    let proxy = setup.start();
    accept_bad(&proxy, POISON);
    proxy.wait_for_log("destination is down");
    proxy.accept(0..FINE);
    destination.wait_until(PATIENCE, "the others", |seen| good(seen) == FINE);
    proxy.wait_for_log("destination works again");
}
on_routes!(probes_find_what_the_destination_takes: sqlite Sqlite, postgres Postgres);

/// While nothing but errors comes the queue goes slowly, and at full rate as soon as that ends.
fn nothing_but_errors_slow_the_queue_down(route: Route) {
    const REQUESTS: usize = 400;
    let destination = Destination::answering(|_| Answer::status(500));
    let setup = route
        .to(&destination)
        .set("proxy.breaker_failures", 3)
        .set("queue.handle_per_second", 200);
    let proxy = setup.start();
    proxy.accept(0..REQUESTS);
    proxy.wait_for_log("destination answers nothing but errors");
    let status = http::get(proxy.control, "/status").text();
    assert!(status.contains("\"breaker\":\"slowed\""), "{status}");
    let new = http::numbered(REQUESTS);
    assert_eq!(proxy.send(&new).status, 200);
    destination.answer(|_| Answer::ok());
    destination.wait_for_numbers(REQUESTS + 1, PATIENCE);
    proxy.wait_for_log("destination answers without errors again");
    let metrics = metrics::assert_settled(&proxy, REQUESTS + 1);
    assert_eq!(metrics.get("asyncproxy_breaker_opened_total"), 0.0);
    let request = http::get(proxy.control, "/status").text();
    assert!(request.contains("\"breaker\":\"closed\""), "{request}");
}
on_routes!(nothing_but_errors_slow_the_queue_down: direct Direct, sqlite Sqlite);
