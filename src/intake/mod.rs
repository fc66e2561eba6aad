//! Intake: bytes in, recorded request to admission, answer out.
//!
//! The acceptors in here differ in how they read; what they do with a request is the same.

pub mod tiny_http;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use crate::admission::{Admission, Admitted};
use crate::budget::{Budget, Permit};
use crate::metrics::Metrics;
use crate::request::{Invalid, Peer, Request};

/// What every acceptor needs.
#[derive(Debug)]
pub struct Intake {
    pub admission: Admission,
    pub metrics: Arc<Metrics>,
    pub budget: Arc<Budget>,
    /// The status that acknowledges a request.
    pub response_status: u16,
    pub body_bytes_max: usize,
    /// Set when no more requests shall come in on open connections.
    pub draining: Arc<AtomicBool>,
}

/// What a sender is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Accepted: in the channel or committed.
    Accepted(u16),
    /// 400: could never be sent on.
    Invalid(Invalid),
    /// 400: the body broke off or was malformed.
    BadBody,
    /// 413.
    TooLarge,
    /// 503 with `Retry-After`: no room at the moment.
    Overloaded,
}

/// What a refused sender is asked to wait, in seconds.
const RETRY_AFTER_SECONDS: &str = "1";

impl Answer {
    pub fn status(self) -> u16 {
        match self {
            Answer::Accepted(status) => status,
            Answer::Invalid(_) | Answer::BadBody => 400,
            Answer::TooLarge => 413,
            Answer::Overloaded => 503,
        }
    }

    /// The answer as it stands on the wire, in one piece. Errors say why in a line of text.
    pub fn to_bytes(self, connection: Option<&str>, is_head: bool, now: SystemTime) -> Vec<u8> {
        use std::fmt::Write;
        let status = self.status();
        let reason = http::StatusCode::from_u16(status)
            .ok()
            .and_then(|status| status.canonical_reason())
            .unwrap_or("");
        let body = self.explanation();
        let date = httpdate::fmt_http_date(now);
        let mut text = String::with_capacity(256);
        // Writing to a String cannot fail.
        let _ = write!(text, "HTTP/1.1 {status} {reason}\r\nDate: {date}\r\n");
        // RFC 9110 §8.6: none with 204, which has no content.
        if status != 204 {
            let _ = write!(text, "Content-Length: {}\r\n", body.len());
        }
        if !body.is_empty() {
            text.push_str("Content-Type: text/plain; charset=utf-8\r\n");
        }
        if self == Answer::Overloaded {
            let _ = write!(text, "Retry-After: {RETRY_AFTER_SECONDS}\r\n");
        }
        if let Some(connection) = connection {
            let _ = write!(text, "Connection: {connection}\r\n");
        }
        text.push_str("\r\n");
        if !is_head {
            text.push_str(&body);
        }
        text.into_bytes()
    }

    fn explanation(self) -> String {
        match self {
            Answer::Accepted(_) => String::new(),
            Answer::Invalid(why) => format!("{why}\n"),
            Answer::BadBody => "body is malformed or was cut short\n".into(),
            Answer::TooLarge => "body is larger than this server accepts\n".into(),
            Answer::Overloaded => "no room at the moment, try again\n".into(),
        }
    }
}

impl Intake {
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Records a request that was read whole and admits it.
    pub fn accept<'a>(
        &self,
        method: &str,
        target: &str,
        fields: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
        peer: Peer<'_>,
        body: Vec<u8>,
        permit: Permit,
    ) -> Answer {
        let recorded = Request::record(method, target, fields, peer, body, SystemTime::now());
        match recorded {
            Err(why) => self.refuse(Answer::Invalid(why)),
            // Admission counts its own refusals.
            Ok(request) => match self.admission.admit(request, permit) {
                Admitted::Direct | Admitted::Stored => Answer::Accepted(self.response_status),
                Admitted::Refused => Answer::Overloaded,
            },
        }
    }

    /// Counts a refusal made before admission.
    pub fn refuse(&self, answer: Answer) -> Answer {
        let refused = &self.metrics.refused;
        refused.count(match answer {
            Answer::TooLarge => &refused.too_large,
            Answer::Overloaded => &refused.overloaded,
            Answer::Accepted(_) | Answer::Invalid(_) | Answer::BadBody => &refused.invalid,
        });
        answer
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
