//! The queue's contract: what a store keeps, and what the rest of the program may ask of it.
//!
//! Owns the types; [`sqlite`] and [`postgres`] keep the rows. Every change is one short
//! transaction: a claim is a lease, never a delete, and nothing is held while a request is sent.

pub mod batch;
pub mod depth;
pub mod doubts;
pub mod health;
pub mod heartbeat;
pub mod identity;
pub mod migrate;
pub mod mover;
pub mod operate;
pub mod poller;
pub mod postgres;
pub mod probes;
pub mod settler;
pub mod shares;
pub mod spool;
pub mod sqlite;
pub mod writer;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use self::doubts::{Broken, NotAppended};
use crate::request::Request;
use crate::settle::{Failure, Verdict};

/// Rows in one claim, one insert or one settlement, at most.
pub const BATCH_ROWS_MAX: usize = 500;

/// Body and header bytes that a batch has at most, but for one of a single row.
pub const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Probes are looked for among so many rows: what that costs does not grow with the queue.
pub const PROBE_ROWS_MAX: usize = 500;

/// An instance that has not been heard of for so long is dead.
pub const SILENCE: Duration = Duration::from_secs(10);

/// Where requests wait. All durations count from the store's own clock, so that several
/// instances on one store need not agree on the time.
pub trait Store: fmt::Debug + Send + Sync {
    /// Commits all rows or none. A row whose id is already there is left as it is, so a
    /// caller who does not know whether the last try was committed may simply repeat it.
    ///
    /// # Errors
    /// [`StoreError`]; the rows may have been committed if the connection broke during the commit.
    fn append(&self, rows: &[NewRow]) -> Result<(), StoreError>;

    /// As [`Store::append`], in a time of the caller's where the store goes by one, and with what
    /// is known of rows that were not committed in it.
    ///
    /// # Errors
    /// [`NotAppended`].
    fn append_within(
        &self,
        rows: &[NewRow],
        _within: Duration,
        _broken: Broken,
    ) -> Result<(), NotAppended> {
        self.append(rows).map_err(NotAppended::over)
    }

    /// Those of the rows with these ids that are there, be they waiting, leased or dead.
    ///
    /// # Errors
    /// [`StoreError`].
    fn present(&self, ids: &[Uuid]) -> Result<HashSet<Uuid>, StoreError>;

    /// Leases up to `limit` rows of a class that are due, oldest due first (in any order without
    /// `db.use_index`): counts the attempt and hides the row for `lease`. Takes no more
    /// rows than have `bytes_max` bytes together (see [`Request::bytes`]); the first is taken in
    /// any case.
    /// A row that cannot be read is moved to the dead letters instead. Nothing while the queue is
    /// paused.
    ///
    /// # Errors
    /// [`StoreError`]; rows leased all the same are due again when the lease is over.
    fn claim(
        &self,
        class: Class,
        limit: usize,
        bytes_max: usize,
        lease: Duration,
    ) -> Result<Claim, StoreError>;

    /// Leases rows, as [`claim`](Store::claim) does, that are to find out whether the destination
    /// works. Of up to [`PROBE_ROWS_MAX`] due ones at a spot in the queue, whatever `db.use_index`
    /// says, those tried least are taken.
    ///
    /// # Errors
    /// As [`claim`](Store::claim).
    fn claim_probes(&self, wanted: &Probe<'_>, lease: Duration) -> Result<Claim, StoreError>;

    /// Carries out what was decided about claimed rows. A settlement that does not match the
    /// row's current attempt changes nothing: someone else has claimed it since.
    ///
    /// # Errors
    /// [`StoreError`]; repeating the batch is safe.
    fn settle(&self, settlements: &[Settlement]) -> Result<Settled, StoreError>;

    /// Deletes dead letters that died longer ago than `older_than`, oldest first: up to `limit`,
    /// and no further one once their bodies have [`BATCH_BYTES_MAX`] together. The first is
    /// deleted in any case, so none is left when it returns 0; but one that another instance is
    /// deleting is left to it.
    ///
    /// # Errors
    /// [`StoreError`]; the rows may be gone if the connection broke during the commit.
    fn purge(&self, older_than: Duration, limit: usize) -> Result<u64, StoreError>;

    /// Counts the rows. Costs a scan: for a sampler, not for every scrape.
    ///
    /// # Errors
    /// [`StoreError`].
    fn sample(&self) -> Result<Sample, StoreError>;

    /// Whether an operator has paused the queue, as [`Sample::is_paused`], at once.
    ///
    /// # Errors
    /// [`StoreError`].
    fn is_paused(&self) -> Result<bool, StoreError>;

    /// Which other process serves it, too, though it is for one only, if so.
    fn other_process(&self) -> Option<String> {
        None
    }

    /// Whether other instances may serve it, too: then each has to [`beat`](Store::beat).
    fn is_shared(&self) -> bool {
        false
    }

    /// The name by which the store knows this instance, if it has one for each.
    fn instance(&self) -> Option<Uuid> {
        None
    }

    /// Tells the other instances that this one is there. What belongs to one that has not told so
    /// for [`SILENCE`] is due again, and can no longer be settled by it, though it comes back; an
    /// instance that has been silent itself meanwhile leaves that to others. Returns how many rows
    /// that were.
    ///
    /// # Errors
    /// [`StoreError`]; repeating it is safe.
    fn beat(&self) -> Result<u64, StoreError> {
        Ok(0)
    }

    /// Tells them that this one ends. What it still has leased is then due, as if it were dead.
    ///
    /// # Errors
    /// [`StoreError`]; then they take it for dead after a while.
    fn leave(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Why it should get no new rows though it works, if so: its disk is nearly full. What was
    /// acknowledged before may be appended all the same.
    fn shortage(&self) -> Option<String> {
        None
    }

    /// Why nobody needs to wait for it, if so: it is at an operation for longer than that may take.
    fn hangs(&self) -> Option<StoreError> {
        None
    }

    /// Ends the use of the store; nothing succeeds afterwards.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if what it held is lost, so that somebody must be told; any other if
    /// it was not closed in good order.
    fn close(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Rows by the attempts made so far: those that fail again and again must not keep others waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The first or second attempt is to be made.
    Fresh,
    /// The third or a later one.
    Retried,
}

impl Class {
    /// Of a row whose attempt number `attempt` is to be made.
    pub fn of(attempt: u32) -> Class {
        if attempt <= 2 {
            Class::Fresh
        } else {
            Class::Retried
        }
    }
}

/// Where in the queue to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spot {
    /// Where the rows are that have been due for longest.
    Front,
    /// Where those are that have just become due.
    End,
    /// At some of all, whichever. May miss what is there.
    Anywhere,
}

/// Which rows may be probes.
#[derive(Debug, Clone, Copy)]
pub struct Probe<'a> {
    pub class: Class,
    pub spot: Spot,
    pub limit: usize,
    /// As for a claim.
    pub bytes_max: usize,
    /// Not these.
    pub except: &'a [Uuid],
}

/// One of something for each class.
#[derive(Debug, Clone)]
pub struct ByClass<T> {
    pub fresh: T,
    pub retried: T,
}

impl<T> ByClass<T> {
    pub fn of(&self, class: Class) -> &T {
        match class {
            Class::Fresh => &self.fresh,
            Class::Retried => &self.retried,
        }
    }
}

/// A row to be appended.
#[derive(Debug, Clone)]
pub struct NewRow {
    pub request: Arc<Request>,
    /// Attempts made so far, or with [`Fate::Leased`] about to be made.
    pub attempt: u32,
    pub fate: Fate,
}

/// Where an appended row goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Waits, and is due `after` from now. `failure` tells how the last attempt ended.
    Due {
        after: Duration,
        failure: Option<Failure>,
    },
    /// Leased to whoever appends it, as a claim would do it, for so long; the attempt that the row
    /// counts is about to be made.
    Leased(Duration),
    /// Straight to the dead letters.
    Dead(Failure),
}

/// The result of one claim.
#[derive(Debug, Default)]
pub struct Claim {
    pub rows: Vec<Claimed>,
    /// Rows moved to the dead letters because they could not be read.
    pub unreadable: u64,
    /// More rows are due, but a rate that instances share kept them back: asking sooner is in vain.
    pub held_back: Option<Duration>,
}

/// A leased row. `attempt` counts the one to be made now: at least 1.
#[derive(Debug, Clone)]
pub struct Claimed {
    pub request: Request,
    pub attempt: u32,
}

/// What was decided about one claimed row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settlement {
    pub id: Uuid,
    /// The attempt that the claim counted: names the lease this settles.
    pub attempt: u32,
    pub decision: Decision,
}

/// See [`Settlement`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// An attempt was made.
    Attempted(Verdict),
    /// No attempt was made: due at once, and the attempt is not counted.
    Release,
}

/// Rows changed by a [`Store::settle`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settled {
    pub delivered: u64,
    pub later: u64,
    pub buried: u64,
    pub released: u64,
    /// Settlements that matched no row: claimed by another since, or settled before.
    pub stale: u64,
    /// An earlier try of the same call may have settled some of those: its answer was lost.
    pub is_repeat: bool,
}

/// How many rows there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sample {
    /// Due now or later, not leased.
    pub waiting: u64,
    pub leased: u64,
    pub dead: u64,
    /// Time since receipt of the oldest row that waits or is leased.
    pub oldest: Option<Duration>,
    /// Nobody claims anything at the moment.
    pub is_paused: bool,
}

/// Why a store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// No connection to it, no answer in time, or it takes nothing from anybody (a full disk).
    /// What was asked may be asked again as it is.
    Unavailable(String),
    /// Reached, and it works, but it did not take what this one operation brought: a part of that,
    /// or another operation, may succeed. Says nothing about the store.
    Refused(String),
    /// Reached, and it works, but this operation met another's lock, or a limit of time there. It may
    /// be asked again, in smaller parts perhaps. Says nothing about what it brought, either.
    Busy(String),
    /// Opened, but its schema is not one this version can work with. Needs the operator.
    Schema(String),
    /// What it holds cannot be relied on any more: the file is damaged, or gone. Needs the
    /// operator; nothing may rest on it until then.
    Damaged(String),
}

impl StoreError {
    /// Whether it tells that the store does not work, for whoever asks.
    pub fn is_outage(&self) -> bool {
        !matches!(self, StoreError::Refused(_) | StoreError::Busy(_))
    }

    /// Whether it is about what the operation brought, and would be the same another time.
    pub fn is_refusal(&self) -> bool {
        matches!(self, StoreError::Refused(_))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Unavailable(why) => write!(f, "store not available: {why}"),
            StoreError::Refused(why) => write!(f, "store refused: {why}"),
            StoreError::Busy(why) => write!(f, "store busy: {why}"),
            StoreError::Schema(why) => write!(f, "store schema: {why}"),
            StoreError::Damaged(why) => write!(f, "store damaged: {why}"),
        }
    }
}

impl std::error::Error for StoreError {}
