//! What the system lets this process have: the limits of its control groups, of both versions, and
//! the machine's memory.

use std::fs;
use std::path::{Path, PathBuf};

const CGROUPS: &str = "/sys/fs/cgroup";

/// A limit that control groups have, under its names in the two versions.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    v2: &'static str,
    /// The controller, and the file in its own tree.
    v1: (&'static str, &'static str),
}

pub const MEMORY: Limit = Limit {
    v2: "memory.max",
    v1: ("memory", "memory.limit_in_bytes"),
};

pub const THREADS: Limit = Limit {
    v2: "pids.max",
    v1: ("pids", "pids.max"),
};

/// Bytes that this process may have: of the machine, or of its control group.
pub fn memory() -> Option<u64> {
    let total = total(&fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(lowest(MEMORY).map_or(total, |limit| limit.min(total)))
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// The lowest limit from this process' control group up to the root.
pub fn lowest(limit: Limit) -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    lowest_in(Path::new(CGROUPS), &own, limit)
}

/// `own` is what the kernel tells of a process' groups: `ID:CONTROLLERS:PATH`, one a line.
fn lowest_in(root: &Path, own: &str, limit: Limit) -> Option<u64> {
    let (controller, v1) = limit.v1;
    let mut lowest: Option<u64> = None;
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (tree, name) = match controllers {
            "" => (root.to_owned(), limit.v2),
            some if some.split(',').any(|one| one == controller) => (root.join(controller), v1),
            _ => continue,
        };
        let found = up_to_root(tree, path).filter_map(|group| number(&group.join(name)));
        lowest = lowest.into_iter().chain(found).min();
    }
    lowest
}

/// A group and those it lies in. Inside a container the first may not be there to be seen.
fn up_to_root(tree: PathBuf, path: &str) -> impl Iterator<Item = PathBuf> {
    let path = path.trim_start_matches('/').to_owned();
    let mut group = Some(if path.contains("..") {
        // Outside of what this process sees.
        PathBuf::new()
    } else {
        PathBuf::from(path)
    });
    std::iter::from_fn(move || {
        let here = group.take()?;
        group = here.parent().map(Path::to_owned);
        Some(tree.join(here))
    })
}

/// The number in a file. `max`, which is none, counts as no limit.
pub fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, group: &str, name: &str, text: &str) {
        let group = root.join(group);
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join(name), text).unwrap();
    }

    #[test]
    fn the_lowest_limit_of_all_groups_around_counts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "", "memory.max", "max\n");
        write(root, "system.slice", "memory.max", "1000\n");
        write(root, "system.slice/our.service", "memory.max", "2000\n");
        let memory = |own| lowest_in(root, own, MEMORY);
        assert_eq!(memory("0::/system.slice/our.service\n"), Some(1000));
        assert_eq!(memory("0::/system.slice/other/deeper\n"), Some(1000));
        assert_eq!(memory("0::/\n"), None);
        assert_eq!(memory("0::/../system.slice\n"), None);
        for odd in ["", "0", "0:", ":::", "1:cpu:/system.slice"] {
            assert_eq!(memory(odd), None, "{odd}");
        }
    }

    #[test]
    fn both_versions_are_read_beside_each_other() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let none = "9223372036854771712\n";
        write(root, "memory", "memory.limit_in_bytes", none);
        write(root, "memory/docker/a", "memory.limit_in_bytes", "3000\n");
        write(root, "pids/docker/a", "pids.max", "40\n");
        let own = "5:pids:/docker/a\n4:cpu,memory:/docker/a\n0::/\n";
        assert_eq!(lowest_in(root, own, MEMORY), Some(3000));
        assert_eq!(lowest_in(root, own, THREADS), Some(40));
        // As a container sees it whose groups are those of the host.
        let unseen = "4:memory:/docker/of-the-host\n";
        assert_eq!(
            lowest_in(root, unseen, MEMORY),
            Some(9_223_372_036_854_771_712)
        );
        write(root, "", "memory.max", "2000\n");
        assert_eq!(lowest_in(root, own, MEMORY), Some(2000));
    }

    #[test]
    fn the_machine_has_memory() {
        assert_eq!(total("MemTotal:       1000 kB\n"), Some(1_024_000));
        assert_eq!(total("MemFree: 1000 kB\n"), None);
        assert!(memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
