//! A destination that fails: what is sent again, when, how often, and what becomes of the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::support::destination::{Answer, Destination, Seen};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Setup};
use crate::support::route::{Route, on_routes};
use crate::support::store;

/// What arrived, by the number of the request, in order of arrival.
fn by_number(seen: &[Arc<Seen>]) -> BTreeMap<usize, Vec<Arc<Seen>>> {
    let mut numbers: BTreeMap<usize, Vec<Arc<Seen>>> = BTreeMap::new();
    for seen in seen {
        numbers
            .entry(seen.number())
            .or_default()
            .push(Arc::clone(seen));
    }
    numbers
}

fn attempts(seen: &[Arc<Seen>]) -> Vec<u32> {
    seen.iter().map(|seen| seen.attempt()).collect()
}

fn ids_and_attempts_tell_a_redelivery(route: Route) {
    let destination = Destination::answering(|seen| match seen.attempt() {
        1 => Answer::status(500),
        2 => Answer::status(404),
        _ => Answer::status(204),
    });
    let setup = route.to(&destination);
    let proxy = setup.start();
    proxy.accept(0..20);
    let seen = destination.wait_for(60, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, 20);
    assert_eq!(metrics.attempts("later"), 40.0);
    assert_eq!(metrics.attempts("delivered"), 20.0);
    assert_eq!(destination.seen().len(), 60);
    let numbers = by_number(&seen);
    let mut ids: Vec<_> = numbers.values().map(|seen| seen[0].id()).collect();
    for (number, seen) in &numbers {
        assert_eq!(attempts(seen), [1, 2, 3], "request {number}");
        assert!(seen.iter().all(|again| again.id() == seen[0].id()));
        assert!(
            seen.iter()
                .all(|again| again.body == format!("body {number}").as_bytes())
        );
        assert!(
            seen.iter()
                .all(|again| again.passed_on() == seen[0].passed_on())
        );
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 20);
}
on_routes!(ids_and_attempts_tell_a_redelivery);

fn retry_after_is_honoured(route: Route) {
    const ASKED: Duration = Duration::from_secs(2);
    let destination = Destination::answering(|seen| match (seen.attempt(), seen.number() % 2) {
        (1, 0) => Answer::status(429).line("Retry-After: 2"),
        (1, _) => Answer::status(503).line("retry-after: 2"),
        _ => Answer::ok(),
    });
    let setup = route.to(&destination);
    let proxy = setup.start();
    proxy.accept(0..10);
    let seen = destination.wait_for(20, PATIENCE);
    for (number, seen) in by_number(&seen) {
        assert_eq!(attempts(&seen), [1, 2], "request {number}");
        let waited = seen[1].at - seen[0].at;
        assert!(waited >= ASKED, "request {number} after {waited:?}");
    }
    metrics::assert_settled(&proxy, 10);
}
on_routes!(retry_after_is_honoured: direct Direct, sqlite Sqlite, postgres Postgres);

fn final_statuses_are_given_up_at_once(route: Route) {
    let destination = Destination::answering(|seen| match seen.number() {
        0 => Answer::status(410),
        1 => Answer::status(422),
        _ => Answer::ok(),
    });
    let setup = route
        .to(&destination)
        .set("queue.give_up_statuses", "[410, 422]");
    let proxy = setup.start();
    proxy.accept(0..3);
    destination.wait_for_numbers(3, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, 3);
    assert_eq!(metrics.rows("dead"), 2.0);
    assert_eq!(metrics.attempts("buried"), 2.0);
    assert_eq!(metrics.get("asyncproxy_delivered_total"), 1.0);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
    let dead = store::dead(&setup);
    let statuses: Vec<_> = dead
        .iter()
        .map(|dead| (dead.attempt, dead.status))
        .collect();
    assert_eq!(statuses, [(1, Some(410)), (1, Some(422))]);
    assert!(dead[0].error.contains("410"), "{dead:?}");
    assert_eq!(dead[1].body, b"body 1");
    assert_eq!((&*dead[1].method, &*dead[1].target), ("POST", "/hook"));
    assert_eq!(destination.seen().len(), 3);
}
on_routes!(final_statuses_are_given_up_at_once: direct Direct, sqlite Sqlite, postgres Postgres);

fn retries_end_with_a_dead_letter(route: Route) {
    let destination = Destination::answering(|_| Answer::status(500));
    let setup = route.to(&destination).set("queue.max_retries", 2);
    let proxy = setup.start();
    proxy.accept(0..5);
    let metrics = metrics::wait_for(&proxy, "5 dead", |metrics| metrics.rows("dead") == 5.0);
    metrics.assert_balance();
    assert_eq!(metrics.accepted(), 5.0);
    assert_eq!(metrics.attempts("buried"), 5.0);
    for (number, seen) in by_number(&destination.seen()) {
        assert_eq!(attempts(&seen), [1, 2, 3], "request {number}");
    }
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
    let dead = store::dead(&setup);
    assert_eq!(dead.len(), 5);
    assert!(
        dead.iter()
            .all(|dead| dead.attempt == 3 && dead.status == Some(500))
    );
}
on_routes!(retries_end_with_a_dead_letter: direct Direct, sqlite Sqlite, postgres Postgres);

fn what_a_destination_missed_arrives_when_it_is_up(route: Route) {
    let mut destination = Destination::down();
    let setup = route.to(&destination);
    let proxy = setup.start();
    proxy.accept(0..50);
    let metrics = metrics::wait_for(&proxy, "50 failed attempts", |metrics| {
        metrics.attempts("later") >= 50.0
    });
    assert!(
        metrics
            .get("http_proxy_response_time_seconds_count{path=\"other\",status=\"request error\"}")
            >= 50.0
    );
    destination.open();
    let seen = destination.wait_for_numbers(50, PATIENCE);
    assert!(seen.iter().any(|seen| seen.attempt() > 1));
    metrics::assert_settled(&proxy, 50);
    // And again, this time with connections that break.
    destination.refuse();
    proxy.accept(50..80);
    destination.open();
    destination.wait_for_numbers(80, PATIENCE);
    metrics::assert_settled(&proxy, 80);
    assert_eq!(destination.seen().len(), 80);
}
on_routes!(what_a_destination_missed_arrives_when_it_is_up);

#[test]
fn a_connection_closed_while_idle_costs_no_attempt() {
    let destination = Destination::answering(|_| Answer::ok().closing());
    // One worker, so that each request finds the connection of the one before.
    let setup = Setup::new(&destination.url()).set("proxy.num_clients", 1);
    let proxy = setup.start();
    for number in 0..50 {
        proxy.accept(number..number + 1);
        destination.wait_for(number + 1, PATIENCE);
    }
    let metrics = metrics::assert_settled(&proxy, 50);
    assert_eq!(metrics.attempts("later"), 0.0);
    let seen = destination.seen();
    assert_eq!(seen.len(), 50);
    assert!(seen.iter().all(|seen| seen.attempt() == 1));
}

#[test]
fn a_kept_open_connection_is_used_again() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url()).set("proxy.num_clients", 1);
    let proxy = setup.start();
    for number in 0..10 {
        proxy.accept(number..number + 1);
        destination.wait_for(number + 1, PATIENCE);
    }
    assert!(destination.seen().iter().all(|seen| seen.connection == 0));
}

#[test]
fn an_answer_that_never_comes_is_another_attempt() {
    let destination = Destination::answering(|seen| match (seen.attempt(), seen.number()) {
        (1, 0) => Answer::hang(),
        (1, 1) => Answer::reset(),
        _ => Answer::ok(),
    });
    let setup = Setup::new(&destination.url()).set("proxy.request_timeout", "300ms");
    let proxy = setup.start();
    for number in 0..2 {
        proxy.accept(number..number + 1);
        let seen = destination.wait_for(2 * (number + 1), PATIENCE);
        let tail: Vec<_> = seen[2 * number..].to_vec();
        assert_eq!(attempts(&tail), [1, 2], "request {number}");
    }
    metrics::assert_settled(&proxy, 2);
}

#[test]
fn no_redirect_is_followed() {
    let elsewhere = Destination::start();
    let location = format!("Location: {}/elsewhere", elsewhere.url());
    let destination = Destination::answering(move |seen| match seen.attempt() {
        1 => Answer::status(302).line(&location),
        _ => Answer::ok(),
    });
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    proxy.accept(0..1);
    assert_eq!(attempts(&destination.wait_for(2, PATIENCE)), [1, 2]);
    assert!(elsewhere.seen().is_empty());
}

#[test]
fn requests_older_than_max_age_are_given_up() {
    let destination = Destination::answering(|_| Answer::status(500));
    let setup = Setup::new(&destination.url()).set("queue.max_age", "500ms");
    let proxy = setup.start();
    proxy.accept(0..1);
    metrics::wait_for(&proxy, "a dead letter", |metrics| {
        metrics.rows("dead") == 1.0
    });
    assert!(destination.seen().len() > 1);
    assert_eq!(
        proxy.send(&http::numbered(1)).status,
        200,
        "new ones are still taken"
    );
}

/// However many requests hang that have failed before, some workers are kept for others.
fn requests_that_fail_again_and_again_do_not_keep_others_waiting(route: Route) {
    const STUCK: usize = 40;
    let mut destination = Destination::answering(|seen| match (seen.number(), seen.attempt()) {
        (0..STUCK, 1 | 2) => Answer::status(500),
        (0..STUCK, _) => Answer::hang(),
        _ => Answer::ok(),
    });
    let setup = route
        .to(&destination)
        .set("queue.workers", 4)
        .set("proxy.request_timeout", "10m")
        .set("server.shutdown_timeout", "0s");
    let proxy = setup.start();
    proxy.accept(0..STUCK);
    // Three of four workers hang, and as many rows wait behind them.
    destination.wait_until(PATIENCE, "requests that hang", |seen| {
        seen.iter().filter(|seen| seen.attempt() == 3).count() == 3
    });
    proxy.accept(STUCK..STUCK + 100);
    destination.wait_until(PATIENCE, "all others", |seen| {
        seen.iter().filter(|seen| seen.number() >= STUCK).count() == 100
    });
    let hanging = destination.seen();
    let hanging = hanging.iter().filter(|seen| seen.attempt() == 3);
    assert_eq!(hanging.count(), 3);
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    metrics::assert_settled(&proxy, STUCK + 100);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}
on_routes!(requests_that_fail_again_and_again_do_not_keep_others_waiting: sqlite Sqlite, postgres Postgres);
