//! What an operator does: see [`Operate`].

use std::ops::ControlFlow;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row as SqliteRow, params};
use uuid::Uuid;

use super::super::operate::{
    Action, BURIED, Counts, Filter, LastStatus, Operate, Position, Row, State,
};
use super::super::{BATCH_ROWS_MAX, StoreError};
use super::SqliteStore;
use super::file::open_to_read;
use super::rescue;
use super::rows::{from_ms, sub_ms};
use super::writing::Kind;

/// What of a queue's rows passes a filter; `?1` is now.
macro_rules! passes {
    () => {
        "
           (?2 IS NULL OR (leased = 1 AND next_attempt_at > ?1) = ?2)
       AND (?3 IS NULL OR received_at <= ?3)
       AND (?4 IS NULL OR received_at >= ?4)
       AND (?5 IS NULL OR substr(target, 1, length(?5)) = ?5)
       AND (?6 IS NULL OR last_status = ?6)
       AND (NOT ?7 OR (last_status IS NULL AND last_error IS NOT NULL))"
    };
}

/// The same for dead letters.
macro_rules! passes_dead {
    () => {
        "
           ?1 IS NOT NULL AND ?2 IS NULL
       AND (?3 IS NULL OR received_at <= ?3)
       AND (?4 IS NULL OR received_at >= ?4)
       AND (?5 IS NULL OR substr(target, 1, length(?5)) = ?5)
       AND (?6 IS NULL OR last_status = ?6)
       AND (NOT ?7 OR last_status IS NULL)"
    };
}

macro_rules! columns {
    () => {
        columns!("")
    };
    ($more:literal) => {
        concat!(
            "
    SELECT id, leased = 1 AND next_attempt_at > ?1 AS is_leased, 0 AS is_dead,
           received_at, next_attempt_at AS at, attempt, last_status, last_error,
           method, target, headers, length(body) AS body_bytes",
            $more,
            "
      FROM proxy_requests"
        )
    };
}

macro_rules! columns_dead {
    () => {
        columns_dead!("")
    };
    ($more:literal) => {
        concat!(
            "
    SELECT id, 0 AS is_leased, ?1 IS NOT NULL AS is_dead,
           received_at, died_at AS at, attempt, last_status, last_error,
           method, target, headers, coalesce(length(body), 0) AS body_bytes",
            $more,
            "
      FROM proxy_dead_letters"
        )
    };
}

/// Served by the unique index on `id`, as all statements here but the counts.
const LIST: &str = concat!(
    columns!(),
    "
     WHERE ",
    passes!(),
    "
       AND id > ?8 AND length(id) = 16
     ORDER BY id
     LIMIT ?9"
);

const LIST_DEAD: &str = concat!(
    columns_dead!(),
    "
     WHERE ",
    passes_dead!(),
    "
       AND id > ?8 AND length(id) = 16
     ORDER BY id
     LIMIT ?9"
);

const FIND: &str = concat!(columns!(), " WHERE id = ?2");
const FIND_DEAD: &str = concat!(columns_dead!(), " WHERE id = ?2");

/// With the number of the row as `?2`, and its body.
const SALVAGE: &str = concat!(columns!(", body"), " WHERE seq = ?2");
const SALVAGE_DEAD: &str = concat!(columns_dead!(", body"), " WHERE seq = ?2");

const BODY: &str = "SELECT body FROM proxy_requests WHERE id = ?1";
const BODY_DEAD: &str = "SELECT body FROM proxy_dead_letters WHERE id = ?1";

/// Walks through the table.
const COUNT: &str = concat!(
    "
    SELECT coalesce(sum(NOT (leased = 1 AND next_attempt_at > ?1)), 0),
           coalesce(sum(leased = 1 AND next_attempt_at > ?1), 0)
      FROM proxy_requests
     WHERE ",
    passes!()
);

const COUNT_DEAD: &str = concat!(
    "
    SELECT count(*)
      FROM proxy_dead_letters
     WHERE ",
    passes_dead!()
);

const RETRY: &str = "
    UPDATE proxy_requests
       SET next_attempt_at = min(next_attempt_at, ?2), leased = 0
     WHERE id = ?1 AND NOT (leased = 1 AND next_attempt_at > ?2)";

/// Followed by `DROP_DEAD`, if it found one: what could not be read cannot be sent, and stays.
const RETRY_DEAD: &str = "
    INSERT INTO proxy_requests
           (id, received_at, next_attempt_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, ?2, 0, last_status, last_error,
           method, target, headers, body
      FROM proxy_dead_letters
     WHERE id = ?1 AND received_at IS NOT NULL AND method IS NOT NULL
       AND target IS NOT NULL AND headers IS NOT NULL AND body IS NOT NULL
        ON CONFLICT (id) DO UPDATE SET id = id";

const DROP: &str = "
    DELETE FROM proxy_requests
     WHERE id = ?1 AND NOT (leased = 1 AND next_attempt_at > ?2)";

const DROP_DEAD: &str = "DELETE FROM proxy_dead_letters WHERE id = ?1";

/// Followed by `DROP`.
const BURY: &str = "
    INSERT INTO proxy_dead_letters
           (id, received_at, died_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, ?2, attempt, last_status, ?3,
           method, target, headers, body
      FROM proxy_requests
     WHERE id = ?1 AND NOT (leased = 1 AND next_attempt_at > ?2)
        ON CONFLICT (id) DO NOTHING";

const PAUSE: &str =
    "INSERT INTO proxy_pause (is_only, paused_at) VALUES (1, ?1) ON CONFLICT DO NOTHING";
const RESUME: &str = "DELETE FROM proxy_pause";

/// A filter, as the statements take it.
struct Conditions {
    now: i64,
    is_leased: Option<bool>,
    received_until: Option<i64>,
    received_from: Option<i64>,
    path: Option<String>,
    status: Option<u16>,
    is_unanswered: bool,
}

impl Conditions {
    fn of(filter: &Filter, now: i64) -> Conditions {
        Conditions {
            now,
            is_leased: match filter.state {
                Some(State::Waiting) => Some(false),
                Some(State::Leased) => Some(true),
                Some(State::Dead) | None => None,
            },
            received_until: filter.older_than.map(|age| sub_ms(now, age)),
            received_from: filter.newer_than.map(|age| sub_ms(now, age)),
            path: filter.path.clone(),
            status: match filter.status {
                Some(LastStatus::Answered(status)) => Some(status),
                Some(LastStatus::NoAnswer) | None => None,
            },
            is_unanswered: filter.status == Some(LastStatus::NoAnswer),
        }
    }
}

impl SqliteStore {
    /// Reads without holding up whoever writes.
    fn read<T>(
        &self,
        body: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        self.with_reader(|reader| body(reader).map_err(|error| self.shared.describe(&error)))
    }
}

impl Operate for SqliteStore {
    fn set_paused(&self, is_paused: bool) -> Result<bool, StoreError> {
        self.write(Kind::Drains, move |transaction, now| {
            let changed = if is_paused {
                transaction.execute(PAUSE, [now])
            } else {
                transaction.execute(RESUME, [])
            };
            Ok(changed? > 0)
        })
    }

    fn list(
        &self,
        filter: &Filter,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Vec<Row>, StoreError> {
        let of = Conditions::of(filter, self.shared.now_ms());
        self.read(|connection| {
            let mut found = Vec::new();
            for (statement, is_dead) in [(LIST, false), (LIST_DEAD, true)] {
                let is_meant = match filter.state {
                    Some(state) => (state == State::Dead) == is_dead,
                    None => true,
                };
                if !is_meant || after.is_some_and(|after| after.is_dead && !is_dead) {
                    continue;
                }
                let after = after.filter(|after| after.is_dead == is_dead);
                // No id is before this one, and none of 16 bytes is it.
                let after = after.map_or(Vec::new(), |after| after.id.as_bytes().to_vec());
                let left = i64::try_from(limit - found.len()).unwrap_or(i64::MAX);
                let mut select = connection.prepare(statement)?;
                let mut rows = select.query(params![
                    of.now,
                    of.is_leased,
                    of.received_until,
                    of.received_from,
                    of.path,
                    of.status,
                    of.is_unanswered,
                    after,
                    left
                ])?;
                while let Some(row) = rows.next()? {
                    found.push(read(row)?);
                }
            }
            Ok(found)
        })
    }

    fn find(&self, id: Uuid) -> Result<Option<Row>, StoreError> {
        let now = self.shared.now_ms();
        self.read(|connection| {
            for statement in [FIND, FIND_DEAD] {
                let mut select = connection.prepare(statement)?;
                let found = select.query_row(params![now, id.as_bytes()], read);
                if let Some(row) = found.optional()? {
                    return Ok(Some(row));
                }
            }
            Ok(None)
        })
    }

    fn body(&self, position: Position) -> Result<Option<Vec<u8>>, StoreError> {
        let statement = if position.is_dead { BODY_DEAD } else { BODY };
        self.read(|connection| {
            let mut select = connection.prepare(statement)?;
            let found = select.query_row([position.id.as_bytes()], |row| row.get(0));
            Ok(found.optional()?.flatten())
        })
    }

    fn count(&self, filter: &Filter) -> Result<Counts, StoreError> {
        let of = Conditions::of(filter, self.shared.now_ms());
        self.read(|connection| {
            let parameters = params![
                of.now,
                of.is_leased,
                of.received_until,
                of.received_from,
                of.path,
                of.status,
                of.is_unanswered
            ];
            // Counts: never negative.
            let count = |row: &SqliteRow<'_>, column| row.get(column).map(i64::unsigned_abs);
            let mut counts = Counts::default();
            if filter.state != Some(State::Dead) {
                (counts.waiting, counts.leased) =
                    connection.query_row(COUNT, parameters, |row| {
                        Ok((count(row, 0)?, count(row, 1)?))
                    })?;
            }
            if filter.admits(State::Dead) {
                counts.dead = connection.query_row(COUNT_DEAD, parameters, |row| count(row, 0))?;
            }
            Ok(counts)
        })
    }

    fn salvage(
        &self,
        each: &mut dyn FnMut(Row, Option<Vec<u8>>) -> ControlFlow<()>,
    ) -> Result<u64, StoreError> {
        let shared = &self.shared;
        let describe = |error: rusqlite::Error| shared.describe(&error);
        let connection = open_to_read(&shared.path, shared.timeout).map_err(describe)?;
        let (now, mut unread) = (shared.now_ms(), 0);
        for (table, select) in [
            ("proxy_requests", SALVAGE),
            ("proxy_dead_letters", SALVAGE_DEAD),
        ] {
            // The time is no parameter there: the walk has but one.
            let select = select.replace("?1", &now.to_string()).replace("?2", "?1");
            let mut is_over = false;
            let walked = rescue::walk(&connection, table, &select, &mut |row| {
                let body = row.get::<_, Option<Vec<u8>>>("body");
                let (Ok(found), Ok(body)) = (read(row), body) else {
                    return ControlFlow::Continue(false);
                };
                if found.id.is_nil() {
                    return ControlFlow::Continue(false);
                }
                is_over = each(found, body).is_break();
                match is_over {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(true),
                }
            });
            unread += walked.map_err(describe)?.unread;
            if is_over {
                break;
            }
        }
        Ok(unread)
    }

    fn apply(&self, action: Action, rows: &[Position]) -> Result<u64, StoreError> {
        debug_assert!(rows.len() <= BATCH_ROWS_MAX);
        let rows = rows.to_vec();
        self.write(Kind::Drains, move |transaction, now| {
            let mut changed = 0;
            for Position { is_dead, id } in &rows {
                let id = id.as_bytes();
                changed += match (action, is_dead) {
                    (Action::Retry, false) => transaction.execute(RETRY, params![id, now])?,
                    (Action::Retry, true) => {
                        match transaction.execute(RETRY_DEAD, params![id, now])? {
                            0 => 0,
                            _ => transaction.execute(DROP_DEAD, [id])?,
                        }
                    }
                    (Action::Drop, false) => transaction.execute(DROP, params![id, now])?,
                    (Action::Drop, true) => transaction.execute(DROP_DEAD, [id])?,
                    (Action::Bury, false) => {
                        transaction.execute(BURY, params![id, now, BURIED])?;
                        transaction.execute(DROP, params![id, now])?
                    }
                    // What is dead stays so.
                    (Action::Bury, true) => 0,
                };
            }
            Ok(changed as u64)
        })
    }
}

/// Reads a row. What is not as this program writes it is not known, and the others are.
fn read(row: &SqliteRow<'_>) -> rusqlite::Result<Row> {
    let id: Vec<u8> = row.get("id")?;
    let state = match (row.get("is_dead")?, row.get("is_leased")?) {
        (true, _) => State::Dead,
        (false, true) => State::Leased,
        (false, false) => State::Waiting,
    };
    let received_at: Option<i64> = row.get("received_at").ok().flatten();
    let at: Option<i64> = row.get("at").ok();
    Ok(Row {
        // The statements find no others.
        id: Uuid::from_slice(&id).unwrap_or_default(),
        state,
        received_at: received_at.and_then(from_ms),
        at: at.and_then(from_ms).unwrap_or(std::time::UNIX_EPOCH),
        attempt: row.get("attempt").ok(),
        last_status: row.get("last_status").ok().flatten(),
        last_error: row.get_ref("last_error").ok().and_then(lossy),
        method: row.get("method").ok().flatten(),
        target: row.get("target").ok().flatten(),
        headers: row.get("headers").ok().flatten(),
        body_bytes: row.get("body_bytes").map_or(0, i64::unsigned_abs),
    })
}

/// A text for people, also if it is none.
fn lossy(text: ValueRef<'_>) -> Option<String> {
    let bytes = text.as_bytes_or_null().ok().flatten()?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}
