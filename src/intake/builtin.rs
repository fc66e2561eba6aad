//! The builtin acceptor: HTTP/1.1 and 1.0 on plain sockets, strict and bounded, for the open
//! network.
//!
//! Each connection has a thread while it is open, of at most `max_connections`. Free threads
//! wait in `accept`, so that no connection is handed from one to another; when all are taken,
//! new connections wait in the kernel's backlog, and the steward ends idle ones in their favour.

pub mod body;
mod connection;
pub mod head;
mod seat;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{SockAddr, Socket, Type};

use super::Answer;
use crate::budget::Permit;
use crate::logger::LogLimit;
use crate::thread::Threads;
pub use head::{Framing, Head};
use seat::{Seat, State};

/// Free threads: fewer, and another is started; more, and one that becomes free ends. At most a
/// quarter of all, since each that waits in `accept` has its descriptor set aside already.
const SPARE_MIN: usize = 2;
const SPARE_MAX: usize = 64;
/// See [`Times::moment`].
const BUSY_MOMENT: Duration = Duration::from_millis(100);
/// Pause after an error of `accept`: none of them is cured by asking again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A request that has been coming in, or an answer that has been going out, for so long is ended
/// when others wait for its thread.
const HELD_MS_MAX: u64 = 1000;
/// Time for a thread whose connection was ended to take a waiting one.
const STEWARD_PAUSE: Duration = Duration::from_millis(2);
/// The same for one that leaves after its answer.
const ANSWER_PAUSE: Duration = Duration::from_millis(50);
const STEWARD_LOOK: Duration = Duration::from_secs(1);

static ACCEPT_FAILED: LogLimit = LogLimit::new();
static CONNECTION_PANICKED: LogLimit = LogLimit::new();
static NO_THREAD: LogLimit = LogLimit::new();

/// A request that was read whole.
#[derive(Debug)]
pub struct Received<'a> {
    pub head: &'a Head<'a, 'a>,
    pub peer: Option<IpAddr>,
    pub body: Vec<u8>,
    pub permit: Permit,
    /// When its head was there.
    pub started: Instant,
}

/// What is served over connections.
pub trait Service: Send + Sync + 'static {
    fn body_bytes_max(&self) -> usize;

    /// An empty permit, which grows with the body.
    fn permit(&self) -> Permit;

    fn serve(&self, received: Received<'_>) -> Answer;

    /// Told of each request that is refused before it is served.
    fn refuse(&self, answer: Answer) -> Answer;

    /// Whether connections shall be closed after their answer.
    fn is_draining(&self) -> bool;
}

/// How long connections may take.
#[derive(Debug, Clone)]
pub struct Times {
    /// A whole request from its first byte.
    pub request: Duration,
    /// Between requests.
    pub idle: Duration,
}

impl Times {
    /// How long a connection counts as busy after an answer, and holds its buffer.
    fn moment(&self) -> Duration {
        self.idle.min(BUSY_MOMENT)
    }
}

/// A listening socket and the threads that serve its connections.
pub struct Acceptor<S> {
    name: &'static str,
    listener: Socket,
    service: Arc<S>,
    times: Times,
    max_connections: usize,
    threads: Threads,
    seats: Mutex<Vec<Arc<Seat>>>,
    /// Threads that wait in `accept`, and all threads.
    spare: AtomicUsize,
    all: AtomicUsize,
    /// Tells the steward that no thread is free.
    full: (Sender<()>, Receiver<()>),
    epoch: Instant,
    is_closed: AtomicBool,
}

impl<S> fmt::Debug for Acceptor<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor")
            .field("name", &self.name)
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl<S: Service> Acceptor<S> {
    /// Begins to serve; `name` is that of its threads.
    ///
    /// # Errors
    /// The system's, when it gives no threads or refuses a socket option.
    pub fn start(
        name: &'static str,
        listener: Socket,
        service: Arc<S>,
        times: Times,
        max_connections: usize,
        threads: &Threads,
    ) -> io::Result<Arc<Acceptor<S>>> {
        // Accepted connections inherit these on Linux.
        listener.set_write_timeout(Some(times.request))?;
        if listener.local_addr()?.as_socket().is_some() {
            listener.set_tcp_nodelay(true)?;
            listener.set_keepalive(true)?;
        }
        let acceptor = Arc::new(Acceptor {
            name,
            listener,
            service,
            times,
            max_connections,
            threads: threads.clone(),
            seats: Mutex::default(),
            spare: AtomicUsize::new(0),
            all: AtomicUsize::new(0),
            full: bounded(1),
            epoch: Instant::now(),
            is_closed: AtomicBool::new(false),
        });
        for _ in 0..SPARE_MIN.min(max_connections) {
            acceptor.add_thread()?;
        }
        let steward = Arc::clone(&acceptor);
        threads.spawn(format!("{name}-steward"), move || steward.keep_room())?;
        Ok(acceptor)
    }

    /// Accepts no more connections, closes idle ones at once and others after their answer.
    /// The service is to be draining before this is called.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // On Linux this makes `accept` return, and refuses new connections.
        if let Err(error) = self.listener.shutdown(std::net::Shutdown::Both) {
            log::warn!(error:%; "cannot stop listening");
        }
        self.end_idle();
    }

    /// As [`Acceptor::close`], but for a listening socket that is others', too: new connections
    /// wait for whoever comes next.
    pub fn leave(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // Each ends one `accept`. One that goes to the next program is over before it begins.
        for _ in 0..self.spare.load(Ordering::SeqCst) {
            if let Err(error) = self.connect() {
                log::warn!(error:%; "cannot stop accepting");
                break;
            }
        }
        self.end_idle();
    }

    fn connect(&self) -> io::Result<()> {
        let address = self.listener.local_addr()?;
        let socket = Socket::new(address.domain(), Type::STREAM, None)?;
        socket.connect_timeout(&address, ACCEPT_PAUSE)
    }

    fn end_idle(&self) {
        let _ = self.full.0.try_send(());
        for seat in self.seats().iter() {
            let seen = seat.state();
            if seen.0 == State::Idle {
                seat.stop(seen);
            }
        }
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        let all = self.all.load(Ordering::Relaxed);
        all.saturating_sub(self.spare.load(Ordering::Relaxed))
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    fn seats(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one more thread, unless there are as many as connections are allowed.
    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let number = self.all.fetch_add(1, Ordering::Relaxed);
        if number >= self.max_connections {
            self.all.fetch_sub(1, Ordering::Relaxed);
            return Ok(());
        }
        self.spare.fetch_add(1, Ordering::SeqCst);
        let acceptor = Arc::clone(self);
        let name = format!("{}-{}", self.name, number + 1);
        let started = self.threads.spawn_spare(name, move || acceptor.run());
        if started.is_err() {
            self.spare.fetch_sub(1, Ordering::SeqCst);
            self.all.fetch_sub(1, Ordering::Relaxed);
        }
        started
    }

    /// Serves one connection after the other. Comes in, and waits, as a spare thread.
    fn run(self: &Arc<Self>) {
        let seat = Arc::new(Seat::new(self.epoch));
        self.seats().push(Arc::clone(&seat));
        let spare_max = (self.max_connections / 4).clamp(SPARE_MIN, SPARE_MAX);
        loop {
            if self.is_closed() {
                self.spare.fetch_sub(1, Ordering::SeqCst);
                break;
            }
            // In one step, so that not all can leave at once.
            let one_less = |spare: usize| (spare > spare_max).then(|| spare - 1);
            let order = Ordering::SeqCst;
            if self.spare.fetch_update(order, order, one_less).is_ok() {
                break;
            }
            match self.listener.accept() {
                Ok((socket, address)) => self.occupy(&seat, socket, &address),
                Err(error) => self.pause_after(&error),
            }
        }
        self.seats().retain(|other| !Arc::ptr_eq(other, &seat));
        self.all.fetch_sub(1, Ordering::Relaxed);
    }

    fn occupy(self: &Arc<Self>, seat: &Seat, socket: Socket, address: &SockAddr) {
        if self.spare.fetch_sub(1, Ordering::SeqCst) <= SPARE_MIN
            && let Err(error) = self.add_thread()
            && let Some(suppressed) = NO_THREAD.allow()
        {
            log::error!(error:%, suppressed; "no more threads for connections, see server.max_connections");
        }
        if self.spare.load(Ordering::SeqCst) == 0 {
            let _ = self.full.0.try_send(());
        }
        let socket = Arc::new(socket);
        seat.take(&socket);
        let peer = address.as_socket().map(|address| address.ip());
        let served = catch_unwind(AssertUnwindSafe(|| {
            connection::serve(&*self.service, &self.times, &socket, peer, seat);
        }));
        seat.leave();
        // Spare again before the connection is closed, and so before its end is seen.
        self.spare.fetch_add(1, Ordering::SeqCst);
        if served.is_err()
            && let Some(suppressed) = CONNECTION_PANICKED.allow()
        {
            log::error!(suppressed; "a panic ended a connection: please report it");
        }
    }

    /// No error of `accept` ends the service.
    fn pause_after(&self, error: &io::Error) {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        if self.is_closed() || matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
        {
            return;
        }
        if let Some(suppressed) = ACCEPT_FAILED.allow() {
            log::error!(error:%, suppressed; "no connection can be accepted at the moment");
        }
        std::thread::sleep(ACCEPT_PAUSE);
    }

    /// The steward: while connections wait and no thread is free, ends the one that is idle
    /// longest, or else one whose sender has taken long to send its request or to take its answer,
    /// or else asks the one that has been here longest to leave after its answer.
    fn keep_room(&self) {
        while self.full.1.recv().is_ok() && !self.is_closed() {
            while self.spare.load(Ordering::SeqCst) == 0 && !self.is_closed() {
                if self.has_waiting() {
                    std::thread::sleep(self.end_one());
                }
            }
        }
    }

    /// Whether a connection waits, or comes within a second.
    fn has_waiting(&self) -> bool {
        let mut listener = [PollFd::new(&self.listener, PollFlags::IN)];
        let look = Timespec::try_from(STEWARD_LOOK).ok();
        matches!(poll(&mut listener, look.as_ref()), Ok(1..))
    }

    /// Ends one connection; returns how long to wait for what comes of it.
    fn end_one(&self) -> Duration {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        let seats = self.seats();
        let longest = seats
            .iter()
            .map(|seat| (seat.state(), seat))
            .filter(|((state, since), _)| match state {
                State::Idle => true,
                State::Reading | State::Writing => now.saturating_sub(*since) >= HELD_MS_MAX,
                State::Busy => false,
            })
            .min_by_key(|(state, _)| *state);
        if let Some((seen, seat)) = longest {
            seat.stop(seen);
            return STEWARD_PAUSE;
        }
        // All are at work. Whoever has been here longest leaves after the next answer: one who
        // sends without pause would keep the place for ever.
        let first = seats
            .iter()
            .filter_map(|seat| Some((seat.taken_at()?, seat)))
            .filter(|(taken_at, _)| now.saturating_sub(*taken_at) >= HELD_MS_MAX)
            .min_by_key(|(taken_at, _)| *taken_at);
        if let Some((_, seat)) = first {
            seat.ask_to_leave();
        }
        ANSWER_PAUSE
    }
}
