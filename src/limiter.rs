//! A token bucket. Pure: the caller says what time it is.

use std::time::{Duration, Instant};

/// Gains `per_second` tokens a second and holds at most one second's worth, as the bucket of the
/// Go program did: after a quiet time, a second's worth may pass at once.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_second: f64,
    tokens: f64,
    refilled_at: Instant,
}

impl TokenBucket {
    /// A full bucket. With `per_second: 0` it never has a token.
    pub fn new(per_second: u32, now: Instant) -> TokenBucket {
        TokenBucket {
            per_second: per_second.into(),
            tokens: per_second.into(),
            refilled_at: now,
        }
    }

    /// Changes the rate from now on, and with it how many tokens there may be.
    pub fn set_rate(&mut self, per_second: u32, now: Instant) {
        self.available(now);
        self.per_second = per_second.into();
        self.tokens = self.tokens.min(self.per_second);
    }

    /// Whether there is never a token.
    pub fn is_closed(&self) -> bool {
        self.per_second <= 0.0
    }

    /// Takes one token if there is one.
    pub fn try_take(&mut self, now: Instant) -> bool {
        let taken = self.available(now) > 0;
        if taken {
            self.tokens -= 1.0;
        }
        taken
    }

    /// Whole tokens that could be taken now.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 ≤ tokens ≤ per_second, which is a u32"
    )]
    pub fn available(&mut self, now: Instant) -> u32 {
        let elapsed = now.saturating_duration_since(self.refilled_at);
        self.tokens = (self.tokens + elapsed.as_secs_f64() * self.per_second).min(self.per_second);
        self.refilled_at = self.refilled_at.max(now);
        self.tokens.max(0.0) as u32
    }

    /// Takes `count` tokens that were seen to be available.
    pub fn take(&mut self, count: u32) {
        self.tokens -= f64::from(count);
    }

    /// How long after `now` there will be `count` tokens, as far as the bucket can hold them.
    pub fn wait_for(&mut self, count: u32, now: Instant) -> Duration {
        if self.available(now) >= count {
            return Duration::ZERO;
        }
        let missing = f64::from(count).min(self.per_second) - self.tokens;
        Duration::try_from_secs_f64(missing / self.per_second).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_one_second_and_refills_evenly() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10, start);
        assert_eq!((0..20).filter(|_| bucket.try_take(start)).count(), 10);
        let later = start + Duration::from_millis(250);
        assert_eq!((0..20).filter(|_| bucket.try_take(later)).count(), 2);
        let much_later = start + Duration::from_secs(60);
        assert_eq!(bucket.available(much_later), 10);
    }

    #[test]
    fn a_lower_rate_takes_away_what_was_saved() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(100, start);
        bucket.set_rate(10, start);
        assert_eq!(bucket.available(start), 10);
        bucket.take(10);
        bucket.set_rate(100, start);
        assert_eq!(bucket.available(start), 0);
        assert_eq!(bucket.available(start + Duration::from_millis(500)), 50);
    }

    #[test]
    fn zero_never_has_a_token() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(0, start);
        assert!(!bucket.try_take(start + Duration::from_secs(3600)));
    }

    #[test]
    fn says_how_long_to_wait() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10, start);
        assert_eq!(bucket.wait_for(1, start), Duration::ZERO);
        bucket.take(10);
        assert_eq!(bucket.wait_for(1, start), Duration::from_millis(100));
        assert_eq!(bucket.wait_for(5, start), Duration::from_millis(500));
    }

    #[test]
    fn a_clock_that_steps_back_gives_nothing() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut bucket = TokenBucket::new(1, start);
        assert!(bucket.try_take(start));
        assert!(!bucket.try_take(start - Duration::from_secs(5)));
        assert!(!bucket.try_take(start));
    }
}
