//! The instance that runs beside a command. A command acts on a store by itself, so it asks first
//! whether that is the store of the instance its settings lead to. Without settings it takes those of
//! the one service that runs here.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Failure;
use crate::config::{Bind, Config};
use crate::control::{SOCKET, ask};
use crate::printable;
use crate::queue::StoreError;
use crate::queue::identity::Likeness;
use crate::queue::operate::Operate;

/// Where the settings are looked for.
const DEFAULT: &str = "config.yaml";
/// Where systemd makes the directories of services.
const RUN: &str = "/run";
const SERVICES_MAX: usize = 64;
/// More than any environment has that a program can be started with.
const ENVIRON_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What it said on its control port.
#[derive(Debug)]
pub struct Instance {
    pub status: Value,
    /// Where it was asked.
    place: String,
}

/// A service that runs here.
#[derive(Debug)]
struct Service {
    status: Value,
    socket: PathBuf,
}

/// What to do about an instance that has another store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OtherStore {
    #[default]
    Refuse,
    /// It is meant.
    Use,
}

/// The settings in `path`; else in the directory a command is given in; else those of the service
/// that runs here, with its environment and credentials.
///
/// # Errors
/// One line that says what is wrong.
pub fn settings(path: Option<&Path>) -> Result<Config, String> {
    let told = path.unwrap_or(Path::new(DEFAULT));
    if path.is_some() || told.exists() {
        return Config::load(told).map_err(|error| error.to_string());
    }
    match services().as_slice() {
        [service] => service.settings(),
        [] => Config::load(told)
            .map_err(|error| format!("{error}; no running service was found, either{}", as_root())),
        several => {
            let sockets = several.iter().map(|service| service.socket.display());
            let sockets: Vec<String> = sockets.map(|socket| socket.to_string()).collect();
            let sockets = sockets.join(", ");
            Err(format!(
                "several services run here ({sockets}): choose one by its directory, such as \
                 RUNTIME_DIRECTORY={}, or name settings with --config",
                directory(&several[0].socket).display()
            ))
        }
    }
}

/// Who else may look.
fn as_root() -> &'static str {
    match rustix::process::geteuid().is_root() {
        true => "",
        false => "; root finds those that keep their files to themselves",
    }
}

fn directory(socket: &Path) -> &Path {
    socket.parent().unwrap_or(socket)
}

/// The instance that serves the queue of these settings: the one at `metrics.bind`, or a service that
/// was started with the same file.
///
/// # Errors
/// Why none answers, in a few words.
pub fn running(config: &Config) -> Result<Instance, String> {
    let bind = &config.metrics.bind;
    let why = match ask::status(bind) {
        Ok(status) => {
            return Ok(Instance {
                status,
                place: bind.itself().unwrap_or(bind).to_string(),
            });
        }
        Err(why) => why,
    };
    let settings = config.path.as_deref().and_then(Path::to_str);
    let of_these =
        |service: &Service| settings.is_some() && service.status["settings"].as_str() == settings;
    let service = services().into_iter().find(of_these).ok_or(why)?;
    Ok(Instance {
        status: service.status,
        place: format!("unix:{}", service.socket.display()),
    })
}

impl Instance {
    /// Whether its store is the one that these settings lead to, and `store` with them. `None`: it
    /// does not say.
    ///
    /// # Errors
    /// [`StoreError`], when only the store can tell.
    pub fn has_store_of(
        &self,
        config: &Config,
        store: &dyn Operate,
    ) -> Result<Option<bool>, StoreError> {
        let told = &self.status["store"];
        if told["name"].is_null() {
            return Ok(None);
        }
        match config.store().compare(told) {
            Likeness::Same => Ok(Some(true)),
            Likeness::Other => Ok(Some(false)),
            Likeness::IfKnows(name) => match store.has_instance(name) {
                Ok(knows) => Ok(Some(knows)),
                // Without our tables it knows nobody.
                Err(StoreError::Schema(_)) => Ok(Some(false)),
                Err(error) => Err(error),
            },
        }
    }

    /// Which store it has, and which one these settings lead to.
    pub fn difference(&self, config: &Config) -> String {
        let name = self.status["store"]["name"].as_str().unwrap_or_default();
        format!(
            "the instance at {} has another store than these settings: it has {}, and {} leads to {}",
            self.place,
            printable::line(name.as_bytes()),
            config
                .path
                .as_deref()
                .unwrap_or(Path::new(DEFAULT))
                .display(),
            config.store().name
        )
    }
}

/// Asks the running instance, and goes on only with its store. Without one it goes on, and tells why
/// none answers.
///
/// # Errors
/// [`Failure`]: it has another, or the store cannot tell.
pub fn agree(
    config: &Config,
    store: &dyn Operate,
    other: OtherStore,
) -> Result<Result<Instance, String>, Failure> {
    let found = running(config);
    if let Ok(instance) = &found
        && other == OtherStore::Refuse
        && instance.has_store_of(config, store)? == Some(false)
    {
        return Err(Failure::Failed(format!(
            "{}. Nothing was done. {}; with --other-store the store of these settings is used all the same",
            instance.difference(config),
            instance.way()
        )));
    }
    Ok(found)
}

impl Instance {
    /// How to reach its store.
    fn way(&self) -> &'static str {
        const AS_ROOT: &str = "As root, without --config and where no config.yaml is, a running service's settings are \
             taken, with its environment and credentials";
        const GIVE: &str = "Give the settings that it was started with, environment and credentials \
                            included, such as DB_CONNECTION_STRING; root finds those of a service by \
                            itself, without --config and where no config.yaml is";
        match services().is_empty() {
            true => GIVE,
            false => AS_ROOT,
        }
    }
}

/// All that answer where systemd has made a directory for them, or where `RUNTIME_DIRECTORY` says.
fn services() -> Vec<Service> {
    let directories: Vec<PathBuf> = match std::env::var_os("RUNTIME_DIRECTORY") {
        Some(directories) => std::env::split_paths(&directories).collect(),
        None => {
            let entries = fs::read_dir(RUN).into_iter().flatten().flatten();
            let ours =
                entries.filter(|entry| entry.file_name().as_bytes().starts_with(b"asyncproxy"));
            ours.map(|entry| entry.path()).collect()
        }
    };
    let mut sockets: Vec<PathBuf> = directories.iter().map(|path| path.join(SOCKET)).collect();
    sockets.sort();
    sockets.truncate(SERVICES_MAX);
    let service = |socket: PathBuf| {
        let status = ask::status(&Bind::Unix(socket.clone())).ok()?;
        Some(Service { status, socket })
    };
    sockets.into_iter().filter_map(service).collect()
}

impl Service {
    /// What it was started with, as far as that is read again: its file, environment and credentials
    /// as they are by now.
    fn settings(&self) -> Result<Config, String> {
        let pid = self.status["pid"].as_u64().unwrap_or_default();
        let process = PathBuf::from(format!("/proc/{pid}"));
        let unreadable = |error: io::Error| {
            format!(
                "a service runs here (process {pid}), but its settings cannot be read: {error}{}; \
                 or name settings with --config",
                as_root()
            )
        };
        // It says itself which process it is: that it is its socket's owner's, at least.
        let owner = |path: &Path| path.metadata().map(|file| file.uid());
        let is_own =
            owner(&process).map_err(unreadable)? == owner(&self.socket).map_err(unreadable)?;
        if !is_own {
            return Err(unreadable(io::Error::other(
                "that process is another user's",
            )));
        }
        let environment = environment(&process).map_err(unreadable)?;
        let directory = fs::read_link(process.join("cwd")).map_err(unreadable)?;
        let path = self.status["settings"].as_str().ok_or_else(|| {
            format!("a service runs here (process {pid}), but does not say where its settings are: name them with --config")
        })?;
        let lookup = |name: &str| {
            let text = environment.get(name)?;
            Some(match name {
                "CREDENTIALS_DIRECTORY" => seen_by(&process, text),
                _ => text.clone(),
            })
        };
        let here = std::env::current_dir();
        // What is named there is named from there.
        std::env::set_current_dir(&directory).map_err(unreadable)?;
        let config = Config::load_with(Path::new(path), &lookup);
        if let Ok(here) = here {
            // Gone meanwhile, it is nobody's any more.
            let _ = std::env::set_current_dir(here);
        }
        let mut config = config.map_err(|error| {
            format!("settings of the service that runs here (process {pid}): {error}")
        })?;
        config.found_from(&directory);
        Ok(config)
    }
}

/// A path that may be in a file system of the process' own.
fn seen_by(process: &Path, path: &str) -> String {
    if Path::new(path).exists() {
        return path.to_owned();
    }
    format!("{}/root{path}", process.display())
}

/// What a process was started with.
fn environment(process: &Path) -> io::Result<HashMap<String, String>> {
    let mut bytes = Vec::new();
    File::open(process.join("environ"))?
        .take(ENVIRON_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    let variables = bytes.split(|byte| *byte == 0);
    let pairs = variables.filter_map(|variable| str::from_utf8(variable).ok()?.split_once('='));
    Ok(pairs
        .map(|(name, text)| (name.to_owned(), text.to_owned()))
        .collect())
}
