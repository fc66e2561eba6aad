//! Stores that do what they are asked and do not say so, or never answer at all: what the threads in
//! front of them make of it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use asyncproxy::breaker::Destination;
use asyncproxy::metrics::Metrics;
use asyncproxy::queue::depth::Depth;
use asyncproxy::queue::health::StoreHealth;
use asyncproxy::queue::operate::Operate;
use asyncproxy::queue::poller::{Sampler, Wake};
use asyncproxy::queue::settler::Settler;
use asyncproxy::queue::writer::{Place, Writer};
use asyncproxy::queue::{
    Claim, Class, NewRow, Probe, Sample, Settled, Settlement, Store, StoreError,
};
use crossbeam_channel::{Receiver, Sender, bounded};
use uuid::Uuid;

use crate::contract::{Bench, LEASE, claim, counts, delivered, request, row};
use crate::support::proxy::{PATIENCE, wait_until};

/// A store whose answers are lost as long as it is told so, after it has done what was asked.
#[derive(Debug)]
struct Mute {
    store: Arc<dyn Store>,
    is_mute: AtomicBool,
}

impl Mute {
    fn new(bench: &Bench) -> Arc<Mute> {
        Arc::new(Mute {
            store: bench.open(),
            is_mute: AtomicBool::new(false),
        })
    }

    /// Once: the next answer is heard.
    fn answer<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        match self.is_mute.swap(false, Ordering::SeqCst) {
            true => Err(StoreError::Unavailable("the answer is lost".into())),
            false => result,
        }
    }
}

impl Store for Mute {
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        self.answer(self.store.append(rows))
    }

    fn present(&self, ids: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        self.store.present(ids)
    }

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        self.store.claim(class, limit, bytes_max, lease)
    }

    fn claim_probes(&self, wanted: &Probe<'_>, lease: Duration) -> Result<Claim, StoreError> {
        self.store.claim_probes(wanted, lease)
    }

    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        self.answer(self.store.settle(settlements))
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError> {
        self.store.purge(older_than, limit)
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        self.store.sample()
    }

    fn is_paused(&self) -> Result<bool, StoreError> {
        self.store.is_paused()
    }
}

fn health() -> (Arc<StoreHealth>, Arc<Metrics>) {
    let health = StoreHealth::new(Depth::new(0));
    (Arc::new(health), Arc::new(Metrics::new(1).unwrap()))
}

/// The repeat finds nothing to settle: that was done by the try before, and counts once.
fn a_settlement_whose_answer_is_lost_counts_once(bench: &Bench) {
    let store = Mute::new(bench);
    let rows: Vec<_> = (0..10).map(|_| row(request(b"a"))).collect();
    store.append(&rows).unwrap();
    let claimed = claim(&*store, 10);
    // One was taken over by another: its settlement is stale, and was so the first time.
    let taken_over = Settlement {
        attempt: 7,
        ..delivered(&claimed[9])
    };
    let (health, metrics) = health();
    let (settler, settlements) =
        Settler::new(Arc::<Mute>::clone(&store), health, Arc::clone(&metrics));
    store.is_mute.store(true, Ordering::SeqCst);
    let batch = claimed[..9].iter().map(delivered).chain([taken_over]);
    batch.for_each(|settlement| settlements.send(settlement));
    drop(settlements);
    settler.run();
    assert!(!store.is_mute.load(Ordering::SeqCst));
    assert_eq!((metrics.delivered.get(), metrics.stale.get()), (9, 1));
    assert_eq!(counts(&*store), (0, 1, 0));
}

/// What is there and what is gone, whatever state it is in.
fn the_store_tells_which_rows_it_has(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = (0..4).map(|_| row(request(b"a"))).collect();
    store.append(&rows).unwrap();
    let ids: Vec<Uuid> = rows.iter().map(|row| row.request.id).collect();
    let claimed = claim(&*store, 2);
    store.settle(&[delivered(&claimed[0])]).unwrap();
    let expected: HashSet<Uuid> = ids
        .iter()
        .copied()
        .filter(|id| *id != claimed[0].request.id)
        .collect();
    let asked: Vec<Uuid> = ids.iter().copied().chain([Uuid::now_v7()]).collect();
    assert_eq!(store.present(&asked), Ok(expected));
    assert_eq!(store.present(&[]), Ok(HashSet::new()));
    assert!(LEASE > Duration::from_secs(60));
}

#[test]
fn a_settlement_whose_answer_is_lost_counts_once_in_sqlite() {
    a_settlement_whose_answer_is_lost_counts_once(&Bench::sqlite(true));
}

#[test]
fn a_settlement_whose_answer_is_lost_counts_once_in_postgres() {
    a_settlement_whose_answer_is_lost_counts_once(&Bench::postgres(true, false));
}

#[test]
fn the_store_tells_which_rows_it_has_in_sqlite() {
    the_store_tells_which_rows_it_has(&Bench::sqlite(true));
}

#[test]
fn the_store_tells_which_rows_it_has_in_postgres() {
    the_store_tells_which_rows_it_has(&Bench::postgres(true, false));
}

/// A store that is at its first append for as long as nobody releases it.
#[derive(Debug)]
struct Hung {
    begun: Sender<()>,
    released: Receiver<()>,
}

impl Store for Hung {
    fn append(&self, _: &[NewRow]) -> Result<(), StoreError> {
        self.begun.send(()).unwrap();
        let _ = self.released.recv();
        Ok(())
    }

    fn present(&self, _: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        unreachable!("nobody asks");
    }

    fn claim(&self, _: Class, _: usize, _: usize, _: Duration) -> Result<Claim, StoreError> {
        unreachable!("nobody claims");
    }

    fn claim_probes(&self, _: &Probe<'_>, _: Duration) -> Result<Claim, StoreError> {
        unreachable!("nobody claims");
    }

    fn settle(&self, _: &[Settlement]) -> Result<Settled, StoreError> {
        unreachable!("nobody settles");
    }

    fn purge(&self, _: Duration, _: usize) -> Result<u64, StoreError> {
        unreachable!("nobody purges");
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        unreachable!("nobody counts");
    }

    fn is_paused(&self) -> Result<bool, StoreError> {
        unreachable!("nobody asks");
    }
}

/// A store that takes its time to count as many times as it is told.
#[derive(Debug)]
struct Slow {
    store: Arc<dyn Operate>,
    takes: Duration,
    slow_counts: usize,
    counts: AtomicUsize,
}

impl Store for Slow {
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        self.store.append(rows)
    }

    fn present(&self, ids: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        self.store.present(ids)
    }

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        self.store.claim(class, limit, bytes_max, lease)
    }

    fn claim_probes(&self, wanted: &Probe<'_>, lease: Duration) -> Result<Claim, StoreError> {
        self.store.claim_probes(wanted, lease)
    }

    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        self.store.settle(settlements)
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError> {
        self.store.purge(older_than, limit)
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        let result = self.store.sample();
        if self.counts.fetch_add(1, Ordering::SeqCst) < self.slow_counts {
            thread::sleep(self.takes);
        }
        result
    }

    fn is_paused(&self) -> Result<bool, StoreError> {
        self.store.is_paused()
    }
}

/// Runs a sampler over such a store while `check` looks at what it makes of it.
fn while_sampled(slow_counts: usize, check: impl FnOnce(&Slow, &Destination)) {
    let bench = Bench::sqlite(true);
    let slow = Arc::new(Slow {
        store: bench.operate(),
        // At a twentieth of all time, the next count is further away than anybody here waits.
        takes: PATIENCE / 19,
        slow_counts,
        counts: AtomicUsize::new(0),
    });
    let (health, metrics) = health();
    let destination = Arc::new(Destination::new(10, Arc::clone(&metrics)));
    let (stopper, stop) = bounded(0);
    let sampler = Sampler {
        store: slow.clone(),
        health,
        metrics,
        destination: Arc::clone(&destination),
        clock: Arc::default(),
        dead_retention: Arc::default(),
        stop,
    };
    let sampling = thread::spawn(move || sampler.run());
    check(&slow, &destination);
    drop(stopper);
    sampling.join().unwrap();
}

#[test]
fn one_slow_count_does_not_leave_the_figures_old() {
    while_sampled(1, |slow, _| {
        wait_until("a third count", || slow.counts.load(Ordering::SeqCst) >= 3);
    });
}

#[test]
fn a_pause_is_followed_between_counts_that_are_far_apart() {
    while_sampled(usize::MAX, |slow, destination| {
        wait_until("a second count", || slow.counts.load(Ordering::SeqCst) == 2);
        slow.store.set_paused(true).unwrap();
        wait_until("the pause", || destination.is_paused());
        slow.store.set_paused(false).unwrap();
        wait_until("its end", || !destination.is_paused());
        assert_eq!(slow.counts.load(Ordering::SeqCst), 2);
    });
}

/// Both the one whose append hangs and those behind it, long before their own time is over.
#[test]
fn senders_do_not_wait_for_a_store_that_others_found_to_be_down() {
    const HOUR: Duration = Duration::from_secs(3600);
    let (begun, has_begun) = bounded(1);
    let (release, released) = bounded::<()>(0);
    let store = Arc::new(Hung { begun, released });
    let (health, metrics) = health();
    let (writer, appender) = Writer::new(
        store,
        None,
        Arc::clone(&health),
        Arc::clone(&metrics),
        Wake::new().0,
        HOUR,
    );
    let writer = thread::spawn(move || writer.run());
    let append = |appender: asyncproxy::queue::writer::Appender| {
        thread::spawn(move || appender.append(row(request(b"a"))))
    };
    let first = append(appender.clone());
    has_begun.recv().unwrap();
    let behind: Vec<_> = (0..10).map(|_| append(appender.clone())).collect();
    let down = StoreError::Unavailable("no answer".into());
    let noted = health.note::<()>("claim", Err(down.clone()), &metrics);
    assert_eq!(noted, Err(down.clone()));
    for sender in behind.into_iter().chain([first]) {
        assert_eq!(sender.join().unwrap(), Err(down.clone()));
    }
    drop(release);
    let _ = health.note("claim", Ok(()), &metrics);
    // Those behind were not begun with, and never will be.
    wait_until("a commit", || {
        appender.append(row(request(b"a"))) == Ok(Place::Store)
    });
    assert_eq!(has_begun.try_iter().count(), 1);
    assert_eq!(metrics.late_commits.get(), 1);
    drop(appender);
    writer.join().unwrap();
}
