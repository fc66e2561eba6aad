//! Senders, the real program and a destination, running.

use std::sync::Arc;
use std::time::Duration;

use super::destination::Destination;
use super::load::{Load, Senders};
use super::program::proxy::{Proxy, Setup};
use super::tally::Tally;

/// What a run did in what time.
#[derive(Debug, Default, Clone, Copy)]
pub struct Measured {
    pub delivered: u64,
    pub elapsed: Duration,
}

impl Measured {
    pub fn new(delivered: u64, elapsed: Duration) -> Measured {
        Measured { delivered, elapsed }
    }

    pub fn add(&mut self, delivered: u64, elapsed: Duration) {
        self.delivered += delivered;
        self.elapsed += elapsed;
    }

    pub fn per_second(&self) -> f64 {
        self.delivered as f64 / self.elapsed.as_secs_f64()
    }

    /// The time for `requests` at the same pace.
    pub fn time_for(&self, requests: u64) -> Duration {
        self.elapsed
            .mul_f64(requests as f64 / self.delivered as f64)
    }
}

/// Dropped in this order: the program is killed when nobody waits for it any more.
pub struct Pipeline {
    load: Option<Load>,
    _proxy: Proxy,
    _setup: Setup,
    _destination: Destination,
    tally: Arc<Tally>,
}

impl Pipeline {
    /// Starts the program as `configure` sets it up, before a destination that takes `latency`;
    /// without senders it sends what it finds in its store.
    pub fn start(
        latency: Duration,
        configure: impl FnOnce(Setup) -> Setup,
        senders: Option<Senders>,
    ) -> Pipeline {
        let tally = Arc::new(Tally::default());
        let destination = Destination::start(latency, Arc::clone(&tally));
        let setup = configure(Setup::new(&destination.url()));
        let proxy = setup.start();
        let load = senders.map(|senders| Load::start(proxy.intake, senders, &tally));
        Pipeline {
            load,
            _proxy: proxy,
            _setup: setup,
            _destination: destination,
            tally,
        }
    }

    /// Lets connections be opened and channels fill before anything is measured.
    pub fn warm_up(&self, requests: u64) {
        self.tally.watch(requests, Duration::ZERO, u64::MAX);
        if let Some(load) = &self.load {
            load.forget();
        }
    }

    /// Delivered since the start.
    pub fn delivered(&self) -> u64 {
        self.tally.answered()
    }

    /// Goes on until `requests` more are delivered and `at_least` has passed, or `last` are
    /// delivered since the start.
    pub fn deliver(&self, requests: u64, at_least: Duration, last: u64) -> (u64, Duration) {
        self.tally.watch(requests, at_least, last)
    }

    /// The 99th percentile of the time to a sender's 200.
    pub fn p99(&self) -> Option<Duration> {
        self.load.as_ref().map(Load::p99)
    }
}
