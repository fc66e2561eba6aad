//! Intake: bytes in, recorded request to admission, answer out.
//!
//! The acceptors in here differ in how they read; what they do with a request is the same.

pub mod builtin;
pub mod tiny_http;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use crate::admission::{Admission, Admitted};
use crate::budget::{Budget, Permit};
use crate::metrics::{Busy, Metrics};
use crate::request::{Invalid, Manners, Mark, Peer, Request, path_of};

/// What every acceptor needs.
#[derive(Debug)]
pub struct Intake {
    pub admission: Admission,
    pub metrics: Arc<Metrics>,
    pub budget: Arc<Budget>,
    /// The status that acknowledges a request.
    pub response_status: AtomicU16,
    pub body_bytes_max: AtomicUsize,
    /// The bits of the [`Mark`] that requests get here.
    pub mark: AtomicU32,
    /// The bits of the [`Manners`] that they get here.
    pub manners: AtomicU8,
    /// Set when no more requests shall come in on open connections.
    pub draining: Arc<AtomicBool>,
}

/// What a sender is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Accepted: in the channel or committed.
    Accepted(u16),
    /// A status and a text to go with it.
    Page(u16, Vec<u8>),
    /// A text in JSON.
    Json(String),
    /// 400, or 431 or 508: could never be sent on.
    Invalid(Invalid),
    /// 400: not HTTP as RFC 9112 has it, or with two possible meanings.
    Malformed(&'static str),
    /// 400: the request broke off.
    CutShort,
    /// 408: the request was not in within its time.
    Timeout,
    /// 413.
    TooLarge,
    /// 414.
    LineTooLong,
    /// 417: an expectation other than `100-continue`.
    Expectation,
    /// 431: too many header fields, or too long ones.
    FieldsTooLarge,
    /// 500: would have to be stored, and the store refuses this one request.
    Unstorable,
    /// 503 with `Retry-After`: no room at the moment.
    Overloaded,
    /// 505.
    Version,
}

/// What a refused sender is asked to wait, in seconds.
const RETRY_AFTER_SECONDS: &str = "1";

impl Answer {
    pub fn status(&self) -> u16 {
        match self {
            Answer::Accepted(status) | Answer::Page(status, _) => *status,
            Answer::Json(_) => 200,
            Answer::Invalid(Invalid::Fields) => 431,
            Answer::Invalid(Invalid::Loop) => 508,
            Answer::Invalid(_) | Answer::Malformed(_) | Answer::CutShort => 400,
            Answer::Timeout => 408,
            Answer::TooLarge => 413,
            Answer::LineTooLong => 414,
            Answer::Expectation => 417,
            Answer::FieldsTooLarge => 431,
            Answer::Unstorable => 500,
            Answer::Overloaded => 503,
            Answer::Version => 505,
        }
    }

    /// The answer as it stands on the wire, in one piece. Errors say why in a line of text.
    pub fn to_bytes(&self, connection: Option<&str>, is_head: bool, now: SystemTime) -> Vec<u8> {
        use std::fmt::Write;
        let status = self.status();
        let reason = http::StatusCode::from_u16(status)
            .ok()
            .and_then(|status| status.canonical_reason())
            .unwrap_or("");
        let body = self.text();
        let date = httpdate::fmt_http_date(now);
        let mut text = String::with_capacity(256);
        // Writing to a String cannot fail.
        let _ = write!(text, "HTTP/1.1 {status} {reason}\r\nDate: {date}\r\n");
        // RFC 9110 §8.6: none with 204, which has no content.
        if status != 204 {
            let _ = write!(text, "Content-Length: {}\r\n", body.len());
        }
        if !body.is_empty() {
            // Pages are for Prometheus, which wants the version of its format.
            let media_type = match self {
                Answer::Page(..) => "text/plain; version=0.0.4; charset=utf-8",
                Answer::Json(_) => "application/json",
                _ => "text/plain; charset=utf-8",
            };
            let _ = write!(text, "Content-Type: {media_type}\r\n");
        }
        if *self == Answer::Overloaded {
            let _ = write!(text, "Retry-After: {RETRY_AFTER_SECONDS}\r\n");
        }
        if let Some(connection) = connection {
            let _ = write!(text, "Connection: {connection}\r\n");
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        if !is_head {
            bytes.extend_from_slice(&body);
        }
        bytes
    }

    fn text(&self) -> Cow<'_, [u8]> {
        let why = match self {
            Answer::Accepted(_) => return Cow::Borrowed(b""),
            Answer::Page(_, text) => return Cow::Borrowed(text),
            Answer::Json(text) => return Cow::Borrowed(text.as_bytes()),
            Answer::Invalid(why) => return Cow::Owned(format!("{why}\n").into_bytes()),
            Answer::Malformed(why) => return Cow::Owned(format!("{why}\n").into_bytes()),
            Answer::CutShort => "request is malformed or was cut short\n",
            Answer::Timeout => "request did not come in in time\n",
            Answer::TooLarge => "body is larger than this server accepts\n",
            Answer::LineTooLong => "request line is longer than 16 KiB\n",
            Answer::Expectation => "only 100-continue can be expected\n",
            Answer::FieldsTooLarge => "more than 64 KiB or 100 lines of header fields\n",
            Answer::Unstorable => "the queue does not take this request\n",
            Answer::Overloaded => "no room at the moment, try again\n",
            Answer::Version => "only HTTP/1.1 and HTTP/1.0 are spoken here\n",
        };
        Cow::Borrowed(why.as_bytes())
    }
}

impl Intake {
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// What a destination is told, but for what came in.
    fn here(&self) -> Peer<'static> {
        Peer {
            mark: Some(Mark::from_bits(self.mark.load(Ordering::Relaxed))),
            manners: Manners::from_bits(self.manners.load(Ordering::Relaxed)),
            ..Peer::default()
        }
    }

    /// What the sender of a request is told that was admitted or not, so long after its head.
    pub fn answer(&self, admitted: Admitted, took: Duration) -> Answer {
        let seconds = took.as_secs_f64();
        match admitted {
            Admitted::Direct => self.metrics.answer_direct_seconds.observe(seconds),
            Admitted::Stored => self.metrics.answer_stored_seconds.observe(seconds),
            Admitted::Refused | Admitted::QueueFull | Admitted::Unstorable => {}
        }
        match admitted {
            Admitted::Direct | Admitted::Stored => {
                Answer::Accepted(self.response_status.load(Ordering::Relaxed))
            }
            // Admission counts its own refusals.
            Admitted::Refused | Admitted::QueueFull => Answer::Overloaded,
            Admitted::Unstorable => Answer::Unstorable,
        }
    }

    /// Counts a refusal made before admission.
    pub fn refuse(&self, answer: Answer) -> Answer {
        let refused = &self.metrics.refused;
        refused.count(match answer {
            Answer::TooLarge
            | Answer::LineTooLong
            | Answer::FieldsTooLarge
            | Answer::Invalid(Invalid::Fields) => &refused.too_large,
            Answer::Timeout => &refused.timeout,
            Answer::Overloaded => &refused.overloaded,
            Answer::Invalid(Invalid::Loop) => &refused.looped,
            _ => &refused.invalid,
        });
        answer
    }
}

impl builtin::Received<'_> {
    fn record(self, here: Peer<'static>) -> Result<(Request, Permit), Invalid> {
        let head = self.head;
        let peer = Peer {
            ip: self.peer,
            host: head.host,
            is_10: !head.is_11,
            ..here
        };
        let fields = head.fields.iter().map(|field| (field.name, field.value));
        let now = SystemTime::now();
        let request = Request::record(head.method, head.target, fields, peer, self.body, now)?;
        Ok((request, self.permit))
    }
}

impl builtin::Service for Intake {
    fn body_bytes_max(&self) -> usize {
        self.body_bytes_max.load(Ordering::Relaxed)
    }

    fn permit(&self) -> Permit {
        self.budget.permit()
    }

    fn serve(&self, received: builtin::Received<'_>) -> Answer {
        let _busy = Busy::new(&self.metrics.busy_intake);
        let started = received.started;
        let path = self.metrics.path(path_of(received.head.target), started);
        path.requests.inc();
        let answer = match received.record(self.here()) {
            Err(why) => self.refuse(Answer::Invalid(why)),
            Ok((request, permit)) => {
                let admitted = self.admission.admit(request, permit);
                self.answer(admitted, started.elapsed())
            }
        };
        path.answer_seconds.observe(started.elapsed().as_secs_f64());
        answer
    }

    fn is_quick(&self) -> bool {
        self.admission.is_quick()
    }

    fn serve_quickly(&self, received: builtin::Received<'_>) -> Option<Answer> {
        let started = received.started;
        let path = self.metrics.path(path_of(received.head.target), started);
        let (request, permit) = received.record(self.here()).ok()?;
        let admitted = self.admission.admit_quickly(request, permit)?;
        let took = started.elapsed();
        path.requests.inc();
        path.answer_seconds.observe(took.as_secs_f64());
        Some(self.answer(admitted, took))
    }

    fn refuse(&self, answer: Answer) -> Answer {
        Intake::refuse(self, answer)
    }

    fn is_draining(&self) -> bool {
        Intake::is_draining(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(answer: Answer, connection: Option<&str>, is_head: bool) -> String {
        let bytes = answer.to_bytes(connection, is_head, SystemTime::UNIX_EPOCH);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn answers_as_they_stand_on_the_wire() {
        let date = "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n";
        assert_eq!(
            text(Answer::Accepted(200), None, false),
            format!("HTTP/1.1 200 OK\r\n{date}Content-Length: 0\r\n\r\n")
        );
        assert_eq!(
            text(Answer::Accepted(204), Some("close"), false),
            format!("HTTP/1.1 204 No Content\r\n{date}Connection: close\r\n\r\n")
        );
        assert!(text(Answer::Overloaded, None, false).contains("Retry-After: 1\r\n"));
        assert!(text(Answer::TooLarge, None, true).ends_with("\r\n\r\n"));
        assert!(text(Answer::TooLarge, None, false).ends_with("accepts\n"));
    }
}
