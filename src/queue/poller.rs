//! Claims due rows and hands them to the queue workers. Never sends them.
//!
//! Claims as many as the token bucket, the workers' room and the lease allow. An empty queue is
//! looked at with a growing pause; a row stored by this process wakes the poller at once.
//!
//! Beside it the sampler, which counts rows and deletes dead letters that are old enough.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::health::StoreHealth;
use super::probes::Probes;
use super::shares::{Got, Looked, Shares};
use super::{BATCH_ROWS_MAX, ByClass, Claim, Class, Probe, Store, StoreError};
use crate::breaker::{Destination, Pace};
use crate::budget::Budget;
use crate::clock::Clock;
use crate::limiter::TokenBucket;
use crate::logger::LogLimit;
use crate::metrics::Metrics;
use crate::progress::Stage;
use crate::worker::Delivery;

/// Pauses between looks at an empty queue, or at a store that does not work.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How soon retried rows are looked for again when there were none.
const RETRIED_PAUSE: Duration = Duration::from_millis(100);

/// What a lease has beyond `proxy.request_timeout`: half of it for waiting until a worker is
/// free, the rest for settling.
const LEASE_MARGIN: Duration = Duration::from_secs(30);

/// How long a row is leased, and until when it may be sent if the lease begins now.
pub fn lease(request_timeout: Duration) -> (Duration, Instant) {
    let send_until = Instant::now() + LEASE_MARGIN / 2;
    (request_timeout + LEASE_MARGIN, send_until)
}

/// How often it is asked for how many rows there are, if that costs little, and for a pause.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// Between two purges: as long as dead letters are kept, within these bounds.
const PURGE_INTERVAL_MIN: Duration = Duration::from_secs(1);
const PURGE_INTERVAL_MAX: Duration = Duration::from_secs(10 * 60);
/// Between the batches of a purge, at least: others write meanwhile.
const PURGE_PAUSE: Duration = Duration::from_millis(100);
/// After one that failed.
const PURGE_PAUSE_FAILED: Duration = Duration::from_secs(60);
/// Between looks whether the store works again.
const PURGE_PAUSE_DOWN: Duration = Duration::from_secs(1);

static NOT_COUNTED: LogLimit = LogLimit::new();
static NOT_PURGED: LogLimit = LogLimit::new();

/// Tells the poller that there may be something to claim.
#[derive(Debug, Clone)]
pub struct Wake(Sender<()>);

impl Wake {
    /// A wake, and where its calls arrive.
    pub fn new() -> (Wake, Receiver<()>) {
        let (sender, receiver) = bounded(1);
        (Wake(sender), receiver)
    }

    pub fn wake(&self) {
        // Full: it has been told already.
        let _ = self.0.try_send(());
    }
}

/// Workers that take no rows but fresh ones, of so many in all: however long the destination takes
/// for those that fail again and again, others get through.
pub fn reserved(workers: usize) -> usize {
    (workers / 4).max(1).min(workers - 1)
}

/// Counts the rows claimed and not yet through with: bounds how many more are claimed.
#[derive(Debug)]
pub struct Room {
    all: Count,
    /// Those among them that are not fresh.
    retried: Count,
    wake: Wake,
}

#[derive(Debug)]
struct Count {
    claimed: AtomicUsize,
    limit: usize,
}

impl Count {
    fn new(limit: usize) -> Count {
        Count {
            claimed: AtomicUsize::new(0),
            limit,
        }
    }

    fn claimed(&self) -> usize {
        self.claimed.load(Ordering::Acquire)
    }

    /// How many rows fit; 0 until a fair batch does, so that claims stay large under load.
    fn available(&self) -> usize {
        let free = self.limit.saturating_sub(self.claimed());
        if free >= self.batch_min() { free } else { 0 }
    }

    fn batch_min(&self) -> usize {
        (self.limit / 4).max(1)
    }

    fn enter(&self) {
        self.claimed.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether a batch fits now, for the first time.
    fn leave(&self) -> bool {
        let claimed = self.claimed.fetch_sub(1, Ordering::AcqRel) - 1;
        claimed == self.limit.saturating_sub(self.batch_min())
    }
}

impl Room {
    /// Room for each worker's row and for one more each, so that no worker waits for a claim.
    pub fn new(workers: usize, wake: Wake) -> Room {
        Room {
            all: Count::new(2 * workers),
            retried: Count::new(2 * (workers - reserved(workers))),
            wake,
        }
    }

    /// Rows claimed that nobody is through with.
    pub fn claimed(&self) -> usize {
        self.all.claimed()
    }

    fn enter(&self, class: Class) {
        self.all.enter();
        if class == Class::Retried {
            self.retried.enter();
        }
    }

    /// A worker is through with a row.
    pub fn leave(&self, class: Class) {
        let has_room = class == Class::Retried && self.retried.leave();
        if self.all.leave() || has_room {
            self.wake.wake();
        }
    }
}

/// The claiming thread.
#[derive(Debug)]
pub struct Poller {
    pub store: Arc<dyn Store>,
    pub health: Arc<StoreHealth>,
    pub metrics: Arc<Metrics>,
    pub budget: Arc<Budget>,
    pub room: Arc<Room>,
    pub destination: Arc<Destination>,
    /// At work while the store is asked.
    pub stage: Arc<Stage>,
    pub per_second: Arc<AtomicU32>,
    pub request_timeout: Duration,
    pub woken: Receiver<()>,
    /// Closed to make the poller stop claiming.
    pub stop: Receiver<()>,
    pub deliveries: ByClass<Sender<Delivery>>,
}

/// What the poller remembers from one look into the store to the next.
#[derive(Debug)]
struct Memory {
    shares: Shares,
    probes: Probes,
    /// When retried rows are worth looking for again.
    retried_at: Instant,
}

impl Poller {
    /// Runs until `stop` is closed.
    pub fn run(self) {
        let mut bucket = TokenBucket::new(self.per_second.load(Ordering::Relaxed), Instant::now());
        let mut pause = PAUSE_MIN;
        let mut not_before = Instant::now();
        let mut memory = Memory {
            shares: Shares::default(),
            probes: Probes::default(),
            retried_at: not_before,
        };
        loop {
            let pace = self.destination.pace();
            let limit = if Instant::now() < not_before {
                // A row stored meanwhile does not change that others have taken the tokens.
                0
            } else {
                self.limit(pace, &mut bucket)
            };
            // While the store does not work, nobody but this tells when it works again.
            let looked = if limit > 0 || self.health.fault().is_some() {
                let _work = self.stage.work();
                self.look(pace, limit, &mut memory)
            } else {
                Looked::default()
            };
            // At most one second's worth, which fits into u32; but for probes, which are few.
            let claimed = u32::try_from(looked.claimed).unwrap_or(u32::MAX);
            let available = bucket.available(Instant::now());
            bucket.take(claimed.min(available));
            if let Some(held_back) = looked.held_back {
                pause = PAUSE_MIN;
                not_before = Instant::now() + held_back;
            }
            let held_back = not_before.saturating_duration_since(Instant::now());
            let wait = if !held_back.is_zero() {
                held_back
            } else if limit == 0 {
                // For room a worker wakes us; for a token nobody does.
                self.wait(pace, &mut bucket)
            } else if looked.is_more {
                pause = PAUSE_MIN;
                Duration::ZERO
            } else {
                pause = if looked.claimed == 0 {
                    (pause * 2).min(PAUSE_MAX)
                } else {
                    PAUSE_MIN
                };
                pause
            };
            if self.is_stopped(wait, &mut pause) {
                return;
            }
        }
    }

    /// How many rows may be claimed now.
    fn limit(&self, pace: Pace, bucket: &mut TokenBucket) -> usize {
        let now = Instant::now();
        bucket.set_rate(self.rate(pace), now);
        match (pace, self.bytes_max()) {
            // The probes are on their way.
            (Pace::Probe(_), _) if self.has_unstarted() => 0,
            (Pace::Probe(probes), _) => {
                let per_second = self.per_second.load(Ordering::Relaxed).max(1);
                // All that wait for a worker are gone, so that there is room for these.
                self.room.retried.limit.min(probes.min(per_second) as usize)
            }
            // What will make room is on its way.
            (_, 0) if self.room.claimed() > 0 => 0,
            (Pace::Stopped(_), _) => 0,
            (Pace::Full | Pace::Share(_) | Pace::Sample(_), _) => {
                let tokens = bucket.available(now) as usize;
                self.room.all.available().min(tokens).min(BATCH_ROWS_MAX)
            }
        }
    }

    /// Whether rows wait for a worker.
    fn has_unstarted(&self) -> bool {
        let ByClass { fresh, retried } = &self.deliveries;
        !fresh.is_empty() || !retried.is_empty()
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a u32"
    )]
    fn rate(&self, pace: Pace) -> u32 {
        let per_second = self.per_second.load(Ordering::Relaxed);
        match pace {
            Pace::Full => per_second,
            Pace::Share(share) | Pace::Sample(share) => {
                ((f64::from(per_second) * share) as u32).max(1)
            }
            Pace::Probe(_) | Pace::Stopped(_) => 1,
        }
    }

    /// Until a probe is due, or a twentieth of a second's tokens are there: 20 claims a second are
    /// enough.
    fn wait(&self, pace: Pace, bucket: &mut TokenBucket) -> Duration {
        let now = Instant::now();
        let wait = match pace {
            Pace::Stopped(until) => until.saturating_duration_since(now).max(PAUSE_MIN),
            _ => bucket.wait_for((self.rate(pace) / 20).max(1), now),
        };
        if wait.is_zero() {
            PAUSE_MAX
        } else {
            wait.min(PAUSE_MAX)
        }
    }

    /// Waits, unless woken; tells whether to stop.
    fn is_stopped(&self, wait: Duration, pause: &mut Duration) -> bool {
        if self.stop.try_recv() == Err(crossbeam_channel::TryRecvError::Disconnected) {
            return true;
        }
        if wait.is_zero() {
            return false;
        }
        crossbeam_channel::select! {
            recv(self.stop) -> _ => return true,
            recv(self.woken) -> _ => *pause = PAUSE_MIN,
            default(wait) => {}
        }
        false
    }

    /// Bytes that may be claimed at once: half of the memory is left to what comes in, and as
    /// much as is claimed is held twice while it is read.
    fn bytes_max(&self) -> usize {
        let left = (self.budget.limit_bytes() / 2).saturating_sub(self.budget.held_bytes());
        left.min(self.budget.batch_bytes_max())
    }

    /// Claims up to `limit` rows, as the pace wants them. A store that does not work is asked in any
    /// case.
    fn look(&self, pace: Pace, limit: usize, memory: &mut Memory) -> Looked {
        match pace {
            Pace::Full | Pace::Share(_) => {
                memory.probes.forget();
                self.claim_both(limit, memory)
            }
            Pace::Probe(_) | Pace::Sample(_) if limit > 0 => self.claim_probes(limit, memory),
            Pace::Probe(_) | Pace::Sample(_) | Pace::Stopped(_) => self.claim_both(limit, memory),
        }
    }

    /// Claims rows of both classes, of the retried ones not more than there are workers for, so
    /// that neither class keeps the other waiting.
    fn claim_both(&self, limit: usize, memory: &mut Memory) -> Looked {
        let retried_max = if Instant::now() < memory.retried_at {
            0
        } else {
            self.room.retried.available()
        };
        let looked = memory.shares.claim(limit, retried_max, |class, limit| {
            self.claim(class, limit).unwrap_or(Got {
                is_over: true,
                ..Got::default()
            })
        });
        if looked.no_retried {
            memory.retried_at = Instant::now() + RETRIED_PAUSE;
        }
        looked
    }

    fn claim(&self, class: Class, limit: usize) -> Option<Got> {
        // The lease begins no sooner than this.
        let (lease, send_until) = lease(self.request_timeout);
        let bytes_max = self.bytes_max();
        // Counted before it is there: as it is read, and as it then is.
        let _copies = self.budget.copying(2 * bytes_max);
        let result = self.store.claim(class, limit, bytes_max, lease);
        let claim = self.count(result)?;
        let bytes: usize = claim.rows.iter().map(|row| row.request.bytes()).sum();
        let got = Got {
            rows: claim.rows.len(),
            first: claim.rows.iter().filter(|row| row.attempt == 1).count(),
            // Where it was the bytes that ended it, not the rows, half of them are mostly there.
            is_cut_short: !claim.rows.is_empty() && bytes > bytes_max / 2,
            held_back: claim.held_back,
            is_over: false,
        };
        self.hand_over(class, claim, send_until);
        Some(got)
    }

    /// Claims rows that find out whether the destination works.
    fn claim_probes(&self, limit: usize, memory: &mut Memory) -> Looked {
        let mut looked = Looked::default();
        looked.claimed = memory.probes.claim(limit, |class, spot, limit, except| {
            let limit = match class {
                Class::Fresh => limit,
                Class::Retried => limit.min(self.room.retried.available()),
            };
            if looked.held_back.is_some() || limit == 0 {
                return None;
            }
            let (lease, send_until) = lease(self.request_timeout);
            let bytes_max = self.bytes_max();
            let _copies = self.budget.copying(2 * bytes_max);
            let wanted = Probe {
                class,
                spot,
                limit,
                bytes_max,
                except,
            };
            let result = self.store.claim_probes(&wanted, lease);
            let claim = self.count(result)?;
            looked.held_back = claim.held_back;
            let ids = claim.rows.iter().map(|row| row.request.id).collect();
            self.hand_over(class, claim, send_until);
            Some(ids)
        });
        looked
    }

    /// Counts what a claim brought; `None` if the store does not work.
    fn count(&self, result: Result<Claim, StoreError>) -> Option<Claim> {
        let claim = self.health.note("claim", result, &self.metrics).ok()?;
        self.health.depth.leave(claim.unreadable);
        self.metrics.unreadable.inc_by(claim.unreadable);
        let ids = claim.rows.iter().map(|row| row.request.id);
        self.health.doubts.seen(ids, &self.metrics);
        if !claim.rows.is_empty() {
            #[expect(clippy::cast_precision_loss, reason = "at most BATCH_ROWS_MAX")]
            self.metrics.batch_claim.observe(claim.rows.len() as f64);
        }
        Some(claim)
    }

    fn hand_over(&self, class: Class, claim: Claim, send_until: Instant) {
        for row in claim.rows {
            let permit = self.budget.holding(row.request.bytes());
            self.room.enter(class);
            let delivery = Delivery::claimed(row, permit, send_until);
            // The channel has room for all that `room` admits. With no worker left the row is
            // let go, and due again after its lease.
            if self.deliveries.of(class).send(delivery).is_err() {
                self.room.leave(class);
            }
        }
    }
}

/// Counts the rows now and then, so that no scrape has to, and deletes old dead letters.
#[derive(Debug)]
pub struct Sampler {
    pub store: Arc<dyn Store>,
    pub health: Arc<StoreHealth>,
    pub metrics: Arc<Metrics>,
    /// Told whether the queue is paused.
    pub destination: Arc<Destination>,
    /// Looked at each time.
    pub clock: Arc<Clock>,
    /// Dead letters are kept for ever without one.
    pub dead_retention: Arc<Mutex<Option<Duration>>>,
    pub stop: Receiver<()>,
}

impl Sampler {
    /// Runs until `stop` is closed.
    pub fn run(self) {
        let mut sample_at = Instant::now();
        let mut took = Duration::ZERO;
        let mut look_at = sample_at;
        let mut purge: Option<Purge> = None;
        loop {
            self.follow(&mut purge);
            let purge_at = purge.as_ref().map(|purge| purge.at);
            let next = sample_at.min(look_at);
            let next = purge_at.map_or(next, |at| at.min(next));
            if self.stop.recv_deadline(next) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            let now = Instant::now();
            // Before the count, which so shows what is left.
            if let Some(purge) = purge.as_mut().filter(|purge| purge.at <= now) {
                self.purge(purge);
            }
            if sample_at <= now {
                let before = std::mem::replace(&mut took, self.sample());
                sample_at = Instant::now() + pause_after(took.min(before));
                look_at = Instant::now() + LOOK_PAUSE;
            } else if look_at <= now {
                self.look();
                look_at = Instant::now() + LOOK_PAUSE;
            }
        }
        if let Some(mut purge) = purge {
            purge.report();
        }
    }

    /// Purges as the settings are now.
    fn follow(&self, purge: &mut Option<Purge>) {
        let retention = self.dead_retention.lock();
        let retention = *retention.unwrap_or_else(PoisonError::into_inner);
        if purge.as_ref().map(|purge| purge.older_than) != retention {
            if let Some(mut purge) = purge.take() {
                purge.report();
            }
            *purge = retention.map(Purge::new);
        }
    }

    /// Counts the rows, and tells how long that took.
    fn sample(&self) -> Duration {
        let started = Instant::now();
        if let Some(jump) = self.clock.look() {
            let how = jump.describe();
            log::warn!("the system's clock was {how}: pauses and leases go on as they were");
        }
        // A store that does not work is for the poller to try.
        if self.health.fault().is_none() {
            match self.store.sample() {
                Ok(sample) => {
                    let rows = sample.waiting + sample.leased;
                    self.health.depth.counted(rows);
                    self.metrics.sampled(&sample);
                    self.destination.set_paused(sample.is_paused);
                }
                // Found where nobody may ask for anything else.
                Err(error @ StoreError::Damaged(_)) => {
                    let _ = self.health.note::<()>("count", Err(error), &self.metrics);
                }
                // A count that takes too long does not mean that nothing else works.
                Err(error) => {
                    self.metrics.store_errors.inc();
                    if let Some(suppressed) = NOT_COUNTED.allow() {
                        log::warn!(error:%, suppressed; "rows cannot be counted, queue metrics are old");
                    }
                }
            }
        }
        // One that found the store down took none of its time.
        match self.health.fault() {
            Some(_) => Duration::ZERO,
            None => started.elapsed(),
        }
    }

    /// Follows a pause while no count is due: those of a long queue are far apart.
    fn look(&self) {
        if self.health.fault().is_none()
            && let Ok(is_paused) = self.store.is_paused()
        {
            self.destination.set_paused(is_paused);
        }
    }

    /// Deletes one batch. Counts go on between batches, and a stop need not wait for the last.
    fn purge(&self, purge: &mut Purge) {
        let started = Instant::now();
        let wait = if self.health.fault().is_some() {
            PURGE_PAUSE_DOWN
        } else {
            match self.store.purge(purge.older_than, BATCH_ROWS_MAX) {
                Ok(0) => {
                    purge.report();
                    purge.interval()
                }
                Ok(count) => {
                    self.metrics.dead_letters_purged.inc_by(count);
                    purge.count += count;
                    // Leaves most of a slow store's time to those who wait for it.
                    (4 * started.elapsed()).max(PURGE_PAUSE)
                }
                // As with a count, nothing else need be wrong.
                Err(error) => {
                    self.metrics.store_errors.inc();
                    if let Some(suppressed) = NOT_PURGED.allow() {
                        log::warn!(error:%, suppressed; "old dead letters cannot be purged");
                    }
                    PURGE_PAUSE_FAILED.min(purge.interval())
                }
            }
        };
        purge.at = Instant::now() + wait;
    }
}

/// Until the next count: that of a long queue takes at most a twentieth of all time. What counts
/// is the shorter of two in a row, as one alone may have waited for a disk that was busy, which
/// shall not leave the figures old for minutes.
fn pause_after(took: Duration) -> Duration {
    (20 * took).max(LOOK_PAUSE)
}

/// A purge of the dead letters: one under way, or the next.
#[derive(Debug)]
struct Purge {
    older_than: Duration,
    /// When the next batch is due.
    at: Instant,
    /// Deleted and not yet reported.
    count: u64,
}

impl Purge {
    fn new(older_than: Duration) -> Purge {
        Purge {
            older_than,
            at: Instant::now(),
            count: 0,
        }
    }

    /// From the end of a purge to the next one.
    fn interval(&self) -> Duration {
        self.older_than
            .clamp(PURGE_INTERVAL_MIN, PURGE_INTERVAL_MAX)
    }

    fn report(&mut self) {
        let count = std::mem::take(&mut self.count);
        if count > 0 {
            log::info!(count; "old dead letters purged");
        }
    }
}
