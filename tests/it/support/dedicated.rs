//! A Postgres server of one's own, for tests that stop and start it.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use postgres::{Client, NoTls};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::postgres::{Port, give_to_server_account, server_command};
use super::process::Process;
use super::proxy::PATIENCE;

/// A cluster on a port of its own; not running at first.
pub struct DedicatedCluster {
    directory: PathBuf,
    /// Removed with it.
    temporary: Option<TempDir>,
    port: Port,
    server: Option<Process>,
    tls: bool,
}

impl DedicatedCluster {
    /// Makes an empty cluster without starting it.
    pub fn create() -> DedicatedCluster {
        let temporary = TempDir::new().expect("temporary directory");
        let directory = temporary.path().to_owned();
        let mut cluster = DedicatedCluster::create_in(directory);
        cluster.temporary = Some(temporary);
        cluster
    }

    /// The same in a directory that may exist already.
    pub fn create_in(directory: PathBuf) -> DedicatedCluster {
        std::fs::create_dir_all(&directory).expect("create a directory");
        give_to_server_account(&directory);
        let initdb = server_command("initdb")
            .args(["--username=test", "--auth=trust", "--no-sync", "-D"])
            .arg(directory.join("data"))
            .current_dir(&directory)
            .output()
            .expect("run initdb");
        let errors = String::from_utf8_lossy(&initdb.stderr);
        assert!(initdb.status.success(), "initdb: {errors}");
        DedicatedCluster {
            directory,
            temporary: None,
            port: Port::take(),
            server: None,
            tls: false,
        }
    }

    /// Speaks TLS from the next start on, with this certificate and key.
    pub fn with_tls(&mut self, certificate: &Path, key: &Path) {
        for (from, name) in [(certificate, "server.crt"), (key, "server.key")] {
            let to = self.directory.join("data").join(name);
            std::fs::copy(from, &to).expect("copy a certificate");
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).expect("chmod");
            give_to_server_account(&to);
        }
        self.tls = true;
    }

    /// Demands a certificate by this authority, whose common name is the user's, from the next start on.
    pub fn trust_clients_of(&self, authority: &Path) {
        let data = self.directory.join("data");
        std::fs::copy(authority, data.join("root.crt")).expect("copy a certificate");
        give_to_server_account(&data.join("root.crt"));
        let mut settings = std::fs::OpenOptions::new()
            .append(true)
            .open(data.join("postgresql.conf"))
            .expect("postgresql.conf");
        settings
            .write_all(b"ssl_ca_file = 'root.crt'\n")
            .expect("write a setting");
        self.set_access("hostssl all all 127.0.0.1/32 cert\n");
    }

    /// Replaces `pg_hba.conf`.
    pub fn set_access(&self, lines: &str) {
        std::fs::write(self.directory.join("data/pg_hba.conf"), lines).expect("write pg_hba.conf");
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Of the default database, whether the server runs or not.
    pub fn url(&self) -> String {
        format!("postgres://test@127.0.0.1:{}/postgres", self.port())
    }

    /// Makes a standby of a running server without starting it; it gets all that is committed
    /// there while both run.
    pub fn standby_of(primary: &DedicatedCluster) -> DedicatedCluster {
        let temporary = TempDir::new().expect("temporary directory");
        let directory = temporary.path().to_owned();
        give_to_server_account(&directory);
        let copied = server_command("pg_basebackup")
            .args([
                "-h",
                "127.0.0.1",
                "-U",
                "test",
                "-X",
                "stream",
                "-R",
                "-c",
                "fast",
            ])
            .args(["--no-sync", "-p", &primary.port().to_string(), "-D"])
            .arg(directory.join("data"))
            .current_dir(&directory)
            .output()
            .expect("run pg_basebackup");
        let errors = String::from_utf8_lossy(&copied.stderr);
        assert!(copied.status.success(), "pg_basebackup: {errors}");
        DedicatedCluster {
            directory,
            temporary: Some(temporary),
            port: Port::take(),
            server: None,
            tls: false,
        }
    }

    /// Makes the standby a server of its own, and waits until it is.
    pub fn promote(&self) {
        let promoted = server_command("pg_ctl")
            .args(["promote", "-w", "-D"])
            .arg(self.directory.join("data"))
            .current_dir(&self.directory)
            .output()
            .expect("run pg_ctl");
        let errors = String::from_utf8_lossy(&promoted.stderr);
        assert!(promoted.status.success(), "pg_ctl promote: {errors}");
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// The same with settings, each as `name=value`.
    pub fn start_with(&mut self, settings: &[&str]) {
        let server = Process::spawn(
            server_command("postgres")
                .arg("-D")
                .arg(self.directory.join("data"))
                .args(["-c", "listen_addresses=127.0.0.1"])
                .args(["-c", "unix_socket_directories="])
                .args(["-c", "fsync=off"])
                .args(["-c", if self.tls { "ssl=on" } else { "ssl=off" }])
                .args(["-p", &self.port().to_string()])
                .args(settings.iter().flat_map(|setting| ["-c", setting]))
                .current_dir(&self.directory),
        );
        // A standby accepts read-only ones.
        server.wait_for_line("ready to accept", PATIENCE);
        self.server = Some(server);
    }

    /// Stops the server, breaking its connections.
    pub fn stop(&mut self) {
        self.end(Signal::INT);
    }

    /// Ends the server as a crash would: it recovers when it starts again.
    pub fn crash(&mut self) {
        self.end(Signal::QUIT);
    }

    fn end(&mut self, signal: Signal) {
        let mut server = self.server.take().expect("stop only a running server");
        server.signal(signal);
        server.wait(PATIENCE);
    }

    /// Whether the server has not ended by itself.
    pub fn is_running(&mut self) -> bool {
        let server = self.server.take_if(|server| server.has_ended());
        server.is_none()
    }

    /// Stops all its processes without ending them.
    pub fn freeze(&self) {
        self.signal_all(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal_all(Signal::CONT);
    }

    fn signal_all(&self, signal: Signal) {
        let server = self.server.as_ref().expect("a running server");
        for process in [server.pid()].into_iter().chain(children(server.pid())) {
            let process = i32::try_from(process).ok().and_then(Pid::from_raw);
            // One that has ended meanwhile needs no signal.
            let _ = kill_process(process.expect("a process id"), signal);
        }
    }

    /// Ends all connections but the one that does it.
    pub fn terminate_connections(&self) {
        let mut client = Client::connect(&self.url(), NoTls).expect("connect");
        let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        client.simple_query(terminate).expect(terminate);
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

/// Processes that a process has started and that run still.
fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let children = std::fs::read_to_string(&path).expect(&path);
    let children = children.split_whitespace();
    children.filter_map(|child| child.parse().ok()).collect()
}
