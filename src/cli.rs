//! The command line: what was asked for, and the text of `--help`.

pub mod bench;
pub mod demo;
pub mod doctor;
pub mod help;
pub mod instance;
pub mod migrate;
pub mod queue;
pub mod reload;
pub mod sink;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

use crate::config::{Bind, parse_duration};
use crate::queue::StoreError;
use bench::Bench;
use demo::Demo;
use doctor::Doctor;
use help::unexpected;
use instance::OtherStore;
use migrate::Migrate;

/// What the program is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Run(PathBuf),
    CheckConfig(PathBuf, Shown),
    Demo(Demo),
    Doctor(Option<PathBuf>, Doctor),
    Migrate(Option<PathBuf>, Migrate),
    Sink(Sink),
    Bench(Box<Bench>),
    Queue(Option<PathBuf>, Box<queue::Queue>),
    /// Of which process.
    Reload(i32),
    /// What to print.
    Help(&'static str),
    Version,
}

/// How much `--check-config` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    Settings,
    /// Only what is wrong with them.
    Errors,
}

/// Why a command was not carried out.
#[derive(Debug)]
pub enum Failure {
    Failed(String),
    /// Nobody takes the output any more, or the disk is full.
    Output(io::Error),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::Failed(error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Output(error)
    }
}

/// Options of `asyncproxy sink`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sink {
    pub bind: Bind,
    pub status: u16,
    pub delay: Duration,
}

/// Understands the arguments, without the program's name.
///
/// # Errors
/// One line that says what is wrong with them.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut parser = Parser::from_args(arguments);
    let mut config = None;
    let (mut is_check, mut is_quiet) = (false, false);
    while let Some(argument) = next(&mut parser)? {
        match argument {
            Arg::Long("config") => config = Some(PathBuf::from(value(&mut parser)?)),
            Arg::Long("check-config") => is_check = true,
            Arg::Long("quiet") => is_quiet = true,
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::PROGRAM)),
            Arg::Long("version") | Arg::Short('V') => return Ok(Command::Version),
            Arg::Value(command) if is_quiet => {
                return Err(unexpected(Arg::Value(command), ""));
            }
            Arg::Value(command) if command == "help" && !is_check => {
                return parse_help(&mut parser);
            }
            Arg::Value(command) if command == "doctor" && !is_check => {
                return parse_doctor(&mut parser, config);
            }
            Arg::Value(command) if command == "migrate" && !is_check => {
                return parse_migrate(&mut parser, config);
            }
            Arg::Value(command) if command == "demo" && config.is_none() && !is_check => {
                return parse_demo(&mut parser);
            }
            Arg::Value(command) if command == "reload" && config.is_none() && !is_check => {
                return parse_reload(&mut parser);
            }
            Arg::Value(command) if command == "sink" && config.is_none() && !is_check => {
                return parse_sink(&mut parser);
            }
            Arg::Value(command) if command == "bench" && config.is_none() && !is_check => {
                return bench::parse(&mut parser);
            }
            Arg::Value(command) if command == "queue" && !is_check => {
                return Ok(match queue::parse(&mut parser)? {
                    None => Command::Help(queue::HELP),
                    Some(queue) => {
                        let path = queue.config.clone().or(config);
                        Command::Queue(path, Box::new(queue))
                    }
                });
            }
            other => return Err(unexpected(other, "")),
        }
    }
    let config = or_default(config);
    match (is_check, is_quiet) {
        (true, false) => Ok(Command::CheckConfig(config, Shown::Settings)),
        (true, true) => Ok(Command::CheckConfig(config, Shown::Errors)),
        (false, false) => Ok(Command::Run(config)),
        (false, true) => Err("--quiet: only goes with --check-config".into()),
    }
}

fn or_default(config: Option<PathBuf>) -> PathBuf {
    config.unwrap_or_else(|| PathBuf::from("config.yaml"))
}

fn parse_help(parser: &mut Parser) -> Result<Command, String> {
    let text = match next(parser)? {
        None => help::PROGRAM,
        Some(Arg::Value(command)) => command
            .to_str()
            .filter(|name| help::is_command(name))
            .map(help::of)
            .ok_or_else(|| unexpected(Arg::Value(command.clone()), ""))?,
        Some(other) => return Err(unexpected(other, "")),
    };
    Ok(Command::Help(text))
}

fn parse_demo(parser: &mut Parser) -> Result<Command, String> {
    let mut demo = Demo::default();
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Long("seconds") => {
                let seconds = text(parser)?.parse().ok();
                demo.seconds = seconds
                    .filter(|seconds| demo::SECONDS.contains(seconds))
                    .ok_or("--seconds: must be a whole number from 8 to 3600")?;
            }
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::of("demo"))),
            other => return Err(unexpected(other, "demo")),
        }
    }
    Ok(Command::Demo(demo))
}

fn parse_doctor(parser: &mut Parser, mut config: Option<PathBuf>) -> Result<Command, String> {
    let mut doctor = Doctor::default();
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Long("config") => config = Some(PathBuf::from(value(parser)?)),
            Arg::Long("json") => doctor.json = true,
            Arg::Long("deep") => doctor.deep = true,
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::of("doctor"))),
            other => return Err(unexpected(other, "doctor")),
        }
    }
    Ok(Command::Doctor(config, doctor))
}

fn parse_migrate(parser: &mut Parser, mut config: Option<PathBuf>) -> Result<Command, String> {
    let mut migrate = Migrate::default();
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Long("config") => config = Some(PathBuf::from(value(parser)?)),
            Arg::Long("status") => migrate.status = true,
            Arg::Long("other-store") => migrate.other_store = OtherStore::Use,
            Arg::Long("json") => migrate.json = true,
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::of("migrate"))),
            other => return Err(unexpected(other, "migrate")),
        }
    }
    Ok(Command::Migrate(config, migrate))
}

fn parse_reload(parser: &mut Parser) -> Result<Command, String> {
    let mut process = None;
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Value(pid) if process.is_none() => {
                let pid = pid.to_str().and_then(|pid| pid.parse().ok());
                let pid = pid.filter(|pid| *pid > 0);
                process = Some(pid.ok_or("reload: PID must be the number of a process")?);
            }
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::of("reload"))),
            other => return Err(unexpected(other, "reload")),
        }
    }
    let process = process.ok_or("reload: which process? See --help")?;
    Ok(Command::Reload(process))
}

fn parse_sink(parser: &mut Parser) -> Result<Command, String> {
    let mut sink = Sink {
        bind: Bind::parse(":5000")?,
        status: 200,
        delay: Duration::ZERO,
    };
    while let Some(argument) = next(parser)? {
        let wrong = |option: &str, why: &str| format!("{option}: must be {why}");
        match argument {
            Arg::Long("bind") => {
                sink.bind =
                    Bind::parse(&text(parser)?).map_err(|why: String| wrong("--bind", &why))?;
            }
            Arg::Long("status") => {
                let status = text(parser)?.parse().ok();
                sink.status = status
                    .filter(|status| (200..=599).contains(status))
                    .ok_or("--status: must be a whole number from 200 to 599")?;
            }
            Arg::Long("delay") => {
                sink.delay =
                    parse_duration(&text(parser)?).map_err(|why: String| wrong("--delay", &why))?;
            }
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::of("sink"))),
            other => return Err(unexpected(other, "sink")),
        }
    }
    Ok(Command::Sink(sink))
}

fn next<'a>(parser: &'a mut Parser) -> Result<Option<Arg<'a>>, String> {
    parser.next().map_err(|error| error.to_string())
}

fn value(parser: &mut Parser) -> Result<OsString, String> {
    parser.value().map_err(|error| error.to_string())
}

fn text(parser: &mut Parser) -> Result<String, String> {
    value(parser)?.string().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn understands_each_command() {
        for (line, command) in [
            ("", Command::Run("config.yaml".into())),
            ("--config a.yaml", Command::Run("a.yaml".into())),
            (
                "--check-config --config=a",
                Command::CheckConfig("a".into(), Shown::Settings),
            ),
            (
                "--quiet --check-config",
                Command::CheckConfig("config.yaml".into(), Shown::Errors),
            ),
            ("demo", Command::Demo(Demo { seconds: 15 })),
            ("demo --seconds 8", Command::Demo(Demo { seconds: 8 })),
            ("-h", Command::Help(help::PROGRAM)),
            ("help", Command::Help(help::PROGRAM)),
            ("help queue", Command::Help(queue::HELP)),
            ("queue ls --help", Command::Help(queue::HELP)),
            ("sink --help", Command::Help(help::of("sink"))),
            ("help sink", Command::Help(help::of("sink"))),
            ("reload 17", Command::Reload(17)),
            ("bench --help", Command::Help(help::of("bench"))),
            ("--version", Command::Version),
        ] {
            assert_eq!(parse_line(line), Ok(command), "{line}");
        }
        let migrate = |path: Option<&str>, status, json, other_store| {
            let options = Migrate {
                status,
                json,
                other_store,
            };
            Command::Migrate(path.map(PathBuf::from), options)
        };
        let (refuse, use_it) = (OtherStore::Refuse, OtherStore::Use);
        for (line, command) in [
            ("migrate", migrate(None, false, false, refuse)),
            ("migrate --status", migrate(None, true, false, refuse)),
            ("migrate --other-store", migrate(None, false, false, use_it)),
            (
                "--config a migrate --json",
                migrate(Some("a"), false, true, refuse),
            ),
            (
                "migrate --config a",
                migrate(Some("a"), false, false, refuse),
            ),
            (
                "--config a doctor --deep --json",
                Command::Doctor(
                    Some("a".into()),
                    Doctor {
                        json: true,
                        deep: true,
                    },
                ),
            ),
        ] {
            assert_eq!(parse_line(line), Ok(command), "{line}");
        }
        let sink = Command::Sink(Sink {
            bind: Bind::parse("127.0.0.1:0").unwrap(),
            status: 503,
            delay: Duration::from_millis(1500),
        });
        let line = "sink --bind 127.0.0.1:0 --status 503 --delay 1.5s";
        assert_eq!(parse_line(line), Ok(sink));
    }

    #[test]
    fn names_what_it_does_not_understand() {
        for (line, part) in [
            ("--confg a", "--confg"),
            ("run", "\"run\""),
            ("--config", "--config"),
            ("sink --status 99", "200 to 599"),
            ("sink --delay soon", "--delay"),
            ("sink --bind nowhere", "--bind"),
            ("--config a sink", "\"sink\""),
            ("--check-config bench", "\"bench\""),
            ("--quiet", "--check-config"),
            ("reload", "which process"),
            ("reload 0", "must be the number of a process"),
            ("reload -1", "\"-1\""),
            ("reload 1 2", "\"2\""),
            ("--quiet doctor", "\"doctor\""),
        ] {
            let error = parse_line(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
