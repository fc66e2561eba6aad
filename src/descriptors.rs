//! The limit of open file descriptors: raised at the start to what the settings need.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{Acceptor, Config};
use crate::intake::tiny_http;

/// Descriptors besides those of senders, destinations and Postgres: listeners, the control
/// port's connections (64), SQLite's files, log.
const OTHERS: u64 = 112;
/// tiny_http has no limit of connections; so many are allowed for.
const TINY_HTTP_SENDERS: u64 = 1024;

/// Raises the soft limit as far as needed, and returns how many connections of senders fit. The
/// log names the settings to lower if the hard limit is in the way.
pub fn raise_limit(config: &Config) -> usize {
    let max_connections = config.server.max_connections;
    let needed = needed(config);
    let limit = raise_to(needed);
    if limit >= needed {
        return max_connections;
    }
    // Senders must not take what the store and the destinations need, as long as anything is left.
    let fitting =
        max_connections.saturating_sub(usize::try_from(needed - limit).unwrap_or(usize::MAX));
    let share = usize::try_from(limit / 4).unwrap_or(usize::MAX);
    let connections = fitting.max(share).clamp(1, max_connections);
    log::warn!(limit, needed, connections; "the limit of open files (ulimit -Hn) is low: raise it, or lower server.max_connections, proxy.num_clients and queue.workers");
    connections
}

/// As [`raise_limit`], for a client with this many connections.
///
/// # Errors
/// How many connections the hard limit leaves.
pub fn raise_for_clients(connections: u64) -> Result<(), u64> {
    let limit = raise_to(connections + OTHERS);
    match limit >= connections + OTHERS {
        true => Ok(()),
        false => Err(limit.saturating_sub(OTHERS)),
    }
}

/// Raises the soft limit to what is needed, or as far as it goes, and returns what it is then.
fn raise_to(needed: u64) -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // `None` stands for no limit.
    let Some(soft) = limit.current.filter(|soft| *soft < needed) else {
        return limit.current.unwrap_or(u64::MAX);
    };
    let raised = Rlimit {
        current: Some(needed.min(limit.maximum.unwrap_or(u64::MAX))),
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!(soft, needed, error:%; "cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Descriptors that the settings ask for.
pub fn needed(config: &Config) -> u64 {
    let senders = match config.server.acceptor {
        Acceptor::Builtin => config.server.max_connections as u64,
        Acceptor::TinyHttp => TINY_HTTP_SENDERS * tiny_http::DESCRIPTORS_PER_CONNECTION,
    };
    let destinations = (config.proxy.num_clients + config.queue.workers) as u64;
    senders + destinations + u64::from(config.db.max_connections) + OTHERS
}
