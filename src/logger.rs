//! Lines on stderr, in logfmt or JSON: one line, and one write, for each event.
//!
//! Whatever senders and destinations put into a value, it stays within that value: quotes and
//! control characters are escaped, so that nobody forges lines or drives a terminal. A log that
//! cannot be written is lost, and one that nobody reads is dropped: it never stops the program, nor
//! any thread of it. Panics are logged like all else.

mod form;

use std::fmt;
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::lines::Lines;
use crate::thread::Threads;
use form::Form;
pub use form::Format;

/// How often a limited event is logged.
const LIMIT_INTERVAL: Duration = Duration::from_secs(10);
/// How long the end of the program waits for whoever reads the log.
const FLUSH_TIME: Duration = Duration::from_secs(2);

static OTHER_CRATES: LogLimit = LogLimit::new();

static LOGGER: Logger = Logger {
    is_colored: AtomicBool::new(false),
    has_priority: AtomicBool::new(false),
    is_json: AtomicBool::new(false),
};

/// On their way to stderr.
static LINES: Lines = Lines::new(dropped_line);

/// Logs to stderr from now on, up to `level`; of other crates, warnings and errors only.
///
/// Coloured on a terminal, unless the environment has `LOG_COLOR=false` or `NO_COLOR`;
/// `LOG_COLOR=true` colours always. To the journal, each line begins with its priority.
///
/// # Errors
/// The system's, when it gives no thread.
pub fn init(level: LevelFilter, format: Format) -> io::Result<()> {
    let wanted = color_wanted(
        std::env::var("LOG_COLOR").ok().as_deref(),
        std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
        io::stderr().is_terminal(),
    );
    LOGGER.is_colored.store(wanted, Ordering::Relaxed);
    let has_priority = is_read_by_the_journal();
    LOGGER.has_priority.store(has_priority, Ordering::Relaxed);
    static IS_WRITING: Mutex<bool> = Mutex::new(false);
    let mut is_writing = IS_WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    if !*is_writing {
        Threads::default().spawn_spare("log".to_owned(), || LINES.write_to(io::stderr()))?;
        *is_writing = true;
    }
    // Fails when there is a logger already: this one, or a test's.
    let _ = log::set_logger(&LOGGER);
    set(level, format);
    Ok(())
}

/// Changes what is logged, and how.
pub fn set(level: LevelFilter, format: Format) {
    log::set_max_level(level);
    let is_json = format == Format::Json;
    LOGGER.is_json.store(is_json, Ordering::Relaxed);
}

/// What a line for stderr must begin with to be taken for what it is: for the journal its
/// priority, and else nothing.
pub fn prefix(level: Level) -> &'static str {
    match is_read_by_the_journal() {
        true => form::priority(level),
        false => "",
    }
}

/// Whether stderr is what systemd says it has connected with the journal: a program started by the
/// service may have another.
fn is_read_by_the_journal() -> bool {
    let Ok(found) = rustix::fs::fstat(io::stderr()) else {
        return false;
    };
    let stream = std::env::var("JOURNAL_STREAM").ok();
    stream.is_some_and(|stream| stream == format!("{}:{}", found.st_dev, found.st_ino))
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

/// The last words of a program that logs, in a form of their own: for whoever looks at its exit
/// status. Among lines of JSON they are one of these.
pub fn say_last(words: &dyn fmt::Display) {
    let form = LOGGER.form();
    LINES.push_last(match form.format {
        Format::Json => {
            let mut record = Record::builder();
            record.level(Level::Error);
            form.line(
                &record.args(format_args!("{words}")).build(),
                SystemTime::now(),
            )
        }
        Format::Logfmt if form.has_priority => {
            format!("{}{words}\n", form::priority(Level::Error))
        }
        Format::Logfmt => format!("{words}\n"),
    });
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
    let pairs = [("lines", count)];
    let mut record = Record::builder();
    record.level(Level::Warn).key_values(&pairs);
    record.args(format_args!("log lines dropped, nobody read them"));
    LOGGER.form().line(&record.build(), SystemTime::now())
}

fn color_wanted(log_color: Option<&str>, no_color: bool, terminal: bool) -> bool {
    match log_color.map(str::to_ascii_lowercase).as_deref() {
        Some("true" | "1" | "yes" | "on" | "always") => true,
        Some("false" | "0" | "no" | "off" | "never") => false,
        _ => terminal && !no_color,
    }
}

struct Logger {
    is_colored: AtomicBool,
    has_priority: AtomicBool,
    is_json: AtomicBool,
}

impl Logger {
    fn form(&self) -> Form {
        Form {
            format: match self.is_json.load(Ordering::Relaxed) {
                true => Format::Json,
                false => Format::Logfmt,
            },
            is_colored: self.is_colored.load(Ordering::Relaxed),
            has_priority: self.has_priority.load(Ordering::Relaxed),
        }
    }
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
            LINES.push(self.form().line(record, SystemTime::now()));
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

    #[test]
    fn dropped_lines_are_told_of_in_logfmt() {
        let line = dropped_line(7);
        assert!(line.starts_with("ts="), "{line}");
        let rest = " level=warn msg=\"log lines dropped, nobody read them\" lines=7\n";
        assert!(line.ends_with(rest), "{line}");
    }

    #[test]
    fn of_other_crates_only_warnings_and_errors() {
        init(LevelFilter::Debug, Format::Logfmt).unwrap();
        init(LevelFilter::Debug, Format::Logfmt).unwrap();
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
