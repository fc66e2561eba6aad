//! The end of a run: lets workers finish, then stores what they did not.
//!
//! Every accepted request is in exactly one of these places: the store, a channel, or a worker's
//! slot. This takes it out of the last two.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::metrics::Metrics;
use crate::queue::settler::Settlements;
use crate::queue::writer::Appender;
use crate::queue::{Fate, NewRow, Settlement, Store, StoreError};
use crate::worker::{Delivery, Origin, Slot, interrupted};

/// How often the end of the work is looked for.
const LOOK: Duration = Duration::from_millis(10);
/// How long a store that does not work is tried with the last requests.
const LAST_TRIES: Duration = Duration::from_secs(10);
const TRY_PAUSE: Duration = Duration::from_millis(200);
/// Threads that store the rest side by side, so that the writer commits it in groups.
const STORING_THREADS: usize = 64;
/// Lost requests that are named in the log.
const NAMED_MAX: usize = 100;

/// All places a request can be in, and the ways into the store.
#[derive(Debug)]
pub struct Drain {
    pub store: Arc<dyn Store>,
    pub metrics: Arc<Metrics>,
    pub appender: Appender,
    pub settlements: Settlements,
    pub direct: Receiver<Delivery>,
    pub claimed: Receiver<Delivery>,
    pub slots: Vec<Arc<Slot>>,
    /// Dropped to make workers wait for nothing any more.
    pub hurry: Option<Sender<()>>,
}

impl Drain {
    /// Gives back the rows that were claimed but that no worker has begun with.
    pub fn release_unstarted(&self) {
        for delivery in self.claimed.try_iter() {
            self.settlements.send(delivery.interrupted(false));
        }
    }

    /// Waits until the last of the senders' connections is closed and the workers are through
    /// with all there is, or until the deadline or another signal.
    pub fn wait(
        &self,
        deadline: Instant,
        signals: &Receiver<i32>,
        connections: impl Fn() -> usize,
    ) {
        // In this order: without connections, nothing comes in behind those who look.
        while connections() > 0 || !self.is_idle() {
            if Instant::now() >= deadline {
                let left = self.unfinished();
                log::warn!(left; "server.shutdown_timeout is over, storing what is left");
                return;
            }
            if signals.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                let left = self.unfinished();
                log::warn!(left; "told again to stop, storing what is left");
                return;
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.unfinished() == 0 && self.settlements.pending() == 0
    }

    fn unfinished(&self) -> usize {
        let started = self.slots.iter().filter(|slot| slot.is_held()).count();
        self.direct.len() + self.claimed.len() + started
    }

    /// Stores all that is left and gives back all leases. Returns how many acknowledged
    /// requests could not be stored and are lost.
    pub fn store_rest(mut self) -> u64 {
        self.hurry = None;
        let (mut unstored, mut unsettled) = (Vec::new(), Vec::new());
        let unstarted = self.direct.try_iter().chain(self.claimed.try_iter());
        let rest = unstarted.map(|delivery| (Arc::new(delivery), false)).chain(
            self.slots
                .iter()
                .filter_map(|slot| Some((slot.take()?, true))),
        );
        for (delivery, started) in rest {
            match delivery.origin {
                Origin::Direct => unstored.push((delivery, started)),
                Origin::Claimed { .. } => unsettled.push(delivery.interrupted(started)),
            }
        }
        let deadline = Instant::now() + LAST_TRIES;
        self.settle(&unsettled, deadline);
        let lost = self.append(&unstored, deadline);
        let stored = unstored.len() - lost;
        log::info!(stored, released = unsettled.len(), lost; "stopped");
        lost as u64
    }

    fn settle(&self, settlements: &[Settlement], deadline: Instant) {
        for batch in settlements.chunks(crate::queue::BATCH_ROWS_MAX) {
            // Not settled: the lease runs out by itself.
            let _ = persist(deadline, || self.store.settle(batch));
        }
        while self.settlements.pending() > 0 && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
    }

    fn append(&self, unstored: &[(Arc<Delivery>, bool)], deadline: Instant) -> usize {
        let share = unstored.len().div_ceil(STORING_THREADS).max(1);
        let lost: Vec<_> = std::thread::scope(|scope| {
            let shares: Vec<_> = unstored
                .chunks(share)
                .map(|share| scope.spawn(move || self.append_each(share, deadline)))
                .collect();
            shares
                .into_iter()
                .flat_map(|share| share.join().unwrap_or_default())
                .collect()
        });
        for delivery in lost.iter().take(NAMED_MAX) {
            log::error!(id:% = delivery.request.id; "lost: neither delivered nor stored");
        }
        lost.len()
    }

    /// Appends one after the other, each until it is stored or the deadline is over. Returns
    /// what could not be stored.
    fn append_each(
        &self,
        share: &[(Arc<Delivery>, bool)],
        deadline: Instant,
    ) -> Vec<Arc<Delivery>> {
        let mut lost = Vec::new();
        for (delivery, started) in share {
            match persist(deadline, || {
                self.appender.append_anyway(rest_row(delivery, *started))
            }) {
                Ok(()) => {}
                Err(_) => {
                    self.metrics.lost_shutdown.inc();
                    lost.push(Arc::clone(delivery));
                }
            }
            self.metrics.in_flight.dec();
        }
        lost
    }
}

/// The row that keeps a direct delivery over the end of the program, due at once.
fn rest_row(delivery: &Delivery, started: bool) -> NewRow {
    // Not known to be delivered, though it may be: a duplicate is better than a loss.
    let (attempts, failure) = if started {
        (delivery.attempt, Some(interrupted()))
    } else {
        (delivery.attempt - 1, None)
    };
    delivery.to_row(
        attempts,
        Fate::Due {
            after: Duration::ZERO,
            failure,
        },
    )
}

/// Repeats a store operation until it succeeds or the deadline is over; tries at least once.
fn persist<T>(
    deadline: Instant,
    operation: impl Fn() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    loop {
        match operation() {
            Err(_) if Instant::now() + TRY_PAUSE < deadline => std::thread::sleep(TRY_PAUSE),
            result => return result,
        }
    }
}
