//! Carries out in batches what workers decided about claimed rows.
//!
//! Owns the settlements until they are stored. One that never gets there costs nothing but a
//! redelivery: the lease runs out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::health::StoreHealth;
use super::{BATCH_ROWS_MAX, Settled, Settlement, Store};
use crate::metrics::Metrics;
use crate::progress::Stage;

/// How long a settlement waits for others: nobody waits for it.
const LINGER: Duration = Duration::from_millis(5);
/// Pause between tries while the store does not work.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
const RETRY_PAUSES_MAX: usize = 8;

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

    fn settle(&self, batch: &[Settlement]) {
        loop {
            let work = self.stage.work();
            let result = self.store.settle(batch);
            drop(work);
            match self.health.note("settle", result, &self.metrics) {
                Ok(settled) => return self.count(batch, &settled),
                // Repeating is safe: what was settled already is stale the second time.
                Err(_) => self.pause(),
            }
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

    fn count(&self, batch: &[Settlement], settled: &Settled) {
        #[expect(clippy::cast_precision_loss, reason = "at most BATCH_ROWS_MAX")]
        self.metrics.batch_settle.observe(batch.len() as f64);
        self.health.depth.leave(settled.delivered + settled.buried);
        self.metrics.delivered.inc_by(settled.delivered);
        self.metrics.stale.inc_by(settled.stale);
    }
}
