//! What this instance has leased, and that it is there.
//!
//! Leases name their instance, and each instance tells every second that it is there. What belongs
//! to one that has not been heard of for a while is due again: see [`TAKE_OVER`](super::statements).
//! Whoever judges that must have been heard of itself all the time: after an outage of the server all
//! have been silent.
//!
//! A claim whose answer was lost leaves rows that are leased to us and that nobody here knows of. So
//! what is known is kept here, and the rest is given back before the next claim.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use uuid::Uuid;

/// How often it is looked for rows of a lost claim, and how far apart: a server that was frozen
/// may be at that claim still.
const LOOKS: u32 = 4;
const LOOK_PAUSE: Duration = Duration::from_secs(2);

/// The instance, by a name of its own for each start.
#[derive(Debug)]
pub(super) struct Leases {
    pub(super) instance: Uuid,
    /// How long an instance may say nothing.
    pub(super) silence: Duration,
    state: Mutex<State>,
    /// Held during a claim: what is claimed is not known before it ends.
    claiming: Mutex<()>,
    /// Read while rows are appended leased, written while unknown ones are given back.
    appending: RwLock<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Until when each is leased, by id and attempt.
    held: HashMap<(Uuid, u32), Instant>,
    /// Since when we have been heard of without a gap, and when last.
    heard: Option<(Instant, Instant)>,
    /// Looks still to be made for rows of lost claims, and when.
    looks: u32,
    look_at: Option<Instant>,
}

impl Leases {
    pub(super) fn new(silence: Duration) -> Leases {
        Leases {
            instance: Uuid::now_v7(),
            silence,
            state: Mutex::default(),
            claiming: Mutex::default(),
            appending: RwLock::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn claiming(&self) -> MutexGuard<'_, ()> {
        self.claiming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn appending(&self) -> RwLockReadGuard<'_, ()> {
        self.appending
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn not_appending(&self) -> RwLockWriteGuard<'_, ()> {
        self.appending
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns those that were not held before: whoever finds that it has none of them after all
    /// lets go of these, and of nobody else's.
    pub(super) fn hold(
        &self,
        leases: impl Iterator<Item = (Uuid, u32)>,
        until: Instant,
    ) -> Vec<(Uuid, u32)> {
        let mut state = self.state();
        let leases = leases.filter(|lease| state.held.insert(*lease, until).is_none());
        leases.collect()
    }

    pub(super) fn let_go(&self, leases: impl Iterator<Item = (Uuid, u32)>) {
        let mut state = self.state();
        for lease in leases {
            state.held.remove(&lease);
        }
    }

    /// Whether anything may be leased to us, known or not.
    pub(super) fn may_have_some(&self) -> bool {
        let state = self.state();
        !state.held.is_empty() || state.looks > 0
    }

    /// Whether we must tell that we are there before anything is leased to us.
    pub(super) fn must_beat(&self, now: Instant) -> bool {
        let last = self.state().heard.map(|(_, last)| last);
        last.is_none_or(|last| now.saturating_duration_since(last) > self.silence / 2)
    }

    /// Notes that we told it at `now` or later. Tells whether we may judge others.
    pub(super) fn heard(&self, now: Instant) -> bool {
        let mut state = self.state();
        let since = match state.heard {
            Some((since, last)) if now.saturating_duration_since(last) <= self.silence / 2 => since,
            _ => now,
        };
        state.heard = Some((since, now));
        // What was never settled has ended by itself.
        state.held.retain(|_, until| *until > now);
        now.saturating_duration_since(since) >= self.silence
    }

    /// Notes that something may have been leased to us that we do not know of.
    pub(super) fn lost(&self) {
        let mut state = self.state();
        state.looks = LOOKS;
        state.look_at = None;
    }

    /// Whether it is to be looked for rows that we do not know of.
    pub(super) fn must_look(&self, now: Instant) -> bool {
        let state = self.state();
        state.looks > 0 && state.look_at.is_none_or(|at| at <= now)
    }

    pub(super) fn known(&self) -> Vec<Uuid> {
        self.state().held.keys().map(|(id, _)| *id).collect()
    }

    pub(super) fn looked(&self, now: Instant) {
        let mut state = self.state();
        state.looks = state.looks.saturating_sub(1);
        state.look_at = Some(now + LOOK_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(10);

    #[test]
    fn only_who_was_heard_of_all_the_time_judges_others() {
        let leases = Leases::new(SILENCE);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(leases.must_beat(start));
        for second in 0..10 {
            assert!(!leases.heard(at(second)), "{second}");
        }
        assert!(!leases.must_beat(at(14)));
        assert!(leases.heard(at(10)));
        // After a gap it begins anew.
        assert!(leases.must_beat(at(16)));
        assert!(!leases.heard(at(16)));
        assert!(!leases.heard(at(21)));
        assert!(leases.heard(at(26)));
    }

    #[test]
    fn an_append_that_failed_lets_go_of_nothing_that_was_claimed() {
        let leases = Leases::new(SILENCE);
        let until = Instant::now() + SILENCE;
        let [claimed, new] = [Uuid::from_u128(1), Uuid::from_u128(2)].map(|id| (id, 2));
        assert_eq!(leases.hold([claimed].into_iter(), until), [claimed]);
        let appended = leases.hold([claimed, new].into_iter(), until);
        assert_eq!(appended, [new]);
        leases.let_go(appended.into_iter());
        assert_eq!(leases.known(), [claimed.0]);
    }

    #[test]
    fn rows_of_a_lost_claim_are_looked_for_a_few_times() {
        let leases = Leases::new(SILENCE);
        let now = Instant::now();
        let (known, over) = (Uuid::from_u128(1), Uuid::from_u128(2));
        leases.hold([(known, 1)].into_iter(), now + SILENCE);
        leases.hold([(over, 1)].into_iter(), now);
        assert!(!leases.must_look(now));
        leases.lost();
        leases.heard(now);
        for look in 0..LOOKS {
            let at = now + look * LOOK_PAUSE;
            assert!(leases.must_look(at), "{look}");
            assert_eq!(leases.known(), [known]);
            leases.looked(at);
            assert!(!leases.must_look(at), "{look}");
        }
        assert!(!leases.must_look(now + 10 * SILENCE));
        leases.let_go([(known, 1)].into_iter());
        assert!(leases.known().is_empty());
    }
}
