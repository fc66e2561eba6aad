//! Whose the files of a SQLite queue are, and who else uses them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::support::destination::Destination;
use crate::support::http;
use crate::support::postgres::{as_server_account, give_to_server_account};
use crate::support::process::Process;
use crate::support::proxy::{Proxy, Setup, binary, wait_until};

/// A directory of the server's account, where tests run as root; else of the one who tests.
fn owned_setup(destination: &str) -> Setup {
    let setup = Setup::new(destination).set("server.enqueue_rate", 0);
    give_to_server_account(&setup.path(""));
    setup
}

fn owner(path: &Path) -> (u32, u32) {
    let file = path.metadata().expect("metadata");
    (file.uid(), file.gid())
}

/// The program, run by that account, from where it may be.
fn of_the_account(setup: &Setup) -> Command {
    setup.write();
    let program = setup.path("asyncproxy");
    fs::copy(binary(&setup.path("")).get_program(), &program).expect("copy");
    let mut command = Command::new(program);
    command.current_dir(setup.path("")).env_clear();
    as_server_account(&mut command);
    command
}

#[test]
fn what_root_makes_belongs_to_the_owner_of_its_directory() {
    let destination = Destination::down();
    for makes in ["migrate", "run"] {
        let setup = owned_setup(&destination.url());
        if makes == "migrate" {
            let output = setup.command().arg("migrate").output().expect("run");
            assert!(output.status.success(), "{output:?}");
        } else {
            let proxy = setup.start();
            proxy.accept(0..3);
            wait_until("the reserve", || {
                setup.path("queue.sqlite-reserve").exists()
            });
            let names = ["", "-wal", "-shm", "-lock", "-reserve"];
            for name in names.map(|suffix| format!("queue.sqlite{suffix}")) {
                assert_eq!(owner(&setup.path(&name)), owner(&setup.path("")), "{name}");
            }
            proxy.stop();
        }
        assert_eq!(owner(&setup.path("queue.sqlite")), owner(&setup.path("")));
        // The service that it is for can go on with it.
        let proxy = Proxy::of(Process::spawn(&mut of_the_account(&setup)));
        proxy.wait_for_store();
        proxy.accept(3..6);
        proxy.stop();
    }
}

#[test]
fn a_start_with_a_file_that_is_not_ours_to_write_says_whose_it_is() {
    for (setting, name) in [
        ("db.connection_string", "queue.sqlite"),
        ("db.spool", "spool.sqlite"),
    ] {
        let setup = owned_setup("http://127.0.0.1:1");
        let setup = match setting {
            "db.spool" => setup
                .set(
                    "db.connection_string",
                    "'host=localhost port=1 user=a dbname=b'",
                )
                .set("db.spool", "sqlite:spool.sqlite"),
            _ => setup,
        };
        let path = setup.path(name);
        fs::write(&path, "").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("chmod");
        let output = of_the_account(&setup).output().expect("run");
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(1), "{setting}: {said}");
        let (owner, _) = owner(&path);
        for part in [
            format!("{setting}: "),
            name.to_owned(),
            format!("belongs to user {owner}"),
            "chown --reference=".to_owned(),
        ] {
            assert!(said.contains(&part), "{setting}, {part}: {said}");
        }
        assert!(!said.contains("msg=listening"), "{said}");
    }
}

#[test]
fn doctor_names_files_that_are_not_their_directorys_owners() {
    let setup = owned_setup("http://127.0.0.1:1");
    let output = setup.command().arg("migrate").output().expect("run");
    assert!(output.status.success());
    let told = |setup: &Setup| {
        let output = setup.command().arg("doctor").output().expect("run");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let whose = "whose directory it is";
    assert!(!told(&setup).contains(whose), "{}", told(&setup));
    let of_another = owner(&setup.path("")).0 != rustix::process::geteuid().as_raw();
    // As cp or an editor of root's leaves it. Who is not root cannot make such a one.
    let copy = setup.path("copy");
    fs::copy(setup.path("queue.sqlite"), &copy).expect("copy");
    fs::rename(&copy, setup.path("queue.sqlite")).expect("rename");
    assert_eq!(told(&setup).contains(whose), of_another, "{}", told(&setup));
}

#[test]
fn a_second_instance_on_one_file_says_so_and_so_does_doctor() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let first = setup.start();
    first.wait_for_store();
    let alone = setup.command().arg("doctor").output().expect("run");
    let alone = String::from_utf8(alone.stdout).expect("UTF-8");
    assert!(!alone.contains("several processes"), "{alone}");
    let second = setup.start();
    let pids = [first.pid(), second.pid()];
    let mut said = String::new();
    wait_until("the second to say so", || {
        let ready = http::get(second.control, "/readyz");
        assert_eq!(ready.status, 200);
        said = ready.text();
        said.starts_with("ok, but another process ")
    });
    assert!(
        said.contains(&format!("({})", pids[0])) && said.contains("queue.sqlite as well"),
        "{said}"
    );
    assert_eq!(http::get(first.control, "/readyz").text(), "ok\n");
    let status = http::get(second.control, "/status").text();
    assert!(status.contains("\"rival\":\"another process "), "{status}");
    let told = setup.command().arg("doctor").output().expect("run");
    let told = String::from_utf8(told.stdout).expect("UTF-8");
    let listed: BTreeSet<u32> = told
        .split_once("several processes of this program: ")
        .and_then(|(_, rest)| rest.lines().next())
        .into_iter()
        .flat_map(|rest| rest.split(", ").filter_map(|pid| pid.trim().parse().ok()))
        .collect();
    assert_eq!(listed, pids.into_iter().collect(), "{told}");
    second.stop();
    first.stop();
}
