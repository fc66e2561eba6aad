//! Settings as text, from the YAML file, credentials and the environment, not yet understood.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_yaml::Value;

use super::{SETTINGS, Setting, files};

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

/// Shown in place of what may be a secret.
const SENSITIVE: &str = "<sensitive>";

/// All settings, each with its text and, but for the YAML file, where it came from.
pub(super) struct Raw {
    texts: BTreeMap<&'static str, (String, Option<Source>)>,
    warnings: Vec<String>,
}

struct Source {
    name: String,
    /// A file of its own: its content is not shown, it may be a secret put in the wrong place.
    is_hidden: bool,
    /// The file, if its rights are the operator's concern: those of credentials are systemd's.
    path: Option<PathBuf>,
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SENSITIVE)
    }
}

impl Raw {
    /// `env` looks up an environment variable; an empty one counts as unset.
    pub(super) fn read(
        yaml: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Raw, ConfigError> {
        let mut raw = Raw {
            texts: SETTINGS
                .iter()
                .map(|setting| (setting.key, (setting.default.to_owned(), None)))
                .collect(),
            warnings: Vec::new(),
        };
        raw.take_yaml(yaml)?;
        let env = |name: &str| env(name).filter(|text| !text.is_empty());
        if let Some(directory) = env("CREDENTIALS_DIRECTORY") {
            raw.take_credentials(Path::new(&directory))?;
        }
        for setting in SETTINGS {
            raw.take_env(setting, &env)?;
        }
        Ok(raw)
    }

    fn take_credentials(&mut self, directory: &Path) -> Result<(), ConfigError> {
        for setting in SETTINGS {
            let name = format!("credential {}", setting.key);
            if let Some(text) = files::read(&directory.join(setting.key))
                .map_err(|error| ConfigError(format!("{} (from {name}): {error}", setting.key)))?
            {
                self.take_file(setting, name, None, text);
            }
        }
        // Only for the warnings: a directory that cannot be listed may still be read from.
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Others' credentials are none of ours.
            if name.contains('.') && find(&name).is_none() && !nearest(&name).is_empty() {
                self.warnings.push(format!("credential {}", unknown(&name)));
            }
        }
        Ok(())
    }

    fn take_env(
        &mut self,
        setting: &'static Setting,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), ConfigError> {
        let name = setting.env();
        let file_name = format!("{name}_FILE");
        match (env(&name), env(&file_name)) {
            (None, None) => {}
            (Some(_), Some(_)) => {
                let what = format!("{name} and {file_name} are both set; unset one of them");
                return Err(ConfigError(format!("{}: {what}", setting.key)));
            }
            (Some(text), None) => {
                let source = Source {
                    name,
                    is_hidden: false,
                    path: None,
                };
                self.texts.insert(setting.key, (text, Some(source)));
            }
            (None, Some(path)) => {
                let text = files::read(Path::new(&path))
                    .and_then(|text| text.ok_or_else(|| format!("{path:?}: no such file")))
                    .map_err(|error| {
                        ConfigError(format!("{} (from {file_name}): {error}", setting.key))
                    })?;
                self.take_file(setting, file_name, Some(path.into()), text);
            }
        }
        Ok(())
    }

    fn take_file(
        &mut self,
        setting: &'static Setting,
        name: String,
        path: Option<PathBuf>,
        text: String,
    ) {
        let source = Source {
            name,
            is_hidden: true,
            path,
        };
        self.texts.insert(setting.key, (text, Some(source)));
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
        self.texts.insert(setting.key, (text, None));
        Ok(())
    }

    pub(super) fn text(&self, key: &str) -> &str {
        self.texts.get(key).map_or("", |(text, _)| text)
    }

    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The file that a setting's text is from, when its rights are the operator's concern; `yaml` is
    /// the one with all settings.
    pub(super) fn file_of<'a>(&'a self, key: &str, yaml: Option<&'a Path>) -> Option<&'a Path> {
        match self.texts.get(key) {
            Some((_, Some(source))) => source.path.as_deref(),
            _ => yaml,
        }
    }

    fn is_hidden(&self, key: &str) -> bool {
        let source = self.texts.get(key).and_then(|(_, source)| source.as_ref());
        source.is_some_and(|source| source.is_hidden)
    }

    /// The text, unless it may be a secret.
    pub(super) fn shown(&self, key: &str) -> &str {
        if self.is_hidden(key) {
            SENSITIVE
        } else {
            self.text(key)
        }
    }

    /// Understands a setting. What it must be is what `parse` says.
    pub(super) fn get<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        if self.is_hidden(key) {
            return self.get_secret(key, parse);
        }
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
        match self.texts.get(key) {
            Some((_, Some(source))) => ConfigError(format!("{key} (from {}): {what}", source.name)),
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
    let nearest = nearest(key);
    ConfigError(format!("{}: no such setting{nearest}", one_line(key)))
}

fn nearest(key: &str) -> String {
    let names = SETTINGS
        .iter()
        .flat_map(|setting| [setting.key, setting.section()]);
    names
        .map(|name| (strsim::damerau_levenshtein(name, key), name))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, name)| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

fn one_line(text: &str) -> String {
    let short: String = text.chars().take(300).collect();
    short.escape_debug().to_string()
}
