//! The limit of open file descriptors: raised at the start to what the settings need.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{Acceptor, Config};
use crate::intake::tiny_http;

/// Descriptors besides those of senders, destinations and Postgres: listeners, the control
/// port's connections, SQLite's files, log.
const OTHERS: u64 = 64;
/// tiny_http has no limit of connections; so many are allowed for.
const TINY_HTTP_SENDERS: u64 = 1024;

/// Raises the soft limit, and the log names the settings to lower if the hard limit is in the way.
pub fn raise_limit(config: &Config) {
    let needed = needed(config);
    let limit = getrlimit(Resource::Nofile);
    // `None` stands for no limit.
    let Some(soft) = limit.current.filter(|soft| *soft < needed) else {
        return;
    };
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: Some(needed.min(hard)),
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!(soft, needed, error:%; "cannot raise the limit of open files");
    } else if hard < needed {
        log::warn!(limit = hard, needed; "the limit of open files (ulimit -Hn) is low: raise it, or lower server.max_connections, proxy.num_clients and queue.workers");
    }
}

fn needed(config: &Config) -> u64 {
    let senders = match config.server.acceptor {
        Acceptor::Builtin => config.server.max_connections as u64,
        Acceptor::TinyHttp => TINY_HTTP_SENDERS * tiny_http::DESCRIPTORS_PER_CONNECTION,
    };
    let destinations = (config.proxy.num_clients + config.queue.workers) as u64;
    senders + destinations + u64::from(config.db.max_connections) + OTHERS
}
