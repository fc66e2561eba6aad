//! A list of hosts: the one that takes writes is found, and one that answers nothing is left.

use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use asyncproxy::queue::postgres::PostgresStore;
use asyncproxy::queue::{Store, StoreError};
use postgres::{Client, NoTls};

use crate::contract::{append_one, counts, request, row};
use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::load::{Ledger, Load};
use crate::support::metrics;
use crate::support::postgres::cluster;
use crate::support::proxy::{Setup, wait_until};

/// What is promised are 10 s; the rest is for machines that do ten other things.
const FAILOVER_MAX: Duration = Duration::from_secs(20);

/// A primary whose commits wait for its standby, and that one.
fn pair() -> (DedicatedCluster, DedicatedCluster) {
    let mut primary = DedicatedCluster::create();
    // Not in its file, which the standby gets, too: alone it would wait for one of its own.
    primary.start_with(&["synchronous_standby_names=*"]);
    let mut standby = DedicatedCluster::standby_of(&primary);
    standby.start();
    let mut client = Client::connect(&primary.url(), NoTls).expect("connect");
    wait_until("the standby to be in step", || {
        let in_step = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
        let row = client.query_one(in_step, &[]).expect(in_step);
        row.get::<_, i64>(0) == 1
    });
    (primary, standby)
}

fn listing(first: u16, second: u16) -> String {
    format!("host=127.0.0.1,127.0.0.1 port={first},{second} user=test dbname=postgres")
}

#[test]
fn a_frozen_primary_is_left_for_the_promoted_standby_and_nothing_is_lost() {
    let ledger = Ledger::default();
    let destination = Destination::answering({
        let ledger = ledger.clone();
        move |seen| {
            ledger.take(seen.number());
            Answer::ok()
        }
    });
    let (primary, standby) = pair();
    let setup = Setup::new(&destination.url())
        .set(
            "db.connection_string",
            listing(primary.port(), standby.port()),
        )
        .set("proxy.request_timeout", "1s")
        .set("server.enqueue_rate", 0);
    let proxy = setup.start();
    proxy.wait_for_log("store is ready");
    let load = Load::start(8, Duration::from_millis(4));
    load.send_to(proxy.intake, 0);
    let some_more = || {
        let enough = load.acknowledged() + 200;
        wait_until("acknowledgements", || load.acknowledged() >= enough);
    };
    some_more();
    primary.freeze();
    standby.promote();
    let promoted = Instant::now();
    some_more();
    let took = promoted.elapsed();
    let told = load.stop();
    wait_until("all that was acknowledged", || {
        ledger.missing(&told).is_empty()
    });
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("queue_total_size") == 0.0
    });
    eprintln!(
        "200 more acknowledged {took:?} after the promotion; of {} lost 0, doubled {}, refused {}",
        told.acknowledged.len(),
        ledger.doubled(),
        told.refused,
    );
    assert!(took < FAILOVER_MAX, "{took:?}");
    proxy.stop();
    primary.thaw();
}

#[test]
fn a_standby_that_is_listed_first_is_passed_over_unless_any_server_is_asked_for() {
    let (primary, standby) = pair();
    let hosts = listing(standby.port(), primary.port());
    let open =
        |hosts: &str| PostgresStore::new(hosts.parse().unwrap(), 2, true, Duration::from_secs(10));
    let store = open(&hosts);
    append_one(&store);
    assert_eq!(counts(&store), (1, 0, 0));
    let any = open(&format!("{hosts} target_session_attrs=any"));
    let refused = any.append(&[row(request(b"a"))]);
    let Err(StoreError::Unavailable(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("name the primary"), "{why}");
}

#[test]
fn a_host_that_accepts_and_says_nothing_costs_little_and_is_tried_last_from_then_on() {
    let database = cluster().database();
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    let keywords = format!(
        "host=127.0.0.1,127.0.0.1 port={port},{} user=test dbname={}",
        database.port(),
        database.name()
    );
    let store = PostgresStore::new(keywords.parse().unwrap(), 1, true, Duration::from_secs(10));
    let began = Instant::now();
    wait_until("the second host", || store.sample().is_ok());
    let first = began.elapsed();
    assert!(first < FAILOVER_MAX, "{first:?}");
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
    database.client().batch_execute(kill).expect(kill);
    // Without the time that the silent one would take: the list begins with the other now.
    silent.set_nonblocking(true).unwrap();
    while silent.accept().is_ok() {}
    append_one(&store);
    assert!(silent.accept().is_err(), "the silent host was asked again");
}
