//! Claims by tokens that all instances on the database share.
//!
//! The tokens are a row of `proxy_rate`, and one statement locks it, claims as many rows as there
//! are tokens, and takes these: with that statement's end they are free for the next. The requests
//! themselves are read afterwards.

use std::time::{Duration, SystemTime};

use ::postgres::Row;
use ::postgres::types::Type;
use uuid::Uuid;

use super::Parameter;
use super::errors::Fault;
use super::session::Session;
use super::statements::{CLAIMED, RESTORE_RATE};

/// While another instance has the tokens: about as long as a claim takes.
const TURN: Duration = Duration::from_millis(10);

/// Claims with a statement of [`CLAIM_BY_TOKENS`](super::statements::CLAIM_BY_TOKENS) or one of its
/// kind and its parameters, of which `limit` and `rate` (a second) are some. Returns the rows in
/// the columns of `CLAIM`, and how long nothing will come, if that is for want of tokens.
pub(super) fn claim(
    session: &mut Session,
    statement: &str,
    parameters: &[Parameter<'_>],
    limit: i64,
    rate: f64,
) -> Result<(Vec<Row>, Option<Duration>), Fault> {
    let row = session.query_typed_one(statement, parameters)?;
    if !row.try_get::<_, bool>("has_rate")? {
        session.execute_typed(RESTORE_RATE, &[])?;
    }
    let ids: Vec<Uuid> = row.try_get("ids")?;
    let attempts: Vec<i32> = row.try_get("attempts")?;
    let due_at: Vec<SystemTime> = row.try_get("due_at")?;
    let held_back = if row.try_get("is_due")? {
        let claimed = i64::try_from(ids.len()).unwrap_or(i64::MAX);
        held_back(row.try_get("tokens")?, claimed, limit, rate)
    } else {
        None
    };
    if ids.is_empty() {
        return Ok((Vec::new(), held_back));
    }
    let rows = session.query_typed(
        CLAIMED,
        &[
            (&ids, Type::UUID_ARRAY),
            (&attempts, Type::INT4_ARRAY),
            (&due_at, Type::TIMESTAMPTZ_ARRAY),
        ],
    )?;
    Ok((rows, held_back))
}

/// Until a twentieth of a second's tokens are there, as the poller waits for its own; `None` if
/// it was not for them that no more was claimed. `tokens` were there before, unless another had
/// them.
fn held_back(tokens: Option<f64>, claimed: i64, limit: i64, rate: f64) -> Option<Duration> {
    let Some(tokens) = tokens else {
        return Some(TURN);
    };
    #[expect(clippy::cast_precision_loss, reason = "at most BATCH_ROWS_MAX")]
    let left = tokens - claimed as f64;
    if claimed >= limit || left >= 1.0 {
        return None;
    }
    let missing = (rate / 20.0).max(1.0) - left;
    let wait = Duration::try_from_secs_f64(missing / rate).unwrap_or_default();
    Some(wait.max(TURN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_want_of_tokens_holds_back() {
        // Another has them.
        assert_eq!(held_back(None, 0, 10, 50.0), Some(TURN));
        // All that was asked for; all that was due.
        assert_eq!(held_back(Some(10.5), 10, 10, 50.0), None);
        assert_eq!(held_back(Some(10.5), 9, 20, 50.0), None);
        // None left, or half a one.
        let wait = |tokens, claimed, rate| held_back(Some(tokens), claimed, 60, rate);
        assert_eq!(wait(50.0, 50, 50.0), Some(Duration::from_millis(50)));
        assert_eq!(wait(0.5, 0, 1.0), Some(Duration::from_millis(500)));
        // Even so there are enough in no time.
        assert_eq!(wait(0.99, 0, 20.0), Some(TURN));
    }
}
