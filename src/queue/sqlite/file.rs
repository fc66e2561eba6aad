//! The file: created for this user alone, locked by who serves it, its schema brought up to date.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, MAIN_DB, OpenFlags, TransactionBehavior, params};

use super::super::StoreError;
use super::super::migrate::{self, Policy, Step, Version};
use super::{SqliteStore, now_ms};

/// Bytes of page cache: more did not make it faster, the system has one of its own.
const WRITER_CACHE_KIB: i32 = 256;
pub(super) const READER_CACHE_KIB: i32 = 64;
/// Pages after which the WAL is copied into the database, and bytes it is then cut back to.
const WAL_PAGES: i32 = 4000;
const WAL_BYTES_KEPT: i32 = 16 * 1024 * 1024;
/// How often, and how soon again, the lock beside the file is tried.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

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
pub(super) enum Ownership {
    /// It has not been opened yet.
    #[default]
    Unknown,
    /// For as long as the lock is held, which no crash outlives.
    Ours {
        _lock: File,
    },
    Others,
}

impl SqliteStore {
    pub(super) fn open_migrated(&self) -> Result<Connection, StoreError> {
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

    pub(super) fn open(&self, cache_kib: i32) -> rusqlite::Result<Connection> {
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
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StoreError::Damaged(text),
            // Of the file: locked, full, lost, read-only, failing.
            Some(_) => StoreError::Unavailable(text),
        }
    }
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
