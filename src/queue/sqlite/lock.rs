//! Who serves a file: whoever has locked `PATH-lock` beside it, which no crash outlives. What is written
//! in that tells others how many milliseconds the clock of the one who serves is ahead of the system's.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{major, minor};

use super::file::beside;
use super::owner::create_private;

/// How often, and how soon again, the lock is tried.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);
/// The locks of the system, a line each; of a machine with so many, not all are looked at.
const LOCKS: &str = "/proc/locks";
const LOCKS_BYTES_MAX: u64 = 1 << 20;

/// Whose a file is.
#[derive(Debug)]
pub(super) enum Ownership {
    /// It has not been opened yet.
    Unknown,
    Ours {
        lock: Lock,
    },
    Others,
}

/// Held for as long as the file is served.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    ahead_ms: i64,
}

impl Lock {
    fn path(of: &Path) -> PathBuf {
        beside(of, "-lock")
    }

    /// Takes the lock on the file `of`, unless another has it. One who is just ending is waited for.
    ///
    /// # Errors
    /// The lock's file, and why it cannot be used.
    pub(super) fn take_patiently(of: &Path) -> Result<Option<Lock>, String> {
        for _ in 1..TRIES {
            if let Some(lock) = Lock::take(of)? {
                return Ok(Some(lock));
            }
            std::thread::sleep(PAUSE);
        }
        Lock::take(of)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// As above.
    pub(super) fn take(of: &Path) -> Result<Option<Lock>, String> {
        let path = Lock::path(of);
        let open = || {
            create_private(&path)?;
            File::options().read(true).write(true).open(&path)
        };
        let file = open().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(file.try_lock().is_ok().then_some(Lock {
            file,
            // Unknown: whatever is written there is not true any more.
            ahead_ms: i64::MIN,
        }))
    }

    /// Nothing happens if that is known.
    pub(super) fn note_ahead(&mut self, ahead_ms: i64) {
        if ahead_ms == self.ahead_ms {
            return;
        }
        let text = match ahead_ms {
            0 => String::new(),
            ms => format!("{ms}\n"),
        };
        let noted = self
            .file
            .set_len(0)
            .and_then(|()| self.file.write_all_at(text.as_bytes(), 0));
        // As good as it gets: on a full disk the next look tries again.
        if noted.is_ok() {
            self.ahead_ms = ahead_ms;
        }
    }
}

/// What the last one who served the file has written about its clock.
pub(super) fn read_ahead(of: &Path) -> Option<i64> {
    let text = std::fs::read_to_string(Lock::path(of)).ok()?;
    text.trim().parse().ok()
}

/// How far the clock of whoever serves a file is ahead of the system's.
pub(super) fn ahead_of_system(path: &Path) -> i64 {
    match is_served(path) {
        true => read_ahead(path).unwrap_or(0),
        false => 0,
    }
}

/// Whether a process serves the file. Of one that may not be looked at that is not known.
fn is_served(path: &Path) -> bool {
    File::open(Lock::path(path)).is_ok_and(|file| file.try_lock_shared().is_err())
}

/// That a process serves the file, if one does.
pub fn server_of(path: &Path) -> Option<String> {
    is_served(path).then(|| served_by(path))
}

/// In words, for a file that another process serves.
pub(super) fn served_by(path: &Path) -> String {
    let shown = path.display();
    match holder(&Lock::path(path)) {
        Some(pid) => format!("another process (pid {pid}) serves {shown}"),
        None => format!("another process serves {shown}"),
    }
}

/// The process that has locked a file, as far as it can be seen from here.
fn holder(path: &Path) -> Option<u32> {
    let metadata = path.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let id = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    let mut locks = String::new();
    let file = File::open(LOCKS).ok()?;
    file.take(LOCKS_BYTES_MAX).read_to_string(&mut locks).ok()?;
    locks.lines().find_map(|line| pid_in(line, &id))
}

/// Of a line such as `3: FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF`. One who waits for a lock has an
/// arrow before its kind.
fn pid_in(line: &str, id: &str) -> Option<u32> {
    let mut words = line.split_whitespace().skip(1);
    let is_lock = words.next() == Some("FLOCK");
    let pid = words.nth(2)?.parse().ok()?;
    // 0: of a process that cannot be seen from here.
    (is_lock && words.next() == Some(id) && pid > 0).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found() {
        let id = "fe:00:131";
        for (line, pid) in [
            ("3: FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF", Some(1234)),
            ("3: FLOCK  ADVISORY  WRITE 0 fe:00:131 0 EOF", None),
            ("3: FLOCK  ADVISORY  WRITE 1234 fe:00:1312 0 EOF", None),
            ("3: POSIX  ADVISORY  WRITE 1234 fe:00:131 0 EOF", None),
            ("3: -> FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF", None),
            ("3: FLOCK", None),
            ("", None),
        ] {
            assert_eq!(pid_in(line, id), pid, "{line}");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        assert_eq!(server_of(&path), None);
        let lock = Lock::take(&path).unwrap().unwrap();
        assert!(Lock::take(&path).unwrap().is_none());
        let told = server_of(&path).unwrap();
        let expected = format!("(pid {}) serves {}", std::process::id(), path.display());
        assert!(told.ends_with(&expected), "{told}");
        drop(lock);
    }
}
