//! The control port: metrics for Prometheus, `/healthz`, `/readyz` and `/status`.

pub mod ask;

use std::sync::Arc;
use std::time::Instant;

use crate::breaker::Destination;
use crate::budget::{Budget, Permit};
use crate::intake::builtin::{Received, Service};
use crate::intake::{Answer, Intake};
use crate::metrics::Metrics;
use crate::printable;
use crate::progress::Progress;
use crate::queue::health::StoreHealth;
use crate::request::path_of;
use crate::status::Status;

/// Most connections at once. Those that have sent no whole request give way to others.
pub const CONNECTIONS_MAX: usize = 64;
/// The name of its socket in the directory that systemd gives a service at run time
/// (`RuntimeDirectory=`): there the commands find a service without knowing its settings.
pub const SOCKET: &str = "control.sock";
/// Most threads: enough for some scrapers at once. Health is told without one.
const THREADS_MAX: usize = 32;

/// Answers on the control port.
#[derive(Debug)]
pub struct Control {
    pub metrics_path: String,
    pub metrics: Arc<Metrics>,
    pub health: Arc<StoreHealth>,
    pub destination: Arc<Destination>,
    pub intake: Arc<Intake>,
    pub status: Arc<Status>,
    pub progress: Arc<Progress>,
    pub budget: Arc<Budget>,
}

impl Service for Control {
    fn body_bytes_max(&self) -> usize {
        0
    }

    fn permit(&self) -> Permit {
        self.budget.permit()
    }

    fn threads_max(&self) -> Option<usize> {
        Some(THREADS_MAX)
    }

    fn serve(&self, received: Received<'_>) -> Answer {
        let path = path_of(received.head.target);
        match self.at_once(received.head.method, path) {
            Some(answer) => answer,
            None if path == "/status" => self.status(),
            None => self.metrics(),
        }
    }

    fn is_quick(&self) -> bool {
        true
    }

    /// By the front, whatever else is asked for: an orchestrator that gets no answer here kills the
    /// program.
    fn serve_quickly(&self, received: Received<'_>) -> Option<Answer> {
        self.at_once(received.head.method, path_of(received.head.target))
    }

    fn refuse(&self, answer: Answer) -> Answer {
        answer
    }

    /// The last to be closed: asked until the end.
    fn is_draining(&self) -> bool {
        false
    }
}

/// In which what others say is nothing but text.
fn page(status: u16, text: impl Into<String>) -> Answer {
    let text = printable::text(text.into().as_bytes());
    Answer::Page(status, text.into_bytes())
}

impl Control {
    /// What is told from a few values in memory; nothing of it waits for anybody. `None`: all else.
    fn at_once(&self, method: &str, path: &str) -> Option<Answer> {
        if !matches!(method, "GET" | "HEAD") {
            return Some(page(405, "only GET and HEAD\n"));
        }
        Some(match path {
            "/healthz" => match self.progress.stuck(Instant::now()) {
                None => page(200, "ok\n"),
                Some(stuck) => page(503, format!("{stuck}\n")),
            },
            "/readyz" => self.readiness(),
            "/status" => return None,
            path if path == self.metrics_path => return None,
            _ => page(404, "not found\n"),
        })
    }

    fn metrics(&self) -> Answer {
        let held_bytes = self.intake.budget.held_bytes();
        self.metrics
            .held_bytes
            .set(i64::try_from(held_bytes).unwrap_or(i64::MAX));
        match self.metrics.encode() {
            Ok(text) => Answer::Page(200, text),
            Err(error) => page(500, format!("{error}\n")),
        }
    }

    fn status(&self) -> Answer {
        let status = self.status.to_json(self.intake.is_draining());
        Answer::Json(format!("{}\n", printable::json(&status)))
    }

    /// Whether requests can be taken, and all that stands in the way, a line each.
    fn readiness(&self) -> Answer {
        let (is_ready, hindrances) = self.hindrances();
        let text = hindrances.join("\nand ");
        match (is_ready, text.as_str()) {
            (true, "") => page(200, "ok\n"),
            (true, text) => page(200, format!("ok, but {text}\n")),
            (false, text) => page(503, format!("{text}\n")),
        }
    }

    fn hindrances(&self) -> (bool, Vec<String>) {
        let admission = &self.intake.admission;
        let (fault, shortage) = (self.health.fault(), admission.shortage());
        let is_stored = shortage.is_none() && (fault.is_none() || admission.has_spool());
        // What finds no room for its row is refused; what finds no store goes direct instead.
        let is_sent =
            admission.has_direct_room() && (shortage.is_none() || !admission.stores_all());
        let is_draining = self.intake.is_draining();
        let mut hindrances = Vec::new();
        if is_draining {
            hindrances.push("shutting down".to_owned());
        }
        if let Some(fault) = fault {
            hindrances.push(match (is_stored, is_sent) {
                (true, _) => format!("requests go to the spool: {fault}"),
                (false, true) => format!("nothing can be stored: {fault}"),
                (false, false) => fault.to_string(),
            });
        }
        if let Some(shortage) = shortage {
            hindrances.push(match is_sent {
                true => format!("nothing more is stored: {shortage}"),
                false => shortage,
            });
        }
        hindrances.extend(admission.other_process());
        let destination = &self.destination;
        let fault = destination.fault();
        hindrances.extend(fault.map(|fault| format!("the destination is down: {fault}")));
        if destination.is_paused() {
            hindrances.push("the queue is paused".to_owned());
        }
        (!is_draining && (is_stored || is_sent), hindrances)
    }
}
