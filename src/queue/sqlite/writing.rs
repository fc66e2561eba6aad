//! The side of the thread that writes: the connection, and what is looked after beside it.
//!
//! Once a second, or between two operations: whether the file is still ours, how much room its disk
//! has, and now and then whether rows wait longer than any pause can be.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior, params};

use super::super::StoreError;
use super::Shared;
use super::disk::Disk;
use super::file::REMEDY;
use super::lock::{self, Lock, Ownership};
use super::rescue::{self, Saved};
use super::rows::add_ms;
use super::statements::{HAS_FAR, PULL_IN};
use super::watch::Watch;

const LOOK: Duration = Duration::from_secs(1);
const PULL_IN_INTERVAL: Duration = Duration::from_secs(60);

/// What an operation does to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Adds rows.
    Grows,
    /// Gets rid of some, or leads to it: may use the reserve.
    Drains,
}

#[derive(Debug)]
pub(super) struct Writing {
    pub(super) shared: Arc<Shared>,
    // Dropped in this order: see `watch`.
    connection: Option<Connection>,
    pub(super) watch: Option<Watch>,
    pub(super) ownership: Ownership,
    disk: Disk,
    look_at: Instant,
    pull_in_at: Instant,
    /// The file is not ours any more, and what it held is nowhere else.
    unsaved: Option<String>,
}

impl Writing {
    /// Opens nothing yet.
    pub(super) fn new(shared: Arc<Shared>) -> Writing {
        let now = Instant::now();
        Writing {
            disk: Disk::below(&shared.path),
            shared,
            connection: None,
            watch: None,
            ownership: Ownership::Unknown,
            look_at: now,
            pull_in_at: now,
            unsaved: None,
        }
    }

    /// Runs one write transaction. Where the disk is full and it leads to more room, the reserve is
    /// given up for it.
    pub(super) fn transact<T>(
        &mut self,
        kind: Kind,
        body: &dyn Fn(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        if let Some(fault) = self.shared.latched() {
            return Err(fault);
        }
        let mut result = self.try_once(body);
        let is_unavailable = matches!(result, Err(StoreError::Unavailable(_)));
        if is_unavailable && kind == Kind::Drains && self.disk.is_full() {
            self.disk.give_up_reserve(&self.shared.room);
            // So that the log is used from its beginning, and need not grow.
            if let Some(connection) = &self.connection {
                fold(connection, "PASSIVE");
            }
            result = self.try_once(body);
        }
        if let Err(StoreError::Damaged(why)) = &result
            && self.shared.serves
        {
            self.shared.latch(why.clone());
        }
        result
    }

    fn try_once<T>(
        &mut self,
        body: &dyn Fn(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.open_migrated()?,
        };
        let result = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .and_then(|transaction| {
                let value = body(&transaction)?;
                transaction.commit()?;
                Ok(value)
            });
        match result {
            Ok(value) => {
                self.connection = Some(connection);
                Ok(value)
            }
            Err(error) => {
                if error.sqlite_error_code() == Some(ErrorCode::DiskFull) {
                    // Closing it would give up the room that its log has.
                    self.connection = Some(connection);
                } else {
                    // The other one shares what SQLite knows of the file, such as that it is
                    // read-only.
                    *self.shared.reader() = None;
                }
                Err(self.shared.describe(&error))
            }
        }
    }

    fn open_migrated(&mut self) -> Result<Connection, StoreError> {
        let shared = Arc::clone(&self.shared);
        let log_bytes = self.disk.log_bytes_max(shared.log_bytes_max());
        let connection = shared.open_migrated(self, log_bytes)?;
        if shared.serves {
            match &mut self.watch {
                Some(watch) => watch.reopened(),
                // What cannot be watched can still be written.
                none => *none = Watch::begin(&shared.path).ok(),
            }
            self.disk.look(&shared.room);
        }
        Ok(connection)
    }

    /// When [`Writing::look`] is due.
    pub(super) fn look_at(&self) -> Instant {
        self.look_at
    }

    pub(super) fn look(&mut self) {
        self.look_at = Instant::now() + LOOK;
        let shared = Arc::clone(&self.shared);
        if !shared.serves || shared.latched().is_some() {
            return;
        }
        let Some(watch) = &mut self.watch else {
            return;
        };
        if self.connection.is_some()
            && let Err(why) = watch.look()
        {
            return self.lose(why);
        }
        self.disk.look(&shared.room);
        self.follow_other();
        if let Ownership::Ours { lock } = &mut self.ownership {
            lock.note_ahead(shared.clock.ahead_ms());
        }
        if self.pull_in_at <= Instant::now() {
            self.pull_in_at = Instant::now() + PULL_IN_INTERVAL;
            self.pull_in();
        }
    }

    /// When the other process that served the file has ended, this one serves it. What that had leased
    /// waits for the end of its lease: it cannot be told from what this one has.
    fn follow_other(&mut self) {
        if !matches!(self.ownership, Ownership::Others) {
            return;
        }
        let shared = &self.shared;
        match Lock::take(&shared.path) {
            Ok(Some(lock)) => {
                self.ownership = Ownership::Ours { lock };
                shared.note_other(None);
                log::info!(path:% = shared.path.display(); "the other process has ended: this one serves the queue");
            }
            // It may be yet another.
            Ok(None) => shared.note_other(Some(lock::served_by(&shared.path))),
            Err(_) => {}
        }
    }

    /// The file is not ours any more: nothing more is done to it, and what is still open is saved.
    pub(super) fn lose(&mut self, why: String) {
        self.shared.latch(format!("{why} while it was in use"));
        log::error!("{why} while it was in use: nothing is stored or claimed until a restart");
        self.unsaved = Some(why);
        self.save();
    }

    /// Saves what is held and is nowhere else.
    fn save(&mut self) {
        let Some(why) = self.unsaved.clone() else {
            return;
        };
        let path = &self.shared.path;
        self.shared.is_saving.store(true, Ordering::SeqCst);
        let saved = match &self.connection {
            Some(connection) => rescue::save(connection, path),
            None => Err("it was not open".to_owned()),
        };
        self.shared.is_saving.store(false, Ordering::SeqCst);
        let outcome = match saved {
            Ok(Saved::Nothing) => {
                log::warn!("the queue held no requests, nothing had to be saved");
                self.unsaved = None;
                "it held no requests, restart the program".to_owned()
            }
            Ok(Saved::All(to)) => {
                let saved_to = to.display().to_string();
                log::error!(saved_to; "what the queue held is saved to a new file");
                self.unsaved = None;
                bring_back(&to)
            }
            Ok(Saved::Part { to, rows, why }) => {
                let saved_to = to.display().to_string();
                log::error!(saved_to, rows, error = why; "a part of what the queue held is saved to a new file, the rest cannot be read");
                format!("{rows} of its requests could be saved, {}", bring_back(&to))
            }
            Err(error) => {
                log::error!(error; "what the queue held cannot be saved");
                format!("what it held cannot be saved: {error}")
            }
        };
        self.shared
            .latch(format!("{why} while it was in use; {outcome}"));
    }

    /// Makes due what is to wait longer than any pause: another clock has set that.
    fn pull_in(&mut self) {
        let shared = Arc::clone(&self.shared);
        let Some(pause_max) = shared.pause_max() else {
            return;
        };
        if !matches!(self.ownership, Ownership::Ours { .. }) {
            return;
        }
        let pulled = self.transact(Kind::Drains, &|transaction| {
            let now = shared.now_ms();
            let far = add_ms(now, pause_max);
            if !transaction.query_row(HAS_FAR, [far], |row| row.get(0))? {
                return Ok(0);
            }
            let mut count = 0;
            for statement in PULL_IN {
                count += transaction.execute(statement, params![far, now])?;
            }
            Ok(count)
        });
        match pulled {
            Ok(0) => {}
            Ok(count) => {
                log::warn!(count; "requests that were to wait longer than any pause are due now");
            }
            // Whoever uses the store finds the same, and tells.
            Err(_) => {}
        }
    }

    /// On a full disk what an earlier run has left in the log comes into the file first, so that the
    /// log is used from its beginning.
    pub(super) fn make_room(&self, connection: &Connection) {
        if self.disk.is_full() {
            fold(connection, "PASSIVE");
        }
    }

    /// Closes the file, with all rows in it: nothing stays in the log, unless others use it.
    ///
    /// # Errors
    /// What the file held is lost.
    pub(super) fn close(&mut self) -> Result<(), StoreError> {
        if self.unsaved.is_some() {
            self.save();
        }
        let is_ours = self.unsaved.is_none() && self.shared.latched().is_none();
        if is_ours && let Some(connection) = &self.connection {
            fold(connection, "TRUNCATE");
        }
        if let Some(connection) = self.connection.take()
            && let Err((_, error)) = connection.close()
        {
            log::warn!(error:%; "the queue's file was not closed in good order");
        }
        if is_ours && self.watch.is_some() {
            self.disk.keep_room();
        }
        match self.unsaved.take() {
            None => Ok(()),
            Some(why) => Err(StoreError::Damaged(format!(
                "{why} while it was in use, and what it held could not be saved"
            ))),
        }
    }
}

/// Copies the log into the file, as far as that can be done.
fn fold(connection: &Connection, how: &str) {
    // Tells in a row how far it came; the log is whole either way.
    let fold = format!("PRAGMA wal_checkpoint({how})");
    let _ = connection.query_row(&fold, [], |_| Ok(()));
}

fn bring_back(saved: &std::path::Path) -> String {
    format!(
        "what it held is saved in {0}: restart the program, and bring it back with \
         `DB_CONNECTION_STRING=sqlite:{0} asyncproxy queue export --output FILE` and \
         `asyncproxy queue import FILE`",
        saved.display()
    )
}

/// Of a damaged file, for its error.
pub(super) fn with_remedy(text: &str) -> String {
    format!("{text}: {REMEDY}")
}

/// A name that tells what it is: `PATH-saved-20260102T030405Z`.
pub(super) fn saved_name(path: &std::path::Path, now: std::time::SystemTime) -> PathBuf {
    let time = humantime::format_rfc3339_seconds(now).to_string();
    super::file::beside(path, &format!("-saved-{}", time.replace(['-', ':'], "")))
}
