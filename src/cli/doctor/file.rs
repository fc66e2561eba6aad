//! A SQLite file, the queue's or the spool's, and the disk below it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{Access, access, statfs, statvfs};
use rustix::process::geteuid;

use super::owner::{self, Owners};
use super::{Doctor, Finding, PATIENCE, size, within};
use crate::config::Config;
use crate::queue::migrate::{Policy, Version};
use crate::queue::sqlite::owner::directory_of;
use crate::queue::sqlite::{REMEDY, SqliteStore, inspect};

/// Beyond what file systems and clocks are inexact.
const CLOCK_DIFFERENCE: Duration = Duration::from_secs(2);
const FREE_MIN: u64 = 64 << 20;
const FREE_LITTLE: u64 = 1 << 30;
/// It is cut back to 16 MiB after each copy into the database, unless a reader stays in it.
const WAL_LARGE: u64 = 256 << 20;
/// Others than the owner.
const OTHERS: u32 = 0o077;

/// File systems over a network, by the magic number that statfs(2) tells; SQLite's locks and shared
/// memory do not work on them.
const NETWORK: [(u32, &str); 7] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x0102_1997, "9P"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
];

pub(super) fn findings(
    about: &'static str,
    path: &Path,
    config: &Config,
    options: Doctor,
) -> Vec<Finding> {
    let shown = path.display().to_string();
    let owned = path.to_owned();
    let Some(facts) = within(PATIENCE, move || Facts::gather(&owned)) else {
        return vec![stuck(about, &shown)];
    };
    let policy = match about {
        "db.spool" => Policy::Apply,
        _ => config.db.migrate,
    };
    let mut findings = vec![usable(about, &shown, &facts)];
    if findings.iter().any(|finding| finding.mend.is_some()) {
        findings.extend(network(about, &facts));
        return findings;
    }
    if facts.file.is_some() {
        findings.push(private(about, &shown, &facts));
        findings.extend(owner::finding(about, &facts.owners, facts.own_user));
    }
    findings.extend(network(about, &facts));
    let min_free = config.queue.min_free;
    findings.extend(facts.free.map(|free| space(about, free, min_free)));
    findings.extend(clock(about, facts.written_ahead));
    findings.extend(saved(about, &facts.saved));
    findings.extend(wal(about, facts.wal_bytes));
    let store = SqliteStore::new(path.to_owned(), config.db.use_index, config.db.timeout);
    findings.push(match store.version() {
        Ok(version) => schema(about, version, policy),
        Err(error) => unreadable(about, &error.to_string()),
    });
    if options.deep && facts.file.is_some() {
        let checked = inspect::quick_check(path, config.db.timeout);
        findings.push(intact(about, checked));
    }
    findings
}

/// What the system knows of it.
#[derive(Debug, Default)]
struct Facts {
    /// `None`: not there.
    file: Option<File>,
    /// Files can be made and changed in its directory.
    has_directory: bool,
    own_user: u32,
    owners: Owners,
    network: Option<&'static str>,
    /// Bytes, for users without special rights.
    free: Option<u64>,
    wal_bytes: u64,
    /// How much later than now it was written.
    written_ahead: Duration,
    /// What was saved when it was taken away while in use.
    saved: Vec<String>,
}

#[derive(Debug)]
struct File {
    is_regular: bool,
    is_accessible: bool,
    mode: u32,
    owner: u32,
}

impl Facts {
    fn gather(path: &Path) -> Facts {
        let directory = directory_of(path).to_owned();
        let mut wal = path.as_os_str().to_owned();
        wal.push("-wal");
        let file = fs::metadata(path).ok().map(|metadata| File {
            is_regular: metadata.is_file(),
            is_accessible: access(path, Access::READ_OK | Access::WRITE_OK).is_ok(),
            mode: metadata.mode() & 0o7777,
            owner: metadata.uid(),
        });
        let system = statfs(&directory).ok();
        let magic = system.map(|system| u32::try_from(i128::from(system.f_type) & 0xffff_ffff));
        let magic = magic.and_then(Result::ok);
        let known = |magic| NETWORK.iter().find(|(number, _)| *number == magic);
        Facts {
            file,
            has_directory: access(&directory, Access::WRITE_OK | Access::EXEC_OK).is_ok(),
            own_user: geteuid().as_raw(),
            owners: Owners::gather(path),
            network: magic.and_then(known).map(|(_, name)| *name),
            free: statvfs(&directory)
                .ok()
                .map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize)),
            written_ahead: written_ahead(&[path, Path::new(&wal)]),
            wal_bytes: fs::metadata(&wal).map_or(0, |metadata| metadata.len()),
            saved: saved_beside(path, &directory),
        }
    }
}

fn written_ahead(files: &[&Path]) -> Duration {
    let written = |path: &&Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let last = files.iter().filter_map(written).max();
    last.and_then(|last| last.duration_since(SystemTime::now()).ok())
        .unwrap_or_default()
}

fn saved_beside(path: &Path, directory: &Path) -> Vec<String> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let prefix = format!("{name}-saved-");
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let mut saved: Vec<String> = names.filter(|name| name.starts_with(&prefix)).collect();
    saved.sort();
    saved
}

fn stuck(about: &'static str, path: &str) -> Finding {
    Finding::error(
        about,
        format!("{path}: its disk does not answer within {PATIENCE:?}"),
        "see whether the file system is mounted and well",
    )
}

fn usable(about: &'static str, path: &str, facts: &Facts) -> Finding {
    match &facts.file {
        _ if !facts.has_directory => Finding::error(
            about,
            format!("{path}: no files can be made in its directory"),
            "make the directory, and have it belong to the user that the program runs as",
        ),
        None => Finding::ok(about, format!("{path} is not there yet")),
        Some(file) if !file.is_regular => Finding::error(
            about,
            format!("{path} is not a file"),
            "name a file after sqlite:",
        ),
        Some(file) if !file.is_accessible => Finding::error(
            about,
            format!("{path} cannot be read and written by this user"),
            format!("chown it to the user that the program runs as, and chmod 600 {path}"),
        ),
        Some(_) => match facts.owners.inaccessible() {
            Some(path) => Finding::error(
                about,
                format!("{path} cannot be read and written by this user"),
                format!("chown it to the user that the program runs as, and chmod 600 {path}"),
            ),
            None => Finding::ok(about, format!("{path} can be read and written")),
        },
    }
}

fn private(about: &'static str, path: &str, facts: &Facts) -> Finding {
    match &facts.file {
        Some(file) if file.mode & OTHERS != 0 => Finding::warning(
            about,
            format!("mode {:04o}: others may read what senders sent", file.mode),
            format!("chmod 600 {path}*"),
        ),
        // Root may be anybody, see `owner`.
        Some(file) if facts.own_user != 0 && file.owner != facts.own_user => Finding::warning(
            about,
            format!(
                "it belongs to user {}, this is {}",
                file.owner, facts.own_user
            ),
            "run this as the user that the program runs as, or chown the file to it",
        ),
        _ => Finding::ok(about, "only its owner may read it"),
    }
}

fn network(about: &'static str, facts: &Facts) -> Option<Finding> {
    let name = facts.network?;
    Some(Finding::error(
        about,
        format!("it lies on {name}, a network file system, where SQLite loses data"),
        "put it on a local disk, or use Postgres",
    ))
}

fn space(about: &'static str, free: u64, min_free: u64) -> Finding {
    let found = format!("{} free on its disk", size(free));
    let mend = "make room: a full disk refuses requests";
    match free {
        _ if free < min_free => Finding::error(
            about,
            format!("{found}, less than queue.min_free ({})", size(min_free)),
            "make room, or set queue.min_free: as it is, requests that would have to be stored are refused",
        ),
        0..FREE_MIN => Finding::error(about, found, mend),
        FREE_MIN..FREE_LITTLE => Finding::warning(about, found, mend),
        _ => Finding::ok(about, found),
    }
}

fn wal(about: &'static str, bytes: u64) -> Option<Finding> {
    (bytes > WAL_LARGE).then(|| {
        Finding::warning(
            about,
            format!("its -wal file has {}", size(bytes)),
            "end whatever else reads the file: as long as it does, the log cannot be cut",
        )
    })
}

fn clock(about: &'static str, ahead: Duration) -> Option<Finding> {
    (ahead > CLOCK_DIFFERENCE).then(|| {
        let seconds = ahead.as_secs();
        Finding::warning(
            about,
            format!("it was written {seconds} s later than now: the clock has been set back"),
            "see that the machine keeps the time (chrony, systemd-timesyncd)",
        )
    })
}

fn saved(about: &'static str, files: &[String]) -> Option<Finding> {
    let last = files.last()?;
    Some(Finding::warning(
        about,
        format!(
            "requests of a file that was taken away while in use are saved in {}",
            files.join(", ")
        ),
        format!(
            "DB_CONNECTION_STRING=sqlite:{last} asyncproxy queue export --output FILE, asyncproxy queue import FILE, and remove it"
        ),
    ))
}

/// Of either store.
pub(super) fn schema(about: &'static str, version: Version, policy: Policy) -> Finding {
    let Version { applied, wanted } = version;
    match (version.require(), policy) {
        (Ok(()), _) => Finding::ok(about, format!("the schema has version {applied}")),
        (Err(_), Policy::Apply) if applied < wanted => Finding::ok(
            about,
            format!("the schema has version {applied}, and gets {wanted} at the next start"),
        ),
        (Err(_), _) => Finding::error(
            about,
            format!("the schema has version {applied}, this program wants {wanted}"),
            match applied < wanted {
                true => "run asyncproxy migrate (db.migrate is false)",
                false => "run the newer program",
            },
        ),
    }
}

fn unreadable(about: &'static str, error: &str) -> Finding {
    let mend = "if it is no SQLite file, name another; else restore it";
    Finding::error(about, error, mend)
}

fn intact(about: &'static str, checked: Result<String, String>) -> Finding {
    match checked {
        Ok(lines) if lines == "ok" => Finding::ok(about, "quick_check finds nothing wrong"),
        Ok(lines) | Err(lines) => Finding::error(about, format!("quick_check: {lines}"), REMEDY),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    fn facts(file: Option<File>) -> Facts {
        Facts {
            file,
            has_directory: true,
            ..Facts::default()
        }
    }

    fn file(mode: u32, owner: u32, is_accessible: bool) -> Option<File> {
        Some(File {
            is_regular: true,
            is_accessible,
            mode,
            owner,
        })
    }

    #[test]
    fn a_file_must_be_usable_and_private() {
        let usable = |facts: &Facts| usable("a", "path", facts).level;
        assert_eq!(usable(&facts(None)), Level::Ok);
        assert_eq!(usable(&facts(file(0o600, 0, true))), Level::Ok);
        assert_eq!(usable(&facts(file(0o600, 0, false))), Level::Error);
        assert_eq!(usable(&Facts::default()), Level::Error);
        assert_eq!(stuck("a", "path").level, Level::Error);
        let private = |mode, owner| private("a", "path", &facts(file(mode, owner, true))).level;
        assert_eq!(private(0o600, 0), Level::Ok);
        assert_eq!(private(0o644, 0), Level::Warning);
        assert_eq!(private(0o600, 1), Level::Ok, "as root sees it");
        let foreign = Facts {
            own_user: 2,
            ..facts(file(0o600, 1, true))
        };
        assert_eq!(super::private("a", "path", &foreign).level, Level::Warning);
    }

    #[test]
    fn what_lies_below_it_is_judged() {
        let on = |network| Facts {
            network,
            ..Facts::default()
        };
        assert_eq!(network("a", &on(None)), None);
        assert_eq!(network("a", &on(Some("NFS"))).unwrap().level, Level::Error);
        assert_eq!(space("a", 0, 0).level, Level::Error);
        assert_eq!(space("a", FREE_MIN, 0).level, Level::Warning);
        assert_eq!(space("a", FREE_LITTLE, FREE_LITTLE).level, Level::Ok);
        assert_eq!(space("a", FREE_LITTLE, u64::MAX).level, Level::Error);
        assert_eq!(clock("a", CLOCK_DIFFERENCE), None);
        let hour = clock("a", Duration::from_secs(3600)).unwrap();
        assert!(hour.found.contains("written 3600 s later than now"));
        assert_eq!(wal("a", WAL_LARGE), None);
        assert_eq!(wal("a", WAL_LARGE + 1).unwrap().level, Level::Warning);
        assert_eq!(intact("a", Ok("ok".into())).level, Level::Ok);
        assert_eq!(intact("a", Err("malformed".into())).level, Level::Error);
        assert!(Facts::gather(Path::new("none")).free.is_some());
    }

    #[test]
    fn what_was_saved_beside_it_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("queue.sqlite");
        assert_eq!(saved("a", &Facts::gather(&path).saved), None);
        let name = "queue.sqlite-saved-20260102T030405Z";
        fs::write(directory.path().join(name), "").unwrap();
        fs::write(directory.path().join("other.sqlite-saved-2"), "").unwrap();
        let finding = saved("a", &Facts::gather(&path).saved).unwrap();
        assert!(finding.found.ends_with(name), "{finding:?}");
    }

    #[test]
    fn a_schema_is_pending_or_wrong() {
        let level = |applied, policy| schema("a", Version { applied, wanted: 2 }, policy).level;
        assert_eq!(level(2, Policy::Require), Level::Ok);
        assert_eq!(level(0, Policy::Apply), Level::Ok);
        assert_eq!(level(0, Policy::Require), Level::Error);
        assert_eq!(level(3, Policy::Apply), Level::Error);
    }
}
