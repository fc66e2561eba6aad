//! A disk that hangs: a library loaded before all others, in which a sync does not return as long
//! as a file is there.

use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::proxy::Setup;

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int sync_when_it_works(const char *name, int fd) {
    const char *hangs = getenv("DISK_HANGS");
    while (hangs && access(hangs, F_OK) == 0)
        usleep(5000);
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return sync_when_it_works("fsync", fd); }
int fdatasync(int fd) { return sync_when_it_works("fdatasync", fd); }
"#;

#[derive(Debug)]
pub struct HangingDisk {
    directory: TempDir,
}

impl HangingDisk {
    /// Works, at first.
    pub fn new() -> HangingDisk {
        let directory = TempDir::new().expect("temporary directory");
        let disk = HangingDisk { directory };
        std::fs::write(disk.path("sync.c"), SOURCE).expect("write");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .args([disk.path("sync.so"), disk.path("sync.c")])
            .arg("-ldl")
            .status()
            .expect("run cc");
        assert!(built.success());
        disk
    }

    pub fn below(&self, setup: Setup) -> Setup {
        setup
            .env("LD_PRELOAD", self.path("sync.so").display())
            .env("DISK_HANGS", self.path("hangs").display())
    }

    pub fn hang(&self) {
        std::fs::write(self.path("hangs"), "").expect("write");
    }

    pub fn work(&self) {
        std::fs::remove_file(self.path("hangs")).expect("remove");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}
