//! The destination's breaker: after failures in a row nothing is sent but single probes, and
//! after a probe that succeeds the queue starts slowly.
//!
//! [`Breaker`] is pure: outcomes and the time in, what may be sent out. [`Destination`] shares
//! one among the threads, and reports what it does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::Metrics;
use crate::settle::Outcome;

/// Pause before the first probe; doubles with each that fails.
const PROBE_PAUSE_MIN: Duration = Duration::from_secs(1);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Doublings of the queue's rate after a probe that succeeded, one a second.
const DOUBLINGS: u32 = 5;

/// Whether an attempt may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    Granted(Era),
    /// Not before this time.
    Denied(Instant),
}

/// Names a state of the breaker: what was begun in an earlier one says nothing about this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Era(u64);

/// How fast the queue may go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    Full,
    /// This share of the full rate.
    Share(f64),
    /// One single row, now.
    Probe,
    /// Nothing before this time.
    Stopped(Instant),
}

/// A change worth telling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Opened,
    ProbeFailed,
    Recovered,
}

#[derive(Debug)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        probe_at: Instant,
        pause: Duration,
        /// A probe is under way, and is waited for until then.
        probing_until: Option<Instant>,
        error: String,
    },
    Recovering {
        since: Instant,
        failures: u32,
    },
}

#[derive(Debug)]
pub struct Breaker {
    /// Failures in a row that open it; 0: it never opens.
    failures_max: u32,
    state: State,
    era: Era,
}

impl Breaker {
    pub fn new(failures_max: u32) -> Breaker {
        Breaker {
            failures_max,
            state: State::Closed { failures: 0 },
            era: Era(0),
        }
    }

    /// For a destination that has changed: what was is forgotten.
    pub fn renew(&mut self) {
        self.enter(State::Closed { failures: 0 });
    }

    /// From now on so many failures in a row open it; 0 closes it for good.
    pub fn set_failures_max(&mut self, failures_max: u32) {
        self.failures_max = failures_max;
        if failures_max == 0 {
            self.renew();
        }
    }

    /// To be asked before each attempt; each that is granted is to be noted.
    pub fn permit(&mut self, now: Instant) -> Permit {
        if let State::Open {
            probe_at,
            probing_until,
            ..
        } = &mut self.state
        {
            let next = probing_until.unwrap_or(*probe_at);
            if now < next {
                return Permit::Denied(next);
            }
            *probing_until = Some(now + PROBE_PAUSE_MAX);
        }
        Permit::Granted(self.era)
    }

    /// Notes how an attempt ended that was granted in `era`.
    pub fn note(&mut self, era: Era, outcome: &Outcome, now: Instant) -> Option<Change> {
        if era != self.era || self.failures_max == 0 {
            return None;
        }
        let failure = failure(outcome);
        let has_recovered = self.has_recovered(now);
        match (&mut self.state, failure) {
            (State::Open { .. }, None) => {
                self.enter(State::Recovering {
                    since: now,
                    failures: 0,
                });
                Some(Change::Recovered)
            }
            (State::Open { pause, .. }, Some((error, asked))) => {
                let pause = (*pause * 2).min(PROBE_PAUSE_MAX);
                self.open(pause, asked, error, now);
                Some(Change::ProbeFailed)
            }
            (State::Recovering { .. } | State::Closed { .. }, None) if has_recovered => {
                self.state = State::Closed { failures: 0 };
                None
            }
            (State::Recovering { failures, .. } | State::Closed { failures }, None) => {
                *failures = 0;
                None
            }
            (
                State::Recovering { failures, .. } | State::Closed { failures },
                Some((error, asked)),
            ) => {
                *failures += 1;
                if *failures < self.failures_max {
                    return None;
                }
                self.open(PROBE_PAUSE_MIN, asked, error, now);
                Some(Change::Opened)
            }
        }
    }

    fn open(&mut self, pause: Duration, asked: Option<Duration>, error: String, now: Instant) {
        let wait = pause.max(asked.unwrap_or_default().min(PROBE_PAUSE_MAX));
        self.enter(State::Open {
            probe_at: now + wait,
            pause,
            probing_until: None,
            error,
        });
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.era.0 += 1;
    }

    fn has_recovered(&self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { .. } => false,
            State::Recovering { since, .. } => {
                now.saturating_duration_since(since) >= Duration::from_secs(DOUBLINGS.into())
            }
        }
    }

    /// Whether new requests may go direct.
    pub fn is_closed(&self, now: Instant) -> bool {
        self.has_recovered(now)
    }

    /// How fast the queue may go.
    pub fn pace(&self, now: Instant) -> Pace {
        match &self.state {
            State::Open {
                probe_at,
                probing_until,
                ..
            } => match probing_until.unwrap_or(*probe_at) {
                next if now < next => Pace::Stopped(next),
                _ => Pace::Probe,
            },
            State::Recovering { since, .. } if !self.has_recovered(now) => {
                let seconds = now.saturating_duration_since(*since).as_secs();
                let doublings = u32::try_from(seconds).unwrap_or(DOUBLINGS);
                Pace::Share(f64::from(1_u32 << doublings) / f64::from(1_u32 << DOUBLINGS))
            }
            State::Recovering { .. } | State::Closed { .. } => Pace::Full,
        }
    }

    /// What was wrong last, while it is open.
    pub fn fault(&self) -> Option<&str> {
        match &self.state {
            State::Open { error, .. } => Some(error),
            State::Closed { .. } | State::Recovering { .. } => None,
        }
    }
}

/// What says that the destination is down, or over its limits: no answer, 5xx and 429. Any other
/// answer shows that it works, whatever it thinks of the request. With it, how long it asks to be
/// left alone.
fn failure(outcome: &Outcome) -> Option<(String, Option<Duration>)> {
    match outcome {
        Outcome::Unreachable(error) | Outcome::Unanswered(error) => Some((error.clone(), None)),
        Outcome::Answered {
            status: status @ (429 | 500..=599),
            retry_after,
        } => Some((format!("destination answered {status}"), *retry_after)),
        Outcome::Answered { .. } | Outcome::Unsendable(_) => None,
    }
}

/// The breaker of the one destination, for all threads.
#[derive(Debug)]
pub struct Destination {
    breaker: Mutex<Breaker>,
    /// The queue is paused: nothing new is sent, though the destination may work.
    is_paused: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Destination {
    pub fn new(failures_max: u32, metrics: Arc<Metrics>) -> Destination {
        Destination {
            breaker: Mutex::new(Breaker::new(failures_max)),
            is_paused: AtomicBool::new(false),
            metrics,
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Breaker::set_failures_max`].
    pub fn set_failures_max(&self, failures_max: u32) {
        self.change(|breaker| breaker.set_failures_max(failures_max));
    }

    /// See [`Breaker::renew`].
    pub fn renew(&self) {
        self.change(Breaker::renew);
    }

    fn change(&self, change: impl FnOnce(&mut Breaker)) {
        let mut breaker = self.breaker();
        change(&mut breaker);
        self.metrics
            .breaker
            .open
            .set(i64::from(breaker.fault().is_some()));
    }

    pub fn permit(&self) -> Permit {
        self.breaker().permit(Instant::now())
    }

    pub fn note(&self, era: Era, outcome: &Outcome) {
        let change = self.breaker().note(era, outcome, Instant::now());
        let Some(change) = change else { return };
        let error = self.fault().unwrap_or_default();
        match change {
            Change::Opened => {
                self.metrics.breaker.open.set(1);
                self.metrics.breaker.opened.inc();
                log::error!(error; "destination is down: only probes are sent, requests wait in the queue");
            }
            // At most one a second, and rarer with each.
            Change::ProbeFailed => log::warn!(error; "destination is still down"),
            Change::Recovered => {
                self.metrics.breaker.open.set(0);
                log::warn!("destination works again: the queue starts slowly");
            }
        }
    }

    pub fn is_closed(&self) -> bool {
        self.breaker().is_closed(Instant::now())
    }

    /// Whether new requests may go direct.
    pub fn is_open_to_new(&self) -> bool {
        !self.is_paused() && self.is_closed()
    }

    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// Follows what an operator has set in the store.
    pub fn set_paused(&self, is_paused: bool) {
        let was_paused = self.is_paused.swap(is_paused, Ordering::Relaxed);
        self.metrics.set_paused(is_paused);
        if is_paused != was_paused {
            let what = if is_paused { "paused" } else { "resumed" };
            log::warn!("queue {what} by an operator");
        }
    }

    pub fn pace(&self) -> Pace {
        self.breaker().pace(Instant::now())
    }

    pub fn fault(&self) -> Option<String> {
        self.breaker().fault().map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn down() -> Outcome {
        Outcome::Unreachable("refused".into())
    }

    fn answered(status: u16, retry_after: Option<u64>) -> Outcome {
        Outcome::Answered {
            status,
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    /// Makes an attempt, which must be granted.
    fn attempt(breaker: &mut Breaker, outcome: &Outcome, now: Instant) -> Option<Change> {
        match breaker.permit(now) {
            Permit::Granted(era) => breaker.note(era, outcome, now),
            Permit::Denied(_) => panic!("denied"),
        }
    }

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(3);
        for _ in 0..2 {
            assert_eq!(attempt(&mut breaker, &down(), now), None);
        }
        assert_eq!(attempt(&mut breaker, &down(), now), Some(Change::Opened));
        breaker
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let now = Instant::now();
        let mut breaker = Breaker::new(2);
        for outcome in [
            answered(200, None),
            answered(404, None),
            answered(301, None),
        ] {
            assert_eq!(attempt(&mut breaker, &down(), now), None);
            assert_eq!(attempt(&mut breaker, &outcome, now), None);
        }
        assert_eq!(attempt(&mut breaker, &answered(429, None), now), None);
        let change = attempt(&mut breaker, &answered(503, None), now);
        assert_eq!(change, Some(Change::Opened));
        assert_eq!(breaker.fault(), Some("destination answered 503"));
        assert!(!breaker.is_closed(now));
    }

    #[test]
    fn zero_never_opens_it() {
        let now = Instant::now();
        let mut breaker = Breaker::new(0);
        for _ in 0..1000 {
            assert_eq!(attempt(&mut breaker, &down(), now), None);
        }
        assert!(breaker.is_closed(now));
        assert_eq!(breaker.pace(now), Pace::Full);
    }

    #[test]
    fn one_probe_at_a_time_with_pauses_that_grow() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            let probe_at = now + seconds(pause);
            assert_eq!(breaker.pace(now), Pace::Stopped(probe_at), "{pause}");
            assert!(matches!(breaker.permit(now), Permit::Denied(_)));
            now = probe_at;
            assert_eq!(breaker.pace(now), Pace::Probe);
            let Permit::Granted(era) = breaker.permit(now) else {
                panic!("no probe");
            };
            assert!(matches!(breaker.permit(now), Permit::Denied(_)));
            assert!(matches!(breaker.pace(now), Pace::Stopped(_)));
            assert_eq!(breaker.note(era, &down(), now), Some(Change::ProbeFailed));
        }
    }

    #[test]
    fn a_probe_that_hangs_is_not_waited_for_without_end() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let later = now + seconds(1);
        let Permit::Granted(hanging) = breaker.permit(later) else {
            panic!("no probe");
        };
        let next = later + PROBE_PAUSE_MAX;
        assert_eq!(breaker.permit(later), Permit::Denied(next));
        assert_eq!(breaker.pace(next), Pace::Probe);
        let change = attempt(&mut breaker, &answered(200, None), next);
        assert_eq!(change, Some(Change::Recovered));
        assert_eq!(breaker.note(hanging, &down(), next), None);
    }

    #[test]
    fn a_probe_waits_as_long_as_it_was_asked_to() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1);
        attempt(&mut breaker, &answered(503, Some(10)), now);
        assert_eq!(breaker.pace(now), Pace::Stopped(now + seconds(10)));
        let later = now + seconds(10);
        attempt(&mut breaker, &answered(429, Some(9999)), later);
        assert_eq!(breaker.pace(later), Pace::Stopped(later + seconds(30)));
    }

    #[test]
    fn it_closes_slowly() {
        let now = Instant::now() + seconds(1);
        let mut breaker = opened(now - seconds(1));
        assert_eq!(
            attempt(&mut breaker, &answered(200, None), now),
            Some(Change::Recovered)
        );
        assert_eq!(breaker.fault(), None);
        for (second, share) in [(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0), (4, 16.0)] {
            let at = now + seconds(second);
            assert_eq!(breaker.pace(at), Pace::Share(share / 32.0));
            assert!(!breaker.is_closed(at));
        }
        let at = now + seconds(5);
        assert_eq!(breaker.pace(at), Pace::Full);
        assert!(breaker.is_closed(at));
        // As many failures as ever open it again.
        for _ in 0..2 {
            assert_eq!(attempt(&mut breaker, &down(), at), None);
        }
        let change = attempt(&mut breaker, &down(), at);
        assert_eq!(change, Some(Change::Opened));
    }

    #[test]
    fn what_was_begun_before_says_nothing() {
        let now = Instant::now();
        let mut breaker = Breaker::new(2);
        let early: Vec<_> = (0..9).map(|_| breaker.permit(now)).collect();
        let note = |breaker: &mut Breaker, permit: Permit, outcome: &Outcome| match permit {
            Permit::Granted(era) => breaker.note(era, outcome, now),
            Permit::Denied(_) => panic!("denied"),
        };
        note(&mut breaker, early[0], &down());
        assert_eq!(note(&mut breaker, early[1], &down()), Some(Change::Opened));
        // One that succeeds now was sent when the destination still worked.
        assert_eq!(note(&mut breaker, early[2], &answered(200, None)), None);
        assert!(breaker.fault().is_some());
        let later = now + seconds(1);
        attempt(&mut breaker, &answered(200, None), later);
        for permit in &early[3..] {
            assert_eq!(note(&mut breaker, *permit, &down()), None);
        }
        assert_eq!(breaker.fault(), None);
    }
}
