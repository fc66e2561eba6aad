//! Each of thousands of requests arrives once and unchanged, whatever its way.

use crate::support::destination::{Destination, Seen};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Setup};
use crate::support::route::{Route, on_routes};
use crate::support::store;

const REQUESTS: usize = 5000;
const SENDERS: usize = 10;
/// What the direct channel has room for: it is to hold all of a round.
const ROUND: usize = 250;

fn every_request_arrives_once_and_unchanged(route: Route) {
    let destination = Destination::start();
    let mut setup = route.to(&destination);
    let round = match route {
        Route::Direct => {
            setup = setup.set("proxy.num_clients", ROUND);
            ROUND
        }
        _ => REQUESTS,
    };
    let proxy = setup.start();
    for first in (0..REQUESTS).step_by(round) {
        let statuses = http::load(proxy.intake, SENDERS, round / SENDERS, |number| {
            request(first + number)
        });
        assert_eq!(statuses, vec![200; round]);
        if route == Route::Direct {
            destination.wait_for(first + round, PATIENCE);
        }
    }
    let seen = destination.wait_for(REQUESTS, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, REQUESTS);
    assert_eq!(metrics.get(route.admission()), REQUESTS as f64);
    assert_eq!(metrics.get("asyncproxy_delivered_total"), REQUESTS as f64);
    assert_eq!(metrics.attempts("delivered"), REQUESTS as f64);
    assert_eq!(metrics.sum("asyncproxy_lost_total"), 0.0);
    assert_eq!(metrics.rows("dead"), 0.0);
    assert_eq!(metrics.get("asyncproxy_held_bytes"), 0.0);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
    assert_each_once(&seen);
    assert_eq!(destination.seen().len(), REQUESTS);
}
on_routes!(every_request_arrives_once_and_unchanged);

#[test]
fn as_many_threads_as_the_go_program_had() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url())
        .set("proxy.num_clients", 700)
        .set("queue.workers", 120)
        .set("server.enqueue_rate", 300);
    let proxy = setup.start();
    let statuses = http::load(proxy.intake, SENDERS, 100, request);
    assert_eq!(statuses, vec![200; SENDERS * 100]);
    destination.wait_for_numbers(SENDERS * 100, PATIENCE);
    let metrics = metrics::assert_settled(&proxy, SENDERS * 100);
    // The rate divides them: some went each way.
    assert!(metrics.get(Route::Direct.admission()) >= 1.0);
    assert!(metrics.get(Route::Sqlite.admission()) >= 1.0);
    proxy.stop();
    assert_eq!(destination.seen().len(), SENDERS * 100);
}

#[test]
fn several_instances_share_one_queue() {
    const ROWS: usize = 1000;
    let mut destination = Destination::down();
    let setup = Route::Postgres.to(&destination);
    let proxies = [setup.start(), setup.start()];
    for (instance, proxy) in proxies.iter().enumerate() {
        let statuses = http::load(proxy.intake, 5, ROWS / 10, |number| {
            request(instance * ROWS / 2 + number)
        });
        assert_eq!(statuses, vec![200; ROWS / 2]);
    }
    destination.open();
    let seen = destination.wait_for_numbers(ROWS, PATIENCE);
    let delivered = proxies.each_ref().map(|proxy| {
        let settled = metrics::wait_for(proxy, "an empty queue", |metrics| {
            metrics.get("queue_total_size") == 0.0
        });
        settled.get("asyncproxy_delivered_total")
    });
    assert_eq!(delivered.iter().sum::<f64>(), ROWS as f64);
    assert!(delivered.iter().all(|count| *count > 0.0), "{delivered:?}");
    let mut numbers: Vec<_> = seen.iter().map(|seen| seen.number()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..ROWS).collect::<Vec<_>>());
    for proxy in proxies {
        proxy.stop();
    }
    assert_eq!(store::rows(&setup), 0);
}

fn assert_each_once(seen: &[std::sync::Arc<Seen>]) {
    let mut missing = vec![true; REQUESTS];
    for seen in seen {
        let number = seen.number();
        assert!(missing[number], "request {number} arrived twice");
        missing[number] = false;
        assert_eq!(seen.method, method(number));
        assert_eq!(seen.target(), target(number));
        let mut expected = fields(number);
        expected.extend([
            "X-Forwarded-For: 127.0.0.1".to_owned(),
            "X-Forwarded-Host: hooks.example".to_owned(),
            "X-Forwarded-Proto: http".to_owned(),
        ]);
        assert_eq!(seen.passed_on(), http::grouped(expected));
        assert!(seen.body == body(number), "body of request {number}");
        assert_eq!(seen.attempt(), 1);
    }
}

fn request(number: usize) -> Vec<u8> {
    let fields = fields(number);
    let lines: Vec<_> = fields.iter().map(String::as_str).collect();
    http::request(method(number), &target(number), &lines, &body(number))
}

fn method(number: usize) -> &'static str {
    ["POST", "PUT", "PATCH", "DELETE", "GET"][number % 5]
}

fn target(number: usize) -> String {
    format!("/hooks/{}//%2F?n={number}&q=%zz;", number % 7)
}

fn fields(number: usize) -> Vec<String> {
    let mut fields = vec![
        format!("X-Id: {number}"),
        "Content-Type: application/octet-stream".to_owned(),
        format!("x-multi: {}", number * 3),
        format!("X-MULTI: {:x}", number * 7),
    ];
    fields.extend((0..number % 12).map(|field| format!("X-Field-{field}: \"{number}\", {field}")));
    fields
}

/// Up to 9 KB of any bytes; every tenth is empty.
fn body(number: usize) -> Vec<u8> {
    if number.is_multiple_of(10) {
        return Vec::new();
    }
    let length = number * 7919 % 9000;
    let mut random = fastrand::Rng::with_seed(number as u64);
    std::iter::repeat_with(|| random.u8(..))
        .take(length)
        .collect()
}
