//! What the connection a thread serves is at, for those who must choose one to end.

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use socket2::Socket;

use super::connection::has_received;

/// One thread's connection.
#[derive(Debug)]
pub(super) struct Seat {
    socket: Mutex<Option<Arc<Socket>>>,
    /// Milliseconds from `epoch` to the beginning of the state, and the state.
    state: AtomicU64,
    epoch: Instant,
    /// Whether the connection was ended in another's favour.
    is_evicted: AtomicBool,
    /// Whether it shall be closed after the answer it is at.
    is_asked_to_leave: AtomicBool,
    /// Milliseconds from `epoch` to the beginning of the connection.
    taken_at: AtomicU64,
}

/// What a connection is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum State {
    /// Waits for a request to begin.
    Idle,
    /// A request has begun to come in.
    Reading,
    /// An answer is being sent.
    Writing,
    /// A request is being served, or there is no connection.
    Busy,
}

const STATES: u64 = 4;

impl Seat {
    /// `epoch` is one for all seats.
    pub(super) fn new(epoch: Instant) -> Seat {
        let seat = Seat {
            socket: Mutex::default(),
            state: AtomicU64::default(),
            epoch,
            is_evicted: AtomicBool::new(false),
            is_asked_to_leave: AtomicBool::new(false),
            taken_at: AtomicU64::default(),
        };
        seat.serving();
        seat
    }

    pub(super) fn take(&self, socket: &Arc<Socket>, opened_at: Instant) {
        self.taken_at
            .store(self.milliseconds(opened_at), Ordering::SeqCst);
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(socket));
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.is_evicted.load(Ordering::SeqCst)
    }

    pub(super) fn leave(&self) {
        self.is_evicted.store(false, Ordering::SeqCst);
        self.is_asked_to_leave.store(false, Ordering::SeqCst);
        self.serving();
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn idle(&self) {
        self.enter(State::Idle, Instant::now());
    }

    pub(super) fn reading(&self, now: Instant) {
        self.enter(State::Reading, now);
    }

    pub(super) fn serving(&self) {
        // Nobody asks since when.
        self.enter(State::Busy, self.epoch);
    }

    pub(super) fn writing(&self) {
        self.enter(State::Writing, Instant::now());
    }

    /// When the connection began, if there is one that nobody has asked to leave yet.
    pub(super) fn taken_at(&self) -> Option<u64> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        (socket.is_some() && !self.is_asked_to_leave())
            .then(|| self.taken_at.load(Ordering::SeqCst))
    }

    pub(super) fn ask_to_leave(&self) {
        self.is_asked_to_leave.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_asked_to_leave(&self) -> bool {
        self.is_asked_to_leave.load(Ordering::SeqCst)
    }

    fn milliseconds(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.epoch);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX / STATES)
    }

    fn enter(&self, state: State, now: Instant) {
        let ms = self.milliseconds(now);
        // Who closes says so first and looks at the state then; here it is the other way round.
        self.state
            .store(ms * STATES + state as u64, Ordering::SeqCst);
    }

    /// The state, and since when (milliseconds).
    pub(super) fn state(&self) -> (State, u64) {
        let value = self.state.load(Ordering::SeqCst);
        let state = match value % STATES {
            0 => State::Idle,
            1 => State::Reading,
            2 => State::Writing,
            _ => State::Busy,
        };
        (state, value / STATES)
    }

    /// Whether a request has begun that the thread has not noticed yet.
    pub(super) fn has_received(&self) -> bool {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.as_deref().is_some_and(has_received)
    }

    /// Ends what the connection is at, if it is still at it: it receives no more, but what has
    /// arrived already is answered; or it sends no more. Tells whether it was.
    pub(super) fn stop(&self, seen: (State, u64)) -> bool {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that has gone on to another connection since had to come through this lock.
        let socket = socket.as_ref().filter(|_| self.state() == seen);
        if let Some(socket) = socket {
            let how = match seen.0 {
                State::Writing => Shutdown::Both,
                State::Idle | State::Reading | State::Busy => Shutdown::Read,
            };
            self.is_evicted.store(true, Ordering::SeqCst);
            // Fails only if the sender was faster.
            let _ = socket.shutdown(how);
        }
        socket.is_some()
    }
}
