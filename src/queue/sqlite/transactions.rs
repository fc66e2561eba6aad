//! What each operation does to the tables, within a transaction.

use std::collections::HashSet;

use rusqlite::{Transaction, params};
use uuid::Uuid;

use super::super::{
    BATCH_BYTES_MAX, Claim, Claimed, Decision, Fate, NewRow, Probe, Settled, Settlement,
};
use super::probes;
use super::rows::{add_ms, read, to_ms};
use super::statements::{
    BURY, BURY_UNREADABLE, DELETE, DELETE_UNREADABLE, INSERT, INSERT_DEAD, INSERT_LEASED,
    IS_PAUSED, IS_PRESENT, LEASE, POSTPONE, PURGE, RELEASE, SELECT_OLD,
};
use crate::settle::{Failure, Verdict};

pub(super) fn append(
    transaction: &Transaction<'_>,
    now: i64,
    rows: &[NewRow],
) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare(INSERT)?;
    let mut insert_leased = transaction.prepare(INSERT_LEASED)?;
    let mut insert_dead = transaction.prepare(INSERT_DEAD)?;
    for NewRow {
        request,
        attempt,
        fate,
    } in rows
    {
        let (statement, at, failure) = match fate {
            Fate::Due { after, failure } => (&mut insert, add_ms(now, *after), failure.as_ref()),
            Fate::Leased(lease) => (&mut insert_leased, add_ms(now, *lease), None),
            Fate::Dead(failure) => (&mut insert_dead, now, Some(failure)),
        };
        statement.execute(params![
            request.id.as_bytes(),
            to_ms(request.received_at),
            at,
            attempt,
            failure.and_then(|failure| failure.status),
            failure.map(|failure| &failure.error),
            request.method,
            request.target,
            request.headers.as_bytes(),
            request.body,
        ])?;
    }
    Ok(())
}

/// Which of them are there, as dead letters, too.
pub(super) fn present(
    transaction: &Transaction<'_>,
    ids: &[Uuid],
) -> rusqlite::Result<HashSet<Uuid>> {
    let mut is_present = transaction.prepare(IS_PRESENT)?;
    let mut present = HashSet::new();
    for id in ids {
        if is_present.query_row([id.as_bytes()], |row| row.get(0))? {
            present.insert(*id);
        }
    }
    Ok(present)
}

pub(super) fn claim(
    transaction: &Transaction<'_>,
    select: &str,
    (limit, bytes_max): (usize, usize),
    (now, until): (i64, i64),
) -> rusqlite::Result<Claim> {
    if transaction.query_row(IS_PAUSED, [], |row| row.get(0))? {
        return Ok(Claim::default());
    }
    let mut select = transaction.prepare(select)?;
    // Collected before anything is changed that the SELECT walks along.
    let (mut due, mut bytes) = (Vec::with_capacity(limit), 0);
    let mut rows = select.query(params![now, i64::try_from(limit).unwrap_or(i64::MAX)])?;
    while let Some(row) = rows.next()? {
        let read = read(row);
        bytes += read.as_ref().map_or(0, |row| row.request.bytes());
        if bytes > bytes_max && !due.is_empty() {
            break;
        }
        due.push((row.get::<_, i64>(0)?, read));
    }
    drop(rows);
    lease_all(transaction, due, (now, until))
}

pub(super) fn claim_probes(
    transaction: &Transaction<'_>,
    wanted: &Probe<'_>,
    (now, until): (i64, i64),
) -> rusqlite::Result<Claim> {
    if transaction.query_row(IS_PAUSED, [], |row| row.get(0))? {
        return Ok(Claim::default());
    }
    let due = probes::due(transaction, wanted, now)?;
    lease_all(transaction, due, (now, until))
}

/// A row by its place, and as it was read.
pub(super) type Due = (i64, Result<Claimed, String>);

/// Leases rows until then; buries those that could not be read.
fn lease_all(
    transaction: &Transaction<'_>,
    due: Vec<Due>,
    (now, until): (i64, i64),
) -> rusqlite::Result<Claim> {
    let mut claim = Claim::default();
    let mut lease_one = transaction.prepare(LEASE)?;
    for (seq, read) in due {
        match read {
            Ok(claimed) => {
                lease_one.execute(params![seq, until])?;
                claim.rows.push(claimed);
            }
            Err(why) => {
                let why = format!("row cannot be read: {why}");
                transaction.execute(BURY_UNREADABLE, params![seq, now, why])?;
                transaction.execute(DELETE_UNREADABLE, [seq])?;
                claim.unreadable += 1;
            }
        }
    }
    Ok(claim)
}

pub(super) fn settle(
    transaction: &Transaction<'_>,
    now: i64,
    settlements: &[Settlement],
) -> rusqlite::Result<Settled> {
    let mut settled = Settled::default();
    let mut delete = transaction.prepare(DELETE)?;
    let mut postpone = transaction.prepare(POSTPONE)?;
    let mut release = transaction.prepare(RELEASE)?;
    for Settlement {
        id,
        attempt,
        decision,
    } in settlements
    {
        let id = id.as_bytes();
        let (changed, count) = match decision {
            Decision::Attempted(Verdict::Delivered) => (
                delete.execute(params![id, attempt])?,
                &mut settled.delivered,
            ),
            Decision::Attempted(Verdict::Later { after, failure }) => {
                let Failure { status, error } = failure;
                let at = add_ms(now, *after);
                (
                    postpone.execute(params![id, attempt, at, status, error])?,
                    &mut settled.later,
                )
            }
            Decision::Attempted(Verdict::Bury(Failure { status, error })) => {
                transaction.execute(BURY, params![id, attempt, now, status, error])?;
                (delete.execute(params![id, attempt])?, &mut settled.buried)
            }
            Decision::Release => (
                release.execute(params![id, attempt, now])?,
                &mut settled.released,
            ),
        };
        *(if changed == 1 {
            count
        } else {
            &mut settled.stale
        }) += 1;
    }
    Ok(settled)
}

pub(super) fn purge(
    transaction: &Transaction<'_>,
    died_before: i64,
    limit: usize,
) -> rusqlite::Result<u64> {
    let mut select = transaction.prepare(SELECT_OLD)?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    // Collected before anything is deleted that the SELECT walks along.
    let (mut old, mut bytes) = (Vec::new(), 0_u64);
    let mut rows = select.query(params![died_before, limit])?;
    while let Some(row) = rows.next()? {
        old.push(row.get::<_, i64>(0)?);
        // A length: never negative.
        bytes += row.get::<_, i64>(1)?.unsigned_abs();
        if bytes >= BATCH_BYTES_MAX as u64 {
            break;
        }
    }
    drop(rows);
    let mut purge = transaction.prepare(PURGE)?;
    for seq in &old {
        purge.execute([seq])?;
    }
    Ok(old.len() as u64)
}
