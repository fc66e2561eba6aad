//! A request as it reached the destination.

use std::time::Instant;

use super::http::{self, Message};

/// One request as it arrived.
#[derive(Debug)]
pub struct Seen {
    pub method: String,
    pub target: Vec<u8>,
    /// Field lines in order, names and values byte for byte.
    pub lines: Vec<Vec<u8>>,
    pub body: Vec<u8>,
    /// Number of the connection it came in on, from 0.
    pub connection: usize,
    pub at: Instant,
}

impl Seen {
    /// What came in on connection number `connection`, just now.
    pub fn new(message: Message, connection: usize) -> Seen {
        let mut parts = message.start.splitn(3, |byte| *byte == b' ');
        let method = parts.next().unwrap_or_default();
        let target = parts.next().unwrap_or_default();
        let version = parts.next().unwrap_or_default();
        assert_eq!(version, b"HTTP/1.1", "{:?}", message.start);
        Seen {
            method: String::from_utf8_lossy(method).into_owned(),
            target: target.to_vec(),
            lines: message.lines,
            body: message.body,
            connection,
            at: Instant::now(),
        }
    }

    /// The first value of field `name`.
    pub fn field(&self, name: &str) -> Option<&str> {
        http::field(&self.lines, name)
    }

    /// The number given by [`http::numbered`].
    pub fn number(&self) -> usize {
        self.field("x-id").expect("X-Id").parse().expect("number")
    }

    /// The field lines that may be compared with the sender's: those that the sending side must
    /// set itself are left out. See [`http::grouped`].
    pub fn passed_on(&self) -> Vec<String> {
        let lines = self.lines.iter().filter(|line| !is_own(line));
        http::grouped(lines)
    }

    /// Who has passed it on, as its `Via` fields tell.
    pub fn vias(&self) -> Vec<String> {
        let lines = self.lines.iter().map(|line| String::from_utf8_lossy(line));
        let vias = lines.filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("via").then(|| value.to_owned())
        });
        vias.collect()
    }

    pub fn id(&self) -> &str {
        self.field("x-asyncproxy-id").expect("X-Asyncproxy-Id")
    }

    /// Which attempt it was, from 1.
    pub fn attempt(&self) -> u32 {
        let attempt = self.field("x-asyncproxy-attempt").expect("attempt");
        attempt.parse().expect("number")
    }

    pub fn target(&self) -> String {
        String::from_utf8_lossy(&self.target).into_owned()
    }
}

/// Field lines that the sending side sets itself.
const OWN: [&str; 4] = [
    "host",
    "content-length",
    "x-asyncproxy-id",
    "x-asyncproxy-attempt",
];

fn is_own(line: &[u8]) -> bool {
    let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
    line.starts_with(b"Via: 1.1 asyncproxy-")
        || OWN
            .iter()
            .any(|own| name.eq_ignore_ascii_case(own.as_bytes()))
}
