//! Filters, as they are given on the command line.

use crate::config::parse_duration;
use crate::queue::operate::{Filter, LastStatus, State};

pub(super) const NAMES: [&str; 5] = ["state", "older-than", "newer-than", "path", "status"];

/// What was given so far.
#[derive(Debug, Default)]
pub(super) struct Parts {
    first: Option<String>,
    filter: Filter,
}

impl Parts {
    /// # Errors
    /// What the value must be.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        self.first.get_or_insert_with(|| name.to_owned());
        let age =
            || parse_duration(value).map_err(|must_be| format!("--{name}: must be {must_be}"));
        match name {
            "state" => {
                let state = State::ALL.into_iter().find(|state| state.as_str() == value);
                self.filter.state = Some(state.ok_or("--state: must be waiting, leased or dead")?);
            }
            "older-than" => self.filter.older_than = Some(age()?),
            "newer-than" => self.filter.newer_than = Some(age()?),
            "path" => self.filter.path = Some(value.to_owned()),
            _ => self.filter.status = Some(status(value)?),
        }
        Ok(())
    }

    /// The name of one that was given.
    pub(super) fn first(&self) -> Option<&str> {
        self.first.as_deref()
    }

    /// # Errors
    /// That no request can pass.
    pub(super) fn filter(&self) -> Result<Filter, String> {
        let filter = &self.filter;
        if let (Some(older), Some(newer)) = (filter.older_than, filter.newer_than)
            && older > newer
        {
            return Err("--older-than: must be less than --newer-than".into());
        }
        Ok(filter.clone())
    }
}

fn status(value: &str) -> Result<LastStatus, String> {
    if value == "none" {
        return Ok(LastStatus::NoAnswer);
    }
    let status = value
        .parse()
        .ok()
        .filter(|status| (100..=999).contains(status));
    status
        .map(LastStatus::Answered)
        .ok_or_else(|| "--status: must be a status such as 503, or none".into())
}
