//! `asyncproxy doctor`: what it finds, where there is something to find.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::Destination;
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::{TestDb, cluster};
use crate::support::proxy::Setup;

/// Exit status and findings.
struct Report(i32, Vec<Value>);

fn run(setup: &Setup, arguments: &[&str]) -> (i32, String) {
    let output = setup.command().arg("doctor").args(arguments).output();
    let output = output.expect("run");
    assert_eq!(output.stderr, b"", "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code().expect("exit status"), text)
}

fn examine(setup: &Setup, arguments: &[&str]) -> Report {
    let (status, text) = run(setup, &[&["--json"], arguments].concat());
    let findings: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    for finding in &findings {
        let level = finding["level"].as_str().expect("level");
        assert!(level == "ok" || finding["mend"].is_string(), "{finding}");
    }
    Report(status, findings)
}

impl Report {
    /// The one about `about` that says `part`, and its level.
    fn level(&self, about: &str, part: &str) -> &str {
        let found = self.1.iter().find(|finding| {
            finding["about"] == about
                && finding["found"]
                    .as_str()
                    .is_some_and(|text| text.contains(part))
        });
        let found =
            found.unwrap_or_else(|| panic!("{about}: {part}: {}", Value::from(self.1.clone())));
        found["level"].as_str().expect("level")
    }

    fn errors(&self) -> Vec<&Value> {
        let errors = self.1.iter().filter(|finding| finding["level"] == "error");
        errors.collect()
    }
}

/// On a database of its own, which has the schema.
fn on_postgres(url: &str) -> Setup {
    let database = cluster().database();
    let setup = Setup::new(url).set("db.connection_string", database.url());
    let setup = setup.keep(database);
    let migrated = setup.command().arg("migrate").status().expect("run");
    assert!(migrated.success());
    setup
}

#[test]
fn a_sound_setup_has_no_errors() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let report = examine(&setup, &["--deep"]);
    assert_eq!(report.0, 0, "{:#?}", report.errors());
    assert_eq!(report.level("db.connection_string", "not there yet"), "ok");
    assert_eq!(report.level("metrics.bind", "no instance"), "ok");
    // Looking makes no file.
    assert!(!setup.path("queue.sqlite").exists());
    let proxy = setup.start();
    proxy.accept(0..1);
    proxy.wait_for_store();
    let setup = setup.set("metrics.bind", proxy.control);
    let report = examine(&setup, &["--deep"]);
    assert_eq!(report.0, 0, "{:#?}", report.errors());
    assert_eq!(
        report.level("db.connection_string", "the schema has version 1"),
        "ok"
    );
    assert_eq!(report.level("db.connection_string", "quick_check"), "ok");
    assert_eq!(report.level("metrics.bind", "an instance runs here"), "ok");
    proxy.stop();
    assert_eq!(destination.seen().len(), 1, "nothing was sent by looking");
}

#[test]
fn a_destination_that_is_the_program_itself_is_an_error() {
    for (key, bind) in [
        ("server.bind", "':18080'"),
        ("metrics.bind", "localhost:18080"),
    ] {
        let setup = Setup::new("http://127.0.0.1:18080/path").set(key, bind);
        let report = examine(&setup, &[]);
        assert_eq!(report.0, 1);
        let level = report.level("proxy.remote_url", &format!("({key})"));
        assert_eq!(level, "error");
    }
}

#[test]
fn text_is_a_line_each_and_how_to_mend_it() {
    let (status, text) = run(&Setup::new("http://127.0.0.1:1"), &[]);
    assert_eq!(status, 1);
    let mut lines = text.lines().skip_while(|line| !line.starts_with("error"));
    let error = lines.next().expect("an error");
    assert!(
        error.contains("http://127.0.0.1:1 cannot be reached"),
        "{text}"
    );
    assert!(
        lines.next().expect("a way out").trim().starts_with("-> "),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "no colour here: {text}");
}

#[test]
fn settings_that_cannot_be_read_are_the_first_finding() {
    let setup = Setup::new("http://127.0.0.1:1").set("server.bind", "nonsense");
    let report = examine(&setup, &[]);
    assert_eq!((report.0, report.1.len()), (2, 1));
    assert_eq!(report.level("settings", "server.bind"), "error");
}

#[test]
fn files_that_cannot_be_used_are_told() {
    let setup = Setup::new("http://127.0.0.1:1");
    assert!(
        setup
            .command()
            .arg("migrate")
            .status()
            .expect("run")
            .success()
    );
    let file = setup.path("queue.sqlite");
    fs::set_permissions(&file, Permissions::from_mode(0o644)).expect("chmod");
    let report = examine(&setup, &[]);
    assert_eq!(report.level("db.connection_string", "mode 0644"), "warning");
    fs::write(
        &file,
        "no database, and long enough to be taken for one. ".repeat(100),
    )
    .expect("write");
    let report = examine(&setup, &["--deep"]);
    assert_eq!(
        report.level("db.connection_string", "not a database"),
        "error"
    );
    let setup = setup.set("db.connection_string", "sqlite:none/queue.sqlite");
    let report = examine(&setup, &[]);
    assert_eq!(
        report.level("db.connection_string", "no files can be made"),
        "error"
    );
}

#[test]
fn a_schema_that_is_left_to_migrate_is_an_error_until_it_is_done() {
    let database = cluster().database();
    for connection in ["sqlite:queue.sqlite".to_owned(), database.url()] {
        let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", connection);
        let wanted = "the schema has version 0";
        assert_eq!(
            examine(&setup, &[]).level("db.connection_string", wanted),
            "ok"
        );
        let setup = setup.set("db.migrate", false);
        assert_eq!(
            examine(&setup, &[]).level("db.connection_string", wanted),
            "error"
        );
    }
}

#[test]
fn postgres_is_looked_at() {
    let destination = Destination::start();
    let report = examine(&on_postgres(&destination.url()), &[]);
    assert_eq!(report.0, 0, "{:#?}", report.errors());
    for (about, part) in [
        ("db.connection_string", "connected in"),
        ("db.connection_string", "PostgreSQL 1"),
        ("db.connection_string", "the schema has version 2"),
        ("db.max_connections", "free"),
        ("pooler", "none"),
        ("old snapshots", "none"),
        ("proxy_requests", "0 live rows"),
        ("proxy_dead_letters", "0 live rows"),
        ("autovacuum", "on"),
        ("fsync", "on"),
        ("synchronous_commit", "on"),
        ("database clock", "from this machine's"),
    ] {
        assert_eq!(report.level(about, part), "ok");
    }
}

#[test]
fn a_snapshot_that_is_held_is_named_with_its_pid() {
    let database = cluster().database();
    let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", database.url());
    let mut holder = database.client();
    holder
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        .expect("begin");
    let pid: i32 = holder
        .query_one("SELECT pg_backend_pid()", &[])
        .expect("pid")
        .get(0);
    let many =
        "DO $$ BEGIN FOR i IN 1..10100 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$";
    database.client().batch_execute(many).expect(many);
    let report = examine(&setup, &[]);
    assert_eq!(
        report.level("old snapshots", &format!("pid {pid} ")),
        "warning"
    );
    drop(holder);
}

#[test]
fn a_user_without_rights_is_told_what_it_cannot_see() {
    let database = cluster().database();
    let mut other = database.client();
    let role = format!("doctor_{}", std::process::id());
    let create = format!("CREATE ROLE {role} LOGIN; GRANT ALL ON SCHEMA public TO {role}");
    other.batch_execute(&create).expect("create the role");
    let connection = database.url().replace("test@", &format!("{role}@"));
    let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", connection);
    let report = examine(&setup, &[]);
    assert_eq!(
        report.level("old snapshots", "not visible to this user"),
        "ok"
    );
    other
        .batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .expect("drop");
}

/// `user` in the connection string of a database.
fn as_role(database: &TestDb, role: &str) -> Setup {
    let connection = database.url().replace("test@", &format!("{role}@"));
    Setup::new("http://127.0.0.1:1").set("db.connection_string", connection)
}

/// What each of them is told to do works.
#[test]
fn a_role_that_may_not_do_what_is_needed_is_an_error_that_says_what_to_grant() {
    let database = cluster().database();
    let mut owner = database.client();
    let role = "doctor_rights";
    let create = format!("CREATE ROLE {role} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    owner.batch_execute(&create).expect(&create);
    let setup = as_role(&database, role);
    let report = examine(&setup, &[]);
    assert_eq!(
        report.level("rights", "may make none in the schema public"),
        "error"
    );
    assert_eq!(report.0, 1);
    // The start and the command say it, too.
    let migrate = setup.command().arg("migrate").output().expect("run");
    let told = String::from_utf8_lossy(&migrate.stderr).into_owned();
    assert!(
        told.contains("asyncproxy doctor tells what is missing"),
        "{told}"
    );
    let own = as_role(&database, "test").command().arg("migrate").status();
    assert!(own.expect("run").success());
    let grant = format!("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}");
    owner.batch_execute(&grant).expect(&grant);
    let report = examine(&setup, &[]);
    for missing in [
        "INSERT ON proxy_requests",
        "UPDATE ON proxy_requests",
        "DELETE ON proxy_dead_letters",
    ] {
        assert_eq!(report.level("rights", missing), "error");
    }
    assert_eq!(report.0, 1);
    let grant = format!("GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}");
    owner.batch_execute(&grant).expect(&grant);
    let report = examine(&setup, &[]);
    assert_eq!(report.level("rights", "has all that is needed"), "ok");
    // A version that is still to be applied needs the owner.
    let older = "DROP TABLE proxy_instances; DELETE FROM asyncproxy_migrations WHERE version = 2;
                 GRANT CREATE ON SCHEMA public TO PUBLIC";
    owner.batch_execute(older).expect(older);
    let report = examine(&setup, &[]);
    assert_eq!(report.level("rights", "does not own them"), "error");
    owner
        .batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .expect("drop");
}

#[test]
fn a_server_that_takes_no_writes_is_an_error() {
    let mut primary = DedicatedCluster::create();
    primary.start();
    let migrated = Setup::new("http://127.0.0.1:1").set("db.connection_string", primary.url());
    let done = migrated.command().arg("migrate").status();
    assert!(done.expect("run").success());
    let mut standby = DedicatedCluster::standby_of(&primary);
    standby.start();
    let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", standby.url());
    let report = examine(&setup, &[]);
    assert_eq!(
        report.level("db.connection_string", "is a standby"),
        "error"
    );
    assert_eq!(report.0, 1);
    let proxy = setup.start();
    let line = proxy.wait_for_log("store does not work");
    assert!(line.contains("name the primary"), "{line}");
    proxy.stop();

    let database = cluster().database();
    let mut client = database.client();
    for (setting, about, part, level) in [
        (
            "default_transaction_read_only = on",
            "db.connection_string",
            "read-only by default",
            "error",
        ),
        (
            "default_transaction_isolation = 'serializable'",
            "default isolation",
            "serializable",
            "warning",
        ),
    ] {
        let set = format!("ALTER DATABASE {} SET {setting}", database.name());
        client.batch_execute(&set).expect(&set);
        let report = examine(&as_role(&database, "test"), &[]);
        assert_eq!(report.level(about, part), level);
        let reset = format!(
            "SET default_transaction_read_only = off; ALTER DATABASE {} RESET ALL",
            database.name()
        );
        client.batch_execute(&reset).expect(&reset);
    }
}

#[test]
fn pgbouncer_is_recognised_by_what_it_does() {
    let database = cluster().database();
    for (mode, level, part) in [
        ("session", "ok", "none, or one that pools by session"),
        ("transaction", "ok", "pools by transaction"),
        ("statement", "error", "pools by statement"),
    ] {
        let pgbouncer = Pgbouncer::pooling_by(mode, &database);
        let setup = Setup::new("http://127.0.0.1:1");
        let setup = setup.set("db.connection_string", pgbouncer.url());
        let report = examine(&setup, &[]);
        assert_eq!(report.level("pooler", part), level);
        report.level("database clock", "from this machine's");
    }
}

#[test]
fn a_database_that_is_away_or_does_not_answer_is_an_error() {
    let setup = Setup::new("http://127.0.0.1:1").set("db.timeout", "300ms");
    let gone = "postgres://me:secret@127.0.0.1:1/none".to_owned();
    let silent = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = silent.local_addr().expect("address").port();
    let mut setup = setup;
    for (connection, part) in [
        (gone, "127.0.0.1:1"),
        (
            format!("postgres://me:secret@127.0.0.1:{port}/none"),
            "no answer within 300ms",
        ),
    ] {
        setup = setup.set("db.connection_string", connection);
        let report = examine(&setup, &[]);
        assert_eq!(report.level("db.connection_string", part), "error");
        assert!(!format!("{:?}", report.1).contains("secret"));
    }
}
