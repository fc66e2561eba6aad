//! What is logged, how often, and what must never be.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics::{self, Metrics};
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::store;

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

/// All that is said until the end, to a reader that is taken for the journal if `is_journal`.
fn said(setup: &Setup, arguments: &[&str], is_journal: bool) -> String {
    let (reader, writer) = std::io::pipe().expect("pipe");
    let stat = rustix::fs::fstat(&writer).expect("fstat");
    let inode = stat.st_ino + u64::from(!is_journal);
    let mut command = setup.command();
    command
        .args(arguments)
        .env("JOURNAL_STREAM", format!("{}:{inode}", stat.st_dev))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(writer);
    let mut child = command.spawn().expect("start");
    // It has the other end of the pipe, too.
    drop(command);
    let mut text = String::new();
    for line in BufReader::new(reader).lines() {
        let line = line.expect("a line") + "\n";
        if line.contains("store is ready") {
            kill_process(Pid::from_child(&child), Signal::TERM).expect("signal");
        }
        text += &line;
    }
    child.wait().expect("wait");
    text
}

#[test]
fn lines_are_in_their_format_and_for_the_journal_have_their_priority() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address");
    for (format, is_journal) in [
        ("logfmt", true),
        ("logfmt", false),
        ("json", true),
        ("json", false),
    ] {
        let setup = || Setup::new("http://127.0.0.1:1").set("log.format", format);
        let check = |text: &str, last: &str| {
            for (line, is_last) in text
                .lines()
                .rev()
                .zip([true].into_iter().chain([false; 99]))
            {
                let (priority, line) = line.split_at(match is_journal {
                    true => "<6>".len(),
                    false => 0,
                });
                match is_journal {
                    true if is_last => assert_eq!(priority, last, "{text}"),
                    true => assert!(["<6>", "<4>"].contains(&priority), "{text}"),
                    false => {}
                }
                match format {
                    "json" => {
                        let line: serde_json::Value = serde_json::from_str(line).expect(line);
                        assert!(line["msg"].is_string(), "{line}");
                    }
                    _ if is_last && last == "<3>" => assert!(line.starts_with("asyncproxy: ")),
                    _ => assert_logfmt(line),
                }
            }
        };
        check(&said(&setup(), &[], is_journal), "<6>");
        let cannot_start = setup().set("server.bind", taken);
        check(&said(&cannot_start, &[], is_journal), "<3>");
    }
}

#[test]
fn what_is_said_without_a_log_has_its_priority_in_the_journal() {
    let wrong = Setup::new("http://127.0.0.1:1").set("log.format", "xml");
    for arguments in [&[][..], &["--check-config"], &["--nonsense"], &["migrate"]] {
        let text = said(&wrong, arguments, true);
        assert!(text.starts_with("<3>asyncproxy: "), "{text}");
        let text = said(&wrong, arguments, false);
        assert!(text.starts_with("asyncproxy: "), "{text}");
    }
}

/// Its addresses are known without its log.
struct Silent {
    child: Child,
    intake: PathBuf,
    control: PathBuf,
}

impl Silent {
    fn start(setup: Setup, stderr: impl Into<Stdio>) -> (Silent, Setup) {
        let (intake, control) = (setup.path("intake.sock"), setup.path("control.sock"));
        let setup = setup
            .set("server.bind", format!("unix:{}", intake.display()))
            .set("metrics.bind", format!("unix:{}", control.display()))
            .set("log.level", "debug");
        let mut command = setup.command();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = child.stderr(stderr).spawn().expect("start");
        let silent = Silent {
            child,
            intake,
            control,
        };
        wait_until("the intake", || UnixStream::connect(&silent.intake).is_ok());
        (silent, setup)
    }

    fn accept(&self, numbers: std::ops::Range<usize>) {
        let mut connection = http::Connection::open_unix(&self.intake);
        for number in numbers {
            let answer = connection.exchange(&http::numbered(number));
            assert_eq!(answer.status, 200, "request {number}: {answer:?}");
        }
    }

    fn metrics(&self) -> Metrics {
        let request = b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
        Metrics::parse(
            &http::Connection::open_unix(&self.control)
                .exchange(request)
                .text(),
        )
    }

    fn dropped(&self) -> f64 {
        self.metrics().get("asyncproxy_log_dropped_total")
    }

    /// Asks it to end, and waits.
    fn stop(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("signal");
        wait_until("the end", || self.child.try_wait().expect("wait").is_some());
        self.child.wait().expect("wait").code()
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const DELIVERED: &str = "msg=\"delivered\"";

/// A debug line for each delivery is more than the pipe and the program keep.
#[test]
fn a_log_that_nobody_reads_stops_neither_deliveries_nor_the_stop() {
    let mut destination = Destination::down();
    let (unread, stderr) = std::io::pipe().expect("pipe");
    let setup = Setup::new(&destination.url());
    let (proxy, setup) = Silent::start(setup, stderr);
    proxy.accept(0..500);
    destination.open();
    proxy.accept(500..3500);
    destination.wait_for_numbers(3500, PATIENCE);
    wait_until("dropped lines", || proxy.dropped() > 0.0);
    assert_eq!(proxy.stop(), Some(0));
    assert_eq!(store::rows(&setup), 0);
    // What was written before is whole, but for the line that the end came into.
    let text = std::io::read_to_string(unread).expect("text");
    let whole = text.rsplit_once('\n').expect("lines").0;
    assert_logfmt(whole);
    assert!(whole.contains(DELIVERED), "{whole}");
}

#[test]
fn who_reads_the_log_again_is_told_how_much_is_missing() {
    const COUNT: usize = 3500;
    let destination = Destination::start();
    let (unread, stderr) = std::io::pipe().expect("pipe");
    let setup = Setup::new(&destination.url());
    let (proxy, _setup) = Silent::start(setup, stderr);
    proxy.accept(0..COUNT);
    destination.wait_for_numbers(COUNT, PATIENCE);
    wait_until("all settled", || {
        proxy.metrics().get("asyncproxy_in_flight") == 0.0
    });
    let dropped = proxy.dropped();
    assert!(dropped > 0.0, "{dropped}");
    let mut lines = BufReader::new(unread)
        .lines()
        .map(|line| line.expect("a line"));
    let mut text = String::new();
    // Told of without any other line to come.
    while !text.contains("log lines dropped") {
        text = text + &lines.next().expect("a line") + "\n";
    }
    let reader = thread::spawn(|| lines.collect::<Vec<_>>().join("\n"));
    assert_eq!(proxy.stop(), Some(0));
    text += &reader.join().expect("text");
    assert_logfmt(&text);
    let told: usize = text
        .lines()
        .filter(|line| line.contains("log lines dropped"))
        .filter_map(|line| line.split_once("lines=")?.1.parse::<usize>().ok())
        .sum();
    assert_eq!(told as f64, dropped);
    let delivered = text.lines().filter(|line| line.contains(DELIVERED)).count();
    assert!(
        delivered < COUNT && delivered + told >= COUNT,
        "{delivered} and {told}"
    );
    assert!(
        text.lines()
            .last()
            .expect("a line")
            .contains("msg=\"stopped\""),
        "{text}"
    );
}

#[test]
fn a_log_whose_reader_is_gone_stops_nothing() {
    let destination = Destination::start();
    let (unread, stderr) = std::io::pipe().expect("pipe");
    drop(unread);
    let (proxy, setup) = Silent::start(Setup::new(&destination.url()), stderr);
    proxy.accept(0..200);
    destination.wait_for_numbers(200, PATIENCE);
    wait_until("lines that could not be written", || {
        proxy.dropped() >= 200.0
    });
    assert_eq!(proxy.stop(), Some(0));
    assert_eq!(store::rows(&setup), 0);
}

/// What was logged before it, and the reason itself, is there when the program has ended.
#[test]
fn a_fatal_error_is_the_last_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = taken.local_addr().expect("address");
    let setup = Setup::new("http://127.0.0.1:1").set("server.bind", address);
    for _ in 0..20 {
        let output = setup.command().output().expect("run");
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).expect("UTF-8");
        let last = text.lines().last().expect("a line");
        assert!(
            last.starts_with("asyncproxy: server.bind: cannot listen on"),
            "{text}"
        );
    }
}
