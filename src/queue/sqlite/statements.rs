//! What the store asks of SQLite to serve the queue.

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
pub(super) const INSERT: &str = insert!("proxy_requests", "next_attempt_at", "", "");
pub(super) const INSERT_LEASED: &str =
    insert!("proxy_requests", "next_attempt_at", ", leased", ", 1");
pub(super) const INSERT_DEAD: &str = insert!("proxy_dead_letters", "died_at", "", "");

pub(super) const IS_PRESENT: &str = "
    SELECT EXISTS (SELECT 1 FROM proxy_requests WHERE id = ?1)
        OR EXISTS (SELECT 1 FROM proxy_dead_letters WHERE id = ?1)";

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
pub(super) const SELECT_FRESH: &str = select_due!(
    "INDEXED BY proxy_requests_fresh",
    "attempt <= 1",
    " ORDER BY next_attempt_at"
);
pub(super) const SELECT_RETRIED: &str = select_due!(
    "INDEXED BY proxy_requests_retried",
    "attempt > 1",
    " ORDER BY next_attempt_at"
);
pub(super) const SELECT_FRESH_UNORDERED: &str = select_due!("NOT INDEXED", "attempt <= 1", "");
pub(super) const SELECT_RETRIED_UNORDERED: &str = select_due!("NOT INDEXED", "attempt > 1", "");

/// What may be a probe at one end of a class. Served by its index, but for the attempts.
macro_rules! select_candidates {
    ($from:literal, $class:literal, $order:literal) => {
        concat!(
            "
    SELECT seq, id, attempt
      FROM proxy_requests ",
            $from,
            "
     WHERE next_attempt_at <= ?1 AND ",
            $class,
            "
     ORDER BY next_attempt_at",
            $order,
            "
     LIMIT ?2"
        )
    };
}
pub(super) const FRESH_AT_FRONT: &str =
    select_candidates!("INDEXED BY proxy_requests_fresh", "attempt <= 1", "");
pub(super) const FRESH_AT_END: &str =
    select_candidates!("INDEXED BY proxy_requests_fresh", "attempt <= 1", " DESC");
pub(super) const RETRIED_AT_FRONT: &str =
    select_candidates!("INDEXED BY proxy_requests_retried", "attempt > 1", "");
pub(super) const RETRIED_AT_END: &str =
    select_candidates!("INDEXED BY proxy_requests_retried", "attempt > 1", " DESC");

/// What may be one of either class from a place on. Served by the table's key.
pub(super) const CANDIDATES_FROM: &str = "
    SELECT seq, id, attempt
      FROM (
        SELECT seq, id, attempt, next_attempt_at
          FROM proxy_requests
         WHERE seq >= ?3
         ORDER BY seq
         LIMIT ?2
      )
     WHERE next_attempt_at <= ?1";

/// Two steps along the table's key.
pub(super) const SPAN: &str = "
    SELECT coalesce((SELECT min(seq) FROM proxy_requests), 0),
           coalesce((SELECT max(seq) FROM proxy_requests), 0)";

pub(super) const SELECT_ONE: &str = "
    SELECT seq, id, received_at, attempt, method, target, headers, body
      FROM proxy_requests
     WHERE seq = ?1";

pub(super) const LEASE: &str = "
    UPDATE proxy_requests
       SET attempt = attempt + 1, leased = 1, next_attempt_at = ?2
     WHERE seq = ?1";

pub(super) const BURY_UNREADABLE: &str = "
    INSERT INTO proxy_dead_letters
           (id, received_at, died_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, ?2, attempt, last_status, ?3,
           method, target, headers, body
      FROM proxy_requests
     WHERE seq = ?1
        ON CONFLICT (id) DO NOTHING";

pub(super) const DELETE_UNREADABLE: &str = "DELETE FROM proxy_requests WHERE seq = ?1";

pub(super) const DELETE: &str = "
    DELETE FROM proxy_requests
     WHERE id = ?1 AND attempt = ?2 AND leased = 1";

pub(super) const POSTPONE: &str = "
    UPDATE proxy_requests
       SET leased = 0, next_attempt_at = ?3, last_status = ?4, last_error = ?5
     WHERE id = ?1 AND attempt = ?2 AND leased = 1";

pub(super) const RELEASE: &str = "
    UPDATE proxy_requests
       SET leased = 0, next_attempt_at = ?3, attempt = attempt - 1
     WHERE id = ?1 AND attempt = ?2 AND leased = 1";

/// Followed by `DELETE`.
pub(super) const BURY: &str = "
    INSERT INTO proxy_dead_letters
           (id, received_at, died_at, attempt, last_status, last_error,
            method, target, headers, body)
    SELECT id, received_at, ?3, attempt, ?4, ?5,
           method, target, headers, body
      FROM proxy_requests
     WHERE id = ?1 AND attempt = ?2 AND leased = 1
        ON CONFLICT (id) DO NOTHING";

/// Served by `proxy_dead_letters_died_at`, which also has the order. Reads no body for its length.
pub(super) const SELECT_OLD: &str = "
    SELECT seq, coalesce(length(body), 0)
      FROM proxy_dead_letters
     WHERE died_at < ?1
     ORDER BY died_at
     LIMIT ?2";

pub(super) const PURGE: &str = "DELETE FROM proxy_dead_letters WHERE seq = ?1";

/// Served by the two indexes alone, and the last count by the one on `died_at`. The lowest number is
/// that of the oldest row, whatever the clocks said.
pub(super) const SAMPLE: &str = "
    SELECT sum(count), sum(leased), min(oldest), (SELECT count(*) FROM proxy_dead_letters),
           EXISTS (SELECT 1 FROM proxy_pause), (SELECT min(seq) FROM proxy_requests)
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

pub(super) const IS_PAUSED: &str = "SELECT EXISTS (SELECT 1 FROM proxy_pause)";

/// At the start. Walks through the two indexes.
pub(super) const TAKE_OVER: [&str; 2] = [
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_fresh
       SET leased = 0, next_attempt_at = min(next_attempt_at, ?1)
     WHERE attempt <= 1 AND leased = 1",
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_retried
       SET leased = 0, next_attempt_at = min(next_attempt_at, ?1)
     WHERE attempt > 1 AND leased = 1",
];

/// What waits by a clock that was `?2` ahead of the one that is `?1` now. Served by the indexes, as the
/// two that follow.
pub(super) const MOVE_BACK: [&str; 2] = [
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_fresh
       SET next_attempt_at = max(next_attempt_at - ?2, ?1)
     WHERE attempt <= 1 AND next_attempt_at > ?1",
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_retried
       SET next_attempt_at = max(next_attempt_at - ?2, ?1)
     WHERE attempt > 1 AND next_attempt_at > ?1",
];

pub(super) const HAS_FAR: &str = "
    SELECT EXISTS (SELECT 1
                     FROM proxy_requests INDEXED BY proxy_requests_fresh
                    WHERE attempt <= 1 AND next_attempt_at > ?1)
        OR EXISTS (SELECT 1
                     FROM proxy_requests INDEXED BY proxy_requests_retried
                    WHERE attempt > 1 AND next_attempt_at > ?1)";

pub(super) const PULL_IN: [&str; 2] = [
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_fresh
       SET leased = 0, next_attempt_at = ?2
     WHERE attempt <= 1 AND next_attempt_at > ?1",
    "
    UPDATE proxy_requests INDEXED BY proxy_requests_retried
       SET leased = 0, next_attempt_at = ?2
     WHERE attempt > 1 AND next_attempt_at > ?1",
];
