//! The registry: the one place for metric names, labels and buckets.
//!
//! The rest of the program reports events through the fields here. They add up:
//! accepted (direct + stored) = delivered + waiting + leased + spooled + in flight + dead + purged +
//! lost, counted from an empty queue; without a spool, late commits come on top of what was accepted.

mod paths;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

pub use paths::PathMetrics;

use crate::logger;
use crate::queue::Sample;
use crate::settle::Outcome;
use crate::trend::{Moment, Trend};
use paths::{PathLabels, Vecs};

const ANSWER_BUCKETS: [f64; 11] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0,
];
/// Fine where the answers are that waited for nothing.
const ADMISSION_BUCKETS: [f64; 13] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0,
];
const DELIVERY_BUCKETS: [f64; 13] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];
const BATCH_BUCKETS: [f64; 9] = [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0];

/// All metrics of one running program.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    paths: PathLabels,
    pub admitted_direct: IntCounter,
    pub admitted_stored: IntCounter,
    pub answer_direct_seconds: Histogram,
    pub answer_stored_seconds: Histogram,
    pub refused: Refusals,
    pub attempts_delivered: IntCounter,
    pub attempts_later: IntCounter,
    pub attempts_buried: IntCounter,
    pub delivered: IntCounter,
    pub stale: IntCounter,
    pub unreadable: IntCounter,
    pub dead_letters_purged: IntCounter,
    pub late_commits: IntCounter,
    pub lost_shutdown: IntCounter,
    pub lost_refused: IntCounter,
    pub in_flight: IntGauge,
    pub breaker: Breaker,
    pub spool: Spool,
    pub held_bytes: IntGauge,
    pub store_up: IntGauge,
    pub store_errors: IntCounter,
    pub busy_intake: IntGauge,
    pub busy_proxy: IntGauge,
    pub busy_queue: IntGauge,
    pub batch_append: Histogram,
    pub batch_claim: Histogram,
    pub batch_settle: Histogram,
    /// As far as it is known here: see [`logger::dropped`].
    log_dropped: Mutex<IntCounter>,
    reloads: Reloads,
    rows: RowGauges,
    trend: Mutex<Trend>,
}

/// Requests refused, by reason.
#[derive(Debug)]
pub struct Refusals {
    total: IntCounter,
    pub invalid: IntCounter,
    pub too_large: IntCounter,
    pub timeout: IntCounter,
    pub overloaded: IntCounter,
    pub queue_full: IntCounter,
    pub looped: IntCounter,
    pub unstorable: IntCounter,
}

impl Refusals {
    /// Counts one refusal for one of the reasons here.
    pub fn count(&self, reason: &IntCounter) {
        self.total.inc();
        reason.inc();
    }
}

/// Settings that were read anew.
#[derive(Debug)]
pub struct Reloads {
    succeeded: IntCounter,
    failed: IntCounter,
    is_last_good: IntGauge,
    failure: Mutex<Option<ReloadFailure>>,
}

/// Why settings were not reloaded.
#[derive(Debug, Clone)]
pub struct ReloadFailure {
    pub error: String,
    pub at: Instant,
}

impl Reloads {
    pub fn succeeded(&self) {
        self.is_last_good.set(1);
        self.set(None);
        // Last: who sees the count sees how it ended.
        self.succeeded.inc();
    }

    pub fn failed(&self, error: &str) {
        self.is_last_good.set(0);
        self.set(Some(ReloadFailure {
            error: error.to_owned(),
            at: Instant::now(),
        }));
        self.failed.inc();
    }

    /// All of them, failed ones included.
    pub fn count(&self) -> u64 {
        self.succeeded.get() + self.failed.get()
    }

    /// The last one, if none has succeeded since.
    pub fn failure(&self) -> Option<ReloadFailure> {
        let failure = self.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, failure: Option<ReloadFailure>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }
}

/// The file beside Postgres.
#[derive(Debug)]
pub struct Spool {
    pub rows: IntGauge,
    pub spooled: IntCounter,
    pub moved: IntCounter,
}

/// The destination's breaker.
#[derive(Debug)]
pub struct Breaker {
    pub open: IntGauge,
    pub opened: IntCounter,
}

#[derive(Debug)]
struct RowGauges {
    total: IntGauge,
    waiting: IntGauge,
    leased: IntGauge,
    dead: IntGauge,
    oldest: Gauge,
    max: IntGauge,
    paused: IntGauge,
}

impl Metrics {
    /// # Errors
    /// The registry's, if two metrics had one name.
    pub fn new(paths_max: usize) -> Result<Metrics, prometheus::Error> {
        let make = Make(Registry::new());
        let [admitted_direct, admitted_stored, total] = make.counters_by(
            "asyncproxy_requests_total",
            "Requests by how they were admitted.",
            ("admission", ["direct", "stored", "refused"]),
        )?;
        let [answer_direct_seconds, answer_stored_seconds] = make.answers()?;
        let [attempts_delivered, attempts_later, attempts_buried] = make.attempts()?;
        let [lost_shutdown, lost_refused] = make.lost()?;
        let [busy_intake, busy_proxy, busy_queue] = make.busy()?;
        let [batch_append, batch_claim, batch_settle] = make.batches()?;
        Ok(Metrics {
            paths: make.path_labels(paths_max)?,
            admitted_direct,
            admitted_stored,
            answer_direct_seconds,
            answer_stored_seconds,
            refused: make.refusals(total)?,
            attempts_delivered,
            attempts_later,
            attempts_buried,
            delivered: make.counter(
                "asyncproxy_delivered_total",
                "Requests delivered and, if they were stored, deleted from the store.",
            )?,
            stale: make.counter(
                "asyncproxy_stale_settlements_total",
                "Settlements of a lease that was over: the request may have been sent twice.",
            )?,
            late_commits: make.counter(
                "asyncproxy_late_commits_total",
                "Rows committed when their request had been sent or refused for want of an answer.",
            )?,
            unreadable: make.counter(
                "asyncproxy_unreadable_rows_total",
                "Rows moved to the dead letters because they could not be read.",
            )?,
            dead_letters_purged: make.counter(
                "asyncproxy_dead_letters_purged_total",
                "Dead letters deleted because they were older than queue.dead_retention.",
            )?,
            lost_shutdown,
            lost_refused,
            in_flight: make.gauge(
                "asyncproxy_in_flight",
                "Requests accepted that are held in memory only.",
            )?,
            breaker: make.breaker()?,
            spool: make.spool()?,
            held_bytes: make.gauge("asyncproxy_held_bytes", "Bytes of requests held in memory.")?,
            store_up: make.gauge("asyncproxy_store_up", "1 while the store works, else 0.")?,
            store_errors: make.counter(
                "asyncproxy_store_errors_total",
                "Store operations that failed.",
            )?,
            busy_intake,
            busy_proxy,
            busy_queue,
            batch_append,
            batch_claim,
            batch_settle,
            log_dropped: make.log_dropped()?,
            reloads: make.reloads()?,
            rows: make.rows()?,
            trend: Mutex::default(),
            registry: make.0,
        })
    }

    /// How many attempts there were so far, however they ended.
    pub fn attempts_made(&self) -> u64 {
        let ended = [
            &self.attempts_delivered,
            &self.attempts_later,
            &self.attempts_buried,
        ];
        ended.iter().map(|counter| counter.get()).sum()
    }

    /// The metrics of a path (without its query).
    pub fn path(&self, path: &str, now: Instant) -> Arc<PathMetrics> {
        self.paths.of(path, now)
    }

    /// Records how long an attempt took that began then, and how it ended.
    pub fn observe_attempt(&self, path: &str, outcome: &Outcome, started: Instant) {
        let took = started.elapsed();
        self.paths
            .observe_attempt(path, outcome, took, started + took);
    }

    pub fn reloads(&self) -> &Reloads {
        &self.reloads
    }

    /// Shows how many rows there may be.
    pub fn set_rows_max(&self, rows_max: u64) {
        let rows_max = i64::try_from(rows_max).unwrap_or(i64::MAX);
        self.rows.max.set(rows_max);
    }

    /// Shows whether an operator has paused the queue.
    pub fn set_paused(&self, is_paused: bool) {
        self.rows.paused.set(i64::from(is_paused));
    }

    /// Takes over a count of the rows.
    pub fn sampled(&self, sample: &Sample) {
        let rows = &self.rows;
        let set =
            |gauge: &IntGauge, count: u64| gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        set(&rows.total, sample.waiting + sample.leased);
        set(&rows.waiting, sample.waiting);
        set(&rows.leased, sample.leased);
        set(&rows.dead, sample.dead);
        rows.oldest
            .set(sample.oldest.unwrap_or_default().as_secs_f64());
        let moment = Moment {
            at: Instant::now(),
            received: self.admitted_direct.get() + self.admitted_stored.get(),
            queued: self.rows_appended(),
            delivered: self.delivered.get(),
            rows: sample.waiting + sample.leased,
        };
        let mut trend = self.trend.lock().unwrap_or_else(PoisonError::into_inner);
        trend.add(sample, moment);
    }

    /// What the counts of the last half minute show.
    pub fn trend(&self) -> Trend {
        let trend = self.trend.lock().unwrap_or_else(PoisonError::into_inner);
        trend.clone()
    }

    fn rows_appended(&self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a sum of counts"
        )]
        let rows = self.batch_append.get_sample_sum() as u64;
        rows
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// The encoder's.
    pub fn encode(&self) -> Result<Vec<u8>, prometheus::Error> {
        let log_dropped = &self.log_dropped;
        let log_dropped = log_dropped.lock().unwrap_or_else(PoisonError::into_inner);
        log_dropped.inc_by(logger::dropped().saturating_sub(log_dropped.get()));
        drop(log_dropped);
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Makes and registers metrics.
struct Make(Registry);

impl Make {
    fn register<M: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: M,
    ) -> Result<M, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.register(IntCounter::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(Opts::new(name, help), &[label])?)
    }

    /// One counter for each value of a label.
    fn counters_by<const N: usize>(
        &self,
        name: &str,
        help: &str,
        (label, values): (&str, [&str; N]),
    ) -> Result<[IntCounter; N], prometheus::Error> {
        let counters = self.counters(name, help, label)?;
        Ok(values.map(|value| counters.with_label_values(&[value])))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.register(IntGauge::new(name, help)?)
    }

    /// One gauge for each value of a label.
    fn gauges_by<const N: usize>(
        &self,
        name: &str,
        help: &str,
        (label, values): (&str, [&str; N]),
    ) -> Result<[IntGauge; N], prometheus::Error> {
        let gauges = self.register(IntGaugeVec::new(Opts::new(name, help), &[label])?)?;
        Ok(values.map(|value| gauges.with_label_values(&[value])))
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(HistogramVec::new(opts, labels)?)
    }

    /// The Go program's metrics by path, with its names and labels.
    fn path_labels(&self, paths_max: usize) -> Result<PathLabels, prometheus::Error> {
        let requests = self.counters("http_requests_total", "Number of requests.", "path")?;
        let answer_seconds = self.histograms(
            "http_response_time_seconds",
            "Response time.",
            &["path"],
            &ANSWER_BUCKETS,
        )?;
        let delivery = self.histograms(
            "http_proxy_response_time_seconds",
            "Proxy request response time.",
            &["path", "status"],
            &DELIVERY_BUCKETS,
        )?;
        let vecs = Vecs {
            requests,
            answer_seconds,
            delivery,
        };
        Ok(PathLabels::new(vecs, paths_max, Instant::now()))
    }

    fn attempts(&self) -> Result<[IntCounter; 3], prometheus::Error> {
        self.counters_by(
            "asyncproxy_attempts_total",
            "Attempts to deliver by what they led to.",
            ("outcome", ["delivered", "later", "buried"]),
        )
    }

    fn answers(&self) -> Result<[Histogram; 2], prometheus::Error> {
        let answers = self.histograms(
            "asyncproxy_answer_seconds",
            "Response time of accepted requests, by how they were admitted.",
            &["admission"],
            &ADMISSION_BUCKETS,
        )?;
        Ok(["direct", "stored"].map(|admission| answers.with_label_values(&[admission])))
    }

    fn busy(&self) -> Result<[IntGauge; 3], prometheus::Error> {
        self.gauges_by(
            "asyncproxy_threads_busy",
            "Threads at work, by pool.",
            ("pool", ["intake", "proxy", "queue"]),
        )
    }

    fn breaker(&self) -> Result<Breaker, prometheus::Error> {
        Ok(Breaker {
            open: self.gauge(
                "asyncproxy_breaker_open",
                "1 while the destination is taken to be down and only probes are sent.",
            )?,
            opened: self.counter(
                "asyncproxy_breaker_opened_total",
                "Times the destination was found to be down.",
            )?,
        })
    }

    fn spool(&self) -> Result<Spool, prometheus::Error> {
        Ok(Spool {
            rows: self.gauge(
                "asyncproxy_spool_rows",
                "Requests in the spool, to be moved to Postgres.",
            )?,
            spooled: self.counter("asyncproxy_spooled_total", "Requests put into the spool.")?,
            moved: self.counter(
                "asyncproxy_spool_moved_total",
                "Requests moved from the spool to Postgres.",
            )?,
        })
    }

    fn lost(&self) -> Result<[IntCounter; 2], prometheus::Error> {
        self.counters_by(
            "asyncproxy_lost_total",
            "Acknowledged requests that are gone, by reason.",
            ("reason", ["shutdown", "refused"]),
        )
    }

    fn refusals(&self, total: IntCounter) -> Result<Refusals, prometheus::Error> {
        let [
            invalid,
            too_large,
            timeout,
            overloaded,
            queue_full,
            looped,
            unstorable,
        ] = self.counters_by(
            "asyncproxy_refused_total",
            "Requests answered with an error, by reason.",
            (
                "reason",
                [
                    "invalid",
                    "too_large",
                    "timeout",
                    "overloaded",
                    "queue_full",
                    "loop",
                    "unstorable",
                ],
            ),
        )?;
        Ok(Refusals {
            total,
            invalid,
            too_large,
            timeout,
            overloaded,
            queue_full,
            looped,
            unstorable,
        })
    }

    fn batches(&self) -> Result<[Histogram; 3], prometheus::Error> {
        let batches = self.histograms(
            "asyncproxy_batch_rows",
            "Rows in one store operation.",
            &["op"],
            &BATCH_BUCKETS,
        )?;
        Ok(["append", "claim", "settle"].map(|op| batches.with_label_values(&[op])))
    }

    fn log_dropped(&self) -> Result<Mutex<IntCounter>, prometheus::Error> {
        let counter = self.counter(
            "asyncproxy_log_dropped_total",
            "Log lines that were not written, because nobody read them or because of an error.",
        )?;
        Ok(Mutex::new(counter))
    }

    fn reloads(&self) -> Result<Reloads, prometheus::Error> {
        let [succeeded, failed] = self.counters_by(
            "asyncproxy_config_reloads_total",
            "Settings read anew on SIGHUP, by result.",
            ("result", ["ok", "failed"]),
        )?;
        let is_last_good = self.gauge(
            "asyncproxy_config_last_reload_successful",
            "1 unless the last reload of the settings failed.",
        )?;
        is_last_good.set(1);
        Ok(Reloads {
            succeeded,
            failed,
            is_last_good,
            failure: Mutex::default(),
        })
    }

    fn rows(&self) -> Result<RowGauges, prometheus::Error> {
        let [waiting, leased, dead] = self.gauges_by(
            "asyncproxy_queue_rows",
            "Rows in the store when last counted, by state.",
            ("state", ["waiting", "leased", "dead"]),
        )?;
        let oldest = Gauge::new(
            "asyncproxy_queue_oldest_age_seconds",
            "Time since receipt of the oldest row that is not dead, when last counted.",
        )?;
        Ok(RowGauges {
            total: self.gauge("queue_total_size", "Number of all requests in the queue.")?,
            waiting,
            leased,
            dead,
            oldest: self.register(oldest)?,
            max: self.gauge(
                "asyncproxy_queue_rows_max",
                "Rows that may wait or be leased (queue.max_rows); 0: no limit.",
            )?,
            paused: self.gauge(
                "asyncproxy_queue_paused",
                "1 while an operator has paused the queue, else 0.",
            )?,
        })
    }
}

/// Counts one thread as busy while it lives.
#[derive(Debug)]
pub struct Busy<'a>(&'a IntGauge);

impl<'a> Busy<'a> {
    pub fn new(gauge: &'a IntGauge) -> Busy<'a> {
        gauge.inc();
        Busy(gauge)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics) -> String {
        String::from_utf8(metrics.encode().unwrap()).unwrap()
    }

    fn answered(status: u16) -> Outcome {
        Outcome::Answered {
            status,
            retry_after: None,
        }
    }

    #[test]
    fn paths_are_capped_and_the_rest_is_other() {
        let metrics = Metrics::new(2).unwrap();
        let now = Instant::now();
        for path in ["/a", "/b", "/c", "/a", &"/d".repeat(200)] {
            metrics.observe_attempt(path, &answered(200), now);
            metrics.path(path, now).requests.inc();
        }
        let text = text(&metrics);
        assert!(text.contains("http_requests_total{path=\"/a\"} 2"));
        assert!(text.contains("http_requests_total{path=\"/b\"} 1"));
        assert!(text.contains("http_requests_total{path=\"other\"} 2"));
        assert!(!text.contains("/c"));
    }

    #[test]
    fn a_hostile_path_cannot_forge_a_metric_or_steer_a_terminal() {
        let metrics = Metrics::new(2).unwrap();
        let hostile = "/\"} 1\nforged 1\n\u{9b}2J\u{202e}\u{7f}";
        metrics.observe_attempt(hostile, &answered(200), Instant::now());
        let text = text(&metrics);
        assert!(!text.lines().any(|line| line.starts_with("forged")));
        assert!(text.contains("forged 1"), "{text}");
        let is_plain = |c: char| c == '\n' || c.is_ascii_graphic() || c == ' ';
        assert!(text.chars().all(is_plain), "{text}");
    }

    #[test]
    fn attempts_carry_the_go_programs_status_labels() {
        let metrics = Metrics::new(2).unwrap();
        for outcome in [
            answered(204),
            answered(503),
            answered(999),
            Outcome::Unreachable("refused".into()),
        ] {
            metrics.observe_attempt("/a", &outcome, Instant::now());
        }
        for status in ["OK", "response 503", "response other", "request error"] {
            let line = format!(
                "http_proxy_response_time_seconds_count{{path=\"/a\",status=\"{status}\"}} 1"
            );
            assert!(text(&metrics).contains(&line), "{status}");
        }
    }
}
