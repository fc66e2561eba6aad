//! Writing to the file, one operation after the other.
//!
//! A disk may hang: then a sync never returns. So operations run on a thread of their own, and
//! whoever asked for one stops waiting after `db.timeout`. As long as one is out for longer than
//! that, nobody begins to wait: all are told at once. When it returns after all, the next is tried
//! as ever.
//!
//! To hand an operation over, and its result back, are two switches of threads, and on a busy
//! machine these take as long as the commit. Whoever may be stuck as long as the disk is runs it
//! where it is.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
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
    turns: OnceLock<Arc<Turns>>,
    /// Of the thread, once it has been started.
    jobs: Mutex<State>,
    threads: Threads,
}

#[derive(Debug)]
enum State {
    Idle,
    Started(Sender<Job>),
    Closed,
}

impl Executor {
    /// Starts no thread yet.
    pub(super) fn new(about: String, timeout: Duration) -> Executor {
        Executor {
            about,
            timeout,
            turns: OnceLock::new(),
            jobs: Mutex::new(State::Idle),
            threads: Threads::default(),
        }
    }

    /// Runs `operation` on the thread. If the caller has gone when it succeeds, `undo` gets the
    /// result nobody waits for. What is written with is made if it is not there.
    pub(super) fn run<T: Send + 'static>(
        &self,
        writing: impl FnOnce() -> Writing,
        operation: impl FnOnce(&mut Writing) -> Result<T, StoreError> + Send + 'static,
        undo: impl FnOnce(&mut Writing, T) + Send + 'static,
    ) -> Result<T, StoreError> {
        let turns = self.turns(writing)?;
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
        if self.jobs(turns)?.send_deadline(job, deadline).is_err() {
            return Err(self.gave_up(turns));
        }
        answered.recv_deadline(deadline).unwrap_or_else(|error| {
            caller_has_gone.store(true, Ordering::Release);
            match error {
                RecvTimeoutError::Timeout => Err(self.gave_up(turns)),
                RecvTimeoutError::Disconnected => {
                    Err(StoreError::Refused("the operation panicked".into()))
                }
            }
        })
    }

    /// Runs `operation` where it is called. Waits for its turn no longer than `db.timeout`, but as
    /// long as the disk takes; others see that it [`hangs`](Executor::hangs).
    pub(super) fn run_here<T>(
        &self,
        writing: impl FnOnce() -> Writing,
        operation: impl FnOnce(&mut Writing) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let turns = self.turns(writing)?;
        // It looks after the file in between.
        self.jobs(turns)?;
        match turns.take_until(Instant::now() + self.timeout) {
            Some(mut turn) => operation(&mut turn.writing),
            None => Err(self.gave_up(turns)),
        }
    }

    /// Why there is no answer to be waited for, if so.
    pub(super) fn hangs(&self) -> Option<StoreError> {
        let hangs = self.turns.get()?.hang(self.timeout);
        hangs.then(|| self.unanswered())
    }

    /// Ends the thread, which is waited for until the deadline; nothing is run any more.
    pub(super) fn close(&self, deadline: Instant) {
        *self.state() = State::Closed;
        if self.hangs().is_none() {
            self.threads.wait_for("sqlite", deadline);
        }
    }

    pub(super) fn is_started(&self) -> bool {
        matches!(*self.state(), State::Started(_))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turns(&self, writing: impl FnOnce() -> Writing) -> Result<&Arc<Turns>, StoreError> {
        let turns = self.turns.get_or_init(|| Arc::new(Turns::of(writing())));
        self.hangs().map_or(Ok(turns), Err)
    }

    fn jobs(&self, turns: &Arc<Turns>) -> Result<Sender<Job>, StoreError> {
        let mut state = self.state();
        match &*state {
            State::Closed => {
                return Err(StoreError::Unavailable(format!("{}: closed", self.about)));
            }
            State::Started(jobs) => return Ok(jobs.clone()),
            State::Idle => {}
        }
        let (sender, jobs) = bounded(JOBS_MAX);
        let turns = Arc::clone(turns);
        self.threads
            .spawn("sqlite", move || serve(&jobs, &turns))
            .map_err(|error| StoreError::Unavailable(format!("no thread for it: {error}")))?;
        *state = State::Started(sender.clone());
        Ok(sender)
    }

    fn gave_up(&self, turns: &Turns) -> StoreError {
        turns.give_up();
        self.unanswered()
    }

    fn unanswered(&self) -> StoreError {
        let Executor { about, timeout, .. } = self;
        let why = format!("{about}: no answer within {timeout:?}, its disk may hang");
        StoreError::Unavailable(why)
    }
}

/// The thread: runs what it is asked to, and looks after the file in between.
fn serve(jobs: &Receiver<Job>, turns: &Turns) {
    let mut look_at = Instant::now();
    loop {
        let job = match jobs.recv_deadline(look_at) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Some(mut turn) = turns.take() else {
            return;
        };
        // Whoever asked for it is told. The connection is gone with it, and opened anew.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            if let Some(job) = job {
                job(&mut turn.writing);
            }
            if turn.writing.look_at() <= Instant::now() {
                turn.writing.look();
            }
        }));
        look_at = turn.writing.look_at();
    }
}

/// Who writes: one at a time.
#[derive(Debug)]
struct Turns {
    writing: Mutex<Writing>,
    /// Whoever has what is in here may lock that: a lock cannot be waited for with a limit.
    free: (Sender<()>, Receiver<()>),
    at: Mutex<At>,
}

/// What whoever writes is at.
#[derive(Debug, Default)]
struct At {
    since: Option<Instant>,
    /// Somebody has waited for it in vain.
    hangs: bool,
}

impl Turns {
    fn of(writing: Writing) -> Turns {
        let turns = Turns {
            writing: Mutex::new(writing),
            free: bounded(1),
            at: Mutex::default(),
        };
        turns.end();
        turns
    }

    fn at(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Turn<'_>> {
        self.free.1.recv().ok().map(|()| self.begin())
    }

    fn take_until(&self, deadline: Instant) -> Option<Turn<'_>> {
        let taken = self.free.1.recv_deadline(deadline);
        taken.ok().map(|()| self.begin())
    }

    fn begin(&self) -> Turn<'_> {
        self.at().since = Some(Instant::now());
        let writing = self.writing.lock();
        Turn {
            turns: self,
            writing: writing.unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn end(&self) {
        *self.at() = At::default();
        // There is one, and it was taken.
        let _ = self.free.0.try_send(());
    }

    fn give_up(&self) {
        let mut at = self.at();
        at.hangs = at.since.is_some();
    }

    fn hang(&self, timeout: Duration) -> bool {
        let at = self.at();
        at.hangs || at.since.is_some_and(|since| since.elapsed() >= timeout)
    }
}

/// Ends when dropped, by a panic, too.
struct Turn<'a> {
    turns: &'a Turns,
    writing: MutexGuard<'a, Writing>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.end();
    }
}

#[cfg(test)]
mod tests {
    use super::super::SqliteStore;
    use super::*;

    fn store(timeout: Duration) -> (tempfile::TempDir, SqliteStore) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        (directory, SqliteStore::new(path, true, timeout))
    }

    fn here<T>(
        store: &SqliteStore,
        operation: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let writing = || Writing::new(Arc::clone(&store.shared));
        store.executor.run_here(writing, |_| operation())
    }

    fn there<T: Send + 'static>(
        store: &SqliteStore,
        operation: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let writing = || Writing::new(Arc::clone(&store.shared));
        store.executor.run(writing, |_| operation(), |_, _: T| {})
    }

    #[test]
    fn an_operation_that_hangs_where_it_is_run_is_seen_by_all_until_it_returns() {
        let (_directory, store) = store(Duration::from_millis(50));
        let (release, is_released) = bounded::<()>(0);
        std::thread::scope(|scope| {
            let stuck = scope.spawn(|| here(&store, || Ok(is_released.recv().is_err())));
            while store.executor.hangs().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let refused = Err(store.executor.unanswered());
            assert_eq!(here(&store, || Ok(())), refused);
            assert_eq!(there(&store, || Ok(())), refused);
            assert_eq!(store.executor.hangs(), Some(store.executor.unanswered()));
            drop(release);
            assert_eq!(stuck.join().unwrap(), Ok(true));
        });
        assert_eq!(store.executor.hangs(), None);
    }

    #[test]
    fn an_operation_that_panics_ends_its_own_turn_only() {
        let (_directory, store) = store(Duration::from_secs(60));
        let panics = || -> Result<(), StoreError> { panic!("expected by this test") };
        let caught = catch_unwind(AssertUnwindSafe(|| here(&store, panics)));
        assert!(caught.is_err());
        assert_eq!(here(&store, || Ok(1)), Ok(1));
        let panicked = there(&store, panics);
        assert!(
            matches!(panicked, Err(StoreError::Refused(_))),
            "{panicked:?}"
        );
        assert_eq!(there(&store, || Ok(2)), Ok(2));
        assert_eq!(here(&store, || Ok(3)), Ok(3));
    }
}
