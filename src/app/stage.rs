//! What the stages of the pipeline share, as the settings want it.

use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::{RunError, cannot_start};
use crate::breaker::Destination;
use crate::budget::Budget;
use crate::config::{Config, Database, RateScope};
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::queue::Store;
use crate::queue::depth::Depth;
use crate::queue::health::StoreHealth;
use crate::queue::migrate::Policy;
use crate::queue::operate::Operate;
use crate::queue::postgres::PostgresStore;
use crate::queue::spool::Spool;
use crate::queue::sqlite::SqliteStore;
use crate::status::Status;
use crate::thread::Threads;
use crate::upstream::Upstream;

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
pub(super) struct Tunables {
    pub(super) upstream: Upstream,
    pub(super) per_second: Arc<AtomicU32>,
    pub(super) dead_retention: Arc<Mutex<Option<Duration>>>,
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

pub(super) fn upstream(config: &Config, request_timeout: Duration) -> Upstream {
    let proxy = &config.proxy;
    Upstream::new(proxy.remote_url.clone(), request_timeout, proxy.tls.clone())
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
    pub(super) threads: Threads,
    pub(super) tunables: Tunables,
}

impl Stage {
    /// And where the spool, if there is one, tells that it has something.
    pub(super) fn new(
        config: &Config,
        threads: Threads,
    ) -> Result<(Stage, Option<Receiver<()>>), RunError> {
        let tunables = Tunables::new(config);
        let metrics = Metrics::new(config.metrics.max_paths)
            .map_err(io::Error::other)
            .map_err(cannot_start("metrics"))?;
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
    pub(super) fn status(&self, config: &Config) -> Arc<Status> {
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
