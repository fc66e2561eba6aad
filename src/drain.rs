//! The end of a run: lets workers finish, then stores what they did not.
//!
//! Every accepted request is in the store, a channel, a worker's slot, or for an instant on its
//! way between these. What is counted in memory is waited for; what is then left is stored.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::direct;
use crate::metrics::Metrics;
use crate::queue::poller::Room;
use crate::queue::settler::Settlements;
use crate::queue::spool::Spool;
use crate::queue::{
    BATCH_BYTES_MAX, BATCH_ROWS_MAX, ByClass, Class, Fate, NewRow, Settlement, Store, StoreError,
};
use crate::worker::{Delivery, Origin, Places, Slot, interrupted};

/// How often the end of the work is looked for.
const LOOK: Duration = Duration::from_millis(10);
/// How long requests are looked for that are between a channel and a slot.
const GATHER_TIME: Duration = Duration::from_secs(1);
/// How long a store that does not work is tried with requests that exist nowhere else.
const APPEND_TIME: Duration = Duration::from_secs(6);
/// The same with leases, which end by themselves.
const SETTLE_TIME: Duration = Duration::from_secs(2);
const TRY_PAUSE: Duration = Duration::from_millis(200);
/// Lost requests that are named in the log.
const NAMED_MAX: usize = 1000;

/// All places a request can be in, and the ways into the store.
#[derive(Debug)]
pub struct Drain {
    pub store: Arc<dyn Store>,
    pub spool: Option<Arc<Spool>>,
    pub metrics: Arc<Metrics>,
    pub room: Arc<Room>,
    pub places: Arc<Places>,
    pub settlements: Settlements,
    pub direct: direct::Receiver<Delivery>,
    pub claimed: ByClass<Receiver<Delivery>>,
    pub slots: Vec<Arc<Slot>>,
    /// Dropped to make workers wait for nothing any more.
    pub hurry: Option<Sender<()>>,
}

/// A direct delivery, and whether its attempt has begun.
type Rest = (Arc<Delivery>, bool);

impl Drain {
    /// Gives back the rows that were claimed but that no worker has begun with.
    pub fn release_unstarted(&self, deadline: Instant) {
        for delivery in self.unstarted() {
            let class = Class::of(delivery.attempt);
            self.settlements
                .send_until(delivery.interrupted(false), deadline);
            self.room.leave(class);
        }
    }

    fn unstarted(&self) -> impl Iterator<Item = Delivery> {
        let ByClass { fresh, retried } = &self.claimed;
        fresh.try_iter().chain(retried.try_iter())
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
        while connections() > 0 || self.unfinished() > 0 || self.settlements.pending() > 0 {
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

    /// Counted, not looked for: a request on its way from one place to the next is in none.
    fn unfinished(&self) -> usize {
        self.in_flight() + self.leased()
    }

    fn leased(&self) -> usize {
        self.room.claimed() + self.places.taken()
    }

    fn in_flight(&self) -> usize {
        usize::try_from(self.metrics.in_flight.get()).unwrap_or(0)
    }

    /// Stores all that is left and gives back all leases. Returns how many acknowledged
    /// requests could not be stored and are lost.
    pub fn store_rest(mut self) -> u64 {
        self.hurry = None;
        let (unstored, unsettled) = self.gather();
        let (all, released) = (unstored.len(), unsettled.len());
        let lost = self.append(unstored);
        self.settle(&unsettled);
        log::info!(stored = all - lost, released, lost; "stopped");
        lost as u64
    }

    /// Takes everything out of channels and slots, until all that is counted is found.
    fn gather(&self) -> (Vec<Rest>, Vec<Settlement>) {
        let (mut unstored, mut unsettled) = (Vec::new(), Vec::new());
        let deadline = Instant::now() + GATHER_TIME;
        loop {
            let unstarted = self.direct.try_iter().chain(self.unstarted());
            let started = self.slots.iter().filter_map(|slot| slot.take());
            let rest = unstarted
                .map(|delivery| (Arc::new(delivery), false))
                .chain(started.map(|delivery| (delivery, true)));
            for (delivery, started) in rest {
                match delivery.origin {
                    Origin::Direct => unstored.push((delivery, started)),
                    Origin::Stored { .. } | Origin::Claimed { .. } => {
                        unsettled.push(delivery.interrupted(started));
                    }
                }
            }
            let is_all = unstored.len() >= self.in_flight() && unsettled.len() >= self.leased();
            if is_all || Instant::now() >= deadline {
                return (unstored, unsettled);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Appends in batches, each again and again until it is stored or the time is over. Returns
    /// how many requests could not be stored.
    fn append(&self, unstored: Vec<Rest>) -> usize {
        let deadline = Instant::now() + APPEND_TIME;
        let mut pending = batches(unstored);
        loop {
            let mut is_down = false;
            pending.retain(|batch| {
                let rows: Vec<_> = batch.iter().map(rest_row).collect();
                // A batch that fails for its rows does not hold up the others.
                let result = if is_down {
                    None
                } else {
                    Some(self.store.append(&rows))
                };
                is_down |= matches!(result, Some(Err(StoreError::Unavailable(_))));
                let is_spooled = || {
                    let spool = self.spool.as_ref();
                    spool.is_some_and(|spool| spool.append(&rows).is_ok())
                };
                let is_stored = matches!(result, Some(Ok(()))) || is_spooled();
                if is_stored {
                    self.metrics.in_flight.sub(rows.len() as i64);
                }
                !is_stored
            });
            if pending.is_empty() || Instant::now() + TRY_PAUSE >= deadline {
                break;
            }
            std::thread::sleep(TRY_PAUSE);
        }
        let lost = pending.concat();
        self.metrics.lost_shutdown.inc_by(lost.len() as u64);
        self.metrics.in_flight.sub(lost.len() as i64);
        for (delivery, _) in lost.iter().take(NAMED_MAX) {
            log::error!(id:% = delivery.request.id; "lost: neither delivered nor stored");
        }
        lost.len()
    }

    fn settle(&self, settlements: &[Settlement]) {
        let deadline = Instant::now() + SETTLE_TIME;
        for batch in settlements.chunks(BATCH_ROWS_MAX) {
            while self.store.settle(batch).is_err() {
                if Instant::now() + TRY_PAUSE >= deadline {
                    log::warn!(
                        "rows could not be given back, they are due when their leases are over"
                    );
                    return;
                }
                std::thread::sleep(TRY_PAUSE);
            }
        }
        while self.settlements.pending() > 0 && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
    }
}

/// Shares the rest into inserts of a size that stores like.
fn batches(rest: Vec<Rest>) -> Vec<Vec<Rest>> {
    let (mut batches, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for one in rest {
        bytes += one.0.request.body.len();
        batch.push(one);
        if batch.len() >= BATCH_ROWS_MAX || bytes >= BATCH_BYTES_MAX {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

/// The row that keeps a direct delivery over the end of the program, due at once.
fn rest_row((delivery, started): &Rest) -> NewRow {
    // Not known to be delivered, though it may be: a duplicate is better than a loss.
    let (attempts, failure) = if *started {
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
