//! Where a claim begins to look.
//!
//! What was claimed leaves dead entries at the front of the index. Postgres drops them in passing,
//! but not while any session holds an older snapshot: then each claim walks through all of them.
//! So a claim that took long is remembered, and those after it begin where it ended; only now and
//! then one begins at the front again, for rows that have become due there since.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A claim that begins at the front and takes longer walks through dead entries.
const LONG: Duration = Duration::from_millis(10);
/// Of all time, such claims may take one part in so many.
const SHARE: u32 = 20;
/// No row waits longer for being found, however long a claim took (for another reason, perhaps).
const UNSEEN_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Start(Mutex<Option<Ended>>);

/// Where the last claim ended, and until when that counts.
#[derive(Debug, Clone, Copy)]
struct Ended {
    due_at: SystemTime,
    until: Instant,
}

impl Start {
    fn ended(&self) -> MutexGuard<'_, Option<Ended>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From when on a row must be due to be claimed; `None`: from the front.
    pub(super) fn get(&self, now: Instant) -> Option<SystemTime> {
        let ended = *self.ended();
        Some(ended.filter(|ended| now < ended.until)?.due_at)
    }

    /// Notes a claim that began at `start`, took so long, and ended with a row due at `due_at`.
    pub(super) fn note(&self, start: Option<SystemTime>, took: Duration, due_at: SystemTime) {
        let mut ended = self.ended();
        match (start, &mut *ended) {
            (Some(_), Some(ended)) => ended.due_at = ended.due_at.max(due_at),
            (None, _) if took > LONG => {
                let until = Instant::now() + (SHARE * took).min(UNSEEN_MAX);
                *ended = Some(Ended { due_at, until });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_claims_move_the_start_and_only_for_a_while() {
        let start = Start::default();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        start.note(None, LONG, at(1));
        assert_eq!(start.get(Instant::now()), None);
        start.note(None, Duration::from_millis(100), at(2));
        assert_eq!(start.get(Instant::now()), Some(at(2)));
        start.note(Some(at(2)), Duration::from_millis(1), at(3));
        assert_eq!(start.get(later(1)), Some(at(3)));
        assert_eq!(start.get(later(3)), None);
        start.note(None, Duration::from_secs(10), at(4));
        assert_eq!(start.get(later(4)), Some(at(4)));
        assert_eq!(start.get(later(6)), None);
    }
}
