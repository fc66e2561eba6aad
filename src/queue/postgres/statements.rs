//! What the store asks of the server, apart from the schema.

use super::super::ByClass;

/// A statement for each class of rows. Not one with a parameter: only a condition that it can see
/// makes the planner take the index of that class.
type Statements = ByClass<&'static str>;

/// The primary key finds ids that are there already, as in all statements by id.
pub(super) const APPEND: &str = "
    INSERT INTO proxy_requests
           (id, received_at, next_attempt_at, attempt, last_status, last_error,
            method, target, headers, body, leased, leased_by)
    SELECT id, received_at, now() + after * interval '1 second', attempt, status, error,
           method, target, headers, body, leased, CASE WHEN leased THEN $12 END
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

/// Both parts by the primary key.
pub(super) const PRESENT: &str = "
    SELECT id FROM proxy_requests WHERE id = ANY ($1)
     UNION ALL
    SELECT id FROM proxy_dead_letters WHERE id = ANY ($1)";

/// Rows are found and ordered by the index of their class, and updated where they were found. One
/// that another instance changes meanwhile is skipped. No count overflows. The pause is looked for
/// once, before any row.
///
/// `$4`, if any, is where to begin: see [`Start`](super::start::Start). `$5` is the instance.
macro_rules! claim {
    ($class:expr, $order:expr) => {
        concat!(
            "
    WITH due AS MATERIALIZED (
        SELECT ctid AS place, next_attempt_at AS due_at,
               octet_length(body) + octet_length(headers) + octet_length(target) AS bytes
          FROM proxy_requests
         WHERE next_attempt_at <= now() AND next_attempt_at >= coalesce($4, '-infinity')
           AND NOT EXISTS (SELECT FROM proxy_pause)
           AND ",
            $class,
            "
         ",
            $order,
            "
         LIMIT $1
           FOR UPDATE SKIP LOCKED
    ), fitting AS (
        SELECT place, due_at,
               sum(bytes) OVER (ORDER BY due_at, place) AS bytes_with,
               row_number() OVER (ORDER BY due_at, place) AS number
          FROM due
    )
    UPDATE proxy_requests
       SET attempt = least(attempt, 2147483646) + 1,
           leased = true,
           leased_by = $5,
           next_attempt_at = now() + $2 * interval '1 second'
      FROM fitting
     WHERE ctid = place AND (bytes_with <= $3 OR number = 1)
 RETURNING id, attempt, due_at, received_at, method, target, headers, body"
        )
    };
}

pub(super) const CLAIM: Statements = ByClass {
    fresh: claim!("attempt <= 1", "ORDER BY next_attempt_at"),
    retried: claim!("attempt > 1", "ORDER BY next_attempt_at"),
};

/// As it comes: the planner reads the table from its start.
pub(super) const CLAIM_UNORDERED: Statements = ByClass {
    fresh: claim!("attempt <= 1", ""),
    retried: claim!("attempt > 1", ""),
};

/// As `claim!`, but claims no more rows than `proxy_rate` has tokens, and takes those: `$6` come
/// in a second, and as many fit. Nothing is locked or written while nothing is due.
///
/// Returns one row: whether `proxy_rate` has its row, whether anything is due, the tokens before
/// (null: another instance is claiming, or nothing is due), and what is claimed. Not the bodies:
/// an instance that stops reading half-way would keep the tokens from all others.
///
/// The clock is read once the row is locked, so never before another's `refilled_at`, unless it
/// was set back: then nothing comes for the time before, and the row follows the clock. Of the
/// two limits the inner one is the planner's, which has to know it to choose the index.
///
/// What `paid` joins are no subqueries in SET: where another instance has changed the row since
/// this statement began, only the former are kept while the row is looked at again. `is_only` is
/// for the index, where a transaction that stayed open for long has left a large table behind.
macro_rules! claim_by_tokens {
    ($class:expr, $order:expr) => {
        concat!(
            "
    WITH waiting AS MATERIALIZED (
        SELECT (
            SELECT true
              FROM proxy_requests
             WHERE next_attempt_at <= now() AND next_attempt_at >= coalesce($4, '-infinity')
               AND NOT EXISTS (SELECT FROM proxy_pause)
               AND ",
            $class,
            "
             ",
            $order,
            "
             LIMIT 1
        ) IS NOT NULL AS is_due
    ), held AS MATERIALIZED (
        SELECT tokens, refilled_at
          FROM proxy_rate
         WHERE is_only AND (SELECT is_due FROM waiting)
           FOR UPDATE SKIP LOCKED
    ), seen AS MATERIALIZED (
        SELECT tokens, refilled_at, clock_timestamp() AS seen_at
          FROM held
    ), refilled AS MATERIALIZED (
        SELECT least(
                   tokens + $6 * greatest(
                       extract(epoch FROM seen_at - refilled_at)::double precision, 0),
                   $6) AS tokens,
               seen_at,
               seen_at < refilled_at AS is_set_back
          FROM seen
    ), due AS MATERIALIZED (
        SELECT place, due_at, bytes
          FROM (
            SELECT ctid AS place, next_attempt_at AS due_at,
                   octet_length(body) + octet_length(headers) + octet_length(target) AS bytes
              FROM proxy_requests
             WHERE next_attempt_at <= now() AND next_attempt_at >= coalesce($4, '-infinity')
               AND NOT EXISTS (SELECT FROM proxy_pause)
               AND ",
            $class,
            "
             ",
            $order,
            "
             LIMIT $1
               FOR UPDATE SKIP LOCKED
          ) AS wanted
         LIMIT coalesce((SELECT floor(tokens)::bigint FROM refilled), 0)
    ), fitting AS (
        SELECT place, due_at,
               sum(bytes) OVER (ORDER BY due_at, place) AS bytes_with,
               row_number() OVER (ORDER BY due_at, place) AS number
          FROM due
    ), claimed AS (
        UPDATE proxy_requests
           SET attempt = least(attempt, 2147483646) + 1,
               leased = true,
               leased_by = $5,
               next_attempt_at = now() + $2 * interval '1 second'
          FROM fitting
         WHERE ctid = place AND (bytes_with <= $3 OR number = 1)
     RETURNING id, attempt, due_at
    ), paid AS (
        UPDATE proxy_rate
           SET tokens = refilled.tokens - taken.tokens,
               refilled_at = refilled.seen_at
          FROM refilled, (SELECT count(*) AS tokens FROM claimed) AS taken
         WHERE is_only AND (taken.tokens > 0 OR refilled.is_set_back)
    )
    SELECT EXISTS (SELECT FROM proxy_rate WHERE is_only) AS has_rate,
           (SELECT is_due FROM waiting) AS is_due,
           (SELECT tokens FROM refilled) AS tokens,
           coalesce(array_agg(id), '{}') AS ids,
           coalesce(array_agg(attempt), '{}') AS attempts,
           coalesce(array_agg(due_at), '{}') AS due_at
      FROM claimed"
        )
    };
}

pub(super) const CLAIM_BY_TOKENS: Statements = ByClass {
    fresh: claim_by_tokens!("attempt <= 1", "ORDER BY next_attempt_at"),
    retried: claim_by_tokens!("attempt > 1", "ORDER BY next_attempt_at"),
};

pub(super) const CLAIM_BY_TOKENS_UNORDERED: Statements = ByClass {
    fresh: claim_by_tokens!("attempt <= 1", ""),
    retried: claim_by_tokens!("attempt > 1", ""),
};

/// As `claim!` or `claim_by_tokens!`, but of the `$8` rows of the class at a spot those tried least,
/// and none of `$7`. The former are found by the index, or in some blocks of the table, whichever;
/// then their places find the rows.
macro_rules! probe {
    ($claim:ident, $class:literal, $from:expr, $order:literal) => {
        $claim!(
            concat!(
                $class,
                " AND id <> ALL ($7)
           AND ctid = ANY (ARRAY(
                SELECT ctid
                  FROM proxy_requests ",
                $from,
                "
                 WHERE next_attempt_at <= now() AND ",
                $class,
                "
                 ORDER BY ",
                $order,
                "
                 LIMIT $8
           ))"
            ),
            concat!("ORDER BY attempt, ", $order)
        )
    };
    ($claim:ident, $class:literal, front) => {
        probe!($claim, $class, "", "next_attempt_at")
    };
    ($claim:ident, $class:literal, end) => {
        probe!($claim, $class, "", "next_attempt_at DESC")
    };
    ($claim:ident, $class:literal, anywhere) => {
        probe!(
            $claim,
            $class,
            "TABLESAMPLE SYSTEM (
                    least(100, 100.0 * 50 * current_setting('block_size')::integer
                               / greatest(pg_relation_size('proxy_requests'), 1)))",
            "random()"
        )
    };
}

macro_rules! probes {
    ($claim:ident, $spot:tt) => {
        ByClass {
            fresh: probe!($claim, "attempt <= 1", $spot),
            retried: probe!($claim, "attempt > 1", $spot),
        }
    };
}

pub(super) const PROBE: Statements = probes!(claim, front);
pub(super) const PROBE_END: Statements = probes!(claim, end);
pub(super) const PROBE_ANYWHERE: Statements = probes!(claim, anywhere);
pub(super) const PROBE_BY_TOKENS: Statements = probes!(claim_by_tokens, front);
pub(super) const PROBE_END_BY_TOKENS: Statements = probes!(claim_by_tokens, end);
pub(super) const PROBE_ANYWHERE_BY_TOKENS: Statements = probes!(claim_by_tokens, anywhere);

/// Rows claimed by their tokens, in the columns of `CLAIM`. The primary key finds them.
///
/// `coalesce`, here and below, only keeps statistics out of it: they know of no leased rows, as
/// those are gone soon, and for none the planner would compare each of ours with each leased one.
pub(super) const CLAIMED: &str = "
    SELECT row.id, row.attempt, mine.due_at, row.received_at,
           row.method, row.target, row.headers, row.body
      FROM unnest($1, $2, $3) AS mine (id, attempt, due_at)
      JOIN proxy_requests AS row
        ON row.id = mine.id AND row.attempt = mine.attempt AND coalesce(row.leased)";

/// For one who has emptied the table: empty, so that this gives nobody more than the rate.
pub(super) const RESTORE_RATE: &str = "
    INSERT INTO proxy_rate (tokens, refilled_at)
    VALUES (0, clock_timestamp())
        ON CONFLICT DO NOTHING";

/// Each part finds its rows by the primary key, and changes those that `$14` has leased.
/// [`Outcomes`](super::Outcomes) sees to it that no row is in two parts, as only one of them would
/// change it, whichever.
pub(super) const SETTLE: &str = "
    WITH delivered AS (
        DELETE FROM proxy_requests AS row
         USING unnest($1, $2) AS mine (id, attempt)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND coalesce(row.leased)
           AND row.leased_by = $14
     RETURNING 1
    ), later AS (
        UPDATE proxy_requests AS row
           SET leased = false,
               leased_by = NULL,
               next_attempt_at = now() + mine.after * interval '1 second',
               last_status = mine.status,
               last_error = mine.error
          FROM unnest($3, $4, $5, $6, $7) AS mine (id, attempt, after, status, error)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND coalesce(row.leased)
           AND row.leased_by = $14
     RETURNING 1
    ), gone AS (
        DELETE FROM proxy_requests AS row
         USING unnest($8, $9, $10, $11) AS mine (id, attempt, status, error)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND coalesce(row.leased)
           AND row.leased_by = $14
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
               leased_by = NULL,
               next_attempt_at = now(),
               attempt = row.attempt - 1
          FROM unnest($12, $13) AS mine (id, attempt)
         WHERE row.id = mine.id AND row.attempt = mine.attempt AND coalesce(row.leased)
           AND row.leased_by = $14
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

/// Served by the two indexes alone where the table has been vacuumed, and the dead letters by one
/// of theirs.
pub(super) const SAMPLE: &str = "
    SELECT sum(count)::bigint,
           sum(leased)::bigint,
           (SELECT count(*) FROM proxy_dead_letters),
           floor(extract(epoch FROM now() - min(oldest)) * 1000)::bigint,
           EXISTS (SELECT FROM proxy_pause)
      FROM (
        SELECT count(*) AS count,
               count(*) FILTER (WHERE leased AND next_attempt_at > now()) AS leased,
               min(received_at) AS oldest
          FROM proxy_requests
         WHERE attempt <= 1
         UNION ALL
        SELECT count(*),
               count(*) FILTER (WHERE leased AND next_attempt_at > now()),
               min(received_at)
          FROM proxy_requests
         WHERE attempt > 1
      ) AS classes";

pub(super) const IS_PAUSED: &str = "SELECT EXISTS (SELECT FROM proxy_pause)";

/// `$1` is there; is anybody not heard of for `$2` seconds? Nothing rests on this being on the disk.
pub(super) const BEAT: &str = "
    WITH beat AS (
        INSERT INTO proxy_instances (id, last_seen)
        VALUES ($1, clock_timestamp())
            ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen
    )
    SELECT EXISTS (
               SELECT
                 FROM proxy_instances
                WHERE id <> $1 AND last_seen < now() - $2 * interval '1 second'
           ),
           set_config('synchronous_commit', 'off', true)";

/// `$1` has nothing any more, or if `$2` will not be heard of again.
pub(super) const LEAVE: &str = "
    WITH gone AS (
        DELETE FROM proxy_instances
         WHERE id = $1 AND NOT $2
    )
    UPDATE proxy_instances
       SET last_seen = '-infinity'
     WHERE id = $1 AND $2";

/// Gives back leases that are not over, of both classes, for the index of each. What was over is
/// due in any case, so nothing that is due is walked through.
macro_rules! give_back {
    ($with:literal, $attempt:literal, $whose:literal) => {
        concat!(
            "
    WITH ",
            $with,
            " fresh AS (
        UPDATE proxy_requests
           SET leased = false,
               leased_by = NULL,
               next_attempt_at = now(),
               attempt = ",
            $attempt,
            "
         WHERE attempt <= 1 AND next_attempt_at > now() AND leased
           AND ",
            $whose,
            "
     RETURNING 1
    ), retried AS (
        UPDATE proxy_requests
           SET leased = false,
               leased_by = NULL,
               next_attempt_at = now(),
               attempt = ",
            $attempt,
            "
         WHERE attempt > 1 AND next_attempt_at > now() AND leased
           AND ",
            $whose,
            "
     RETURNING 1
    )
    SELECT (SELECT count(*) FROM fresh) + (SELECT count(*) FROM retried)"
        )
    };
}

/// Of those not heard of for `$1` seconds, who are forgotten after twice as long: until then a
/// claim of theirs may still be under way. The attempt stays counted, as it may have been made.
/// Only while `$2`, who asks, is heard of: since it was decided to ask, this instance or the server
/// may have been frozen, and all have been silent.
pub(super) const TAKE_OVER: &str = give_back!(
    "silent AS MATERIALIZED (
        SELECT id, last_seen
          FROM proxy_instances
         WHERE last_seen < now() - $1 * interval '1 second'
           AND EXISTS (
                   SELECT
                     FROM proxy_instances
                    WHERE id = $2 AND last_seen >= now() - $1 * interval '1 second'
               )
           FOR UPDATE SKIP LOCKED
    ), forgotten AS (
        DELETE FROM proxy_instances AS instance
         USING silent
         WHERE instance.id = silent.id
           AND silent.last_seen < now() - 2 * $1 * interval '1 second'
    ),",
    "attempt",
    "leased_by IN (SELECT id FROM silent)"
);

/// Of `$1`, but for the rows `$2`: what it claimed and never heard of. No attempt was made.
pub(super) const GIVE_BACK_UNKNOWN: &str =
    give_back!("", "attempt - 1", "leased_by = $1 AND NOT (id = ANY ($2))");
