//! The loss contract: `kill -9` at any moment, over and over, and every request counted one by
//! one at the destination.
//!
//! The moments are drawn from a seed that is printed; `ASYNCPROXY_TEST_SEED` sets another.

use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::process::Signal;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::load::{Ledger, Load};
use crate::support::metrics;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Setup};
use crate::support::route::{Route, on_routes};
use crate::support::store;

const ROUNDS: usize = 24;
const SENDERS: usize = 8;
/// Requests that the program may hold in memory only: one for each worker and for each place in
/// the channel.
const IN_MEMORY_MAX: usize = 2 * 8;

pub fn rng(what: &str) -> Rng {
    let seed = std::env::var("ASYNCPROXY_TEST_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(1);
    eprintln!("{what}: ASYNCPROXY_TEST_SEED={seed}");
    Rng::with_seed(seed)
}

/// A destination that takes some time, and fails now and then, so that there are rows and
/// attempts of all ages.
fn moody(ledger: &Ledger) -> Destination {
    let ledger = ledger.clone();
    Destination::answering(move |seen| match fastrand::u8(0..20) {
        0 => Answer::status(500),
        mood => {
            ledger.take(seen.number());
            Answer::ok().delay(Duration::from_millis(u64::from(mood) / 4))
        }
    })
}

/// Starts and kills the program, at any moment from its first instruction on. In every other
/// round all requests are stored before they are answered.
fn kill_again_and_again(mut setup: Setup, load: &Load, rng: &mut Rng) -> Setup {
    for round in 0..ROUNDS {
        let is_stored = round % 2 == 0;
        setup = setup.set("server.enqueue_rate", if is_stored { 0 } else { 1_000_000 });
        if round % 6 == 5 {
            // Somewhere in its start.
            let process = Process::spawn(&mut setup.command());
            thread::sleep(Duration::from_micros(rng.u64(0..40_000)));
            process.signal(Signal::KILL);
            continue;
        }
        let proxy = setup.start();
        load.send_to(proxy.intake, round);
        thread::sleep(Duration::from_millis(rng.u64(1..400)));
        proxy.kill9();
    }
    setup
}

fn a_program_killed_at_any_moment(route: Route, ack: &str) {
    let ledger = Ledger::default();
    let destination = moody(&ledger);
    let what = format!("{route:?}, ack: {ack}");
    let mut rng = rng(&what);
    let setup = route
        .to(&destination)
        .set("server.ack", ack)
        .set("proxy.request_timeout", "1s")
        .set("proxy.breaker_failures", 10);
    let load = Load::start(SENDERS, Duration::ZERO);
    let setup = kill_again_and_again(setup, &load, &mut rng);
    // The last one is left alone, and delivers what all before it have stored.
    let proxy = setup.start();
    load.send_to(proxy.intake, ROUNDS);
    thread::sleep(Duration::from_millis(100));
    let told = load.stop();
    let may_be_lost = |round: usize| ack == "received" && round % 2 == 1;
    // Rows that were leased come back when the lease is over, half a minute or so later.
    let deadline = Instant::now() + 2 * PATIENCE;
    while Instant::now() < deadline
        && ledger
            .missing(&told)
            .iter()
            .any(|(_, round)| !may_be_lost(*round))
    {
        thread::sleep(Duration::from_millis(50));
    }
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("asyncproxy_store_up") == 1.0
            && metrics.get("queue_total_size") == 0.0
            && metrics.get("asyncproxy_in_flight") == 0.0
    });
    let lost = ledger.missing(&told);
    eprintln!(
        "{what}: {ROUNDS} kills, acked {}, delivered {}, lost {}, doubled {}; not answered {}",
        told.acknowledged.len(),
        ledger.taken(),
        lost.len(),
        ledger.doubled(),
        told.unanswered,
    );
    assert!(told.acknowledged.len() > 500, "{}", told.acknowledged.len());
    for round in 0..=ROUNDS {
        let of_round = lost.iter().filter(|(_, other)| *other == round).count();
        let limit = if may_be_lost(round) { IN_MEMORY_MAX } else { 0 };
        assert!(of_round <= limit, "{of_round} lost in round {round}");
    }
    assert_eq!(store::dead(&setup), []);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}

fn killed_with_received(route: Route) {
    a_program_killed_at_any_moment(route, "received");
}
on_routes!(killed_with_received: sqlite Sqlite, postgres Postgres);

fn killed_with_stored(route: Route) {
    a_program_killed_at_any_moment(route, "stored");
}
on_routes!(killed_with_stored: sqlite Sqlite, postgres Postgres);

/// A new store each time, so that most are killed while they create it.
fn killed_while_the_schema_is_created(route: Route) {
    let mut rng = rng(&format!("{route:?}, new stores"));
    for _ in 0..20 {
        let destination = Destination::start();
        let setup = route.to(&destination);
        let process = Process::spawn(&mut setup.command());
        thread::sleep(Duration::from_micros(rng.u64(0..60_000)));
        process.signal(Signal::KILL);
        drop(process);
        let proxy = setup.start();
        for number in 0..3 {
            assert_eq!(proxy.send(&http::numbered(number)).status, 200);
        }
        destination.wait_for_numbers(3, PATIENCE);
        metrics::assert_settled(&proxy, 3);
        proxy.stop();
        assert_eq!(destination.seen().len(), 3);
    }
}
on_routes!(killed_while_the_schema_is_created: sqlite Sqlite, postgres Postgres);
