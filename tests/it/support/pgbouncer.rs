//! PgBouncer in transaction mode, in front of one database.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use tempfile::TempDir;

use super::postgres::{Port, TestDb, give_to_server_account, run_until_we_end};

/// Server connections: fewer than the clients have, so that they must share.
const POOL_SIZE: u32 = 3;
const START_TIMEOUT: Duration = Duration::from_secs(15);

/// A running PgBouncer. Ends when dropped, or with this process.
pub struct Pgbouncer {
    url: String,
    guard: Child,
    /// Kept over a restart.
    port: Option<Port>,
    server: (String, u16),
    mode: &'static str,
    /// What it says.
    log: PathBuf,
}

impl Pgbouncer {
    pub fn start(database: &TestDb) -> Pgbouncer {
        Pgbouncer::pooling_by("transaction", database)
    }

    /// With another `pool_mode`.
    pub fn pooling_by(mode: &'static str, database: &TestDb) -> Pgbouncer {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let is_installed = std::env::split_paths(&path)
            .chain(["/usr/sbin".into()])
            .any(|directory| directory.join("pgbouncer").exists());
        assert!(is_installed, "install pgbouncer (tests/run.sh does)");
        for _ in 0..5 {
            // Someone else may take the port first.
            let server = (database.name().to_owned(), database.port());
            if let Some(running) = Pgbouncer::try_start(server, Port::take(), mode) {
                return running;
            }
        }
        panic!("pgbouncer does not start");
    }

    /// Ends it, with all connections, and starts it again on the same port.
    pub fn restart(&mut self) {
        self.end();
        let server = self.server.clone();
        let port = self.port.take().expect("the port of one that is running");
        let restarted = Pgbouncer::try_start(server, port, self.mode);
        *self = restarted.expect("pgbouncer starts again");
    }

    fn try_start(server: (String, u16), port: Port, mode: &'static str) -> Option<Pgbouncer> {
        let directory = TempDir::new().expect("temporary directory");
        give_to_server_account(directory.path());
        let configuration = directory.path().join("pgbouncer.ini");
        let log = directory.path().join("log");
        let ini = ini(&server, port.number(), mode, &log);
        fs::write(&configuration, ini).expect("write pgbouncer.ini");
        give_to_server_account(&configuration);
        // The server account's shell removes the directory: this process may be killed.
        let _ = directory.keep();
        let guard = run_until_we_end(
            r#"PATH="$PATH:/usr/sbin"; exec 3<&0; pgbouncer -q "$0" & cat <&3 >/dev/null
               kill -9 $!; rm -rf "${0%/*}""#,
            &[&configuration],
        );
        let url = format!("postgres://test@127.0.0.1:{}/{}", port.number(), server.0);
        let running = Pgbouncer {
            url,
            guard,
            port: Some(port),
            server,
            mode,
            log,
        };
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline {
            if Client::connect(&running.url, NoTls).is_ok() {
                return Some(running);
            }
            thread::sleep(Duration::from_millis(20));
        }
        None
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }
}

impl Pgbouncer {
    fn end(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

impl Drop for Pgbouncer {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = fs::read_to_string(&self.log);
            eprintln!("--- output of PgBouncer:\n{}---", log.unwrap_or_default());
        }
        self.end();
    }
}

fn ini((name, server_port): &(String, u16), port: u16, mode: &str, log: &Path) -> String {
    let log = log.display();
    format!(
        "[databases]\n\
         {name} = host=127.0.0.1 port={server_port} dbname={name} user=test\n\
         [pgbouncer]\n\
         listen_addr = 127.0.0.1\n\
         listen_port = {port}\n\
         unix_socket_dir =\n\
         logfile = {log}\n\
         auth_type = any\n\
         pool_mode = {mode}\n\
         default_pool_size = {POOL_SIZE}\n\
         max_client_conn = 200\n"
    )
}
