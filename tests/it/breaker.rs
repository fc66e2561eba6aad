//! A destination that is down: nobody burns attempts on it, and it is not flattened when it is
//! back.

use std::time::Duration;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::store;

const FAILURES: usize = 3;

fn with_breaker(setup: Setup) -> Setup {
    setup.set("proxy.breaker_failures", FAILURES)
}

/// Sends requests from number 0 on, until the breaker is open; returns how many.
fn open_breaker(proxy: &Proxy) -> usize {
    let mut sent = 0;
    wait_until("an open breaker", || {
        proxy.accept(sent..sent + 1);
        sent += 1;
        proxy.metrics().get("asyncproxy_breaker_open") == 1.0
    });
    sent
}

fn nothing_is_sent_but_probes(route: Route) {
    const MORE: usize = 50;
    let mut destination = Destination::down();
    let setup = with_breaker(route.to(&destination));
    let proxy = setup.start();
    let first = open_breaker(&proxy);
    proxy.wait_for_log("destination is down");
    let ready = http::get(proxy.control, "/readyz");
    assert_eq!(ready.status, 200);
    assert!(
        ready.text().contains("the destination is down: "),
        "{}",
        ready.text()
    );
    let all = first + MORE;
    proxy.accept(first..all);
    // However often the queue would have tried them meanwhile.
    let before = proxy.metrics().attempts("later");
    wait_until("two probes", || {
        proxy.metrics().attempts("later") >= before + 2.0
    });
    let failed = proxy.metrics().attempts("later");
    assert!(failed <= before + 3.0, "{failed} after {before}");
    destination.open();
    let seen = destination.wait_for(all, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, all);
    assert_eq!(metrics.get("asyncproxy_breaker_open"), 0.0);
    assert_eq!(metrics.get("asyncproxy_breaker_opened_total"), 1.0);
    proxy.wait_for_log("destination works again");
    assert_eq!(destination.seen().len(), all);
    // Each failure shows in the attempt of one that arrived, and nothing else does.
    let attempts: u32 = seen.iter().map(|seen| seen.attempt() - 1).sum();
    assert_eq!(f64::from(attempts), metrics.attempts("later"));
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}
on_routes!(nothing_is_sent_but_probes);

/// Half of the requests that go direct are in the channel when the breaker opens.
#[test]
fn without_a_queue_direct_requests_wait_for_the_probe() {
    let mut destination = Destination::down();
    let setup = with_breaker(Route::Direct.to(&destination)).set("server.enqueue_enabled", false);
    let proxy = setup.start();
    proxy.accept(0..40);
    proxy.wait_for_log("destination is down");
    proxy.accept(40..60);
    metrics::wait_for(&proxy, "all to be stored", |metrics| {
        metrics.get("queue_total_size") == 60.0
    });
    destination.open();
    destination.wait_for(60, PATIENCE);
    metrics::assert_settled(&proxy, 60);
    assert_eq!(destination.seen().len(), 60);
}

/// How many arrive within so many seconds after the first, once the destination is back and after
/// so many probes have failed.
fn arrivals(route: Route, rate: usize, failed_probes: usize) -> [usize; 2] {
    const ROWS: usize = 500;
    let mut destination = Destination::down();
    let setup = with_breaker(route.to(&destination)).set("queue.handle_per_second", rate);
    let proxy = setup.start();
    let first = open_breaker(&proxy);
    proxy.accept(first..ROWS);
    let before = proxy.metrics().attempts("later");
    wait_until("probes", || {
        proxy.metrics().attempts("later") >= before + failed_probes as f64
    });
    destination.open();
    let seen = destination.wait_for(ROWS, PATIENCE);
    metrics::assert_settled(&proxy, ROWS);
    let begin = seen[0].at;
    [1, 2].map(|seconds| {
        let end = begin + Duration::from_secs(seconds);
        seen.iter().filter(|seen| seen.at < end).count()
    })
}

#[test]
fn a_destination_that_is_back_is_not_flattened() {
    const RATE: usize = 320;
    // The next probe is made when it was down for 15 s.
    let [one, two] = arrivals(Route::Sqlite, RATE, 3);
    // 10, 20, 40, ... a second, and what the bucket holds at each step; at full rate it would be
    // up to 640 within the first second.
    assert!(one <= RATE / 8, "{one} in the first second");
    assert!(two <= RATE / 3, "{two} in two seconds");
}

#[test]
fn after_a_short_time_the_queue_begins_with_half_of_its_rate() {
    const RATE: usize = 320;
    let [one, _] = arrivals(Route::Sqlite, RATE, 0);
    assert!(one <= RATE * 5 / 8, "{one} in the first second");
}

fn a_stop_meanwhile_is_quick_and_costs_no_attempts(route: Route) {
    let mut destination = Destination::down();
    let setup = with_breaker(route.to(&destination)).set("server.shutdown_timeout", "10m");
    let proxy = setup.start();
    let first = open_breaker(&proxy);
    proxy.accept(first..first + 20);
    let failed = proxy.metrics().attempts("later");
    proxy.stop();
    assert_eq!(store::rows(&setup), i64::try_from(first + 20).expect("few"));
    assert_eq!(store::leased(&setup), 0);
    destination.open();
    let proxy = setup.start();
    let seen = destination.wait_for(first + 20, PATIENCE);
    let attempts: u32 = seen.iter().map(|seen| seen.attempt() - 1).sum();
    // One more probe may have been made before it was stopped.
    assert!(
        f64::from(attempts) <= failed + 1.0,
        "{attempts} after {failed}"
    );
    proxy.stop();
}
on_routes!(a_stop_meanwhile_is_quick_and_costs_no_attempts: direct Direct, sqlite Sqlite, first PostgresFirst);

#[test]
fn answers_that_are_the_requests_fault_do_not_open_it() {
    let destination = Destination::answering(|seen| match seen.attempt() {
        1 => Answer::status(404),
        _ => Answer::ok(),
    });
    let setup = with_breaker(Route::Direct.to(&destination));
    let proxy = setup.start();
    proxy.accept(0..30);
    destination.wait_for(60, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, 30);
    assert_eq!(metrics.get("asyncproxy_breaker_opened_total"), 0.0);
}

#[test]
fn zero_switches_it_off() {
    let mut destination = Destination::down();
    let setup = Route::Direct
        .to(&destination)
        .set("proxy.breaker_failures", 0);
    let proxy = setup.start();
    proxy.accept(0..30);
    wait_until("many failures", || {
        proxy.metrics().attempts("later") > 100.0
    });
    assert_eq!(proxy.metrics().get("asyncproxy_breaker_opened_total"), 0.0);
    destination.open();
    destination.wait_for(30, PATIENCE);
    metrics::assert_settled(&proxy, 30);
}
