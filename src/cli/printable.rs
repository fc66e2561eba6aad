//! Text from outside on its way to a terminal.

use std::fmt::Write;

use serde_json::Value;

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

/// One line of JSON. What a terminal might take for more than text is escaped, as JSON has it.
pub fn json(value: &Value) -> String {
    let mut line = String::new();
    for character in value.to_string().chars() {
        // Quotes and backslashes are JSON's own; what it has left beyond ASCII may be anything.
        let is_plain = character.is_ascii_graphic()
            || character == ' '
            || (!character.is_ascii() && character.escape_debug().len() == 1);
        if is_plain {
            line.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            let _ = write!(line, "\\u{unit:04x}");
        }
    }
    line
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
        let hostile = Value::from("\u{9b}2J\u{7f}\u{202e}\u{e9}\n\"\u{1f600}");
        let line = json(&hostile);
        assert_eq!(line, "\"\\u009b2J\\u007f\\u202e\u{e9}\\n\\\"\u{1f600}\"");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), hostile);
        assert!(is_text("{\"a\":\n\t\"\u{e9}\"}".as_bytes()));
        assert!(!is_text(b"a\0") && !is_text(b"\xff") && !is_text(b"\r\n"));
    }
}
