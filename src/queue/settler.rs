//! Carries out in batches what workers decided about claimed rows.
//!
//! Owns the settlements until they are stored. One that never gets there costs nothing but a
//! redelivery: the lease runs out. One that the store refuses holds up no other.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use uuid::Uuid;

use super::batch::{self, Part, Stopped};
use super::health::StoreHealth;
use super::{BATCH_ROWS_MAX, Decision, Settled, Settlement, Store, StoreError};
use crate::logger::LogLimit;
use crate::metrics::Metrics;
use crate::progress::Stage;
use crate::settle::{Failure, Verdict};

/// How long a settlement waits for others: nobody waits for it.
const LINGER: Duration = Duration::from_millis(5);
/// Pause between tries while the store does not work.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
const RETRY_PAUSES_MAX: usize = 8;

static GIVEN_UP: LogLimit = LogLimit::new();

/// The workers' side: hands over settlements, and knows how many are under way.
#[derive(Debug, Clone)]
pub struct Settlements {
    sender: Sender<Settlement>,
    pending: Arc<AtomicUsize>,
}

impl Settlements {
    /// Hands over a settlement; waits while too many are under way.
    pub fn send(&self, settlement: Settlement) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        if self.sender.send(settlement).is_err() {
            // No settler: the lease runs out, and the row is sent again.
            self.pending.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// As [`Settlements::send`], but only until a deadline: what is not handed over then is due
    /// again when its lease is over.
    pub fn send_until(&self, settlement: Settlement, deadline: Instant) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        if self.sender.send_deadline(settlement, deadline).is_err() {
            self.pending.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Settlements handed over and not stored yet.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }
}

/// The settling thread.
#[derive(Debug)]
pub struct Settler {
    store: Arc<dyn Store>,
    health: Arc<StoreHealth>,
    metrics: Arc<Metrics>,
    settlements: Receiver<Settlement>,
    /// At work while the store is asked.
    pub stage: Arc<Stage>,
    pending: Arc<AtomicUsize>,
}

impl Settler {
    /// A settler, and the way to hand it settlements.
    pub fn new(
        store: Arc<dyn Store>,
        health: Arc<StoreHealth>,
        metrics: Arc<Metrics>,
    ) -> (Settler, Settlements) {
        let (sender, settlements) = bounded(2 * BATCH_ROWS_MAX);
        let pending = Arc::new(AtomicUsize::new(0));
        let settler = Settler {
            store,
            health,
            metrics,
            settlements,
            stage: Arc::default(),
            pending: Arc::clone(&pending),
        };
        (settler, Settlements { sender, pending })
    }

    /// Runs until the last sender is gone and all it has sent is settled.
    pub fn run(self) {
        while let Ok(first) = self.settlements.recv() {
            let batch = self.gather(first);
            self.settle(&batch);
            self.pending.fetch_sub(batch.len(), Ordering::AcqRel);
        }
    }

    fn gather(&self, first: Settlement) -> Vec<Settlement> {
        let mut batch = vec![first];
        let deadline = Instant::now() + LINGER;
        while batch.len() < BATCH_ROWS_MAX {
            match self.settlements.recv_deadline(deadline) {
                Ok(settlement) => batch.push(settlement),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        batch
    }

    /// Settles all of a batch that the store takes, however often that has to be tried.
    fn settle(&self, mut batch: &[Settlement]) {
        let mut is_repeat = false;
        while !batch.is_empty() {
            let mut unsettled = Vec::new();
            let result = batch::carry_out(
                batch,
                |part| {
                    let settled = self.ask(|store| store.settle(part))?;
                    self.count(part, settled, is_repeat)
                },
                |part| {
                    if let Part::Refused(at, why) = part {
                        unsettled.push((at, why));
                    }
                },
            );
            for (at, why) in unsettled {
                self.bury(&batch[at], why);
            }
            match result {
                Ok(()) => return,
                Err(Stopped { from, error }) => {
                    batch = &batch[from..];
                    if error.is_refusal() {
                        return give_up(batch, &error);
                    }
                    // What was settled already, by a try whose answer was lost, is stale then.
                    is_repeat |= error.is_outage();
                    self.pause();
                }
            }
        }
    }

    fn ask<T>(
        &self,
        operation: impl FnOnce(&dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let work = self.stage.work();
        let result = operation(&*self.store);
        drop(work);
        self.health.note("settle", result, &self.metrics)
    }

    /// A settlement that the store refuses alone: the row goes to the dead letters, if that is
    /// taken, or else its lease runs out.
    fn bury(&self, refused: &Settlement, why: String) {
        let error = StoreError::Refused(why);
        let buried = Settlement {
            decision: Decision::Attempted(Verdict::Bury(Failure {
                status: None,
                error: format!("what became of it could not be noted: {error}"),
            })),
            ..refused.clone()
        };
        let is_delivered = refused.decision == Decision::Attempted(Verdict::Delivered);
        // What was delivered shall not look as if it were not.
        let result = match is_delivered {
            true => Err(error),
            false => self.ask(|store| store.settle(&[buried])),
        };
        match result {
            Ok(settled) => self.health.depth.leave(settled.buried),
            Err(error) => give_up(std::slice::from_ref(refused), &error),
        }
    }

    /// Waits for the store, which the poller tries; but not for ever, as that may have ended.
    fn pause(&self) {
        for _ in 0..RETRY_PAUSES_MAX {
            std::thread::sleep(RETRY_PAUSE);
            if self.health.fault().is_none() {
                return;
            }
        }
    }

    /// Counts what was settled. After a try without an answer, what is gone was settled by that.
    fn count(
        &self,
        batch: &[Settlement],
        settled: Settled,
        is_repeat: bool,
    ) -> Result<(), StoreError> {
        let mut delivered = settled.delivered;
        if settled.stale > 0 && (is_repeat || settled.is_repeat) {
            delivered = delivered.max(self.delivered_before(batch)?);
        }
        let stale = settled.stale.saturating_sub(delivered - settled.delivered);
        #[expect(clippy::cast_precision_loss, reason = "at most BATCH_ROWS_MAX")]
        self.metrics.batch_settle.observe(batch.len() as f64);
        self.health.depth.leave(delivered + settled.buried);
        self.metrics.delivered.inc_by(delivered);
        self.metrics.stale.inc_by(stale);
        Ok(())
    }

    /// How many of those that were delivered are in the store no more.
    fn delivered_before(&self, batch: &[Settlement]) -> Result<u64, StoreError> {
        let delivered = Decision::Attempted(Verdict::Delivered);
        let delivered = batch.iter().filter(|one| one.decision == delivered);
        let ids: HashSet<Uuid> = delivered.map(|one| one.id).collect();
        let ids: Vec<Uuid> = ids.into_iter().collect();
        let present = self.ask(|store| store.present(&ids))?;
        Ok((ids.len() - present.len()) as u64)
    }
}

/// Names settlements that the store does not take.
fn give_up(batch: &[Settlement], error: &StoreError) {
    for settlement in batch {
        if let Some(suppressed) = GIVEN_UP.allow() {
            let Settlement { id, attempt, .. } = settlement;
            log::error!(id:%, attempt, error:%, suppressed; "the store does not take what became of a request, its lease runs out");
        }
    }
}
