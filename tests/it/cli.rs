//! The command line: what is printed where, and the exit status.

use std::net::TcpListener;
use std::process::Output;

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Setup, binary};

/// Runs to the end with these arguments.
fn run(setup: &Setup, arguments: &[&str]) -> (i32, String, String) {
    let output = setup.command().args(arguments).output();
    let Output {
        status,
        stdout,
        stderr,
    } = output.expect("run");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        status.code().expect("exit status"),
        text(stdout),
        text(stderr),
    )
}

/// The one line of an error, without the program's name.
fn error_line(stderr: &str) -> &str {
    let line = stderr.strip_prefix("asyncproxy: ");
    let line = line.unwrap_or_else(|| panic!("not an error line: {stderr:?}"));
    let line = line.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains('\n'), "more than one line: {stderr}");
    line
}

fn to_nowhere() -> Setup {
    Setup::new("http://127.0.0.1:1")
}

#[test]
fn version_and_help() {
    let setup = Setup::empty();
    let version = format!("asyncproxy {}\n", env!("CARGO_PKG_VERSION"));
    for flag in ["--version", "-V"] {
        assert_eq!(run(&setup, &[flag]), (0, version.clone(), String::new()));
    }
    let own = |command: &str| run(&setup, &[command, "--help"]).1;
    for (command, words) in [
        ("demo", &["--seconds"][..]),
        ("doctor", &["--config", "--json", "--deep"]),
        (
            "migrate",
            &["--config", "--status", "--json", "--other-store"],
        ),
        ("queue", &["--config", "--state", "--other-store"]),
        ("reload", &["PID", "ExecReload="]),
        ("sink", &["--bind", "--status", "--delay"]),
        (
            "bench",
            &["--url", "--clients", "--rate", "--duration", "--body"],
        ),
    ] {
        let text = own(command);
        assert_eq!(
            run(&setup, &["help", command]),
            (0, text.clone(), String::new())
        );
        for word in words.iter().chain(&["Usage:", "Example", "Exit status:"]) {
            assert!(text.contains(word), "{command}, {word}: {text}");
        }
        assert!(!text.contains("--check-config"), "{command}: its own only");
    }
    for arguments in [&["--help"][..], &["-h"], &["help"]] {
        let (status, stdout, stderr) = run(&setup, arguments);
        assert_eq!((status, &*stderr), (0, ""));
        for word in [
            "--config",
            "--check-config",
            "--version",
            "--help",
            "demo",
            "--seconds",
            "doctor",
            "--deep",
            "migrate",
            "--status",
            "--json",
            "sink",
            "--bind",
            "--status",
            "--delay",
            "bench",
            "--url",
            "--clients",
            "--rate",
            "--duration",
            "--body",
        ] {
            assert!(stdout.contains(word), "{word}: {stdout}");
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let setup = to_nowhere();
    for (arguments, named) in [
        (&["--confg", "a"][..], "--confg"),
        (&["-x"], "-x"),
        (&["serve"], "serve"),
        (&["--config"], "--config"),
        (&["sink", "--status", "99"], "--status"),
        (&["sink", "--status", "many"], "--status"),
        (&["sink", "--delay", "soon"], "--delay"),
        (&["sink", "--bind", "nowhere"], "--bind"),
        (&["sink", "--config", "a"], "--config"),
        (&["bench"], "--url"),
        (&["bench", "--url", "localhost:8080"], "--url"),
        (&["bench", "--clients", "0"], "--clients"),
        (&["bench", "--rate", "1e18"], "--rate"),
        (&["bench", "--duration", "0s"], "--duration"),
        (
            &["bench", "--url", "http://h", "--body", "\u{1b}"],
            "--body",
        ),
        (&["bench", "--config", "a"], "--config"),
        (&["--check-config=yes"], "--check-config"),
        (&["\u{1b}[2J"], "[2J"),
    ] {
        let (status, stdout, stderr) = run(&setup, arguments);
        assert_eq!((status, &*stdout), (2, ""), "{arguments:?}: {stderr}");
        let line = error_line(&stderr);
        assert!(line.contains(named), "{arguments:?}: {line}");
        assert!(!line.contains(char::is_control), "{arguments:?}: {line:?}");
    }
}

#[test]
fn check_config_shows_the_effective_settings() {
    let setup = to_nowhere()
        .set("server.response_status", 202)
        .env("SERVER_RESPONSE_STATUS", 204)
        .env("QUEUE_BACKOFF_MAX", "1m30s");
    let (status, stdout, stderr) = run(&setup, &["--check-config"]);
    assert_eq!((status, &*stderr), (0, ""));
    for part in [
        "server:",
        "response_status: 204",
        "backoff_max: 1m30s",
        "remote_url: http://127.0.0.1:1",
        "num_clients: 8",
        "sqlite:queue.sqlite",
    ] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    assert!(!setup.path("queue.sqlite").exists(), "nothing is opened");
}

/// For a script, or a unit's ExecReload: nothing but what is wrong.
#[test]
fn check_config_says_nothing_of_good_settings_when_it_is_to_be_quiet() {
    let quiet = ["--check-config", "--quiet"];
    let warned_of = "host=localhost dbname=a binary_parameters=yes";
    let (_, _, stderr) = run(
        &to_nowhere().set("db.connection_string", warned_of),
        &quiet[..1],
    );
    assert!(stderr.contains("warning"), "{stderr}");
    let (status, stdout, stderr) =
        run(&to_nowhere().set("db.connection_string", warned_of), &quiet);
    assert_eq!((status, &*stdout, &*stderr), (0, "", ""));
    let (status, stdout, stderr) = run(&to_nowhere().set("queue.workers", "many"), &quiet);
    assert_eq!((status, &*stdout), (2, ""));
    assert!(
        error_line(&stderr).contains("queue.workers: must be"),
        "{stderr}"
    );
}

#[test]
fn what_check_config_shows_is_a_configuration() {
    let setup = to_nowhere().set("queue.give_up_statuses", "[410, 422]");
    let (_, shown, _) = run(&setup, &["--check-config"]);
    std::fs::write(setup.path("shown.yaml"), &shown).expect("write");
    let (status, again, stderr) = run(&setup, &["--config", "shown.yaml", "--check-config"]);
    assert_eq!((status, &*stderr), (0, ""));
    assert_eq!(again, shown);
}

#[test]
fn passwords_are_never_shown() {
    for connection in [
        "postgres://user:hunter2@db.example:5432/queue?sslmode=disable",
        "postgresql://user:hunter2@db.example/queue",
        "postgres://db.example/queue?user=user&password=hunter2",
        "host=db.example user=user password=hunter2 dbname=queue",
        "host=db.example user=user password='hunter2' dbname=queue",
        "host=db.example password = hunter2 user=user dbname=queue",
    ] {
        let setup = to_nowhere().set("db.connection_string", format!("{connection:?}"));
        let (status, stdout, stderr) = run(&setup, &["--check-config"]);
        assert_eq!(status, 0, "{connection}: {stderr}");
        assert!(stdout.contains("db.example"), "{connection}: {stdout}");
        let shown = stdout + &stderr;
        assert!(!shown.contains("hunter2"), "{connection}: {shown}");
    }
    // Nor when it is wrong.
    for connection in [
        "postgres://user:hunter2@db.example:port/queue",
        "host=db.example password=hunter2 port=many",
        "hunter2:hunter2",
    ] {
        let setup = to_nowhere().set("db.connection_string", format!("{connection:?}"));
        let (status, _, stderr) = run(&setup, &["--check-config"]);
        assert_eq!(status, 2, "{connection}");
        assert!(error_line(&stderr).contains("db.connection_string"));
        assert!(!stderr.contains("hunter2"), "{connection}: {stderr}");
    }
}

#[test]
fn unknown_libpq_keywords_are_accepted_with_a_warning() {
    let connection = "host=db.example dbname=queue binary_parameters=yes sslmode=disable";
    let setup = to_nowhere().set("db.connection_string", connection);
    let (status, _, stderr) = run(&setup, &["--check-config"]);
    assert_eq!(status, 0, "{stderr}");
    assert!(
        error_line(&stderr).contains("binary_parameters"),
        "{stderr}"
    );
}

/// Settings that stop the start: key, value as it stands in the file.
const BAD: [(&str, &str); 36] = [
    ("server.bind", "8080"),
    ("server.bind", "localhost"),
    ("server.bind", "127.0.0.1:70000"),
    ("server.response_status", "99"),
    ("server.response_status", "600"),
    ("server.response_status", "ok"),
    ("server.shutdown_timeout", "-1s"),
    ("server.shutdown_timeout", "soon"),
    ("server.enqueue_enabled", "maybe"),
    ("server.enqueue_rate", "-1"),
    ("server.enqueue_rate", "4294967296"),
    ("server.acceptor", "apache"),
    ("server.max_body_size", "10MB or so"),
    ("server.memory_limit", "0"),
    ("metrics.path", "metrics"),
    ("metrics.max_paths", "-3"),
    ("proxy.remote_url", "localhost:5000"),
    ("proxy.remote_url", "ftp://localhost"),
    ("proxy.remote_url", "http://"),
    ("proxy.remote_url", "http://localhost/?query"),
    ("proxy.request_timeout", "0s"),
    ("proxy.request_timeout", "1 fortnight"),
    ("proxy.num_clients", "0"),
    ("proxy.num_clients", "-1"),
    ("proxy.num_clients", "1.5"),
    ("queue.workers", "0"),
    ("queue.handle_per_second", "0"),
    ("queue.max_retries", "-1"),
    ("queue.backoff_min", "0s"),
    ("queue.give_up_statuses", "[99]"),
    ("queue.give_up_statuses", "gone"),
    ("db.connection_string", "mysql://localhost/db"),
    ("db.max_connections", "0"),
    ("db.use_index", "sometimes"),
    ("log.level", "loud"),
    ("log.format", "xml"),
];

#[test]
fn a_bad_setting_is_one_clear_line() {
    for (key, value) in BAD {
        let setup = to_nowhere().set(key, value);
        for arguments in [&["--check-config"][..], &[]] {
            let (status, stdout, stderr) = run(&setup, arguments);
            assert_eq!((status, &*stdout), (2, ""), "{key}: {value}: {stderr}");
            assert_names(error_line(&stderr), key, value);
        }
        // The same from the environment, which has its own name.
        let name = key.replace('.', "_").to_uppercase();
        let bare = value.trim_matches(['[', ']']);
        let setup = to_nowhere().env(&name, bare);
        let (status, _, stderr) = run(&setup, &["--check-config"]);
        assert_eq!(status, 2, "{name}={bare}: {stderr}");
        let line = error_line(&stderr);
        assert!(
            line.contains(&name) || line.contains(key),
            "{name}={bare}: {line}"
        );
    }
}

/// Key, what was got, and something about what is accepted.
fn assert_names(line: &str, key: &str, value: &str) {
    assert!(line.contains(key), "{key}: {line}");
    let got = value.trim_matches(['[', ']']);
    // These may hold a password, and a wrong one may hold it anywhere.
    if !["proxy.remote_url", "db.connection_string"].contains(&key) {
        assert!(line.contains(got), "{key}: {value}: {line}");
    }
    let rest = line.replace(key, "").replace(got, "");
    let words = rest.split_whitespace().count();
    assert!(words >= 3, "{key} {value}: what is accepted? {line}");
}

#[test]
fn combinations_and_unknown_keys_are_refused() {
    for (key, value, named) in [
        ("server.bnd", ":80", "server.bnd"),
        ("serve.bind", ":80", "serve"),
        ("queue.backoff_max", "1ms", "queue.backoff_max"),
    ] {
        let setup = to_nowhere().set(key, value);
        let (status, _, stderr) = run(&setup, &["--check-config"]);
        assert_eq!(status, 2, "{key}: {stderr}");
        assert!(error_line(&stderr).contains(named), "{key}: {stderr}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let setup = Setup::empty();
    let (status, _, stderr) = run(&setup, &["--config", "nowhere.yaml"]);
    assert_eq!(status, 2);
    assert!(error_line(&stderr).contains("nowhere.yaml"), "{stderr}");
    for text in [
        "server: [",
        "server:\n  bind: {a: b}\n",
        "- 1\n",
        "server: 1\n",
    ] {
        std::fs::write(setup.path("bad.yaml"), text).expect("write");
        let (status, _, stderr) = run(&setup, &["--config", "bad.yaml"]);
        assert_eq!(status, 2, "{text:?}: {stderr}");
        error_line(&stderr);
    }
    std::fs::write(setup.path("bad.yaml"), b"server:\n  bind: \xff\n").expect("write");
    let (status, _, stderr) = run(&setup, &["--config", "bad.yaml"]);
    assert_eq!(status, 2);
    error_line(&stderr);
}

#[test]
fn an_address_that_cannot_be_listened_on_has_advice() {
    let setup = to_nowhere();
    let long = format!("unix:/{}", "a".repeat(107));
    for (bind, status, part) in [
        (
            "unix:/nowhere/a.sock",
            1,
            "there is no directory \"/nowhere\"",
        ),
        ("192.0.2.1:8080", 1, "does not have that address"),
        (long.as_str(), 2, "at most 107 bytes, this one has 108"),
    ] {
        let setup = to_nowhere().set("server.bind", bind);
        let (found, _, stderr) = run(&setup, &[]);
        let line = error_line(&stderr);
        assert_eq!(found, status, "{bind}: {line}");
        assert!(
            line.contains(part) && line.contains("server.bind"),
            "{bind}: {line}"
        );
    }
    let setup = setup.set("server.bind", format!("unix:/{}", "a".repeat(106)));
    let (status, _, stderr) = run(&setup, &["--check-config"]);
    assert_eq!(status, 0, "{stderr}");
}

#[test]
fn the_start_names_destination_queue_and_settings_in_one_line() {
    let setup = Setup::new("http://localhost:1/base/").set(
        "db.connection_string",
        "'host=localhost port=1 user=ann password=hush dbname=q'",
    );
    let proxy = setup.start();
    let line = proxy.wait_for_log("msg=\"starting\"");
    let settings = std::fs::canonicalize(setup.path("config.yaml")).expect("config.yaml");
    for part in [
        "destination=http://localhost:1/base ",
        "queue=\"host=localhost port=1 user=ann dbname=q password=<sensitive>\"",
        settings
            .file_name()
            .expect("a name")
            .to_str()
            .expect("UTF-8"),
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!line.contains("hush"), "{line}");
    proxy.stop();
}

/// What one who writes YAML by hand gets wrong is told with its place.
#[test]
fn what_is_wrong_in_a_file_is_named_with_its_line() {
    let setup = Setup::empty();
    for (text, parts) in [
        ("server:\n\tbind: :80\n", &["line 2", "tab"][..]),
        (
            "server:\n  bind: :80\nqueue:\nserver:\n",
            &["line 4", "server", "line 1"],
        ),
        (
            "server:\n  bind: :80\n  bind: :81\n",
            &["line 3", "server.bind", "line 2"],
        ),
        ("server:\n  ack: @x\n", &["line 2", "not YAML"]),
        ("bind: :80\n", &["line 1", "server.bind or metrics.bind"]),
        (
            "server:\n  workers: 3\n",
            &["line 2", "server.workers", "queue.workers"],
        ),
        (
            "server:\n  bnid: :80\n",
            &["line 2", "did you mean server.bind?"],
        ),
        ("log:\n  level: info\nserver: 5\n", &["line 3", "server"]),
        (
            "server:\n\n  bind: {a: b}\n",
            &["line 3", "server.bind", "must be"],
        ),
        (
            "queue:\n  # Threads.\n  workers: none\n",
            &["line 3", "queue.workers", "\"none\""],
        ),
        (
            "proxy:\n  remote_url: localhost:5000\n",
            &["line 2", "http://localhost:5000"],
        ),
        ("server: {bind: '80'}\n", &["server.bind", "host:port"]),
        (
            "server:\n  bind: \"a\\e[31m\"\n",
            &["line 2", "server.bind"],
        ),
    ] {
        std::fs::write(setup.path("bad.yaml"), text).expect("write");
        let (status, _, stderr) = run(&setup, &["--config", "bad.yaml", "--check-config"]);
        assert_eq!(status, 2, "{text:?}: {stderr}");
        let line = error_line(&stderr);
        assert!(!line.contains('\u{1b}'), "{line:?}");
        for part in ["bad.yaml"].iter().chain(parts) {
            assert!(line.contains(part), "{text:?}, {part}: {line}");
        }
    }
}

#[test]
fn variables_that_are_nearly_ours_are_warned_of_without_their_value() {
    let setup = to_nowhere()
        .env("SERVER_BINDS", "hush")
        .env("DB_CONNECTION_STRING_FLE", "hush")
        .env("SEVER_BIND", "hush")
        .env("PROXY_REMOTE_URI", "hush");
    // Others' that only begin alike, and ours.
    let setup = setup
        .env("DB_HOST", "hush")
        .env("LOG_DIR", "hush")
        .env("QUEUE_URL", "hush")
        .env("SERVER_SOFTWARE", "hush")
        .env("PROXY_HOST", "hush")
        .env("HTTP_PROXY", "hush")
        .env("LOG_COLOR", "false")
        .env("SERVER_RESPONSE_STATUS", "201");
    let (status, _, stderr) = run(&setup, &["--check-config"]);
    assert_eq!(status, 0, "{stderr}");
    assert!(!stderr.contains("hush"), "{stderr}");
    let warned: Vec<&str> = stderr.lines().collect();
    let expected = [
        ("DB_CONNECTION_STRING_FLE", "DB_CONNECTION_STRING_FILE"),
        ("PROXY_REMOTE_URI", "PROXY_REMOTE_URL"),
        ("SERVER_BINDS", "SERVER_BIND"),
        ("SEVER_BIND", "SERVER_BIND"),
    ];
    assert_eq!(warned.len(), expected.len(), "{stderr}");
    for (line, (name, meant)) in warned.iter().zip(expected) {
        let part = format!("{name}: no such setting; did you mean {meant}?");
        assert!(line.contains(&part), "{line}");
    }
    let proxy = setup.start();
    proxy.wait_for_log("did you mean SERVER_BIND?");
    proxy.stop();
}

#[test]
fn the_environment_overrides_the_file() {
    let destination = Destination::start();
    let setup = to_nowhere()
        .env("PROXY_REMOTE_URL", destination.url())
        .env("SERVER_RESPONSE_STATUS", 201);
    let proxy = setup.start();
    assert_eq!(proxy.send(&http::numbered(0)).status, 201);
    destination.wait_for(1, PATIENCE);
    proxy.stop();
}

#[test]
fn the_shipped_configuration_is_good() {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config.yaml");
    let (status, stdout, stderr) = run(&Setup::empty(), &["--config", shipped, "--check-config"]);
    assert_eq!((status, &*stderr), (0, ""));
    assert!(stdout.contains("num_clients: 700"), "{stdout}");
    assert!(stdout.contains("sqlite:"), "{stdout}");
}

#[test]
fn a_port_in_use_is_one_clear_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address");
    for key in ["server.bind", "metrics.bind"] {
        let setup = to_nowhere().set(key, address);
        let (status, stdout, stderr) = run(&setup, &[]);
        assert_eq!((status, &*stdout), (1, ""));
        let line = error_line(&stderr);
        assert!(line.starts_with(key), "{line}");
        assert!(line.contains(&address.to_string()), "{line}");
        assert!(
            line.contains("in use") && line.contains("ss -ltnp"),
            "{line}"
        );
    }
    let at = address.to_string();
    let (status, _, stderr) = run(&Setup::empty(), &["sink", "--bind", &at]);
    assert_eq!(status, 1);
    assert!(error_line(&stderr).contains("in use"), "{stderr}");
}

#[test]
fn sink_prints_what_reaches_it() {
    let directory = tempfile::TempDir::new().expect("directory");
    let mut command = binary(directory.path());
    command.args([
        "sink",
        "--bind",
        "127.0.0.1:0",
        "--status",
        "503",
        "--delay",
        "10ms",
    ]);
    let sink = Process::spawn(&mut command);
    let line = sink.wait_for_line("listening on ", PATIENCE);
    let (_, address) = line.split_once("listening on ").expect("address");
    let request = http::request(
        "PUT",
        "/a?b=%20",
        &["X-Tab: a\tb", "X-Quote: \"a\""],
        b"{\"body\"}\x1b[31m\r\xff\0",
    );
    let answer = http::exchange(address.parse().expect("address"), &request);
    assert_eq!(answer.status, 503);
    for part in ["PUT /a?b=%20", "X-Quote: ", "{\"body\"}", "\\xff"] {
        sink.wait_for_line(part, PATIENCE);
    }
    assert!(!sink.text().contains(['\x1b', '\0']), "{:?}", sink.text());
}

#[test]
fn sink_is_a_destination() {
    let directory = tempfile::TempDir::new().expect("directory");
    let sink = Process::spawn(binary(directory.path()).args(["sink", "--bind", "127.0.0.1:0"]));
    let line = sink.wait_for_line("listening on ", PATIENCE);
    let (_, address) = line.split_once("listening on ").expect("address");
    let proxy = Setup::new(&format!("http://{address}")).start();
    proxy.accept(0..3);
    for number in 0..3 {
        sink.wait_for_line(&format!("body {number}"), PATIENCE);
    }
}
