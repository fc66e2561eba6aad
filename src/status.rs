//! What the program is at, in one picture: for `/status` on the control port, and for whoever
//! shows it. Reads only.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::breaker::Destination;
use crate::clock::Clock;
use crate::config::RateScope;
use crate::metrics::Metrics;
use crate::queue::Store;
use crate::queue::health::StoreHealth;
use crate::queue::identity::Identity;
use crate::queue::spool::Spool;

/// Knows where to look.
#[derive(Debug)]
pub struct Status {
    pub metrics: Arc<Metrics>,
    pub store: Arc<dyn Store>,
    pub health: Arc<StoreHealth>,
    pub clock: Arc<Clock>,
    pub destination: Arc<Destination>,
    pub spool: Option<Arc<Spool>>,
    pub per_second: Arc<AtomicU32>,
    pub rate_scope: RateScope,
    pub started: Instant,
    /// Which store it is.
    pub identity: Identity,
    /// The file that the settings are from.
    pub settings: Option<PathBuf>,
}

impl Status {
    /// All of it, as JSON.
    pub fn to_json(&self, is_draining: bool) -> Value {
        let trend = self.metrics.trend();
        let (sample, rates) = (trend.sample(), trend.rates());
        let seconds = |duration: Duration| (duration.as_secs_f64() * 1000.0).round() / 1000.0;
        let per_second = |rate: f64| (rate * 10.0).round() / 10.0;
        let fault = self.destination.fault();
        let breaker = self.destination.name();
        let mut store = self.identity.to_json(self.store.instance());
        store["fault"] = json!(self.health.fault().map(|fault| fault.to_string()));
        store["shortage"] = json!(self.store.shortage());
        store["other_process"] = json!(self.other_process());
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "state": if is_draining { "draining" } else { "running" },
            "uptime_seconds": seconds(self.started.elapsed()),
            "requests": {
                "received_per_second": per_second(rates.received),
                "delivered_per_second": per_second(rates.delivered),
                "in_flight": self.metrics.in_flight.get(),
            },
            "queue": {
                "waiting": sample.waiting,
                "paused": self.destination.is_paused(),
                "leased": sample.leased,
                "dead": sample.dead,
                "oldest_seconds": sample.oldest.map(seconds),
                "arriving_per_second": per_second(rates.arriving),
                "leaving_per_second": per_second(rates.leaving),
                "empty_in_seconds": rates.empty_in.map(seconds),
                "counted_seconds_ago": trend.counted_at().map(|at| seconds(at.elapsed())),
                "rate_per_second": self.per_second.load(Ordering::Relaxed),
                "rate_scope": match self.rate_scope {
                    RateScope::Instance => "instance",
                    RateScope::Cluster => "cluster",
                },
            },
            "destination": { "breaker": breaker, "fault": fault },
            "pid": std::process::id(),
            "settings": self.settings,
            "store": store,
            // What the system's clock was set by last, if it was.
            "clock": self.clock.jump().map(|jump| json!({
                "set_by_seconds": jump.by_seconds(),
                "seconds_ago": seconds(jump.at.elapsed()),
            })),
            "reloads": self.metrics.reloads().count(),
            // Until one succeeds.
            "failed_reload": self.metrics.reloads().failure().map(|failure| json!({
                "error": failure.error,
                "seconds_ago": seconds(failure.at.elapsed()),
            })),
            "spool": self.spool.is_some().then(|| json!({ "rows": self.metrics.spool.rows.get() })),
        })
    }

    /// Which other process serves a file of ours, too, if one does.
    fn other_process(&self) -> Option<String> {
        let of_spool = || self.spool.as_ref().and_then(|spool| spool.other_process());
        self.store.other_process().or_else(of_spool)
    }

    /// Requests in memory that are on their way, leased ones included.
    pub fn being_sent(&self) -> i64 {
        let metrics = &self.metrics;
        metrics.in_flight.get() + metrics.busy_queue.get()
    }

    /// One line for people: rates, queue and what is wrong, if anything is.
    pub fn to_line(&self) -> String {
        let trend = self.metrics.trend();
        let (sample, rates) = (trend.sample(), trend.rates());
        let mut line = format!(
            "{:.1} received/s, {:.1} delivered/s, {} waiting",
            rates.received,
            rates.delivered,
            sample.waiting + sample.leased,
        );
        if let Some(oldest) = sample.oldest {
            line += &format!(", oldest {}", about(oldest));
        }
        if let Some(empty_in) = rates.empty_in {
            line += &format!(", empty in about {}", about(empty_in));
        }
        if self.destination.is_paused() {
            line += "; the queue is paused";
        }
        if let Some(fault) = self.destination.fault() {
            line += &format!("; destination is down: {fault}");
        }
        if let Some(fault) = self.health.fault() {
            line += &format!("; {fault}");
        }
        if let Some(shortage) = self.store.shortage() {
            line += &format!("; {shortage}");
        }
        if let Some(failure) = self.metrics.reloads().failure() {
            let ago = about(failure.at.elapsed());
            line += &format!(
                "; the reload {ago} ago failed, settings are as they were: {}",
                failure.error
            );
        }
        if let Some(other) = self.other_process() {
            line += &format!("; {other}");
        }
        if let Some(jump) = self.clock.jump() {
            let ago = about(jump.at.elapsed());
            line += &format!("; the clock was {} {ago} ago", jump.describe());
        }
        line
    }
}

/// A duration in the largest unit that fits, for people: `4 s`, `17 min`, `3 h`, `2 d`.
pub fn about(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", (seconds + 30) / 60),
        7_200..172_800 => format!("{} h", (seconds + 1_800) / 3_600),
        _ => format!("{} d", (seconds + 43_200) / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_told_in_the_unit_that_fits() {
        for (seconds, text) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (1000, "17 min"),
            (7_200, "2 h"),
            (172_800, "2 d"),
        ] {
            assert_eq!(about(Duration::from_secs(seconds)), text);
        }
    }
}
