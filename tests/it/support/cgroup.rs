//! Control groups with a memory limit, where this process may make some.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A group of its own. Removed when dropped, which is to be after its processes have ended.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// `None` where none can be made, or none that bounds memory.
    pub fn with_memory(bytes: usize) -> Option<Cgroup> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("asyncproxy-test-{}-{number}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        let files = [
            (root.join("memory"), "memory.limit_in_bytes"),
            (root.to_owned(), "memory.max"),
        ];
        files.into_iter().find_map(|(tree, file)| {
            let group = tree.join(&name);
            fs::create_dir(&group).ok()?;
            let cgroup = Cgroup(group);
            // Where there is no such file, this is no tree of groups, or not one with memory.
            let limit = cgroup.0.join(file);
            let is_set = limit.exists() && fs::write(limit, bytes.to_string()).is_ok();
            is_set.then_some(cgroup)
        })
    }

    /// A line of shell that puts the shell into it.
    pub fn enter(&self) -> String {
        format!("echo $$ > {}", self.0.join("cgroup.procs").display())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
