//! Who has passed a request on (`Via`, RFC 9110 §7.6.3), and whether that was us already.

use std::fmt;

/// How every asyncproxy names itself in `Via`.
const NAME: &[u8] = b"asyncproxy-";
/// The protocol it received a request with, as `Via` tells it.
const PROTOCOLS: [&[u8]; 2] = [b"1.1 ", b"1.0 "];

const MARK_BYTES: usize = NAME.len() + 8;
const VALUE_BYTES: usize = 4 + MARK_BYTES;

/// Tells this program from others of its kind: a request with the same mark in its `Via` has been
/// here before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u32);

impl Mark {
    /// The same for the same parts, after restarts and in other versions, too.
    pub fn of(parts: &[&str]) -> Mark {
        // FNV-1a, whose values are fixed. Parts end with a byte that no UTF-8 has.
        let bytes = parts
            .iter()
            .flat_map(|part| part.bytes().chain(std::iter::once(0xff)));
        Mark(bytes.fold(0x811c_9dc5, |hash: u32, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        }))
    }

    pub fn from_bits(bits: u32) -> Mark {
        Mark(bits)
    }

    pub fn to_bits(self) -> u32 {
        self.0
    }

    fn bytes(self) -> [u8; MARK_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        let (name, digits) = bytes.split_at_mut(NAME.len());
        name.copy_from_slice(NAME);
        for (digit, shift) in digits.iter_mut().zip((0..8).rev()) {
            *digit = b"0123456789abcdef"[(self.0 >> (4 * shift)) as usize & 0xf];
        }
        bytes
    }

    /// The value of the `Via` field that is added to what came in with HTTP/1.0 or HTTP/1.1.
    pub(super) fn value(self, is_10: bool) -> [u8; VALUE_BYTES] {
        let mut value = [0; VALUE_BYTES];
        let (protocol, mark) = value.split_at_mut(VALUE_BYTES - MARK_BYTES);
        protocol.copy_from_slice(PROTOCOLS[usize::from(is_10)]);
        mark.copy_from_slice(&self.bytes());
        value
    }

    /// Whether a `Via` field names this program: as the second word of one of its members.
    pub(super) fn is_in(self, via: &[u8]) -> bool {
        let mark = self.bytes();
        via.split(|byte| *byte == b',').any(|member| {
            let mut words = member
                .split(|byte| matches!(byte, b' ' | b'\t'))
                .filter(|word| !word.is_empty());
            words
                .nth(1)
                .is_some_and(|by| by.eq_ignore_ascii_case(&mark))
        })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_stable_and_tell_programs_apart() {
        let mark = Mark::of(&["host", ":8080", "http://localhost:5000"]);
        assert_eq!(mark.to_string(), "asyncproxy-5d6b8ee2");
        assert_eq!(Mark::from_bits(mark.to_bits()), mark);
        for other in [
            ["other", ":8080", "http://localhost:5000"],
            ["host", ":8081", "http://localhost:5000"],
            ["host", ":8080", "http://localhost:5001"],
            ["host:", "8080", "http://localhost:5000"],
        ] {
            assert_ne!(Mark::of(&other), mark, "{other:?}");
        }
        assert_eq!(mark.value(false), *b"1.1 asyncproxy-5d6b8ee2");
        assert_eq!(Mark(0xf).value(true), *b"1.0 asyncproxy-0000000f");
    }

    #[test]
    fn a_mark_is_found_wherever_it_stands() {
        let mark = Mark(0x0a1b_2c3d);
        for own in [
            "1.1 asyncproxy-0a1b2c3d",
            "1.0\tASYNCPROXY-0A1B2C3D (comment)",
            "1.1 fred, HTTP/1.1  asyncproxy-0a1b2c3d ,, 1.1 p.example.net",
        ] {
            assert!(mark.is_in(own.as_bytes()), "{own}");
        }
        for other in [
            "",
            ",",
            "asyncproxy-0a1b2c3d",
            "1.1 asyncproxy-0a1b2c3e",
            "1.1 asyncproxy-0a1b2c3d0",
            "1.1 fred asyncproxy-0a1b2c3d",
        ] {
            assert!(!mark.is_in(other.as_bytes()), "{other}");
        }
    }
}
