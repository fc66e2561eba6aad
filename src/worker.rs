//! Workers: receive a delivery, send it, settle it. One path for direct and claimed ones.
//!
//! Each worker keeps the delivery it is at in a [`Slot`], out of which a shutdown can take it.
//! Whoever takes it out settles it; nobody else does.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use prometheus::IntGauge;

use crate::breaker::{Destination, Era, Permit};
use crate::budget;
use crate::direct;
use crate::logger::LogLimit;
use crate::metrics::{Busy, Metrics};
use crate::progress::Stage;
use crate::queue::mover::refused;
use crate::queue::poller::Room;
use crate::queue::settler::Settlements;
use crate::queue::writer::Appender;
use crate::queue::{ByClass, Claimed, Class, Decision, Fate, NewRow, Settlement, StoreError};
use crate::request::Request;
use crate::settle::{Failure, RetryPolicy, Verdict};
use crate::upstream::Client;

static FAILED: LogLimit = LogLimit::new();
static BURIED: LogLimit = LogLimit::new();
static UNSTORED: LogLimit = LogLimit::new();
static UNSTORABLE: LogLimit = LogLimit::new();

/// Pause between tries to store what was not delivered.
const STORE_PAUSE: Duration = Duration::from_secs(1);

/// A request on its way to the destination.
#[derive(Debug)]
pub struct Delivery {
    pub request: Arc<Request>,
    /// Counts the attempt to be made next, or being made: at least 1.
    pub attempt: u32,
    pub origin: Origin,
    permit: Arc<budget::Permit>,
}

/// Where a delivery came from, which is where its failure goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From memory: exists nowhere else.
    Direct,
    /// From memory, but its row is in the store, leased since it was committed.
    Stored { send_until: Instant },
    /// From the store, leased. Later than `send_until` too little of the lease is left.
    Claimed { send_until: Instant },
}

impl Delivery {
    /// A request as it was accepted.
    pub fn direct(request: Arc<Request>, permit: budget::Permit) -> Delivery {
        Delivery {
            request,
            attempt: 1,
            origin: Origin::Direct,
            permit: Arc::new(permit),
        }
    }

    /// The same once its row is committed, leased until some time after `send_until`.
    pub fn stored(self, send_until: Instant) -> Delivery {
        Delivery {
            origin: Origin::Stored { send_until },
            ..self
        }
    }

    /// A row as it was claimed.
    pub fn claimed(row: Claimed, permit: budget::Permit, send_until: Instant) -> Delivery {
        Delivery {
            request: Arc::new(row.request),
            attempt: row.attempt,
            origin: Origin::Claimed { send_until },
            permit: Arc::new(permit),
        }
    }

    /// Whether memory is so scarce that a new request should rather be stored.
    pub fn is_memory_scarce(&self) -> bool {
        self.permit.is_scarce()
    }

    /// The same after so many attempts.
    fn after(&self, attempts: u32) -> Delivery {
        Delivery {
            request: Arc::clone(&self.request),
            attempt: attempts.saturating_add(1),
            origin: self.origin,
            permit: Arc::clone(&self.permit),
        }
    }

    /// The row that keeps a direct delivery after `attempts` that did not deliver it.
    pub fn to_row(&self, attempts: u32, fate: Fate) -> NewRow {
        NewRow {
            request: Arc::clone(&self.request),
            attempt: attempts,
            fate,
        }
    }

    pub fn settlement(&self, decision: Decision) -> Settlement {
        Settlement {
            id: self.request.id,
            attempt: self.attempt,
            decision,
        }
    }

    /// Settles a leased delivery that a shutdown interrupted: due at once, as far as is known
    /// not delivered. Started attempts count.
    pub fn interrupted(&self, started: bool) -> Settlement {
        self.settlement(if started {
            Decision::Attempted(Verdict::Later {
                after: Duration::ZERO,
                failure: interrupted(),
            })
        } else {
            Decision::Release
        })
    }
}

/// Counts the requests that are committed and then sent from memory, from before the commit until
/// they are through: never more than the channel and the workers hold.
#[derive(Debug)]
pub struct Places {
    taken: AtomicUsize,
    limit: usize,
}

impl Places {
    pub fn new(workers: usize) -> Places {
        Places {
            taken: AtomicUsize::new(0),
            limit: 2 * workers,
        }
    }

    /// Takes a place, if there is one.
    pub fn try_take(&self) -> bool {
        let one_more = |taken: usize| (taken < self.limit).then(|| taken + 1);
        let order = Ordering::AcqRel;
        self.taken
            .fetch_update(order, Ordering::Acquire, one_more)
            .is_ok()
    }

    pub fn leave(&self) {
        self.taken.fetch_sub(1, Ordering::AcqRel);
    }

    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Acquire)
    }
}

/// How an attempt ended that a shutdown did not wait for.
pub fn interrupted() -> Failure {
    Failure {
        status: None,
        error: "interrupted by shutdown".into(),
    }
}

/// What one worker is at.
#[derive(Debug, Default)]
pub struct Slot(Mutex<Option<Arc<Delivery>>>);

impl Slot {
    fn hold(&self, delivery: Delivery) -> Arc<Delivery> {
        let delivery = Arc::new(delivery);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&delivery));
        delivery
    }

    /// Takes the delivery out, and with it the duty to settle it.
    pub fn take(&self) -> Option<Arc<Delivery>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What all workers share.
#[derive(Debug)]
pub struct Shared {
    pub policy: RwLock<RetryPolicy>,
    pub appender: Appender,
    pub settlements: Settlements,
    pub room: Arc<Room>,
    pub places: Arc<Places>,
    pub destination: Arc<Destination>,
    pub metrics: Arc<Metrics>,
    /// Closed when workers shall no longer wait for anything but their channel.
    pub hurry: Receiver<()>,
}

/// Where a worker's deliveries come from.
#[derive(Debug)]
pub enum Deliveries {
    Direct(direct::Receiver<Delivery>),
    /// Of those reserved for fresh rows.
    Fresh(Receiver<Delivery>),
    All(ByClass<Receiver<Delivery>>),
}

impl Deliveries {
    /// Waits for a delivery; `None` when there will be none.
    fn next(&self) -> Option<Delivery> {
        match self {
            Deliveries::Direct(direct) => direct.recv(),
            Deliveries::Fresh(fresh) => fresh.recv().ok(),
            Deliveries::All(ByClass { fresh, retried }) => crossbeam_channel::select! {
                recv(fresh) -> delivery => delivery.or_else(|_| retried.recv()).ok(),
                recv(retried) -> delivery => delivery.or_else(|_| fresh.recv()).ok(),
            },
        }
    }
}

/// One worker thread.
#[derive(Debug)]
pub struct Worker {
    pub shared: Arc<Shared>,
    pub client: Client,
    pub slot: Arc<Slot>,
    pub deliveries: Deliveries,
    /// At work while a request is sent.
    pub stage: Arc<Stage>,
    pub busy: IntGauge,
}

impl Worker {
    /// Runs until the channel of deliveries is closed and empty, or the program is about to end.
    pub fn run(mut self) {
        while let Some(delivery) = self.deliveries.next() {
            let busy = self.busy.clone();
            let _busy = Busy::new(&busy);
            match delivery.origin {
                Origin::Direct => {
                    if self.deliver_direct(delivery).is_break() {
                        return;
                    }
                }
                Origin::Stored { send_until } => {
                    self.deliver_leased(delivery, send_until);
                    self.shared.places.leave();
                }
                Origin::Claimed { send_until } => {
                    let class = Class::of(delivery.attempt);
                    self.deliver_leased(delivery, send_until);
                    self.shared.room.leave(class);
                }
            }
        }
    }

    fn deliver_leased(&mut self, delivery: Delivery, send_until: Instant) {
        let delivery = self.slot.hold(delivery);
        // Asked last: what is permitted may be a probe, which must be made.
        let permit = (Instant::now() <= send_until).then(|| self.shared.destination.permit());
        let decision = match permit {
            Some(Permit::Granted(era)) => Decision::Attempted(self.attempt(&delivery, era)),
            Some(Permit::Denied(_)) | None => Decision::Release,
        };
        if self.slot.take().is_some() {
            self.shared.settlements.send(delivery.settlement(decision));
        }
    }

    /// Holds on to the request until it is delivered, stored or taken out of the slot: while
    /// neither destination nor store take it, it is tried with both again and again. Breaks when
    /// it is left in the slot, which then must not be used for another.
    fn deliver_direct(&mut self, delivery: Delivery) -> ControlFlow<()> {
        let mut delivery = self.slot.hold(delivery);
        loop {
            let (fate, attempts) = match self.shared.destination.permit() {
                Permit::Granted(era) => (fate(self.attempt(&delivery, era)), delivery.attempt),
                Permit::Denied(until) => (Some(due_at(until)), delivery.attempt - 1),
            };
            let is_delivered = fate.is_none();
            let kept = fate.map(|fate| self.keep(&delivery, attempts, fate));
            let kept = kept.unwrap_or(Kept::Over);
            match kept {
                Kept::Over | Kept::Lost => {
                    if self.slot.take().is_some() {
                        let metrics = &self.shared.metrics;
                        metrics.delivered.inc_by(u64::from(is_delivered));
                        let is_lost = matches!(kept, Kept::Lost);
                        metrics.lost_refused.inc_by(u64::from(is_lost));
                        metrics.in_flight.dec();
                    }
                    return ControlFlow::Continue(());
                }
                Kept::Interrupted => return ControlFlow::Break(()),
                Kept::DueAgain => {
                    if self.slot.take().is_none() {
                        return ControlFlow::Continue(());
                    }
                    delivery = self.slot.hold(delivery.after(attempts));
                }
            }
        }
    }

    /// Tries to store what `attempts` did not deliver, until it is due again or stored.
    #[inline(never)] // As `report`.
    fn keep(&self, delivery: &Delivery, attempts: u32, fate: Fate) -> Kept {
        let due = match &fate {
            Fate::Due { after, .. } => Some(Instant::now() + *after),
            // Given up: there is no further attempt, however long the store takes.
            Fate::Dead(_) | Fate::Leased(_) => None,
        };
        loop {
            let row = delivery.to_row(attempts, remaining(&fate, due));
            let error = match self.shared.appender.append(row) {
                Ok(_) => return Kept::Over,
                Err(StoreError::Refused(why)) => match self.bury(delivery, attempts, &fate, &why) {
                    Ok(kept) => return kept,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if let Some(suppressed) = UNSTORED.allow() {
                log::error!(error:%, suppressed; "neither delivered nor stored, kept in memory");
            }
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            let pause = left.unwrap_or(STORE_PAUSE).min(STORE_PAUSE);
            if self.shared.hurry.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return Kept::Interrupted;
            }
            if left.is_some_and(|left| left <= pause) {
                return Kept::DueAgain;
            }
        }
    }

    /// What the store refuses to keep becomes a dead letter, as it would be refused each time. If it
    /// is refused as that, too, it is lost: nothing is tried for ever in memory.
    ///
    /// # Errors
    /// The store's, when it could not be asked.
    fn bury(
        &self,
        delivery: &Delivery,
        attempts: u32,
        fate: &Fate,
        why: &str,
    ) -> Result<Kept, StoreError> {
        let id = delivery.request.id;
        let failure = match fate {
            Fate::Due { failure, .. } => failure.clone(),
            Fate::Dead(failure) => Some(failure.clone()),
            Fate::Leased(_) => None,
        };
        let dead = Fate::Dead(refused(why, failure));
        match self.shared.appender.append(delivery.to_row(attempts, dead)) {
            Ok(_) => {
                if let Some(suppressed) = UNSTORABLE.allow() {
                    log::error!(id:%, attempts, why, suppressed; "the store refuses a request that was not delivered, moved to the dead letters");
                }
                Ok(Kept::Over)
            }
            Err(StoreError::Refused(why)) => {
                // Each is named: there is no other trace of it.
                log::error!(id:%, attempts, why; "lost: neither delivered nor stored");
                Ok(Kept::Lost)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the attempt that `delivery` counts, and tells what is to be done next.
    fn attempt(&mut self, delivery: &Delivery, era: Era) -> Verdict {
        let request = &delivery.request;
        let started = Instant::now();
        let sending = self.stage.work();
        let outcome = self.client.send(request, delivery.attempt);
        drop(sending);
        self.shared.destination.note(era, request.id, &outcome);
        let metrics = &self.shared.metrics;
        metrics.observe_attempt(request.path(), &outcome, started);
        let age = SystemTime::now()
            .duration_since(request.received_at)
            .unwrap_or_default();
        let verdict = self
            .shared
            .policy
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .decide(outcome, delivery.attempt, age, fastrand::f64());
        self.report(delivery, &verdict, started.elapsed());
        verdict
    }

    // What it takes of the stack, all workers that wait for an answer would have as well.
    #[inline(never)]
    fn report(&self, delivery: &Delivery, verdict: &Verdict, took: Duration) {
        let metrics = &self.shared.metrics;
        let (id, attempt) = (delivery.request.id, delivery.attempt);
        match verdict {
            Verdict::Delivered => {
                metrics.attempts_delivered.inc();
                log::debug!(id:%, attempt, ms = took.as_millis(); "delivered");
            }
            Verdict::Later { after, failure } => {
                metrics.attempts_later.inc();
                if let Some(suppressed) = FAILED.allow() {
                    log::warn!(id:%, attempt, error:% = failure, retry_in_ms = after.as_millis(), suppressed; "delivery failed, will be tried again");
                }
            }
            Verdict::Bury(failure) => {
                metrics.attempts_buried.inc();
                if let Some(suppressed) = BURIED.allow() {
                    log::error!(id:%, attempt, error:% = failure, suppressed; "given up, moved to the dead letters");
                }
            }
        }
    }
}

/// What became of a direct delivery that was to be stored.
enum Kept {
    /// Stored, or nothing was left to store.
    Over,
    /// The store refuses it in any form.
    Lost,
    DueAgain,
    /// The program is about to end, and stores it itself.
    Interrupted,
}

/// A fate as it is now: due a little sooner than when it was decided.
fn remaining(fate: &Fate, due: Option<Instant>) -> Fate {
    match (fate, due) {
        (Fate::Due { failure, .. }, Some(due)) => Fate::Due {
            after: due.saturating_duration_since(Instant::now()),
            failure: failure.clone(),
        },
        _ => fate.clone(),
    }
}

/// The fate of a delivery that may not be sent before.
fn due_at(at: Instant) -> Fate {
    Fate::Due {
        after: at.saturating_duration_since(Instant::now()),
        failure: None,
    }
}

/// Where a direct delivery goes that is not delivered.
fn fate(verdict: Verdict) -> Option<Fate> {
    match verdict {
        Verdict::Delivered => None,
        Verdict::Later { after, failure } => Some(Fate::Due {
            after,
            failure: Some(failure),
        }),
        Verdict::Bury(failure) => Some(Fate::Dead(failure)),
    }
}
