//! The control port: metrics for Prometheus, `/healthz`, `/readyz` and `/status`.

pub mod ask;

use std::sync::Arc;
use std::time::Instant;

use crate::breaker::Destination;
use crate::budget::{Budget, Permit};
use crate::intake::builtin::{Received, Service};
use crate::intake::{Answer, Intake};
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::queue::health::StoreHealth;
use crate::status::Status;

/// Enough for some scrapers and health checks at once.
pub const CONNECTIONS_MAX: usize = 16;

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

    fn serve(&self, received: Received<'_>) -> Answer {
        if !matches!(received.head.method, "GET" | "HEAD") {
            return page(405, "only GET and HEAD\n");
        }
        match received.head.target.split('?').next().unwrap_or("") {
            "/healthz" => match self.progress.stuck(Instant::now()) {
                None => page(200, "ok\n"),
                Some(stuck) => page(503, format!("{stuck}\n")),
            },
            "/readyz" => self.readiness(),
            "/status" => self.status(),
            path if path == self.metrics_path => self.metrics(),
            _ => page(404, "not found\n"),
        }
    }

    fn refuse(&self, answer: Answer) -> Answer {
        answer
    }

    /// The last to be closed: asked until the end.
    fn is_draining(&self) -> bool {
        false
    }
}

fn page(status: u16, text: impl Into<String>) -> Answer {
    Answer::Page(status, text.into().into_bytes())
}

impl Control {
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
        Answer::Json(format!(
            "{}\n",
            self.status.to_json(self.intake.is_draining())
        ))
    }

    /// Whether requests can be taken, and what stands in the way.
    fn readiness(&self) -> Answer {
        if self.intake.is_draining() {
            return page(503, "shutting down\n");
        }
        let admission = &self.intake.admission;
        let Some(fault) = self.health.fault() else {
            if let Some(shortage) = admission.shortage() {
                return match admission.has_direct_room() && !admission.stores_all() {
                    true => page(200, format!("ok, but nothing more is stored: {shortage}\n")),
                    false => page(503, format!("{shortage}\n")),
                };
            }
            return match self.destination.fault() {
                None if self.destination.is_paused() => page(200, "ok, but the queue is paused\n"),
                None => page(200, "ok\n"),
                Some(fault) => page(200, format!("ok, but the destination is down: {fault}\n")),
            };
        };
        if admission.has_spool() && admission.shortage().is_none() {
            page(200, format!("ok, but requests go to the spool: {fault}\n"))
        } else if admission.has_direct_room() {
            page(200, format!("ok, but nothing can be stored: {fault}\n"))
        } else {
            page(503, format!("{fault}\n"))
        }
    }
}
