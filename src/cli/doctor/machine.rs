//! What the system gives: threads, descriptors, memory, time to stop, and the clock.

use std::path::Path;
use std::time::{Duration, SystemTime};

use humantime::format_duration;
use rustix::process::{Resource, geteuid, getrlimit};

use super::{Finding, size, told_by};
use crate::config::{Acceptor, Config};
use crate::{descriptors, machine};

/// Threads besides those that settings count: control port, signals, writer and the like.
const OTHER_THREADS: u64 = 48;
/// Operations of the store that a shutdown may wait for, one after the other.
const STORE_OPERATIONS_AT_STOP: u32 = 3;
/// 2025-01-01: before the program was there.
const YEAR_2025: Duration = Duration::from_secs(1_735_689_600);

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let memory_limit = u64::try_from(config.server.memory_limit).unwrap_or(u64::MAX);
    let needed = config.server.shutdown_timeout + STORE_OPERATIONS_AT_STOP * config.db.timeout;
    vec![
        threads(threads_needed(config), thread_limits()),
        open_files(
            descriptors::needed(config),
            getrlimit(Resource::Nofile).maximum,
        ),
        memory(memory_limit, machine::memory()),
        systemd(needed, unit().as_deref()),
        clock(SystemTime::now(), synchronised().as_deref()),
    ]
}

fn threads_needed(config: &Config) -> u64 {
    let connections = match config.server.acceptor {
        Acceptor::Builtin => config.server.max_connections,
        Acceptor::TinyHttp => 0,
    };
    let counted = config.proxy.num_clients + config.queue.workers + connections;
    counted as u64 + u64::from(config.db.max_connections) + OTHER_THREADS
}

/// Each limit that could be read, and where it is set.
fn thread_limits() -> Vec<(&'static str, u64)> {
    let mut limits = Vec::new();
    // Nothing holds root back there.
    let processes = getrlimit(Resource::Nproc).current;
    if let Some(limit) = processes.filter(|_| !geteuid().is_root()) {
        limits.push(("ulimit -u (LimitNPROC= of a unit)", limit));
    }
    if let Some(limit) = machine::lowest(machine::THREADS) {
        limits.push(("pids.max of the cgroup (TasksMax= of a unit)", limit));
    }
    if let Some(limit) = machine::number(Path::new("/proc/sys/kernel/threads-max")) {
        limits.push(("kernel.threads-max", limit));
    }
    limits
}

fn threads(needed: u64, limits: Vec<(&'static str, u64)>) -> Finding {
    const ABOUT: &str = "threads";
    let Some((name, limit)) = limits.into_iter().min_by_key(|(_, limit)| *limit) else {
        return Finding::ok(ABOUT, format!("up to {needed}; no limit is known"));
    };
    let found = format!("up to {needed}, {name} allows {limit}");
    if needed > limit {
        let mend =
            "raise the limit, or lower proxy.num_clients, queue.workers and server.max_connections";
        return Finding::error(ABOUT, found, mend);
    }
    Finding::ok(ABOUT, found)
}

/// `None` is no limit.
fn open_files(needed: u64, hard_limit: Option<u64>) -> Finding {
    const ABOUT: &str = "open files";
    match hard_limit {
        Some(limit) if limit < needed => Finding::warning(
            ABOUT,
            format!(
                "the settings ask for {needed}, the limit is {limit}: fewer senders are let in than server.max_connections"
            ),
            "raise ulimit -Hn (LimitNOFILE= of a unit), or lower server.max_connections, proxy.num_clients and queue.workers",
        ),
        Some(limit) => Finding::ok(ABOUT, format!("up to {needed}, the limit is {limit}")),
        None => Finding::ok(ABOUT, format!("up to {needed}, without a limit")),
    }
}

fn memory(limit: u64, there: Option<u64>) -> Finding {
    const ABOUT: &str = "server.memory_limit";
    let Some(there) = there else {
        let found = format!(
            "{}; how much memory there is could not be read",
            size(limit)
        );
        return Finding::ok(ABOUT, found);
    };
    let found = format!("{} for bodies, of {} there are", size(limit), size(there));
    let mend = "lower it to a quarter of the memory, or give more (MemoryMax= of a unit)";
    match limit {
        _ if limit >= there => Finding::error(ABOUT, found, mend),
        _ if limit > there / 2 => Finding::warning(ABOUT, found, mend),
        _ => Finding::ok(ABOUT, found),
    }
}

/// What systemd says of a unit for this program.
fn unit() -> Option<String> {
    told_by(
        "systemctl",
        &[
            "show",
            "asyncproxy.service",
            "--property=LoadState,TimeoutStopUSec",
        ],
    )
}

fn systemd(needed: Duration, told: Option<&str>) -> Finding {
    const ABOUT: &str = "TimeoutStopSec";
    let property = |name: &str| {
        let mut lines = told.unwrap_or_default().lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    };
    if property("LoadState") != Some("loaded") {
        return Finding::ok(
            ABOUT,
            "not checked: systemd knows no asyncproxy.service here",
        );
    }
    let text = property("TimeoutStopUSec").unwrap_or_default();
    if text == "infinity" {
        return Finding::ok(ABOUT, "systemd waits as long as a stop takes");
    }
    let Ok(given) = humantime::parse_duration(text) else {
        return Finding::ok(ABOUT, format!("not checked: systemd says {text:?}"));
    };
    let found = format!(
        "systemd waits {}, a stop may take {} (server.shutdown_timeout and {STORE_OPERATIONS_AT_STOP} times db.timeout)",
        format_duration(given),
        format_duration(needed)
    );
    if given < needed {
        let mend = format!(
            "set TimeoutStopSec={} in the unit, or what is in memory may be lost at a stop",
            needed.as_secs() + 1
        );
        return Finding::error(ABOUT, found, mend);
    }
    Finding::ok(ABOUT, found)
}

fn synchronised() -> Option<String> {
    told_by(
        "timedatectl",
        &["show", "--property=NTPSynchronized", "--value"],
    )
}

fn clock(now: SystemTime, synchronised: Option<&str>) -> Finding {
    const ABOUT: &str = "clock";
    const MEND: &str = "start a time service: timedatectl set-ntp true, or chrony";
    let time = humantime::format_rfc3339_seconds(now);
    if now < SystemTime::UNIX_EPOCH + YEAR_2025 {
        return Finding::error(ABOUT, format!("it says {time}, which is over"), MEND);
    }
    match synchronised {
        Some("yes") => Finding::ok(ABOUT, format!("it says {time}, synchronised")),
        Some("no") => Finding::warning(ABOUT, format!("it says {time}, not synchronised"), MEND),
        _ => Finding::ok(
            ABOUT,
            format!("it says {time}; whether it is synchronised could not be read"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn the_lowest_limit_of_threads_counts() {
        let found = |limits| threads(1000, limits);
        assert_eq!(found(vec![]).level, Level::Ok);
        assert_eq!(found(vec![("a", 1000), ("b", 2000)]).level, Level::Ok);
        let low = found(vec![("a", 2000), ("b", 999)]);
        assert_eq!(low.level, Level::Error);
        assert!(low.found.contains("b allows 999"), "{low:?}");
        assert!(threads_needed(&Config::from_yaml("", &|_| None).unwrap()) > 1844);
    }

    #[test]
    fn descriptors_and_memory_are_compared() {
        assert_eq!(open_files(10, None).level, Level::Ok);
        assert_eq!(open_files(10, Some(10)).level, Level::Ok);
        assert_eq!(open_files(11, Some(10)).level, Level::Warning);
        assert_eq!(memory(10, None).level, Level::Ok);
        assert_eq!(memory(50, Some(100)).level, Level::Ok);
        assert_eq!(memory(51, Some(100)).level, Level::Warning);
        assert_eq!(memory(100, Some(100)).level, Level::Error);
    }

    #[test]
    fn systemd_must_wait_long_enough() {
        let needed = Duration::from_secs(45);
        let level = |told| systemd(needed, told).level;
        assert_eq!(level(None), Level::Ok);
        assert_eq!(
            level(Some("LoadState=not-found\nTimeoutStopUSec=1s")),
            Level::Ok
        );
        assert_eq!(
            level(Some("LoadState=loaded\nTimeoutStopUSec=infinity")),
            Level::Ok
        );
        assert_eq!(
            level(Some("TimeoutStopUSec=1min 30s\nLoadState=loaded")),
            Level::Ok
        );
        let short = systemd(needed, Some("LoadState=loaded\nTimeoutStopUSec=10s"));
        assert_eq!(short.level, Level::Error);
        assert!(
            short
                .mend
                .is_some_and(|mend| mend.contains("TimeoutStopSec=46"))
        );
    }

    #[test]
    fn a_clock_that_is_wrong_is_told() {
        let now = SystemTime::UNIX_EPOCH + 2 * YEAR_2025;
        assert_eq!(
            clock(SystemTime::UNIX_EPOCH, Some("yes")).level,
            Level::Error
        );
        assert_eq!(clock(now, Some("yes")).level, Level::Ok);
        assert_eq!(clock(now, Some("no")).level, Level::Warning);
        assert_eq!(clock(now, None).level, Level::Ok);
    }
}
