//! Body bytes held in memory, over all stages, and their limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the body bytes that are held by live [`Permit`]s.
#[derive(Debug)]
pub struct Budget {
    held_bytes: AtomicUsize,
    limit_bytes: AtomicUsize,
}

impl Budget {
    pub fn new(limit_bytes: usize) -> Arc<Budget> {
        Arc::new(Budget {
            held_bytes: AtomicUsize::new(0),
            limit_bytes: AtomicUsize::new(limit_bytes),
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
        self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        Permit {
            budget: Arc::clone(self),
            bytes,
        }
    }
}

/// The right to hold some body bytes; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Permit {
    /// Adds `bytes`, or leaves the permit as it was if the limit would be passed.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let grown =
            self.budget
                .held_bytes
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                    held.checked_add(bytes)
                        // Nothing is always possible, also when claims have passed the limit.
                        .filter(|sum| *sum <= self.budget.limit_bytes() || bytes == 0)
                });
        if grown.is_ok() {
            self.bytes += bytes;
        }
        grown.is_ok()
    }
}

impl Permit {
    /// Whether so much is held that bodies should not stay in memory longer than they must.
    pub fn is_scarce(&self) -> bool {
        self.budget.held_bytes() > self.budget.limit_bytes() / 4 * 3
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget
            .held_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
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
        drop((first, claimed));
        assert!(!budget.permit().is_scarce());
        assert_eq!(budget.held_bytes(), 0);
        assert!(!budget.permit().try_grow(usize::MAX));
    }
}
