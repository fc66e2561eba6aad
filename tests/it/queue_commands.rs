//! `asyncproxy queue …`, as an operator types it, beside a running instance.

use std::io::Write;
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};
use crate::support::store;

fn output(setup: &Setup, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = setup.command();
    command.arg("queue").args(arguments);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails need not read it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// What a command prints that must succeed.
fn queue(setup: &Setup, arguments: &[&str]) -> String {
    queue_with(setup, arguments, b"")
}

fn queue_with(setup: &Setup, arguments: &[&str], input: &[u8]) -> String {
    let output = output(setup, arguments, input);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    assert_eq!(error, "", "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command complains of, with its exit status.
fn refused(setup: &Setup, arguments: &[&str]) -> (i32, String) {
    let output = output(setup, arguments, b"");
    let error = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), error)
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn ls(setup: &Setup, filter: &[&str]) -> Vec<Value> {
    lines(&queue(setup, &[&["ls", "--json"], filter].concat()))
}

/// Leaves requests waiting that failed once: their next attempt is far away.
fn waiting(route: Route, count: usize) -> (Destination, Setup, Proxy) {
    let destination = Destination::answering(|_| Answer::status(503));
    let setup = route
        .to(&destination)
        .set("queue.backoff_min", "1h")
        .set("queue.backoff_max", "1h");
    let proxy = setup.start();
    for number in 0..count {
        let target = format!("/hook/{number}?to=[1-2]");
        let lines = ["Authorization: Bearer sesame", "X-Strange: \u{9b}2J'$(id)'"];
        let body = format!("{{\"it's\": {number}}}");
        let post = http::request("POST", &target, &lines, body.as_bytes());
        assert_eq!(proxy.send(&post).status, 200);
    }
    store::wait_for_tried(&setup, count);
    (destination, setup, proxy)
}

fn a_request_is_found_and_shown(route: Route) {
    let (_destination, setup, proxy) = waiting(route, 3);
    let table = queue(&setup, &["ls"]);
    assert_eq!(table.lines().count(), 4, "{table}");
    assert!(
        table.lines().nth(1).unwrap().contains("  waiting  "),
        "{table}"
    );
    assert!(
        table
            .lines()
            .nth(1)
            .unwrap()
            .ends_with(" 503        11  POST /hook/0?to=[1-2]"),
        "{table}"
    );
    assert_eq!(queue(&setup, &["ls", "--limit", "2"]).lines().count(), 3);
    assert_eq!(ls(&setup, &["--status", "503"]).len(), 3);
    assert_eq!(ls(&setup, &["--status", "none"]).len(), 0);
    assert_eq!(ls(&setup, &["--path", "/hook/1"]).len(), 1);
    assert_eq!(ls(&setup, &["--older-than", "1h"]).len(), 0);
    assert_eq!(
        ls(&setup, &["--newer-than", "1h", "--state", "waiting"]).len(),
        3
    );

    let found = &ls(&setup, &["--path", "/hook/1"])[0];
    let id = found["id"].as_str().unwrap();
    assert_eq!(found["attempt"], 1);
    assert_eq!(found["last_error"], "destination answered 503");
    let shown = queue(&setup, &["show", id]);
    for part in [
        "waiting, due in ",
        "POST /hook/1?to=[1-2]",
        "Authorization: <redacted>",
        "11 bytes",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(shown.contains("X-Strange: \\u{9b}2J'$(id)'"), "{shown}");
    assert!(
        !shown.contains('\u{9b}') && !shown.contains("sesame"),
        "{shown}"
    );
    let shown = queue(&setup, &["show", id, "--show-credentials", "--json"]);
    assert!(shown.contains("Bearer sesame"), "{shown}");
    assert_eq!(queue(&setup, &["show", id, "--body"]), "{\"it's\": 1}");

    let nobody = "01a207b7-e515-7429-b231-ee29857c0400";
    let (status, error) = refused(&setup, &["show", nobody]);
    assert_eq!(status, 1);
    assert!(error.contains("neither in the queue nor"), "{error}");
    proxy.stop();
}
on_routes!(a_request_is_found_and_shown: sqlite Sqlite, postgres Postgres);

/// The command that is printed sends just what was received, through a real shell and curl.
fn a_curl_command_sends_the_same(route: Route) {
    let (destination, setup, proxy) = waiting(route, 2);
    let id = ls(&setup, &["--path", "/hook/1"])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let hidden = queue(&setup, &["show", &id, "--curl"]);
    assert!(
        hidden.contains("<redacted>") && !hidden.contains("sesame"),
        "{hidden}"
    );
    assert!(!hidden.contains('\u{9b}'), "{hidden}");
    let command = queue(&setup, &["show", &id, "--curl", "--show-credentials"]);
    let before = destination.seen().len();
    let sent = std::process::Command::new("sh")
        .args(["-c", &command])
        .output()
        .unwrap();
    assert!(
        sent.status.success(),
        "{command}\n{}",
        String::from_utf8_lossy(&sent.stderr)
    );
    let seen = destination.wait_for(before + 1, PATIENCE);
    let (ours, curls) = (
        seen[..before]
            .iter()
            .find(|seen| seen.target == b"/hook/1?to=[1-2]")
            .unwrap(),
        &seen[before],
    );
    assert_eq!(curls.method, ours.method);
    assert_eq!(curls.target, ours.target);
    assert_eq!(curls.body, ours.body);
    let fields = |lines: &[Vec<u8>]| {
        let mut lines: Vec<_> = lines
            .iter()
            .filter(|line| !line.starts_with(b"X-Asyncproxy-Attempt"))
            .cloned()
            .collect();
        lines.sort_by_key(|line| line.to_ascii_lowercase());
        let lines = lines
            .iter()
            .map(|line| String::from_utf8_lossy(line).to_lowercase());
        lines.collect::<Vec<_>>()
    };
    assert_eq!(fields(&curls.lines), fields(&ours.lines));
    proxy.stop();
}
on_routes!(a_curl_command_sends_the_same: sqlite Sqlite, postgres Postgres);

fn requests_are_retried_buried_and_dropped(route: Route) {
    let (destination, setup, proxy) = waiting(route, 5);
    let (status, error) = refused(&setup, &["retry"]);
    assert_eq!(status, 2);
    assert!(error.contains("needs ids, a filter, or --all"), "{error}");

    assert_eq!(
        queue(&setup, &["bury", "--path", "/hook/1", "--dry-run"]),
        "1 request would be moved to the dead letters\n"
    );
    assert_eq!(store::dead(&setup).len(), 0);
    assert_eq!(
        queue(&setup, &["bury", "--path", "/hook/1"]),
        "1 request moved to the dead letters\n"
    );
    let dead = store::dead(&setup);
    assert_eq!(dead[0].error, "buried by an operator");
    let id = ls(&setup, &["--path", "/hook/2"])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(queue(&setup, &["drop", &id]), "1 request dropped\n");
    assert_eq!(refused(&setup, &["drop", &id]).0, 1);
    let (status, error) = refused(&setup, &["drop", "--path", "/hook"]);
    assert_eq!(status, 2);
    assert!(
        error.contains("--state waiting or --state dead, or --all"),
        "{error}"
    );

    // Without a state, a retry means the dead letters.
    destination.answer(|_| Answer::ok());
    assert_eq!(
        queue(&setup, &["retry", "--all", "--json"]),
        "{\"being_sent\":0,\"changed\":1,\"dry_run\":false,\"unchanged\":0}\n"
    );
    metrics::wait_for(&proxy, "the dead letter delivered", |metrics| {
        metrics.get("asyncproxy_delivered_total") == 1.0
    });
    assert_eq!(
        queue(&setup, &["retry", "--state", "waiting"]),
        "3 requests made due\n"
    );
    metrics::wait_for(&proxy, "the others delivered", |metrics| {
        metrics.get("asyncproxy_delivered_total") == 4.0
    });
    assert_eq!(queue(&setup, &["drop", "--all"]), "0 requests dropped\n");
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}
on_routes!(requests_are_retried_buried_and_dropped: sqlite Sqlite, postgres Postgres);

/// More rows than a batch has; each is changed once.
fn many_are_changed_in_batches(route: Route) {
    let (_destination, setup, proxy) = waiting(route, 1201);
    assert_eq!(
        queue(&setup, &["bury", "--all"]),
        "1201 requests moved to the dead letters\n"
    );
    assert_eq!(store::dead(&setup).len(), 1201);
    assert_eq!(
        queue(&setup, &["drop", "--state", "dead", "--dry-run"]),
        "1201 requests would be dropped\n"
    );
    assert_eq!(
        queue(&setup, &["drop", "--state", "dead"]),
        "1201 requests dropped\n"
    );
    assert_eq!(store::dead(&setup).len(), 0);
    proxy.stop();
}
on_routes!(many_are_changed_in_batches: sqlite Sqlite, postgres Postgres);

/// Requests of before and of after it wait, also those that would go direct, and through a
/// restart.
fn a_pause_holds_everything(route: Route) {
    let destination = Destination::start();
    let setup = route.to(&destination);
    let proxy = setup.start();
    proxy.wait_for_store();
    assert!(queue(&setup, &["pause"]).starts_with("paused: "));
    assert_eq!(queue(&setup, &["pause"]), "it was paused already\n");
    proxy.wait_for_log("queue paused by an operator");
    assert_eq!(proxy.metrics().get("asyncproxy_queue_paused"), 1.0);
    assert_eq!(
        http::get(proxy.control, "/readyz").text(),
        "ok, but the queue is paused\n"
    );
    proxy.accept(0..3);
    assert_eq!(
        proxy
            .metrics()
            .get("asyncproxy_requests_total{admission=\"stored\"}"),
        3.0
    );
    let status = queue(&setup, &["status", "--json"]);
    assert!(status.contains("\"paused\":true"), "{status}");
    proxy.stop();

    let proxy = setup.start();
    proxy.wait_for_log("queue paused by an operator");
    proxy.accept(3..5);
    wait_until("all of them", || store::rows(&setup) == 5);
    assert_eq!(destination.seen().len(), 0);
    assert_eq!(queue(&setup, &["resume"]), "resumed\n");
    assert_eq!(queue(&setup, &["resume"]), "it was not paused\n");
    destination.wait_for_numbers(5, PATIENCE);
    proxy.stop();
}
on_routes!(a_pause_holds_everything: direct Direct, sqlite Sqlite, postgres Postgres, stored_first PostgresFirst);

fn the_status_is_told_with_and_without_an_instance(route: Route) {
    let destination = Destination::answering(|_| Answer::status(503));
    let setup = route
        .to(&destination)
        .set("queue.backoff_min", "1h")
        .set("queue.backoff_max", "1h");
    let proxy = setup.start();
    proxy.accept(0..4);
    store::wait_for_tried(&setup, 4);
    let bind = format!("METRICS_BIND={}", proxy.control);
    let mut command = setup.command();
    let (name, value) = bind.split_once('=').unwrap();
    let output = command
        .env(name, value)
        .args(["queue", "status"])
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    for part in [
        "queue        4 waiting, 0 being sent, 0 dead letters\n",
        "arriving     ",
        "leaving      ",
        "/s, at most 100000/s (instance)\n",
        "instance     0.1.0, running for ",
        "destination  breaker closed\n",
        "works\n",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    proxy.stop();
    let told = queue(&setup, &["status"]);
    for part in [
        "queue        4 waiting, 0 being sent, 0 dead letters\n",
        "growing      0.0/s\n",
        "forecast     does not shrink at the moment\n",
        "instance     none answers: ",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let told: Value = serde_json::from_str(&queue(&setup, &["status", "--json"])).unwrap();
    assert_eq!(told["queue"]["waiting"], 4);
    assert_eq!(told["instance"], Value::Null);
}
on_routes!(the_status_is_told_with_and_without_an_instance: sqlite Sqlite, postgres Postgres);

/// From one store to another of the other kind, and back: what comes back is what there was.
#[test]
fn a_queue_moves_from_sqlite_to_postgres_and_back() {
    let (_destination, sqlite, proxy) = waiting(Route::Sqlite, 7);
    let binary = http::request(
        "PUT",
        "/binary",
        &["X-Latin: caf\u{e9}"],
        &[0, 159, 146, 150, 255],
    );
    assert_eq!(proxy.send(&binary).status, 200);
    store::wait_for_tried(&sqlite, 8);
    queue(&sqlite, &["bury", "--path", "/hook/3"]);
    proxy.stop();

    let destination = Destination::start();
    let postgres = Route::Postgres.to(&destination);
    let created = postgres.command().arg("migrate").output().unwrap();
    assert!(created.status.success(), "{created:?}");
    let exported = queue(&sqlite, &["export"]);
    assert_eq!(exported.lines().count(), 8);
    for _ in 0..2 {
        let told = queue_with(&postgres, &["import"], exported.as_bytes());
        assert_eq!(told, "8 requests imported, or there already\n");
    }
    let file = sqlite.path("moved.jsonl");
    let path = file.to_str().unwrap();
    queue(&postgres, &["export", "--output", path]);
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    // A file that is there is not overwritten.
    assert_eq!(refused(&postgres, &["export", "--output", path]).0, 1);
    queue(&sqlite, &["drop", "--all"]);
    assert_eq!(
        queue(&sqlite, &["import", path]),
        "8 requests imported, or there already\n"
    );
    let without_times = |text: &str| {
        let mut rows = lines(text);
        for row in &mut rows {
            let row = row.as_object_mut().unwrap();
            // Counted from each store's own clock.
            for key in ["due_at", "died_at"] {
                row.remove(key);
            }
        }
        rows
    };
    assert_eq!(
        without_times(&queue(&sqlite, &["export"])),
        without_times(&exported)
    );
}

/// A line of an export with these header fields.
fn line(number: usize, fields: &[(&str, &str)]) -> String {
    let line = serde_json::json!({
        "id": format!("01a207b7-e515-7429-b231-{number:012x}"),
        "state": "waiting",
        "received_at": "2026-01-01T00:00:00Z",
        "due_at": "2026-01-01T00:00:00Z",
        "attempt": 0,
        "method": "POST",
        "target": "/hook",
        "headers": fields,
        "body": "hello",
    });
    format!("{line}\n")
}

/// Whoever has written the line: two framings would be two requests to some destinations.
fn what_an_import_brings_is_sent_with_one_framing(route: Route) {
    let destination = Destination::start();
    let setup = route.to(&destination);
    let proxy = setup.start();
    proxy.wait_for_log("store is ready");
    let fields = [
        ("Content-Length", "1"),
        ("content_length", "1"),
        ("Transfer-Encoding", "chunked"),
        ("Host", "forged.example"),
        ("X-Asyncproxy-Id", "forged"),
        ("X_Asyncproxy_Attempt", "9"),
        ("X_Forwarded_For", "forged"),
        ("Proxy", "http://192.0.2.1/"),
        ("Expect", "100-continue"),
        ("Connection", "close, X-Hop"),
        ("X-Hop", "1"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Kept", "1"),
    ];
    let told = queue_with(&setup, &["import"], line(0, &fields).as_bytes());
    assert_eq!(told, "1 request imported, or there already\n");
    let seen = &destination.wait_for(1, PATIENCE)[0];
    let lines: Vec<_> = http::grouped(&seen.lines);
    assert_eq!(
        lines,
        [
            "content-length: 5".to_owned(),
            format!("host: {}", destination.address),
            "X-Asyncproxy-Attempt: 1".to_owned(),
            "X-Asyncproxy-Id: 01a207b7-e515-7429-b231-000000000000".to_owned(),
            "X-Forwarded-For: 192.0.2.1".to_owned(),
            "X-Kept: 1".to_owned(),
        ]
    );
    assert_eq!(seen.body, b"hello");
    proxy.stop();
}
on_routes!(what_an_import_brings_is_sent_with_one_framing: sqlite Sqlite, postgres Postgres);

#[test]
fn lines_that_could_never_be_sent_are_refused_by_their_number() {
    let (_destination, setup, proxy) = waiting(Route::Sqlite, 1);
    proxy.stop();
    let text = [
        line(1, &vec![("X", "y"); 20_000]),
        line(2, &[("X", &"y".repeat(128 * 1024))]),
        line(3, &[]).replace("POST", &"A".repeat(65)),
        line(4, &vec![("X", "y"); 100]),
    ];
    let output = output(&setup, &["import"], text.concat().as_bytes());
    let error = String::from_utf8(output.stderr).unwrap();
    for part in [
        "line 1: headers: header fields must be at most 128 lines",
        "line 2: headers: header fields must be at most 128 lines",
        "line 3: method must be a token of at most 64 bytes",
        "3 lines could not be imported",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(store::rows(&setup), 2);
}

#[test]
fn faulty_lines_are_told_of_and_all_others_taken() {
    let (_destination, setup, proxy) = waiting(Route::Sqlite, 2);
    proxy.stop();
    let exported = queue(&setup, &["export"]);
    queue(&setup, &["drop", "--all"]);
    let good: Vec<&str> = exported.lines().collect();
    let text = format!(
        "{}\nnot json\n\n{}\n{}\n",
        good[0],
        good[1].replace("POST", "PO ST"),
        good[1]
    );
    let output = output(&setup, &["import"], text.as_bytes());
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    for part in [
        "line 2: not JSON",
        "line 4: ",
        "2 lines could not be imported",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(store::rows(&setup), 2);
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let setup = Setup::new("http://127.0.0.1:1");
    for (arguments, part) in [
        (&[][..], "queue --help"),
        (&["look"], "unknown command \"look\""),
        (
            &["ls", "--state", "gone"],
            "--state: must be waiting, leased or dead",
        ),
        (
            &["ls", "--older-than", "soon"],
            "--older-than: must be a duration",
        ),
        (
            &["ls", "--older-than", "2h", "--newer-than", "1h"],
            "must be less than",
        ),
        (&["ls", "--status", "5"], "--status: must be"),
        (&["ls", "--limit", "some"], "--limit: must be"),
        (&["ls", "--dry-run"], "does not take --dry-run"),
        (&["ls", "x"], "does not take \"x\""),
        (&["status", "--path", "/"], "does not take --path"),
        (&["show"], "needs one id"),
        (&["show", "x"], "\"x\" is no id"),
        (
            &[
                "show",
                "01a207b7-e515-7429-b231-ee29857c0400",
                "--body",
                "--curl",
            ],
            "either",
        ),
        (
            &["retry", "01a207b7-e515-7429-b231-ee29857c0400", "--all"],
            "either ids",
        ),
        (&["retry", "--state", "leased"], "left alone"),
        (&["bury", "--state", "dead"], "buried already"),
        (&["pause", "--verbose"], "--verbose"),
        (&["import", "a", "b"], "one file"),
    ] {
        let (status, error) = refused(&setup, arguments);
        assert_eq!(status, 2, "{arguments:?}: {error}");
        assert!(error.contains(part), "{arguments:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    // No queue is made by looking for one.
    let (status, error) = refused(&setup, &["ls"]);
    assert_eq!(status, 1);
    assert!(
        error.contains("it has version 0, this program wants 1: run asyncproxy migrate"),
        "{error}"
    );
    assert!(!setup.path("queue.sqlite").exists());
}

#[test]
fn a_reader_who_has_seen_enough_is_no_error() {
    let (_destination, setup, proxy) = waiting(Route::Sqlite, 600);
    let mut command = setup.command();
    let mut child = command
        .args(["queue", "export"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    proxy.stop();
}

fn one_row_that_the_store_refuses_keeps_no_other_from_being_imported(route: Route) {
    let (_destination, setup, proxy) = waiting(route, 20);
    let exported = queue(&setup, &["export"]);
    queue(&setup, &["drop", "--all"]);
    proxy.stop();
    let refusing = match setup.get("db.connection_string").starts_with("sqlite:") {
        true => {
            "CREATE TRIGGER refuse BEFORE INSERT ON proxy_requests WHEN NEW.target LIKE '/hook/7?%'
             BEGIN SELECT RAISE(ABORT, 'bad target'); END"
        }
        false => {
            "ALTER TABLE proxy_requests
               ADD CONSTRAINT bad_target CHECK (target NOT LIKE '/hook/7?%')"
        }
    };
    store::execute(&setup, refusing);
    let output = output(&setup, &["import"], exported.as_bytes());
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("1 line could not be imported"), "{error}");
    assert!(error.contains("bad"), "{error}");
    assert_eq!(store::rows(&setup), 19);
}
on_routes!(one_row_that_the_store_refuses_keeps_no_other_from_being_imported: sqlite Sqlite, postgres Postgres);
