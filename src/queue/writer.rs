//! Group commit: one thread appends all rows that wait in one insert and one commit, and then
//! releases everyone who waits for it. Under load a commit carries hundreds of rows; idle, it
//! carries one at once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::health::StoreHealth;
use super::poller::Wake;
use super::spool::Spool;
use super::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, Fate, NewRow, Store, StoreError};
use crate::budget::{Budget, Copies};
use crate::metrics::Metrics;
use crate::progress::Stage;

/// A row on its way to the store, and whoever waits for it.
#[derive(Debug)]
struct Append {
    /// Taken by whoever comes first: the writer that starts on it, or the waiter who gives up.
    /// What nobody waits for any more is held no longer, however many of these there are.
    row: Arc<Mutex<Option<NewRow>>>,
    bytes: usize,
    committed: Sender<Committed>,
}

fn take(row: &Mutex<Option<NewRow>>) -> Option<NewRow> {
    row.lock().unwrap_or_else(PoisonError::into_inner).take()
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
    health: Arc<StoreHealth>,
    spool: Option<Arc<Spool>>,
    timeout: Duration,
}

impl Appender {
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
    /// as there may be.
    pub fn append_new(&self, row: NewRow) -> Option<Result<Place, StoreError>> {
        let depth = &self.health.depth;
        if !depth.try_enter() {
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
        let bytes = row.request.bytes();
        let row = Arc::new(Mutex::new(Some(row)));
        let (committed, answer) = bounded(1);
        let append = Append {
            row: Arc::clone(&row),
            bytes,
            committed,
        };
        let late = || StoreError::Unavailable(format!("no commit within {:?}", self.timeout));
        self.appends
            .send_deadline(append, deadline)
            .map_err(|_| late())?;
        answer.recv_deadline(deadline).unwrap_or_else(|_| {
            // Not started on: it never will be. Else its end is not known.
            take(&row);
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
    /// Tells how large a batch may be; without one, [`BATCH_BYTES_MAX`].
    pub budget: Option<Arc<Budget>>,
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
            budget: None,
            appends: receiver,
        };
        (writer, appender)
    }

    /// Runs until the last [`Appender`] is gone and all it has sent is stored.
    pub fn run(self) {
        let mut next = None;
        while let Some(first) = next.take().or_else(|| self.appends.recv().ok()) {
            let (rows, waiting, left) = self.gather(first);
            next = left;
            if !rows.is_empty() {
                let _work = self.stage.work();
                let _copies = self.copies(&rows);
                self.commit(&rows, &waiting);
            }
        }
    }

    /// A statement is written down, and then once more on its way to the server.
    fn copies(&self, rows: &[NewRow]) -> Option<Copies> {
        let bytes: usize = rows.iter().map(|row| row.request.bytes()).sum();
        let budget = self.budget.as_ref()?;
        Some(budget.copying(2 * bytes))
    }

    /// A batch, who waits for it, and what did not fit into it any more.
    fn gather(&self, first: Append) -> (Vec<NewRow>, Vec<Sender<Committed>>, Option<Append>) {
        let budget = self.budget.as_ref();
        let bytes_max = budget.map_or(BATCH_BYTES_MAX, |budget| budget.batch_bytes_max());
        let (mut rows, mut waiting, mut bytes) = (Vec::new(), Vec::new(), 0);
        for append in std::iter::once(first).chain(self.appends.try_iter()) {
            if !rows.is_empty() && bytes + append.bytes > bytes_max {
                return (rows, waiting, Some(append));
            }
            let Some(row) = take(&append.row) else {
                // Its waiter has given up and found another way.
                continue;
            };
            bytes += append.bytes;
            rows.push(row);
            waiting.push(append.committed);
            if rows.len() >= BATCH_ROWS_MAX {
                break;
            }
        }
        (rows, waiting, None)
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::queue::sqlite::SqliteStore;
    use crate::request::{Peer, Request};

    /// Over a store that is never opened.
    fn writer(timeout: Duration) -> (Writer, Appender) {
        let store = SqliteStore::new("nowhere/queue.sqlite".into(), true, timeout);
        Writer::new(
            Arc::new(store),
            None,
            Arc::default(),
            Arc::new(Metrics::new(1).unwrap()),
            Wake::new().0,
            timeout,
        )
    }

    fn row(body_bytes: usize) -> NewRow {
        let (fields, body) = (std::iter::empty(), vec![b'x'; body_bytes]);
        let now = SystemTime::UNIX_EPOCH;
        let request = Request::record("POST", "/", fields, Peer::default(), body, now);
        NewRow {
            request: Arc::new(request.unwrap()),
            attempt: 0,
            fate: Fate::Leased(Duration::ZERO),
        }
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_held() {
        let (writer, appender) = writer(Duration::from_millis(1));
        let row = row(1);
        for _ in 0..3 {
            assert!(appender.append(row.clone()).is_err());
        }
        assert_eq!(Arc::strong_count(&row.request), 1);
        let first = writer.appends.recv().unwrap();
        let (rows, waiting, left) = writer.gather(first);
        assert!(rows.is_empty() && waiting.is_empty() && left.is_none());
    }

    #[test]
    fn no_batch_of_several_rows_is_larger_than_it_may_be() {
        let (mut writer, appender) = writer(Duration::ZERO);
        // 256 KiB for a batch.
        writer.budget = Some(Budget::new(0));
        let sizes = [100_000, 100_000, 100_000, 1_000_000, 1, 1];
        for row in sizes.map(row) {
            let append = Append {
                bytes: row.request.bytes(),
                row: Arc::new(Mutex::new(Some(row))),
                committed: bounded(1).0,
            };
            appender.appends.send(append).unwrap();
        }
        let (mut batches, mut next) = (Vec::new(), None);
        while let Some(first) = next.take().or_else(|| writer.appends.try_recv().ok()) {
            let (rows, waiting, left) = writer.gather(first);
            assert_eq!(rows.len(), waiting.len());
            batches.push(rows.len());
            next = left;
        }
        assert_eq!(batches, [2, 1, 1, 2]);
    }
}
