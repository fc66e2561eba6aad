//! Brings the schema up to this program's version: all steps or none, one instance at a time.

use std::time::Duration;

use ::postgres::Transaction;
use ::postgres::types::Type;

use super::super::StoreError;
use super::super::migrate::{self, Adopted, Migration, Step, Version};
use super::adopt;
use super::errors::{Fault, describe};
use super::session::Session;

/// The first with `AS MATERIALIZED`, which the statements have.
pub(super) const OLDEST: (i32, &str) = (120_000, "12");

/// Held until the end of the transaction; the key is the program's name in ASCII.
const LOCK: &str = "SELECT pg_try_advisory_xact_lock(x'6173796e6370726f'::bigint)";
/// Between tries to get it: a server that is waited for without a word might as well be gone.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// A change that waits for a dump to end holds up all others meanwhile: better give way, and try
/// again with the next operation.
const TABLE_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '3s'";

const SERVER: &str = "
    SELECT current_setting('server_version'),
           current_setting('server_version_num')::integer,
           current_setting('default_transaction_isolation') = 'read committed'";

/// What the others cannot hold, they would refuse in the middle of a batch.
const ENCODING: &str = "SELECT getdatabaseencoding()::text";

/// Asked first: a role that may not create tables can still use those that are there.
const HAS_MIGRATIONS: &str = "SELECT to_regclass('asyncproxy_migrations') IS NOT NULL";

const CREATE_MIGRATIONS: &str = "
    CREATE TABLE asyncproxy_migrations (
        version    bigint      PRIMARY KEY,
        applied_at timestamptz NOT NULL
    )";

/// What is recorded, and how many tables of each version are not there, whatever is recorded.
const APPLIED: &str = "
    SELECT coalesce(max(version), 0),
           (SELECT count(*)
              FROM unnest(ARRAY['proxy_requests', 'proxy_dead_letters', 'proxy_rate', 'proxy_pause'])
                   AS first (name)
             WHERE to_regclass(name) IS NULL),
           (SELECT count(*)
              FROM unnest(ARRAY['proxy_instances']) AS second (name)
             WHERE to_regclass(name) IS NULL)
           + (SELECT count(*)
                FROM pg_class AS restored
               WHERE restored.oid = to_regclass('proxy_requests')
                 AND NOT EXISTS (SELECT
                                   FROM pg_attribute
                                  WHERE attrelid = restored.oid AND attname = 'leased_by'
                                    AND NOT attisdropped))
      FROM asyncproxy_migrations";

const RECORD: &str = "
    INSERT INTO asyncproxy_migrations (version, applied_at)
    VALUES ($1, now())
        ON CONFLICT (version) DO UPDATE SET applied_at = excluded.applied_at";

/// The server, as far as it matters for whether it can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Server {
    version: String,
    version_num: i32,
    pub(super) is_read_committed: bool,
}

impl Server {
    /// # Errors
    /// [`StoreError::Schema`] if it is too old.
    pub(super) fn require(&self) -> Result<(), StoreError> {
        let (oldest, name) = OLDEST;
        match self.version_num < oldest {
            true => Err(StoreError::Schema(format!(
                "PostgreSQL {} is too old, upgrade the server to {name} or later",
                self.version
            ))),
            false => Ok(()),
        }
    }
}

/// Looks at the server.
///
/// # Errors
/// The server's.
pub(super) fn server(session: &mut Session) -> Result<Server, Fault> {
    let row = session.query_typed_one(SERVER, &[])?;
    Ok(Server {
        version: row.try_get(0)?,
        version_num: row.try_get(1)?,
        is_read_committed: row.try_get(2)?,
    })
}

/// What has been applied to a schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Applied {
    /// By its own account.
    recorded: i64,
    /// So that all its tables are there.
    whole: i64,
}

impl Applied {
    fn new(recorded: i64, missing_first: i64, missing_second: i64) -> Applied {
        let known = i64::try_from(migrate::POSTGRES.len()).unwrap_or(i64::MAX);
        let whole = match recorded {
            // A newer program's, which knows better what there has to be.
            newer if newer > known => newer,
            _ if missing_first > 0 => 0,
            _ if missing_second > 0 => recorded.min(1),
            recorded => recorded,
        };
        Applied { recorded, whole }
    }
}

/// Applies what is still to be applied, however long it takes. Whoever has the tables locked for
/// long is waited for only if `waits`.
///
/// # Errors
/// [`StoreError::Schema`] if the tables found are not ones to
/// work with; otherwise the server's error. Nothing has changed then.
pub(super) fn migrate(session: &mut Session, waits: bool) -> Result<Vec<Step>, Fault> {
    let mut transaction = session.transaction()?;
    while !transaction
        .query_typed_one(LOCK, &[])?
        .try_get::<_, bool>(0)?
    {
        std::thread::sleep(LOCK_PAUSE);
    }
    if !waits {
        transaction.batch_execute(TABLE_LOCK_TIMEOUT)?;
    }
    let encoding: String = transaction.query_typed_one(ENCODING, &[])?.try_get(0)?;
    if !matches!(encoding.as_str(), "UTF8" | "SQL_ASCII") {
        return Err(Fault::Store(StoreError::Schema(format!(
            "the database's encoding must be UTF8 (it is {encoding})"
        ))));
    }
    let has_migrations: bool = transaction
        .query_typed_one(HAS_MIGRATIONS, &[])?
        .try_get(0)?;
    if !has_migrations {
        transaction.batch_execute(CREATE_MIGRATIONS)?;
    }
    let applied = applied(&transaction.query_typed_one(APPLIED, &[])?)?;
    let pending = migrate::pending(migrate::POSTGRES, applied.whole)?;
    // The first table has the name of one that the Go program may have left.
    let adoption = match applied.recorded {
        0 => adopt::set_aside(&mut transaction)?,
        _ => None,
    };
    let mut steps = Vec::new();
    for migration in pending {
        steps.push(apply(&mut transaction, migration)?);
    }
    if let Some(adoption) = adoption
        && let Some(first) = steps.first_mut()
    {
        // Into the tables as they are now.
        first.adopted = Some(adoption.convert(&mut transaction)?);
    }
    transaction.commit()?;
    Ok(steps)
}

fn applied(row: &::postgres::Row) -> Result<Applied, Fault> {
    Ok(Applied::new(
        row.try_get(0)?,
        row.try_get(1)?,
        row.try_get(2)?,
    ))
}

/// Reads the version and changes nothing.
///
/// # Errors
/// The server's.
pub(super) fn version(session: &mut Session) -> Result<Version, Fault> {
    let has_migrations: bool = session.query_typed_one(HAS_MIGRATIONS, &[])?.try_get(0)?;
    let applied = match has_migrations {
        true => applied(&session.query_typed_one(APPLIED, &[])?)?.whole,
        false => 0,
    };
    Ok(Version::new(migrate::POSTGRES, applied))
}

/// As a running program does it: with a line in the log for what is remarkable.
///
/// # Errors
/// As [`migrate`].
pub(super) fn migrate_at_start(session: &mut Session) -> Result<(), Fault> {
    let steps = migrate(session, false).map_err(|fault| match describe(fault) {
        // Of the schema as it is nothing can be used.
        StoreError::Refused(why) => StoreError::Unavailable(format!("migrating: {why}")),
        error => error,
    })?;
    for Adopted { waiting, dead } in steps.iter().filter_map(|step| step.adopted) {
        log::info!(waiting, dead; "took over the queue of the Go program");
    }
    Ok(())
}

fn apply(transaction: &mut Transaction<'_>, migration: &Migration) -> Result<Step, Fault> {
    transaction.batch_execute(migration.sql)?;
    transaction.execute_typed(RECORD, &[(&migration.version, Type::INT8)])?;
    Ok(Step {
        version: migration.version,
        adopted: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_counts_only_with_its_tables() {
        let whole = |recorded, first, second| Applied::new(recorded, first, second).whole;
        assert_eq!(whole(2, 0, 0), 2);
        assert_eq!(whole(1, 0, 1), 1);
        assert_eq!(whole(2, 0, 1), 1);
        assert_eq!(whole(2, 1, 0), 0);
        assert_eq!(whole(0, 4, 1), 0);
        assert_eq!(whole(99, 4, 1), 99);
    }

    #[test]
    fn a_server_before_twelve_is_refused_by_name() {
        let server = |version: &str, version_num| Server {
            version: version.to_owned(),
            version_num,
            is_read_committed: true,
        };
        assert_eq!(server("12.0", 120_000).require(), Ok(()));
        let error = server("11.22", 110_022).require().unwrap_err().to_string();
        assert!(error.contains("PostgreSQL 11.22 is too old"), "{error}");
    }
}
