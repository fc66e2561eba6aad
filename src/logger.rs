//! logfmt on stderr: one line, and one write, for each event.
//!
//! Whatever senders and destinations put into a value, it stays within that value: quotes and
//! control characters are escaped, so that nobody forges lines or drives a terminal. A log that
//! cannot be written is lost, and one that nobody reads is dropped: it never stops the program, nor
//! any thread of it. Panics are logged like all else.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use log::kv::{self, Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::lines::Lines;
use crate::printable;
use crate::thread::Threads;

/// Bytes of a message or value, before escaping; what is longer is cut.
const VALUE_BYTES_MAX: usize = 1000;
/// How often a limited event is logged.
const LIMIT_INTERVAL: Duration = Duration::from_secs(10);
/// Left out when zero: see [`LogLimit`].
const SUPPRESSED: &str = "suppressed";

/// How long the end of the program waits for whoever reads the log.
const FLUSH_TIME: Duration = Duration::from_secs(2);

static OTHER_CRATES: LogLimit = LogLimit::new();

static LOGGER: Logger = Logger {
    color: AtomicBool::new(false),
};

/// On their way to stderr.
static LINES: Lines = Lines::new(dropped_line);

/// Logs to stderr from now on, up to `level`; of other crates, warnings and errors only.
///
/// Coloured on a terminal, unless the environment has `LOG_COLOR=false` or `NO_COLOR`;
/// `LOG_COLOR=true` colours always. Calling it again changes the level.
///
/// # Errors
/// The system's, when it gives no thread.
pub fn init(level: LevelFilter) -> io::Result<()> {
    let wanted = color_wanted(
        std::env::var("LOG_COLOR").ok().as_deref(),
        std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
        io::stderr().is_terminal(),
    );
    LOGGER.color.store(wanted, Ordering::Relaxed);
    static IS_WRITING: Mutex<bool> = Mutex::new(false);
    let mut is_writing = IS_WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    if !*is_writing {
        Threads::default().spawn_spare("log".to_owned(), || LINES.write_to(io::stderr()))?;
        *is_writing = true;
    }
    // Fails when there is a logger already: this one, or a test's.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
    Ok(())
}

/// Logs panics from now on. What the standard library would do waits for whoever reads stderr.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        log_panic(panic);
        // Of the main thread, it is the end of the program.
        if std::thread::current().name() == Some("main") {
            flush();
        }
    }));
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("");
    let at = panic.location().map(ToString::to_string);
    let at = at.unwrap_or_default();
    let what = panic.payload_as_str().unwrap_or("");
    log::error!(thread, at, what; "a thread panicked: please report it");
}

/// The last words of a program that logs, not in logfmt: for whoever looks at its exit status.
pub fn say_last(words: &dyn fmt::Display) {
    LINES.push_last(format!("{words}\n"));
}

/// Waits until all that was logged is written, but not for long when nobody reads it.
pub fn flush() {
    LINES.flush(FLUSH_TIME);
}

/// How many lines were not written, because nobody read them or because of an error.
pub fn dropped() -> u64 {
    LINES.dropped()
}

fn dropped_line(count: u64) -> String {
    let color = LOGGER.color.load(Ordering::Relaxed);
    let pairs = [("lines", count)];
    let mut record = Record::builder();
    record.level(Level::Warn).key_values(&pairs);
    record.args(format_args!("log lines dropped, nobody read them"));
    line(&record.build(), SystemTime::now(), color)
}

fn color_wanted(log_color: Option<&str>, no_color: bool, terminal: bool) -> bool {
    match log_color.map(str::to_ascii_lowercase).as_deref() {
        Some("true" | "1" | "yes" | "on" | "always") => true,
        Some("false" | "0" | "no" | "off" | "never") => false,
        _ => terminal && !no_color,
    }
}

struct Logger {
    color: AtomicBool,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let is_wanted = is_own(metadata) || metadata.level() <= Level::Warn;
        metadata.level() <= log::max_level() && is_wanted
    }

    fn log(&self, record: &Record<'_>) {
        // What other crates say once for each request would flood the log.
        let is_logged = self.enabled(record.metadata())
            && (is_own(record.metadata()) || OTHER_CRATES.allow().is_some());
        if is_logged {
            let color = self.color.load(Ordering::Relaxed);
            LINES.push(line(record, SystemTime::now(), color));
        }
    }

    fn flush(&self) {
        flush();
    }
}

fn is_own(metadata: &Metadata<'_>) -> bool {
    metadata
        .target()
        .strip_prefix(env!("CARGO_CRATE_NAME"))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn line(record: &Record<'_>, now: SystemTime, color: bool) -> String {
    let ts = humantime::format_rfc3339_millis(now);
    let (level, code) = match record.level() {
        Level::Error => ("error", 31),
        Level::Warn => ("warn", 33),
        Level::Info => ("info", 32),
        Level::Debug => ("debug", 36),
        Level::Trace => ("trace", 35),
    };
    let mut line = if color {
        format!("ts={ts} level=\x1b[{code}m{level}\x1b[0m msg=")
    } else {
        format!("ts={ts} level={level} msg=")
    };
    push_quoted(&mut line, &Cut::of(record.args()));
    let mut pairs = Pairs(&mut line);
    // `Pairs` never fails.
    let _ = record.key_values().visit(&mut pairs);
    line.push('\n');
    line
}

/// Writes ` key=value` for each pair.
struct Pairs<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        if key.as_str() == SUPPRESSED && value.to_u64() == Some(0) {
            return Ok(());
        }
        self.0.push(' ');
        self.0.extend(key.as_str().chars().map(|c| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '.' | '-' => c,
            _ => '_',
        }));
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

/// Limits how often one event is logged: once in ten seconds.
///
/// ```
/// # use asyncproxy::logger::LogLimit;
/// static FAILED: LogLimit = LogLimit::new();
/// if let Some(suppressed) = FAILED.allow() {
///     log::warn!(suppressed; "it failed");
/// }
/// ```
#[derive(Debug)]
pub struct LogLimit(Mutex<Limit>);

#[derive(Debug)]
struct Limit {
    logged: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    #[expect(clippy::new_without_default, reason = "made for statics")]
    pub const fn new() -> LogLimit {
        LogLimit(Mutex::new(Limit {
            logged: None,
            suppressed: 0,
        }))
    }

    /// Whether to log the event now, and if so, how many were not logged since the last one.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut limit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let early = limit
            .logged
            .is_some_and(|logged| now.saturating_duration_since(logged) < LIMIT_INTERVAL);
        if early {
            limit.suppressed = limit.suppressed.saturating_add(1);
            return None;
        }
        limit.logged = Some(now);
        Some(std::mem::take(&mut limit.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(level: Level, pairs: &[(&str, Value<'_>)], args: fmt::Arguments<'_>) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678);
        let record = Record::builder()
            .level(level)
            .target("asyncproxy::app")
            .key_values(&pairs)
            .args(args)
            .build();
        line(&record, now, false)
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
    fn dropped_lines_are_told_of_in_logfmt() {
        let line = dropped_line(7);
        assert!(line.starts_with("ts="), "{line}");
        let rest = " level=warn msg=\"log lines dropped, nobody read them\" lines=7\n";
        assert!(line.ends_with(rest), "{line}");
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
    fn of_other_crates_only_warnings_and_errors() {
        init(LevelFilter::Debug).unwrap();
        init(LevelFilter::Debug).unwrap();
        let enabled = |target: &str, level| {
            LOGGER.enabled(&Metadata::builder().target(target).level(level).build())
        };
        assert!(enabled("asyncproxy", Level::Debug));
        assert!(enabled("asyncproxy::worker", Level::Info));
        assert!(!enabled("asyncproxy::worker", Level::Trace));
        assert!(!enabled("asyncproxyish", Level::Info));
        assert!(!enabled("ureq", Level::Info));
        assert!(enabled("ureq", Level::Warn));
    }

    #[test]
    fn color_follows_the_environment_then_the_terminal() {
        assert!(color_wanted(None, false, true));
        assert!(!color_wanted(None, false, false));
        assert!(!color_wanted(None, true, true));
        assert!(!color_wanted(Some("false"), false, true));
        assert!(!color_wanted(Some("0"), false, true));
        assert!(color_wanted(Some("true"), true, false));
        let record = Record::builder()
            .level(Level::Error)
            .args(format_args!("x"))
            .build();
        assert!(line(&record, SystemTime::now(), true).contains("level=\u{1b}[31merror\u{1b}[0m "));
    }

    #[test]
    fn a_limit_allows_one_in_ten_seconds_and_counts_the_rest() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let at = |ms| limit.allow_at(start + Duration::from_millis(ms));
        assert_eq!(at(0), Some(0));
        assert_eq!(at(1), None);
        assert_eq!(at(9_999), None);
        assert_eq!(at(10_000), Some(2));
        assert_eq!(at(10_001), None);
        assert_eq!(at(60_000), Some(1));
        assert_eq!(at(5), None);
    }
}
