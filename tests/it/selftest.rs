//! The tools of the tests, tested: an error in them would look like one of the program.

use std::time::Duration;

use crate::support::destination::{Answer, Destination};
use crate::support::http::{self, Connection};
use crate::support::metrics::Metrics;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn destination_records_every_byte_in_order() {
    let destination = Destination::start();
    let mut connection = Connection::open(destination.address);
    connection
        .exchange(b"PUT /%41?x HTTP/1.1\r\nX-b: \xff\r\nx-A:1\r\nContent-Length: 2\r\n\r\n\0\n");
    connection.exchange(
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
    );
    let seen = destination.wait_for(2, SOON);
    assert_eq!(
        (seen[0].method.as_str(), &*seen[0].target),
        ("PUT", &b"/%41?x"[..])
    );
    assert_eq!(
        seen[0].lines[..2],
        [b"X-b: \xff".to_vec(), b"x-A:1".to_vec()]
    );
    assert_eq!(
        (&*seen[0].body, &*seen[1].body),
        (&b"\0\n"[..], &b"abc"[..])
    );
    assert_eq!((seen[0].connection, seen[1].connection), (0, 0));
}

#[test]
fn destination_answers_as_told() {
    let destination = Destination::answering(|seen| match &*seen.target {
        b"/busy" => Answer::status(503).line("Retry-After: 7"),
        b"/close" => Answer::ok().closing(),
        b"/reset" => Answer::reset(),
        _ => Answer::ok(),
    });
    let busy = http::get(destination.address, "/busy");
    assert_eq!((busy.status, busy.field("retry-after")), (503, Some("7")));
    for (target, first_answered) in [("/close", true), ("/reset", false)] {
        let mut connection = Connection::open(destination.address);
        connection.send(&http::request("POST", target, &[], b""));
        assert_eq!(connection.response().is_ok(), first_answered, "{target}");
        connection.send(&http::request("POST", "/", &[], b""));
        assert!(connection.response().is_err(), "{target}");
    }
}

#[test]
fn destination_refuses_and_opens_on_the_same_port() {
    let mut destination = Destination::answering(|_| Answer::hang());
    let mut hung = Connection::open(destination.address);
    hung.send(&http::numbered(0));
    destination.wait_for(1, SOON);
    destination.refuse();
    assert!(hung.response().is_err());
    assert!(std::net::TcpStream::connect(destination.address).is_err());
    destination.answer(|_| Answer::ok());
    destination.open();
    assert_eq!(
        http::exchange(destination.address, &http::numbered(1)).status,
        200
    );
    destination.wait_for_numbers(2, SOON);
}

#[test]
fn load_sends_every_number_once() {
    let destination = Destination::start();
    let statuses = http::load(destination.address, 4, 25, http::numbered);
    assert_eq!(statuses, vec![200; 100]);
    let mut numbers: Vec<_> = destination
        .seen()
        .iter()
        .map(|seen| seen.number())
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..100).collect::<Vec<_>>());
}

#[test]
fn metrics_are_read_with_their_labels() {
    let metrics = Metrics::parse("# HELP a b\na{x=\"1 2\"} 3\na{x=\"y\"} 4.5\nab 1\n");
    assert_eq!(
        (
            metrics.get("a{x=\"1 2\"}"),
            metrics.sum("a"),
            metrics.get("b")
        ),
        (3.0, 7.5, 0.0)
    );
}
