//! What becomes of a delivery after one attempt. Pure: outcome, attempt and age in, verdict out.

use std::fmt;
use std::time::Duration;

/// The longest time a `Retry-After` of the destination is honoured.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How one attempt to send ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Answered with this status; `retry_after` as the answer asked, if it did.
    Answered {
        status: u16,
        retry_after: Option<Duration>,
    },
    /// No connection: the request was not sent, and can have no part in it.
    Unreachable(String),
    /// Sent, at least in part, and no answer that could be read: a timeout, a broken connection.
    Unanswered(String),
    /// It cannot be written as a request at all, to whatever destination.
    Unsendable(String),
}

/// Why an attempt did not deliver: kept with the row, shown to the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub status: Option<u16>,
    pub error: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

/// What is to be done with the delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Delivered,
    /// Try again no sooner than `after` from now.
    Later {
        after: Duration,
        failure: Failure,
    },
    /// Move to the dead letters.
    Bury(Failure),
}

/// When to try again, and when to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts after the first.
    pub max_retries: u32,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// Requests received longer ago than this are given up; `None`: no limit.
    pub max_age: Option<Duration>,
    /// Answers after which another attempt is pointless.
    pub give_up_statuses: Vec<u16>,
}

impl RetryPolicy {
    /// Decides on attempt number `attempt` (from 1) of a request received `age` ago.
    /// `jitter` is uniform in 0..1 and spreads the attempts of rows that failed together.
    pub fn decide(&self, outcome: Outcome, attempt: u32, age: Duration, jitter: f64) -> Verdict {
        let (failure, retry_after) = match outcome {
            Outcome::Answered {
                status: 200..=299, ..
            } => return Verdict::Delivered,
            Outcome::Answered {
                status,
                retry_after,
            } => {
                let failure = Failure {
                    status: Some(status),
                    error: format!("destination answered {status}"),
                };
                if self.give_up_statuses.contains(&status) {
                    return Verdict::Bury(failure);
                }
                // RFC 9110 §10.2.3 gives it a meaning with 503, RFC 6585 §4 with 429.
                (failure, retry_after.filter(|_| matches!(status, 429 | 503)))
            }
            Outcome::Unsendable(error) => {
                return Verdict::Bury(Failure {
                    status: None,
                    error,
                });
            }
            Outcome::Unreachable(error) | Outcome::Unanswered(error) => (
                Failure {
                    status: None,
                    error,
                },
                None,
            ),
        };
        if attempt > self.max_retries || self.max_age.is_some_and(|max_age| age >= max_age) {
            return Verdict::Bury(failure);
        }
        let asked = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
        Verdict::Later {
            after: self.backoff(attempt, jitter).max(asked),
            failure,
        }
    }

    /// Doubles from `backoff_min` up to `backoff_max`, of which between a half and all is waited.
    pub fn backoff(&self, attempt: u32, jitter: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(31);
        let full = self
            .backoff_min
            .saturating_mul(1 << doublings)
            .min(self.backoff_max);
        full.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            max_retries: 3,
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(600),
            max_age: None,
            give_up_statuses: vec![410],
        }
    }

    fn answered(status: u16) -> Outcome {
        Outcome::Answered {
            status,
            retry_after: None,
        }
    }

    #[test]
    fn only_2xx_delivers() {
        for status in [200, 204, 299] {
            let verdict = policy().decide(answered(status), 1, Duration::ZERO, 0.0);
            assert_eq!(verdict, Verdict::Delivered);
        }
        for status in [100, 199, 301, 404, 500, 999] {
            let verdict = policy().decide(answered(status), 1, Duration::ZERO, 0.0);
            assert!(matches!(verdict, Verdict::Later { .. }), "{status}");
        }
    }

    #[test]
    fn gives_up_after_the_last_retry_the_age_or_a_final_status() {
        let failed = || Outcome::Unreachable("refused".into());
        let buried = |verdict| matches!(verdict, Verdict::Bury(_));
        assert!(!buried(policy().decide(failed(), 3, Duration::ZERO, 0.0)));
        assert!(buried(policy().decide(failed(), 4, Duration::ZERO, 0.0)));
        assert!(buried(policy().decide(
            answered(410),
            1,
            Duration::ZERO,
            0.0
        )));
        let aged = RetryPolicy {
            max_age: Some(Duration::from_secs(60)),
            ..policy()
        };
        assert!(!buried(aged.decide(
            failed(),
            1,
            Duration::from_secs(59),
            0.0
        )));
        assert!(buried(aged.decide(
            failed(),
            1,
            Duration::from_secs(60),
            0.0
        )));
    }

    #[test]
    fn backoff_doubles_to_the_cap_with_jitter() {
        let seconds = |attempt, jitter| policy().backoff(attempt, jitter).as_secs_f64();
        assert!((seconds(1, 1.0) - 1.0).abs() < 1e-9);
        assert!((seconds(1, 0.0) - 0.5).abs() < 1e-9);
        assert!((seconds(5, 1.0) - 16.0).abs() < 1e-9);
        assert!((seconds(u32::MAX, 1.0) - 600.0).abs() < 1e-9);
    }

    #[test]
    fn honours_retry_after_on_429_and_503_within_a_day() {
        let asked = |status, seconds| {
            let outcome = Outcome::Answered {
                status,
                retry_after: Some(Duration::from_secs(seconds)),
            };
            match policy().decide(outcome, 1, Duration::ZERO, 0.0) {
                Verdict::Later { after, .. } => after,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(asked(429, 120), Duration::from_secs(120));
        assert_eq!(asked(503, 120), Duration::from_secs(120));
        assert_eq!(asked(500, 120), Duration::from_millis(500));
        assert_eq!(asked(503, 0), Duration::from_millis(500));
        assert_eq!(asked(503, u64::MAX), RETRY_AFTER_MAX);
    }
}
