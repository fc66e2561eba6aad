//! `asyncproxy reload PID`: has a service read its settings again and tells how that ended, which a signal
//! alone does not. Made for `ExecReload=`: systemd does not show it the service's credentials, so that only the
//! service itself can say whether its settings are good.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::config::Bind;
use crate::control::{SOCKET, ask};
use crate::printable;

/// Less than systemd waits (`TimeoutStartSec=`, 90 s).
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// Returns when the settings are reloaded.
///
/// # Errors
/// What is wrong with them, or why that cannot be told.
pub fn run(pid: i32) -> Result<(), String> {
    let socket = socket()?;
    let before = status(&socket, pid)?;
    let process = Pid::from_raw(pid).ok_or("no such process")?;
    kill_process(process, Signal::HUP).map_err(|error| format!("process {pid}: {error}"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = status(&socket, pid)?;
        if reloads(&now) != reloads(&before) {
            return match now["failed_reload"]["error"].as_str() {
                None => Ok(()),
                Some(error) => Err(format!(
                    "settings not reloaded, all stay as they are: {}",
                    printable::line(error.as_bytes())
                )),
            };
        }
        if Instant::now() > deadline {
            let seconds = PATIENCE.as_secs();
            return Err(format!("the service has not reloaded in {seconds} s"));
        }
        std::thread::sleep(PAUSE);
    }
}

fn socket() -> Result<Bind, String> {
    let directories = std::env::var_os("RUNTIME_DIRECTORY").ok_or(
        "RUNTIME_DIRECTORY is not set: it names the directory of the service's control.sock",
    )?;
    let directory = std::env::split_paths(&directories).next();
    Ok(Bind::Unix(
        directory.unwrap_or_else(PathBuf::new).join(SOCKET),
    ))
}

fn status(socket: &Bind, pid: i32) -> Result<Value, String> {
    let status = ask::status(socket)?;
    match status["pid"].as_i64() == Some(pid.into()) {
        true => Ok(status),
        false => Err(format!("{socket}: is not process {pid}")),
    }
}

/// How many there were.
fn reloads(status: &Value) -> Option<u64> {
    status["reloads"].as_u64()
}
