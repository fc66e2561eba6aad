//! Group commit: one thread appends all rows that wait in one insert and one commit, and then
//! releases everyone who waits for it. Under load a commit carries hundreds of rows; idle, it
//! carries one at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::health::StoreHealth;
use super::poller::Wake;
use super::spool::Spool;
use super::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, Fate, NewRow, Store, StoreError};
use crate::metrics::Metrics;
use crate::progress::Stage;

/// A row on its way to the store, and whoever waits for it.
#[derive(Debug)]
struct Append {
    row: NewRow,
    /// Set by whoever comes first: the writer that starts on it, or the waiter who gives up.
    taken: Arc<AtomicBool>,
    committed: Sender<Committed>,
}

type Committed = Result<Place, StoreError>;

/// Where a row was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Store,
    /// Waits there for the store, also if it was to be leased.
    Spool,
}

/// The side of those who want rows stored.
#[derive(Debug, Clone)]
pub struct Appender {
    appends: Sender<Append>,
    store: Arc<dyn Store>,
    health: Arc<StoreHealth>,
    spool: Option<Arc<Spool>>,
    timeout: Duration,
}

impl Appender {
    /// Why no new row would be taken though there is something that works, if so.
    pub fn shortage(&self) -> Option<String> {
        match (&self.spool, self.health.fault()) {
            (Some(spool), Some(_)) => spool.shortage(),
            _ => self.store.shortage(),
        }
    }

    /// Whether rows are taken while the store does not work.
    pub fn has_spool(&self) -> bool {
        self.spool.as_ref().is_some_and(|spool| spool.works())
    }

    /// Stores a row; returns once it is committed.
    ///
    /// # Errors
    /// At once while the store is known not to work and there is no spool; else the store's or the
    /// spool's error, or that there was no answer within `db.timeout`. In that last case the row
    /// may be committed later all the same, which makes it a duplicate at worst.
    pub fn append(&self, row: NewRow) -> Result<Place, StoreError> {
        let depth = &self.health.depth;
        depth.enter();
        let is_dead = matches!(row.fate, Fate::Dead(_));
        let result = self.commit(row);
        if is_dead || result != Ok(Place::Store) {
            depth.leave(1);
        }
        result
    }

    /// As [`Appender::append`], for a row that may be refused: `None` when there are as many rows
    /// as there may be, or the disk is nearly full.
    pub fn append_new(&self, row: NewRow) -> Option<Result<Place, StoreError>> {
        let depth = &self.health.depth;
        if self.shortage().is_some() || !depth.try_enter() {
            return None;
        }
        let result = self.commit(row);
        if result != Ok(Place::Store) {
            depth.leave(1);
        }
        Some(result)
    }

    fn commit(&self, row: NewRow) -> Result<Place, StoreError> {
        if let Some(fault) = self.health.fault()
            && self.spool.is_none()
        {
            return Err(fault);
        }
        let deadline = Instant::now() + self.timeout;
        let taken = Arc::new(AtomicBool::new(false));
        let (committed, answer) = bounded(1);
        let append = Append {
            row,
            taken: Arc::clone(&taken),
            committed,
        };
        let late = || StoreError::Unavailable(format!("no commit within {:?}", self.timeout));
        self.appends
            .send_deadline(append, deadline)
            .map_err(|_| late())?;
        answer.recv_deadline(deadline).unwrap_or_else(|_| {
            // Not started on: it never will be. Else its end is not known.
            taken.store(true, Ordering::Relaxed);
            Err(late())
        })
    }
}

/// The thread's side.
#[derive(Debug)]
pub struct Writer {
    pub store: Arc<dyn Store>,
    pub spool: Option<Arc<Spool>>,
    pub health: Arc<StoreHealth>,
    pub metrics: Arc<Metrics>,
    pub wake: Wake,
    /// At work while rows are committed.
    pub stage: Arc<Stage>,
    appends: Receiver<Append>,
}

impl Writer {
    /// A writer, and the way to hand it rows. `timeout` bounds the wait of each appender.
    pub fn new(
        store: Arc<dyn Store>,
        spool: Option<Arc<Spool>>,
        health: Arc<StoreHealth>,
        metrics: Arc<Metrics>,
        wake: Wake,
        timeout: Duration,
    ) -> (Writer, Appender) {
        let (sender, receiver) = bounded(2 * BATCH_ROWS_MAX);
        let appender = Appender {
            appends: sender,
            store: Arc::clone(&store),
            health: Arc::clone(&health),
            spool: spool.clone(),
            timeout,
        };
        let writer = Writer {
            store,
            spool,
            health,
            metrics,
            wake,
            stage: Arc::default(),
            appends: receiver,
        };
        (writer, appender)
    }

    /// Runs until the last [`Appender`] is gone and all it has sent is stored.
    pub fn run(self) {
        while let Ok(first) = self.appends.recv() {
            let (rows, waiting) = self.gather(first);
            if !rows.is_empty() {
                let _work = self.stage.work();
                self.commit(&rows, &waiting);
            }
        }
    }

    fn gather(&self, first: Append) -> (Vec<NewRow>, Vec<Sender<Committed>>) {
        let (mut rows, mut waiting, mut bytes) = (Vec::new(), Vec::new(), 0);
        for append in std::iter::once(first).chain(self.appends.try_iter()) {
            if append.taken.swap(true, Ordering::Relaxed) {
                // Its waiter has given up and found another way.
                continue;
            }
            let request = &append.row.request;
            bytes += request.body.len() + request.headers.as_bytes().len() + request.target.len();
            rows.push(append.row);
            waiting.push(append.committed);
            if rows.len() >= BATCH_ROWS_MAX || bytes >= BATCH_BYTES_MAX {
                break;
            }
        }
        (rows, waiting)
    }

    fn commit(&self, rows: &[NewRow], waiting: &[Sender<Committed>]) {
        let result = self.append(rows);
        if result.is_ok() {
            #[expect(clippy::cast_precision_loss, reason = "at most BATCH_ROWS_MAX")]
            self.metrics.batch_append.observe(rows.len() as f64);
        }
        for committed in waiting {
            if committed.send(result.clone()).is_err() && result.is_ok() {
                // Its waiter has given up and found another way: it may be delivered twice.
                self.metrics.late_commits.inc();
            }
        }
        let due_now = |row: &NewRow| matches!(row.fate, Fate::Due { after, .. } if after.is_zero());
        if result == Ok(Place::Store) && rows.iter().any(due_now) {
            self.wake.wake();
        }
    }

    /// Commits rows to the store, or else to the spool.
    fn append(&self, rows: &[NewRow]) -> Committed {
        let fault = match self.health.fault() {
            // Others have waited for it; the poller finds out when it works again.
            Some(fault) => fault,
            None => {
                let result = self.store.append(rows);
                match self.health.note("append", result, &self.metrics) {
                    Ok(()) => return Ok(Place::Store),
                    Err(error) => error,
                }
            }
        };
        let Some(spool) = &self.spool else {
            return Err(fault);
        };
        spool.append(rows).map(|()| Place::Spool)
    }
}
