//! What a process takes of the system, as the kernel tells.

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[derive(Debug, Clone, Copy)]
pub struct Usage {
    pub resident_bytes: usize,
    /// The most that was ever resident.
    pub peak_bytes: usize,
    pub threads: usize,
    pub descriptors: usize,
}

impl Usage {
    pub fn of(pid: u32) -> Usage {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let number = |name: &str| -> usize {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let value = line.expect(name).trim().trim_end_matches(" kB");
            value.parse().expect(name)
        };
        Usage {
            resident_bytes: number("VmRSS:") * 1024,
            peak_bytes: number("VmHWM:") * 1024,
            threads: number("Threads:"),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).expect("fd").count(),
        }
    }
}

/// Open sockets of a process, but for connections to `destination`.
pub fn sockets_but_to(pid: u32, destination: SocketAddr) -> usize {
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("net/tcp");
    let port = format!(":{:04X}", destination.port());
    let connections = table.lines().map(|line| line.split_whitespace().collect());
    let inodes: HashSet<String> = connections
        .filter(|fields: &Vec<_>| fields.get(2).is_some_and(|remote| remote.ends_with(&port)))
        .filter_map(|fields| Some(format!("socket:[{}]", fields.get(9)?)))
        .collect();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("fd");
    descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.ok()?.path()).ok())
        .filter_map(|opened| opened.into_os_string().into_string().ok())
        .filter(|opened| opened.starts_with("socket:") && !inodes.contains(opened))
        .count()
}

/// Enough for the largest crowd and for what runs beside it.
const DESCRIPTORS: u64 = 8192;

/// Lets the tests themselves open many files.
pub fn raise_own_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|soft| soft >= DESCRIPTORS) {
        return;
    }
    let raised = Rlimit {
        current: Some(DESCRIPTORS),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).expect("raise the limit of open files: see ulimit -Hn");
}
