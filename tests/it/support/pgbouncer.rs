//! A stand-in, until the store has its own test support.

use super::postgres::TestDb;
use super::process::Process;
use super::proxy::PATIENCE;
use std::process::Command;

#[derive(Debug)]
pub struct Pgbouncer {
    url: String,
    _p: Process,
    _d: tempfile::TempDir,
}
impl Pgbouncer {
    pub fn start(db: &TestDb) -> Pgbouncer {
        let d = tempfile::TempDir::new().unwrap();
        std::fs::set_permissions(
            d.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let url = db.url();
        let (server, name) = url
            .trim_start_matches("postgres://test@")
            .split_once('/')
            .unwrap();
        let (host, port) = server.split_once(':').unwrap();
        let mine = fastrand::u16(10_000..20_000);
        std::fs::write(d.path().join("users"), "\"test\" \"\"\n").unwrap();
        std::fs::write(d.path().join("b.ini"), format!("[databases]\n{name} = host={host} port={port} dbname={name} user=test\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={mine}\nauth_type=any\npool_mode=transaction\nmax_client_conn=200\ndefault_pool_size=5\nunix_socket_dir=\n")).unwrap();
        let p = Process::spawn(
            Command::new("pgbouncer")
                .args(["-u", "postgres"])
                .arg(d.path().join("b.ini")),
        );
        p.wait_for_line("process up", PATIENCE);
        Pgbouncer {
            url: format!("postgres://test@127.0.0.1:{mine}/{name}"),
            _p: p,
            _d: d,
        }
    }
    pub fn url(&self) -> String {
        self.url.clone()
    }
}
