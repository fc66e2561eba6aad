//! Good and bad requests in one queue, in simulated time: the rules that decide what is sent (token
//! bucket, shares of the classes, breaker, probes, backoff) on a model of store, workers and
//! destination. However the two are mixed, the good ones get half of the rate at least.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use asyncproxy::breaker::{Breaker, Era, Pace, Permit};
use asyncproxy::limiter::TokenBucket;
use asyncproxy::queue::probes::Probes;
use asyncproxy::queue::shares::{Got, Shares};
use asyncproxy::queue::{Class, PROBE_ROWS_MAX, Spot};
use asyncproxy::settle::{Outcome, RetryPolicy, Verdict};
use uuid::Uuid;

const RATE: u32 = 30;
const FAILURES: u32 = 10;
/// As often as the poller claims: as soon as there is a token.
const TICK: Duration = Duration::from_millis(34);
/// For what a breaker that opens, and what it takes to find a good request, cost once.
const SLACK: Duration = Duration::from_secs(12);
const PATIENCE: Duration = Duration::from_secs(3600);
/// Destinations that answer everything, and those that are sent something bad.
const GOOD: Bad = Bad::Status(200);
const BAD: [Bad; 7] = [
    Bad::Status(400),
    Bad::Status(429),
    Bad::Status(500),
    Bad::Status(503),
    Bad::Timeout,
    Bad::Reset,
    Bad::Any,
];

/// How requests of one kind end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bad {
    Status(u16),
    Timeout,
    Reset,
    /// Each attempt in another way.
    Any,
}

impl Bad {
    /// What becomes of an attempt, and how long that takes.
    fn attempt(self, random: &mut fastrand::Rng) -> (Outcome, Duration) {
        let soon = Duration::from_millis(20);
        match self {
            Bad::Status(status) => (
                Outcome::Answered {
                    status,
                    retry_after: None,
                },
                soon,
            ),
            Bad::Timeout => (
                Outcome::Unanswered("timeout".into()),
                Duration::from_secs(1),
            ),
            Bad::Reset => (Outcome::Unanswered("connection reset".into()), soon),
            Bad::Any => BAD[random.usize(..BAD.len() - 1)].attempt(random),
        }
    }
}

/// A row that waits, by when it is due and which it is.
type Key = (Instant, usize);

struct Attempt {
    row: usize,
    era: Era,
    outcome: Outcome,
    ends_at: Instant,
}

/// Everything but the rules.
struct Model {
    rows: Vec<Bad>,
    attempts: Vec<u32>,
    fresh: BTreeMap<Key, ()>,
    retried: BTreeMap<Key, ()>,
    under_way: Vec<Attempt>,
    random: fastrand::Rng,
    now: Instant,
    delivered: Vec<Duration>,
}

impl Model {
    fn new(rows: &[Bad], every: Duration) -> Model {
        let now = Instant::now();
        let count = u32::try_from(rows.len()).unwrap();
        // A backlog, if they do not come one by one.
        let due = |row: usize| {
            let row = u32::try_from(row).unwrap();
            if every.is_zero() {
                now - Duration::from_millis(10) * (count - row)
            } else {
                now + every * row
            }
        };
        Model {
            rows: rows.to_vec(),
            attempts: vec![0; rows.len()],
            fresh: (0..rows.len()).map(|row| ((due(row), row), ())).collect(),
            retried: BTreeMap::new(),
            under_way: Vec::new(),
            random: fastrand::Rng::with_seed(1),
            now,
            delivered: Vec::new(),
        }
    }

    fn waiting(&mut self, class: Class) -> &mut BTreeMap<Key, ()> {
        match class {
            Class::Fresh => &mut self.fresh,
            Class::Retried => &mut self.retried,
        }
    }

    fn claim(&mut self, class: Class, limit: usize) -> Vec<usize> {
        let until = (self.now, usize::MAX);
        let due = self.waiting(class).range(..=until);
        let keys: Vec<Key> = due.take(limit).map(|(key, ())| *key).collect();
        self.lease(class, &keys)
    }

    /// As `Store::claim_probes` has it.
    fn claim_probes(
        &mut self,
        class: Class,
        spot: Spot,
        limit: usize,
        except: &[Uuid],
    ) -> Vec<usize> {
        let until = (self.now, usize::MAX);
        let due = self.waiting(class).range(..=until).map(|(key, ())| *key);
        let window = PROBE_ROWS_MAX + except.len();
        let mut keys: Vec<Key> = match spot {
            Spot::Front => due.take(window).collect(),
            Spot::End => due.rev().take(window).collect(),
            Spot::Anywhere => {
                let mut keys: Vec<Key> = due.collect();
                self.random.shuffle(&mut keys);
                keys
            }
        };
        keys.retain(|(_, row)| !except.contains(&id(*row)));
        keys.sort_by_key(|(_, row)| self.attempts[*row]);
        keys.truncate(limit);
        self.lease(class, &keys)
    }

    fn lease(&mut self, class: Class, keys: &[Key]) -> Vec<usize> {
        for key in keys {
            self.waiting(class).remove(key);
        }
        keys.iter().map(|(_, row)| *row).collect()
    }

    fn wait(&mut self, row: usize, after: Duration) {
        let key = (self.now + after, row);
        let class = Class::of(self.attempts[row] + 1);
        self.waiting(class).insert(key, ());
    }

    fn send(&mut self, breaker: &mut Breaker, row: usize) {
        match breaker.permit(self.now) {
            Permit::Denied(_) => self.wait(row, Duration::ZERO),
            Permit::Granted(era) => {
                self.attempts[row] += 1;
                let (outcome, takes) = self.rows[row].attempt(&mut self.random);
                self.under_way.push(Attempt {
                    row,
                    era,
                    outcome,
                    ends_at: self.now + takes,
                });
            }
        }
    }

    fn settle(&mut self, breaker: &mut Breaker, policy: &RetryPolicy, started: Instant) {
        let now = self.now;
        let (over, under_way) = std::mem::take(&mut self.under_way)
            .into_iter()
            .partition(|attempt: &Attempt| attempt.ends_at <= now);
        self.under_way = under_way;
        for Attempt {
            row, era, outcome, ..
        } in over
        {
            breaker.note(era, id(row), &outcome, now);
            let jitter = self.random.f64();
            let attempt = self.attempts[row];
            match policy.decide(outcome, attempt, Duration::ZERO, jitter) {
                Verdict::Delivered => self.delivered.push(now - started),
                Verdict::Later { after, .. } => self.wait(row, after),
                Verdict::Bury(_) => {}
            }
        }
    }
}

fn id(row: usize) -> Uuid {
    Uuid::from_u128(row as u128)
}

fn policy() -> RetryPolicy {
    RetryPolicy {
        max_retries: 1000,
        backoff_min: Duration::from_secs(1),
        backoff_max: Duration::from_secs(10),
        max_age: None,
        give_up_statuses: Vec::new(),
    }
}

fn rate(pace: Pace) -> u32 {
    match pace {
        Pace::Full => RATE,
        Pace::Share(share) | Pace::Sample(share) => {
            let is_within = |rate: &u32| f64::from(*rate) <= f64::from(RATE) * share;
            (1..=RATE).rev().find(is_within).unwrap_or(1)
        }
        Pace::Probe(_) | Pace::Stopped(_) => 1,
    }
}

/// When each of the good ones was delivered.
fn run(rows: &[Bad], every: Duration) -> Vec<Duration> {
    let mut model = Model::new(rows, every);
    let good = rows.iter().filter(|row| **row == GOOD).count();
    let (started, policy) = (model.now, policy());
    let mut breaker = Breaker::new(FAILURES);
    let mut bucket = TokenBucket::new(RATE, started);
    let (mut shares, mut probes) = (Shares::default(), Probes::default());
    while model.delivered.len() < good {
        let now = model.now;
        assert!(
            now - started < PATIENCE,
            "{} of {good}",
            model.delivered.len()
        );
        model.settle(&mut breaker, &policy, started);
        let pace = breaker.pace(now);
        bucket.set_rate(rate(pace), now);
        let tokens = bucket.available(now) as usize;
        let mut claimed = Vec::new();
        match pace {
            Pace::Full | Pace::Share(_) => {
                probes.forget();
                while tokens > claimed.len() {
                    let before = claimed.len();
                    shares.claim(tokens - before, usize::MAX, |class, limit| {
                        let rows = model.claim(class, limit);
                        let first = rows.iter().filter(|row| model.attempts[**row] == 0).count();
                        claimed.extend(&rows);
                        Got {
                            rows: rows.len(),
                            first,
                            ..Got::default()
                        }
                    });
                    if claimed.len() == before {
                        break;
                    }
                }
            }
            Pace::Probe(_) | Pace::Sample(_) => {
                let limit = match pace {
                    Pace::Probe(probes) => probes as usize,
                    _ => tokens,
                };
                probes.claim(limit, |class, spot, limit, except| {
                    let rows = model.claim_probes(class, spot, limit, except);
                    claimed.extend(&rows);
                    Some(rows.into_iter().map(id).collect())
                });
            }
            Pace::Stopped(_) => {}
        }
        bucket.take(u32::try_from(claimed.len().min(tokens)).unwrap());
        for row in claimed {
            model.send(&mut breaker, row);
        }
        model.now += TICK;
    }
    model.delivered
}

/// Each of the good ones is there after twice the time that it takes if all are good.
fn assert_half_of_the_rate(rows: &[Bad], every: Duration, what: &str) {
    let all_good: Vec<Bad> = vec![GOOD; rows.len()];
    let undisturbed = run(&all_good, every);
    let places = rows.iter().enumerate().filter(|(_, row)| **row == GOOD);
    let alone: Vec<Duration> = places.map(|(place, _)| undisturbed[place]).collect();
    let mixed = run(rows, every);
    for (number, (mixed, alone)) in mixed.iter().zip(&alone).enumerate() {
        assert!(
            *mixed <= 2 * *alone + SLACK,
            "{what}: good one {number} after {mixed:?} instead of {alone:?}"
        );
    }
}

/// So many rows, of which `tenths` of ten are good, in an order.
fn mixture(order: Order, tenths: usize, bad: Bad, random: &mut fastrand::Rng) -> Vec<Bad> {
    const ROWS: usize = 1200;
    let good = ROWS * tenths / 10;
    let mut rows = vec![bad; ROWS - good];
    match order {
        Order::Random => {
            rows.extend(vec![GOOD; good]);
            random.shuffle(&mut rows);
        }
        Order::BadFirst => rows.extend(vec![GOOD; good]),
        Order::BadAround => {
            let middle = rows.len() / 2;
            rows.splice(middle..middle, vec![GOOD; good]);
        }
        // A burst of bad ones, and what is left of them mixed with the good.
        Order::Burst(burst) => {
            let burst = burst.min(rows.len());
            let mut rest = rows.split_off(burst);
            rest.extend(vec![GOOD; good]);
            random.shuffle(&mut rest);
            rows.extend(rest);
        }
    }
    rows
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Random,
    BadFirst,
    BadAround,
    Burst(usize),
}

fn assert_all_mixtures(orders: &[Order], every: Duration) {
    for bad in BAD {
        for order in orders {
            for tenths in 1..=9 {
                let mut random = fastrand::Rng::with_seed(tenths as u64);
                let rows = mixture(*order, tenths, bad, &mut random);
                let what = format!("{bad:?} {order:?}, {tenths} of 10 good");
                assert_half_of_the_rate(&rows, every, &what);
            }
        }
    }
}

#[test]
fn no_backlog_of_good_and_bad_requests_brings_the_good_below_half_of_the_rate() {
    let orders = [
        Order::Random,
        Order::BadFirst,
        Order::BadAround,
        Order::Burst(60),
        Order::Burst(300),
    ];
    assert_all_mixtures(&orders, Duration::ZERO);
}

/// As many come as may be sent, so that all that is tried again is too much.
#[test]
fn no_stream_of_good_and_bad_requests_brings_the_good_below_half_of_the_rate() {
    let orders = [Order::Random, Order::Burst(60), Order::Burst(300)];
    assert_all_mixtures(&orders, Duration::from_secs(1) / RATE);
}
