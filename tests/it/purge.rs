//! Dead letters that are old enough go away, and no others.

use asyncproxy::queue::BATCH_ROWS_MAX;

use crate::support::destination::{Answer, Destination};
use crate::support::metrics;
use crate::support::proxy::Setup;
use crate::support::route::{Route, on_routes};
use crate::support::store;

const PURGED: &str = "asyncproxy_dead_letters_purged_total";
/// More than two batches.
const OLD: usize = 2 * BATCH_ROWS_MAX + 100;
const YOUNG: usize = 50;

/// Leaves that many dead letters behind, the old ones a month old.
fn bury(setup: &Setup) {
    let proxy = setup.start();
    proxy.accept(0..OLD + YOUNG);
    metrics::wait_for(&proxy, "all dead", |metrics| {
        metrics.rows("dead") == (OLD + YOUNG) as f64
    });
    assert_eq!(proxy.metrics().get(PURGED), 0.0);
    proxy.stop();
    store::age_dead(setup, OLD as i64);
}

fn old_dead_letters_go_and_young_ones_stay(route: Route) {
    let destination = Destination::answering(|_| Answer::status(410));
    let setup = route
        .to(&destination)
        .set("queue.give_up_statuses", "[410]");
    bury(&setup);

    let kept = setup.set("queue.dead_retention", 0);
    let proxy = kept.start();
    // A purge would come before the first count.
    metrics::wait_for(&proxy, "a count", |metrics| {
        metrics.rows("dead") == (OLD + YOUNG) as f64
    });
    assert_eq!(proxy.metrics().get(PURGED), 0.0);
    proxy.stop();
    assert_eq!(store::dead(&kept).len(), OLD + YOUNG);

    let purging = kept.set("queue.dead_retention", "30d");
    let proxy = purging.start();
    let line = proxy.wait_for_log("old dead letters purged");
    assert!(line.contains(&format!("count={OLD}")), "{line}");
    metrics::wait_for(&proxy, "a count of the rest", |metrics| {
        metrics.rows("dead") == YOUNG as f64
    });
    assert_eq!(proxy.metrics().get(PURGED), OLD as f64);
    proxy.stop();
    assert_eq!(store::dead(&purging).len(), YOUNG);
}
on_routes!(old_dead_letters_go_and_young_ones_stay: sqlite Sqlite, postgres Postgres);

fn purged_dead_letters_stay_in_the_balance(route: Route) {
    let destination = Destination::answering(|seen| match seen.number() {
        0..5 => Answer::status(410),
        _ => Answer::ok(),
    });
    let setup = route
        .to(&destination)
        .set("queue.give_up_statuses", "[410]")
        .set("queue.dead_retention", "1s");
    let proxy = setup.start();
    proxy.accept(0..20);
    metrics::wait_for(&proxy, "all purged", |metrics| metrics.get(PURGED) == 5.0);
    let metrics = metrics::assert_settled(&proxy, 20);
    assert_eq!(metrics.get("asyncproxy_delivered_total"), 15.0);
    assert_eq!(metrics.rows("dead"), 0.0);
}
on_routes!(purged_dead_letters_stay_in_the_balance: sqlite Sqlite, postgres Postgres);

#[test]
fn a_purge_that_fails_is_logged_and_ends_nothing() {
    let destination = Destination::answering(|seen| match seen.number() {
        0 => Answer::status(410),
        _ => Answer::ok(),
    });
    let setup = Setup::new(&destination.url())
        .set("queue.give_up_statuses", "[410]")
        .set("queue.dead_retention", "1s");
    let proxy = setup.start();
    proxy.wait_for_store();
    store::execute(
        &setup,
        "CREATE TRIGGER refuse BEFORE DELETE ON proxy_dead_letters \
         BEGIN SELECT raise(ABORT, 'not this one'); END",
    );
    proxy.accept(0..1);
    let line = proxy.wait_for_log("old dead letters cannot be purged");
    assert!(line.contains("not this one"), "{line}");
    proxy.accept(1..3);
    metrics::assert_settled(&proxy, 3);
    store::execute(&setup, "DROP TRIGGER refuse");
    metrics::wait_for(&proxy, "a purge", |metrics| metrics.get(PURGED) == 1.0);
    metrics::assert_settled(&proxy, 3);
    proxy.stop();
}
