//! Brings the schema up to this program's version: all steps or none, one instance at a time.

use ::postgres::types::Type;
use ::postgres::{Client, Transaction};

use super::super::StoreError;
use super::super::migrate::{self, Adopted, Migration, Step, Version};
use super::adopt;
use super::connections::Fault;

/// Held until the end of the transaction; the key is the program's name in ASCII.
const LOCK: &str = "SELECT pg_advisory_xact_lock(x'6173796e6370726f'::bigint)";

/// What the others cannot hold, they would refuse in the middle of a batch.
const ENCODING: &str = "SELECT getdatabaseencoding()::text";

/// Asked first: a role that may not create tables can still use those that are there.
const HAS_MIGRATIONS: &str = "SELECT to_regclass('asyncproxy_migrations') IS NOT NULL";

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
pub(super) fn migrate(client: &mut Client) -> Result<Vec<Step>, Fault> {
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
    let mut steps = Vec::new();
    for migration in migrate::pending(migrate::POSTGRES, applied)? {
        steps.push(apply(&mut transaction, migration)?);
    }
    transaction.commit()?;
    Ok(steps)
}

/// Reads the version and changes nothing.
///
/// # Errors
/// The server's.
pub(super) fn version(client: &mut Client) -> Result<Version, Fault> {
    let has_migrations: bool = client.query_typed_one(HAS_MIGRATIONS, &[])?.try_get(0)?;
    let applied = match has_migrations {
        true => client.query_typed_one(APPLIED, &[])?.try_get(0)?,
        false => 0,
    };
    Ok(Version::new(migrate::POSTGRES, applied))
}

/// As a running program does it: with a line in the log for what is remarkable.
///
/// # Errors
/// As [`migrate`].
pub(super) fn migrate_at_start(client: &mut Client) -> Result<(), Fault> {
    for Adopted { waiting, dead } in migrate(client)?.iter().filter_map(|step| step.adopted) {
        log::info!(waiting, dead; "took over the queue of the Go program");
    }
    Ok(())
}

fn apply(transaction: &mut Transaction<'_>, migration: &Migration) -> Result<Step, Fault> {
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
    Ok(Step {
        version: migration.version,
        adopted,
    })
}
