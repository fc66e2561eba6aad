//! The tiny_http acceptor, for networks one can trust: it knows no deadlines and few limits.
//!
//! tiny_http reads heads in threads of its own; the threads here read bodies, ask admission and
//! answer. What of its faults can be kept from the program is kept from it here.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use ::tiny_http::{HTTPVersion, Request as Incoming, Server};
use socket2::SockRef;

use super::{Answer, Intake};
use crate::budget::Permit;
use crate::logger::LogLimit;
use crate::metrics::Busy;
use crate::request::{Peer, Request, is_authority, path_of};

/// Threads that read bodies and answer: as many requests can be on their way into one commit.
pub const THREADS: usize = 64;

/// tiny_http holds each connection twice, to read and to write.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 2;

/// A body is read in pieces of at most this size, each within the memory limit.
const PIECE_BYTES: usize = 64 * 1024;

/// An unread body that is announced as larger is not drained by tiny_http but left behind: it
/// would allocate the announced size at once, which can abort the program.
const DRAINABLE_BYTES_MAX: usize = 64 * 1024 * 1024;

static BROKEN: LogLimit = LogLimit::new();
static LEFT_BEHIND: LogLimit = LogLimit::new();

/// A listening tiny_http server and the way to stop it.
pub struct Acceptor {
    server: Server,
    listener: TcpListener,
    intake: Arc<Intake>,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl Acceptor {
    /// Serves requests that come in on `listener` once [`Acceptor::run`] is called.
    ///
    /// # Errors
    /// The system's, or tiny_http's.
    pub fn new(listener: TcpListener, intake: Arc<Intake>) -> io::Result<Acceptor> {
        let copy = listener.try_clone()?;
        // It panics when the system gives no thread, after rows have been leased.
        let server = catch_unwind(|| Server::from_listener(copy, None))
            .map_err(|_panic| io::Error::other("tiny_http panicked"))?
            .map_err(io::Error::other)?;
        Ok(Acceptor {
            server,
            listener,
            intake,
        })
    }

    /// Stops accepting connections; open ones are served on.
    pub fn stop_accepting(&self) {
        // tiny_http has no call for this. On Linux it makes accept return, and new connections
        // are refused.
        if let Err(error) = SockRef::from(&self.listener).shutdown(std::net::Shutdown::Both) {
            log::warn!(error:%; "cannot stop listening");
        }
    }

    /// One of [`THREADS`]. Returns if the server fails, and then no other can go on either.
    pub fn run(&self) {
        loop {
            match self.server.recv() {
                Ok(request) => self.serve(request),
                // The end of the accept loop, which is what was wanted.
                Err(_) if self.intake.is_draining() => {}
                Err(error) => {
                    log::error!(error:%; "no more connections can be accepted");
                    return;
                }
            }
        }
    }

    fn serve(&self, mut request: Incoming) {
        let started = Instant::now();
        let metrics = &self.intake.metrics;
        let _busy = Busy::new(&metrics.busy_intake);
        let path = metrics.path(path_of(request.url()), started);
        path.requests.inc();
        let answer = self.answer(&mut request, started);
        self.respond(request, answer);
        path.answer_seconds.observe(started.elapsed().as_secs_f64());
    }

    fn answer(&self, request: &mut Incoming, started: Instant) -> Answer {
        let mut permit = self.intake.budget.permit();
        let body = match self.read_body(request, &mut permit) {
            Ok(body) => body,
            Err(answer) => return self.intake.refuse(answer),
        };
        let fields = request.headers().iter().map(|field| {
            (
                field.field.as_str().as_str(),
                field.value.as_str().as_bytes(),
            )
        });
        let peer = Peer {
            ip: request.remote_addr().map(std::net::SocketAddr::ip),
            host: find(request, "Host").map(str::as_bytes),
            is_10: *request.http_version() <= HTTPVersion(1, 0),
            ..self.intake.here()
        };
        if peer.host.is_some_and(|host| !is_authority(host)) {
            return self.intake.refuse(Answer::Malformed("malformed Host"));
        }
        let method = request.method().to_string();
        let now = SystemTime::now();
        let recorded = Request::record(&method, request.url(), fields, peer, body, now);
        match recorded {
            Err(why) => self.intake.refuse(Answer::Invalid(why)),
            Ok(recorded) => {
                let admitted = self.intake.admission.admit(recorded, permit);
                self.intake.answer(admitted, started.elapsed())
            }
        }
    }

    fn read_body(&self, request: &mut Incoming, permit: &mut Permit) -> Result<Vec<u8>, Answer> {
        let limit = self.intake.body_bytes_max.load(Ordering::Relaxed);
        let announced = request.body_length();
        if announced.is_some_and(|bytes| bytes > limit) {
            return Err(Answer::TooLarge);
        }
        if wants_upgrade(request) && announced.is_none() {
            // tiny_http hands over the bare connection here, whose end would never come.
            return match find(request, "Transfer-Encoding") {
                Some(_) => Err(Answer::CutShort),
                None => Ok(Vec::new()),
            };
        }
        let body_bytes_max = announced.unwrap_or(limit + 1);
        let mut body = Vec::new();
        let mut reader = request.as_reader().take(body_bytes_max as u64);
        loop {
            let piece = (body_bytes_max - body.len()).min(PIECE_BYTES);
            if piece == 0 {
                break;
            }
            let expected = if announced.is_some() { piece } else { 0 };
            if !permit.try_grow(expected) {
                return Err(Answer::Overloaded);
            }
            body.reserve(expected);
            let read = reader
                .by_ref()
                .take(piece as u64)
                .read_to_end(&mut body)
                .map_err(|_| Answer::CutShort)?;
            if announced.is_none() && !permit.try_grow(read) {
                return Err(Answer::Overloaded);
            }
            if read < piece {
                break;
            }
        }
        match announced {
            Some(bytes) if body.len() < bytes => Err(Answer::CutShort),
            None if body.len() > limit => Err(Answer::TooLarge),
            _ => {
                // What is counted is what is held.
                body.shrink_to_fit();
                Ok(body)
            }
        }
    }

    fn respond(&self, request: Incoming, answer: Answer) {
        let connection = if self.intake.is_draining() || !matches!(answer, Answer::Accepted(_)) {
            // After an error nobody knows how much of the request is still to come.
            Some("close")
        } else {
            kept_open(&request)
        };
        let is_head = *request.method() == ::tiny_http::Method::Head;
        let bytes = answer.to_bytes(connection, is_head, SystemTime::now());
        let unread = match answer {
            Answer::TooLarge => request.body_length().unwrap_or(0),
            _ => 0,
        };
        let result = if unread > DRAINABLE_BYTES_MAX {
            leave_behind(request, &bytes)
        } else {
            let mut writer = request.into_writer();
            writer.write_all(&bytes).and_then(|()| writer.flush())
        };
        if let Err(error) = result
            && let Some(suppressed) = BROKEN.allow()
        {
            log::debug!(error:%, suppressed; "sender did not take its answer");
        }
    }
}

/// Answers and forgets the connection, with its reader never dropped: see
/// [`DRAINABLE_BYTES_MAX`]. Costs two descriptors until the end of the program.
fn leave_behind(request: Incoming, bytes: &[u8]) -> io::Result<()> {
    if let Some(suppressed) = LEFT_BEHIND.allow() {
        log::warn!(suppressed; "a sender announced an absurdly large body, its connection is left open");
    }
    let empty = ::tiny_http::Response::empty(100);
    let mut stream = request.upgrade("none", empty);
    let result = stream.write_all(bytes).and_then(|()| stream.flush());
    std::mem::forget(stream);
    result
}

fn find<'a>(request: &'a Incoming, name: &'static str) -> Option<&'a str> {
    request
        .headers()
        .iter()
        .find(|field| field.field.equiv(name))
        .map(|field| field.value.as_str())
}

fn wants_upgrade(request: &Incoming) -> bool {
    find(request, "Connection").is_some_and(|value| has_word(value, "upgrade"))
}

/// What to say of the connection, as tiny_http will keep it open or not.
fn kept_open(request: &Incoming) -> Option<&'static str> {
    let connection = find(request, "Connection").unwrap_or("");
    if has_word(connection, "close") || has_word(connection, "upgrade") {
        return Some("close");
    }
    match (
        *request.http_version() == HTTPVersion(1, 0),
        has_word(connection, "keep-alive"),
    ) {
        (true, true) => Some("keep-alive"),
        (true, false) => Some("close"),
        (false, _) => None,
    }
}

fn has_word(value: &str, word: &str) -> bool {
    value.to_ascii_lowercase().contains(word)
}
