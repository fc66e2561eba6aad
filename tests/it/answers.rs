//! Answers that are early, sloppy or long, and requests that cannot be sent: what the program makes
//! of them as a whole. How an answer is read is tested beside the code.

#[path = "../fuzz/answers.rs"]
mod check;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;

use proptest::prelude::*;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup};
use crate::support::route::{Route, on_routes};
use crate::support::store;

/// More than the sockets of both sides hold.
const LARGE: usize = 9 * 1024 * 1024;

fn opened(proxy: &Proxy) -> f64 {
    proxy.metrics().get("asyncproxy_breaker_opened_total")
}

/// Refuses large bodies as soon as it has read their head, and closes; takes all others.
fn picky(mut stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    loop {
        let mut length = 0;
        let mut line = String::from("head");
        while !line.trim().is_empty() {
            line.clear();
            if reader.read_line(&mut line).unwrap_or_default() == 0 {
                return;
            }
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().expect("a length");
            }
        }
        if length >= LARGE {
            let answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.write_all(answer);
            return;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(answer).expect("an answer");
    }
}

/// The destination works: it has only said what it does not want.
#[test]
fn a_refusal_during_the_upload_is_an_answer_and_opens_no_breaker() {
    const REFUSED: usize = 12;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let address = listener.local_addr().expect("address");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("accept");
            thread::spawn(move || picky(stream));
        }
    });
    let setup = Setup::new(&format!("http://{address}"))
        .set("proxy.breaker_failures", 3)
        .set("proxy.num_clients", 64)
        .set("queue.give_up_statuses", "[413]");
    let proxy = setup.start();
    for _ in 0..REFUSED {
        let request = http::request("POST", "/upload", &[], &vec![b'x'; LARGE]);
        assert_eq!(proxy.send(&request).status, 200);
    }
    proxy.accept(0..20);
    metrics::wait_for(&proxy, "all of them settled", |metrics| {
        metrics.rows("dead") == REFUSED as f64 && metrics.get("asyncproxy_delivered_total") == 20.0
    });
    assert_eq!(opened(&proxy), 0.0);
    proxy.stop();
    let dead = store::dead(&setup);
    assert_eq!(dead.len(), REFUSED);
    assert!(
        dead.iter()
            .all(|dead| (dead.attempt, dead.status) == (1, Some(413)))
    );
}

fn a_sloppy_header_line_costs_no_second_attempt(route: Route) {
    let destination = Destination::answering(|seen| match seen.number() % 4 {
        0 => Answer::ok().line("X-Powered-By : sloppy"),
        1 => Answer::ok().line("X-Long: one\r\n two"),
        2 => Answer::ok().line("no colon at all"),
        _ => Answer::ok().line("X-Control: \u{1}\u{7f}"),
    });
    let setup = route.to(&destination).set("proxy.breaker_failures", 1);
    let proxy = setup.start();
    proxy.accept(0..40);
    destination.wait_for_numbers(40, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, 40);
    assert_eq!(metrics.attempts("delivered"), 40.0);
    assert_eq!(metrics.attempts("later"), 0.0);
    assert_eq!(opened(&proxy), 0.0);
    assert_eq!(destination.seen().len(), 40);
}
on_routes!(a_sloppy_header_line_costs_no_second_attempt: direct Direct, sqlite Sqlite);

/// More than 64 bits hold, and a date whose weekday is wrong: both far in the future.
#[test]
fn a_pause_that_is_asked_for_in_an_odd_way_is_kept() {
    for (status, line) in [
        (503, "Retry-After: 99999999999999999999999"),
        (429, "Retry-After: Mon, 31 Dec 2199 23:59:59 GMT"),
    ] {
        let destination = Destination::answering(move |_| Answer::status(status).line(line));
        let proxy = Setup::new(&destination.url()).start();
        proxy.accept(0..1);
        let logged = proxy.wait_for_log(&format!("destination answered {status}"));
        // A day is the most that is honoured.
        assert!(logged.contains("retry_in_ms=86400000"), "{logged}");
        assert_eq!(destination.seen().len(), 1);
    }
}

/// Taken by a program that refused less, or written by hand.
fn rows_that_cannot_be_sent_are_given_up_at_once_and_say_nothing_about_the_destination(
    route: Route,
) {
    const GOOD: usize = 100;
    const BAD: usize = 12;
    let mut destination = Destination::down();
    let setup = route.to(&destination);
    let proxy = setup.start();
    proxy.accept(0..GOOD + BAD);
    proxy.stop();
    // The oldest, so that they are all tried first.
    store::execute(
        &setup,
        &format!(
            "UPDATE proxy_requests SET method = '{}' WHERE id IN \
             (SELECT id FROM proxy_requests ORDER BY received_at, id LIMIT {BAD})",
            "A".repeat(16_372)
        ),
    );
    destination.open();
    let setup = setup.set("proxy.breaker_failures", 3);
    let proxy = setup.start();
    metrics::wait_for(&proxy, "all of them settled", |metrics| {
        metrics.rows("dead") == BAD as f64
            && metrics.get("asyncproxy_delivered_total") == GOOD as f64
    });
    assert_eq!(opened(&proxy), 0.0);
    proxy.stop();
    assert_eq!(destination.seen().len(), GOOD);
    let dead = store::dead(&setup);
    assert_eq!(dead.len(), BAD);
    assert!(
        dead.iter().all(|dead| dead.error.contains("method")),
        "{}",
        dead[0].error
    );
}
on_routes!(rows_that_cannot_be_sent_are_given_up_at_once_and_say_nothing_about_the_destination: sqlite Sqlite, postgres Postgres);

proptest! {
    #[test]
    fn no_bytes_make_reading_an_answer_panic(
        head in "HTTP/1[.][01] [1-5][0-9]{2} OK\r\n([A-Za-z-]{1,20} ?: ?[!-~]{0,9}\r?\n){0,9}",
        rest in prop::collection::vec(any::<u8>(), 0..500),
    ) {
        check::check(&rest);
        check::check(&[head.as_bytes(), &rest].concat());
    }
}
