//! The header fields of a recorded request: which of those that came in are passed on, and how
//! they are kept.
//!
//! [`Headers`] never holds a field that must not be forwarded, wherever its fields are from: a
//! sender, a store's row, or a line of an import. `Host` may stand first, and goes its own way.

use std::fmt;

use memchr::memchr;

use super::{Invalid, Peer, is_authority};

/// Most field lines of one request: those that the intake takes (100), and what is added to them.
pub const LINES_MAX: usize = 128;
/// Most bytes of them, as [`Headers::as_bytes`] has them: those that the intake takes (64 KiB), a
/// space more in each, and what is added.
pub const BLOCK_BYTES_MAX: usize = 128 * 1024;

/// Names that `Connection` fields may list.
const CONNECTION_OPTIONS_MAX: usize = 32;

/// Fields that belong to one hop and are never passed on (RFC 9110 §7.6.1); those that the sending
/// side sets itself: the framing, `Host` and `Expect`; and `Proxy`, which CGI programs would take
/// for the proxy that they are to use (httpoxy).
const NEVER_FORWARDED: [&str; 12] = [
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
    "proxy",
];

/// The first field, if it is kept.
const HOST: &str = "Host";

/// All of ours begin so: [`super::ID_HEADER`], [`super::ATTEMPT_HEADER`], and those to come.
const OWN_PREFIX: &str = "x-asyncproxy-";

/// Fields about the sender that we, or a proxy in front of us, set.
const FORWARDED_PREFIX: &str = "x-forwarded-";

/// What becomes of a field that came in, by its name alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Not passed on.
    Drop,
    /// Folded into the one field that ends with the sender's address.
    ForwardedFor,
    /// Passed on, in the place of the one that would be added.
    ForwardedHost,
    ForwardedProto,
    /// Passed on if we are not in it, before our own.
    Via,
    Pass,
}

/// CGI and WSGI make one variable of names that differ only in case and in `_` for `-`: what a
/// destination could take for a field that is ours or the framing's is treated as if it were.
fn fate(name: &str) -> Fate {
    let is_dropped = NEVER_FORWARDED.iter().any(|never| is_like(name, never))
        // Ours to set, those of other versions, too: a sender must not be able to imitate them.
        || begins_like(name, OWN_PREFIX);
    if is_dropped {
        return Fate::Drop;
    }
    if begins_like(name, FORWARDED_PREFIX) {
        return match name {
            // Beside the real one it would be the sender's word against that of a proxy.
            name if name.contains('_') => Fate::Drop,
            name if name.eq_ignore_ascii_case("x-forwarded-for") => Fate::ForwardedFor,
            name if name.eq_ignore_ascii_case("x-forwarded-host") => Fate::ForwardedHost,
            name if name.eq_ignore_ascii_case("x-forwarded-proto") => Fate::ForwardedProto,
            _ => Fate::Pass,
        };
    }
    match name.eq_ignore_ascii_case("via") {
        true => Fate::Via,
        false => Fate::Pass,
    }
}

/// Whether CGI takes both names for the same. `known` is in lower case, with hyphens.
fn is_like(name: &str, known: &str) -> bool {
    name.len() == known.len() && begins_like(name, known)
}

fn begins_like(name: &str, known: &str) -> bool {
    let alike = |(byte, known): (u8, u8)| {
        byte.to_ascii_lowercase() == known || (byte == b'_' && known == b'-')
    };
    name.len() >= known.len() && name.bytes().zip(known.bytes()).all(alike)
}

/// Header fields in order, repeats and bytes kept, held as they stand on the wire:
/// `Name: value CR LF` each. The stores keep this block as it is.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers {
    block: Vec<u8>,
    lines: usize,
}

/// Names only: values may be secrets.
impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|(name, _)| name))
            .finish()
    }
}

impl Headers {
    /// What is passed on of `received`, and what is added.
    pub(super) fn forwarded<'a>(
        received: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
        peer: Peer<'_>,
    ) -> Result<Headers, Invalid> {
        let mut headers = Headers {
            block: Vec::with_capacity(512),
            lines: 0,
        };
        let mut forwarded_for = Vec::new();
        let (mut has_forwarded_host, mut has_forwarded_proto) = (false, false);
        let hop = connection_options(received.clone())?;
        for (name, value) in received {
            let fate = fate(name);
            if fate == Fate::Via && peer.mark.is_some_and(|mark| mark.is_in(value)) {
                return Err(Invalid::Loop);
            }
            if fate == Fate::Drop || is_listed(name, &hop) {
                continue;
            }
            if fate == Fate::ForwardedFor {
                add_member(&mut forwarded_for, value);
                continue;
            }
            has_forwarded_host |= fate == Fate::ForwardedHost;
            has_forwarded_proto |= fate == Fate::ForwardedProto;
            headers.append(name, value)?;
        }
        if let Some(ip) = peer.ip {
            add_member(&mut forwarded_for, ip.to_canonical().to_string().as_bytes());
        }
        if !forwarded_for.is_empty() {
            headers.append("X-Forwarded-For", &forwarded_for)?;
        }
        // A proxy in front of us knows better what the sender asked it for.
        if let (Some(host), false) = (peer.host, has_forwarded_host) {
            headers.append("X-Forwarded-Host", host)?;
        }
        if !has_forwarded_proto {
            let proto = peer.manners.proto.as_str();
            headers.append("X-Forwarded-Proto", proto.as_bytes())?;
        }
        if let Some(mark) = peer.mark {
            headers.append("Via", &mark.value(peer.is_10))?;
        }
        if let (Some(host), true) = (peer.host, peer.manners.preserves_host && has_forwarded_host) {
            // Else it stands in the field that was added.
            headers.keep_host(host)?;
        }
        Ok(headers)
    }

    /// Keeps what came in as `Host` apart from what a proxy says it was: before all else.
    fn keep_host(&mut self, host: &[u8]) -> Result<(), Invalid> {
        let others = std::mem::take(self);
        self.append(HOST, host)?;
        let (block, lines) = (others.block, others.lines);
        if self.lines + lines > LINES_MAX || self.block.len() + block.len() > BLOCK_BYTES_MAX {
            return Err(Invalid::Fields);
        }
        self.block.extend_from_slice(&block);
        self.lines += lines;
        Ok(())
    }

    /// What came in as `Host`, as far as it was kept.
    pub fn host(&self) -> Option<&[u8]> {
        let (_, kept) = self.parts();
        let mut told = self
            .iter()
            .filter(|(name, _)| fate(name) == Fate::ForwardedHost);
        let told = told
            .next()
            .map(|(_, value)| value)
            .filter(|_| told.next().is_none());
        kept.or(told)
            .filter(|host| !host.is_empty() && is_authority(host))
    }

    /// All but `Host`, which depends on the destination, as it is sent.
    pub fn to_send(&self) -> &[u8] {
        self.parts().0
    }

    /// The fields that are sent as they are, and what is kept of `Host`.
    fn parts(&self) -> (&[u8], Option<&[u8]>) {
        match split_line(&self.block) {
            Some((HOST, host, rest)) => (rest, Some(host)),
            _ => (&self.block, None),
        }
    }

    /// Takes back fields that were recorded once, from wherever they were kept. What must never
    /// be forwarded is left out, as when they were received, whoever has put it there.
    ///
    /// # Errors
    /// As [`Headers::push`].
    pub fn restored<'a>(
        fields: impl Iterator<Item = (&'a str, &'a [u8])> + Clone,
    ) -> Result<Headers, Invalid> {
        // Before anything is done with each of them.
        if fields.clone().nth(LINES_MAX).is_some() {
            return Err(Invalid::Fields);
        }
        let hop = connection_options(fields.clone())?;
        let mut headers = Headers::default();
        for (number, (name, value)) in fields.enumerate() {
            if number == 0 && name == HOST {
                headers.append(name, value)?;
            } else if !is_listed(name, &hop) {
                headers.push(name, value)?;
            }
        }
        Ok(headers)
    }

    /// Appends one field, if it may be forwarded; else it is checked only.
    ///
    /// # Errors
    /// [`Invalid::Header`] if the name is not a token, or the value has a control character
    /// other than a tab (RFC 9110 §5.5), or is one that the client library refuses;
    /// [`Invalid::Fields`] past [`LINES_MAX`] or [`BLOCK_BYTES_MAX`].
    pub fn push(&mut self, name: &str, value: &[u8]) -> Result<(), Invalid> {
        match fate(name) {
            Fate::Drop => check_field(name, value),
            _ => self.append(name, value),
        }
    }

    fn append(&mut self, name: &str, value: &[u8]) -> Result<(), Invalid> {
        check_field(name, value)?;
        let bytes = self.block.len() + name.len() + value.len() + 4;
        if self.lines == LINES_MAX || bytes > BLOCK_BYTES_MAX {
            return Err(Invalid::Fields);
        }
        self.lines += 1;
        self.block.extend_from_slice(name.as_bytes());
        self.block.extend_from_slice(b": ");
        self.block.extend_from_slice(value);
        self.block.extend_from_slice(b"\r\n");
        Ok(())
    }

    /// The block as the stores keep it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.block
    }

    /// Takes a block back from a store, as [`Headers::restored`] does.
    ///
    /// # Errors
    /// [`Invalid::Header`] if it is not a block of valid fields, [`Invalid::Fields`] if there are
    /// too many of them.
    pub fn from_bytes(block: Vec<u8>) -> Result<Headers, Invalid> {
        if block.len() > BLOCK_BYTES_MAX {
            return Err(Invalid::Fields);
        }
        let (mut lines, mut is_clean) = (0, true);
        let mut rest = block.as_slice();
        while !rest.is_empty() {
            let (name, value, after) = split_line(rest).ok_or(Invalid::Header)?;
            check_field(name, value)?;
            is_clean &= fate(name) != Fate::Drop || (lines == 0 && name == HOST);
            lines += 1;
            if lines > LINES_MAX {
                return Err(Invalid::Fields);
            }
            rest = after;
        }
        match is_clean {
            true => Ok(Headers { block, lines }),
            // Not written by this version.
            false => Headers::restored(lines_of(&block)),
        }
    }

    /// The fields in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> + Clone {
        lines_of(&self.block)
    }
}

/// The fields of a block up to the first that is none.
fn lines_of(block: &[u8]) -> impl Iterator<Item = (&str, &[u8])> + Clone {
    let mut rest = block;
    std::iter::from_fn(move || {
        let (name, value, after) = split_line(rest)?;
        rest = after;
        Some((name, value))
    })
}

/// The name and the value of the first line, and what follows it.
fn split_line(block: &[u8]) -> Option<(&str, &[u8], &[u8])> {
    let end = memchr(b'\n', block)?;
    let line = block[..end].strip_suffix(b"\r")?;
    let colon = memchr(b':', line)?;
    let value = line[colon + 1..].strip_prefix(b" ")?;
    let name = str::from_utf8(&line[..colon]).ok()?;
    Some((name, value, &block[end + 1..]))
}

fn check_field(name: &str, value: &[u8]) -> Result<(), Invalid> {
    let is_field = is_token(name.as_bytes()) && value.iter().copied().all(is_value_byte);
    // ureq reads this one field as text and refuses it otherwise.
    let is_refused = name.eq_ignore_ascii_case("authorization") && !value.iter().all(is_text);
    match is_field && !is_refused {
        true => Ok(()),
        false => Err(Invalid::Header),
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

/// Makes one list of many fields.
fn add_member(list: &mut Vec<u8>, value: &[u8]) {
    if !list.is_empty() {
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(value);
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

fn is_listed(name: &str, options: &[&[u8]]) -> bool {
    let mut options = options.iter();
    options.any(|option| option.eq_ignore_ascii_case(name.as_bytes()))
}

#[cfg(test)]
mod tests;
