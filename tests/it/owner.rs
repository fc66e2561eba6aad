//! Whose the files of a queue are: a service that runs as a user of its own, and root, who makes or
//! restores them for it. Needs root, to be either.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::postgres::{give_to_server_account, server_account};
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::store;

const NO_POSTGRES: &str = "postgres://test@127.0.0.1:1/none";

/// User and group of a service, which is any account but root's.
fn service() -> (u32, u32) {
    server_account().expect("run this test as root: it is about what root does")
}

/// A setup in a directory of the service's, which need not be let to where the binary is.
fn in_the_services_directory(url: &str) -> Setup {
    let setup = Setup::new(url);
    give_to_server_account(&setup.path(""));
    let built = setup.command().get_program().to_owned();
    let binary = setup.path("asyncproxy");
    fs::hard_link(&built, &binary)
        .or_else(|_| fs::copy(&built, &binary).map(drop))
        .expect("the binary");
    setup
}

/// The binary as the service runs it.
fn as_service(setup: &Setup) -> Command {
    let (user, group) = service();
    setup.write();
    let mut command = Command::new(setup.path("asyncproxy"));
    command.current_dir(setup.path("")).env_clear();
    command.uid(user).gid(group);
    command
}

fn start_as_service(setup: &Setup) -> Proxy {
    Proxy::of(Process::spawn(&mut as_service(setup)))
}

/// All that lies in the directory and has this in its name.
fn files(setup: &Setup, name: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(setup.path("")).unwrap();
    let files = files.map(|file| file.unwrap().path());
    files
        .filter(|file| file.to_string_lossy().contains(name))
        .collect()
}

fn assert_of_the_service(setup: &Setup, name: &str, suffixes: &[&str]) {
    for suffix in suffixes {
        let path = setup.path(&format!("{name}{suffix}"));
        assert!(path.exists(), "{path:?}");
    }
    for path in files(setup, name) {
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), service(), "{path:?}");
        assert_eq!(metadata.mode() & 0o777, 0o600, "{path:?}");
    }
}

#[test]
fn what_root_makes_is_for_the_owner_of_the_directory() {
    let destination = Destination::down();
    let setup = in_the_services_directory(&destination.url());
    let proxy = setup.start();
    proxy.wait_for_store();
    proxy.accept(0..3);
    wait_until("3 rows", || store::rows(&setup) == 3);
    let all = ["", "-wal", "-shm", "-lock", "-reserve"];
    assert_of_the_service(&setup, "queue.sqlite", &all);
    // What is saved when it is taken away, too.
    fs::remove_file(setup.path("queue.sqlite")).unwrap();
    proxy.wait_for_log("what the queue held is saved to a new file");
    assert_eq!(files(&setup, "-saved-").len(), 1);
    assert_of_the_service(&setup, "-saved-", &[]);
    proxy.stop();
}

#[test]
fn a_queue_that_root_has_migrated_is_the_services_to_serve() {
    let mut destination = Destination::down();
    let setup = in_the_services_directory(&destination.url());
    let migrated = setup.command().arg("migrate").status().unwrap();
    assert!(migrated.success());
    assert_of_the_service(&setup, "queue.sqlite", &[""]);
    let proxy = start_as_service(&setup);
    proxy.accept(0..3);
    wait_until("3 rows", || store::rows(&setup) == 3);
    // Root may look while it runs.
    let status = setup.command().args(["queue", "status"]).status().unwrap();
    assert!(status.success());
    assert_of_the_service(&setup, "queue.sqlite", &["", "-wal", "-shm", "-lock"]);
    destination.open();
    destination.wait_for_numbers(3, PATIENCE);
    proxy.stop();
}

#[test]
fn a_spool_that_root_makes_is_for_the_owner_of_the_directory() {
    let destination = Destination::down();
    let setup = in_the_services_directory(&destination.url())
        .set("db.connection_string", NO_POSTGRES)
        .set("db.spool", "sqlite:spool.sqlite")
        .set("server.enqueue_rate", 0);
    let proxy = setup.start();
    proxy.accept(0..3);
    let all = ["", "-wal", "-shm", "-lock"];
    assert_of_the_service(&setup, "spool.sqlite", &all);
    proxy.stop();
}

/// What an operator has done to files that are there, and what the start says of it.
type Deed = (&'static str, fn(&Setup), &'static str);

fn to_root(path: &Path) {
    chown(path, Some(0), Some(0)).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

const DEEDS: [Deed; 6] = [
    (
        "restored by root",
        |setup| to_root(&setup.path("queue.sqlite")),
        "belongs to root (mode 0600)",
    ),
    (
        "served by root, and given back without what lies beside it",
        |setup| to_root(&setup.path("queue.sqlite-lock")),
        "queue.sqlite-lock cannot be written",
    ),
    (
        "all of it root's, and readable",
        |setup| {
            for path in files(setup, "queue.sqlite") {
                to_root(&path);
                set_mode(&path, 0o644);
            }
        },
        "belongs to root (mode 0644)",
    ),
    (
        "made read-only",
        |setup| set_mode(&setup.path("queue.sqlite"), 0o400),
        "(mode 0400)",
    ),
    (
        "in a directory of root's",
        |setup| {
            to_root(&setup.path(""));
            set_mode(&setup.path(""), 0o755);
        },
        "no files can be made",
    ),
    (
        "marked as immutable",
        |setup| {
            let path = setup.path("queue.sqlite");
            let marked = Command::new("chattr").arg("+i").arg(path).status();
            assert!(marked.expect("chattr, of e2fsprogs").success());
        },
        "immutable",
    ),
];

#[test]
fn a_file_that_is_there_and_not_ours_ends_the_start_and_the_message_mends_it() {
    for (name, deed, said) in DEEDS {
        let destination = Destination::start();
        let setup = in_the_services_directory(&destination.url());
        let path = setup.path("queue.sqlite").display().to_string();
        let setup = setup.set("db.connection_string", format!("sqlite:{path}"));
        let proxy = start_as_service(&setup);
        proxy.wait_for_store();
        proxy.stop();
        deed(&setup);
        let mut process = Process::spawn(&mut as_service(&setup));
        assert_eq!(process.wait(PATIENCE).code(), Some(1), "{name}");
        let text = process.text();
        let complaint = text
            .lines()
            .find(|line| line.starts_with("asyncproxy: db.connection_string: "))
            .unwrap_or_else(|| panic!("{name}: {text}"));
        assert!(complaint.contains(said), "{name}: {complaint}");
        let ourselves = format!("runs as uid {}:", service().0);
        assert!(complaint.contains(&ourselves), "{name}: {complaint}");
        assert!(!text.contains("listening"), "{name}: {text}");
        let (_, mend) = complaint.rsplit_once("; ").expect("a way out");
        let mended = Command::new("sh").args(["-c", mend]).status().unwrap();
        assert!(mended.success(), "{name}: {mend}");
        let proxy = start_as_service(&setup);
        proxy.wait_for_store();
        proxy.accept(0..1);
        proxy.stop();
    }
}

#[test]
fn a_spool_that_is_not_ours_ends_the_start_too() {
    let destination = Destination::start();
    let setup = in_the_services_directory(&destination.url())
        .set("db.connection_string", NO_POSTGRES)
        .set("db.spool", "sqlite:spool.sqlite");
    fs::write(setup.path("spool.sqlite"), "").unwrap();
    let mut process = Process::spawn(&mut as_service(&setup));
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    let complaint = "asyncproxy: db.spool: spool.sqlite cannot be written";
    process.wait_for_line(complaint, PATIENCE);
}

/// What it may write whatever the mode says is no wrong setting.
#[test]
fn root_starts_on_a_read_only_file_as_ever() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    proxy.wait_for_store();
    proxy.stop();
    set_mode(&setup.path("queue.sqlite"), 0o400);
    let proxy = setup.start();
    proxy.wait_for_store();
    assert_eq!(http::get(proxy.control, "/readyz").text(), "ok\n");
    proxy.stop();
}

/// The finding about the queue's file that says this.
fn found(command: &mut Command, part: &str) -> Option<Value> {
    let output = command.args(["doctor", "--json"]).output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    findings.into_iter().find(|finding| {
        let text = finding["found"].as_str().unwrap();
        finding["about"] == "db.connection_string" && text.contains(part)
    })
}

#[test]
fn doctor_compares_files_with_their_directory_and_its_way_out_works() {
    const PART: &str = "a service that runs as its owner cannot write there";
    let destination = Destination::start();
    let setup = in_the_services_directory(&destination.url());
    let proxy = start_as_service(&setup);
    proxy.wait_for_store();
    proxy.stop();
    assert_eq!(found(&mut setup.command(), PART), None);
    for name in ["queue.sqlite", "queue.sqlite-lock"] {
        to_root(&setup.path(name));
        // As the service sees it, and as root does.
        let finding = found(&mut as_service(&setup), "cannot be read and written");
        assert_eq!(finding.expect(name)["level"], "error");
        let finding = found(&mut setup.command(), PART).expect(name);
        assert_eq!(finding["level"], "warning");
        let text = finding["found"].as_str().unwrap();
        assert!(
            text.starts_with(&format!("{name} belongs to root")),
            "{text}"
        );
        let mended = Command::new("sh")
            .args(["-c", finding["mend"].as_str().unwrap()])
            .current_dir(setup.path(""))
            .status();
        assert!(mended.unwrap().success());
        assert_eq!(found(&mut setup.command(), PART), None);
    }
}
