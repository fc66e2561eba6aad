//! TLS to the destination: who is trusted, what is shown to it, and why a failed attempt failed.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::support::certificates::{Authority, Issued};
use crate::support::http::{self, Kind, Message};
use crate::support::proxy::{PATIENCE, Proxy, Setup};
use crate::support::store;

/// An https destination: tells the number of the connection that each request came on.
struct Secure {
    port: u16,
    requests: Receiver<usize>,
}

/// Serves one connection; the function tells of each request, and whether to go on.
type Serve = fn(TcpStream, Arc<ServerConfig>, &dyn Fn() -> bool);

impl Secure {
    fn start(own: &Issued, clients_of: Option<&Path>) -> Secure {
        Secure::serving(own, clients_of, serve)
    }

    /// Answers 413 to whatever begins to arrive, and closes.
    fn refusing(own: &Issued) -> Secure {
        Secure::serving(own, None, refuse)
    }

    fn serving(own: &Issued, clients_of: Option<&Path>, serve: Serve) -> Secure {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients_of {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots
                    .add(CertificateDer::from_pem_file(authority).unwrap())
                    .unwrap();
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let chain = vec![CertificateDer::from_pem_file(&own.certificate).unwrap()];
        let key = PrivateKeyDer::from_pem_file(&own.key).unwrap();
        let config = Arc::new(builder.with_single_cert(chain, key).unwrap());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, requests) = channel();
        thread::spawn(move || {
            for (number, socket) in listener.incoming().enumerate() {
                let (socket, config, seen) = (socket.unwrap(), Arc::clone(&config), seen.clone());
                thread::spawn(move || serve(socket, config, &|| seen.send(number).is_ok()));
            }
        });
        Secure { port, requests }
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}", self.port)
    }

    fn next(&self) -> usize {
        self.requests.recv_timeout(PATIENCE).expect("a request")
    }
}

fn serve(socket: TcpStream, config: Arc<ServerConfig>, seen: &dyn Fn() -> bool) {
    let connection = ServerConnection::new(config).unwrap();
    let mut reader = BufReader::new(StreamOwned::new(connection, socket));
    while let Ok(Some(_)) = Message::read(&mut reader, Kind::Request) {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        if !seen() || reader.get_mut().write_all(answer).is_err() {
            break;
        }
    }
}

fn refuse(socket: TcpStream, config: Arc<ServerConfig>, seen: &dyn Fn() -> bool) {
    // Its answer is not to wait for what is unread: closing would then take it back.
    socket.set_nodelay(true).unwrap();
    let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), socket);
    stream.read_exact(&mut [0; 100]).unwrap();
    let answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n";
    stream.write_all(answer).unwrap();
    seen();
}

/// Sends one request; what is logged of why its attempt failed must say this. Its row stays.
fn assert_fails(setup: &Setup, why: &str) {
    let proxy = setup.start();
    send(&proxy);
    let line = proxy.wait_for_log("delivery failed");
    assert!(line.contains(why), "{line}");
    proxy.stop();
    assert_eq!(store::rows(setup), 1);
}

fn send(proxy: &Proxy) {
    let answer = proxy.send(&http::request("POST", "/hook", &[], b"body"));
    assert_eq!(answer.status, 200);
}

fn trusting(url: &str, authority: &Authority) -> Setup {
    Setup::new(url)
        .set("proxy.ca_file", authority.certificate().display())
        .set("proxy.num_clients", 1)
}

#[test]
fn a_trusted_destination_is_sent_to_on_one_connection() {
    let authority = Authority::new("ours");
    let destination = Secure::start(&authority.issue("server", "DNS:localhost", 2), None);
    let proxy = trusting(&destination.url("localhost"), &authority).start();
    for _ in 0..3 {
        send(&proxy);
        assert_eq!(destination.next(), 0);
    }
    // Longer than the buffers of a connection, which is the same all the same.
    let long = format!("X-Long: {}", "x".repeat(20_000));
    let answer = proxy.send(&http::request("POST", "/hook", &[&long], &[7; 300_000]));
    assert_eq!(answer.status, 200);
    assert_eq!(destination.next(), 0);
    proxy.stop();
}

/// Session tickets come while the body is still being sent, and then the answer.
#[test]
fn a_refusal_during_the_upload_is_seen_through_tls_too() {
    let authority = Authority::new("ours");
    let destination = Secure::refusing(&authority.issue("server", "DNS:localhost", 2));
    let proxy = trusting(&destination.url("localhost"), &authority).start();
    let body = vec![7; 9 * 1024 * 1024];
    let answer = proxy.send(&http::request("POST", "/hook", &[], &body));
    assert_eq!(answer.status, 200);
    destination.next();
    let line = proxy.wait_for_log("delivery failed");
    assert!(line.contains("destination answered 413"), "{line}");
    proxy.kill9();
}

#[test]
fn an_untrusted_destination_is_a_failed_attempt_that_says_why() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let good = Secure::start(&ours.issue("server", "DNS:localhost", 2), None);
    let expired = Secure::start(&ours.issue("expired", "DNS:localhost", -1), None);
    for (url, authority, why) in [
        (good.url("localhost"), &others, "UnknownIssuer"),
        (good.url("127.0.0.1"), &ours, "not valid for name"),
        (expired.url("localhost"), &ours, "Expired"),
    ] {
        assert_fails(&trusting(&url, authority), why);
    }
}

#[test]
fn a_destination_that_asks_for_a_certificate_gets_it() {
    let authority = Authority::new("ours");
    let server = authority.issue("server", "DNS:localhost", 2);
    let own = authority.issue("client", "DNS:client", 2);
    let destination = Secure::start(&server, Some(&authority.certificate()));
    let setup = trusting(&destination.url("localhost"), &authority);
    // It says why, unless the reset that follows was faster.
    assert_fails(&setup, "");
    let proxy = trusting(&destination.url("localhost"), &authority)
        .set("proxy.client_cert_file", own.certificate.display())
        .set("proxy.client_key_file", own.key.display())
        .start();
    send(&proxy);
    destination.next();
    proxy.stop();
}

/// Certificates are renewed in place: a hangup is enough, though no setting has changed.
#[test]
fn a_hangup_reads_certificates_anew() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let destination = Secure::start(&ours.issue("server", "DNS:localhost", 2), None);
    let setup = Setup::new(&destination.url("localhost"));
    let trusted = setup.path("ca.pem");
    std::fs::copy(others.certificate(), &trusted).unwrap();
    let setup = setup
        .set("proxy.ca_file", trusted.display())
        .set("proxy.num_clients", 1);
    let proxy = setup.start();
    send(&proxy);
    proxy.wait_for_log("UnknownIssuer");
    std::fs::copy(ours.certificate(), &trusted).unwrap();
    proxy.sighup();
    proxy.wait_for_log("settings reloaded");
    // What failed before, and what comes now.
    send(&proxy);
    destination.next();
    destination.next();
    proxy.stop();
}

#[test]
fn keys_that_cannot_be_used_are_named() {
    let authority = Authority::new("ours");
    let (own, other) = (
        authority.issue("client", "DNS:client", 2),
        authority.issue("other", "DNS:other", 2),
    );
    let encrypted = own.key.with_extension("encrypted");
    let done = std::process::Command::new("openssl")
        .args(["pkcs8", "-topk8", "-passout", "pass:sesame", "-in"])
        .arg(&own.key)
        .arg("-out")
        .arg(&encrypted)
        .status();
    assert!(done.unwrap().success());
    for key in [&other.key, &encrypted, &own.certificate] {
        let setup = trusting("https://localhost:1", &authority)
            .set("proxy.client_cert_file", own.certificate.display())
            .set("proxy.client_key_file", key.display());
        let output = setup.command().arg("--check-config").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{}: {said}", key.display());
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("proxy.client_"), "{said}");
        assert!(
            said.contains(&*own.certificate.to_string_lossy())
                || said.contains(&*key.to_string_lossy()),
            "{said}"
        );
    }
}
