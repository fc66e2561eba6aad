//! A Postgres server of one's own, for tests that stop and start it.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Signal, geteuid};
use tempfile::TempDir;

use super::process::Process;
use super::proxy::PATIENCE;

/// A cluster on a port of its own; not running at first.
#[derive(Debug)]
pub struct DedicatedCluster {
    directory: TempDir,
    port: u16,
    server: Option<Process>,
}

impl DedicatedCluster {
    /// Makes an empty cluster without starting it.
    pub fn create() -> DedicatedCluster {
        let directory = TempDir::new().expect("temporary directory");
        if let Some((user, group)) = server_account() {
            chown(directory.path(), Some(user), Some(group)).expect("chown");
        }
        let initdb = command("initdb")
            .args(["--username=test", "--auth=trust", "--no-sync", "-D"])
            .arg(directory.path().join("data"))
            .current_dir(directory.path())
            .output()
            .expect("run initdb");
        let errors = String::from_utf8_lossy(&initdb.stderr);
        assert!(initdb.status.success(), "initdb: {errors}");
        DedicatedCluster {
            directory,
            port: free_port(),
            server: None,
        }
    }

    /// Of the default database, whether the server runs or not.
    pub fn url(&self) -> String {
        format!("postgres://test@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&mut self) {
        let server = Process::spawn(
            command("postgres")
                .arg("-D")
                .arg(self.directory.path().join("data"))
                .args(["-c", "listen_addresses=127.0.0.1"])
                .args(["-c", "unix_socket_directories="])
                .args(["-c", "fsync=off"])
                .args(["-p", &self.port.to_string()])
                .current_dir(self.directory.path()),
        );
        server.wait_for_line("ready to accept connections", PATIENCE);
        self.server = Some(server);
    }

    /// Stops the server, breaking its connections.
    pub fn stop(&mut self) {
        let mut server = self.server.take().expect("stop only a running server");
        server.signal(Signal::INT);
        server.wait(PATIENCE);
    }
}

impl Drop for DedicatedCluster {
    fn drop(&mut self) {
        // A killed server would leave its children behind.
        if self.server.is_some() {
            self.stop();
        }
    }
}

/// One of the server's programs, run as who may run it.
fn command(program: &str) -> Command {
    let mut command = Command::new(server_directory().join(program));
    if let Some((user, group)) = server_account() {
        command.uid(user).gid(group);
    }
    command
}

/// Debian keeps the server's programs off the PATH; the newest version is taken.
fn server_directory() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let debian = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).chain(debian);
    candidates
        .filter(|directory| directory.join("initdb").exists())
        .max()
        .expect("Postgres must be installed: tests/run.sh does so")
}

/// Postgres refuses to run as root: then it runs as the account its package made.
fn server_account() -> Option<(u32, u32)> {
    if !geteuid().is_root() {
        return None;
    }
    let accounts = fs::read_to_string(Path::new("/etc/passwd")).expect("/etc/passwd");
    let fields = accounts
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields[0] == "postgres")
        .expect("the account `postgres`, which the package makes");
    Some((
        fields[2].parse().expect("uid"),
        fields[3].parse().expect("gid"),
    ))
}

/// A port below those that the system hands out by itself: it stays free while the server is down.
fn free_port() -> u16 {
    std::iter::repeat_with(|| fastrand::u16(20_000..30_000))
        .take(100)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port")
}
