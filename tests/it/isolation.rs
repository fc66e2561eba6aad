//! Databases whose transactions are stricter by default than ours, and what meets in the server.

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;

use asyncproxy::queue::postgres::PostgresStore;
use asyncproxy::queue::{Class, Store};

use crate::contract::{LEASE, TIMEOUT, append_one, claim, counts, delivered, request, row};
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::{TestDb, cluster};

const STORES: usize = 4;
const ROUNDS: usize = 25;
const ROWS: usize = 4;

fn open(url: &str) -> PostgresStore {
    PostgresStore::new(url.parse().unwrap(), 2, true, TIMEOUT)
}

fn set_default(database: &TestDb, level: &str) {
    let set = format!(
        "ALTER DATABASE {} SET default_transaction_isolation = '{level}'",
        database.name()
    );
    database.client().batch_execute(&set).expect(&set);
}

/// Several instances at once; not one operation may fail, and no row is claimed twice.
fn work(stores: &[PostgresStore]) {
    let claimed = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        for store in stores {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    let rows: Vec<_> = (0..ROWS).map(|_| row(request(b"body"))).collect();
                    store.append(&rows).unwrap();
                    let claim = store.claim(Class::Fresh, ROWS, usize::MAX, LEASE).unwrap();
                    let ids = claim.rows.iter().map(|row| row.request.id);
                    for id in ids {
                        assert!(claimed.lock().unwrap().insert(id), "{id} twice");
                    }
                    let settlements: Vec<_> = claim.rows.iter().map(delivered).collect();
                    let settled = store.settle(&settlements).unwrap();
                    assert_eq!(settled.delivered, settlements.len() as u64);
                    store.beat().unwrap();
                    store.sample().unwrap();
                }
            });
        }
    });
    while let rows @ [_, ..] = &*claim(&stores[0], 100) {
        let settlements: Vec<_> = rows.iter().map(delivered).collect();
        stores[0].settle(&settlements).unwrap();
    }
    assert_eq!(counts(&stores[0]), (0, 0, 0));
}

fn works_at(level: &str, is_pooled: bool) {
    let database = cluster().database();
    set_default(&database, level);
    let bouncer = is_pooled.then(|| Pgbouncer::start(&database));
    let url = bouncer.as_ref().map_or(database.url(), Pgbouncer::url);
    let stores: Vec<_> = (0..STORES).map(|_| open(&url)).collect();
    work(&stores);
}

#[test]
fn repeatable_read_by_default_fails_nothing() {
    works_at("repeatable read", false);
}

#[test]
fn serializable_by_default_fails_nothing() {
    works_at("serializable", false);
}

#[test]
fn serializable_by_default_fails_nothing_behind_pgbouncer() {
    works_at("serializable", true);
}

/// What was looked at when the stores began does not hold any more.
#[test]
fn a_default_that_changes_meanwhile_fails_nothing() {
    let database = cluster().database();
    let stores: Vec<_> = (0..STORES).map(|_| open(&database.url())).collect();
    work(&stores);
    set_default(&database, "serializable");
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
    database.client().batch_execute(kill).expect(kill);
    work(&stores);
}

/// Each of the two kinds of failure that mean "again", in front of a third of all inserts.
#[test]
fn what_the_server_lets_fail_for_another_transaction_is_done_again() {
    let database = cluster().database();
    let store = open(&database.url());
    append_one(&store);
    for code in ["40001", "40P01"] {
        let trap = format!(
            "DROP SEQUENCE IF EXISTS turns;
             CREATE SEQUENCE turns;
             CREATE OR REPLACE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 -- No rollback takes a number back.
                 IF nextval('turns') % 3 > 0 THEN
                     RAISE EXCEPTION 'met another' USING ERRCODE = '{code}';
                 END IF;
                 RETURN NEW;
             END $$;
             CREATE OR REPLACE TRIGGER trap BEFORE INSERT ON proxy_requests
                FOR EACH ROW EXECUTE FUNCTION trap()"
        );
        let trap = trap.replace(
            "CREATE OR REPLACE TRIGGER",
            "DROP TRIGGER IF EXISTS trap ON proxy_requests; CREATE TRIGGER",
        );
        database.client().batch_execute(&trap).expect(&trap);
        let before = counts(&store).0;
        for _ in 0..5 {
            assert_eq!(store.append(&[row(request(b"body"))]), Ok(()), "{code}");
        }
        assert_eq!(counts(&store).0, before + 5);
    }
}

/// One that goes on failing is told as what it is: the store works.
#[test]
fn what_fails_for_others_again_and_again_is_refused_and_no_outage() {
    let database = cluster().database();
    let store = PostgresStore::new(
        database.url().parse().unwrap(),
        2,
        true,
        Duration::from_secs(10),
    );
    append_one(&store);
    let trap = "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'met another' USING ERRCODE = '40P01'; END $$;
                CREATE TRIGGER trap BEFORE INSERT ON proxy_requests
                   FOR EACH ROW EXECUTE FUNCTION trap()";
    database.client().batch_execute(trap).expect(trap);
    let refused = store.append(&[row(request(b"body"))]).unwrap_err();
    assert!(!refused.is_outage(), "{refused:?}");
    assert!(refused.to_string().contains("40P01"), "{refused}");
}
