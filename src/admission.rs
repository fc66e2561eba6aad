//! Admission: decides in memory whether a request goes direct, is stored, or is refused.
//!
//! A sender is never told of success for something that is neither in the channel nor
//! committed, and never waits on the destination.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
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
use crate::queue::{Decision, Fate};
use crate::request::Request;
use crate::worker::{Delivery, Places};

static REFUSED: LogLimit = LogLimit::new();
static FULL: LogLimit = LogLimit::new();

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// In the channel of the proxy workers.
    Direct,
    /// Committed to the store.
    Stored,
    /// Neither would take it; the sender should come again.
    Refused,
    /// It would have to be stored, and there are as many rows as there may be.
    QueueFull,
}

/// Shared by all intake threads.
#[derive(Debug)]
pub struct Admission {
    /// `None`: requests are never stored before they were tried (`enqueue_enabled: false`).
    enqueue: Option<Mutex<TokenBucket>>,
    direct: Sender<Delivery>,
    appender: Appender,
    destination: Arc<Destination>,
    /// With `server.ack: stored`.
    committing: Option<Committing>,
    metrics: Arc<Metrics>,
    /// Held for reading by each admission under way: closing waits for them.
    closed: RwLock<bool>,
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
            enqueue: enqueue_rate.map(|rate| Mutex::new(TokenBucket::new(rate, now))),
            direct,
            appender,
            destination,
            committing: None,
            metrics,
            closed: RwLock::new(false),
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

    /// Refuses all that comes from now on. When this returns, nothing is on its way into the
    /// channel or the store any more.
    pub fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Whether new requests can be admitted without the store at this moment.
    pub fn has_direct_room(&self) -> bool {
        self.committing.is_none() && !self.direct.is_full()
    }

    /// Whether requests can be committed while the store does not work.
    pub fn has_spool(&self) -> bool {
        self.appender.has_spool()
    }

    /// Whether the next request is likely to be admitted without waiting for the store.
    pub fn is_quick(&self) -> bool {
        let has_token = |bucket: &Mutex<TokenBucket>| {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.available(Instant::now()) > 0
        };
        self.has_direct_room()
            && self
                .enqueue
                .as_ref()
                .is_none_or(|bucket| self.destination.is_open_to_new() && has_token(bucket))
    }

    /// Admits a request; returns once it is in the channel, committed, or refused.
    pub fn admit(&self, request: Request, permit: Permit) -> Admitted {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        let admitted = if *closed {
            Admitted::Refused
        } else {
            self.decide(Delivery::direct(Arc::new(request), permit))
        };
        drop(closed);
        self.count(admitted);
        admitted
    }

    /// Admits a request if that need not wait for the store; `None` if it must, and nothing is
    /// counted.
    pub fn admit_quickly(&self, request: Request, permit: Permit) -> Option<Admitted> {
        if self.committing.is_some() {
            return None;
        }
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        let admitted = if *closed {
            Admitted::Refused
        } else {
            let delivery = Delivery::direct(Arc::new(request), permit);
            match &self.enqueue {
                None => self.direct_or_refused(delivery),
                Some(bucket) => self.within_rate(bucket, delivery).ok()?,
            }
        };
        drop(closed);
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
                    log::error!(suppressed; "request refused: the queue holds queue.max_rows");
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
        let Some(bucket) = &self.enqueue else {
            return self.direct_or_refused(delivery);
        };
        self.within_rate(bucket, delivery)
            .unwrap_or_else(|delivery| self.store_or_direct(delivery))
    }

    /// Takes a delivery direct, as far as the destination, the rate, the memory and the channel
    /// allow.
    fn within_rate(
        &self,
        bucket: &Mutex<TokenBucket>,
        delivery: Delivery,
    ) -> Result<Admitted, Delivery> {
        let may_go = self.destination.is_open_to_new() && take_token(bucket);
        if !may_go || delivery.is_memory_scarce() {
            return Err(delivery);
        }
        self.try_direct(delivery).map(|()| Admitted::Direct)
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
        match self.appender.append_new(delivery.to_row(0, due)) {
            None => Admitted::QueueFull,
            Some(Err(_)) => Admitted::Refused,
            Some(Ok(_)) => Admitted::Stored,
        }
    }

    /// Commits a request: leased to this process and sent from memory as far as the rate, the
    /// memory and the workers allow, or else to be claimed.
    fn commit(&self, committing: &Committing, delivery: Delivery) -> Admitted {
        let goes_direct = self.destination.is_open_to_new()
            && self.enqueue.as_ref().is_none_or(take_token)
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
            return match committed {
                None => Admitted::QueueFull,
                Some(Err(_)) => Admitted::Refused,
                Some(Ok(_)) => Admitted::Stored,
            };
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
        // Counted first: a worker may be through with it before we are back.
        self.metrics.in_flight.inc();
        self.direct
            .try_send(delivery)
            .inspect_err(|_| self.metrics.in_flight.dec())
    }
}

fn take_token(bucket: &Mutex<TokenBucket>) -> bool {
    let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
    bucket.try_take(Instant::now())
}
