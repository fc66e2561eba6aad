//! Settings: raw text from YAML and ENV in, a validated [`Config`] out. Nothing later checks again.

use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use http::uri::{Authority, Scheme};

use crate::settle::RetryPolicy;

/// All settings, validated.
#[derive(Debug)]
pub struct Config {
    pub server: Server,
    pub metrics: Metrics,
    pub proxy: Proxy,
    pub queue: Queue,
    pub db: Db,
    pub log: Log,
}

#[derive(Debug)]
pub struct Server {
    pub bind: Bind,
    pub response_status: u16,
    pub shutdown_timeout: Duration,
    pub enqueue_enabled: bool,
    pub enqueue_rate: u32,
    pub acceptor: Acceptor,
    pub max_body_size: usize,
    pub memory_limit: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptor {
    TinyHttp,
}

#[derive(Debug)]
pub struct Metrics {
    pub bind: Bind,
    pub path: String,
    pub max_paths: usize,
}

#[derive(Debug)]
pub struct Proxy {
    pub remote_url: RemoteUrl,
    pub request_timeout: Duration,
    pub num_clients: usize,
}

/// `proxy.remote_url`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteUrl {
    pub scheme: Scheme,
    pub authority: Authority,
    /// Put before each target; empty or begins with `/`, never ends with one.
    pub path_prefix: String,
}

#[derive(Debug)]
pub struct Queue {
    pub workers: usize,
    pub handle_per_second: u32,
    pub retry: RetryPolicy,
}

#[derive(Debug)]
pub struct Db {
    pub database: Database,
    pub max_connections: u32,
    pub use_index: bool,
    pub timeout: Duration,
}

/// `db.connection_string`, taken apart.
#[derive(Debug)]
pub enum Database {
    Sqlite(PathBuf),
    Postgres(Box<postgres::Config>),
}

#[derive(Debug)]
pub struct Log {
    pub level: log::LevelFilter,
}

/// An address to listen on: `host:port`, or `:port` for all addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind(String);

impl Bind {
    pub fn listen(&self) -> io::Result<TcpListener> {
        TcpListener::bind(&self.0)
    }
}

impl std::fmt::Display for Bind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
