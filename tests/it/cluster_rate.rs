//! `queue.rate_scope: cluster`: stores on one Postgres claim no more together than one may alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use asyncproxy::queue::postgres::PostgresStore;
use asyncproxy::queue::{Claim, Class, Store};

use crate::contract::{LEASE, TIMEOUT, append_one, counts, request, row};
use crate::instances::INSERT;
use crate::support::destination::{Answer, Destination};
use crate::support::metrics;
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::{TestDb, cluster};
use crate::support::proxy::{PATIENCE, Setup, wait_until};

fn open_at(url: &str, per_second: u32) -> PostgresStore {
    PostgresStore::new(url.parse().unwrap(), 2, true, TIMEOUT).sharing_rate(per_second)
}

fn open(database: &TestDb, per_second: u32) -> PostgresStore {
    open_at(&database.url(), per_second)
}

fn append(store: &dyn Store, rows: usize) {
    let rows: Vec<_> = (0..rows).map(|_| row(request(b"body"))).collect();
    store.append(&rows).unwrap();
}

fn claim(store: &dyn Store, limit: usize) -> Claim {
    store.claim(Class::Fresh, limit, usize::MAX, LEASE).unwrap()
}

fn sql(database: &TestDb, statement: &str) {
    database.client().batch_execute(statement).unwrap();
}

fn is_true(database: &TestDb, condition: &str) -> bool {
    let query = format!("SELECT {condition} FROM proxy_rate");
    database.client().query_one(&query, &[]).unwrap().get(0)
}

/// What a bucket gives that is full at first, at most.
fn most_after(elapsed: Duration, per_second: u32) -> usize {
    let tokens = u128::from(per_second) * (1000 + elapsed.as_millis()) / 1000;
    usize::try_from(tokens).unwrap() + 1
}

#[test]
fn many_stores_claim_no_more_than_the_rate() {
    let database = cluster().database();
    claims_no_more_than_the_rate(&database, &database.url());
}

#[test]
fn many_stores_claim_no_more_than_the_rate_behind_pgbouncer() {
    let database = cluster().database();
    let bouncer = Pgbouncer::start(&database);
    claims_no_more_than_the_rate(&database, &bouncer.url());
}

/// All at once and one row each, so that they get in each other's way as often as can be.
fn claims_no_more_than_the_rate(database: &TestDb, url: &str) {
    const RATE: u32 = 100;
    const ENOUGH: usize = 250;
    append(&open(database, RATE), 500);
    let claimed = AtomicUsize::new(0);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let store = open_at(url, RATE);
                while claimed.load(Ordering::SeqCst) < ENOUGH {
                    let rows = claim(&store, 1).rows.len();
                    let all = rows + claimed.fetch_add(rows, Ordering::SeqCst);
                    let most = most_after(started.elapsed(), RATE);
                    assert!(all <= most, "{all} claimed, at most {most} may be");
                }
            });
        }
    });
    let all = claimed.into_inner() as u64;
    assert_eq!(counts(&open(database, RATE)), (500 - all, all, 0));
    assert!(is_true(database, "count(*) = 1"));
    let small = "bool_and(pg_relation_size('proxy_rate') <= 2 * 8192)";
    assert!(is_true(database, small), "the table has grown");
}

#[test]
fn takes_tokens_only_for_what_is_claimed() {
    const RATE: u32 = 20;
    let database = cluster().database();
    let store = open(&database, RATE);
    append(&store, 3);
    let started = Instant::now();
    let first = claim(&store, 100);
    assert_eq!((first.rows.len(), first.held_back), (3, None));
    append(&store, 100);
    // Two that are left for want of memory.
    let second = store.claim(Class::Fresh, 3, 1, LEASE).unwrap();
    assert_eq!((second.rows.len(), second.held_back), (1, None));
    let third = claim(&store, 100);
    assert!(third.held_back.is_some());
    let all = 3 + 1 + third.rows.len();
    assert!((RATE as usize..=most_after(started.elapsed(), RATE)).contains(&all));
}

#[test]
fn a_claim_of_nothing_writes_nothing() {
    let database = cluster().database();
    let store = open(&database, 10);
    append_one(&store);
    assert_eq!(claim(&store, 1).rows.len(), 1);
    let version = || -> (String, String) {
        let query = "SELECT xmin::text, xmax::text FROM proxy_rate";
        let row = database.client().query_one(query, &[]).unwrap();
        (row.get(0), row.get(1))
    };
    let before = version();
    let nothing = claim(&store, 1);
    assert_eq!((nothing.rows.len(), nothing.held_back), (0, None));
    assert_eq!(version(), before);
}

#[test]
fn nobody_waits_for_one_who_holds_the_tokens() {
    let database = cluster().database();
    let store = open(&database, 10);
    append(&store, 20);
    let mut client = database.client();
    let mut holder = client.transaction().unwrap();
    holder
        .batch_execute("SELECT FROM proxy_rate FOR UPDATE")
        .unwrap();
    let nothing = claim(&store, 10);
    assert!(nothing.rows.is_empty());
    assert!(nothing.held_back.is_some());
    // One that does not share the rate needs no token.
    let other = PostgresStore::new(database.url().parse().unwrap(), 1, true, TIMEOUT);
    assert_eq!(claim(&other, 10).rows.len(), 10);
    holder.rollback().unwrap();
    assert_eq!(claim(&store, 10).rows.len(), 10);
}

#[test]
fn a_store_with_a_rate_of_its_own_does_without_the_table() {
    let database = cluster().database();
    let store = PostgresStore::new(database.url().parse().unwrap(), 1, true, TIMEOUT);
    append_one(&store);
    sql(&database, "DROP TABLE proxy_rate");
    assert_eq!(claim(&store, 1).rows.len(), 1);
}

#[test]
fn a_clock_that_is_set_gives_no_more_than_a_second_and_stops_nobody() {
    const RATE: u32 = 10;
    let database = cluster().database();
    let store = open(&database, RATE);
    append(&store, 100);
    // Set forward by a year, as it were.
    sql(
        &database,
        "UPDATE proxy_rate SET refilled_at = now() - interval '1 year', tokens = 5",
    );
    assert_eq!(claim(&store, 100).rows.len(), RATE as usize);
    // Set back.
    sql(
        &database,
        "UPDATE proxy_rate SET refilled_at = now() + interval '1 year', tokens = 0.5",
    );
    let nothing = claim(&store, 100);
    assert!(nothing.rows.is_empty());
    assert!(nothing.held_back.is_some());
    assert!(is_true(&database, "refilled_at <= now() AND tokens = 0.5"));
    wait_until("tokens", || !claim(&store, 100).rows.is_empty());
}

#[test]
fn a_table_that_was_emptied_is_filled_again() {
    let database = cluster().database();
    let store = open(&database, 10);
    append_one(&store);
    sql(&database, "TRUNCATE proxy_rate");
    assert!(claim(&store, 1).held_back.is_some());
    wait_until("tokens", || !claim(&store, 1).rows.is_empty());
}

/// Each for itself would send twice as much.
#[test]
fn two_instances_send_no_more_than_the_rate_together() {
    const RATE: u32 = 50;
    const ROWS: usize = 400;
    let arrivals: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let destination = Destination::answering({
        let arrivals = Arc::clone(&arrivals);
        move |_| {
            arrivals.lock().unwrap().push(Instant::now());
            Answer::ok()
        }
    });
    let database = cluster().database();
    let bouncer = Pgbouncer::start(&database);
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", bouncer.url())
        .set("queue.handle_per_second", RATE)
        .set("queue.rate_scope", "cluster");
    let proxies = [setup.start(), setup.start()];
    for proxy in &proxies {
        proxy.wait_for_store();
    }
    let started = Instant::now();
    let mut client = database.client();
    let inserted = client.execute(INSERT, &[&(ROWS as i64)]).expect(INSERT);
    assert_eq!(inserted, ROWS as u64);
    let seen = destination.wait_for_numbers(ROWS, PATIENCE);
    assert_eq!(seen.len(), ROWS);
    let delivered = proxies.each_ref().map(|proxy| {
        metrics::wait_for(proxy, "an empty queue", |metrics| {
            metrics.get("queue_total_size") == 0.0
        })
        .get("asyncproxy_delivered_total")
    });
    assert_eq!(delivered.iter().sum::<f64>(), ROWS as f64);
    assert!(delivered.iter().all(|count| *count > 0.0), "{delivered:?}");
    let mut arrivals = arrivals.lock().unwrap().clone();
    arrivals.sort();
    for (before, arrived) in arrivals.iter().enumerate() {
        let elapsed = arrived.duration_since(started);
        let most = most_after(elapsed, RATE);
        assert!(before < most, "{} arrived by {elapsed:?}", before + 1);
    }
    eprintln!(
        "{delivered:?} delivered in {:?}",
        arrivals[ROWS - 1] - started
    );
    for proxy in proxies {
        proxy.stop();
    }
    // Not by way of PgBouncer, which knows no named statements.
    let left = client.query_one("SELECT count(*) FROM proxy_requests", &[]);
    assert_eq!(left.unwrap().get::<_, i64>(0), 0);
}
