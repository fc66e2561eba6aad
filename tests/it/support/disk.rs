//! A disk of a chosen size, to be filled up. A tmpfs, and so only root can have it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

#[derive(Debug)]
pub struct Disk {
    directory: TempDir,
}

impl Disk {
    /// Mounts a disk; `size` as in `2m`.
    pub fn mount(size: &str) -> Disk {
        let directory = TempDir::new().expect("temporary directory");
        let options = format!("size={size},mode=0755");
        run(
            &["-t", "tmpfs", "-o", &options, "asyncproxy-test"],
            directory.path(),
        );
        Disk { directory }
    }

    /// Changes an option: `ro`, `rw`, `size=64m`.
    pub fn remount(&self, option: &str) {
        run(&["-o", &format!("remount,{option}")], self.directory.path());
    }

    /// Leaves no room; returns the file that takes it.
    pub fn fill(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let mut file = File::create(&path).expect("create a file");
        while file.write_all(&[0; 1 << 16]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a program that is still being killed must not keep it.
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.directory.path())
            .status();
    }
}

fn run(arguments: &[&str], directory: &Path) {
    let mount = Command::new("mount")
        .args(arguments)
        .arg(directory)
        .output();
    let mount = mount.expect("run mount");
    assert!(
        mount.status.success(),
        "this test fills a disk of its own and must be allowed to mount a tmpfs: run it as root \
         (in a container with CAP_SYS_ADMIN): {}",
        String::from_utf8_lossy(&mount.stderr)
    );
}
