//! What attempts say about the destination, and what they have said since it last gave a sign of
//! life. Pure.
//!
//! One request may be at fault itself when it is not answered: it makes the application hang, or
//! crash. So what counts there is how many different ones were not, one after another.

use std::collections::HashSet;
use std::time::Duration;

use uuid::Uuid;

use crate::settle::Outcome;

/// So many times as many different requests have to go unanswered as connections have to fail:
/// with a tenth of them good, that happens once in a thousand million times.
const DIFFERENT_FACTOR: u32 = 20;
/// And no more than these, which are remembered by their ids.
const DIFFERENT_MAX: usize = 10_000;

/// What one attempt says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sign {
    /// Answered below 500: whatever it thinks of the request, it works.
    Works,
    /// Answered with an error of its own: it is there.
    Fails,
    /// No answer, or one that says that there is nobody to answer, or that wishes for a pause.
    Silent(Fault),
    /// It was not asked anything.
    Nothing,
}

/// What was wrong with an attempt that got no sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) error: String,
    /// No connection, which has nothing to do with any request.
    pub(super) is_unreachable: bool,
    /// How long it wishes to be left alone.
    pub(super) asked: Option<Duration>,
}

impl Sign {
    pub(super) fn of(outcome: &Outcome) -> Sign {
        match outcome {
            Outcome::Answered {
                status: status @ (429 | 502 | 503 | 504),
                retry_after,
            } => Sign::Silent(Fault {
                error: format!("destination answered {status}"),
                is_unreachable: false,
                asked: *retry_after,
            }),
            Outcome::Answered {
                status: 500..=599, ..
            } => Sign::Fails,
            Outcome::Answered { .. } => Sign::Works,
            Outcome::Unanswered(error) | Outcome::Unreachable(error) => Sign::Silent(Fault {
                error: error.clone(),
                is_unreachable: matches!(outcome, Outcome::Unreachable(_)),
                asked: None,
            }),
            Outcome::Unsendable(_) => Sign::Nothing,
        }
    }
}

/// How many failures it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Connections that failed in a row.
    pub(super) unreachable: u32,
    /// Different requests in a row.
    pub(super) different: usize,
}

impl Limits {
    pub(super) fn new(failures_max: u32) -> Limits {
        let different = failures_max.saturating_mul(DIFFERENT_FACTOR);
        Limits {
            unreachable: failures_max,
            different: usize::try_from(different).map_or(DIFFERENT_MAX, |it| it.min(DIFFERENT_MAX)),
        }
    }
}

/// What was seen since the last sign of life.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    unreachable: u32,
    /// Requests that got no sign of life since the last one.
    silent: HashSet<Uuid>,
    /// Requests that got nothing below 500 since the last that did: the silent ones, and others.
    failing: HashSet<Uuid>,
}

impl Evidence {
    pub(super) fn note(&mut self, id: Uuid, sign: &Sign, limits: Limits) {
        match sign {
            Sign::Nothing => return,
            Sign::Works => return self.clear(),
            Sign::Fails => {
                self.unreachable = 0;
                self.silent.clear();
            }
            Sign::Silent(fault) => {
                let count = u32::from(fault.is_unreachable);
                self.unreachable = self.unreachable.saturating_add(count);
                if self.silent.len() < limits.different {
                    self.silent.insert(id);
                }
            }
        }
        if self.failing.len() < limits.different {
            self.failing.insert(id);
        }
    }

    fn clear(&mut self) {
        self.unreachable = 0;
        self.silent.clear();
        self.failing.clear();
    }

    /// Whether the destination is to be taken for down.
    pub(super) fn is_down(&self, limits: Limits) -> bool {
        self.unreachable >= limits.unreachable || self.silent.len() >= limits.different
    }

    /// Whether nearly all requests fail there, though it may answer.
    pub(super) fn is_failing(&self, limits: Limits) -> bool {
        self.failing.len() >= limits.different
    }
}
