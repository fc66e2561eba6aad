//! What systemd is told (sd_notify(3)): ready, what the program is at, that it is alive, and that
//! it needs more time to stop. Without `NOTIFY_SOCKET` nobody is told anything.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::logger::LogLimit;
use crate::printable;
use crate::progress::Progress;
use crate::status::Status;
use crate::thread::Threads;

/// How often the status is looked at, at least.
const LOOK: Duration = Duration::from_secs(5);
/// How much more time is asked for while stopping, each time.
const EXTENSION: Duration = Duration::from_secs(15);
/// How long systemd may take to take what it is told.
const TOLD_WITHIN: Duration = Duration::from_secs(1);
/// Longest text of a status.
const STATUS_BYTES_MAX: usize = 400;

static NOT_TOLD: LogLimit = LogLimit::new();
static STUCK: LogLimit = LogLimit::new();

/// The way to systemd.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
    /// How often systemd wants to hear that the program is alive.
    watchdog: Option<Duration>,
    is_stopping: AtomicBool,
}

impl Notifier {
    /// `None` if nobody wants to be told. `env` looks up an environment variable.
    ///
    /// # Errors
    /// What is wrong with the socket that is named.
    pub fn from_env(
        env: impl Fn(&str) -> Option<std::ffi::OsString>,
    ) -> io::Result<Option<Arc<Notifier>>> {
        let Some(path) = env("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Ok(None);
        };
        let number = |name| env(name).and_then(|text| text.to_str()?.parse::<u64>().ok());
        // Set for another process, it came here by inheritance.
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| *usec > 0 && is_ours);
        let socket = UnixDatagram::unbound()?;
        // One who does not listen must not hold up the start, a stop or a reload.
        socket.set_write_timeout(Some(TOLD_WITHIN))?;
        Ok(Some(Arc::new(Notifier {
            socket,
            address: address(&path)?,
            watchdog: watchdog.map(Duration::from_micros),
            is_stopping: AtomicBool::new(false),
        })))
    }

    fn send(&self, lines: &[&str]) {
        let message = lines.join("\n");
        if let Err(error) = self.socket.send_to_addr(message.as_bytes(), &self.address)
            && let Some(suppressed) = NOT_TOLD.allow()
        {
            log::warn!(error:%, suppressed; "systemd cannot be told");
        }
    }

    /// All is up, or up again after a reload.
    pub fn ready(&self) {
        self.send(&["READY=1"]);
    }

    /// Settings are being read anew; [`Notifier::ready`] follows.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let usec = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        self.send(&["RELOADING=1", &format!("MONOTONIC_USEC={usec}")]);
    }

    /// The program has begun to stop.
    pub fn stopping(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        self.send(&["STOPPING=1", &extension(), "STATUS=stopping"]);
    }

    /// Tells from now on, from a thread of its own, what the program is at, that it is alive as
    /// long as it makes progress, and for `stop_max` after the begin of a stop that it needs
    /// more time.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(
        self: &Arc<Self>,
        status: Arc<Status>,
        progress: Arc<Progress>,
        stop_max: Duration,
        threads: &Threads,
    ) -> io::Result<()> {
        let notifier = Arc::clone(self);
        threads.spawn("systemd", move || {
            notifier.run(&status, &progress, stop_max)
        })
    }

    fn run(&self, status: &Status, progress: &Progress, stop_max: Duration) {
        // Twice in its time: one may come late.
        let pause = self
            .watchdog
            .map_or(LOOK, |watchdog| LOOK.min(watchdog / 2));
        let (mut told, mut stop_until) = (String::new(), None);
        loop {
            let is_stopping = self.is_stopping.load(Ordering::SeqCst);
            let mut lines = Vec::new();
            let left = match is_stopping {
                true => format!("stopping, {} being sent: ", status.being_sent()),
                false => String::new(),
            };
            let line = format!("STATUS={left}{}", one_line(&status.to_line()));
            if line != told {
                told.clone_from(&line);
                lines.push(line);
            }
            match progress.stuck(Instant::now()) {
                None if self.watchdog.is_some() => lines.push("WATCHDOG=1".into()),
                None => {}
                Some(stuck) => {
                    if let Some(suppressed) = STUCK.allow() {
                        log::error!(suppressed; "{stuck}: please report it");
                    }
                }
            }
            let until = is_stopping.then(|| *stop_until.get_or_insert(Instant::now() + stop_max));
            if until.is_some_and(|until| Instant::now() < until) {
                lines.push(extension());
            }
            if !lines.is_empty() {
                self.send(&lines.iter().map(String::as_str).collect::<Vec<_>>());
            }
            std::thread::sleep(pause);
        }
    }
}

fn extension() -> String {
    format!("EXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros())
}

/// A path, or with `@` an abstract name.
fn address(path: &OsStr) -> io::Result<SocketAddr> {
    match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(path),
        _ => Err(io::Error::other("must begin with / or @")),
    }
}

/// A destination's error in it must not become a message of its own.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars() {
        if line.len() + character.len_utf8() > STATUS_BYTES_MAX {
            break;
        }
        line.push(if printable::is_hidden(character) {
            ' '
        } else {
            character
        });
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_have_paths_or_abstract_names() {
        assert!(
            address(OsStr::new("/run/notify"))
                .unwrap()
                .as_pathname()
                .is_some()
        );
        let name = address(OsStr::new("@name")).unwrap();
        assert_eq!(name.as_abstract_name(), Some(&b"name"[..]));
        assert!(address(OsStr::new("vsock:2:1234")).is_err());
    }

    #[test]
    fn nobody_is_told_without_a_socket() {
        assert!(Notifier::from_env(|_| None).unwrap().is_none());
        assert!(Notifier::from_env(|_| Some("".into())).unwrap().is_none());
    }

    #[test]
    fn a_watchdog_of_another_process_is_not_ours() {
        let watchdog = |pid: String| {
            let env = move |name: &str| match name {
                "NOTIFY_SOCKET" => Some("@asyncproxy-test".into()),
                "WATCHDOG_USEC" => Some("30000000".into()),
                "WATCHDOG_PID" => Some(pid.clone().into()),
                _ => None,
            };
            Notifier::from_env(env).unwrap().unwrap().watchdog
        };
        let pid = std::process::id();
        assert_eq!(watchdog(pid.to_string()), Some(Duration::from_secs(30)));
        assert_eq!(watchdog((pid + 1).to_string()), None);
    }

    #[test]
    fn a_status_is_one_short_line() {
        assert_eq!(one_line("a\nWATCHDOG=1\r\u{1b}b"), "a WATCHDOG=1  b");
        assert!(one_line(&"\u{e9}".repeat(1000)).len() <= STATUS_BYTES_MAX);
    }
}
