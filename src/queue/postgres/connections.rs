//! Connections to the server, and the threads that use them.
//!
//! The client library waits for an answer without a limit, a frozen server answers nothing, and
//! a limit set on the session would be lost or leak behind PgBouncer in transaction mode. So each
//! operation runs on a thread of this module, and its caller stops waiting after `db.timeout`.
//! A thread that is left behind ends its operation when the server resumes or TCP gives up, and
//! is useful again; until then it keeps its connection busy, so there are never more of either
//! than `db.max_connections`.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[cfg(not(feature = "tls"))]
use ::postgres::NoTls as Connector;
use ::postgres::config::SslMode;
use ::postgres::error::{DbError, Severity, SqlState};
use ::postgres::{Client, Config};
use crossbeam_channel::{Receiver, RecvTimeoutError, SendError, Sender, TrySendError, bounded};
use r2d2::{ManageConnection, NopErrorHandler, Pool};
use r2d2_postgres::PostgresConnectionManager;

use super::super::{BATCH_BYTES_MAX, StoreError};
use super::schema;
#[cfg(feature = "tls")]
use super::tls::Connector;
use crate::config::PostgresServer;
use crate::thread::Threads;
use crate::tls::ClientConfig;

/// Longest wait for a free connection: while the server is down nobody waits longer.
const CHECKOUT_TIMEOUT_MAX: Duration = Duration::from_secs(1);
/// After this much silence of the server TCP asks whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
/// The client library keeps the buffers of the largest operation: one for what it sends, one on the
/// way to the socket and one for what it gets. A connection that has carried more, so one large
/// request, is closed.
const KEPT_BYTES_MAX: usize = BATCH_BYTES_MAX;
/// The library's default, which stands for "not set".
const KEEPALIVE_IDLE_DEFAULT: Duration = Duration::from_secs(2 * 60 * 60);

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum Fault {
    Postgres(::postgres::Error),
    Store(StoreError),
}

impl From<::postgres::Error> for Fault {
    fn from(error: ::postgres::Error) -> Fault {
        Fault::Postgres(error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Fault {
        Fault::Store(error)
    }
}

type Job = Box<dyn FnOnce(&Shared) + Send>;

/// Runs operations on pooled connections, each within a time limit.
pub(super) struct Connections {
    shared: Arc<Shared>,
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
    pub(super) fn new(server: PostgresServer, max: u32, timeout: Duration) -> Connections {
        let max = max.max(1);
        let checkout = timeout
            .min(CHECKOUT_TIMEOUT_MAX)
            .max(Duration::from_millis(1));
        let manager = Manager::new(server, timeout);
        let last_error = Arc::clone(&manager.last_error);
        let pool = Pool::builder()
            .max_size(max)
            .min_idle(Some(0))
            .connection_timeout(checkout)
            // A round trip for each operation; a connection found dead is replaced instead.
            .test_on_check_out(false)
            .error_handler(Box::new(NopErrorHandler))
            .build_unchecked(manager);
        Connections {
            shared: Arc::new(Shared {
                pool,
                last_error,
                max,
                migrates: AtomicBool::new(true),
                migrated: AtomicBool::new(false),
                migrating: Mutex::new(()),
            }),
            jobs: bounded(0),
            threads: Mutex::default(),
        }
    }

    /// From now on the schema is only looked at.
    pub(super) fn never_migrate(&self) {
        self.shared.migrates.store(false, Ordering::Release);
    }

    /// Runs `operation` for `timeout` at most, again on another connection if the one it got had died while idle: so
    /// it must be one that may be repeated. If the caller has gone when it succeeds,
    /// `undo` gets the result nobody waits for. `bytes` tells how many it sent or got.
    pub(super) fn run<T: Send + 'static>(
        &self,
        timeout: Duration,
        operation: impl Fn(&mut Client) -> Result<T, Fault> + Send + 'static,
        bytes: impl Fn(&T) -> usize + Send + 'static,
        undo: impl Fn(&mut Client, &T) -> Result<(), Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + timeout;
        // Without buffer: the result is either taken or known not to be.
        let (answer, answered) = bounded(0);
        let caller_has_gone = Arc::new(AtomicBool::new(false));
        let is_wanted = {
            let caller_has_gone = Arc::clone(&caller_has_gone);
            move || !caller_has_gone.load(Ordering::Acquire)
        };
        let job = Box::new(move |shared: &Shared| {
            let result = shared.run(&operation, &bytes, &is_wanted);
            if let Err(SendError(Ok(unwanted))) = answer.send(result) {
                // Best effort: what is not undone is a lease, and ends by itself.
                let _ = shared.run(&|client| undo(client, &unwanted), &|()| 0, &|| true);
            }
        });
        self.hand_over(job, deadline)?;
        answered
            .recv_deadline(deadline)
            .unwrap_or_else(|error| match error {
                RecvTimeoutError::Timeout => {
                    // If it still waits for a connection, it shall not begin.
                    caller_has_gone.store(true, Ordering::Release);
                    let why = format!("no answer within {timeout:?}");
                    Err(StoreError::Unavailable(why))
                }
                RecvTimeoutError::Disconnected => {
                    Err(StoreError::Refused("the operation panicked".into()))
                }
            })
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

/// What the threads have in common.
struct Shared {
    pool: Pool<Manager>,
    last_error: Arc<Mutex<Option<String>>>,
    max: u32,
    /// Whether the schema may be changed; else it must be right.
    migrates: AtomicBool,
    migrated: AtomicBool,
    migrating: Mutex<()>,
}

impl Shared {
    fn run<T>(
        &self,
        operation: &dyn Fn(&mut Client) -> Result<T, Fault>,
        bytes: &dyn Fn(&T) -> usize,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<T, StoreError> {
        let asked_at = Instant::now();
        // A restarted server leaves a whole pool of dead connections behind.
        let mut dead = 0;
        loop {
            let mut link = self.pool.get().map_err(|_| self.no_connection())?;
            let result = self.ensure_migrated(&mut link.client).and_then(|()| {
                if is_wanted() {
                    operation(&mut link.client)
                } else {
                    Err(Fault::Store(self.no_connection()))
                }
            });
            let fault = match result {
                Ok(value) => {
                    link.broken = bytes(&value) > KEPT_BYTES_MAX;
                    return Ok(value);
                }
                Err(fault) => fault,
            };
            link.broken = is_broken(&fault);
            if link.broken && link.opened_at < asked_at && dead < self.max {
                dead += 1;
                continue;
            }
            return Err(describe(fault));
        }
    }

    fn ensure_migrated(&self, client: &mut Client) -> Result<(), Fault> {
        if self.migrated.load(Ordering::Acquire) {
            return Ok(());
        }
        let _turn = self
            .migrating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !self.migrated.load(Ordering::Acquire) {
            match self.migrates.load(Ordering::Acquire) {
                true => schema::migrate_at_start(client)?,
                false => schema::version(client)?.require()?,
            }
            self.migrated.store(true, Ordering::Release);
        }
        Ok(())
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
pub(super) fn connect(server: &PostgresServer, timeout: Duration) -> Result<Client, StoreError> {
    let manager = Manager::new(server.clone(), timeout);
    manager.open().map_err(|error| {
        StoreError::Unavailable(format!("{}: {}", manager.address, one_line(&error)))
    })
}

/// A connection. Dropped, not reused, once it is `broken`, or has grown too large.
struct Link {
    client: Client,
    opened_at: Instant,
    broken: bool,
}

struct Manager {
    connector: PostgresConnectionManager<Connector>,
    /// For `sslmode=prefer`: what is tried after TLS has failed.
    plain: Option<PostgresConnectionManager<Connector>>,
    address: String,
    /// Of the last try to connect; none if it succeeded.
    last_error: Arc<Mutex<Option<String>>>,
}

impl Manager {
    fn new(server: PostgresServer, timeout: Duration) -> Manager {
        let mut config = bounded_config(server.config, timeout);
        if server.tls.is_none() {
            config.ssl_mode(SslMode::Disable);
        }
        let plain = (config.get_ssl_mode() == SslMode::Prefer).then(|| {
            let mut config = config.clone();
            config.ssl_mode(SslMode::Disable);
            PostgresConnectionManager::new(config, connector(None, timeout))
        });
        Manager {
            address: address(&config),
            connector: PostgresConnectionManager::new(config, connector(server.tls, timeout)),
            plain,
            last_error: Arc::default(),
        }
    }

    /// As libpq with `sslmode=prefer`: without TLS if that fails, or if the server takes the user
    /// only without it.
    fn open(&self) -> Result<Client, ::postgres::Error> {
        let result = self.connector.connect();
        match (&result, &self.plain) {
            (Err(error), Some(plain)) if may_be_tls(error) => plain.connect(),
            _ => result,
        }
    }
}

#[cfg(feature = "tls")]
fn connector(config: Option<Arc<ClientConfig>>, timeout: Duration) -> Connector {
    Connector { config, timeout }
}

#[cfg(not(feature = "tls"))]
fn connector(_config: Option<Arc<ClientConfig>>, _timeout: Duration) -> Connector {
    Connector
}

fn may_be_tls(error: &::postgres::Error) -> bool {
    match error.code() {
        Some(code) => *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        // The library does not say of what kind its errors are.
        None => error
            .to_string()
            .starts_with("error performing TLS handshake"),
    }
}

impl ManageConnection for Manager {
    type Connection = Link;
    type Error = ::postgres::Error;

    fn connect(&self) -> Result<Link, ::postgres::Error> {
        let result = self.open();
        let mut last_error = self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last_error = result
            .as_ref()
            .err()
            .map(|error| format!("{}: {}", self.address, one_line(error)));
        Ok(Link {
            client: result?,
            opened_at: Instant::now(),
            broken: false,
        })
    }

    fn is_valid(&self, link: &mut Link) -> Result<(), ::postgres::Error> {
        self.connector.is_valid(&mut link.client)
    }

    fn has_broken(&self, link: &mut Link) -> bool {
        link.broken || self.connector.has_broken(&mut link.client)
    }
}

/// Sets what the connection string leaves open, so that a lost host is noticed.
fn bounded_config(mut config: Config, timeout: Duration) -> Config {
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(timeout);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(KEEPALIVE_IDLE.max(timeout));
    }
    if config.get_keepalives_idle() == KEEPALIVE_IDLE_DEFAULT {
        config.keepalives_idle(KEEPALIVE_IDLE);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(KEEPALIVE_INTERVAL);
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(KEEPALIVE_RETRIES);
    }
    if config.get_application_name().is_none() {
        config.application_name(env!("CARGO_PKG_NAME"));
    }
    config
}

/// The hosts, for error texts.
fn address(config: &Config) -> String {
    let hosts: Vec<String> = config
        .get_hosts()
        .iter()
        .enumerate()
        .map(|(index, host)| match host {
            ::postgres::config::Host::Tcp(name) => {
                let ports = config.get_ports();
                let port = ports.get(index).or(ports.first()).copied();
                format!("{name}:{}", port.unwrap_or(5432))
            }
            #[cfg(unix)]
            ::postgres::config::Host::Unix(path) => path.display().to_string(),
        })
        .collect();
    hosts.join(",")
}

/// Whether the connection is not to be used again. An error that the server reported ends the
/// statement, a fatal one the connection; any other leaves the two sides out of step.
fn is_broken(fault: &Fault) -> bool {
    match fault {
        Fault::Store(_) => false,
        Fault::Postgres(error) => error.as_db_error().is_none_or(|error| {
            is_fatal(error)
                // Connected to what has become a standby: the next connection may find better.
                || *error.code() == SqlState::READ_ONLY_SQL_TRANSACTION
        }),
    }
}

fn is_fatal(error: &DbError) -> bool {
    matches!(
        error.parsed_severity(),
        Some(Severity::Fatal | Severity::Panic)
    ) || matches!(error.severity(), "FATAL" | "PANIC")
}

pub(super) fn describe(fault: Fault) -> StoreError {
    let error = match fault {
        Fault::Store(error) => return error,
        Fault::Postgres(error) => error,
    };
    let text = one_line(&error);
    match error.as_db_error() {
        Some(db) if is_fatal(db) => StoreError::Unavailable(text),
        Some(db) => classify(db.code().code(), text),
        None => {
            let is_io = std::error::Error::source(&error)
                .is_some_and(<dyn std::error::Error>::is::<std::io::Error>);
            match error.is_closed() || is_io {
                true => StoreError::Unavailable(text),
                false => StoreError::Refused(text),
            }
        }
    }
}

/// What an SQLSTATE says about the server, by its class (PostgreSQL's appendix A).
fn classify(sqlstate: &str, text: String) -> StoreError {
    match sqlstate {
        // A statement that was cancelled or did not get its lock: of this one alone.
        "57014" | "55P03" => StoreError::Refused(text),
        // A relation, column or right that is not there: no operation of ours will do better.
        "42P01" | "42703" | "42501" => StoreError::Schema(text),
        // 08: the connection, PgBouncer's own errors among them. 53: disk, memory or connections
        // are exhausted. 57: an operator or a shutdown. 58: the system's errors. 25006: a standby.
        "25006" => StoreError::Unavailable(text),
        code => match code.get(..2) {
            Some("08" | "53" | "57" | "58") => StoreError::Unavailable(text),
            Some("3D" | "3F") => StoreError::Schema(text),
            _ => StoreError::Refused(text),
        },
    }
}

/// The error with its causes. Not the server's DETAIL, which quotes rows.
fn one_line(error: &::postgres::Error) -> String {
    let mut text = match error.as_db_error() {
        Some(db) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        None => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        }
    };
    // Whatever a server says stays one line of the log.
    text.retain(|character| character != '\0');
    text.replace(['\r', '\n'], " ")
}
