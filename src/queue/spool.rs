//! The spool: a SQLite file beside a Postgres store, for what that does not take while it is down.
//!
//! Rows are committed here before their senders are answered, and moved to the store by the
//! [mover](super::mover) when it works again. Nothing is sent from here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use uuid::Uuid;

use super::sqlite::{SpoolPosition, SqliteStore};
use super::{BATCH_ROWS_MAX, Fate, NewRow, Store, StoreError};
use crate::logger::LogLimit;
use crate::metrics::Metrics;

/// How long senders wait for a store that has a spool: they are answered within a second, whatever
/// becomes of the append.
pub const APPEND_TIMEOUT: Duration = Duration::from_millis(500);
/// 1 GiB: enough for a long outage, and a bound to what an outage takes of the disk.
const PAGES_MAX: u32 = 1 << 18;

static SPOOLING: LogLimit = LogLimit::new();
static FAILED: LogLimit = LogLimit::new();

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

    /// As [`Store::other_process`].
    pub fn other_process(&self) -> Option<String> {
        self.file.other_process()
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
                    log::warn!(suppressed; "requests go to the spool until the store takes them");
                }
                self.metrics.spool.spooled.inc_by(rows.len() as u64);
                // Full: it has been told already.
                let _ = self.filled.try_send(());
            }
            Err(error) => report(error),
        }
        result
    }

    /// The oldest rows after `after`, with where they lie: as many as one batch takes whose bodies
    /// have `bytes_max` bytes together, and one in any case.
    ///
    /// # Errors
    /// The file's.
    pub(super) fn oldest(
        &self,
        after: SpoolPosition,
        bytes_max: usize,
    ) -> Result<Vec<(SpoolPosition, NewRow)>, StoreError> {
        let oldest = self.file.oldest(after, BATCH_ROWS_MAX, bytes_max);
        oldest.inspect_err(report)
    }

    fn counting(&self) -> MutexGuard<'_, ()> {
        self.counting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes rows that are in the store.
    ///
    /// # Errors
    /// The file's; repeating it is safe.
    pub(super) fn remove(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let _counting = self.counting();
        self.file.remove(ids).inspect_err(report)?;
        self.metrics.spool.rows.sub(ids.len() as i64);
        Ok(())
    }

    /// Counts anew: what an earlier run has left, and an id that was there already and has been
    /// counted twice.
    pub(super) fn count(&self) {
        let _counting = self.counting();
        if let Ok(sample) = self.file.sample() {
            let rows = sample.waiting + sample.leased + sample.dead;
            let rows = i64::try_from(rows).unwrap_or(i64::MAX);
            self.metrics.spool.rows.set(rows);
        }
    }
}

fn report(error: &StoreError) {
    if let Some(suppressed) = FAILED.allow() {
        log::error!(error:%, suppressed; "spool does not work");
    }
}

/// Nobody sends it from here.
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
