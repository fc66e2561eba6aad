//! Settings as text, from the YAML file, credentials and the environment, not yet understood.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_yaml::Value;

use super::place::{lines_of, not_yaml};
use super::{SETTINGS, Setting, files};
use crate::printable;

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

/// Longer names of environment variables are nobody's of ours.
const ENV_BYTES_MAX: usize = 64;

/// Shown in place of what may be a secret.
const SENSITIVE: &str = "<sensitive>";

/// All settings, each with its text and, but for the YAML file, where it came from.
pub(super) struct Raw {
    texts: BTreeMap<&'static str, (String, Option<Source>)>,
    file: Yaml,
    warnings: Vec<String>,
}

/// The YAML file.
#[derive(Default)]
struct Yaml {
    path: Option<PathBuf>,
    /// The settings in it, and on which line each stands, if that can be told.
    lines: BTreeMap<&'static str, Option<usize>>,
}

impl Yaml {
    /// An error of something in it.
    fn error(&self, line: Option<usize>, what: &str) -> ConfigError {
        let path = self.path.as_ref().map(|path| format!("{path:?}"));
        let line = line.map(|line| format!("line {line}"));
        let place: Vec<String> = path.into_iter().chain(line).collect();
        match place.as_slice() {
            [] => ConfigError(what.to_owned()),
            place => ConfigError(format!("{}: {what}", place.join(", "))),
        }
    }
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
    /// `path` is that of the YAML; `env` looks up an environment variable, and an empty one counts as
    /// unset.
    pub(super) fn read(
        yaml: &str,
        path: Option<&Path>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Raw, ConfigError> {
        let mut raw = Raw {
            texts: SETTINGS
                .iter()
                .map(|setting| (setting.key, (setting.default.to_owned(), None)))
                .collect(),
            file: Yaml {
                path: path.map(Path::to_owned),
                ..Yaml::default()
            },
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
        let root: Value = serde_yaml::from_str(yaml).map_err(|error| {
            let what = not_yaml(yaml, &error.to_string());
            let what = printable::line(what.as_bytes());
            // It names the line itself.
            let error = self.file.error(None, &what);
            ConfigError(error.0.replacen(": line ", ", line ", 1))
        })?;
        let sections = match root {
            Value::Null => return Ok(()),
            Value::Mapping(sections) => sections,
            _ => {
                let what = "must hold sections such as server: and queue:";
                return Err(self.file.error(None, what));
            }
        };
        for (section, settings) in sections {
            let section = scalar(&section).unwrap_or_default();
            let line = lines_of(yaml, &section, None).first().copied();
            let is_known = SETTINGS.iter().any(|setting| setting.section() == section);
            if !is_known {
                return Err(self.file.error(line, &unknown(&section)));
            }
            match settings {
                Value::Null => {}
                Value::Mapping(settings) => {
                    for (name, value) in settings {
                        let name = scalar(&name).unwrap_or_default();
                        let line = lines_of(yaml, &section, Some(&name)).first().copied();
                        self.take_value(&format!("{section}.{name}"), &value, line)?;
                    }
                }
                _ => {
                    let what = format!("{section}: must hold settings, one a line");
                    return Err(self.file.error(line, &what));
                }
            }
        }
        Ok(())
    }

    fn take_value(
        &mut self,
        key: &str,
        value: &Value,
        line: Option<usize>,
    ) -> Result<(), ConfigError> {
        let setting = find(key).ok_or_else(|| self.file.error(line, &unknown(key)))?;
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
        let text = text.ok_or_else(|| {
            let what = format!("{key}: must be {}", setting.accepts);
            self.file.error(line, &what)
        })?;
        self.texts.insert(setting.key, (text, None));
        self.file.lines.insert(setting.key, line);
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
            _ => match self.file.lines.get(key) {
                Some(line) => self.file.error(*line, &format!("{key}: {what}")),
                None => ConfigError(format!("{key}: {what}")),
            },
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

/// What is wrong with a section or key that is not there, and which one was probably meant.
fn unknown(key: &str) -> String {
    format!("{}: no such setting{}", one_line(key), meant(key))
}

/// The settings of that name in another place, or else the one whose name is nearest.
fn meant(key: &str) -> String {
    let name = key.rsplit('.').next().unwrap_or_default();
    let elsewhere: Vec<&str> = SETTINGS
        .iter()
        .filter(|setting| setting.key.split('.').nth(1) == Some(name))
        .map(|setting| setting.key)
        .collect();
    match elsewhere.as_slice() {
        [] => nearest(key),
        keys => format!("; did you mean {}, each in its section?", keys.join(" or ")),
    }
}

fn nearest(key: &str) -> String {
    let names = SETTINGS
        .iter()
        .flat_map(|setting| [setting.key, setting.section()]);
    names
        .map(|name| (strsim::damerau_levenshtein(name, key), name))
        .min()
        // Of short names all are near each other.
        .filter(|(distance, name)| *distance <= 3 && *distance < name.len())
        .map(|(_, name)| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

/// Warnings of environment variables that look as if they were to be settings and are none. Others'
/// may begin alike: only what is very near to a name is told, and no value ever.
pub(super) fn strange_variables(names: impl Iterator<Item = String>) -> Vec<String> {
    let ours: Vec<String> = SETTINGS
        .iter()
        .flat_map(|setting| [setting.env(), format!("{}_FILE", setting.env())])
        .collect();
    let is_candidate = |name: &String| {
        name.contains('_')
            && name != "LOG_COLOR"
            && name.len() <= ENV_BYTES_MAX
            && !ours.contains(name)
    };
    let mut warnings: Vec<String> = names
        .filter(is_candidate)
        .filter_map(|name| {
            let distance = |own: &String| (strsim::damerau_levenshtein(own, &name), own.clone());
            let (distance, own) = ours.iter().map(distance).min()?;
            let is_near = distance <= (own.len() / 4).min(3);
            is_near.then(|| {
                format!(
                    "environment variable {}: no such setting; did you mean {own}?",
                    one_line(&name)
                )
            })
        })
        .collect();
    warnings.sort();
    warnings
}

fn one_line(text: &str) -> String {
    let short: String = text.chars().take(300).collect();
    short.escape_debug().to_string()
}
