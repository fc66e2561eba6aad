//! Commands beside a running instance: they act on its store, or on none.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::metrics;
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::cluster;
use crate::support::proxy::{Proxy, Setup, binary};
use crate::support::route::{Route, on_routes};
use crate::support::store;
use tempfile::TempDir;

/// Those that act on a queue, with what they need.
const COMMANDS: [&[&str]; 9] = [
    &["queue", "status"],
    &["queue", "ls"],
    &["queue", "retry", "--all"],
    &["queue", "drop", "--all"],
    &["queue", "bury", "--all"],
    &["queue", "pause"],
    &["queue", "export"],
    &["queue", "import"],
    &["migrate"],
];

fn run(command: &mut std::process::Command, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.args(arguments).output().expect("run");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

/// Settings of a command that asks `proxy`.
fn asking(setup: Setup, proxy: &Proxy) -> Setup {
    setup.set("metrics.bind", proxy.control)
}

/// What waits in the queue of a running instance: each failed once, and its next attempt is far
/// away.
fn waiting(route: Route, count: usize) -> (Destination, Setup, Proxy) {
    let destination = Destination::down();
    let setup = route
        .to(&destination)
        .set("server.enqueue_rate", 0)
        .set("queue.backoff_min", "1h")
        .set("queue.backoff_max", "1h");
    let proxy = setup.start();
    proxy.accept(0..count);
    store::wait_for_tried(&setup, count);
    (destination, setup, proxy)
}

/// As root's environment without the credential: the settings lead to a file that is left over.
fn another_store_is_refused_by_every_command(route: Route) {
    let (_destination, setup, proxy) = waiting(route, 3);
    let secret = "hunter2";
    let other = asking(Setup::new("http://127.0.0.1:1"), &proxy);
    for is_there in [false, true] {
        if is_there {
            let (status, ..) = run(&mut other.command(), &["migrate", "--other-store"]);
            assert_eq!(status, Some(0));
        }
        let before = files(&other);
        for arguments in COMMANDS {
            let (status, told, error) = run(&mut other.command(), arguments);
            assert_eq!(
                (status, told.as_str()),
                (Some(1), ""),
                "{arguments:?}: {error}"
            );
            for part in [
                "has another store than these settings",
                "Nothing was done",
                "config.yaml leads to sqlite:/",
                "--other-store",
                &proxy.control.to_string(),
            ] {
                assert!(error.contains(part), "{arguments:?}, {part}: {error}");
            }
            assert!(!error.contains(secret), "{error}");
        }
        assert_eq!(files(&other), before);
        let (status, told, _) = run(&mut other.command(), &["doctor"]);
        assert_eq!(status, Some(1));
        assert!(
            told.contains("has another store than these settings"),
            "{told}"
        );
    }
    // Meant all the same.
    let (status, told, error) = run(&mut other.command(), &["queue", "ls", "--other-store"]);
    assert_eq!(status, Some(0), "{error}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert_eq!(store::rows(&setup), 3);
    proxy.kill9();
    // Without an instance there is nobody to have another.
    let (status, ..) = run(&mut other.command(), &["queue", "ls"]);
    assert_eq!(status, Some(0));
}
on_routes!(another_store_is_refused_by_every_command: sqlite Sqlite, postgres Postgres);

/// What is in the directory, but for the settings.
fn files(setup: &Setup) -> Vec<String> {
    setup.write();
    let entries = fs::read_dir(setup.path("")).expect("read_dir");
    let names = entries.map(|entry| entry.expect("entry").file_name());
    let mut names: Vec<_> = names
        .map(|name| name.into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// One store has many names: other paths to a file, other ways to a server.
#[test]
fn the_same_store_by_another_name_is_the_same() {
    let (_destination, setup, proxy) = waiting(Route::Sqlite, 2);
    let file = fs::canonicalize(setup.path("queue.sqlite")).expect("canonicalize");
    let other = Setup::new("http://127.0.0.1:1");
    std::os::unix::fs::symlink(&file, other.path("link")).expect("symlink");
    let other = asking(other, &proxy).set("db.connection_string", "sqlite:link");
    let (status, told, error) = run(&mut other.command(), &["queue", "status"]);
    assert_eq!(status, Some(0), "{error}");
    assert!(told.contains("2 waiting, 0 being sent"), "{told}");
    proxy.kill9();

    let database = cluster().database();
    let bouncer = Pgbouncer::start(&database);
    let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", bouncer.url());
    let proxy = setup.start();
    proxy.wait_for_store();
    let other = asking(Setup::new("http://127.0.0.1:1"), &proxy);
    let other = other.set("db.connection_string", database.url());
    let (status, _, error) = run(&mut other.command(), &["queue", "pause"]);
    assert_eq!(status, Some(0), "{error}");
    let (status, told, _) = run(&mut other.command(), &["doctor"]);
    assert!(
        told.contains("it has the store of these settings"),
        "{status:?} {told}"
    );
    proxy.stop();
}

/// A service as systemd starts it: a directory at run time, settings elsewhere, and what is secret in
/// its environment or its credentials.
struct Service {
    setup: Setup,
    proxy: Proxy,
    runtime: TempDir,
}

impl Service {
    fn start(destination: &Destination, add: impl FnOnce(Setup) -> Setup) -> Service {
        let runtime = TempDir::new().expect("temporary directory");
        let setup = Setup::new(&destination.url())
            .set("server.enqueue_rate", 0)
            .env("RUNTIME_DIRECTORY", runtime.path().display());
        let setup = add(setup);
        let proxy = setup.start();
        proxy.wait_for_store();
        Service {
            setup,
            proxy,
            runtime,
        }
    }

    /// A command given anywhere else, with nothing but where to look for services.
    fn command(&self, directory: &Path) -> std::process::Command {
        let mut command = binary(directory);
        command.env("RUNTIME_DIRECTORY", self.runtime.path());
        command
    }
}

#[test]
fn without_settings_those_of_the_running_service_are_taken() {
    let destination = Destination::down();
    let database = cluster().database();
    let credentials = TempDir::new().expect("temporary directory");
    fs::write(
        credentials.path().join("db.connection_string"),
        database.url(),
    )
    .expect("write");
    let in_environment = Service::start(&destination, |setup| {
        setup.env("DB_CONNECTION_STRING", "sqlite:elsewhere.sqlite")
    });
    let in_credentials = Service::start(&destination, |setup| {
        setup.env("CREDENTIALS_DIRECTORY", credentials.path().display())
    });
    for service in [in_environment, in_credentials] {
        let empty = TempDir::new().expect("temporary directory");
        service.proxy.accept(0..3);
        let mut command = service.command(empty.path());
        let (status, told, error) = run(&mut command, &["queue", "status", "--json"]);
        assert_eq!((status, error.as_str()), (Some(0), ""));
        let told: Value = serde_json::from_str(&told).expect("JSON");
        let count = |state: &str| told["queue"][state].as_u64().expect("a number");
        assert_eq!(count("waiting") + count("leased"), 3, "{told}");
        let (status, ..) = run(&mut service.command(empty.path()), &["queue", "pause"]);
        assert_eq!(status, Some(0));
        metrics::wait_for(&service.proxy, "the pause", |metrics| {
            metrics.get("asyncproxy_queue_paused") == 1.0
        });
        // A file that is named is found from where the command is given.
        let export = ["queue", "export", "--output", "rows"];
        let (status, _, error) = run(&mut service.command(empty.path()), &export);
        assert_eq!(status, Some(0), "{error}");
        let rows = fs::read_to_string(empty.path().join("rows")).expect("rows");
        assert_eq!(rows.lines().count(), 3);
        let (status, ..) = run(&mut service.command(empty.path()), &["migrate", "--status"]);
        assert_eq!(status, Some(0));
        let (_, told, _) = run(&mut service.command(empty.path()), &["doctor"]);
        assert!(
            told.contains("it has the store of these settings"),
            "{told}"
        );
        // Settings that are there come first, and are not those of the service.
        fs::copy(
            service.setup.path("config.yaml"),
            empty.path().join("config.yaml"),
        )
        .expect("copy");
        let (status, _, error) = run(&mut service.command(empty.path()), &["queue", "resume"]);
        assert_eq!(status, Some(1));
        assert!(
            error.contains("no such file") || error.contains("migrate"),
            "{error}"
        );
        let names = fs::read_dir(empty.path()).expect("read_dir").count();
        assert_eq!(names, 2, "settings and rows: no queue was made");
        service.proxy.kill9();
    }
}

/// The port of an instance need not answer where its settings say, as that may be set elsewhere.
#[test]
fn a_service_of_the_same_settings_is_asked_wherever_it_listens() {
    let destination = Destination::start();
    let service = Service::start(&destination, |setup| {
        setup.env("DB_CONNECTION_STRING", "sqlite:elsewhere.sqlite")
    });
    let path = service.setup.path("config.yaml");
    let path = path.to_str().expect("UTF-8");
    let empty = TempDir::new().expect("temporary directory");
    let mut command = service.command(empty.path());
    let (status, _, error) = run(&mut command, &["--config", path, "queue", "pause"]);
    assert_eq!(status, Some(1), "{error}");
    assert!(
        error.contains("elsewhere.sqlite") && error.contains("Nothing was done"),
        "{error}"
    );
    service.proxy.stop();
}

#[test]
fn without_settings_and_without_one_service_it_says_what_to_do() {
    let empty = TempDir::new().expect("temporary directory");
    let mut command = binary(empty.path());
    command.env("RUNTIME_DIRECTORY", empty.path());
    let (status, _, error) = run(&mut command, &["queue", "status"]);
    assert_eq!(status, Some(2));
    assert!(
        error.contains("--config") && error.contains("no running service"),
        "{error}"
    );
    let destination = Destination::start();
    let [one, other] = [(); 2].map(|()| Service::start(&destination, |setup| setup));
    let both = std::env::join_paths([one.runtime.path(), other.runtime.path()]).expect("paths");
    let mut command = binary(empty.path());
    command.env("RUNTIME_DIRECTORY", both);
    let (status, _, error) = run(&mut command, &["queue", "status"]);
    assert_eq!(status, Some(2));
    for service in [&one, &other] {
        let directory = service.runtime.path().to_str().expect("UTF-8");
        assert!(
            error.contains(directory) && error.contains("several"),
            "{error}"
        );
    }
    // A directory that is somebody's, but nobody's socket.
    let nobody = TempDir::new().expect("temporary directory");
    fs::write(nobody.path().join("control.sock"), "").expect("write");
    let mut command = binary(empty.path());
    command.env("RUNTIME_DIRECTORY", nobody.path());
    assert_eq!(run(&mut command, &["queue", "status"]).0, Some(2));
    one.proxy.stop();
    other.proxy.stop();
    assert_eq!(fs::read_dir(empty.path()).expect("read_dir").count(), 0);
}

#[test]
fn the_status_names_store_and_settings_without_the_password() {
    let database = cluster().database();
    let url = database.url().replace("test@", "test:hunter2@");
    let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", url);
    let proxy = setup.start();
    let status = http::get(proxy.control, "/status").text();
    assert!(!status.contains("hunter2"), "{status}");
    let status: Value = serde_json::from_str(&status).expect("JSON");
    let name = status["store"]["name"].as_str().expect("name");
    assert!(
        name.contains(&format!("dbname={}", database.name())),
        "{name}"
    );
    let settings = status["settings"].as_str().expect("settings");
    assert_eq!(
        fs::canonicalize(settings).expect("settings"),
        fs::canonicalize(setup.path("config.yaml")).expect("config.yaml")
    );
    proxy.stop();
}

const ROW: &str = r#"{"id":"01a207b7-e515-7429-b231-ee29857c0400","state":"leased","attempt":0,"received_at":"2026-11-23T18:24:55Z","method":"POST","target":"/","headers":[],"body":""}"#;

/// And `migrate` says what it made.
#[test]
fn only_migrate_makes_a_file() {
    let setup = Setup::new("http://127.0.0.1:1");
    setup.write();
    let others = [&["doctor"][..], &["queue", "resume"]];
    for arguments in COMMANDS.into_iter().chain(others) {
        if arguments == ["migrate"] {
            continue;
        }
        let (status, _, error) = run(&mut setup.command(), arguments);
        // Of nothing, all is imported.
        let expected = i32::from(arguments != ["queue", "import"]);
        assert_eq!(status, Some(expected), "{arguments:?}: {error}");
        assert_eq!(files(&setup), ["config.yaml"], "{arguments:?}");
    }
    fs::write(setup.path("rows"), ROW).expect("write");
    let (status, _, error) = run(&mut setup.command(), &["queue", "import", "rows"]);
    assert_eq!(status, Some(1), "{error}");
    assert!(error.contains("asyncproxy migrate"), "{error}");
    assert_eq!(files(&setup), ["config.yaml", "rows"]);
    let (status, told, _) = run(&mut setup.command(), &["migrate"]);
    assert_eq!(status, Some(0));
    let path = fs::canonicalize(setup.path("queue.sqlite")).expect("queue.sqlite");
    assert!(told.contains("queue.sqlite, an empty queue\n"), "{told}");
    assert!(path.is_file());
    let (_, told, _) = run(&mut setup.command(), &["migrate"]);
    assert!(!told.contains("made"), "{told}");
}

/// What systemd's ExecReload is to tell; a signal alone tells nobody.
#[test]
fn a_reload_by_command_ends_as_the_reload_did() {
    let destination = Destination::start();
    let service = Service::start(&destination, |setup| setup);
    let status = http::get(service.proxy.control, "/status").text();
    let status: Value = serde_json::from_str(&status).expect("JSON");
    let pid = status["pid"].to_string();
    let here = TempDir::new().expect("temporary directory");
    let reload = |pid: &str| run(&mut service.command(here.path()), &["reload", pid]);
    let path = service.setup.path("config.yaml");
    let good = fs::read_to_string(&path).expect("settings");
    for _ in 0..3 {
        assert_eq!(reload(&pid), (Some(0), String::new(), String::new()));
        fs::write(&path, good.replace("num_clients: ", "num_clients: none # ")).expect("write");
        let (status, _, error) = reload(&pid);
        assert_eq!(status, Some(1));
        assert!(
            error.contains("all stay as they are") && error.contains("proxy.num_clients: must be"),
            "{error}"
        );
        fs::write(&path, &good).expect("write");
    }
    assert_eq!(reload(&pid).0, Some(0));
    // Nothing else gets a signal, which would end it.
    let (status, _, error) = reload(&std::process::id().to_string());
    assert!(
        status == Some(1) && error.contains("is not process"),
        "{error}"
    );
    let (status, _, error) = run(&mut binary(here.path()), &["reload", &pid]);
    assert!(
        status == Some(1) && error.contains("RUNTIME_DIRECTORY is not set"),
        "{error}"
    );
    service.proxy.stop();
}
