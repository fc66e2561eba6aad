//! What `asyncproxy doctor` asks a SQLite file. Changes nothing, and judges nothing.

use std::path::Path;
use std::time::Duration;

use super::file::open_to_read;

/// Reads the whole file and returns what is wrong with it, line by line; `ok` if nothing is.
///
/// # Errors
/// SQLite's, in one line.
pub fn quick_check(path: &Path, timeout: Duration) -> Result<String, String> {
    let check = || -> rusqlite::Result<String> {
        let connection = open_to_read(path, timeout)?;
        let mut statement = connection.prepare("PRAGMA quick_check(10)")?;
        let lines = statement.query_map([], |row| row.get::<_, String>(0))?;
        Ok(lines.collect::<rusqlite::Result<Vec<_>>>()?.join("; "))
    };
    check().map_err(|error| error.to_string())
}
