//! Settings as a whole: defaults, files, environment, errors.

#![allow(clippy::too_many_lines, reason = "tables of cases")]

use super::*;

fn load(yaml: &str) -> Result<Config, String> {
    Config::from_yaml(yaml, &|_| None).map_err(|error| error.to_string())
}

fn error(yaml: &str) -> String {
    load(yaml).unwrap_err()
}

const SHIPPED: &str = include_str!("../../config.yaml");

const GO: &str = "
server:
  bind: :8080
  response_status: 200
  shutdown_timeout: 30s
  enqueue_enabled: true
  enqueue_rate: 100
metrics:
  bind: :8081
  path: /metrics
proxy:
  remote_url: http://localhost:5000
  request_timeout: 120s
  num_clients: 700
queue:
  workers: 120
  handle_per_second: 30
  max_retries: 1000
db:
  connection_string: host=localhost port=5432 user=postgres password=postgres dbname=asyncproxy sslmode=disable binary_parameters=yes
  max_connections: 2
  use_index: true
";

#[test]
fn the_go_programs_file_works_unchanged() {
    let config = load(GO).unwrap();
    assert_eq!(config.server.bind, Bind::All(8080));
    assert_eq!(config.server.enqueue_rate, 100);
    assert_eq!(config.proxy.num_clients, 700);
    assert_eq!(config.proxy.request_timeout, Duration::from_secs(120));
    assert_eq!(config.queue.workers, 120);
    assert_eq!(config.queue.retry.max_retries, 1000);
    assert!(matches!(config.db.database, Database::Postgres(_)));
    assert_eq!(
        config.warnings(),
        ["db.connection_string: ignored binary_parameters"]
    );
}

#[test]
fn the_shipped_file_has_all_settings_in_order_at_their_defaults() {
    let shipped = load(SHIPPED).unwrap();
    let defaults = load("").unwrap();
    assert_eq!(shipped.effective(), defaults.effective());
    let mut rest = SHIPPED;
    for setting in SETTINGS {
        let (section, name) = setting.key.split_once('.').unwrap();
        if let Some(at) = rest.find(&format!("\n{section}:\n")) {
            rest = &rest[at..];
        }
        let line = format!("\n  {name}:");
        let at = rest
            .find(&line)
            .unwrap_or_else(|| panic!("{} is missing or misplaced", setting.key));
        rest = &rest[at + line.len()..];
    }
}

#[test]
fn what_is_shown_is_read_back_alike_but_for_secrets() {
    let config =
        load("proxy: {remote_url: 'http://h/a'}\nqueue: {give_up_statuses: [410, 404]}").unwrap();
    let shown = config.effective();
    assert_eq!(load(&shown).unwrap().effective(), shown);
    let shown = load(GO).unwrap().effective();
    assert!(
        shown.contains(
            "host=localhost port=5432 user=postgres dbname=asyncproxy password=<sensitive>"
        )
    );
    assert!(!shown.contains("password=postgres"));
    assert!(!format!("{:?}", load(GO).unwrap().db).contains("password: Some(\"postgres"));
}

#[test]
fn the_environment_wins_and_is_named_in_errors() {
    let env = |name: &str| match name {
        "SERVER_ENQUEUE_RATE" => Some("7".to_owned()),
        "QUEUE_GIVE_UP_STATUSES" => Some("410,404".to_owned()),
        "LOG_LEVEL" => Some(String::new()),
        _ => None,
    };
    let config = Config::from_yaml("server:\n  enqueue_rate: 5", &env).unwrap();
    assert_eq!(config.server.enqueue_rate, 7);
    assert_eq!(config.queue.retry.give_up_statuses, [410, 404]);
    assert_eq!(config.log.level, log::LevelFilter::Info);
    let bad = |name: &str| (name == "PROXY_NUM_CLIENTS").then(|| "0".to_owned());
    let error = Config::from_yaml("", &bad).unwrap_err().to_string();
    assert_eq!(
        error,
        "proxy.num_clients (from PROXY_NUM_CLIENTS): must be a whole number from 1 to 10000 (got \"0\")"
    );
}

#[test]
fn errors_name_the_setting_the_value_and_what_is_accepted() {
    for (yaml, parts) in [
        (
            "server:\n  bind: '80'",
            &["server.bind", "host:port", "\"80\""][..],
        ),
        (
            "server: {response_status: 100}",
            &["server.response_status", "200 to 599"],
        ),
        (
            "server: {enqueue_enabled: maybe}",
            &["server.enqueue_enabled", "true or false"],
        ),
        (
            "queue: {max_rows: -1}",
            &["queue.max_rows", "whole number", "\"-1\""],
        ),
        (
            "server: {ack: sent}",
            &["server.ack", "received or stored", "\"sent\""],
        ),
        (
            "server: {acceptor: hyper}",
            &["server.acceptor", "builtin or tiny_http"],
        ),
        (
            "server: {shutdown_timeout: soon}",
            &["server.shutdown_timeout", "30s", "\"soon\""],
        ),
        (
            "server: {max_body_size: 300MiB}",
            &[
                "server.memory_limit",
                "server.max_body_size",
                "got auto, which is",
                "MiB here",
            ],
        ),
        (
            "server: {max_body_size: 3MiB, memory_limit: 2MiB}",
            &["server.memory_limit", "server.max_body_size", "got 2MiB"],
        ),
        (
            "server: {memory_limit: most}",
            &["server.memory_limit", "auto, or a size", "\"most\""],
        ),
        (
            "server: {bind: 'unix:/a', acceptor: tiny_http}",
            &["server.bind", "tiny_http"],
        ),
        (
            "server: {bind: ':1'}\nmetrics: {bind: ':1'}",
            &["metrics.bind", "server.bind"],
        ),
        (
            "proxy: {remote_url: 'localhost:5000'}",
            &["proxy.remote_url", "http://localhost:5000"],
        ),
        (
            "proxy: {request_timeout: 0}",
            &["proxy.request_timeout", "from 1ms"],
        ),
        (
            "queue: {rate_scope: global}",
            &["queue.rate_scope", "instance or cluster", "\"global\""],
        ),
        (
            "queue: {backoff_min: 1h}",
            &["queue.backoff_max", "queue.backoff_min", "1h"],
        ),
        (
            "queue: {give_up_statuses: [200]}",
            &["queue.give_up_statuses", "410"],
        ),
        (
            "queue: {dead_retention: 30days}",
            &["queue.dead_retention", "30d", "\"30days\""],
        ),
        (
            "queue: {dead_retention: 11000d}",
            &["queue.dead_retention", "10 years", "\"11000d\""],
        ),
        (
            "queue: {dead_retention: -1}",
            &["queue.dead_retention", "\"-1\""],
        ),
        (
            "queue: {workers: [1, {}]}",
            &["queue.workers", "a whole number"],
        ),
        (
            "queue: {worker: 1}",
            &["queue.worker", "no such setting", "queue.workers"],
        ),
        ("que: {workers: 1}", &["que", "no such setting", "queue"]),
        ("server: 5", &["server", "settings"]),
        ("- a", &["sections"]),
        ("a: b: c", &["not YAML"]),
        (
            "server:\n  bind: :1\n  bind: :2",
            &["line 3", "server.bind", "line 2"],
        ),
        (
            "db: {connection_string: 'host=h', spool: spool.sqlite}",
            &["db.spool", "empty or sqlite:PATH", "spool.sqlite"],
        ),
        (
            "db: {spool: 'sqlite:spool.sqlite'}",
            &["db.spool", "must be empty with SQLite"],
        ),
        ("db: {migrate: later}", &["db.migrate", "true or false"]),
        (
            "db: {connection_string: 'mysql://h'}",
            &["db.connection_string", "sqlite:PATH"],
        ),
        ("\"a\\nb\": 1", &["no such setting"]),
    ] {
        let error = error(yaml);
        for part in parts {
            assert!(error.contains(part), "{yaml}: {error}");
        }
        assert!(!error.contains(|c: char| c.is_control()), "{error:?}");
    }
}

#[test]
fn dead_letters_are_kept_for_30_days_or_for_ever() {
    let days = |days: u64| Some(Duration::from_secs(days * 24 * 60 * 60));
    for (yaml, retention) in [
        ("", days(30)),
        ("queue: {dead_retention: 7d}", days(7)),
        ("queue: {dead_retention: 0}", None),
        ("queue: {dead_retention: 0d}", None),
    ] {
        assert_eq!(
            load(yaml).unwrap().queue.dead_retention,
            retention,
            "{yaml}"
        );
    }
}

#[test]
fn secrets_are_in_no_error() {
    for yaml in [
        "proxy: {remote_url: 'http://u:secret@h'}",
        "db: {connection_string: 'postgres://u:secret@h:x/d'}",
        "db: {connection_string: 'password=secret port=x'}",
    ] {
        assert!(!error(yaml).contains("secret"), "{yaml}: {}", error(yaml));
    }
}

#[test]
fn an_empty_section_or_value_stands_for_the_default() {
    let config = load("server:\nqueue:\n  workers:\n").unwrap();
    assert_eq!(config.effective(), load("").unwrap().effective());
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Path::new("/nonexistent/a.yaml"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nonexistent/a.yaml") && error.contains("--config"),
        "{error}"
    );
}

#[test]
fn files_for_tls_that_cannot_be_used_are_named() {
    for (yaml, telling) in [
        (
            "ca_file: /no/such",
            "proxy.ca_file: cannot be used: /no/such: No such file",
        ),
        (
            "ca_file: /dev/null",
            "proxy.ca_file: cannot be used: /dev/null: no certificate",
        ),
        (
            "ca_file: Cargo.toml\n  client_key_file: /b",
            "proxy.ca_file",
        ),
    ] {
        let yaml = format!("proxy:\n  {yaml}");
        let error = Config::from_yaml(&yaml, &|_| None).map(|_| ()).unwrap_err();
        let telling = match cfg!(feature = "tls") {
            true => telling,
            false => "this build has no TLS",
        };
        assert!(error.to_string().contains(telling), "{error}");
    }
}

#[test]
fn values_come_from_files_and_credentials_and_are_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().to_str().unwrap().to_owned();
    let file = folder.path().join("rate");
    std::fs::write(&file, "7\n").unwrap();
    std::fs::write(folder.path().join("server.enqueue_rate"), "5\n").unwrap();
    std::fs::write(folder.path().join("db.conection_string"), "hush").unwrap();
    let path = file.to_str().unwrap().to_owned();
    let load = |pairs: &[(&str, &str)]| {
        let env = |name: &str| {
            let pair = pairs.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        };
        Config::from_yaml("server: {enqueue_rate: 3}", &env).map_err(|error| error.to_string())
    };
    let credentials = ("CREDENTIALS_DIRECTORY", directory.as_str());
    let named = ("SERVER_ENQUEUE_RATE_FILE", path.as_str());
    let rate = |pairs: &[(&str, &str)]| load(pairs).unwrap().server.enqueue_rate;
    assert_eq!(rate(&[]), 3);
    assert_eq!(rate(&[credentials]), 5);
    assert_eq!(rate(&[credentials, named]), 7);
    assert_eq!(rate(&[credentials, ("SERVER_ENQUEUE_RATE", "9")]), 9);
    let config = load(&[credentials]).unwrap();
    assert!(config.warnings()[0].contains("did you mean db.connection_string?"));

    let both = load(&[named, ("SERVER_ENQUEUE_RATE", "9")]).unwrap_err();
    assert!(
        both.contains("SERVER_ENQUEUE_RATE and SERVER_ENQUEUE_RATE_FILE"),
        "{both}"
    );
    let missing = load(&[("LOG_LEVEL_FILE", "/nowhere/at/all")]).unwrap_err();
    assert!(
        missing.starts_with("log.level (from LOG_LEVEL_FILE): \"/nowhere"),
        "{missing}"
    );
    std::fs::write(&file, "hush").unwrap();
    let wrong = load(&[named]).unwrap_err();
    assert!(wrong.starts_with("server.enqueue_rate (from SERVER_ENQUEUE_RATE_FILE): must be"));
    assert!(!wrong.contains("hush"), "{wrong}");
    let spool = load(&[("METRICS_PATH_FILE", path.as_str())]).unwrap_err();
    assert!(!spool.contains("hush"), "{spool}");
    std::fs::write(&file, "/hush").unwrap();
    let hidden = load(&[("METRICS_PATH_FILE", path.as_str())]).unwrap();
    assert!(
        !hidden.effective().contains("hush") && !format!("{:?}", hidden.server).contains("hush")
    );
}

#[test]
fn each_form_of_a_value_that_documents_show_is_accepted_from_the_environment() {
    let defaults = load("").unwrap().effective();
    for setting in SETTINGS {
        let name = setting.env();
        let env = |asked: &str| (asked == name).then(|| setting.default.to_owned());
        let config = Config::from_yaml("", &env).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(config.effective(), defaults, "{name}={}", setting.default);
    }
    for text in ["410", "[410]", "410,404", "[410, 404]", "[]"] {
        let env = |name: &str| (name == "QUEUE_GIVE_UP_STATUSES").then(|| text.to_owned());
        let from_env = Config::from_yaml("", &env).unwrap_or_else(|error| panic!("{error}"));
        let in_yaml = text.trim_matches(['[', ']']);
        let from_yaml = load(&format!("queue: {{give_up_statuses: [{in_yaml}]}}")).unwrap();
        let statuses = |config: &Config| config.queue.retry.give_up_statuses.clone();
        assert_eq!(statuses(&from_env), statuses(&from_yaml), "{text}");
        // What is shown can be given again.
        let again = load(&from_env.effective()).unwrap();
        assert_eq!(statuses(&again), statuses(&from_env), "{text}");
    }
}

#[test]
fn a_secret_that_everybody_may_read_is_named_and_no_other() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str, mode| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let secret = "host=h password=hush";
    let yaml = |text: &str| format!("db: {{connection_string: '{text}'}}");
    let exposed = |path: &Path, env: &[(&str, &Path)]| {
        let env = |name: &str| {
            let pair = env.iter().find(|(key, _)| *key == name);
            pair.map(|(_, path)| path.to_str().unwrap().to_owned())
        };
        let raw = Raw::read(&std::fs::read_to_string(path).unwrap(), None, &env).unwrap();
        let config = Config::understand(raw, Some(path), &env).unwrap();
        let said = config.all_warnings().join(" ");
        assert!(!said.contains("hush"), "{said}");
        let exposed = config.exposed().iter();
        exposed
            .map(|secret| secret.path.clone())
            .collect::<Vec<_>>()
    };
    let open = write("open.yaml", &yaml(secret), 0o644);
    let private = write("private.yaml", &yaml(secret), 0o640);
    let without = write("without.yaml", &yaml("host=h user=u"), 0o644);
    let sqlite = write("sqlite.yaml", &yaml("sqlite:a"), 0o644);
    let file = write("db.connection_string", secret, 0o644);
    // Its file wins over the YAML; in a directory of credentials it is systemd's.
    let named: &[(&str, &Path)] = &[("DB_CONNECTION_STRING_FILE", &file)];
    let credential: &[(&str, &Path)] = &[("CREDENTIALS_DIRECTORY", folder.path())];
    for (yaml, env, expected) in [
        (&open, &[][..], Some(&open)),
        (&private, &[], None),
        (&without, &[], None),
        (&sqlite, &[], None),
        (&open, named, Some(&file)),
        (&open, credential, None),
    ] {
        let expected: Vec<PathBuf> = expected.into_iter().cloned().collect();
        assert_eq!(exposed(yaml, env), expected, "{yaml:?} {env:?}");
    }
}
