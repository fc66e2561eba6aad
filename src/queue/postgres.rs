//! The Postgres store: one table that several instances share.
//!
//! Works behind PgBouncer in transaction mode: no named statement, no session state, no session
//! lock. Nearly every operation is one statement, and so one round trip and one transaction; all
//! times are the server's.

mod adopt;
mod append;
mod connections;
mod errors;
mod hosts;
pub mod inspect;
mod leases;
mod operate;
mod schema;
mod session;
mod settle;
mod start;
mod statements;
mod stream;
#[cfg(feature = "tls")]
mod tls;
mod tokens;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use ::postgres::Row;
use ::postgres::types::{ToSql, Type};
use uuid::Uuid;

use super::doubts::{self, Broken, End, NotAppended};
use super::migrate::{Policy, Step, Version};
use super::{
    BATCH_BYTES_MAX, ByClass, Claim, Claimed, Class, Decision, Fate, NewRow, PROBE_ROWS_MAX, Probe,
    SILENCE, Sample, Settled, Settlement, Spot, Store, StoreError,
};
use crate::config::PostgresServer;
use crate::request::{Headers, Request};
use crate::settle::{Failure, Verdict};
use connections::Connections;
use errors::{Fault, is_broken};
use leases::Leases;
use session::Session;
use settle::Outcomes;
use start::Start;
use statements::{
    BEAT, CLAIM, CLAIM_BY_TOKENS, CLAIM_BY_TOKENS_UNORDERED, CLAIM_UNORDERED, GIVE_BACK_UNKNOWN,
    IS_PAUSED, LEAVE, PRESENT, PROBE, PROBE_ANYWHERE, PROBE_ANYWHERE_BY_TOKENS, PROBE_BY_TOKENS,
    PROBE_END, PROBE_END_BY_TOKENS, PURGE, SAMPLE, TAKE_OVER,
};

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
    leases: Leases,
    timeout: Duration,
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
            connections: Connections::new(&server, max_connections, timeout),
            use_index,
            starts: ByClass {
                fresh: Arc::default(),
                retried: Arc::default(),
            },
            leases: Leases::new(SILENCE),
            timeout,
            shared_rate: None,
        }
    }

    /// Takes an instance for dead that has said nothing for so long.
    #[must_use]
    pub fn with_silence(self, silence: Duration) -> PostgresStore {
        PostgresStore {
            leases: Leases::new(silence),
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
        operation: impl Fn(&mut Session) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.connections.run(timeout, operation)
    }

    fn shared_rate(&self) -> Option<u32> {
        let rate = self.shared_rate.as_ref();
        rate.map(|rate| rate.load(Ordering::Relaxed))
    }

    /// Runs a claim for this instance, and remembers what it leased. Rows whose answer comes too late
    /// are given back before the next claim, by whoever is about to make it: nobody else may, as the
    /// same attempt of them may be leased again by then.
    fn claiming(
        &self,
        lease: Duration,
        operation: impl Fn(&mut Session, Uuid) -> Result<Claim, Fault> + Send + 'static,
    ) -> Result<Claim, StoreError> {
        let _claiming = self.leases.claiming();
        self.be_heard(self.timeout)?;
        self.give_back_unknown()?;
        let instance = self.leases.instance;
        let until = end_of(lease);
        let tries = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&tries);
        let result = self.connections.run(self.timeout, move |session| {
            counted.fetch_add(1, Ordering::Relaxed);
            operation(session, instance)
        });
        if result.is_err() || tries.load(Ordering::Relaxed) > 1 {
            self.leases.lost();
        }
        if let Ok(claim) = &result {
            let rows = claim.rows.iter();
            let leases = rows.map(|row| (row.request.id, row.attempt));
            self.leases.hold(leases, until);
        }
        result
    }

    /// Tells that this instance is there. Returns whether another is not, as far as that can be told.
    fn tell(&self, timeout: Duration) -> Result<bool, StoreError> {
        let began = Instant::now();
        let (instance, silence) = (self.leases.instance, self.leases.silence.as_secs_f64());
        let is_any_silent = self.run(timeout, move |session| {
            let parameters = [(&instance as _, Type::UUID), (&silence as _, Type::FLOAT8)];
            Ok(session.query_typed_one(BEAT, &parameters)?.try_get(0)?)
        })?;
        Ok(self.leases.heard(began) && is_any_silent)
    }

    fn append_rows(
        &self,
        rows: &[NewRow],
        within: Duration,
        broken: Broken,
    ) -> Result<(), NotAppended> {
        let (instance, rows) = (self.leases.instance, rows.to_vec());
        let (teller, ending) = doubts::ending();
        let reached_again = Arc::new(AtomicBool::new(false));
        let is_reached = Arc::clone(&reached_again);
        let deadline = Instant::now() + within;
        let has_broken = AtomicBool::new(false);
        let result = self.run(within, move |session| {
            if has_broken.load(Ordering::Relaxed) && broken == Broken::Tell {
                is_reached.store(true, Ordering::Release);
                let why = "the connection broke before an answer";
                return Err(Fault::Store(StoreError::Unavailable(why.into())));
            }
            teller.begin();
            let result = append::append(session, &rows, instance);
            match &result {
                Ok(()) => teller.tell(End::Committed),
                Err(fault) if is_broken(fault) => {
                    has_broken.store(true, Ordering::Relaxed);
                    teller.broke();
                }
                Err(_) => teller.rolled_back(),
            }
            result
        });
        let Err(error) = result else { return Ok(()) };
        let unreachable = match ending.is_running() {
            true => None,
            false => self.connections.cannot_connect(),
        };
        // Without an answer in time, only a connection that cannot be made tells that it is away.
        let is_in_time = Instant::now() < deadline && !reached_again.load(Ordering::Acquire);
        Err(NotAppended {
            is_away: error.is_outage() && (is_in_time || unreachable.is_some()),
            error: match unreachable {
                Some(unreachable) if !is_in_time => unreachable,
                _ => error,
            },
            ending,
        })
    }

    /// Before anything is leased to it: whose leases are taken over has to be known.
    fn be_heard(&self, timeout: Duration) -> Result<(), StoreError> {
        match self.leases.must_beat(Instant::now()) {
            true => self.tell(timeout).map(drop),
            false => Ok(()),
        }
    }

    /// Gives back what lost claims have leased to us, if there may be any.
    fn give_back_unknown(&self) -> Result<(), StoreError> {
        if !self.leases.must_look(Instant::now()) {
            return Ok(());
        }
        let _not_appending = self.leases.not_appending();
        let known = self.leases.known();
        let instance = self.leases.instance;
        let count = self.run(self.timeout, move |session| {
            let parameters = [
                (&instance as _, Type::UUID),
                (&known as _, Type::UUID_ARRAY),
            ];
            count(&session.query_typed_one(GIVE_BACK_UNKNOWN, &parameters)?, 0)
        })?;
        self.leases.looked(Instant::now());
        if count > 0 {
            log::warn!(count; "gave back rows whose claim was never answered");
        }
        Ok(())
    }
}

/// Applies what is pending to a database, however long that takes; `timeout` is for connecting.
///
/// # Errors
/// [`StoreError`]; nothing has changed then.
pub fn migrate(server: &PostgresServer, timeout: Duration) -> Result<Vec<Step>, StoreError> {
    let mut link = connections::connect(server, timeout)?;
    let session = &mut link.session;
    let described = |result: Result<_, Fault>| result.map_err(errors::describe);
    described(schema::server(session))?.require()?;
    schema::migrate(session, true).map_err(errors::describe)
}

/// Reads the version of a database's schema, and changes nothing.
///
/// # Errors
/// [`StoreError`].
pub fn version(server: &PostgresServer, timeout: Duration) -> Result<Version, StoreError> {
    let mut link = connections::connect(server, timeout)?;
    let session = &mut link.session;
    schema::server(session)
        .map_err(errors::describe)?
        .require()?;
    schema::version(session).map_err(errors::describe)
}

impl Store for PostgresStore {
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError> {
        self.append_within(rows, self.timeout, Broken::Repeat)
            .map_err(|not| not.error)
    }

    fn append_within(
        &self,
        rows: &[NewRow],
        within: Duration,
        broken: Broken,
    ) -> Result<(), NotAppended> {
        let leased: Vec<_> = rows.iter().filter_map(leased).collect();
        let longest = leased.iter().map(|(_, lease)| *lease).max();
        let Some(longest) = longest else {
            return self.append_rows(rows, within, broken);
        };
        let begun = Instant::now();
        self.be_heard(within).map_err(NotAppended::not_begun)?;
        let _appending = self.leases.appending();
        let leases = leased.iter().map(|(lease, _)| *lease);
        let new = self.leases.hold(leases, end_of(longest));
        let result = self.append_rows(rows, within.saturating_sub(begun.elapsed()), broken);
        if result.is_err() {
            self.leases.let_go(new.into_iter());
            self.leases.lost();
        }
        result
    }

    fn present(&self, ids: &[Uuid]) -> Result<HashSet<Uuid>, StoreError> {
        let ids = ids.to_vec();
        self.run(self.timeout, move |session| {
            let rows = session.query_typed(PRESENT, &[(&ids, Type::UUID_ARRAY)])?;
            let ids = rows.iter().map(|row| row.try_get(0));
            Ok(ids.collect::<Result<_, _>>()?)
        })
    }

    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError> {
        let start = self.use_index.then(|| Arc::clone(self.starts.of(class)));
        let shared_rate = self.shared_rate();
        self.claiming(lease, move |session, instance| {
            claim(
                session,
                class,
                start.as_deref(),
                shared_rate,
                (limit, bytes_max, lease),
                instance,
            )
        })
    }

    fn claim_probes(&self, wanted: &Probe<'_>, lease: Duration) -> Result<Claim, StoreError> {
        let shared_rate = self.shared_rate();
        let statements = match (wanted.spot, shared_rate) {
            (Spot::Front, None) => PROBE,
            (Spot::End, None) => PROBE_END,
            (Spot::Anywhere, None) => PROBE_ANYWHERE,
            (Spot::Front, Some(_)) => PROBE_BY_TOKENS,
            (Spot::End, Some(_)) => PROBE_END_BY_TOKENS,
            (Spot::Anywhere, Some(_)) => PROBE_ANYWHERE_BY_TOKENS,
        };
        let statement = *statements.of(wanted.class);
        let (limit, bytes_max) = (wanted.limit, wanted.bytes_max);
        let except = wanted.except.to_vec();
        self.claiming(lease, move |session, instance| {
            let claimed = (limit, bytes_max, lease);
            claim_probes(session, statement, shared_rate, claimed, &except, instance)
        })
    }

    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        let (instance, owned) = (self.leases.instance, settlements.to_vec());
        let has_broken = AtomicBool::new(false);
        let settled = self.run(self.timeout, move |session| {
            let is_repeat = has_broken.load(Ordering::Relaxed);
            let settled = settle::settle(session, &owned, instance);
            if settled.as_ref().is_err_and(is_broken) {
                has_broken.store(true, Ordering::Relaxed);
            }
            Ok(Settled {
                is_repeat,
                ..settled?
            })
        })?;
        let leases = settlements.iter();
        self.leases
            .let_go(leases.map(|settlement| (settlement.id, settlement.attempt)));
        Ok(settled)
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError> {
        self.run(self.timeout, move |session| {
            purge(session, older_than, limit)
        })
    }

    fn sample(&self) -> Result<Sample, StoreError> {
        self.run(self.timeout, sample)
    }

    fn is_paused(&self) -> Result<bool, StoreError> {
        self.run(self.timeout, |session| {
            let row = session.query_typed_one(IS_PAUSED, &[])?;
            Ok(row.try_get(0)?)
        })
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn instance(&self) -> Option<Uuid> {
        Some(self.leases.instance)
    }

    fn beat(&self) -> Result<u64, StoreError> {
        if !self.tell(self.timeout)? {
            return Ok(0);
        }
        let (instance, silence) = (self.leases.instance, self.leases.silence.as_secs_f64());
        self.run(self.timeout, move |session| {
            let parameters = [(&silence as _, Type::FLOAT8), (&instance as _, Type::UUID)];
            count(&session.query_typed_one(TAKE_OVER, &parameters)?, 0)
        })
    }

    fn leave(&self) -> Result<(), StoreError> {
        let (instance, has_leases) = (self.leases.instance, self.leases.may_have_some());
        self.run(self.timeout, move |session| {
            let parameters = [(&instance as _, Type::UUID), (&has_leases as _, Type::BOOL)];
            session.execute_typed(LEAVE, &parameters)?;
            Ok(())
        })
    }
}

/// The lease with which a row is appended, if with one.
fn leased(row: &NewRow) -> Option<((Uuid, u32), Duration)> {
    match row.fate {
        Fate::Leased(lease) => Some(((row.request.id, row.attempt), lease)),
        Fate::Due { .. } | Fate::Dead(_) => None,
    }
}

/// When a lease that begins now is over, or soon after.
fn end_of(lease: Duration) -> Instant {
    Instant::now() + lease.min(DELAY_MAX)
}

/// Claims in order from `start`; without one, as rows come. With a `shared_rate`, by its tokens.
fn claim(
    session: &mut Session,
    class: Class,
    start: Option<&Start>,
    shared_rate: Option<u32>,
    (limit, bytes_max, lease): (usize, usize, Duration),
    instance: Uuid,
) -> Result<Claim, Fault> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let bytes_max = i64::try_from(bytes_max).unwrap_or(i64::MAX);
    let lease = to_seconds(lease);
    let begun = Instant::now();
    let from = start.and_then(|start| start.get(begun));
    let rate = f64::from(shared_rate.unwrap_or_default());
    let parameters: [Parameter<'_>; 6] = [
        (&limit, Type::INT8),
        (&lease, Type::FLOAT8),
        (&bytes_max, Type::INT8),
        (&from, Type::TIMESTAMPTZ),
        (&instance, Type::UUID),
        (&rate, Type::FLOAT8),
    ];
    let statements = match (shared_rate, start) {
        (Some(_), Some(_)) => CLAIM_BY_TOKENS,
        (Some(_), None) => CLAIM_BY_TOKENS_UNORDERED,
        (None, Some(_)) => CLAIM,
        (None, None) => CLAIM_UNORDERED,
    };
    let statement = statements.of(class);
    let (rows, held_back) = match shared_rate {
        Some(_) => tokens::claim(session, statement, &parameters, limit, rate)?,
        None => (session.query_typed(statement, &parameters[..5])?, None),
    };
    let last_due = rows.iter().filter_map(|row| row.try_get("due_at").ok());
    if let (Some(start), Some(last_due)) = (start, last_due.max()) {
        start.note(from, begun.elapsed(), last_due);
    }
    let claim = sort_out(session, rows, instance)?;
    Ok(Claim { held_back, ..claim })
}

/// Claims none of `except` with a statement of [`PROBE`] or one of its kind.
fn claim_probes(
    session: &mut Session,
    statement: &str,
    shared_rate: Option<u32>,
    (limit, bytes_max, lease): (usize, usize, Duration),
    except: &[Uuid],
    instance: Uuid,
) -> Result<Claim, Fault> {
    let to_i64 = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let rate = f64::from(shared_rate.unwrap_or_default());
    let parameters: [Parameter<'_>; 8] = [
        (&to_i64(limit), Type::INT8),
        (&to_seconds(lease), Type::FLOAT8),
        (&to_i64(bytes_max.max(1)), Type::INT8),
        (&None::<SystemTime>, Type::TIMESTAMPTZ),
        (&instance, Type::UUID),
        (&rate, Type::FLOAT8),
        (&except, Type::UUID_ARRAY),
        // Those that are passed over count as well.
        (&to_i64(PROBE_ROWS_MAX + except.len()), Type::INT8),
    ];
    let (rows, held_back) = match shared_rate {
        Some(_) => tokens::claim(session, statement, &parameters, to_i64(limit), rate)?,
        None => (session.query_typed(statement, &parameters)?, None),
    };
    let claim = sort_out(session, rows, instance)?;
    Ok(Claim { held_back, ..claim })
}

/// Reads claimed rows; buries those that cannot be read.
fn sort_out(session: &mut Session, rows: Vec<Row>, instance: Uuid) -> Result<Claim, Fault> {
    let mut claimed = Vec::with_capacity(rows.len());
    let mut unreadable = Outcomes::default();
    for row in rows {
        match read(&row) {
            Ok(readable) => {
                session.carries(readable.request.bytes());
                claimed.push((row.try_get::<_, SystemTime>("due_at").ok(), readable));
            }
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
        unreadable.settle(session, instance)?.buried
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

fn purge(session: &mut Session, older_than: Duration, limit: usize) -> Result<u64, Fault> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let bytes_max = i64::try_from(BATCH_BYTES_MAX).unwrap_or(i64::MAX);
    let purged = session.execute_typed(
        PURGE,
        &[
            (&limit, Type::INT8),
            (&to_seconds(older_than), Type::FLOAT8),
            (&bytes_max, Type::INT8),
        ],
    )?;
    Ok(purged)
}

fn sample(session: &mut Session) -> Result<Sample, Fault> {
    let row = session.query_typed_one(SAMPLE, &[])?;
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
