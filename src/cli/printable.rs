//! Text from outside on its way to a terminal.

use std::fmt::Write;

/// One line: what is printable stays, anything else is escaped.
pub fn line(bytes: &[u8]) -> String {
    escaped(bytes, |_| false)
}

/// As [`line()`], but line ends and tabs stay, too.
pub fn text(bytes: &[u8]) -> String {
    escaped(bytes, |character| matches!(character, '\n' | '\t'))
}

/// Whether nothing would be escaped as text.
pub fn is_text(bytes: &[u8]) -> bool {
    text(bytes).as_bytes() == bytes
}

fn escaped(bytes: &[u8], is_kept: impl Fn(char) -> bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' | '"' | '\'' => text.push(character),
                kept if is_kept(kept) => text.push(kept),
                other => text.extend(other.escape_debug()),
            }
        }
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_the_terminal() {
        let hostile = b"a\x1b[2J\r\xff\xc3\xa9\n\"{\\}\"\x00";
        assert_eq!(text(hostile), "a\\u{1b}[2J\\r\\xff\u{e9}\n\"{\\}\"\\0");
        assert_eq!(line(b"a\nb\tc"), "a\\nb\\tc");
        // Right-to-left override.
        assert_eq!(line("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert!(is_text("{\"a\":\n\t\"\u{e9}\"}".as_bytes()));
        assert!(!is_text(b"a\0") && !is_text(b"\xff") && !is_text(b"\r\n"));
    }
}
