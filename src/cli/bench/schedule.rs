//! The open loop's timetable: request n is due at n / rate, whatever became of those before it.
//! In whole numbers, so that no rounding adds or drops a request.

use std::time::Duration;

/// Thousandths of a request a second in the highest rate.
const MILLIS_MAX: u64 = 1_000_000_000;
/// Nanoseconds in a second, times 1,000 for a rate in thousandths.
const SCALE: u128 = 1_000_000_000_000;

/// Requests a second, in thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// # Errors
    /// What it must be.
    pub(super) fn parse(text: &str) -> Result<Rate, String> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let is_valid = is_number(whole) && is_number(decimals) && decimals.len() <= 3;
        format!("{whole}{decimals:0<3}")
            .parse()
            .ok()
            .filter(|millis| is_valid && (1..=MILLIS_MAX).contains(millis))
            .map(Rate)
            .ok_or_else(|| {
                "a number of requests a second from 0.001 to 1000000, such as 50 or 0.5".to_owned()
            })
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// Which request is due when, counted from the start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    rate: u64,
    duration: Duration,
}

impl Schedule {
    pub(super) fn new(rate: Rate, duration: Duration) -> Schedule {
        Schedule {
            rate: rate.0,
            duration,
        }
    }

    /// When request `n` is due, from 0; `None` if it would be at the end or later.
    pub(super) fn due(&self, n: u64) -> Option<Duration> {
        let nanoseconds = u128::from(n) * SCALE / u128::from(self.rate);
        let due = Duration::from_nanos(u64::try_from(nanoseconds).ok()?);
        (n < self.due_before(self.duration)).then_some(due)
    }

    /// How many requests are due before `elapsed`, and before the end.
    pub(super) fn due_before(&self, elapsed: Duration) -> u64 {
        let nanoseconds = elapsed.min(self.duration).as_nanos();
        let due = (nanoseconds * u128::from(self.rate)).div_ceil(SCALE);
        u64::try_from(due).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(rate: &str, milliseconds: u64) -> Schedule {
        let rate = Rate::parse(rate).unwrap();
        Schedule::new(rate, Duration::from_millis(milliseconds))
    }

    #[test]
    fn rates_are_exact_and_bounded() {
        for (text, shown) in [
            ("1", "1"),
            ("50", "50"),
            ("0.5", "0.5"),
            (".001", "0.001"),
            ("100.250", "100.25"),
            ("1000000", "1000000"),
        ] {
            let rate = Rate::parse(text).unwrap();
            assert_eq!(rate.to_string(), shown);
        }
        for text in [
            "",
            ".",
            "0",
            "0.0001",
            "-1",
            "+1",
            "1e3",
            "1e18",
            "1000000.001",
            "99999999999999999999999",
            "NaN",
            "inf",
            "1.2.3",
            "1 ",
            "\u{663}",
        ] {
            assert!(Rate::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn as_many_are_due_as_rate_times_duration() {
        for (rate, milliseconds, total) in [
            ("100", 1000, 100),
            ("3", 1000, 3),
            ("1.1", 10_000, 11),
            ("49", 1000, 49),
            ("0.1", 1, 1),
            ("0.5", 3000, 2),
            ("1000000", 315_360_000_000, 315_360_000_000_000),
        ] {
            let schedule = schedule(rate, milliseconds);
            assert_eq!(schedule.due(0), Some(Duration::ZERO), "{rate}");
            let last = schedule.due(total - 1).unwrap();
            assert!(last < Duration::from_millis(milliseconds), "{rate}");
            assert_eq!(schedule.due(total), None, "{rate}");
            assert_eq!(schedule.due(u64::MAX), None, "{rate}");
            assert_eq!(schedule.due_before(Duration::MAX), total, "{rate}");
        }
    }

    #[test]
    fn due_times_are_those_of_the_rate() {
        let schedule = schedule("4", 10_000);
        assert_eq!(schedule.due(7), Some(Duration::from_millis(1750)));
        assert_eq!(schedule.due_before(Duration::ZERO), 0);
        assert_eq!(schedule.due_before(Duration::from_nanos(1)), 1);
        assert_eq!(schedule.due_before(Duration::from_millis(250)), 1);
        assert_eq!(schedule.due_before(Duration::from_millis(251)), 2);
    }
}
