//! The destination's breaker: while it is down nothing is sent but probes, and after one that is
//! answered the queue starts slowly.
//!
//! It judges the destination, not a request: `evidence` has what an attempt says. [`Breaker`] is
//! pure: outcomes and the time in, what may be sent out. [`Destination`] shares one among the
//! threads, and reports what it does.

mod evidence;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::logger::LogLimit;
use crate::metrics::Metrics;
use crate::settle::Outcome;
use evidence::{Evidence, Fault, Limits, Sign};

/// Pause before the first probes; doubles each time that they fail.
const PROBE_PAUSE_MIN: Duration = Duration::from_secs(1);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Probes at once, at most, where requests may have a part in it that they are not answered.
const PROBES_MAX: u32 = 32;
/// Doublings of the queue's rate after a probe that succeeded, one a second.
const DOUBLINGS: u32 = 5;
/// As many if it was down for less than this: there is not much that waits.
const DOUBLINGS_BRIEF: u32 = 1;
const BRIEF: Duration = Duration::from_secs(10);
/// The share of its rate at which the queue goes while nearly all requests fail.
const FAILING_SHARE: f64 = 0.25;

static FAILING: LogLimit = LogLimit::new();
static WORKING: LogLimit = LogLimit::new();

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
    /// This share, and with rows from all over the queue, as probes are.
    Sample(f64),
    /// So many single rows, now.
    Probe(u32),
    /// Nothing before this time.
    Stopped(Instant),
}

/// A change worth telling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Opened,
    ProbeFailed,
    Recovered,
    /// Nearly all requests fail.
    Failing,
    /// They do not any more.
    Working,
}

#[derive(Debug)]
enum State {
    Closed {
        evidence: Evidence,
        /// After it was open.
        recovery: Option<Recovery>,
    },
    Open(Open),
}

#[derive(Debug, Clone, Copy)]
struct Recovery {
    since: Instant,
    doublings: u32,
}

impl Recovery {
    /// The share of the full rate, while it is less than that.
    fn share(self, now: Instant) -> Option<f64> {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
        let doublings = self.doublings.checked_sub(seconds)?;
        (doublings > 0).then(|| 1.0 / f64::from(1_u32 << doublings))
    }
}

/// Nothing is sent but probes, in rounds: of a round, one by one or all at once.
#[derive(Debug)]
struct Open {
    since: Instant,
    /// When the next round begins, if none of this one is answered.
    next_round: Instant,
    pause: Duration,
    /// Probes of a round, and how many of this one have not been asked for.
    width: u32,
    left: u32,
    /// One of this round has failed.
    has_failed: bool,
    error: String,
}

impl Open {
    fn permit(&mut self, now: Instant) -> Result<(), Instant> {
        if now >= self.next_round {
            self.left = self.width;
            self.has_failed = false;
            // Those that hang are not waited for without end.
            self.next_round = now + PROBE_PAUSE_MAX;
        } else if self.left == 0 {
            return Err(self.next_round);
        }
        self.left -= 1;
        Ok(())
    }

    fn pace(&self, now: Instant) -> Pace {
        if now >= self.next_round {
            Pace::Probe(self.width)
        } else if self.left > 0 {
            Pace::Probe(self.left)
        } else {
            Pace::Stopped(self.next_round)
        }
    }

    /// The probe could not be made: another may be, instead.
    fn give_back(&mut self) {
        self.left = (self.left + 1).min(self.width);
    }

    /// Notes a probe that has failed; tells whether it is the first of its round.
    fn fail(&mut self, fault: Fault, width: u32, now: Instant) -> bool {
        self.error = fault.error;
        self.width = width;
        self.left = self.left.min(width - 1);
        let asked = fault.asked.unwrap_or_default().min(PROBE_PAUSE_MAX);
        if self.has_failed {
            self.next_round = self.next_round.max(now + asked);
            return false;
        }
        self.has_failed = true;
        self.pause = (self.pause * 2).min(PROBE_PAUSE_MAX);
        self.next_round = now + self.pause.max(asked);
        true
    }

    fn recovery(&self, now: Instant) -> Recovery {
        let is_brief = now.saturating_duration_since(self.since) < BRIEF;
        Recovery {
            since: now,
            doublings: if is_brief { DOUBLINGS_BRIEF } else { DOUBLINGS },
        }
    }
}

#[derive(Debug)]
pub struct Breaker {
    /// Connections that have to fail in a row to open it; 0: it never opens.
    failures_max: u32,
    state: State,
    era: Era,
}

impl Breaker {
    pub fn new(failures_max: u32) -> Breaker {
        Breaker {
            failures_max,
            state: closed(None),
            era: Era(0),
        }
    }

    /// For a destination that has changed: what was is forgotten.
    pub fn renew(&mut self) {
        self.enter(closed(None));
    }

    /// From now on it takes so many failures; 0 closes it for good.
    pub fn set_failures_max(&mut self, failures_max: u32) {
        self.failures_max = failures_max;
        if failures_max == 0 {
            self.renew();
        }
    }

    /// To be asked before each attempt; each that is granted is to be noted.
    pub fn permit(&mut self, now: Instant) -> Permit {
        if let State::Open(open) = &mut self.state
            && let Err(next) = open.permit(now)
        {
            return Permit::Denied(next);
        }
        Permit::Granted(self.era)
    }

    /// Notes how an attempt with the request `id` ended that was granted in `era`.
    pub fn note(&mut self, era: Era, id: Uuid, outcome: &Outcome, now: Instant) -> Option<Change> {
        if era != self.era || self.failures_max == 0 {
            return None;
        }
        let sign = Sign::of(outcome);
        let limits = self.limits();
        match &mut self.state {
            State::Open(_) => self.note_probe(sign, now),
            State::Closed { evidence, .. } => {
                let was_failing = evidence.is_failing(limits);
                evidence.note(id, &sign, limits);
                if let Sign::Silent(fault) = sign
                    && evidence.is_down(limits)
                {
                    self.open(fault, now);
                    return Some(Change::Opened);
                }
                match (was_failing, evidence.is_failing(limits)) {
                    (false, true) => Some(Change::Failing),
                    (true, false) => Some(Change::Working),
                    _ => None,
                }
            }
        }
    }

    fn open(&mut self, fault: Fault, now: Instant) {
        let asked = fault.asked.unwrap_or_default().min(PROBE_PAUSE_MAX);
        self.enter(State::Open(Open {
            since: now,
            next_round: now + PROBE_PAUSE_MIN.max(asked),
            pause: PROBE_PAUSE_MIN,
            width: self.width(&fault),
            left: 0,
            has_failed: false,
            error: fault.error,
        }));
    }

    fn note_probe(&mut self, sign: Sign, now: Instant) -> Option<Change> {
        let width = match &sign {
            Sign::Silent(fault) => self.width(fault),
            _ => 1,
        };
        let State::Open(open) = &mut self.state else {
            return None;
        };
        match sign {
            Sign::Works | Sign::Fails => {
                let recovery = open.recovery(now);
                self.enter(closed(Some(recovery)));
                Some(Change::Recovered)
            }
            Sign::Silent(fault) => open.fail(fault, width, now).then_some(Change::ProbeFailed),
            Sign::Nothing => {
                open.give_back();
                None
            }
        }
    }

    /// Probes at once. Where there is no connection one tells as much as many; else the fault may
    /// be the request's.
    fn width(&self, fault: &Fault) -> u32 {
        if fault.is_unreachable {
            1
        } else {
            self.failures_max.clamp(1, PROBES_MAX)
        }
    }

    fn limits(&self) -> Limits {
        Limits::new(self.failures_max)
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.era.0 += 1;
    }

    /// Whether new requests may go direct.
    pub fn is_closed(&self, now: Instant) -> bool {
        self.pace(now) == Pace::Full
    }

    /// How fast the queue may go.
    pub fn pace(&self, now: Instant) -> Pace {
        match &self.state {
            State::Open(open) => open.pace(now),
            State::Closed { evidence, recovery } => {
                let share = recovery.and_then(|recovery| recovery.share(now));
                if self.is_failing(evidence) {
                    return Pace::Sample(share.unwrap_or(1.0).min(FAILING_SHARE));
                }
                share.map_or(Pace::Full, Pace::Share)
            }
        }
    }

    fn is_failing(&self, evidence: &Evidence) -> bool {
        self.failures_max > 0 && evidence.is_failing(self.limits())
    }

    /// What was wrong last, while it is open.
    pub fn fault(&self) -> Option<&str> {
        match &self.state {
            State::Open(open) => Some(&open.error),
            State::Closed { .. } => None,
        }
    }

    /// The state's name, for people.
    pub fn name(&self, now: Instant) -> &'static str {
        match &self.state {
            State::Open(_) => "open",
            State::Closed { evidence, .. } if self.is_failing(evidence) => "slowed",
            State::Closed { .. } if self.pace(now) == Pace::Full => "closed",
            State::Closed { .. } => "recovering",
        }
    }
}

fn closed(recovery: Option<Recovery>) -> State {
    State::Closed {
        evidence: Evidence::default(),
        recovery,
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

    /// See [`Breaker::note`].
    pub fn note(&self, era: Era, id: Uuid, outcome: &Outcome) {
        let change = self.breaker().note(era, id, outcome, Instant::now());
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
            Change::Failing => {
                if let Some(suppressed) = FAILING.allow() {
                    log::error!(suppressed; "destination answers nothing but errors: the queue slows down, requests wait there");
                }
            }
            Change::Working => {
                if let Some(suppressed) = WORKING.allow() {
                    log::warn!(suppressed; "destination answers without errors again");
                }
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

    /// See [`Breaker::name`].
    pub fn name(&self) -> &'static str {
        self.breaker().name(Instant::now())
    }

    pub fn fault(&self) -> Option<String> {
        self.breaker().fault().map(str::to_owned)
    }
}
