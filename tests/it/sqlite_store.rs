//! What only the SQLite store does: it takes over what a program that is no more had leased.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use asyncproxy::queue::Store;
use asyncproxy::queue::sqlite::SqliteStore;

use crate::contract::{TIMEOUT, append_one, claim, counts, delivered, request, row};
use crate::support::destination::{Answer, Destination};
use crate::support::proxy::{PATIENCE, wait_until};
use crate::support::route::{Route, on_routes};

fn open(path: &Path) -> SqliteStore {
    SqliteStore::new(path.to_owned(), true, TIMEOUT)
}

/// Waits until nobody has the file: a child that another test is just starting has a copy of each
/// descriptor, and with it of the lock, until it is another program.
fn wait_until_unlocked(path: &Path) {
    let lock = File::open(path.with_file_name("queue.sqlite-lock")).unwrap();
    wait_until("the lock to be free", || lock.try_lock().is_ok());
    // Not only closed: that would leave it to other copies.
    lock.unlock().unwrap();
}

#[test]
fn a_new_program_takes_over_what_the_last_one_had_leased() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    let first = open(&path);
    let id = append_one(&first);
    append_one(&first);
    assert_eq!(claim(&first, 2).len(), 2);
    drop(first);
    wait_until_unlocked(&path);
    let second = open(&path);
    let claimed = claim(&second, 10);
    assert_eq!(claimed.len(), 2);
    assert!(claimed.iter().any(|row| row.request.id == id));
    // The attempt of the last one counts: it may have been made.
    assert!(claimed.iter().all(|row| row.attempt == 2));
}

#[test]
fn leases_of_a_program_that_lives_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    let first = open(&path);
    append_one(&first);
    assert_eq!(claim(&first, 1).len(), 1);
    let second = open(&path);
    assert!(claim(&second, 10).is_empty());
    assert_eq!(counts(&second), (0, 1, 0));
    append_one(&second);
    assert_eq!(claim(&first, 10).len(), 1, "both may use it");
}

/// After an error the file is opened anew, by the program whose leases they are.
#[test]
fn opening_anew_ends_no_lease() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    let store = SqliteStore::new(path.clone(), true, Duration::from_secs(2));
    append_one(&store);
    assert_eq!(claim(&store, 1).len(), 1);
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    store.settle(&[]).unwrap_err();
    other.execute_batch("ROLLBACK").unwrap();
    assert!(claim(&store, 10).is_empty());
    assert_eq!(counts(&store), (0, 1, 0));
}

/// What bounds a spool.
#[test]
fn a_file_of_limited_size_takes_what_fits_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    let store = open(&path).with_pages_max(64);
    let large = || row(request(&[b'x'; 16 * 1024]));
    let taken = (0..64)
        .take_while(|_| store.append(&[large()]).is_ok())
        .count();
    assert!((5..16).contains(&taken), "{taken} of 16 KiB into 256 KiB");
    let full = store.append(&[large()]).unwrap_err().to_string();
    assert!(full.contains("full"), "{full}");
    assert_eq!(counts(&store), (taken as u64, 0, 0));
    // Room that is given back is used again.
    let claimed = claim(&store, 2);
    let settled = store.settle(&[delivered(&claimed[0]), delivered(&claimed[1])]);
    assert_eq!(settled.unwrap().delivered, 2);
    store.append(&[large()]).unwrap();
}

fn a_restart_after_a_crash_waits_for_no_lease(route: Route) {
    let mut destination = Destination::answering(|_| Answer::hang());
    // Longer than any test: no lease ends while it runs.
    let setup = route.to(&destination).set("proxy.request_timeout", "10m");
    let mut proxy = setup.start();
    proxy.accept(0..8);
    destination.wait_for(8, PATIENCE);
    proxy.kill9();
    proxy.wait();
    destination.refuse();
    destination.answer(|_| Answer::ok());
    destination.open();
    let proxy = setup.start();
    let seen = destination.wait_for(16, PATIENCE);
    assert!(seen[8..].iter().all(|seen| seen.attempt() == 2));
    proxy.wait_for_log("took over what was leased when the last run ended");
    proxy.stop();
}
on_routes!(a_restart_after_a_crash_waits_for_no_lease: claimed Sqlite, first SqliteFirst);
