//! Settings as text, from the YAML file and the environment, not yet understood.

use std::collections::BTreeMap;
use std::fmt;

use serde_yaml::Value;

use super::{SETTINGS, Setting};

/// What is wrong with the settings, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub(super) String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// Text from outside, quoted: control characters cannot get through.
fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(200).collect();
    format!("{shown:?}")
}

/// All settings, each with its text and, if it came from there, its ENV name.
#[derive(Debug)]
pub(super) struct Raw(BTreeMap<&'static str, (String, Option<String>)>);

impl Raw {
    /// `env` looks up an environment variable; an empty one counts as unset.
    pub(super) fn read(
        yaml: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Raw, ConfigError> {
        let mut raw = Raw(SETTINGS
            .iter()
            .map(|setting| (setting.key, (setting.default.to_owned(), None)))
            .collect());
        raw.take_yaml(yaml)?;
        for setting in SETTINGS {
            let name = setting.env();
            if let Some(text) = env(&name).filter(|text| !text.is_empty()) {
                raw.0.insert(setting.key, (text, Some(name)));
            }
        }
        Ok(raw)
    }

    fn take_yaml(&mut self, yaml: &str) -> Result<(), ConfigError> {
        let root: Value = serde_yaml::from_str(yaml)
            .map_err(|error| ConfigError(format!("not YAML: {}", one_line(&error.to_string()))))?;
        let sections = match root {
            Value::Null => return Ok(()),
            Value::Mapping(sections) => sections,
            _ => {
                return Err(ConfigError(
                    "must hold sections such as server: and queue:".into(),
                ));
            }
        };
        for (section, settings) in sections {
            let section = scalar(&section).unwrap_or_default();
            let is_known = SETTINGS.iter().any(|setting| setting.section() == section);
            if !is_known {
                return Err(unknown(&section));
            }
            match settings {
                Value::Null => {}
                Value::Mapping(settings) => {
                    for (name, value) in settings {
                        let key = format!("{section}.{}", scalar(&name).unwrap_or_default());
                        self.take_value(&key, &value)?;
                    }
                }
                _ => {
                    return Err(ConfigError(format!(
                        "{section}: must hold settings, one a line"
                    )));
                }
            }
        }
        Ok(())
    }

    fn take_value(&mut self, key: &str, value: &Value) -> Result<(), ConfigError> {
        let setting = find(key).ok_or_else(|| unknown(key))?;
        let text = match value {
            // Nothing after the colon: as if the line were not there.
            Value::Null => return Ok(()),
            Value::Sequence(values) => values
                .iter()
                .map(scalar)
                .collect::<Option<Vec<_>>>()
                .map(|texts| texts.join(", ")),
            value => scalar(value),
        };
        let text =
            text.ok_or_else(|| ConfigError(format!("{key}: must be {}", setting.accepts)))?;
        self.0.insert(setting.key, (text, None));
        Ok(())
    }

    pub(super) fn text(&self, key: &str) -> &str {
        self.0.get(key).map_or("", |(text, _)| text)
    }

    /// Understands a setting. What it must be is what `parse` says.
    pub(super) fn get<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        parse(self.text(key)).map_err(|must_be| {
            self.error(
                key,
                &format!("must be {must_be} (got {})", quoted(self.text(key))),
            )
        })
    }

    /// As [`Raw::get`], for a value that must not be shown.
    pub(super) fn get_secret<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        parse(self.text(key)).map_err(|must_be| self.error(key, &format!("must be {must_be}")))
    }

    pub(super) fn error(&self, key: &str, what: &str) -> ConfigError {
        match self.0.get(key) {
            Some((_, Some(name))) => ConfigError(format!("{key} (from {name}): {what}")),
            _ => ConfigError(format!("{key}: {what}")),
        }
    }
}

fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(boolean) => Some(boolean.to_string()),
        _ => None,
    }
}

/// An error for a section or key that is not there, with the one that was probably meant.
fn unknown(key: &str) -> ConfigError {
    let names = SETTINGS
        .iter()
        .flat_map(|setting| [setting.key, setting.section()]);
    let nearest = names
        .map(|name| (strsim::damerau_levenshtein(name, key), name))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, name)| format!("; did you mean {name}?"))
        .unwrap_or_default();
    ConfigError(format!("{}: no such setting{nearest}", one_line(key)))
}

fn one_line(text: &str) -> String {
    let short: String = text.chars().take(300).collect();
    short.escape_debug().to_string()
}
