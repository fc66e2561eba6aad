//! Senders that keep the program busy and do not ask for more than it has room for.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::program::http;
use super::tally::Tally;

/// How long a sender waits when it was refused: a worker has still to take the next request.
const REFUSED: Duration = Duration::from_micros(200);

/// What senders do.
#[derive(Debug, Clone, Copy)]
pub struct Senders {
    /// Connections, kept open, with one request at a time each.
    pub connections: usize,
    /// Requests under way at most, from the sender's first byte to the destination's answer.
    pub window: usize,
    pub body_bytes: usize,
}

/// Running senders. They end when it is dropped.
pub struct Load {
    tally: Arc<Tally>,
    times: Arc<Mutex<Vec<Duration>>>,
    senders: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn start(to: SocketAddr, senders: Senders, tally: &Arc<Tally>) -> Load {
        let times = Arc::new(Mutex::new(Vec::new()));
        let body = vec![b'x'; senders.body_bytes];
        let request: Arc<[u8]> = http::request("POST", "/hook", &[], &body).into();
        let threads = (0..senders.connections).map(|_| {
            let (tally, times, request) =
                (Arc::clone(tally), Arc::clone(&times), Arc::clone(&request));
            thread::spawn(move || send(to, &request, senders.window, &tally, &times))
        });
        Load {
            senders: threads.collect(),
            tally: Arc::clone(tally),
            times,
        }
    }

    /// Forgets how long answers took so far.
    pub fn forget(&self) {
        lock(&self.times).clear();
    }

    /// The 99th percentile of the time to a sender's 200.
    pub fn p99(&self) -> Duration {
        let mut times = lock(&self.times).clone();
        times.sort_unstable();
        times
            .get(times.len() * 99 / 100)
            .copied()
            .unwrap_or_default()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.tally.end();
        for sender in self.senders.drain(..) {
            let sent = sender.join();
            assert!(sent.is_ok() || thread::panicking(), "a sender failed");
        }
    }
}

fn lock(times: &Mutex<Vec<Duration>>) -> std::sync::MutexGuard<'_, Vec<Duration>> {
    times.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(
    to: SocketAddr,
    request: &[u8],
    window: usize,
    tally: &Tally,
    times: &Mutex<Vec<Duration>>,
) {
    let mut stream = TcpStream::connect(to).expect("connect");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    let mut answer = [0; 4096];
    while tally.enter(window) {
        let sent_at = Instant::now();
        stream.write_all(request).expect("send");
        // An answer is small and comes in one piece.
        let bytes = stream.read(&mut answer).expect("an answer");
        if answer[..bytes].starts_with(b"HTTP/1.1 200 ") {
            lock(times).push(sent_at.elapsed());
        } else {
            let answer = String::from_utf8_lossy(&answer[..bytes]);
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            tally.leave();
            thread::sleep(REFUSED);
        }
    }
}
