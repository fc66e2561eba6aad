//! How many requests are under way and how many were answered: shared by the senders and the
//! destination, which are in one process here.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Pause between two looks at how many were answered.
const LOOK: Duration = Duration::from_millis(1);
/// How long nothing may be answered.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Tally {
    counts: Mutex<Counts>,
    has_left: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    under_way: usize,
    answered: u64,
    is_over: bool,
}

impl Tally {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until fewer than `window` requests are under way and lets one more go; false when
    /// it is over.
    pub fn enter(&self, window: usize) -> bool {
        let mut counts = self
            .has_left
            .wait_while(self.lock(), |counts| {
                counts.under_way >= window && !counts.is_over
            })
            .unwrap_or_else(PoisonError::into_inner);
        counts.under_way += 1;
        !counts.is_over
    }

    /// One was refused: it is not under way any more.
    pub fn leave(&self) {
        self.lock().under_way -= 1;
        self.has_left.notify_one();
    }

    /// The destination has answered one, which need not have been let go here.
    pub fn answer(&self) {
        let mut counts = self.lock();
        counts.under_way = counts.under_way.saturating_sub(1);
        counts.answered += 1;
        drop(counts);
        self.has_left.notify_one();
    }

    /// Lets no more go.
    pub fn end(&self) {
        self.lock().is_over = true;
        self.has_left.notify_all();
    }

    pub fn answered(&self) -> u64 {
        self.lock().answered
    }

    /// Waits until `requests` more are answered and `at_least` has passed, or `last` are answered
    /// in all; how many were, and in what time.
    pub fn watch(&self, requests: u64, at_least: Duration, last: u64) -> (u64, Duration) {
        let before = self.answered();
        let started = Instant::now();
        let (mut seen, mut seen_at) = (before, started);
        loop {
            let (answered, now) = (self.answered(), Instant::now());
            let is_enough = answered - before >= requests && now - started >= at_least;
            if is_enough || answered >= last {
                return (answered - before, now - started);
            }
            if answered > seen {
                (seen, seen_at) = (answered, now);
            }
            assert!(
                now - seen_at < PATIENCE,
                "the destination has got nothing for {PATIENCE:?}, after {answered} requests"
            );
            thread::sleep(LOOK);
        }
    }
}
