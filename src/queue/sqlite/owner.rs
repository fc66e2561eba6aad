//! Whose files lie at a path and beside it. Made by root, they belong to the owner of their directory, who
//! is to use them: a service that runs as a user of its own. What SQLite puts beside a file belongs to
//! the file's owner by itself.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use super::file::beside;

/// What lies beside a file while it is in use, and is written to, too.
const BESIDE: [&str; 3] = ["-wal", "-shm", "-lock"];

/// A file and those beside it, whether they are there or not.
pub fn files(path: &Path) -> Vec<PathBuf> {
    let beside = BESIDE.iter().map(|suffix| beside(path, suffix));
    std::iter::once(path.to_owned()).chain(beside).collect()
}

/// Where a file lies.
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Creates the file if it is not there, for the eyes of its owner only: requests carry secrets.
/// What SQLite puts beside it inherits this. Tells whether it was not there.
pub(super) fn create_private(path: &Path) -> io::Result<bool> {
    let created = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match created {
        Ok(file) => {
            give_to_directorys_owner(&file, path);
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Only root can, and where even that may not, it uses the file itself.
fn give_to_directorys_owner(file: &File, path: &Path) {
    if !geteuid().is_root() {
        return;
    }
    if let Ok(directory) = directory_of(path).metadata() {
        let _ = fchown(file, Some(directory.uid()), Some(directory.gid()));
    }
}

/// Why a file that is there cannot be written by this process, and what to do about it, if so. Not for
/// what concerns everybody, such as a file system that is mounted read-only.
pub fn not_writable(path: &Path) -> Option<String> {
    path.metadata().ok()?;
    let files = files(path);
    let refused = files.iter().filter_map(|path| Refused::find(path));
    let refused: Vec<Refused> = refused.collect();
    if let Some(first) = refused.first() {
        return Some(format!(
            "{} cannot be written by {}: {}; {}",
            first.path.display(),
            ourselves(),
            first.why(),
            mend(&refused)
        ));
    }
    // Without a log, one has to be made.
    if beside(path, "-wal").exists() {
        return None;
    }
    let directory = directory_of(path);
    refusal(directory, Access::WRITE_OK | Access::EXEC_OK)?;
    let metadata = directory.metadata().ok()?;
    Some(format!(
        "in {}, the directory of {}, no files can be made by {}: {}; {}",
        directory.display(),
        path.display(),
        ourselves(),
        belongs(&metadata),
        mend(&[Refused {
            path: directory.to_owned(),
            metadata,
            errno: Errno::ACCESS,
        }])
    ))
}

/// A file that may not be read and written.
struct Refused {
    path: PathBuf,
    metadata: Metadata,
    errno: Errno,
}

impl Refused {
    fn find(path: &Path) -> Option<Refused> {
        let metadata = path.metadata().ok()?;
        Some(Refused {
            errno: refusal(path, Access::READ_OK | Access::WRITE_OK)?,
            path: path.to_owned(),
            metadata,
        })
    }

    fn why(&self) -> String {
        match self.errno {
            Errno::PERM => "it is marked as immutable or append-only".to_owned(),
            _ => belongs(&self.metadata),
        }
    }

    fn command(&self) -> String {
        match self.errno {
            Errno::PERM => "chattr -i -a".to_owned(),
            _ if self.metadata.uid() == geteuid().as_raw() => "chmod u+rwX".to_owned(),
            _ => format!("chown {}:{}", geteuid().as_raw(), getegid().as_raw()),
        }
    }
}

/// Why this process may not do that, if it is for its rights. What is said of a file system or of a
/// disk says nothing about them.
fn refusal(path: &Path, wanted: Access) -> Option<Errno> {
    let errno = access(path, wanted).err()?;
    matches!(errno, Errno::ACCESS | Errno::PERM).then_some(errno)
}

fn ourselves() -> String {
    format!("this program, which runs as {}", user(geteuid().as_raw()))
}

fn belongs(metadata: &Metadata) -> String {
    let mode = metadata.mode() & 0o7777;
    format!("it belongs to {} (mode {mode:04o})", user(metadata.uid()))
}

/// A user for people. No name is asked for: who tells them may not be there.
pub fn user(id: u32) -> String {
    match id {
        0 => "root".to_owned(),
        id => format!("uid {id}"),
    }
}

/// One command for each kind of refusal.
fn mend(refused: &[Refused]) -> String {
    let mut commands: Vec<(String, String)> = Vec::new();
    for refused in refused {
        let (command, path) = (refused.command(), refused.path.display().to_string());
        match commands.iter_mut().find(|(known, _)| *known == command) {
            Some((_, paths)) => *paths = format!("{paths} {path}"),
            None => commands.push((command, path)),
        }
    }
    let commands = commands
        .iter()
        .map(|(command, paths)| format!("{command} {paths}"));
    commands.collect::<Vec<_>>().join(" && ")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_file_that_is_refused_is_mended_by_the_command_for_its_kind() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |name: &str, errno| {
            let path = directory.path().join(name);
            fs::write(&path, "").unwrap();
            let metadata = path.metadata().unwrap();
            Refused {
                path,
                metadata,
                errno,
            }
        };
        let all = [
            refused("a", Errno::ACCESS),
            refused("b", Errno::PERM),
            refused("c", Errno::ACCESS),
        ];
        let path = |name| directory.path().join(name).display().to_string();
        let (a, b, c) = (path("a"), path("b"), path("c"));
        // They are ours.
        assert_eq!(
            mend(&all),
            format!("chmod u+rwX {a} {c} && chattr -i -a {b}")
        );
        assert!(all[1].why().contains("immutable"));
    }

    #[test]
    fn what_is_not_there_or_is_ours_is_no_fault() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        assert_eq!(not_writable(&path), None);
        assert_eq!(
            not_writable(&directory.path().join("none/queue.sqlite")),
            None
        );
        fs::write(&path, "").unwrap();
        assert_eq!(not_writable(&path), None);
    }

    #[test]
    fn a_path_without_a_directory_lies_in_the_working_directory() {
        assert_eq!(directory_of(Path::new("queue.sqlite")), Path::new("."));
        assert_eq!(directory_of(Path::new("a/queue.sqlite")), Path::new("a"));
    }
}
