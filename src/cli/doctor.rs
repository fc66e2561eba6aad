//! `asyncproxy doctor`: looks at what operators get wrong, and says how to mend it. Changes nothing.
//!
//! Each check is in two parts: what gathers facts, and a pure function that makes a [`Finding`] of them.

mod file;
mod finding;
mod machine;
mod outside;
mod owner;
mod postgres;
mod settings;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crossbeam_channel::bounded;

use super::instance;
use crate::app::visited_store;
use crate::config::{Config, Database};
use crate::thread::Threads;
pub use finding::{Finding, Level, to_json, to_text};

/// How long anything besides the database is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Options of `asyncproxy doctor`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Doctor {
    pub json: bool,
    /// Read SQLite files whole.
    pub deep: bool,
}

/// What was found, and the exit status that goes with it.
#[derive(Debug)]
pub struct Report {
    pub findings: Vec<Finding>,
    /// Without settings there is nothing else to look at.
    pub is_readable: bool,
}

impl Report {
    pub fn has_errors(&self) -> bool {
        let mut levels = self.findings.iter().map(|finding| finding.level);
        levels.any(|level| level == Level::Error)
    }
}

/// Looks at everything that the settings in `path` lead to.
pub fn run(path: Option<&Path>, options: Doctor) -> Report {
    const ABOUT: &str = "settings";
    let config = match instance::settings(path) {
        Ok(config) => config,
        Err(error) => {
            let mend = "correct it; --check-config shows what is understood";
            return Report {
                findings: vec![Finding::error(ABOUT, error, mend)],
                is_readable: false,
            };
        }
    };
    let path = config.path.as_deref().unwrap_or(Path::new(""));
    let mut findings = vec![Finding::ok(ABOUT, format!("{path:?} is understood"))];
    for warning in config.warnings() {
        findings.push(Finding::warning(ABOUT, warning, "leave it out"));
    }
    findings.extend(config.exposed().iter().map(settings::exposed));
    findings.extend(settings::findings(&config));
    findings.extend(machine::findings(&config));
    findings.extend(running(&config));
    match &config.db.database {
        Database::Sqlite(path) => {
            findings.extend(file::findings(
                "db.connection_string",
                path,
                &config,
                options,
            ));
        }
        Database::Postgres(database) => findings.extend(postgres::findings(database, &config)),
    }
    if let Some(path) = &config.db.spool {
        findings.extend(file::findings("db.spool", path, &config, options));
    }
    findings.extend(outside::findings(&config));
    Report {
        findings,
        is_readable: true,
    }
}

/// Whether the instance that runs with these settings has the store that they lead to.
fn running(config: &Config) -> Option<Finding> {
    const ABOUT: &str = "running instance";
    let instance = instance::running(config).ok()?;
    // A store that does not work is told of where it is looked at.
    let has_it = instance
        .has_store_of(config, &*visited_store(config))
        .ok()??;
    Some(match has_it {
        true => Finding::ok(ABOUT, "it has the store of these settings"),
        false => Finding::error(
            ABOUT,
            instance.difference(config),
            "look with the settings that it was started with, environment and credentials included; as \
             root, without --config and where no config.yaml is, those of a service are found",
        ),
    })
}

/// Does something that knows no time limit; `None` if it takes too long.
fn within<T: Send + 'static>(
    timeout: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = bounded(1);
    let spawned = Threads::default().spawn_spare("doctor".to_owned(), move || {
        let _ = sender.send(work());
    });
    spawned.ok()?;
    receiver.recv_timeout(timeout).ok()
}

/// What a program of the system's says, if it is there and succeeds.
fn told_by(program: &'static str, arguments: &'static [&'static str]) -> Option<String> {
    within(PATIENCE, move || {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let output = command.output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(text)
    })?
}

/// A size for people: `512 MiB`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut value = bytes;
    while value >= 10_240 && unit + 1 < UNITS.len() {
        value /= 1024;
        unit += 1;
    }
    format!("{value} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (10_239, "10239 bytes"),
            (10_240, "10 KiB"),
            (256 << 20, "256 MiB"),
            (u64::MAX, "16777215 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn what_takes_too_long_is_not_waited_for() {
        let (_kept, never) = bounded::<()>(0);
        assert_eq!(
            within(Duration::from_millis(1), move || never.recv().is_ok()),
            None
        );
        assert_eq!(within(PATIENCE, || 1), Some(1));
    }
}
