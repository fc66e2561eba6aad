//! What the two ends know of each webhook, by its id: the sender of its answer, the destination of its
//! arrival. The proxy between them is not asked.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Arrivals that are shown at the start, and again after the outage.
const SHOWN: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    sent: usize,
    answered: HashSet<String>,
    slowest: Duration,
    /// How often each arrived.
    arrived: HashMap<String, usize>,
    shown: usize,
}

/// See [`Ledger::counts`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) sent: usize,
    pub(super) answered: usize,
    pub(super) slowest: Duration,
    /// Each once, however often it arrived.
    pub(super) delivered: usize,
    pub(super) twice: usize,
    /// Answered and not delivered yet; at the end: lost.
    pub(super) waiting: usize,
}

impl Counts {
    pub(super) fn is_complete(&self) -> bool {
        self.sent == self.answered && self.waiting == 0
    }
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn send(&self) {
        self.entries().sent += 1;
    }

    pub(super) fn answered(&self, id: String, took: Duration) {
        let mut entries = self.entries();
        entries.answered.insert(id);
        entries.slowest = entries.slowest.max(took);
    }

    /// Returns whether this arrival is to be shown.
    pub(super) fn arrived(&self, id: String) -> bool {
        let mut entries = self.entries();
        *entries.arrived.entry(id).or_default() += 1;
        entries.shown += 1;
        entries.shown <= SHOWN
    }

    /// Has the next few shown.
    pub(super) fn show_arrivals(&self) {
        self.entries().shown = 0;
    }

    pub(super) fn counts(&self) -> Counts {
        let entries = self.entries();
        let has_arrived = |id: &&String| entries.arrived.contains_key(*id);
        Counts {
            sent: entries.sent,
            answered: entries.answered.len(),
            slowest: entries.slowest,
            delivered: entries.arrived.len(),
            twice: entries.arrived.values().filter(|times| **times > 1).count(),
            waiting: entries
                .answered
                .iter()
                .filter(|id| !has_arrived(id))
                .count(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_id_at_both_ends() {
        let ledger = Ledger::default();
        for id in ["a", "b", "c"] {
            ledger.send();
            ledger.answered(id.into(), Duration::from_millis(2));
        }
        ledger.send();
        for id in ["a", "a", "b"] {
            assert!(ledger.arrived(id.into()));
        }
        let counts = ledger.counts();
        assert_eq!((counts.sent, counts.answered), (4, 3));
        assert_eq!((counts.delivered, counts.twice), (2, 1));
        assert_eq!(counts.waiting, 1);
        assert!(!counts.is_complete());
        ledger.arrived("c".into());
        assert!(!ledger.arrived("c".into()));
        ledger.show_arrivals();
        assert!(ledger.arrived("c".into()));
        assert_eq!(ledger.counts().waiting, 0);
    }
}
