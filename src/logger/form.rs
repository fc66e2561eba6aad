//! The form of a line: logfmt or JSON, coloured, or with the priority that the journal asks for.

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use log::kv::{self, Key, Value, VisitSource};
use log::{Level, Record};
use serde_json::Value as Json;

use crate::printable;

/// Bytes of a message or value, before escaping; what is longer is cut.
const VALUE_BYTES_MAX: usize = 1000;
/// Left out when zero: see [`LogLimit`](super::LogLimit).
const SUPPRESSED: &str = "suppressed";

/// What a line looks like, which `log.format` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Logfmt,
    Json,
}

/// How lines are written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub(super) format: Format,
    /// Of logfmt only.
    pub(super) is_colored: bool,
    /// Whether each line begins with its priority, as sd-daemon(3) has it.
    pub(super) has_priority: bool,
}

impl Form {
    /// The line of an event, with its end.
    pub(super) fn line(self, record: &Record<'_>, now: SystemTime) -> String {
        let mut line = match self.has_priority {
            true => priority(record.level()).to_owned(),
            false => String::new(),
        };
        match self.format {
            Format::Logfmt => push_logfmt(&mut line, record, now, self.is_colored),
            Format::Json => push_json(&mut line, record, now),
        }
        line.push('\n');
        line
    }
}

/// What the journal takes off a line, and keeps as its priority.
pub(super) fn priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

fn name(level: Level) -> (&'static str, u8) {
    match level {
        Level::Error => ("error", 31),
        Level::Warn => ("warn", 33),
        Level::Info => ("info", 32),
        Level::Debug => ("debug", 36),
        Level::Trace => ("trace", 35),
    }
}

fn push_logfmt(line: &mut String, record: &Record<'_>, now: SystemTime, is_colored: bool) {
    let ts = humantime::format_rfc3339_millis(now);
    let (level, code) = name(record.level());
    // Writing to a string never fails.
    let _ = match is_colored {
        true => write!(line, "ts={ts} level=\x1b[{code}m{level}\x1b[0m msg="),
        false => write!(line, "ts={ts} level={level} msg="),
    };
    push_quoted(line, &Cut::of(record.args()));
    let _ = record.key_values().visit(&mut Pairs(line));
}

/// One object, its members in the order of logfmt.
fn push_json(line: &mut String, record: &Record<'_>, now: SystemTime) {
    let ts = humantime::format_rfc3339_millis(now);
    let (level, _) = name(record.level());
    let text = Json::from(Cut::of(record.args()));
    let msg = printable::json(&text);
    let _ = write!(
        line,
        "{{\"ts\":\"{ts}\",\"level\":\"{level}\",\"msg\":{msg}"
    );
    let _ = record.key_values().visit(&mut Members(line));
    line.push('}');
}

/// Whether a pair has nothing to tell.
fn is_left_out(key: &Key<'_>, value: &Value<'_>) -> bool {
    key.as_str() == SUPPRESSED && value.to_u64() == Some(0)
}

/// A key that forges nothing, whichever crate it comes from.
fn push_key(line: &mut String, key: &Key<'_>) {
    line.extend(key.as_str().chars().map(|c| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '.' | '-' => c,
        _ => '_',
    }));
}

/// Writes ` key=value` for each pair.
struct Pairs<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        if is_left_out(&key, &value) {
            return Ok(());
        }
        self.0.push(' ');
        push_key(self.0, &key);
        self.0.push('=');
        let text = Cut::of(&value);
        if is_plain(&text) {
            self.0.push_str(&text);
        } else {
            push_quoted(self.0, &text);
        }
        Ok(())
    }
}

/// Writes `,"key":value` for each pair.
struct Members<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Members<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        if is_left_out(&key, &value) {
            return Ok(());
        }
        self.0.push_str(",\"");
        push_key(self.0, &key);
        self.0.push_str("\":");
        let json = match (value.to_bool(), value.to_u64(), value.to_i64()) {
            (Some(is_so), ..) => Json::from(is_so),
            (_, Some(number), _) => Json::from(number),
            (.., Some(number)) => Json::from(number),
            _ => Json::from(Cut::of(&value)),
        };
        self.0.push_str(&printable::json(&json));
        Ok(())
    }
}

/// Collects text up to a limit and says so when there is more.
struct Cut(String);

impl Cut {
    fn of(value: &dyn fmt::Display) -> String {
        let mut cut = Cut(String::new());
        if write!(cut, "{value}").is_err() {
            cut.0.push_str("...");
        }
        cut.0
    }
}

impl fmt::Write for Cut {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = VALUE_BYTES_MAX - self.0.len();
        if text.len() <= room {
            self.0.push_str(text);
            return Ok(());
        }
        self.0.push_str(&text[..text.floor_char_boundary(room)]);
        Err(fmt::Error)
    }
}

fn is_plain(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\'))
}

fn push_quoted(line: &mut String, text: &str) {
    line.push('"');
    push_escaped(line, text);
    line.push('"');
}

/// Escapes quotes, backslashes, and all that is invisible or turns the direction of writing.
fn push_escaped(line: &mut String, text: &str) {
    for part in text.split_inclusive(['"', '\\']) {
        let plain = part.trim_end_matches(['"', '\\']);
        printable::push(line, plain);
        line.extend(part[plain.len()..].chars().flat_map(char::escape_debug));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PLAIN: Form = Form {
        format: Format::Logfmt,
        is_colored: false,
        has_priority: false,
    };

    fn written(
        form: Form,
        level: Level,
        pairs: &[(&str, Value<'_>)],
        args: fmt::Arguments<'_>,
    ) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678);
        let record = Record::builder()
            .level(level)
            .target("asyncproxy::app")
            .key_values(&pairs)
            .args(args)
            .build();
        form.line(&record, now)
    }

    fn logged(level: Level, pairs: &[(&str, Value<'_>)], args: fmt::Arguments<'_>) -> String {
        written(PLAIN, level, pairs, args)
    }

    fn value(text: &str) -> String {
        let line = logged(
            Level::Info,
            &[("v", Value::from(text))],
            format_args!("msg"),
        );
        let (_, value) = line.split_once(" v=").unwrap();
        value.strip_suffix('\n').unwrap().to_owned()
    }

    #[test]
    fn a_line_has_time_level_message_and_pairs_in_order() {
        let pairs = [
            ("addr", Value::from("127.0.0.1:8080")),
            ("left", Value::from(3)),
            ("error", Value::from("no route")),
        ];
        assert_eq!(
            logged(Level::Info, &pairs, format_args!("listening")),
            "ts=2026-01-02T03:04:05.678Z level=info msg=\"listening\" addr=127.0.0.1:8080 left=3 error=\"no route\"\n"
        );
    }

    #[test]
    fn suppressed_is_left_out_when_zero() {
        let with = |count: u64| {
            logged(
                Level::Warn,
                &[("suppressed", Value::from(count))],
                format_args!("x"),
            )
        };
        assert!(!with(0).contains("suppressed"));
        assert!(with(7).ends_with(" suppressed=7\n"));
    }

    #[test]
    fn values_cannot_forge_lines_or_terminal_sequences() {
        assert_eq!(value("plain-1.0/x:y"), "plain-1.0/x:y");
        assert_eq!(value(""), r#""""#);
        assert_eq!(value("a b"), r#""a b""#);
        assert_eq!(value("a=b"), r#""a=b""#);
        assert_eq!(value(r#"say "hi" c:\d"#), r#""say \"hi\" c:\\d""#);
        assert_eq!(value("it's"), "it's");
        assert_eq!(
            value("x\nts=1 level=error\r\t"),
            r#""x\nts=1 level=error\r\t""#
        );
        assert_eq!(value("\u{1b}[31m\u{7}\u{9b}"), r#""\u{1b}[31m\u{7}\u{9b}""#);
        assert_eq!(
            value("\u{202e}\u{200b}\u{2066}\u{feff}\u{2028}\u{3164}"),
            r#""\u{202e}\u{200b}\u{2066}\u{feff}\u{2028}\u{3164}""#
        );
        assert_eq!(value("grün"), r#""grün""#);
    }

    #[test]
    fn keys_of_other_crates_cannot_forge_pairs() {
        let line = logged(
            Level::Info,
            &[("a b=\n", Value::from(1))],
            format_args!("x"),
        );
        assert!(line.ends_with(" a_b__=1\n"), "{line}");
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let long = value(&"ä".repeat(5000));
        assert_eq!(long, format!("\"{}...\"", "ä".repeat(VALUE_BYTES_MAX / 2)));
        let odd = value(&format!("x{}", "ä".repeat(5000)));
        assert!(odd.len() <= VALUE_BYTES_MAX + 5, "{}", odd.len());
        let fits = "x".repeat(VALUE_BYTES_MAX);
        assert_eq!(value(&fits), fits);
        let message = "y".repeat(5000);
        assert!(logged(Level::Info, &[], format_args!("{message}")).len() < 1100);
    }

    #[test]
    fn json_has_the_same_in_the_same_order_and_forges_nothing() {
        let json = Form {
            format: Format::Json,
            ..PLAIN
        };
        let pairs = [
            ("addr", Value::from("127.0.0.1:8080")),
            ("left", Value::from(3)),
            ("below", Value::from(-3)),
            ("is_new", Value::from(true)),
            ("suppressed", Value::from(0)),
            ("a\"b", Value::from("x\n\"\u{1b}[31m\u{202e}\u{9b}")),
        ];
        let line = written(json, Level::Warn, &pairs, format_args!("say \"hi\"\n"));
        assert_eq!(
            line,
            concat!(
                r#"{"ts":"2026-01-02T03:04:05.678Z","level":"warn","msg":"say \"hi\"\n","#,
                r#""addr":"127.0.0.1:8080","left":3,"below":-3,"is_new":true,"#,
                r#""a_b":"x\n\"\u001b[31m\u202e\u009b"}"#,
                "\n"
            )
        );
        let long = written(json, Level::Info, &[], format_args!("{}", "y".repeat(5000)));
        assert!(serde_json::from_str::<Json>(&long).unwrap()["msg"].is_string());
        assert!(long.len() < 1100, "{}", long.len());
    }

    #[test]
    fn each_level_has_its_priority() {
        for format in [Format::Logfmt, Format::Json] {
            let form = Form {
                format,
                is_colored: false,
                has_priority: true,
            };
            for (level, number) in [
                (Level::Error, 3),
                (Level::Warn, 4),
                (Level::Info, 6),
                (Level::Debug, 7),
                (Level::Trace, 7),
            ] {
                let line = written(form, level, &[], format_args!("x"));
                let plain = Form {
                    has_priority: false,
                    ..form
                };
                let rest = written(plain, level, &[], format_args!("x"));
                assert_eq!(line, format!("<{number}>{rest}"));
            }
        }
    }

    #[test]
    fn levels_are_coloured() {
        let colored = Form {
            is_colored: true,
            ..PLAIN
        };
        let line = written(colored, Level::Error, &[], format_args!("x"));
        assert!(line.contains("level=\u{1b}[31merror\u{1b}[0m "));
    }
}
