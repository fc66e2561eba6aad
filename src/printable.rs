//! Text from outside on its way to a terminal, or to a page that may be read on one.

use std::fmt::Write;

use serde_json::Value;

/// One line: what is printable stays, anything else is escaped.
pub fn line(bytes: &[u8]) -> String {
    escaped(bytes, |_| false)
}

/// A number of things: `1 request`, `2 requests`. What one of them is called takes an s for more.
pub fn count(number: u64, one: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {one}s"),
    }
}

/// As [`line()`], but line ends and tabs stay, too.
pub fn text(bytes: &[u8]) -> String {
    escaped(bytes, |character| matches!(character, '\n' | '\t'))
}

/// Whether nothing would be escaped as text.
pub fn is_text(bytes: &[u8]) -> bool {
    text(bytes).as_bytes() == bytes
}

/// JSON. What a terminal might take for more than text is escaped, as JSON has it.
pub fn json(value: &Value) -> String {
    let mut line = String::new();
    for character in value.to_string().chars() {
        if !is_hidden(character) {
            line.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            let _ = write!(line, "\\u{unit:04x}");
        }
    }
    line
}

/// Appends text in which what is invisible is escaped.
pub fn push(line: &mut String, text: &str) {
    text.chars()
        .for_each(|character| push_char(line, character));
}

fn push_char(line: &mut String, character: char) {
    if is_blank(character) {
        line.extend(character.escape_unicode());
    } else if is_hidden(character) {
        line.extend(character.escape_debug());
    } else {
        line.push(character);
    }
}

/// Whether it is invisible, steers a terminal or turns the direction of writing.
pub fn is_hidden(character: char) -> bool {
    match character {
        '"' | '\'' | '\\' => false,
        _ => is_blank(character) || character.escape_debug().len() > 1,
    }
}

/// Letters and symbols by their category, but blank on the screen.
fn is_blank(character: char) -> bool {
    matches!(
        character,
        '\u{115f}' | '\u{1160}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}'
    )
}

fn escaped(bytes: &[u8], is_kept: impl Fn(char) -> bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if is_kept(character) {
                text.push(character);
            } else {
                push_char(&mut text, character);
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
    fn a_number_agrees_with_its_noun() {
        for (number, one, said) in [
            (0, "request", "0 requests"),
            (1, "request", "1 request"),
            (2, "dead letter", "2 dead letters"),
            (11, "line", "11 lines"),
            (u64::MAX, "byte", "18446744073709551615 bytes"),
        ] {
            assert_eq!(count(number, one), said);
        }
    }

    #[test]
    fn nothing_steers_the_terminal() {
        let hostile = b"a\x1b[2J\r\xff\xc3\xa9\n\"{\\}\"\x00";
        assert_eq!(text(hostile), "a\\u{1b}[2J\\r\\xff\u{e9}\n\"{\\}\"\\0");
        assert_eq!(line(b"a\nb\tc"), "a\\nb\\tc");
        // Right-to-left override, and a letter that looks like nothing.
        assert_eq!(line("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert_eq!(line("a\u{3164}b".as_bytes()), "a\\u{3164}b");
        for hidden in ('\u{80}'..='\u{9f}').chain('\u{2066}'..='\u{2069}') {
            assert!(is_hidden(hidden), "{hidden:?}");
        }
        let hostile = Value::from("\u{9b}2J\u{7f}\u{202e}\u{e9}\n\"\u{1f600}");
        let line = json(&hostile);
        assert_eq!(line, "\"\\u009b2J\\u007f\\u202e\u{e9}\\n\\\"\u{1f600}\"");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), hostile);
        assert!(is_text("{\"a\":\n\t\"\u{e9}\"}".as_bytes()));
        assert!(!is_text(b"a\0") && !is_text(b"\xff") && !is_text(b"\r\n"));
    }
}
