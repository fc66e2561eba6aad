//! The SQLite store: one file, one writing connection.
//!
//! Every commit is on the disk when it returns (WAL, `synchronous=FULL`); batches make it fast.
//! After any error the connection is closed, and the next call opens the file anew: whatever
//! was wrong with it (permissions, a full or lost disk) need not be known here to recover.

mod file;
pub mod inspect;
mod operate;
mod probes;
mod spooled;
mod statements;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, Row, Transaction, TransactionBehavior, params};
use uuid::Uuid;

use super::migrate::Policy;
use super::{
    BATCH_BYTES_MAX, Claim, Claimed, Class, Decision, Fate, NewRow, Probe, Sample, Settled,
    Settlement, Store, StoreError,
};
use crate::request::{Headers, Request};
use crate::settle::{Failure, Verdict};
use file::{Ownership, READER_CACHE_KIB};
pub(super) use spooled::SpoolPosition;
use statements::{
    BURY, BURY_UNREADABLE, DELETE, DELETE_UNREADABLE, INSERT, INSERT_DEAD, INSERT_LEASED,
    IS_PAUSED, IS_PRESENT, LEASE, POSTPONE, PURGE, RELEASE, SAMPLE, SELECT_FRESH,
    SELECT_FRESH_UNORDERED, SELECT_OLD, SELECT_RETRIED, SELECT_RETRIED_UNORDERED,
};

/// A queue in a SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    use_index: bool,
    timeout: Duration,
    policy: Policy,
    pages_max: Option<u32>,
    ownership: Mutex<Ownership>,
    writer: Mutex<Option<Connection>>,
    /// Counts without holding up the writer.
    reader: Mutex<Option<Connection>>,
}

impl SqliteStore {
    /// Opens nothing yet. `timeout` bounds the wait for other processes that hold the file.
    pub fn new(path: PathBuf, use_index: bool, timeout: Duration) -> SqliteStore {
        SqliteStore {
            path,
            use_index,
            timeout,
            policy: Policy::Apply,
            pages_max: None,
            ownership: Mutex::default(),
            writer: Mutex::default(),
            reader: Mutex::default(),
        }
    }

    /// Refuses to let the file grow beyond so many pages of 4 KiB.
    #[must_use]
    pub fn with_pages_max(self, pages_max: u32) -> SqliteStore {
        SqliteStore {
            pages_max: Some(pages_max),
            ..self
        }
    }

    /// Leaves the schema, and the file if there is none, to `asyncproxy migrate`, if the policy is so.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> SqliteStore {
        SqliteStore { policy, ..self }
    }

    /// For one who does not serve the queue: whoever does keeps its leases.
    #[must_use]
    pub fn visiting(self) -> SqliteStore {
        SqliteStore {
            ownership: Mutex::new(Ownership::Others),
            ..self
        }
    }

    fn reader(&self) -> MutexGuard<'_, Option<Connection>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one write transaction.
    fn write<T>(
        &self,
        body: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let mut slot = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => self.open_migrated()?,
        };
        let result = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .and_then(|transaction| {
                let value = body(&transaction)?;
                transaction.commit()?;
                Ok(value)
            });
        if result.is_ok() {
            *slot = Some(connection);
        } else {
            // It shares what SQLite knows of the file, such as that it is read-only.
            *self.reader() = None;
        }
        result.map_err(|error| self.describe(&error))
    }

    /// Runs on a connection that only reads. After any error it is opened anew.
    fn with_reader<T>(
        &self,
        body: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let kept = self.reader().take();
        let reader = match kept {
            Some(reader) => reader,
            None => {
                // Whoever comes first creates the schema.
                self.write(|_| Ok(()))?;
                self.open(READER_CACHE_KIB)
                    .map_err(|error| self.describe(&error))?
            }
        };
        let value = body(&reader)?;
        *self.reader() = Some(reader);
        Ok(value)
    }
}

impl Store for SqliteStore {
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        self.write(|transaction| {
            let now = now_ms();
            let mut insert = transaction.prepare(INSERT)?;
            let mut insert_leased = transaction.prepare(INSERT_LEASED)?;
            let mut insert_dead = transaction.prepare(INSERT_DEAD)?;
            for NewRow {
                request,
                attempt,
                fate,
            } in rows
            {
                let (statement, at, failure) = match fate {
                    Fate::Due { after, failure } => {
                        (&mut insert, add_ms(now, *after), failure.as_ref())
                    }
                    Fate::Leased(lease) => (&mut insert_leased, add_ms(now, *lease), None),
                    Fate::Dead(failure) => (&mut insert_dead, now, Some(failure)),
                };
                statement.execute(params![
                    request.id.as_bytes(),
                    to_ms(request.received_at),
                    at,
                    attempt,
                    failure.and_then(|failure| failure.status),
                    failure.map(|failure| &failure.error),
                    request.method,
                    request.target,
                    request.headers.as_bytes(),
                    request.body,
                ])?;
            }
            Ok(())
        })
    }

    fn present(&self, ids: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        self.write(|transaction| {
            let mut is_present = transaction.prepare(IS_PRESENT)?;
            let mut present = HashSet::new();
            for id in ids {
                if is_present.query_row([id.as_bytes()], |row| row.get(0))? {
                    present.insert(*id);
                }
            }
            Ok(present)
        })
    }

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        self.write(|transaction| {
            let now = now_ms();
            if transaction.query_row(IS_PAUSED, [], |row| row.get(0))? {
                return Ok(Claim::default());
            }
            let mut select = transaction.prepare(match (class, self.use_index) {
                (Class::Fresh, true) => SELECT_FRESH,
                (Class::Retried, true) => SELECT_RETRIED,
                (Class::Fresh, false) => SELECT_FRESH_UNORDERED,
                (Class::Retried, false) => SELECT_RETRIED_UNORDERED,
            })?;
            // Collected before anything is changed that the SELECT walks along.
            let (mut due, mut bytes) = (Vec::with_capacity(limit), 0);
            let mut rows = select.query(params![now, i64::try_from(limit).unwrap_or(i64::MAX)])?;
            while let Some(row) = rows.next()? {
                let read = read(row);
                bytes += read.as_ref().map_or(0, |row| row.request.bytes());
                if bytes > bytes_max && !due.is_empty() {
                    break;
                }
                due.push((row.get::<_, i64>(0)?, read));
            }
            drop(rows);
            lease_all(transaction, due, add_ms(now, lease), now)
        })
    }

    fn claim_probes(&self, wanted: &Probe<'_>, lease: Duration) -> Result<Claim, StoreError> {
        self.write(|transaction| {
            let now = now_ms();
            if transaction.query_row(IS_PAUSED, [], |row| row.get(0))? {
                return Ok(Claim::default());
            }
            let due = probes::due(transaction, wanted, now)?;
            lease_all(transaction, due, add_ms(now, lease), now)
        })
    }

    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        self.write(|transaction| {
            let now = now_ms();
            let mut settled = Settled::default();
            let mut delete = transaction.prepare(DELETE)?;
            let mut postpone = transaction.prepare(POSTPONE)?;
            let mut release = transaction.prepare(RELEASE)?;
            for Settlement {
                id,
                attempt,
                decision,
            } in settlements
            {
                let id = id.as_bytes();
                let (changed, count) = match decision {
                    Decision::Attempted(Verdict::Delivered) => (
                        delete.execute(params![id, attempt])?,
                        &mut settled.delivered,
                    ),
                    Decision::Attempted(Verdict::Later { after, failure }) => {
                        let Failure { status, error } = failure;
                        let at = add_ms(now, *after);
                        (
                            postpone.execute(params![id, attempt, at, status, error])?,
                            &mut settled.later,
                        )
                    }
                    Decision::Attempted(Verdict::Bury(Failure { status, error })) => {
                        transaction.execute(BURY, params![id, attempt, now, status, error])?;
                        (delete.execute(params![id, attempt])?, &mut settled.buried)
                    }
                    Decision::Release => (
                        release.execute(params![id, attempt, now])?,
                        &mut settled.released,
                    ),
                };
                *(if changed == 1 {
                    count
                } else {
                    &mut settled.stale
                }) += 1;
            }
            Ok(settled)
        })
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError> {
        self.write(|transaction| {
            let died_before = sub_ms(now_ms(), older_than);
            let mut select = transaction.prepare(SELECT_OLD)?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            // Collected before anything is deleted that the SELECT walks along.
            let (mut old, mut bytes) = (Vec::new(), 0_u64);
            let mut rows = select.query(params![died_before, limit])?;
            while let Some(row) = rows.next()? {
                old.push(row.get::<_, i64>(0)?);
                // A length: never negative.
                bytes += row.get::<_, i64>(1)?.unsigned_abs();
                if bytes >= BATCH_BYTES_MAX as u64 {
                    break;
                }
            }
            drop(rows);
            let mut purge = transaction.prepare(PURGE)?;
            for seq in &old {
                purge.execute([seq])?;
            }
            Ok(old.len() as u64)
        })
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        let now = now_ms();
        let sample = |row: &Row<'_>| {
            // Counts: never negative.
            let count = |column| row.get(column).map(i64::unsigned_abs);
            let (all, leased) = (count(0)?, count(1)?);
            let oldest: Option<i64> = row.get(2)?;
            Ok(Sample {
                waiting: all.saturating_sub(leased),
                leased,
                dead: count(3)?,
                oldest: oldest.map(|oldest| {
                    Duration::from_millis(u64::try_from(now.saturating_sub(oldest)).unwrap_or(0))
                }),
                is_paused: row.get(4)?,
            })
        };
        self.with_reader(|reader| {
            reader
                .query_row(SAMPLE, [now], sample)
                .map_err(|error| self.describe(&error))
        })
    }
}

/// A row by its place, and as it was read.
type Due = (i64, Result<Claimed, String>);

/// Leases rows until then; buries those that could not be read.
fn lease_all(
    transaction: &Transaction<'_>,
    due: Vec<Due>,
    until: i64,
    now: i64,
) -> rusqlite::Result<Claim> {
    let mut claim = Claim::default();
    let mut lease_one = transaction.prepare(LEASE)?;
    for (seq, read) in due {
        match read {
            Ok(claimed) => {
                lease_one.execute(params![seq, until])?;
                claim.rows.push(claimed);
            }
            Err(why) => {
                let why = format!("row cannot be read: {why}");
                transaction.execute(BURY_UNREADABLE, params![seq, now, why])?;
                transaction.execute(DELETE_UNREADABLE, [seq])?;
                claim.unreadable += 1;
            }
        }
    }
    Ok(claim)
}

/// Reads a row of `SELECT_DUE`, for the attempt to come.
///
/// # Errors
/// Why the row is none that this program could have written.
fn read(row: &Row<'_>) -> Result<Claimed, String> {
    let describe = |error: rusqlite::Error| error.to_string();
    let id = row.get::<_, Vec<u8>>("id").map_err(describe)?;
    let attempt = row.get::<_, u32>("attempt").map_err(describe)?;
    let headers = row.get::<_, Vec<u8>>("headers").map_err(describe)?;
    let request = Request {
        id: Uuid::from_slice(&id).map_err(|error| format!("id: {error}"))?,
        received_at: from_ms(row.get("received_at").map_err(describe)?)
            .ok_or("received_at is out of range")?,
        method: row.get("method").map_err(describe)?,
        target: row.get("target").map_err(describe)?,
        headers: Headers::from_bytes(headers).map_err(|error| error.to_string())?,
        body: row.get("body").map_err(describe)?,
    };
    request.check().map_err(|error| error.to_string())?;
    Ok(Claimed {
        request,
        attempt: attempt.checked_add(1).ok_or("attempt is out of range")?,
    })
}

fn now_ms() -> i64 {
    to_ms(SystemTime::now())
}

fn to_ms(time: SystemTime) -> i64 {
    let ms = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => ms(since),
        Err(before) => -ms(before.duration()),
    }
}

fn from_ms(ms: i64) -> Option<SystemTime> {
    let distance = Duration::from_millis(ms.unsigned_abs());
    if ms >= 0 {
        UNIX_EPOCH.checked_add(distance)
    } else {
        UNIX_EPOCH.checked_sub(distance)
    }
}

fn add_ms(now: i64, duration: Duration) -> i64 {
    now.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

fn sub_ms(now: i64, duration: Duration) -> i64 {
    now.saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_and_never_overflow() {
        for ms in [0, 1, -1, 1_700_000_000_123] {
            assert_eq!(from_ms(ms).map(to_ms), Some(ms));
        }
        assert_eq!(add_ms(i64::MAX - 1, Duration::MAX), i64::MAX);
        assert_eq!(sub_ms(-2, Duration::MAX), i64::MIN);
        let _ = from_ms(i64::MIN);
    }

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
