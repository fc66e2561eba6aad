//! The builtin acceptor over the wire: limits at their edges, times, expectations, versions.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::destination::Destination;
use crate::support::http::{self, Connection};
use crate::support::proxy::{PATIENCE, Setup, wait_until};

/// Set where a test waits for it to pass. Short, and still long for a request sent at once.
const TIME: Duration = Duration::from_millis(700);
const TIME_TEXT: &str = "700ms";
const BODY_BYTES_MAX: usize = 64 * 1024;
const GOOD: &[u8] = b"POST /good HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n";

fn setup(destination: &Destination) -> Setup {
    Setup::new(&destination.url()).set("server.max_body_size", BODY_BYTES_MAX)
}

/// The next answer is this refusal, announces the end, and is followed by it.
fn assert_refused(connection: &mut Connection, status: u16, what: &str) {
    let answer = connection.response();
    let answer = answer.unwrap_or_else(|error| panic!("{what}: {error} instead of {status}"));
    assert_eq!(answer.status, status, "{what}");
    assert_eq!(answer.field("connection"), Some("close"), "{what}");
    let rest = connection.rest();
    assert_eq!(rest.expect("the end"), b"", "after the answer to {what}");
}

/// Sends `bytes` over and over, one at a time, until it cannot any more.
fn trickle(mut stream: TcpStream, bytes: &'static [u8]) {
    thread::spawn(move || {
        for byte in bytes.iter().cycle() {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn limits_hold_at_their_edge() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    let line = |bytes: usize| {
        let target = "a".repeat(bytes - "GET / HTTP/1.1".len());
        format!("GET /{target} HTTP/1.1\r\nHost: h\r\n\r\n").into_bytes()
    };
    let fields_bytes = |bytes: usize| {
        let value = "a".repeat(bytes - "Host: h\r\nX: \r\n".len());
        format!("GET / HTTP/1.1\r\nHost: h\r\nX: {value}\r\n\r\n").into_bytes()
    };
    let fields = |count: usize| {
        let lines = "X: a\r\n".repeat(count - 1);
        format!("GET / HTTP/1.1\r\nHost: h\r\n{lines}\r\n").into_bytes()
    };
    let body = |bytes: usize| http::request("POST", "/", &[], &vec![b'b'; bytes]);
    type Make<'a> = &'a dyn Fn(usize) -> Vec<u8>;
    let limits: [(&str, usize, u16, Make<'_>); 4] = [
        ("request line", 16 * 1024, 414, &line),
        ("bytes of fields", 64 * 1024, 431, &fields_bytes),
        ("fields", 100, 431, &fields),
        ("body", BODY_BYTES_MAX, 413, &body),
    ];
    for (what, limit, status, make) in limits {
        // One under and at the limit: answered, and the connection goes on.
        let mut connection = Connection::open(proxy.intake);
        for size in [limit - 1, limit] {
            assert_eq!(
                connection.exchange(&make(size)).status,
                200,
                "{what} {size}"
            );
        }
        // One over: refused, and what follows is not taken for a request.
        connection.send(&[make(limit + 1), GOOD.to_vec()].concat());
        assert_refused(&mut connection, status, what);
    }
    // What was accepted at the edge can also be sent on.
    let seen = destination.wait_for(8, PATIENCE);
    assert!(seen.iter().all(|seen| seen.target != b"/good"));
    let longest = seen.iter().map(|seen| seen.target.len()).max();
    assert_eq!(longest, Some(16 * 1024 - "GET  HTTP/1.1".len()));
    assert_eq!(proxy.metrics().refused("too_large"), 4.0);
    assert_eq!(proxy.metrics().accepted(), 8.0);
}

#[test]
fn a_body_too_large_is_refused_before_it_is_sent() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    for length in ["65537", "18446744073709551615", "99999999999999999999999"] {
        let mut connection = Connection::open(proxy.intake);
        connection.send(
            format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n").as_bytes(),
        );
        assert_refused(&mut connection, 413, length);
    }
}

#[test]
fn a_sender_of_a_body_too_large_still_gets_its_answer() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    let body = vec![b'b'; 4 * 1024 * 1024];
    let chunked = [
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n400000\r\n".as_slice(),
        &body,
        b"\r\n0\r\n\r\n",
    ];
    for request in [http::request("POST", "/", &[], &body), chunked.concat()] {
        let mut connection = Connection::open(proxy.intake);
        // All of it before the answer is looked at, as simple senders do.
        connection.send(&request);
        assert_refused(&mut connection, 413, "a large body");
    }
}

#[test]
fn a_request_that_trickles_in_is_over_at_its_deadline() {
    let destination = Destination::start();
    let setup = setup(&destination).set("server.read_timeout", TIME_TEXT);
    let proxy = setup.start();
    let fields = "POST /slow HTTP/1.1\r\nHost: h\r\n";
    for (what, head) in [
        ("request line", "POST /".to_owned()),
        ("head", format!("{fields}X: ")),
        ("body", format!("{fields}Content-Length: 60000\r\n\r\n")),
        (
            "chunk",
            format!("{fields}Transfer-Encoding: chunked\r\n\r\nf000\r\n"),
        ),
        (
            "trailer",
            format!("{fields}Transfer-Encoding: chunked\r\n\r\n0\r\nX: "),
        ),
    ] {
        let mut connection = Connection::open(proxy.intake);
        let begun = Instant::now();
        connection.send(head.as_bytes());
        trickle(connection.sender(), b"a");
        assert_refused(&mut connection, 408, what);
        assert!(begun.elapsed() >= TIME, "{what}: {:?}", begun.elapsed());
    }
    // Nor does it help to have been good before.
    let mut connection = Connection::open(proxy.intake);
    assert_eq!(connection.exchange(GOOD).status, 200);
    connection.send(&GOOD[..GOOD.len() - 1]);
    assert_refused(&mut connection, 408, "the second request");
    assert_eq!(proxy.metrics().refused("timeout"), 6.0);
    assert_eq!(proxy.metrics().accepted(), 1.0);
}

#[test]
fn an_idle_connection_is_closed_without_an_answer() {
    let destination = Destination::start();
    let setup = setup(&destination).set("server.idle_timeout", TIME_TEXT);
    let proxy = setup.start();
    let mut unused = Connection::open(proxy.intake);
    let mut used = Connection::open(proxy.intake);
    assert_eq!(used.exchange(GOOD).status, 200);
    let mut hurried = Connection::open(proxy.intake);
    // Read in two parts: its deadline must not stay behind as the idle time, or the reverse.
    hurried.send(&GOOD[..20]);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(hurried.exchange(&GOOD[20..]).status, 200);
    for connection in [&mut unused, &mut used, &mut hurried] {
        assert_eq!(connection.rest().expect("the end"), b"");
    }
    assert_eq!(proxy.metrics().refused("timeout"), 0.0);
}

#[test]
fn a_sender_that_does_not_read_its_answers_is_dropped() {
    let destination = Destination::start();
    let setup = setup(&destination)
        .set("server.read_timeout", TIME_TEXT)
        .set("server.max_connections", 2);
    let proxy = setup.start();
    // As many as there may be, so that others depend on their end.
    let deaf: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = http::narrow(proxy.intake);
            thread::spawn(move || {
                let requests = GOOD.repeat(100);
                // Far more answers than any buffers hold.
                (0..10_000).find_map(|_| stream.write_all(&requests).err())
            })
        })
        .collect();
    wait_until("both to send", || proxy.metrics().accepted() > 200.0);
    assert_eq!(proxy.send(GOOD).status, 200);
    for sender in deaf {
        let error = sender.join().expect("sender");
        let kind = error
            .expect("all was taken, though nothing was read")
            .kind();
        assert_ne!(kind, std::io::ErrorKind::WouldBlock, "still open");
    }
    assert_eq!(proxy.send(GOOD).status, 200);
}

#[test]
fn expectations_are_met_or_refused() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    let head = |fields: &str| format!("POST /e HTTP/1.1\r\nHost: h\r\n{fields}\r\n").into_bytes();
    let mut connection = Connection::open(proxy.intake);
    for (framing, body) in [
        ("Content-Length: 4\r\n", &b"body"[..]),
        ("Transfer-Encoding: chunked\r\n", b"4\r\nbody\r\n0\r\n\r\n"),
    ] {
        connection.send(&head(&format!("{framing}Expect: 100-Continue\r\n")));
        assert_eq!(connection.interim().expect("an interim answer"), 100);
        assert_eq!(connection.exchange(body).status, 200, "{framing}");
    }
    // Nobody waits for it: the first answer there is, is the last.
    let with_body = [
        head("Content-Length: 4\r\nExpect: 100-continue\r\n"),
        b"body".to_vec(),
    ];
    for request in [
        with_body.concat(),
        head("Content-Length: 0\r\nExpect: 100-continue\r\n"),
    ] {
        connection.send(&request);
        assert_eq!(connection.interim().expect("an answer"), 200);
    }
    let mut http_10 = Connection::open(proxy.intake);
    http_10.send(b"POST /e HTTP/1.0\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody");
    assert_eq!(http_10.interim().expect("an answer"), 200);
    for (fields, status) in [
        ("Content-Length: 65537\r\nExpect: 100-continue\r\n", 413),
        ("Content-Length: 4\r\nExpect: 200-ok\r\n", 417),
        ("Content-Length: 4\r\nExpect: 100-continue, x\r\n", 417),
    ] {
        let mut connection = Connection::open(proxy.intake);
        connection.send(&head(fields));
        // Not through `response`, which would skip an interim answer.
        assert_eq!(connection.interim().expect("an answer"), status, "{fields}");
    }
    let seen = destination.wait_for(5, PATIENCE);
    assert!(seen.iter().all(|seen| seen.field("expect").is_none()));
}

#[test]
fn versions_decide_how_a_connection_goes_on() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    for version in ["HTTP/2.0", "HTTP/1.2", "HTTP/3.0"] {
        let mut connection = Connection::open(proxy.intake);
        connection.send(format!("POST / {version}\r\nHost: h\r\n\r\n").as_bytes());
        assert_refused(&mut connection, 505, version);
    }
    let plain = b"POST / HTTP/1.0\r\nContent-Length: 4\r\n\r\nbody";
    let kept = b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nbody";
    let mut connection = Connection::open(proxy.intake);
    assert_eq!(connection.exchange(kept).status, 200);
    assert_eq!(connection.exchange(kept).status, 200);
    let answer = connection.exchange(plain);
    assert_eq!(
        (answer.status, answer.field("connection")),
        (200, Some("close"))
    );
    assert_eq!(connection.rest().expect("the end"), b"");
}

/// Senders of HTTP/1.0 that ask for it take an answer without for the last (RFC 9112 §C.2.2).
#[test]
fn an_http_10_sender_is_told_that_its_connection_is_kept() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    let mut connection = Connection::open(proxy.intake);
    let answer = connection.exchange(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    let connection = answer.field("connection").map(str::to_ascii_lowercase);
    assert_eq!(connection.as_deref(), Some("keep-alive"));
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    let mut connection = Connection::open(proxy.intake);
    let good: Vec<_> = (0..50).flat_map(http::numbered).collect();
    // Understood, but never to be sent on: what follows it is found all the same.
    let vain = http::request("POST", "/a#b", &["X-Id: 50"], b"body 50");
    let bad = http::request("POST", "/", &["X-Id : 52"], b"");
    connection.send(&[&good, &*vain, &http::numbered(51), &bad, GOOD].concat());
    for number in 0..50 {
        let answer = connection.response().expect("an answer");
        assert_eq!(answer.status, 200, "request {number}");
    }
    assert_eq!(connection.response().expect("an answer").status, 400);
    assert_eq!(connection.response().expect("an answer").status, 200);
    assert_refused(&mut connection, 400, "the last");
    let seen = destination.wait_for(51, PATIENCE);
    assert_eq!(seen.len(), 51);
    for seen in seen {
        let number = seen.number();
        assert_eq!(seen.body, format!("body {number}").as_bytes());
    }
}

#[test]
fn bytes_beyond_ascii_reach_the_destination() {
    let destination = Destination::start();
    let setup = setup(&destination);
    let proxy = setup.start();
    let line = [b"X-Bytes: ".as_slice(), &Vec::from_iter(0x80..=0xff)].concat();
    let head = b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n".as_slice();
    let answer = proxy.send(&[head, &line, b"\r\n\r\n"].concat());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let seen = destination.wait_for(1, PATIENCE);
    assert!(seen[0].lines.contains(&line), "{:?}", seen[0].lines);
}
