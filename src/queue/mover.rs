//! Moves to the store what waits in the spool, the oldest first: appended there, then removed here.
//!
//! A move is a conversation with a time of its own, which grows with what there is to say: nobody
//! waits for it. While the end of an append is not known, be it the mover's or one that senders did not
//! wait for, its rows stay where they are. A crash between append and removal repeats the append,
//! which leaves alone what is still there. A row that the store refuses becomes a dead letter, or is
//! left lying: it holds up none behind it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, select};
use uuid::Uuid;

use super::batch::{self, Part, Stopped};
use super::doubts::{Broken, End, Ended, Kept, NotAppended};
use super::health::StoreHealth;
use super::poller::Wake;
use super::spool::Spool;
use super::sqlite::SpoolPosition;
use super::{BATCH_BYTES_MAX, Fate, NewRow, Store, StoreError};
use crate::budget::Budget;
use crate::logger::LogLimit;
use crate::metrics::Metrics;
use crate::settle::Failure;

/// Pause between looks at a store that does not work, or whose answer is still to come.
const LOOK: Duration = Duration::from_millis(250);
/// Pause after a store has refused one row after the other.
const REFUSING_PAUSE: Duration = Duration::from_secs(1);
/// Pause before rows are tried again that the store has refused in any form.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// Rows left lying at a time; with more, those behind them wait.
const ASIDE_MAX: usize = 10_000;
/// The slowest way to a store that is reckoned with at first, in bytes a second.
const BYTES_PER_SECOND: usize = 256 * 1024;
/// How many times slower it may be after failures.
const SLOWNESS_MAX: u32 = 16;

static REFUSED: LogLimit = LogLimit::new();
static MOVED: LogLimit = LogLimit::new();

/// The moving thread.
#[derive(Debug)]
pub struct Mover {
    pub spool: Arc<Spool>,
    pub store: Arc<dyn Store>,
    pub health: Arc<StoreHealth>,
    pub metrics: Arc<Metrics>,
    pub budget: Arc<Budget>,
    pub filled: Receiver<()>,
    pub wake: Wake,
    /// Closed to make it end.
    pub stop: Receiver<()>,
    /// Of one operation of the store that brings little.
    pub timeout: Duration,
}

/// How a move goes, and what it has left behind.
#[derive(Debug)]
struct Course {
    bytes_max: usize,
    slowness: u32,
    /// The mover's append that has not ended: one at a time.
    open: Option<u64>,
    /// Refused in any form, and when they are tried again: whoever made the store refuse them may
    /// have thought again by then.
    aside: HashSet<Uuid>,
    again_at: Instant,
    moved: usize,
}

impl Course {
    fn new() -> Course {
        Course {
            bytes_max: BATCH_BYTES_MAX,
            slowness: 1,
            open: None,
            aside: HashSet::new(),
            again_at: Instant::now(),
            moved: 0,
        }
    }

    fn succeeded(&mut self) {
        self.bytes_max = self.bytes_max.saturating_mul(2).min(BATCH_BYTES_MAX);
        self.slowness = (self.slowness / 2).max(1);
    }

    /// Smaller batches, and more time for each byte.
    fn failed(&mut self) {
        self.bytes_max = (self.bytes_max / 2).max(1);
        self.slowness = (self.slowness * 2).min(SLOWNESS_MAX);
    }
}

impl Mover {
    /// Runs until `stop` is closed.
    pub fn run(self) {
        // What an earlier run has left behind.
        let mut pause = Some(Duration::ZERO);
        let mut course = Course::new();
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
                self.move_all(&mut course)
            };
        }
    }

    /// Moves what can be moved. Returns when to come again, if anything is left.
    fn move_all(&self, course: &mut Course) -> Option<Duration> {
        if self.resolve().and_then(|()| self.remove()).is_err() {
            return Some(LOOK);
        }
        if course.open.is_some_and(|open| self.health.doubts.has(open)) {
            return Some(LOOK);
        }
        course.moved = 0;
        let mut position = SpoolPosition::default();
        let mut is_held_back = false;
        loop {
            if self.stop.try_recv() == Err(TryRecvError::Disconnected) {
                return None;
            }
            let bytes_max = course.bytes_max.min(self.budget.batch_bytes_max());
            let Ok(rows) = self.spool.oldest(position, bytes_max) else {
                return Some(REFUSED_PAUSE);
            };
            let Some((last, _)) = rows.last() else {
                return self.all_seen(course, is_held_back);
            };
            position = *last;
            let held_back = self.health.doubts.held_back();
            let rows = rows.into_iter().map(|(_, row)| row);
            let (held, rows): (Vec<_>, Vec<_>) =
                rows.partition(|row| held_back.contains(&row.request.id));
            is_held_back |= !held.is_empty();
            let is_aside = |row: &NewRow| course.aside.contains(&row.request.id);
            let rows: Vec<_> = rows.into_iter().filter(|row| !is_aside(row)).collect();
            let bytes: usize = rows.iter().map(|row| row.request.bytes()).sum();
            // Themselves, and what a statement makes of them.
            let _copies = self.budget.copying(3 * bytes);
            if let Err(error) = self.move_batch(&rows, course) {
                self.spool.count();
                return Some(match error.is_refusal() {
                    true => REFUSING_PAUSE,
                    false => LOOK,
                });
            }
        }
    }

    /// At the end of the spool.
    fn all_seen(&self, course: &mut Course, is_held_back: bool) -> Option<Duration> {
        self.spool.count();
        let (moved, refused) = (course.moved, course.aside.len());
        if moved > 0
            && let Some(suppressed) = MOVED.allow()
        {
            log::info!(moved, refused, suppressed; "spool is moved to the store");
        }
        let again = course.again_at.saturating_duration_since(Instant::now());
        if again.is_zero() {
            course.aside.clear();
            course.again_at = Instant::now() + REFUSED_PAUSE;
        }
        match (is_held_back, refused) {
            (true, _) => Some(LOOK),
            (false, 1..) if again.is_zero() => Some(REFUSED_PAUSE),
            (false, 1..) => Some(again),
            (false, 0) => None,
        }
    }

    /// Ends the doubts that can be ended.
    fn resolve(&self) -> Result<(), StoreError> {
        let doubts = &self.health.doubts;
        for Ended { number, ids, end } in doubts.ended() {
            let committed = match end {
                End::Committed => ids,
                End::Nothing | End::NotBegun => Vec::new(),
                End::Unknown => {
                    let present = self.store.present(&ids);
                    let present = self.health.note("look for rows", present, &self.metrics)?;
                    present.into_iter().collect()
                }
            };
            doubts.close(number, committed);
        }
        Ok(())
    }

    /// Removes what is known to be in the store.
    fn remove(&self) -> Result<usize, StoreError> {
        let ids = self.health.doubts.committed();
        if !ids.is_empty() {
            self.spool.remove(&ids)?;
            self.health.doubts.removed(&ids);
            let count = i64::try_from(ids.len()).unwrap_or(i64::MAX);
            self.health.depth.add(count);
            self.metrics.spool.moved.inc_by(ids.len() as u64);
            self.wake.wake();
        }
        Ok(ids.len())
    }

    /// Moves those of the rows that the store takes.
    fn move_batch(&self, rows: &[NewRow], course: &mut Course) -> Result<(), StoreError> {
        let mut refused = Vec::new();
        let result = batch::carry_out(
            rows,
            |part| {
                self.append(part, course)?;
                course.moved += self.remove()?;
                Ok(())
            },
            |part| {
                if let Part::Refused(at, why) = part {
                    refused.push((at, why));
                }
            },
        );
        for (at, why) in refused {
            self.bury(&rows[at], &why, course)?;
        }
        result.map_err(|Stopped { error, .. }| error)
    }

    fn append(&self, rows: &[NewRow], course: &mut Course) -> Result<(), StoreError> {
        let bytes: usize = rows.iter().map(|row| row.request.body.len()).sum();
        #[expect(clippy::cast_precision_loss, reason = "of bytes in memory")]
        let seconds = bytes as f64 / BYTES_PER_SECOND as f64;
        let within = self.timeout + Duration::from_secs_f64(seconds) * course.slowness;
        let ids: Vec<Uuid> = rows.iter().map(|row| row.request.id).collect();
        let doubts = &self.health.doubts;
        let not = match self.store.append_within(rows, within, Broken::Tell) {
            Ok(()) => {
                course.succeeded();
                doubts.add_committed(&ids);
                return self.health.note("move", Ok(()), &self.metrics);
            }
            Err(not) => not,
        };
        let NotAppended {
            error,
            ending,
            is_away,
        } = not;
        if !error.is_refusal() {
            course.failed();
        }
        if error.is_outage() {
            course.open = Some(doubts.add(ids, ending, Kept::InSpool, &self.metrics));
        }
        match error.is_outage() && !is_away {
            // A slow way to the store, perhaps; others find out whether it works.
            true => Err(error),
            false => self.health.note("move", Err(error), &self.metrics),
        }
    }

    /// A row that the store refuses alone: to the dead letters, or left lying.
    fn bury(&self, row: &NewRow, why: &str, course: &mut Course) -> Result<(), StoreError> {
        let id = row.request.id;
        let failure = match &row.fate {
            Fate::Due { failure, .. } => failure.clone(),
            Fate::Leased(_) => None,
            // In that form it has been refused.
            Fate::Dead(_) => return self.leave_lying(id, why, course),
        };
        let dead = NewRow {
            fate: Fate::Dead(refused(why, failure)),
            ..row.clone()
        };
        match self.append(&[dead], course) {
            Ok(()) => {
                course.moved += self.remove()?;
                if let Some(suppressed) = REFUSED.allow() {
                    log::error!(id:%, why, suppressed; "the store refuses a row, moved to the dead letters");
                }
                Ok(())
            }
            Err(StoreError::Refused(why)) => self.leave_lying(id, &why, course),
            Err(error) => Err(error),
        }
    }

    fn leave_lying(&self, id: Uuid, why: &str, course: &mut Course) -> Result<(), StoreError> {
        if course.aside.len() >= ASIDE_MAX {
            return Err(StoreError::Refused(why.to_owned()));
        }
        course.aside.insert(id);
        if let Some(suppressed) = REFUSED.allow() {
            log::error!(id:%, why, suppressed; "the store refuses a row, it stays in the spool");
        }
        Ok(())
    }
}

/// What is noted with a request that the store takes as a dead letter only; `failure` is how its
/// last attempt ended, if there was one.
pub fn refused(why: &str, failure: Option<Failure>) -> Failure {
    match failure {
        None => Failure {
            status: None,
            error: format!("refused by the store: {why}"),
        },
        Some(Failure { status, error }) => Failure {
            status,
            error: format!("{error}; refused by the store: {why}"),
        },
    }
}
