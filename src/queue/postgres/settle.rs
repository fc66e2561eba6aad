//! What was decided about leased rows, in one statement.

use std::collections::HashSet;

use ::postgres::types::Type;
use uuid::Uuid;

use super::super::{Decision, Settled, Settlement};
use super::errors::Fault;
use super::session::Session;
use super::statements::SETTLE;
use super::{count, to_i32, to_seconds, to_status, to_text};
use crate::settle::Verdict;

/// Carries out settlements of what `instance` has leased.
pub(super) fn settle(
    session: &mut Session,
    settlements: &[Settlement],
    instance: Uuid,
) -> Result<Settled, Fault> {
    let mut outcomes = Outcomes::default();
    for settlement in settlements {
        outcomes.add(
            settlement.id,
            to_i32(settlement.attempt),
            &settlement.decision,
        );
    }
    let mut settled = outcomes.settle(session, instance)?;
    let changed = settled.delivered + settled.later + settled.buried + settled.released;
    settled.stale = (settlements.len() as u64).saturating_sub(changed);
    Ok(settled)
}

/// Settlements, sorted by what they do to the row, one array for each column.
#[derive(Default)]
pub(super) struct Outcomes {
    named: HashSet<(Uuid, i32)>,
    delivered: (Vec<Uuid>, Vec<i32>),
    later: (Vec<Uuid>, Vec<i32>),
    later_after: Vec<f64>,
    later_failures: (Vec<Option<i32>>, Vec<String>),
    buried: (Vec<Uuid>, Vec<i32>),
    buried_failures: (Vec<Option<i32>>, Vec<String>),
    released: (Vec<Uuid>, Vec<i32>),
}

impl Outcomes {
    /// Takes a settlement, unless one before it names the same lease.
    pub(super) fn add(&mut self, id: Uuid, attempt: i32, decision: &Decision) {
        if !self.named.insert((id, attempt)) {
            return;
        }
        let (ids, attempts) = match decision {
            Decision::Attempted(Verdict::Delivered) => &mut self.delivered,
            Decision::Attempted(Verdict::Later { after, failure }) => {
                self.later_after.push(to_seconds(*after));
                self.later_failures.0.push(to_status(failure));
                self.later_failures.1.push(to_text(failure));
                &mut self.later
            }
            Decision::Attempted(Verdict::Bury(failure)) => {
                self.buried_failures.0.push(to_status(failure));
                self.buried_failures.1.push(to_text(failure));
                &mut self.buried
            }
            Decision::Release => &mut self.released,
        };
        ids.push(id);
        attempts.push(attempt);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Counts the rows changed; `stale` is not known here.
    pub(super) fn settle(&self, session: &mut Session, instance: Uuid) -> Result<Settled, Fault> {
        let row = session.query_typed_one(
            SETTLE,
            &[
                (&self.delivered.0, Type::UUID_ARRAY),
                (&self.delivered.1, Type::INT4_ARRAY),
                (&self.later.0, Type::UUID_ARRAY),
                (&self.later.1, Type::INT4_ARRAY),
                (&self.later_after, Type::FLOAT8_ARRAY),
                (&self.later_failures.0, Type::INT4_ARRAY),
                (&self.later_failures.1, Type::TEXT_ARRAY),
                (&self.buried.0, Type::UUID_ARRAY),
                (&self.buried.1, Type::INT4_ARRAY),
                (&self.buried_failures.0, Type::INT4_ARRAY),
                (&self.buried_failures.1, Type::TEXT_ARRAY),
                (&self.released.0, Type::UUID_ARRAY),
                (&self.released.1, Type::INT4_ARRAY),
                (&instance, Type::UUID),
            ],
        )?;
        Ok(Settled {
            delivered: count(&row, 0)?,
            later: count(&row, 1)?,
            buried: count(&row, 2)?,
            released: count(&row, 3)?,
            ..Settled::default()
        })
    }
}
