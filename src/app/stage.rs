//! What the stages of the pipeline share, as the settings want it.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::{RunError, cannot_start};
use crate::breaker::Destination;
use crate::budget::Budget;
use crate::clock::Clock;
use crate::config::{Config, Database, RateScope};
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::queue::Store;
use crate::queue::depth::Depth;
use crate::queue::health::StoreHealth;
use crate::queue::migrate::Policy;
use crate::queue::operate::Operate;
use crate::queue::poller::lease;
use crate::queue::postgres::PostgresStore;
use crate::queue::spool::Spool;
use crate::queue::sqlite::SqliteStore;
use crate::settle::RETRY_AFTER_MAX;
use crate::status::Status;
use crate::thread::Threads;
use crate::upstream::{Host, Upstream};

/// Beyond the longest pause: two clocks may differ by that.
const PAUSE_MARGIN: Duration = Duration::from_secs(60);

fn store(config: &Config, clock: &Arc<Clock>, tunables: &Tunables) -> Arc<dyn Store> {
    let db = &config.db;
    match &db.database {
        // One process, whose poller keeps to the rate: that is its whole cluster.
        Database::Sqlite(path) => {
            let store = file(path, config, clock, tunables).appending_here();
            Arc::new(store.with_policy(db.migrate))
        }
        Database::Postgres(postgres) => {
            let postgres = (**postgres).clone();
            let store = PostgresStore::new(postgres, db.max_connections, db.use_index, db.timeout);
            let store = store.with_policy(db.migrate);
            let per_second = Arc::clone(&tunables.per_second);
            Arc::new(match config.queue.rate_scope {
                RateScope::Instance => store,
                RateScope::Cluster => store.sharing_changing_rate(per_second),
            })
        }
    }
}

/// A file that this process serves.
fn file(path: &Path, config: &Config, clock: &Arc<Clock>, tunables: &Tunables) -> SqliteStore {
    SqliteStore::new(path.to_owned(), config.db.use_index, config.db.timeout)
        .with_clock(Arc::clone(clock))
        .with_pause_max(Arc::clone(&tunables.pause_max))
        .with_min_free(Arc::clone(&tunables.min_free))
}

/// Milliseconds that no row waits longer for than this: after a failure, as an answer asked for, or
/// for the end of a lease.
fn pause_max(config: &Config) -> u64 {
    let (lease, _) = lease(config.proxy.request_timeout);
    let pause = config
        .queue
        .retry
        .backoff_max
        .max(RETRY_AFTER_MAX)
        .max(lease);
    u64::try_from((pause + PAUSE_MARGIN).as_millis()).unwrap_or(u64::MAX)
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
pub(super) struct Tunables {
    pub(super) upstream: Upstream,
    pub(super) per_second: Arc<AtomicU32>,
    pub(super) dead_retention: Arc<Mutex<Option<Duration>>>,
    /// Milliseconds.
    pause_max: Arc<AtomicU64>,
    /// Bytes.
    min_free: Arc<AtomicU64>,
}

impl Tunables {
    fn new(config: &Config) -> Tunables {
        Tunables {
            upstream: upstream(config, config.proxy.request_timeout),
            per_second: Arc::new(AtomicU32::new(config.queue.handle_per_second)),
            dead_retention: Arc::new(Mutex::new(config.queue.dead_retention)),
            pause_max: Arc::new(AtomicU64::new(pause_max(config))),
            min_free: Arc::new(AtomicU64::new(config.queue.min_free)),
        }
    }

    /// What the files of this process go by.
    pub(super) fn set_files(&self, config: &Config) {
        self.pause_max.store(pause_max(config), Ordering::Relaxed);
        self.min_free
            .store(config.queue.min_free, Ordering::Relaxed);
    }
}

pub(super) fn upstream(config: &Config, request_timeout: Duration) -> Upstream {
    let proxy = &config.proxy;
    let host = match proxy.preserve_host {
        true => Host::Preserved,
        false => Host::Own,
    };
    Upstream::new(proxy.remote_url.clone(), request_timeout, proxy.tls.clone()).with_host(host)
}

/// What the stages of the pipeline share.
#[derive(Clone)]
pub(super) struct Stage {
    pub(super) store: Arc<dyn Store>,
    pub(super) spool: Option<Arc<Spool>>,
    pub(super) health: Arc<StoreHealth>,
    pub(super) destination: Arc<Destination>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) budget: Arc<Budget>,
    pub(super) progress: Arc<Progress>,
    pub(super) clock: Arc<Clock>,
    pub(super) threads: Threads,
    pub(super) tunables: Tunables,
}

impl Stage {
    /// And where the spool, if there is one, tells that it has something.
    pub(super) fn new(
        config: &Config,
        threads: Threads,
    ) -> Result<(Stage, Option<Receiver<()>>), RunError> {
        let (tunables, clock) = (Tunables::new(config), Arc::<Clock>::default());
        let metrics = Metrics::new(config.metrics.max_paths)
            .map_err(io::Error::other)
            .map_err(cannot_start("metrics"))?;
        metrics.set_rows_max(config.queue.max_rows);
        let metrics = Arc::new(metrics);
        let (spool, filled) = match config.db.spool.clone() {
            None => (None, None),
            Some(path) => {
                let file = file(&path, config, &clock, &tunables);
                let (spool, filled) = Spool::new(file, Arc::clone(&metrics));
                (Some(Arc::new(spool)), Some(filled))
            }
        };
        let destination = Destination::new(config.proxy.breaker_failures, Arc::clone(&metrics));
        let stage = Stage {
            store: store(config, &clock, &tunables),
            spool,
            health: Arc::new(StoreHealth::new(Depth::new(config.queue.max_rows))),
            destination: Arc::new(destination),
            metrics,
            budget: Budget::new(config.server.memory_limit),
            progress: Arc::default(),
            clock,
            threads,
            tunables,
        };
        Ok((stage, filled))
    }
}

impl Stage {
    pub(super) fn status(&self, config: &Config) -> Arc<Status> {
        Arc::new(Status {
            metrics: Arc::clone(&self.metrics),
            store: Arc::clone(&self.store),
            health: Arc::clone(&self.health),
            clock: Arc::clone(&self.clock),
            destination: Arc::clone(&self.destination),
            spool: self.spool.clone(),
            per_second: Arc::clone(&self.tunables.per_second),
            rate_scope: config.queue.rate_scope,
            started: Instant::now(),
            identity: config.store(),
            settings: config.path.clone(),
        })
    }
}
