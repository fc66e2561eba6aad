//! A file as a spool.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Row, params};
use uuid::Uuid;

use super::super::{Fate, NewRow, StoreError};
use super::SqliteStore;
use super::rows::read;
use super::writing::Kind;
use crate::settle::Failure;

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

/// What only a spool does: it is read in the order of arrival, and emptied row by row.
impl SqliteStore {
    /// Up to `limit` rows after number `after`, as they were appended, with their numbers: first
    /// those that wait, then dead letters. Ends early once they have `bytes_max` bytes.
    /// What cannot be read stays where it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(in crate::queue) fn oldest(
        &self,
        after: SpoolPosition,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<(SpoolPosition, NewRow)>, StoreError> {
        self.write(Kind::Drains, move |transaction, now| {
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
                    let Ok(new) = read_new(row, is_dead, now) else {
                        continue;
                    };
                    bytes += new.request.bytes();
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
    pub(in crate::queue) fn remove(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let ids = ids.to_vec();
        self.write(Kind::Drains, move |transaction, _| {
            for statement in [REMOVE, REMOVE_DEAD] {
                let mut remove = transaction.prepare(statement)?;
                for id in &ids {
                    remove.execute([id.as_bytes()])?;
                }
            }
            Ok(())
        })
    }
}

/// Where a row lies in a spool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::queue) struct SpoolPosition {
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
    // One that is none is not known.
    let status = row.get("last_status").ok().flatten();
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
