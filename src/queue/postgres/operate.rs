//! What an operator does: see [`Operate`].

use ::postgres::Row as PostgresRow;
use ::postgres::types::Type;
use uuid::Uuid;

use super::super::operate::{
    Action, BURIED, Counts, Filter, LastStatus, Operate, Position, Row, State,
};
use super::super::{BATCH_ROWS_MAX, StoreError};
use super::errors::Fault;
use super::session::Session;
use super::{Parameter, PostgresStore, count, to_seconds};

/// What of a queue's rows passes a filter. The parameters are those of [`Conditions`].
macro_rules! passes {
    () => {
        "
           ($1::boolean IS NULL OR (leased AND next_attempt_at > now()) = $1)
       AND ($2::float8 IS NULL OR received_at <= now() - $2 * interval '1 second')
       AND ($3::float8 IS NULL OR received_at >= now() - $3 * interval '1 second')
       AND ($4::text IS NULL OR starts_with(target, $4))
       AND ($5::int4 IS NULL OR last_status = $5)
       AND (NOT $6 OR (last_status IS NULL AND last_error IS NOT NULL))"
    };
}

/// The same for dead letters.
macro_rules! passes_dead {
    () => {
        "
           $1::boolean IS NULL
       AND ($2::float8 IS NULL OR received_at <= now() - $2 * interval '1 second')
       AND ($3::float8 IS NULL OR received_at >= now() - $3 * interval '1 second')
       AND ($4::text IS NULL OR starts_with(target, $4))
       AND ($5::int4 IS NULL OR last_status = $5)
       AND (NOT $6 OR last_status IS NULL)"
    };
}

const HAS_INSTANCE: &str = "SELECT EXISTS (SELECT 1 FROM proxy_instances WHERE id = $1)";

/// Served by the primary key, as all statements here but the counts.
const LIST: &str = concat!(
    "
    SELECT id, leased AND next_attempt_at > now() AS is_leased, false AS is_dead,
           received_at, next_attempt_at AS at, attempt, last_status, last_error,
           method, target, headers, octet_length(body)::bigint AS body_bytes
      FROM proxy_requests
     WHERE ",
    passes!(),
    "
       AND ($7::uuid IS NULL OR id > $7)
     ORDER BY id
     LIMIT $8"
);

const LIST_DEAD: &str = concat!(
    "
    SELECT id, false AS is_leased, true AS is_dead,
           received_at, died_at AS at, attempt, last_status, last_error,
           method, target, headers, coalesce(octet_length(body), 0)::bigint AS body_bytes
      FROM proxy_dead_letters
     WHERE ",
    passes_dead!(),
    "
       AND ($7::uuid IS NULL OR id > $7)
     ORDER BY id
     LIMIT $8"
);

const FIND: &str = "
    SELECT id, leased AND next_attempt_at > now() AS is_leased, false AS is_dead,
           received_at, next_attempt_at AS at, attempt, last_status, last_error,
           method, target, headers, octet_length(body)::bigint AS body_bytes
      FROM proxy_requests
     WHERE id = $1
     UNION ALL
    SELECT id, false, true,
           received_at, died_at, attempt, last_status, last_error,
           method, target, headers, coalesce(octet_length(body), 0)::bigint
      FROM proxy_dead_letters
     WHERE id = $1";

const BODY: &str = "SELECT body FROM proxy_requests WHERE id = $1";
const BODY_DEAD: &str = "SELECT body FROM proxy_dead_letters WHERE id = $1";

/// Walks through the table.
const COUNT: &str = concat!(
    "
    SELECT count(*) FILTER (WHERE NOT (leased AND next_attempt_at > now())),
           count(*) FILTER (WHERE leased AND next_attempt_at > now())
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
       SET next_attempt_at = least(next_attempt_at, now()), leased = false, leased_by = NULL
     WHERE id = ANY ($1) AND NOT (leased AND next_attempt_at > now())";

/// What could not be read cannot be sent either, and stays.
const RETRY_DEAD: &str = "
    WITH gone AS (
        DELETE FROM proxy_dead_letters
         WHERE id = ANY ($1) AND isfinite(received_at) AND method IS NOT NULL
           AND target IS NOT NULL AND headers IS NOT NULL AND body IS NOT NULL
     RETURNING id, received_at, last_status, last_error, method, target, headers, body
    ), back AS (
        INSERT INTO proxy_requests
               (id, received_at, next_attempt_at, attempt, last_status, last_error,
                method, target, headers, body)
        SELECT id, received_at, now(), 0, last_status, last_error,
               method, target, headers, body
          FROM gone
            ON CONFLICT (id) DO NOTHING
    )
    SELECT count(*) FROM gone";

const DROP: &str = "
    DELETE FROM proxy_requests
     WHERE id = ANY ($1) AND NOT (leased AND next_attempt_at > now())";

const DROP_DEAD: &str = "DELETE FROM proxy_dead_letters WHERE id = ANY ($1)";

const BURY: &str = "
    WITH gone AS (
        DELETE FROM proxy_requests
         WHERE id = ANY ($1) AND NOT (leased AND next_attempt_at > now())
     RETURNING id, received_at, attempt, last_status, method, target, headers, body
    ), buried AS (
        INSERT INTO proxy_dead_letters
               (id, received_at, died_at, attempt, last_status, last_error,
                method, target, headers, body)
        SELECT id, received_at, now(), attempt, last_status, $2,
               method, target, headers, body
          FROM gone
            ON CONFLICT (id) DO NOTHING
    )
    SELECT count(*) FROM gone";

const PAUSE: &str = "INSERT INTO proxy_pause DEFAULT VALUES ON CONFLICT DO NOTHING";
const RESUME: &str = "DELETE FROM proxy_pause";

/// A filter, as the statements take it.
struct Conditions {
    is_leased: Option<bool>,
    older_than: Option<f64>,
    newer_than: Option<f64>,
    path: Option<String>,
    status: Option<i32>,
    is_unanswered: bool,
}

impl Conditions {
    fn of(filter: &Filter) -> Conditions {
        Conditions {
            is_leased: match filter.state {
                Some(State::Waiting) => Some(false),
                Some(State::Leased) => Some(true),
                Some(State::Dead) | None => None,
            },
            older_than: filter.older_than.map(to_seconds),
            newer_than: filter.newer_than.map(to_seconds),
            path: filter.path.clone(),
            status: match filter.status {
                Some(LastStatus::Answered(status)) => Some(status.into()),
                Some(LastStatus::NoAnswer) | None => None,
            },
            is_unanswered: filter.status == Some(LastStatus::NoAnswer),
        }
    }

    fn parameters(&self) -> [Parameter<'_>; 6] {
        [
            (&self.is_leased, Type::BOOL),
            (&self.older_than, Type::FLOAT8),
            (&self.newer_than, Type::FLOAT8),
            (&self.path, Type::TEXT),
            (&self.status, Type::INT4),
            (&self.is_unanswered, Type::BOOL),
        ]
    }
}

impl Operate for PostgresStore {
    fn set_paused(&self, is_paused: bool) -> Result<bool, StoreError> {
        self.run(self.timeout, move |session| {
            let statement = if is_paused { PAUSE } else { RESUME };
            Ok(session.execute_typed(statement, &[])? > 0)
        })
    }

    fn has_instance(&self, name: Uuid) -> Result<bool, StoreError> {
        self.run(self.timeout, move |session| {
            let row = session.query_typed_one(HAS_INSTANCE, &[(&name, Type::UUID)])?;
            Ok(row.try_get(0)?)
        })
    }

    fn list(
        &self,
        filter: &Filter,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Vec<Row>, StoreError> {
        let filter = filter.clone();
        self.run(self.timeout, move |session| {
            list(session, &filter, after, limit)
        })
    }

    fn find(&self, id: Uuid) -> Result<Option<Row>, StoreError> {
        self.run(self.timeout, move |session| {
            let rows = session.query_typed(FIND, &[(&id, Type::UUID)])?;
            rows.first().map(read).transpose()
        })
    }

    fn body(&self, position: Position) -> Result<Option<Vec<u8>>, StoreError> {
        let Position { is_dead, id } = position;
        self.run(self.timeout, move |session| {
            let statement = if is_dead { BODY_DEAD } else { BODY };
            let rows = session.query_typed(statement, &[(&id, Type::UUID)])?;
            Ok(match rows.first() {
                Some(row) => row.try_get(0)?,
                None => None,
            })
        })
    }

    fn count(&self, filter: &Filter) -> Result<Counts, StoreError> {
        let filter = filter.clone();
        self.run(self.timeout, move |session| {
            let conditions = Conditions::of(&filter);
            let mut counts = Counts::default();
            if filter.state != Some(State::Dead) {
                let row = session.query_typed_one(COUNT, &conditions.parameters())?;
                (counts.waiting, counts.leased) = (count(&row, 0)?, count(&row, 1)?);
            }
            if filter.admits(State::Dead) {
                let row = session.query_typed_one(COUNT_DEAD, &conditions.parameters())?;
                counts.dead = count(&row, 0)?;
            }
            Ok(counts)
        })
    }

    fn apply(&self, action: Action, rows: &[Position]) -> Result<u64, StoreError> {
        debug_assert!(rows.len() <= BATCH_ROWS_MAX);
        let ids = |is_dead| {
            let rows = rows.iter().filter(|row| row.is_dead == is_dead);
            rows.map(|row| row.id).collect::<Vec<_>>()
        };
        let (live, dead) = (ids(false), ids(true));
        self.run(self.timeout, move |session| {
            apply(session, action, &live, &dead)
        })
    }
}

fn list(
    session: &mut Session,
    filter: &Filter,
    after: Option<Position>,
    limit: usize,
) -> Result<Vec<Row>, Fault> {
    let conditions = Conditions::of(filter);
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
        let after = after.map(|after| after.id);
        let left = i64::try_from(limit - found.len()).unwrap_or(i64::MAX);
        let mut parameters = conditions.parameters().to_vec();
        parameters.extend([
            (&after as &(dyn super::ToSql + Sync), Type::UUID),
            (&left, Type::INT8),
        ]);
        for row in &session.query_typed(statement, &parameters)? {
            found.push(read(row)?);
        }
    }
    Ok(found)
}

fn read(row: &PostgresRow) -> Result<Row, Fault> {
    let (is_leased, is_dead): (bool, bool) = (row.try_get("is_leased")?, row.try_get("is_dead")?);
    let attempt: Option<i32> = row.try_get("attempt")?;
    Ok(Row {
        id: row.try_get("id")?,
        state: match (is_dead, is_leased) {
            (true, _) => State::Dead,
            (false, true) => State::Leased,
            (false, false) => State::Waiting,
        },
        // A dead letter's may be beyond what the program knows.
        received_at: row.try_get("received_at").ok().flatten(),
        // As well as any row's that somebody else has written.
        at: row.try_get("at").unwrap_or(std::time::UNIX_EPOCH),
        attempt: attempt.and_then(|attempt| u32::try_from(attempt).ok()),
        last_status: row.try_get("last_status")?,
        last_error: row.try_get("last_error")?,
        method: row.try_get("method")?,
        target: row.try_get("target")?,
        headers: row.try_get("headers")?,
        body_bytes: row.try_get::<_, i64>("body_bytes")?.unsigned_abs(),
    })
}

fn apply(
    session: &mut Session,
    action: Action,
    live: &[Uuid],
    dead: &[Uuid],
) -> Result<u64, Fault> {
    let live: &[Parameter<'_>] = &[(&live, Type::UUID_ARRAY)];
    let dead: &[Parameter<'_>] = &[(&dead, Type::UUID_ARRAY)];
    // Two statements, of which each is whole by itself: the second may be missing.
    Ok(match action {
        Action::Retry => {
            let due = session.execute_typed(RETRY, live)?;
            due + count(&session.query_typed_one(RETRY_DEAD, dead)?, 0)?
        }
        Action::Drop => {
            session.execute_typed(DROP, live)? + session.execute_typed(DROP_DEAD, dead)?
        }
        // What is dead stays so.
        Action::Bury => {
            let parameters = [live[0].clone(), (&BURIED, Type::TEXT)];
            count(&session.query_typed_one(BURY, &parameters)?, 0)?
        }
    })
}
