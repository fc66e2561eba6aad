//! The hosts of the connection string, and connections to the one that is to be used.
//!
//! Each new connection goes through the list anew. A host that accepts and then says nothing costs
//! a bounded time, once: it is tried last from then on, and the connections to it are left.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::postgres::config::{Host as Name, LoadBalanceHosts, SslMode, SslNegotiation};
use ::postgres::error::SqlState;
use ::postgres::{Client, Config};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;

use super::super::StoreError;
use super::errors::{is_late, of_connecting};
use super::session::Session;
use super::stream::{Connector, Limit, Security};
use crate::config::PostgresServer;

/// The least time for connecting, as a server that is busy takes it.
const CONNECT_TIMEOUT_MIN: Duration = Duration::from_secs(2);
/// How long a connection's end is written, to a server that may not read.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);
/// After this much silence of the server TCP asks whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
/// The library's default, which stands for "not set".
const KEEPALIVE_IDLE_DEFAULT: Duration = Duration::from_secs(2 * 60 * 60);

/// When a host was last found not to be one to ask. All copies are one.
type LeftAt = Arc<Mutex<Option<Instant>>>;

/// A connection. Dropped, not reused, once it is `broken`.
pub(super) struct Link {
    pub(super) session: Session,
    /// Of this connection's reads and writes.
    pub(super) limit: Limit,
    pub(super) opened_at: Instant,
    pub(super) broken: bool,
    left_at: LeftAt,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

impl Link {
    /// No connection that is there already is used any more, and others are tried before the host.
    pub(super) fn leave_host(&self) {
        leave(&self.left_at);
    }

    fn is_left(&self) -> bool {
        let left_at = self.left_at.lock().unwrap_or_else(PoisonError::into_inner);
        left_at.is_some_and(|left_at| self.opened_at <= left_at)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The library says goodbye, and waits until that is written.
        self.limit.set(Instant::now() + CLOSE_TIMEOUT);
    }
}

fn leave(left_at: &LeftAt) {
    *left_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

/// One host of the list.
struct Host {
    config: Config,
    security: Security,
    name: String,
    timeout: Duration,
    left_at: LeftAt,
}

/// Opens connections.
pub(super) struct Hosts {
    hosts: Vec<Host>,
    /// Not in the order of the string.
    is_random: bool,
    /// Whether the database's transactions need to be told their level; for its sessions.
    pub(super) asks_isolation: Arc<AtomicBool>,
    /// Of the last try to connect; none if it succeeded.
    pub(super) last_error: Arc<Mutex<Option<String>>>,
}

impl Hosts {
    pub(super) fn new(server: &PostgresServer, timeout: Duration) -> Hosts {
        let config = bounded_config(server.config.clone(), timeout);
        let count = config.get_hosts().len();
        // Of several the next one is tried soon: it may be the one that works.
        let default = match count {
            0 | 1 => timeout.max(CONNECT_TIMEOUT_MIN),
            _ => CONNECT_TIMEOUT_MIN,
        };
        let timeout = server.config.get_connect_timeout().copied();
        let timeout = timeout.filter(|given| !given.is_zero()).unwrap_or(default);
        let hosts = (0..count).map(|index| Host::new(&config, index, server, timeout));
        Hosts {
            hosts: hosts.collect(),
            is_random: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            asks_isolation: Arc::default(),
            last_error: Arc::default(),
        }
    }

    /// How connections to any of them are made secure.
    pub(super) fn security(&self) -> Security {
        let mut all = self.hosts.iter().map(|host| host.security.clone());
        all.find(|security| !matches!(security, Security::Plain))
            .unwrap_or_default()
    }

    /// Connects to the first host that is there and takes what `target_session_attrs` asks for.
    ///
    /// # Errors
    /// What each of them said.
    pub(super) fn open(&self) -> Result<Link, String> {
        let mut errors = Vec::new();
        for host in self.in_order() {
            match host.open() {
                Ok((client, limit)) => {
                    limit.lift();
                    return Ok(Link {
                        session: Session::new(client, Arc::clone(&self.asks_isolation)),
                        limit,
                        opened_at: Instant::now(),
                        broken: false,
                        left_at: Arc::clone(&host.left_at),
                    });
                }
                Err(error) => {
                    if is_late(&error) {
                        leave(&host.left_at);
                    }
                    errors.push(format!("{}: {}", host.name, of_connecting(&error)));
                }
            }
        }
        Err(errors.join("; "))
    }

    /// Those that were left last come last.
    fn in_order(&self) -> Vec<&Host> {
        let mut hosts: Vec<&Host> = self.hosts.iter().collect();
        if self.is_random {
            fastrand::shuffle(&mut hosts);
        }
        hosts.sort_by_key(|host| *host.left_at.lock().unwrap_or_else(PoisonError::into_inner));
        hosts
    }
}

impl ManageConnection for Hosts {
    type Connection = Link;
    type Error = StoreError;

    fn connect(&self) -> Result<Link, StoreError> {
        let result = self.open();
        let mut last_error = self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last_error = result.as_ref().err().cloned();
        result.map_err(StoreError::Unavailable)
    }

    /// Asks nothing of the server: that would be a round trip for each operation.
    fn is_valid(&self, link: &mut Link) -> Result<(), StoreError> {
        match link.is_left() {
            true => Err(StoreError::Unavailable("its host did not answer".into())),
            false => Ok(()),
        }
    }

    fn has_broken(&self, link: &mut Link) -> bool {
        link.broken || link.is_left() || link.session.is_closed()
    }
}

impl Host {
    fn new(config: &Config, index: usize, server: &PostgresServer, timeout: Duration) -> Host {
        let mut single = single(config, index);
        single.connect_timeout(timeout);
        let is_local = matches!(single.get_hosts(), [Name::Unix(_)]);
        let security = match (&server.tls, config.get_ssl_mode()) {
            // Nobody listens in on a unix socket.
            _ if is_local => Security::Plain,
            (None, _) | (_, SslMode::Disable) => Security::Plain,
            (Some(tls), SslMode::Prefer) => Security::Preferred(Arc::clone(tls)),
            (Some(tls), _) => Security::Required(Arc::clone(tls)),
        };
        if is_local {
            single.ssl_mode(SslMode::Disable);
        } else {
            // Has all go through the connector, TLS or not.
            single.ssl_mode(SslMode::Require);
            single.ssl_negotiation(SslNegotiation::Direct);
        }
        Host {
            name: name(&single),
            config: single,
            security,
            timeout,
            left_at: LeftAt::default(),
        }
    }

    /// As libpq with `sslmode=prefer`: without TLS if that fails, or if the server takes the user
    /// only without it.
    fn open(&self) -> Result<(Client, Limit), ::postgres::Error> {
        let result = self.open_with(self.security.clone());
        match (&result, &self.security) {
            (Err(error), Security::Preferred(_)) if may_be_tls(error) => {
                self.open_with(Security::Plain)
            }
            _ => result,
        }
    }

    fn open_with(&self, security: Security) -> Result<(Client, Limit), ::postgres::Error> {
        let limit = Limit::until(Instant::now() + self.timeout);
        let connector = Connector {
            security,
            limit: limit.clone(),
        };
        let manager = PostgresConnectionManager::new(self.config.clone(), connector);
        Ok((manager.connect()?, limit))
    }
}

fn may_be_tls(error: &::postgres::Error) -> bool {
    match error.code() {
        Some(code) => *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        // The library does not say of what kind its errors are.
        None => {
            let text = error.to_string();
            text.starts_with("error performing TLS handshake") && !is_late(error)
        }
    }
}

/// Sets what the connection string leaves open, so that a lost host is noticed.
fn bounded_config(mut config: Config, timeout: Duration) -> Config {
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(KEEPALIVE_IDLE.max(timeout));
    }
    if config.get_keepalives_idle() == KEEPALIVE_IDLE_DEFAULT {
        config.keepalives_idle(KEEPALIVE_IDLE);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(KEEPALIVE_INTERVAL);
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(KEEPALIVE_RETRIES);
    }
    if config.get_application_name().is_none() {
        config.application_name(env!("CARGO_PKG_NAME"));
    }
    config
}

/// The same for one host of the list.
fn single(all: &Config, index: usize) -> Config {
    let mut config = Config::new();
    match &all.get_hosts()[index] {
        Name::Tcp(name) => config.host(name),
        #[cfg(unix)]
        Name::Unix(path) => config.host_path(path),
    };
    if let Some(address) = all.get_hostaddrs().get(index) {
        config.hostaddr(*address);
    }
    let ports = all.get_ports();
    if let Some(port) = ports.get(index).or(ports.first()) {
        config.port(*port);
    }
    if let Some(user) = all.get_user() {
        config.user(user);
    }
    if let Some(password) = all.get_password() {
        config.password(password);
    }
    if let Some(name) = all.get_dbname() {
        config.dbname(name);
    }
    if let Some(options) = all.get_options() {
        config.options(options);
    }
    if let Some(name) = all.get_application_name() {
        config.application_name(name);
    }
    if let Some(timeout) = all.get_tcp_user_timeout() {
        config.tcp_user_timeout(*timeout);
    }
    config.keepalives(all.get_keepalives());
    config.keepalives_idle(all.get_keepalives_idle());
    if let Some(interval) = all.get_keepalives_interval() {
        config.keepalives_interval(interval);
    }
    if let Some(retries) = all.get_keepalives_retries() {
        config.keepalives_retries(retries);
    }
    config.target_session_attrs(all.get_target_session_attrs());
    config.load_balance_hosts(all.get_load_balance_hosts());
    config.channel_binding(all.get_channel_binding());
    config
}

/// A host, for error texts.
fn name(config: &Config) -> String {
    let port = config.get_ports().first().copied().unwrap_or(5432);
    match config.get_hosts() {
        [Name::Tcp(name), ..] => format!("{name}:{port}"),
        #[cfg(unix)]
        [Name::Unix(path), ..] => path.display().to_string(),
        [] => String::new(),
    }
}
