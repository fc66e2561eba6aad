//! Metrics by path: which paths are labels, and for how long.
//!
//! Anybody can ask for any path. So only one to which something was delivered becomes a label, and
//! one that is not used any more gives way. All others count together.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};

use crate::printable;
use crate::settle::Outcome;

/// Longest path that becomes a label, in bytes.
const LABEL_BYTES_MAX: usize = 200;

/// The label of every path that has none of its own.
const OTHER: &str = "other";

/// A label that is not used for so long gives way to another.
const UNUSED: Duration = Duration::from_secs(60 * 60);

const OK: &str = "OK";

/// Metrics of one path.
#[derive(Debug)]
pub struct PathMetrics {
    label: String,
    pub requests: IntCounter,
    pub answer_seconds: Histogram,
    delivery_ok: Histogram,
    /// Of attempts that ended in another way, by how; `None` once the label is given to another.
    delivery_other: Mutex<Option<BTreeMap<u16, Histogram>>>,
    delivery: HistogramVec,
    /// In seconds since the first label could be given.
    used_at: AtomicU64,
}

impl PathMetrics {
    fn new(label: String, vecs: &Vecs, used_at: u64) -> PathMetrics {
        let by_path = [label.as_str()];
        PathMetrics {
            requests: vecs.requests.with_label_values(&by_path),
            answer_seconds: vecs.answer_seconds.with_label_values(&by_path),
            delivery_ok: vecs.delivery.with_label_values(&[label.as_str(), OK]),
            delivery_other: Mutex::new(Some(BTreeMap::new())),
            delivery: vecs.delivery.clone(),
            used_at: AtomicU64::new(used_at),
            label,
        }
    }

    /// Records how long an attempt took and how it ended, with the Go program's labels.
    fn observe_attempt(&self, outcome: &Outcome, took: Duration) {
        let seconds = took.as_secs_f64();
        if is_delivered(outcome) {
            return self.delivery_ok.observe(seconds);
        }
        let status = match outcome {
            Outcome::Answered { status, .. } => *status,
            Outcome::Unreachable(_) | Outcome::Unanswered(_) | Outcome::Unsendable(_) => 0,
        };
        // Other numbers are no status codes: a closed set of labels, whatever is answered.
        let status = if status > 599 || (1..100).contains(&status) {
            999
        } else {
            status
        };
        let mut others = self.delivery_other();
        let Some(others) = &mut *others else { return };
        let other = others.entry(status).or_insert_with(|| {
            let by_status = [self.label.as_str(), &status_label(status)];
            self.delivery.with_label_values(&by_status)
        });
        other.observe(seconds);
    }

    fn delivery_other(&self) -> std::sync::MutexGuard<'_, Option<BTreeMap<u16, Histogram>>> {
        let others = self.delivery_other.lock();
        others.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of it out of what is shown. Who still holds it counts in vain.
    fn remove(&self, vecs: &Vecs) {
        let label = self.label.as_str();
        // They fail only for what is not there.
        let _ = vecs.requests.remove_label_values(&[label]);
        let _ = vecs.answer_seconds.remove_label_values(&[label]);
        let _ = vecs.delivery.remove_label_values(&[label, OK]);
        for status in self.delivery_other().take().unwrap_or_default().keys() {
            let by_status = [label, &status_label(*status)];
            let _ = vecs.delivery.remove_label_values(&by_status);
        }
    }
}

fn status_label(status: u16) -> String {
    match status {
        0 => "request error".into(),
        100..=599 => format!("response {status}"),
        _ => "response other".into(),
    }
}

fn is_delivered(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Answered {
            status: 200..=299,
            ..
        }
    )
}

/// The metrics that have a path as label.
#[derive(Debug)]
pub(super) struct Vecs {
    pub(super) requests: IntCounterVec,
    pub(super) answer_seconds: HistogramVec,
    pub(super) delivery: HistogramVec,
}

/// Hands out the metrics of a path, and those of `other` for all without a label.
#[derive(Debug)]
pub(super) struct PathLabels {
    known: RwLock<HashMap<String, Arc<PathMetrics>>>,
    paths_max: usize,
    other: Arc<PathMetrics>,
    vecs: Vecs,
    begin: Instant,
    /// No label is unused for long enough before this, in seconds.
    look_at: AtomicU64,
}

impl PathLabels {
    pub(super) fn new(vecs: Vecs, paths_max: usize, now: Instant) -> PathLabels {
        PathLabels {
            known: RwLock::default(),
            paths_max,
            other: Arc::new(PathMetrics::new(OTHER.into(), &vecs, 0)),
            vecs,
            begin: now,
            look_at: AtomicU64::new(0),
        }
    }

    pub(super) fn of(&self, path: &str, now: Instant) -> Arc<PathMetrics> {
        let known = self.find(path, now);
        known.unwrap_or_else(|| Arc::clone(&self.other))
    }

    /// Records an attempt. One that has delivered earns its path a label, if there is one left.
    pub(super) fn observe_attempt(
        &self,
        path: &str,
        outcome: &Outcome,
        took: Duration,
        now: Instant,
    ) {
        let mut metrics = self.find(path, now);
        if metrics.is_none() && is_delivered(outcome) {
            metrics = self.give_label(path, now);
        }
        let metrics = metrics.as_ref().unwrap_or(&self.other);
        metrics.observe_attempt(outcome, took);
    }

    fn find(&self, path: &str, now: Instant) -> Option<Arc<PathMetrics>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let metrics = known.get(path)?;
        let now = self.seconds(now);
        // Mostly it is so already, and the line stays with all processors.
        if metrics.used_at.load(Ordering::Relaxed) < now {
            metrics.used_at.store(now, Ordering::Relaxed);
        }
        Some(Arc::clone(metrics))
    }

    fn give_label(&self, path: &str, now: Instant) -> Option<Arc<PathMetrics>> {
        let now = self.seconds(now);
        if path.len() > LABEL_BYTES_MAX {
            return None;
        }
        let is_full = {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            known.len() >= self.paths_max
        };
        if is_full && now < self.look_at.load(Ordering::Relaxed) {
            return None;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(metrics) = known.get(path) {
            return Some(Arc::clone(metrics));
        }
        if known.len() >= self.paths_max && !self.make_room(&mut known, now) {
            return None;
        }
        let mut label = String::with_capacity(path.len());
        printable::push(&mut label, path);
        // What is escaped may look like another one, or like what stands for all others.
        if known.values().any(|other| other.label == label) || label == OTHER {
            return None;
        }
        let metrics = Arc::new(PathMetrics::new(label, &self.vecs, now));
        known.insert(path.to_owned(), Arc::clone(&metrics));
        Some(metrics)
    }

    /// Takes away the label that has not been used for longest, if that is long enough ago.
    fn make_room(&self, known: &mut HashMap<String, Arc<PathMetrics>>, now: u64) -> bool {
        let used_at = |metrics: &PathMetrics| metrics.used_at.load(Ordering::Relaxed);
        let Some((path, metrics)) = known.iter().min_by_key(|(_, metrics)| used_at(metrics)) else {
            return false;
        };
        let unused_at = used_at(metrics).saturating_add(UNUSED.as_secs());
        if now < unused_at {
            self.look_at.store(unused_at, Ordering::Relaxed);
            return false;
        }
        metrics.remove(&self.vecs);
        let path = path.clone();
        known.remove(&path);
        true
    }

    fn seconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begin).as_secs()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{HistogramOpts, Opts};

    use super::*;

    fn labels(paths_max: usize, now: Instant) -> PathLabels {
        let histogram = |labels: &[&str]| HistogramVec::new(HistogramOpts::new("a", "a"), labels);
        let vecs = Vecs {
            requests: IntCounterVec::new(Opts::new("a", "a"), &["path"]).unwrap(),
            answer_seconds: histogram(&["path"]).unwrap(),
            delivery: histogram(&["path", "status"]).unwrap(),
        };
        PathLabels::new(vecs, paths_max, now)
    }

    fn answered(status: u16) -> Outcome {
        Outcome::Answered {
            status,
            retry_after: None,
        }
    }

    fn attempt(labels: &PathLabels, path: &str, status: u16, now: Instant) {
        let took = Duration::from_millis(3);
        labels.observe_attempt(path, &answered(status), took, now);
    }

    /// Samples that are shown of all three metrics.
    fn shown(labels: &PathLabels) -> usize {
        use prometheus::core::Collector;
        let Vecs {
            requests,
            answer_seconds,
            delivery,
        } = &labels.vecs;
        let all = [
            requests.collect(),
            answer_seconds.collect(),
            delivery.collect(),
        ];
        let families = all.iter().flatten();
        families.map(|family| family.get_metric().len()).sum()
    }

    fn hours(hours: u64) -> Duration {
        Duration::from_secs(hours * 3600)
    }

    #[test]
    fn only_what_was_delivered_earns_a_label() {
        let now = Instant::now();
        let labels = labels(2, now);
        for number in 0..100 {
            let junk = format!("/junk/{number}");
            labels.of(&junk, now).requests.inc();
            for status in [301, 404, 500, 999] {
                attempt(&labels, &junk, status, now);
            }
        }
        assert_eq!(labels.of("/a", now).label, OTHER);
        attempt(&labels, "/a", 200, now);
        attempt(&labels, "/b", 204, now);
        attempt(&labels, "/c", 200, now);
        let label = |path| labels.of(path, now).label.clone();
        assert_eq!([label("/a"), label("/b"), label("/c")], ["/a", "/b", OTHER]);
        assert_eq!(label("/junk/1"), OTHER);
        assert_eq!(labels.other.requests.get(), 100);
        attempt(
            &labels,
            &format!("/{}", "d".repeat(LABEL_BYTES_MAX)),
            200,
            now,
        );
        // `other` has its two, three kinds of failure and deliveries.
        let of_other = 2 + 1 + 4;
        assert_eq!(shown(&labels), of_other + 2 * 3);
    }

    #[test]
    fn a_label_gives_way_when_it_was_unused_for_an_hour_and_another_wants_it() {
        let now = Instant::now();
        let labels = labels(2, now);
        for path in ["/a", "/b"] {
            attempt(&labels, path, 200, now);
            attempt(&labels, path, 503, now);
        }
        let before = shown(&labels);
        let later = now + hours(1) - Duration::from_secs(1);
        labels.of("/b", later).requests.inc();
        attempt(&labels, "/c", 200, later);
        assert_eq!(labels.of("/c", later).label, OTHER);
        let stale = labels.of("/a", now);
        let at = now + hours(1);
        attempt(&labels, "/c", 404, at);
        assert_eq!(labels.of("/c", at).label, OTHER, "not delivered");
        attempt(&labels, "/c", 200, at);
        assert_eq!(labels.of("/c", at).label, "/c");
        assert_eq!(labels.of("/a", at).label, OTHER);
        assert_eq!(labels.of("/b", at).label, "/b");
        // Who has still the old one brings nothing back.
        stale.observe_attempt(&answered(502), Duration::ZERO);
        stale.requests.inc();
        attempt(&labels, "/c", 503, at);
        assert_eq!(shown(&labels), before + 1, "404 of other");
        // It may come back, from nothing.
        let much_later = at + hours(2);
        attempt(&labels, "/a", 200, much_later);
        assert_eq!(labels.of("/a", much_later).label, "/a");
        assert_eq!(labels.of("/a", much_later).requests.get(), 0);
    }

    #[test]
    fn labels_stay_bounded_however_many_paths_are_delivered() {
        let mut now = Instant::now();
        let labels = labels(5, now);
        for number in 0..2000 {
            attempt(&labels, &format!("/{number}"), 200, now);
            attempt(&labels, &format!("/{number}"), 500, now);
            now += Duration::from_secs(60);
        }
        assert_eq!(labels.known.read().unwrap().len(), 5);
        assert!(shown(&labels) <= 6 * 4, "{}", shown(&labels));
    }

    #[test]
    fn nothing_invisible_becomes_a_label() {
        let now = Instant::now();
        let labels = labels(9, now);
        for (path, label) in [
            ("/a\u{9b}2J", "/a\\u{9b}2J"),
            ("/a\u{202e}b", "/a\\u{202e}b"),
            ("/\u{3164}", "/\\u{3164}"),
            ("/caf\u{e9}\\\"'", "/caf\u{e9}\\\"'"),
        ] {
            attempt(&labels, path, 200, now);
            assert_eq!(labels.of(path, now).label, label);
        }
        // It would count with the first, and take it away when it goes.
        attempt(&labels, "/a\\u{9b}2J", 200, now);
        assert_eq!(labels.of("/a\\u{9b}2J", now).label, OTHER);
    }

    #[test]
    fn without_labels_all_is_other() {
        let now = Instant::now();
        let labels = labels(0, now);
        attempt(&labels, "/a", 200, now);
        assert_eq!(labels.of("/a", now).label, OTHER);
    }
}
