//! The composition root: builds the pipeline, starts it, waits, and drains it. The only module
//! that knows all the others.
//!
//! `stage` has what the stages share, `start` starts them one by one; here is what comes then.

mod stage;
mod start;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use socket2::Socket;

use crate::config::own::{self, Listener, OwnAddress};
use crate::config::{
    Acceptor, Bind, Change, Config, ConfigError, Database, Listening, RemoteUrl, handed_over,
    shown_address,
};
use crate::descriptors;
use crate::drain::Drain;
use crate::intake::Intake;
use crate::logger;
use crate::printable;
use crate::queue::StoreError;
use crate::queue::health::StoreHealth;
use crate::queue::sqlite::owner::not_writable;
use crate::request::Mark;
use crate::systemd::Notifier;
use crate::thread::{Threads, spawn_brief};
use crate::worker::Shared;
pub use stage::visited_store;
use stage::{Tunables, upstream};
use start::Accepting;

/// How long threads that only look are waited for.
const LOOKERS_PATIENCE: Duration = Duration::from_secs(1);

/// Why the program could not start, or did not end well.
#[derive(Debug)]
pub enum RunError {
    /// An address cannot be listened on.
    Listen {
        setting: &'static str,
        address: String,
        error: io::Error,
        /// What helps, if anything can be said about it.
        advice: Option<String>,
    },
    /// The destination is one of our own listeners.
    Own(OwnAddress),
    /// A file of the queue's is there, and not ours to write.
    NotWritable { setting: &'static str, why: String },
    /// The system gave no thread, signal handler or the like.
    Start { what: String, error: io::Error },
    /// A thread ended that should not have.
    Thread(String),
    /// Acknowledged requests are gone.
    Lost(u64),
    /// So may be those that were stored.
    Store(StoreError),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::Listen {
                setting,
                address,
                error,
                advice,
            } => {
                write!(f, "{setting}: cannot listen on {address}: {error}")?;
                match advice {
                    None => Ok(()),
                    Some(advice) => write!(f, ": {advice}"),
                }
            }
            RunError::Own(own) => own.fmt(f),
            RunError::NotWritable { setting, why } => write!(f, "{setting}: {why}"),
            RunError::Start { what, error } => write!(f, "cannot start {what}: {error}"),
            RunError::Thread(name) => write!(f, "thread {name} ended unexpectedly"),
            RunError::Lost(count) => write!(
                f,
                "{} could be neither delivered nor stored",
                printable::count(*count, "acknowledged request")
            ),
            RunError::Store(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for RunError {}

/// How long a stop takes beyond `server.shutdown_timeout`, at most, whatever the store does; the rest
/// of ten seconds is for the program's own end.
const STOP_TIME: Duration = Duration::from_secs(9);
/// Of that, how long operations of the store that are under way are waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Reads the settings anew.
pub type Load<'a> = &'a dyn Fn() -> Result<Config, ConfigError>;

/// Runs until a signal tells it to stop. SIGHUP makes it take over what `load` returns.
///
/// # Errors
/// As [`App::start`] and [`App::run`].
pub fn run(config: Config, load: Load<'_>) -> Result<(), RunError> {
    let signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(cannot_start("signal handling"))?;
    let threads = Threads::default();
    let (stop, hangups) = forward(&threads, signals)?;
    App::start(config, threads, stop)?.run(&hangups, load)
}

/// Where requests go and where they wait, in one line: what is looked for first when they do not.
fn report_start(config: &Config) {
    let RemoteUrl {
        scheme,
        authority,
        path_prefix,
    } = &config.proxy.remote_url;
    let destination = format!("{scheme}://{authority}{path_prefix}");
    let (version, queue) = (env!("CARGO_PKG_VERSION"), config.store().name);
    let settings = config.path.as_deref().unwrap_or(Path::new("")).display();
    log::info!(version, destination, queue, settings:%; "starting");
}

/// All of it, started; in a process that may do other things beside.
#[allow(missing_debug_implementations, reason = "threads and channels")]
pub struct App {
    running: Running,
    address: String,
    listeners: [Listener; 2],
    /// As at the start: what needs a restart is as it was then.
    started: Config,
    /// As last reloaded.
    reloaded: Option<Config>,
}

impl App {
    /// Listens, and begins to serve. A number received from `stop` is a signal.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn start(config: Config, threads: Threads, stop: Receiver<i32>) -> Result<App, RunError> {
        check_files(&config)?;
        let (intake, control) = listen_on_both(&config)?;
        let own = [
            Listener::of_socket("server.bind", &intake.socket),
            Listener::of_socket("metrics.bind", &control.socket),
        ];
        own::check(&config.proxy.remote_url, &own).map_err(RunError::Own)?;
        let address = shown_address(&intake.socket).map_err(cannot_start("intake"))?;
        report_start(&config);
        let listeners = Listeners {
            intake,
            control: control.socket,
            max_connections: descriptors::raise_limit(&config),
        };
        Ok(App {
            running: Running::start(&config, (threads, stop), listeners)?,
            address,
            listeners: own,
            started: config,
            reloaded: None,
        })
    }

    /// Where requests are taken, as [`shown_address`] has it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Waits for a signal, and ends in good order. On each hangup takes over what `load` returns.
    ///
    /// # Errors
    /// [`RunError`]; after [`RunError::Thread`] all has been drained as at any stop.
    pub fn run(mut self, hangups: &Receiver<()>, load: Load<'_>) -> Result<(), RunError> {
        let ended = loop {
            match self.running.wait(hangups) {
                Event::Hangup => self.reload(load),
                Event::Stop => break None,
                Event::Ended(thread) => break Some(thread),
            }
        };
        let settings = self.settings();
        let timeout = settings.server.shutdown_timeout;
        let (lost, closed) = self.running.drain(timeout);
        match (ended, lost, closed) {
            (_, 1.., _) => Err(RunError::Lost(lost)),
            (_, 0, Err(error)) => Err(RunError::Store(error)),
            (Some(thread), 0, Ok(())) => Err(RunError::Thread(thread)),
            (None, 0, Ok(())) => Ok(()),
        }
    }

    fn settings(&self) -> &Config {
        self.reloaded.as_ref().unwrap_or(&self.started)
    }

    /// All or nothing: settings that are not valid change nothing.
    fn reload(&mut self, load: Load<'_>) {
        let running = &self.running;
        if let Some(notifier) = &running.notifier {
            notifier.reloading();
        }
        let reloads = running.drain.metrics.reloads();
        match load()
            .map_err(|error| error.to_string())
            .and_then(|newer| self.check(newer))
        {
            Err(error) => {
                reloads.failed(&error);
                log::error!(error:%; "settings not reloaded, all stay as they are");
            }
            Ok(newer) => {
                running.reconfigure(&self.started, self.settings(), &newer);
                self.report(&newer);
                running.drain.metrics.reloads().succeeded();
                self.reloaded = Some(newer);
            }
        }
        if let Some(notifier) = &self.running.notifier {
            notifier.ready();
        }
    }

    /// What depends on more than the settings.
    fn check(&self, newer: Config) -> Result<Config, String> {
        let remote = &newer.proxy.remote_url;
        // One that is the same would be refused for what has changed about a name meanwhile.
        if *remote != self.settings().proxy.remote_url {
            own::check(remote, &self.listeners).map_err(|error| error.to_string())?;
        }
        Ok(newer)
    }

    fn report(&self, newer: &Config) {
        for warning in newer.all_warnings() {
            log::warn!("{warning}");
        }
        let changes = self.settings().changes(newer);
        for Change { key, from, to } in changes.iter().filter(|change| !change.needs_restart()) {
            log::info!(key, from, to; "setting changed");
        }
        // Compared with the start: those of earlier reloads are still to come, too.
        let waiting = self.started.changes(newer);
        let waiting = waiting.iter().filter(|change| change.needs_restart());
        let waiting: Vec<&str> = waiting.map(|change| change.key).collect();
        if !waiting.is_empty() {
            let settings = waiting.join(", ");
            log::warn!(settings; "these settings change with the next restart");
        }
        log::info!("settings reloaded");
    }
}

/// What the main thread waits for.
enum Event {
    Hangup,
    Stop,
    /// Of a thread that should not have.
    Ended(String),
}

fn cannot_start(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    move |error| RunError::Start {
        what: what.into(),
        error,
    }
}

/// A file that is there and not ours to write stays so until somebody mends it. All else that keeps a
/// store from working may pass.
fn check_files(config: &Config) -> Result<(), RunError> {
    let queue = match &config.db.database {
        Database::Sqlite(path) => Some(("db.connection_string", path)),
        Database::Postgres(_) => None,
    };
    let spool = config.db.spool.as_ref().map(|path| ("db.spool", path));
    for (setting, path) in queue.into_iter().chain(spool) {
        let (path, (tell, told)) = (path.clone(), bounded(1));
        let look = move || drop(tell.send(not_writable(&path)));
        spawn_brief("files", look).map_err(cannot_start("thread files"))?;
        // Of a disk that hangs nothing is known; whoever uses it will see.
        if let Ok(Some(why)) = told.recv_timeout(config.db.timeout) {
            return Err(RunError::NotWritable { setting, why });
        }
    }
    Ok(())
}

/// What tells this program from another that requests may come through as well: where it runs, where
/// it listens, and where it sends to.
fn mark(bind: &Bind, remote: &RemoteUrl) -> Mark {
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy();
    let RemoteUrl {
        scheme,
        authority,
        path_prefix,
    } = remote;
    let remote = format!("{scheme}://{authority}{path_prefix}");
    Mark::of(&[&host, &bind.to_string(), &remote])
}

/// For senders, and for metrics and health. What systemd handed over for neither is told of, whether
/// that went well or not.
fn listen_on_both(config: &Config) -> Result<(Listening, Listening), RunError> {
    let server = &config.server;
    let intake = match (server.acceptor, server.bind.itself()) {
        // It can take over none of systemd's.
        (Acceptor::TinyHttp, Some(itself)) => itself,
        _ => &server.bind,
    };
    let intake = listen("server.bind", intake);
    let control = listen("metrics.bind", &config.metrics.bind);
    for left in handed_over::left() {
        log::warn!(
            "systemd handed over the socket {left}, which is not taken: nobody answers there. \
             server.bind or metrics.bind takes it with systemd:{}",
            left.name
        );
    }
    Ok((intake?, control?))
}

fn listen(setting: &'static str, bind: &Bind) -> Result<Listening, RunError> {
    bind.listen().map_err(|error| RunError::Listen {
        setting,
        address: bind.to_string(),
        advice: handed_over::advice(setting, bind, &error),
        error,
    })
}

/// The sockets that are listened on, though nobody accepts on them yet.
struct Listeners {
    intake: Listening,
    control: Socket,
    /// Of the intake.
    max_connections: usize,
}

/// The running program.
struct Running {
    notifier: Option<Arc<Notifier>>,
    health: Arc<StoreHealth>,
    shared: Arc<Shared>,
    tunables: Tunables,
    threads: Threads,
    signals: Receiver<i32>,
    /// `None` until senders are answered.
    accepting: Option<Accepting>,
    intake: Arc<Intake>,
    drain: Drain,
    /// Closed to stop claiming.
    claiming: Sender<()>,
    /// Closed when no lease is left: until then the others hear of us.
    beating: Sender<()>,
}

impl Running {
    fn wait(&self, hangups: &Receiver<()>) -> Event {
        select! {
            recv(hangups) -> _ => Event::Hangup,
            recv(self.signals) -> signal => {
                let signal = signal.unwrap_or_default();
                log::info!(signal; "stopping");
                Event::Stop
            }
            recv(self.threads.ended()) -> name => {
                let thread = name.unwrap_or_default();
                log::error!(thread; "a thread ended unexpectedly, stopping");
                Event::Ended(thread)
            }
        }
    }

    /// Takes over those settings that need no restart.
    fn reconfigure(&self, started: &Config, older: &Config, newer: &Config) {
        logger::set(newer.log.level, newer.log.format);
        let (server, queue) = (&newer.server, &newer.queue);
        let intake = &self.intake;
        let rate = server.enqueue_enabled.then_some(server.enqueue_rate);
        intake.admission.set_rate(rate);
        intake
            .response_status
            .store(server.response_status, Ordering::Relaxed);
        intake
            .body_bytes_max
            .store(server.max_body_size, Ordering::Relaxed);
        let manners = newer.manners().to_bits();
        intake.manners.store(manners, Ordering::Relaxed);
        intake.budget.set_limit(server.memory_limit);
        self.health.depth.set_max(queue.max_rows);
        self.drain.metrics.set_rows_max(queue.max_rows);
        let tunables = &self.tunables;
        tunables.set_files(newer);
        tunables
            .per_second
            .store(queue.handle_per_second, Ordering::Relaxed);
        let retention = tunables.dead_retention.lock();
        *retention.unwrap_or_else(PoisonError::into_inner) = queue.dead_retention;
        let policy = self.shared.policy.write();
        *policy.unwrap_or_else(PoisonError::into_inner) = queue.retry.clone();
        let destination = &self.shared.destination;
        destination.set_failures_max(newer.proxy.breaker_failures);
        let is_moved = older.proxy.remote_url != newer.proxy.remote_url;
        // Certificates may be new ones in the same files.
        let has_other_host = older.proxy.preserve_host != newer.proxy.preserve_host;
        if is_moved || has_other_host || newer.proxy.tls.is_some() {
            let timeout = started.proxy.request_timeout;
            tunables.upstream.replace(upstream(newer, timeout));
        }
        if is_moved {
            destination.renew();
            let mark = mark(&started.server.bind, &newer.proxy.remote_url);
            intake.mark.store(mark.to_bits(), Ordering::Relaxed);
        }
    }

    /// Stops in order: no new connections, no new claims, workers through, the rest stored.
    /// Returns how many acknowledged requests are lost, and whether the store has kept its own.
    fn drain(self, timeout: Duration) -> (u64, Result<(), StoreError>) {
        let deadline = Instant::now() + timeout;
        if let Some(notifier) = &self.notifier {
            notifier.stopping();
        }
        self.intake.draining.store(true, Ordering::SeqCst);
        if let Some(accepting) = &self.accepting {
            accepting.stop();
        }
        drop(self.claiming);
        self.threads.wait_for("poller", deadline);
        self.drain.release_unstarted(deadline);
        let connections = || self.accepting.as_ref().map_or(0, Accepting::connections);
        self.drain.wait(deadline, &self.signals, connections);
        let end = Instant::now() + STOP_TIME;
        // A claim under way would lease rows after all others were given back, and a request that
        // waits to be stored would come after them. But a store may never answer.
        let patience = Instant::now() + STOP_PATIENCE;
        self.threads.wait_for("poller", patience);
        self.intake.admission.close(patience);
        let (store, spool) = (Arc::clone(&self.drain.store), self.drain.spool.clone());
        let lost = self.drain.store_rest(end);
        drop(self.beating);
        // They use the store until they see that they are to end.
        for thread in ["heartbeat", "mover", "sampler"] {
            let looked_for = Instant::now() + LOOKERS_PATIENCE;
            self.threads.wait_for(thread, looked_for.min(end));
        }
        let store = closed(store.close());
        let spool = spool.map_or(Ok(()), |spool| closed(spool.close()));
        (lost, store.and(spool))
    }
}

/// What matters of how a store was closed: that nothing is lost.
fn closed(result: Result<(), StoreError>) -> Result<(), StoreError> {
    match result {
        Err(error @ StoreError::Damaged(_)) => Err(error),
        Err(error) => {
            log::warn!(error:%; "the store was not closed in good order");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn spawn(
    threads: &Threads,
    name: impl Into<String>,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), RunError> {
    let name = name.into();
    threads
        .spawn(name.clone(), body)
        .map_err(cannot_start(format!(
            "thread {name}, of as many as proxy.num_clients and queue.workers ask for"
        )))
}

/// Where signals to stop arrive, and hangups.
fn forward(
    threads: &Threads,
    mut signals: Signals,
) -> Result<(Receiver<i32>, Receiver<()>), RunError> {
    let (stop, stopped) = bounded(8);
    let (hang_up, hangups) = bounded(1);
    spawn(threads, "signals", move || {
        for signal in signals.forever() {
            // More than fit say nothing new.
            let _ = match signal {
                SIGHUP => hang_up.try_send(()).is_ok(),
                signal => stop.try_send(signal).is_ok(),
            };
        }
    })?;
    Ok((stopped, hangups))
}
