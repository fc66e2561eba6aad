//! `/readyz` names all that stands in the way, whatever else does.

use serde_json::Value;

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};

/// Waits until all of these are said with this status; returns the lines.
fn wait_until_ready_says(proxy: &Proxy, status: u16, parts: &[&str]) -> Vec<String> {
    let mut said = String::new();
    wait_until(&format!("/readyz with {status} and {parts:?}"), || {
        let answer = http::get(proxy.control, "/readyz");
        said = answer.text();
        answer.status == status && parts.iter().all(|part| said.contains(part))
    });
    said.lines().map(str::to_owned).collect()
}

fn queue(setup: &Setup, verb: &str) {
    let done = setup.command().args(["queue", verb]).status().unwrap();
    assert!(done.success(), "{verb}");
}

/// The breaker opens with the second request that fails.
fn to_nobody() -> (Destination, Setup) {
    let destination = Destination::down();
    let setup = Setup::new(&destination.url()).set("proxy.breaker_failures", 2);
    (destination, setup)
}

/// Sends requests until the destination is known to be down; returns how many were taken.
fn open_breaker(proxy: &Proxy) -> usize {
    let mut taken = 0;
    wait_until("an open breaker", || {
        if proxy.send(&http::numbered(taken)).status == 200 {
            taken += 1;
        }
        proxy.metrics().get("asyncproxy_breaker_open") == 1.0
    });
    taken
}

const PAUSED: &str = "the queue is paused";
const DOWN: &str = "the destination is down: ";

#[test]
fn a_pause_is_shown_while_the_destination_is_down_and_after_it() {
    let (mut destination, setup) = to_nobody();
    let proxy = setup.start();
    proxy.wait_for_store();
    let sent = open_breaker(&proxy);
    wait_until_ready_says(&proxy, 200, &["ok, but ", DOWN]);
    queue(&setup, "pause");
    let lines = wait_until_ready_says(&proxy, 200, &[DOWN, PAUSED]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("ok, but the destination is down: "));
    assert_eq!(lines[1], "and the queue is paused");
    queue(&setup, "resume");
    wait_until_ready_says(&proxy, 200, &[DOWN]);
    destination.open();
    destination.wait_for_numbers(sent, PATIENCE);
    wait_until("nothing in the way", || {
        http::get(proxy.control, "/readyz").text() == "ok\n"
    });
    proxy.stop();
}

/// With no room for a row and nothing sent, each request is refused: that is no readiness.
#[test]
fn what_can_be_neither_stored_nor_sent_is_not_ready() {
    for (key, value, why) in [
        ("queue.min_free", "1000000GiB", "less than queue.min_free"),
        ("queue.max_rows", "1", "the queue holds queue.max_rows"),
    ] {
        let (mut destination, setup) = to_nobody();
        let setup = setup.set(key, value);
        let proxy = setup.start();
        proxy.wait_for_store();
        proxy.wait_for_store();
        // Those that go direct and fail are stored in any case.
        let sent = open_breaker(&proxy);
        let lines = wait_until_ready_says(&proxy, 503, &[why, DOWN]);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(proxy.send(&http::numbered(sent)).status, 503);
        queue(&setup, "pause");
        let lines = wait_until_ready_says(&proxy, 503, &[why, DOWN, PAUSED]);
        assert_eq!(lines.len(), 3, "{lines:?}");
        queue(&setup, "resume");
        destination.open();
        wait_until_ready_says(&proxy, 200, &["ok"]);
        destination.wait_for_numbers(sent, PATIENCE);
        proxy.stop();
    }
}

#[test]
fn a_shutdown_hides_nothing_else() {
    let (_destination, setup) = to_nobody();
    let setup = setup.set("server.shutdown_timeout", "60s");
    let mut proxy = setup.start();
    open_breaker(&proxy);
    // Has begun a request, and so is waited for.
    let mut sender = http::Connection::open(proxy.intake);
    sender.send(b"POST / HTTP/1.1\r\n");
    proxy.sigterm();
    let lines = wait_until_ready_says(&proxy, 503, &["shutting down", DOWN]);
    assert_eq!(lines[0], "shutting down");
    drop(sender);
    assert_eq!(proxy.wait().code(), Some(0));
}

/// What doctor finds that says this, and its level.
fn found(setup: &Setup, part: &str) -> Option<(String, String)> {
    let output = setup.command().args(["doctor", "--json"]).output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let finding = findings
        .iter()
        .find(|finding| text(finding, "found").contains(part))?;
    Some((text(finding, "level"), text(finding, "found")))
}

#[test]
fn the_second_of_two_on_one_file_says_so_until_it_is_alone() {
    let destination = Destination::start();
    let first_setup = Setup::new(&destination.url());
    let path = first_setup.path("queue.sqlite").display().to_string();
    let first_setup = first_setup.set("db.connection_string", format!("sqlite:{path}"));
    let second_setup =
        Setup::new(&destination.url()).set("db.connection_string", format!("sqlite:{path}"));
    let first = first_setup.start();
    first.wait_for_store();
    let said = format!("another process (pid {}) serves {path}", first.pid());
    // Before it is started.
    let silent = second_setup.set("metrics.bind", "127.0.0.1:1");
    let (level, text) = found(&silent, &said).expect("a warning");
    assert_eq!(level, "warning", "{text}");
    let second_setup = silent.set("metrics.bind", "127.0.0.1:0");

    let second = second_setup.start();
    let lines = wait_until_ready_says(&second, 200, &["ok, but ", &said]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    second.wait_for_log(&format!("{said}: its leases are left alone"));
    let status: Value = serde_json::from_str(&http::get(second.control, "/status").text()).unwrap();
    let other = status["store"]["other_process"].as_str().unwrap();
    assert!(other.starts_with(&said), "{other}");
    let second_setup = second_setup.set("metrics.bind", second.control);
    let (level, text) = found(&second_setup, &format!("the instance: {said}")).expect("a warning");
    assert_eq!(level, "warning", "{text}");
    // Senders of both are answered and delivered to; the first has nothing to say.
    first.accept(0..2);
    second.accept(2..4);
    destination.wait_for_numbers(4, PATIENCE);
    assert_eq!(http::get(first.control, "/readyz").text(), "ok\n");
    let first_setup = first_setup.set("metrics.bind", first.control);
    assert_eq!(found(&first_setup, "another process"), None);

    first.stop();
    second.wait_for_log("this one serves the queue");
    assert_eq!(http::get(second.control, "/readyz").text(), "ok\n");
    // A third would find it so.
    let said = format!("another process (pid {}) serves {path}", second.pid());
    let silent = second_setup.set("metrics.bind", "127.0.0.1:1");
    assert!(found(&silent, &said).is_some());
    second.stop();
}
