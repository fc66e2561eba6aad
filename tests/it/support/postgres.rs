//! A Postgres cluster for the whole test process, and databases in it for single tests.
//!
//! The cluster starts when first asked for. A shell that waits for this process to end, in
//! whatever way, stops it and removes its directory.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use postgres::{Client, NoTls};
use rustix::process::geteuid;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

/// A running server.
pub struct Cluster {
    port: u16,
    /// Cleans up when this process has ended: nobody waits for it.
    _guard: Child,
}

/// A database of its own. Dropped with it.
pub struct TestDb {
    name: String,
    port: u16,
}

/// The cluster of this process.
pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(Cluster::start)
}

impl Cluster {
    #[expect(clippy::zombie_processes, reason = "it outlives this process")]
    fn start() -> Cluster {
        let directory = TempDir::new().expect("temporary directory");
        give_to_server_account(directory.path());
        let directory = directory.keep();
        let guard = run_until_we_end(
            r#"cat >/dev/null; "$1" -D "$0/data" -m immediate -s stop; rm -rf "$0""#,
            &[&directory, &server_program("pg_ctl")],
        );
        let initdb = server_command("initdb")
            .args(["--username=test", "--auth=trust", "--encoding=UTF8"])
            .args(["--locale=C", "--no-sync", "-D"])
            .arg(directory.join("data"))
            .current_dir(&directory)
            .output()
            .expect("run initdb");
        let errors = String::from_utf8_lossy(&initdb.stderr);
        assert!(initdb.status.success(), "initdb: {errors}");
        for _ in 0..5 {
            // Someone else may take the port before the server does.
            let port = Port::take();
            if start_server(&directory, port.number()) {
                return Cluster {
                    port: port.number(),
                    _guard: guard,
                };
            }
        }
        let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
        panic!("the server does not start:\n{log}");
    }

    /// Makes an empty database.
    pub fn database(&self) -> TestDb {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let create = format!("CREATE DATABASE {name}");
        connect(self.port, "postgres")
            .batch_execute(&create)
            .expect("create a database");
        TestDb {
            name,
            port: self.port,
        }
    }
}

impl TestDb {
    pub fn url(&self) -> String {
        format!("postgres://test@127.0.0.1:{}/{}", self.port, self.name)
    }

    /// The same as libpq keywords.
    pub fn keywords(&self) -> String {
        keywords(self.port, &self.name)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A connection of the test's own.
    pub fn client(&self) -> Client {
        connect(self.port, &self.name)
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        // Not while unwinding: a second panic would hide the first.
        if let Ok(mut client) = Client::connect(&keywords(self.port, "postgres"), NoTls) {
            let _ = client.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name));
        }
    }
}

fn keywords(port: u16, name: &str) -> String {
    format!("host=127.0.0.1 port={port} user=test dbname={name}")
}

fn connect(port: u16, name: &str) -> Client {
    Client::connect(&keywords(port, name), NoTls).expect("connect to the test server")
}

fn start_server(directory: &Path, port: u16) -> bool {
    let options = format!(
        "-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' \
         -c max_connections=200"
    );
    server_command("pg_ctl")
        .args(["-w", "-s", "-D"])
        .arg(directory.join("data"))
        .arg("-l")
        .arg(directory.join("log"))
        .args(["-o", &options, "start"])
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("run pg_ctl")
        .success()
}

/// Runs a shell script as the server's account. Its standard input ends when the process handle
/// is dropped or this process ends.
pub(super) fn run_until_we_end(script: &str, arguments: &[&Path]) -> Child {
    let mut command = Command::new("sh");
    as_server_account(&mut command);
    command
        // What stops us, such as Ctrl-C, must not stop what cleans up after us.
        .args(["-c", &format!("trap '' HUP INT TERM; {script}")])
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("run sh")
}

/// Makes `path` the server account's.
pub fn give_to_server_account(path: &Path) {
    if let Some((user, group)) = server_account() {
        chown(path, Some(user), Some(group)).expect("chown");
    }
}

fn as_server_account(command: &mut Command) {
    if let Some((user, group)) = server_account() {
        command.uid(user).gid(group);
    }
}

pub(super) fn server_command(program: &str) -> Command {
    let mut command = Command::new(server_program(program));
    as_server_account(&mut command);
    command
}

fn server_program(name: &str) -> PathBuf {
    find_server_program(name)
        .unwrap_or_else(|| panic!("no {name}: install postgresql (tests/run.sh does)"))
}

/// Debian keeps the server's programs off the PATH.
pub fn find_server_program(name: &str) -> Option<PathBuf> {
    let asked = Command::new("pg_config").arg("--bindir").output();
    let asked = asked.ok().filter(|output| output.status.success());
    let configured = asked.map(|output| {
        let directory = String::from_utf8_lossy(&output.stdout);
        PathBuf::from(directory.trim_end().to_owned())
    });
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let debian = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    configured
        .into_iter()
        .chain(debian)
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|program| program.exists())
}

/// Postgres refuses to run as root: then it runs as the account its package made.
pub fn server_account() -> Option<(u32, u32)> {
    if !geteuid().is_root() {
        return None;
    }
    let accounts = fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let account = accounts
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields[0] == "postgres")
        .expect("the account `postgres`, which the package makes");
    Some((
        account[2].parse().expect("uid"),
        account[3].parse().expect("gid"),
    ))
}

/// A port that nobody else here takes for as long as this is there, whether something listens on it
/// or not.
pub struct Port {
    number: u16,
    _held: Socket,
}

impl Port {
    /// One below those that the system hands out by itself.
    pub fn take() -> Port {
        std::iter::repeat_with(|| fastrand::u16(20_000..30_000))
            .take(100)
            .find_map(|number| Port::try_take(number).ok())
            .expect("a free port")
    }

    fn try_take(number: u16) -> io::Result<Port> {
        let held = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // Refused also if somebody else only holds it.
        held.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, number)).into())?;
        // From here on a server may listen on it, as all servers set this.
        held.set_reuse_address(true)?;
        Ok(Port {
            number,
            _held: held,
        })
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}
