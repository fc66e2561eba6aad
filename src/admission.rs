//! Admission: decides in memory whether a request goes direct, is stored, or is refused.
//!
//! A sender is never told of success for something that is neither in the channel nor
//! committed, and never waits on the destination.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use crate::budget::Permit;
use crate::limiter::TokenBucket;
use crate::logger::LogLimit;
use crate::metrics::Metrics;
use crate::queue::Fate;
use crate::queue::writer::Appender;
use crate::request::Request;
use crate::worker::Delivery;

static REFUSED: LogLimit = LogLimit::new();

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// In the channel of the proxy workers.
    Direct,
    /// Committed to the store.
    Stored,
    /// Neither would take it; the sender should come again.
    Refused,
}

/// Shared by all intake threads.
#[derive(Debug)]
pub struct Admission {
    /// `None`: requests are never stored before they were tried (`enqueue_enabled: false`).
    enqueue: Option<Mutex<TokenBucket>>,
    direct: Sender<Delivery>,
    appender: Appender,
    metrics: Arc<Metrics>,
    /// Held for reading by each admission under way: closing waits for them.
    closed: RwLock<bool>,
}

impl Admission {
    /// With `enqueue_rate` (requests a second) what exceeds it is stored; without, all goes
    /// direct as long as there is room.
    pub fn new(
        enqueue_rate: Option<u32>,
        direct: Sender<Delivery>,
        appender: Appender,
        metrics: Arc<Metrics>,
    ) -> Admission {
        let now = Instant::now();
        Admission {
            enqueue: enqueue_rate.map(|rate| Mutex::new(TokenBucket::new(rate, now))),
            direct,
            appender,
            metrics,
            closed: RwLock::new(false),
        }
    }

    /// Refuses all that comes from now on. When this returns, nothing is on its way into the
    /// channel or the store any more.
    pub fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Whether new requests can go direct at this moment.
    pub fn has_direct_room(&self) -> bool {
        !self.direct.is_full()
    }

    /// Whether the next request is likely to be admitted without waiting for the store.
    pub fn is_quick(&self) -> bool {
        let has_token = |bucket: &Mutex<TokenBucket>| {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.available(Instant::now()) > 0
        };
        self.enqueue.as_ref().is_none_or(has_token) && self.has_direct_room()
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
            Admitted::Refused => {
                self.metrics.refused.count(&self.metrics.refused.overloaded);
                if let Some(suppressed) = REFUSED.allow() {
                    log::error!(suppressed; "request refused: neither the store nor the direct channel takes it");
                }
            }
        }
    }

    fn decide(&self, delivery: Delivery) -> Admitted {
        let Some(bucket) = &self.enqueue else {
            return self.direct_or_refused(delivery);
        };
        self.within_rate(bucket, delivery)
            .unwrap_or_else(|delivery| self.store_or_direct(delivery))
    }

    /// Takes a delivery direct, as far as the rate, the memory and the channel allow.
    fn within_rate(
        &self,
        bucket: &Mutex<TokenBucket>,
        delivery: Delivery,
    ) -> Result<Admitted, Delivery> {
        let within_rate = bucket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_take(Instant::now());
        if !within_rate || delivery.is_memory_scarce() {
            return Err(delivery);
        }
        self.try_direct(delivery).map(|()| Admitted::Direct)
    }

    fn store_or_direct(&self, delivery: Delivery) -> Admitted {
        let row = delivery.to_row(
            0,
            Fate::Due {
                after: Duration::ZERO,
                failure: None,
            },
        );
        if self.appender.append(row).is_ok() {
            return Admitted::Stored;
        }
        self.direct_or_refused(delivery)
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
        self.direct.try_send(delivery).map_err(|refused| {
            self.metrics.in_flight.dec();
            refused.into_inner()
        })
    }
}
