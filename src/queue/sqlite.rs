//! The SQLite store: one file, one writing connection.
//!
//! Every commit is on the disk when it returns (WAL, `synchronous=FULL`); batches make it fast.
//! After most errors the connection is closed, and the next call opens the file anew: whatever
//! was wrong with it (permissions, a lost disk) need not be known here to recover. Only a file that
//! is damaged, or not there any more, is not used again until the program is started anew.

mod disk;
mod executor;
mod file;
pub mod inspect;
mod lock;
mod operate;
pub mod owner;
mod probes;
mod rescue;
mod rows;
mod spooled;
mod statements;
mod transactions;
mod watch;
mod writing;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, Row, Transaction};

use super::migrate::Policy;
use super::{
    Claim, Class, Decision, NewRow, Probe, Sample, Settled, Settlement, Store, StoreError,
};
use crate::clock::Clock;
use disk::Room;
use executor::Executor;
pub use file::REMEDY;
pub use lock::server_of;
use rows::{add_ms, sub_ms, to_ms};
pub(super) use spooled::SpoolPosition;
use statements::{
    IS_PAUSED, SAMPLE, SELECT_FRESH, SELECT_FRESH_UNORDERED, SELECT_RETRIED,
    SELECT_RETRIED_UNORDERED,
};
use transactions::{append, claim, claim_probes, present, purge, settle};
use uuid::Uuid;
use writing::{Kind, Writing};

/// Rows in one claim while the reserve of the disk is in use: each takes room in the log.
const CLAIM_ROWS_FULL: usize = 32;
/// How long whoever counts is waited for at the end.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// The same of the saving of a file that was taken away, which may be large.
const SAVE_PATIENCE: Duration = Duration::from_secs(60);

/// A queue in a SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    shared: Arc<Shared>,
    executor: Executor,
}

/// What the thread that writes and those who ask it have in common.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    use_index: bool,
    timeout: Duration,
    policy: Policy,
    pages_max: Option<u32>,
    /// `false`: another process does, and keeps the leases.
    serves: bool,
    /// Whoever appends may be stuck with the disk.
    appends_here: bool,
    clock: Arc<Clock>,
    /// The same for one who does not serve: what the clock of the one who does is ahead of ours.
    ahead_ms: OnceLock<i64>,
    /// Milliseconds; no row waits longer. 0: not known.
    pause_max: Arc<AtomicU64>,
    room: Room,
    /// Why the file is not used any more.
    fault: Mutex<Option<StoreError>>,
    /// Another process that serves the file, too.
    other: Mutex<Option<String>>,
    /// What a file that was taken away held is being saved.
    is_saving: AtomicBool,
    /// Counts without holding up whoever writes.
    reader: Mutex<Option<Connection>>,
    /// Readers in use, and so not there.
    reading: AtomicUsize,
    is_closed: AtomicBool,
    /// The oldest row, and when it was seen first.
    oldest: Mutex<Option<(i64, Instant)>>,
}

impl SqliteStore {
    /// Opens nothing yet. `timeout` bounds each operation, and within it the wait for other
    /// processes that hold the file.
    pub fn new(path: PathBuf, use_index: bool, timeout: Duration) -> SqliteStore {
        SqliteStore::of(Shared {
            room: Room::new(&path, Arc::default()),
            path,
            use_index,
            timeout,
            policy: Policy::Apply,
            pages_max: None,
            serves: true,
            appends_here: false,
            clock: Arc::default(),
            ahead_ms: OnceLock::new(),
            pause_max: Arc::default(),
            fault: Mutex::default(),
            other: Mutex::default(),
            is_saving: AtomicBool::new(false),
            reader: Mutex::default(),
            reading: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            oldest: Mutex::default(),
        })
    }

    fn of(shared: Shared) -> SqliteStore {
        SqliteStore {
            executor: Executor::new(shared.path.display().to_string(), shared.timeout),
            shared: Arc::new(shared),
        }
    }

    /// Changes what is not in use yet.
    fn with(mut self, change: impl FnOnce(&mut Shared)) -> SqliteStore {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            change(shared);
        }
        self
    }

    /// Refuses to let the file grow beyond so many pages of 4 KiB.
    #[must_use]
    pub fn with_pages_max(self, pages_max: u32) -> SqliteStore {
        self.with(|shared| shared.pages_max = Some(pages_max))
    }

    /// Leaves the schema, and the file if there is none, to `asyncproxy migrate`, if the policy is so.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> SqliteStore {
        self.with(|shared| shared.policy = policy)
    }

    /// Keeps the time by a clock that others look at, too.
    #[must_use]
    pub fn with_clock(self, clock: Arc<Clock>) -> SqliteStore {
        self.with(|shared| shared.clock = clock)
    }

    /// No pause and no lease is longer than so many milliseconds: what is to wait longer is due.
    #[must_use]
    pub fn with_pause_max(self, milliseconds: Arc<AtomicU64>) -> SqliteStore {
        self.with(|shared| shared.pause_max = milliseconds)
    }

    /// Wants no new rows while less than so many bytes are free on the disk.
    #[must_use]
    pub fn with_min_free(self, bytes: Arc<AtomicU64>) -> SqliteStore {
        self.with(|shared| shared.room = Room::new(&shared.path, bytes))
    }

    /// Rows are appended where that is called, which is faster: whoever does so has nothing else to
    /// do than what needs the file. Without, nobody waits for it longer than the timeout.
    #[must_use]
    pub fn appending_here(self) -> SqliteStore {
        self.with(|shared| shared.appends_here = true)
    }

    /// For one who does not serve the queue: whoever does keeps its leases.
    #[must_use]
    pub fn visiting(self) -> SqliteStore {
        self.with(|shared| shared.serves = false)
    }

    /// Runs one write transaction, with the time that it is.
    fn write<T: Send + 'static>(
        &self,
        kind: Kind,
        body: impl Fn(&Transaction<'_>, i64) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.write_or_undo(kind, body, |_, _| {})
    }

    /// The same; `undo` gets the result if nobody waits for it any more.
    fn write_or_undo<T: Send + 'static>(
        &self,
        kind: Kind,
        body: impl Fn(&Transaction<'_>, i64) -> rusqlite::Result<T> + Send + 'static,
        undo: impl FnOnce(&mut Writing, T) + Send + 'static,
    ) -> Result<T, StoreError> {
        if let Some(fault) = self.shared.latched() {
            return Err(fault);
        }
        let shared = Arc::clone(&self.shared);
        self.executor.run(
            || Writing::new(Arc::clone(&self.shared)),
            move |writing| {
                writing.transact(kind, &|transaction| body(transaction, shared.now_ms()))
            },
            undo,
        )
    }

    /// As [`SqliteStore::write`], on the thread that calls it, for as long as the disk takes.
    fn write_here<T>(
        &self,
        kind: Kind,
        body: impl Fn(&Transaction<'_>, i64) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let shared = &self.shared;
        if let Some(fault) = shared.latched() {
            return Err(fault);
        }
        self.executor.run_here(
            || Writing::new(Arc::clone(shared)),
            |writing| writing.transact(kind, &|transaction| body(transaction, shared.now_ms())),
        )
    }

    /// Runs on a connection that only reads. After any error it is opened anew.
    fn with_reader<T>(
        &self,
        body: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let shared = &self.shared;
        if let Some(fault) = shared.latched() {
            return Err(fault);
        }
        let _reading = Reading::begin(&shared.reading);
        let kept = shared.reader().take();
        let reader = match kept {
            Some(reader) => reader,
            None => {
                // Whoever comes first creates the schema.
                self.write(Kind::Drains, |_, _| Ok(()))?;
                let reader = shared.open_reader();
                reader.map_err(|error| shared.describe(&error))?
            }
        };
        let result = body(&reader);
        match &result {
            Ok(_) if !shared.is_closed.load(Ordering::SeqCst) => *shared.reader() = Some(reader),
            Err(StoreError::Damaged(why)) if shared.serves => shared.latch(why.clone()),
            _ => {}
        }
        result
    }

    /// Closes the file: all rows are in it, unless others use it still, and nothing is done with it
    /// any more.
    fn end(&self) -> Result<(), StoreError> {
        let shared = &self.shared;
        if shared.is_closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let deadline = Instant::now() + CLOSE_PATIENCE.min(shared.timeout);
        while shared.reading.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        *shared.reader() = None;
        let deadline = Instant::now() + SAVE_PATIENCE;
        while shared.is_saving.load(Ordering::SeqCst) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        if !self.executor.is_started() {
            return Ok(());
        }
        let closed = self.executor.run(
            || Writing::new(Arc::clone(shared)),
            Writing::close,
            |_, ()| {},
        );
        self.executor.close(Instant::now() + shared.timeout);
        match closed {
            Err(error) if shared.is_saving.load(Ordering::SeqCst) => {
                let why = "what it held is not saved yet";
                Err(StoreError::Damaged(format!("{error}; {why}")))
            }
            closed => closed,
        }
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        // Whoever wants to know how it went calls `close`.
        let _ = self.end();
    }
}

impl Shared {
    fn reader(&self) -> MutexGuard<'_, Option<Connection>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the file is not used any more, if it is not.
    fn latched(&self) -> Option<StoreError> {
        let fault = self.fault.lock();
        fault.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on, until a restart, the file is not used any more.
    fn latch(&self, why: String) {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        *fault = Some(StoreError::Damaged(why));
    }

    /// Notes which other process serves the file, or that none does.
    fn note_other(&self, other: Option<String>) {
        *self.other.lock().unwrap_or_else(PoisonError::into_inner) = other;
    }

    /// Now, as whoever serves the file has it.
    fn now_ms(&self) -> i64 {
        let now = to_ms(self.clock.now());
        match self.serves {
            true => now,
            false => now.saturating_add(
                *self
                    .ahead_ms
                    .get_or_init(|| lock::ahead_of_system(&self.path)),
            ),
        }
    }

    fn pause_max(&self) -> Option<Duration> {
        let pause_max = self.pause_max.load(Ordering::Relaxed);
        (pause_max > 0).then(|| Duration::from_millis(pause_max))
    }

    /// The age of the oldest row. It may have been received by a clock that was set since: it is as
    /// old as the later of the two clocks says, and as it has been seen here.
    fn age(&self, received_at: i64, seq: i64, now: i64) -> Duration {
        let instant = self.clock.instant();
        let mut oldest = self.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        let seen_at = match *oldest {
            Some((known, seen_at)) if known == seq => seen_at,
            _ => instant,
        };
        *oldest = Some((seq, seen_at));
        let now = now.max(to_ms(self.clock.time_of_day()));
        let age = u64::try_from(now.saturating_sub(received_at)).unwrap_or(0);
        Duration::from_millis(age).max(instant.saturating_duration_since(seen_at))
    }
}

/// A reader is in use, until dropped.
struct Reading<'a>(&'a AtomicUsize);

impl Reading<'_> {
    fn begin(count: &AtomicUsize) -> Reading<'_> {
        count.fetch_add(1, Ordering::SeqCst);
        Reading(count)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Store for SqliteStore {
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        let bytes: usize = rows.iter().map(|row| row.request.bytes()).sum();
        if self.shared.appends_here {
            self.write_here(Kind::Grows, |transaction, now| {
                append(transaction, now, rows)
            })?;
        } else {
            let rows = rows.to_vec();
            self.write(Kind::Grows, move |transaction, now| {
                append(transaction, now, &rows)
            })?;
        }
        self.shared.room.spend(bytes as u64);
        Ok(())
    }

    fn present(&self, ids: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        let ids = ids.to_vec();
        self.write(Kind::Drains, move |transaction, _| {
            present(transaction, &ids)
        })
    }

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        let shared = &self.shared;
        let limit = match shared.room.is_given_up() {
            true => limit.min(CLAIM_ROWS_FULL),
            false => limit,
        };
        let select = match (class, shared.use_index) {
            (Class::Fresh, true) => SELECT_FRESH,
            (Class::Retried, true) => SELECT_RETRIED,
            (Class::Fresh, false) => SELECT_FRESH_UNORDERED,
            (Class::Retried, false) => SELECT_RETRIED_UNORDERED,
        };
        self.write_or_undo(
            Kind::Drains,
            move |transaction, now| {
                let until = add_ms(now, lease);
                claim(transaction, select, (limit, bytes_max), (now, until))
            },
            // Nobody is there to send them.
            give_back,
        )
    }

    fn claim_probes(&self, wanted: &Probe<'_>, lease: Duration) -> Result<Claim, StoreError> {
        let limit = match self.shared.room.is_given_up() {
            true => wanted.limit.min(CLAIM_ROWS_FULL),
            false => wanted.limit,
        };
        let (class, spot, bytes_max) = (wanted.class, wanted.spot, wanted.bytes_max);
        let except = wanted.except.to_vec();
        self.write_or_undo(
            Kind::Drains,
            move |transaction, now| {
                let wanted = Probe {
                    class,
                    spot,
                    limit,
                    bytes_max,
                    except: &except,
                };
                claim_probes(transaction, &wanted, (now, add_ms(now, lease)))
            },
            give_back,
        )
    }

    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        let is_one = settlements.len() == 1;
        let settlements = settlements.to_vec();
        let settled = self.write(Kind::Drains, move |transaction, now| {
            settle(transaction, now, &settlements)
        });
        settled.map_err(|error| match error {
            // Each takes room in the log: of what is left of the disk, fewer may do with less.
            StoreError::Unavailable(why) if !is_one && self.shared.room.is_given_up() => {
                StoreError::Busy(why)
            }
            error => error,
        })
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError> {
        self.write(Kind::Drains, move |transaction, now| {
            purge(transaction, sub_ms(now, older_than), limit)
        })
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        // What reads may work all the same.
        if let Some(hangs) = self.executor.hangs() {
            return Err(hangs);
        }
        let now = self.shared.now_ms();
        let sample = |row: &Row<'_>| {
            // Counts: never negative.
            let count = |column| row.get(column).map(i64::unsigned_abs);
            let (all, leased) = (count(0)?, count(1)?);
            let oldest: Option<i64> = row.get(2)?;
            let first: Option<i64> = row.get(5)?;
            Ok(Sample {
                waiting: all.saturating_sub(leased),
                leased,
                dead: count(3)?,
                oldest: oldest
                    .zip(first)
                    .map(|(oldest, first)| self.shared.age(oldest, first, now)),
                is_paused: row.get(4)?,
            })
        };
        self.with_reader(|reader| {
            reader
                .query_row(SAMPLE, [now], sample)
                .map_err(|error| self.shared.describe(&error))
        })
    }

    fn is_paused(&self) -> Result<bool, StoreError> {
        if let Some(hangs) = self.executor.hangs() {
            return Err(hangs);
        }
        self.with_reader(|reader| {
            reader
                .query_row(IS_PAUSED, [], |row| row.get(0))
                .map_err(|error| self.shared.describe(&error))
        })
    }

    fn shortage(&self) -> Option<String> {
        self.shared.room.shortage()
    }

    fn other_process(&self) -> Option<String> {
        let other = self.shared.other.lock();
        let other = other.unwrap_or_else(PoisonError::into_inner).clone()?;
        Some(format!(
            "{other}, too: stop it, or give each instance a file of its own"
        ))
    }

    fn hangs(&self) -> Option<StoreError> {
        self.executor.hangs()
    }

    fn close(&self) -> Result<(), StoreError> {
        self.end()
    }
}

fn give_back(writing: &mut Writing, claim: Claim) {
    let unsent: Vec<_> = claim
        .rows
        .into_iter()
        .map(|row| Settlement {
            id: row.request.id,
            attempt: row.attempt,
            decision: Decision::Release,
        })
        .collect();
    let shared = Arc::clone(&writing.shared);
    // Best effort: what is not given back is due again when its lease is over.
    let _ = writing.transact(Kind::Drains, &|transaction| {
        settle(transaction, shared.now_ms(), &unsent)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        let store = SqliteStore::new(path.clone(), true, Duration::from_secs(5));
        assert_eq!(store.sample(), Ok(Sample::default()));
        for suffix in ["", "-wal", "-shm"] {
            let mut file = path.clone().into_os_string();
            file.push(suffix);
            let mode = std::fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{suffix}");
        }
    }
}
