//! The SQLite store: one file, one writing connection.
//!
//! Every commit is on the disk when it returns (WAL, `synchronous=FULL`); batches make it fast.
//! After any error the connection is closed, and the next call opens the file anew: whatever
//! was wrong with it (permissions, a full or lost disk) need not be known here to recover.

pub mod inspect;
mod operate;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{
    Connection, ErrorCode, MAIN_DB, OpenFlags, Row, Transaction, TransactionBehavior, params,
};
use uuid::Uuid;

use super::migrate::{Policy, Step, Version};
use super::{
    BATCH_BYTES_MAX, Claim, Claimed, Class, Decision, Fate, NewRow, Sample, Settled, Settlement,
    Store, StoreError, migrate,
};
use crate::request::{Headers, Request};
use crate::settle::{Failure, Verdict};

/// Bytes of page cache: more did not make it faster, the system has one of its own.
const WRITER_CACHE_KIB: i32 = 256;
const READER_CACHE_KIB: i32 = 64;
/// Pages after which the WAL is copied into the database, and bytes it is then cut back to.
const WAL_PAGES: i32 = 4000;
const WAL_BYTES_KEPT: i32 = 16 * 1024 * 1024;
/// How often, and how soon again, the lock beside the file is tried.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Served by the unique index on `id`, as all statements by id.
macro_rules! insert {
    ($table:literal, $at:literal, $column:literal, $value:literal) => {
        concat!(
            "
    INSERT INTO ",
            $table,
            "
           (id, received_at, ",
            $at,
            ", attempt, last_status, last_error,
            method, target, headers, body",
            $column,
            ")
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10",
            $value,
            ")
        ON CONFLICT (id) DO NOTHING"
        )
    };
}
const INSERT: &str = insert!("proxy_requests", "next_attempt_at", "", "");
const INSERT_LEASED: &str = insert!("proxy_requests", "next_attempt_at", ", leased", ", 1");
const INSERT_DEAD: &str = insert!("proxy_dead_letters", "died_at", "", "");

/// Served by the index of the class, which also has the order; or, as rows come, by the table.
macro_rules! select_due {
    ($from:literal, $class:literal, $order:literal) => {
        concat!(
            "
    SELECT seq, id, received_at, attempt, method, target, headers, body
      FROM proxy_requests ",
            $from,
            "
     WHERE next_attempt_at <= ?1 AND ",
            $class,
            $order,
            "
     LIMIT ?2"
        )
    };
}
const SELECT_FRESH: &str = select_due!(
    "INDEXED BY proxy_requests_fresh",
    "attempt <= 1",
    " ORDER BY next_attempt_at"
);
const SELECT_RETRIED: &str = select_due!(
    "INDEXED BY proxy_requests_retried",
    "attempt > 1",
    " ORDER BY next_attempt_at"
);
const SELECT_FRESH_UNORDERED: &str = select_due!("NOT INDEXED", "attempt <= 1", "");
const SELECT_RETRIED_UNORDERED: &str = select_due!("NOT INDEXED", "attempt > 1", "");

const LEASE: &str = "
    UPDATE proxy_requests
       SET attempt = attempt + 1, leased = 1, next_attempt_at = ?2
     WHERE seq = ?1";

const BURY_UNREADABLE: &str = "
    INSERT INTO proxy_dead_letters
           (id, received_at, died_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, ?2, attempt, last_status, ?3,
           method, target, headers, body
      FROM proxy_requests
     WHERE seq = ?1
        ON CONFLICT (id) DO NOTHING";

const DELETE_UNREADABLE: &str = "DELETE FROM proxy_requests WHERE seq = ?1";

const DELETE: &str = "
    DELETE FROM proxy_requests
     WHERE id = ?1 AND attempt = ?2 AND leased = 1";

const POSTPONE: &str = "
    UPDATE proxy_requests
       SET leased = 0, next_attempt_at = ?3, last_status = ?4, last_error = ?5
     WHERE id = ?1 AND attempt = ?2 AND leased = 1";

const RELEASE: &str = "
    UPDATE proxy_requests
       SET leased = 0, next_attempt_at = ?3, attempt = attempt - 1
     WHERE id = ?1 AND attempt = ?2 AND leased = 1";

/// Followed by `DELETE`.
const BURY: &str = "
    INSERT INTO proxy_dead_letters
           (id, received_at, died_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, ?3, attempt, ?4, ?5,
           method, target, headers, body
      FROM proxy_requests
     WHERE id = ?1 AND attempt = ?2 AND leased = 1
        ON CONFLICT (id) DO NOTHING";

/// Served by the table, in the order of arrival.
const OLDEST: &str = "
    SELECT seq, id, received_at, next_attempt_at AS due_at, attempt, last_status, last_error,
           method, target, headers, body
      FROM proxy_requests
     WHERE seq > ?1
     ORDER BY seq
     LIMIT ?2";

const OLDEST_DEAD: &str = "
    SELECT seq, id, received_at, died_at AS due_at, attempt, last_status, last_error,
           method, target, headers, body
      FROM proxy_dead_letters
     WHERE seq > ?1
     ORDER BY seq
     LIMIT ?2";

const REMOVE: &str = "DELETE FROM proxy_requests WHERE id = ?1";
const REMOVE_DEAD: &str = "DELETE FROM proxy_dead_letters WHERE id = ?1";
/// Served by `proxy_dead_letters_died_at`, which also has the order. Reads no body for its length.
const SELECT_OLD: &str = "
    SELECT seq, coalesce(length(body), 0)
      FROM proxy_dead_letters
     WHERE died_at < ?1
     ORDER BY died_at
     LIMIT ?2";

const PURGE: &str = "DELETE FROM proxy_dead_letters WHERE seq = ?1";

/// Served by the two indexes alone, and the last count by the one on `died_at`.
const SAMPLE: &str = "
    SELECT sum(count), sum(leased), min(oldest), (SELECT count(*) FROM proxy_dead_letters),
           EXISTS (SELECT 1 FROM proxy_pause)
      FROM (
        SELECT count(*) AS count,
               coalesce(sum(leased = 1 AND next_attempt_at > ?1), 0) AS leased,
               min(received_at) AS oldest
          FROM proxy_requests INDEXED BY proxy_requests_fresh
         WHERE attempt <= 1
         UNION ALL
        SELECT count(*),
               coalesce(sum(leased = 1 AND next_attempt_at > ?1), 0),
               min(received_at)
          FROM proxy_requests INDEXED BY proxy_requests_retried
         WHERE attempt > 1
      )";

const IS_PAUSED: &str = "SELECT EXISTS (SELECT 1 FROM proxy_pause)";

const CREATE_MIGRATIONS: &str = "
    CREATE TABLE IF NOT EXISTS asyncproxy_migrations (
        version    INTEGER PRIMARY KEY,
        applied_at INTEGER NOT NULL
    ) STRICT";

const HAS_MIGRATIONS: &str =
    "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'asyncproxy_migrations')";

const APPLIED: &str = "SELECT coalesce(max(version), 0) FROM asyncproxy_migrations";

/// Walks through the two indexes, once at the start.
const TAKE_OVER: [&str; 2] = [
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_fresh
       SET leased = 0, next_attempt_at = min(next_attempt_at, ?1)
     WHERE attempt <= 1 AND leased = 1",
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_retried
       SET leased = 0, next_attempt_at = min(next_attempt_at, ?1)
     WHERE attempt > 1 AND leased = 1",
];

/// Whose a file is.
#[derive(Debug, Default)]
enum Ownership {
    /// It has not been opened yet.
    #[default]
    Unknown,
    /// For as long as the lock is held, which no crash outlives.
    Ours {
        _lock: File,
    },
    Others,
}

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

    fn open_migrated(&self) -> Result<Connection, StoreError> {
        if self.policy == Policy::Require {
            self.version()?.require()?;
        }
        let mut connection = self.open_writable()?;
        self.apply_pending(&mut connection)?;
        self.take_over(&connection)?;
        Ok(connection)
    }

    /// Applies what is pending; a file that is not there is created.
    ///
    /// # Errors
    /// [`StoreError`]; the schema is as it was then.
    pub fn migrate(&self) -> Result<Vec<Step>, StoreError> {
        self.apply_pending(&mut self.open_writable()?)
    }

    /// Reads the version of the schema, and writes nothing: no file, and none beside it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn version(&self) -> Result<Version, StoreError> {
        let applied = match self.path.try_exists() {
            Ok(false) => 0,
            _ => self.read_version().map_err(|error| self.describe(&error))?,
        };
        Ok(Version::new(migrate::SQLITE, applied))
    }

    fn read_version(&self) -> rusqlite::Result<i64> {
        let connection = open_to_read(&self.path, self.timeout)?;
        let has_migrations: bool = connection.query_row(HAS_MIGRATIONS, [], |row| row.get(0))?;
        match has_migrations {
            true => connection.query_row(APPLIED, [], |row| row.get(0)),
            false => Ok(0),
        }
    }

    fn open_writable(&self) -> Result<Connection, StoreError> {
        create_private(&self.path).map_err(|error| {
            StoreError::Unavailable(format!("{}: {error}", self.path.display()))
        })?;
        let connection = self
            .open(WRITER_CACHE_KIB)
            .map_err(|error| self.describe(&error))?;
        // SQLite opens what it may not write to all the same, and fails at the first write.
        if connection.is_readonly(MAIN_DB).unwrap_or(false) {
            let why = format!("{}: attempt to open a read-only file", self.path.display());
            return Err(StoreError::Unavailable(why));
        }
        Ok(connection)
    }

    /// Gives back, once, what a program that is no more had leased: nobody else serves this file.
    fn take_over(&self, connection: &Connection) -> Result<(), StoreError> {
        let mut ownership = self
            .ownership
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !matches!(*ownership, Ownership::Unknown) {
            // Leases of this process.
            return Ok(());
        }
        let mut path = self.path.clone().into_os_string();
        path.push("-lock");
        let path = PathBuf::from(path);
        let file = create_private(&path).and_then(|()| File::options().write(true).open(&path));
        let file =
            file.map_err(|error| StoreError::Unavailable(format!("{}: {error}", path.display())))?;
        let Some(file) = lock(file) else {
            log::warn!(path:% = path.display(); "another process uses this queue: its leases are left alone");
            *ownership = Ownership::Others;
            return Ok(());
        };
        let now = now_ms();
        let taken = TAKE_OVER.map(|statement| connection.execute(statement, [now]));
        let taken: rusqlite::Result<Vec<usize>> = taken.into_iter().collect();
        let count: usize = taken.map_err(|error| self.describe(&error))?.iter().sum();
        *ownership = Ownership::Ours { _lock: file };
        if count > 0 {
            log::info!(count; "took over what was leased when the last run ended");
        }
        Ok(())
    }

    fn open(&self, cache_kib: i32) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.busy_timeout(self.timeout)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -cache_kib)?;
        connection.pragma_update(None, "wal_autocheckpoint", WAL_PAGES)?;
        connection.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT)?;
        if let Some(pages_max) = self.pages_max {
            connection.pragma_update(None, "max_page_count", pages_max)?;
        }
        Ok(connection)
    }

    fn apply_pending(&self, connection: &mut Connection) -> Result<Vec<Step>, StoreError> {
        let describe = |error: rusqlite::Error| self.describe(&error);
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(describe)?;
        transaction
            .execute_batch(CREATE_MIGRATIONS)
            .map_err(describe)?;
        let applied = transaction
            .query_row(APPLIED, [], |row| row.get(0))
            .map_err(describe)?;
        let mut steps = Vec::new();
        for migration in migrate::pending(migrate::SQLITE, applied)? {
            transaction
                .execute_batch(migration.sql)
                .and_then(|()| {
                    transaction.execute(
                        "INSERT INTO asyncproxy_migrations (version, applied_at) VALUES (?1, ?2)",
                        params![migration.version, now_ms()],
                    )
                })
                .map_err(describe)?;
            steps.push(Step {
                version: migration.version,
                adopted: None,
            });
        }
        transaction.commit().map_err(describe)?;
        Ok(steps)
    }

    fn describe(&self, error: &rusqlite::Error) -> StoreError {
        let text = format!("{}: {error}", self.path.display());
        match error.sqlite_error_code() {
            Some(ErrorCode::CannotOpen | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                StoreError::Unavailable(text)
            }
            _ => StoreError::Failed(text),
        }
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

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        self.write(|transaction| {
            let now = now_ms();
            let mut claim = Claim::default();
            if transaction.query_row(IS_PAUSED, [], |row| row.get(0))? {
                return Ok(claim);
            }
            let mut select = transaction.prepare(match (class, self.use_index) {
                (Class::Fresh, true) => SELECT_FRESH,
                (Class::Retried, true) => SELECT_RETRIED,
                (Class::Fresh, false) => SELECT_FRESH_UNORDERED,
                (Class::Retried, false) => SELECT_RETRIED_UNORDERED,
            })?;
            let mut lease_one = transaction.prepare(LEASE)?;
            // Collected before anything is changed that the SELECT walks along.
            let (mut due, mut bytes) = (Vec::with_capacity(limit), 0);
            let mut rows = select.query(params![now, i64::try_from(limit).unwrap_or(i64::MAX)])?;
            while let Some(row) = rows.next()? {
                let read = read(row);
                bytes += read.as_ref().map_or(0, |row| row.request.body.len());
                due.push((row.get::<_, i64>(0)?, read));
                if bytes >= bytes_max {
                    break;
                }
            }
            drop(rows);
            for (seq, read) in due {
                match read {
                    Ok(claimed) => {
                        lease_one.execute(params![seq, add_ms(now, lease)])?;
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

/// What only a spool does: it is read in the order of arrival, and emptied row by row.
impl SqliteStore {
    /// Up to `limit` rows after number `after`, as they were appended, with their numbers: first
    /// those that wait, then dead letters. Ends early once their bodies have `bytes_max` bytes.
    /// What cannot be read stays where it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn oldest(
        &self,
        after: SpoolPosition,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<(SpoolPosition, NewRow)>, StoreError> {
        self.write(|transaction| {
            let (mut found, mut bytes) = (Vec::new(), 0);
            for (is_dead, statement) in [(false, OLDEST), (true, OLDEST_DEAD)] {
                if after.is_dead && !is_dead {
                    continue;
                }
                let seq = if is_dead == after.is_dead {
                    after.seq
                } else {
                    0
                };
                let left = i64::try_from(limit - found.len()).unwrap_or(i64::MAX);
                let mut select = transaction.prepare(statement)?;
                let mut rows = select.query(params![seq, left])?;
                while let Some(row) = rows.next()?
                    && bytes < bytes_max
                {
                    let Ok(new) = read_new(row, is_dead, now_ms()) else {
                        continue;
                    };
                    bytes += new.request.body.len();
                    let seq = row.get("seq")?;
                    found.push((SpoolPosition { is_dead, seq }, new));
                }
            }
            Ok(found)
        })
    }

    /// Removes rows and dead letters.
    ///
    /// # Errors
    /// [`StoreError`]; repeating it is safe.
    pub(super) fn remove(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        self.write(|transaction| {
            for statement in [REMOVE, REMOVE_DEAD] {
                let mut remove = transaction.prepare(statement)?;
                for id in ids {
                    remove.execute([id.as_bytes()])?;
                }
            }
            Ok(())
        })
    }
}

/// Where a row lies in a spool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SpoolPosition {
    is_dead: bool,
    seq: i64,
}

/// Reads a row of `OLDEST` or `OLDEST_DEAD`.
///
/// # Errors
/// As [`read`].
fn read_new(row: &Row<'_>, is_dead: bool, now: i64) -> Result<NewRow, String> {
    let describe = |error: rusqlite::Error| error.to_string();
    let claimed = read(row)?;
    let status = row.get("last_status").map_err(describe)?;
    let error: Option<String> = row.get("last_error").map_err(describe)?;
    let failure = error.map(|error| Failure { status, error });
    let due_at: i64 = row.get("due_at").map_err(describe)?;
    let fate = match (is_dead, failure) {
        (true, Some(failure)) => Fate::Dead(failure),
        (true, None) => return Err("a dead letter without a reason".into()),
        (false, failure) => Fate::Due {
            after: Duration::from_millis(u64::try_from(due_at.saturating_sub(now)).unwrap_or(0)),
            failure,
        },
    };
    Ok(NewRow {
        request: Arc::new(claimed.request),
        // Reading counts the attempt that a claim is about to make.
        attempt: claimed.attempt - 1,
        fate,
    })
}

/// Locks a file, if nobody has it locked. One who is just ending is waited for.
fn lock(file: File) -> Option<File> {
    for _ in 0..LOCK_TRIES {
        if file.try_lock().is_ok() {
            return Some(file);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    None
}

/// Creates the file if it is not there, for the eyes of this user only: requests carry
/// secrets. What SQLite puts beside it inherits this.
fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let created = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match created {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Opens a file for reading without leaving anything beside it. Where there is no WAL, nobody has
/// it open: what SQLite would create there to read it is not needed then.
pub(super) fn open_to_read(path: &Path, timeout: Duration) -> rusqlite::Result<Connection> {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    let mut uri = String::from("file:");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                uri.push(char::from(*byte));
            }
            other => uri.push_str(&format!("%{other:02x}")),
        }
    }
    uri.push_str("?mode=ro");
    if !Path::new(&wal).exists() {
        uri.push_str("&immutable=1");
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri, flags)?;
    connection.busy_timeout(timeout)?;
    Ok(connection)
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
