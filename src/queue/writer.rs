//! Group commit: one thread appends all rows that wait in one insert and one commit, and then
//! releases everyone who waits for it. Under load a commit carries hundreds of rows; idle, it
//! carries one at once. A row that the store refuses fails nobody but its own sender.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::batch::{self, Part, Stopped};
use super::doubts::{Broken, End, Ending, Kept, NotAppended};
use super::health::StoreHealth;
use super::poller::Wake;
use super::spool::{self, Spool};
use super::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, Fate, NewRow, Store, StoreError};
use crate::metrics::Metrics;
use crate::progress::Stage;

/// How often those who wait for a commit look whether the store was found to be down meanwhile.
const LOOK: Duration = Duration::from_millis(100);

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
        let result = self.wait(&answer, deadline);
        result.unwrap_or_else(|| {
            // Not started on: it never will be. Else its end is not known.
            taken.store(true, Ordering::Relaxed);
            Err(self.health.fault().unwrap_or_else(late))
        })
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
            let is_given_up = self.spool.is_none() && self.health.fault().is_some();
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
            timeout,
            slow: None,
        };
        (writer, appender)
    }

    /// Runs until the last [`Appender`] is gone and all it has sent is stored.
    pub fn run(mut self) {
        let stage = Arc::clone(&self.stage);
        while let Ok(first) = self.appends.recv() {
            let (rows, waiting) = self.gather(first);
            if !rows.is_empty() {
                let _work = stage.work();
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
        let is_waited_for = end.is_none() && slow.since.elapsed() < self.timeout;
        if is_waited_for {
            return Err(slow.error.clone());
        }
        let error = slow.error.clone();
        self.slow = None;
        match end {
            // Nothing in all its time, or no connection to this moment.
            None | Some(End::NotBegun) => self.health.note("append", Err(error), &self.metrics),
            // A connection that broke may be the only one.
            Some(End::Committed | End::Nothing | End::Unknown) => Ok(()),
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
        let is_refused = !error.is_outage();
        let ids = rows.iter().map(|row| row.request.id).collect();
        match &self.spool {
            Some(spool) if !is_refused => {
                // Before they are in the spool: from then on the mover would move them.
                let number = self.health.doubts.add(ids, ending, Kept::InSpool);
                let result = spool.append(rows);
                if result.is_err() {
                    self.health.doubts.not_spooled(number);
                }
                result.map(|()| Place::Spool)
            }
            _ => {
                if !is_refused {
                    self.health.doubts.add(ids, ending, Kept::Elsewhere);
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
