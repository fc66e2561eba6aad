//! Files that hold secrets, and whether everybody on the machine may read them.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The right of others than owner and group to read.
const OTHERS_READ: u32 = 0o004;

/// A file with a secret in it that everybody may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExposedSecret {
    /// The setting that led to it, or that it holds.
    pub key: &'static str,
    pub path: PathBuf,
    mode: u32,
}

impl ExposedSecret {
    /// `None` if it is private enough, or not there. Group members are taken to be meant.
    pub(super) fn find(key: &'static str, path: &Path) -> Option<ExposedSecret> {
        let mode = fs::metadata(path).ok()?.mode() & 0o7777;
        (mode & OTHERS_READ != 0).then(|| ExposedSecret {
            key,
            path: path.to_owned(),
            mode,
        })
    }
}

impl fmt::Display for ExposedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ExposedSecret { key, path, mode } = self;
        write!(
            f,
            "{key}: everybody may read the password or key in {path:?} (mode {mode:04o})"
        )
    }
}
