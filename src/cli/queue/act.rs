//! `queue retry`, `drop` and `bury`.

use std::io::Write;

use serde_json::json;

use super::transfer::Progress;
use super::{Failure, Selection, not_found};
use crate::printable;
use crate::queue::BATCH_ROWS_MAX;
use crate::queue::operate::{Action, Filter, Operate, Position, Row, State};

/// What was done.
#[derive(Debug, Default)]
struct Done {
    /// Or, in a dry run, what would be.
    changed: u64,
    /// Being sent, and so left alone.
    leased: u64,
    /// Already where they should be, or gone meanwhile.
    unchanged: u64,
}

/// The filter with the state that the action is for, if none is given.
///
/// # Errors
/// What has to be said.
pub(super) fn preset(action: Action, filter: Filter, is_all: bool) -> Result<Filter, String> {
    let state = match (action, filter.state) {
        (Action::Bury, Some(State::Dead)) => {
            return Err("queue bury: dead letters are buried already".into());
        }
        (_, Some(State::Leased)) => {
            return Err("--state leased: requests that are being sent are left alone".into());
        }
        (_, Some(state)) => Some(state),
        (Action::Retry, None) => Some(State::Dead),
        (Action::Bury, None) => Some(State::Waiting),
        (Action::Drop, None) if is_all => None,
        (Action::Drop, None) => {
            return Err("queue drop: needs --state waiting or --state dead, or --all".into());
        }
    };
    Ok(Filter { state, ..filter })
}

pub(super) fn run(
    store: &dyn Operate,
    action: Action,
    selection: &Selection,
    is_dry_run: bool,
    is_json: bool,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let done = match selection {
        Selection::Ids(ids) => {
            let mut rows = Vec::new();
            for id in ids {
                rows.push(store.find(*id)?.ok_or_else(|| not_found(*id))?);
            }
            let mut done = Done::default();
            for rows in rows.chunks(BATCH_ROWS_MAX) {
                apply(store, action, rows, is_dry_run, &mut done)?;
            }
            done
        }
        Selection::Filter(filter) if is_dry_run => {
            let counts = store.count(filter)?;
            Done {
                changed: counts.waiting + counts.dead,
                leased: counts.leased,
                unchanged: 0,
            }
        }
        Selection::Filter(filter) => all(store, action, filter)?,
    };
    print(action, &done, is_dry_run, is_json, output)
}

fn all(store: &dyn Operate, action: Action, filter: &Filter) -> Result<Done, Failure> {
    let (mut done, mut after) = (Done::default(), None);
    let mut progress = Progress::new("requests");
    loop {
        let rows = store.list(filter, after, BATCH_ROWS_MAX)?;
        let Some(last) = rows.last() else {
            return Ok(done);
        };
        after = Some(last.position());
        apply(store, action, &rows, false, &mut done)?;
        progress.add(rows.len());
    }
}

fn apply(
    store: &dyn Operate,
    action: Action,
    rows: &[Row],
    is_dry_run: bool,
    done: &mut Done,
) -> Result<(), Failure> {
    let is_meant = |row: &&Row| match row.state {
        State::Leased => false,
        State::Dead => action != Action::Bury,
        State::Waiting => true,
    };
    let meant: Vec<Position> = rows.iter().filter(is_meant).map(Row::position).collect();
    let leased = rows.iter().filter(|row| row.state == State::Leased).count();
    let changed = match is_dry_run {
        true => meant.len() as u64,
        false => store.apply(action, &meant)?,
    };
    done.changed += changed;
    done.leased += leased as u64;
    done.unchanged += (rows.len() - leased) as u64 - changed;
    Ok(())
}

fn print(
    action: Action,
    done: &Done,
    is_dry_run: bool,
    is_json: bool,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let Done {
        changed,
        leased,
        unchanged,
    } = done;
    if is_json {
        let done = json!({ "changed": changed, "being_sent": leased, "unchanged": unchanged, "dry_run": is_dry_run });
        return Ok(writeln!(output, "{done}")?);
    }
    let what = match (action, is_dry_run) {
        (Action::Retry, false) => "made due",
        (Action::Drop, false) => "dropped",
        (Action::Bury, false) => "moved to the dead letters",
        (Action::Retry, true) => "would be made due",
        (Action::Drop, true) => "would be dropped",
        (Action::Bury, true) => "would be moved to the dead letters",
    };
    writeln!(output, "{} {what}", printable::count(*changed, "request"))?;
    if *leased > 0 {
        writeln!(output, "{leased} being sent, left alone")?;
    }
    if *unchanged > 0 {
        let why = match action {
            Action::Retry => "delivered or claimed meanwhile, or cannot be sent",
            Action::Drop => "delivered or claimed meanwhile",
            Action::Bury => "dead already, or delivered or claimed meanwhile",
        };
        writeln!(output, "{unchanged} left alone: {why}")?;
    }
    Ok(())
}
