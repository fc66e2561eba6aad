//! Settings that are read anew on SIGHUP, under traffic: none is lost, and each does what it says.

use std::fmt::Display;
use std::time::Duration;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::store;

/// Rewrites the file with one setting changed, and waits until it is taken over.
fn change(proxy: &Proxy, setup: Setup, key: &str, value: impl Display) -> Setup {
    let setup = setup.set(key, value);
    reload(proxy, &setup, "ok");
    setup
}

fn reload(proxy: &Proxy, setup: &Setup, result: &str) {
    let name = format!("asyncproxy_config_reloads_total{{result=\"{result}\"}}");
    let before = proxy.metrics().get(&name);
    setup.write();
    proxy.sighup();
    wait_until("the reload", || proxy.metrics().get(&name) == before + 1.0);
}

#[test]
fn what_senders_see_changes_at_once() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let post = |bytes: usize| {
        let body = vec![b'x'; bytes];
        proxy
            .send(&http::request("POST", "/hook", &[], &body))
            .status
    };
    assert_eq!(post(2000), 200);
    let setup = change(&proxy, setup, "server.response_status", 202);
    assert_eq!(post(2000), 202);
    let line = proxy.wait_for_log("setting changed");
    assert!(
        line.contains("key=server.response_status") && line.contains("to=202"),
        "{line}"
    );
    let setup = change(&proxy, setup, "server.max_body_size", "1KiB");
    assert_eq!(post(2000), 413);
    let setup = setup.set("server.memory_limit", "1KiB");
    let setup = change(&proxy, setup, "server.max_body_size", "1KiB");
    // A body and its head are more.
    assert_eq!(post(1000), 503);
    let setup = setup.set("server.memory_limit", "256MiB");
    let setup = change(&proxy, setup, "server.max_body_size", "10MiB");
    assert_eq!(post(2000), 202);

    // Which way requests take.
    let stored = || proxy.metrics().get(Route::Sqlite.admission());
    assert_eq!(stored(), 0.0);
    let setup = change(&proxy, setup, "server.enqueue_rate", 0);
    assert_eq!((post(10), stored()), (202, 1.0));
    let setup = change(&proxy, setup, "server.enqueue_enabled", false);
    assert_eq!((post(10), stored()), (202, 1.0));
    let _setup = change(&proxy, setup, "log.level", "error");
    destination.wait_for(5, PATIENCE);
    proxy.stop();
}

/// What waits for the old destination goes to the new one.
fn the_destination_moves(route: Route) {
    let old = Destination::down();
    let new = Destination::start();
    let setup = route
        .to(&old)
        .set("proxy.breaker_failures", 2)
        .set("queue.backoff_min", "1h")
        .set("queue.backoff_max", "1h");
    let proxy = setup.start();
    proxy.wait_for_store();
    proxy.accept(0..4);
    wait_until("the breaker", || {
        http::get(proxy.control, "/readyz")
            .text()
            .contains("destination is down")
    });
    wait_until("all stored", || store::rows(&setup) == 4);
    let setup = change(&proxy, setup, "proxy.remote_url", new.url());
    // Nothing is known against the new one.
    assert_eq!(http::get(proxy.control, "/readyz").text(), "ok\n");
    proxy.accept(4..8);
    let due = setup
        .command()
        .args(["queue", "retry", "--state", "waiting"])
        .output()
        .unwrap();
    assert!(due.status.success(), "{due:?}");
    new.wait_for_numbers(8, PATIENCE);
    metrics::assert_settled(&proxy, 8);
    proxy.stop();
}
on_routes!(the_destination_moves: direct Direct, sqlite Sqlite, postgres Postgres);

fn the_queue_follows(route: Route) {
    let destination = Destination::answering(|_| Answer::status(410));
    let setup = route
        .to(&destination)
        .set("queue.handle_per_second", 1)
        .set("queue.max_rows", 0);
    let proxy = setup.start();
    proxy.accept(0..20);
    // By one a second it would take longer than anyone waits.
    let setup = setup.set("queue.give_up_statuses", "[410]");
    let setup = change(&proxy, setup, "queue.handle_per_second", 100_000);
    metrics::wait_for(&proxy, "all dead", |metrics| metrics.rows("dead") == 20.0);
    let status = http::get(proxy.control, "/status").text();
    assert!(status.contains("\"rate_per_second\":100000"), "{status}");
    store::age_dead(&setup, 20);
    let setup = change(&proxy, setup, "queue.dead_retention", "1d");
    metrics::wait_for(&proxy, "all purged", |metrics| {
        metrics.get("asyncproxy_dead_letters_purged_total") == 20.0
    });
    let setup = setup
        .set("queue.max_rows", 1)
        .set("queue.give_up_statuses", "[]");
    let setup = setup
        .set("queue.backoff_min", "1h")
        .set("queue.backoff_max", "1h");
    reload(&proxy, &setup, "ok");
    proxy.accept(20..21);
    metrics::wait_for(&proxy, "one row", |metrics| metrics.rows("waiting") == 1.0);
    assert_eq!(proxy.send(&http::numbered(21)).status, 503);
    assert_eq!(proxy.metrics().refused("queue_full"), 1.0);
    proxy.stop();
}
on_routes!(the_queue_follows: sqlite Sqlite, postgres Postgres);

#[test]
fn a_rate_that_instances_share_follows() {
    let destination = Destination::start();
    let setup = Route::Postgres
        .to(&destination)
        .set("queue.rate_scope", "cluster")
        .set("queue.handle_per_second", 1);
    let proxy = setup.start();
    proxy.accept(0..50);
    let _setup = change(&proxy, setup, "queue.handle_per_second", 10_000);
    destination.wait_for_numbers(50, PATIENCE);
    proxy.stop();
}

#[test]
fn settings_that_are_not_valid_change_nothing() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let setup = setup.set("server.response_status", 202);
    let bad = setup.set("queue.handle_per_second", "many");
    reload(&proxy, &bad, "failed");
    let line = proxy.wait_for_log("settings not reloaded");
    assert!(
        line.contains("queue.handle_per_second: must be a whole number"),
        "{line}"
    );
    proxy.accept(0..1);
    assert_eq!(
        proxy
            .metrics()
            .get("asyncproxy_config_last_reload_successful"),
        0.0
    );
    std::fs::remove_file(bad.path("config.yaml")).unwrap();
    proxy.sighup();
    proxy.wait_for_log("cannot read the settings");
    let good = bad.set("queue.handle_per_second", 30);
    reload(&proxy, &good, "ok");
    assert_eq!(proxy.send(&http::numbered(1)).status, 202);
    assert_eq!(
        proxy
            .metrics()
            .get("asyncproxy_config_last_reload_successful"),
        1.0
    );
    proxy.stop();
}

#[test]
fn what_needs_a_restart_is_named_and_no_secret_shown() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let setup = setup.set("queue.workers", 9).set(
        "db.connection_string",
        "'postgres://me:sesame@localhost/queue'",
    );
    reload(&proxy, &setup, "ok");
    let line = proxy.wait_for_log("these settings change with the next restart");
    assert!(
        line.contains("settings=\"queue.workers, db.connection_string\""),
        "{line}"
    );
    proxy.accept(0..1);
    destination.wait_for_numbers(1, PATIENCE);
    // Again, until it is restarted.
    reload(&proxy, &setup, "ok");
    let told = || proxy.log().matches("these settings change").count();
    wait_until("the second line", || told() == 2);
    assert!(!proxy.log().contains("sesame"), "{}", proxy.log());
    proxy.stop();
}

/// Hangups without pause under load: nothing is lost, and none of them ends the program.
fn a_storm_of_hangups_loses_nothing(route: Route) {
    let destination = Destination::start();
    let setup = route.to(&destination);
    let proxy = setup.start();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| http::load(proxy.intake, 4, 500, http::numbered));
        while !load.is_finished() {
            proxy.sighup();
            std::thread::sleep(Duration::from_millis(1));
        }
        let statuses = load.join().unwrap();
        assert!(statuses.iter().all(|status| *status == 200));
    });
    destination.wait_for_numbers(2000, PATIENCE);
    metrics::assert_settled(&proxy, 2000);
    proxy.stop();
}
on_routes!(a_storm_of_hangups_loses_nothing: direct Direct, sqlite Sqlite, postgres Postgres);
