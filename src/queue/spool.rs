//! The spool: a SQLite file beside a Postgres store, for what that does not take while it is down.
//!
//! Rows are committed here before their senders are answered, and moved to the store when it
//! works again, the oldest first: appended there, then removed here. A crash in between repeats
//! the append, which leaves alone what is there already. Nothing is sent from here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select};
use uuid::Uuid;

use super::health::StoreHealth;
use super::poller::Wake;
use super::sqlite::{SpoolPosition, SqliteStore};
use super::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, Fate, NewRow, Store, StoreError};
use crate::logger::LogLimit;
use crate::metrics::Metrics;

/// How long a store that has a spool may take for an append: its senders are answered within a
/// second, whatever becomes of it.
pub const APPEND_TIMEOUT: Duration = Duration::from_millis(500);
/// 1 GiB: enough for a long outage, and a bound to what an outage takes of the disk.
const PAGES_MAX: u32 = 1 << 18;
/// Pause between looks at a store that does not work.
const LOOK: Duration = Duration::from_millis(250);
/// Pause before rows are tried again that the store refuses.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

static SPOOLING: LogLimit = LogLimit::new();
static FAILED: LogLimit = LogLimit::new();
static REFUSED: LogLimit = LogLimit::new();

/// The side of those who append.
#[derive(Debug)]
pub struct Spool {
    file: SqliteStore,
    metrics: Arc<Metrics>,
    /// Tells the mover that there is something.
    filled: Sender<()>,
    /// Whether the last append succeeded.
    works: AtomicBool,
    /// Held while the file and the number of its rows in the metrics change.
    counting: Mutex<()>,
}

impl Spool {
    /// A spool, and where it tells that there is something in it.
    pub fn new(file: SqliteStore, metrics: Arc<Metrics>) -> (Spool, Receiver<()>) {
        let (filled, when_filled) = bounded(1);
        let file = file.with_pages_max(PAGES_MAX);
        let spool = Spool {
            file,
            metrics,
            filled,
            works: AtomicBool::new(true),
            counting: Mutex::default(),
        };
        (spool, when_filled)
    }

    /// Whether it took what it was given last.
    pub fn works(&self) -> bool {
        self.works.load(Ordering::Relaxed)
    }

    /// As [`Store::shortage`].
    pub fn shortage(&self) -> Option<String> {
        self.file.shortage()
    }

    /// As [`Store::close`].
    ///
    /// # Errors
    /// The same.
    pub fn close(&self) -> Result<(), StoreError> {
        self.file.close()
    }

    /// Commits rows. Nobody here sends what was to be leased, so that it just waits.
    ///
    /// # Errors
    /// As [`Store::append`].
    pub fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        let rows: Vec<_> = rows.iter().map(waiting).collect();
        let counting = self.counting();
        let result = self.file.append(&rows);
        if result.is_ok() {
            self.metrics.spool.rows.add(rows.len() as i64);
        }
        drop(counting);
        self.works.store(result.is_ok(), Ordering::Relaxed);
        match &result {
            Ok(()) => {
                if let Some(suppressed) = SPOOLING.allow() {
                    log::warn!(suppressed; "requests go to the spool until the store works");
                }
                self.metrics.spool.spooled.inc_by(rows.len() as u64);
                // Full: it has been told already.
                let _ = self.filled.try_send(());
            }
            Err(error) => {
                if let Some(suppressed) = FAILED.allow() {
                    log::error!(error:%, suppressed; "spool does not work");
                }
            }
        }
        result
    }

    fn counting(&self) -> MutexGuard<'_, ()> {
        self.counting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let _counting = self.counting();
        self.file.remove(ids)?;
        self.metrics.spool.rows.sub(ids.len() as i64);
        Ok(())
    }

    /// Counts anew: what an earlier run has left, and an id that was there already and has been
    /// counted twice.
    fn count(&self) {
        let _counting = self.counting();
        if let Ok(sample) = self.file.sample() {
            let rows = sample.waiting + sample.leased + sample.dead;
            let rows = i64::try_from(rows).unwrap_or(i64::MAX);
            self.metrics.spool.rows.set(rows);
        }
    }
}

fn waiting(row: &NewRow) -> NewRow {
    match &row.fate {
        Fate::Leased(_) => NewRow {
            request: Arc::clone(&row.request),
            attempt: row.attempt.saturating_sub(1),
            fate: Fate::Due {
                after: Duration::ZERO,
                failure: None,
            },
        },
        Fate::Due { .. } | Fate::Dead(_) => row.clone(),
    }
}

/// The thread that moves rows to the store.
#[derive(Debug)]
pub struct Mover {
    pub spool: Arc<Spool>,
    pub store: Arc<dyn Store>,
    pub health: Arc<StoreHealth>,
    pub metrics: Arc<Metrics>,
    pub filled: Receiver<()>,
    pub wake: Wake,
    /// Closed to make it end.
    pub stop: Receiver<()>,
}

impl Mover {
    /// Runs until `stop` is closed.
    pub fn run(self) {
        // What an earlier run has left behind.
        let mut pause = Some(Duration::ZERO);
        loop {
            let wait = pause.map_or_else(crossbeam_channel::never, crossbeam_channel::after);
            select! {
                recv(self.stop) -> _ => return,
                recv(self.filled) -> _ => {}
                recv(wait) -> _ => {}
            }
            pause = if self.health.fault().is_some() {
                Some(LOOK)
            } else {
                self.move_all()
            };
        }
    }

    /// Moves what can be moved. Returns when to come again, if anything is left.
    fn move_all(&self) -> Option<Duration> {
        let (mut position, mut moved, mut refused) = (SpoolPosition::default(), 0, 0);
        loop {
            if self.stop.try_recv() == Err(crossbeam_channel::TryRecvError::Disconnected) {
                return None;
            }
            let oldest = self
                .spool
                .file
                .oldest(position, BATCH_ROWS_MAX, BATCH_BYTES_MAX);
            let rows = match oldest {
                Ok(rows) => rows,
                Err(error) => {
                    if let Some(suppressed) = FAILED.allow() {
                        log::error!(error:%, suppressed; "spool does not work");
                    }
                    return Some(REFUSED_PAUSE);
                }
            };
            let Some((last, _)) = rows.last() else {
                self.spool.count();
                if moved > 0 {
                    log::info!(moved, refused; "spool is moved to the store");
                }
                return (refused > 0).then_some(REFUSED_PAUSE);
            };
            position = *last;
            let rows: Vec<_> = rows.into_iter().map(|(_, row)| row).collect();
            match self.move_batch(&rows) {
                Ok(count) => {
                    moved += count;
                    refused += rows.len() - count;
                }
                Err(_) => {
                    self.spool.count();
                    return Some(LOOK);
                }
            }
        }
    }

    /// Moves rows, or those of them that the store takes; returns how many.
    fn move_batch(&self, rows: &[NewRow]) -> Result<usize, StoreError> {
        let result = self.store.append(rows);
        if matches!(result, Err(StoreError::Refused(_))) {
            return self.move_singly(rows);
        }
        self.health.note("append", result, &self.metrics)?;
        let ids: Vec<Uuid> = rows.iter().map(|row| row.request.id).collect();
        self.spool.remove(&ids)?;
        self.health.depth.add(rows.len() as i64);
        self.metrics.spool.moved.inc_by(rows.len() as u64);
        self.wake.wake();
        Ok(rows.len())
    }

    /// Moves those of the rows that the store takes, when it does not take all: it may be one of
    /// them that it refuses. If it takes none, it is the store.
    fn move_singly(&self, rows: &[NewRow]) -> Result<usize, StoreError> {
        let mut moved = 0;
        for row in rows {
            let result = self.store.append(std::slice::from_ref(row));
            match result {
                Ok(()) => {
                    self.spool.remove(&[row.request.id])?;
                    self.metrics.spool.moved.inc();
                    self.wake.wake();
                    moved += 1;
                }
                Err(StoreError::Refused(error)) if moved > 0 || rows.len() == 1 => {
                    if let Some(suppressed) = REFUSED.allow() {
                        log::error!(id:% = row.request.id, error, suppressed; "the store refuses a row, it stays in the spool");
                    }
                }
                Err(error) => return self.health.note("append", Err(error), &self.metrics),
            }
        }
        Ok(moved)
    }
}
