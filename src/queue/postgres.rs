//! The Postgres store: one table that several instances share.
//!
//! Works behind PgBouncer in transaction mode: no named statement, no session state, no session
//! lock. Nearly every operation is one statement, and so one round trip and one transaction; all
//! times are the server's.

mod adopt;
mod connections;
pub mod inspect;
mod operate;
mod schema;
mod start;
mod statements;
#[cfg(feature = "tls")]
mod tls;
mod tokens;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use ::postgres::types::{ToSql, Type};
use ::postgres::{Client, Row};
use uuid::Uuid;

use super::migrate::{Policy, Step, Version};
use super::{
    BATCH_BYTES_MAX, ByClass, Claim, Claimed, Class, Decision, Fate, NewRow, Sample, Settled,
    Settlement, Store, StoreError,
};
use crate::config::PostgresServer;
use crate::request::{Headers, Request};
use crate::settle::{Failure, Verdict};
use connections::{Connections, Fault};
use start::Start;
use statements::{APPEND, APPEND_DEAD, CLAIM, CLAIM_UNORDERED, PURGE, SAMPLE, SETTLE};

/// The longest delay or lease: what is later may as well be then.
const DELAY_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
/// The year 9999 ends here, and with it what every tool can show.
const UNIX_SECONDS_MAX: u64 = 253_402_300_799;

/// A queue in a Postgres database.
#[derive(Debug)]
pub struct PostgresStore {
    connections: Connections,
    use_index: bool,
    starts: ByClass<Arc<Start>>,
    timeout: Duration,
    append_timeout: Duration,
    shared_rate: Option<Arc<AtomicU32>>,
}

/// A value for a statement, with its type.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

impl PostgresStore {
    /// Connects to nothing yet. Each operation takes `timeout` at most.
    pub fn new(
        server: PostgresServer,
        max_connections: u32,
        use_index: bool,
        timeout: Duration,
    ) -> PostgresStore {
        PostgresStore {
            connections: Connections::new(server, max_connections, timeout),
            use_index,
            starts: ByClass {
                fresh: Arc::default(),
                retried: Arc::default(),
            },
            timeout,
            append_timeout: timeout,
            shared_rate: None,
        }
    }

    /// Gives up an append sooner than other operations.
    #[must_use]
    pub fn with_append_timeout(self, append_timeout: Duration) -> PostgresStore {
        PostgresStore {
            append_timeout: append_timeout.min(self.timeout),
            ..self
        }
    }

    /// Leaves the schema to `asyncproxy migrate`, if the policy is so.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> PostgresStore {
        if policy == Policy::Require {
            self.connections.never_migrate();
        }
        self
    }

    /// Claims at most so many rows a second, and a second's worth at once, together with all
    /// other stores on the database that do so.
    #[must_use]
    pub fn sharing_rate(self, per_second: u32) -> PostgresStore {
        self.sharing_changing_rate(Arc::new(AtomicU32::new(per_second)))
    }

    /// As [`PostgresStore::sharing_rate`], by a rate that others may change.
    #[must_use]
    pub fn sharing_changing_rate(self, per_second: Arc<AtomicU32>) -> PostgresStore {
        PostgresStore {
            shared_rate: Some(per_second),
            ..self
        }
    }

    fn run<T: Send + 'static>(
        &self,
        timeout: Duration,
        operation: impl Fn(&mut Client) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.connections
            .run(timeout, operation, |_| 0, |_, _| Ok(()))
    }
}

/// Applies what is pending to a database, however long that takes; `timeout` is for connecting.
///
/// # Errors
/// [`StoreError`]; nothing has changed then.
pub fn migrate(server: &PostgresServer, timeout: Duration) -> Result<Vec<Step>, StoreError> {
    let mut client = connections::connect(server, timeout)?;
    schema::migrate(&mut client).map_err(connections::describe)
}

/// Reads the version of a database's schema, and changes nothing.
///
/// # Errors
/// [`StoreError`].
pub fn version(server: &PostgresServer, timeout: Duration) -> Result<Version, StoreError> {
    let mut client = connections::connect(server, timeout)?;
    schema::version(&mut client).map_err(connections::describe)
}

impl Store for PostgresStore {
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        let rows = rows.to_vec();
        let bytes = rows.iter().map(|row| row.request.bytes()).sum();
        self.connections.run(
            self.append_timeout,
            move |client| append(client, &rows),
            move |()| bytes,
            |_, ()| Ok(()),
        )
    }

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        let start = self.use_index.then(|| Arc::clone(self.starts.of(class)));
        let rate = self.shared_rate.as_ref();
        let shared_rate = rate.map(|rate| rate.load(Ordering::Relaxed));
        self.connections.run(
            self.timeout,
            move |client| {
                claim(
                    client,
                    class,
                    start.as_deref(),
                    shared_rate,
                    (limit, bytes_max, lease),
                )
            },
            |claim| claim.rows.iter().map(|row| row.request.bytes()).sum(),
            |client, unwanted| {
                let mut outcomes = Outcomes::default();
                for row in &unwanted.rows {
                    outcomes.add(row.request.id, to_i32(row.attempt), &Decision::Release);
                }
                outcomes.settle(client).map(drop)
            },
        )
    }

    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        let settlements = settlements.to_vec();
        self.run(self.timeout, move |client| settle(client, &settlements))
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError> {
        self.run(self.timeout, move |client| purge(client, older_than, limit))
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        self.run(self.timeout, sample)
    }
}

fn append(client: &mut Client, rows: &[NewRow]) -> Result<(), Fault> {
    let (mut due, mut dead) = (NewRows::default(), NewRows::default());
    for row in rows {
        match &row.fate {
            Fate::Due { after, failure } => due.add(row, *after, failure.as_ref()),
            Fate::Leased(lease) => due.add(row, *lease, None),
            Fate::Dead(failure) => dead.add(row, Duration::ZERO, Some(failure)),
        }
    }
    match (due.ids.is_empty(), dead.ids.is_empty()) {
        (_, true) => client.execute_typed(APPEND, &due.parameters())?,
        (true, false) => client.execute_typed(APPEND_DEAD, &dead.parameters())?,
        (false, false) => {
            let mut transaction = client.transaction()?;
            transaction.execute_typed(APPEND, &due.parameters())?;
            transaction.execute_typed(APPEND_DEAD, &dead.parameters())?;
            transaction.commit()?;
            0
        }
    };
    Ok(())
}

/// New rows, one array for each column.
#[derive(Default)]
struct NewRows<'a> {
    ids: Vec<Uuid>,
    received_at: Vec<SystemTime>,
    after: Vec<f64>,
    attempts: Vec<i32>,
    statuses: Vec<Option<i32>>,
    errors: Vec<Option<String>>,
    methods: Vec<&'a str>,
    targets: Vec<&'a str>,
    headers: Vec<&'a [u8]>,
    bodies: Vec<&'a [u8]>,
    leased: Vec<bool>,
}

impl<'a> NewRows<'a> {
    fn add(&mut self, row: &'a NewRow, after: Duration, failure: Option<&Failure>) {
        let request = &row.request;
        self.ids.push(request.id);
        self.received_at.push(to_storable(request.received_at));
        self.after.push(to_seconds(after));
        self.attempts.push(to_i32(row.attempt));
        self.statuses.push(failure.and_then(to_status));
        self.errors.push(failure.map(to_text));
        self.methods.push(&request.method);
        self.targets.push(&request.target);
        self.headers.push(request.headers.as_bytes());
        self.bodies.push(&request.body);
        self.leased.push(matches!(row.fate, Fate::Leased(_)));
    }

    fn parameters(&self) -> [Parameter<'_>; 11] {
        [
            (&self.ids, Type::UUID_ARRAY),
            (&self.received_at, Type::TIMESTAMPTZ_ARRAY),
            (&self.after, Type::FLOAT8_ARRAY),
            (&self.attempts, Type::INT4_ARRAY),
            (&self.statuses, Type::INT4_ARRAY),
            (&self.errors, Type::TEXT_ARRAY),
            (&self.methods, Type::TEXT_ARRAY),
            (&self.targets, Type::TEXT_ARRAY),
            (&self.headers, Type::BYTEA_ARRAY),
            (&self.bodies, Type::BYTEA_ARRAY),
            (&self.leased, Type::BOOL_ARRAY),
        ]
    }
}

/// Claims in order from `start`; without one, as rows come. With a `shared_rate`, by its tokens.
fn claim(
    client: &mut Client,
    class: Class,
    start: Option<&Start>,
    shared_rate: Option<u32>,
    (limit, bytes_max, lease): (usize, usize, Duration),
) -> Result<Claim, Fault> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let bytes_max = i64::try_from(bytes_max).unwrap_or(i64::MAX);
    let lease = to_seconds(lease);
    let begun = Instant::now();
    let from = start.and_then(|start| start.get(begun));
    let parameters: [Parameter<'_>; 4] = [
        (&limit, Type::INT8),
        (&lease, Type::FLOAT8),
        (&bytes_max, Type::INT8),
        (&from, Type::TIMESTAMPTZ),
    ];
    let (rows, held_back) = match (shared_rate, start) {
        (Some(rate), _) => tokens::claim(client, class, start.is_some(), &parameters, limit, rate)?,
        (None, Some(_)) => (client.query_typed(CLAIM.of(class), &parameters)?, None),
        (None, None) => {
            let rows = client.query_typed(CLAIM_UNORDERED.of(class), &parameters)?;
            (rows, None)
        }
    };
    let last_due = rows.iter().filter_map(|row| row.try_get("due_at").ok());
    if let (Some(start), Some(last_due)) = (start, last_due.max()) {
        start.note(from, begun.elapsed(), last_due);
    }
    let claim = sort_out(client, rows)?;
    Ok(Claim { held_back, ..claim })
}

/// Reads claimed rows; buries those that cannot be read.
fn sort_out(client: &mut Client, rows: Vec<Row>) -> Result<Claim, Fault> {
    let mut claimed = Vec::with_capacity(rows.len());
    let mut unreadable = Outcomes::default();
    for row in rows {
        match read(&row) {
            Ok(readable) => claimed.push((row.try_get::<_, SystemTime>("due_at").ok(), readable)),
            Err(why) => unreadable.add(
                row.try_get("id")?,
                row.try_get("attempt")?,
                &Decision::Attempted(Verdict::Bury(Failure {
                    status: None,
                    error: format!("row cannot be read: {why}"),
                })),
            ),
        }
    }
    let buried = if unreadable.is_empty() {
        0
    } else {
        unreadable.settle(client)?.buried
    };
    // The order in which an UPDATE returns its rows is not defined.
    claimed.sort_by_key(|(due_at, row)| (*due_at, row.request.id));
    Ok(Claim {
        rows: claimed.into_iter().map(|(_, row)| row).collect(),
        unreadable: buried,
        held_back: None,
    })
}

/// Reads a row that `CLAIM` returned.
///
/// # Errors
/// Why the row is none that this program could have written.
fn read(row: &Row) -> Result<Claimed, String> {
    let describe = |error: ::postgres::Error| error.to_string();
    let headers = row.try_get("headers").map_err(describe)?;
    let request = Request {
        id: row.try_get("id").map_err(describe)?,
        received_at: row.try_get("received_at").map_err(describe)?,
        method: row.try_get("method").map_err(describe)?,
        target: row.try_get("target").map_err(describe)?,
        headers: Headers::from_bytes(headers).map_err(|error| error.to_string())?,
        body: row.try_get("body").map_err(describe)?,
    };
    request.check().map_err(|error| error.to_string())?;
    let attempt: i32 = row.try_get("attempt").map_err(describe)?;
    match u32::try_from(attempt) {
        Ok(attempt) if attempt >= 1 => Ok(Claimed { request, attempt }),
        _ => Err("attempt is out of range".into()),
    }
}

fn settle(client: &mut Client, settlements: &[Settlement]) -> Result<Settled, Fault> {
    let mut outcomes = Outcomes::default();
    for settlement in settlements {
        outcomes.add(
            settlement.id,
            to_i32(settlement.attempt),
            &settlement.decision,
        );
    }
    let mut settled = outcomes.settle(client)?;
    let changed = settled.delivered + settled.later + settled.buried + settled.released;
    settled.stale = (settlements.len() as u64).saturating_sub(changed);
    Ok(settled)
}

/// Settlements, sorted by what they do to the row, one array for each column.
#[derive(Default)]
struct Outcomes {
    named: std::collections::HashSet<(Uuid, i32)>,
    delivered: (Vec<Uuid>, Vec<i32>),
    later: (Vec<Uuid>, Vec<i32>),
    later_after: Vec<f64>,
    later_failures: (Vec<Option<i32>>, Vec<String>),
    buried: (Vec<Uuid>, Vec<i32>),
    buried_failures: (Vec<Option<i32>>, Vec<String>),
    released: (Vec<Uuid>, Vec<i32>),
}

impl Outcomes {
    /// Takes a settlement, unless one before it names the same lease.
    fn add(&mut self, id: Uuid, attempt: i32, decision: &Decision) {
        if !self.named.insert((id, attempt)) {
            return;
        }
        let (ids, attempts) = match decision {
            Decision::Attempted(Verdict::Delivered) => &mut self.delivered,
            Decision::Attempted(Verdict::Later { after, failure }) => {
                self.later_after.push(to_seconds(*after));
                self.later_failures.0.push(to_status(failure));
                self.later_failures.1.push(to_text(failure));
                &mut self.later
            }
            Decision::Attempted(Verdict::Bury(failure)) => {
                self.buried_failures.0.push(to_status(failure));
                self.buried_failures.1.push(to_text(failure));
                &mut self.buried
            }
            Decision::Release => &mut self.released,
        };
        ids.push(id);
        attempts.push(attempt);
    }

    fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Counts the rows changed; `stale` is not known here.
    fn settle(&self, client: &mut Client) -> Result<Settled, Fault> {
        let row = client.query_typed_one(
            SETTLE,
            &[
                (&self.delivered.0, Type::UUID_ARRAY),
                (&self.delivered.1, Type::INT4_ARRAY),
                (&self.later.0, Type::UUID_ARRAY),
                (&self.later.1, Type::INT4_ARRAY),
                (&self.later_after, Type::FLOAT8_ARRAY),
                (&self.later_failures.0, Type::INT4_ARRAY),
                (&self.later_failures.1, Type::TEXT_ARRAY),
                (&self.buried.0, Type::UUID_ARRAY),
                (&self.buried.1, Type::INT4_ARRAY),
                (&self.buried_failures.0, Type::INT4_ARRAY),
                (&self.buried_failures.1, Type::TEXT_ARRAY),
                (&self.released.0, Type::UUID_ARRAY),
                (&self.released.1, Type::INT4_ARRAY),
            ],
        )?;
        Ok(Settled {
            delivered: count(&row, 0)?,
            later: count(&row, 1)?,
            buried: count(&row, 2)?,
            released: count(&row, 3)?,
            stale: 0,
        })
    }
}

fn purge(client: &mut Client, older_than: Duration, limit: usize) -> Result<u64, Fault> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let bytes_max = i64::try_from(BATCH_BYTES_MAX).unwrap_or(i64::MAX);
    let purged = client.execute_typed(
        PURGE,
        &[
            (&limit, Type::INT8),
            (&to_seconds(older_than), Type::FLOAT8),
            (&bytes_max, Type::INT8),
        ],
    )?;
    Ok(purged)
}

fn sample(client: &mut Client) -> Result<Sample, Fault> {
    let row = client.query_typed_one(SAMPLE, &[])?;
    let (all, leased) = (count(&row, 0)?, count(&row, 1)?);
    let oldest_ms: Option<i64> = row.try_get(3)?;
    Ok(Sample {
        waiting: all.saturating_sub(leased),
        leased,
        dead: count(&row, 2)?,
        // A sender's clock may be ahead of the server's.
        oldest: oldest_ms.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or(0))),
        is_paused: row.try_get(4)?,
    })
}

fn count(row: &Row, column: usize) -> Result<u64, Fault> {
    Ok(row.try_get::<_, i64>(column)?.unsigned_abs())
}

fn to_i32(attempt: u32) -> i32 {
    i32::try_from(attempt).unwrap_or(i32::MAX)
}

fn to_seconds(duration: Duration) -> f64 {
    duration.min(DELAY_MAX).as_secs_f64()
}

fn to_status(failure: &Failure) -> Option<i32> {
    failure.status.map(i32::from)
}

/// A text value holds everything but NUL.
fn to_text(failure: &Failure) -> String {
    failure.error.replace('\0', "")
}

/// What lies outside of 1970 to 9999 comes from a broken clock.
fn to_storable(time: SystemTime) -> SystemTime {
    let last = SystemTime::UNIX_EPOCH + Duration::from_secs(UNIX_SECONDS_MAX);
    time.clamp(SystemTime::UNIX_EPOCH, last)
}
