//! The control port: metrics for Prometheus, `/healthz` and `/readyz`.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use ::tiny_http::{Header, Method, Response, Server};

use crate::intake::Intake;
use crate::metrics::Metrics;
use crate::queue::health::StoreHealth;

/// Enough for a scraper and a health check at once.
pub const THREADS: usize = 2;

/// Answers on the control port.
pub struct Control {
    server: Server,
    pub metrics_path: String,
    pub metrics: Arc<Metrics>,
    pub health: Arc<StoreHealth>,
    pub intake: Arc<Intake>,
    /// Whether requests may go direct as long as the store does not work.
    pub goes_direct: bool,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

type Answer = (u16, Vec<u8>);

impl Control {
    /// # Errors
    /// The system's, or tiny_http's.
    pub fn listen(listener: TcpListener) -> io::Result<Server> {
        Server::from_listener(listener, None).map_err(io::Error::other)
    }

    pub fn new(
        server: Server,
        metrics_path: String,
        metrics: Arc<Metrics>,
        health: Arc<StoreHealth>,
        intake: Arc<Intake>,
        goes_direct: bool,
    ) -> Control {
        Control {
            server,
            metrics_path,
            metrics,
            health,
            intake,
            goes_direct,
        }
    }

    /// One of [`THREADS`]. Returns if the server fails.
    pub fn run(&self) {
        loop {
            match self.server.recv() {
                Ok(request) => {
                    let (status, text) = self.answer(request.method(), request.url());
                    let mut response = Response::from_data(text).with_status_code(status);
                    if let Ok(plain) =
                        "Content-Type: text/plain; version=0.0.4; charset=utf-8".parse::<Header>()
                    {
                        response = response.with_header(plain);
                    }
                    // A client that does not take its answer misses it.
                    let _ = request.respond(response);
                }
                Err(error) => {
                    log::error!(error:%; "metrics and health cannot be served any more");
                    return;
                }
            }
        }
    }

    fn answer(&self, method: &Method, target: &str) -> Answer {
        if !matches!(method, Method::Get | Method::Head) {
            return (405, b"only GET and HEAD\n".to_vec());
        }
        match target.split('?').next().unwrap_or("") {
            "/healthz" => (200, b"ok\n".to_vec()),
            "/readyz" => self.readiness(),
            path if path == self.metrics_path => self.metrics(),
            _ => (404, b"not found\n".to_vec()),
        }
    }

    fn metrics(&self) -> Answer {
        let held_bytes = self.intake.budget.held_bytes();
        self.metrics
            .held_bytes
            .set(i64::try_from(held_bytes).unwrap_or(i64::MAX));
        match self.metrics.encode() {
            Ok(text) => (200, text),
            Err(error) => (500, format!("{error}\n").into_bytes()),
        }
    }

    /// Whether requests can be taken, and what stands in the way.
    fn readiness(&self) -> Answer {
        if self.intake.is_draining() {
            return (503, b"shutting down\n".to_vec());
        }
        let Some(fault) = self.health.fault() else {
            return (200, b"ok\n".to_vec());
        };
        if self.goes_direct && self.intake.admission.has_direct_room() {
            (
                200,
                format!("ok, but nothing can be stored: {fault}\n").into_bytes(),
            )
        } else {
            (503, format!("{fault}\n").into_bytes())
        }
    }
}
