//! A clock that does not jump: the time of day when it was made, and what has passed since.
//!
//! Somebody may set the system's clock while the program runs. Pauses and leases are kept by this
//! one, which goes on as if nothing had happened; [`Clock::look`] tells that something has.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Less is none: the two times are not read at the same moment.
const JUMP_MIN: Duration = Duration::from_secs(1);
/// How long reading both may take, for the difference to count.
const READING_MAX: Duration = Duration::from_millis(100);

/// What the system says: the time of day, and a time that only ever passes.
type Reading = dyn Fn() -> (SystemTime, Instant) + Send + Sync;

pub struct Clock {
    read: Box<Reading>,
    started: (SystemTime, Instant),
    jump: Mutex<Option<Jump>>,
}

/// The last time that the system's clock was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jump {
    /// By how many milliseconds; negative: back.
    pub by_ms: i64,
    pub at: Instant,
    /// All jumps since the start together.
    total_ms: i64,
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Clock").field(&self.started).finish()
    }
}

impl Default for Clock {
    fn default() -> Clock {
        Clock::reading(|| (SystemTime::now(), Instant::now()))
    }
}

impl Clock {
    /// For tests, which set the clock they read.
    pub fn reading(read: impl Fn() -> (SystemTime, Instant) + Send + Sync + 'static) -> Clock {
        let started = read();
        Clock {
            read: Box::new(read),
            started,
            jump: Mutex::default(),
        }
    }

    /// The time by this clock.
    pub fn now(&self) -> SystemTime {
        self.at((self.read)().1)
    }

    /// The time by the system's clock.
    pub fn time_of_day(&self) -> SystemTime {
        (self.read)().0
    }

    /// A time that only passes.
    pub fn instant(&self) -> Instant {
        (self.read)().1
    }

    fn at(&self, instant: Instant) -> SystemTime {
        let (time_of_day, started) = self.started;
        time_of_day + instant.saturating_duration_since(started)
    }

    /// Milliseconds that this clock is ahead of the system's; negative: behind it.
    pub fn ahead_ms(&self) -> i64 {
        let jump = self.jump.lock().unwrap_or_else(PoisonError::into_inner);
        jump.as_ref()
            .map_or(0, |jump| jump.total_ms.saturating_neg())
    }

    /// Tells whether the system's clock has been set since the last look. To be asked now and then.
    pub fn look(&self) -> Option<Jump> {
        let began = (self.read)().1;
        let (time_of_day, instant) = (self.read)();
        if instant.saturating_duration_since(began) > READING_MAX {
            // Interrupted in between, perhaps for long: the next look tells.
            return None;
        }
        let total_ms = ms_between(self.at(instant), time_of_day);
        let mut last = self.jump.lock().unwrap_or_else(PoisonError::into_inner);
        let by_ms = total_ms - last.as_ref().map_or(0, |jump| jump.total_ms);
        if Duration::from_millis(by_ms.unsigned_abs()) < JUMP_MIN {
            return None;
        }
        let jump = Jump {
            by_ms,
            at: instant,
            total_ms,
        };
        *last = Some(jump);
        Some(jump)
    }

    /// The last jump since the start.
    pub fn jump(&self) -> Option<Jump> {
        *self.jump.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jump {
    /// Negative: back.
    pub fn by_seconds(&self) -> i64 {
        (self.by_ms + self.by_ms.signum() * 500) / 1000
    }

    /// For people: `set back by 3600 s`.
    pub fn describe(&self) -> String {
        let seconds = self.by_seconds().unsigned_abs();
        match self.by_ms < 0 {
            true => format!("set back by {seconds} s"),
            false => format!("set forward by {seconds} s"),
        }
    }
}

/// Milliseconds from one time to another.
fn ms_between(from: SystemTime, to: SystemTime) -> i64 {
    let since_epoch = |time: SystemTime| match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i128::try_from(since.as_millis()).unwrap_or(i128::MAX),
        Err(before) => -i128::try_from(before.duration().as_millis()).unwrap_or(i128::MAX),
    };
    let ms = since_epoch(to).saturating_sub(since_epoch(from));
    i64::try_from(ms).unwrap_or(if ms < 0 { i64::MIN / 2 } else { i64::MAX / 2 })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn goes_on_while_the_systems_clock_is_set() {
        let start = Instant::now();
        let noon = UNIX_EPOCH + 500_000 * HOUR;
        let system = Arc::new(Mutex::new((noon, start)));
        let clock = Clock::reading({
            let system = Arc::clone(&system);
            move || *system.lock().unwrap()
        });
        let set = |time_of_day, passed| {
            *system.lock().unwrap() = (time_of_day, start + passed);
        };
        assert_eq!((clock.look(), clock.ahead_ms()), (None, 0));
        // Time passes, and the clock is corrected by a little.
        set(noon + HOUR + JUMP_MIN / 2, HOUR);
        assert_eq!(clock.look(), None);
        set(noon, HOUR);
        let jump = clock.look().unwrap();
        assert_eq!(jump.describe(), "set back by 3600 s");
        assert_eq!((clock.look(), clock.jump()), (None, Some(jump)));
        assert_eq!(clock.now(), noon + HOUR);
        assert_eq!(clock.ahead_ms(), 3_600_000);
        set(noon + 4 * HOUR, 2 * HOUR);
        assert_eq!(clock.look().unwrap().describe(), "set forward by 10800 s");
        assert_eq!(clock.now(), noon + 2 * HOUR);
        assert_eq!(clock.ahead_ms(), -2 * 3_600_000);
    }
}
