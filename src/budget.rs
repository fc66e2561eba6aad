//! Bytes of requests held in memory, over all stages, and their limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::queue::BATCH_BYTES_MAX;

/// So many bytes less than were held is much: see [`Budget::freed`].
const MUCH_BYTES: usize = 8 * 1024 * 1024;
/// What part of the limit is left for copies by what comes in, at least and at most.
const COPIES_SHARE_MIN: usize = 8;
const COPIES_SHARE_MAX: usize = 5;
/// A batch on its way into or out of a store is there up to twice beside what is held: such batches
/// stay within a quarter of the limit.
const BATCHES_PER_LIMIT: usize = 16;
/// What a batch may have in any case.
const BATCH_BYTES_MIN: usize = 256 * 1024;

/// Counts the bytes that are held by live [`Permit`]s.
#[derive(Debug)]
pub struct Budget {
    held_bytes: AtomicUsize,
    limit_bytes: AtomicUsize,
    /// Copies, which nobody need be told of.
    copied_bytes: AtomicUsize,
    /// The most that was held since much was freed.
    peak_bytes: AtomicUsize,
    freed: (Sender<()>, Receiver<()>),
}

impl Budget {
    pub fn new(limit_bytes: usize) -> Arc<Budget> {
        Arc::new(Budget {
            held_bytes: AtomicUsize::new(0),
            limit_bytes: AtomicUsize::new(limit_bytes),
            copied_bytes: AtomicUsize::new(0),
            peak_bytes: AtomicUsize::new(0),
            freed: bounded(1),
        })
    }

    pub fn limit_bytes(&self) -> usize {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// What is held already stays, whatever the limit.
    pub fn set_limit(&self, limit_bytes: usize) {
        self.limit_bytes.store(limit_bytes, Ordering::Relaxed);
    }

    pub fn held_bytes(&self) -> usize {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// Bytes after which a batch takes no more rows: less than [`BATCH_BYTES_MAX`] where memory
    /// is small.
    pub fn batch_bytes_max(&self) -> usize {
        let share = self.limit_bytes() / BATCHES_PER_LIMIT;
        share.clamp(BATCH_BYTES_MIN, BATCH_BYTES_MAX)
    }

    /// Tells each time that much of what was held is held no longer.
    pub fn freed(&self) -> &Receiver<()> {
        &self.freed.1
    }

    /// An empty permit, to be grown.
    pub fn permit(self: &Arc<Self>) -> Permit {
        Permit {
            budget: Arc::clone(self),
            bytes: 0,
        }
    }

    /// A permit for bytes that are in memory already, whatever the limit: what was claimed
    /// from the store must be counted, but cannot be refused.
    pub fn holding(self: &Arc<Self>, bytes: usize) -> Permit {
        let before = self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.note_peak(before.saturating_add(bytes));
        Permit {
            budget: Arc::clone(self),
            bytes,
        }
    }

    /// Counts copies that a store is about to make, until this is dropped: what comes in gets so
    /// much less, up to a fifth of the limit, so that it is scarce before it is refused.
    pub fn copying(self: &Arc<Self>, bytes: usize) -> Copies {
        self.copied_bytes.fetch_add(bytes, Ordering::Relaxed);
        Copies {
            budget: Arc::clone(self),
            bytes,
        }
    }

    /// What all that comes in may have together.
    fn share_bytes(&self) -> usize {
        let limit = self.limit_bytes();
        let copied = self.copied_bytes.load(Ordering::Relaxed);
        limit - copied.clamp(limit / COPIES_SHARE_MIN, limit / COPIES_SHARE_MAX)
    }

    fn note_peak(&self, held: usize) {
        // Looked at first: nearly always there is nothing to write.
        if held > self.peak_bytes.load(Ordering::Relaxed) {
            self.peak_bytes.fetch_max(held, Ordering::Relaxed);
        }
    }

    fn give_up(&self, bytes: usize) {
        let held = self.held_bytes.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        if held.saturating_add(MUCH_BYTES) <= self.peak_bytes.load(Ordering::Relaxed) {
            self.peak_bytes.store(held, Ordering::Relaxed);
            // Full: it has been told already.
            let _ = self.freed.0.try_send(());
        }
    }
}

/// The right to hold some bytes; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Permit {
    /// Adds `bytes`, or leaves the permit as it was if what comes in would have more than its
    /// share of the limit: all but what copies need.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let budget = &self.budget;
        let grown = budget
            .held_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                let share = if held == self.bytes {
                    // Alone it may be as large as the limit.
                    budget.limit_bytes()
                } else {
                    budget.share_bytes()
                };
                held.checked_add(bytes)
                    // Nothing is always possible, also when claims have passed the limit.
                    .filter(|sum| *sum <= share || bytes == 0)
            });
        if let Ok(before) = grown {
            budget.note_peak(before + bytes);
            self.bytes += bytes;
        }
        grown.is_ok()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives back what is beyond `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        let beyond = self.bytes.saturating_sub(bytes);
        self.bytes -= beyond;
        self.budget.give_up(beyond);
    }

    /// Whether so much is held that bodies should not stay in memory longer than they must.
    pub fn is_scarce(&self) -> bool {
        self.budget.held_bytes() > self.budget.limit_bytes() / 4 * 3
    }
}

/// See [`Budget::copying`].
#[derive(Debug)]
pub struct Copies {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Copies {
    fn drop(&mut self) {
        let copied = &self.budget.copied_bytes;
        copied.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_what_comes_in_and_counts_what_is_claimed() {
        let budget = Budget::new(10);
        let mut first = budget.permit();
        assert!(first.try_grow(6));
        assert!(first.try_grow(4));
        assert!(!first.try_grow(1));
        let claimed = budget.holding(5);
        assert_eq!(budget.held_bytes(), 15);
        assert!(!budget.permit().try_grow(1));
        assert!(first.is_scarce());
        first.shrink_to(9);
        first.shrink_to(11);
        assert_eq!(budget.held_bytes(), 14);
        drop(first);
        let mut second = budget.permit();
        assert!(!second.try_grow(5), "an eighth is for copies");
        assert!(second.try_grow(4));
        drop((second, claimed));
        assert!(!budget.permit().is_scarce());
        assert_eq!(budget.held_bytes(), 0);
        assert!(!budget.permit().try_grow(usize::MAX));
    }

    #[test]
    fn copies_take_of_what_may_come_in() {
        let budget = Budget::new(80);
        let mut first = budget.permit();
        assert!(first.try_grow(1));
        let may_grow = |bytes| budget.permit().try_grow(bytes);
        assert!(may_grow(69) && !may_grow(70));
        let copies = budget.copying(12);
        assert!(may_grow(67) && !may_grow(68));
        let more = budget.copying(1000);
        assert!(may_grow(63) && !may_grow(64), "a fifth at most");
        assert!(first.try_grow(79), "alone");
        assert_eq!(budget.held_bytes(), 80);
        drop((first, copies, more));
        assert_eq!(budget.share_bytes(), 70);
    }

    #[test]
    fn tells_once_for_each_time_that_much_was_freed() {
        let budget = Budget::new(10 * MUCH_BYTES);
        let told = || budget.freed().try_recv().is_ok();
        let mut permit = budget.permit();
        assert!(permit.try_grow(3 * MUCH_BYTES));
        permit.shrink_to(2 * MUCH_BYTES + 1);
        assert!(!told());
        permit.shrink_to(2 * MUCH_BYTES);
        assert!(told());
        permit.shrink_to(MUCH_BYTES + 1);
        assert!(!told());
        let claimed = budget.holding(MUCH_BYTES);
        drop(permit);
        assert!(told());
        drop(claimed);
        assert!(told());
        assert!(!told());
    }

    #[test]
    fn batches_are_smaller_where_memory_is() {
        let of = |limit| Budget::new(limit).batch_bytes_max();
        assert_eq!(of(0), BATCH_BYTES_MIN);
        assert_eq!(of(16 << 20), 1 << 20);
        assert_eq!(of(64 << 20), BATCH_BYTES_MAX);
        assert_eq!(of(1 << 30), BATCH_BYTES_MAX);
    }
}
