//! A queue to measure on, and what fills and empties it while nothing is measured.

use std::any::Any;
use std::cell::{Cell, RefCell, RefMut};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use asyncproxy::queue::postgres::PostgresStore;
use asyncproxy::queue::sqlite::SqliteStore;
use asyncproxy::queue::{
    BATCH_BYTES_MAX, BATCH_ROWS_MAX, Claimed, Class, Decision, Settled, Settlement, Store,
};
use asyncproxy::settle::Verdict;

use crate::bare::Database;
use crate::cluster;
use crate::rows::Body;

pub const TIMEOUT: Duration = Duration::from_secs(30);
/// As in the program, where the writer has one of them at most.
const CONNECTIONS: u32 = 2;
/// Longer than anything takes here.
const LEASE: Duration = Duration::from_secs(3600);
/// In the table, however many are appended: some 180 MB.
const ROWS_MAX: u64 = 20_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Sqlite,
    Postgres,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Sqlite => "sqlite",
            Kind::Postgres => "postgres",
        })
    }
}

/// The stores that can be measured here; says which one cannot.
pub fn installed(directory: &Path) -> Vec<Kind> {
    let can_enter = || cluster::run_until_we_end(r#"cd "$0""#, &[directory]).wait();
    if cluster::find_server_program("initdb").is_none() {
        eprintln!("postgres is left out: no initdb on this machine (install postgresql)");
    } else if !can_enter().unwrap().success() {
        // Run by root, the server has another account.
        eprintln!(
            "postgres is left out: its account cannot enter {} (STORE_BENCH_DIR names another)",
            directory.display()
        );
    } else {
        return vec![Kind::Sqlite, Kind::Postgres];
    }
    vec![Kind::Sqlite]
}

/// Where both stores keep their files: on a disk, unless the user says otherwise.
pub fn choose_directory() -> PathBuf {
    let asked = std::env::var_os("STORE_BENCH_DIR").map(PathBuf::from);
    let directory = asked.unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    std::fs::create_dir_all(&directory).unwrap();
    // The cluster's goes where temporary directories go.
    tempfile::env::override_temp_dir(&directory).unwrap();
    eprintln!("the stores are in {}", directory.display());
    directory
}

/// The disk without any store.
pub struct Disk(File);

impl Disk {
    pub fn open(directory: &Path) -> Disk {
        Disk(tempfile::tempfile_in(directory).unwrap())
    }

    /// The time it takes to have a page on it, as for a commit.
    pub fn sync(&self) -> Duration {
        let started = Instant::now();
        self.0.write_all_at(&[1; 8192], 0).unwrap();
        self.0.sync_data().unwrap();
        started.elapsed()
    }
}

/// All delivered.
pub fn settlements(claimed: &[Claimed]) -> Vec<Settlement> {
    decide(claimed, &Decision::Attempted(Verdict::Delivered))
}

fn decide(claimed: &[Claimed], decision: &Decision) -> Vec<Settlement> {
    let settlement = |claimed: &Claimed| Settlement {
        id: claimed.request.id,
        attempt: claimed.attempt,
        decision: decision.clone(),
    };
    claimed.iter().map(settlement).collect()
}

/// A store, and the way past it.
pub struct Queue {
    pub kind: Kind,
    pub store: Arc<dyn Store>,
    database: RefCell<Database>,
    /// The files, for as long as they are needed.
    _kept: Box<dyn Any>,
    /// Rows that wait while something is claimed.
    waiting: u64,
    /// Rows in the table, and the name of their body if exactly `waiting` have it.
    held: Cell<u64>,
    filled: Cell<Option<&'static str>>,
    /// Rows changed or deleted since the table was swept.
    changed: Cell<u64>,
}

impl Queue {
    pub fn open(kind: Kind, directory: &Path, waiting: u64) -> Queue {
        let (store, database, kept): (Arc<dyn Store>, _, Box<dyn Any>) = match kind {
            Kind::Sqlite => {
                let directory = tempfile::tempdir_in(directory).unwrap();
                let path = directory.path().join("queue.sqlite");
                let store = SqliteStore::new(path.clone(), true, TIMEOUT);
                // The first to come creates the schema.
                store.sample().unwrap();
                (
                    Arc::new(store),
                    Database::sqlite(&path),
                    Box::new(directory),
                )
            }
            Kind::Postgres => {
                let database = cluster::cluster().database();
                let config = database.keywords().parse().unwrap();
                let store = PostgresStore::new(config, CONNECTIONS, true, TIMEOUT);
                store.sample().unwrap();
                let client = database.client();
                (
                    Arc::new(store),
                    Database::postgres(client),
                    Box::new(database),
                )
            }
        };
        Queue {
            kind,
            store,
            database: RefCell::new(database),
            _kept: kept,
            waiting,
            held: Cell::new(0),
            filled: Cell::new(None),
            changed: Cell::new(0),
        }
    }

    pub fn database(&self) -> RefMut<'_, Database> {
        self.database.borrow_mut()
    }

    /// Sees to it that so many rows can be appended and the table does not get too large.
    pub fn make_room(&self, rows: u64) {
        self.filled.set(None);
        if self.held.get() + rows > ROWS_MAX {
            self.clear();
        }
        self.held.set(self.held.get() + rows);
    }

    fn clear(&self) {
        let mut database = self.database();
        database.clear();
        database.flush();
        self.held.set(0);
        self.filled.set(None);
        self.changed.set(0);
    }

    /// Sees to it that `waiting` rows with this body wait, and nothing else.
    pub fn fill(&self, body: &Body) {
        if self.filled.get() == Some(body.name) {
            return;
        }
        self.clear();
        self.append(body, self.waiting);
        self.held.set(self.waiting);
        self.filled.set(Some(body.name));
        let mut database = self.database();
        database.sweep();
        database.flush();
    }

    /// Appends as many rows as were deleted.
    pub fn replace(&self, body: &Body, rows: u64) {
        self.append(body, rows);
        self.note_changes(2 * rows);
    }

    fn append(&self, body: &Body, rows: u64) {
        let mut left = rows;
        while left > 0 {
            let batch = left.min(BATCH_ROWS_MAX as u64);
            self.store.append(&body.rows(batch)).unwrap();
            left -= batch;
        }
    }

    pub fn claim(&self, rows: u64) -> Vec<Claimed> {
        let limit = usize::try_from(rows).unwrap();
        let claim = self
            .store
            .claim(Class::Fresh, limit, BATCH_BYTES_MAX, LEASE)
            .unwrap();
        assert_eq!(claim.rows.len(), limit, "enough rows wait");
        claim.rows
    }

    pub fn settle(&self, settlements: &[Settlement]) {
        let expected = Settled {
            delivered: settlements.len() as u64,
            ..Settled::default()
        };
        assert_eq!(self.store.settle(settlements), Ok(expected));
    }

    /// Gives back what was claimed.
    pub fn release(&self, claimed: &[Claimed]) {
        for batch in decide(claimed, &Decision::Release).chunks(BATCH_ROWS_MAX) {
            let settled = self.store.settle(batch).unwrap();
            assert_eq!(settled.released, batch.len() as u64);
        }
        self.note_changes(2 * claimed.len() as u64);
    }

    /// Sweeps as often as the server would by itself, but not while something is measured.
    fn note_changes(&self, rows: u64) {
        self.changed.set(self.changed.get() + rows);
        if self.changed.get() > ROWS_MAX {
            self.database().sweep();
            self.changed.set(0);
        }
    }
}
