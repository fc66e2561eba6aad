//! Arguments, logger, run, exit status; nothing else.

use std::fmt::Display;
use std::io::{BufWriter, ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::process::exit;

use asyncproxy::cli::bench::Bench;
use asyncproxy::cli::doctor::{self, Doctor};
use asyncproxy::cli::instance::settings;
use asyncproxy::cli::migrate::Migrate;
use asyncproxy::cli::{self, Command, Failure, Shown};
use asyncproxy::config::Config;
use asyncproxy::{allocator, app, logger};
use log::Level;

/// Could not start or go on, or lost something.
const FAILED: i32 = 1;
/// Wrong arguments or settings.
const MISUSED: i32 = 2;

fn main() {
    allocator::configure();
    let status = match cli::parse(std::env::args_os().skip(1)) {
        Err(error) => complain(error, MISUSED),
        Ok(Command::Help(text)) => print(text),
        Ok(Command::Version) => print(concat!("asyncproxy ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::CheckConfig(path, shown)) => check_config(&path, shown),
        Ok(Command::Run(path)) => run(&path),
        Ok(Command::Demo(options)) => match cli::demo::run(options) {
            Ok(true) => 0,
            Ok(false) => FAILED,
            Err(error) => complain(format!("demo: {error}"), FAILED),
        },
        Ok(Command::Doctor(path, options)) => doctor(path.as_deref(), options),
        Ok(Command::Migrate(path, options)) => migrate(path.as_deref(), options),
        Ok(Command::Reload(pid)) => match cli::reload::run(pid) {
            Ok(()) => 0,
            Err(error) => complain(format!("reload: {error}"), FAILED),
        },
        Ok(Command::Sink(sink)) => match cli::sink::run(&sink) {
            Ok(()) => 0,
            Err(error) => complain(format!("sink: {}: {error}", sink.bind), FAILED),
        },
        Ok(Command::Bench(options)) => bench(*options),
        Ok(Command::Queue(path, queue)) => with_output(path.as_deref(), |config, output| {
            cli::queue::run(&queue, config, output).map(|()| 0)
        }),
    };
    // Not a return: workers may still wait for a destination, and need not be waited for.
    exit(status);
}

fn run(path: &Path) -> i32 {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return complain(error, MISUSED),
    };
    if let Err(error) = logger::init(config.log.level, config.log.format) {
        return complain(format!("cannot start the log: {error}"), FAILED);
    }
    logger::log_panics();
    for warning in config.all_warnings() {
        log::warn!("{warning}");
    }
    // Read again on SIGHUP, wherever the program is then.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let status = match app::run(config, &|| Config::load(&path)) {
        Ok(()) => 0,
        Err(error) => {
            // After what was logged, and as that without waiting for whoever reads it.
            logger::say_last(&format_args!("asyncproxy: {error}"));
            FAILED
        }
    };
    logger::flush();
    status
}

/// Runs a command that takes the settings and prints something.
fn with_output(
    path: Option<&Path>,
    command: impl FnOnce(&Config, &mut dyn Write) -> Result<i32, Failure>,
) -> i32 {
    let config = match settings(path) {
        Ok(config) => config,
        Err(error) => return complain(error, MISUSED),
    };
    let mut output = BufWriter::new(std::io::stdout().lock());
    let done = command(&config, &mut output);
    match done.and_then(|status| Ok(output.flush().map(|()| status)?)) {
        Ok(status) => status,
        Err(Failure::Failed(why)) => complain(why, FAILED),
        // Whoever read it has seen enough.
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => 0,
        Err(Failure::Output(error)) => complain(format!("output: {error}"), FAILED),
    }
}

fn check_config(path: &Path, shown: Shown) -> i32 {
    match Config::load(path) {
        Ok(_) if shown == Shown::Errors => 0,
        Ok(config) => {
            for warning in config.all_warnings() {
                complain(format!("warning: {warning}"), 0);
            }
            print(&config.effective())
        }
        Err(error) => complain(error, MISUSED),
    }
}

fn doctor(path: Option<&Path>, options: Doctor) -> i32 {
    let report = doctor::run(path, options);
    let printed = print(&match options.json {
        true => format!("{}\n", doctor::to_json(&report.findings)),
        false => doctor::to_text(&report.findings, std::io::stdout().is_terminal()),
    });
    match report {
        _ if !report.is_readable => MISUSED,
        _ if report.has_errors() => FAILED,
        _ => printed,
    }
}

fn migrate(path: Option<&Path>, options: Migrate) -> i32 {
    let config = match settings(path) {
        Ok(config) => config,
        Err(error) => return complain(error, MISUSED),
    };
    match cli::migrate::run(&config, options) {
        Ok(outcome) => {
            let printed = print(&outcome.text);
            if outcome.is_current { printed } else { FAILED }
        }
        Err(Failure::Failed(why)) => complain(format!("migrate: {why}"), FAILED),
        Err(Failure::Output(error)) => complain(format!("output: {error}"), FAILED),
    }
}

fn bench(options: Bench) -> i32 {
    if let Some(warning) = options.warning() {
        complain(format!("warning: {warning}"), 0);
    }
    match cli::bench::run(options) {
        Ok(report) => {
            let printed = print(&report.to_string());
            if report.is_success() { printed } else { FAILED }
        }
        Err(error) => complain(format!("bench: {error}"), FAILED),
    }
}

fn print(text: &str) -> i32 {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => 0,
        Err(_) => FAILED,
    }
}

fn complain(error: impl Display, status: i32) -> i32 {
    let level = match status {
        0 => Level::Warn,
        _ => Level::Error,
    };
    // A closed stderr changes nothing about the exit status.
    let _ = writeln!(
        std::io::stderr(),
        "{}asyncproxy: {error}",
        logger::prefix(level)
    );
    status
}
