//! Tells the other instances on the store, every second, that this one is there: whether it is
//! claiming, idle, paused, or draining. What one of them had leased that is there no more is due
//! again by that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::Store;
use super::health::StoreHealth;
use super::poller::Wake;
use crate::logger::LogLimit;
use crate::metrics::Metrics;

/// Between two beats: some may fail before one is taken for dead.
const INTERVAL: Duration = Duration::from_secs(1);

static NOT_HEARD: LogLimit = LogLimit::new();

/// The thread that does it.
#[derive(Debug)]
pub struct Heartbeat {
    pub store: Arc<dyn Store>,
    pub health: Arc<StoreHealth>,
    pub metrics: Arc<Metrics>,
    pub wake: Wake,
    /// Closed when all is given back.
    pub stop: Receiver<()>,
}

impl Heartbeat {
    /// Runs until `stop` is closed.
    pub fn run(self) {
        let mut beat_at = Instant::now();
        while self.stop.recv_deadline(beat_at) == Err(RecvTimeoutError::Timeout) {
            beat_at = Instant::now() + INTERVAL;
            // A store that does not work is for the poller to try.
            if self.health.fault().is_none() {
                self.beat();
            }
        }
        if self.health.fault().is_none()
            && let Err(error) = self.store.leave()
        {
            log::warn!(error:%; "the other instances are not told of the end");
        }
    }

    fn beat(&self) {
        match self.store.beat() {
            Ok(0) => {}
            Ok(count) => {
                log::warn!(count; "took over requests of an instance that is not there any more");
                self.wake.wake();
            }
            // Whether the store works is told by those who need it for more.
            Err(error) => {
                self.metrics.store_errors.inc();
                if let Some(suppressed) = NOT_HEARD.allow() {
                    log::warn!(error:%, suppressed; "the other instances do not hear of this one");
                }
            }
        }
    }
}
