//! The thread that writes to the file, one operation after the other.
//!
//! A disk may hang: then a sync never returns. Whoever asks for an operation stops waiting after
//! `db.timeout`, and as long as that operation is still out, nobody waits any more: the others are
//! told at once. When it returns after all, the next operation is tried as ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendError, Sender, bounded};

use super::super::StoreError;
use super::writing::Writing;
use crate::thread::Threads;

/// Operations that wait: one of each thread that uses the store.
const JOBS_MAX: usize = 64;

type Job = Box<dyn FnOnce(&mut Writing) + Send>;

/// The side of those who ask.
#[derive(Debug)]
pub(super) struct Executor {
    /// The file, for errors.
    about: String,
    timeout: Duration,
    /// Of the thread, once it has been started.
    jobs: Mutex<State>,
    turn: Arc<Mutex<Turn>>,
    threads: Threads,
}

#[derive(Debug)]
enum State {
    Idle,
    Started(Sender<Job>),
    Closed,
}

/// What the thread is at.
#[derive(Debug, Default)]
struct Turn {
    is_busy: bool,
    /// Somebody has waited for it in vain.
    hangs: bool,
}

impl Executor {
    /// Starts no thread yet.
    pub(super) fn new(about: String, timeout: Duration) -> Executor {
        Executor {
            about,
            timeout,
            jobs: Mutex::new(State::Idle),
            turn: Arc::default(),
            threads: Threads::default(),
        }
    }

    /// Runs `operation` on the thread, which `writing` is made for if it is not there. If the caller
    /// has gone when it succeeds, `undo` gets the result nobody waits for.
    pub(super) fn run<T: Send + 'static>(
        &self,
        writing: impl FnOnce() -> Writing,
        operation: impl FnOnce(&mut Writing) -> Result<T, StoreError> + Send + 'static,
        undo: impl FnOnce(&mut Writing, T) + Send + 'static,
    ) -> Result<T, StoreError> {
        if turn(&self.turn).hangs {
            return Err(self.unanswered());
        }
        let deadline = Instant::now() + self.timeout;
        // Without buffer: the result is either taken or known not to be.
        let (answer, answered) = bounded(0);
        let caller_has_gone = Arc::new(AtomicBool::new(false));
        let has_gone = Arc::clone(&caller_has_gone);
        let job: Job = Box::new(move |writing| {
            if has_gone.load(Ordering::Acquire) {
                return;
            }
            let result = operation(writing);
            if let Err(SendError(Ok(unwanted))) = answer.send(result) {
                undo(writing, unwanted);
            }
        });
        if self.jobs(writing)?.send_deadline(job, deadline).is_err() {
            return Err(self.gave_up());
        }
        answered.recv_deadline(deadline).unwrap_or_else(|error| {
            caller_has_gone.store(true, Ordering::Release);
            match error {
                RecvTimeoutError::Timeout => Err(self.gave_up()),
                RecvTimeoutError::Disconnected => {
                    Err(StoreError::Refused("the operation panicked".into()))
                }
            }
        })
    }

    /// Ends the thread, which is waited for until the deadline; nothing is run any more.
    pub(super) fn close(&self, deadline: Instant) {
        *self.state() = State::Closed;
        if !turn(&self.turn).hangs {
            self.threads.wait_for("sqlite", deadline);
        }
    }

    pub(super) fn is_started(&self) -> bool {
        matches!(*self.state(), State::Started(_))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn jobs(&self, writing: impl FnOnce() -> Writing) -> Result<Sender<Job>, StoreError> {
        let mut state = self.state();
        match &*state {
            State::Closed => {
                return Err(StoreError::Unavailable(format!("{}: closed", self.about)));
            }
            // One that panicked has ended.
            State::Started(jobs) if !self.threads.all_ended("sqlite") => return Ok(jobs.clone()),
            State::Started(_) | State::Idle => {}
        }
        let (sender, jobs) = bounded(JOBS_MAX);
        let (turn, writing) = (Arc::clone(&self.turn), writing());
        self.threads
            .spawn("sqlite", move || serve(&jobs, &turn, writing))
            .map_err(|error| StoreError::Unavailable(format!("no thread for it: {error}")))?;
        *state = State::Started(sender.clone());
        Ok(sender)
    }

    fn gave_up(&self) -> StoreError {
        let mut turn = turn(&self.turn);
        turn.hangs = turn.is_busy;
        self.unanswered()
    }

    fn unanswered(&self) -> StoreError {
        let Executor { about, timeout, .. } = self;
        let why = format!("{about}: no answer within {timeout:?}, its disk may hang");
        StoreError::Unavailable(why)
    }
}

fn turn(turn: &Mutex<Turn>) -> MutexGuard<'_, Turn> {
    turn.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread: runs what it is asked to, and looks after the file in between.
fn serve(jobs: &Receiver<Job>, turn: &Mutex<Turn>, mut writing: Writing) {
    loop {
        let job = jobs.recv_deadline(writing.look_at());
        let _busy = Busy::begin(turn);
        match job {
            Ok(job) => job(&mut writing),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if writing.look_at() <= Instant::now() {
            writing.look();
        }
    }
}

/// The thread is at something, until dropped.
struct Busy<'a>(&'a Mutex<Turn>);

impl Busy<'_> {
    fn begin(of: &Mutex<Turn>) -> Busy<'_> {
        turn(of).is_busy = true;
        Busy(of)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        *turn(self.0) = Turn::default();
    }
}
