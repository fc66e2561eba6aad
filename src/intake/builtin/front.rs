//! The front: one thread that takes in connections, waits for all idle ones at once, and answers
//! whole requests that need not wait for anything. All else it hands over to a thread.
//!
//! Waking a thread for each request costs more than the request: this way, under load, one
//! thread is never asleep, and idle connections cost no stack.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::io::Errno;
use socket2::SockAddr;

use super::connection::{Link, Open, Rest};
use super::quick::{Begun, Cause, Quick, Visit};
use super::{Acceptor, CONNECTION_PANICKED, Service};
use crate::intake::Answer;
use crate::logger::LogLimit;

/// Events of one look, and connections taken in at once.
const EVENTS_MAX: usize = 64;
/// What events that are no connection's are known by.
const LISTENER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
/// How often connections are looked for that have been idle for too long.
const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_secs(1);
/// A connection is left so long to send its first or next request, whoever waits for its place.
const GRACE: Duration = Duration::from_millis(10);
/// The same where requests are waited for in here, and are looked for as soon as a connection is
/// taken in. What the places have room for in this time must be more than anybody opens: past that
/// the kernel's backlog overflows, and who is turned away there comes again after a second.
const GRACE_HERE: Duration = Duration::from_millis(1);
/// Pause after an error of `accept`: none of them is cured by asking again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// At the end, one who has only just connected is left so long to send a first request. Who has been
/// answered before knows that an idle connection may end at any time, and sends again.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

static ACCEPT_FAILED: LogLimit = LogLimit::new();
static NOT_WATCHED: LogLimit = LogLimit::new();

/// The connections that wait for their next request.
#[derive(Debug)]
pub(super) struct Parked {
    epoll: OwnedFd,
    wake: OwnedFd,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) by_descriptor: HashMap<RawFd, Idle>,
    is_closed: bool,
}

#[derive(Debug)]
pub(super) struct Idle {
    link: Link,
    since: Instant,
    /// If its next request has begun to come in.
    pub(super) begun: Option<Box<Begun>>,
}

impl Idle {
    /// Whether nothing has come in yet since it was taken in.
    fn is_silent(&self) -> bool {
        self.begun.is_none() && self.since == self.link.opened_at
    }

    /// When the request that is waited for is to be here.
    fn deadline(&self, request: Duration) -> Option<Instant> {
        self.begun.as_ref().map(|begun| begun.at + request)
    }
}

impl Parked {
    /// # Errors
    /// The system's.
    pub(super) fn new() -> io::Result<Parked> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(WAKE);
        epoll::add(&epoll, &wake, data, epoll::EventFlags::IN)?;
        Ok(Parked {
            epoll,
            wake,
            waiting: Mutex::default(),
        })
    }

    pub(super) fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a connection to the front, idle since then. Closes it when the front has closed.
    pub(super) fn park(&self, link: Link, since: Instant) {
        let mut waiting = self.waiting();
        if waiting.is_closed {
            return;
        }
        let descriptor = link.socket.as_raw_fd();
        let data = epoll::EventData::new_u64(u64::try_from(descriptor).unwrap_or(WAKE));
        // Told once for each arrival: what is told again and again costs a look each time.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        match epoll::add(&self.epoll, &link.socket, data, flags) {
            Ok(()) => {
                let idle = Idle {
                    link,
                    since,
                    begun: None,
                };
                waiting.by_descriptor.insert(descriptor, idle);
            }
            Err(error) => {
                if let Some(suppressed) = NOT_WATCHED.allow() {
                    log::error!(error:%, suppressed; "connection closed, it cannot be waited for");
                }
            }
        }
    }

    /// Makes the front look whether it shall close.
    pub(super) fn wake(&self) {
        // Fails only when it has been told 2^64 times.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// The thread's side.
pub(super) struct Front<S> {
    acceptor: Arc<Acceptor<S>>,
    quick: Quick,
    /// `None` while connections are taken in; else when to take them in again.
    listen_at: Option<Instant>,
    look_at: Option<Instant>,
    look: Duration,
}

impl<S: Service> Front<S> {
    /// # Errors
    /// The system's.
    pub(super) fn new(acceptor: Arc<Acceptor<S>>) -> io::Result<Front<S>> {
        // A connection that is gone before it is taken in must not hold up all others.
        acceptor.listener.set_nonblocking(true)?;
        let look = (acceptor.times.idle / 8).clamp(LOOK_MIN, LOOK_MAX);
        let front = Front {
            acceptor,
            quick: Quick::default(),
            listen_at: None,
            look_at: None,
            look,
        };
        front.listen()?;
        Ok(front)
    }

    fn listen(&self) -> io::Result<()> {
        let data = epoll::EventData::new_u64(LISTENER);
        let epoll = &self.acceptor.parked.epoll;
        Ok(epoll::add(
            epoll,
            &self.acceptor.listener,
            data,
            epoll::EventFlags::IN,
        )?)
    }

    /// Runs until the acceptor is closed.
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let stage = Arc::clone(self.acceptor.stage());
        loop {
            let timeout = self.timeout(Instant::now());
            let waited = self.wait(&mut events, timeout);
            if self.acceptor.is_closed() {
                return self.close(&mut events);
            }
            if let Err(error) = waited {
                log::error!(error:%; "connections cannot be waited for");
                return;
            }
            let _work = stage.work();
            for event in &events {
                match { event.data }.u64() {
                    LISTENER => self.accept(),
                    WAKE => {}
                    _ => self.visit_told(event),
                }
            }
            self.be_on_time(Instant::now());
        }
    }

    /// Waits for events, and leaves them in `events`.
    fn wait(&self, events: &mut Vec<epoll::Event>, timeout: Option<Duration>) -> Result<(), Errno> {
        events.clear();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let epoll = &self.acceptor.parked.epoll;
        match epoll::wait(epoll, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn visit_told(&mut self, event: &epoll::Event) {
        let cause = match { event.flags }.contains(epoll::EventFlags::RDHUP) {
            true => Cause::HungUp,
            false => Cause::Arrived,
        };
        let descriptor = RawFd::try_from({ event.data }.u64()).unwrap_or(-1);
        self.visit(descriptor, cause);
    }

    /// How long to wait for events: without open connections, as long as it takes.
    fn timeout(&mut self, now: Instant) -> Option<Duration> {
        if self.acceptor.connections() == 0 {
            self.look_at = None;
        } else {
            self.look_at.get_or_insert(now + self.look);
        }
        let next = [self.listen_at, self.look_at].into_iter().flatten().min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Does what is due by now.
    fn be_on_time(&mut self, now: Instant) {
        if self.listen_at.is_some_and(|at| at <= now) {
            self.listen_at = match self.listen() {
                Ok(()) => None,
                Err(_) => Some(now + ACCEPT_PAUSE),
            };
        }
        if self.look_at.is_some_and(|at| at <= now) {
            let times = self.acceptor.times.clone();
            let is_late = |idle: &Idle| idle.deadline(times.request).is_some_and(|at| at <= now);
            self.end_those(Cause::Late, is_late);
            let is_expired = |idle: &Idle| {
                idle.begun.is_none() && now.saturating_duration_since(idle.since) >= times.idle
            };
            self.end_those(Cause::Leaving, is_expired);
            let waiting = self.acceptor.parked.waiting();
            let idle = waiting.by_descriptor.values();
            self.look_at = idle.filter_map(|idle| idle.deadline(times.request)).min();
        }
    }

    /// Ends connections; what has arrived already is answered.
    fn end_those(&mut self, cause: Cause, which: impl Fn(&Idle) -> bool) {
        let waiting = self.acceptor.parked.waiting();
        let chosen = waiting.by_descriptor.iter();
        let chosen: Vec<RawFd> = chosen
            .filter(|(_, idle)| which(idle))
            .map(|(descriptor, _)| *descriptor)
            .collect();
        drop(waiting);
        for descriptor in chosen {
            self.visit(descriptor, cause);
        }
    }

    /// Ends what is idle; those who have only just connected after their first request.
    fn close(&mut self, events: &mut Vec<epoll::Event>) {
        let parked = &self.acceptor.parked;
        parked.waiting().is_closed = true;
        // Nobody looks at these any more, and they would be told of again and again.
        let _ = epoll::delete(&parked.epoll, &self.acceptor.listener);
        let _ = epoll::delete(&parked.epoll, &parked.wake);
        let deadline = Instant::now() + FIRST_REQUEST;
        loop {
            // Told once: what came with the news of the end is not told again.
            for event in events.iter() {
                self.visit_told(event);
            }
            self.end_those(Cause::Leaving, |idle| !idle.is_silent());
            let left = deadline.saturating_duration_since(Instant::now());
            let is_over = self.acceptor.parked.waiting().by_descriptor.is_empty();
            if is_over || left.is_zero() || self.wait(events, Some(left)).is_err() {
                break;
            }
        }
        self.end_those(Cause::Leaving, |_| true);
    }

    fn accept(&mut self) {
        for number in 0..EVENTS_MAX {
            if self.acceptor.connections() >= self.acceptor.max_connections {
                // The first is known to be there.
                if number > 0 && !self.has_waiting() {
                    return;
                }
                if let Some(pause) = self.make_room() {
                    return self.pause(pause);
                }
            }
            match self.acceptor.listener.accept() {
                Ok((socket, address)) => {
                    let link = Link {
                        socket: Arc::new(socket),
                        peer: SockAddr::as_socket(&address).map(|address| address.ip()),
                        opened_at: Instant::now(),
                        _open: Open::new(&self.acceptor.open),
                    };
                    let (descriptor, since) = (link.socket.as_raw_fd(), link.opened_at);
                    self.acceptor.parked.park(link, since);
                    if self.acceptor.waits_in_front() {
                        self.visit(descriptor, Cause::Arrived);
                    }
                }
                Err(error) => {
                    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
                    if matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
                        || self.acceptor.is_closed()
                    {
                        return;
                    }
                    // None of them ends the service.
                    if let Some(suppressed) = ACCEPT_FAILED.allow() {
                        log::error!(error:%, suppressed; "no connection can be accepted at the moment");
                    }
                    return self.pause(ACCEPT_PAUSE);
                }
            }
        }
    }

    fn has_waiting(&self) -> bool {
        let mut listener = [PollFd::new(&self.acceptor.listener, PollFlags::IN)];
        matches!(poll(&mut listener, Some(&Timespec::default())), Ok(1..))
    }

    /// Takes in no connections for a while.
    fn pause(&mut self, pause: Duration) {
        let acceptor = &self.acceptor;
        if epoll::delete(&acceptor.parked.epoll, &acceptor.listener).is_ok() {
            self.listen_at = Some(Instant::now() + pause);
        }
    }

    /// Ends one connection in favour of one that waits: the one whose request has been coming in
    /// here longest, the one that is idle longest, or else one that a thread is at. Returns how long
    /// to wait for what comes of it, if it is not over.
    fn make_room(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let grace = match self.acceptor.waits_in_front() {
            true => GRACE_HERE,
            false => GRACE,
        };
        let waiting = self.acceptor.parked.waiting();
        let idle = waiting.by_descriptor.iter();
        let slowest = idle
            .clone()
            .filter_map(|(descriptor, idle)| Some((idle.begun.as_ref()?.at, *descriptor)))
            .min();
        let longest = idle
            .map(|(descriptor, idle)| (now.saturating_duration_since(idle.since), *descriptor))
            .max();
        drop(waiting);
        let descriptor = match (slowest, longest) {
            (Some((_, descriptor)), _) => descriptor,
            (None, Some((idle_for, _))) if idle_for < grace => return Some(grace - idle_for),
            (None, Some((_, descriptor))) => descriptor,
            (None, None) => return Some(self.acceptor.end_one()),
        };
        self.visit(descriptor, Cause::Leaving);
        let is_over = self.acceptor.connections() < self.acceptor.max_connections;
        (!is_over).then(|| self.acceptor.end_one())
    }

    /// Looks at what a connection has received.
    fn visit(&mut self, descriptor: RawFd, cause: Cause) {
        let acceptor = &self.acceptor;
        let mut waiting = acceptor.parked.waiting();
        let Some(idle) = waiting.by_descriptor.get_mut(&descriptor) else {
            // Over since it was told of.
            return;
        };
        let (service, quick) = (&*acceptor.service, &mut self.quick);
        let begun = idle.begun.take();
        // What one connection sends must not end another.
        let visit = catch_unwind(AssertUnwindSafe(|| {
            quick.visit(service, &idle.link, begun, cause)
        }));
        match visit {
            Ok(Visit::Unchanged) => {}
            Ok(Visit::Served(at)) => idle.since = at,
            Ok(Visit::Begun(begun)) => {
                let deadline = begun.at + acceptor.times.request;
                idle.begun = Some(begun);
                self.look_at = Some(self.look_at.map_or(deadline, |at| at.min(deadline)));
            }
            Ok(Visit::Over) => {
                waiting.by_descriptor.remove(&descriptor);
            }
            Ok(Visit::HandOver(rest)) => {
                let idle = waiting.by_descriptor.remove(&descriptor);
                drop(waiting);
                if let Some(Idle { link, .. }) = idle {
                    self.hand_over(link, rest);
                }
            }
            Err(_panic) => {
                waiting.by_descriptor.remove(&descriptor);
                drop(waiting);
                self.quick = Quick::default();
                if let Some(suppressed) = CONNECTION_PANICKED.allow() {
                    log::error!(suppressed; "a panic ended a connection: please report it");
                }
            }
        }
    }

    /// Leaves a connection to a thread, if there may be one for it.
    fn hand_over(&mut self, link: Link, rest: Rest) {
        let acceptor = &self.acceptor;
        // Fails for nothing that is watched.
        let _ = epoll::delete(&acceptor.parked.epoll, &link.socket);
        if acceptor.has_thread() {
            acceptor.hand_over(link, rest);
        } else {
            self.quick
                .refuse(&*acceptor.service, &link, Answer::Overloaded);
        }
    }
}
