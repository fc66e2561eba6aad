//! Several instances on one Postgres.

use crate::support::destination::{Answer, Destination};
use crate::support::load::Ledger;
use crate::support::metrics;
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::cluster;
use crate::support::proxy::{Proxy, Setup, wait_until};

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
