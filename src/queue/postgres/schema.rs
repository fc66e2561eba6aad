//! Brings the schema up to this program's version: all steps or none, one instance at a time.

use ::postgres::types::Type;
use ::postgres::{Client, Transaction};

use super::super::StoreError;
use super::super::migrate::{self, Migration};
use super::super::operate::Versions;
use super::adopt::{self, Adopted};
use super::connections::Fault;

/// Held until the end of the transaction; the key is the program's name in ASCII.
const LOCK: &str = "SELECT pg_advisory_xact_lock(x'6173796e6370726f'::bigint)";

/// What the others cannot hold, they would refuse in the middle of a batch.
const ENCODING: &str = "SELECT getdatabaseencoding()::text";

/// Asked first: a role that may not create tables can still use those that are there.
const HAS_MIGRATIONS: &str = "SELECT to_regclass('asyncproxy_migrations') IS NOT NULL";

const HAS_TABLES: &str = "
    SELECT to_regclass('asyncproxy_migrations') IS NOT NULL,
           to_regclass('proxy_requests') IS NOT NULL";

const CREATE_MIGRATIONS: &str = "
    CREATE TABLE asyncproxy_migrations (
        version    bigint      PRIMARY KEY,
        applied_at timestamptz NOT NULL
    )";

const APPLIED: &str = "SELECT coalesce(max(version), 0) FROM asyncproxy_migrations";

const RECORD: &str = "
    INSERT INTO asyncproxy_migrations (version, applied_at)
    VALUES ($1, now())";

/// Applies what is still to be applied.
///
/// # Errors
/// [`StoreError::Schema`] if the tables found are not ones to
/// work with; otherwise the server's error. Nothing has changed then.
pub(super) fn migrate(client: &mut Client) -> Result<(), Fault> {
    let mut transaction = client.transaction()?;
    transaction.query_typed_one(LOCK, &[])?;
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
    let applied: i64 = transaction.query_typed_one(APPLIED, &[])?.try_get(0)?;
    let mut adopted = None;
    for migration in migrate::pending(migrate::POSTGRES, applied)? {
        adopted = apply(&mut transaction, migration)?.or(adopted);
    }
    transaction.commit()?;
    if let Some(Adopted { waiting, dead }) = adopted {
        log::info!(waiting, dead; "took over the queue of the Go program");
    }
    Ok(())
}

/// What the schema is at, and whether there is a table that would be converted. Changes nothing.
///
/// # Errors
/// The server's.
pub(super) fn versions(client: &mut Client) -> Result<Versions, Fault> {
    let row = client.query_typed_one(HAS_TABLES, &[])?;
    let (has_migrations, has_table): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    let applied = if has_migrations {
        client.query_typed_one(APPLIED, &[])?.try_get(0)?
    } else {
        0
    };
    Ok(Versions {
        applied,
        wanted: migrate::latest(migrate::POSTGRES),
        is_go_table: has_table && applied == 0,
    })
}

/// Whether the schema can be worked with as it is.
///
/// # Errors
/// [`StoreError::Schema`] if not; otherwise the server's.
pub(super) fn check(client: &mut Client) -> Result<(), Fault> {
    let applied = versions(client)?.applied;
    Ok(migrate::check(migrate::POSTGRES, applied)?)
}

fn apply(
    transaction: &mut Transaction<'_>,
    migration: &Migration,
) -> Result<Option<Adopted>, Fault> {
    // The first table has the name of one that the Go program may have left.
    let adoption = if migration.version == 1 {
        adopt::set_aside(transaction)?
    } else {
        None
    };
    transaction.batch_execute(migration.sql)?;
    let adopted = match adoption {
        Some(adoption) => Some(adoption.convert(transaction)?),
        None => None,
    };
    transaction.execute_typed(RECORD, &[(&migration.version, Type::INT8)])?;
    Ok(adopted)
}
