//! How many rows wait or are leased, as far as this process knows, and how many there may be.
//!
//! The last count of the store, plus what was appended and less what was settled here since: off
//! by what happened while it was counted, and by what other instances did since, about a second ago.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

#[derive(Debug, Default)]
pub struct Depth {
    counted: AtomicI64,
    since: AtomicI64,
    /// 0: no limit.
    rows_max: AtomicU64,
}

impl Depth {
    pub fn new(rows_max: u64) -> Depth {
        Depth {
            counted: AtomicI64::new(0),
            since: AtomicI64::new(0),
            rows_max: AtomicU64::new(rows_max),
        }
    }

    /// 0: no limit.
    pub fn set_max(&self, rows_max: u64) {
        self.rows_max.store(rows_max, Ordering::Relaxed);
    }

    /// Enters one row, whatever the limit: it was acknowledged before.
    pub fn enter(&self) {
        self.add(1);
    }

    /// Enters one row, if there is room.
    pub fn try_enter(&self) -> bool {
        let rows =
            self.counted.load(Ordering::Relaxed) + self.since.fetch_add(1, Ordering::Relaxed);
        let rows_max = self.rows_max.load(Ordering::Relaxed);
        let has_room = rows_max == 0 || rows.max(0).unsigned_abs() < rows_max;
        if !has_room {
            self.add(-1);
        }
        has_room
    }

    /// Whether there is no room for one more that may be refused.
    pub fn is_full(&self) -> bool {
        let rows = self.counted.load(Ordering::Relaxed) + self.since.load(Ordering::Relaxed);
        let rows_max = self.rows_max.load(Ordering::Relaxed);
        rows_max > 0 && rows.max(0).unsigned_abs() >= rows_max
    }

    pub fn add(&self, rows: i64) {
        self.since.fetch_add(rows, Ordering::Relaxed);
    }

    pub fn leave(&self, rows: u64) {
        self.add(-i64::try_from(rows).unwrap_or(i64::MAX));
    }

    /// Takes a count. What was appended while it was made is not known until the next one: rather
    /// so many rows too many than a request refused for which there is room.
    pub fn counted(&self, rows: u64) {
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        self.counted.store(rows, Ordering::Relaxed);
        self.since.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_at_the_limit_and_takes_again_below() {
        let depth = Depth::new(2);
        assert!(!depth.is_full());
        assert!(depth.try_enter() && depth.try_enter());
        assert!(depth.is_full() && !depth.try_enter());
        // Acknowledged before, and so taken.
        depth.enter();
        depth.leave(1);
        assert!(!depth.try_enter());
        depth.leave(1);
        assert!(depth.try_enter());
        depth.counted(1);
        assert!(depth.try_enter() && !depth.try_enter());
    }

    #[test]
    fn zero_is_no_limit() {
        let depth = Depth::new(0);
        depth.counted(1_000_000);
        assert!(depth.try_enter());
    }
}
