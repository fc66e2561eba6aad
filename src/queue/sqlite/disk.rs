//! Room on the disk below the file: how much is left for new rows, and a reserve for getting rid
//! of those that are there.
//!
//! Claiming and deleting need room, too: for the log, and for the file to grow by what the log
//! holds. So a part of the disk is taken from the start, and given up when it is needed. As long
//! as the reserve is not whole, no new rows are taken.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

use super::file::beside;
use super::owner::{create_private, directory_of};

/// The reserve is this part of the disk, and no more than so many bytes.
const RESERVE_PART: u64 = 8;
const RESERVE_BYTES_MAX: u64 = 32 << 20;
const MIB: u64 = 1 << 20;

/// What whoever appends has to know. Unknown as long as nobody has looked.
#[derive(Debug)]
pub(super) struct Room {
    shown: String,
    /// Bytes, as the settings have it.
    min_free: Arc<AtomicU64>,
    /// Bytes, as far as is known; what has been appended since is taken off.
    free: AtomicU64,
    /// Bytes that are left to what was acknowledged before, whatever the settings.
    floor: AtomicU64,
    is_given_up: AtomicBool,
}

impl Room {
    pub(super) fn new(path: &Path, min_free: Arc<AtomicU64>) -> Room {
        Room {
            shown: path.display().to_string(),
            min_free,
            free: AtomicU64::new(u64::MAX),
            floor: AtomicU64::new(0),
            is_given_up: AtomicBool::new(false),
        }
    }

    /// Whether the reserve is in use.
    pub(super) fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    /// Why there is no room for new rows, if there is none.
    pub(super) fn shortage(&self) -> Option<String> {
        let free = self.free.load(Ordering::Relaxed);
        let min_free = self.min_free.load(Ordering::Relaxed);
        let shown = &self.shown;
        if self.is_given_up() || free < self.floor.load(Ordering::Relaxed) {
            let why = "its disk is nearly full, what is left is for delivering the rows it has: make room";
            return Some(format!("{shown}: {why}"));
        }
        (free < min_free).then(|| {
            format!(
                "{shown}: {} MiB free on its disk, less than queue.min_free ({} MiB): make room, or set queue.min_free",
                free / MIB,
                min_free / MIB
            )
        })
    }

    /// Rows of so many bytes have been appended: to the log, and soon to the file.
    pub(super) fn spend(&self, bytes: u64) {
        let spent = |free: u64| (free != u64::MAX).then(|| free.saturating_sub(2 * bytes));
        let _ = self
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent);
    }
}

/// The disk, for the one who writes.
#[derive(Debug)]
pub(super) struct Disk {
    directory: PathBuf,
    reserve: PathBuf,
    /// Bytes; 0 where the system does not tell how large the disk is.
    reserve_bytes: u64,
    was_short: bool,
}

impl Disk {
    pub(super) fn below(path: &Path) -> Disk {
        let directory = directory_of(path).to_owned();
        let total =
            statvfs(&directory).map_or(0, |disk| disk.f_blocks.saturating_mul(disk.f_frsize));
        Disk {
            directory,
            reserve: beside(path, "-reserve"),
            reserve_bytes: (total / RESERVE_PART).min(RESERVE_BYTES_MAX),
            was_short: false,
        }
    }

    /// Bytes of log after which it should be copied into the file: with the reserve there is room
    /// for both.
    pub(super) fn log_bytes_max(&self, wanted: u64) -> u64 {
        match self.reserve_bytes {
            0 => wanted,
            bytes => wanted.min(bytes / 2),
        }
    }

    /// Sees how much is free, makes the reserve whole if there is room for it, and tells `room`.
    pub(super) fn look(&mut self, room: &Room) {
        let Some(free) = self.free() else {
            return;
        };
        room.floor.store(self.reserve_bytes, Ordering::Relaxed);
        let has_room = free >= self.reserve_bytes.saturating_mul(2);
        let mut is_whole = self.reserve_bytes_kept() >= self.reserve_bytes;
        if !is_whole && has_room {
            is_whole = self.make_reserve(self.reserve_bytes);
        }
        room.is_given_up
            .store(!is_whole && !has_room, Ordering::Relaxed);
        room.free
            .store(self.free().unwrap_or(free), Ordering::Relaxed);
        let shortage = room.shortage();
        match &shortage {
            Some(why) if !self.was_short => log::warn!("no new requests are stored: {why}"),
            None if self.was_short => log::info!("there is room again, new requests are stored"),
            _ => {}
        }
        self.was_short = shortage.is_some();
    }

    /// Whether an operation may have failed for that.
    pub(super) fn is_full(&self) -> bool {
        self.free().is_some_and(|free| free < self.reserve_bytes)
    }

    /// Gives the reserve up, if there is one.
    pub(super) fn give_up_reserve(&mut self, room: &Room) {
        if self.reserve_bytes_kept() == 0 {
            return;
        }
        let path = self.reserve.display();
        match std::fs::remove_file(&self.reserve) {
            Ok(()) => {
                log::warn!(path:%; "the disk is full: the reserve is used for delivering what is there");
                room.is_given_up.store(true, Ordering::Relaxed);
            }
            Err(error) => {
                log::error!(path:%, error:%; "the disk is full, and the reserve cannot be given up");
            }
        }
    }

    /// At the end: what the log has left is kept for the next start.
    pub(super) fn keep_room(&self) {
        let mut bytes = self.reserve_bytes;
        while bytes >= 1 << 16 && !self.make_reserve(bytes) {
            bytes /= 2;
        }
    }

    fn free(&self) -> Option<u64> {
        let disk = statvfs(&self.directory).ok()?;
        // Some file systems do not tell.
        (disk.f_blocks > 0).then(|| disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn reserve_bytes_kept(&self) -> u64 {
        std::fs::metadata(&self.reserve).map_or(0, |reserve| reserve.len())
    }

    /// Takes room on the disk. What it does not get whole it does not keep.
    fn make_reserve(&self, bytes: u64) -> bool {
        if self.reserve_bytes_kept() >= bytes {
            return true;
        }
        let take = || -> std::io::Result<()> {
            create_private(&self.reserve)?;
            let mut file = File::options().write(true).open(&self.reserve)?;
            match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
                Err(Errno::OPNOTSUPP) => {
                    let zeros = [0; 1 << 16];
                    for _ in 0..bytes.div_ceil(zeros.len() as u64) {
                        file.write_all(&zeros)?;
                    }
                    Ok(())
                }
                taken => Ok(taken?),
            }
        };
        if take().is_ok() {
            return true;
        }
        let _ = std::fs::remove_file(&self.reserve);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_is_free_less_what_was_appended() {
        let min_free = Arc::new(AtomicU64::new(10 * MIB));
        let room = Room::new(Path::new("queue.sqlite"), Arc::clone(&min_free));
        room.spend(u64::MAX / 4);
        assert_eq!(room.shortage(), None, "nobody has looked");
        room.free.store(12 * MIB, Ordering::Relaxed);
        assert_eq!(room.shortage(), None);
        room.spend(2 * MIB);
        let why = room.shortage().unwrap();
        assert!(why.contains("queue.sqlite: 8 MiB free"), "{why}");
        assert!(why.contains("queue.min_free (10 MiB)"), "{why}");
        min_free.store(0, Ordering::Relaxed);
        assert_eq!(room.shortage(), None);
        room.floor.store(9 * MIB, Ordering::Relaxed);
        assert!(room.shortage().unwrap().contains("full"));
    }

    #[test]
    fn the_reserve_is_for_the_owner_alone_and_is_kept_once() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        let mut disk = Disk::below(&path);
        let room = Room::new(&path, Arc::default());
        disk.look(&room);
        disk.look(&room);
        let reserve = std::fs::metadata(beside(&path, "-reserve")).unwrap();
        assert_eq!(reserve.len(), disk.reserve_bytes);
        assert_eq!(reserve.permissions().mode() & 0o777, 0o600);
        disk.give_up_reserve(&room);
        assert!(!beside(&path, "-reserve").exists());
        assert!(room.shortage().unwrap().contains("full"));
        disk.look(&room);
        assert_eq!(room.shortage(), None, "it is there again");
    }
}
