//! Under systemd: what it is told, its sockets, and the units in `dist/`.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::listening::{hand_over, listener};
use crate::support::destination::{Answer, Destination};
use crate::support::http::{self, Connection};
use crate::support::postgres::cluster;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Setup, wait_until};
use crate::support::relay::Relay;

/// What systemd would hear.
struct Listener {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Listener {
    /// Listens for a program with that setup.
    fn of(setup: Setup) -> (Listener, Setup) {
        let path = setup.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let listener = Listener {
            socket,
            heard: Vec::new(),
        };
        (listener, setup.env("NOTIFY_SOCKET", path.display()))
    }

    /// Waits until a line is heard that begins so, and returns it.
    fn wait_for(&mut self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut message = [0; 4096];
            let bytes = self.socket.recv(&mut message).expect(start);
            let message = String::from_utf8(message[..bytes].to_vec()).unwrap();
            self.heard.extend(message.lines().map(str::to_owned));
            if let Some(line) = message.lines().find(|line| line.starts_with(start)) {
                return line.to_owned();
            }
            assert!(Instant::now() < deadline, "{start}: {:?}", self.heard);
        }
    }

    /// Waits until lines that begin so have been heard, whichever comes first.
    fn wait_for_all(&mut self, starts: &[&str]) {
        while let Some(missing) = starts.iter().find(|start| !self.has_heard(start)) {
            self.wait_for(missing);
        }
    }

    fn has_heard(&self, start: &str) -> bool {
        self.heard.iter().any(|line| line.starts_with(start))
    }
}

#[test]
fn it_is_told_of_the_start_the_state_and_the_end() {
    let destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url()).set("server.shutdown_timeout", "1h");
    let (mut systemd, setup) = Listener::of(setup.env("WATCHDOG_USEC", 400_000));
    let mut proxy = setup.start();
    // In either order: they come from two threads.
    systemd.wait_for_all(&[
        "READY=1",
        "STATUS=0.0 received/s, 0.0 delivered/s, 0 waiting",
    ]);
    assert!(http::get(proxy.control, "/healthz").status == 200);
    assert!(!systemd.has_heard("STOPPING=1"));
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    // A destination that hangs is none of our faults.
    for _ in 0..5 {
        systemd.wait_for("WATCHDOG=1");
    }
    proxy.sigterm();
    systemd.wait_for("STOPPING=1");
    for _ in 0..3 {
        assert_eq!(systemd.wait_for("EXTEND"), "EXTEND_TIMEOUT_USEC=15000000");
    }
    systemd.wait_for("WATCHDOG=1");
    assert!(
        systemd.has_heard("STATUS=stopping, 1 being sent: "),
        "{:?}",
        systemd.heard
    );
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(0));
}

#[test]
fn a_reload_is_announced_and_ended_whether_it_succeeds_or_not() {
    let setup = Setup::new("http://127.0.0.1:1");
    let (mut systemd, setup) = Listener::of(setup);
    let proxy = setup.start();
    systemd.wait_for("READY=1");
    for (rate, line) in [
        ("7", "settings reloaded"),
        ("many", "settings not reloaded"),
    ] {
        set_enqueue_rate(&setup, rate);
        proxy.sighup();
        let usec = systemd.wait_for("MONOTONIC_USEC=");
        assert!(systemd.has_heard("RELOADING=1"));
        let (_, usec) = usec.split_once('=').unwrap();
        assert!(usec.parse::<u64>().unwrap() > 0);
        systemd.wait_for("READY=1");
        proxy.wait_for_log(line);
    }
    proxy.stop();
}

fn set_enqueue_rate(setup: &Setup, rate: &str) {
    let path = setup.path("config.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("enqueue_rate: ", &format!("enqueue_rate: {rate} # "));
    std::fs::write(&path, text).unwrap();
}

#[test]
fn a_reload_that_failed_is_shown_until_one_succeeds() {
    let setup = Setup::new("http://127.0.0.1:1");
    let (mut systemd, setup) = Listener::of(setup.env("WATCHDOG_USEC", 20_000));
    let proxy = setup.start();
    let shown = || {
        let status = http::get(proxy.control, "/status").text();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["failed_reload"].clone()
    };
    systemd.wait_for("STATUS=");
    assert!(shown().is_null());
    for wrong in ["many", "more"] {
        set_enqueue_rate(&setup, wrong);
        proxy.sighup();
        let error = format!(
            "server.enqueue_rate: must be a whole number from 0 to 1000000 (got \"{wrong}\""
        );
        wait_until("the error in /status", || {
            shown()["error"]
                .as_str()
                .is_some_and(|told| told.contains(&error))
        });
        while !systemd.wait_for("STATUS=").contains(&error) {}
    }
    set_enqueue_rate(&setup, "7");
    proxy.sighup();
    wait_until("no error in /status", || shown().is_null());
    while systemd.wait_for("STATUS=").contains("reload") {}
    proxy.stop();
}

#[test]
fn a_systemd_that_does_not_listen_holds_up_no_stop() {
    let setup = Setup::new("http://127.0.0.1:1");
    // It is there, but takes nothing: its queue is full before long.
    let (_systemd, setup) = Listener::of(setup.env("WATCHDOG_USEC", 10_000));
    let proxy = setup.start();
    proxy.wait_for_log("systemd cannot be told");
    proxy.stop();
}

#[test]
fn a_frozen_database_does_not_trip_the_watchdog() {
    let database = cluster().database();
    let relay = Relay::start(listener(), database.port());
    let (port, relayed) = (database.port().to_string(), relay.port().to_string());
    let destination = Destination::start();
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("db.timeout", "300ms")
        .set(
            "db.connection_string",
            database.url().replace(&port, &relayed),
        )
        .keep(database);
    let (mut systemd, setup) = Listener::of(setup.env("WATCHDOG_USEC", 200_000));
    let proxy = setup.start();
    proxy.wait_for_store();
    relay.freeze(true);
    proxy.accept(0..1);
    systemd.wait_for("STATUS=0");
    wait_until("the fault in the status", || {
        systemd.wait_for("STATUS=").contains("; store ")
    });
    for _ in 0..20 {
        systemd.wait_for("WATCHDOG=1");
    }
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    relay.freeze(false);
}

/// With one of a kind that it does not know, it names what is wrong.
#[test]
fn who_names_no_socket_is_told_nothing() {
    let setup = Setup::new("http://127.0.0.1:1").env("WATCHDOG_USEC", 200_000);
    setup.start().stop();
    let setup = setup.env("NOTIFY_SOCKET", "vsock:2:1");
    let mut process = Process::spawn(&mut setup.command());
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    assert!(
        process.text().contains("NOTIFY_SOCKET"),
        "{}",
        process.text()
    );
}

/// Whether one request is acknowledged by a program that may end at any moment.
fn is_acknowledged(path: &Path, number: usize) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&http::numbered(number))?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer)?;
    Ok(&answer == b"HTTP/1.1 200")
}

/// What is wrong with the way to systemd is found before a sender is answered: whoever knocks from
/// the first moment on is refused, or has its request delivered or stored.
#[test]
fn a_start_that_fails_for_its_notify_socket_loses_nothing_acknowledged() {
    let destination = Destination::answering(|_| Answer::ok().delay(Duration::from_millis(50)));
    let next = AtomicUsize::new(0);
    let mut lost = Vec::new();
    for _ in 0..10 {
        let setup = Setup::new(&destination.url());
        let path = setup.path("intake.sock");
        let setup = setup
            .set("server.bind", format!("unix:{}", path.display()))
            .env("NOTIFY_SOCKET", "vsock:2:1");
        let is_over = AtomicBool::new(false);
        let knock = || {
            let mut acknowledged = Vec::new();
            while !is_over.load(Ordering::SeqCst) {
                let number = next.fetch_add(1, Ordering::SeqCst);
                if is_acknowledged(&path, number).unwrap_or(false) {
                    acknowledged.push(number);
                }
            }
            acknowledged
        };
        let acknowledged = thread::scope(|scope| {
            let senders: Vec<_> = (0..4).map(|_| scope.spawn(knock)).collect();
            let mut process = Process::spawn(&mut setup.command());
            assert_eq!(process.wait(PATIENCE).code(), Some(1));
            is_over.store(true, Ordering::SeqCst);
            let senders = senders.into_iter().map(|sender| sender.join().unwrap());
            senders.flatten().collect::<Vec<_>>()
        });
        // Nor is there a store yet, in which they could be.
        assert!(!setup.path("queue.sqlite").exists());
        let delivered: Vec<_> = destination
            .seen()
            .iter()
            .map(|seen| seen.number())
            .collect();
        let is_lost = |number: &usize| !delivered.contains(number);
        lost.extend(acknowledged.into_iter().filter(is_lost));
    }
    assert!(lost.is_empty(), "{} lost: {lost:?}", lost.len());
}

/// Sends numbered requests on ever new connections while `body` runs; each is acknowledged.
fn under_load(open: impl Fn(usize) -> u16 + Sync, body: impl FnOnce(&AtomicUsize)) -> usize {
    let (sent, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let senders: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::SeqCst) {
                        let number = sent.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(open(number), 200, "request {number}");
                    }
                })
            })
            .collect();
        body(&sent);
        is_over.store(true, Ordering::SeqCst);
        for sender in senders {
            sender.join().expect("no connection is refused or reset");
        }
    });
    sent.into_inner()
}

fn wait_for_more(sent: &AtomicUsize) {
    let before = sent.load(Ordering::SeqCst);
    wait_until("more requests", || {
        sent.load(Ordering::SeqCst) > before + 50
    });
}

#[test]
fn restarts_on_handed_over_sockets_refuse_no_connection() {
    let destination = Destination::start();
    let (http, metrics) = (listener(), listener());
    let address = http.local_addr().unwrap();
    let setup = Setup::new(&destination.url())
        .set("server.bind", "systemd:http")
        .set("metrics.bind", "systemd:metrics");
    let mut proxy = hand_over(&setup, "http:metrics", &http, &metrics);
    let open = |number| {
        let mut connection = Connection::open(address);
        connection.exchange(&http::numbered(number)).status
    };
    let sent = under_load(open, |sent| {
        for _ in 0..3 {
            wait_for_more(sent);
            proxy.sigterm();
            assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.log());
            // The metrics of the next answer who asks now.
            proxy = hand_over(&setup, "http:metrics", &http, &metrics);
        }
        wait_for_more(sent);
    });
    destination.wait_for_numbers(sent, PATIENCE);
    assert_eq!(http::get(proxy.control, "/healthz").status, 200);
    proxy.stop();
}

/// The same, with systemd's own code for the sockets.
#[test]
fn restarts_under_systemd_socket_activate_refuse_no_connection() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url())
        .set("server.bind", "systemd:http")
        .set("metrics.bind", "systemd:metrics");
    let (http, metrics) = (setup.path("http.sock"), setup.path("metrics.sock"));
    let program = setup.command().get_program().to_owned();
    // It starts one program, once: this one starts ours, again and again.
    let script = "
        number=0
        while [ $number -lt 4 ]; do
            sh -c 'LISTEN_PID=$$ exec \"$0\"' \"$0\" &
            echo $! > pid; mv pid pid.$number
            wait $!
            echo \"ended $number with $?\" >&2
            number=$((number + 1))
        done";
    let mut command = Command::new("systemd-socket-activate");
    command
        .current_dir(setup.path(""))
        .arg("--listen")
        .arg(&http)
        .arg("--listen")
        .arg(&metrics)
        .arg("--fdname=http:metrics")
        .args(["sh", "-c", script])
        .arg(program);
    let mut process = Process::spawn(&mut command);
    wait_until("sockets (is systemd installed?)", || {
        http.exists() && metrics.exists()
    });
    let open = |number| {
        let mut connection = Connection::open_unix(&http);
        connection.exchange(&http::numbered(number)).status
    };
    let end = |number: usize| {
        let path = setup.path(&format!("pid.{number}"));
        wait_until("the pid", || path.exists());
        let pid: i32 = std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        // Not before it listens to signals: it has answered someone by then.
        kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
        process.wait_for_line(&format!("ended {number} with 0"), PATIENCE);
    };
    let sent = under_load(open, |sent| {
        for number in 0..3 {
            wait_for_more(sent);
            end(number);
        }
        wait_for_more(sent);
    });
    destination.wait_for_numbers(sent, PATIENCE);
    end(3);
    assert!(process.wait(PATIENCE).success());
}

fn dist(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("dist")
        .join(name)
}

fn systemd_analyze(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("systemd-analyze")
        .args(arguments)
        .output()
        .expect("systemd-analyze, of the package systemd");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn the_units_are_valid() {
    let directory = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for name in [
        "asyncproxy.service",
        "asyncproxy.socket",
        "asyncproxy-metrics.socket",
    ] {
        let unit = std::fs::read_to_string(dist(name)).unwrap();
        // What it starts has to be there.
        let unit = unit.replace("/usr/bin/asyncproxy", env!("CARGO_BIN_EXE_asyncproxy"));
        let path = directory.path().join(name);
        std::fs::write(&path, unit).unwrap();
        paths.push(path.to_str().unwrap().to_owned());
    }
    let mut arguments = vec!["verify"];
    arguments.extend(paths.iter().map(String::as_str));
    let (is_valid, text) = systemd_analyze(&arguments);
    assert!(is_valid, "{text}");
    let ours = text.lines().find(|line| line.contains("asyncproxy"));
    assert_eq!(ours, None, "{text}");
}

#[test]
fn the_service_is_sandboxed() {
    let path = dist("asyncproxy.service");
    let (is_good, text) = systemd_analyze(&[
        "security",
        "--offline=true",
        "--threshold=15",
        path.to_str().unwrap(),
    ]);
    assert!(is_good, "{text}");
    assert!(
        text.contains("Overall exposure level for asyncproxy.service: 1."),
        "{text}"
    );
}
