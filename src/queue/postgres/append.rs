//! New rows, in one statement or one transaction.

use std::time::{Duration, SystemTime};

use ::postgres::types::Type;
use uuid::Uuid;

use super::super::{Fate, NewRow};
use super::errors::Fault;
use super::session::Session;
use super::statements::{APPEND, APPEND_DEAD};
use super::{Parameter, to_i32, to_seconds, to_status, to_storable, to_text};
use crate::settle::Failure;

/// Commits the rows; those that are to be leased, to `instance`.
pub(super) fn append(session: &mut Session, rows: &[NewRow], instance: Uuid) -> Result<(), Fault> {
    let (mut due, mut dead) = (NewRows::default(), NewRows::default());
    for row in rows {
        session.carries(row.request.bytes());
        match &row.fate {
            Fate::Due { after, failure } => due.add(row, *after, failure.as_ref()),
            Fate::Leased(lease) => due.add(row, *lease, None),
            Fate::Dead(failure) => dead.add(row, Duration::ZERO, Some(failure)),
        }
    }
    match (due.ids.is_empty(), dead.ids.is_empty()) {
        (_, true) => session.execute_typed(APPEND, &due.due_parameters(&Some(instance)))?,
        (true, false) => session.execute_typed(APPEND_DEAD, &dead.parameters())?,
        (false, false) => {
            let mut transaction = session.transaction()?;
            transaction.execute_typed(APPEND, &due.due_parameters(&Some(instance)))?;
            transaction.execute_typed(APPEND_DEAD, &dead.parameters())?;
            transaction.commit()?;
            0
        }
    };
    Ok(())
}

/// New rows, one array for each column.
#[derive(Default)]
pub(super) struct NewRows<'a> {
    pub(super) ids: Vec<Uuid>,
    pub(super) received_at: Vec<SystemTime>,
    pub(super) after: Vec<f64>,
    pub(super) attempts: Vec<i32>,
    pub(super) statuses: Vec<Option<i32>>,
    pub(super) errors: Vec<Option<String>>,
    pub(super) methods: Vec<&'a str>,
    pub(super) targets: Vec<&'a str>,
    pub(super) headers: Vec<&'a [u8]>,
    pub(super) bodies: Vec<&'a [u8]>,
    pub(super) leased: Vec<bool>,
}

impl<'a> NewRows<'a> {
    fn add(&mut self, row: &'a NewRow, after: Duration, failure: Option<&Failure>) {
        let request = &row.request;
        self.ids.push(request.id);
        self.received_at.push(to_storable(request.received_at));
        self.after.push(to_seconds(after));
        self.attempts.push(to_i32(row.attempt));
        self.statuses.push(failure.and_then(to_status));
        self.errors.push(failure.map(to_text));
        self.methods.push(&request.method);
        self.targets.push(&request.target);
        self.headers.push(request.headers.as_bytes());
        self.bodies.push(&request.body);
        self.leased.push(matches!(row.fate, Fate::Leased(_)));
    }

    /// For `APPEND`.
    pub(super) fn due_parameters<'b>(&'b self, instance: &'b Option<Uuid>) -> Vec<Parameter<'b>> {
        let mut parameters = self.parameters().to_vec();
        parameters.push((instance, Type::UUID));
        parameters
    }

    /// For `APPEND_DEAD`.
    pub(super) fn parameters(&self) -> [Parameter<'_>; 11] {
        [
            (&self.ids, Type::UUID_ARRAY),
            (&self.received_at, Type::TIMESTAMPTZ_ARRAY),
            (&self.after, Type::FLOAT8_ARRAY),
            (&self.attempts, Type::INT4_ARRAY),
            (&self.statuses, Type::INT4_ARRAY),
            (&self.errors, Type::TEXT_ARRAY),
            (&self.methods, Type::TEXT_ARRAY),
            (&self.targets, Type::TEXT_ARRAY),
            (&self.headers, Type::BYTEA_ARRAY),
            (&self.bodies, Type::BYTEA_ARRAY),
            (&self.leased, Type::BOOL_ARRAY),
        ]
    }
}
