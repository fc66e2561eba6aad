//! Sends a recorded request to the destination: the only module that knows ureq.
//!
//! One [`Client`] per worker thread, each with one kept-alive connection, opened when first
//! needed. Retries nothing, but for a kept-alive connection that turns out to be closed.

mod resolver;
#[cfg(feature = "tls")]
mod tls;
mod transport;

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::uri::{PathAndQuery, Scheme};
use http::{Method, Uri, Version, header};
#[cfg(feature = "tls")]
use ureq::unversioned::transport::Connector;
use ureq::{Agent, AsSendBody, SendBody};
use ureq_proto::client::header_raw;
use uuid::Uuid;

use crate::config::RemoteUrl;
use crate::request::{ATTEMPT_HEADER, ID_HEADER, Request};
use crate::settle::Outcome;
use crate::tls::ClientConfig;
use resolver::CachingResolver;
use transport::{Pool, Tcp};

/// A destination that does not accept a connection in this time is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What is read of an answer's body, so that its connection can be used again.
const DRAIN_BYTES_MAX: u64 = 64 * 1024;
/// How long the rest of an answer is waited for once its status is known.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that was closed while it was idle fails at once. One that fails later may have
/// been working on the request, and a second full timeout might outlive the lease.
const STALE_FAILS_IN: Duration = Duration::from_secs(1);
/// Size of a connection's buffers; a header field has to fit in whole.
const BUFFER_BYTES: usize = 16 * 1024;
/// What a header or request line has besides its name and value or its target, generously.
const LINE_SLACK_BYTES: usize = 512;
/// Idle connections are closed after this time, before most destinations do it.
const IDLE_MAX: Duration = Duration::from_secs(15);

/// The destination, shared by all clients.
#[derive(Debug, Clone)]
pub struct Upstream {
    remote: RemoteUrl,
    request_timeout: Duration,
    resolver: CachingResolver,
    buffers: Arc<Pool>,
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "never there"))]
    tls: Option<Arc<ClientConfig>>,
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
        Upstream {
            tls,
            resolver: CachingResolver::new(&remote.authority),
            buffers: Pool::new(BUFFER_BYTES, BUFFER_BYTES),
            remote,
            request_timeout,
            successor: Arc::default(),
        }
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
            opened: Arc::default(),
            agent: None,
        }
    }

    fn uri(&self, target: &str) -> Result<Uri, http::Error> {
        let path = match self.remote.path_prefix.as_str() {
            "" => PathAndQuery::try_from(target)?,
            prefix => PathAndQuery::try_from(format!("{prefix}{target}"))?,
        };
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.remote.scheme.clone());
        parts.authority = Some(self.remote.authority.clone());
        parts.path_and_query = Some(path);
        Ok(Uri::from_parts(parts)?)
    }

    /// Out of line, as the next: what they take of the stack, all workers that wait for an answer
    /// would have as well. Returns the length of the longest line, too.
    #[inline(never)]
    fn head(
        &self,
        id: Uuid,
        request: &Request,
        attempt: u32,
    ) -> Result<(http::request::Builder, usize), http::Error> {
        let head = http::request::Builder::new()
            .method(Method::from_bytes(request.method.as_bytes())?)
            .uri(self.uri(&request.target)?)
            .version(Version::HTTP_11);
        let mut longest = request.target.len() + self.remote.path_prefix.len();
        let mut head = request.headers.iter().fold(head, |head, (name, value)| {
            longest = longest.max(name.len() + value.len());
            header_raw(head, name, value)
        });
        head = header_raw(head, ID_HEADER, id.to_string().as_bytes());
        head = header_raw(head, ATTEMPT_HEADER, attempt.to_string().as_bytes());
        Ok((head, longest))
    }

    #[inline(never)]
    fn agent(&self, buffer_bytes: usize, opened: &Arc<AtomicU64>) -> Agent {
        let config = Agent::config_builder()
            .timeout_global(Some(self.request_timeout))
            .timeout_connect(Some(self.request_timeout.min(CONNECT_TIMEOUT)))
            .timeout_recv_body(Some(self.request_timeout.min(DRAIN_TIMEOUT)))
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .user_agent("")
            .accept("")
            .accept_encoding("")
            .input_buffer_size(BUFFER_BYTES)
            .output_buffer_size(buffer_bytes)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(IDLE_MAX);
        let pool = if buffer_bytes == BUFFER_BYTES {
            Arc::clone(&self.buffers)
        } else {
            Pool::new(BUFFER_BYTES, buffer_bytes)
        };
        let tcp = Tcp {
            pool: Arc::clone(&pool),
            opened: Arc::clone(opened),
        };
        let resolver = self.resolver.clone();
        #[cfg(feature = "tls")]
        if let (true, Some(tls)) = (self.remote.scheme == Scheme::HTTPS, &self.tls) {
            let secured = tcp.chain(tls::Tls {
                config: Arc::clone(tls),
                pool: Arc::clone(&pool),
            });
            return Agent::with_parts(config.build(), secured, resolver);
        }
        Agent::with_parts(config.build(), tcp, resolver)
    }
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
    opened: Arc<AtomicU64>,
    agent: Option<Agent>,
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
        let opened_before = self.opened.load(Ordering::Relaxed);
        let mut result = self.try_send(id, request, attempt);
        let reused = self.opened.load(Ordering::Relaxed) == opened_before;
        let is_stale = reused && started.elapsed() < STALE_FAILS_IN;
        if is_stale && result.as_ref().is_err_and(is_closed_by_peer) {
            // The destination closed the connection while it was idle: this says nothing
            // about the request, which is sent again on a new one.
            result = self.try_send(id, request, attempt);
        }
        match result {
            Ok(outcome) => outcome,
            Err(error) => self.outcome(&error),
        }
    }

    /// Whose fault it is that there is no answer.
    fn outcome(&self, error: &ureq::Error) -> Outcome {
        use ureq::Timeout::{Connect, Resolve};
        let text = describe(error);
        if matches!(error, ureq::Error::Http(_) | ureq::Error::BadUri(_)) {
            return Outcome::Unsendable(text);
        }
        self.upstream.resolver.suspect();
        match error {
            ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(Connect | Resolve) => Outcome::Unreachable(text),
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Outcome::Unreachable(text)
            }
            _ => Outcome::Unanswered(text),
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
            self.agent = None;
        }
    }

    fn try_send(
        &mut self,
        id: Uuid,
        request: &Request,
        attempt: u32,
    ) -> Result<Outcome, ureq::Error> {
        let (head, longest_line) = self.upstream.head(id, request, attempt)?;
        let agent = self.agent(longest_line + LINE_SLACK_BYTES);
        if request.body.is_empty() && !announces_empty_body(&request.method) {
            exchange(&agent, head, SendBody::none())
        } else {
            exchange(&agent, head, request.body.as_slice())
        }
    }

    fn agent(&mut self, buffer_bytes: usize) -> Agent {
        if buffer_bytes > BUFFER_BYTES {
            // Rare and large: a connection of its own, so that all others can stay small.
            return self.upstream.agent(buffer_bytes, &self.opened);
        }
        let agent = self
            .agent
            .get_or_insert_with(|| self.upstream.agent(BUFFER_BYTES, &self.opened));
        agent.clone()
    }
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
    let body = response.body_mut().with_config().limit(DRAIN_BYTES_MAX);
    body.read_to_string().map_err(|error| describe(&error))
}

/// Out of line, too: there is one of it for each kind of body.
#[inline(never)]
fn exchange(
    agent: &Agent,
    head: http::request::Builder,
    body: impl AsSendBody,
) -> Result<Outcome, ureq::Error> {
    Ok(drain(agent.run(head.body(body)?)?))
}

/// Methods whose empty body is announced with `Content-Length: 0` (RFC 9110 §8.6).
fn announces_empty_body(method: &str) -> bool {
    matches!(method, "POST" | "PUT" | "PATCH")
}

/// Reads what little the answer has to say, so that the connection can be kept.
#[inline(never)]
fn drain(mut response: http::Response<ureq::Body>) -> Outcome {
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| parse_retry_after(value.as_bytes(), SystemTime::now()));
    let status = response.status().as_u16();
    let mut rest = response.body_mut().as_reader().take(DRAIN_BYTES_MAX);
    // The status is the answer. A body that breaks off, or does not end, changes nothing but
    // the connection, which is then not used again.
    let _ = io::copy(&mut rest, &mut io::sink());
    Outcome::Answered {
        status,
        retry_after,
    }
}

/// `Retry-After` in both forms of RFC 9110 §10.2.3: seconds, or a date.
fn parse_retry_after(value: &[u8], now: SystemTime) -> Option<Duration> {
    let value = std::str::from_utf8(value).ok()?.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
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
mod tests {
    use super::*;

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let parse = |text: &str| parse_retry_after(text.as_bytes(), now);
        assert_eq!(parse("120"), Some(Duration::from_secs(120)));
        assert_eq!(parse(" 0 "), Some(Duration::ZERO));
        assert_eq!(
            parse("Sun, 06 Nov 1994 08:50:37 GMT"),
            Some(Duration::from_secs(60))
        );
        assert_eq!(parse("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        for bad in ["", "-1", "soon", "99999999999999999999", "1.5"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
