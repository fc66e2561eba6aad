//! What is logged, how often, and what must never be.

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup};

/// Sends `n` requests that carry secrets wherever a request can.
fn send_secrets(proxy: &Proxy, n: usize) {
    let mut connection = http::Connection::open(proxy.intake);
    for _ in 0..n {
        let request = http::request(
            "POST",
            "/hook?token=hunter2",
            &["Authorization: Bearer hunter2", "Cookie: session=hunter2"],
            b"password=hunter2",
        );
        assert_eq!(connection.exchange(&request).status, 200);
    }
}

/// Takes a line apart; `None` if it is not logfmt.
fn logfmt(line: &str) -> Option<Vec<(String, String)>> {
    let (mut pairs, mut rest) = (Vec::new(), line);
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=')?;
        let is_key = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if key.is_empty() || !key.bytes().all(is_key) {
            return None;
        }
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => {
                let mut escaped = false;
                let end = quoted.find(|character| {
                    let is_end = character == '"' && !escaped;
                    escaped = character == '\\' && !escaped;
                    is_end
                })?;
                (&quoted[..end], &quoted[end + 1..])
            }
            None => after.split_at(after.find(' ').unwrap_or(after.len())),
        };
        pairs.push((key.to_owned(), value.to_owned()));
        rest = after.strip_prefix(' ').unwrap_or(after);
    }
    Some(pairs)
}

fn assert_logfmt(log: &str) {
    for line in log.lines() {
        let pairs = logfmt(line).unwrap_or_else(|| panic!("not logfmt: {line}"));
        for key in ["level", "msg"] {
            let found = pairs.iter().filter(|(name, _)| name == key).count();
            assert_eq!(found, 1, "{key} in {line}");
        }
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

#[test]
fn every_line_is_logfmt_and_none_has_a_secret() {
    let destination = Destination::answering(|seen| match seen.attempt() {
        1 => Answer::status(500),
        _ => Answer::ok(),
    });
    for level in ["debug", "info"] {
        let setup = Setup::new(&destination.url()).set("log.level", level);
        let mut proxy = setup.start();
        send_secrets(&proxy, 5);
        let hostile = http::request("POST", "/a\x1b[2J", &["X-A: hunter2\x1b[2J"], b"");
        assert_eq!(proxy.send(&hostile).status, 400);
        metrics::assert_settled(&proxy, 5);
        proxy.sigterm();
        assert_eq!(proxy.wait().code(), Some(0));
        assert_logfmt(&proxy.log());
        assert!(!proxy.log().contains("hunter2"), "{}", proxy.log());
    }
}

#[test]
fn a_request_that_goes_well_is_not_worth_a_line() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let mut proxy = setup.start();
    proxy.accept(0..50);
    metrics::assert_settled(&proxy, 50);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    let lines = proxy.log().lines().count();
    assert!(lines < 20, "{lines} lines: {}", proxy.log());
}

#[test]
fn a_destination_that_is_down_does_not_fill_the_log() {
    let mut destination = Destination::down();
    let setup = Setup::new(&destination.url());
    let mut proxy = setup.start();
    proxy.accept(0..200);
    metrics::wait_for(&proxy, "500 failed attempts", |metrics| {
        metrics.attempts("later") >= 500.0
    });
    let failed = proxy.wait_for_log("delivery failed");
    assert!(failed.contains("error="), "{failed}");
    destination.open();
    destination.wait_for_numbers(200, PATIENCE);
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    let lines = proxy.log().lines().count();
    assert!(lines < 100, "{lines} lines");
}

#[test]
fn colours_can_be_switched_off() {
    let setup = Setup::new("http://127.0.0.1:1").env("LOG_COLOR", false);
    let mut proxy = setup.start();
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(!proxy.log().contains('\x1b'));
    assert_logfmt(&proxy.log());
}
