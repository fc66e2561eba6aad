//! The host and port that a request is for. One check for `Host` and for an absolute target.

use std::net::Ipv6Addr;

/// Whether this is a `uri-host [ ":" port ]` (RFC 9112 §3.2, RFC 3986 §3.2.2 and §3.2.3): what a
/// `Host` field may say. May be empty, and has no user information.
pub fn is_authority(text: &[u8]) -> bool {
    let (is_host, port) = match text.strip_prefix(b"[") {
        Some(literal) => match literal.iter().position(|byte| *byte == b']') {
            Some(end) => (is_literal(&literal[..end]), &literal[end + 1..]),
            None => return false,
        },
        None => {
            let end = text.iter().position(|byte| *byte == b':');
            let (name, port) = text.split_at(end.unwrap_or(text.len()));
            (is_name(name), port)
        }
    };
    let is_port = match port {
        [] => true,
        [b':', digits @ ..] => digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    is_host && is_port
}

/// `reg-name`, which an IPv4 address is, too.
fn is_name(name: &[u8]) -> bool {
    let mut rest = name;
    while let [first, after @ ..] = rest {
        rest = match (first, after) {
            (b'%', [high, low, after @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                after
            }
            (byte, after) if is_unreserved_or_delimiter(*byte) => after,
            _ => return false,
        };
    }
    true
}

/// What stands between brackets: an IPv6 address, or one of a version to come.
fn is_literal(literal: &[u8]) -> bool {
    if let [b'v' | b'V', future @ ..] = literal {
        let Some(dot) = future.iter().position(|byte| *byte == b'.') else {
            return false;
        };
        let (version, address) = (&future[..dot], &future[dot + 1..]);
        let is_address_byte = |byte: &u8| *byte == b':' || is_unreserved_or_delimiter(*byte);
        return !version.is_empty()
            && version.iter().all(u8::is_ascii_hexdigit)
            && !address.is_empty()
            && address.iter().all(is_address_byte);
    }
    str::from_utf8(literal).is_ok_and(|address| address.parse::<Ipv6Addr>().is_ok())
}

fn is_unreserved_or_delimiter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_those_of_rfc_3986() {
        for good in [
            "",
            "h",
            "h:",
            "h:80",
            ":80",
            "Hooks.example.",
            "a_b-c~d",
            "192.0.2.1:8080",
            "h%C3%A4%41",
            "a!$&'()*+,;=",
            "[::1]",
            "[2001:DB8::192.0.2.1]:443",
            "[v1.fe80:a+b]",
        ] {
            assert!(is_authority(good.as_bytes()), "{good}");
        }
        for bad in [
            "a b",
            "a\tb",
            "a/b",
            "a?b",
            "a#b",
            "a@b",
            "u:p@h",
            "a\"b",
            "a<b",
            "a>b",
            "a\\b",
            "a^b",
            "a`b",
            "a{b",
            "a|b",
            "a\0b",
            "a\rb",
            "a\nb",
            "\u{e4}",
            "h:x",
            "h:8 0",
            "h:80:80",
            "h:-1",
            "::1",
            "[::1",
            "::1]",
            "[]",
            "[h]",
            "[::1]x",
            "[::1]80",
            "[fe80::1%25eth0]",
            "[v.a]",
            "[v1.]",
            "[vx.a]",
            "%",
            "a%4",
            "a%zz",
            "[::1]]",
            "[[::1]]",
        ] {
            assert!(!is_authority(bad.as_bytes()), "{bad:?}");
        }
        assert!(!is_authority(b"a\xff"));
    }
}
