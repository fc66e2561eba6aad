//! Sends a recorded request to the destination: the only module that knows ureq.
//!
//! ureq resolves, connects and bounds each step in time; what is written and how an answer is read
//! is ours ([`answer`], `head`, `exchange`). One [`Client`] per worker thread, each with one
//! kept-alive connection, opened when first needed. Retries nothing, but for a kept-alive
//! connection that turns out to be closed.

pub mod answer;
mod buffers;
mod connect;
mod exchange;
#[cfg(feature = "tls")]
pub mod handshake;
mod head;
mod resolver;
mod retry_after;
#[cfg(feature = "tls")]
mod tls;
mod transport;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::Uri;
use http::uri::{PathAndQuery, Scheme};
use ureq::{Agent, Timeout};
use uuid::Uuid;

use crate::config::RemoteUrl;
use crate::request::Request;
use crate::settle::Outcome;
use crate::tls::ClientConfig;
use buffers::Pool;
use connect::Connect;
use exchange::{Answered, Unanswered};
pub use head::Host;
use resolver::CachingResolver;
use transport::Line;

/// A destination that does not accept a connection in this time is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that was closed while it was idle fails at once. One that fails later may have
/// been working on the request, and a second full timeout might outlive the lease.
const STALE_FAILS_IN: Duration = Duration::from_secs(1);
/// Size of a connection's buffers.
const BUFFER_BYTES: usize = 16 * 1024;
/// Connections that were idle for longer are not used again: most destinations close them later.
const IDLE_MAX: Duration = Duration::from_secs(15);
/// Most of what `get_text` reads.
const TEXT_BYTES_MAX: u64 = 64 * 1024;

/// The destination, shared by all clients.
#[derive(Debug, Clone)]
pub struct Upstream {
    remote: RemoteUrl,
    host: Host,
    request_timeout: Duration,
    resolver: CachingResolver,
    connect: Arc<Connect>,
    successor: Arc<Successor>,
}

/// What takes the place of an [`Upstream`] while clients of it are in use.
#[derive(Debug, Default)]
struct Successor {
    /// Counts the changes.
    generation: AtomicU64,
    upstream: Mutex<Option<Upstream>>,
}

impl Upstream {
    /// `request_timeout` bounds each attempt from resolving the name to the answer's end; `tls`
    /// is for an https destination.
    pub fn new(
        remote: RemoteUrl,
        request_timeout: Duration,
        tls: Option<Arc<ClientConfig>>,
    ) -> Upstream {
        let uri = uri(&remote);
        let connect = Connect::new(uri.clone(), &Pool::new(BUFFER_BYTES, BUFFER_BYTES));
        #[cfg(feature = "tls")]
        let connect = match tls.filter(|_| remote.scheme == Scheme::HTTPS) {
            Some(tls) => connect.secured(tls),
            None => connect,
        };
        #[cfg(not(feature = "tls"))]
        let _ = tls;
        Upstream {
            resolver: CachingResolver::new(&uri),
            connect: Arc::new(connect),
            remote,
            host: Host::Own,
            request_timeout,
            successor: Arc::default(),
        }
    }

    /// With another `Host` than the destination's own.
    #[must_use]
    pub fn with_host(self, host: Host) -> Upstream {
        Upstream { host, ..self }
    }

    /// From their next request on, all clients of this one are clients of `newer`.
    pub fn replace(&self, newer: Upstream) {
        let successor = &self.successor;
        let newer = Upstream {
            successor: Arc::clone(successor),
            ..newer
        };
        let mut upstream = successor
            .upstream
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *upstream = Some(newer);
        successor.generation.fetch_add(1, Ordering::Release);
    }

    /// A client for one thread. Costs nothing until it sends.
    pub fn client(&self) -> Client {
        Client {
            upstream: self.clone(),
            generation: 0,
            idle: None,
        }
    }
}

/// Scheme and authority, with an empty path: all that connecting needs.
fn uri(remote: &RemoteUrl) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(remote.scheme.clone());
    parts.authority = Some(remote.authority.clone());
    parts.path_and_query = Some(PathAndQuery::from_static("/"));
    // With all three there is nothing that could be missing.
    Uri::from_parts(parts).unwrap_or_default()
}

/// Whether a build can send to this scheme.
pub fn supports(scheme: &Scheme) -> bool {
    *scheme == Scheme::HTTP || (cfg!(feature = "tls") && *scheme == Scheme::HTTPS)
}

/// Sends requests one at a time.
#[derive(Debug)]
pub struct Client {
    upstream: Upstream,
    /// Changes of it that have been followed.
    generation: u64,
    idle: Option<Idle>,
}

/// A connection between two requests.
#[derive(Debug)]
struct Idle {
    line: Box<dyn Line>,
    since: Instant,
}

/// One attempt that is to be made.
struct Attempt<'a> {
    head: Vec<u8>,
    body: &'a [u8],
    /// Answers to HEAD have no body.
    is_head: bool,
    deadline: Option<Instant>,
}

impl Client {
    /// Makes attempt number `attempt` (from 1) and tells how it ended.
    pub fn send(&mut self, request: &Request, attempt: u32) -> Outcome {
        self.send_as(request.id, request, attempt)
    }

    /// As [`Client::send`], under another id: so that many can share one request and its body.
    pub fn send_as(&mut self, id: Uuid, request: &Request, attempt: u32) -> Outcome {
        self.follow();
        let started = Instant::now();
        let head = match head::write(
            (&self.upstream.remote, self.upstream.host),
            id,
            request,
            attempt,
        ) {
            Ok(head) => head,
            Err(why) => return Outcome::Unsendable(why),
        };
        let attempt = Attempt {
            head,
            body: &request.body,
            is_head: request.method == "HEAD",
            deadline: started.checked_add(self.upstream.request_timeout),
        };
        if let Some(line) = self.take_idle(attempt.deadline) {
            match self.exchange(line, &attempt) {
                // The destination closed the connection while it was idle: this says nothing
                // about the request, which is sent again on a new one.
                Err(failed) if is_stale(&failed, started) => {}
                result => return self.outcome(result),
            }
        }
        let connect_by = started.checked_add(self.upstream.request_timeout.min(CONNECT_TIMEOUT));
        let connected = self
            .upstream
            .connect
            .connect(&self.upstream.resolver, connect_by);
        match connected {
            Ok(line) => {
                let result = self.exchange(line, &attempt);
                self.outcome(result)
            }
            Err(error) => {
                self.upstream.resolver.suspect();
                Outcome::Unreachable(describe(&error))
            }
        }
    }

    /// The connection that was kept, if it is still fit for use.
    fn take_idle(&mut self, deadline: Option<Instant>) -> Option<Box<dyn Line>> {
        let Idle { mut line, since } = self.idle.take()?;
        let address = line.socket().address();
        let is_named = || {
            let timeout = connect::by(deadline, Timeout::Resolve);
            timeout.is_ok_and(|timeout| self.upstream.resolver.names(address, timeout))
        };
        let is_fit = since.elapsed() < IDLE_MAX && is_named() && line.is_open();
        is_fit.then_some(line)
    }

    fn exchange(
        &mut self,
        mut line: Box<dyn Line>,
        attempt: &Attempt<'_>,
    ) -> Result<Answered, Unanswered> {
        let message = [attempt.head.as_slice(), attempt.body];
        let answered = exchange::exchange(&mut *line, message, attempt.is_head, attempt.deadline)?;
        if answered.is_reusable {
            let since = Instant::now();
            self.idle = Some(Idle { line, since });
        }
        Ok(answered)
    }

    fn outcome(&self, result: Result<Answered, Unanswered>) -> Outcome {
        let failed = match result {
            Ok(Answered { answer, .. }) => {
                let wish = answer.retry_after;
                return Outcome::Answered {
                    status: answer.status,
                    retry_after: wish
                        .and_then(|value| retry_after::parse(&value, SystemTime::now())),
                };
            }
            Err(failed) => failed,
        };
        self.upstream.resolver.suspect();
        let text = describe(&failed.error);
        if failed.is_sent {
            Outcome::Unanswered(text)
        } else {
            Outcome::Unreachable(text)
        }
    }

    /// Goes on with what has taken the place of the destination, if something has.
    fn follow(&mut self) {
        let successor = &self.upstream.successor;
        let generation = successor.generation.load(Ordering::Acquire);
        if generation == self.generation {
            return;
        }
        let newer = successor.upstream.lock();
        let newer = newer.unwrap_or_else(PoisonError::into_inner).clone();
        self.generation = generation;
        if let Some(newer) = newer {
            self.upstream = newer;
            self.idle = None;
        }
    }
}

/// Whether a kept connection was closed before the request came. If anything of an answer has
/// come, it was not.
fn is_stale(failed: &Unanswered, started: Instant) -> bool {
    !failed.is_heard && started.elapsed() < STALE_FAILS_IN && is_closed_by_peer(&failed.error)
}

/// Asks for a short text with GET, for `asyncproxy doctor`.
///
/// # Errors
/// One line that says why there is none.
pub fn get_text(url: &str, timeout: Duration) -> Result<String, String> {
    let agent = Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build()
        .new_agent();
    let mut response = agent.get(url).call().map_err(|error| describe(&error))?;
    let body = response.body_mut().with_config().limit(TEXT_BYTES_MAX);
    body.read_to_string().map_err(|error| describe(&error))
}

fn is_closed_by_peer(error: &ureq::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error, ureq::Error::Io(error)
        if matches!(error.kind(), ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof))
}

fn describe(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Timeout(timeout) => format!("timeout: {timeout}"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
