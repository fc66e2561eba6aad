//! `asyncproxy migrate` and `db.migrate: false`.

use std::process::{Command, Output};

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::proxy::{PATIENCE, Setup, wait_until};
use crate::support::route::{Route, on_routes};

fn run(setup: &Setup, arguments: &[&str]) -> (Option<i32>, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::output(setup.command().args(arguments)).unwrap();
    let text = [stdout, stderr].concat();
    (status.code(), String::from_utf8(text).unwrap())
}

fn the_schema_is_left_to_who_is_told_to(route: Route) {
    let destination = Destination::start();
    let setup = route
        .to(&destination)
        .set("db.migrate", false)
        .set("server.enqueue_rate", 0)
        .set("proxy.num_clients", 1);
    let (status, text) = run(&setup, &["migrate", "--status"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(
        text.contains("no queue yet; this program needs version 1"),
        "{text}"
    );
    let (status, text) = run(&setup, &["queue", "ls"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("run `asyncproxy migrate`"), "{text}");
    assert!(!setup.path("queue.sqlite").exists());

    // It runs all the same, and goes on by itself once someone has done it.
    let proxy = setup.start();
    proxy.wait_for_log("run `asyncproxy migrate`");
    wait_until("/readyz with what to do", || {
        http::get(proxy.control, "/readyz")
            .text()
            .contains("asyncproxy migrate")
    });
    let (status, text) = run(&setup, &["migrate"]);
    assert_eq!(
        (status, text.as_str()),
        (Some(0), "brought from version 0 to 1\n")
    );
    wait_until("/readyz without a fault", || {
        http::get(proxy.control, "/readyz").text() == "ok\n"
    });
    proxy.accept(0..1);
    destination.wait_for(1, PATIENCE);
    proxy.stop();

    assert_eq!(
        run(&setup, &["migrate"]),
        (Some(0), "up to date, at version 1\n".into())
    );
    let (status, text) = run(&setup, &["migrate", "--status", "--json"]);
    assert_eq!(status, Some(0));
    assert_eq!(
        text,
        "{\"up_to_date\":true,\"version\":1,\"wanted\":1,\"was\":1}\n"
    );
}
on_routes!(the_schema_is_left_to_who_is_told_to: sqlite Sqlite, postgres Postgres);

fn a_newer_schema_is_no_business_of_ours(route: Route) {
    let destination = Destination::start();
    let setup = route.to(&destination);
    assert_eq!(run(&setup, &["migrate"]).0, Some(0));
    crate::support::store::execute(&setup, "UPDATE asyncproxy_migrations SET version = 7");
    for arguments in [
        &["migrate"][..],
        &["migrate", "--status"],
        &["queue", "status"],
    ] {
        let (status, text) = run(&setup, arguments);
        assert_eq!(status, Some(1), "{text}");
        assert!(
            text.contains("it has version 7, this program knows versions up to 1"),
            "{text}"
        );
    }
}
on_routes!(a_newer_schema_is_no_business_of_ours: sqlite Sqlite, postgres Postgres);
