//! Group commit: one thread appends all rows that wait in one insert and one commit, and then
//! releases everyone who waits for it. Under load a commit carries hundreds of rows; idle, it
//! carries one at once. A row that the store refuses fails nobody but its own sender.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::batch::{self, Part, Stopped};
use super::doubts::{Broken, End, Ending, Kept, NotAppended};
use super::health::StoreHealth;
use super::poller::Wake;
use super::spool::{self, Spool};
use super::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, Fate, NewRow, Store, StoreError};
use crate::budget::{Budget, Copies};
use crate::metrics::Metrics;
use crate::progress::Stage;

/// How often those who wait for a commit look whether the store was found to be down meanwhile.
const LOOK: Duration = Duration::from_millis(100);

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

    /// Which other process serves a file of ours, too, if one does.
    pub fn other_process(&self) -> Option<String> {
        let spool = self.spool.as_ref();
        let of_spool = || spool.and_then(|spool| spool.other_process());
        self.store.other_process().or_else(of_spool)
    }

    /// Whether the queue holds as many rows as it may.
    pub fn is_full(&self) -> bool {
        self.health.depth.is_full()
    }

    /// Whether rows are taken while the store does not work.
    pub fn has_spool(&self) -> bool {
        self.spool.as_ref().is_some_and(|spool| spool.works())
    }

    /// Stores a row; returns once it is committed.
    ///
    /// # Errors
    /// As soon as the store is known not to work and there is no spool; else the store's or the
    /// spool's error, or that there was no answer within `db.timeout`. When there was no answer the row
    /// may be committed later all the same, which makes it a duplicate at worst.
    /// [`StoreError::Refused`] is about this row alone: the store works, and does not take it.
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
        if self.spool.is_none()
            && let Some(fault) = self.fault()
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
        let result = self.wait(&answer, deadline);
        result.unwrap_or_else(|| {
            // Not started on: it never will be. Else its end is not known.
            take(&row);
            Err(self.fault().unwrap_or_else(late))
        })
    }

    /// Why there is no commit to be waited for, if so.
    fn fault(&self) -> Option<StoreError> {
        self.health.fault().or_else(|| self.store.hangs())
    }

    /// Waits for an answer, but not for a store that others have found to be down: an append that
    /// hangs would have all who are behind it wait for the same.
    fn wait(&self, answer: &Receiver<Committed>, deadline: Instant) -> Option<Committed> {
        loop {
            let look = deadline.min(Instant::now() + LOOK);
            match answer.recv_deadline(look) {
                Ok(committed) => return Some(committed),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let is_given_up = self.spool.is_none() && self.fault().is_some();
            if is_given_up || Instant::now() >= deadline {
                // It may have come in this instant.
                return answer.try_recv().ok();
            }
        }
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
    timeout: Duration,
    /// The append that took longer than senders are to wait, with a spool. Until it is over, what
    /// comes goes there at once.
    slow: Option<Slow>,
}

#[derive(Debug)]
struct Slow {
    ending: Ending,
    error: StoreError,
    since: Instant,
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
            budget: None,
            appends: receiver,
            timeout,
            slow: None,
        };
        (writer, appender)
    }

    /// Runs until the last [`Appender`] is gone and all it has sent is stored.
    pub fn run(mut self) {
        let stage = Arc::clone(&self.stage);
        let mut next = None;
        while let Some(first) = next.take().or_else(|| self.appends.recv().ok()) {
            let (rows, waiting, left) = self.gather(first);
            next = left;
            if !rows.is_empty() {
                let _work = stage.work();
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

    /// Commits rows and answers those who wait for them, part by part.
    fn commit(&mut self, rows: &[NewRow], waiting: &[Sender<Committed>]) {
        let (health, metrics, wake) = (
            Arc::clone(&self.health),
            Arc::clone(&self.metrics),
            self.wake.clone(),
        );
        let answer = |at: usize, result: Committed| {
            let is_late = waiting[at].send(result.clone()).is_err();
            if is_late && result.is_ok() {
                // Its waiter has given up and found another way: it may be delivered twice.
                metrics.late_commits.inc();
            }
        };
        let result = batch::carry_out(
            rows,
            |part| self.append(part),
            |part| match part {
                Part::Taken(range, place) => {
                    committed(&metrics, &rows[range.clone()], place, &wake);
                    if place == Place::Store {
                        let ids = rows[range.clone()].iter().map(|row| row.request.id);
                        health.doubts.appended(ids);
                    }
                    range.for_each(|at| answer(at, Ok(place)));
                }
                Part::Refused(at, why) => answer(at, Err(StoreError::Refused(why))),
            },
        );
        if let Err(Stopped { from, error }) = result {
            // Refused with others, which says nothing about it.
            let error = match error {
                StoreError::Refused(why) => {
                    StoreError::Unavailable(format!("it refuses whatever it is given: {why}"))
                }
                error => error,
            };
            (from..rows.len()).for_each(|at| answer(at, Err(error.clone())));
        }
    }

    /// Commits rows to the store, or else to the spool.
    fn append(&mut self, rows: &[NewRow]) -> Committed {
        let error = match self.may_ask() {
            Ok(()) => {
                let (within, broken) = self.terms();
                match self.store.append_within(rows, within, broken) {
                    Ok(()) => {
                        let noted = self.health.note("append", Ok(()), &self.metrics);
                        return noted.map(|()| Place::Store);
                    }
                    Err(not) => return self.not_appended(rows, not),
                }
            }
            // Others have waited for it; the poller finds out when it works again.
            Err(error) => error,
        };
        match &self.spool {
            Some(spool) => spool.append(rows).map(|()| Place::Spool),
            None => Err(error),
        }
    }

    /// Whether the store works, as far as is known, and is not at an append that takes too long.
    fn may_ask(&mut self) -> Result<(), StoreError> {
        if let Some(fault) = self.health.fault() {
            return Err(fault);
        }
        let Some(slow) = &self.slow else {
            return Ok(());
        };
        let end = slow.ending.look();
        let patience = match end {
            None => self.timeout,
            // All its connections were in use, which need not be for long.
            Some(End::NotBegun) => spool::APPEND_TIMEOUT,
            // A connection that broke may be the only one.
            Some(End::Committed | End::Nothing | End::Unknown) => Duration::ZERO,
        };
        let error = slow.error.clone();
        if slow.since.elapsed() < patience {
            return Err(error);
        }
        self.slow = None;
        match end {
            // Nothing in all its time.
            None => self.health.note("append", Err(error), &self.metrics),
            Some(_) => Ok(()),
        }
    }

    /// How long the store may take, and what to do when the connection breaks.
    fn terms(&self) -> (Duration, Broken) {
        match self.spool {
            Some(_) => (self.timeout.min(spool::APPEND_TIMEOUT), Broken::Tell),
            None => (self.timeout, Broken::Repeat),
        }
    }

    /// What did not get into the store, or is not known to have, goes to the spool, but for what
    /// the store refuses: it would be refused again.
    fn not_appended(&mut self, rows: &[NewRow], not: NotAppended) -> Committed {
        let NotAppended {
            error,
            ending,
            is_away,
        } = not;
        if error.is_outage() && !is_away && self.spool.is_some() {
            // Senders wait no longer. That says nothing about the store, which may do it yet.
            self.slow = Some(Slow {
                ending: ending.clone(),
                error: error.clone(),
                since: Instant::now(),
            });
        } else {
            let outcome: Result<(), _> = Err(error.clone());
            let _ = self.health.note("append", outcome, &self.metrics);
        }
        let is_refused = error.is_refusal();
        let ids = rows.iter().map(|row| row.request.id).collect();
        match &self.spool {
            Some(spool) if !is_refused => {
                // Before they are in the spool: from then on the mover would move them.
                let doubts = &self.health.doubts;
                let number = doubts.add(ids, ending, Kept::InSpool, &self.metrics);
                let result = spool.append(rows);
                if result.is_err() {
                    doubts.not_spooled(number);
                }
                result.map(|()| Place::Spool)
            }
            _ => {
                if !is_refused {
                    let doubts = &self.health.doubts;
                    doubts.add(ids, ending, Kept::Elsewhere, &self.metrics);
                }
                Err(error)
            }
        }
    }
}

fn committed(metrics: &Metrics, rows: &[NewRow], place: Place, wake: &Wake) {
    #[expect(clippy::cast_precision_loss, reason = "at most BATCH_ROWS_MAX")]
    metrics.batch_append.observe(rows.len() as f64);
    let due_now = |row: &NewRow| matches!(row.fate, Fate::Due { after, .. } if after.is_zero());
    if place == Place::Store && rows.iter().any(due_now) {
        wake.wake();
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
    fn a_store_whose_connections_are_in_use_is_not_down() {
        let (mut writer, _appender) = writer(Duration::from_secs(60));
        let error = StoreError::Unavailable("no free connection".into());
        let mut slow = |end, since| {
            writer.slow = Some(Slow {
                ending: Ending::over(end),
                error: error.clone(),
                since,
            });
            (writer.may_ask(), writer.health.fault())
        };
        let now = Instant::now();
        // For a moment what comes goes to the spool, then it is asked again.
        assert_eq!(slow(End::NotBegun, now), (Err(error.clone()), None));
        let before = now.checked_sub(spool::APPEND_TIMEOUT).unwrap();
        assert_eq!(slow(End::NotBegun, before), (Ok(()), None));
        assert_eq!(slow(End::Nothing, now), (Ok(()), None));
    }

    #[test]
    fn an_append_that_never_ends_shows_that_the_store_is_down() {
        let (mut writer, _appender) = writer(Duration::ZERO);
        let error = StoreError::Unavailable("no answer".into());
        let (_teller, ending) = super::super::doubts::ending();
        writer.slow = Some(Slow {
            ending,
            error: error.clone(),
            since: Instant::now(),
        });
        assert_eq!(writer.may_ask(), Err(error.clone()));
        assert_eq!(writer.health.fault(), Some(error));
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
