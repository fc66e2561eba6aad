//! Chooses the rows of a [`Store::claim_probes`](super::Store::claim_probes).

use rusqlite::{Params, Statement, Transaction, params};

use super::super::{Class, PROBE_ROWS_MAX, Probe, Spot};
use super::rows::read;
use super::statements::{
    CANDIDATES_FROM, FRESH_AT_END, FRESH_AT_FRONT, RETRIED_AT_END, RETRIED_AT_FRONT, SELECT_ONE,
    SPAN,
};
use super::transactions::Due;

/// A row that may be one.
struct Candidate {
    seq: i64,
    attempts: u32,
}

/// Rows to be leased, those tried least first.
pub(super) fn due(
    transaction: &Transaction<'_>,
    wanted: &Probe<'_>,
    now: i64,
) -> rusqlite::Result<Vec<Due>> {
    let chosen = match wanted.spot {
        Spot::Front | Spot::End => at_end(transaction, wanted, now)?,
        Spot::Anywhere => anywhere(transaction, wanted, now)?,
    };
    let mut select = transaction.prepare(SELECT_ONE)?;
    let (mut due, mut bytes) = (Vec::new(), 0);
    for seq in chosen.into_iter().take(wanted.limit) {
        let read = select.query_row([seq], |row| Ok(read(row)))?;
        bytes += read.as_ref().map_or(0, |row| row.request.bytes());
        if bytes > wanted.bytes_max && !due.is_empty() {
            break;
        }
        due.push((seq, read));
    }
    Ok(due)
}

fn at_end(
    transaction: &Transaction<'_>,
    wanted: &Probe<'_>,
    now: i64,
) -> rusqlite::Result<Vec<i64>> {
    let mut select = transaction.prepare(match (wanted.class, wanted.spot) {
        (Class::Fresh, Spot::End) => FRESH_AT_END,
        (Class::Fresh, _) => FRESH_AT_FRONT,
        (Class::Retried, Spot::End) => RETRIED_AT_END,
        (Class::Retried, _) => RETRIED_AT_FRONT,
    })?;
    // Those that are passed over count as well.
    let rows = to_i64(PROBE_ROWS_MAX + wanted.except.len());
    let mut found = candidates(&mut select, params![now, rows], wanted)?;
    found.sort_by_key(|row| row.attempts);
    Ok(found.into_iter().map(|row| row.seq).collect())
}

/// One row from each of as many random places as are wanted.
fn anywhere(
    transaction: &Transaction<'_>,
    wanted: &Probe<'_>,
    now: i64,
) -> rusqlite::Result<Vec<i64>> {
    let span = transaction.query_row(SPAN, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let (least, most): (i64, i64) = span;
    let mut select = transaction.prepare(CANDIDATES_FROM)?;
    let rows = to_i64(PROBE_ROWS_MAX / wanted.limit.max(1)).max(1);
    let mut chosen = Vec::new();
    let mut first_from = |place: i64, chosen: &[i64]| -> rusqlite::Result<Option<i64>> {
        let found = candidates(&mut select, params![now, rows, place], wanted)?;
        let left = found.iter().filter(|row| !chosen.contains(&row.seq));
        Ok(left.min_by_key(|row| row.attempts).map(|row| row.seq))
    };
    for _ in 0..wanted.limit.min(PROBE_ROWS_MAX) {
        let place = fastrand::i64(least..=most);
        chosen.extend(first_from(place, &chosen)?);
    }
    if chosen.is_empty() {
        // Behind none of the places is one: those at the end are being sent.
        chosen.extend(first_from(least, &[])?);
    }
    Ok(chosen)
}

/// What the statement finds, but for what is not wanted.
fn candidates(
    select: &mut Statement<'_>,
    parameters: impl Params,
    wanted: &Probe<'_>,
) -> rusqlite::Result<Vec<Candidate>> {
    let mut found = Vec::new();
    let mut rows = select.query(parameters)?;
    while let Some(row) = rows.next()? {
        let id = row.get_ref(1)?.as_blob().unwrap_or_default();
        // Whatever somebody has written there: reading the row tells.
        let attempts = u32::try_from(row.get::<_, i64>(2)?).unwrap_or(u32::MAX);
        let is_excepted = wanted.except.iter().any(|except| except.as_bytes() == id);
        if !is_excepted && Class::of(attempts.saturating_add(1)) == wanted.class {
            found.push(Candidate {
                seq: row.get(0)?,
                attempts,
            });
        }
    }
    Ok(found)
}

fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
