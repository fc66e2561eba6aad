//! Starts the pipeline, from its end to its beginning: what takes requests comes last, and after all
//! else that can fail. Should a step fail all the same when rows may be leased or senders answered
//! already, what was taken on is drained as at any stop.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicUsize};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use prometheus::IntGauge;
use socket2::Socket;

use super::stage::Stage;
use super::{Listeners, RunError, Running, cannot_start, mark, spawn};
use crate::admission::{Admission, Committing};
use crate::allocator;
use crate::budget::Budget;
use crate::config::{Acceptor as AcceptorKind, Ack, Bind, Config, Listening, shown_address};
use crate::control::{self, Control};
use crate::direct;
use crate::drain::Drain;
use crate::intake::{Intake, builtin, tiny_http};
use crate::progress::{self, Around, Progress};
use crate::queue::ByClass;
use crate::queue::heartbeat::Heartbeat;
use crate::queue::mover::Mover;
use crate::queue::poller::{self, Poller, Room, Sampler, Wake};
use crate::queue::settler::{Settlements, Settler};
use crate::queue::spool::Spool;
use crate::queue::writer::{Appender, Writer};
use crate::status::Status;
use crate::systemd::Notifier;
use crate::thread::Threads;
use crate::worker::{Deliveries, Delivery, Places, Shared, Slot, Worker};

/// Heads of requests to the control port, which has no bodies.
const CONTROL_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long the front may be at the connections it has heard of.
const INTAKE_LIMIT: Duration = Duration::from_secs(30);
/// What systemd is told that a stop takes beyond `server.shutdown_timeout`: storing what is left takes
/// ten seconds, saving a file that was taken away up to a minute.
const STOP_TIME_TOLD: Duration = Duration::from_secs(90);
/// For scrapers and health checks, which send all they have to say at once.
const CONTROL_TIMES: builtin::Times = builtin::Times {
    request: Duration::from_secs(1),
    idle: Duration::from_secs(60),
};

/// The acceptor that the settings name.
pub(super) enum Accepting {
    Builtin {
        acceptor: Arc<builtin::Acceptor<Intake>>,
        /// The socket is systemd's: it outlives the program, which must not end its listening.
        is_handed_over: bool,
    },
    TinyHttp(Arc<tiny_http::Acceptor>),
}

impl Accepting {
    pub(super) fn stop(&self) {
        match self {
            Accepting::Builtin {
                acceptor,
                is_handed_over: true,
            } => acceptor.leave(),
            Accepting::Builtin { acceptor, .. } => acceptor.close(),
            // Never gets a socket of systemd's.
            Accepting::TinyHttp(acceptor) => acceptor.stop_accepting(),
        }
    }

    /// Senders' connections that are open. tiny_http does not tell, and is not waited for.
    pub(super) fn connections(&self) -> usize {
        match self {
            Accepting::Builtin { acceptor, .. } => acceptor.connections(),
            Accepting::TinyHttp(_) => 0,
        }
    }
}

impl Running {
    pub(super) fn start(
        config: &Config,
        (threads, signals): (Threads, Receiver<i32>),
        listeners: Listeners,
    ) -> Result<Running, RunError> {
        let notifier = Notifier::from_env(|name| std::env::var_os(name))
            .map_err(cannot_start("telling systemd, as NOTIFY_SOCKET asks for,"))?;
        let (stage, filled) = Stage::new(config, threads)?;
        let (wake, woken) = Wake::new();
        let (claiming, stop) = bounded(0);
        let (appender, settlements) = start_store_threads(&stage, config, &wake, &stop)?;
        if let (Some(spool), Some(filled)) = (&stage.spool, filled) {
            start_mover(&stage, spool, filled, &wake, (&stop, config.db.timeout))?;
        }
        let beating = start_heartbeat(&stage, &wake)?;
        start_giving_back(&stage, &stop)?;
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
        let committing = Committing {
            places: Arc::clone(&places),
            settlements: settlements.clone(),
            request_timeout: config.proxy.request_timeout,
        };
        let intake = new_intake(config, &stage, direct_sender, appender, committing);
        let drain = Drain {
            store: Arc::clone(&stage.store),
            spool: stage.spool.clone(),
            metrics: Arc::clone(&stage.metrics),
            room,
            places,
            settlements,
            direct,
            claimed,
            slots,
            hurry: Some(hurry_sender),
        };
        let running = Running {
            notifier,
            health: Arc::clone(&stage.health),
            shared,
            tunables: stage.tunables.clone(),
            threads: stage.threads.clone(),
            signals,
            accepting: None,
            intake: Arc::new(intake),
            drain,
            claiming,
            beating,
        };
        running.begin(config, &stage, poller, listeners)
    }

    /// Begins to take on what must not be lost: rows, then requests.
    fn begin(
        self,
        config: &Config,
        stage: &Stage,
        poller: Poller,
        listeners: Listeners,
    ) -> Result<Running, RunError> {
        match self.take_on(config, stage, poller, listeners) {
            Ok(accepting) => {
                if let Some(notifier) = &self.notifier {
                    notifier.ready();
                }
                Ok(Running {
                    accepting: Some(accepting),
                    ..self
                })
            }
            Err(error) => {
                log::error!(error:%; "the start failed, stopping");
                match self.drain(config.server.shutdown_timeout) {
                    (lost @ 1.., _) => Err(RunError::Lost(lost)),
                    (0, Err(damaged)) => Err(RunError::Store(damaged)),
                    (0, Ok(())) => Err(error),
                }
            }
        }
    }

    fn take_on(
        &self,
        config: &Config,
        stage: &Stage,
        poller: Poller,
        listeners: Listeners,
    ) -> Result<Accepting, RunError> {
        let intake = &self.intake;
        let status = stage.status(config);
        start_control(config, stage, intake, &status, listeners.control)?;
        if let Some(notifier) = &self.notifier {
            let stop_max = config.server.shutdown_timeout + STOP_TIME_TOLD;
            let progress = Arc::clone(&stage.progress);
            notifier
                .start(status, progress, stop_max, &stage.threads)
                .map_err(cannot_start("thread systemd"))?;
        }
        // From here on rows are leased.
        spawn(&stage.threads, "poller", move || poller.run())?;
        // And from here on senders are answered: nothing may come after it that can fail.
        start_intake(
            stage,
            config,
            listeners.intake,
            listeners.max_connections,
            intake,
        )
    }
}

fn start_giving_back(stage: &Stage, stop: &Receiver<()>) -> Result<(), RunError> {
    let (freed, stop) = (stage.budget.freed().clone(), stop.clone());
    spawn(&stage.threads, "memory", move || {
        allocator::run(&freed, &stop);
    })
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
    let (mut writer, appender) = Writer::new(
        Arc::clone(store),
        stage.spool.clone(),
        Arc::clone(health),
        Arc::clone(metrics),
        wake.clone(),
        config.db.timeout,
    );
    writer.budget = Some(Arc::clone(&stage.budget));
    let limit = store_limit(config);
    let disk = Arc::clone(store);
    let around = move || match disk.hangs() {
        Some(_) => Around::Excused,
        None => Around::Nothing,
    };
    stage.progress.watch("writer", &writer.stage, limit, around);
    spawn(threads, "writer", move || writer.run())?;
    let (settler, settlements) =
        Settler::new(Arc::clone(store), Arc::clone(health), Arc::clone(metrics));
    stage
        .progress
        .watch("settler", &settler.stage, limit, || Around::Nothing);
    spawn(threads, "settler", move || settler.run())?;
    let sampler = Sampler {
        store: Arc::clone(store),
        health: Arc::clone(health),
        metrics: Arc::clone(metrics),
        destination: Arc::clone(&stage.destination),
        clock: Arc::clone(&stage.clock),
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

/// Beats until what it returns is dropped.
fn start_heartbeat(stage: &Stage, wake: &Wake) -> Result<Sender<()>, RunError> {
    let (beating, stop) = bounded(0);
    if stage.store.is_shared() {
        let heartbeat = Heartbeat {
            store: Arc::clone(&stage.store),
            health: Arc::clone(&stage.health),
            metrics: Arc::clone(&stage.metrics),
            wake: wake.clone(),
            stop,
        };
        spawn(&stage.threads, "heartbeat", move || heartbeat.run())?;
    }
    Ok(beating)
}

fn start_mover(
    stage: &Stage,
    spool: &Arc<Spool>,
    filled: Receiver<()>,
    wake: &Wake,
    (stop, timeout): (&Receiver<()>, Duration),
) -> Result<(), RunError> {
    let mover = Mover {
        spool: Arc::clone(spool),
        store: Arc::clone(&stage.store),
        health: Arc::clone(&stage.health),
        metrics: Arc::clone(&stage.metrics),
        budget: Arc::clone(&stage.budget),
        filled,
        wake: wake.clone(),
        stop: stop.clone(),
        timeout,
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
        .watch("poller", &poller_stage, limit, || Around::Nothing);
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
    let around = move || match !waiting.is_empty() && busy.get() < workers {
        true => Around::Waited,
        false => Around::Nothing,
    };
    progress.watch("proxy workers", proxy, limit, around);
    progress.watch("queue workers", queue, limit, || Around::Nothing);
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
        manners: AtomicU8::new(config.manners().to_bits()),
        mark: AtomicU32::new(mark(&server.bind, &config.proxy.remote_url).to_bits()),
        body_bytes_max: AtomicUsize::new(server.max_body_size),
        draining: Arc::new(AtomicBool::new(false)),
    }
}

/// Starts the acceptor that the settings name.
fn start_intake(
    stage: &Stage,
    config: &Config,
    listening: Listening,
    max_connections: usize,
    intake: &Arc<Intake>,
) -> Result<Accepting, RunError> {
    let Listening {
        socket,
        is_handed_over,
    } = listening;
    let address = shown_address(&socket).map_err(cannot_start("intake"))?;
    let server = &config.server;
    let accepting = match server.acceptor {
        AcceptorKind::Builtin => {
            let times = builtin::Times {
                request: server.read_timeout,
                idle: server.idle_timeout,
            };
            let acceptor = builtin::Acceptor::start(
                "intake",
                socket,
                Arc::clone(intake),
                times,
                max_connections,
                &stage.threads,
            )
            .map_err(cannot_start("intake"))?;
            stage
                .progress
                .watch("intake", acceptor.stage(), INTAKE_LIMIT, || Around::Nothing);
            Accepting::Builtin {
                acceptor,
                is_handed_over,
            }
        }
        AcceptorKind::TinyHttp => {
            Accepting::TinyHttp(start_tiny_http(&stage.threads, socket, intake)?)
        }
    };
    log::info!(addr:% = address; "listening");
    Ok(accepting)
}

/// It accepts as soon as it is there, so the threads that answer come first.
fn start_tiny_http(
    threads: &Threads,
    listener: Socket,
    intake: &Arc<Intake>,
) -> Result<Arc<tiny_http::Acceptor>, RunError> {
    let (hand_out, waiting) = bounded::<Arc<tiny_http::Acceptor>>(tiny_http::THREADS);
    for number in 1..=tiny_http::THREADS {
        let waiting = waiting.clone();
        spawn(threads, format!("intake-{number}"), move || {
            if let Ok(acceptor) = waiting.recv() {
                acceptor.run();
            }
        })?;
    }
    let acceptor = tiny_http::Acceptor::new(listener.into(), Arc::clone(intake));
    let acceptor = Arc::new(acceptor.map_err(cannot_start("intake"))?);
    for _ in 0..tiny_http::THREADS {
        // There is room for all, and each waits for one.
        let _ = hand_out.send(Arc::clone(&acceptor));
    }
    Ok(acceptor)
}

fn start_control(
    config: &Config,
    stage: &Stage,
    intake: &Arc<Intake>,
    status: &Arc<Status>,
    listener: Socket,
) -> Result<(), RunError> {
    let address = shown_address(&listener).map_err(cannot_start("control"))?;
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
    let control = Arc::new(control);
    let start = |name, listener| {
        let (control, max) = (Arc::clone(&control), control::CONNECTIONS_MAX);
        builtin::Acceptor::start(name, listener, control, CONTROL_TIMES, max, &stage.threads)
            .map_err(cannot_start("control"))
    };
    start("control", listener)?;
    if let Some(local) = listen_locally() {
        start("local", local)?;
    }
    log::info!(addr:% = address; "serving metrics and health");
    Ok(())
}

/// The same where a command finds it. Nothing else needs it, so a start does not fail for it.
fn listen_locally() -> Option<Socket> {
    let directories = std::env::var_os("RUNTIME_DIRECTORY")?;
    let directory = std::env::split_paths(&directories).next()?;
    let bind = Bind::Unix(directory.join(control::SOCKET));
    let listening = bind.listen();
    if let Err(error) = &listening {
        log::warn!(addr:% = bind, error:%; "commands will not find this service by themselves");
    }
    listening.ok().map(|listening| listening.socket)
}
