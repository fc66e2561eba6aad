//! Requests that the store refuses, for whatever reason its owner has: they stand alone, and nobody
//! else is any the worse for them.

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::store;

/// Where requests go that the store of a test refuses.
const BAD: &str = "/bad";

fn bad(number: usize) -> Vec<u8> {
    let id = format!("X-Id: {number}");
    http::request("POST", BAD, &[&id], format!("body {number}").as_bytes())
}

/// SQL that refuses what happens to rows of `table` as far as they are bad and `when` holds.
fn refusing(setup: &Setup, table: &str, event: &str, when: &str) -> String {
    let row = if event == "DELETE" { "OLD" } else { "NEW" };
    let name = format!("{table}_{event}");
    let when = format!("{row}.target LIKE '{BAD}%' AND {when}");
    match setup.get("db.connection_string").starts_with("sqlite:") {
        true => format!(
            "CREATE TRIGGER {name} BEFORE {event} ON {table} WHEN {when}
             BEGIN SELECT RAISE(ABORT, 'bad target'); END"
        ),
        false => format!(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN RAISE EXCEPTION 'bad target'; END $$;
             CREATE TRIGGER {name} BEFORE {event} ON {table}
             FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION refuse()"
        ),
    }
}

/// Starts a program on a store that refuses to insert bad rows into `tables`.
fn start_refusing(setup: &Setup, tables: &[&str]) -> Proxy {
    let proxy = setup.start();
    proxy.wait_for_log("store is ready");
    for table in tables {
        store::execute(setup, &refusing(setup, table, "INSERT", "1 = 1"));
    }
    proxy
}

/// Nobody was told that the store does not work.
fn assert_never_down(proxy: &Proxy) {
    assert_eq!(proxy.metrics().get("asyncproxy_store_up"), 1.0);
    let log = proxy.log();
    assert!(!log.contains("store does not work"), "{log}");
}

fn one_refused_row_fails_no_other_sender(route: Route) {
    const SENDERS: usize = 48;
    let destination = Destination::start();
    let setup = route.to(&destination);
    let proxy = start_refusing(&setup, &["proxy_requests"]);
    std::thread::scope(|scope| {
        for sender in 0..SENDERS {
            let intake = proxy.intake;
            scope.spawn(move || {
                let mut connection = http::Connection::open(intake);
                for round in 0..4 {
                    let number = round * SENDERS + sender;
                    let is_bad = number.is_multiple_of(7);
                    let request = if is_bad {
                        bad(number)
                    } else {
                        http::numbered(number)
                    };
                    let answer = connection.exchange(&request);
                    assert_eq!(answer.status, if is_bad { 500 } else { 200 }, "{answer:?}");
                }
            });
        }
    });
    let refused = (0..4 * SENDERS).filter(|number| number.is_multiple_of(7));
    let refused = refused.count();
    let accepted = 4 * SENDERS - refused;
    destination.wait_for(accepted, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, accepted);
    assert_eq!(metrics.refused("unstorable"), refused as f64);
    assert_eq!(destination.seen().len(), accepted);
    assert_never_down(&proxy);
    proxy.stop();
}
on_routes!(one_refused_row_fails_no_other_sender: sqlite Sqlite, postgres Postgres, first SqliteFirst, pgbouncer Pgbouncer);

/// Goes direct, fails there, and cannot be stored to be tried again.
fn to_a_destination_that_is_down(route: Route) -> (Destination, Setup) {
    let destination = Destination::down();
    let setup = route
        .to(&destination)
        .set("server.ack", "received")
        .set("server.enqueue_rate", 1000)
        .set("proxy.num_clients", 64);
    (destination, setup)
}

fn a_failed_request_that_the_store_refuses_becomes_a_dead_letter(route: Route) {
    let (mut destination, setup) = to_a_destination_that_is_down(route);
    let proxy = start_refusing(&setup, &["proxy_requests"]);
    for number in [0, 10] {
        assert_eq!(proxy.send(&bad(number)).status, 200);
        proxy.accept(number + 1..number + 10);
    }
    wait_until("two dead letters", || store::dead(&setup).len() == 2);
    for dead in store::dead(&setup) {
        assert_eq!(dead.target, BAD);
        assert_eq!(dead.attempt, 1);
        assert!(dead.error.contains("refused by the store"), "{dead:?}");
        assert!(dead.error.contains("bad target"), "{dead:?}");
    }
    destination.open();
    destination.wait_for(18, PATIENCE);
    metrics::assert_settled(&proxy, 20);
    assert_never_down(&proxy);
    proxy.stop();
}
on_routes!(a_failed_request_that_the_store_refuses_becomes_a_dead_letter: sqlite Sqlite, postgres Postgres);

fn what_is_refused_in_any_form_is_lost_by_name_and_not_tried_for_ever(route: Route) {
    let (_destination, setup) = to_a_destination_that_is_down(route);
    let mut proxy = start_refusing(&setup, &["proxy_requests", "proxy_dead_letters"]);
    assert_eq!(proxy.send(&bad(0)).status, 200);
    proxy.accept(1..10);
    let lost = proxy.wait_for_log("msg=\"lost: neither delivered nor stored\"");
    assert!(lost.contains("bad target"), "{lost}");
    let metrics = metrics::wait_for(&proxy, "the rest to be stored", |metrics| {
        metrics.get("asyncproxy_in_flight") == 0.0 && metrics.rows("waiting") == 9.0
    });
    assert_eq!(
        metrics.get("asyncproxy_lost_total{reason=\"refused\"}"),
        1.0
    );
    metrics.assert_balance();
    assert_never_down(&proxy);
    proxy.sigterm();
    // Something acknowledged is gone.
    assert_eq!(proxy.wait().code(), Some(1));
}
on_routes!(what_is_refused_in_any_form_is_lost_by_name_and_not_tried_for_ever: sqlite Sqlite, postgres Postgres);

fn one_refused_settlement_holds_up_no_other(route: Route) {
    let destination = Destination::start();
    let setup = route.to(&destination);
    let proxy = start_refusing(&setup, &[]);
    let no_delete = refusing(&setup, "proxy_requests", "DELETE", "1 = 1");
    store::execute(&setup, &no_delete);
    for number in [0, 20, 40] {
        assert_eq!(proxy.send(&bad(number)).status, 200);
        proxy.accept(number + 1..number + 20);
    }
    destination.wait_for_numbers(60, PATIENCE);
    proxy.wait_for_log("the store does not take what became of a request");
    let metrics = metrics::wait_for(&proxy, "all others to be settled", |metrics| {
        metrics.get("asyncproxy_delivered_total") == 57.0 && metrics.rows("leased") == 3.0
    });
    metrics.assert_balance();
    assert_never_down(&proxy);
    // It is not asked again and again: their leases run out.
    assert_eq!(destination.seen().len(), 60);
    proxy.stop();
}
on_routes!(one_refused_settlement_holds_up_no_other: sqlite Sqlite, postgres Postgres);

fn what_cannot_be_put_off_goes_to_the_dead_letters(route: Route) {
    let destination = Destination::answering(|seen| match seen.number() {
        0 => Answer::status(500),
        _ => Answer::ok(),
    });
    let setup = route.to(&destination);
    let proxy = start_refusing(&setup, &[]);
    let no_failure = "NEW.last_error IS NOT NULL";
    let no_failure = refusing(&setup, "proxy_requests", "UPDATE", no_failure);
    store::execute(&setup, &no_failure);
    assert_eq!(proxy.send(&bad(0)).status, 200);
    proxy.accept(1..20);
    wait_until("a dead letter", || store::dead(&setup).len() == 1);
    let dead = store::dead(&setup);
    assert!(dead[0].error.contains("bad target"), "{dead:?}");
    metrics::assert_settled(&proxy, 20);
    assert_never_down(&proxy);
    proxy.stop();
}
on_routes!(what_cannot_be_put_off_goes_to_the_dead_letters: sqlite Sqlite, postgres Postgres);

/// A spool with bad rows at its head, in front of a Postgres that refuses them in `tables`.
fn spooled(tables: &[&str], bads: usize) -> (Destination, DedicatedCluster, Setup, Proxy) {
    let destination = Destination::start();
    let mut cluster = DedicatedCluster::create();
    cluster.start();
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("db.connection_string", cluster.url())
        .set("db.spool", "sqlite:spool.sqlite");
    start_refusing(&setup, tables).stop();
    cluster.stop();
    let proxy = setup.start();
    proxy.wait_for_log("store does not work");
    for number in 0..bads {
        assert_eq!(proxy.send(&bad(number)).status, 200);
    }
    proxy.accept(bads..bads + 20);
    cluster.start();
    proxy.wait_for_log("store works again");
    (destination, cluster, setup, proxy)
}

#[test]
fn a_refused_row_at_the_head_of_the_spool_is_buried_and_blocks_nothing() {
    let (destination, _cluster, setup, proxy) = spooled(&["proxy_requests"], 2);
    destination.wait_for(20, PATIENCE);
    metrics::assert_settled(&proxy, 22);
    let dead = store::dead(&setup);
    assert_eq!(dead.len(), 2);
    assert!(dead[0].error.contains("bad target"), "{dead:?}");
    assert_eq!(proxy.metrics().get("asyncproxy_store_up"), 1.0);
    assert_eq!(proxy.log().matches("store does not work").count(), 1);
    proxy.stop();
    assert_eq!(destination.seen().len(), 20);
}

#[test]
fn a_row_refused_in_any_form_stays_in_the_spool_and_blocks_nothing() {
    // More than are judged one after the other.
    let tables = ["proxy_requests", "proxy_dead_letters"];
    let (destination, _cluster, setup, proxy) = spooled(&tables, 12);
    destination.wait_for(20, PATIENCE);
    let named = proxy.wait_for_log("the store refuses a row, it stays in the spool");
    assert!(named.contains("id="), "{named}");
    let metrics = metrics::wait_for(&proxy, "the bad ones alone in the spool", |metrics| {
        metrics.get("asyncproxy_spool_rows") == 12.0
            && metrics.get("asyncproxy_delivered_total") == 20.0
            && metrics.is_balanced()
    });
    assert_eq!(metrics.accepted(), 32.0);
    assert_eq!(proxy.log().matches("store does not work").count(), 1);
    // Once the store takes them, they come.
    for table in tables {
        let name = format!("DROP TRIGGER {table}_INSERT ON {table}");
        store::execute(&setup, &name);
    }
    destination.wait_for_numbers(32, PATIENCE);
    metrics::assert_settled(&proxy, 32);
    proxy.stop();
    assert_eq!(destination.seen().len(), 32);
}
