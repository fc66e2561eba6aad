//! The end of a run: lets workers finish, then stores what they did not.
//!
//! Every accepted request is in the store, a channel, a worker's slot, or for an instant on its
//! way between these. What is counted in memory is waited for; what is then left is stored, by a
//! thread that is not waited for without end: a disk may never answer.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use uuid::Uuid;

use crate::direct;
use crate::metrics::Metrics;
use crate::queue::batch::{self, Part, Stopped};
use crate::queue::doubts::Broken;
use crate::queue::mover::refused;
use crate::queue::poller::Room;
use crate::queue::settler::Settlements;
use crate::queue::spool::Spool;
use crate::queue::{
    BATCH_BYTES_MAX, BATCH_ROWS_MAX, ByClass, Class, Fate, NewRow, Settlement, Store, StoreError,
};
use crate::thread::Threads;
use crate::worker::{Delivery, Origin, Places, Slot, interrupted};

/// How often the end of the work is looked for.
const LOOK: Duration = Duration::from_millis(10);
/// How long requests are looked for that are between a channel and a slot.
const GATHER_TIME: Duration = Duration::from_secs(3);
/// Of the time for storing, what is left for leases, which end by themselves.
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

    /// Stores all that is left and gives back all leases, until `end`. Returns how many
    /// acknowledged requests could not be stored and are lost, those of the whole run included.
    pub fn store_rest(mut self, end: Instant) -> u64 {
        self.hurry = None;
        let (unstored, unsettled) = self.gather();
        let (all, released) = (unstored.len(), unsettled.len());
        let rest = Arc::new(Unstored::new(&self, unstored, unsettled, end));
        let (done, is_done) = bounded(0);
        let work = {
            let rest = Arc::clone(&rest);
            move || {
                rest.store_all();
                // Nobody waits for it any more when the time is over.
                let _ = done.send(());
            }
        };
        match Threads::default().spawn("drain", work) {
            Ok(()) if is_done.recv_deadline(end) == Err(RecvTimeoutError::Timeout) => {
                log::error!("the store does not answer, what is left is not waited for");
            }
            Ok(()) => {}
            // Better without a bound than not at all.
            Err(_) => rest.store_all(),
        }
        let settled_by = end.min(Instant::now() + SETTLE_TIME);
        while self.settlements.pending() > 0 && Instant::now() < settled_by {
            std::thread::sleep(LOOK);
        }
        let unstorable = rest.give_up();
        let lost = unstorable + self.count_missing();
        log::info!(stored = all - unstorable, released, lost; "stopped");
        lost as u64 + self.metrics.lost_refused.get()
    }

    /// What is still counted when all that was found is stored or lost was in no place where a
    /// request can be: a thread has taken it along in a panic, or holds it and is not run. Nobody
    /// can say that it is safe, so it counts as lost, though not even its id is known.
    fn count_missing(&self) -> usize {
        let missing = self.in_flight();
        if missing > 0 {
            self.metrics.lost_shutdown.inc_by(missing as u64);
            self.metrics.in_flight.sub(missing as i64);
            log::error!(missing; "lost: acknowledged, but in no channel and with no worker");
        }
        missing
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
            let leases = self.leased().saturating_sub(unsettled.len());
            let is_all = unstored.len() >= self.in_flight() && leases == 0;
            if !is_all && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            if leases > 0 {
                log::warn!(leases; "rows not found, they are due when their leases are over");
            }
            return (unstored, unsettled);
        }
    }
}

/// What exists nowhere but in memory, for the thread that stores it and the one that waits.
struct Unstored {
    store: Arc<dyn Store>,
    spool: Option<Arc<Spool>>,
    metrics: Arc<Metrics>,
    end: Instant,
    unstored: Vec<Rest>,
    unsettled: Vec<Settlement>,
    /// Not stored by now. Whoever takes an id out counts it.
    ids: Mutex<HashSet<Uuid>>,
}

impl Unstored {
    fn new(
        drain: &Drain,
        unstored: Vec<Rest>,
        unsettled: Vec<Settlement>,
        end: Instant,
    ) -> Unstored {
        let ids = unstored.iter().map(|(one, _)| one.request.id).collect();
        Unstored {
            store: Arc::clone(&drain.store),
            spool: drain.spool.clone(),
            metrics: Arc::clone(&drain.metrics),
            end,
            unstored,
            unsettled,
            ids: Mutex::new(ids),
        }
    }

    fn ids(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends all again and again until it is stored or the time is over; then settles.
    fn store_all(&self) {
        let mut rest = self.unstored.clone();
        let deadline = self.end.checked_sub(SETTLE_TIME).unwrap_or(self.end);
        loop {
            rest = self.try_all(rest);
            if rest.is_empty() || Instant::now() + TRY_PAUSE >= deadline {
                break;
            }
            std::thread::sleep(TRY_PAUSE);
        }
        self.settle(&self.unsettled);
    }

    /// Tries once with each batch. Returns what was not stored.
    fn try_all(&self, rest: Vec<Rest>) -> Vec<Rest> {
        let (mut left, mut is_down) = (Vec::new(), false);
        for batch in batches(rest) {
            let rows: Vec<_> = batch.iter().map(rest_row).collect();
            let mut unstorable = Vec::new();
            let result = batch::carry_out(
                &rows,
                |part| self.append(part, &mut is_down),
                |part| match part {
                    Part::Taken(range, ()) => self.stored(&rows[range]),
                    Part::Refused(at, why) => unstorable.push((at, why)),
                },
            );
            for (at, why) in unstorable {
                if self.bury(&rows[at], &why, &mut is_down).is_err() {
                    left.push(batch[at].clone());
                }
            }
            if let Err(Stopped { from, .. }) = result {
                left.extend_from_slice(&batch[from..]);
            }
        }
        left
    }

    /// Appends to the store, or else to the spool.
    fn append(&self, rows: &[NewRow], is_down: &mut bool) -> Result<(), StoreError> {
        let mut result = Err(StoreError::Unavailable("as before".into()));
        if !*is_down {
            // Whatever becomes of it, there is time for the spool.
            let left = self.end.saturating_duration_since(Instant::now());
            let appended = self.store.append_within(rows, left / 2, Broken::Repeat);
            result = appended.map_err(|not| not.error);
            *is_down = matches!(&result, Err(error) if error.is_outage());
        }
        match (&self.spool, result) {
            (Some(spool), Err(error)) if !error.is_refusal() => spool.append(rows),
            (_, result) => result,
        }
    }

    /// What the store refuses alone becomes a dead letter, or waits in the spool for the operator.
    fn bury(&self, row: &NewRow, why: &str, is_down: &mut bool) -> Result<(), StoreError> {
        let failure = match &row.fate {
            Fate::Due { failure, .. } => failure.clone(),
            Fate::Leased(_) | Fate::Dead(_) => None,
        };
        let dead = NewRow {
            fate: Fate::Dead(refused(why, failure)),
            ..row.clone()
        };
        let dead = std::slice::from_ref(&dead);
        self.append(dead, is_down)
            .or_else(|error| match &self.spool {
                Some(spool) => spool.append(dead),
                None => Err(error),
            })?;
        self.stored(dead);
        Ok(())
    }

    fn stored(&self, rows: &[NewRow]) {
        let mut ids = self.ids();
        let stored = rows.iter().filter(|row| ids.remove(&row.request.id));
        self.metrics.in_flight.sub(stored.count() as i64);
    }

    /// Counts and names what is not stored by now.
    fn give_up(&self) -> usize {
        let lost = std::mem::take(&mut *self.ids());
        self.metrics.lost_shutdown.inc_by(lost.len() as u64);
        self.metrics.in_flight.sub(lost.len() as i64);
        for id in lost.iter().take(NAMED_MAX) {
            log::error!(id:%; "lost: neither delivered nor stored");
        }
        lost.len()
    }

    fn settle(&self, settlements: &[Settlement]) {
        for batch in settlements.chunks(BATCH_ROWS_MAX) {
            let mut batch = batch;
            while let Err(Stopped { from, error }) =
                batch::carry_out(batch, |part| self.store.settle(part).map(drop), |_| {})
            {
                batch = &batch[from..];
                let is_over = Instant::now() + TRY_PAUSE >= self.end;
                if is_over || error.is_refusal() {
                    log::warn!(error:%; "rows could not be given back, they are due when their leases are over");
                    return;
                }
                std::thread::sleep(TRY_PAUSE);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::queue::health::StoreHealth;
    use crate::queue::poller::Wake;
    use crate::queue::settler::Settler;
    use crate::queue::sqlite::SqliteStore;
    use crate::request::{Peer, Request};

    fn request() -> Arc<Request> {
        let peer = Peer::default();
        let fields = std::iter::empty::<(&str, &[u8])>();
        let now = std::time::SystemTime::now();
        Arc::new(Request::record("POST", "/", fields, peer, Vec::new(), now).unwrap())
    }

    /// As when a thread has panicked between the channel and its slot.
    #[test]
    fn what_is_counted_and_found_nowhere_is_lost_and_the_rest_is_stored() {
        let directory = tempfile::tempdir().unwrap();
        let timeout = Duration::from_secs(60);
        let path = directory.path().join("a.sqlite");
        let store: Arc<dyn Store> = Arc::new(SqliteStore::new(path, true, timeout));
        let metrics = Arc::new(Metrics::new(1).unwrap());
        let health = Arc::new(StoreHealth::new(crate::queue::depth::Depth::new(0)));
        let (_settler, settlements) =
            Settler::new(Arc::clone(&store), health, Arc::clone(&metrics));
        let (sender, direct, _overseer) = direct::bounded(8);
        let never = crossbeam_channel::never;
        let budget = Budget::new(1024);
        for _ in 0..2 {
            let delivery = Delivery::direct(request(), budget.permit());
            sender.try_send(delivery).unwrap();
        }
        metrics.in_flight.set(5);
        let places = Arc::new(Places::new(1));
        // A lease that is not found is not lost: its row is in the store.
        assert!(places.try_take());
        let drain = Drain {
            store: Arc::clone(&store),
            spool: None,
            metrics: Arc::clone(&metrics),
            room: Arc::new(Room::new(2, Wake::new().0)),
            places,
            settlements,
            direct,
            claimed: ByClass {
                fresh: never(),
                retried: never(),
            },
            slots: vec![Arc::default()],
            hurry: None,
        };
        assert_eq!(
            drain.store_rest(Instant::now() + Duration::from_secs(10)),
            3
        );
        assert_eq!(metrics.lost_shutdown.get(), 3);
        assert_eq!(metrics.in_flight.get(), 0);
        assert_eq!(store.sample().unwrap().waiting, 2);
    }
}
