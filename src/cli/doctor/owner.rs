//! Whose a SQLite file and those beside it are, and whether a service that runs as the owner of their
//! directory could write them.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Access, access};

use super::Finding;
use crate::queue::sqlite::owner::{directory_of, files, user};

const READ_WRITE: u32 = 0o6;

/// A file, or a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owned {
    path: String,
    user: u32,
    group: u32,
    mode: u32,
    /// This user may read and write it.
    is_accessible: bool,
}

impl Owned {
    fn of(path: &Path, metadata: &Metadata) -> Owned {
        Owned {
            path: path.display().to_string(),
            user: metadata.uid(),
            group: metadata.gid(),
            mode: metadata.mode() & 0o7777,
            is_accessible: access(path, Access::READ_OK | Access::WRITE_OK).is_ok(),
        }
    }

    fn find(path: &Path) -> Option<Owned> {
        let metadata = path.metadata().ok()?;
        Some(Owned::of(path, &metadata))
    }

    /// Whether the owner of `directory` may read and write it, by what can be seen from outside.
    fn is_writable_by(&self, directory: &Owned) -> bool {
        let shift = match self {
            file if file.user == directory.user => 6,
            file if file.group == directory.group => 3,
            _ => 0,
        };
        directory.user == 0 || self.mode >> shift & READ_WRITE == READ_WRITE
    }
}

/// Of a file and those beside it, as far as they are there, and of their directory.
#[derive(Debug, Default)]
pub(super) struct Owners {
    files: Vec<Owned>,
    directory: Option<Owned>,
}

impl Owners {
    pub(super) fn gather(path: &Path) -> Owners {
        let files = files(path);
        Owners {
            files: files.iter().filter_map(|path| Owned::find(path)).collect(),
            directory: Owned::find(directory_of(path)),
        }
    }

    /// One that this user cannot write.
    pub(super) fn inaccessible(&self) -> Option<&str> {
        let mut files = self.files.iter();
        let file = files.find(|file| !file.is_accessible)?;
        Some(&file.path)
    }
}

/// Who made or restored the files as root may have left them to a service that cannot write them.
pub(super) fn finding(about: &'static str, owners: &Owners, own_user: u32) -> Option<Finding> {
    let directory = owners.directory.as_ref()?;
    let foreign = |file: &&Owned| {
        let is_used_by_us = own_user != 0 && file.user == own_user;
        !is_used_by_us && !file.is_writable_by(directory)
    };
    let foreign: Vec<&Owned> = owners.files.iter().filter(foreign).collect();
    let first = foreign.first()?;
    let paths: Vec<&str> = foreign.iter().map(|file| file.path.as_str()).collect();
    let (paths, belong) = match paths.len() {
        1 => (paths.join(""), "belongs"),
        _ => (paths.join(" "), "belong"),
    };
    let (owner, group) = (directory.user, directory.group);
    Some(Finding::warning(
        about,
        format!(
            "{paths} {belong} to {} (mode {:04o}), the directory to {}: a service that runs as its owner cannot write there",
            user(first.user),
            first.mode,
            user(owner)
        ),
        match first.user == owner {
            true => format!("chmod u+rw {paths}"),
            false => format!("chown {owner}:{group} {paths}"),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(path: &str, (user, group): (u32, u32), mode: u32) -> Owned {
        Owned {
            path: path.to_owned(),
            user,
            group,
            mode,
            is_accessible: true,
        }
    }

    #[test]
    fn files_are_compared_with_the_owner_of_their_directory() {
        const SERVICE: (u32, u32) = (998, 997);
        for (directory, file, own_user, is_foreign) in [
            // Of a service's directory, as root sees it.
            (SERVICE, (SERVICE, 0o600), 0, false),
            (SERVICE, ((0, 0), 0o600), 0, true),
            (SERVICE, ((0, 0), 0o644), 0, true),
            (SERVICE, ((0, 0), 0o666), 0, false),
            (SERVICE, ((0, 997), 0o660), 0, false),
            (SERVICE, ((0, 997), 0o640), 0, true),
            (SERVICE, (SERVICE, 0o400), 0, true),
            // Somebody's own file in a directory of several.
            (SERVICE, ((1000, 1000), 0o600), 1000, false),
            ((0, 0), ((1000, 1000), 0o600), 1000, false),
            ((0, 0), ((1000, 1000), 0o600), 0, false),
        ] {
            let (owner, mode) = file;
            let owners = Owners {
                files: vec![owned("q", SERVICE, 0o600), owned("q-wal", owner, mode)],
                directory: Some(owned(".", directory, 0o700)),
            };
            let own = Owners {
                files: vec![owned("q-wal", owner, mode)],
                ..owners
            };
            let found = finding("a", &own, own_user);
            assert_eq!(found.is_some(), is_foreign, "{directory:?} {file:?}");
        }
    }

    #[test]
    fn all_that_has_to_be_changed_is_named_in_one_command() {
        let owners = Owners {
            files: vec![
                owned("q", (0, 0), 0o600),
                owned("q-wal", (998, 997), 0o600),
                owned("q-lock", (0, 0), 0o600),
            ],
            directory: Some(owned(".", (998, 997), 0o700)),
        };
        let found = finding("a", &owners, 0).unwrap();
        assert_eq!(found.mend.as_deref(), Some("chown 998:997 q q-lock"));
        assert!(
            found
                .found
                .starts_with("q q-lock belong to root (mode 0600), the directory to uid 998")
        );
    }
}
