//! Where the program listens: TCP, Unix sockets, sockets handed over; the control port; and how
//! listening ends.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use socket2::SockRef;

use crate::support::destination::{Answer, Destination};
use crate::support::http::{self, Connection};
use crate::support::metrics::Metrics;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};

/// Longer than any test.
const LONG: &str = "10m";

fn send_unix(path: &Path, bytes: &[u8]) -> http::Response {
    Connection::open_unix(path).exchange(bytes)
}

#[test]
fn a_unix_socket_is_listened_on_even_after_a_crash() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let path = setup.path("intake.sock");
    let setup = setup.set("server.bind", format!("unix:{}", path.display()));
    let listening = format!("msg=\"listening\" addr=unix:{}", path.display());
    for number in 0..3 {
        // The socket that the last one left behind is there, and nobody listens on it.
        assert_eq!(path.exists(), number > 0);
        let mut process = Process::spawn(&mut setup.command());
        process.wait_for_line(&listening, PATIENCE);
        assert_eq!(send_unix(&path, &http::numbered(number)).status, 200);
        destination.wait_for_numbers(number + 1, PATIENCE);
        process.signal(Signal::KILL);
        process.wait(PATIENCE);
    }
    let seen = destination.seen();
    // There is no address to tell; one that the sender tells is passed on.
    assert!(
        seen.iter()
            .all(|seen| seen.field("x-forwarded-for").is_none())
    );
    assert_eq!(seen[0].field("x-forwarded-host"), Some("hooks.example"));
}

#[test]
fn a_unix_socket_in_use_is_not_taken() {
    let setup = Setup::new("http://127.0.0.1:1");
    let path = setup.path("intake.sock");
    let setup = setup.set("server.bind", format!("unix:{}", path.display()));
    let first = Process::spawn(&mut setup.command());
    first.wait_for_line("msg=\"listening\"", PATIENCE);
    let mut second = Process::spawn(&mut setup.command());
    assert_eq!(second.wait(PATIENCE).code(), Some(1));
    assert!(
        second
            .text()
            .contains("server.bind: cannot listen on unix:")
    );
    assert_eq!(send_unix(&path, &http::numbered(0)).status, 200);
}

#[test]
fn the_control_port_can_be_a_unix_socket() {
    let setup = Setup::new("http://127.0.0.1:1");
    let path = setup.path("control.sock");
    let setup = setup.set("metrics.bind", format!("unix:{}", path.display()));
    let process = Process::spawn(&mut setup.command());
    process.wait_for_line("msg=\"listening\"", PATIENCE);
    let answer = send_unix(&path, b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!((answer.status, &*answer.text()), (200, "ok\n"));
}

#[test]
fn all_addresses_are_those_of_both_families() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url()).set("server.bind", "':0'");
    let proxy = setup.start();
    let port = proxy.intake.port();
    let v4 = http::exchange((Ipv4Addr::LOCALHOST, port).into(), &http::numbered(0));
    assert_eq!(v4.status, 200);
    // The sender's address is told as what it is, not as one mapped into IPv6.
    let seen = destination.wait_for_numbers(1, PATIENCE);
    assert_eq!(seen[0].field("x-forwarded-for"), Some("127.0.0.1"));
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        eprintln!("this machine has no ::1, so that only IPv4 was tried");
        return;
    }
    let v6 = http::exchange((Ipv6Addr::LOCALHOST, port).into(), &http::numbered(1));
    assert_eq!(v6.status, 200);
    let seen = destination.wait_for_numbers(2, PATIENCE);
    assert_eq!(seen[1].field("x-forwarded-for"), Some("::1"));
}

/// What systemd does: descriptors from 3 on, told of in the environment.
pub fn hand_over(setup: &Setup, names: &str, first: &TcpListener, second: &TcpListener) -> Proxy {
    Proxy::of(hand_over_to_one_that_fails(setup, names, first, second))
}

/// The same, of a program that does not come to listen.
fn hand_over_to_one_that_fails(
    setup: &Setup,
    names: &str,
    first: &TcpListener,
    second: &TcpListener,
) -> Process {
    let script = format!(
        "exec 3<&0 4<&1 0</dev/null 1>&2
        export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES={names}
        exec \"$0\""
    );
    let copy = |listener: &TcpListener| OwnedFd::from(listener.try_clone().expect("clone"));
    let mut shell = setup.shell(&script);
    Process::spawn_with_sockets(&mut shell, copy(first), copy(second))
}

pub fn listener() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen")
}

#[test]
fn sockets_are_taken_over_from_systemd() {
    let destination = Destination::start();
    let (first, second) = (listener(), listener());
    let address = |listener: &TcpListener| listener.local_addr().expect("address");
    let setup = Setup::new(&destination.url()).set("server.bind", "systemd");
    let proxy = hand_over(&setup, "a:b", &first, &second);
    assert_eq!(proxy.intake, address(&first));
    proxy.accept(0..1);
    proxy.stop();
    // By name, both, and the other way round.
    let (first, second) = (listener(), listener());
    let setup = Setup::new(&destination.url())
        .set("server.bind", "systemd:intake")
        .set("metrics.bind", "systemd:control");
    let proxy = hand_over(&setup, "control:intake", &first, &second);
    assert_eq!(
        (proxy.intake, proxy.control),
        (address(&second), address(&first))
    );
    proxy.accept(1..2);
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    proxy.stop();
    destination.wait_for_numbers(2, PATIENCE);
}

#[test]
fn a_socket_from_systemd_outlives_the_program() {
    let destination = Destination::answering(|_| Answer::hang());
    let (first, second) = (listener(), listener());
    let setup = Setup::new(&destination.url())
        .set("server.bind", "systemd")
        .set("server.shutdown_timeout", LONG);
    let mut proxy = hand_over(&setup, "a:b", &first, &second);
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    proxy.sigterm();
    wait_until("the end of accepting", || {
        http::get(proxy.control, "/readyz").status == 503
    });
    // The program goes on: what it has in flight hangs.
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    // Comes between two programs, and is served by the next.
    let mut early = Connection::open(proxy.intake);
    early.send(&http::numbered(1));
    destination.answer(|_| Answer::ok());
    let proxy = hand_over(&setup, "a:b", &first, &second);
    assert_eq!(early.response().expect("an answer").status, 200);
    proxy.accept(2..3);
    proxy.stop();
}

/// Who comes while the program ends is not turned away, but waits for the next.
#[test]
fn connections_wait_for_the_next_program_on_a_socket_from_systemd() {
    let destination = Destination::answering(|_| Answer::hang());
    let (first, second) = (listener(), listener());
    let setup = Setup::new(&destination.url())
        .set("server.bind", "systemd")
        .set("server.shutdown_timeout", LONG);
    let mut proxy = hand_over(&setup, "a:b", &first, &second);
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    let mut idle = Connection::open(proxy.intake);
    assert_eq!(idle.exchange(&http::numbered(1)).status, 200);
    proxy.sigterm();
    // Idle ones are closed last of all.
    assert_eq!(idle.rest().expect("the end"), b"");
    let mut waiting: Vec<_> = (2..10)
        .map(|number| {
            let mut connection = Connection::open(proxy.intake);
            connection.send(&http::numbered(number));
            connection
        })
        .collect();
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    destination.answer(|_| Answer::ok());
    let _next = hand_over(&setup, "a:b", &first, &second);
    for connection in &mut waiting {
        assert_eq!(connection.response().expect("an answer").status, 200);
    }
    destination.wait_for_numbers(10, PATIENCE);
}

#[test]
fn a_socket_from_systemd_may_be_nonblocking_or_not() {
    let destination = Destination::start();
    let (first, second) = (listener(), listener());
    first.set_nonblocking(true).expect("O_NONBLOCK");
    let setup = Setup::new(&destination.url()).set("server.bind", "systemd");
    for number in 0..2 {
        let proxy = hand_over(&setup, "a:b", &first, &second);
        proxy.accept(number..number + 1);
        proxy.stop();
        // One setting for all copies of a socket.
        first.set_nonblocking(false).expect("O_NONBLOCK");
    }
}

#[test]
fn a_socket_that_was_not_handed_over_is_an_error() {
    for (setting, bind, names, unit) in [
        ("server.bind", "systemd", "", "asyncproxy.socket"),
        (
            "server.bind",
            "systemd:intake",
            "control",
            "asyncproxy.socket",
        ),
        ("metrics.bind", "systemd:m", "", "asyncproxy-metrics.socket"),
    ] {
        let setup = Setup::new("http://127.0.0.1:1").set(setting, bind);
        let mut process = Process::spawn(setup.command().env("LISTEN_FDNAMES", names));
        assert_eq!(process.wait(PATIENCE).code(), Some(1));
        let text = process.text();
        let said = format!("{setting}: cannot listen on {bind}: systemd handed over no socket");
        assert!(text.contains(&said), "{text}");
        let helps = format!(
            "start the unit that has it (systemctl start {unit}), or write {setting}: {bind},"
        );
        assert!(text.contains(&helps), "{text}");
    }
}

/// So that one setting goes with and without units of sockets.
#[test]
fn without_a_socket_from_systemd_the_other_address_is_listened_on_and_ends_with_the_program() {
    let destination = Destination::answering(|_| Answer::hang());
    let (http, metrics) = (listener(), listener());
    let setup = Setup::new(&destination.url())
        .set("server.bind", "systemd:http,127.0.0.1:0")
        .set("metrics.bind", "systemd:metrics,127.0.0.1:0")
        .set("server.shutdown_timeout", LONG);
    let address = http.local_addr().expect("address");
    for (number, names) in ["http:metrics", "other:metrics"].into_iter().enumerate() {
        let is_handed_over = names.starts_with("http");
        let mut proxy = hand_over(&setup, names, &http, &metrics);
        assert_eq!(proxy.intake == address, is_handed_over, "{names}");
        proxy.accept(number..number + 1);
        destination.wait_for(number + 1, PATIENCE);
        proxy.sigterm();
        wait_until("the end of accepting", || {
            http::get(proxy.control, "/readyz").status == 503
        });
        // The program goes on: what it has in flight hangs.
        let refuses = TcpStream::connect(proxy.intake).is_err();
        assert_eq!(refuses, !is_handed_over, "{names}");
        proxy.sigterm();
        assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
    }
}

#[test]
fn a_socket_from_systemd_that_no_setting_takes_is_warned_of() {
    let (http, metrics) = (listener(), listener());
    let setup = Setup::new("http://127.0.0.1:1");
    let proxy = hand_over(&setup, "http:metrics", &http, &metrics);
    for (name, listener) in [("http", &http), ("metrics", &metrics)] {
        let address = listener.local_addr().expect("address");
        let said = format!("systemd handed over the socket {name} ({address}), which is not taken");
        let line = proxy.wait_for_log(&said);
        assert!(line.contains("level=warn"), "{line}");
    }
    proxy.stop();
    // One that is taken, and one where the program wants to listen itself.
    let address = http.local_addr().expect("address");
    let setup = setup
        .set("server.bind", address)
        .set("metrics.bind", "systemd:metrics,127.0.0.1:0");
    let mut process = hand_over_to_one_that_fails(&setup, "http:metrics", &http, &metrics);
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    let text = process.text();
    let helps = format!("write server.bind: systemd:http,{address} to take it");
    assert!(text.contains(&helps), "{text}");
    assert!(text.contains("the socket http ("), "{text}");
    assert!(!text.contains("the socket metrics ("), "{text}");
}

/// It cannot end its listening without ending that of the next program.
#[test]
fn tiny_http_takes_no_socket_from_systemd() {
    let destination = Destination::start();
    let (http, metrics) = (listener(), listener());
    let setup = Setup::new(&destination.url())
        .set("server.acceptor", "tiny_http")
        .set("server.bind", "systemd:http,127.0.0.1:0")
        .set("metrics.bind", "systemd:metrics,127.0.0.1:0");
    let proxy = hand_over(&setup, "http:metrics", &http, &metrics);
    assert_ne!(proxy.intake, http.local_addr().expect("address"));
    proxy.wait_for_log("systemd handed over the socket http (");
    proxy.accept(0..1);
    proxy.stop();
    destination.wait_for_numbers(1, PATIENCE);
    let setup = setup.set("server.bind", "systemd:http");
    let mut process = Process::spawn(&mut setup.command());
    assert_eq!(process.wait(PATIENCE).code(), Some(2));
    let text = process.text();
    assert!(text.contains("with server.acceptor tiny_http"), "{text}");
}

#[test]
fn listening_ends_at_once_and_idle_connections_with_it() {
    let destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url())
        .set("server.idle_timeout", LONG)
        .set("server.read_timeout", LONG)
        .set("server.shutdown_timeout", LONG);
    let mut proxy = setup.start();
    let mut unused = Connection::open(proxy.intake);
    let mut used = Connection::open(proxy.intake);
    assert_eq!(used.exchange(&http::numbered(0)).status, 200);
    destination.wait_for(1, PATIENCE);
    let mut begun = Connection::open(proxy.intake);
    begun.send(b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(begun.interim().expect("an interim answer"), 100);
    proxy.sigterm();
    // The program goes on: what it has in flight hangs.
    for idle in [&mut unused, &mut used] {
        assert_eq!(idle.rest().expect("the end"), b"");
    }
    wait_until("refused connections", || {
        TcpStream::connect(proxy.intake).is_err()
    });
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    let answer = begun.exchange(b"ab");
    assert_eq!(
        (answer.status, answer.field("connection")),
        (200, Some("close"))
    );
    assert_eq!(begun.rest().expect("the end"), b"");
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
}

#[test]
fn a_request_that_comes_in_is_answered_though_nothing_else_is_left_to_do() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url())
        .set("server.read_timeout", LONG)
        .set("server.shutdown_timeout", LONG);
    let mut proxy = setup.start();
    let mut begun = Connection::open(proxy.intake);
    begun.send(b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(begun.interim().expect("an interim answer"), 100);
    proxy.sigterm();
    wait_until("refused connections", || {
        TcpStream::connect(proxy.intake).is_err()
    });
    let answer = begun.exchange(b"ab");
    assert_eq!(
        (answer.status, answer.field("connection")),
        (200, Some("close"))
    );
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
}

#[test]
fn the_control_port_has_its_statuses() {
    let setup = Setup::new("http://127.0.0.1:1").set("metrics.path", "/numbers");
    let proxy = setup.start();
    let mut connection = Connection::open(proxy.control);
    let mut ask = |method: &str, target: &str| {
        connection.exchange(
            format!("{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
                .as_bytes(),
        )
    };
    for (target, status) in [
        ("/healthz", 200),
        ("/healthz?verbose", 200),
        ("/numbers", 200),
        ("/metrics", 404),
        ("/", 404),
    ] {
        assert_eq!(ask("GET", target).status, status, "{target}");
    }
    for (method, target) in [("POST", "/healthz"), ("PUT", "/numbers"), ("DELETE", "/")] {
        let answer = ask(method, target);
        assert_eq!(answer.status, 405, "{method} {target}");
    }
    let metrics = http::get(proxy.control, "/numbers");
    assert!(Metrics::parse(&metrics.text()).has("asyncproxy_store_up"));
    // HEAD: the length is told, the text is not sent.
    let mut head = Connection::open(proxy.control);
    head.send(b"HEAD /numbers HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    let answer = String::from_utf8(head.rest().expect("an answer")).expect("text");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    assert!(!answer.contains("Content-Length: 0\r\n"), "{answer}");
}

#[test]
fn nothing_sent_to_the_control_port_harms_the_program() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let long = format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(17 * 1024));
    for (request, status) in [
        (
            "GET /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 9223372036854775807\r\n\r\n",
            413,
        ),
        (
            "GET /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n",
            413,
        ),
        (
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\na",
            413,
        ),
        (
            "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n",
            413,
        ),
        (
            "GET /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
            400,
        ),
        ("GET /metrics HTTP/1.1\r\nHost: h\r\nExpect: x\r\n\r\n", 417),
        ("GET /metrics HTTP/9.9\r\nHost: h\r\n\r\n", 505),
        ("\0\0\0\0", 400),
        ("\r\n\r\n\r\n\r\n", 400),
        (&long, 414),
    ] {
        let mut connection = Connection::open(proxy.control);
        connection.send(request.as_bytes());
        let start: String = request.chars().take(90).collect();
        assert_eq!(
            connection.interim().expect("an answer"),
            status,
            "{start:?}"
        );
    }
    // As many as it serves at once and more, none of which ends: idle, or in the middle of it.
    let held: Vec<_> = (0..40)
        .map(|number| {
            let mut stream = TcpStream::connect(proxy.control).expect("connect");
            if number % 2 == 0 {
                stream
                    .write_all(b"GET /metrics HTTP/1.1\r\nHo")
                    .expect("begin");
            }
            stream
        })
        .collect();
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    assert_eq!(proxy.metrics().accepted(), 0.0);
    drop(held);
    // Cut off in the middle.
    for _ in 0..100 {
        let mut stream = TcpStream::connect(proxy.control).expect("connect");
        stream.write_all(b"GET /met").expect("begin");
        SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .expect("SO_LINGER");
    }
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(http::get(proxy.control, "/metrics").status, 200));
        }
    });
    proxy.accept(0..1);
    proxy.stop();
}
