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
use serde_json::Value;

use crate::support::certificates::{Authority, Issued};
use crate::support::destination::Destination;
use crate::support::http::{self, Kind, Message};
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
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

/// In words, wherever it is told: which of the two is meant, only the operator knows.
#[test]
fn a_destination_that_speaks_the_other_protocol_is_told_in_words() {
    let authority = Authority::new("ours");
    let secure = Secure::start(&authority.issue("server", "DNS:localhost", 2), None);
    let no_tls = "it does not speak TLS: is it http://?";
    let closed = "connection closed before any word of TLS came: is it http://?";
    let saying = |words| format!("https://localhost:{}", port_of_one_who_says(words));
    for (url, said) in [
        (saying(NO_REQUEST), no_tls),
        (saying("SSH-2.0-server\r\n"), no_tls),
        // Too little to be anything.
        (saying("H"), no_tls),
        (saying(""), closed),
        (
            format!("http://localhost:{}", secure.port),
            "it speaks TLS: is it https://?",
        ),
    ] {
        let setup = trusting(&url, &authority).set("proxy.breaker_failures", 1);
        let proxy = setup.start();
        send(&proxy);
        let line = proxy.wait_for_log("delivery failed");
        assert!(line.contains(said), "{line}");
        let mut number = 0;
        wait_until("a breaker that is open", || {
            number += 1;
            proxy.accept(number..number + 1);
            proxy.metrics().get("asyncproxy_breaker_open") == 1.0
        });
        for target in ["/readyz", "/status"] {
            let text = http::get(proxy.control, target).text();
            assert!(text.contains(said), "{text}");
        }
        proxy.stop();
    }
}

/// What an HTTP server answers to what it cannot read.
const NO_REQUEST: &str = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";

/// The port of a server that hears something, says this, and closes.
fn port_of_one_who_says(words: &'static str) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            // All that comes: what is unread when it closes would take back what it says.
            let _ = socket.read(&mut [0; 16 * 1024]);
            let _ = socket.write_all(words.as_bytes());
        }
    });
    port
}

/// A machine without root certificates: what was to be encrypted is not sent in the clear.
#[test]
fn without_any_authority_nothing_is_sent() {
    let plain = Destination::start();
    let url = format!("https://localhost:{}", plain.address.port());
    let setup = Setup::new(&url).env("SSL_CERT_FILE", "/dev/null");
    assert_fails(&setup, "no https destination is trusted");
    assert_eq!(plain.seen().len(), 0);
}

/// What doctor says of the destination, but that it can be reached.
fn examined(setup: &Setup) -> (String, String, String) {
    let output = setup.command().args(["doctor", "--json"]).output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let finding = findings
        .iter()
        .filter(|finding| finding["about"] == "proxy.remote_url")
        .find(|finding| {
            !finding["found"]
                .as_str()
                .unwrap()
                .contains("accepts connections")
        })
        .unwrap_or_else(|| panic!("{findings:?}"));
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    (text("level"), text("found"), text("mend"))
}

#[test]
fn doctor_shakes_hands_with_the_certificates_of_the_settings() {
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let server = ours.issue("server", "DNS:localhost", 2);
    let good = Secure::start(&server, None);
    let asking = Secure::start(&server, Some(&ours.certificate()));
    let expired = Secure::start(&ours.issue("expired", "DNS:localhost", -1), None);
    let in_the_clear = format!("https://localhost:{}", port_of_one_who_says(NO_REQUEST));
    let (own, foreign) = (
        ours.issue("client", "DNS:client", 2),
        others.issue("foreign", "DNS:client", 2),
    );
    let with = |setup: Setup, shown: &Issued| {
        setup
            .set("proxy.client_cert_file", shown.certificate.display())
            .set("proxy.client_key_file", shown.key.display())
    };
    let to = |server: &Secure| trusting(&server.url("localhost"), &ours);
    for (setup, level, found, mend) in [
        (to(&good), "ok", "its certificate is trusted", ""),
        (
            with(to(&asking), &own),
            "ok",
            "its certificate is trusted",
            "",
        ),
        (
            to(&asking),
            "error",
            "is shown none",
            "proxy.client_cert_file",
        ),
        (
            with(to(&asking), &foreign),
            "error",
            "does not accept",
            "proxy.client_cert_file",
        ),
        (
            trusting(&in_the_clear, &ours),
            "error",
            "does not speak TLS: is it http://?",
            "http://",
        ),
        (
            trusting(&good.url("localhost"), &others),
            "error",
            "UnknownIssuer",
            "proxy.ca_file",
        ),
        (
            trusting(&good.url("127.0.0.1"), &ours),
            "error",
            "for other names",
            "proxy.remote_url",
        ),
        (to(&expired), "error", "has expired", "renew"),
    ] {
        let said = examined(&setup);
        assert_eq!(said.0, level, "{said:?}");
        assert!(said.1.contains(found), "{said:?}");
        assert!(said.2.contains(mend), "{said:?}");
    }
    assert!(good.requests.try_recv().is_err(), "nothing was sent");
}

/// Accepts, and says nothing: the handshake has its time, and no more.
#[test]
fn doctor_does_not_wait_for_a_destination_that_says_nothing() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!(
        "https://localhost:{}",
        listener.local_addr().unwrap().port()
    );
    let said = examined(&trusting(&url, &Authority::new("ours")));
    assert_eq!(said.0, "error", "{said:?}");
    assert!(said.1.contains("timeout"), "{said:?}");
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
