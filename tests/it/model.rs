//! Any sequence of operations on a store against a model of it: after each of them both have the
//! same rows, in the same state.
//!
//! What fails is shrunk, printed and kept in `tests/proptest-regressions`, to be tried first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use asyncproxy::queue::{
    Claimed, Class, Decision, Fate, NewRow, Settled, Settlement, Store, StoreError,
};
use asyncproxy::request::Request;
use asyncproxy::settle::{Failure, Verdict};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};
use uuid::Uuid;

use crate::contract::{Bench, Dialect, LEASE, request};

/// Sequences for each kind of store, and operations in one of them.
const CASES: u32 = 32;
const OPERATIONS: std::ops::Range<usize> = 1..60;
const SHRINK_STEPS_MAX: u32 = 2000;

/// So few that operations meet each other's rows.
const SLOTS: u8 = 5;
/// The same for all, so that their order does not tell how many fit into a claim.
const BODY: &[u8] = b"8 bytes.";

#[test]
fn sqlite() {
    run(&Bench::sqlite(true));
}

#[test]
fn sqlite_without_index() {
    run(&Bench::sqlite(false));
}

#[test]
fn postgres() {
    run(&Bench::postgres(true, false));
}

#[test]
fn postgres_without_index() {
    run(&Bench::postgres(false, false));
}

fn run(bench: &Bench) {
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        max_shrink_iters: SHRINK_STEPS_MAX,
        source_file: Some(file!()),
        ..Config::default()
    });
    let result = runner.run(&vec(operation(), OPERATIONS), |operations| {
        let mut pair = Pair::new(bench);
        operations
            .iter()
            .try_for_each(|operation| pair.step(operation))
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Rows are named by a small number, attempts by what the row counts when it is its turn.
#[derive(Debug, Clone)]
enum Operation {
    Append(Vec<Append>),
    /// With one more row, which the store refuses.
    AppendRefused(Vec<Append>),
    Claim {
        class: Class,
        limit: usize,
        bytes_max: usize,
    },
    Settle(Vec<Settle>),
    /// The delay or the lease of these is over.
    TimePasses(Vec<u8>),
    /// And a new start.
    Crash,
    /// Those that crashed have been silent for so long that they are dead.
    TakeOver,
}

#[derive(Debug, Clone)]
struct Append {
    slot: u8,
    attempt: u32,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Due,
    DueAgain,
    Later,
    Leased,
    Dead,
}

#[derive(Debug, Clone)]
struct Settle {
    slot: u8,
    attempt: Attempt,
    choice: Choice,
}

#[derive(Debug, Clone, Copy)]
enum Attempt {
    Current,
    Before,
    After,
}

#[derive(Debug, Clone, Copy)]
enum Choice {
    Delivered,
    Now,
    Later,
    Bury,
    Release,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        5 => vec(append(), 0..4).prop_map(Operation::Append),
        1 => vec(append(), 0..4).prop_map(Operation::AppendRefused),
        5 => claim(),
        5 => vec(settle(), 0..5).prop_map(Operation::Settle),
        3 => vec(0..SLOTS, 0..5).prop_map(Operation::TimePasses),
        1 => Just(Operation::Crash),
        1 => Just(Operation::TakeOver),
    ]
}

fn append() -> impl Strategy<Value = Append> {
    let kind = prop_oneof![
        Just(Kind::Due),
        Just(Kind::DueAgain),
        Just(Kind::Later),
        Just(Kind::Leased),
        Just(Kind::Dead),
    ];
    (0..SLOTS, 1..4u32, kind).prop_map(|(slot, attempt, kind)| Append {
        slot,
        attempt,
        kind,
    })
}

fn claim() -> impl Strategy<Value = Operation> {
    let limit = 0..=usize::from(SLOTS);
    // As much as some bodies, or one byte more.
    let bytes = (0..3usize, 0..2usize).prop_map(|(rows, more)| rows * request(BODY).bytes() + more);
    let bytes_max = prop_oneof![2 => Just(usize::MAX), 1 => bytes];
    let class = prop_oneof![Just(Class::Fresh), Just(Class::Retried)];
    (class, limit, bytes_max).prop_map(|(class, limit, bytes_max)| Operation::Claim {
        class,
        limit,
        bytes_max,
    })
}

fn settle() -> impl Strategy<Value = Settle> {
    let attempt = prop_oneof![
        4 => Just(Attempt::Current),
        1 => Just(Attempt::Before),
        1 => Just(Attempt::After),
    ];
    let choice = prop_oneof![
        Just(Choice::Delivered),
        Just(Choice::Now),
        Just(Choice::Later),
        Just(Choice::Bury),
        Just(Choice::Release),
    ];
    (0..SLOTS, attempt, choice).prop_map(|(slot, attempt, choice)| Settle {
        slot,
        attempt,
        choice,
    })
}

fn id(slot: u8) -> Uuid {
    Uuid::from_u128(u128::from(slot))
}

/// A store and its model.
struct Pair<'a> {
    bench: &'a Bench,
    store: Arc<dyn Store>,
    model: Model,
    /// When each row is due, in microseconds since 1970, as last read.
    due_at: BTreeMap<Uuid, i64>,
    /// Tells apart what was appended or failed at different times.
    stamp: u32,
}

impl Pair<'_> {
    /// Empties the store, whatever the last case left there.
    fn new(bench: &Bench) -> Pair<'_> {
        let store = bench.open();
        store.sample().unwrap();
        (bench.sql)("DELETE FROM proxy_requests; DELETE FROM proxy_dead_letters");
        Pair {
            bench,
            store,
            model: Model::default(),
            due_at: BTreeMap::new(),
            stamp: 0,
        }
    }

    fn step(&mut self, operation: &Operation) -> TestCaseResult {
        match operation {
            Operation::Append(rows) => {
                let rows: Vec<_> = rows.iter().map(|row| self.new_row(row)).collect();
                prop_assert_eq!(self.store.append(&rows), Ok(()));
                rows.iter().for_each(|row| self.model.append(row));
            }
            Operation::AppendRefused(rows) => self.append_refused(rows)?,
            Operation::Claim {
                class,
                limit,
                bytes_max,
            } => self.claim(*class, *limit, *bytes_max)?,
            Operation::Settle(settlements) => {
                let settlements: Vec<_> =
                    settlements.iter().map(|it| self.settlement(it)).collect();
                let settled = self.store.settle(&settlements);
                prop_assert_eq!(settled, Ok(self.model.settle(&settlements)));
            }
            Operation::TimePasses(slots) => self.time_passes(slots),
            Operation::Crash => {
                self.store = self.bench.open();
                self.model.crash(self.bench.dialect);
            }
            Operation::TakeOver => self.take_over(),
        }
        self.compare(operation)
    }

    fn take_over(&mut self) {
        if !self.store.is_shared() {
            return;
        }
        let silent = "UPDATE proxy_instances SET last_seen = '-infinity'";
        self.store.beat().unwrap();
        (self.bench.sql)(silent);
        // This one is heard of again, and forgets the others once it may judge them.
        let alone = [[Some("1".to_owned())]];
        loop {
            self.store.beat().unwrap();
            if (self.bench.query)("SELECT count(*) FROM proxy_instances") == alone {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.model.take_over();
    }

    fn stamp(&mut self) -> String {
        self.stamp += 1;
        format!("/{}", self.stamp)
    }

    fn failure(&mut self) -> Failure {
        Failure {
            status: Some(503),
            error: self.stamp(),
        }
    }

    fn new_row(&mut self, row: &Append) -> NewRow {
        let due = |after, failure| Fate::Due { after, failure };
        NewRow {
            request: Arc::new(Request {
                id: id(row.slot),
                target: self.stamp(),
                ..request(BODY)
            }),
            attempt: row.attempt,
            fate: match row.kind {
                Kind::Due => due(Duration::ZERO, None),
                Kind::DueAgain => due(Duration::ZERO, Some(self.failure())),
                Kind::Later => due(LEASE, Some(self.failure())),
                Kind::Leased => Fate::Leased(LEASE),
                Kind::Dead => Fate::Dead(self.failure()),
            },
        }
    }

    fn append_refused(&mut self, rows: &[Append]) -> TestCaseResult {
        let mut rows: Vec<_> = rows.iter().map(|row| self.new_row(row)).collect();
        rows.push(self.new_row(&Append {
            slot: SLOTS,
            // No attempt is the one about to be made.
            attempt: 0,
            kind: Kind::Leased,
        }));
        let result = self.store.append(&rows);
        prop_assert!(
            matches!(result, Err(StoreError::Refused(_))),
            "{:?}",
            result
        );
        Ok(())
    }

    fn settlement(&mut self, settle: &Settle) -> Settlement {
        let verdict = match settle.choice {
            Choice::Delivered => Some(Verdict::Delivered),
            Choice::Now => Some(Verdict::Later {
                after: Duration::ZERO,
                failure: self.failure(),
            }),
            Choice::Later => Some(Verdict::Later {
                after: LEASE,
                failure: self.failure(),
            }),
            Choice::Bury => Some(Verdict::Bury(self.failure())),
            Choice::Release => None,
        };
        let id = id(settle.slot);
        let current = self.model.rows.get(&id).map_or(1, |row| row.attempt);
        Settlement {
            id,
            attempt: match settle.attempt {
                Attempt::Current => current,
                Attempt::Before => current.saturating_sub(1),
                Attempt::After => current + 1,
            },
            decision: verdict.map_or(Decision::Release, Decision::Attempted),
        }
    }

    fn claim(&mut self, class: Class, limit: usize, bytes_max: usize) -> TestCaseResult {
        let mut due = self.model.due(class);
        due.sort_by_key(|id| self.due_at[id]);
        let fitting = (bytes_max / request(BODY).bytes()).max(1);
        due.truncate(limit.min(fitting));
        let claim = self.store.claim(class, limit, bytes_max, LEASE).unwrap();
        prop_assert_eq!((claim.rows.len(), claim.unreadable), (due.len(), 0));
        for claimed in &claim.rows {
            self.model.claim(claimed)?;
        }
        if self.bench.is_ordered {
            // Rows may be due at the same time.
            let times =
                |ids: Vec<Uuid>| -> Vec<_> { ids.iter().map(|id| self.due_at[id]).collect() };
            let claimed = claim.rows.iter().map(|row| row.request.id).collect();
            prop_assert_eq!(times(claimed), times(due));
        }
        Ok(())
    }

    fn time_passes(&mut self, slots: &[u8]) {
        let dialect = self.bench.dialect;
        for id in slots.iter().map(|slot| id(*slot)) {
            if self.model.time_passes(id) {
                (self.bench.sql)(&format!(
                    "UPDATE proxy_requests SET next_attempt_at = {} WHERE id = {}",
                    dialect.now(),
                    dialect.id(id)
                ));
            }
        }
    }

    /// First by what the store says, then by what is there.
    fn compare(&mut self, after: &Operation) -> TestCaseResult {
        let sample = self.store.sample().unwrap();
        let counts = (sample.waiting, sample.leased, sample.dead);
        prop_assert_eq!(counts, self.model.counts(), "{:?}", after);
        let is_empty = self.model.rows.is_empty();
        prop_assert_eq!(sample.oldest.is_none(), is_empty, "{:?}", after);
        let rows;
        (rows, self.due_at) = read_rows(self.bench);
        prop_assert_eq!(&rows, &self.model.rows, "{:?}", after);
        prop_assert_eq!(&read_dead(self.bench), &self.model.dead, "{:?}", after);
        Ok(())
    }
}

/// What the store should hold. A request may both wait and be a dead letter: one that was given
/// up and then appended again, or the other way around.
#[derive(Default)]
struct Model {
    rows: BTreeMap<Uuid, Row>,
    dead: BTreeMap<Uuid, Dead>,
    /// Rows leased by programs that have crashed.
    anothers: BTreeSet<Uuid>,
}

#[derive(Debug, Clone, PartialEq)]
struct Row {
    attempt: u32,
    is_leased: bool,
    /// With `is_leased`: the lease is over.
    is_due: bool,
    target: String,
    error: Option<String>,
}

#[derive(Debug, PartialEq)]
struct Dead {
    attempt: u32,
    target: String,
    error: String,
}

impl Model {
    fn append(&mut self, new: &NewRow) {
        let target = new.request.target.clone();
        let (is_leased, is_due, error) = match &new.fate {
            Fate::Due { after, failure } => {
                let error = failure.as_ref().map(|failure| failure.error.clone());
                (false, after.is_zero(), error)
            }
            Fate::Leased(_) => (true, false, None),
            Fate::Dead(failure) => {
                let error = failure.error.clone();
                return self.bury(new.request.id, new.attempt, target, error);
            }
        };
        self.rows.entry(new.request.id).or_insert(Row {
            attempt: new.attempt,
            is_leased,
            is_due,
            target,
            error,
        });
    }

    fn bury(&mut self, id: Uuid, attempt: u32, target: String, error: String) {
        self.dead.entry(id).or_insert(Dead {
            attempt,
            target,
            error,
        });
    }

    fn due(&self, class: Class) -> Vec<Uuid> {
        let is_in = |row: &Row| row.is_due && Class::of(row.attempt + 1) == class;
        let due = self.rows.iter().filter(|(_, row)| is_in(row));
        due.map(|(id, _)| *id).collect()
    }

    fn claim(&mut self, claimed: &Claimed) -> TestCaseResult {
        let row = self.rows.get_mut(&claimed.request.id);
        prop_assert!(
            row.as_ref().is_some_and(|row| row.is_due),
            "claimed {:?}, which is {:?}",
            claimed,
            row
        );
        let row = row.unwrap();
        self.anothers.remove(&claimed.request.id);
        row.attempt += 1;
        row.is_leased = true;
        row.is_due = false;
        prop_assert_eq!(claimed.attempt, row.attempt);
        prop_assert_eq!(&claimed.request.target, &row.target);
        prop_assert_eq!(&claimed.request.body, BODY);
        Ok(())
    }

    fn settle(&mut self, settlements: &[Settlement]) -> Settled {
        let mut settled = Settled::default();
        for settlement in settlements {
            *self.settle_one(settlement, &mut settled) += 1;
        }
        settled
    }

    fn settle_one<'a>(&mut self, settlement: &Settlement, count: &'a mut Settled) -> &'a mut u64 {
        let Settlement { id, attempt, .. } = settlement;
        let row = self.rows.get_mut(id);
        // A lease that is over is still its holder's until someone else claims the row.
        let is_anothers = self.anothers.contains(id);
        let is_ours = |row: &&mut Row| row.is_leased && !is_anothers && row.attempt == *attempt;
        let Some(row) = row.filter(is_ours) else {
            return &mut count.stale;
        };
        row.is_leased = false;
        match &settlement.decision {
            Decision::Attempted(Verdict::Delivered) => {
                self.rows.remove(id);
                &mut count.delivered
            }
            Decision::Attempted(Verdict::Later { after, failure }) => {
                row.is_due = after.is_zero();
                row.error = Some(failure.error.clone());
                &mut count.later
            }
            Decision::Attempted(Verdict::Bury(failure)) => {
                if let Some(Row { target, .. }) = self.rows.remove(id) {
                    self.bury(*id, *attempt, target, failure.error.clone());
                }
                &mut count.buried
            }
            Decision::Release => {
                row.is_due = true;
                row.attempt -= 1;
                &mut count.released
            }
        }
    }

    /// Whether there is a row for which this makes a difference.
    fn time_passes(&mut self, id: Uuid) -> bool {
        match self.rows.get_mut(&id) {
            Some(row) => !std::mem::replace(&mut row.is_due, true),
            None => false,
        }
    }

    fn crash(&mut self, dialect: Dialect) {
        // The next program takes over what the last one had leased; with Postgres, not before
        // that has been silent for a while.
        for (id, row) in self.rows.iter_mut().filter(|(_, row)| row.is_leased) {
            if dialect == Dialect::Sqlite {
                row.is_leased = false;
                row.is_due = true;
            } else {
                self.anothers.insert(*id);
            }
        }
    }

    /// All that crashed is found to be dead. What was due already stays where it is.
    fn take_over(&mut self) {
        for id in &self.anothers {
            let row = self.rows.get_mut(id);
            if let Some(row) = row.filter(|row| row.is_leased && !row.is_due) {
                row.is_leased = false;
                row.is_due = true;
            }
        }
        // Of the others the lease is over: it is nobody's any more.
    }

    /// (waiting, leased, dead)
    fn counts(&self) -> (u64, u64, u64) {
        let is_held = |row: &&Row| row.is_leased && !row.is_due;
        let leased = self.rows.values().filter(is_held).count();
        let waiting = self.rows.len() - leased;
        (waiting as u64, leased as u64, self.dead.len() as u64)
    }
}

/// The rows, and when each is due.
fn read_rows(bench: &Bench) -> (BTreeMap<Uuid, Row>, BTreeMap<Uuid, i64>) {
    let rows = (bench.query)(&format!(
        "SELECT id, attempt, CASE WHEN leased THEN 1 ELSE 0 END, {}, target, last_error
           FROM proxy_requests",
        bench.dialect.micros("next_attempt_at")
    ));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    // What is not due is not so for the length of a lease.
    let soon = i64::try_from((now + LEASE / 2).as_micros()).unwrap();
    let (mut read, mut times) = (BTreeMap::new(), BTreeMap::new());
    for row in rows {
        let [id, attempt, leased, due_at, target, error] = row.try_into().unwrap();
        let id: Uuid = parse(id);
        let due_at = parse(due_at);
        let row = Row {
            attempt: parse(attempt),
            is_leased: parse::<u8>(leased) == 1,
            is_due: due_at < soon,
            target: parse(target),
            error,
        };
        read.insert(id, row);
        times.insert(id, due_at);
    }
    (read, times)
}

fn read_dead(bench: &Bench) -> BTreeMap<Uuid, Dead> {
    let query = "SELECT id, attempt, target, last_error FROM proxy_dead_letters";
    let rows = (bench.query)(query).into_iter();
    rows.map(|row| {
        let [id, attempt, target, error] = row.try_into().unwrap();
        let dead = Dead {
            attempt: parse(attempt),
            target: parse(target),
            error: parse(error),
        };
        (parse(id), dead)
    })
    .collect()
}

fn parse<T: std::str::FromStr<Err: std::fmt::Debug>>(text: Option<String>) -> T {
    text.unwrap().parse().unwrap()
}
