//! What came of the requests: counted while they are sent, and shown at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::printable;
use crate::settle::Outcome;

/// Distinct reasons of errors that are told apart; the rest is counted together.
const REASONS_MAX: usize = 20;
/// Reasons that are shown.
const REASONS_SHOWN: usize = 5;
/// Digits of a latency that are kept.
const DIGITS: u8 = 3;
/// Longest reason shown, in characters.
const REASON_CHARS: usize = 120;

/// What some of the clients have sent, and what came of it.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) sent: u64,
    /// Sent, but after their time: no client was free then.
    pub(super) late: u64,
    statuses: BTreeMap<u16, u64>,
    errors: BTreeMap<String, u64>,
    /// Of answers, in microseconds. Grows with the longest.
    latencies: Option<Histogram<u64>>,
}

impl Tally {
    pub(super) fn new() -> Tally {
        Tally {
            sent: 0,
            late: 0,
            statuses: BTreeMap::new(),
            errors: BTreeMap::new(),
            latencies: Histogram::new(DIGITS).ok(),
        }
    }

    pub(super) fn record(&mut self, outcome: Outcome, latency: Duration) {
        match outcome {
            Outcome::Answered { status, .. } => {
                *self.statuses.entry(status).or_default() += 1;
                let microseconds = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                if let Some(latencies) = &mut self.latencies {
                    // Cannot fail: it grows.
                    let _ = latencies.record(microseconds);
                }
            }
            Outcome::Unreachable(reason)
            | Outcome::Unanswered(reason)
            | Outcome::Unsendable(reason) => self.count_error(reason, 1),
        }
    }

    fn count_error(&mut self, reason: String, count: u64) {
        let is_known = self.errors.contains_key(&reason) || self.errors.len() < REASONS_MAX;
        let reason = if is_known { reason } else { "others".into() };
        *self.errors.entry(reason).or_default() += count;
    }

    pub(super) fn add(&mut self, other: &Tally) {
        self.add_counts(other);
        if let (Some(latencies), Some(others)) = (&mut self.latencies, &other.latencies) {
            // Cannot fail: it grows.
            let _ = latencies.add(others);
        }
    }

    /// As [`Tally::add`], but for the latencies: cheap.
    pub(super) fn add_counts(&mut self, other: &Tally) {
        self.sent += other.sent;
        self.late += other.late;
        for (status, count) in &other.statuses {
            *self.statuses.entry(*status).or_default() += count;
        }
        for (reason, count) in &other.errors {
            self.count_error(reason.clone(), *count);
        }
    }

    pub(super) fn answered(&self) -> u64 {
        self.statuses.values().sum()
    }

    fn succeeded(&self) -> u64 {
        self.statuses.range(200..300).map(|(_, count)| count).sum()
    }

    pub(super) fn failed(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// What is shown at the end.
#[derive(Debug)]
pub struct Report {
    pub(super) tally: Tally,
    /// Time in which requests were sent.
    pub(super) sending: Duration,
    /// Requests whose time had come and that no client was free for until the end; open loop only.
    pub(super) unsent: Option<u64>,
}

impl Report {
    /// Whether each request that was due was sent and answered 2xx.
    pub fn is_success(&self) -> bool {
        let sent = self.tally.sent;
        sent > 0 && self.tally.succeeded() == sent && self.unsent.unwrap_or(0) == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tally = &self.tally;
        let (sent, answered, failed) = (tally.sent, tally.answered(), tally.failed());
        let seconds = self.sending.as_secs_f64();
        let rate = |count| per_second(count, self.sending);
        writeln!(
            f,
            "sent: {sent} in {seconds:.1} s, {:.1} a second",
            rate(sent)
        )?;
        writeln!(f, "answered: {answered}, {:.1} a second", rate(answered))?;
        for (status, count) in &tally.statuses {
            writeln!(f, "  {status}: {count}")?;
        }
        writeln!(f, "errors: {failed}")?;
        self.write_errors(f)?;
        let unanswered = sent.saturating_sub(answered + failed);
        if unanswered > 0 {
            writeln!(f, "unanswered: {unanswered} when it ended")?;
        }
        if let Some(unsent) = self.unsent {
            writeln!(f, "late: {} (no client was free at their time)", tally.late)?;
            match unsent {
                0 => writeln!(f, "unsent: 0")?,
                _ => writeln!(
                    f,
                    "unsent: {} of the schedule not sent in time: more --clients are needed",
                    printable::count(unsent, "request")
                )?,
            }
        }
        self.write_latencies(f)
    }
}

impl Report {
    fn write_errors(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut errors: Vec<_> = self.tally.errors.iter().collect();
        errors.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (reason, count) in errors.iter().take(REASONS_SHOWN) {
            // It may quote the answer: nothing in it can steer the terminal.
            let reason: String = reason.chars().take(REASON_CHARS).collect();
            writeln!(f, "  {}: {count}", reason.escape_debug())?;
        }
        let rest = errors.iter().skip(REASONS_SHOWN);
        match rest.map(|(_, count)| **count).sum::<u64>() {
            0 => Ok(()),
            rest => writeln!(f, "  other reasons: {rest}"),
        }
    }

    fn write_latencies(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(latencies) = self.tally.latencies.as_ref().filter(|all| !all.is_empty()) else {
            return writeln!(f, "latency: no answers");
        };
        writeln!(f, "latency:")?;
        for (name, quantile) in [
            ("50 %", 0.5),
            ("90 %", 0.9),
            ("99 %", 0.99),
            ("99.9 %", 0.999),
            ("max", 1.0),
        ] {
            let microseconds = latencies.value_at_quantile(quantile);
            let (whole, rest) = (microseconds / 1000, microseconds % 1000);
            writeln!(f, "  {name}: {whole}.{rest:03} ms")?;
        }
        Ok(())
    }
}

pub(super) fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() {
        return 0.0;
    }
    count as f64 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: u16) -> Outcome {
        Outcome::Answered {
            status,
            retry_after: None,
        }
    }

    fn report(outcomes: impl IntoIterator<Item = Outcome>) -> Report {
        let mut tally = Tally::new();
        for (latency, outcome) in (1..).zip(outcomes) {
            tally.sent += 1;
            tally.record(outcome, Duration::from_millis(latency));
        }
        Report {
            tally,
            sending: Duration::from_secs(2),
            unsent: None,
        }
    }

    #[test]
    fn only_2xx_for_all_that_was_due_is_success() {
        assert!(report([answered(200), answered(299)]).is_success());
        for bad in [answered(199), answered(301), answered(500)] {
            assert!(!report([answered(200), bad]).is_success());
        }
        assert!(!report([Outcome::Unanswered("gone".into())]).is_success());
        assert!(!report([]).is_success(), "nothing was sent");
        let mut unanswered = report([answered(200)]);
        unanswered.tally.sent += 1;
        assert!(!unanswered.is_success());
        assert!(unanswered.to_string().contains("unanswered: 1"));
        let mut behind = report([answered(200)]);
        behind.unsent = Some(0);
        assert!(behind.is_success());
        behind.unsent = Some(3);
        assert!(!behind.is_success());
        assert!(behind.to_string().contains("unsent: 3 requests"));
    }

    #[test]
    fn tallies_add_up_and_are_shown() {
        let mut whole = Tally::new();
        for half in [500, 200] {
            let all = (0..500).map(|_| answered(half));
            whole.add(&report(all).tally);
        }
        let shown = Report {
            tally: whole,
            ..report([])
        }
        .to_string();
        for line in [
            "sent: 1000 in 2.0 s, 500.0 a second",
            "answered: 1000, 500.0 a second",
            "  200: 500",
            "  500: 500",
            "errors: 0",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
        }
        // To three digits.
        assert!(shown.contains("  50 %: 250."), "{shown}");
        assert!(shown.contains("  max: 500."), "{shown}");
    }

    #[test]
    fn reasons_are_bounded_escaped_and_the_most_frequent_first() {
        let frequent = (0..9).map(|_| Outcome::Unanswered("\x1b[2Jgone".into()));
        let many = (0..1000).map(|n| Outcome::Unanswered(format!("reason {n}")));
        let report = report(many.chain(frequent));
        assert!(report.tally.errors.len() <= REASONS_MAX + 1);
        let shown = report.to_string();
        assert!(shown.contains("errors: 1009\n  others: 989"), "{shown}");
        assert!(shown.lines().count() < 15, "{shown}");
        assert!(shown.ends_with("latency: no answers\n"), "{shown}");
        let escaped = super::tests::report([Outcome::Unanswered("\x1b[2J".into())]).to_string();
        assert!(escaped.contains("  \\u{1b}[2J: 1"), "{escaped}");
    }

    #[test]
    fn the_longest_latencies_are_kept_as_they_are() {
        let mut report = report([]);
        report
            .tally
            .record(answered(200), Duration::from_secs(7200));
        let shown = report.to_string();
        let max = shown.rsplit("max: ").next().unwrap_or_default();
        let max: f64 = max.trim_end_matches(" ms\n").parse().unwrap();
        assert!((7_200_000.0..7_210_000.0).contains(&max), "{max}");
    }
}
