//! Bounds to what the store holds.

use std::time::Duration;

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::store;

fn a_full_queue_refuses_what_it_would_have_to_hold(route: Route) {
    const ROWS_MAX: usize = 10;
    let mut destination = Destination::down();
    let setup = route
        .to(&destination)
        .set("queue.max_rows", ROWS_MAX)
        .set("queue.backoff_min", "1s")
        .set("queue.backoff_max", "1s");
    let proxy = setup.start();
    proxy.accept(0..ROWS_MAX);
    // What comes in while rows are counted is not known before the next count.
    wait_until("a count", || {
        proxy.metrics().get("queue_total_size") == 10.0
    });
    for number in ROWS_MAX..ROWS_MAX + 5 {
        let refused = proxy.send(&http::numbered(number));
        assert_eq!(refused.status, 503);
        assert!(refused.field("retry-after").is_some());
    }
    let metrics = proxy.metrics();
    assert_eq!(metrics.refused("queue_full"), 5.0);
    assert_eq!(metrics.get("asyncproxy_queue_rows_max"), 10.0);
    assert_eq!(
        metrics.get("asyncproxy_requests_total{admission=\"refused\"}"),
        5.0
    );
    proxy.wait_for_log("the queue holds queue.max_rows");
    assert_eq!(store::rows(&setup), 10);
    // It holds for those that were there before.
    proxy.stop();
    let proxy = setup.start();
    wait_until("a count", || {
        proxy.metrics().get("queue_total_size") == 10.0
    });
    assert_eq!(proxy.send(&http::numbered(99)).status, 503);
    destination.open();
    destination.wait_for_numbers(ROWS_MAX, PATIENCE);
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("asyncproxy_delivered_total") == 10.0
    });
    proxy.accept(ROWS_MAX..2 * ROWS_MAX);
    destination.wait_for_numbers(2 * ROWS_MAX, PATIENCE);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}
on_routes!(a_full_queue_refuses_what_it_would_have_to_hold: sqlite Sqlite, postgres Postgres, first SqliteFirst);

/// What was acknowledged before is stored, however full the queue is.
#[test]
fn a_full_queue_takes_what_was_acknowledged() {
    let mut destination = Destination::down();
    let setup = Route::Direct
        .to(&destination)
        .set("queue.max_rows", 1)
        .set("queue.backoff_min", "1s")
        .set("queue.backoff_max", "1s");
    let proxy = setup.start();
    proxy.accept(0..20);
    metrics::wait_for(&proxy, "all to be stored", |metrics| {
        metrics.get("queue_total_size") == 20.0
    });
    destination.open();
    destination.wait_for_numbers(20, PATIENCE + Duration::from_secs(1));
    metrics::assert_settled(&proxy, 20);
}
