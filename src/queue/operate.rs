//! What an operator may do with a queue, beside the instances that serve it: look, retry, drop,
//! bury, pause. Each change is one short transaction. Rows that are being sent are left alone.

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::{Store, StoreError};

/// The error of a row that an operator has buried.
pub const BURIED: &str = "buried by an operator";

/// A store, as an operator uses it.
pub trait Operate: Store {
    /// Keeps all instances from claiming rows, until told otherwise. Tells whether that is new.
    ///
    /// # Errors
    /// [`StoreError`].
    fn set_paused(&self, is_paused: bool) -> Result<bool, StoreError>;

    /// Whether it knows an instance by this name (see [`Store::instance`]).
    ///
    /// # Errors
    /// [`StoreError`].
    fn has_instance(&self, _name: Uuid) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// Up to `limit` rows that pass the filter, without their bodies, by id: first those that
    /// wait or are leased, then the dead letters. Begins after the row `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    fn list(
        &self,
        filter: &Filter,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Vec<Row>, StoreError>;

    /// One row, without its body.
    ///
    /// # Errors
    /// [`StoreError`].
    fn find(&self, id: Uuid) -> Result<Option<Row>, StoreError>;

    /// A row's body; `None` if the row is gone, or has none.
    ///
    /// # Errors
    /// [`StoreError`].
    fn body(&self, position: Position) -> Result<Option<Vec<u8>>, StoreError>;

    /// How many rows pass the filter, by their state.
    ///
    /// # Errors
    /// [`StoreError`].
    fn count(&self, filter: &Filter) -> Result<Counts, StoreError>;

    /// Reads past what is damaged: gives `each` row that can still be read, with its body, until that
    /// breaks off. Returns how many are known to be there and cannot be read.
    ///
    /// # Errors
    /// [`StoreError`]; always in a store whose server sees to that itself.
    fn salvage(
        &self,
        _each: &mut dyn FnMut(Row, Option<Vec<u8>>) -> ControlFlow<()>,
    ) -> Result<u64, StoreError> {
        let why = "only a SQLite file is read past what is damaged";
        Err(StoreError::Refused(why.into()))
    }

    /// Does something to rows, unless they have left their state meanwhile. Returns how many it
    /// was done to. [`super::BATCH_ROWS_MAX`] at most.
    ///
    /// # Errors
    /// [`StoreError`]; repeating it is safe.
    fn apply(&self, action: Action, rows: &[Position]) -> Result<u64, StoreError>;
}

/// What is done to rows. Never to one that is leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Due at once; a dead letter goes back into the queue, and its attempts begin anew.
    Retry,
    /// Deleted for good.
    Drop,
    /// To the dead letters.
    Bury,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Due now or later.
    Waiting,
    /// Being sent.
    Leased,
    Dead,
}

impl State {
    pub const ALL: [State; 3] = [State::Waiting, State::Leased, State::Dead];

    pub fn as_str(self) -> &'static str {
        match self {
            State::Waiting => "waiting",
            State::Leased => "leased",
            State::Dead => "dead",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How the last attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastStatus {
    Answered(u16),
    /// It failed without an answer.
    NoAnswer,
}

/// Which rows are meant: those of which all that is given here is true.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub state: Option<State>,
    /// Since receipt.
    pub older_than: Option<Duration>,
    pub newer_than: Option<Duration>,
    /// How the target begins, literally.
    pub path: Option<String>,
    pub status: Option<LastStatus>,
}

impl Filter {
    pub fn admits(&self, state: State) -> bool {
        self.state.is_none_or(|only| only == state)
    }

    /// Whether a row passes, for one who cannot leave that to the store.
    pub fn passes(&self, row: &Row, now: SystemTime) -> bool {
        let received = |is_past: &dyn Fn(SystemTime, SystemTime) -> bool, age: Option<Duration>| {
            age.is_none_or(|age| {
                let limit = now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
                row.received_at.is_some_and(|at| is_past(at, limit))
            })
        };
        let has_status = match self.status {
            None => true,
            Some(LastStatus::Answered(status)) => row.last_status == Some(i32::from(status)),
            Some(LastStatus::NoAnswer) => row.last_status.is_none() && row.last_error.is_some(),
        };
        let has_path = |path: &String| {
            row.target
                .as_ref()
                .is_some_and(|target| target.starts_with(path))
        };
        self.admits(row.state)
            && received(&|at, limit| at <= limit, self.older_than)
            && received(&|at, limit| at >= limit, self.newer_than)
            && self.path.as_ref().is_none_or(has_path)
            && has_status
    }
}

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub is_dead: bool,
    pub id: Uuid,
}

/// A row as it is kept. What a dead letter may lack, because it could not be read, is optional.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub id: Uuid,
    pub state: State,
    pub received_at: Option<SystemTime>,
    /// When it is due, its lease ends, or it died.
    pub at: SystemTime,
    pub attempt: Option<u32>,
    pub last_status: Option<i32>,
    pub last_error: Option<String>,
    pub method: Option<String>,
    pub target: Option<String>,
    /// As [`crate::request::Headers`] keeps them.
    pub headers: Option<Vec<u8>>,
    pub body_bytes: u64,
}

impl Row {
    pub fn position(&self) -> Position {
        Position {
            is_dead: self.state == State::Dead,
            id: self.id,
        }
    }
}

/// Rows by their state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub waiting: u64,
    pub leased: u64,
    pub dead: u64,
}

impl Counts {
    pub fn of(&self, state: State) -> u64 {
        match state {
            State::Waiting => self.waiting,
            State::Leased => self.leased,
            State::Dead => self.dead,
        }
    }
}
