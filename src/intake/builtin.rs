//! The builtin acceptor: HTTP/1.1 and 1.0 on plain sockets, strict and bounded, for the open
//! network.
//!
//! One thread, the front, takes in connections, waits for all idle ones, and answers what can be
//! answered at once. A request that must be waited for (for its rest, or for the store) gets a
//! thread until it is answered, of at most `max_connections`. When all places are taken, new
//! connections wait in the kernel's backlog, and the front ends idle ones in their favour. Of a
//! service that limits its threads, the front itself waits for whole requests.

pub mod body;
mod connection;
mod front;
pub mod head;
mod quick;
mod seat;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use socket2::Socket;

use super::Answer;
use crate::budget::Permit;
use crate::logger::LogLimit;
use crate::progress::Stage;
use crate::thread::Threads;
use connection::{Link, Rest};
use front::{Front, Parked};
pub use head::{Framing, Head};
use seat::{Seat, State};

/// Threads that wait for a connection to be handed over, however long.
const THREADS_KEPT: usize = 2;
/// How long any other waits before it ends.
const THREAD_IDLE_MAX: Duration = Duration::from_secs(10);
/// See [`Times::moment`].
const BUSY_MOMENT: Duration = Duration::from_millis(100);
/// A request that has been coming in, or an answer that has been going out, for so long is ended
/// when others wait for its thread.
const HELD_MS_MAX: u64 = 1000;
/// Time for a thread whose connection was ended to close it.
const END_PAUSE: Duration = Duration::from_millis(2);
/// The same for one that leaves after its answer.
const ANSWER_PAUSE: Duration = Duration::from_millis(50);

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

    /// Most threads at a time. With a limit, a request gets one only once it is here in whole, and
    /// 503 if there is none. Without, there is one for each connection that needs it.
    fn threads_max(&self) -> Option<usize> {
        None
    }

    /// Answers a request, however long that takes.
    fn serve(&self, received: Received<'_>) -> Answer;

    /// Whether requests that come now are likely to be served quickly.
    fn is_quick(&self) -> bool {
        false
    }

    /// Answers a request if that takes no waiting. Else it has changed nothing, and the same
    /// request is served again.
    fn serve_quickly(&self, _received: Received<'_>) -> Option<Answer> {
        None
    }

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
    /// How long a connection keeps its thread after an answer.
    fn moment(&self) -> Duration {
        self.idle.min(BUSY_MOMENT)
    }
}

/// A connection on its way to a thread.
type Handover = (Link, Rest);

/// A listening socket and the threads that serve its connections.
pub struct Acceptor<S> {
    name: &'static str,
    listener: Socket,
    service: Arc<S>,
    times: Times,
    max_connections: usize,
    threads: Threads,
    parked: Parked,
    /// The front, at work while it looks at connections.
    stage: Arc<Stage>,
    /// Connections open now.
    open: Arc<AtomicUsize>,
    handed_over: (Sender<Handover>, Receiver<Handover>),
    seats: Mutex<Vec<Arc<Seat>>>,
    /// Connections that are at threads, or wait for one.
    at_threads: AtomicUsize,
    /// Threads that wait, less the connections that wait for them.
    free: AtomicIsize,
    started: AtomicUsize,
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
            parked: Parked::new()?,
            stage: Arc::default(),
            open: Arc::default(),
            // One place for each: never full.
            handed_over: bounded(max_connections),
            seats: Mutex::default(),
            at_threads: AtomicUsize::new(0),
            free: AtomicIsize::new(0),
            started: AtomicUsize::new(0),
            epoch: Instant::now(),
            is_closed: AtomicBool::new(false),
        });
        for _ in 0..THREADS_KEPT.min(max_connections) {
            acceptor.add_thread()?;
        }
        let front = Front::new(Arc::clone(&acceptor))?;
        threads.spawn(format!("{name}-front"), move || front.run())?;
        Ok(acceptor)
    }

    /// Accepts no more connections, closes idle ones at once and others after their answer; one that
    /// has not sent anything yet has a second for its first request.
    /// The service is to be draining before this is called.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // On Linux this refuses new connections.
        if let Err(error) = self.listener.shutdown(std::net::Shutdown::Both) {
            log::warn!(error:%; "cannot stop listening");
        }
        self.leave();
    }

    /// As [`Acceptor::close`], but for a listening socket that is others', too: new connections
    /// wait for whoever comes next.
    pub fn leave(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        self.parked.wake();
        for seat in self.seats().iter() {
            let seen = seat.state();
            if seen.0 == State::Idle && !seat.has_received() {
                seat.stop(seen);
            }
        }
    }

    /// The front, to be watched.
    pub fn stage(&self) -> &Arc<Stage> {
        &self.stage
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    fn seats(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the front itself waits for whole requests.
    fn waits_in_front(&self) -> bool {
        self.service.threads_max().is_some()
    }

    /// Whether one more connection may be handed over. Makes room for it, if it can be made at once.
    fn has_thread(&self) -> bool {
        let threads_max = self.service.threads_max().unwrap_or(usize::MAX);
        self.at_threads.load(Ordering::SeqCst) < threads_max || self.end_slow()
    }

    /// Gives a connection to a thread that is free, or to a new one.
    fn hand_over(self: &Arc<Self>, link: Link, rest: Rest) {
        self.at_threads.fetch_add(1, Ordering::SeqCst);
        if self.free.fetch_sub(1, Ordering::SeqCst) <= 0
            && let Err(error) = self.add_thread()
            && let Some(suppressed) = NO_THREAD.allow()
        {
            // It waits for one of those that are there.
            log::error!(error:%, suppressed; "no more threads for connections, see server.max_connections");
        }
        if self.handed_over.0.try_send((link, rest)).is_err() {
            self.at_threads.fetch_sub(1, Ordering::SeqCst);
            self.free.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let number = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        self.free.fetch_add(1, Ordering::SeqCst);
        let acceptor = Arc::clone(self);
        let name = format!("{}-{number}", self.name);
        let started = self
            .threads
            .spawn_spare(name, move || acceptor.run(number <= THREADS_KEPT));
        if started.is_err() {
            self.free.fetch_sub(1, Ordering::SeqCst);
        }
        started
    }

    /// Serves one connection after the other. Comes in, and waits, as a free thread.
    fn run(&self, is_kept: bool) {
        let seat = Arc::new(Seat::new(self.epoch));
        self.seats().push(Arc::clone(&seat));
        while let Some((link, rest)) = self.next(is_kept) {
            self.occupy(&seat, link, rest);
            self.at_threads.fetch_sub(1, Ordering::SeqCst);
            self.free.fetch_add(1, Ordering::SeqCst);
        }
        self.seats().retain(|other| !Arc::ptr_eq(other, &seat));
    }

    /// Waits for a connection; `None` when the thread is to end.
    fn next(&self, is_kept: bool) -> Option<Handover> {
        let waiting = &self.handed_over.1;
        loop {
            if is_kept {
                return waiting.recv().ok();
            }
            if let Ok(connection) = waiting.recv_timeout(THREAD_IDLE_MAX) {
                return Some(connection);
            }
            // In one step, so that nobody counts on it any more.
            let one_less = |free: isize| (free > 0).then(|| free - 1);
            let order = Ordering::SeqCst;
            if self.free.fetch_update(order, order, one_less).is_ok() {
                return None;
            }
        }
    }

    fn occupy(&self, seat: &Seat, link: Link, rest: Rest) {
        seat.take(&link.socket, link.opened_at);
        let served = catch_unwind(AssertUnwindSafe(|| {
            connection::serve(&*self.service, &self.times, link, rest, seat)
        }));
        seat.leave();
        match served {
            Ok(Some(idle)) => self.parked.park(idle, Instant::now()),
            Ok(None) => {}
            Err(_panic) => {
                if let Some(suppressed) = CONNECTION_PANICKED.allow() {
                    log::error!(suppressed; "a panic ended a connection: please report it");
                }
            }
        }
    }

    /// Ends one connection that keeps a thread, but not for a request that is being served: one that
    /// is idle or sends slowly, or one that has been slow to take its answer. Tells whether there was
    /// one; its thread is free then in no time.
    fn end_slow(&self) -> bool {
        let now = self.now();
        let seats = self.seats();
        let slowest = seats
            .iter()
            .filter(|seat| !seat.is_evicted())
            .map(|seat| (seat.state(), seat))
            .filter(|((state, since), _)| match state {
                State::Idle | State::Reading => true,
                State::Writing => now.saturating_sub(*since) >= HELD_MS_MAX,
                State::Busy => false,
            })
            .min_by_key(|(state, _)| *state);
        slowest.is_some_and(|(seen, seat)| seat.stop(seen))
    }

    /// Milliseconds since the epoch of all seats.
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Ends one connection that a thread is at: one whose sender has taken long to send its
    /// request or to take its answer, or else the one that has been here longest, after its
    /// answer. Returns how long to wait for what comes of it.
    fn end_one(&self) -> Duration {
        let now = self.now();
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
            return END_PAUSE;
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

#[cfg(test)]
mod tests;
