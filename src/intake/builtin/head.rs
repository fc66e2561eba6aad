//! A request's head: where it ends, what it says, and how its body is framed. Pure.
//!
//! Follows RFC 9112 and refuses what two implementations could read differently: a request
//! smuggled past this server would reach the destination under another's name.

use std::mem::MaybeUninit;

use httparse::{Header, Request as Parser, Status};
use memchr::memchr3;

use crate::intake::Answer;
use crate::request::is_authority;

/// Longest request line in bytes, without its line end.
pub const LINE_BYTES_MAX: usize = 16 * 1024;
/// Most bytes of all field lines together, with their line ends.
pub const FIELDS_BYTES_MAX: usize = 64 * 1024;
/// Most field lines.
pub const FIELDS_MAX: usize = 100;

/// Finds the end of a head in bytes that arrive bit by bit, looking at each once.
#[derive(Debug, Default)]
pub struct Scan {
    seen: usize,
    /// Where the field lines begin.
    fields_at: Option<usize>,
}

impl Scan {
    /// How many of `bytes`, which begin a connection's next request, are its head; `None`
    /// if it goes on beyond them. To be called again with the same bytes and more.
    ///
    /// # Errors
    /// What to refuse the request with: its lines are malformed or too long.
    pub fn end(&mut self, bytes: &[u8]) -> Result<Option<usize>, Answer> {
        loop {
            let plain = memchr3(b'\r', b'\n', 0, &bytes[self.seen..]);
            let at = plain.map_or(bytes.len(), |plain| self.seen + plain);
            if at > self.seen {
                match self.fields_at {
                    None if at > LINE_BYTES_MAX => return Err(Answer::LineTooLong),
                    Some(fields_at) if at - fields_at > FIELDS_BYTES_MAX => {
                        return Err(Answer::FieldsTooLarge);
                    }
                    _ => self.seen = at,
                }
            }
            match bytes[at..] {
                [] | [b'\r'] => return Ok(None),
                [b'\r', b'\n', ..] => self.seen += 2,
                [b'\r', ..] => {
                    return Err(Answer::Malformed("carriage return without line feed"));
                }
                [b'\n', ..] => return Err(Answer::Malformed("line feed without carriage return")),
                _ => return Err(Answer::Malformed("NUL in the head")),
            }
            let fields_at = *self.fields_at.get_or_insert(self.seen);
            if bytes[..self.seen].ends_with(b"\r\n\r\n") {
                // The line end before the empty line is the request line's, or counts.
                if at.saturating_sub(fields_at) > FIELDS_BYTES_MAX {
                    return Err(Answer::FieldsTooLarge);
                }
                return Ok(Some(self.seen));
            }
        }
    }
}

/// Room for the fields of one head.
pub type Fields<'b> = [MaybeUninit<Header<'b>>; FIELDS_MAX];

/// An understood head.
#[derive(Debug, PartialEq, Eq)]
pub struct Head<'h, 'b> {
    pub method: &'b str,
    pub target: &'b str,
    pub fields: &'h [Header<'b>],
    pub framing: Framing,
    /// HTTP/1.1, not HTTP/1.0.
    pub is_11: bool,
    pub keep_alive: bool,
    pub expects_continue: bool,
    pub host: Option<&'b [u8]>,
}

/// Where a request's body ends (RFC 9112 §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// After so many bytes; none at all without a `Content-Length`.
    Length(u64),
    Chunked,
}

impl<'h, 'b> Head<'h, 'b> {
    /// Understands the bytes that [`Scan`] found to be a head.
    ///
    /// # Errors
    /// What to refuse the request with.
    pub fn parse(bytes: &'b [u8], fields: &'h mut Fields<'b>) -> Result<Self, Answer> {
        let mut parser = Parser::new(&mut []);
        match parser.parse_with_uninit_headers(bytes, fields) {
            Ok(Status::Complete(length)) if length == bytes.len() => {}
            Ok(_) => return Err(Answer::Malformed("malformed head")),
            Err(httparse::Error::TooManyHeaders) => return Err(Answer::FieldsTooLarge),
            Err(httparse::Error::Version) if names_http(bytes) => return Err(Answer::Version),
            Err(error) => return Err(Answer::Malformed(why(error))),
        }
        let (Some(method), Some(target), Some(minor)) =
            (parser.method, parser.path, parser.version)
        else {
            return Err(Answer::Malformed("malformed head"));
        };
        let fields: &'h [Header<'b>] = parser.headers;
        let is_11 = minor == 1;
        let host = single(fields, "host").map_err(|()| Answer::Malformed("more than one Host"))?;
        match host {
            None if is_11 => return Err(Answer::Malformed("no Host")),
            Some(host) if !is_authority(host) => {
                return Err(Answer::Malformed("malformed Host"));
            }
            _ => {}
        }
        Ok(Head {
            method,
            target,
            fields,
            framing: framing(fields, is_11)?,
            is_11,
            keep_alive: keeps_alive(fields, is_11),
            expects_continue: expects_continue(fields, is_11)?,
            host,
        })
    }
}

/// The values of a field, in order.
fn values<'h, 'b>(fields: &'h [Header<'b>], name: &'h str) -> impl Iterator<Item = &'b [u8]> + 'h {
    fields
        .iter()
        .filter(move |field| field.name.eq_ignore_ascii_case(name))
        .map(|field| field.value)
}

fn single<'b>(fields: &[Header<'b>], name: &str) -> Result<Option<&'b [u8]>, ()> {
    let mut values = values(fields, name);
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        (_, Some(_)) => Err(()),
    }
}

/// The members of a list field such as `Connection`; empty ones count for nothing (RFC 9110
/// §5.6.1).
fn members<'h, 'b>(fields: &'h [Header<'b>], name: &'h str) -> impl Iterator<Item = &'b [u8]> + 'h {
    values(fields, name)
        .flat_map(|value| value.split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|member| !member.is_empty())
}

fn has_word(fields: &[Header<'_>], name: &str, word: &str) -> bool {
    members(fields, name).any(|member| member.eq_ignore_ascii_case(word.as_bytes()))
}

/// RFC 9112 §9.3.
fn keeps_alive(fields: &[Header<'_>], is_11: bool) -> bool {
    !has_word(fields, "connection", "close")
        && (is_11 || has_word(fields, "connection", "keep-alive"))
}

/// RFC 9110 §10.1.1. HTTP/1.0 knows no expectations.
fn expects_continue(fields: &[Header<'_>], is_11: bool) -> Result<bool, Answer> {
    let mut expected = members(fields, "expect").filter(|_| is_11).peekable();
    let expects = expected.peek().is_some();
    if expected.all(|member| member.eq_ignore_ascii_case(b"100-continue")) {
        Ok(expects)
    } else {
        Err(Answer::Expectation)
    }
}

/// RFC 9112 §6. Both fields are lists, but are taken in their plain form only, `chunked` and one
/// number: of `chunked,` or `5, 5` other programs make what they like, some none of it, and where a
/// body ends must not be a matter of opinion (§11.2). No sender needs them.
fn framing(fields: &[Header<'_>], is_11: bool) -> Result<Framing, Answer> {
    let coding = single(fields, "transfer-encoding")
        .map_err(|()| Answer::Malformed("more than one Transfer-Encoding"))?;
    let mut lengths = values(fields, "content-length");
    let length = lengths.next();
    if lengths.any(|other| Some(other) != length) {
        return Err(Answer::Malformed("differing Content-Length"));
    }
    match (coding, length) {
        (Some(_), Some(_)) => Err(Answer::Malformed("Content-Length with Transfer-Encoding")),
        (Some(_), None) if !is_11 => Err(Answer::Malformed("Transfer-Encoding in HTTP/1.0")),
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
        (Some(_), None) => Err(Answer::Malformed("Transfer-Encoding other than chunked")),
        (None, None) => Ok(Framing::Length(0)),
        (None, Some(length)) => parse_length(length).map(Framing::Length),
    }
}

/// Digits and nothing else; more than 64 bits hold is more than anybody accepts.
fn parse_length(value: &[u8]) -> Result<u64, Answer> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Answer::Malformed("malformed Content-Length"));
    }
    let text = str::from_utf8(value).unwrap_or_default();
    text.parse().map_err(|_| Answer::TooLarge)
}

/// Whether the version is one of HTTP at all, as `HTTP/2.0` is.
fn names_http(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ').skip(2);
    matches!((words.next(), words.next()), (Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor]), None)
        if major.is_ascii_digit() && minor.is_ascii_digit())
}

fn why(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::HeaderName => "malformed field name",
        httparse::Error::HeaderValue => "malformed field value",
        httparse::Error::Version => "malformed HTTP version",
        _ => "malformed request line",
    }
}
