//! What every store must do: the documentation of `Store`, clause by clause.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ::postgres::{Client, SimpleQueryMessage};
use asyncproxy::queue::operate::Operate;
use asyncproxy::queue::postgres::PostgresStore;
use asyncproxy::queue::sqlite::SqliteStore;
use asyncproxy::queue::{
    BATCH_BYTES_MAX, BATCH_ROWS_MAX, Claim, Claimed, Class, Decision, Fate, NewRow, Sample,
    Settled, Settlement, Store, StoreError,
};
use asyncproxy::request::{Headers, Request};
use asyncproxy::settle::{Failure, Verdict};
use rusqlite::types::ValueRef;
use uuid::Uuid;

use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::cluster;

/// Far beyond what a test takes.
pub const LEASE: Duration = Duration::from_secs(600);
const SHORT_LEASE: Duration = Duration::from_millis(50);
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const TIMEOUT: Duration = Duration::from_secs(30);
/// After which an instance is taken for dead here.
const SILENCE: Duration = Duration::from_millis(300);

/// What a query returns, as text; `None`: NULL.
pub type Rows = Vec<Vec<Option<String>>>;

/// A database of some kind, empty at first.
pub struct Bench {
    open: Box<dyn Fn() -> Arc<dyn Operate>>,
    /// Runs SQL behind the store's back.
    pub sql: Box<dyn Fn(&str)>,
    /// Runs a query there.
    pub query: Box<dyn Fn(&str) -> Rows>,
    pub dialect: Dialect,
    pub is_ordered: bool,
    _kept: Box<dyn Any>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    fn bytes(self, bytes: &[u8]) -> String {
        let hex = hex(bytes);
        match self {
            Dialect::Sqlite => format!("x'{hex}'"),
            Dialect::Postgres => format!("'\\x{hex}'"),
        }
    }

    pub fn id(self, id: Uuid) -> String {
        match self {
            Dialect::Sqlite => self.bytes(id.as_bytes()),
            Dialect::Postgres => format!("'{id}'"),
        }
    }

    /// The time `hours` before the one that `column` has.
    fn hours_before(self, column: &str, hours: u32) -> String {
        match self {
            Dialect::Sqlite => format!("{column} - {hours} * 3600000"),
            Dialect::Postgres => format!("{column} - {hours} * interval '1 hour'"),
        }
    }

    /// Now or before.
    pub fn now(self) -> &'static str {
        match self {
            Dialect::Sqlite => "0",
            Dialect::Postgres => "now()",
        }
    }

    pub fn yes(self) -> &'static str {
        match self {
            Dialect::Sqlite => "1",
            Dialect::Postgres => "true",
        }
    }

    /// Microseconds since 1970.
    pub fn micros(self, time: &str) -> String {
        match self {
            Dialect::Sqlite => format!("{time} * 1000"),
            Dialect::Postgres => format!("(extract(epoch FROM {time}) * 1000000)::bigint"),
        }
    }
}

impl Bench {
    pub fn sqlite(is_ordered: bool) -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        let (sql_path, query_path) = (path.clone(), path.clone());
        Bench {
            open: Box::new(move || Arc::new(SqliteStore::new(path.clone(), is_ordered, TIMEOUT))),
            sql: Box::new(move |sql| connect(&sql_path).execute_batch(sql).unwrap()),
            query: Box::new(move |sql| texts_of_sqlite(&connect(&query_path), sql)),
            dialect: Dialect::Sqlite,
            is_ordered,
            _kept: Box::new(directory),
        }
    }

    pub fn postgres(is_ordered: bool, is_pooled: bool) -> Bench {
        Bench::postgres_with(is_ordered, is_pooled, |store| store)
    }

    /// With a rate that stores share, and that is never reached.
    pub fn postgres_by_tokens(is_ordered: bool, is_pooled: bool) -> Bench {
        Bench::postgres_with(is_ordered, is_pooled, |store| store.sharing_rate(1_000_000))
    }

    fn postgres_with(
        is_ordered: bool,
        is_pooled: bool,
        adapt: fn(PostgresStore) -> PostgresStore,
    ) -> Bench {
        let database = cluster().database();
        let bouncer = is_pooled.then(|| Pgbouncer::start(&database));
        let url = match &bouncer {
            Some(bouncer) => bouncer.url(),
            None => database.keywords(),
        };
        let sql_client = Rc::new(RefCell::new(database.client()));
        let query_client = Rc::clone(&sql_client);
        Bench {
            open: Box::new(move || {
                let config = url.parse().unwrap();
                let store = PostgresStore::new(config, 5, is_ordered, TIMEOUT);
                Arc::new(adapt(store.with_silence(SILENCE)))
            }),
            sql: Box::new(move |sql| sql_client.borrow_mut().batch_execute(sql).unwrap()),
            query: Box::new(move |sql| texts_of_postgres(&mut query_client.borrow_mut(), sql)),
            dialect: Dialect::Postgres,
            is_ordered,
            _kept: Box::new((bouncer, database)),
        }
    }

    pub fn open(&self) -> Arc<dyn Store> {
        (self.open)()
    }

    pub fn operate(&self) -> Arc<dyn Operate> {
        (self.open)()
    }
}

fn connect(path: &Path) -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.busy_timeout(TIMEOUT).unwrap();
    connection
}

fn texts_of_sqlite(connection: &rusqlite::Connection, sql: &str) -> Rows {
    let mut statement = connection.prepare(sql).unwrap();
    let columns = statement.column_count();
    let text = |value: ValueRef<'_>| match value {
        ValueRef::Null => None,
        ValueRef::Integer(number) => Some(number.to_string()),
        ValueRef::Real(number) => Some(number.to_string()),
        ValueRef::Text(text) => Some(String::from_utf8(text.to_vec()).unwrap()),
        ValueRef::Blob(bytes) => Some(hex(bytes)),
    };
    let rows = statement.query_map([], |row| {
        let values = (0..columns).map(|column| row.get_ref(column).map(text));
        values.collect()
    });
    rows.unwrap().map(Result::unwrap).collect()
}

fn texts_of_postgres(client: &mut Client, sql: &str) -> Rows {
    let messages = client.simple_query(sql).unwrap();
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    rows.map(|row| {
        let values = (0..row.len()).map(|column| row.get(column).map(str::to_owned));
        values.collect()
    })
    .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes a test of each function for each kind of store.
macro_rules! contract {
    ($($test:ident),+ $(,)?) => {
        contract!(@on sqlite, super::Bench::sqlite(true), $($test),+);
        contract!(@on sqlite_without_index, super::Bench::sqlite(false), $($test),+);
        contract!(@on postgres, super::Bench::postgres(true, false), $($test),+);
        contract!(@on postgres_without_index, super::Bench::postgres(false, false), $($test),+);
        contract!(@on pgbouncer, super::Bench::postgres(true, true), $($test),+);
        contract!(@on pgbouncer_by_tokens, super::Bench::postgres_by_tokens(true, true), $($test),+);
        contract!(@on postgres_by_tokens_without_index, super::Bench::postgres_by_tokens(false, false), $($test),+);
    };
    (@on $kind:ident, $bench:expr, $($test:ident),+) => {
        mod $kind {
            $(#[test]
            fn $test() {
                super::$test(&$bench);
            })+
        }
    };
}

pub(crate) use contract;

contract!(
    empty_batches_change_nothing,
    requests_come_back_as_they_were,
    appending_again_changes_nothing,
    a_leased_append_is_like_a_claim,
    append_is_all_or_none,
    claims_oldest_due_first_and_no_more_than_asked,
    a_claim_takes_no_more_bytes_than_asked_but_always_one_row,
    a_claim_counts_targets_and_header_fields_as_well,
    classes_are_claimed_apart,
    a_row_is_due_after_its_delay,
    a_claim_counts_the_attempt_and_hides_the_row,
    a_lease_that_is_over_is_due_again,
    a_late_settlement_changes_nothing,
    delivered_rows_are_gone_and_settle_once,
    later_waits_for_its_delay,
    buried_rows_are_dead_letters,
    dead_rows_are_appended_to_the_dead_letters,
    old_dead_letters_are_purged_oldest_first,
    a_purge_takes_no_more_bytes_than_a_batch_but_always_one_row,
    concurrent_purges_count_each_row_once,
    a_release_is_due_at_once_and_not_counted,
    a_mixed_batch_counts_each_kind,
    one_lease_is_settled_once_in_a_batch,
    the_sample_counts_each_kind,
    large_bodies_and_binary_headers_survive,
    a_full_batch_fits,
    texts_with_nul_are_stored,
    extreme_times_do_no_harm,
    concurrent_claims_never_share_a_row,
    unreadable_rows_are_buried_and_block_nobody,
    fields_that_are_never_forwarded_are_left_out_of_rows,
    rows_survive_reopening,
    two_stores_share_one_queue,
    what_a_silent_instance_has_leased_is_taken_over_and_no_longer_its,
    an_instance_that_beats_keeps_what_it_has_leased,
    one_that_leaves_hands_on_what_it_has_leased,
    a_schema_that_goes_meanwhile_is_made_again,
    a_newer_schema_is_refused,
);

pub fn request(body: &[u8]) -> Request {
    let mut headers = Headers::default();
    headers.push("Content-Type", b"text/plain").unwrap();
    Request {
        id: Uuid::now_v7(),
        received_at: SystemTime::now(),
        method: "POST".into(),
        target: "/hook?a=1".into(),
        headers,
        body: body.to_vec(),
    }
}

pub fn row(request: Request) -> NewRow {
    NewRow {
        request: Arc::new(request),
        attempt: 0,
        fate: Fate::Due {
            after: Duration::ZERO,
            failure: None,
        },
    }
}

fn due_in(after: Duration) -> NewRow {
    NewRow {
        fate: Fate::Due {
            after,
            failure: None,
        },
        ..row(request(b"later"))
    }
}

fn failure(error: &str) -> Failure {
    Failure {
        status: Some(503),
        error: error.into(),
    }
}

/// Appends one row that is due at once.
pub fn append_one(store: &dyn Store) -> Uuid {
    let row = row(request(b"one"));
    store.append(std::slice::from_ref(&row)).unwrap();
    row.request.id
}

/// Claims rows of both classes.
pub fn claim_any(store: &dyn Store, limit: usize, bytes_max: usize, lease: Duration) -> Claim {
    let mut claim = store
        .claim(Class::Fresh, limit, bytes_max, lease)
        .expect("claim");
    let left = limit - claim.rows.len();
    let retried = store
        .claim(Class::Retried, left, bytes_max, lease)
        .expect("claim");
    claim.unreadable += retried.unreadable;
    claim.rows.extend(retried.rows);
    claim
}

pub fn claim(store: &dyn Store, limit: usize) -> Vec<Claimed> {
    let claim = claim_any(store, limit, usize::MAX, LEASE);
    assert_eq!(claim.unreadable, 0);
    claim.rows
}

/// Claims one row, as soon as there is one.
fn claim_when_due(store: &dyn Store, lease: Duration) -> Claimed {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(row) = claim_any(store, 1, usize::MAX, lease).rows.pop() {
            return row;
        }
        assert!(Instant::now() < deadline, "no row became due");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn settlement(row: &Claimed, decision: Decision) -> Settlement {
    Settlement {
        id: row.request.id,
        attempt: row.attempt,
        decision,
    }
}

pub fn delivered(row: &Claimed) -> Settlement {
    settlement(row, Decision::Attempted(Verdict::Delivered))
}

fn later(row: &Claimed, after: Duration) -> Settlement {
    let failure = failure("later");
    settlement(row, Decision::Attempted(Verdict::Later { after, failure }))
}

fn bury(row: &Claimed) -> Settlement {
    settlement(row, Decision::Attempted(Verdict::Bury(failure("bury"))))
}

fn release(row: &Claimed) -> Settlement {
    settlement(row, Decision::Release)
}

const STALE: Settled = Settled {
    delivered: 0,
    later: 0,
    buried: 0,
    released: 0,
    stale: 1,
    is_repeat: false,
};

/// (waiting, leased, dead)
pub fn counts(store: &dyn Store) -> (u64, u64, u64) {
    let sample = store.sample().unwrap();
    (sample.waiting, sample.leased, sample.dead)
}

fn empty_batches_change_nothing(bench: &Bench) {
    let store = bench.open();
    store.append(&[]).unwrap();
    assert_eq!(store.settle(&[]), Ok(Settled::default()));
    assert!(claim(&*store, 0).is_empty());
    assert!(claim(&*store, 10).is_empty());
    assert_eq!(store.sample(), Ok(Sample::default()));
}

fn requests_come_back_as_they_were(bench: &Bench) {
    let store = bench.open();
    let sent = request(b"\0\xff body");
    store.append(&[row(sent.clone())]).unwrap();
    let got = claim(&*store, 1).pop().unwrap();
    let distance = match got.request.received_at.duration_since(sent.received_at) {
        Ok(distance) => distance,
        Err(error) => error.duration(),
    };
    assert!(distance <= Duration::from_millis(1), "{distance:?}");
    let received_at = sent.received_at;
    let expected = Request {
        received_at,
        ..got.request
    };
    assert_eq!(expected, sent);
}

fn appending_again_changes_nothing(bench: &Bench) {
    let store = bench.open();
    let waiting = row(request(b"waiting"));
    let dead = NewRow {
        fate: Fate::Dead(failure("first")),
        ..row(request(b"dead"))
    };
    let rows = [waiting.clone(), dead.clone(), waiting.clone(), dead];
    store.append(&rows).unwrap();
    store.append(&rows).unwrap();
    assert_eq!(counts(&*store), (1, 0, 1));
    let claimed = claim(&*store, 10);
    assert_eq!(claimed.len(), 1);
    store.append(&[waiting]).unwrap();
    assert_eq!(counts(&*store), (0, 1, 1), "a lease outlives an append");
}

fn a_leased_append_is_like_a_claim(bench: &Bench) {
    let store = bench.open();
    let leased = |lease| NewRow {
        attempt: 1,
        fate: Fate::Leased(lease),
        ..row(request(b"leased"))
    };
    let (long, short, given_back) = (leased(LEASE), leased(SHORT_LEASE), leased(LEASE));
    store.append(&[long.clone(), given_back.clone()]).unwrap();
    assert_eq!(counts(&*store), (0, 2, 0));
    assert!(claim(&*store, 10).is_empty());
    store.append(&[row((*long.request).clone())]).unwrap();
    assert_eq!(counts(&*store), (0, 2, 0), "appended again as waiting");
    let settle = |row: &NewRow, decision| Settlement {
        id: row.request.id,
        attempt: 1,
        decision,
    };
    let settled = store.settle(&[
        settle(&long, Decision::Attempted(Verdict::Delivered)),
        settle(&given_back, Decision::Release),
    ]);
    let (delivered, released) = settled.map(|it| (it.delivered, it.released)).unwrap();
    assert_eq!((delivered, released), (1, 1));
    let claimed = claim(&*store, 10);
    assert_eq!(claimed.len(), 1);
    assert_eq!(
        (claimed[0].request.id, claimed[0].attempt),
        (given_back.request.id, 1)
    );
    store.append(std::slice::from_ref(&short)).unwrap();
    let claimed = claim_when_due(&*store, LEASE);
    assert_eq!((claimed.request.id, claimed.attempt), (short.request.id, 2));
    let late = settle(&short, Decision::Attempted(Verdict::Delivered));
    assert_eq!(store.settle(&[late]), Ok(STALE));
}

fn append_is_all_or_none(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    // The last row of the batch is one that the database refuses.
    let refused = NewRow {
        fate: Fate::Dead(failure("refused")),
        ..row(request(b"c"))
    };
    (bench.sql)("ALTER TABLE proxy_dead_letters RENAME COLUMN target TO gone");
    let result = store.append(&[row(request(b"a")), row(request(b"b")), refused]);
    assert!(result.is_err(), "{result:?}");
    (bench.sql)("ALTER TABLE proxy_dead_letters RENAME COLUMN gone TO target");
    assert_eq!(counts(&*store), (1, 0, 0));
}

fn claims_oldest_due_first_and_no_more_than_asked(bench: &Bench) {
    let store = bench.open();
    let mut ids: Vec<Uuid> = Vec::new();
    for _ in 0..6 {
        ids.push(append_one(&*store));
        // Times are kept in milliseconds.
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut claimed = Vec::new();
    for expected in [4, 2, 0] {
        let rows = claim(&*store, 4);
        assert_eq!(rows.len(), expected);
        claimed.extend(rows.iter().map(|row| row.request.id));
    }
    if !bench.is_ordered {
        claimed.sort();
    }
    assert_eq!(claimed, ids);
}

fn a_claim_takes_no_more_bytes_than_asked_but_always_one_row(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = (0..5).map(|_| row(request(&[b'x'; 1000]))).collect();
    store.append(&rows).unwrap();
    let claim = |limit, bytes_max| {
        store
            .claim(Class::Fresh, limit, bytes_max, LEASE)
            .unwrap()
            .rows
    };
    assert_eq!(claim(0, usize::MAX).len(), 0);
    let first = claim(10, 2 * rows[0].request.bytes());
    assert_eq!(first.len(), 2);
    assert_eq!(claim(10, 0).len(), 1);
    assert_eq!(counts(&*store), (2, 3, 0));
    let rest = claim(10, usize::MAX);
    assert_eq!(rest.len(), 2);
    assert!(rest.iter().all(|row| row.attempt == 1));
    let ids: HashSet<_> = first
        .iter()
        .chain(&rest)
        .map(|row| row.request.id)
        .collect();
    assert_eq!(ids.len(), 4);
}

fn a_claim_counts_targets_and_header_fields_as_well(bench: &Bench) {
    let store = bench.open();
    let with_target = Request {
        target: format!("/{}", "a".repeat(1000)),
        ..request(b"")
    };
    let mut with_field = request(b"");
    with_field.headers.push("X-Large", &[b'x'; 1000]).unwrap();
    for large in [with_target, with_field] {
        let id = |_| Request {
            id: Uuid::now_v7(),
            ..large.clone()
        };
        let rows: Vec<_> = (0..5).map(id).map(row).collect();
        store.append(&rows).unwrap();
        let claim = |bytes_max| {
            let claim = store.claim(Class::Fresh, 10, bytes_max, LEASE).unwrap();
            claim.rows.len()
        };
        assert_eq!(claim(2 * large.bytes() - 1), 1);
        assert_eq!(claim(2 * large.bytes()), 2);
        assert_eq!(claim(usize::MAX), 2);
    }
}

fn classes_are_claimed_apart(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = (0..5)
        .map(|attempt| NewRow {
            attempt,
            ..row(request(b"tried"))
        })
        .collect();
    store.append(&rows).unwrap();
    let claim = |class| {
        let claim = store.claim(class, 10, usize::MAX, LEASE).unwrap();
        let mut attempts: Vec<_> = claim.rows.iter().map(|row| row.attempt).collect();
        attempts.sort_unstable();
        attempts
    };
    assert_eq!(claim(Class::Retried), [3, 4, 5]);
    assert_eq!(claim(Class::Fresh), [1, 2]);
    assert!(claim(Class::Retried).is_empty() && claim(Class::Fresh).is_empty());
    // The attempt that was claimed has made one of them leave the first class.
    (bench.sql)(&format!(
        "UPDATE proxy_requests SET next_attempt_at = {}",
        bench.dialect.now()
    ));
    assert_eq!(claim(Class::Fresh), [2]);
    assert_eq!(claim(Class::Retried), [3, 4, 5, 6]);
    assert_eq!(store.sample().unwrap().leased, 5);
}

fn a_row_is_due_after_its_delay(bench: &Bench) {
    let store = bench.open();
    let delay = Duration::from_millis(200);
    let before = Instant::now();
    store.append(&[due_in(LEASE), due_in(delay)]).unwrap();
    let row = claim_when_due(&*store, LEASE);
    // The store rounds to milliseconds.
    assert!(before.elapsed() >= delay - Duration::from_millis(2));
    assert_eq!(row.attempt, 1);
    assert_eq!(counts(&*store), (1, 1, 0));
}

fn a_claim_counts_the_attempt_and_hides_the_row(bench: &Bench) {
    let store = bench.open();
    let again = NewRow {
        attempt: 7,
        ..row(request(b"again"))
    };
    store.append(&[again]).unwrap();
    assert_eq!(claim(&*store, 10)[0].attempt, 8);
    assert!(claim(&*store, 10).is_empty());
}

fn a_lease_that_is_over_is_due_again(bench: &Bench) {
    let store = bench.open();
    let id = append_one(&*store);
    for attempt in 1..4 {
        let row = claim_when_due(&*store, SHORT_LEASE);
        assert_eq!((row.request.id, row.attempt), (id, attempt));
    }
}

fn a_late_settlement_changes_nothing(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    let first = claim_when_due(&*store, SHORT_LEASE);
    let second = claim_when_due(&*store, LEASE);
    for late in [
        delivered(&first),
        later(&first, Duration::ZERO),
        bury(&first),
        release(&first),
    ] {
        assert_eq!(store.settle(&[late]), Ok(STALE));
        assert_eq!(counts(&*store), (0, 1, 0));
    }
    let settled = store.settle(&[delivered(&second)]).unwrap();
    assert_eq!((settled.delivered, settled.stale), (1, 0));
}

fn delivered_rows_are_gone_and_settle_once(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    let row = claim(&*store, 1).pop().unwrap();
    let settled = store.settle(&[delivered(&row)]).unwrap();
    assert_eq!((settled.delivered, settled.stale), (1, 0));
    assert_eq!(store.settle(&[delivered(&row)]), Ok(STALE));
    assert_eq!(store.sample(), Ok(Sample::default()));
}

fn later_waits_for_its_delay(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    let row = claim(&*store, 1).pop().unwrap();
    let (delay, before) = (Duration::from_millis(200), Instant::now());
    let settled = store.settle(&[later(&row, delay)]).unwrap();
    assert_eq!((settled.later, settled.stale), (1, 0));
    assert_eq!(counts(&*store), (1, 0, 0));
    assert_eq!(store.settle(&[delivered(&row)]), Ok(STALE), "not leased");
    let again = claim_when_due(&*store, LEASE);
    assert!(before.elapsed() >= delay - Duration::from_millis(2));
    assert_eq!(again.attempt, 2);
    assert_eq!(again.request, row.request);
}

fn buried_rows_are_dead_letters(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    let row = claim(&*store, 1).pop().unwrap();
    let settled = store.settle(&[bury(&row)]).unwrap();
    assert_eq!((settled.buried, settled.stale), (1, 0));
    assert_eq!(store.settle(&[bury(&row)]), Ok(STALE));
    assert_eq!(counts(&*store), (0, 0, 1));
    assert_dead_letter(bench, &row.request, 1, "bury");
}

fn dead_rows_are_appended_to_the_dead_letters(bench: &Bench) {
    let store = bench.open();
    let dead = NewRow {
        attempt: 3,
        fate: Fate::Dead(failure("dead")),
        ..row(request(b"dead"))
    };
    store.append(std::slice::from_ref(&dead)).unwrap();
    store
        .append(&[row(request(b"alive")), dead.clone()])
        .unwrap();
    assert_eq!(counts(&*store), (1, 0, 1));
    assert_dead_letter(bench, &dead.request, 3, "dead");
}

/// Fails unless there is one dead letter, like this.
fn assert_dead_letter(bench: &Bench, request: &Request, attempt: u32, error: &str) {
    let dialect = bench.dialect;
    (bench.sql)(&format!(
        "CREATE TABLE found (rows integer CHECK (rows = 1));
         INSERT INTO found
         SELECT count(*) FROM proxy_dead_letters
          WHERE id = {} AND attempt = {attempt} AND last_status = 503
            AND last_error = '{error}' AND method = '{}' AND target = '{}'
            AND headers = {} AND body = {} AND received_at IS NOT NULL
            AND died_at >= received_at;
         DROP TABLE found",
        dialect.id(request.id),
        request.method,
        request.target,
        dialect.bytes(request.headers.as_bytes()),
        dialect.bytes(&request.body),
    ));
}

/// Appends dead letters of these ages in hours, and returns their ids.
fn append_dead(bench: &Bench, store: &dyn Store, body: &[u8], ages: &[u32]) -> Vec<Uuid> {
    let dead = |_: &u32| NewRow {
        fate: Fate::Dead(failure("dead")),
        ..row(request(body))
    };
    let rows: Vec<NewRow> = ages.iter().map(dead).collect();
    for batch in rows.chunks(BATCH_ROWS_MAX) {
        store.append(batch).unwrap();
    }
    let ids: Vec<Uuid> = rows.iter().map(|row| row.request.id).collect();
    let aged = |(id, hours): (&Uuid, &u32)| {
        let died_at = bench.dialect.hours_before("died_at", *hours);
        let id = bench.dialect.id(*id);
        format!("UPDATE proxy_dead_letters SET died_at = {died_at} WHERE id = {id};")
    };
    let sql: String = ids.iter().zip(ages).map(aged).collect();
    (bench.sql)(&sql);
    ids
}

fn hours(hours: u64) -> Duration {
    Duration::from_secs(hours * 60 * 60)
}

fn old_dead_letters_are_purged_oldest_first(bench: &Bench) {
    let store = bench.open();
    assert_eq!(store.purge(Duration::ZERO, 10), Ok(0));
    let waiting = append_one(&*store);
    let ids = append_dead(bench, &*store, b"dead", &[0, 3, 7, 5, 1]);
    assert_eq!(store.purge(hours(2), 0), Ok(0));
    assert_eq!(store.purge(hours(8), 10), Ok(0));
    assert_eq!(store.purge(Duration::MAX, 10), Ok(0));
    assert_eq!(counts(&*store), (1, 0, 5));
    for (limit, purged, oldest_left, left) in [(1, 1, 3, 4), (1, 1, 1, 3), (10, 1, 4, 2)] {
        assert_eq!(store.purge(hours(2), limit), Ok(purged));
        assert_eq!(counts(&*store), (1, 0, left));
        assert_oldest_dead_letter(bench, ids[oldest_left]);
    }
    assert_eq!(store.purge(hours(2), 10), Ok(0));
    assert_eq!(store.purge(Duration::from_secs(60), 10), Ok(1));
    assert_oldest_dead_letter(bench, ids[0]);
    assert_eq!(claim(&*store, 10)[0].request.id, waiting);
}

/// Fails unless the dead letter that died first is this one.
fn assert_oldest_dead_letter(bench: &Bench, id: Uuid) {
    (bench.sql)(&format!(
        "CREATE TABLE found (rows integer CHECK (rows = 1));
         INSERT INTO found
         SELECT count(*) FROM proxy_dead_letters
          WHERE id = {}
            AND died_at = (SELECT min(died_at) FROM proxy_dead_letters);
         DROP TABLE found",
        bench.dialect.id(id),
    ));
}

fn a_purge_takes_no_more_bytes_than_a_batch_but_always_one_row(bench: &Bench) {
    let store = bench.open();
    append_dead(bench, &*store, &[b'x'; 2 * BATCH_BYTES_MAX / 3], &[2, 3, 4]);
    append_dead(bench, &*store, &[b'x'; 2 * BATCH_BYTES_MAX], &[5, 6]);
    // A row that was taken over need not have a body.
    append_dead(bench, &*store, b"", &[7]);
    (bench.sql)("UPDATE proxy_dead_letters SET body = NULL WHERE length(body) = 0");
    for purged in [2, 1, 2, 1, 0] {
        assert_eq!(store.purge(hours(1), 10), Ok(purged));
    }
    assert_eq!(counts(&*store), (0, 0, 0));
}

fn concurrent_purges_count_each_row_once(bench: &Bench) {
    const ROWS: usize = 200;
    let store = bench.open();
    append_dead(bench, &*store, b"race", &[2; ROWS]);
    append_dead(bench, &*store, b"young", &[0; 3]);
    let purged: u64 = std::thread::scope(|scope| {
        let purge_all = || {
            let mut all = 0;
            loop {
                match store.purge(hours(1), 7).unwrap() {
                    0 => return all,
                    purged => all += purged,
                }
            }
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(purge_all)).collect();
        threads.into_iter().map(|it| it.join().unwrap()).sum()
    });
    assert_eq!(purged, ROWS as u64);
    assert_eq!(counts(&*store), (0, 0, 3));
}

fn a_release_is_due_at_once_and_not_counted(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    for _ in 0..3 {
        let row = claim(&*store, 1).pop().unwrap();
        assert_eq!(row.attempt, 1);
        let settled = store.settle(&[release(&row)]).unwrap();
        assert_eq!((settled.released, settled.stale), (1, 0));
        assert_eq!(store.settle(&[release(&row)]), Ok(STALE));
        assert_eq!(counts(&*store), (1, 0, 0));
    }
}

fn a_mixed_batch_counts_each_kind(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<NewRow> = (0..11).map(|_| row(request(b"mixed"))).collect();
    store.append(&rows).unwrap();
    let claimed = claim(&*store, 11);
    let mut batch: Vec<Settlement> = Vec::new();
    batch.extend(claimed[..4].iter().map(delivered));
    batch.extend(claimed[4..7].iter().map(|row| later(row, LEASE)));
    batch.extend(claimed[7..9].iter().map(bury));
    batch.push(release(&claimed[9]));
    batch.push(Settlement {
        attempt: 2,
        ..delivered(&claimed[10])
    });
    let expected = Settled {
        delivered: 4,
        later: 3,
        buried: 2,
        released: 1,
        stale: 1,
        is_repeat: false,
    };
    assert_eq!(store.settle(&batch), Ok(expected));
    assert_eq!(counts(&*store), (4, 1, 2));
}

fn one_lease_is_settled_once_in_a_batch(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    let row = claim(&*store, 1).pop().unwrap();
    let batch = [bury(&row), delivered(&row), release(&row), bury(&row)];
    let expected = Settled {
        buried: 1,
        stale: 3,
        ..Settled::default()
    };
    assert_eq!(store.settle(&batch), Ok(expected));
    assert_eq!(counts(&*store), (0, 0, 1));
}

fn the_sample_counts_each_kind(bench: &Bench) {
    let store = bench.open();
    let mut old = request(b"old");
    old.received_at -= Duration::from_secs(3600);
    store.append(&[row(old)]).unwrap();
    store.append(&[due_in(LEASE), due_in(LEASE)]).unwrap();
    assert_eq!(counts(&*store), (3, 0, 0));
    let row = claim(&*store, 10).pop().unwrap();
    assert_eq!(counts(&*store), (2, 1, 0));
    let oldest = store.sample().unwrap().oldest.unwrap();
    assert!(oldest >= Duration::from_secs(3599), "{oldest:?}");
    assert!(oldest < Duration::from_secs(4000), "{oldest:?}");
    store.settle(&[bury(&row)]).unwrap();
    assert_eq!(counts(&*store), (2, 0, 1));
    assert!(store.sample().unwrap().oldest.unwrap() < Duration::from_secs(600));
    // A lease that is over is one nobody holds.
    append_one(&*store);
    claim_when_due(&*store, Duration::ZERO);
    let deadline = Instant::now() + PATIENCE;
    while counts(&*store) != (3, 0, 1) {
        assert!(Instant::now() < deadline, "{:?}", counts(&*store));
    }
}

fn large_bodies_and_binary_headers_survive(bench: &Bench) {
    let store = bench.open();
    let mut large = request(&vec![0xa5; 10 * 1024 * 1024]);
    let all: Vec<u8> = (0x20..=0x7e).chain(0x80..=0xff).chain([b'\t']).collect();
    large.headers.push("X-Binary", &all).unwrap();
    large.headers.push("X-Empty", b"").unwrap();
    large.headers.push("X-Binary", b"again: and").unwrap();
    large.target = format!("/{}?%00=%ff", "a".repeat(30_000));
    let empty = Request {
        headers: Headers::default(),
        ..request(b"")
    };
    for sent in [large, empty] {
        store.append(&[row(sent.clone())]).unwrap();
        let got = claim(&*store, 1).pop().unwrap().request;
        assert!(got.body == sent.body);
        assert!(got.headers == sent.headers);
        assert!(got.target == sent.target);
    }
}

fn a_full_batch_fits(bench: &Bench) {
    let store = bench.open();
    let body: Vec<u8> = (0..8900_u32).map(|n| (n * n % 251) as u8).collect();
    let rows: Vec<NewRow> = (0..BATCH_ROWS_MAX).map(|_| row(request(&body))).collect();
    store.append(&rows).unwrap();
    let claimed = claim(&*store, BATCH_ROWS_MAX);
    let sent: HashSet<Uuid> = rows.iter().map(|row| row.request.id).collect();
    let got: HashSet<Uuid> = claimed.iter().map(|row| row.request.id).collect();
    assert_eq!(sent, got);
    assert!(claimed.iter().all(|row| row.request.body == body));
    let batch: Vec<Settlement> = claimed.iter().map(delivered).collect();
    let settled = store.settle(&batch).unwrap();
    assert_eq!(settled.delivered, BATCH_ROWS_MAX as u64);
    assert_eq!(counts(&*store), (0, 0, 0));
}

fn texts_with_nul_are_stored(bench: &Bench) {
    let store = bench.open();
    let texts = || failure("a\0b\u{1f600}'\\");
    let waiting = NewRow {
        fate: Fate::Due {
            after: Duration::ZERO,
            failure: Some(texts()),
        },
        ..row(request(b"a"))
    };
    let dead = NewRow {
        fate: Fate::Dead(texts()),
        ..row(request(b"b"))
    };
    store.append(&[waiting, dead]).unwrap();
    for bury in [false, true] {
        let row = claim(&*store, 1).pop().unwrap();
        let (after, failure) = (Duration::ZERO, texts());
        let verdict = if bury {
            Verdict::Bury(failure)
        } else {
            Verdict::Later { after, failure }
        };
        let settled = store.settle(&[settlement(&row, Decision::Attempted(verdict))]);
        assert_eq!(settled.unwrap().stale, 0);
    }
    assert_eq!(counts(&*store), (0, 0, 2));
}

fn extreme_times_do_no_harm(bench: &Bench) {
    let store = bench.open();
    let mut rows = Vec::new();
    for seconds in [0, 1 << 33, 1 << 40, 1 << 55] {
        let mut request = request(b"when");
        let Some(received_at) = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
        else {
            continue;
        };
        request.received_at = received_at;
        rows.push(row(request));
    }
    rows.push(due_in(Duration::MAX));
    store.append(&rows).unwrap();
    let claimed = store
        .claim(Class::Fresh, 10, usize::MAX, Duration::MAX)
        .unwrap()
        .rows;
    assert_eq!(claimed.len(), rows.len() - 1);
    assert!(store.sample().unwrap().oldest.is_some());
    let batch: Vec<Settlement> = claimed
        .iter()
        .map(|row| later(row, Duration::MAX))
        .collect();
    assert_eq!(store.settle(&batch).unwrap().later, claimed.len() as u64);
    assert!(claim(&*store, 10).is_empty());
}

fn concurrent_claims_never_share_a_row(bench: &Bench) {
    const ROWS: usize = 400;
    let store = bench.open();
    let rows: Vec<NewRow> = (0..ROWS).map(|_| row(request(b"race"))).collect();
    store.append(&rows).unwrap();
    let claimed: Vec<Uuid> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let rows = claim(&*store, 7);
                        if rows.is_empty() {
                            return mine;
                        }
                        let batch: Vec<Settlement> = rows.iter().map(delivered).collect();
                        let settled = store.settle(&batch).unwrap();
                        assert_eq!(settled.delivered, rows.len() as u64);
                        mine.extend(rows.iter().map(|row| row.request.id));
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let unique: HashSet<Uuid> = claimed.iter().copied().collect();
    assert_eq!((claimed.len(), unique.len()), (ROWS, ROWS));
    assert_eq!(counts(&*store), (0, 0, 0));
}

fn unreadable_rows_are_buried_and_block_nobody(bench: &Bench) {
    let store = bench.open();
    let ids: Vec<Uuid> = (0..8).map(|_| append_one(&*store)).collect();
    let damages = [
        format!("method = '{}'", "A".repeat(65)),
        format!(
            "headers = {}",
            bench.dialect.bytes(&b"X: y\r\n".repeat(20_000))
        ),
        "method = 'GE T'".to_string(),
        "method = ''".to_string(),
        "target = 'no path'".to_string(),
        format!("headers = {}", bench.dialect.bytes(b"no field")),
        format!("headers = {}", bench.dialect.bytes(b"\xff: \0\r\n")),
    ];
    for (damage, id) in damages.iter().zip(&ids) {
        let id = bench.dialect.id(*id);
        (bench.sql)(&format!(
            "UPDATE proxy_requests SET {damage} WHERE id = {id}"
        ));
    }
    let (mut unreadable, mut read) = (0, Vec::new());
    for _ in 0..ids.len() {
        let claim = claim_any(&*store, 1, usize::MAX, LEASE);
        unreadable += claim.unreadable;
        read.extend(claim.rows);
    }
    assert_eq!(unreadable, damages.len() as u64);
    assert_eq!(read.len(), 1);
    assert_eq!(read[0].request.id, ids[7]);
    assert_eq!(counts(&*store), (0, 1, damages.len() as u64));
}

/// Whoever has written the row: it would be sent with two framings, or under a forged name.
fn fields_that_are_never_forwarded_are_left_out_of_rows(bench: &Bench) {
    let store = bench.open();
    let id = append_one(&*store);
    let block = b"Content-Length: 1\r\nX-Kept: 1\r\ntransfer_encoding: chunked\r\nHost: h\r\n\
        X-Asyncproxy-Id: forged\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: x-hop\r\nX-Hop: 1\r\n";
    let headers = bench.dialect.bytes(block);
    let id = bench.dialect.id(id);
    (bench.sql)(&format!(
        "UPDATE proxy_requests SET headers = {headers} WHERE id = {id}"
    ));
    let claimed = claim(&*store, 1).pop().unwrap();
    assert_eq!(
        claimed.request.headers.as_bytes(),
        b"X-Kept: 1\r\nX-Forwarded-For: 192.0.2.1\r\n"
    );
}

fn rows_survive_reopening(bench: &Bench) {
    let store = bench.open();
    let leased = append_one(&*store);
    let row = claim(&*store, 1).pop().unwrap();
    let waiting = append_one(&*store);
    drop(store);
    let store = bench.open();
    if bench.dialect == Dialect::Sqlite {
        // Nobody else can be at it any more.
        assert_eq!(counts(&*store), (2, 0, 0));
        assert_eq!(store.settle(&[delivered(&row)]), Ok(STALE));
        return;
    }
    assert_eq!(counts(&*store), (1, 1, 0));
    assert_eq!(claim(&*store, 10)[0].request.id, waiting);
    assert_eq!(row.request.id, leased);
    // The lease is that of the instance that was there before.
    assert_eq!(store.settle(&[delivered(&row)]), Ok(STALE));
    assert_eq!(counts(&*store), (0, 2, 0));
}

fn two_stores_share_one_queue(bench: &Bench) {
    let (one, other) = (bench.open(), bench.open());
    let id = append_one(&*one);
    let row = claim(&*other, 1).pop().unwrap();
    assert_eq!(row.request.id, id);
    assert!(claim(&*one, 1).is_empty());
    if one.is_shared() {
        // A lease names its instance.
        assert_eq!(one.settle(&[delivered(&row)]), Ok(STALE));
    }
    assert_eq!(other.settle(&[delivered(&row)]).unwrap().delivered, 1);
    assert_eq!(other.settle(&[delivered(&row)]), Ok(STALE));
}

/// Beats until something is taken over from an instance that does not.
fn take_over(store: &dyn Store) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let taken = store.beat().unwrap();
        if taken > 0 {
            return taken;
        }
        assert!(Instant::now() < deadline, "nothing was taken over");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn what_a_silent_instance_has_leased_is_taken_over_and_no_longer_its(bench: &Bench) {
    let (silent, other) = (bench.open(), bench.open());
    if !silent.is_shared() {
        assert_eq!((silent.beat(), other.beat()), (Ok(0), Ok(0)));
        return;
    }
    let ids: HashSet<_> = (0..3).map(|_| append_one(&*silent)).collect();
    let fresh = claim(&*silent, 1).pop().unwrap();
    // Of either class.
    let retried = settlement(&fresh, Decision::Release);
    silent.settle(&[retried]).unwrap();
    (bench.sql)(&format!(
        "UPDATE proxy_requests SET attempt = 7 WHERE id = {}",
        bench.dialect.id(fresh.request.id)
    ));
    let mut leased = claim(&*silent, 10);
    let claimed = silent.claim(Class::Retried, 10, usize::MAX, LEASE);
    leased.extend(claimed.unwrap().rows);
    silent
        .append(&[NewRow {
            attempt: 1,
            fate: Fate::Leased(LEASE),
            ..row(request(b"leased as it came"))
        }])
        .unwrap();
    assert_eq!(counts(&*other), (0, 4, 0));
    assert_eq!(take_over(&*other), 4);
    assert_eq!(counts(&*other), (4, 0, 0));
    let all_kinds = |row: &Claimed| [delivered(row), later(row, LEASE), bury(row), release(row)];
    for late in leased.iter().flat_map(all_kinds) {
        assert_eq!(silent.settle(&[late]), Ok(STALE), "before the next claim");
    }
    let mut again = claim_all(&*other);
    assert_eq!(again.len(), 4);
    for late in leased.iter().flat_map(all_kinds) {
        assert_eq!(silent.settle(&[late]), Ok(STALE), "after it");
    }
    again.retain(|row| ids.contains(&row.request.id));
    for row in &again {
        let before = leased.iter().find(|old| old.request.id == row.request.id);
        assert_eq!(
            row.attempt,
            before.unwrap().attempt + 1,
            "may have been made"
        );
    }
    let settled = other.settle(&again.iter().map(delivered).collect::<Vec<_>>());
    assert_eq!(settled.unwrap().delivered, 3);
}

fn claim_all(store: &dyn Store) -> Vec<Claimed> {
    let mut rows = claim(store, 10);
    let retried = store.claim(Class::Retried, 10, usize::MAX, LEASE);
    rows.extend(retried.unwrap().rows);
    rows
}

fn an_instance_that_beats_keeps_what_it_has_leased(bench: &Bench) {
    let (one, other) = (bench.open(), bench.open());
    append_one(&*one);
    let row = claim(&*one, 1).pop().unwrap();
    let until = Instant::now() + 4 * SILENCE;
    while Instant::now() < until {
        assert_eq!((one.beat(), other.beat()), (Ok(0), Ok(0)));
        std::thread::sleep(SILENCE / 50);
    }
    assert_eq!(one.settle(&[delivered(&row)]).unwrap().delivered, 1);
}

fn one_that_leaves_hands_on_what_it_has_leased(bench: &Bench) {
    let (one, other) = (bench.open(), bench.open());
    if !one.is_shared() {
        assert_eq!(one.leave(), Ok(()));
        return;
    }
    append_one(&*one);
    let row = claim(&*one, 1).pop().unwrap();
    assert_eq!(one.leave(), Ok(()));
    assert_eq!(take_over(&*other), 1);
    let again = claim(&*other, 1).pop().unwrap();
    assert_eq!(again.request.id, row.request.id);
    other.settle(&[delivered(&again)]).unwrap();
    assert_eq!(other.leave(), Ok(()));
    let left = (bench.query)("SELECT count(*) FROM proxy_instances WHERE last_seen > '-infinity'");
    assert_eq!(left, [[Some("0".to_owned())]]);
}

/// As a dump that was taken before is restored: each operation finds its way back to work.
fn a_schema_that_goes_meanwhile_is_made_again(bench: &Bench) {
    if bench.dialect == Dialect::Sqlite {
        // Its file is its own.
        return;
    }
    let store = bench.open();
    let all = "proxy_requests, proxy_dead_letters, proxy_rate, proxy_pause, proxy_instances";
    for gone in [
        format!("DROP TABLE {all}, asyncproxy_migrations"),
        format!("DROP TABLE {all}"),
        "DROP TABLE proxy_requests".to_owned(),
        "DROP TABLE proxy_dead_letters, proxy_pause".to_owned(),
        "DROP TABLE proxy_instances".to_owned(),
        // One table as a dump of version 1 restores it.
        "ALTER TABLE proxy_requests DROP COLUMN leased_by".to_owned(),
        // The schema of version 1.
        "DROP TABLE proxy_instances; ALTER TABLE proxy_requests DROP COLUMN leased_by;
         DELETE FROM asyncproxy_migrations WHERE version > 1"
            .to_owned(),
    ] {
        append_one(&*store);
        (bench.sql)(&gone);
        let dead = NewRow {
            fate: Fate::Dead(failure("dead")),
            ..row(request(b"dead"))
        };
        assert_eq!(
            store.append(&[row(request(b"due")), dead]),
            Ok(()),
            "{gone}"
        );
        assert_eq!(store.beat(), Ok(0), "{gone}");
        let rows = claim_all(&*store);
        assert!(!rows.is_empty(), "{gone}");
        let settlements: Vec<_> = rows.iter().map(delivered).collect();
        let settled = store.settle(&settlements).unwrap();
        assert_eq!(settled.delivered, rows.len() as u64, "{gone}");
        assert!(store.sample().unwrap().dead >= 1, "{gone}");
    }
}

fn a_newer_schema_is_refused(bench: &Bench) {
    append_one(&*bench.open());
    let now = bench.dialect.now();
    (bench.sql)(&format!(
        "INSERT INTO asyncproxy_migrations (version, applied_at) VALUES (1000, {now})"
    ));
    let store = bench.open();
    for _ in 0..2 {
        let refused = store.append(&[row(request(b"new"))]);
        assert!(matches!(refused, Err(StoreError::Schema(_))), "{refused:?}");
    }
    (bench.sql)("DELETE FROM asyncproxy_migrations WHERE version = 1000");
    assert_eq!(counts(&*store), (1, 0, 0), "tried again at each call");
}
