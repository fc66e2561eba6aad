//! The control port: metrics, health, readiness.

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Setup, wait_until};

/// Everything that is there from the start, whether anything has happened or not.
const NAMES: [&str; 33] = [
    "queue_total_size",
    "asyncproxy_requests_total{admission=\"direct\"}",
    "asyncproxy_requests_total{admission=\"stored\"}",
    "asyncproxy_requests_total{admission=\"refused\"}",
    "asyncproxy_refused_total{reason=\"invalid\"}",
    "asyncproxy_refused_total{reason=\"too_large\"}",
    "asyncproxy_refused_total{reason=\"overloaded\"}",
    "asyncproxy_refused_total{reason=\"loop\"}",
    "asyncproxy_attempts_total{outcome=\"delivered\"}",
    "asyncproxy_attempts_total{outcome=\"later\"}",
    "asyncproxy_attempts_total{outcome=\"buried\"}",
    "asyncproxy_delivered_total",
    "asyncproxy_stale_settlements_total",
    "asyncproxy_unreadable_rows_total",
    "asyncproxy_dead_letters_purged_total",
    "asyncproxy_lost_total{reason=\"shutdown\"}",
    "asyncproxy_in_flight",
    "asyncproxy_held_bytes",
    "asyncproxy_log_dropped_total",
    "asyncproxy_config_reloads_total{result=\"ok\"}",
    "asyncproxy_config_reloads_total{result=\"failed\"}",
    "asyncproxy_config_last_reload_successful",
    "asyncproxy_queue_paused",
    "asyncproxy_store_up",
    "asyncproxy_store_errors_total",
    "asyncproxy_threads_busy{pool=\"intake\"}",
    "asyncproxy_threads_busy{pool=\"proxy\"}",
    "asyncproxy_threads_busy{pool=\"queue\"}",
    "asyncproxy_batch_rows_count{op=\"append\"}",
    "asyncproxy_queue_rows{state=\"waiting\"}",
    "asyncproxy_queue_rows{state=\"leased\"}",
    "asyncproxy_queue_rows{state=\"dead\"}",
    "asyncproxy_queue_oldest_age_seconds",
];

#[test]
fn endpoints_answer_as_they_are_named() {
    let setup = Setup::new("http://127.0.0.1:1").set("metrics.path", "/internal/prom");
    let proxy = setup.start();
    for (target, status, text) in [
        ("/healthz", 200, "ok\n"),
        ("/healthz?verbose", 200, "ok\n"),
        ("/readyz", 200, "ok\n"),
        ("/status", 200, "\"state\":\"running\""),
        ("/internal/prom", 200, "asyncproxy_in_flight 0\n"),
        ("/metrics", 404, ""),
        ("/", 404, ""),
    ] {
        let answer = http::get(proxy.control, target);
        assert_eq!(answer.status, status, "{target}");
        assert!(answer.text().contains(text), "{target}: {}", answer.text());
    }
    let answer = http::get(proxy.control, "/internal/prom");
    let kind = answer.field("content-type").expect("Content-Type");
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let status = http::get(proxy.control, "/status");
    assert_eq!(status.field("content-type"), Some("application/json"));
    let post = http::request("POST", "/healthz", &[], b"");
    assert_eq!(http::exchange(proxy.control, &post).status, 405);
}

#[test]
fn every_metric_is_there_from_the_start() {
    let setup = Setup::new("http://127.0.0.1:1");
    let proxy = setup.start();
    let metrics = proxy.metrics();
    for name in NAMES {
        assert!(metrics.has(name), "{name}");
    }
}

#[test]
fn the_go_programs_metrics_keep_their_names_and_labels() {
    let destination = Destination::answering(|seen| match (seen.attempt(), &*seen.target()) {
        (1, "/hook") => Answer::status(500),
        (1, "/gone?x=2") => Answer::reset(),
        _ => Answer::ok(),
    });
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    // A path is a label once something was delivered there.
    for target in ["/hook?first", "/gone?first", "/fine?first"] {
        let request = http::request("POST", target, &[], b"");
        assert_eq!(proxy.send(&request).status, 200);
    }
    metrics::assert_settled(&proxy, 3);
    proxy.accept(0..1);
    for target in ["/gone?x=2", "/fine?secret=1", "/fine?secret=2"] {
        let request = http::request("POST", target, &[], b"");
        assert_eq!(proxy.send(&request).status, 200);
    }
    destination.wait_for(9, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, 7);
    for (name, count) in [
        ("http_requests_total{path=\"/hook\"}", 1.0),
        ("http_requests_total{path=\"/fine\"}", 2.0),
        ("http_requests_total{path=\"other\"}", 3.0),
        ("http_response_time_seconds_count{path=\"/fine\"}", 2.0),
        (
            "http_proxy_response_time_seconds_count{path=\"/hook\",status=\"response 500\"}",
            1.0,
        ),
        (
            "http_proxy_response_time_seconds_count{path=\"/hook\",status=\"OK\"}",
            2.0,
        ),
        (
            "http_proxy_response_time_seconds_count{path=\"/gone\",status=\"request error\"}",
            1.0,
        ),
        (
            "http_proxy_response_time_seconds_count{path=\"/fine\",status=\"OK\"}",
            3.0,
        ),
    ] {
        assert_eq!(metrics.get(name), count, "{name}");
    }
    let text = http::get(proxy.control, "/metrics").text();
    assert!(!text.contains("secret"));
}

/// Whoever asks for whatever paths takes no label from those that are in use.
#[test]
fn paths_are_labels_once_something_was_delivered_there() {
    let destination = Destination::answering(|seen| match seen.target().starts_with("/junk") {
        true => Answer::status(404),
        false => Answer::ok(),
    });
    let setup = Setup::new(&destination.url())
        .set("metrics.max_paths", 3)
        .set("queue.give_up_statuses", "[404]");
    let proxy = setup.start();
    let send = |path: &str| {
        let request = http::request("POST", path, &[], b"");
        assert_eq!(proxy.send(&request).status, 200);
    };
    (0..50).for_each(|path| send(&format!("/junk/{path}")));
    destination.wait_for(50, PATIENCE);
    metrics::wait_for(&proxy, "all to be given up", |metrics| {
        metrics.rows("dead") == 50.0
    });
    for path in 0..10 {
        // One after another, each twice.
        for time in 0..2 {
            send(&format!("/path/{path}"));
            destination.wait_for(50 + 2 * path + time + 1, PATIENCE);
            metrics::wait_for(&proxy, "it to be counted", |metrics| {
                metrics.get("asyncproxy_delivered_total") == (2 * path + time + 1) as f64
            });
        }
    }
    let metrics = metrics::assert_settled(&proxy, 70);
    assert_eq!(metrics.get("http_requests_total{path=\"/path/2\"}"), 1.0);
    assert_eq!(
        metrics.get("http_proxy_response_time_seconds_count{path=\"/path/2\",status=\"OK\"}"),
        2.0
    );
    assert_eq!(metrics.get("http_requests_total{path=\"other\"}"), 67.0);
    assert_eq!(metrics.sum("http_requests_total"), 70.0);
    assert_eq!(
        metrics.get("http_proxy_response_time_seconds_count{path=\"other\",status=\"OK\"}"),
        14.0
    );
    assert!(!metrics.has("http_requests_total{path=\"/path/3\"}"));
}

/// As a URI may have them, though no browser sends them.
#[test]
fn nothing_in_a_path_steers_the_terminal_that_shows_the_metrics() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    for target in ["/a\u{9b}2J", "/b\u{202e}c", "/d\u{85}"] {
        let request = http::request("POST", target, &[], b"");
        assert_eq!(proxy.send(&request).status, 200, "{target:?}");
    }
    metrics::assert_settled(&proxy, 3);
    let text = http::get(proxy.control, "/metrics").text();
    assert!(text.contains("path=\"/a\\\\u{9b}2J\""), "{text}");
    assert!(text.contains("path=\"/b\\\\u{202e}c\""), "{text}");
    let hidden = |c: char| c != '\n' && !c.is_ascii_graphic() && c != ' ';
    assert!(!text.contains(hidden), "{text}");
}

#[test]
fn what_was_accepted_can_always_be_found() {
    let destination = Destination::answering(|seen| match seen.number() {
        0..5 => Answer::ok(),
        5..8 => Answer::status(410),
        8..12 => Answer::hang(),
        _ => Answer::status(500),
    });
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("queue.backoff_min", "1h")
        .set("queue.backoff_max", "1h")
        .set("queue.give_up_statuses", "[410]");
    let proxy = setup.start();
    proxy.accept(0..20);
    let metrics = metrics::wait_for(&proxy, "all in their places", |metrics| {
        metrics.get("asyncproxy_delivered_total") == 5.0
            && metrics.rows("dead") == 3.0
            && metrics.rows("leased") == 4.0
            && metrics.rows("waiting") == 8.0
    });
    metrics.assert_balance();
    assert_eq!(metrics.accepted(), 20.0);
    assert_eq!(metrics.get("queue_total_size"), 12.0);
    assert!(metrics.get("asyncproxy_queue_oldest_age_seconds") > 0.0);
    assert_eq!(metrics.get("asyncproxy_threads_busy{pool=\"queue\"}"), 4.0);
    assert!(metrics.get("asyncproxy_batch_rows_count{op=\"append\"}") >= 1.0);
    assert!(metrics.get("asyncproxy_held_bytes") > 0.0);
}

/// A destination that is down fills the queue; all of it and its end are seen from outside.
#[test]
fn status_tells_what_waits_and_why() {
    let setup = Setup::new("http://127.0.0.1:1")
        .set("server.enqueue_rate", 0)
        .set("proxy.breaker_failures", 1)
        .set("queue.handle_per_second", 30);
    let proxy = setup.start();
    let status = || -> serde_json::Value {
        serde_json::from_str(&http::get(proxy.control, "/status").text()).unwrap()
    };
    let first = status();
    assert_eq!(first["queue"]["rate_per_second"], 30);
    assert_eq!(first["queue"]["rate_scope"], "instance");
    assert_eq!(first["destination"]["breaker"], "closed");
    assert_eq!(first["store"]["fault"], serde_json::Value::Null);
    assert_eq!(first["spool"], serde_json::Value::Null);
    // What arrives is counted from the first count on.
    wait_until("a count", || {
        status()["queue"]["counted_seconds_ago"].is_number()
    });
    proxy.accept(0..3);
    wait_until("/status with all that waits", || {
        let status = status();
        let queue = &status["queue"];
        let rows = queue["waiting"].as_u64().unwrap() + queue["leased"].as_u64().unwrap();
        rows == 3
            && queue["oldest_seconds"].as_f64().is_some()
            && queue["arriving_per_second"].as_f64().unwrap() > 0.0
            && status["destination"]["breaker"] == "open"
            && status["destination"]["fault"].is_string()
    });
}
