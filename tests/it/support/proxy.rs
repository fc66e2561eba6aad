//! The real binary, with a configuration and a directory of its own.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::http::{self, Response};
use super::metrics::Metrics;
use super::process::Process;
use super::usage::{self, Usage};

/// How long anything that must happen may take, on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

const BINARY: &str = env!("CARGO_BIN_EXE_asyncproxy");

/// What the tests need to run fast; each test sets what it is about.
const DEFAULTS: [(&str, &str); 10] = [
    ("server.bind", "127.0.0.1:0"),
    ("server.enqueue_rate", "100000"),
    ("metrics.bind", "127.0.0.1:0"),
    ("proxy.breaker_failures", "0"),
    ("proxy.num_clients", "8"),
    ("queue.workers", "8"),
    ("queue.handle_per_second", "100000"),
    ("queue.backoff_min", "10ms"),
    ("queue.backoff_max", "200ms"),
    ("db.connection_string", "sqlite:queue.sqlite"),
];

/// A configuration and the directory it lies in. Starts the program any number of times.
pub struct Setup {
    directory: TempDir,
    settings: BTreeMap<String, String>,
    env: Vec<(String, String)>,
    /// Databases and the like that must outlive the program.
    kept: Vec<Box<dyn Any>>,
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Setup").field(&self.settings).finish()
    }
}

impl Setup {
    /// Proxies to `remote_url`, through SQLite.
    pub fn new(remote_url: &str) -> Setup {
        let mut setup = Setup::empty().set("proxy.remote_url", remote_url);
        for (key, value) in DEFAULTS {
            setup = setup.set(key, value);
        }
        setup
    }

    /// No settings at all; without any, no file is written either.
    pub fn empty() -> Setup {
        Setup {
            directory: TempDir::new().expect("temporary directory"),
            settings: BTreeMap::new(),
            env: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Sets `section.key` in the file, to a YAML value.
    pub fn set(mut self, key: &str, value: impl Display) -> Setup {
        self.settings.insert(key.to_owned(), value.to_string());
        self
    }

    /// The value that was set.
    pub fn get(&self, key: &str) -> &str {
        self.settings.get(key).expect("a setting that was set")
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl Display) -> Setup {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// Keeps something for as long as the setup is there.
    pub fn keep(mut self, kept: impl Any) -> Setup {
        self.kept.push(Box::new(kept));
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The binary in the directory, with the file written.
    pub fn command(&self) -> Command {
        self.write();
        let mut command = binary(self.directory.path());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Writes the file, for a program that reads it again.
    pub fn write(&self) {
        if !self.settings.is_empty() {
            std::fs::write(self.path("config.yaml"), self.yaml()).expect("write config.yaml");
        }
    }

    /// A shell in the same place, for a `script` that ends with `exec "$0"`: the binary.
    pub fn shell(&self, script: &str) -> Command {
        let binary = self.command();
        let mut shell = Command::new("/bin/sh");
        shell.current_dir(self.directory.path()).env_clear();
        shell.envs(self.env.iter().map(|(name, value)| (name, value)));
        shell.arg("-c").arg(script).arg(binary.get_program());
        shell
    }

    /// Starts the program and waits until it listens.
    pub fn start(&self) -> Proxy {
        Proxy::of(Process::spawn(&mut self.command()))
    }

    fn yaml(&self) -> String {
        let mut yaml = String::new();
        let mut open = "";
        for (key, value) in &self.settings {
            let (section, name) = key.split_once('.').expect("section.key");
            if section != open {
                writeln!(yaml, "{section}:").expect("write");
                open = section;
            }
            writeln!(yaml, "  {name}: {value}").expect("write");
        }
        yaml
    }
}

/// Waits until `reached`, looking again and again; `what` names it on failure.
pub fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The binary with `directory` as its working directory and nothing else from outside.
pub fn binary(directory: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command.current_dir(directory).env_clear();
    command
}

fn logged_address(process: &Process, message: &str) -> SocketAddr {
    let line = process.wait_for_line(message, PATIENCE);
    let (_, rest) = line.split_once("addr=").expect("addr=");
    let address = rest.split_whitespace().next().unwrap_or(rest);
    address.parse().expect("address and port")
}

/// The running program.
#[derive(Debug)]
pub struct Proxy {
    pub intake: SocketAddr,
    /// Where metrics and health are served.
    pub control: SocketAddr,
    process: Process,
}

impl Proxy {
    /// Waits until the program listens.
    pub fn of(process: Process) -> Proxy {
        let control = logged_address(&process, "msg=\"serving metrics and health\"");
        let intake = logged_address(&process, "msg=\"listening\"");
        Proxy {
            intake,
            control,
            process,
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it takes of the system.
    pub fn usage(&self) -> Usage {
        Usage::of(self.process.pid())
    }

    /// Its open sockets, but for connections to `destination`.
    pub fn sockets_but_to(&self, destination: SocketAddr) -> usize {
        usage::sockets_but_to(self.process.pid(), destination)
    }

    /// Sends one request to the intake, on a connection of its own.
    pub fn send(&self, bytes: &[u8]) -> Response {
        http::exchange(self.intake, bytes)
    }

    /// Sends the requests numbered `numbers` (see [`http::numbered`]); all must be accepted.
    pub fn accept(&self, numbers: std::ops::Range<usize>) {
        let mut connection = http::Connection::open(self.intake);
        for number in numbers {
            let answer = connection.exchange(&http::numbered(number));
            assert_eq!(answer.status, 200, "request {number}: {answer:?}");
        }
    }

    pub fn metrics(&self) -> Metrics {
        Metrics::scrape(self.control)
    }

    pub fn wait_for_log(&self, part: &str) -> String {
        self.process.wait_for_line(part, PATIENCE)
    }

    /// Waits until the store works, at the first attempt or, on a busy machine, a later one.
    pub fn wait_for_store(&self) {
        wait_until("a store that works", || {
            self.metrics().get("asyncproxy_store_up") > 0.5
        });
    }

    pub fn log(&self) -> String {
        self.process.text()
    }

    pub fn sigterm(&self) {
        self.process.signal(Signal::TERM);
    }

    pub fn sighup(&self) {
        self.process.signal(Signal::HUP);
    }

    pub fn sigint(&self) {
        self.process.signal(Signal::INT);
    }

    /// Stops it without ending it.
    pub fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    pub fn kill9(&self) {
        self.process.signal(Signal::KILL);
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.process.wait(PATIENCE)
    }

    /// Asks the program to end; it must have lost nothing.
    pub fn stop(mut self) {
        self.sigterm();
        assert_eq!(self.wait().code(), Some(0));
    }
}
