//! Somebody sets the system's clock while rows wait, and the SQLite store goes on as it should.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use asyncproxy::clock::Clock;
use asyncproxy::queue::operate::{Action, Filter, Operate, State};
use asyncproxy::queue::sqlite::SqliteStore;
use asyncproxy::queue::{Class, Decision, Fate, NewRow, Settlement, Store};
use asyncproxy::settle::{Failure, Verdict};

use crate::contract::{TIMEOUT, append_one, claim, counts, request, row};
use crate::support::proxy::wait_until;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// A machine whose time passes and whose clock is set as the test wants it.
#[derive(Clone)]
struct Machine(Arc<Mutex<(SystemTime, Instant)>>);

impl Machine {
    fn at(time_of_day: SystemTime) -> Machine {
        Machine(Arc::new(Mutex::new((time_of_day, Instant::now()))))
    }

    fn clock(&self) -> Arc<Clock> {
        let machine = Arc::clone(&self.0);
        Arc::new(Clock::reading(move || *machine.lock().unwrap()))
    }

    fn pass(&self, time: Duration) {
        let mut now = self.0.lock().unwrap();
        *now = (now.0 + time, now.1 + time);
    }

    fn set_back(&self, by: Duration) {
        self.0.lock().unwrap().0 -= by;
    }

    fn set_forward(&self, by: Duration) {
        self.0.lock().unwrap().0 += by;
    }

    fn time_of_day(&self) -> SystemTime {
        self.0.lock().unwrap().0
    }
}

fn open(path: &Path, clock: &Arc<Clock>) -> SqliteStore {
    SqliteStore::new(path.to_owned(), true, TIMEOUT).with_clock(Arc::clone(clock))
}

fn waiting_for(after: Duration) -> NewRow {
    let failure = None;
    NewRow {
        fate: Fate::Due { after, failure },
        ..row(request(b"waiting"))
    }
}

/// Whatever is set in between: pauses and leases end after the time that has passed.
#[test]
fn pauses_and_leases_take_as_long_as_they_should_whatever_the_clock_says() {
    type Set = fn(&Machine, Duration);
    let sets: [Set; 3] = [Machine::set_back, Machine::set_forward, |_, _| {}];
    for set in sets {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::at(SystemTime::now());
        let store = open(&directory.path().join("queue.sqlite"), &machine.clock());
        store.append(&[waiting_for(MINUTE)]).unwrap();
        append_one(&store);
        let lease = |limit| store.claim(Class::Fresh, limit, usize::MAX, 10 * MINUTE);
        let leased = lease(10).unwrap().rows;
        assert_eq!(leased.len(), 1);
        set(&machine, HOUR);
        // Neither the one that waits nor the one that is being sent.
        assert_eq!(lease(10).unwrap().rows.len(), 0);
        assert_eq!(counts(&store), (1, 1, 0));
        machine.pass(MINUTE + Duration::from_secs(1));
        let due = lease(10).unwrap().rows;
        assert_eq!(due.len(), 1);
        assert_eq!(counts(&store), (0, 2, 0));
        // A failed attempt after the clock was set, with a pause by the same clock.
        let later = Verdict::Later {
            after: MINUTE,
            failure: Failure {
                status: Some(500),
                error: "500".into(),
            },
        };
        let settlement = Settlement {
            id: due[0].request.id,
            attempt: 1,
            decision: Decision::Attempted(later),
        };
        assert_eq!(store.settle(&[settlement]).unwrap().later, 1);
        set(&machine, HOUR);
        assert_eq!(lease(10).unwrap().rows.len(), 0);
        machine.pass(MINUTE + Duration::from_secs(1));
        assert_eq!(lease(10).unwrap().rows.len(), 1);
        // And leases end, too.
        machine.pass(9 * MINUTE);
        assert_eq!(lease(10).unwrap().rows.len(), 1, "the first, again");
    }
}

#[test]
fn ages_grow_whatever_the_clock_says() {
    for is_back in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::at(SystemTime::now());
        let store = open(&directory.path().join("queue.sqlite"), &machine.clock());
        let received = |machine: &Machine| {
            let mut request = request(b"old");
            request.received_at = machine.time_of_day();
            row(request)
        };
        store.append(&[received(&machine)]).unwrap();
        let age = || store.sample().unwrap().oldest.unwrap();
        assert!(age() < MINUTE);
        machine.pass(10 * MINUTE);
        match is_back {
            true => machine.set_back(HOUR),
            false => machine.set_forward(HOUR),
        }
        assert!(age() >= 10 * MINUTE, "{:?}", age());
        // One that was received by the new clock does not hide the old one.
        store.append(&[received(&machine)]).unwrap();
        machine.pass(10 * MINUTE);
        assert!(age() >= 20 * MINUTE, "{:?}", age());
    }
}

/// As far as it can be known: as long as the row has been seen.
#[test]
fn a_row_of_the_future_ages_while_it_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::at(SystemTime::now());
    let store = open(&directory.path().join("queue.sqlite"), &machine.clock());
    let mut request = request(b"of the future");
    request.received_at = SystemTime::now() + 5 * HOUR;
    store.append(&[row(request)]).unwrap();
    assert_eq!(store.sample().unwrap().oldest, Some(Duration::ZERO));
    machine.pass(7 * MINUTE);
    assert_eq!(store.sample().unwrap().oldest, Some(7 * MINUTE));
}

/// By the time that the file was written last.
#[test]
fn after_a_start_with_a_clock_that_was_set_back_nothing_waits_longer_than_it_was_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    let first = open(&path, &Arc::default());
    for _ in 0..300 {
        append_one(&first);
    }
    first.append(&[waiting_for(5 * MINUTE)]).unwrap();
    assert_eq!(claim(&first, 5).len(), 5);
    drop(first);
    let machine = Machine::at(SystemTime::now() - HOUR);
    let second = open(&path, &machine.clock());
    let due = claim(&second, 500).len();
    assert_eq!(due, 300);
    machine.pass(5 * MINUTE);
    assert_eq!(claim(&second, 500).len(), 1);
}

/// The file is written by the new clock then; what the last run's was ahead of it lies beside it.
#[test]
fn a_restart_after_the_clock_was_set_back_while_it_ran_goes_on_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    // Has come to the right time when it is set back.
    let machine = Machine::at(SystemTime::now() + HOUR);
    let clock = machine.clock();
    let first = open(&path, &clock);
    append_one(&first);
    first.append(&[waiting_for(5 * MINUTE)]).unwrap();
    machine.set_back(HOUR);
    clock.look().unwrap();
    let lock = directory.path().join("queue.sqlite-lock");
    wait_until("the difference to be noted", || {
        std::fs::read_to_string(&lock).unwrap() == "3600000\n"
    });
    drop(first);
    let machine = Machine::at(SystemTime::now());
    let second = open(&path, &machine.clock());
    assert_eq!(claim(&second, 10).len(), 1);
    machine.pass(5 * MINUTE);
    assert_eq!(claim(&second, 10).len(), 1);
    assert_eq!(std::fs::read_to_string(&lock).unwrap(), "");
}

#[test]
fn an_operator_sees_by_the_clock_of_the_program_that_serves_the_queue() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    // An hour behind when it starts, then put right.
    let machine = Machine::at(SystemTime::now() - HOUR);
    let clock = machine.clock();
    let store = open(&path, &clock);
    let leased = append_one(&store);
    assert_eq!(claim(&store, 1).len(), 1);
    store.append(&[waiting_for(MINUTE)]).unwrap();
    machine.set_forward(HOUR);
    clock.look().unwrap();
    let lock = directory.path().join("queue.sqlite-lock");
    wait_until("the difference to be noted", || {
        std::fs::read_to_string(&lock).unwrap() == "-3600000\n"
    });
    let visitor = SqliteStore::new(path, true, TIMEOUT).visiting();
    let rows = visitor.list(&Filter::default(), None, 10).unwrap();
    let states: Vec<_> = rows.iter().map(|row| (row.id, row.state)).collect();
    assert_eq!(states[0], (leased, State::Leased));
    assert_eq!(states[1].1, State::Waiting);
    let positions: Vec<_> = rows.iter().map(|row| row.position()).collect();
    // The one that is being sent is left alone; the other one is due.
    assert_eq!(visitor.apply(Action::Retry, &positions), Ok(1));
    // What has passed in this test.
    machine.pass(MINUTE / 2);
    assert_eq!(claim(&store, 10).len(), 1);
    assert_eq!(visitor.apply(Action::Drop, &positions), Ok(0));
}

#[test]
fn what_is_to_wait_longer_than_any_pause_is_due() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue.sqlite");
    let pause_max = || Arc::new((25 * HOUR.as_secs() * 1000).into());
    let store = open(&path, &Arc::default()).with_pause_max(pause_max());
    let mut retried = waiting_for(26 * HOUR);
    retried.attempt = 5;
    let rows = [waiting_for(26 * HOUR), retried, waiting_for(24 * HOUR)];
    store.append(&rows).unwrap();
    drop(store);
    let store = open(&path, &Arc::default()).with_pause_max(pause_max());
    let mut claimed = Vec::new();
    wait_until("two rows that are due", || {
        claimed.extend(claim(&store, 10));
        claimed.len() >= 2
    });
    let ids: Vec<_> = claimed.iter().map(|row| row.request.id).collect();
    assert!(ids.contains(&rows[0].request.id) && ids.contains(&rows[1].request.id));
}
