//! `asyncproxy migrate`: creates or changes the tables, for those who do not let services do it.

use std::fmt::Write;

use serde_json::json;

use super::Failure;
use super::instance::{self, OtherStore};
use crate::app::visited_store;
use crate::config::{Config, Database, Db};
use crate::printable;
use crate::queue::migrate::{Adopted, Step, Version};
use crate::queue::sqlite::SqliteStore;
use crate::queue::{StoreError, postgres};

/// Options of `asyncproxy migrate`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Migrate {
    /// Only tell what is pending.
    pub status: bool,
    pub json: bool,
    pub other_store: OtherStore,
}

/// What to print, and whether the schema is up to date.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub text: String,
    pub is_current: bool,
}

/// Applies what is pending, or tells it.
///
/// # Errors
/// [`Failure`]; the schema is as it was then.
pub fn run(config: &Config, options: Migrate) -> Result<Outcome, Failure> {
    let _instance = instance::agree(config, &*visited_store(config), options.other_store)?;
    let is_new = match &config.db.database {
        Database::Sqlite(path) => !path.try_exists().unwrap_or(true),
        Database::Postgres(_) => false,
    };
    let before = version(&config.db)?;
    if options.status {
        return Ok(Outcome {
            text: match options.json {
                true => line(&status_json(before)),
                false => status(before),
            },
            is_current: before.applied == before.wanted,
        });
    }
    let steps = migrate(&config.db)?;
    let made = is_new.then(|| config.store().name);
    Ok(Outcome {
        text: match options.json {
            true => line(&steps_json(before, &steps, made)),
            false => told(before, &steps, made),
        },
        is_current: true,
    })
}

fn version(db: &Db) -> Result<Version, StoreError> {
    match &db.database {
        Database::Sqlite(path) => {
            SqliteStore::new(path.clone(), db.use_index, db.timeout).version()
        }
        Database::Postgres(config) => postgres::version(config, db.timeout),
    }
}

fn migrate(db: &Db) -> Result<Vec<Step>, StoreError> {
    match &db.database {
        Database::Sqlite(path) => {
            SqliteStore::new(path.clone(), db.use_index, db.timeout).migrate()
        }
        Database::Postgres(config) => postgres::migrate(config, db.timeout),
    }
}

/// All versions there are, and whether they are applied. Of a newer program's only the numbers are known.
fn status(version: Version) -> String {
    let mut text = String::new();
    for number in 1..=version.applied.max(version.wanted) {
        let state = match (number <= version.applied, number <= version.wanted) {
            (true, true) => "applied",
            (true, false) => "applied by a newer program, not known to this one",
            (false, _) => "pending",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "version {number}: {state}");
    }
    text
}

fn status_json(version: Version) -> serde_json::Value {
    let pending: Vec<i64> = (version.applied + 1..=version.wanted).collect();
    let applied: Vec<i64> = (1..=version.applied).collect();
    json!({ "applied": applied, "pending": pending, "wanted": version.wanted })
}

fn told(before: Version, steps: &[Step], made: Option<String>) -> String {
    if steps.is_empty() {
        return format!("nothing to do: the schema has version {}\n", before.wanted);
    }
    let made = made.map(|file| format!("made {file}, an empty queue\n"));
    let mut text = made.unwrap_or_default();
    for step in steps {
        let _ = write!(text, "applied version {}", step.version);
        if let Some(Adopted { waiting, dead }) = step.adopted {
            let _ = write!(
                text,
                ", took over the queue of the Go program: {waiting} waiting, {}",
                printable::count(dead, "dead letter")
            );
        }
        text.push('\n');
    }
    text
}

fn steps_json(before: Version, steps: &[Step], made: Option<String>) -> serde_json::Value {
    let applied: Vec<serde_json::Value> = steps
        .iter()
        .map(|step| {
            let adopted = step
                .adopted
                .map(|Adopted { waiting, dead }| json!({ "waiting": waiting, "dead": dead }));
            json!({ "version": step.version, "taken_over": adopted })
        })
        .collect();
    json!({ "applied": applied, "version": before.wanted, "made": made })
}

fn line(value: &serde_json::Value) -> String {
    format!("{value}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(applied: i64, wanted: i64) -> Version {
        Version { applied, wanted }
    }

    #[test]
    fn each_version_is_told_apart() {
        assert_eq!(
            status(version(1, 2)),
            "version 1: applied\nversion 2: pending\n"
        );
        assert!(status(version(2, 1)).contains("version 2: applied by a newer program"));
        assert_eq!(
            status_json(version(1, 2)),
            json!({ "applied": [1], "pending": [2], "wanted": 2 })
        );
    }

    #[test]
    fn steps_are_told_with_what_was_taken_over() {
        let adopted = Some(Adopted {
            waiting: 4,
            dead: 1,
        });
        let step = Step {
            version: 1,
            adopted,
        };
        assert_eq!(
            told(version(0, 1), &[step], None),
            "applied version 1, took over the queue of the Go program: 4 waiting, 1 dead letter\n"
        );
        assert_eq!(
            told(version(1, 1), &[], None),
            "nothing to do: the schema has version 1\n"
        );
    }
}
