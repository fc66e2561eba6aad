//! The recorded request: what travels the whole pipeline, and the rules for its header fields.
//!
//! A value without I/O. Intake builds it, the store keeps it, upstream sends it; none of them
//! knows another. What cannot be sent on is refused here, before anything is acknowledged.

mod authority;
mod headers;
mod via;

use std::cell::RefCell;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::time::SystemTime;

use http::Method;
use http::uri::PathAndQuery;
use uuid::Uuid;

pub use authority::is_authority;
pub use headers::{BLOCK_BYTES_MAX, Headers, LINES_MAX};
pub use via::Mark;

/// Constant over all attempts, so that the destination can recognise a redelivery.
pub const ID_HEADER: &str = "X-Asyncproxy-Id";
/// 1 for the first attempt.
pub const ATTEMPT_HEADER: &str = "X-Asyncproxy-Attempt";

/// Longest request target that can be sent on, in bytes: the destination's path prefix is
/// added to it, and a URI may have 65,534 (the limit of the `http` crate).
pub const TARGET_BYTES_MAX: usize = 32 * 1024;

/// Longest method that can be sent on, in bytes. The longest one registered has 17.
pub const METHOD_BYTES_MAX: usize = 64;

/// One request as recorded, ready to be sent any number of times.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    /// UUIDv7: sorts by the time of receipt.
    pub id: Uuid,
    pub received_at: SystemTime,
    pub method: String,
    /// Path and query byte for byte as sent; begins with `/`.
    pub target: String,
    pub headers: Headers,
    pub body: Vec<u8>,
}

/// Bodies and header values are the sender's and stay out of every log.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("id", &self.id)
            .field("method", &self.method)
            .field("target", &self.target)
            .field("headers", &self.headers)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// What the intake knows about the connection a request came in on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peer<'a> {
    /// The sender's address, absent on a unix socket.
    pub ip: Option<std::net::IpAddr>,
    /// The value of the request's `Host` field.
    pub host: Option<&'a [u8]>,
    /// HTTP/1.0, not HTTP/1.1.
    pub is_10: bool,
    /// What the request is marked with as having come through here.
    pub mark: Option<Mark>,
    /// What is passed on beside what a proxy in front of us says.
    pub manners: Manners,
}

/// What the settings say of what a destination is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manners {
    /// The sender's protocol, unless a proxy in front of us tells it.
    pub proto: Proto,
    /// `Host` is sent on as it came in.
    pub preserves_host: bool,
}

impl Manners {
    pub fn to_bits(self) -> u8 {
        u8::from(self.proto == Proto::Https) | u8::from(self.preserves_host) << 1
    }

    pub fn from_bits(bits: u8) -> Manners {
        Manners {
            proto: match bits & 1 {
                0 => Proto::Http,
                _ => Proto::Https,
            },
            preserves_host: bits & 2 != 0,
        }
    }
}

/// The protocol that a sender speaks, with us or with what ends TLS before us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Proto {
    #[default]
    Http,
    Https,
}

impl Proto {
    pub fn as_str(self) -> &'static str {
        match self {
            Proto::Http => "http",
            Proto::Https => "https",
        }
    }
}

/// Why a request can never be sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    Method,
    Target,
    Header,
    /// Too many header fields.
    Fields,
    /// Has been here before.
    Loop,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Invalid::Method => "method must be a token of at most 64 bytes other than CONNECT",
            Invalid::Target => {
                "target must be a path of at most 32 KiB in valid URI characters, or an http URL of one"
            }
            Invalid::Header => "header field must have a token as name and no control characters",
            Invalid::Fields => "header fields must be at most 128 lines and 128 KiB",
            Invalid::Loop => "request has been here before: its destination leads back to this server",
        })
    }
}

impl std::error::Error for Invalid {}

impl Request {
    /// Records a request at `received_at`. `received` are the header fields as they came in;
    /// what belongs to the sender's hop is dropped, what tells the destination about the
    /// sender is added.
    ///
    /// # Errors
    /// [`Invalid`] if the request could never be sent on, whatever the destination.
    pub fn record<'a>(
        method: &str,
        target: &str,
        received: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
        peer: Peer<'_>,
        body: Vec<u8>,
        received_at: SystemTime,
    ) -> Result<Request, Invalid> {
        check_method(method)?;
        let (target, authority) = origin_form(target)?;
        check_target(target)?;
        let peer = Peer {
            // RFC 9112 §3.2.2: it is what was asked for, whatever the Host field says.
            host: authority.or(peer.host),
            ..peer
        };
        Ok(Request {
            id: new_id(received_at),
            received_at,
            method: method.to_owned(),
            target: target.to_owned(),
            headers: Headers::forwarded(received, peer)?,
            body,
        })
    }

    /// What it takes of the memory, but for a few small things.
    pub fn bytes(&self) -> usize {
        self.body.len() + self.headers.as_bytes().len() + self.target.len()
    }

    /// The path without the query: what metrics are labelled with.
    pub fn path(&self) -> &str {
        path_of(&self.target)
    }

    /// Checks what a store handed back, whoever wrote the row.
    ///
    /// # Errors
    /// [`Invalid`] as in [`Request::record`].
    pub fn check(&self) -> Result<(), Invalid> {
        check_method(&self.method)?;
        check_target(&self.target)
    }
}

thread_local! {
    /// Seeded from the system's randomness, so that no two threads of any instances agree.
    static RANDOM: RefCell<fastrand::Rng> =
        RefCell::new(fastrand::Rng::with_seed(RandomState::new().hash_one(0)));
}

/// A UUIDv7. Its random part need only be unique, not secret: asking the system for it would
/// cost a call for each request.
pub fn new_id(received_at: SystemTime) -> Uuid {
    let since = received_at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let milliseconds = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let mut random = [0; 10];
    RANDOM.with_borrow_mut(|rng| rng.fill(&mut random));
    uuid::Builder::from_unix_timestamp_millis(milliseconds, &random).into_uuid()
}

/// The part of a target before its query.
pub fn path_of(target: &str) -> &str {
    target.split_once('?').map_or(target, |(path, _)| path)
}

fn check_method(method: &str) -> Result<(), Invalid> {
    if method.len() > METHOD_BYTES_MAX {
        return Err(Invalid::Method);
    }
    match Method::from_bytes(method.as_bytes()) {
        // CONNECT asks for a tunnel, which nothing can be recorded of.
        Ok(Method::CONNECT) | Err(_) => Err(Invalid::Method),
        Ok(_) => Ok(()),
    }
}

fn check_target(target: &str) -> Result<(), Invalid> {
    // A fragment is not part of a request target (RFC 9112 §3.2) and would be cut off silently.
    if !target.starts_with('/') || target.len() > TARGET_BYTES_MAX || target.contains('#') {
        return Err(Invalid::Target);
    }
    match PathAndQuery::try_from(target) {
        Ok(parsed) if parsed.as_str() == target => Ok(()),
        _ => Err(Invalid::Target),
    }
}

/// Reduces an absolute-form target (RFC 9112 §3.2.2) to its path and query, and the host. That must
/// be one that a `Host` field could name, and there must be one; user information before it is an
/// error (RFC 9110 §4.2.4), and would be lost.
fn origin_form(target: &str) -> Result<(&str, Option<&[u8]>), Invalid> {
    if target.starts_with('/') {
        return Ok((target, None));
    }
    let (scheme, rest) = target.split_once("://").ok_or(Invalid::Target)?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(Invalid::Target);
    }
    let (authority, path) = match rest.find(['/', '?', '#']) {
        None => (rest, "/"),
        Some(at) if rest[at..].starts_with('/') => rest.split_at(at),
        Some(_) => return Err(Invalid::Target),
    };
    let authority = authority.as_bytes();
    let is_host = !matches!(authority, [] | [b':', ..]) && is_authority(authority);
    is_host
        .then_some((path, Some(authority)))
        .ok_or(Invalid::Target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str, fields: &[(&str, &str)]) -> Result<Request, Invalid> {
        let peer = Peer {
            ip: Some([192, 0, 2, 7].into()),
            host: Some(b"hooks.example"),
            ..Peer::default()
        };
        Request::record(
            "POST",
            target,
            fields.iter().map(|(name, value)| (*name, value.as_bytes())),
            peer,
            b"body".to_vec(),
            SystemTime::UNIX_EPOCH,
        )
    }

    fn fields(request: &Request) -> Vec<(String, String)> {
        request
            .headers
            .iter()
            .map(|(name, value)| (name.into(), String::from_utf8_lossy(value).into()))
            .collect()
    }

    #[test]
    fn keeps_end_to_end_fields_with_case_order_and_repeats() {
        let request = record(
            "/a",
            &[("X-B", "1"), ("x-a", "2"), ("X-B", "3"), ("Cookie", "")],
        )
        .unwrap();
        let seen = fields(&request);
        let expected = [("X-B", "1"), ("x-a", "2"), ("X-B", "3"), ("Cookie", "")];
        assert_eq!(
            seen[..4],
            expected.map(|(name, value)| (name.to_string(), value.to_string()))
        );
    }

    #[test]
    fn drops_what_belongs_to_the_hop_and_what_is_ours() {
        let request = record(
            "/a",
            &[
                ("Host", "hooks.example"),
                ("Connection", "close, X-Hop"),
                ("x-hop", "1"),
                ("Keep-Alive", "1"),
                ("TE", "trailers"),
                ("Transfer-Encoding", "chunked"),
                ("Content-Length", "4"),
                ("Expect", "100-continue"),
                ("Upgrade", "h2c"),
                ("x-asyncproxy-id", "forged"),
                ("X-Asyncproxy-Attempt", "9"),
            ],
        )
        .unwrap();
        let names: Vec<_> = fields(&request).into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            names,
            ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"]
        );
    }

    #[test]
    fn extends_the_forwarded_chain_and_trusts_a_proxy_in_front() {
        let request = record(
            "/",
            &[
                ("X-Forwarded-For", "198.51.100.1"),
                ("X-Forwarded-Proto", "https"),
                ("x-forwarded-for", "198.51.100.2"),
            ],
        )
        .unwrap();
        assert!(fields(&request).contains(&(
            "X-Forwarded-For".into(),
            "198.51.100.1, 198.51.100.2, 192.0.2.7".into()
        )));
        assert!(fields(&request).contains(&("X-Forwarded-Proto".into(), "https".into())));
        assert!(!fields(&request).contains(&("X-Forwarded-Proto".into(), "http".into())));
    }

    #[test]
    fn keeps_targets_byte_for_byte() {
        for target in [
            "/",
            "//a//b/../c/./",
            "/a;b=c?d=e&&f",
            "/%2F%00%zz?%41=%",
            "/?",
            "/a?b?c=d/e",
            "/a|b^c{d}\"?e=[1]{2}^`|\\'",
        ] {
            assert_eq!(
                record(target, &[]).map(|r| r.target),
                Ok(target.to_string())
            );
        }
    }

    #[test]
    fn reduces_absolute_form_to_its_path() {
        for (absolute, path, host) in [
            ("http://h/a?b", "/a?b", "h"),
            ("HTTPS://h:1/", "/", "h:1"),
            ("http://[::1]:80/?", "/?", "[::1]:80"),
        ] {
            assert_eq!(record(absolute, &[]).unwrap().target, path);
            assert!(
                fields(&record(absolute, &[]).unwrap())
                    .contains(&("X-Forwarded-Host".into(), host.into()))
            );
        }
    }

    #[test]
    fn refuses_what_could_never_be_sent_on() {
        let long = format!("/{}", "a".repeat(TARGET_BYTES_MAX));
        for target in [
            "",
            "*",
            "a",
            "h:80",
            "/a b",
            "/a#b",
            "http://h?x",
            "ftp://h/",
            // What no Host field could name, and one that names nothing.
            "http:///a",
            "http://:80/a",
            "http://user:password@h/",
            "http://@h/",
            "http://h:x/",
            "http://a\"b/",
            "http://a\\b/",
            "http://a^b/",
            "http://[::1/",
            "http://\u{e4}/",
            &long,
        ] {
            assert_eq!(record(target, &[]), Err(Invalid::Target), "{target:.20}");
        }
        assert_eq!(record("/", &[("a b", "")]), Err(Invalid::Header));
        assert_eq!(record("/", &[("a", "b\rc")]), Err(Invalid::Header));
        assert_eq!(record("/", &[("a", "b\0c")]), Err(Invalid::Header));
        let long = "A".repeat(METHOD_BYTES_MAX + 1);
        for method in ["CONNECT", "", "GE T", "G\u{e9}T", &long] {
            assert_eq!(check_method(method), Err(Invalid::Method), "{method}");
        }
        assert_eq!(check_method(&long[1..]), Ok(()));
    }
}
