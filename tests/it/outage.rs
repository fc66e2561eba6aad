//! A store that fails: senders go direct or are told to come again, nothing acknowledged is
//! lost, and all is well again by itself once the store works.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::disk::Disk;
use crate::support::http::{self, Connection};
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};

/// Waits until `/readyz` answers `status` and a text with `part`.
fn wait_until_ready_says(proxy: &Proxy, status: u16, part: &str) -> String {
    let mut last = String::new();
    wait_until(&format!("/readyz with {status} {part:?}"), || {
        let answer = http::get(proxy.control, "/readyz");
        last = format!("{} {}", answer.status, answer.text());
        answer.status == status && answer.text().contains(part)
    });
    last
}

fn to_postgres(destination: &Destination, cluster: &DedicatedCluster) -> Setup {
    Setup::new(&destination.url()).set("db.connection_string", cluster.url())
}

#[test]
fn postgres_down_at_start_is_picked_up_when_it_comes() {
    let mut destination = Destination::down();
    let mut cluster = DedicatedCluster::create();
    let setup = to_postgres(&destination, &cluster);
    cluster.start();
    let proxy = setup.start();
    proxy.accept(0..10);
    metrics::wait_for(&proxy, "10 rows", |metrics| {
        metrics.get("queue_total_size") == 10.0
    });
    proxy.stop();
    cluster.stop();
    destination.open();

    let proxy = setup.start();
    wait_until_ready_says(&proxy, 200, "store not available");
    proxy.wait_for_log("store does not work");
    assert_eq!(proxy.metrics().get("asyncproxy_store_up"), 0.0);
    // One after the other: in memory there is room for a few only.
    for number in 10..20 {
        proxy.accept(number..number + 1);
        destination.wait_for(number - 9, PATIENCE);
    }
    let direct = destination.wait_for(10, PATIENCE);
    assert!(direct.iter().all(|seen| seen.number() >= 10));
    cluster.start();
    destination.wait_for_numbers(20, PATIENCE);
    wait_until_ready_says(&proxy, 200, "ok\n");
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("asyncproxy_store_up") == 1.0 && metrics.get("queue_total_size") == 0.0
    });
    proxy.stop();
}

#[test]
fn postgres_may_stop_and_start_meanwhile() {
    let destination = Destination::start();
    let mut cluster = DedicatedCluster::create();
    cluster.start();
    let setup = to_postgres(&destination, &cluster).set("server.enqueue_rate", 0);
    let proxy = setup.start();
    proxy.accept(0..20);
    destination.wait_for_numbers(20, PATIENCE);
    for round in 1..3 {
        let first = round * 100;
        cluster.stop();
        wait_until_ready_says(&proxy, 200, "nothing can be stored");
        proxy.accept(first..first + 8);
        destination.wait_until(PATIENCE, "the direct ones", |seen| {
            (first..first + 8).all(|number| seen.iter().any(|seen| seen.number() == number))
        });
        cluster.start();
        wait_until_ready_says(&proxy, 200, "ok\n");
        proxy.accept(first + 8..first + 20);
        destination.wait_until(PATIENCE, "the stored ones", |seen| {
            (first + 8..first + 20).all(|number| seen.iter().any(|seen| seen.number() == number))
        });
    }
    let metrics = metrics::assert_settled(&proxy, 60);
    assert_eq!(metrics.get(Route::Direct.admission()), 16.0);
    assert_eq!(metrics.get(Route::Postgres.admission()), 44.0);
    proxy.stop();
}

#[test]
fn nothing_is_acknowledged_that_has_no_place() {
    let mut destination = Destination::answering(|_| Answer::hang());
    let cluster = DedicatedCluster::create();
    let setup = to_postgres(&destination, &cluster).set("proxy.num_clients", 1);
    let proxy = setup.start();
    wait_until_ready_says(&proxy, 200, "nothing can be stored");
    // One is with the worker, one in the channel, and then there is no room.
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    proxy.accept(1..2);
    let refused = proxy.send(&http::numbered(2));
    assert_eq!(refused.status, 503);
    let wait: u32 = refused
        .field("retry-after")
        .expect("Retry-After")
        .parse()
        .expect("seconds");
    assert!(wait >= 1);
    wait_until_ready_says(&proxy, 503, "store not available");
    let metrics = proxy.metrics();
    assert_eq!(metrics.refused("overloaded"), 1.0);
    assert_eq!(
        metrics.get("asyncproxy_requests_total{admission=\"refused\"}"),
        1.0
    );
    assert_eq!(metrics.accepted(), 2.0);
    metrics.assert_balance();
    // The destination is back: both arrive, and no other.
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    let seen = destination.wait_for_numbers(2, PATIENCE);
    assert!(seen.iter().all(|seen| seen.number() < 2));
    metrics::assert_settled(&proxy, 2);
    proxy.accept(3..4);
}

#[test]
fn without_a_queue_a_full_channel_refuses() {
    let destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_enabled", false)
        .set("server.enqueue_rate", 0)
        .set("proxy.num_clients", 1);
    let proxy = setup.start();
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    proxy.accept(1..2);
    let refused = proxy.send(&http::numbered(2));
    assert_eq!(refused.status, 503);
    assert!(refused.field("retry-after").is_some());
}

#[test]
fn bodies_past_the_memory_limit_are_refused_for_the_time_being() {
    let mut destination = Destination::answering(|_| Answer::hang());
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_enabled", false)
        .set("server.max_body_size", "1MiB")
        .set("server.memory_limit", "1MiB");
    let proxy = setup.start();
    let id = |number| format!("X-Id: {number}");
    let large = |number| http::request("POST", "/hook", &[&id(number)], &vec![b'x'; 600 * 1024]);
    assert_eq!(proxy.send(&large(0)).status, 200);
    destination.wait_for(1, PATIENCE);
    let refused = proxy.send(&large(1));
    assert_eq!(refused.status, 503);
    assert!(refused.field("retry-after").is_some());
    // Small ones have room still.
    proxy.accept(2..3);
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    metrics::assert_settled(&proxy, 2);
    assert_eq!(proxy.metrics().get("asyncproxy_held_bytes"), 0.0);
    assert_eq!(proxy.send(&large(3)).status, 200);
    metrics::assert_settled(&proxy, 3);
    assert!(destination.seen().iter().all(|seen| seen.number() != 1));
}

#[test]
fn a_read_only_sqlite_file_is_reported_and_picked_up_again() {
    let disk = Disk::mount("16m");
    let mut destination = Destination::down();
    let connection = format!("sqlite:{}", disk.path("queue.sqlite").display());
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", connection)
        .set("queue.min_free", 0);
    let proxy = setup.start();
    proxy.accept(0..10);
    metrics::wait_for(&proxy, "10 rows", |metrics| {
        metrics.get("queue_total_size") == 10.0
    });
    proxy.stop();
    destination.open();

    disk.remount("ro");
    let proxy = setup.start();
    let said = wait_until_ready_says(&proxy, 200, "nothing can be stored");
    assert!(
        ["read-only", "readonly", "unable to open"]
            .iter()
            .any(|why| said.contains(why)),
        "{said}"
    );
    proxy.wait_for_log("store does not work");
    proxy.accept(10..15);
    assert!(
        destination
            .wait_for(5, PATIENCE)
            .iter()
            .all(|seen| seen.number() >= 10)
    );
    disk.remount("rw");
    destination.wait_for_numbers(15, PATIENCE);
    wait_until_ready_says(&proxy, 200, "ok\n");
    proxy.stop();
}

#[test]
fn a_full_disk_is_reported_and_no_acknowledged_request_lost() {
    let disk = Disk::mount("4m");
    let mut destination = Destination::down();
    let connection = format!("sqlite:{}", disk.path("queue.sqlite").display());
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", connection)
        .set("queue.min_free", 0)
        .set("server.enqueue_rate", 0)
        .set("proxy.num_clients", 2);
    let proxy = setup.start();
    // More than the disk has room for; its end is met on the way.
    let mut acknowledged = Vec::new();
    let mut connection = Connection::open(proxy.intake);
    let mut refused = 0;
    for number in 0..120 {
        let answer = connection.exchange(&large(number));
        match answer.status {
            200 => acknowledged.push(number),
            503 => {
                refused += 1;
                connection = Connection::open(proxy.intake);
            }
            other => panic!("{other}"),
        }
    }
    assert!(acknowledged.len() > 10 && refused > 10, "{acknowledged:?}");
    proxy.wait_for_log("request refused");
    // What is free is looked at once a second, and estimated in between.
    wait_until("a disk that is full, and known to be", || {
        let answer = http::exchange(proxy.intake, &large(120 + refused));
        if answer.status == 200 {
            acknowledged.push(120 + refused);
        }
        refused += 1;
        let ready = http::get(proxy.control, "/readyz");
        ready.status == 503
            && ready.text().contains("full")
            && proxy.log().contains("no new requests are stored")
    });
    disk.remount("size=64m");
    destination.open();
    destination.wait_until(PATIENCE, "all acknowledged", |seen| {
        let arrived = |number: &usize| seen.iter().any(|seen| seen.number() == *number);
        acknowledged.iter().all(arrived)
    });
    wait_until_ready_says(&proxy, 200, "ok\n");
    let metrics = metrics::assert_settled(&proxy, acknowledged.len());
    assert_eq!(metrics.sum("asyncproxy_lost_total"), 0.0);
    proxy.stop();
}

fn large(number: usize) -> Vec<u8> {
    let id = format!("X-Id: {number}");
    http::request("POST", "/hook", &[&id], &vec![b'x'; 64 * 1024])
}

#[test]
fn a_full_disk_from_the_start_stops_nobody() {
    let disk = Disk::mount("64k");
    let filled =
        File::create(disk.path("filler")).and_then(|mut file| file.write_all(&[0; 1 << 20]));
    filled.expect_err("the disk is full");
    let destination = Destination::start();
    let connection = format!("sqlite:{}", disk.path("queue.sqlite").display());
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", connection)
        .set("queue.min_free", 0);
    let proxy = setup.start();
    wait_until_ready_says(&proxy, 200, "nothing can be stored");
    proxy.accept(0..3);
    destination.wait_for_numbers(3, PATIENCE);
    disk.remount("size=16m");
    wait_until_ready_says(&proxy, 200, "ok\n");
}

fn a_killed_program_loses_nothing_it_had_stored(route: Route) {
    let destination = Destination::start();
    let setup = route
        .to(&destination)
        .set("proxy.request_timeout", "1s")
        .set("queue.workers", 4);
    let proxy = setup.start();
    let acknowledged = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for sender in 0..8 {
            let (acknowledged, intake) = (&acknowledged, proxy.intake);
            scope.spawn(move || {
                let mut connection = Connection::open(intake);
                for number in (sender..80_000).step_by(8) {
                    connection.send(&http::numbered(number));
                    match connection.response() {
                        Ok(answer) if answer.status == 200 => {
                            acknowledged.lock().expect("lock").push(number);
                        }
                        Ok(answer) => panic!("{answer:?}"),
                        Err(_killed) => return,
                    }
                }
            });
        }
        destination.wait_for(300, PATIENCE);
        proxy.kill9();
    });
    drop(proxy);
    let acknowledged = acknowledged.into_inner().expect("lock");
    let proxy = setup.start();
    // A row that was leased comes back when its lease is over, half a minute or so later.
    destination.wait_until(2 * PATIENCE, "all acknowledged", |seen| {
        // Cheap first: this is asked at each arrival.
        if seen.len() < acknowledged.len() {
            return false;
        }
        let mut missing = vec![false; 80_000];
        acknowledged
            .iter()
            .for_each(|number| missing[*number] = true);
        seen.iter().for_each(|seen| missing[seen.number()] = false);
        !missing.contains(&true)
    });
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("asyncproxy_store_up") == 1.0 && metrics.get("queue_total_size") == 0.0
    });
    proxy.stop();
}
on_routes!(a_killed_program_loses_nothing_it_had_stored: sqlite Sqlite, postgres Postgres);
