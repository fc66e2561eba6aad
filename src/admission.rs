//! Admission: decides in memory whether a request goes direct, is stored, or is refused.
//!
//! A sender is never told of success for something that is neither in the channel nor
//! committed, and never waits on the destination.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::time::{Duration, Instant};

use crate::breaker::Destination;
use crate::budget::Permit;
use crate::direct::Sender;
use crate::limiter::TokenBucket;
use crate::logger::LogLimit;
use crate::metrics::Metrics;
use crate::queue::poller::lease;
use crate::queue::settler::Settlements;
use crate::queue::writer::{Appender, Place};
use crate::queue::{Decision, Fate, StoreError};
use crate::request::Request;
use crate::worker::{Delivery, Places};

/// How often a stop looks whether the last admission is through.
const CLOSE_LOOK: Duration = Duration::from_millis(1);

const FULL_QUEUE: &str = "the queue holds queue.max_rows";

static REFUSED: LogLimit = LogLimit::new();
static FULL: LogLimit = LogLimit::new();
static UNSTORABLE: LogLimit = LogLimit::new();

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// In the channel of the proxy workers.
    Direct,
    /// Committed to the store.
    Stored,
    /// Neither would take it; the sender should come again.
    Refused,
    /// It would have to be stored, and there are as many rows as there may be, or the disk is nearly
    /// full.
    QueueFull,
    /// The store works and does not take this one.
    Unstorable,
}

/// What `server.enqueue_rate` says of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rate {
    /// There is none: nothing is stored before it was tried.
    None,
    Within,
    Past,
}

/// Shared by all intake threads.
#[derive(Debug)]
pub struct Admission {
    /// `None`: requests are never stored before they were tried (`enqueue_enabled: false`).
    enqueue: Mutex<Option<TokenBucket>>,
    direct: Sender<Delivery>,
    appender: Appender,
    destination: Arc<Destination>,
    /// With `server.ack: stored`.
    committing: Option<Committing>,
    metrics: Arc<Metrics>,
    closed: AtomicBool,
    /// Held for reading by each admission under way: closing waits for them.
    under_way: RwLock<()>,
}

/// What it takes to commit each request before it is acknowledged, and to send it all the same
/// without waiting for a claim.
#[derive(Debug)]
pub struct Committing {
    pub places: Arc<Places>,
    pub settlements: Settlements,
    pub request_timeout: Duration,
}

impl Admission {
    /// With `enqueue_rate` (requests a second) what exceeds it is stored; without, all goes
    /// direct as long as there is room.
    pub fn new(
        enqueue_rate: Option<u32>,
        direct: Sender<Delivery>,
        appender: Appender,
        destination: Arc<Destination>,
        metrics: Arc<Metrics>,
    ) -> Admission {
        let now = Instant::now();
        Admission {
            enqueue: Mutex::new(enqueue_rate.map(|rate| TokenBucket::new(rate, now))),
            direct,
            appender,
            destination,
            committing: None,
            metrics,
            closed: AtomicBool::new(false),
            under_way: RwLock::default(),
        }
    }

    /// Admits nothing any more that is not committed.
    #[must_use]
    pub fn committing(self, committing: Committing) -> Admission {
        Admission {
            committing: Some(committing),
            ..self
        }
    }

    /// See [`Admission::new`].
    pub fn set_rate(&self, enqueue_rate: Option<u32>) {
        let now = Instant::now();
        let mut enqueue = self.enqueue();
        match (&mut *enqueue, enqueue_rate) {
            (Some(bucket), Some(rate)) => bucket.set_rate(rate, now),
            (enqueue, rate) => *enqueue = rate.map(|rate| TokenBucket::new(rate, now)),
        }
    }

    fn enqueue(&self) -> MutexGuard<'_, Option<TokenBucket>> {
        self.enqueue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether requests may be stored before they were tried, and if so whether this one is within
    /// the rate of those that go direct: that takes a token.
    fn rate(&self) -> Rate {
        match &mut *self.enqueue() {
            None => Rate::None,
            Some(bucket) => match bucket.try_take(Instant::now()) {
                true => Rate::Within,
                false => Rate::Past,
            },
        }
    }

    /// Refuses all that comes from now on. When this returns before the deadline, nothing is on
    /// its way into the channel or the store any more; else what waits there for a store that does
    /// not answer finds the channel closed to it.
    pub fn close(&self, deadline: Instant) {
        self.closed.store(true, Ordering::SeqCst);
        while Instant::now() < deadline {
            if !matches!(self.under_way.try_write(), Err(TryLockError::WouldBlock)) {
                return;
            }
            std::thread::sleep(CLOSE_LOOK);
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn under_way(&self) -> RwLockReadGuard<'_, ()> {
        self.under_way
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether new requests can be admitted without the store at this moment.
    pub fn has_direct_room(&self) -> bool {
        self.committing.is_none() && !self.direct.is_full()
    }

    /// Whether requests can be committed while the store does not work.
    pub fn has_spool(&self) -> bool {
        self.appender.has_spool()
    }

    /// Why no new request can be stored though there is something that works, if so.
    pub fn shortage(&self) -> Option<String> {
        let is_full = || self.appender.is_full().then(|| FULL_QUEUE.to_owned());
        self.appender.shortage().or_else(is_full)
    }

    /// Whether each request is stored before it is acknowledged or sent: as the settings have it, or
    /// because nothing new is sent now.
    pub fn stores_all(&self) -> bool {
        let is_stored =
            |bucket: &TokenBucket| bucket.is_closed() || !self.destination.is_open_to_new();
        self.committing.is_some() || self.enqueue().as_ref().is_some_and(is_stored)
    }

    /// As [`Appender::other_process`].
    pub fn other_process(&self) -> Option<String> {
        self.appender.other_process()
    }

    /// Whether the next request is likely to be admitted without waiting for the store.
    pub fn is_quick(&self) -> bool {
        self.has_direct_room()
            && match &mut *self.enqueue() {
                None => true,
                Some(bucket) => {
                    self.destination.is_open_to_new() && bucket.available(Instant::now()) > 0
                }
            }
    }

    /// Admits a request; returns once it is in the channel, committed, or refused.
    pub fn admit(&self, request: Request, permit: Permit) -> Admitted {
        let under_way = self.under_way();
        let admitted = if self.is_closed() {
            Admitted::Refused
        } else {
            self.decide(Delivery::direct(Arc::new(request), permit))
        };
        drop(under_way);
        self.count(admitted);
        admitted
    }

    /// Admits a request if that need not wait for the store; `None` if it must, and nothing is
    /// counted.
    pub fn admit_quickly(&self, request: Request, permit: Permit) -> Option<Admitted> {
        if self.committing.is_some() {
            return None;
        }
        let under_way = self.under_way();
        let admitted = if self.is_closed() {
            Admitted::Refused
        } else {
            let delivery = Delivery::direct(Arc::new(request), permit);
            self.direct_if_it_may(delivery).ok()?
        };
        drop(under_way);
        self.count(admitted);
        Some(admitted)
    }

    fn count(&self, admitted: Admitted) {
        match admitted {
            Admitted::Direct => self.metrics.admitted_direct.inc(),
            Admitted::Stored => self.metrics.admitted_stored.inc(),
            Admitted::QueueFull => {
                self.metrics.refused.count(&self.metrics.refused.queue_full);
                if let Some(suppressed) = FULL.allow() {
                    let why = self.shortage();
                    let why = why.as_deref().unwrap_or(FULL_QUEUE);
                    log::error!(suppressed; "request refused: {why}");
                }
            }
            Admitted::Unstorable => {
                self.metrics.refused.count(&self.metrics.refused.unstorable);
                if let Some(suppressed) = UNSTORABLE.allow() {
                    log::error!(suppressed; "request refused: the store does not take it, whatever else it takes");
                }
            }
            Admitted::Refused => {
                self.metrics.refused.count(&self.metrics.refused.overloaded);
                if let Some(suppressed) = REFUSED.allow() {
                    log::error!(suppressed; "request refused: neither the store nor the direct channel takes it");
                }
            }
        }
    }

    fn decide(&self, delivery: Delivery) -> Admitted {
        if let Some(committing) = &self.committing {
            return self.commit(committing, delivery);
        }
        self.direct_if_it_may(delivery)
            .unwrap_or_else(|delivery| self.store_or_direct(delivery))
    }

    /// Takes a delivery direct, as far as the destination, the rate, the memory and the channel
    /// allow. Gives it back if it is to be stored.
    fn direct_if_it_may(&self, delivery: Delivery) -> Result<Admitted, Delivery> {
        let rate = match self.destination.is_open_to_new() {
            true => self.rate(),
            // Takes no token.
            false if self.enqueue().is_some() => Rate::Past,
            false => Rate::None,
        };
        match rate {
            Rate::None => Ok(self.direct_or_refused(delivery)),
            Rate::Within if !delivery.is_memory_scarce() => {
                self.try_direct(delivery).map(|()| Admitted::Direct)
            }
            Rate::Within | Rate::Past => Err(delivery),
        }
    }

    fn store_or_direct(&self, delivery: Delivery) -> Admitted {
        match self.store(&delivery) {
            Admitted::Refused => self.direct_or_refused(delivery),
            admitted => admitted,
        }
    }

    fn store(&self, delivery: &Delivery) -> Admitted {
        let due = Fate::Due {
            after: Duration::ZERO,
            failure: None,
        };
        admitted(self.appender.append_new(delivery.to_row(0, due)))
    }

    /// Commits a request: leased to this process and sent from memory as far as the rate, the
    /// memory and the workers allow, or else to be claimed.
    fn commit(&self, committing: &Committing, delivery: Delivery) -> Admitted {
        let goes_direct = self.destination.is_open_to_new()
            && self.rate() != Rate::Past
            && !delivery.is_memory_scarce();
        if goes_direct && committing.places.try_take() {
            self.commit_leased(committing, delivery)
        } else {
            self.store(&delivery)
        }
    }

    /// To be called with a place taken. What went to the spool is not sent from here.
    fn commit_leased(&self, committing: &Committing, delivery: Delivery) -> Admitted {
        let (lease, send_until) = lease(committing.request_timeout);
        let row = delivery.to_row(1, Fate::Leased(lease));
        let committed = self.appender.append_new(row);
        if committed != Some(Ok(Place::Store)) {
            committing.places.leave();
            return admitted(committed);
        }
        // There is a place for it: at most, a worker has still to take the one before.
        if let Err(refused) = self.direct.send(delivery.stored(send_until)) {
            let unsent = refused.settlement(Decision::Release);
            committing.settlements.send(unsent);
            committing.places.leave();
        }
        Admitted::Stored
    }

    fn direct_or_refused(&self, delivery: Delivery) -> Admitted {
        match self.try_direct(delivery) {
            Ok(()) => Admitted::Direct,
            Err(_full) => Admitted::Refused,
        }
    }

    fn try_direct(&self, delivery: Delivery) -> Result<(), Delivery> {
        if self.is_closed() {
            // It has waited for the store until after the channel was emptied.
            return Err(delivery);
        }
        // Counted first: a worker may be through with it before we are back.
        self.metrics.in_flight.inc();
        self.direct
            .try_send(delivery)
            .inspect_err(|_| self.metrics.in_flight.dec())
    }
}

/// What became of a request that was to be stored.
fn admitted(committed: Option<Result<Place, StoreError>>) -> Admitted {
    match committed {
        None => Admitted::QueueFull,
        Some(Ok(_)) => Admitted::Stored,
        // Were it taken all the same, and its first attempt failed, there would be no place for it.
        Some(Err(StoreError::Refused(_))) => Admitted::Unstorable,
        Some(Err(_)) => Admitted::Refused,
    }
}
