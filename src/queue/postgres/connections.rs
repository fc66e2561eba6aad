//! The pool of connections, and the threads that use them.
//!
//! A limit set on the session would be lost or leak behind PgBouncer in transaction mode. So each
//! operation runs on a thread of this module, and its caller stops waiting after `db.timeout`. The
//! statement is then cancelled, and its connection thrown away, at the latest after [`GRACE`], when
//! the socket's own limit is over: so no thread stays with a server that does not answer, and there
//! are never more of either than `db.max_connections`.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::postgres::CancelToken;
use ::postgres::error::SqlState;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use r2d2::{NopErrorHandler, Pool};

use super::super::{BATCH_BYTES_MAX, StoreError};
use super::errors::{Fault, Remedy, describe, is_broken};
use super::hosts::{Hosts, Link};
use super::schema;
use super::session::Session;
use super::stream::{Connector, Limit, Security};
use crate::config::PostgresServer;
use crate::thread::Threads;

/// Longest wait for a free connection: while the server is down nobody waits longer.
const CHECKOUT_TIMEOUT_MAX: Duration = Duration::from_secs(1);
/// How long an operation that nobody waits for any more may take to end by being cancelled.
const GRACE: Duration = Duration::from_secs(1);
/// For asking the server to cancel, on a connection of its own.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a server may say nothing while the schema is changed.
const MIGRATION_SILENCE: Duration = Duration::from_secs(60);
/// How often an operation is tried again that met another in the server, and the pause before,
/// which grows with each.
const AGAIN_MAX: u32 = 6;
const AGAIN_PAUSE: Duration = Duration::from_millis(5);

/// The client library keeps the buffers of the largest operation: one for what it sends, one on the
/// way to the socket and one for what it gets. A connection that has carried more, so one large
/// request, is closed.
const KEPT_BYTES_MAX: usize = BATCH_BYTES_MAX;

type Job = Box<dyn FnOnce(&Shared) + Send>;

/// Runs operations on pooled connections, each within a time limit.
pub(super) struct Connections {
    shared: Arc<Shared>,
    /// For cancelling.
    security: Security,
    /// Without buffer: a job is taken by a thread that is free, or not at all.
    jobs: (Sender<Job>, Receiver<Job>),
    threads: Mutex<Threads>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").finish_non_exhaustive()
    }
}

impl Connections {
    /// Connects to nothing yet.
    pub(super) fn new(server: &PostgresServer, max: u32, timeout: Duration) -> Connections {
        let max = max.max(1);
        let checkout = timeout
            .min(CHECKOUT_TIMEOUT_MAX)
            .max(Duration::from_millis(1));
        let hosts = Hosts::new(server, timeout);
        let last_error = Arc::clone(&hosts.last_error);
        let asks_isolation = Arc::clone(&hosts.asks_isolation);
        let security = hosts.security();
        let pool = Pool::builder()
            .max_size(max)
            .min_idle(Some(0))
            .connection_timeout(checkout)
            // Costs no round trip: see there.
            .test_on_check_out(true)
            .error_handler(Box::new(NopErrorHandler))
            .build_unchecked(hosts);
        Connections {
            shared: Arc::new(Shared {
                pool,
                last_error,
                asks_isolation,
                max,
                migrates: AtomicBool::new(true),
                migrated: AtomicBool::new(false),
                turn: Turn::new(),
            }),
            security,
            jobs: bounded(0),
            threads: Mutex::default(),
        }
    }

    /// From now on the schema is only looked at.
    pub(super) fn never_migrate(&self) {
        self.shared.migrates.store(false, Ordering::Release);
    }

    /// Runs `operation` for `timeout` at most, again on another connection if the one it got had died while idle: so
    /// it must be one that may be repeated. It may succeed when the caller has gone.
    pub(super) fn run<T: Send + 'static>(
        &self,
        timeout: Duration,
        operation: impl Fn(&mut Session) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + timeout;
        // Without buffer: the result is either taken or known not to be.
        let (answer, answered) = bounded(0);
        let caller = Arc::new(Caller::until(deadline));
        let job = {
            let caller = Arc::clone(&caller);
            Box::new(move |shared: &Shared| {
                // The caller may have gone.
                let _ = answer.send(shared.run(&operation, &caller));
            })
        };
        self.hand_over(job, deadline)?;
        answered
            .recv_deadline(deadline)
            .unwrap_or_else(|error| match error {
                RecvTimeoutError::Timeout => {
                    if let Some(token) = caller.leave() {
                        self.cancel(token);
                    }
                    let why = format!("no answer within {timeout:?}");
                    Err(StoreError::Unavailable(why))
                }
                RecvTimeoutError::Disconnected => {
                    Err(StoreError::Refused("the operation panicked".into()))
                }
            })
    }

    /// Why there is no connection to the server, if the last try to make one has failed.
    pub(super) fn cannot_connect(&self) -> Option<StoreError> {
        let last_error = self.shared.last_error.lock();
        let last_error = last_error.unwrap_or_else(PoisonError::into_inner);
        last_error.clone().map(StoreError::Unavailable)
    }

    /// Asks the server to end a statement, and does not wait for it. The thread at the statement
    /// soon ends, too, so there are about as many of these at most.
    fn cancel(&self, token: CancelToken) {
        let connector = Connector {
            security: self.security.clone(),
            limit: Limit::until(Instant::now() + CANCEL_TIMEOUT),
        };
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a thread or a connection for it the statement goes on: nobody waits for it.
        let _ = threads.spawn_spare("postgres-cancel".to_owned(), move || {
            let _ = token.cancel_query(connector);
        });
    }

    fn hand_over(&self, job: Job, deadline: Instant) -> Result<(), StoreError> {
        let job = match self.jobs.0.try_send(job) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
        };
        self.add_thread()?;
        self.jobs
            .0
            .send_deadline(job, deadline)
            .map_err(|_| StoreError::Unavailable("no free connection in time".into()))
    }

    /// Starts one more thread, unless there are as many as connections.
    fn add_thread(&self) -> Result<(), StoreError> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        // Each thread that runs holds one.
        let running = Arc::strong_count(&self.shared) - 1;
        if running >= self.shared.max as usize {
            return Ok(());
        }
        let (shared, jobs) = (Arc::clone(&self.shared), self.jobs.1.clone());
        threads
            .spawn(format!("postgres-{}", running + 1), move || {
                for job in jobs {
                    job(&shared);
                }
            })
            .map_err(|error| StoreError::Unavailable(format!("no thread for it: {error}")))
    }
}

/// Whoever waits for an operation.
struct Caller {
    deadline: Instant,
    has_gone: AtomicBool,
    /// How to cancel the statement that runs for them.
    running: Mutex<Option<CancelToken>>,
}

impl Caller {
    fn until(deadline: Instant) -> Caller {
        Caller {
            deadline,
            has_gone: AtomicBool::new(false),
            running: Mutex::default(),
        }
    }

    /// What still waits for a connection then does not begin. Returns how to end what has begun.
    fn leave(&self) -> Option<CancelToken> {
        self.has_gone.store(true, Ordering::Release);
        self.set_running(None)
    }

    fn set_running(&self, token: Option<CancelToken>) -> Option<CancelToken> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *running, token)
    }

    fn has_gone(&self) -> bool {
        self.has_gone.load(Ordering::Acquire)
    }
}

/// One after the other, each waiting for the turn before it for a limited time.
struct Turn(Sender<()>, Receiver<()>);

impl Turn {
    fn new() -> Turn {
        let (give, take) = bounded(1);
        let _ = give.send(());
        Turn(give, take)
    }

    /// Held until what it returns is dropped.
    fn take(&self, deadline: Instant) -> Option<impl Drop> {
        struct Taken<'a>(&'a Sender<()>);
        impl Drop for Taken<'_> {
            fn drop(&mut self) {
                let _ = self.0.try_send(());
            }
        }
        self.1.recv_deadline(deadline).ok()?;
        Some(Taken(&self.0))
    }
}

/// What the threads have in common.
struct Shared {
    pool: Pool<Hosts>,
    last_error: Arc<Mutex<Option<String>>>,
    /// See [`Session`].
    asks_isolation: Arc<AtomicBool>,
    max: u32,
    /// Whether the schema may be changed; else it must be right.
    migrates: AtomicBool,
    migrated: AtomicBool,
    /// To look at the schema.
    turn: Turn,
}

impl Shared {
    fn run<T>(
        &self,
        operation: &dyn Fn(&mut Session) -> Result<T, Fault>,
        caller: &Caller,
    ) -> Result<T, StoreError> {
        let asked_at = Instant::now();
        // A restarted server leaves a whole pool of dead connections behind.
        let (mut dead, mut met, mut has_migrated) = (0, 0, false);
        loop {
            let mut link = self.pool.get().map_err(|_| self.no_connection())?;
            let fault = match self.perform(&mut link, operation, caller) {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            link.broken |= is_broken(&fault);
            if fault.is_of_host() {
                link.leave_host();
            } else if link.broken && link.opened_at < asked_at && dead < self.max {
                dead += 1;
                continue;
            }
            match fault.remedy() {
                Remedy::Again if met < AGAIN_MAX => {
                    met += 1;
                    // At READ COMMITTED there is no such fault: the level is another one's.
                    if fault.is_code(&SqlState::T_R_SERIALIZATION_FAILURE) {
                        self.asks_isolation.store(true, Ordering::Relaxed);
                    }
                    drop(link);
                    let pause = met * AGAIN_PAUSE.mul_f64(fastrand::f64());
                    if Instant::now() + pause < caller.deadline {
                        std::thread::sleep(pause);
                        continue;
                    }
                }
                Remedy::Migrate => {
                    self.migrated.store(false, Ordering::Release);
                    if !has_migrated {
                        has_migrated = true;
                        continue;
                    }
                }
                Remedy::Again | Remedy::None => {}
            }
            return Err(describe(fault));
        }
    }

    /// One try, on one connection.
    fn perform<T>(
        &self,
        link: &mut Link,
        operation: &dyn Fn(&mut Session) -> Result<T, Fault>,
        caller: &Caller,
    ) -> Result<T, Fault> {
        self.ensure_migrated(link, caller)?;
        if caller.has_gone() {
            return Err(Fault::Store(self.no_connection()));
        }
        link.limit.set(caller.deadline + GRACE);
        caller.set_running(Some(link.session.cancel_token()));
        let result = operation(&mut link.session);
        link.broken |= link.session.take_carried() > KEPT_BYTES_MAX;
        caller.set_running(None);
        link.limit.lift();
        // Then it is being cancelled, which must not reach the next that uses the connection.
        link.broken |= caller.has_gone();
        result
    }

    fn ensure_migrated(&self, link: &mut Link, caller: &Caller) -> Result<(), Fault> {
        if self.migrated.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(_turn) = self.turn.take(caller.deadline) else {
            let why = "the schema is still being looked at".to_owned();
            return Err(Fault::Store(StoreError::Unavailable(why)));
        };
        if !self.migrated.load(Ordering::Acquire) {
            link.limit.set(caller.deadline + GRACE);
            let result = self.migrate(link);
            link.limit.lift();
            result?;
            self.migrated.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn migrate(&self, link: &mut Link) -> Result<(), Fault> {
        let server = schema::server(&mut link.session)?;
        self.asks_isolation
            .store(!server.is_read_committed, Ordering::Relaxed);
        server.require()?;
        let version = schema::version(&mut link.session)?;
        if version.applied < version.wanted && self.migrates.load(Ordering::Acquire) {
            link.limit.set_silence(MIGRATION_SILENCE);
            schema::migrate_at_start(&mut link.session)
        } else {
            Ok(version.require()?)
        }
    }

    fn no_connection(&self) -> StoreError {
        let last_error = self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*last_error {
            Some(error) => StoreError::Unavailable(error.clone()),
            None => StoreError::Unavailable("no connection".into()),
        }
    }
}

/// One connection for a command, which waits for its answers without a limit.
///
/// # Errors
/// [`StoreError::Unavailable`], with the hosts that were tried.
pub(super) fn connect(server: &PostgresServer, timeout: Duration) -> Result<Link, StoreError> {
    let hosts = Hosts::new(server, timeout);
    hosts.open().map_err(StoreError::Unavailable)
}
