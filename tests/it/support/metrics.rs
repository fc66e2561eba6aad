//! The program's metrics, read as Prometheus would.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use super::http;
use super::proxy::{PATIENCE, Proxy};

/// Samples by `name{labels}`, as written.
#[derive(Debug, Clone)]
pub struct Metrics(BTreeMap<String, f64>);

/// Where an accepted request can be. They must add up to what was accepted.
const WHEREABOUTS: [&str; 9] = [
    "asyncproxy_delivered_total",
    "asyncproxy_queue_rows{state=\"waiting\"}",
    "asyncproxy_queue_rows{state=\"leased\"}",
    "asyncproxy_spool_rows",
    "asyncproxy_in_flight",
    "asyncproxy_queue_rows{state=\"dead\"}",
    "asyncproxy_dead_letters_purged_total",
    "asyncproxy_lost_total{reason=\"shutdown\"}",
    "asyncproxy_lost_total{reason=\"refused\"}",
];

impl Metrics {
    pub fn scrape(control: SocketAddr) -> Metrics {
        let answer = http::get(control, "/metrics");
        assert_eq!(answer.status, 200);
        Metrics::parse(&answer.text())
    }

    pub fn parse(text: &str) -> Metrics {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        Metrics(
            samples
                .filter_map(|line| {
                    let (name, value) = line.rsplit_once(' ')?;
                    Some((name.to_owned(), value.parse().expect("sample value")))
                })
                .collect(),
        )
    }

    /// The sample of this name and labels; 0 if there is none.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// All samples of `name`, whatever their labels.
    pub fn sum(&self, name: &str) -> f64 {
        let labelled = format!("{name}{{");
        let of_name = |key: &str| key == name || key.starts_with(&labelled);
        let matching = self.0.iter().filter(|(key, _)| of_name(key));
        matching.map(|(_, value)| value).sum()
    }

    pub fn accepted(&self) -> f64 {
        self.get("asyncproxy_requests_total{admission=\"direct\"}")
            + self.get("asyncproxy_requests_total{admission=\"stored\"}")
    }

    pub fn rows(&self, state: &str) -> f64 {
        self.get(&format!("asyncproxy_queue_rows{{state=\"{state}\"}}"))
    }

    pub fn attempts(&self, outcome: &str) -> f64 {
        self.get(&format!(
            "asyncproxy_attempts_total{{outcome=\"{outcome}\"}}"
        ))
    }

    pub fn refused(&self, reason: &str) -> f64 {
        self.get(&format!("asyncproxy_refused_total{{reason=\"{reason}\"}}"))
    }

    fn accounted_for(&self) -> f64 {
        WHEREABOUTS.iter().map(|name| self.get(name)).sum()
    }

    pub fn is_balanced(&self) -> bool {
        (self.accepted() - self.accounted_for()).abs() < 0.5
    }

    /// Everything accepted is delivered, waiting, leased, in flight, dead, purged or lost; holds for
    /// a program whose queue was empty at its start.
    pub fn assert_balance(&self) {
        let places = WHEREABOUTS.map(|name| format!("{name} {}", self.get(name)));
        assert!(
            self.is_balanced(),
            "accepted {}, but {places:?}",
            self.accepted()
        );
    }
}

/// Scrapes until `reached`; `what` names it on failure.
pub fn wait_for(proxy: &Proxy, what: &str, reached: impl Fn(&Metrics) -> bool) -> Metrics {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = proxy.metrics();
        if reached(&metrics) {
            return metrics;
        }
        assert!(
            Instant::now() < deadline,
            "waited for {what}; {:#?}",
            metrics.0
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until nothing is on its way any more, and checks the balance of `accepted` requests.
pub fn assert_settled(proxy: &Proxy, accepted: usize) -> Metrics {
    // The rows are sampled, so they lag behind the counters.
    let metrics = wait_for(proxy, "a balance with nothing on its way", |metrics| {
        let on_its_way = metrics.rows("waiting")
            + metrics.rows("leased")
            + metrics.get("asyncproxy_spool_rows")
            + metrics.get("asyncproxy_in_flight");
        on_its_way < 0.5 && metrics.is_balanced()
    });
    metrics.assert_balance();
    assert_eq!(metrics.accepted(), accepted as f64);
    metrics
}
