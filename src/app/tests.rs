//! A start that fails at any of its steps, with rows in the store and senders that do not wait.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use super::*;
use crate::budget::{Budget, Permit};
use crate::intake::Answer;
use crate::intake::builtin::{Acceptor, Received, Service, Times};
use crate::queue::operate::{Filter, State};
use crate::queue::sqlite::SqliteStore;
use crate::queue::{Fate, NewRow, Store};
use crate::request::{Peer, Request};

/// Of each connection, however long the machine takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rows that wait in the store at the start.
const STORED: usize = 4;

type Targets = BTreeSet<String>;

/// A destination that takes note of targets.
#[derive(Default)]
struct Seen(Mutex<Targets>);

impl Seen {
    fn targets(&self) -> Targets {
        self.0.lock().unwrap().clone()
    }
}

impl Service for Seen {
    fn body_bytes_max(&self) -> usize {
        1024
    }

    fn permit(&self) -> Permit {
        Budget::new(1024 * 1024).permit()
    }

    fn serve(&self, received: Received<'_>) -> Answer {
        let target = received.head.target.to_owned();
        self.0.lock().unwrap().insert(target);
        Answer::Accepted(200)
    }

    fn refuse(&self, answer: Answer) -> Answer {
        answer
    }

    fn is_draining(&self) -> bool {
        false
    }
}

fn listening() -> (Socket, SocketAddr) {
    let socket = Bind::Host(Ipv4Addr::LOCALHOST.to_string(), 0)
        .listen()
        .unwrap()
        .socket;
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

fn destination() -> (Arc<Seen>, SocketAddr) {
    let (socket, address) = listening();
    let seen = Arc::new(Seen::default());
    let times = Times {
        request: PATIENCE,
        idle: PATIENCE,
    };
    let (service, threads) = (Arc::clone(&seen), Threads::default());
    // Serves until the end of the test.
    Acceptor::start("destination", socket, service, times, 64, &threads).unwrap();
    (seen, address)
}

fn config(directory: &std::path::Path, destination: SocketAddr, acceptor: &str) -> Config {
    let queue = directory.join("queue.sqlite");
    let yaml = format!(
        "server: {{acceptor: {acceptor}, enqueue_rate: 1000, shutdown_timeout: 60s}}\n\
         proxy: {{remote_url: 'http://{destination}', num_clients: 2}}\n\
         queue: {{workers: 2, handle_per_second: 1000}}\n\
         db: {{connection_string: 'sqlite:{}'}}\n",
        queue.display()
    );
    Config::from_yaml(&yaml, &|_| None).unwrap()
}

/// Rows due at once, whose targets are returned.
fn fill(directory: &std::path::Path) -> Targets {
    let store = SqliteStore::new(directory.join("queue.sqlite"), true, PATIENCE);
    let targets: Targets = (0..STORED)
        .map(|number| format!("/stored/{number}"))
        .collect();
    let row = |target: &String| {
        let peer = Peer::default();
        let fields = std::iter::empty::<(&str, &[u8])>();
        let now = SystemTime::now();
        let request = Request::record("POST", target, fields, peer, Vec::new(), now);
        NewRow {
            request: Arc::new(request.unwrap()),
            attempt: 0,
            fate: Fate::Due {
                after: Duration::ZERO,
                failure: None,
            },
        }
    };
    let rows: Vec<NewRow> = targets.iter().map(row).collect();
    store.append(&rows).unwrap();
    targets
}

/// Sends one request after the other until `is_over`; returns those that were acknowledged.
fn knock(address: SocketAddr, name: usize, is_over: &AtomicBool) -> Targets {
    let mut acknowledged = Targets::new();
    for number in 0.. {
        if is_over.load(Ordering::SeqCst) {
            break;
        }
        let target = format!("/sent/{name}/{number}");
        if is_acknowledged(address, &target, is_over).unwrap_or(false) {
            acknowledged.insert(target);
        }
    }
    acknowledged
}

fn is_acknowledged(address: SocketAddr, target: &str, is_over: &AtomicBool) -> io::Result<bool> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    let request = format!("POST {target} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut status = [0; 12];
    let mut filled = 0;
    while filled < status.len() {
        match stream.read(&mut status[filled..]) {
            Ok(0) => return Ok(false),
            Ok(bytes) => filled += bytes,
            // Nobody takes it from the backlog, and nobody will.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if is_over.load(Ordering::SeqCst) {
                    return Ok(false);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(&status == b"HTTP/1.1 200")
}

/// Starts on a system that gives so many threads, and stops as soon as it runs. Returns whether it
/// did. Whatever was acknowledged or stored has to be delivered or stored, and nothing leased.
fn start_and_stop(acceptor: &str, threads: usize) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let (seen, destination) = destination();
    let config = config(directory.path(), destination, acceptor);
    let mut expected = fill(directory.path());
    let (intake, address) = listening();
    let listeners = Listeners {
        intake: Listening {
            socket: intake,
            is_handed_over: false,
        },
        control: listening().0,
        max_connections: 64,
    };
    let is_over = AtomicBool::new(false);
    let (started, sent) = std::thread::scope(|scope| {
        let is_over = &is_over;
        let senders: Vec<_> = (0..3)
            .map(|name| scope.spawn(move || knock(address, name, is_over)))
            .collect();
        let (_signal, signals) = bounded(1);
        let threads = Threads::of_at_most(threads);
        let started = Running::start(&config, (threads, signals), listeners);
        let started = started.map(|running| assert_eq!(running.drain(PATIENCE), (0, Ok(()))));
        is_over.store(true, Ordering::SeqCst);
        let sent = senders.into_iter().map(|sender| sender.join().unwrap());
        (started, sent.flatten().collect::<Targets>())
    });
    if let Err(error) = &started {
        assert!(matches!(error, RunError::Start { .. }), "{error}");
    }
    expected.extend(sent);
    let left = visited_store(&config)
        .list(&Filter::default(), None, 10_000)
        .unwrap();
    let leased = left.iter().filter(|row| row.state == State::Leased).count();
    assert_eq!(leased, 0, "{acceptor}, {threads} threads");
    let mut found = seen.targets();
    found.extend(left.into_iter().filter_map(|row| row.target));
    let lost: Vec<_> = expected.difference(&found).collect();
    assert!(
        lost.is_empty(),
        "{acceptor}, {threads} threads: lost {lost:?}"
    );
    started.is_ok()
}

/// The builtin acceptor needs few threads to begin with, tiny_http all it will ever have.
#[test]
fn a_start_that_fails_for_want_of_any_thread_loses_nothing() {
    let needed = (0..).find(|threads| start_and_stop("builtin", *threads));
    assert!(needed.unwrap() > 10, "{needed:?}");
    let first = needed.unwrap();
    let mut needed = (first..).step_by(5);
    let needed = needed.find(|threads| start_and_stop("tiny_http", *threads));
    assert!(needed.unwrap() >= crate::intake::tiny_http::THREADS);
}
