//! `asyncproxy migrate`: the schema, for those who do not let services change it.

use std::io::Write;
use std::path::PathBuf;

use lexopt::{Arg, Parser};
use serde_json::json;

use super::{Failure, next, unexpected, value};
use crate::app::visited_store;
use crate::config::Config;
use crate::queue::migrate::{Upkeep, check_version};
use crate::queue::operate::Versions;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrate {
    /// Only tell.
    is_status: bool,
    is_json: bool,
}

/// Understands what follows `migrate`, with the path of the settings. `None`: the help is wanted.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(parser: &mut Parser) -> Result<Option<(Option<PathBuf>, Migrate)>, String> {
    let mut migrate = Migrate {
        is_status: false,
        is_json: false,
    };
    let mut config = None;
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Long("status") => migrate.is_status = true,
            Arg::Long("json") => migrate.is_json = true,
            Arg::Long("config") => config = Some(value(parser)?.into()),
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            other => return Err(unexpected(other)),
        }
    }
    Ok(Some((config, migrate)))
}

impl Migrate {
    /// Returns the exit status.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn run(&self, config: &Config, output: &mut dyn Write) -> Result<i32, Failure> {
        let looked_at = visited_store(config, Upkeep::None);
        let before = looked_at.versions()?;
        check_version(before.applied, before.wanted)?;
        if !self.is_status && before.applied != before.wanted {
            // Opening it does it.
            visited_store(config, Upkeep::Migrate).sample()?;
        }
        let after = looked_at.versions()?;
        let is_current = after.applied == after.wanted;
        if self.is_json {
            let state = json!({
                "version": after.applied,
                "wanted": after.wanted,
                "was": before.applied,
                "up_to_date": is_current,
            });
            writeln!(output, "{state}")?;
        } else {
            writeln!(output, "{}", text(before, after))?;
        }
        Ok(i32::from(!is_current))
    }
}

fn text(before: Versions, after: Versions) -> String {
    let (applied, wanted) = (after.applied, after.wanted);
    if before.applied != applied {
        let converted = match before.is_go_table {
            true => ", the Go program's table converted with its rows",
            false => "",
        };
        return format!(
            "brought from version {} to {applied}{converted}",
            before.applied
        );
    }
    if applied == wanted {
        return format!("up to date, at version {applied}");
    }
    let what = match (applied, after.is_go_table) {
        (0, true) => "the Go program's table is there, which would be converted".to_owned(),
        (0, false) => "there is no queue yet".to_owned(),
        _ => format!("at version {applied}"),
    };
    format!("{what}; this program needs version {wanted}: run `asyncproxy migrate`")
}
