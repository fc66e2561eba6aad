//! What befalls the file of a queue: it is taken away, damaged, its disk is full or hangs. Nobody is
//! told of success for what rests on it then, and what can be saved is saved.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use crate::support::dedicated::DedicatedCluster;
use crate::support::destination::{Answer, Destination};
use crate::support::disk::Disk;
use crate::support::hang::HangingDisk;
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};

/// Stores all that comes, with a destination that is not there.
fn storing(destination: &Destination) -> Setup {
    Setup::new(&destination.url())
        .set("server.ack", "stored")
        .set("server.enqueue_rate", 0)
}

fn in_directory(setup: Setup, directory: &Path) -> Setup {
    let path = directory.join("queue.sqlite");
    setup.set("db.connection_string", format!("sqlite:{}", path.display()))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(suffix);
    beside.into()
}

fn count(path: &Path) -> i64 {
    let file = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    file.query_row("SELECT count(*) FROM proxy_requests", [], |row| row.get(0))
        .unwrap()
}

fn saved(directory: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(directory).unwrap();
    let files = files.map(|file| file.unwrap().path());
    files
        .filter(|file| file.to_string_lossy().contains("-saved-"))
        .collect()
}

fn queue(setup: &Setup, arguments: &[&str]) -> Output {
    let mut command = setup.command();
    command.arg("queue").args(arguments).output().unwrap()
}

fn wait_until_ready_says(proxy: &Proxy, status: u16, part: &str) -> String {
    let mut said = String::new();
    wait_until(&format!("/readyz with {status} and {part:?}"), || {
        let answer = http::get(proxy.control, "/readyz");
        said = answer.text();
        answer.status == status && said.contains(part)
    });
    said
}

fn is_taken_away(deed: fn(&Path), said: &str) {
    let directory = tempfile::tempdir().unwrap();
    let destination = Destination::down();
    let setup = in_directory(storing(&destination), directory.path());
    let path = directory.path().join("queue.sqlite");
    let proxy = setup.start();
    proxy.accept(0..40);
    let before = saved(directory.path());
    assert_eq!(before, Vec::<PathBuf>::new());
    deed(&path);
    let what_is_there = fs::read(&path).ok();
    let ready = wait_until_ready_says(&proxy, 503, "asyncproxy queue import");
    assert!(ready.contains(&path.display().to_string()), "{ready}");
    assert!(ready.contains(said), "{ready}");
    proxy.wait_for_log("what the queue held is saved to a new file");
    assert_eq!(proxy.send(&http::numbered(40)).status, 503);
    assert_eq!(proxy.metrics().get("asyncproxy_store_up"), 0.0);
    let saved = saved(directory.path());
    assert_eq!(saved.len(), 1);
    assert_eq!(count(&saved[0]), 40);
    let mode = fs::metadata(&saved[0]).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Nothing is lost, and what lies there now is left as it is.
    proxy.stop();
    if !said.contains("-wal") {
        assert_eq!(fs::read(&path).ok(), what_is_there);
    }
    // As the message says.
    let from = in_directory(storing(&destination), directory.path()).set(
        "db.connection_string",
        format!("sqlite:{}", saved[0].display()),
    );
    let export = directory.path().join("export");
    let output = queue(
        &from,
        &["export", "--output", &export.display().to_string()],
    );
    assert!(output.status.success(), "{output:?}");
    let into = Setup::new(&destination.url());
    into.start().stop();
    let output = queue(&into, &["import", &export.display().to_string()]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(count(&into.path("queue.sqlite")), 40);
}

#[test]
fn a_file_that_is_removed_while_in_use_is_saved_and_not_made_anew() {
    is_taken_away(
        |path| fs::remove_file(path).unwrap(),
        "queue.sqlite was removed",
    );
}

#[test]
fn a_file_that_is_replaced_while_in_use_is_saved_and_the_other_left_alone() {
    is_taken_away(
        |path| {
            let copy = beside(path, "-copy");
            fs::copy(path, &copy).unwrap();
            fs::rename(copy, path).unwrap();
        },
        "queue.sqlite was replaced",
    );
}

#[test]
fn a_log_that_is_removed_while_in_use_is_noticed_and_all_is_saved() {
    is_taken_away(
        |path| fs::remove_file(beside(path, "-wal")).unwrap(),
        "queue.sqlite-wal was removed",
    );
}

#[test]
fn a_queue_that_cannot_be_saved_makes_the_program_end_with_status_1() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("queue");
    fs::create_dir(&directory).unwrap();
    let destination = Destination::down();
    let setup = in_directory(storing(&destination), &directory);
    let mut proxy = setup.start();
    proxy.accept(0..10);
    fs::remove_dir_all(&directory).unwrap();
    proxy.wait_for_log("what the queue held cannot be saved");
    wait_until_ready_says(&proxy, 503, "cannot be saved");
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(1));
    proxy.wait_for_log("what it held could not be saved");
}

#[test]
fn a_spool_that_is_removed_while_in_use_is_saved() {
    let destination = Destination::down();
    let cluster = DedicatedCluster::create();
    let setup = storing(&destination)
        .set("db.connection_string", cluster.url())
        .set("db.spool", "sqlite:spool.sqlite");
    let proxy = setup.start();
    proxy.wait_for_log("store does not work");
    proxy.accept(0..20);
    fs::remove_file(setup.path("spool.sqlite")).unwrap();
    proxy.wait_for_log("what the queue held is saved to a new file");
    assert_eq!(proxy.send(&http::numbered(20)).status, 503);
    let saved = saved(&setup.path(""));
    assert_eq!(saved.len(), 1);
    assert_eq!(count(&saved[0]), 20);
    proxy.stop();
}

#[test]
fn after_a_stop_the_one_file_has_all_rows() {
    let destination = Destination::down();
    let setup = storing(&destination);
    let path = setup.path("queue.sqlite");
    let copied = || {
        assert!(!beside(&path, "-wal").exists());
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("copy.sqlite");
        fs::copy(&path, &copy).unwrap();
        count(&copy)
    };
    let proxy = setup.start();
    proxy.accept(0..100);
    proxy.stop();
    assert_eq!(copied(), 100);
    let output = queue(&setup, &["drop", "--all"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(copied(), 0);
}

/// Requests of 8 KiB, acknowledged; their number.
fn accept_large(proxy: &Proxy, numbers: std::ops::Range<usize>) {
    let mut connection = http::Connection::open(proxy.intake);
    for number in numbers {
        let id = format!("X-Id: {number}");
        let request = http::request("POST", "/hook", &[&id], &vec![b'x'; 8 * 1024]);
        assert_eq!(connection.exchange(&request).status, 200);
    }
}

/// Writes over pages in the middle of the file, once all of it is there.
fn damage(path: &Path) {
    let other = Connection::open(path).unwrap();
    other.busy_timeout(PATIENCE).unwrap();
    let fold = "PRAGMA wal_checkpoint(TRUNCATE)";
    other.query_row(fold, [], |_| Ok(())).unwrap();
    drop(other);
    let file = File::options().write(true).open(path).unwrap();
    let middle = file.metadata().unwrap().len() / 2 / 4096 * 4096;
    file.write_all_at(&[0xa5; 32 * 4096], middle).unwrap();
}

fn assert_saved_with_one_command(setup: &Setup, all: usize) {
    let output = queue(setup, &["export"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("requests cannot be read"), "{said}");
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let read = lines.filter(|line| !line.is_empty()).count();
    assert!(read > all * 3 / 4 && read < all, "{read} of {all}");
    let into = Setup::new("http://127.0.0.1:1");
    let export = into.path("export");
    fs::write(&export, &output.stdout).unwrap();
    into.start().stop();
    let output = queue(&into, &["import", "export"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(count(&into.path("queue.sqlite")), read as i64);
}

#[test]
fn a_file_that_is_damaged_while_in_use_acknowledges_nothing_more() {
    let destination = Destination::down();
    let setup = storing(&destination);
    let proxy = setup.start();
    accept_large(&proxy, 0..400);
    damage(&setup.path("queue.sqlite"));
    // The next claim comes to it.
    let ready = wait_until_ready_says(&proxy, 503, "store damaged");
    assert!(ready.contains("asyncproxy queue export"), "{ready}");
    for number in 400..410 {
        assert_eq!(proxy.send(&http::numbered(number)).status, 503);
    }
    assert_eq!(proxy.metrics().get("asyncproxy_store_up"), 0.0);
    assert_saved_with_one_command(&setup, 400);
    proxy.stop();
}

#[test]
fn a_file_that_was_damaged_before_the_start_is_found_out_and_doctor_says_what_to_do() {
    let destination = Destination::down();
    let setup = storing(&destination);
    let proxy = setup.start();
    accept_large(&proxy, 0..400);
    proxy.stop();
    damage(&setup.path("queue.sqlite"));
    assert_saved_with_one_command(&setup, 400);
    let output = setup.command().args(["doctor", "--deep"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("asyncproxy queue export"), "{said}");
    let proxy = setup.start();
    wait_until_ready_says(&proxy, 503, "store damaged");
    assert_eq!(proxy.send(&http::numbered(400)).status, 503);
    proxy.stop();
}

/// With the disk full to the brim, and all rows on it.
fn full_disk() -> (Disk, Destination, Setup) {
    let disk = Disk::mount("64m");
    let destination = Destination::down();
    let connection = format!("sqlite:{}", disk.path("queue.sqlite").display());
    let setup = storing(&destination)
        .set("db.connection_string", connection)
        .set("queue.min_free", 0);
    (disk, destination, setup)
}

#[test]
fn a_full_disk_drains_by_itself() {
    let (disk, mut destination, setup) = full_disk();
    let proxy = setup.start();
    accept_large(&proxy, 0..1000);
    disk.fill("filler");
    wait_until_ready_says(&proxy, 503, "full");
    assert_eq!(proxy.send(&http::numbered(1000)).status, 503);
    assert!(proxy.metrics().refused("queue_full") >= 1.0);
    destination.open();
    destination.wait_for_numbers(1000, PATIENCE);
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("queue_total_size") == 0.0
    });
    fs::remove_file(disk.path("filler")).unwrap();
    wait_until_ready_says(&proxy, 200, "ok\n");
    proxy.accept(1000..1010);
    destination.wait_for_numbers(1010, PATIENCE);
    proxy.stop();
}

fn a_full_disk_drains_after(stop: fn(&mut Proxy)) {
    let (disk, mut destination, setup) = full_disk();
    let mut proxy = setup.start();
    accept_large(&proxy, 0..1000);
    disk.fill("filler");
    wait_until_ready_says(&proxy, 503, "full");
    stop(&mut proxy);
    proxy.wait();
    // One that was killed may just have given the reserve up: what another takes of the disk then is
    // nobody's room any more, and without a byte of it nothing can be delivered.
    if disk.path("queue.sqlite-reserve").exists() {
        disk.fill("another");
    }
    destination.open();
    let proxy = setup.start();
    destination.wait_for_numbers(1000, PATIENCE);
    metrics::wait_for(&proxy, "an empty queue", |metrics| {
        metrics.get("queue_total_size") == 0.0
    });
    proxy.stop();
}

#[test]
fn a_full_disk_drains_after_a_restart() {
    a_full_disk_drains_after(|proxy| proxy.sigterm());
}

#[test]
fn a_full_disk_drains_after_a_kill() {
    a_full_disk_drains_after(|proxy| proxy.kill9());
}

#[test]
fn the_queue_stops_growing_before_its_disk_is_full() {
    let disk = Disk::mount("64m");
    let mut destination = Destination::down();
    let connection = format!("sqlite:{}", disk.path("queue.sqlite").display());
    let setup = Setup::new(&destination.url())
        .set("db.connection_string", connection)
        .set("server.enqueue_rate", 0);
    let proxy = setup.start();
    // The disk has less than the default, so that the first is refused, with what to do about it.
    let ready = wait_until_ready_says(&proxy, 503, "less than queue.min_free (256 MiB)");
    assert!(ready.contains("set queue.min_free"), "{ready}");
    let answer = proxy.send(&http::numbered(0));
    assert_eq!(answer.status, 503);
    assert!(answer.field("retry-after").is_some());
    proxy.wait_for_log("request refused: ");
    let status = http::get(proxy.control, "/status").text();
    assert!(status.contains("less than queue.min_free"), "{status}");
    // Settings may be changed while it runs. What goes direct goes on, and is stored if it fails.
    let setup = setup.set("server.enqueue_rate", 1_000_000);
    setup.write();
    proxy.sighup();
    proxy.wait_for_log("settings reloaded");
    wait_until_ready_says(&proxy, 200, "ok, but nothing more is stored");
    proxy.accept(1..5);
    metrics::wait_for(&proxy, "4 rows", |metrics| {
        metrics.get("queue_total_size") == 4.0
    });
    let setup = setup
        .set("queue.min_free", "16MiB")
        .set("server.enqueue_rate", 0);
    setup.write();
    proxy.sighup();
    wait_until_ready_says(&proxy, 200, "ok\n");
    proxy.accept(5..10);
    destination.open();
    destination.wait_until(PATIENCE, "all but the refused one", |seen| {
        (1..10).all(|number| seen.iter().any(|seen| seen.number() == number))
    });
    proxy.stop();
}

#[test]
fn a_disk_that_hangs_is_waited_for_once() {
    const TIMEOUT: Duration = Duration::from_secs(4);
    let disk = HangingDisk::new();
    let destination = Destination::start();
    let setup = disk.below(storing(&destination)).set("db.timeout", "4s");
    let proxy = setup.start();
    proxy.accept(0..3);
    destination.wait_for_numbers(3, PATIENCE);
    disk.hang();
    assert_eq!(proxy.send(&http::numbered(3)).status, 503);
    wait_until_ready_says(&proxy, 503, "its disk may hang");
    // All together take less than one would if it waited.
    let began = Instant::now();
    for number in 4..12 {
        assert_eq!(proxy.send(&http::numbered(number)).status, 503);
    }
    assert!(began.elapsed() < TIMEOUT, "{:?}", began.elapsed());
    let threads = proxy.usage().threads;
    disk.work();
    wait_until_ready_says(&proxy, 200, "ok\n");
    proxy.accept(20..23);
    destination.wait_until(PATIENCE, "what came afterwards", |seen| {
        (20..23).all(|number| seen.iter().any(|seen| seen.number() == number))
    });
    assert!(proxy.usage().threads <= threads + 8, "none is left behind");
    proxy.stop();
}

#[test]
fn a_stop_over_a_disk_that_hangs_ends_in_time_and_names_what_is_lost() {
    let disk = HangingDisk::new();
    let destination = Destination::answering(|_| Answer::hang());
    let setup = disk
        .below(Setup::new(&destination.url()))
        .set("db.timeout", "1s")
        .set("server.shutdown_timeout", "500ms");
    let mut proxy = setup.start();
    proxy.wait_for_log("store is ready");
    proxy.accept(0..4);
    let seen = destination.wait_for(4, PATIENCE);
    disk.hang();
    let began = Instant::now();
    proxy.sigterm();
    assert_eq!(proxy.wait().code(), Some(1));
    let took = began.elapsed();
    assert!(took < Duration::from_millis(10_500), "{took:?}");
    for seen in &seen[..4] {
        proxy.wait_for_log(&format!(
            "lost: neither delivered nor stored\" id={}",
            seen.id()
        ));
    }
}

#[test]
fn a_file_that_others_may_read_is_warned_of() {
    let setup = Setup::new("http://127.0.0.1:1");
    let proxy = setup.start();
    proxy.wait_for_log("store is ready");
    proxy.stop();
    let mode = fs::Permissions::from_mode(0o644);
    fs::set_permissions(setup.path("queue.sqlite"), mode).unwrap();
    let proxy = setup.start();
    proxy.wait_for_log("others than its owner may use the queue's file");
    proxy.stop();
}
