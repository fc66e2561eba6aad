//! The composition root: builds the pipeline, starts it, waits, and drains it. The only module
//! that knows all the others.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use prometheus::IntGauge;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use socket2::Socket;

use crate::admission::{Admission, Committing};
use crate::breaker::Destination;
use crate::budget::Budget;
use crate::config::{
    Acceptor as AcceptorKind, Ack, Bind, Change, Config, ConfigError, Database, RateScope,
    shown_address,
};
use crate::control::{self, Control};
use crate::descriptors;
use crate::direct;
use crate::drain::Drain;
use crate::intake::{Intake, builtin, tiny_http};
use crate::metrics::Metrics;
use crate::progress::{self, Progress};
use crate::queue::depth::Depth;
use crate::queue::health::StoreHealth;
use crate::queue::migrate::Policy;
use crate::queue::operate::Operate;
use crate::queue::poller::{self, Poller, Room, Sampler, Wake};
use crate::queue::postgres::PostgresStore;
use crate::queue::settler::{Settlements, Settler};
use crate::queue::spool::{self, Mover, Spool};
use crate::queue::sqlite::SqliteStore;
use crate::queue::writer::{Appender, Writer};
use crate::queue::{ByClass, Store};
use crate::status::Status;
use crate::systemd::Notifier;
use crate::thread::Threads;
use crate::upstream::Upstream;
use crate::worker::{Deliveries, Delivery, Places, Shared, Slot, Worker};

/// Heads of requests to the control port, which has no bodies.
const CONTROL_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long the front may be at the connections it has heard of.
const INTAKE_LIMIT: Duration = Duration::from_secs(30);
/// What a stop takes beyond `server.shutdown_timeout`, at most: storing what is left.
const STOP_TIME: Duration = Duration::from_secs(90);
/// For scrapers and health checks.
const CONTROL_TIMES: builtin::Times = builtin::Times {
    request: Duration::from_secs(5),
    idle: Duration::from_secs(60),
};

/// Why the program could not start, or did not end well.
#[derive(Debug)]
pub enum RunError {
    /// An address cannot be listened on.
    Listen {
        setting: &'static str,
        address: String,
        error: io::Error,
    },
    /// The system gave no thread, signal handler or the like.
    Start { what: String, error: io::Error },
    /// A thread ended that should not have.
    Thread(String),
    /// Acknowledged requests are gone.
    Lost(u64),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::Listen {
                setting,
                address,
                error,
            } => write!(f, "{setting}: cannot listen on {address}: {error}"),
            RunError::Start { what, error } => write!(f, "cannot start {what}: {error}"),
            RunError::Thread(name) => write!(f, "thread {name} ended unexpectedly"),
            RunError::Lost(count) => write!(
                f,
                "{count} acknowledged requests could be neither delivered nor stored"
            ),
        }
    }
}

impl std::error::Error for RunError {}

/// Reads the settings anew.
pub type Load<'a> = &'a dyn Fn() -> Result<Config, ConfigError>;

/// Runs until a signal tells it to stop. SIGHUP makes it take over what `load` returns.
///
/// # Errors
/// As [`App::start`] and [`App::run`].
pub fn run(config: Config, load: Load<'_>) -> Result<(), RunError> {
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(start("signal handling"))?;
    let threads = Threads::default();
    let (stop, hangups) = forward(&threads, signals)?;
    App::start(config, threads, stop)?.run(&hangups, load)
}

/// All of it, started; in a process that may do other things beside.
#[allow(missing_debug_implementations, reason = "threads and channels")]
pub struct App {
    running: Running,
    address: String,
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
        let listener = listen("server.bind", &config.server.bind)?;
        let control_listener = listen("metrics.bind", &config.metrics.bind)?;
        let address = shown_address(&listener).map_err(start("intake"))?;
        let max_connections = descriptors::raise_limit(&config);
        let listeners = (listener, control_listener);
        Ok(App {
            running: Running::start(&config, (threads, stop), listeners, max_connections)?,
            address,
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
        let is_handed_over = matches!(self.started.server.bind, Bind::Systemd(_));
        let lost = self.running.drain(timeout, is_handed_over);
        match (ended, lost) {
            (_, 1..) => Err(RunError::Lost(lost)),
            (Some(thread), 0) => Err(RunError::Thread(thread)),
            (None, 0) => Ok(()),
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
        match load() {
            Err(error) => {
                reloads.failed();
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

    fn report(&self, newer: &Config) {
        for warning in newer.warnings() {
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

fn start(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    move |error| RunError::Start {
        what: what.into(),
        error,
    }
}

fn listen(setting: &'static str, bind: &Bind) -> Result<Socket, RunError> {
    bind.listen().map_err(|error| RunError::Listen {
        setting,
        address: bind.to_string(),
        error,
    })
}

fn store(config: &Config, per_second: &Arc<AtomicU32>) -> Arc<dyn Store> {
    let db = &config.db;
    match &db.database {
        // One process, whose poller keeps to the rate: that is its whole cluster.
        Database::Sqlite(path) => {
            let store = SqliteStore::new(path.clone(), db.use_index, db.timeout);
            Arc::new(store.with_policy(db.migrate))
        }
        Database::Postgres(postgres) => {
            let postgres = (**postgres).clone();
            let store = PostgresStore::new(postgres, db.max_connections, db.use_index, db.timeout);
            let store = store.with_policy(db.migrate);
            let store = match db.spool {
                Some(_) => store.with_append_timeout(spool::APPEND_TIMEOUT),
                None => store,
            };
            Arc::new(match config.queue.rate_scope {
                RateScope::Instance => store,
                RateScope::Cluster => store.sharing_changing_rate(Arc::clone(per_second)),
            })
        }
    }
}

/// The same store for one who looks at it beside the instances that serve it.
pub fn visited_store(config: &Config) -> Arc<dyn Operate> {
    let db = &config.db;
    match &db.database {
        Database::Sqlite(path) => {
            let store = SqliteStore::new(path.clone(), db.use_index, db.timeout);
            Arc::new(store.with_policy(Policy::Require).visiting())
        }
        Database::Postgres(postgres) => {
            let store = PostgresStore::new((**postgres).clone(), 1, db.use_index, db.timeout);
            Arc::new(store.with_policy(Policy::Require))
        }
    }
}

/// What a reload changes and no stage owns alone.
#[derive(Clone)]
struct Tunables {
    upstream: Upstream,
    per_second: Arc<AtomicU32>,
    dead_retention: Arc<Mutex<Option<Duration>>>,
}

impl Tunables {
    fn new(config: &Config) -> Tunables {
        Tunables {
            upstream: upstream(config, config.proxy.request_timeout),
            per_second: Arc::new(AtomicU32::new(config.queue.handle_per_second)),
            dead_retention: Arc::new(Mutex::new(config.queue.dead_retention)),
        }
    }
}

fn upstream(config: &Config, request_timeout: Duration) -> Upstream {
    let proxy = &config.proxy;
    Upstream::new(proxy.remote_url.clone(), request_timeout, proxy.tls.clone())
}

/// What the stages of the pipeline share.
struct Stage {
    store: Arc<dyn Store>,
    spool: Option<Arc<Spool>>,
    health: Arc<StoreHealth>,
    destination: Arc<Destination>,
    metrics: Arc<Metrics>,
    budget: Arc<Budget>,
    progress: Arc<Progress>,
    threads: Threads,
    tunables: Tunables,
}

impl Stage {
    /// And where the spool, if there is one, tells that it has something.
    fn new(config: &Config, threads: Threads) -> Result<(Stage, Option<Receiver<()>>), RunError> {
        let tunables = Tunables::new(config);
        let metrics = Metrics::new(config.metrics.max_paths)
            .map_err(io::Error::other)
            .map_err(start("metrics"))?;
        metrics.set_rows_max(config.queue.max_rows);
        let metrics = Arc::new(metrics);
        let (spool, filled) = match config.db.spool.clone() {
            None => (None, None),
            Some(path) => {
                let (spool, filled) = Spool::new(path, config.db.timeout, Arc::clone(&metrics));
                (Some(Arc::new(spool)), Some(filled))
            }
        };
        let destination = Destination::new(config.proxy.breaker_failures, Arc::clone(&metrics));
        let stage = Stage {
            store: store(config, &tunables.per_second),
            spool,
            health: Arc::new(StoreHealth::new(Depth::new(config.queue.max_rows))),
            destination: Arc::new(destination),
            metrics,
            budget: Budget::new(config.server.memory_limit),
            progress: Arc::default(),
            threads,
            tunables,
        };
        Ok((stage, filled))
    }
}

impl Stage {
    fn status(&self, config: &Config) -> Arc<Status> {
        Arc::new(Status {
            metrics: Arc::clone(&self.metrics),
            health: Arc::clone(&self.health),
            destination: Arc::clone(&self.destination),
            has_spool: self.spool.is_some(),
            per_second: Arc::clone(&self.tunables.per_second),
            rate_scope: config.queue.rate_scope,
            started: Instant::now(),
        })
    }
}

/// The acceptor that the settings name.
enum Accepting {
    Builtin(Arc<builtin::Acceptor<Intake>>),
    TinyHttp(Arc<tiny_http::Acceptor>),
}

impl Accepting {
    /// A socket of systemd's outlives the program, which must not end its listening.
    fn stop(&self, is_handed_over: bool) {
        match self {
            Accepting::Builtin(acceptor) if is_handed_over => acceptor.leave(),
            Accepting::Builtin(acceptor) => acceptor.close(),
            // Never gets one of these.
            Accepting::TinyHttp(acceptor) => acceptor.stop_accepting(),
        }
    }

    /// Senders' connections that are open. tiny_http does not tell, and is not waited for.
    fn connections(&self) -> usize {
        match self {
            Accepting::Builtin(acceptor) => acceptor.connections(),
            Accepting::TinyHttp(_) => 0,
        }
    }
}

/// The running program.
struct Running {
    notifier: Option<Arc<Notifier>>,
    health: Arc<StoreHealth>,
    shared: Arc<Shared>,
    tunables: Tunables,
    threads: Threads,
    signals: Receiver<i32>,
    accepting: Accepting,
    intake: Arc<Intake>,
    drain: Drain,
    /// Closed to stop claiming.
    claiming: Sender<()>,
    /// A claim that is under way ends in this time.
    claim_time_max: Duration,
}

impl Running {
    fn start(
        config: &Config,
        (threads, signals): (Threads, Receiver<i32>),
        (listener, control_listener): (Socket, Socket),
        max_connections: usize,
    ) -> Result<Running, RunError> {
        let (stage, filled) = Stage::new(config, threads)?;
        let (wake, woken) = Wake::new();
        let (claiming, stop) = bounded(0);
        let (appender, settlements) = start_store_threads(&stage, config, &wake, &stop)?;
        if let (Some(spool), Some(filled)) = (&stage.spool, filled) {
            start_mover(&stage, spool, filled, &wake, &stop)?;
        }
        let room = Arc::new(Room::new(config.queue.workers, wake));
        let places = Arc::new(Places::new(config.proxy.num_clients));
        let (direct_sender, direct) = start_direct(config, &stage)?;
        let (claimed_sender, claimed) = by_class(2 * config.queue.workers);
        let (hurry_sender, hurry) = bounded(0);
        let shared = Arc::new(Shared {
            policy: RwLock::new(config.queue.retry.clone()),
            appender: appender.clone(),
            settlements: settlements.clone(),
            room: Arc::clone(&room),
            places: Arc::clone(&places),
            destination: Arc::clone(&stage.destination),
            metrics: Arc::clone(&stage.metrics),
            hurry,
        });
        let slots = start_workers(&stage, config, &shared, &direct, &claimed)?;
        let poller = new_poller(config, &stage, &room, (woken, stop), claimed_sender);
        spawn(&stage.threads, "poller", move || poller.run())?;
        let committing = Committing {
            places: Arc::clone(&places),
            settlements: settlements.clone(),
            request_timeout: config.proxy.request_timeout,
        };
        let intake = new_intake(config, &stage, direct_sender, appender, committing);
        let intake = Arc::new(intake);
        // Last: from here on there is something to lose.
        let status = stage.status(config);
        start_control(config, &stage, &intake, &status, control_listener)?;
        let accepting = start_intake(&stage, config, listener, max_connections, &intake)?;
        let notifier = tell_systemd(config, &stage, status)?;
        let drain = Drain {
            store: stage.store,
            spool: stage.spool,
            metrics: stage.metrics,
            room,
            places,
            settlements,
            direct,
            claimed,
            slots,
            hurry: Some(hurry_sender),
        };
        Ok(Running {
            notifier,
            health: stage.health,
            shared,
            tunables: stage.tunables,
            threads: stage.threads,
            signals,
            accepting,
            intake,
            drain,
            claiming,
            claim_time_max: 2 * config.db.timeout,
        })
    }

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
        log::set_max_level(newer.log.level);
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
        intake.budget.set_limit(server.memory_limit);
        self.health.depth.set_max(queue.max_rows);
        self.drain.metrics.set_rows_max(queue.max_rows);
        let tunables = &self.tunables;
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
        if is_moved || newer.proxy.tls.is_some() {
            let timeout = started.proxy.request_timeout;
            tunables.upstream.replace(upstream(newer, timeout));
        }
        if is_moved {
            destination.renew();
        }
    }

    /// Stops in order: no new connections, no new claims, workers through, the rest stored.
    /// Returns how many acknowledged requests are lost.
    fn drain(self, timeout: Duration, is_handed_over: bool) -> u64 {
        let deadline = Instant::now() + timeout;
        if let Some(notifier) = &self.notifier {
            notifier.stopping();
        }
        self.intake.draining.store(true, Ordering::SeqCst);
        self.accepting.stop(is_handed_over);
        drop(self.claiming);
        self.threads.wait_for("poller", deadline);
        self.drain.release_unstarted(deadline);
        self.drain
            .wait(deadline, &self.signals, || self.accepting.connections());
        // A claim under way would lease rows after all others were given back.
        self.threads
            .wait_for("poller", Instant::now() + self.claim_time_max);
        self.intake.admission.close();
        self.drain.store_rest()
    }
}

fn spawn(
    threads: &Threads,
    name: impl Into<String>,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), RunError> {
    let name = name.into();
    threads.spawn(name.clone(), body).map_err(start(format!(
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

/// The channel of direct requests.
fn start_direct(
    config: &Config,
    stage: &Stage,
) -> Result<(direct::Sender<Delivery>, direct::Receiver<Delivery>), RunError> {
    let (sender, receiver, overseer) = direct::bounded(config.proxy.num_clients);
    let metrics = Arc::clone(&stage.metrics);
    spawn(&stage.threads, "overseer", move || {
        overseer.run(|| metrics.attempts_made());
    })?;
    Ok((sender, receiver))
}

/// A channel for each class of claimed rows.
fn by_class(room: usize) -> (ByClass<Sender<Delivery>>, ByClass<Receiver<Delivery>>) {
    let ((fresh, fresh_receiver), (retried, retried_receiver)) = (bounded(room), bounded(room));
    let receivers = ByClass {
        fresh: fresh_receiver,
        retried: retried_receiver,
    };
    (ByClass { fresh, retried }, receivers)
}

fn start_store_threads(
    stage: &Stage,
    config: &Config,
    wake: &Wake,
    stop: &Receiver<()>,
) -> Result<(Appender, Settlements), RunError> {
    let Stage {
        store,
        health,
        metrics,
        threads,
        ..
    } = stage;
    let (writer, appender) = Writer::new(
        Arc::clone(store),
        stage.spool.clone(),
        Arc::clone(health),
        Arc::clone(metrics),
        wake.clone(),
        config.db.timeout,
    );
    let limit = store_limit(config);
    stage
        .progress
        .watch("writer", &writer.stage, limit, || false);
    spawn(threads, "writer", move || writer.run())?;
    let (settler, settlements) =
        Settler::new(Arc::clone(store), Arc::clone(health), Arc::clone(metrics));
    stage
        .progress
        .watch("settler", &settler.stage, limit, || false);
    spawn(threads, "settler", move || settler.run())?;
    let sampler = Sampler {
        store: Arc::clone(store),
        health: Arc::clone(health),
        metrics: Arc::clone(metrics),
        destination: Arc::clone(&stage.destination),
        dead_retention: Arc::clone(&stage.tunables.dead_retention),
        stop: stop.clone(),
    };
    spawn(threads, "sampler", move || sampler.run())?;
    Ok((appender, settlements))
}

/// How long one piece of work with the store may take: some operations of `db.timeout` each, in the
/// store and the spool, one on the heels of another.
fn store_limit(config: &Config) -> Duration {
    8 * config.db.timeout + Duration::from_secs(30)
}

fn start_mover(
    stage: &Stage,
    spool: &Arc<Spool>,
    filled: Receiver<()>,
    wake: &Wake,
    stop: &Receiver<()>,
) -> Result<(), RunError> {
    let mover = Mover {
        spool: Arc::clone(spool),
        store: Arc::clone(&stage.store),
        health: Arc::clone(&stage.health),
        metrics: Arc::clone(&stage.metrics),
        filled,
        wake: wake.clone(),
        stop: stop.clone(),
    };
    spawn(&stage.threads, "mover", move || mover.run())
}

fn new_poller(
    config: &Config,
    stage: &Stage,
    room: &Arc<Room>,
    (woken, stop): (Receiver<()>, Receiver<()>),
    deliveries: ByClass<Sender<Delivery>>,
) -> Poller {
    let poller_stage = Arc::default();
    let limit = store_limit(config);
    stage
        .progress
        .watch("poller", &poller_stage, limit, || false);
    Poller {
        store: Arc::clone(&stage.store),
        health: Arc::clone(&stage.health),
        metrics: Arc::clone(&stage.metrics),
        budget: Arc::clone(&stage.budget),
        room: Arc::clone(room),
        destination: Arc::clone(&stage.destination),
        stage: poller_stage,
        per_second: Arc::clone(&stage.tunables.per_second),
        request_timeout: config.proxy.request_timeout,
        woken,
        stop,
        deliveries,
    }
}

fn start_workers(
    stage: &Stage,
    config: &Config,
    shared: &Arc<Shared>,
    direct: &direct::Receiver<Delivery>,
    claimed: &ByClass<Receiver<Delivery>>,
) -> Result<Vec<Arc<Slot>>, RunError> {
    let upstream = &stage.tunables.upstream;
    let mut slots = Vec::new();
    let reserved = poller::reserved(config.queue.workers);
    let (proxy_stage, queue_stage) = (Arc::default(), Arc::default());
    watch_workers(
        config,
        shared,
        direct,
        (&proxy_stage, &queue_stage),
        &stage.progress,
    );
    let mut start_one = |name: String, deliveries, at_work: &Arc<_>, busy: &IntGauge| {
        let slot = Arc::new(Slot::default());
        let worker = Worker {
            shared: Arc::clone(shared),
            client: upstream.client(),
            slot: Arc::clone(&slot),
            deliveries,
            stage: Arc::clone(at_work),
            busy: busy.clone(),
        };
        slots.push(slot);
        spawn(&stage.threads, name, move || worker.run())
    };
    for number in 1..=config.proxy.num_clients {
        let deliveries = Deliveries::Direct(direct.clone());
        start_one(
            format!("proxy-{number}"),
            deliveries,
            &proxy_stage,
            &shared.metrics.busy_proxy,
        )?;
    }
    for number in 1..=config.queue.workers {
        let deliveries = if number <= reserved {
            Deliveries::Fresh(claimed.fresh.clone())
        } else {
            Deliveries::All(claimed.clone())
        };
        start_one(
            format!("queue-{number}"),
            deliveries,
            &queue_stage,
            &shared.metrics.busy_queue,
        )?;
    }
    Ok(slots)
}

/// An attempt may be made twice, and a name may take long to resolve. Direct requests must not wait
/// while workers are idle, either.
fn watch_workers(
    config: &Config,
    shared: &Shared,
    direct: &direct::Receiver<Delivery>,
    (proxy, queue): (&Arc<progress::Stage>, &Arc<progress::Stage>),
    progress: &Progress,
) {
    let limit = 2 * config.proxy.request_timeout + Duration::from_secs(60);
    let (waiting, busy) = (direct.clone(), shared.metrics.busy_proxy.clone());
    let workers = i64::try_from(config.proxy.num_clients).unwrap_or(i64::MAX);
    let is_waited_for = move || !waiting.is_empty() && busy.get() < workers;
    progress.watch("proxy workers", proxy, limit, is_waited_for);
    progress.watch("queue workers", queue, limit, || false);
}

fn new_intake(
    config: &Config,
    stage: &Stage,
    direct: direct::Sender<Delivery>,
    appender: Appender,
    committing: Committing,
) -> Intake {
    let server = &config.server;
    let admission = Admission::new(
        server.enqueue_enabled.then_some(server.enqueue_rate),
        direct,
        appender,
        Arc::clone(&stage.destination),
        Arc::clone(&stage.metrics),
    );
    Intake {
        admission: match server.ack {
            Ack::Received => admission,
            Ack::Stored => admission.committing(committing),
        },
        metrics: Arc::clone(&stage.metrics),
        budget: Arc::clone(&stage.budget),
        response_status: AtomicU16::new(server.response_status),
        body_bytes_max: AtomicUsize::new(server.max_body_size),
        draining: Arc::new(AtomicBool::new(false)),
    }
}

/// Starts the acceptor that the settings name.
fn start_intake(
    stage: &Stage,
    config: &Config,
    listener: Socket,
    max_connections: usize,
    intake: &Arc<Intake>,
) -> Result<Accepting, RunError> {
    let address = shown_address(&listener).map_err(start("intake"))?;
    let server = &config.server;
    let accepting = match server.acceptor {
        AcceptorKind::Builtin => {
            let times = builtin::Times {
                request: server.read_timeout,
                idle: server.idle_timeout,
            };
            let acceptor = builtin::Acceptor::start(
                "intake",
                listener,
                Arc::clone(intake),
                times,
                max_connections,
                &stage.threads,
            )
            .map_err(start("intake"))?;
            stage
                .progress
                .watch("intake", acceptor.stage(), INTAKE_LIMIT, || false);
            Accepting::Builtin(acceptor)
        }
        AcceptorKind::TinyHttp => {
            let acceptor = tiny_http::Acceptor::new(listener.into(), Arc::clone(intake));
            let acceptor = Arc::new(acceptor.map_err(start("intake"))?);
            for number in 1..=tiny_http::THREADS {
                let acceptor = Arc::clone(&acceptor);
                spawn(&stage.threads, format!("intake-{number}"), move || {
                    acceptor.run()
                })?;
            }
            Accepting::TinyHttp(acceptor)
        }
    };
    log::info!(addr:% = address; "listening");
    Ok(accepting)
}

fn start_control(
    config: &Config,
    stage: &Stage,
    intake: &Arc<Intake>,
    status: &Arc<Status>,
    listener: Socket,
) -> Result<(), RunError> {
    let address = shown_address(&listener).map_err(start("control"))?;
    let control = Control {
        metrics_path: config.metrics.path.clone(),
        metrics: Arc::clone(&stage.metrics),
        health: Arc::clone(&stage.health),
        destination: Arc::clone(&stage.destination),
        intake: Arc::clone(intake),
        status: Arc::clone(status),
        progress: Arc::clone(&stage.progress),
        budget: Budget::new(CONTROL_BYTES_MAX),
    };
    builtin::Acceptor::start(
        "control",
        listener,
        Arc::new(control),
        CONTROL_TIMES,
        control::CONNECTIONS_MAX,
        &stage.threads,
    )
    .map_err(start("control"))?;
    log::info!(addr:% = address; "serving metrics and health");
    Ok(())
}

/// Says that all is up, if systemd wants to know, and goes on telling.
fn tell_systemd(
    config: &Config,
    stage: &Stage,
    status: Arc<Status>,
) -> Result<Option<Arc<Notifier>>, RunError> {
    let notifier = Notifier::from_env(|name| std::env::var_os(name));
    let notifier = notifier.map_err(start("telling systemd, as NOTIFY_SOCKET asks for,"))?;
    let Some(notifier) = notifier else {
        return Ok(None);
    };
    let stop_max = config.server.shutdown_timeout + STOP_TIME;
    let progress = Arc::clone(&stage.progress);
    notifier
        .start(status, progress, stop_max, &stage.threads)
        .map_err(start("thread systemd"))?;
    notifier.ready();
    Ok(Some(notifier))
}
