//! A request as a curl command. Whatever it holds, a shell reads it as what it is.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::printable;

/// Longest body that is put on the command line: one argument holds 128 KiB at most.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// What curl would add by itself.
const DEFAULTS: [&str; 4] = ["Accept", "Content-Type", "Expect", "User-Agent"];

/// The command, for any POSIX shell.
pub(super) fn command(
    method: &str,
    url: &str,
    headers: &[(String, Vec<u8>)],
    body: &[u8],
) -> String {
    let is_inline = body.len() <= BODY_BYTES_MAX && printable::is_text(body);
    let mut command = String::new();
    if !is_inline {
        command += &format!(
            "base64 -d <<'END' |\n{}END\n",
            lines(&STANDARD.encode(body))
        );
    }
    // Neither brackets nor dots of the target mean anything to it.
    command += "curl --globoff --path-as-is";
    command += &match method {
        // With any other option it waits for a body.
        "HEAD" => " --head".to_owned(),
        method => format!(" --request {}", quoted(method.as_bytes())),
    };
    let mut add = |line: &[u8]| command += &format!(" \\\n  --header {}", quoted(line));
    for (name, value) in headers {
        if value.is_empty() {
            // With a colon, curl would leave the field out.
            add(format!("{name};").as_bytes());
        } else {
            add(&[name.as_bytes(), b": ", value].concat());
        }
    }
    for name in DEFAULTS {
        if !headers
            .iter()
            .any(|(given, _)| given.eq_ignore_ascii_case(name))
        {
            add(format!("{name}:").as_bytes());
        }
    }
    if !is_inline {
        command += " \\\n  --data-binary @-";
    } else if !body.is_empty() {
        command += &format!(" \\\n  --data-raw {}", quoted(body));
    }
    command + &format!(" \\\n  {}", quoted(url.as_bytes()))
}

fn lines(text: &str) -> String {
    let mut lines = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (line, next) = rest.split_at(rest.len().min(76));
        lines += line;
        lines.push('\n');
        rest = next;
    }
    lines
}

/// One word for a shell. What a terminal could not bear is written in octal.
fn quoted(bytes: &[u8]) -> String {
    let mut word = String::new();
    if printable::is_text(bytes) {
        let text = String::from_utf8_lossy(bytes);
        return format!("'{}'", text.replace('\'', r"'\''"));
    }
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => word.push(char::from(*byte)),
            // Writing to a String cannot fail.
            byte => drop(write!(word, "\\{byte:03o}")),
        }
    }
    format!("\"$(printf '{word}')\"")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// What `sh` makes of a word.
    fn read_by_shell(word: &str) -> Vec<u8> {
        let script = format!("printf %s {word}");
        Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap()
            .stdout
    }

    #[test]
    fn a_shell_reads_what_was_quoted() {
        for hostile in [
            b"plain".as_slice(),
            b"it's $(touch /tmp/x) `id` \\ \" ; & | < > * ? [a] {b} ~ #! %s %%",
            b"line\nline\n\ttab",
            b"\x1b[2J\xff\x80 caf\xc3\xa9 $(id) '\\''",
            b"-n",
            "\u{202e}rtl".as_bytes(),
        ] {
            assert_eq!(
                read_by_shell(&quoted(hostile)),
                hostile,
                "{}",
                quoted(hostile)
            );
        }
        assert!(printable::is_text(quoted(b"\x1b[2J").as_bytes()));
    }

    #[test]
    fn bodies_that_are_no_text_come_through_a_pipe() {
        let body: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let command = command("POST", "http://h/", &[], &body);
        let script = command.replace("curl", "cat; true");
        let read = Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap()
            .stdout;
        assert_eq!(read, body);
    }
}
