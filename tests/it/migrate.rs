//! `asyncproxy migrate`, and the program when it must leave the schema alone.

use std::fs;

use asyncproxy::queue::migrate::{POSTGRES, SQLITE};
use serde_json::{Value, json};

use crate::adopt;
use crate::support::destination::Destination;
use crate::support::http;
use crate::support::metrics;
use crate::support::postgres::cluster;
use crate::support::proxy::{PATIENCE, Setup, wait_until};
use crate::support::store;

/// On an empty database of each kind.
fn on_each_store(url: &str, test: impl Fn(Setup)) {
    test(Setup::new(url));
    let database = cluster().database();
    let connection = database.url();
    let setup = Setup::new(url).set("db.connection_string", connection);
    test(setup.keep(database));
}

/// Exit status, and what was printed where.
fn run(setup: &Setup, arguments: &[&str]) -> (i32, String, String) {
    let output = setup.command().arg("migrate").args(arguments).output();
    let output = output.expect("run");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code().expect("exit status"),
        text(output.stdout),
        text(output.stderr),
    )
}

fn printed(status: i32, text: &str) -> (i32, String, String) {
    (status, text.to_owned(), String::new())
}

const APPLIED: &str = "applied version {}\n";

/// The version that the program wants there.
fn latest(setup: &Setup) -> usize {
    match setup.get("db.connection_string").starts_with("sqlite:") {
        true => SQLITE.len(),
        false => POSTGRES.len(),
    }
}

/// A line for each version.
fn each(setup: &Setup, line: &str) -> String {
    let versions = 1..=latest(setup);
    versions
        .map(|version| line.replace("{}", &version.to_string()))
        .collect()
}

/// A file, if one is made.
fn file(setup: &Setup) -> Option<String> {
    let is_file = setup.get("db.connection_string").starts_with("sqlite:");
    is_file.then(|| format!("sqlite:{}", setup.path("queue.sqlite").display()))
}

/// What is said of an empty database that is made ready.
fn made(setup: &Setup) -> String {
    let file = file(setup).map(|file| format!("made {file}, an empty queue\n"));
    file.unwrap_or_default() + &each(setup, APPLIED)
}

#[test]
fn applies_what_is_pending_once() {
    on_each_store("http://127.0.0.1:1", |setup| {
        let pending = printed(1, &each(&setup, "version {}: pending\n"));
        // Asking changes nothing.
        assert_eq!(run(&setup, &["--status"]), pending);
        assert_eq!(run(&setup, &["--status"]), pending);
        assert!(!setup.path("queue.sqlite").exists());
        assert_eq!(run(&setup, &[]), printed(0, &made(&setup)));
        let applied = printed(0, &each(&setup, "version {}: applied\n"));
        assert_eq!(run(&setup, &["--status"]), applied);
        let latest = latest(&setup);
        let nothing = format!("nothing to do: the schema has version {latest}\n");
        let nothing = printed(0, &nothing);
        assert_eq!(run(&setup, &[]), nothing);
        assert_eq!(store::rows(&setup), 0);
    });
}

#[test]
fn says_it_in_json() {
    on_each_store("http://127.0.0.1:1", |setup| {
        let json = |arguments: &[&str]| -> Value {
            serde_json::from_str(&run(&setup, arguments).1).expect("JSON")
        };
        let latest = latest(&setup);
        let all: Vec<usize> = (1..=latest).collect();
        let pending = json!({ "applied": [], "pending": all, "wanted": latest });
        assert_eq!(json(&["--status", "--json"]), pending);
        let step = |version| json!({ "version": version, "taken_over": null });
        let steps: Vec<Value> = all.iter().map(step).collect();
        assert_eq!(
            json(&["--json"]),
            json!({ "applied": steps, "version": latest, "made": file(&setup) })
        );
        let applied = json!({ "applied": all, "pending": [], "wanted": latest });
        assert_eq!(json(&["--json", "--status"]), applied);
    });
}

#[test]
fn status_leaves_nothing_beside_a_file_in_use_or_not() {
    let setup = Setup::new("http://127.0.0.1:1");
    assert_eq!(run(&setup, &[]).0, 0);
    let files = || {
        let entries = fs::read_dir(setup.path("")).expect("directory");
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = files();
    assert_eq!(run(&setup, &["--status"]).0, 0);
    assert_eq!(files(), before);
    let proxy = setup.start();
    proxy.wait_for_store();
    assert_eq!(run(&setup, &["--status"]).0, 0);
    assert_eq!(run(&setup, &[]).0, 0);
    proxy.stop();
}

#[test]
fn a_newer_schema_is_left_to_the_newer_program() {
    on_each_store("http://127.0.0.1:1", |setup| {
        assert_eq!(run(&setup, &[]).0, 0);
        let version = latest(&setup) + 1;
        let newer = format!(
            "INSERT INTO asyncproxy_migrations (version, applied_at) \
             SELECT {version}, min(applied_at) FROM asyncproxy_migrations"
        );
        store::execute(&setup, &newer);
        let (status, told, _) = run(&setup, &["--status"]);
        assert_eq!(status, 1);
        assert!(
            told.contains(&format!("version {version}: applied by a newer program")),
            "{told}"
        );
        let (status, told, error) = run(&setup, &[]);
        assert_eq!((status, &*told), (1, ""));
        assert!(error.contains("run the newer program"), "{error}");
    });
}

#[test]
fn a_database_that_is_away_is_one_line() {
    let url = "postgres://nobody@127.0.0.1:1/none";
    let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", url);
    for arguments in [&["--status"][..], &[]] {
        let (status, told, error) = run(&setup, arguments);
        assert_eq!((status, &*told), (1, ""));
        let start = "asyncproxy: migrate: store not available: 127.0.0.1:1: ";
        assert!(error.starts_with(start), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn without_leave_to_migrate_the_program_waits_for_someone_who_does() {
    let destination = Destination::start();
    on_each_store(&destination.url(), |setup| {
        let setup = setup.set("db.migrate", false);
        let seen_before = destination.seen().len();
        let proxy = setup.start();
        let latest = latest(&setup);
        let wanted =
            &format!("it has version 0, this program wants {latest}: run asyncproxy migrate");
        let line = proxy.wait_for_log("store does not work");
        assert!(line.contains(wanted), "{line}");
        wait_until("/readyz to tell", || {
            let ready = http::get(proxy.control, "/readyz");
            ready.text().contains("nothing can be stored") && ready.text().contains(wanted)
        });
        metrics::wait_for(&proxy, "the metric", |now| {
            now.get("asyncproxy_store_up") == 0.0
        });
        // Requests go direct meanwhile.
        proxy.accept(0..3);
        wait_until("delivery", || destination.seen().len() == seen_before + 3);
        assert_eq!(run(&setup, &["--status"]).0, 1);
        assert_eq!(run(&setup, &[]), printed(0, &made(&setup)));
        proxy.wait_for_store();
        wait_until("/readyz to be content", || {
            http::get(proxy.control, "/readyz").text() == "ok\n"
        });
        proxy.stop();
    });
}

#[test]
fn the_spool_takes_what_the_store_must_wait_for() {
    let destination = Destination::start();
    let database = cluster().database();
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", database.url())
        .set("db.migrate", false)
        .set("db.spool", "sqlite:spool.sqlite")
        .set("server.enqueue_rate", 0)
        .keep(database);
    let proxy = setup.start();
    proxy.wait_for_log("run asyncproxy migrate");
    proxy.accept(0..5);
    metrics::wait_for(&proxy, "the spool", |now| {
        now.get("asyncproxy_spool_rows") == 5.0
    });
    assert_eq!(run(&setup, &[]), printed(0, &each(&setup, APPLIED)));
    destination.wait_for_numbers(5, PATIENCE);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
}

#[test]
fn the_go_programs_queue_is_taken_over_by_migrate_only() {
    let destination = Destination::start();
    let database = adopt::go_database();
    let setup = Setup::new(&destination.url()).set("db.connection_string", database.url());
    let setup = setup.keep(database).set("db.migrate", false);
    let proxy = setup.start();
    proxy.wait_for_log("run asyncproxy migrate");
    let (status, told, _) = run(&setup, &[]);
    let taken_over =
        "applied version 1, took over the queue of the Go program: 3 waiting, 2 dead letters\n";
    let rest: String = (2..=latest(&setup))
        .map(|version| format!("applied version {version}\n"))
        .collect();
    assert_eq!((status, told), (0, format!("{taken_over}{rest}")));
    wait_until("its requests", || destination.seen().len() == 3);
    proxy.stop();
}
