//! Resolves the destination's name, seldom, and for all workers at once. One lookup at a time is
//! under way, in a thread of its own: getaddrinfo has no timeout and cannot be cancelled. Whoever
//! needs its result waits for no longer than its own attempt may take.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::Uri;
use http::uri::Scheme;
use ureq::config::Config;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::{Agent, Error, Timeout};

use super::transport::{deadline, left};
use crate::thread;

/// While the name is in use, it is looked up this long after the last time.
const AGAIN_AFTER: Duration = Duration::from_secs(3);
/// The same when the destination could not be reached, or the name not be resolved.
const SUSPECT_AFTER: Duration = Duration::from_secs(1);
/// Addresses that are older were in use by nobody: the next lookup is waited for.
const STALE_AFTER: Duration = Duration::from_secs(5);
/// How long a lookup is waited for while there are stale addresses.
const PATIENCE: Duration = Duration::from_secs(1);
/// How soon it is looked whether a lookup can be begun that could not.
const BEGIN_PAUSE: Duration = Duration::from_millis(100);
/// Lookups under way in the whole program: of a name that does not resolve, and of the one that
/// takes its place.
const LOOKUPS_MAX: usize = 2;

static LOOKUPS: AtomicUsize = AtomicUsize::new(0);

/// Asks the system; may take as long as it likes.
type Lookup = dyn Fn() -> Result<ResolvedSocketAddrs, String> + Send + Sync;

/// Shared by all clients of one destination.
#[derive(Clone)]
pub(super) struct CachingResolver(Arc<Shared>);

struct Shared {
    /// `None`: an address needs no resolving, and cannot change.
    lookup: Option<Box<Lookup>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    addresses: Option<ResolvedSocketAddrs>,
    ended: Option<Ended>,
    looking_since: Option<Instant>,
    is_suspect: bool,
}

/// The last lookup.
#[derive(Debug)]
struct Ended {
    at: Instant,
    error: Option<String>,
}

/// What there is for whoever asks.
enum Known {
    Usable,
    Failed(String),
    /// Perhaps then; `None`: when the lookup ends.
    Later(Option<Instant>),
}

impl fmt::Debug for CachingResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut resolver = f.debug_tuple("CachingResolver");
        resolver.field(&*self.lock()).finish()
    }
}

impl CachingResolver {
    pub(super) fn new(uri: &Uri) -> CachingResolver {
        match literal(uri) {
            Some(address) => CachingResolver::with(None, Some(address)),
            None => {
                let uri = uri.clone();
                CachingResolver::looking_up(move || resolve(&uri))
            }
        }
    }

    /// Asks `lookup` instead of the system.
    pub(super) fn looking_up(
        lookup: impl Fn() -> Result<ResolvedSocketAddrs, String> + Send + Sync + 'static,
    ) -> CachingResolver {
        CachingResolver::with(Some(Box::new(lookup)), None)
    }

    fn with(lookup: Option<Box<Lookup>>, address: Option<SocketAddr>) -> CachingResolver {
        CachingResolver(Arc::new(Shared {
            lookup,
            state: Mutex::new(State {
                addresses: address.map(|address| addresses([address])),
                ended: None,
                looking_since: None,
                is_suspect: false,
            }),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination could not be reached: its address may have changed.
    pub(super) fn suspect(&self) {
        self.lock().is_suspect = true;
    }

    /// Whether a connection to this address leads to where the name does, as far as is known.
    pub(super) fn names(&self, address: SocketAddr, timeout: NextTimeout) -> bool {
        if self.0.lookup.is_none() {
            return true;
        }
        let names = |addresses: &ResolvedSocketAddrs| addresses.contains(&address);
        self.wait(timeout, names).unwrap_or(true)
    }

    /// Waits for addresses to `use_them`.
    fn wait<T>(
        &self,
        timeout: NextTimeout,
        use_them: impl FnOnce(&ResolvedSocketAddrs) -> T,
    ) -> Result<T, Error> {
        let deadline = deadline(timeout);
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            state = self.begin_lookup(state, now);
            let until = match (state.known(now, self.0.lookup.is_some()), &state.addresses) {
                (Known::Usable, Some(addresses)) => return Ok(use_them(addresses)),
                (Known::Failed(error), _) => return Err(std::io::Error::other(error).into()),
                (Known::Later(until), _) => until,
                (Known::Usable, None) => None,
            };
            let left = deadline.map(|deadline| left(deadline, Timeout::Resolve));
            let left = left.transpose()?.unwrap_or(Duration::MAX);
            let until = until.map(|until| until.saturating_duration_since(now));
            let pause = until.unwrap_or(Duration::MAX).min(left);
            let waited = self.0.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has the name looked up if it is time.
    fn begin_lookup<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        now: Instant,
    ) -> MutexGuard<'a, State> {
        if self.0.lookup.is_none() || !state.is_due(now) {
            return state;
        }
        let one_more = |lookups| (lookups < LOOKUPS_MAX).then_some(lookups + 1);
        let order = Ordering::AcqRel;
        if LOOKUPS
            .fetch_update(order, Ordering::Acquire, one_more)
            .is_err()
        {
            return state;
        }
        state.looking_since = Some(now);
        // The lookup's end takes it, and a thread that cannot be started ends at once.
        drop(state);
        let lookup = Ongoing {
            shared: Arc::clone(&self.0),
            result: Err("no thread to look up the name".to_owned()),
        };
        let _ = thread::spawn_brief("resolver", move || lookup.run());
        self.lock()
    }
}

impl Resolver for CachingResolver {
    fn resolve(
        &self,
        _: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        self.wait(timeout, Clone::clone)
    }
}

impl State {
    fn is_due(&self, now: Instant) -> bool {
        let pause = match (&self.addresses, self.is_suspect) {
            (Some(_), false) => AGAIN_AFTER,
            _ => SUSPECT_AFTER,
        };
        self.looking_since.is_none() && self.age(now).is_none_or(|age| age >= pause)
    }

    fn age(&self, now: Instant) -> Option<Duration> {
        let ended = self.ended.as_ref()?;
        Some(now.saturating_duration_since(ended.at))
    }

    fn known(&self, now: Instant, can_change: bool) -> Known {
        if self.addresses.is_some() {
            let is_stale = can_change && self.age(now).is_none_or(|age| age >= STALE_AFTER);
            let until = self.looking_since.map(|since| since + PATIENCE);
            return match until.filter(|until| is_stale && now < *until) {
                None => Known::Usable,
                until => Known::Later(until),
            };
        }
        match &self.ended {
            _ if self.looking_since.is_some() => Known::Later(None),
            Some(Ended {
                error: Some(error), ..
            }) if !self.is_due(now) => Known::Failed(error.clone()),
            _ => Known::Later(Some(now + BEGIN_PAUSE)),
        }
    }

    /// A lookup that fails changes nothing.
    fn end(&mut self, result: Result<ResolvedSocketAddrs, String>) {
        let error = match result {
            Ok(addresses) => {
                self.addresses = Some(addresses);
                None
            }
            Err(error) => Some(error),
        };
        self.ended = Some(Ended {
            at: Instant::now(),
            error,
        });
        self.looking_since = None;
        self.is_suspect = false;
    }
}

/// A lookup under way; its end is told however it ends.
struct Ongoing {
    shared: Arc<Shared>,
    result: Result<ResolvedSocketAddrs, String>,
}

impl Ongoing {
    fn run(mut self) {
        if let Some(lookup) = &self.shared.lookup {
            self.result = lookup();
        }
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        LOOKUPS.fetch_sub(1, Ordering::AcqRel);
        let result = std::mem::replace(&mut self.result, Err(String::new()));
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner).end(result);
        self.shared.changed.notify_all();
    }
}

/// The address that stands in place of a name.
fn literal(uri: &Uri) -> Option<SocketAddr> {
    let ip: IpAddr = uri.host()?.trim_matches(['[', ']']).parse().ok()?;
    let default = if uri.scheme() == Some(&Scheme::HTTPS) {
        443
    } else {
        80
    };
    Some(SocketAddr::new(ip, uri.port_u16().unwrap_or(default)))
}

fn resolve(uri: &Uri) -> Result<ResolvedSocketAddrs, String> {
    let config = Agent::config_builder().build();
    let resolved = DefaultResolver::default().resolve(uri, &config, NextTimeout::default());
    resolved.map_err(|error| super::describe(&error))
}

fn addresses(from: impl IntoIterator<Item = SocketAddr>) -> ResolvedSocketAddrs {
    let mut addresses = DefaultResolver::default().empty();
    for address in from {
        addresses.push(address);
    }
    addresses
}
