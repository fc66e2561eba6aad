//! The file: created for this user alone, locked by who serves it, its schema brought up to date.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, ErrorCode, MAIN_DB, OpenFlags, TransactionBehavior, params};

use super::super::StoreError;
use super::super::migrate::{self, Policy, Step, Version};
use super::lock::{self, Lock, Ownership};
use super::owner::create_private;
use super::rows::to_ms;
use super::statements::{MOVE_BACK, TAKE_OVER};
use super::writing::{Writing, with_remedy};
use super::{Shared, SqliteStore};

/// Bytes of page cache: more did not make it faster, the system has one of its own.
const WRITER_CACHE_KIB: i32 = 256;
const READER_CACHE_KIB: i32 = 64;
/// Pages after which the WAL is copied into the database, and bytes it is then cut back to.
const WAL_BYTES: u64 = 16 * 1000 * 1024;
const WAL_BYTES_KEPT: u64 = 16 * 1024 * 1024;
const PAGE_BYTES: u64 = 4096;

const CREATE_MIGRATIONS: &str = "
    CREATE TABLE IF NOT EXISTS asyncproxy_migrations (
        version    INTEGER PRIMARY KEY,
        applied_at INTEGER NOT NULL
    ) STRICT";

const HAS_MIGRATIONS: &str =
    "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'asyncproxy_migrations')";

const APPLIED: &str = "SELECT coalesce(max(version), 0) FROM asyncproxy_migrations";

/// What is left to do about a file that is damaged.
pub const REMEDY: &str = "stop the program, save what can be read with `asyncproxy queue export --output FILE`, \
     move the file and what lies beside it away, start again, and `asyncproxy queue import FILE`";

/// Milliseconds. The clock was set back, if the file was written so much later than now; by at least
/// as much as that, which file systems do not know exactly.
const BEHIND_MIN: i64 = 2000;
const WRITTEN_EXACT_TO: i64 = 1000;

/// Others than the owner.
const OTHERS: u32 = 0o077;

/// When a file was written last, by the clock of the program that wrote it.
fn last_written(path: &Path) -> Option<i64> {
    let written = |path: &Path| {
        path.metadata()
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    let last = written(path).max(written(&beside(path, "-wal")))?;
    let ahead_ms = lock::read_ahead(path).unwrap_or(0);
    Some(to_ms(last).saturating_add(ahead_ms))
}

impl SqliteStore {
    /// Applies what is pending; a file that is not there is created.
    ///
    /// # Errors
    /// [`StoreError`]; the schema is as it was then.
    pub fn migrate(&self) -> Result<Vec<Step>, StoreError> {
        let shared = &self.shared;
        shared.create()?;
        shared.apply_pending(&mut shared.open_writable(WAL_BYTES)?)
    }

    /// Reads the version of the schema, and writes nothing: no file, and none beside it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn version(&self) -> Result<Version, StoreError> {
        self.shared.version()
    }
}

impl Shared {
    /// Bytes of log after which it is copied into the file, where there is room for it.
    pub(super) fn log_bytes_max(&self) -> u64 {
        WAL_BYTES
    }

    /// Opens the file for `writing`, at first or again.
    pub(super) fn open_migrated(
        &self,
        writing: &mut Writing,
        log_bytes: u64,
    ) -> Result<Connection, StoreError> {
        match &writing.watch {
            // Created by us at first, it is not created again.
            Some(watch) => {
                if let Err(why) = watch.is_ours() {
                    writing.lose(why.clone());
                    return Err(self.latched().unwrap_or(StoreError::Damaged(why)));
                }
            }
            None => {
                if self.policy == Policy::Require {
                    self.version()?.require()?;
                }
                self.create()?;
            }
        }
        let written = last_written(&self.path);
        let mut connection = self.open_writable(log_bytes)?;
        writing.make_room(&connection);
        self.apply_pending(&mut connection)?;
        if matches!(writing.ownership, Ownership::Unknown) && self.serves {
            writing.ownership = self.take_over(&mut connection, written)?;
        }
        Ok(connection)
    }

    fn version(&self) -> Result<Version, StoreError> {
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

    fn create(&self) -> Result<(), StoreError> {
        let created = create_private(&self.path);
        let is_new = created.map_err(|error| {
            StoreError::Unavailable(format!("{}: {error}", self.path.display()))
        })?;
        let mode = self.path.metadata().map_or(0, |metadata| metadata.mode());
        if !is_new && self.serves && mode & OTHERS != 0 {
            let (path, mode) = (self.path.display(), format!("{:04o}", mode & 0o7777));
            log::warn!(path:%, mode; "others than its owner may use the queue's file, which holds what senders sent: chmod 600 it and what lies beside it");
        }
        Ok(())
    }

    fn open_writable(&self, log_bytes: u64) -> Result<Connection, StoreError> {
        let connection = self
            .open(WRITER_CACHE_KIB, log_bytes)
            .map_err(|error| self.describe(&error))?;
        // SQLite opens what it may not write to all the same, and fails at the first write.
        if connection.is_readonly(MAIN_DB).unwrap_or(false) {
            let why = format!("{}: attempt to open a read-only file", self.path.display());
            return Err(StoreError::Unavailable(why));
        }
        Ok(connection)
    }

    /// Gives back, once, what a program that is no more had leased: nobody else serves this file.
    /// What it had put off is due as soon as it meant, also if the clock has been set back since
    /// the file was `written`.
    fn take_over(
        &self,
        connection: &mut Connection,
        written: Option<i64>,
    ) -> Result<Ownership, StoreError> {
        let Some(mut lock) = Lock::take_patiently(&self.path).map_err(StoreError::Unavailable)?
        else {
            let why = lock::served_by(&self.path);
            log::warn!("{why}: its leases are left alone");
            self.note_other(Some(why));
            return Ok(Ownership::Others);
        };
        let now = self.now_ms();
        let behind = written.map_or(0, |written| written.saturating_sub(now));
        let taken = || -> rusqlite::Result<usize> {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let mut taken = 0;
            for statement in TAKE_OVER {
                taken += transaction.execute(statement, [now])?;
            }
            if behind >= BEHIND_MIN {
                for statement in MOVE_BACK {
                    transaction.execute(statement, [now, behind + WRITTEN_EXACT_TO])?;
                }
            }
            transaction.commit()?;
            Ok(taken)
        };
        let mut taken = taken;
        let count = taken().map_err(|error| self.describe(&error))?;
        lock.note_ahead(0);
        if count > 0 {
            log::info!(count; "took over what was leased when the last run ended");
        }
        if behind >= BEHIND_MIN {
            let seconds = behind / 1000;
            log::warn!(seconds; "the clock has been set back since the queue was used last: what waits is due so much sooner");
        }
        Ok(Ownership::Ours { lock })
    }

    pub(super) fn open_reader(&self) -> rusqlite::Result<Connection> {
        self.open(READER_CACHE_KIB, WAL_BYTES)
    }

    fn open(&self, cache_kib: i32, log_bytes: u64) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        // Whoever asked shall be told by SQLite, before the time for the operation is over.
        connection.busy_timeout(self.timeout * 3 / 4)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -cache_kib)?;
        connection.pragma_update(None, "wal_autocheckpoint", signed(log_bytes / PAGE_BYTES))?;
        let bytes_kept = signed(log_bytes.min(WAL_BYTES_KEPT));
        connection.pragma_update(None, "journal_size_limit", bytes_kept)?;
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
                        params![migration.version, to_ms(SystemTime::now())],
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

    pub(super) fn describe(&self, error: &rusqlite::Error) -> StoreError {
        let text = format!("{}: {error}", self.path.display());
        match error.sqlite_error_code() {
            // Not of SQLite itself: a value that could not be converted, for one.
            None => StoreError::Refused(text),
            // Of the statement and what it brings.
            Some(
                ErrorCode::Unknown
                | ErrorCode::ConstraintViolation
                | ErrorCode::TypeMismatch
                | ErrorCode::TooBig
                | ErrorCode::ApiMisuse
                | ErrorCode::ParameterOutOfRange,
            ) => StoreError::Refused(text),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                StoreError::Damaged(with_remedy(&text))
            }
            // Of the file: locked, full, lost, read-only, failing.
            Some(_) => StoreError::Unavailable(text),
        }
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The file of this name with something more at its end.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(suffix);
    beside.into()
}

/// Opens a file for reading without leaving anything beside it. Where there is no WAL, nobody has
/// it open: what SQLite would create there to read it is not needed then.
pub(super) fn open_to_read(path: &Path, timeout: Duration) -> rusqlite::Result<Connection> {
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
    if !beside(path, "-wal").exists() {
        uri.push_str("&immutable=1");
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri, flags)?;
    connection.busy_timeout(timeout)?;
    Ok(connection)
}
