//! A client against destinations that do with their sockets what they like.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use socket2::SockRef;

use super::*;
use crate::request::{Headers, Peer};

/// How long anything that must happen may take, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
/// More than the sockets of both sides hold.
const LARGE: usize = 32 * 1024 * 1024;

/// A destination that serves one connection after the other.
struct Raw {
    address: SocketAddr,
    /// What was served: the number of the connection, and whatever was to be told.
    told: Receiver<(usize, u64)>,
}

impl Raw {
    /// `serve` gets each connection and its number; what it returns is told when it is done.
    fn start(serve: impl Fn(TcpStream, usize, &Sender<(usize, u64)>) + Send + 'static) -> Raw {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, told) = channel();
        crate::thread::spawn_brief("raw", move || {
            for (number, stream) in listener.incoming().enumerate() {
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                serve(stream, number, &tell);
            }
        })
        .unwrap();
        Raw { address, told }
    }

    fn client(&self) -> Client {
        client(&format!("http://{}", self.address), PATIENCE)
    }

    fn told(&self) -> (usize, u64) {
        self.told.recv_timeout(PATIENCE).unwrap()
    }
}

fn client(url: &str, timeout: Duration) -> Client {
    Upstream::new(RemoteUrl::parse(url).unwrap(), timeout, None).client()
}

fn request(method: &str, body: usize) -> Request {
    Request::record(
        method,
        "/hook",
        std::iter::empty(),
        Peer::default(),
        vec![b'x'; body],
        SystemTime::UNIX_EPOCH,
    )
    .unwrap()
}

fn answered(status: u16) -> Outcome {
    Outcome::Answered {
        status,
        retry_after: None,
    }
}

/// Reads a head and nothing more.
fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    Some(String::from_utf8(head).unwrap())
}

fn write(stream: &mut TcpStream, text: &str) {
    // Whoever is told nothing more may have gone.
    let _ = stream.write_all(text.as_bytes());
}

/// Answers each of a connection's requests, without a body, with `text`.
fn answer_all(mut stream: TcpStream, number: usize, tell: &Sender<(usize, u64)>, text: &str) {
    while read_head(&mut stream).is_some() {
        write(&mut stream, text);
        let _ = tell.send((number, 0));
    }
}

/// Waits until the other side has closed, without taking anything from it.
fn hold(stream: &TcpStream) {
    let deadline = Instant::now() + PATIENCE;
    let is_open = || match (stream.take_error(), stream.peek(&mut [0])) {
        (Ok(None), Ok(bytes)) => bytes > 0,
        _ => false,
    };
    while is_open() && Instant::now() < deadline {
        // Nothing tells of a reset as long as there is something to be read.
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_refusal_is_believed_though_the_body_is_still_being_sent() {
    for status in [401, 413, 500, 302] {
        for how in ["close", "reset", "half", "hold"] {
            let raw = Raw::start(move |mut stream, number, tell| {
                read_head(&mut stream).unwrap();
                let text = format!("HTTP/1.1 {status} No\r\nContent-Length: 2\r\n\r\nno");
                write(&mut stream, &text);
                match how {
                    "reset" => {
                        let now = Some(Duration::ZERO);
                        SockRef::from(&stream).set_linger(now).unwrap();
                    }
                    "half" => {
                        // It may have closed already, content with the answer.
                        let _ = stream.shutdown(Shutdown::Write);
                        hold(&stream);
                    }
                    "hold" => hold(&stream),
                    _ => {}
                }
                drop(stream);
                tell.send((number, 0)).unwrap();
            });
            let mut client = raw.client();
            let started = Instant::now();
            for number in 0..2 {
                let outcome = client.send(&request("POST", LARGE), 1);
                assert_eq!(outcome, answered(status), "{how}");
                // A connection of its own each, and the other side sees it closed.
                assert_eq!(raw.told().0, number, "{how}");
            }
            assert!(started.elapsed() < PATIENCE / 2, "{how}");
        }
    }
}

#[test]
fn an_early_success_is_believed_though_the_body_is_never_read() {
    let raw = Raw::start(|mut stream, number, tell| {
        read_head(&mut stream).unwrap();
        write(&mut stream, OK);
        hold(&stream);
        tell.send((number, 0)).unwrap();
    });
    let started = Instant::now();
    let outcome = raw.client().send(&request("POST", LARGE), 1);
    assert_eq!(outcome, answered(200));
    assert!(started.elapsed() < PATIENCE / 2);
    raw.told();
}

#[test]
fn a_destination_that_answers_early_and_goes_on_reading_gets_the_whole_body() {
    for ends_first in [false, true] {
        let raw = Raw::start(move |mut stream, number, tell| {
            read_head(&mut stream).unwrap();
            write(
                &mut stream,
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            );
            if ends_first {
                write(&mut stream, "0\r\n\r\n");
                stream.shutdown(Shutdown::Write).unwrap();
            }
            // Its answer grows with what it reads: neither may wait for the other.
            let mut read = 0;
            let mut buffer = vec![0; 256 * 1024];
            while read < LARGE {
                let bytes = stream.read(&mut buffer).unwrap();
                assert!(bytes > 0, "cut off after {read} bytes");
                read += bytes;
                if !ends_first {
                    write(&mut stream, &format!("400\r\n{}\r\n", "y".repeat(0x400)));
                }
            }
            write(&mut stream, "0\r\n\r\n");
            tell.send((number, read as u64)).unwrap();
        });
        let outcome = raw.client().send(&request("POST", LARGE), 1);
        assert_eq!(outcome, answered(200));
        assert_eq!(raw.told(), (0, LARGE as u64), "{ends_first}");
    }
}

#[test]
fn a_sloppy_line_costs_neither_the_answer_nor_the_connection() {
    for line in ["X-A : 1", "X-A: 1\r\n folded", "no colon", "X-A: \x01\x02"] {
        let text = OK.replace("Content", &format!("{line}\r\nContent"));
        let raw = Raw::start(move |stream, number, tell| answer_all(stream, number, tell, &text));
        let mut client = raw.client();
        for _ in 0..3 {
            assert_eq!(
                client.send(&request("GET", 0), 1),
                answered(200),
                "{line:?}"
            );
            assert_eq!(raw.told(), (0, 0), "{line:?}");
        }
    }
}

#[test]
fn a_connection_is_not_used_again_when_it_is_unclear_what_comes_next() {
    let ambiguous = OK.replace(
        "Content-Length",
        "Transfer-Encoding: chunked\r\nContent-Length",
    );
    let huge = OK.replace("Content", &format!("{}Content", "X-A: 1\r\n".repeat(300)));
    let switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n".to_owned();
    for (text, status) in [
        (ambiguous, 200),
        (huge, 200),
        (OK.to_owned() + OK, 200),
        (OK.to_owned() + "\r\n", 200),
        (OK.replace("1.1", "1.0"), 200),
        (switching, 101),
    ] {
        let shown = text.clone();
        let raw = Raw::start(move |stream, number, tell| answer_all(stream, number, tell, &text));
        let mut client = raw.client();
        for number in 0..3 {
            assert_eq!(
                client.send(&request("GET", 0), 1),
                answered(status),
                "{shown}"
            );
            assert_eq!(raw.told(), (number, 0), "{shown}");
        }
    }
}

#[test]
fn what_comes_unasked_between_two_requests_is_no_answer() {
    let raw = Raw::start(|mut stream, number, tell| {
        read_head(&mut stream);
        write(&mut stream, OK);
        tell.send((number, 0)).unwrap();
        if number == 0 {
            // Poison for whoever sends the next request on this connection.
            write(
                &mut stream,
                "HTTP/1.1 418 Poison\r\nContent-Length: 0\r\n\r\n",
            );
            tell.send((number, 1)).unwrap();
        }
    });
    let mut client = raw.client();
    assert_eq!(client.send(&request("GET", 0), 1), answered(200));
    assert_eq!((raw.told(), raw.told()), ((0, 0), (0, 1)));
    assert_eq!(client.send(&request("GET", 0), 1), answered(200));
    assert_eq!(raw.told(), (1, 0));
}

#[test]
fn endless_interim_answers_end_the_attempt() {
    let raw = Raw::start(|mut stream, number, tell| {
        read_head(&mut stream);
        while stream.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").is_ok() {}
        tell.send((number, 0)).unwrap();
    });
    let outcome = raw.client().send(&request("POST", 4), 1);
    let Outcome::Unanswered(why) = outcome else {
        panic!("{outcome:?}");
    };
    assert!(why.contains("32 interim"), "{why}");
    // It is cut: nobody goes on reading.
    raw.told();
}

#[test]
fn a_kept_connection_that_was_closed_is_another_only_if_nothing_was_answered() {
    for (half, requests) in [("", 1), ("HTTP/1.1 2", 0)] {
        let raw = Raw::start(move |mut stream, number, tell| {
            read_head(&mut stream).unwrap();
            write(&mut stream, OK);
            tell.send((number, 0)).unwrap();
            if number == 0 {
                read_head(&mut stream).unwrap();
                write(&mut stream, half);
            }
        });
        let mut client = raw.client();
        assert_eq!(client.send(&request("GET", 0), 1), answered(200));
        assert_eq!(raw.told(), (0, 0));
        let outcome = client.send(&request("GET", 0), 1);
        if requests == 1 {
            assert_eq!(outcome, answered(200));
            assert_eq!(raw.told(), (1, 0));
        } else {
            assert!(matches!(outcome, Outcome::Unanswered(_)), "{outcome:?}");
            assert!(raw.told.try_recv().is_err());
        }
    }
}

#[test]
fn outcomes_tell_whether_the_destination_can_have_had_a_part_in_it() {
    let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = refusing.local_addr().unwrap();
    drop(refusing);
    for url in [
        format!("http://{address}"),
        "http://no-such-host.invalid".to_owned(),
    ] {
        let outcome = client(&url, PATIENCE).send(&request("POST", 4), 1);
        assert!(
            matches!(outcome, Outcome::Unreachable(_)),
            "{url}: {outcome:?}"
        );
    }
    let silent = Raw::start(|stream, _, _| hold(&stream));
    let url = format!("http://{}", silent.address);
    let outcome = client(&url, Duration::from_secs(2)).send(&request("POST", 4), 1);
    assert!(matches!(outcome, Outcome::Unanswered(_)), "{outcome:?}");
    let closing = Raw::start(|mut stream, _, _| drop(read_head(&mut stream)));
    let outcome = closing.client().send(&request("POST", 4), 1);
    assert!(matches!(outcome, Outcome::Unanswered(_)), "{outcome:?}");
}

#[cfg(feature = "tls")]
#[test]
fn a_handshake_that_fails_has_sent_nothing() {
    let tls = crate::tls::for_system(&Scheme::HTTPS).unwrap();
    let raw = Raw::start(|mut stream, _, _| write(&mut stream, OK));
    let url = RemoteUrl::parse(&format!("https://{}", raw.address)).unwrap();
    let outcome = Upstream::new(url, PATIENCE, tls)
        .client()
        .send(&request("POST", 4), 1);
    assert!(matches!(outcome, Outcome::Unreachable(_)), "{outcome:?}");
}

/// Such rows were taken by programs that refused less.
#[test]
fn what_cannot_be_written_is_the_requests_own_fault_and_opens_no_connection() {
    let raw = Raw::start(|stream, number, tell| answer_all(stream, number, tell, OK));
    let mut client = raw.client();
    for (method, target) in [
        ("A".repeat(16_372), "/"),
        ("CONNECT".to_owned(), "/"),
        ("GE T".to_owned(), "/"),
        (String::new(), "/"),
        ("GET".to_owned(), "*"),
        ("GET".to_owned(), "/a b"),
        ("GET".to_owned(), "/\r\nX: y"),
    ] {
        let odd = Request {
            method,
            target: target.to_owned(),
            ..request("GET", 0)
        };
        let outcome = client.send(&odd, 1);
        let Outcome::Unsendable(why) = outcome else {
            panic!("{outcome:?}");
        };
        assert!(why.starts_with("cannot be sent"), "{why}");
        assert!(why.len() < 200, "{why}");
    }
    assert_eq!(client.send(&request("GET", 0), 1), answered(200));
    assert_eq!(raw.told(), (0, 0));
    assert!(raw.told.try_recv().is_err());
}

#[test]
fn a_head_is_written_as_it_was_recorded() {
    let mut headers = Headers::default();
    for (name, value) in [("X-B", "1"), ("x-a", ""), ("X-B", "2")] {
        headers.push(name, value.as_bytes()).unwrap();
    }
    let remote = RemoteUrl::parse("http://h.example:81/base").unwrap();
    for (method, body, length) in [
        ("POST", "", "content-length: 0\r\n"),
        ("POST", "four", "content-length: 4\r\n"),
        ("GET", "", ""),
        ("DELETE", "four", "content-length: 4\r\n"),
    ] {
        let recorded = Request {
            id: Uuid::nil(),
            headers: headers.clone(),
            body: body.into(),
            ..request(method, 0)
        };
        let head = head::write((&remote, Host::Own), recorded.id, &recorded, 3).unwrap();
        let expected = format!(
            "{method} /base/hook HTTP/1.1\r\n{length}host: h.example:81\r\n\
             X-B: 1\r\nx-a: \r\nX-B: 2\r\n\
             X-Asyncproxy-Id: 00000000-0000-0000-0000-000000000000\r\n\
             X-Asyncproxy-Attempt: 3\r\n\r\n"
        );
        assert_eq!(String::from_utf8(head).unwrap(), expected);
    }
}

/// With `addresses` in place of what the system says.
fn client_of(addresses: impl Fn() -> Vec<SocketAddr> + Send + Sync + 'static) -> Client {
    let remote = RemoteUrl::parse("http://h.example").unwrap();
    let upstream = Upstream::new(remote, PATIENCE, None);
    let lookups = Box::leak(Box::default());
    Upstream {
        resolver: CachingResolver::looking_up(lookups, move || {
            Ok(resolver::addresses(addresses()))
        }),
        ..upstream
    }
    .client()
}

#[test]
fn each_address_of_a_name_is_tried() {
    let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let dead = refusing.local_addr().unwrap();
    drop(refusing);
    let raw = Raw::start(|stream, number, tell| answer_all(stream, number, tell, OK));
    let live = raw.address;
    let mut client = client_of(move || vec![dead, dead, live]);
    assert_eq!(client.send(&request("GET", 0), 1), answered(200));
    assert_eq!(raw.told(), (0, 0));
}

/// Within how long, `resolver` asserts: there is no telling how busy this machine is.
#[test]
fn a_name_that_changes_is_followed_by_kept_connections_too() {
    let [before, after] =
        [(); 2].map(|()| Raw::start(|stream, number, tell| answer_all(stream, number, tell, OK)));
    let now = Arc::new(Mutex::new(before.address));
    let current = Arc::clone(&now);
    let mut client = client_of(move || vec![*current.lock().unwrap()]);
    assert_eq!(client.send(&request("GET", 0), 1), answered(200));
    *now.lock().unwrap() = after.address;
    let changed = Instant::now();
    let seen = loop {
        assert_eq!(client.send(&request("GET", 0), 1), answered(200));
        match after.told.recv_timeout(Duration::from_millis(20)) {
            Ok(seen) => break seen,
            Err(_) => assert!(changed.elapsed() < PATIENCE),
        }
    };
    assert_eq!(seen, (0, 0));
    // All on one connection each, before and after.
    assert!(before.told.try_iter().all(|told| told == (0, 0)));
}
