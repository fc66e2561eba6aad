//! Whether the file at the path, and the log beside it, are still those that are open.
//!
//! Whoever removes or replaces them leaves SQLite with files that have no name: it goes on, and
//! says that all is well. Nothing here changes a file, or opens one that SQLite locks: closing it
//! would end SQLite's locks. The one descriptor that is kept is to be dropped after the
//! connections.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A file, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Watch {
    path: PathBuf,
    wal_path: PathBuf,
    /// Keeps its number from being given to another.
    file: File,
    identity: Identity,
    last: Option<Seen>,
    wal: Option<Log>,
}

/// What the beginning of the file tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    bytes: u64,
    /// Bytes that the file had, as it says itself, when page 1 was written last.
    bytes_said: u64,
    /// Goes up with each change of the schema, and with each `VACUUM`.
    schema: u32,
}

/// The log, as it was seen last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Log {
    identity: Identity,
    bytes: u64,
    /// Changes each time the log begins anew.
    salt: Option<[u8; 8]>,
}

impl Watch {
    /// Begins with what is open: to be called when SQLite has just opened it.
    pub(super) fn begin(path: &Path) -> io::Result<Watch> {
        let resolved = path.canonicalize()?;
        let mut wal_path = resolved.into_os_string();
        wal_path.push("-wal");
        // Before it is opened: see below.
        let identity = Identity::of(&path.metadata()?);
        let file = File::open(path)?;
        let mut watch = Watch {
            path: path.to_owned(),
            wal_path: wal_path.into(),
            identity,
            file,
            last: None,
            wal: None,
        };
        // Unknown, not an error: closing the file would end SQLite's locks on it.
        watch.last = watch.header().ok().flatten();
        watch.reopened();
        Ok(watch)
    }

    /// Begins anew with the log: SQLite removes it with its last connection.
    pub(super) fn reopened(&mut self) {
        self.wal = Log::at(&self.wal_path).ok();
    }

    /// # Errors
    /// Why the path does not name the file that was opened at first.
    pub(super) fn is_ours(&self) -> Result<(), String> {
        same(&self.path, self.identity)
    }

    /// # Errors
    /// Why what is open is not what lies there.
    pub(super) fn look(&mut self) -> Result<(), String> {
        self.is_ours()?;
        let shown = self.path.display();
        // What cannot be read now is for SQLite to find out.
        if let Ok(Some(now)) = self.header() {
            if self.last.is_some_and(|last| now.is_other_than(last)) {
                return Err(format!("{shown} was cut or written over by something else"));
            }
            self.last = Some(now);
        } else if self.last.is_some() && self.bytes() == Some(0) {
            return Err(format!("{shown} was cut or written over by something else"));
        }
        let Some(last) = self.wal else { return Ok(()) };
        same(&self.wal_path, last.identity)?;
        if let Ok(now) = Log::at(&self.wal_path) {
            if now.was_cut(last) {
                let wal = self.wal_path.display();
                return Err(format!("{wal} was cut or written over by something else"));
            }
            self.wal = Some(now);
        }
        Ok(())
    }

    fn bytes(&self) -> Option<u64> {
        self.file.metadata().ok().map(|metadata| metadata.len())
    }

    /// `None`: there is none yet.
    fn header(&self) -> io::Result<Option<Seen>> {
        let mut header = [0; 44];
        match self.file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let number = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_be_bytes(bytes)
        };
        let page_bytes = match u16::from_be_bytes([header[16], header[17]]) {
            1 => 65_536,
            bytes => u64::from(bytes),
        };
        Ok(Some(Seen {
            bytes: self.file.metadata()?.len(),
            bytes_said: page_bytes * u64::from(number(28)),
            schema: number(40),
        }))
    }
}

impl Seen {
    /// Shorter than before, but for a `VACUUM`; or from an earlier time.
    fn is_other_than(self, last: Seen) -> bool {
        let is_shorter = self.bytes < last.bytes || self.bytes_said < last.bytes_said;
        let changes = self.schema.wrapping_sub(last.schema);
        (changes == 0 && is_shorter) || changes > u32::MAX / 2
    }
}

impl Log {
    /// It has no locks: it may be opened and closed.
    fn at(path: &Path) -> io::Result<Log> {
        let file = File::open(path)?;
        let mut header = [0; 24];
        let has_header = file.read_exact_at(&mut header, 0).is_ok();
        let metadata = file.metadata()?;
        Ok(Log {
            identity: Identity::of(&metadata),
            bytes: metadata.len(),
            salt: has_header.then(|| {
                let mut salt = [0; 8];
                salt.copy_from_slice(&header[16..24]);
                salt
            }),
        })
    }

    /// SQLite shortens it only when it has begun anew; a hole at its beginning is where it went on
    /// writing after someone had emptied it.
    fn was_cut(self, last: Log) -> bool {
        match self.salt {
            Some(salt) => {
                let is_shorter = self.bytes < last.bytes && last.salt == Some(salt);
                is_shorter || salt == [0; 8]
            }
            None => false,
        }
    }
}

/// Whether a path names a file. One that cannot be looked for is not known to be gone.
fn same(path: &Path, identity: Identity) -> Result<(), String> {
    let shown = path.display();
    match path.metadata() {
        Ok(metadata) if Identity::of(&metadata) == identity => Ok(()),
        Ok(_) => Err(format!("{shown} was replaced by another file")),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Err(format!("{shown} was removed"))
            }
            _ => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rusqlite::Connection;

    use super::*;

    /// A queue of a kind, open, with something in the file and in its log.
    fn queue(directory: &Path) -> (Connection, PathBuf, Watch) {
        let path = directory.join("queue.sqlite");
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE rows (row)")
            .unwrap();
        fill(&connection);
        connection
            .execute_batch("PRAGMA wal_checkpoint(PASSIVE)")
            .unwrap();
        fill(&connection);
        let watch = Watch::begin(&path).unwrap();
        (connection, path, watch)
    }

    fn fill(connection: &Connection) {
        let insert = "INSERT INTO rows VALUES (randomblob(100000))";
        connection.execute_batch(insert).unwrap();
    }

    fn beside(path: &Path, suffix: &str) -> PathBuf {
        let mut beside = path.as_os_str().to_owned();
        beside.push(suffix);
        beside.into()
    }

    #[test]
    fn what_others_do_to_it_is_seen() {
        type Deed = fn(&Path);
        let deeds: [(&str, Deed, &str); 9] = [
            ("remove", |path| fs::remove_file(path).unwrap(), "removed"),
            (
                "rename",
                |path| fs::rename(path, beside(path, "-old")).unwrap(),
                "removed",
            ),
            (
                "replace",
                |path| {
                    fs::copy(path, beside(path, "-copy")).unwrap();
                    fs::rename(beside(path, "-copy"), path).unwrap();
                },
                "replaced",
            ),
            (
                "remove the directory",
                |path| fs::remove_dir_all(path.parent().unwrap()).unwrap(),
                "removed",
            ),
            (
                "remove the log",
                |path| fs::remove_file(beside(path, "-wal")).unwrap(),
                "-wal was removed",
            ),
            (
                "replace the log",
                |path| {
                    fs::remove_file(beside(path, "-wal")).unwrap();
                    fs::write(beside(path, "-wal"), "").unwrap();
                },
                "-wal was replaced",
            ),
            (
                "empty",
                |path| drop(File::options().write(true).truncate(true).open(path)),
                "was cut",
            ),
            (
                "halve",
                |path| {
                    let file = File::options().write(true).open(path).unwrap();
                    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
                },
                "was cut",
            ),
            (
                "halve the log",
                |path| {
                    let file = File::options().write(true).open(beside(path, "-wal"));
                    let file = file.unwrap();
                    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
                },
                "-wal was cut",
            ),
        ];
        for (name, deed, said) in deeds {
            let directory = tempfile::tempdir().unwrap();
            let (_connection, path, mut watch) = queue(directory.path());
            assert_eq!(watch.look(), Ok(()), "{name}");
            deed(&path);
            let error = watch.look().expect_err(name);
            assert!(error.contains(said), "{name}: {error}");
        }
    }

    #[test]
    fn an_emptied_log_is_seen_when_it_is_written_to_again() {
        let directory = tempfile::tempdir().unwrap();
        let (connection, path, mut watch) = queue(directory.path());
        drop(File::create(beside(&path, "-wal")).unwrap());
        // As after a checkpoint, so far.
        assert_eq!(watch.look(), Ok(()));
        fill(&connection);
        assert!(watch.look().unwrap_err().contains("-wal was cut"));
    }

    #[test]
    fn what_sqlite_does_to_it_itself_is_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let (connection, path, mut watch) = queue(directory.path());
        let other = Connection::open(&path).unwrap();
        for deed in [
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "DELETE FROM rows WHERE rowid = 1",
            "PRAGMA wal_checkpoint(RESTART)",
            "INSERT INTO rows VALUES (1)",
            "PRAGMA journal_size_limit = 1000; DELETE FROM rows",
            "INSERT INTO rows VALUES (1)",
            "VACUUM",
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "INSERT INTO rows VALUES (randomblob(1000000))",
            "PRAGMA wal_checkpoint(PASSIVE)",
        ] {
            for connection in [&connection, &other] {
                let mut statement = connection.prepare(deed.split(';').next().unwrap()).unwrap();
                drop(statement.query([]).unwrap().next());
                connection
                    .execute_batch(deed.split_once(';').map_or("", |(_, rest)| rest))
                    .unwrap();
                assert_eq!(watch.look(), Ok(()), "{deed}");
            }
        }
    }

    #[test]
    fn an_older_copy_written_over_it_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let (connection, path, mut watch) = queue(directory.path());
        let copy = fs::read(&path).unwrap();
        for _ in 0..3 {
            fill(&connection);
        }
        connection
            .execute_batch("PRAGMA wal_checkpoint(PASSIVE)")
            .unwrap();
        assert_eq!(watch.look(), Ok(()));
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&copy, 0).unwrap();
        assert!(watch.look().unwrap_err().contains("written over"));
    }
}
