//! The spool: what Postgres does not take waits in a file beside it, and comes to it in the end.

use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use crate::kills::rng;
use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::load::{Ledger, Load};
use crate::support::metrics;
use crate::support::postgres::{TestDb, cluster};
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::relay::Relay;
use crate::support::store;

fn spooled(destination: &Destination, cluster: &DedicatedCluster) -> Setup {
    Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("db.connection_string", cluster.url())
        .set("db.spool", "sqlite:spool.sqlite")
}

fn rows(proxy: &Proxy) -> f64 {
    proxy.metrics().get("asyncproxy_spool_rows")
}

fn running() -> DedicatedCluster {
    let mut cluster = DedicatedCluster::create();
    cluster.start();
    cluster
}

/// Starts a program whose Postgres is found to be down.
fn start_without(setup: &Setup) -> Proxy {
    let proxy = setup.start();
    proxy.wait_for_log("store does not work");
    proxy
}

#[test]
fn what_postgres_does_not_take_comes_to_it_later() {
    let destination = Destination::start();
    let mut cluster = running();
    let setup = spooled(&destination, &cluster);
    let proxy = setup.start();
    proxy.accept(0..10);
    for round in 1..3 {
        metrics::assert_settled(&proxy, round * 50 - 40);
        cluster.stop();
        proxy.accept(round * 100..round * 100 + 50);
        assert_eq!(rows(&proxy), 50.0);
        proxy.metrics().assert_balance();
        let ready = http::get(proxy.control, "/readyz");
        assert_eq!(ready.status, 200);
        assert!(
            ready.text().contains("requests go to the spool: "),
            "{}",
            ready.text()
        );
        cluster.start();
        destination.wait_until(PATIENCE, "all of the round", |seen| {
            (round * 100..round * 100 + 50)
                .all(|number| seen.iter().any(|seen| seen.number() == number))
        });
    }
    proxy.wait_for_log("requests go to the spool");
    proxy.wait_for_log("spool is moved to the store");
    let metrics = metrics::assert_settled(&proxy, 110);
    assert_eq!(metrics.get("asyncproxy_spool_rows"), 0.0);
    assert_eq!(metrics.get("asyncproxy_spooled_total"), 100.0);
    assert_eq!(metrics.get("asyncproxy_spool_moved_total"), 100.0);
    assert_eq!(destination.seen().len(), 110);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}

#[test]
fn the_spool_outlives_the_program() {
    let destination = Destination::start();
    let mut cluster = DedicatedCluster::create();
    let setup = spooled(&destination, &cluster);
    let mut proxy = start_without(&setup);
    proxy.accept(0..30);
    proxy.kill9();
    proxy.wait();
    let proxy = start_without(&setup);
    wait_until("the rows to be counted", || rows(&proxy) == 30.0);
    proxy.accept(30..40);
    assert_eq!(rows(&proxy), 40.0);
    cluster.start();
    destination.wait_for_numbers(40, PATIENCE);
    wait_until("an empty spool", || rows(&proxy) == 0.0);
    proxy.stop();
    assert_eq!(destination.seen().len(), 40);
}

#[test]
fn a_stop_without_postgres_leaves_the_rest_in_the_spool() {
    let mut destination = Destination::answering(|_| Answer::hang());
    let mut cluster = DedicatedCluster::create();
    let setup = spooled(&destination, &cluster)
        .set("server.enqueue_rate", 1000)
        .set("server.shutdown_timeout", "100ms");
    let proxy = start_without(&setup);
    proxy.accept(0..4);
    destination.wait_for(4, PATIENCE);
    proxy.stop();
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    cluster.start();
    let proxy = setup.start();
    let seen = destination.wait_for(8, PATIENCE);
    // The attempts that were interrupted count.
    assert!(seen[4..].iter().all(|seen| seen.attempt() == 2));
    proxy.stop();
}

#[test]
fn attempts_and_dead_letters_go_along() {
    let destination = Destination::answering(|seen| match (seen.number(), seen.attempt()) {
        (0, _) => Answer::status(410),
        (_, 1) => Answer::status(500),
        _ => Answer::ok(),
    });
    let mut cluster = DedicatedCluster::create();
    let setup = spooled(&destination, &cluster)
        .set("server.enqueue_rate", 1000)
        // Room for all: none is to be stored before it was tried.
        .set("proxy.num_clients", 64)
        .set("queue.give_up_statuses", "[410]");
    let proxy = start_without(&setup);
    proxy.accept(0..10);
    wait_until("all to be spooled", || rows(&proxy) == 10.0);
    cluster.start();
    let seen = destination.wait_for(10 + 9, PATIENCE);
    assert!(seen[10..].iter().all(|seen| seen.attempt() == 2));
    metrics::assert_settled(&proxy, 10);
    let dead = store::dead(&setup);
    assert_eq!(dead.len(), 1);
    assert_eq!((dead[0].attempt, dead[0].status), (1, Some(410)));
    assert_eq!(dead[0].body, b"body 0");
    proxy.stop();
}

/// They wait there: nothing is sent that Postgres does not know of.
#[test]
fn with_ack_stored_the_spool_counts_as_stored() {
    let destination = Destination::start();
    let mut cluster = DedicatedCluster::create();
    let setup = spooled(&destination, &cluster)
        .set("server.ack", "stored")
        .set("server.enqueue_rate", 1000);
    let proxy = start_without(&setup);
    proxy.accept(0..20);
    assert_eq!(rows(&proxy), 20.0);
    assert_eq!(destination.seen().len(), 0);
    cluster.start();
    destination.wait_for_numbers(20, PATIENCE);
    metrics::assert_settled(&proxy, 20);
    assert!(destination.seen().iter().all(|seen| seen.attempt() == 1));
    proxy.stop();
    assert_eq!(destination.seen().len(), 20);
}

#[test]
fn a_spool_that_does_not_work_is_as_none() {
    let destination = Destination::start();
    let mut cluster = DedicatedCluster::create();
    let setup = spooled(&destination, &cluster).set("db.spool", "sqlite:missing/spool.sqlite");
    let proxy = start_without(&setup);
    proxy.accept(0..5);
    destination.wait_for_numbers(5, PATIENCE);
    proxy.wait_for_log("spool does not work");
    let ready = http::get(proxy.control, "/readyz");
    assert!(
        ready.text().contains("nothing can be stored"),
        "{}",
        ready.text()
    );
    cluster.start();
    wait_until("readiness", || {
        http::get(proxy.control, "/readyz").text() == "ok\n"
    });
    proxy.accept(5..10);
    destination.wait_for_numbers(10, PATIENCE);
    proxy.stop();
}

/// Killed while it fills the spool, or moves it, or has just begun to.
#[test]
fn killed_while_the_spool_is_moved() {
    const ROUNDS: usize = 20;
    let mut rng = rng("Postgres with a spool");
    let ledger = Ledger::default();
    let destination = Destination::answering({
        let ledger = ledger.clone();
        move |seen| {
            ledger.take(seen.number());
            Answer::ok()
        }
    });
    let mut cluster = running();
    let setup = spooled(&destination, &cluster).set("proxy.request_timeout", "1s");
    let load = Load::start(8, Duration::ZERO);
    for round in 0..ROUNDS {
        cluster.stop();
        let proxy = start_without(&setup);
        load.send_to(proxy.intake, round);
        let enough = load.acknowledged() + 200;
        wait_until("acknowledgements", || load.acknowledged() >= enough);
        cluster.start();
        wait_until("the move", || {
            proxy.metrics().get("asyncproxy_spool_moved_total") > 0.0 || rng.bool()
        });
        thread::sleep(Duration::from_millis(rng.u64(0..50)));
        proxy.kill9();
    }
    let proxy = setup.start();
    load.send_to(proxy.intake, ROUNDS);
    let told = load.stop();
    assert_eq!(told.refused, 0);
    // Leases of those killed come to their end after half a minute.
    wait_until("all acknowledged", || ledger.missing(&told).is_empty());
    wait_until("an empty spool", || rows(&proxy) == 0.0);
    eprintln!(
        "Postgres with a spool: {ROUNDS} kills, acked {}, delivered {}, lost 0, doubled {}; not answered {}",
        told.acknowledged.len(),
        ledger.taken(),
        ledger.doubled(),
        told.unanswered,
    );
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("queue_total_size") == 0.0
    });
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}

/// A database behind a link that is slow, and whose commits are, too.
struct Far {
    relay: Relay,
    database: TestDb,
}

impl Far {
    fn new(bytes_per_second: u32) -> Far {
        let database = cluster().database();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let relay = Relay::narrow(listener, database.port(), bytes_per_second);
        Far { relay, database }
    }

    fn setup(&self, destination: &Destination) -> Setup {
        let (near, far) = (self.database.port(), self.relay.port());
        let url = self.database.url();
        Setup::new(&destination.url())
            .set("server.enqueue_rate", 0)
            .set(
                "db.connection_string",
                url.replace(&near.to_string(), &far.to_string()),
            )
            .set("db.spool", "sqlite:spool.sqlite")
    }

    /// From now on each append takes so long after its rows are there.
    fn commit_slowly(&self, seconds: f64) {
        let sql = format!(
            "CREATE OR REPLACE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
             AS $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
             CREATE OR REPLACE TRIGGER wait AFTER INSERT ON proxy_requests
             FOR EACH STATEMENT EXECUTE FUNCTION wait()"
        );
        self.database.client().batch_execute(&sql).expect("trigger");
    }
}

/// Each append is over half a second late, in which its rows are delivered and deleted.
#[test]
fn what_is_committed_late_is_delivered_once_and_leaves_the_spool() {
    const BODIES: usize = 6;
    let destination = Destination::start();
    let far = Far::new(5_000_000);
    let setup = far.setup(&destination);
    let proxy = setup.start();
    proxy.wait_for_log("store is ready");
    far.commit_slowly(0.7);
    thread::scope(|scope| {
        for number in 0..BODIES {
            let proxy = &proxy;
            scope.spawn(move || {
                let id = format!("X-Id: {number}");
                let body = vec![b'x'; 4_000_000];
                let request = http::request("POST", "/large", &[&id], &body);
                assert_eq!(proxy.send(&request).status, 200);
            });
        }
    });
    destination.wait_for_numbers(BODIES, PATIENCE);
    metrics::assert_settled(&proxy, BODIES);
    wait_until("an empty spool", || rows(&proxy) == 0.0);
    let metrics = proxy.metrics();
    let spooled = metrics.get("asyncproxy_spooled_total");
    assert!(spooled > 0.0);
    assert_eq!(metrics.get("asyncproxy_spool_moved_total"), spooled);
    assert_eq!(metrics.get("asyncproxy_late_commits_total"), 0.0);
    let log = proxy.log();
    assert!(!log.contains("store does not work"), "{log}");
    proxy.stop();
    assert_eq!(destination.seen().len(), BODIES);
}

/// The server commits what it has; nobody hears of it.
#[test]
fn what_is_committed_after_its_connection_broke_does_not_come_back() {
    let destination = Destination::start();
    let far = Far::new(u32::MAX);
    let setup = far.setup(&destination);
    let proxy = setup.start();
    proxy.wait_for_log("store is ready");
    far.commit_slowly(2.0);
    // Answered after half a second, when the append is under way.
    proxy.accept(0..1);
    assert_eq!(rows(&proxy), 1.0);
    far.relay.cut();
    destination.wait_for_numbers(1, PATIENCE);
    metrics::assert_settled(&proxy, 1);
    wait_until("an empty spool", || rows(&proxy) == 0.0);
    assert_eq!(proxy.metrics().get("asyncproxy_spool_moved_total"), 1.0);
    proxy.stop();
    assert_eq!(destination.seen().len(), 1);
}
