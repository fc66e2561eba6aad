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

pub const POSTGRES: &[Migration] = &[
    Migration {
        version: 1,
        sql: include_str!("../../migrations/postgres/0001_queue.sql"),
    },
    Migration {
        version: 2,
        sql: include_str!("../../migrations/postgres/0002_instances.sql"),
    },
];

/// What a store does about a schema that is not at this program's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Applies what is pending.
    Apply,
    /// Changes nothing, and does not work until someone else has applied it.
    Require,
}

/// Of which version a schema is, 0: none yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub applied: i64,
    pub wanted: i64,
}

impl Version {
    pub(super) fn new(all: &'static [Migration], applied: i64) -> Version {
        let wanted = i64::try_from(all.len()).unwrap_or(i64::MAX);
        Version { applied, wanted }
    }

    /// # Errors
    /// [`StoreError::Schema`] if it is not the one that this program works with.
    pub fn require(self) -> Result<(), StoreError> {
        let Version { applied, wanted } = self;
        if applied == wanted {
            return Ok(());
        }
        let remedy = match applied < wanted {
            true => "run asyncproxy migrate",
            false => "run the newer program",
        };
        Err(StoreError::Schema(format!(
            "it has version {applied}, this program wants {wanted}: {remedy}"
        )))
    }
}

/// A migration that was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub version: i64,
    /// The rows of the Go program that it converted.
    pub adopted: Option<Adopted>,
}

/// Rows taken over from the Go program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Adopted {
    pub waiting: u64,
    pub dead: u64,
}

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
    fn only_the_wanted_version_is_worked_with() {
        let require = |applied| Version { applied, wanted: 2 }.require();
        assert_eq!(require(2), Ok(()));
        for (applied, remedy) in [(0, "migrate"), (1, "migrate"), (3, "newer")] {
            let error = require(applied).unwrap_err().to_string();
            let version = format!("version {applied}, this program wants 2: run");
            assert!(
                error.contains(&version) && error.contains(remedy),
                "{error}"
            );
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
