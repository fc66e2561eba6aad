//! The front of a service that limits its threads. No time runs out in here but where a test says
//! so: what is answered has waited for nobody.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use socket2::{Domain, Socket, Type};

use super::seat::State;
use super::{Acceptor, Received, Service, Times};
use crate::budget::{Budget, Permit};
use crate::intake::Answer;
use crate::thread::Threads;

const CONNECTIONS_MAX: usize = 8;
const THREADS_MAX: usize = 2;
/// Longer than any test; a test that has to wait for it fails.
const NEVER: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers `/quick` at once, all else when it is told to.
struct Slow {
    budget: Arc<Budget>,
    entered: Sender<()>,
    released: Receiver<()>,
}

impl Service for Slow {
    fn body_bytes_max(&self) -> usize {
        0
    }

    fn permit(&self) -> Permit {
        self.budget.permit()
    }

    fn threads_max(&self) -> Option<usize> {
        Some(THREADS_MAX)
    }

    fn serve(&self, _received: Received<'_>) -> Answer {
        self.entered.send(()).unwrap();
        self.released.recv_timeout(PATIENCE).unwrap();
        Answer::Accepted(202)
    }

    fn is_quick(&self) -> bool {
        true
    }

    fn serve_quickly(&self, received: Received<'_>) -> Option<Answer> {
        (received.head.target == "/quick").then_some(Answer::Accepted(200))
    }

    fn refuse(&self, answer: Answer) -> Answer {
        answer
    }

    fn is_draining(&self) -> bool {
        false
    }
}

struct Bench {
    address: SocketAddr,
    acceptor: Arc<Acceptor<Slow>>,
    entered: Receiver<()>,
    release: Sender<()>,
}

impl Bench {
    #[allow(
        clippy::disallowed_methods,
        reason = "a test tells more than it looks at"
    )]
    fn start(request: Duration) -> Bench {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        socket.bind(&any.into()).unwrap();
        socket.listen(1024).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let (entered_sender, entered) = unbounded();
        let (release, released) = bounded(THREADS_MAX);
        let service = Slow {
            budget: Budget::new(1 << 20),
            entered: entered_sender,
            released,
        };
        let times = Times {
            request,
            idle: NEVER,
        };
        let threads = Threads::default();
        let acceptor = Acceptor::start(
            "test",
            socket,
            Arc::new(service),
            times,
            CONNECTIONS_MAX,
            &threads,
        );
        Bench {
            address,
            acceptor: acceptor.unwrap(),
            entered,
            release,
        }
    }

    fn send(&self, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// The status of an answer to a request for `target` on a connection of its own.
    fn ask(&self, target: &str) -> u16 {
        status(&mut self.send(&format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n")))
    }

    /// Connections that have begun a request, one after the other.
    fn begin(&self, count: usize) -> Vec<TcpStream> {
        (0..count)
            .map(|_| {
                let before = self.begun();
                let stream = self.send("GET /quick HTTP/1.1\r\nHo");
                // Either one more, or one has given way.
                wait_until(|| self.begun() > before || before == CONNECTIONS_MAX);
                stream
            })
            .collect()
    }

    /// Connections whose request is waited for by the front.
    fn begun(&self) -> usize {
        let waiting = self.acceptor.parked.waiting();
        let idle = waiting.by_descriptor.values();
        idle.filter(|idle| idle.begun.is_some()).count()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.acceptor.close();
    }
}

fn wait_until(reached: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !reached() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
}

fn status(stream: &mut TcpStream) -> u16 {
    let mut start = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut start).unwrap();
    let text = str::from_utf8(&start).unwrap();
    text.strip_prefix("HTTP/1.1 ").unwrap().parse().unwrap()
}

/// Everything up to the end of the connection.
fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_slow_request_keeps_no_thread_and_no_place_that_another_needs() {
    let bench = Bench::start(NEVER);
    let mut slow = bench.begin(CONNECTIONS_MAX - 1);
    for _ in 0..100 {
        assert_eq!(bench.ask("/quick"), 200);
        wait_until(|| bench.acceptor.connections() == slow.len());
    }
    // None of them has had to give way, and each is answered once it is whole.
    assert_eq!(bench.begun(), CONNECTIONS_MAX - 1);
    assert_eq!(bench.acceptor.at_threads.load(super::Ordering::SeqCst), 0);
    for stream in &mut slow {
        stream.write_all(b"st: h\r\n\r\n").unwrap();
        assert_eq!(status(stream), 200);
    }
}

#[test]
fn when_all_places_hold_slow_requests_the_longest_under_way_gives_way() {
    let bench = Bench::start(NEVER);
    let mut slow = bench.begin(CONNECTIONS_MAX);
    // Far more than there are places for, and each asks in vain for one.
    for round in 0..50 {
        assert_eq!(bench.ask("/quick"), 200, "{round}");
        // Until the one that asked is seen to be gone.
        wait_until(|| bench.acceptor.connections() == bench.begun());
        slow.extend(bench.begin(2));
    }
    // In their order, and each was told.
    for stream in &mut slow[..CONNECTIONS_MAX] {
        assert_eq!(status(stream), 503);
        assert!(rest(stream).contains("Connection: close\r\n"));
    }
}

#[test]
fn when_all_threads_are_at_work_what_needs_none_is_answered_and_the_rest_refused() {
    let bench = Bench::start(NEVER);
    let head = "GET /slow HTTP/1.1\r\nHost: h\r\n\r\n";
    let mut at_work: Vec<_> = (0..THREADS_MAX).map(|_| bench.send(head)).collect();
    for _ in &at_work {
        bench.entered.recv_timeout(PATIENCE).unwrap();
    }
    for _ in 0..50 {
        assert_eq!(bench.ask("/quick"), 200);
        assert_eq!(bench.ask("/slow"), 503);
    }
    // Nothing was ended for it. All are let go first: which of them hears of it is not said.
    for _ in &at_work {
        bench.release.send(()).unwrap();
    }
    for stream in &mut at_work {
        assert_eq!(status(stream), 202);
    }
}

#[test]
fn what_is_refused_takes_no_thread() {
    let bench = Bench::start(NEVER);
    let mut refused: Vec<_> = (0..3 * THREADS_MAX)
        .map(|_| bench.send("GET  / HTTP/1.1\r\n\r\n"))
        .collect();
    for stream in &mut refused {
        assert_eq!(status(stream), 400);
    }
    assert_eq!(bench.acceptor.at_threads.load(super::Ordering::SeqCst), 0);
}

#[test]
fn a_thread_that_only_waits_for_a_sender_is_given_to_another() {
    let bench = Bench::start(NEVER);
    // What follows the last request is thrown away, for a second at most: both threads do that.
    let last = "GET /slow HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nmore";
    let mut last: Vec<_> = (0..THREADS_MAX).map(|_| bench.send(last)).collect();
    // Which of them hears of it is not said.
    for _ in &last {
        bench.entered.recv_timeout(PATIENCE).unwrap();
        bench.release.send(()).unwrap();
    }
    for stream in &mut last {
        assert_eq!(status(stream), 202);
    }
    wait_until(|| {
        let seats = bench.acceptor.seats();
        seats.iter().all(|seat| seat.state().0 == State::Reading)
    });
    for _ in 0..THREADS_MAX {
        let mut other = bench.send("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n");
        bench.entered.recv_timeout(PATIENCE).unwrap();
        bench.release.send(()).unwrap();
        assert_eq!(status(&mut other), 202);
    }
}

#[test]
fn a_request_that_is_not_whole_in_time_is_told_so() {
    let bench = Bench::start(Duration::from_millis(50));
    for beginning in [
        "G",
        "GET /quick HTTP/1.1\r\nHo",
        "\r\n",
        "GET /quick HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ] {
        let mut late = bench.send(beginning);
        assert_eq!(status(&mut late), 408, "{beginning:?}");
        assert!(rest(&mut late).contains("Connection: close\r\n"));
    }
}

#[test]
fn a_request_may_come_in_any_pieces_and_others_behind_it() {
    let bench = Bench::start(NEVER);
    let request = "GET /quick HTTP/1.1\r\nHost: h\r\n\r\n";
    let mut stream = bench.send("");
    stream.set_nodelay(true).unwrap();
    for byte in request.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    stream.write_all(request.repeat(2).as_bytes()).unwrap();
    stream.write_all(&request.as_bytes()[..10]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let text = rest(&mut stream);
    assert_eq!(text.matches("HTTP/1.1 200 ").count(), 3, "{text}");
    assert_eq!(text.matches("HTTP/1.1 400 ").count(), 1, "{text}");
    assert!(text.ends_with("cut short\n"), "{text}");
}

#[test]
fn the_front_keeps_no_more_of_a_request_than_it_has_room_for() {
    let bench = Bench::start(NEVER);
    let mut long = bench.send("GET /quick HTTP/1.1\r\nHost: h\r\n");
    let line = format!("X: {}\r\n", "a".repeat(1000));
    // Never whole. It may be reset before all is sent, and the answer with it.
    let _ = (0..60).all(|_| long.write_all(line.as_bytes()).is_ok());
    let mut start = [0; 12];
    match long.read_exact(&mut start) {
        Ok(()) => assert_eq!(&start, b"HTTP/1.1 431"),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    assert_eq!(bench.ask("/quick"), 200);
}

#[test]
fn who_has_only_just_connected_may_send_one_request_at_the_end() {
    let bench = Bench::start(NEVER);
    let request = "GET /quick HTTP/1.1\r\nHost: h\r\n\r\n";
    let mut answered = bench.send(request);
    assert_eq!(status(&mut answered), 200);
    let [mut new, mut silent] = [(); 2].map(|()| bench.send(""));
    wait_until(|| bench.acceptor.connections() == 3);
    bench.acceptor.leave();
    // One that was answered before is ended at once.
    assert!(rest(&mut answered).ends_with("\r\n\r\n"));
    wait_until(|| bench.acceptor.connections() == 2);
    new.write_all(request.as_bytes()).unwrap();
    assert_eq!(status(&mut new), 200);
    assert_eq!(rest(&mut silent), "");
    wait_until(|| bench.acceptor.connections() == 0);
}
