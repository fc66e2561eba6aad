//! Several instances on one Postgres.

use std::time::{Duration, Instant};

use crate::support::destination::{Answer, Destination, Seen};
use crate::support::load::Ledger;
use crate::support::metrics;
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::cluster;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::store;

const ROWS: usize = 20_000;
const WORKERS: usize = 8;

/// As if so many requests had been stored some time ago.
pub const INSERT: &str = "
    INSERT INTO proxy_requests
           (id, received_at, next_attempt_at, attempt, method, target, headers, body)
    SELECT gen_random_uuid(), now(), now(), 0, 'POST', '/hook',
           convert_to('X-Id: ' || number || E'\\r\\n', 'UTF8'), 'body'
      FROM generate_series(0, $1::bigint - 1) AS number";

/// Each row is sent once by whichever claims it; those of one that is killed come twice at most,
/// and none is forgotten.
#[test]
fn three_instances_behind_pgbouncer_share_the_queue_and_one_is_killed() {
    let ledger = Ledger::default();
    let destination = Destination::answering({
        let ledger = ledger.clone();
        move |seen| {
            ledger.take(seen.number());
            Answer::ok()
        }
    });
    let database = cluster().database();
    let bouncer = Pgbouncer::start(&database);
    let setups: Vec<_> = (0..3)
        .map(|_| {
            Setup::new(&destination.url())
                .set("db.connection_string", bouncer.url())
                .set("queue.workers", WORKERS)
                .set("proxy.request_timeout", "1s")
        })
        .collect();
    let mut proxies: Vec<Proxy> = setups.iter().map(Setup::start).collect();
    for proxy in &proxies {
        proxy.wait_for_store();
    }
    let mut client = database.client();
    let inserted = client.execute(INSERT, &[&(ROWS as i64)]).expect(INSERT);
    assert_eq!(inserted, ROWS as u64);
    wait_until("a quarter", || ledger.taken() > ROWS / 4);
    let claims = |proxy: &Proxy| proxy.metrics().get("asyncproxy_delivered_total");
    wait_until("all to take part", || {
        proxies.iter().all(|proxy| claims(proxy) > 0.0)
    });
    assert_eq!(ledger.doubled(), 0);
    let mut killed = proxies.remove(0);
    killed.kill9();
    killed.wait();
    let mut rows = || {
        let row = client.query_one("SELECT count(*) FROM proxy_requests", &[]);
        row.expect("count").get::<_, i64>(0)
    };
    let left = rows();
    wait_until("all rows", || ledger.taken() == ROWS);
    for proxy in &proxies {
        metrics::wait_for(proxy, "an empty queue", |metrics| {
            metrics.get("queue_total_size") == 0.0
        });
    }
    eprintln!(
        "{ROWS} rows, one of three instances killed with {left} left: delivered {}, lost 0, doubled {}",
        ledger.taken(),
        ledger.doubled(),
    );
    assert!(left > 0, "killed too late");
    // What the killed one had claimed: the room of its workers, and what was being settled.
    assert!(
        ledger.doubled() <= 2 * WORKERS + 1000,
        "{}",
        ledger.doubled()
    );
    let stale = proxies
        .iter()
        .map(|proxy| proxy.metrics().get("asyncproxy_stale_settlements_total"));
    assert_eq!(stale.sum::<f64>(), 0.0);
    for proxy in proxies {
        proxy.stop();
    }
    assert_eq!(rows(), 0);
}

/// Far below the lease, which is that of `proxy.request_timeout` and 30 s.
const TAKE_OVER_MAX: Duration = Duration::from_secs(40);
const LONG: &str = "300s";

/// Stored by instances of their own, and sent by those.
fn instance(destination: &Destination, url: &str) -> Setup {
    Setup::new(&destination.url())
        .set("db.connection_string", url)
        .set("proxy.request_timeout", LONG)
        .set("server.enqueue_rate", 0)
}

fn times(seen: &[std::sync::Arc<Seen>], number: usize) -> usize {
    seen.iter().filter(|seen| seen.number() == number).count()
}

#[test]
fn what_the_only_instance_had_when_it_was_killed_is_soon_sent_by_the_next() {
    const SENT: usize = 40;
    for is_pooled in [false, true] {
        let destination = Destination::answering(|_| Answer::hang());
        let database = cluster().database();
        let bouncer = is_pooled.then(|| Pgbouncer::start(&database));
        let url = bouncer.as_ref().map_or(database.url(), Pgbouncer::url);
        let setup = instance(&destination, &url).set("queue.workers", WORKERS);
        let mut proxy = setup.start();
        proxy.accept(0..SENT);
        destination.wait_until(PATIENCE, "all workers at work", |seen| {
            seen.len() == WORKERS
        });
        // What is in flight, and more that wait for these workers.
        metrics::wait_for(&proxy, "leases", |metrics| {
            metrics.rows("leased") > WORKERS as f64
        });
        let in_flight: Vec<_> = destination
            .seen()
            .iter()
            .map(|seen| seen.number())
            .collect();
        proxy.kill9();
        proxy.wait();
        let killed = Instant::now();
        destination.answer(|_| Answer::ok());
        let proxy = setup.start();
        destination.wait_until(PATIENCE, "all that was stored", |seen| {
            (0..SENT).all(|number| times(seen, number) > usize::from(in_flight.contains(&number)))
        });
        let took = killed.elapsed();
        eprintln!(
            "{SENT} stored, {} in flight: all sent {took:?} after the kill",
            in_flight.len()
        );
        assert!(took < TAKE_OVER_MAX, "{took:?}");
        metrics::wait_for(&proxy, "an empty queue", |metrics| {
            metrics.get("queue_total_size") == 0.0
        });
        for number in 0..SENT {
            let expected = 1 + usize::from(in_flight.contains(&number));
            assert_eq!(times(&destination.seen(), number), expected, "{number}");
        }
        proxy.stop();
        // The dead one's name may be kept for a while.
        let known = "SELECT count(*) FROM proxy_instances
                      WHERE last_seen > now() - interval '5 seconds'";
        let row = database.client().query_one(known, &[]).expect(known);
        assert_eq!(row.get::<_, i64>(0), 0, "the last one has left");
    }
}

#[test]
fn an_instance_that_comes_back_from_a_freeze_settles_nothing_that_was_taken_over() {
    const SENT: usize = 6;
    // Answers the first attempts when the other instance has made the second ones.
    let destination = Destination::answering(|seen| match seen.attempt() {
        1 => Answer::ok().delay(Duration::from_secs(14)),
        _ => Answer::status(503),
    });
    let database = cluster().database();
    let setups = [(); 2].map(|()| {
        instance(&destination, &database.url())
            .set("queue.backoff_min", "300s")
            .set("queue.backoff_max", "300s")
    });
    let frozen = setups[0].start();
    frozen.accept(0..SENT);
    destination.wait_until(PATIENCE, "the first attempts", |seen| seen.len() == SENT);
    let other = setups[1].start();
    other.wait_for_log("store is ready");
    frozen.freeze();
    destination.wait_until(2 * PATIENCE, "the second attempts", |seen| {
        seen.len() == 2 * SENT
    });
    metrics::wait_for(&other, "them to be put off", |metrics| {
        metrics.rows("leased") == 0.0
    });
    frozen.thaw();
    // It finds its answers, and takes them for deliveries of its own.
    metrics::wait_for(&frozen, "its settlements", |metrics| {
        metrics.get("asyncproxy_stale_settlements_total") == SENT as f64
    });
    assert_eq!(frozen.metrics().get("asyncproxy_delivered_total"), 0.0);
    assert_eq!(store::rows(&setups[0]), SENT as i64);
    frozen.stop();
    other.stop();
}

/// Idle, paused, or with nowhere to send to: it is there.
#[test]
fn an_instance_is_heard_of_whatever_it_does() {
    let destination = Destination::answering(|_| Answer::hang());
    let database = cluster().database();
    let setup = instance(&destination, &database.url()).set("queue.workers", 1);
    let proxy = setup.start();
    proxy.accept(0..1);
    destination.wait_until(PATIENCE, "the attempt", |seen| seen.len() == 1);
    let other = instance(&destination, &database.url()).start();
    other.wait_for_log("store is ready");
    store::execute(&setup, "INSERT INTO proxy_pause DEFAULT VALUES");
    let mut client = database.client();
    let mut beats = std::collections::HashSet::new();
    // More than ten seconds of them, from each of the two.
    wait_until("beats", || {
        let seen = "SELECT id::text || last_seen::text FROM proxy_instances";
        for row in client.query(seen, &[]).expect(seen) {
            beats.insert(row.get::<_, String>(0));
        }
        beats.len() > 2 * 14
    });
    store::execute(&setup, "DELETE FROM proxy_pause");
    assert_eq!(store::leased(&setup), 1);
    assert_eq!(
        destination.seen().len(),
        1,
        "sent once, though its lease is long"
    );
    other.stop();
    proxy.kill9();
}
