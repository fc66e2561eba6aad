//! `asyncproxy bench`: what it sends, what it says of it, and the exit status.

use std::collections::HashSet;
use std::process::Output;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::destination::{Answer, Destination};
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Setup, binary};

struct Ended {
    status: i32,
    report: String,
    errors: String,
}

/// Runs to the end.
fn bench(url: &str, options: &[&str]) -> Ended {
    let directory = TempDir::new().expect("directory");
    let mut command = binary(directory.path());
    let output = command.args(["bench", "--url", url]).args(options).output();
    let Output {
        status,
        stdout,
        stderr,
    } = output.expect("run");
    Ended {
        status: status.code().expect("exit status"),
        report: String::from_utf8(stdout).expect("UTF-8"),
        errors: String::from_utf8(stderr).expect("UTF-8"),
    }
}

/// The text behind `name: ` in its line.
fn value<'a>(report: &'a str, name: &str) -> &'a str {
    let prefix = format!("{name}: ");
    let mut lines = report.lines().map(str::trim_start);
    lines
        .find_map(|line| line.strip_prefix(&prefix))
        .unwrap_or_else(|| panic!("{name}? {report}"))
}

/// The number that it begins with.
fn count(report: &str, name: &str) -> usize {
    let value = value(report, name);
    let end = value.find(|c: char| !c.is_ascii_digit());
    let digits = &value[..end.unwrap_or(value.len())];
    digits.parse().unwrap_or_else(|_| panic!("{name}: {value}"))
}

fn milliseconds(report: &str, name: &str) -> f64 {
    let value = value(report, name).strip_suffix(" ms").expect("ms");
    value.parse().expect("a number")
}

#[test]
fn the_closed_loop_counts_what_the_destination_saw() {
    let destination = Destination::start();
    let url = format!("{}/hook/?a=/b", destination.url());
    let ended = bench(&url, &["--clients", "3", "--duration", "500ms"]);
    assert_eq!((ended.status, &*ended.errors), (0, ""), "{}", ended.report);
    let seen = destination.seen();
    let sent = count(&ended.report, "sent");
    assert_eq!(sent, seen.len());
    assert_eq!(count(&ended.report, "answered"), sent);
    assert_eq!(count(&ended.report, "200"), sent);
    assert_eq!(count(&ended.report, "errors"), 0);
    assert!(milliseconds(&ended.report, "50 %") <= milliseconds(&ended.report, "max"));
    assert!(!ended.report.contains("unsent"), "{}", ended.report);
    let connections: HashSet<_> = seen.iter().map(|seen| seen.connection).collect();
    assert!(connections.len() <= 3, "kept open: {connections:?}");
    let ids: HashSet<_> = seen.iter().map(|seen| seen.id()).collect();
    assert_eq!(ids.len(), sent, "each has an id of its own");
    for seen in &seen {
        assert_eq!((&*seen.method, &*seen.target()), ("POST", "/hook/?a=/b"));
        assert_eq!(seen.body, [b'x'; 1024]);
    }
}

#[test]
fn the_open_loop_sends_rate_times_duration() {
    let destination = Destination::start();
    // So many clients that each request is taken long before it is due.
    let ended = bench(
        &destination.url(),
        &["--clients", "60", "--rate", "60", "--duration", "2s"],
    );
    assert_eq!((ended.status, &*ended.errors), (0, ""), "{}", ended.report);
    assert_eq!(count(&ended.report, "sent"), 120);
    assert_eq!(count(&ended.report, "unsent"), 0);
    assert_eq!(destination.seen().len(), 120);
}

#[test]
fn what_waits_for_a_client_counts_as_latency() {
    const DELAY: Duration = Duration::from_millis(100);
    let destination = Destination::answering(|_| Answer::ok().delay(DELAY));
    let ended = bench(
        &destination.url(),
        &["--clients", "1", "--rate", "100", "--duration", "1s"],
    );
    let report = &ended.report;
    let sent = count(report, "sent");
    assert_eq!(sent, destination.seen().len());
    assert_eq!(count(report, "answered"), sent);
    // It answers ten a second at most.
    let unsent = count(report, "unsent");
    assert!(unsent >= 80, "{report}");
    assert_eq!(sent + unsent, 100, "{report}");
    assert!(report.contains("more --clients are needed"), "{report}");
    assert!(
        count(report, "late") >= sent - 1,
        "all but the first: {report}"
    );
    // The second was due 90 ms before the first was answered, and so on. Were latency counted from
    // when each was sent, it would be the same for all.
    let waited = 90.0 * (sent - 1) as f64;
    assert!(milliseconds(report, "max") >= 100.0 + waited, "{report}");
    assert_eq!(ended.status, 1, "not all was sent");
}

#[test]
fn any_answer_but_2xx_is_exit_status_1() {
    for status in [302, 404, 503] {
        let destination =
            Destination::answering(move |_| Answer::status(status).line("Location: /elsewhere"));
        let ended = bench(
            &destination.url(),
            &["--clients", "1", "--rate", "4", "--duration", "500ms"],
        );
        assert_eq!(ended.status, 1, "{status}: {}", ended.report);
        let sent = count(&ended.report, "sent");
        assert_eq!(count(&ended.report, &status.to_string()), sent);
        assert_eq!(destination.seen().len(), sent, "no redirect is followed");
    }
}

#[test]
fn errors_are_counted_by_reason() {
    let destination = Destination::down();
    let ended = bench(
        &destination.url(),
        &["--clients", "2", "--rate", "4", "--duration", "500ms"],
    );
    assert_eq!(ended.status, 1);
    assert_eq!(count(&ended.report, "answered"), 0);
    assert_eq!(count(&ended.report, "errors"), 2);
    let refused = "Connection refused (os error 111)";
    assert_eq!(count(&ended.report, refused), 2);
    assert!(ended.report.ends_with("latency: no answers\n"));
}

#[test]
fn the_body_comes_from_a_file() {
    let directory = TempDir::new().expect("directory");
    let path = directory.path().join("body");
    for body in [&b""[..], b"{\"a\": \"\xff\"}"] {
        std::fs::write(&path, body).expect("write");
        let destination = Destination::start();
        let file = path.to_str().expect("UTF-8");
        let ended = bench(
            &destination.url(),
            &["--body", file, "--rate", "1", "--duration", "500ms"],
        );
        assert_eq!(ended.status, 0, "{}", ended.report);
        assert_eq!(destination.wait_for(1, PATIENCE)[0].body, body);
    }
}

#[test]
fn a_signal_ends_it_with_a_report() {
    for signal in [Signal::INT, Signal::TERM] {
        let destination = Destination::start();
        let directory = TempDir::new().expect("directory");
        let mut command = binary(directory.path());
        let url = destination.url();
        // Clients that wait for an hour, too.
        command.args(["bench", "--url", &url, "--duration", "10d"]);
        command.args(["--rate", "0.001", "--clients", "4"]);
        let mut process = Process::spawn(&mut command);
        destination.wait_for(1, PATIENCE);
        process.signal(signal);
        assert_eq!(process.wait(PATIENCE).code(), Some(0));
        let report = process.text();
        assert_eq!(count(&report, "sent"), 1);
        assert_eq!(count(&report, "200"), 1);
        assert_eq!(count(&report, "unsent"), 0);
    }
}

#[test]
fn a_signal_does_not_wait_for_a_destination_that_hangs() {
    let destination = Destination::answering(|_| Answer::hang());
    let directory = TempDir::new().expect("directory");
    let mut command = binary(directory.path());
    command.args(["bench", "--url", &destination.url(), "--clients", "2"]);
    let mut process = Process::spawn(&mut command);
    destination.wait_for(2, PATIENCE);
    process.signal(Signal::INT);
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    let report = process.text();
    assert_eq!(count(&report, "unanswered"), 2);
}

#[test]
fn what_it_sends_goes_through_the_proxy() {
    let destination = Destination::start();
    let proxy = Setup::new(&destination.url()).start();
    let url = format!("http://{}/hook", proxy.intake);
    let options = ["--clients", "20", "--rate", "40", "--duration", "500ms"];
    let ended = bench(&url, &options);
    assert_eq!(ended.status, 0, "{}", ended.report);
    assert_eq!(destination.wait_for(20, PATIENCE).len(), 20);
    proxy.stop();
}
