//! A row of the tables, as this program has it, and times as SQLite keeps them: in milliseconds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::Row;
use uuid::Uuid;

use super::super::Claimed;
use crate::request::{Headers, Request};

/// Reads a row of `SELECT_DUE`, for the attempt to come.
///
/// # Errors
/// Why the row is none that this program could have written.
pub(super) fn read(row: &Row<'_>) -> Result<Claimed, String> {
    let describe = |error: rusqlite::Error| error.to_string();
    let id = row.get::<_, Vec<u8>>("id").map_err(describe)?;
    let attempt = row.get::<_, u32>("attempt").map_err(describe)?;
    let headers = row.get::<_, Vec<u8>>("headers").map_err(describe)?;
    let request = Request {
        id: Uuid::from_slice(&id).map_err(|error| format!("id: {error}"))?,
        received_at: from_ms(row.get("received_at").map_err(describe)?)
            .ok_or("received_at is out of range")?,
        method: row.get("method").map_err(describe)?,
        target: row.get("target").map_err(describe)?,
        headers: Headers::from_bytes(headers).map_err(|error| error.to_string())?,
        body: row.get("body").map_err(describe)?,
    };
    request.check().map_err(|error| error.to_string())?;
    Ok(Claimed {
        request,
        attempt: attempt.checked_add(1).ok_or("attempt is out of range")?,
    })
}

pub(super) fn to_ms(time: SystemTime) -> i64 {
    let ms = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => ms(since),
        Err(before) => -ms(before.duration()),
    }
}

pub(super) fn from_ms(ms: i64) -> Option<SystemTime> {
    let distance = Duration::from_millis(ms.unsigned_abs());
    if ms >= 0 {
        UNIX_EPOCH.checked_add(distance)
    } else {
        UNIX_EPOCH.checked_sub(distance)
    }
}

pub(super) fn add_ms(now: i64, duration: Duration) -> i64 {
    now.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

pub(super) fn sub_ms(now: i64, duration: Duration) -> i64 {
    now.saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_and_never_overflow() {
        for ms in [0, 1, -1, 1_700_000_000_123] {
            assert_eq!(from_ms(ms).map(to_ms), Some(ms));
        }
        assert_eq!(add_ms(i64::MAX - 1, Duration::MAX), i64::MAX);
        assert_eq!(sub_ms(-2, Duration::MAX), i64::MIN);
        let _ = from_ms(i64::MIN);
    }
}
