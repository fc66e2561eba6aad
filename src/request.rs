//! The recorded request: what travels the whole pipeline, and the rules for its header fields.
//!
//! A value without I/O. Intake builds it, the store keeps it, upstream sends it; none of them
//! knows another. What cannot be sent on is refused here, before anything is acknowledged.

use std::cell::RefCell;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::time::SystemTime;

use http::Method;
use http::uri::PathAndQuery;
use uuid::Uuid;

/// Constant over all attempts, so that the destination can recognise a redelivery.
pub const ID_HEADER: &str = "X-Asyncproxy-Id";
/// 1 for the first attempt.
pub const ATTEMPT_HEADER: &str = "X-Asyncproxy-Attempt";

/// Longest request target that can be sent on, in bytes: the destination's path prefix is
/// added to it, and a URI may have 65,534 (the limit of the `http` crate).
pub const TARGET_BYTES_MAX: usize = 32 * 1024;

/// Fields that belong to one hop and are never passed on (RFC 9110 §7.6.1), and those that
/// the sending side sets itself: the framing, `Host` and `Expect`.
const NEVER_FORWARDED: [&str; 11] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "expect",
    "host",
    "proxy-authenticate",
];

/// Names that `Connection` fields may list.
const CONNECTION_OPTIONS_MAX: usize = 32;

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
}

/// Why a request can never be sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    Method,
    Target,
    Header,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Invalid::Method => "method must be a token other than CONNECT",
            Invalid::Target => "target must be a path of at most 32 KiB in valid URI characters",
            Invalid::Header => "header field must have a token as name and no control characters",
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

/// Reduces an absolute-form target (RFC 9112 §3.2.2) to its path and query, and the host.
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
    let host = authority.rsplit('@').next().unwrap_or(authority);
    Ok((path, Some(host.as_bytes())))
}

/// Header fields in order, repeats and bytes kept, held as they stand on the wire:
/// `Name: value CR LF` each. The stores keep this block as it is.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<u8>);

/// Names only: values may be secrets.
impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|(name, _)| name))
            .finish()
    }
}

impl Headers {
    fn forwarded<'a>(
        received: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
        peer: Peer<'_>,
    ) -> Result<Headers, Invalid> {
        let mut headers = Headers(Vec::with_capacity(512));
        let mut forwarded_for = Vec::new();
        let (mut has_forwarded_host, mut has_forwarded_proto) = (false, false);
        let hop = connection_options(received.clone())?;
        for (name, value) in received {
            let is_named = |option: &&[u8]| option.eq_ignore_ascii_case(name.as_bytes());
            if is_never_forwarded(name) || hop.iter().any(is_named) {
                continue;
            }
            if name.eq_ignore_ascii_case("x-forwarded-for") {
                // Folded into one list, the sender's address last.
                if !forwarded_for.is_empty() {
                    forwarded_for.extend_from_slice(b", ");
                }
                forwarded_for.extend_from_slice(value);
                continue;
            }
            has_forwarded_host |= name.eq_ignore_ascii_case("x-forwarded-host");
            has_forwarded_proto |= name.eq_ignore_ascii_case("x-forwarded-proto");
            headers.push(name, value)?;
        }
        if let Some(ip) = peer.ip {
            if !forwarded_for.is_empty() {
                forwarded_for.extend_from_slice(b", ");
            }
            forwarded_for.extend_from_slice(ip.to_canonical().to_string().as_bytes());
        }
        if !forwarded_for.is_empty() {
            headers.push("X-Forwarded-For", &forwarded_for)?;
        }
        // A proxy in front of us knows better what the sender asked it for.
        if let (Some(host), false) = (peer.host, has_forwarded_host) {
            headers.push("X-Forwarded-Host", host)?;
        }
        if !has_forwarded_proto {
            headers.push("X-Forwarded-Proto", b"http")?;
        }
        Ok(headers)
    }

    /// Appends one field.
    ///
    /// # Errors
    /// [`Invalid::Header`] if the name is not a token, or the value has a control character
    /// other than a tab (RFC 9110 §5.5), or is one that the client library refuses.
    pub fn push(&mut self, name: &str, value: &[u8]) -> Result<(), Invalid> {
        let is_field = is_token(name.as_bytes()) && value.iter().copied().all(is_value_byte);
        // ureq reads this one field as text and refuses it otherwise.
        let is_refused = name.eq_ignore_ascii_case("authorization") && !value.iter().all(is_text);
        if !is_field || is_refused {
            return Err(Invalid::Header);
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b": ");
        self.0.extend_from_slice(value);
        self.0.extend_from_slice(b"\r\n");
        Ok(())
    }

    /// The block as the stores keep it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Takes a block back from a store.
    ///
    /// # Errors
    /// [`Invalid::Header`] if it is not a block of valid fields.
    pub fn from_bytes(block: Vec<u8>) -> Result<Headers, Invalid> {
        let mut checked = Headers(Vec::with_capacity(block.len()));
        let mut rest = block.as_slice();
        while !rest.is_empty() {
            let (line, after) = split_at(rest, b"\r\n").ok_or(Invalid::Header)?;
            let (name, value) = split_at(line, b": ").ok_or(Invalid::Header)?;
            checked.push(
                std::str::from_utf8(name).map_err(|_| Invalid::Header)?,
                value,
            )?;
            rest = after;
        }
        Ok(checked)
    }

    /// The fields in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let mut rest = self.0.as_slice();
        std::iter::from_fn(move || {
            let (line, after) = split_at(rest, b"\r\n")?;
            rest = after;
            let (name, value) = split_at(line, b": ")?;
            Some((std::str::from_utf8(name).ok()?, value))
        })
    }
}

/// RFC 9110 §5.6.2, and no longer than the client library can hold.
fn is_token(name: &[u8]) -> bool {
    let is_token_byte =
        |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !name.is_empty() && name.len() < usize::from(u16::MAX) && name.iter().all(is_token_byte)
}

/// RFC 9110 §5.5, `obs-text` included.
fn is_value_byte(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

fn is_text(byte: &u8) -> bool {
    matches!(byte, b'\t' | b' '..=b'~')
}

fn split_at<'a>(bytes: &'a [u8], separator: &[u8; 2]) -> Option<(&'a [u8], &'a [u8])> {
    let at = bytes.windows(2).position(|pair| pair == separator)?;
    Some((&bytes[..at], &bytes[at + 2..]))
}

fn is_never_forwarded(name: &str) -> bool {
    NEVER_FORWARDED
        .iter()
        .any(|never| name.eq_ignore_ascii_case(never))
        // Ours to set: a sender must not be able to imitate them.
        || name.eq_ignore_ascii_case(ID_HEADER)
        || name.eq_ignore_ascii_case(ATTEMPT_HEADER)
}

/// What `Connection` fields list as belonging to the sender's hop.
fn connection_options<'a>(
    received: impl Iterator<Item = (&'a str, &'a [u8])>,
) -> Result<Vec<&'a [u8]>, Invalid> {
    let options: Vec<_> = received
        .filter(|(field, _)| field.eq_ignore_ascii_case("connection"))
        .flat_map(|(_, value)| value.split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|option| !option.is_empty())
        .take(CONNECTION_OPTIONS_MAX + 1)
        .collect();
    // Each is compared with each field.
    if options.len() > CONNECTION_OPTIONS_MAX {
        return Err(Invalid::Header);
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str, fields: &[(&str, &str)]) -> Result<Request, Invalid> {
        let peer = Peer {
            ip: Some([192, 0, 2, 7].into()),
            host: Some(b"hooks.example"),
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
            ("http://user:password@h", "/", "h"),
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
            &long,
        ] {
            assert_eq!(record(target, &[]), Err(Invalid::Target), "{target:.20}");
        }
        assert_eq!(record("/", &[("a b", "")]), Err(Invalid::Header));
        let many = "a,".repeat(CONNECTION_OPTIONS_MAX + 1);
        assert_eq!(record("/", &[("Connection", &many)]), Err(Invalid::Header));
        assert_eq!(record("/", &[("a", "b\rc")]), Err(Invalid::Header));
        assert_eq!(record("/", &[("a", "b\0c")]), Err(Invalid::Header));
        for method in ["CONNECT", "", "GE T", "G\u{e9}T"] {
            assert_eq!(check_method(method), Err(Invalid::Method), "{method}");
        }
    }

    #[test]
    fn fields_are_those_that_the_client_library_takes() {
        use http::{HeaderName, HeaderValue};
        for byte in 0..=255 {
            let bytes = [b'a', byte, b'b'];
            assert_eq!(
                is_token(&bytes),
                HeaderName::from_bytes(&bytes).is_ok(),
                "{byte}"
            );
            let value = HeaderValue::from_bytes(&bytes);
            assert_eq!(is_value_byte(byte), value.is_ok(), "{byte}");
            assert_eq!(
                is_text(&byte),
                value.is_ok_and(|value| value.to_str().is_ok()),
                "{byte}"
            );
        }
        assert!(!is_token(b""));
    }

    #[test]
    fn header_block_survives_a_store_and_rejects_damage() {
        let request = record("/", &[("X-Bin", "a: b"), ("Y", "")]).unwrap();
        let block = request.headers.as_bytes().to_vec();
        assert_eq!(Headers::from_bytes(block), Ok(request.headers));
        for damaged in ["X", "X: y", "X: y\r\nZ", ": y\r\n", "X y: z\r\n"] {
            assert_eq!(
                Headers::from_bytes(damaged.into()),
                Err(Invalid::Header),
                "{damaged}"
            );
        }
    }
}
