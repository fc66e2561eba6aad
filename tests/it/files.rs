//! Whatever the paths in the settings name: a file that was there is neither replaced nor waited for.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Setup};

fn nowhere() -> Setup {
    Setup::new("http://127.0.0.1:1")
}

fn mkfifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status();
    assert!(made.expect("mkfifo, of coreutils").success());
}

/// Starts it, which must fail with that status, and returns what it said.
fn refused(setup: &Setup, arguments: &[&str], status: i32) -> String {
    let mut process = Process::spawn(setup.command().args(arguments));
    assert_eq!(process.wait(PATIENCE).code(), Some(status));
    process.text()
}

/// The queue is as precious as a file can be: it holds what senders believe to be safe.
#[test]
fn an_address_that_names_a_file_does_not_destroy_it() {
    for key in ["server.bind", "metrics.bind"] {
        for name in ["queue.sqlite", "config.yaml", "directory", "fifo", "link"] {
            let setup = nowhere();
            let path = setup.path(name);
            let setup = setup.set(key, format!("unix:{}", path.display()));
            setup.write();
            std::fs::write(setup.path("queue.sqlite"), "requests").unwrap();
            std::fs::create_dir(setup.path("directory")).unwrap();
            mkfifo(&setup.path("fifo"));
            std::os::unix::fs::symlink("queue.sqlite", setup.path("link")).unwrap();
            let kind = match name {
                "directory" => "a directory",
                "fifo" => "a FIFO",
                "link" => "a symbolic link",
                _ => "a regular file",
            };
            let before = std::fs::symlink_metadata(&path).unwrap().file_type();
            let said = refused(&setup, &[], 1);
            let expected = format!("{key}: cannot listen on unix:{}: ", path.display());
            assert!(said.contains(&expected) && said.contains(kind), "{said}");
            assert_eq!(
                std::fs::symlink_metadata(&path).unwrap().file_type(),
                before
            );
            let kept = std::fs::read(setup.path("queue.sqlite")).unwrap();
            assert_eq!(kept, b"requests");
        }
    }
}

#[test]
fn a_fifo_in_place_of_a_file_does_not_hang_the_start() {
    let setup = nowhere();
    let fifo = setup.path("fifo");
    mkfifo(&fifo);
    let fifo = fifo.to_str().unwrap().to_owned();
    let kind = "is a FIFO, not a regular file";
    let assert_named = |said: String, setting: &str| {
        let is_named = said.contains(setting) && said.contains(&fifo) && said.contains(kind);
        assert!(is_named, "{setting}: {said}");
    };
    let env = |name: &str| nowhere().env(name, &fifo);
    let named = refused(&env("DB_CONNECTION_STRING_FILE"), &[], 2);
    assert_named(
        named,
        "db.connection_string (from DB_CONNECTION_STRING_FILE)",
    );
    assert_named(refused(&nowhere(), &["--config", &fifo], 2), "settings");
    let bench = ["bench", "--url", "http://127.0.0.1:1", "--body", &fifo];
    assert_named(refused(&nowhere(), &bench, 2), "--body");
    let directory = setup.path("credentials");
    std::fs::create_dir(&directory).unwrap();
    mkfifo(&directory.join("server.bind"));
    let credential = nowhere().env("CREDENTIALS_DIRECTORY", directory.display());
    let said = refused(&credential, &[], 2);
    assert!(
        said.contains("server.bind (from credential") && said.contains(kind),
        "{said}"
    );
}

#[cfg(feature = "tls")]
#[test]
fn a_fifo_in_place_of_a_certificate_does_not_hang_the_start() {
    let setup = nowhere();
    let fifo = setup.path("fifo");
    mkfifo(&fifo);
    let fifo = fifo.display().to_string();
    for keys in [
        &["proxy.ca_file"][..],
        &["proxy.client_cert_file", "proxy.client_key_file"],
    ] {
        let to_https = Setup::new("https://127.0.0.1:1");
        let setup = keys
            .iter()
            .fold(to_https, |setup, key| setup.set(key, &fifo));
        let said = refused(&setup, &[], 2);
        assert!(
            said.contains(keys[0]) && said.contains("is a FIFO"),
            "{said}"
        );
    }
    for keyword in ["sslrootcert", "sslcert=/dev/null sslkey"] {
        let string = format!("'host=h sslmode=require {keyword}={fifo}'");
        let said = refused(&nowhere().set("db.connection_string", string), &[], 2);
        assert!(said.contains("db.connection_string: "), "{said}");
    }
    // Without the system's authorities it starts, and says so.
    let setup = Setup::new("https://127.0.0.1:1").env("SSL_CERT_FILE", &fifo);
    let proxy = setup.start();
    let warning = proxy.wait_for_log("no https destination is trusted");
    assert!(
        warning.contains("SSL_CERT_FILE=") && warning.contains("is a FIFO"),
        "{warning}"
    );
    proxy.stop();
}

/// Reading settings again must not hang a program that has requests in memory.
#[test]
fn a_reload_that_finds_a_fifo_changes_nothing() {
    let setup = nowhere();
    let proxy = setup.start();
    std::fs::remove_file(setup.path("config.yaml")).unwrap();
    mkfifo(&setup.path("config.yaml"));
    proxy.sighup();
    let said = proxy.wait_for_log("settings not reloaded");
    assert!(said.contains("is a FIFO"), "{said}");
    proxy.stop();
}

#[test]
fn a_secret_that_everybody_may_read_is_told_of_at_the_start_and_by_doctor() {
    let setup = nowhere();
    let path = setup.path("secret");
    let mode = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&path, permissions).unwrap();
    };
    std::fs::write(&path, "postgres://ann:hush-hush@127.0.0.1:1/queue").unwrap();
    let setup = setup.env("DB_CONNECTION_STRING_FILE", path.display());
    let told = "db.connection_string: everybody may read the password or key in";
    let doctor = || {
        let output = setup.command().arg("doctor").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    mode(0o644);
    let proxy = setup.start();
    proxy.wait_for_log(told);
    proxy.stop();
    let found = doctor();
    assert!(
        found.contains(told) && found.contains("chmod o-r"),
        "{found}"
    );
    mode(0o640);
    let proxy = setup.start();
    assert!(!proxy.log().contains(told), "{}", proxy.log());
    proxy.stop();
    let found = doctor();
    assert!(!found.contains(told) && !found.contains("hush"), "{found}");
}
