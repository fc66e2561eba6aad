//! A destination that records each request as it stood on the wire and answers as told.

use std::collections::HashMap;
use std::fmt;
use std::io::{BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use super::http::{Kind, Message};
pub use super::seen::Seen;

/// What to do with a request once it is recorded.
#[derive(Debug, Clone)]
pub struct Answer {
    status: u16,
    lines: Vec<String>,
    delay: Duration,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    KeepOpen,
    /// Close after the answer without announcing it, as an idle timeout would.
    Close,
    /// No answer: reset the connection.
    Reset,
    /// No answer: hold the connection.
    Hang,
    /// A body that does not end.
    Endless,
}

impl Answer {
    pub fn status(status: u16) -> Answer {
        Answer {
            status,
            lines: Vec::new(),
            delay: Duration::ZERO,
            then: Then::KeepOpen,
        }
    }

    pub fn ok() -> Answer {
        Answer::status(200)
    }

    pub fn hang() -> Answer {
        Answer::ok().then(Then::Hang)
    }

    pub fn reset() -> Answer {
        Answer::ok().then(Then::Reset)
    }

    pub fn endless() -> Answer {
        Answer::ok().then(Then::Endless)
    }

    pub fn closing(self) -> Answer {
        self.then(Then::Close)
    }

    pub fn line(mut self, line: &str) -> Answer {
        self.lines.push(line.to_owned());
        self
    }

    pub fn delay(self, delay: Duration) -> Answer {
        Answer { delay, ..self }
    }

    fn then(self, then: Then) -> Answer {
        Answer { then, ..self }
    }

    fn bytes(&self, method: &str) -> Vec<u8> {
        let mut bytes = format!("HTTP/1.1 {} Scripted\r\n", self.status);
        for line in &self.lines {
            bytes.push_str(line);
            bytes.push_str("\r\n");
        }
        bytes.push_str("Content-Length: 8\r\n\r\n");
        // RFC 9110 §9.3.2: what GET would be answered, without the body.
        if method != "HEAD" {
            bytes.push_str("recorded");
        }
        bytes.into_bytes()
    }
}

type Script = Arc<dyn Fn(&Seen) -> Answer + Send + Sync>;

/// An HTTP server on a port of its own, one thread per connection.
pub struct Destination {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Bound all the time, listening or not: nobody else gets the port.
    socket: Socket,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Destination").field(&self.address).finish()
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    script: Script,
    seen: Vec<Arc<Seen>>,
    open: HashMap<usize, TcpStream>,
    connections: usize,
    refusing: bool,
    /// Whether bodies are thrown away, for more of them than a test can hold.
    forgets_bodies: bool,
}

impl Shared {
    /// A failed test must not hide behind a poisoned lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Destination {
    /// Answers 200 at once until told otherwise.
    pub fn start() -> Destination {
        let mut destination = Destination::down();
        destination.open();
        destination
    }

    /// Starts with a script.
    pub fn answering(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Destination {
        let destination = Destination::start();
        destination.answer(script);
        destination
    }

    /// A destination that refuses connections until [`open`](Self::open).
    pub fn down() -> Destination {
        let chosen = bound((Ipv4Addr::LOCALHOST, 0).into());
        let address = chosen.local_addr().expect("address");
        // A port that was asked for by its number is kept when the listening ends.
        let socket = bound(address.as_socket().expect("address"));
        Destination {
            address: address.as_socket().expect("address"),
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    script: Arc::new(|_| Answer::ok()),
                    seen: Vec::new(),
                    open: HashMap::new(),
                    connections: 0,
                    refusing: true,
                    forgets_bodies: false,
                }),
                changed: Condvar::new(),
            }),
            acceptor: None,
            socket,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers what arrives from now on by `script`.
    pub fn answer(&self, script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) {
        self.shared.lock().script = Arc::new(script);
    }

    /// Records no body of what arrives from now on.
    pub fn forget_bodies(&self) {
        self.shared.lock().forgets_bodies = true;
    }

    /// Listens, on the same port as ever.
    pub fn open(&mut self) {
        assert!(self.acceptor.is_none(), "open only while it refuses");
        self.socket.listen(1024).expect("listen");
        let socket = self.socket.try_clone().expect("clone");
        self.shared.lock().refusing = false;
        let shared = Arc::clone(&self.shared);
        self.acceptor = Some(thread::spawn(move || accept(&shared, &socket.into())));
    }

    /// Breaks every connection and refuses new ones.
    pub fn refuse(&mut self) {
        self.close();
    }

    fn close(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        {
            let mut state = self.shared.lock();
            state.refusing = true;
            for (_, stream) in state.open.drain() {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
        // Ends the listening, and the acceptor with it.
        self.socket
            .shutdown(std::net::Shutdown::Read)
            .expect("shutdown");
        acceptor.join().expect("acceptor");
    }

    /// Everything that arrived so far, in order of arrival.
    pub fn seen(&self) -> Vec<Arc<Seen>> {
        self.shared.lock().seen.clone()
    }

    /// Waits until `n` requests have arrived.
    pub fn wait_for(&self, n: usize, timeout: Duration) -> Vec<Arc<Seen>> {
        self.wait_until(timeout, &format!("{n} requests"), |seen| seen.len() >= n)
    }

    /// Waits until what arrived so far satisfies `enough`; `what` names it on failure.
    pub fn wait_until(
        &self,
        timeout: Duration,
        what: &str,
        enough: impl Fn(&[Arc<Seen>]) -> bool,
    ) -> Vec<Arc<Seen>> {
        let (state, waited) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), timeout, |state| !enough(&state.seen))
            .unwrap_or_else(PoisonError::into_inner);
        let seen = state.seen.clone();
        drop(state);
        assert!(
            !waited.timed_out(),
            "waited {timeout:?} for {what}, {} arrived",
            seen.len()
        );
        seen
    }

    /// Waits until each number below `n` (see [`http::numbered`]) has arrived at least once.
    pub fn wait_for_numbers(&self, n: usize, timeout: Duration) -> Vec<Arc<Seen>> {
        self.wait_until(timeout, &format!("numbers 0..{n}"), |seen| {
            let mut missing = vec![true; n];
            seen.iter().for_each(|seen| missing[seen.number()] = false);
            !missing.contains(&true)
        })
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.close();
    }
}

fn bound(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&address.into()).expect("bind");
    socket
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut state = shared.lock();
        if state.refusing {
            return;
        }
        let stream = stream.expect("accept");
        let number = state.connections;
        state.connections += 1;
        state
            .open
            .insert(number, stream.try_clone().expect("clone"));
        drop(state);
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            serve(&shared, number, stream);
            shared.lock().open.remove(&number);
        });
    }
}

fn serve(shared: &Shared, number: usize, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut reader = BufReader::new(stream);
    while let Ok(Some(mut message)) = Message::read(&mut reader, Kind::Request) {
        if shared.lock().forgets_bodies {
            message.body = Vec::new();
        }
        let seen = Arc::new(Seen::new(message, number));
        let script = {
            let mut state = shared.lock();
            state.seen.push(Arc::clone(&seen));
            Arc::clone(&state.script)
        };
        shared.changed.notify_all();
        let answer = script(&seen);
        if !pause(shared, &answer) {
            return;
        }
        match answer.then {
            Then::Reset => {
                // Discarding the connection instead of closing it sends a reset. The copy kept
                // for `close` would hold it open.
                let _ = SockRef::from(reader.get_ref()).set_linger(Some(Duration::ZERO));
                return;
            }
            Then::Endless => return pour(reader.get_mut()),
            Then::KeepOpen | Then::Close | Then::Hang => {
                if reader
                    .get_mut()
                    .write_all(&answer.bytes(&seen.method))
                    .is_err()
                {
                    return;
                }
            }
        }
        if answer.then == Then::Close {
            return;
        }
    }
}

/// Sends an answer until nobody takes it any more.
fn pour(stream: &mut TcpStream) {
    let _ = stream.write_all(b"HTTP/1.1 200 Scripted\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = [b"1000\r\n".as_slice(), &[b'x'; 0x1000], b"\r\n"].concat();
    while stream.write_all(&chunk).is_ok() {}
}

/// Lets the answer's delay pass, however long; false if the destination closes meanwhile.
fn pause(shared: &Shared, answer: &Answer) -> bool {
    let delay = match answer.then {
        Then::Hang => Duration::MAX,
        _ => answer.delay,
    };
    let deadline = Instant::now().checked_add(delay);
    let mut state = shared.lock();
    while !state.refusing {
        let left = deadline.map_or(Duration::from_secs(3600), |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        if left.is_zero() {
            return true;
        }
        state = shared
            .changed
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
    false
}
