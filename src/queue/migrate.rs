//! The schema's history: SQL files, embedded in the binary, applied in order by each store.

use super::StoreError;

/// What to do about a schema that is not this version's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upkeep {
    /// Bring it up to date.
    Migrate,
    /// Do not work with it.
    Check,
    /// For one who only asks what it is at.
    None,
}

/// One step of a schema. `version` counts from 1 without gaps.
#[derive(Debug)]
pub struct Migration {
    pub version: i64,
    pub sql: &'static str,
}

pub const SQLITE: &[Migration] = &[Migration {
    version: 1,
    sql: include_str!("../../migrations/sqlite/0001_queue.sql"),
}];

pub const POSTGRES: &[Migration] = &[Migration {
    version: 1,
    sql: include_str!("../../migrations/postgres/0001_queue.sql"),
}];

/// The version a schema has when all is applied.
pub fn latest(all: &[Migration]) -> i64 {
    all.last().map_or(0, |migration| migration.version)
}

/// Whether a schema at version `applied` is one that a program which wants `wanted` knows.
///
/// # Errors
/// [`StoreError::Schema`] if a later version of this program has been there.
pub fn check_version(applied: i64, wanted: i64) -> Result<(), StoreError> {
    if (0..=wanted).contains(&applied) {
        return Ok(());
    }
    Err(StoreError::Schema(format!(
        "it has version {applied}, this program knows versions up to {wanted}: run the newer program"
    )))
}

/// What is still to be applied to a schema at version `applied` (0: none yet).
///
/// # Errors
/// [`StoreError::Schema`] if a later version of this program has been there.
pub fn pending(
    all: &'static [Migration],
    applied: i64,
) -> Result<&'static [Migration], StoreError> {
    check_version(applied, latest(all))?;
    let applied = usize::try_from(applied).unwrap_or(all.len());
    Ok(all.get(applied..).unwrap_or_default())
}

/// Whether a schema at version `applied` can be worked with as it is.
///
/// # Errors
/// [`StoreError::Schema`], which says what to do.
pub fn check(all: &'static [Migration], applied: i64) -> Result<(), StoreError> {
    if pending(all, applied)?.is_empty() {
        return Ok(());
    }
    let what = match applied {
        0 => "it has no queue yet".to_owned(),
        applied => format!("it has version {applied}, this program needs {}", all.len()),
    };
    Err(StoreError::Schema(format!(
        "{what}: run `asyncproxy migrate`"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_count_from_one_without_gaps() {
        for all in [SQLITE, POSTGRES] {
            for (index, migration) in all.iter().enumerate() {
                assert_eq!(migration.version, i64::try_from(index).unwrap() + 1);
            }
        }
    }

    #[test]
    fn a_newer_schema_is_refused() {
        assert_eq!(pending(SQLITE, 0).unwrap().len(), SQLITE.len());
        assert!(pending(SQLITE, SQLITE.len() as i64).unwrap().is_empty());
        assert!(matches!(pending(SQLITE, 1000), Err(StoreError::Schema(_))));
        assert!(matches!(pending(SQLITE, -1), Err(StoreError::Schema(_))));
        assert_eq!(check(SQLITE, SQLITE.len() as i64), Ok(()));
        assert!(
            check(SQLITE, 0)
                .unwrap_err()
                .to_string()
                .contains("asyncproxy migrate")
        );
    }
}
