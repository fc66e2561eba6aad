//! The schema's history: SQL files, embedded in the binary, applied in order by each store.

use super::StoreError;

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

/// What is still to be applied to a schema at version `applied` (0: none yet).
///
/// # Errors
/// [`StoreError::Schema`] if a later version of this program has been there.
pub fn pending(
    all: &'static [Migration],
    applied: i64,
) -> Result<&'static [Migration], StoreError> {
    let known = all.len();
    usize::try_from(applied)
        .ok()
        .and_then(|applied| all.get(applied..))
        .ok_or_else(|| {
            StoreError::Schema(format!(
                "it has version {applied}, this program knows versions up to {known}: run the newer program"
            ))
        })
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
    }
}
