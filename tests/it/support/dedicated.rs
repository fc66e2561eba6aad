//! A Postgres server of one's own, for tests that stop and start it.

use std::net::{Ipv4Addr, TcpListener};

use rustix::process::Signal;
use tempfile::TempDir;

use super::postgres::{give_to_server_account, server_command};
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
        give_to_server_account(directory.path());
        let initdb = server_command("initdb")
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
            server_command("postgres")
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

/// A port below those that the system hands out by itself: it stays free while the server is down.
fn free_port() -> u16 {
    std::iter::repeat_with(|| fastrand::u16(20_000..30_000))
        .take(100)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port")
}
