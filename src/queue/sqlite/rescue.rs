//! What can still be read: of a file that has been taken away, of one that is damaged.
//!
//! A table is walked along its numbers. Where a page cannot be read, the numbers after it are
//! tried one by one until one leads to a page that can. Writes to a new file alone.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, params_from_iter, types::Value};

use super::SqliteStore;
use super::owner::{create_private, directory_of};
use super::writing::saved_name;

/// Numbers that are tried one by one behind a page that cannot be read, before steps get longer.
const SINGLE_STEPS: i64 = 100_000;
/// Files of one name and second.
const NAMES_MAX: u32 = 100;

/// A table, and what is read of it.
#[derive(Debug)]
pub(super) struct Table {
    name: &'static str,
    columns: &'static str,
}

pub(super) const TABLES: [Table; 2] = [
    Table {
        name: "proxy_requests",
        columns: "seq, id, received_at, next_attempt_at, attempt, leased, last_status, last_error,
                  method, target, headers, body",
    },
    Table {
        name: "proxy_dead_letters",
        columns: "seq, id, received_at, died_at, attempt, last_status, last_error,
                  method, target, headers, body",
    },
];

/// How a walk went.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Walked {
    pub(super) read: u64,
    /// At least so many rows are there and cannot be read.
    pub(super) unread: u64,
}

/// What was saved of a file.
#[derive(Debug)]
pub(super) enum Saved {
    Nothing,
    All(PathBuf),
    Part { to: PathBuf, rows: u64, why: String },
}

/// Walks through a table, in the order of arrival. `read` gets each row that is found by `select`,
/// which takes its number, tells whether it could read it, and may end the walk.
///
/// # Errors
/// SQLite's, where it is not that the file cannot be read.
pub(super) fn walk(
    connection: &Connection,
    table: &str,
    select: &str,
    read: &mut dyn FnMut(&Row<'_>) -> ControlFlow<(), bool>,
) -> rusqlite::Result<Walked> {
    let mut walked = Walked::default();
    let next = format!("SELECT seq FROM {table} NOT INDEXED WHERE seq > ?1 ORDER BY seq LIMIT 1");
    let mut next = connection.prepare(&next)?;
    let mut next = |after: i64| next.query_row([after], |row| row.get(0)).optional();
    let mut select = connection.prepare(select)?;
    let (mut after, mut has_gap) = (i64::MIN, false);
    loop {
        let seq = match next(after) {
            Ok(Some(seq)) => seq,
            Ok(None) => break,
            Err(error) if is_unreadable(&error) => {
                has_gap = true;
                match beyond(after, &mut next) {
                    Some(reached) => after = reached,
                    None => break,
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        after = seq;
        let mut rows = select.query([seq])?;
        match rows.next() {
            Ok(Some(row)) => match read(row) {
                ControlFlow::Continue(true) => walked.read += 1,
                ControlFlow::Continue(false) => walked.unread += 1,
                ControlFlow::Break(()) => return Ok(walked),
            },
            Ok(None) => {}
            Err(error) if is_unreadable(&error) => walked.unread += 1,
            Err(error) => return Err(error),
        }
    }
    if has_gap {
        // Of those that lay where nothing can be read, an index may know.
        let known = format!("SELECT count(*) FROM {table} INDEXED BY sqlite_autoindex_{table}_1");
        let known = connection.query_row(&known, [], |row| row.get::<_, i64>(0));
        let known = known.map_or(0, i64::unsigned_abs);
        let missing = known.saturating_sub(walked.read);
        walked.unread = missing.max(walked.unread + 1);
    }
    Ok(walked)
}

/// The first number behind `after` from which the walk can go on. `None`: there is none.
fn beyond(after: i64, next: &mut dyn FnMut(i64) -> rusqlite::Result<Option<i64>>) -> Option<i64> {
    let mut tried = after.max(0);
    for _ in 0..SINGLE_STEPS {
        tried = tried.checked_add(1)?;
        if next(tried).is_ok() {
            return Some(tried);
        }
    }
    let (mut failed, mut step) = (tried, 1_i64);
    let mut works = loop {
        step = step.checked_mul(2)?;
        let tried = failed.checked_add(step)?;
        match next(tried) {
            Ok(_) => break tried,
            Err(_) => failed = tried,
        }
    };
    while works - failed > 1 {
        let middle = failed + (works - failed) / 2;
        match next(middle) {
            Ok(_) => works = middle,
            Err(_) => failed = middle,
        }
    }
    Some(works)
}

/// Whether it is the file that cannot be read there, so that it may be elsewhere.
fn is_unreadable(error: &rusqlite::Error) -> bool {
    match error.sqlite_error_code() {
        // A value that could not be converted.
        None => true,
        Some(code) => matches!(
            code,
            ErrorCode::DatabaseCorrupt | ErrorCode::SystemIoFailure | ErrorCode::NotADatabase
        ),
    }
}

/// Saves what an open connection holds to a new file beside `path`.
///
/// # Errors
/// Why nothing is saved.
pub(super) fn save(connection: &Connection, path: &Path) -> Result<Saved, String> {
    const IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT 1 FROM proxy_requests)
                               AND NOT EXISTS (SELECT 1 FROM proxy_dead_letters)";
    if connection.query_row(IS_EMPTY, [], |row| row.get(0)) == Ok(true) {
        return Ok(Saved::Nothing);
    }
    let to = create(path)?;
    match copy_whole(connection, &to) {
        Ok(()) => return Ok(Saved::All(to)),
        Err(why) => {
            log::warn!(error = why; "the queue cannot be copied as a whole, its rows are read one by one")
        }
    }
    let _ = std::fs::remove_file(&to);
    let to = create(path)?;
    let rows = copy_rows(connection, &to).inspect_err(|_| {
        let _ = std::fs::remove_file(&to);
    })?;
    if rows == 0 {
        let _ = std::fs::remove_file(&to);
        return Err("none of its rows can be read".to_owned());
    }
    let why = "pages are missing".to_owned();
    Ok(Saved::Part { to, rows, why })
}

/// A new file, for this user's eyes only. Nothing that is there is written over.
fn create(path: &Path) -> Result<PathBuf, String> {
    let first = saved_name(path, SystemTime::now());
    for number in 1..=NAMES_MAX {
        let mut name = first.clone().into_os_string();
        if number > 1 {
            name.push(format!("-{number}"));
        }
        let to = PathBuf::from(name);
        match create_private(&to) {
            Ok(true) => return Ok(to),
            Ok(false) => {}
            Err(error) => return Err(format!("{}: {error}", to.display())),
        }
    }
    Err(format!("{}: is there already", first.display()))
}

fn copy_whole(connection: &Connection, to: &Path) -> Result<(), String> {
    // As text, which is how SQLite takes a name here.
    let name = to.to_str().ok_or("its name is no text")?;
    connection
        .execute("VACUUM INTO ?1", [name])
        .map_err(|error| error.to_string())?;
    sync(to).map_err(|error| error.to_string())
}

/// SQLite has closed it, and nobody else has it open.
fn sync(file: &Path) -> std::io::Result<()> {
    File::open(file)?.sync_all()?;
    File::open(directory_of(file))?.sync_all()
}

fn copy_rows(connection: &Connection, to: &Path) -> Result<u64, String> {
    let store = SqliteStore::new(to.to_owned(), true, Duration::from_secs(60));
    store.migrate().map_err(|error| error.to_string())?;
    let copied = || -> rusqlite::Result<u64> {
        let mut target = Connection::open(to)?;
        let transaction = target.transaction()?;
        let mut count = 0;
        for Table { name, columns } in TABLES {
            let places = vec!["?"; columns.split(',').count()].join(", ");
            let insert = format!("INSERT OR IGNORE INTO {name} ({columns}) VALUES ({places})");
            let mut insert = transaction.prepare(&insert)?;
            let select = format!("SELECT {columns} FROM {name} WHERE seq = ?1");
            let walked = walk(connection, name, &select, &mut |row| {
                let columns = row.as_ref().column_count();
                let values = (0..columns).map(|column| row.get::<_, Value>(column));
                let Ok(values) = values.collect::<rusqlite::Result<Vec<_>>>() else {
                    return ControlFlow::Continue(false);
                };
                // What breaks a rule of the table is no row of ours.
                ControlFlow::Continue(insert.execute(params_from_iter(values)).is_ok())
            })?;
            count += walked.read;
        }
        transaction.commit()?;
        Ok(count)
    };
    let count = copied().map_err(|error| error.to_string())?;
    sync(to).map_err(|error| error.to_string())?;
    Ok(count)
}
