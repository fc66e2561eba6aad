//! TLS to Postgres: each `sslmode` against right and wrong certificates, beside psql.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use asyncproxy::config::PostgresServer;
use asyncproxy::queue::Store;
use asyncproxy::queue::postgres::PostgresStore;

use crate::contract::{TIMEOUT, append_one, claim, counts, delivered};
use crate::support::certificates::Authority;
use crate::support::dedicated::DedicatedCluster;

fn open(string: &str) -> PostgresStore {
    let server: PostgresServer = string.parse().unwrap();
    PostgresStore::new(server, 2, true, TIMEOUT)
}

/// Whether the store can be used, or why not.
fn try_store(string: &str) -> Result<(), String> {
    let sample = open(string).sample();
    sample.map(|_| ()).map_err(|error| error.to_string())
}

fn psql_connects(string: &str) -> bool {
    Command::new("psql")
        .args(["-X", "-w", "-c", "SELECT 1", string])
        // Nothing of the account's own is to decide.
        .env("HOME", "/nonexistent")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("run psql")
        .success()
}

fn string(cluster: &DedicatedCluster, host: &str, rest: &str) -> String {
    let port = cluster.port();
    format!("host={host} hostaddr=127.0.0.1 port={port} user=test dbname=postgres {rest}")
}

fn with_root(mode: &str, root: &Path) -> String {
    format!("sslmode={mode} sslrootcert={}", root.display())
}

/// Compares with what is expected, and psql with the same string.
fn assert_outcome(string: &str, refused_because: Option<&str>) {
    let result = try_store(string);
    match (&result, refused_because) {
        (Ok(()), None) => {}
        (Err(error), Some(why)) => assert!(error.contains(why), "{string}: {error}"),
        _ => panic!("{string}: {result:?}, expected {refused_because:?}"),
    }
    assert_eq!(psql_connects(string), result.is_ok(), "psql {string}");
}

#[test]
fn each_sslmode_verifies_what_libpq_does() {
    const ISSUER: &str = "UnknownIssuer";
    const NAME: &str = "not valid for name";
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let issued = ours.issue("server", "DNS:localhost", 2);
    let mut cluster = DedicatedCluster::create();
    cluster.with_tls(&issued.certificate, &issued.key);
    cluster.start();
    let (right, wrong) = (ours.certificate(), others.certificate());
    for (host, rest, refused_because) in [
        ("localhost", "sslmode=disable".to_owned(), None),
        ("localhost", "sslmode=prefer".to_owned(), None),
        ("127.0.0.1", "sslmode=require".to_owned(), None),
        ("localhost", with_root("require", &right), None),
        ("localhost", with_root("require", &wrong), Some(ISSUER)),
        ("127.0.0.1", with_root("verify-ca", &right), None),
        ("localhost", with_root("verify-ca", &wrong), Some(ISSUER)),
        ("localhost", with_root("verify-full", &right), None),
        ("localhost", with_root("verify-full", &wrong), Some(ISSUER)),
        ("127.0.0.1", with_root("verify-full", &right), Some(NAME)),
        // The certificate is refused, and then there is no encryption.
        ("localhost", with_root("prefer", &wrong), None),
    ] {
        assert_outcome(&string(&cluster, host, &rest), refused_because);
    }
}

#[test]
fn a_server_without_tls_is_refused_from_require_on() {
    const NO_TLS: &str = "server does not support TLS";
    let authority = Authority::new("ours");
    let mut cluster = DedicatedCluster::create();
    cluster.start();
    let root = authority.certificate();
    for (rest, refused_because) in [
        (String::new(), None),
        ("sslmode=prefer".to_owned(), None),
        ("sslmode=require".to_owned(), Some(NO_TLS)),
        (with_root("verify-ca", &root), Some(NO_TLS)),
        (with_root("verify-full", &root), Some(NO_TLS)),
    ] {
        assert_outcome(&string(&cluster, "localhost", &rest), refused_because);
    }
}

#[test]
fn rows_go_their_way_over_tls_with_a_client_certificate() {
    let authority = Authority::new("ours");
    let server = authority.issue("server", "DNS:localhost", 2);
    // Postgres takes the common name for the user's.
    let client = authority.issue("test", "DNS:client", 2);
    let mut cluster = DedicatedCluster::create();
    cluster.with_tls(&server.certificate, &server.key);
    cluster.trust_clients_of(&authority.certificate());
    cluster.start();
    let plain = string(&cluster, "localhost", "sslmode=disable");
    assert_outcome(&plain, Some("pg_hba.conf"));
    let root = with_root("verify-full", &authority.certificate());
    let nameless = string(&cluster, "localhost", &root);
    assert_outcome(&nameless, Some("certificate"));
    let own = format!(
        "{nameless} sslcert={} sslkey={}",
        client.certificate.display(),
        client.key.display()
    );
    assert_outcome(&own, None);
    let store = open(&own);
    append_one(&store);
    let rows = claim(&store, 1);
    assert_eq!(counts(&store), (0, 1, 0));
    store.settle(&[delivered(&rows[0])]).unwrap();
    assert_eq!(counts(&store), (0, 0, 0));
}

#[test]
fn a_password_is_bound_to_the_channel() {
    let authority = Authority::new("ours");
    let issued = authority.issue("server", "DNS:localhost", 2);
    let mut cluster = DedicatedCluster::create();
    cluster.with_tls(&issued.certificate, &issued.key);
    cluster.start();
    let mut client = postgres::Client::connect(&cluster.url(), postgres::NoTls).expect("connect");
    client
        .batch_execute("ALTER USER test PASSWORD 'secret'")
        .unwrap();
    cluster.stop();
    cluster.set_access("hostssl all all 127.0.0.1/32 scram-sha-256\n");
    cluster.start();
    let bound = "password=secret channel_binding=require sslmode=require";
    assert_outcome(&string(&cluster, "localhost", bound), None);
    let prefer = "password=secret sslmode=prefer";
    assert_outcome(&string(&cluster, "localhost", prefer), None);
    let plain = "password=secret sslmode=disable";
    assert_outcome(&string(&cluster, "localhost", plain), Some("pg_hba.conf"));
}

/// One that accepts TLS and then says nothing holds up nobody for longer than it may.
#[test]
fn a_server_that_falls_silent_in_the_handshake_is_given_up() {
    use std::io::{Read, Write};
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut request = [0; 8];
        socket.read_exact(&mut request).unwrap();
        socket.write_all(b"S").unwrap();
        // The hello, and then the end, because we give it up.
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        rest.len()
    });
    let string = format!("host=127.0.0.1 port={port} user=test sslmode=require");
    let server: PostgresServer = string.parse().unwrap();
    let store = PostgresStore::new(server, 1, true, Duration::from_millis(300));
    let error = store.sample().unwrap_err().to_string();
    assert!(error.contains("store not available"), "{error}");
    // The connection does not outlive it.
    assert!(asked.join().unwrap() > 0);
}
