//! Many hostile senders.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What a hostile sender begins with, and then sends forever, a byte at a time.
#[derive(Debug, Clone, Copy)]
pub enum Manner {
    Head,
    Body,
    Idle,
}

impl Manner {
    pub fn start(self) -> &'static [u8] {
        match self {
            Manner::Head => b"POST /hostile HTTP/1.1\r\nHost: h\r\nX: ",
            Manner::Body => b"POST /hostile HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n",
            Manner::Idle => b"",
        }
    }
}

/// Hostile senders, all of one thread. Who is closed comes again.
pub struct Crowd {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// How often all of them have sent.
    rounds: AtomicUsize,
    /// How often one was closed.
    closed: AtomicUsize,
}

impl Crowd {
    /// Returns when all are connected and have begun.
    pub fn gather(to: SocketAddr, manners: &[(Manner, usize)]) -> Crowd {
        let shared: Arc<Shared> = Arc::default();
        let mut senders: Vec<_> = manners
            .iter()
            .flat_map(|(manner, count)| vec![*manner; *count])
            .map(|manner| (manner, begin(to, manner)))
            .collect();
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    for (manner, stream) in &mut senders {
                        if is_over(stream, *manner) {
                            shared.closed.fetch_add(1, Ordering::Relaxed);
                            *stream = begin(to, *manner);
                        }
                    }
                    shared.rounds.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Crowd {
            shared,
            thread: Some(thread),
        }
    }

    pub fn rounds(&self) -> usize {
        self.shared.rounds.load(Ordering::Relaxed)
    }

    pub fn closed(&self) -> usize {
        self.shared.closed.load(Ordering::Relaxed)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("thread").join();
        assert!(ended.is_ok() || thread::panicking(), "the crowd failed");
    }
}

fn begin(to: SocketAddr, manner: Manner) -> TcpStream {
    let mut stream = TcpStream::connect(to).expect("connect");
    stream.set_nonblocking(true).expect("O_NONBLOCK");
    // Whatever became of it shows later.
    let _ = stream.write(manner.start());
    stream
}

/// Sends one more byte; whether the other side has closed.
fn is_over(stream: &mut TcpStream, manner: Manner) -> bool {
    let waits = |error: &std::io::Error| error.kind() == ErrorKind::WouldBlock;
    if !matches!(manner, Manner::Idle) && stream.write(b"a").is_err_and(|error| !waits(&error)) {
        return true;
    }
    !matches!(stream.read(&mut [0; 1024]), Err(error) if waits(&error))
}
