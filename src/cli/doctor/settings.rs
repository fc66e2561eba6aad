//! Settings against each other.

use std::time::Duration;

use humantime::format_duration;

use super::Finding;
use crate::config::{Config, ExposedSecret};
use crate::queue::poller;

/// Nobody expects a recovery to take longer.
const LEASE_LONG: Duration = Duration::from_secs(60 * 60);
/// With less, hardly any answer is waited for.
const SHUTDOWN_MIN: Duration = Duration::from_secs(1);
/// A destination that is quicker on average is rare.
const ATTEMPT_MIN: Duration = Duration::from_millis(50);

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let Config {
        server,
        proxy,
        queue,
        ..
    } = config;
    vec![
        lease(proxy.request_timeout),
        shutdown(proxy.request_timeout, server.shutdown_timeout),
        rate(
            queue.handle_per_second,
            queue.workers,
            proxy.request_timeout,
        ),
        retention(queue.dead_retention),
    ]
}

/// What `Config::exposed` tells of.
pub(super) fn exposed(secret: &ExposedSecret) -> Finding {
    let mend = format!(
        "chmod o-r {:?}, and let its owner or group be who runs this",
        secret.path
    );
    Finding::warning(secret.key, secret.to_string(), mend)
}

fn lease(request_timeout: Duration) -> Finding {
    const ABOUT: &str = "proxy.request_timeout";
    let (lease, _) = poller::lease(request_timeout);
    let found = format!(
        "{}; what was being sent from the queue at a crash is due again after {}",
        format_duration(request_timeout),
        format_duration(lease)
    );
    if lease > LEASE_LONG {
        let mend = "lower it to a little more than the destination needs";
        return Finding::warning(ABOUT, found, mend);
    }
    Finding::ok(ABOUT, found)
}

fn shutdown(request_timeout: Duration, shutdown_timeout: Duration) -> Finding {
    const ABOUT: &str = "server.shutdown_timeout";
    if shutdown_timeout >= request_timeout {
        return Finding::ok(ABOUT, "longer than any attempt: a shutdown interrupts none");
    }
    let found = format!(
        "a shutdown waits {} for attempts that may take {}; what is not through is stored, and may arrive twice",
        format_duration(shutdown_timeout),
        format_duration(request_timeout)
    );
    match shutdown_timeout < SHUTDOWN_MIN {
        true => Finding::warning(ABOUT, found, "set it to at least 1s, better 30s"),
        false => Finding::ok(ABOUT, found),
    }
}

fn rate(per_second: u32, workers: usize, request_timeout: Duration) -> Finding {
    const ABOUT: &str = "queue.handle_per_second";
    let workers_f64 = f64::from(u32::try_from(workers).unwrap_or(u32::MAX));
    let attempt = Duration::from_secs_f64(workers_f64 / f64::from(per_second.max(1)));
    let found = format!(
        "{workers} workers reach {per_second} a second as long as an attempt takes no more than {:.2} s on average (at most {})",
        attempt.as_secs_f64(),
        format_duration(request_timeout)
    );
    match attempt < ATTEMPT_MIN {
        true => Finding::warning(ABOUT, found, "raise queue.workers, or lower it"),
        false => Finding::ok(ABOUT, found),
    }
}

fn retention(dead_retention: Option<Duration>) -> Finding {
    const ABOUT: &str = "queue.dead_retention";
    match dead_retention {
        Some(kept) => Finding::ok(
            ABOUT,
            format!("dead letters are deleted after {}", format_duration(kept)),
        ),
        None => Finding::warning(
            ABOUT,
            "dead letters are kept for ever",
            "set it to a time such as 30d, or delete from proxy_dead_letters yourself",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_defaults_are_fine() {
        let config = Config::from_yaml("", &|_| None).unwrap();
        for finding in findings(&config) {
            assert_eq!(finding.level, Level::Ok, "{finding:?}");
        }
    }

    #[test]
    fn each_is_warned_of() {
        assert!(lease(seconds(120)).found.contains("again after 2m 30s"));
        for finding in [
            lease(seconds(7200)),
            shutdown(seconds(120), seconds(0)),
            rate(1000, 10, seconds(120)),
            retention(None),
        ] {
            assert_eq!(finding.level, Level::Warning, "{finding:?}");
        }
        assert_eq!(shutdown(seconds(20), seconds(30)).level, Level::Ok);
    }
}
