//! What comes from files is used, and shown nowhere.

use crate::support::http;
use crate::support::postgres::cluster;
use crate::support::proxy::Setup;

#[test]
fn check_config_shows_no_password_whatever_the_way_in() {
    const SECRET: &str = "postgres://ann:hush-hush@127.0.0.1:1/queue";
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("db.connection_string");
    for (content, status) in [(SECRET, 0), ("postgress://ann:hush-hush@h/q", 2)] {
        std::fs::write(&file, format!("{content}\n")).expect("write");
        for (name, value) in [
            ("DB_CONNECTION_STRING", content),
            ("DB_CONNECTION_STRING_FILE", file.to_str().expect("UTF-8")),
            (
                "CREDENTIALS_DIRECTORY",
                folder.path().to_str().expect("UTF-8"),
            ),
        ] {
            let setup = Setup::empty();
            let mut command = setup.command();
            command.env_remove("DB_CONNECTION_STRING").env(name, value);
            std::fs::write(folder.path().join("config.yaml"), "").expect("write");
            command
                .arg("--config")
                .arg(folder.path().join("config.yaml"));
            let output = command.arg("--check-config").output().expect("run");
            let shown =
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert_eq!(output.status.code(), Some(status), "{name}: {shown}");
            assert!(!shown.contains("hush"), "{name}: {shown}");
            assert_eq!(shown.contains("127.0.0.1"), status == 0, "{name}: {shown}");
        }
    }
}

/// A server that turns the user away: all that is said of it, by whatever is run, is without the
/// password.
#[test]
fn a_failing_connection_shows_no_password_whatever_the_way_in() {
    let port = cluster().database().port();
    let url = format!("postgres://ann:hush-hush@127.0.0.1:{port}/queue");
    let plain = Setup::new("http://127.0.0.1:1");
    let file = plain.path("db.connection_string");
    std::fs::write(&file, &url).unwrap();
    let folder = file.parent().unwrap().display().to_string();
    let setup = |key: &str, value: &str| {
        let setup = Setup::new("http://127.0.0.1:1");
        match key {
            "" => setup.set("db.connection_string", format!("'{value}'")),
            // Of the file, where it is the last to be asked.
            name => setup.set("db.connection_string", "").env(name, value),
        }
    };
    for (key, value) in [
        ("", url.as_str()),
        ("DB_CONNECTION_STRING", &url),
        ("DB_CONNECTION_STRING_FILE", file.to_str().unwrap()),
        ("CREDENTIALS_DIRECTORY", &folder),
    ] {
        let setup = setup(key, value);
        for arguments in [
            &["doctor"][..],
            &["doctor", "--json"],
            &["migrate"],
            &["migrate", "--status"],
            &["queue", "status"],
            &["--check-config"],
        ] {
            let output = setup.command().args(arguments).output().unwrap();
            let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert!(
                said.contains("ann") || said.contains("127.0.0.1"),
                "{arguments:?}: {said}"
            );
            assert!(!said.contains("hush"), "{key} {arguments:?}: {said}");
        }
        let proxy = setup.start();
        proxy.wait_for_log("store does not work");
        proxy.sighup();
        proxy.wait_for_log("settings reloaded");
        for target in ["/readyz", "/status", "/metrics"] {
            assert!(
                !http::get(proxy.control, target).text().contains("hush"),
                "{target}"
            );
        }
        assert!(!proxy.log().contains("hush"), "{}", proxy.log());
        proxy.stop();
    }
}

/// A password that is not encoded would be taken for a host, asked for and shown.
#[test]
fn a_url_that_can_be_read_in_two_ways_is_refused_and_shown_nowhere() {
    for url in [
        "postgres://ann:p@hush/w#hush@127.0.0.1:1/hush",
        "postgres://ann:12/hush@127.0.0.1/hush",
        "postgres://ann:hush?hush@127.0.0.1:1/hush",
    ] {
        let quoted = format!("'{url}'");
        let setup = Setup::new("http://127.0.0.1:1").set("db.connection_string", quoted);
        for arguments in [
            &["doctor"][..],
            &["doctor", "--json"],
            &["migrate"],
            &["queue", "status"],
            &["--check-config"],
            &[],
        ] {
            let output = setup.command().args(arguments).output().unwrap();
            let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
            assert!(said.contains("%40 for @"), "{arguments:?}: {said}");
            for part in ["hush", "ann", "12"] {
                assert!(!said.contains(part), "{arguments:?}: {said}");
            }
        }
    }
}
