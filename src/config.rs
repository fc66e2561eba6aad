//! Settings: text from YAML and the environment in, a validated [`Config`] out. Nothing later
//! checks again.

mod address;
mod database;
mod files;
pub mod handed_over;
pub mod own;
mod place;
mod raw;
mod refused;
mod secrets;
mod ssl;
mod values;

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use address::{Bind, Listening, RemoteUrl, shown_address};
pub use database::{Database, PostgresServer};
pub use raw::ConfigError;
pub use secrets::ExposedSecret;
pub use values::{duration as parse_duration, positive_duration as parse_positive_duration};

use crate::logger;
use crate::machine;
use crate::queue::identity::Identity;
use crate::queue::migrate::Policy;
use crate::regular_file;
use crate::request::{Manners, Proto};
use crate::settle::RetryPolicy;
use crate::tls::ClientConfig;
use raw::Raw;

/// More than any settings need.
const FILE_BYTES_MAX: usize = 1024 * 1024;

/// One setting: what documents and error messages say of it.
#[derive(Debug)]
pub struct Setting {
    /// `section.name`.
    pub key: &'static str,
    pub default: &'static str,
    pub accepts: &'static str,
    pub about: &'static str,
}

impl Setting {
    /// The environment variable that overrides it.
    pub fn env(&self) -> String {
        self.key.to_ascii_uppercase().replace('.', "_")
    }

    fn section(&self) -> &'static str {
        self.key
            .split_once('.')
            .map_or(self.key, |(section, _)| section)
    }
}

macro_rules! settings {
    ($($key:literal = $default:literal, $accepts:literal, $about:literal;)*) => {
        /// All settings, in the order of `config.yaml`.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            key: $key,
            default: $default,
            accepts: $accepts,
            about: $about,
        }),*];
    };
}

settings! {
    "server.bind" = "systemd:http,:8080", "an address",
        "where to listen: `host:port`, `:port` for all addresses, `unix:/path`, `systemd` or `systemd:NAME`; `systemd:NAME,ADDRESS`: at ADDRESS when systemd hands over no such socket";
    "server.response_status" = "200", "a status", "status that acknowledges a request (200 to 599)";
    "server.shutdown_timeout" = "30s", "a duration", "time workers get to finish at a shutdown; what is left then is stored";
    "server.enqueue_enabled" = "true", "true or false", "`false`: nothing is stored before it was tried once";
    "server.enqueue_rate" = "100", "a whole number", "requests a second that go direct, the rest is stored; `0`: all are stored";
    "server.ack" = "received", "received or stored", "when senders are answered: `received`: as soon as a request is in memory or stored; `stored`: only once it is stored";
    "server.acceptor" = "builtin", "builtin or tiny_http", "`builtin`, or `tiny_http` for trusted networks only";
    "server.max_connections" = "1024", "a whole number", "connections open at once; more wait while idle ones are closed (builtin only)";
    "server.read_timeout" = "5s", "a duration", "time for a whole request to come in (builtin only)";
    "server.idle_timeout" = "60s", "a duration", "time a connection may be idle between requests (builtin only)";
    "server.max_body_size" = "10MiB", "a size", "larger bodies are refused with 413";
    "server.memory_limit" = "auto", "auto or a size", "requests held in memory, over all stages; past three quarters all are stored, past it they are refused with 503; `auto`: a quarter of the memory there is, from 16MiB to 256MiB";
    "server.forwarded_proto" = "http", "http or https", "`X-Forwarded-Proto` of requests that come without one: `https` where TLS ends before us";
    "metrics.bind" = "systemd:metrics,:8081", "an address", "where metrics and health are served, as `server.bind`";
    "metrics.path" = "/metrics", "a path", "path of the metrics";
    "metrics.max_paths" = "50", "a whole number", "distinct `path` labels; the rest is `other`";
    "proxy.remote_url" = "http://localhost:5000", "a URL", "the destination; a path in it is put before each target";
    "proxy.preserve_host" = "false", "true or false", "`true`: the destination gets the `Host` that came in, not its own";
    "proxy.request_timeout" = "120s", "a duration", "time for one attempt, from connecting to the end of the answer";
    "proxy.num_clients" = "700", "a whole number", "threads that deliver direct requests, and how many more may wait for them";
    "proxy.breaker_failures" = "10", "a whole number", "connections in a row that fail, or a twentieth of the different requests in a row that get no answer, after which only probes are sent; `0`: never";
    "proxy.ca_file" = "", "empty or a file", "PEM file with the authorities that an https destination's certificate may be from; empty: the system's";
    "proxy.client_cert_file" = "", "empty or a file", "PEM file with the certificate shown to an https destination, those of its issuers after it; empty: none";
    "proxy.client_key_file" = "", "empty or a file", "PEM file with its key, without a passphrase";
    "queue.workers" = "120", "a whole number", "threads that deliver stored requests";
    "queue.handle_per_second" = "30", "a whole number", "stored requests sent a second, at most";
    "queue.rate_scope" = "instance", "instance or cluster",
        "what `queue.handle_per_second` bounds: each `instance`, or with `cluster` all instances on one Postgres together";
    "queue.max_retries" = "1000", "a whole number", "attempts after the first, then a request is moved to the dead letters";
    "queue.backoff_min" = "1s", "a duration", "pause after the first failed attempt; doubles with each";
    "queue.backoff_max" = "10m", "a duration", "longest pause between attempts";
    "queue.max_age" = "0s", "a duration", "age at which a request that fails is moved to the dead letters; `0`: none";
    "queue.give_up_statuses" = "", "a list of statuses", "answers after which there is no further attempt, such as `[410]`";
    "queue.max_rows" = "0", "a whole number", "stored requests past which new ones that would have to be stored are refused with 503; `0`: no limit";
    "queue.min_free" = "256MiB", "a size", "room on the disk of the SQLite file, or of the spool's, below which new requests that would have to be stored are refused with 503; `0`: no limit";
    "queue.dead_retention" = "30d", "a duration", "time a dead letter is kept, then it is deleted for good; `0`: for ever";
    "db.connection_string" = "sqlite:asyncproxy.sqlite", "a connection string", "the queue: `sqlite:PATH`, a Postgres URL (`%40` for `@` in the password, `%23` for `#`, `%2F` for `/`), or libpq keywords";
    "db.max_connections" = "2", "a whole number", "connections to Postgres";
    "db.use_index" = "true", "true or false", "`false`: rows are claimed as they lie, not the oldest first";
    "db.timeout" = "5s", "a duration", "time for one operation of the store";
    "db.migrate" = "true", "true or false", "`false`: tables are never created or changed at the start; `asyncproxy migrate` does it";
    "db.spool" = "", "empty or sqlite:PATH", "a file for what Postgres does not take while it is down: `sqlite:PATH`; empty: none";
    "log.level" = "info", "a level", "`error`, `warn`, `info`, `debug` or `trace`";
    "log.format" = "logfmt", "logfmt or json", "`logfmt`, or `json`: one object a line";
}

/// What a running program cannot change: its sockets, its threads, its store, and times that leases
/// and connections under way depend on.
pub const NEEDS_RESTART: &[&str] = &[
    "server.bind",
    "server.ack",
    "server.acceptor",
    "server.max_connections",
    "server.read_timeout",
    "server.idle_timeout",
    "metrics.bind",
    "metrics.path",
    "metrics.max_paths",
    "proxy.request_timeout",
    "proxy.num_clients",
    "queue.workers",
    "queue.rate_scope",
    "db.connection_string",
    "db.max_connections",
    "db.use_index",
    "db.timeout",
    "db.migrate",
    "db.spool",
];

/// A setting that has another value than before, as they may be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub key: &'static str,
    pub from: String,
    pub to: String,
}

impl Change {
    pub fn needs_restart(&self) -> bool {
        NEEDS_RESTART.contains(&self.key)
    }
}

/// All settings, validated.
#[derive(Debug)]
pub struct Config {
    pub server: Server,
    pub metrics: Metrics,
    pub proxy: Proxy,
    pub queue: Queue,
    pub db: Db,
    pub log: Log,
    /// The file they are from, wherever the program is then.
    pub path: Option<PathBuf>,
    warnings: Vec<String>,
    exposed: Vec<ExposedSecret>,
    raw: Raw,
}

#[derive(Debug)]
pub struct Server {
    pub bind: Bind,
    pub forwarded_proto: Proto,
    pub response_status: u16,
    pub shutdown_timeout: Duration,
    pub enqueue_enabled: bool,
    /// Requests a second.
    pub enqueue_rate: u32,
    pub ack: Ack,
    pub acceptor: Acceptor,
    pub max_connections: usize,
    pub read_timeout: Duration,
    pub idle_timeout: Duration,
    /// Bytes.
    pub max_body_size: usize,
    /// Bytes.
    pub memory_limit: usize,
}

/// When a sender is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// Once the request is in the direct channel, or committed.
    Received,
    /// Once the request is committed.
    Stored,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptor {
    Builtin,
    TinyHttp,
}

#[derive(Debug)]
pub struct Metrics {
    pub bind: Bind,
    pub path: String,
    pub max_paths: usize,
}

#[derive(Debug)]
pub struct Proxy {
    pub remote_url: RemoteUrl,
    pub request_timeout: Duration,
    pub num_clients: usize,
    /// 0: none.
    pub breaker_failures: u32,
    pub preserve_host: bool,
    /// For an https destination.
    pub tls: Option<Arc<ClientConfig>>,
}

#[derive(Debug)]
pub struct Queue {
    pub workers: usize,
    pub handle_per_second: u32,
    /// 0: no limit.
    pub max_rows: u64,
    /// Bytes; 0: no limit.
    pub min_free: u64,
    pub rate_scope: RateScope,
    pub retry: RetryPolicy,
    /// Dead letters are kept for ever without one.
    pub dead_retention: Option<Duration>,
}

/// What `queue.handle_per_second` bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateScope {
    /// Each process for itself.
    Instance,
    /// All processes on one store together.
    Cluster,
}

#[derive(Debug)]
pub struct Db {
    pub database: Database,
    pub max_connections: u32,
    pub use_index: bool,
    pub timeout: Duration,
    pub migrate: Policy,
    /// A SQLite file for what Postgres does not take.
    pub spool: Option<PathBuf>,
}

#[derive(Debug)]
pub struct Log {
    pub level: log::LevelFilter,
    pub format: logger::Format,
}

impl Config {
    /// Reads a file and the process' environment.
    ///
    /// # Errors
    /// One line that says what is wrong and what is accepted.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let mut config = Config::load_with(path, &|name| std::env::var(name).ok())?;
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        config.warnings.extend(raw::strange_variables(names));
        Ok(config)
    }

    /// Reads a file, and the environment of whoever it is for: `env` looks up a variable.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_with(
        path: &Path,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigError> {
        let yaml = regular_file::read(path, FILE_BYTES_MAX)
            .and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other))
            .map_err(|error| {
                let hint = "name another file with --config";
                ConfigError(format!(
                    "{path:?}: cannot read the settings: {error}; {hint}"
                ))
            })?;
        Config::understand(Raw::read(&yaml, Some(path), env)?, Some(path), env)
    }

    /// Understands settings; `env` looks up an environment variable.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_yaml(
        yaml: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigError> {
        Config::understand(Raw::read(yaml, None, env)?, None, env)
    }

    /// `path` is the file that the YAML is from.
    fn understand(
        raw: Raw,
        path: Option<&Path>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigError> {
        let UnderstoodDb {
            db,
            mut warnings,
            secrets,
        } = db(&raw, path, env)?;
        let config = Config {
            server: server(&raw)?,
            metrics: Metrics {
                bind: raw.get("metrics.bind", Bind::parse)?,
                path: raw.get("metrics.path", values::metrics_path)?,
                max_paths: raw.get("metrics.max_paths", |text| values::integer(text, 0, 10_000))?,
            },
            proxy: Proxy {
                // May hold credentials, though it must not.
                remote_url: raw.get_secret("proxy.remote_url", RemoteUrl::parse)?,
                request_timeout: raw.get("proxy.request_timeout", values::positive_duration)?,
                num_clients: raw
                    .get("proxy.num_clients", |text| values::integer(text, 1, 10_000))?,
                breaker_failures: raw.get("proxy.breaker_failures", |text| {
                    values::integer(text, 0, 1_000_000)
                })?,
                preserve_host: raw.get("proxy.preserve_host", values::boolean)?,
                tls: ssl::destination(&raw, &mut warnings)?,
            },
            queue: queue(&raw)?,
            db,
            log: Log {
                level: raw.get("log.level", values::level)?,
                format: raw.get("log.format", |text| match text {
                    "logfmt" => Ok(logger::Format::Logfmt),
                    "json" => Ok(logger::Format::Json),
                    _ => Err("logfmt or json".to_owned()),
                })?,
            },
            path: path.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned())),
            warnings,
            exposed: exposed(&raw, secrets),
            raw,
        };
        config.check_together()?;
        Ok(config)
    }

    fn check_together(&self) -> Result<(), ConfigError> {
        let Config {
            server, queue, raw, ..
        } = self;
        let compared = |key, other: &str, must_be| {
            let (got, than) = (raw.shown(key), raw.shown(other));
            raw.error(
                key,
                &format!("must be {must_be} {other} ({than}), got {got}"),
            )
        };
        if server.memory_limit < server.max_body_size {
            let other = "server.max_body_size";
            let mut error = compared("server.memory_limit", other, "at least");
            if let Some(limit) = self.automatic_limit() {
                error.0.push_str(&format!(", which is {limit} here"));
            }
            return Err(error);
        }
        if queue.retry.backoff_max < queue.retry.backoff_min {
            return Err(compared(
                "queue.backoff_max",
                "queue.backoff_min",
                "at least",
            ));
        }
        if server.acceptor == Acceptor::TinyHttp
            && !matches!(server.bind.itself(), Some(Bind::All(_) | Bind::Host(..)))
        {
            let what = "must be host:port or :port with server.acceptor tiny_http";
            return Err(raw.error("server.bind", what));
        }
        if server.bind.clashes_with(&self.metrics.bind) {
            return Err(raw.error("metrics.bind", "must be another address than server.bind"));
        }
        Ok(())
    }

    /// Which store they lead to. A relative path counts from where the program is.
    pub fn store(&self) -> Identity {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        match &self.db.database {
            Database::Sqlite(path) => {
                let path = absolute(path);
                Identity {
                    name: format!("sqlite:{}", path.display()),
                    file: Some(path),
                }
            }
            Database::Postgres(_) => Identity {
                name: database::masked(&self.db.database),
                file: None,
            },
        }
    }

    /// Makes relative paths of files that are yet to be opened count from `directory`.
    pub fn found_from(&mut self, directory: &Path) {
        if let Database::Sqlite(path) = &mut self.db.database {
            *path = directory.join(&*path);
        }
        if let Some(path) = &mut self.db.spool {
            *path = directory.join(&*path);
        }
    }

    /// What the destination is told of senders.
    pub fn manners(&self) -> Manners {
        Manners {
            proto: self.server.forwarded_proto,
            preserves_host: self.proxy.preserve_host,
        }
    }

    /// The text of a setting; what is secret is masked.
    fn shown(&self, key: &str) -> String {
        match key {
            "db.connection_string" => database::masked(&self.db.database),
            key => self.raw.shown(key).to_owned(),
        }
    }

    /// What `server.memory_limit` comes to where it says `auto`.
    fn automatic_limit(&self) -> Option<String> {
        let is_automatic = self.raw.text("server.memory_limit") == "auto";
        is_automatic.then(|| format!("{}MiB", self.server.memory_limit >> 20))
    }

    /// What `newer` has that this has not.
    pub fn changes(&self, newer: &Config) -> Vec<Change> {
        let has_changed = |key: &&str| self.raw.text(key) != newer.raw.text(key);
        let keys = SETTINGS.iter().map(|setting| setting.key);
        keys.filter(has_changed)
            .map(|key| Change {
                key,
                from: self.shown(key),
                to: newer.shown(key),
            })
            .collect()
    }

    /// What is accepted but probably not meant.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Files with secrets that everybody may read.
    pub fn exposed(&self) -> &[ExposedSecret] {
        &self.exposed
    }

    /// Both, in words.
    pub fn all_warnings(&self) -> Vec<String> {
        let exposed = self.exposed.iter().map(ToString::to_string);
        self.warnings.iter().cloned().chain(exposed).collect()
    }

    /// All settings as YAML, without secrets.
    pub fn effective(&self) -> String {
        let mut yaml = String::new();
        let mut section = "";
        for setting in SETTINGS {
            if setting.section() != section {
                section = setting.section();
                // Writing to a String cannot fail.
                let _ = writeln!(yaml, "{section}:");
            }
            let text = self.shown(setting.key);
            let name = setting
                .key
                .trim_start_matches(section)
                .trim_start_matches('.');
            let value = match setting.key {
                "queue.give_up_statuses" => format!("[{}]", values::without_brackets(&text)),
                _ => in_yaml(&text),
            };
            let comment = match setting.key {
                "server.memory_limit" => self.automatic_limit(),
                _ => None,
            };
            let comment = comment.map_or_else(String::new, |limit| format!(" # {limit}"));
            let _ = writeln!(yaml, "  {name}: {value}{comment}");
        }
        yaml
    }
}

/// A scalar as YAML reads it back.
fn in_yaml(text: &str) -> String {
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-/:=<>@, ".contains(&byte))
        && !text.contains(": ")
        && !text.ends_with([':', ' ']);
    if is_plain {
        text.to_owned()
    } else if text.chars().any(char::is_control) {
        format!("{text:?}")
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

fn server(raw: &Raw) -> Result<Server, ConfigError> {
    Ok(Server {
        bind: raw.get("server.bind", Bind::parse)?,
        response_status: raw.get("server.response_status", |text| {
            values::integer(text, 200, 599)
        })?,
        shutdown_timeout: raw.get("server.shutdown_timeout", values::duration)?,
        enqueue_enabled: raw.get("server.enqueue_enabled", values::boolean)?,
        enqueue_rate: raw.get("server.enqueue_rate", |text| {
            values::integer(text, 0, 1_000_000)
        })?,
        ack: raw.get("server.ack", |text| match text {
            "received" => Ok(Ack::Received),
            "stored" => Ok(Ack::Stored),
            _ => Err("received or stored".to_owned()),
        })?,
        acceptor: raw.get("server.acceptor", |text| match text {
            "builtin" => Ok(Acceptor::Builtin),
            "tiny_http" => Ok(Acceptor::TinyHttp),
            _ => Err("builtin or tiny_http".to_owned()),
        })?,
        max_connections: raw.get("server.max_connections", |text| {
            values::integer(text, 1, 20_000)
        })?,
        read_timeout: raw.get("server.read_timeout", values::positive_duration)?,
        idle_timeout: raw.get("server.idle_timeout", values::positive_duration)?,
        max_body_size: raw.get("server.max_body_size", values::body_size)?,
        forwarded_proto: raw.get("server.forwarded_proto", |text| match text {
            "http" => Ok(Proto::Http),
            "https" => Ok(Proto::Https),
            _ => Err("http or https".to_owned()),
        })?,
        memory_limit: raw.get("server.memory_limit", |text| {
            values::memory_limit(text, machine::memory)
        })?,
    })
}

fn queue(raw: &Raw) -> Result<Queue, ConfigError> {
    let max_age = raw.get("queue.max_age", values::duration)?;
    let dead_retention = raw.get("queue.dead_retention", values::duration)?;
    Ok(Queue {
        workers: raw.get("queue.workers", |text| values::integer(text, 1, 10_000))?,
        handle_per_second: raw.get("queue.handle_per_second", |text| {
            values::integer(text, 1, 1_000_000)
        })?,
        max_rows: raw.get("queue.max_rows", |text| {
            values::integer(text, 0, 1_000_000_000_000)
        })?,
        min_free: raw.get("queue.min_free", values::size)? as u64,
        rate_scope: raw.get("queue.rate_scope", |text| match text {
            "instance" => Ok(RateScope::Instance),
            "cluster" => Ok(RateScope::Cluster),
            _ => Err("instance or cluster".to_owned()),
        })?,
        retry: RetryPolicy {
            // One less than what counts as an attempt.
            max_retries: raw.get("queue.max_retries", |text| {
                values::integer(text, 0, 1_000_000_000)
            })?,
            backoff_min: raw.get("queue.backoff_min", values::positive_duration)?,
            backoff_max: raw.get("queue.backoff_max", values::positive_duration)?,
            max_age: (!max_age.is_zero()).then_some(max_age),
            give_up_statuses: raw.get("queue.give_up_statuses", values::failed_statuses)?,
        },
        dead_retention: (!dead_retention.is_zero()).then_some(dead_retention),
    })
}

/// Those of all files with secrets that everybody may read; `paths` are those of the store.
fn exposed(raw: &Raw, mut paths: Vec<(&'static str, PathBuf)>) -> Vec<ExposedSecret> {
    const KEY: &str = "proxy.client_key_file";
    match raw.text(KEY) {
        "" => {}
        path => paths.push((KEY, path.into())),
    }
    let found = paths
        .iter()
        .map(|(key, path)| ExposedSecret::find(key, path));
    found.flatten().collect()
}

/// Of the store: its settings, what is probably not meant, and the files that hold its secrets.
struct UnderstoodDb {
    db: Db,
    warnings: Vec<String>,
    secrets: Vec<(&'static str, PathBuf)>,
}

fn db(
    raw: &Raw,
    yaml: Option<&Path>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<UnderstoodDb, ConfigError> {
    const KEY: &str = "db.connection_string";
    let user = env("USER").filter(|user| !user.is_empty());
    let user = user.as_deref().unwrap_or("postgres");
    let parsed = raw.get_secret(KEY, |text| database::parse(text, user))?;
    let mut warnings = raw.warnings().to_vec();
    if !parsed.ignored.is_empty() {
        warnings.push(format!("{KEY}: ignored {}", parsed.ignored.join(", ")));
    }
    let mut secrets: Vec<PathBuf> = parsed.key_file.into_iter().collect();
    if parsed.database.has_password() {
        secrets.extend(raw.file_of(KEY, yaml).map(Path::to_owned));
    }
    let secrets = secrets.into_iter().map(|path| (KEY, path)).collect();
    let db = Db {
        database: parsed.database,
        max_connections: raw.get("db.max_connections", |text| values::integer(text, 1, 1000))?,
        use_index: raw.get("db.use_index", values::boolean)?,
        timeout: raw.get("db.timeout", values::positive_duration)?,
        migrate: raw.get("db.migrate", |text| {
            let is_wanted = values::boolean(text)?;
            Ok(if is_wanted {
                Policy::Apply
            } else {
                Policy::Require
            })
        })?,
        spool: raw.get("db.spool", database::spool)?,
    };
    if db.spool.is_some() && matches!(db.database, Database::Sqlite(_)) {
        let what = "must be empty with SQLite as db.connection_string: it is for Postgres";
        return Err(raw.error("db.spool", what));
    }
    Ok(UnderstoodDb {
        db,
        warnings,
        secrets,
    })
}

#[cfg(test)]
mod tests;
