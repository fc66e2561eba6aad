//! What the store asks of the server, apart from the schema.

/// The primary key finds ids that are there already, as in all statements by id.
pub(super) const APPEND: &str = "
    INSERT INTO proxy_requests
           (id, received_at, next_attempt_at, attempt, last_status, last_error,
            method, target, headers, body, leased)
    SELECT id, received_at, now() + after * interval '1 second', attempt, status, error,
           method, target, headers, body, leased
      FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
           AS new (id, received_at, after, attempt, status, error,
                   method, target, headers, body, leased)
        ON CONFLICT (id) DO NOTHING";

/// As `APPEND`; `after` and `leased` count for nothing.
pub(super) const APPEND_DEAD: &str = "
    INSERT INTO proxy_dead_letters
           (id, received_at, died_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, now(), attempt, status, error,
           method, target, headers, body
      FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
           AS new (id, received_at, after, attempt, status, error,
                   method, target, headers, body, leased)
        ON CONFLICT (id) DO NOTHING";

/// Rows are found and ordered by `proxy_requests_due`, and updated where they were found. One
/// that another instance changes meanwhile is skipped. No count overflows.
///
/// `$4`, if any, is where to begin: see [`Start`](super::start::Start).
macro_rules! claim {
    ($order:literal) => {
        concat!(
            "
    WITH due AS MATERIALIZED (
        SELECT ctid AS place, next_attempt_at AS due_at, octet_length(body) AS bytes
          FROM proxy_requests
         WHERE next_attempt_at <= now() AND next_attempt_at >= coalesce($4, '-infinity')
         ",
            $order,
            "
         LIMIT $1
           FOR UPDATE SKIP LOCKED
    ), fitting AS (
        SELECT place, due_at,
               sum(bytes) OVER (ORDER BY due_at, place) - bytes AS bytes_before
          FROM due
    )
    UPDATE proxy_requests
       SET attempt = least(attempt, 2147483646) + 1,
           leased = true,
           next_attempt_at = now() + $2 * interval '1 second'
      FROM fitting
     WHERE ctid = place AND bytes_before < $3
 RETURNING id, attempt, due_at, received_at, method, target, headers, body"
        )
    };
}

pub(super) const CLAIM: &str = claim!("ORDER BY next_attempt_at");

/// As it comes: the planner reads the table from its start.
pub(super) const CLAIM_UNORDERED: &str = claim!("");

/// Each part finds its rows by the primary key. [`Outcomes`](super::Outcomes) sees to it that no
/// row is in two parts, as only one of them would change it, whichever.
pub(super) const SETTLE: &str = "
    WITH delivered AS (
        DELETE FROM proxy_requests AS row
         USING unnest($1, $2) AS mine (id, attempt)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND row.leased
     RETURNING 1
    ), later AS (
        UPDATE proxy_requests AS row
           SET leased = false,
               next_attempt_at = now() + mine.after * interval '1 second',
               last_status = mine.status,
               last_error = mine.error
          FROM unnest($3, $4, $5, $6, $7) AS mine (id, attempt, after, status, error)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND row.leased
     RETURNING 1
    ), gone AS (
        DELETE FROM proxy_requests AS row
         USING unnest($8, $9, $10, $11) AS mine (id, attempt, status, error)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND row.leased
     RETURNING row.id, row.received_at, row.attempt, mine.status, mine.error,
               row.method, row.target, row.headers, row.body
    ), buried AS (
        INSERT INTO proxy_dead_letters
               (id, received_at, died_at, attempt, last_status, last_error,
                method, target, headers, body)
        SELECT id, received_at, now(), attempt, status, error,
               method, target, headers, body
          FROM gone
            ON CONFLICT (id) DO NOTHING
    ), released AS (
        UPDATE proxy_requests AS row
           SET leased = false,
               next_attempt_at = now(),
               attempt = row.attempt - 1
          FROM unnest($12, $13) AS mine (id, attempt)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND row.leased
     RETURNING 1
    )
    SELECT (SELECT count(*) FROM delivered),
           (SELECT count(*) FROM later),
           (SELECT count(*) FROM gone),
           (SELECT count(*) FROM released)";

/// Rows are found and ordered by the index on `died_at`, and deleted where they were found. One
/// that another instance deletes meanwhile is skipped.
pub(super) const PURGE: &str = "
    WITH old AS MATERIALIZED (
        SELECT ctid AS place, died_at, coalesce(octet_length(body), 0) AS bytes
          FROM proxy_dead_letters
         WHERE died_at < now() - $2 * interval '1 second'
         ORDER BY died_at
         LIMIT $1
           FOR UPDATE SKIP LOCKED
    ), fitting AS (
        SELECT place, sum(bytes) OVER (ORDER BY died_at, place) - bytes AS bytes_before
          FROM old
    )
    DELETE FROM proxy_dead_letters
     USING fitting
     WHERE ctid = place AND bytes_before < $3";

/// Served by `proxy_requests_due` alone where the table has been vacuumed, and the dead
/// letters by one of theirs.
pub(super) const SAMPLE: &str = "
    SELECT count(*),
           count(*) FILTER (WHERE leased AND next_attempt_at > now()),
           (SELECT count(*) FROM proxy_dead_letters),
           floor(extract(epoch FROM now() - min(received_at)) * 1000)::bigint
      FROM proxy_requests";
