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
/// A name that changes is followed within 5 seconds, of which 2 are for the lookup itself.
const _: () = assert!(AGAIN_AFTER.as_secs() <= 3 && STALE_AFTER.as_secs() <= 5);
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
    /// Lookups under way, of all who share the bound.
    lookups: &'static AtomicUsize,
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
            Some(address) => CachingResolver::with(&LOOKUPS, None, Some(address)),
            None => {
                let uri = uri.clone();
                CachingResolver::looking_up(&LOOKUPS, move || resolve(&uri))
            }
        }
    }

    /// Asks `lookup`, of which [`LOOKUPS_MAX`] are under way at most, as `lookups` counts them.
    pub(super) fn looking_up(
        lookups: &'static AtomicUsize,
        lookup: impl Fn() -> Result<ResolvedSocketAddrs, String> + Send + Sync + 'static,
    ) -> CachingResolver {
        CachingResolver::with(lookups, Some(Box::new(lookup)), None)
    }

    fn with(
        lookups: &'static AtomicUsize,
        lookup: Option<Box<Lookup>>,
        address: Option<SocketAddr>,
    ) -> CachingResolver {
        CachingResolver(Arc::new(Shared {
            lookup,
            state: Mutex::new(State {
                addresses: address.map(|address| addresses([address])),
                ended: None,
                looking_since: None,
                is_suspect: false,
            }),
            changed: Condvar::new(),
            lookups,
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
        let lookups = self.0.lookups;
        if lookups
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
        self.shared.lookups.fetch_sub(1, Ordering::AcqRel);
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

pub(super) fn addresses(from: impl IntoIterator<Item = SocketAddr>) -> ResolvedSocketAddrs {
    let mut addresses = DefaultResolver::default().empty();
    for address in from {
        addresses.push(address);
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    const MINUTE: Duration = Duration::from_secs(60);

    type Answers = Result<ResolvedSocketAddrs, String>;

    /// A name server that answers when it is told to, and counts.
    struct Server {
        asked: Receiver<()>,
        answers: Sender<Answers>,
    }

    fn server() -> (CachingResolver, Server) {
        sharing(Box::leak(Box::default()))
    }

    fn sharing(lookups: &'static AtomicUsize) -> (CachingResolver, Server) {
        let (ask, asked) = channel();
        let (answers, answer) = channel::<Answers>();
        let answer = Mutex::new(answer);
        let resolver = CachingResolver::looking_up(lookups, move || {
            ask.send(()).map_err(|error| error.to_string())?;
            let answer = answer.lock().unwrap();
            answer.recv().map_err(|error| error.to_string())?
        });
        (resolver, Server { asked, answers })
    }

    impl Server {
        fn wait_until_asked(&self) {
            self.asked.recv_timeout(MINUTE).unwrap();
        }

        fn answer(&self, port: u16) {
            self.answers.send(Ok(addresses([at(port)]))).unwrap();
        }
    }

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    fn within(time: Duration) -> NextTimeout {
        NextTimeout {
            after: time.into(),
            ..NextTimeout::default()
        }
    }

    fn port(resolver: &CachingResolver) -> u16 {
        resolver
            .wait(within(MINUTE), |found| found[0].port())
            .unwrap()
    }

    /// As if the last lookup had ended so much earlier.
    fn age(resolver: &CachingResolver, by: Duration) {
        let mut state = resolver.lock();
        let ended = state.ended.as_mut().unwrap();
        ended.at = ended.at.checked_sub(by).unwrap();
    }

    fn wait_for_end(resolver: &CachingResolver) {
        let state = resolver.lock();
        let looking = |state: &mut State| state.looking_since.is_some();
        let waited = resolver
            .0
            .changed
            .wait_timeout_while(state, MINUTE, looking);
        assert!(!waited.unwrap().1.timed_out());
    }

    #[test]
    fn all_who_wait_share_one_lookup() {
        let (resolver, server) = server();
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..50).map(|_| scope.spawn(|| port(&resolver))).collect();
            server.wait_until_asked();
            server.answer(1);
            assert!(
                waiting
                    .into_iter()
                    .all(|thread| thread.join().unwrap() == 1)
            );
        });
        assert_eq!(port(&resolver), 1);
        assert!(server.asked.try_recv().is_err());
    }

    #[test]
    fn a_lookup_that_hangs_is_waited_for_until_the_attempt_is_over_and_not_multiplied() {
        let (resolver, server) = server();
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    let waited = resolver.wait(within(Duration::from_millis(50)), |_| ());
                    assert!(matches!(waited, Err(Error::Timeout(Timeout::Resolve))));
                });
            }
        });
        server.wait_until_asked();
        assert!(server.asked.try_recv().is_err());
        server.answer(1);
        assert_eq!(port(&resolver), 1);
    }

    #[test]
    fn while_the_name_is_in_use_nobody_waits_for_the_next_lookup() {
        let (resolver, server) = server();
        server.answer(1);
        assert_eq!(port(&resolver), 1);
        server.wait_until_asked();
        age(&resolver, AGAIN_AFTER);
        // It is under way, and nobody waits for it.
        assert_eq!(port(&resolver), 1);
        server.wait_until_asked();
        assert_eq!(port(&resolver), 1);
        server.answer(2);
        wait_for_end(&resolver);
        assert_eq!(port(&resolver), 2);
        assert!(resolver.names(at(2), within(MINUTE)));
        assert!(!resolver.names(at(1), within(MINUTE)));
    }

    #[test]
    fn addresses_that_nobody_used_for_long_are_looked_up_first_but_not_for_ever() {
        let now = Instant::now();
        let aged = |age: Duration| State {
            addresses: Some(addresses([at(1)])),
            ended: Some(Ended {
                at: now.checked_sub(age).unwrap(),
                error: None,
            }),
            looking_since: Some(now),
            is_suspect: false,
        };
        let is_usable = |age, now, can_change| {
            let known = aged(age).known(now, can_change);
            assert!(!matches!(known, Known::Failed(_)));
            matches!(known, Known::Usable)
        };
        assert!(is_usable(AGAIN_AFTER, now, true));
        assert!(!is_usable(STALE_AFTER, now, true));
        assert!(is_usable(STALE_AFTER, now, false));
        // Then the old ones are better than none.
        assert!(is_usable(STALE_AFTER, now + PATIENCE, true));
    }

    #[test]
    fn a_lookup_that_fails_keeps_the_old_addresses() {
        let (resolver, server) = server();
        server.answer(1);
        assert_eq!(port(&resolver), 1);
        for _ in 0..3 {
            age(&resolver, AGAIN_AFTER);
            server.answers.send(Err("no answer".into())).unwrap();
            assert_eq!(port(&resolver), 1);
            wait_for_end(&resolver);
        }
        resolver.suspect();
        age(&resolver, SUSPECT_AFTER);
        assert_eq!(port(&resolver), 1);
        server.answer(2);
        wait_for_end(&resolver);
        assert_eq!(port(&resolver), 2);
    }

    #[test]
    fn a_failure_is_shared_for_a_second() {
        let (resolver, server) = server();
        server.answers.send(Err("no such name".into())).unwrap();
        for _ in 0..3 {
            let failed = resolver.wait(within(MINUTE), |_| ()).unwrap_err();
            assert_eq!(super::super::describe(&failed), "no such name");
        }
        server.wait_until_asked();
        age(&resolver, SUSPECT_AFTER);
        server.answer(1);
        assert_eq!(port(&resolver), 1);
        server.wait_until_asked();
        assert!(server.asked.try_recv().is_err());
    }

    #[test]
    fn lookups_that_hang_are_few_however_many_names_there_were() {
        let lookups = Box::leak(Box::default());
        let all: Vec<_> = (0..LOOKUPS_MAX + 2).map(|_| sharing(lookups)).collect();
        for (resolver, _) in &all {
            let waited = resolver.wait(within(Duration::from_millis(50)), |_| ());
            assert!(matches!(waited, Err(Error::Timeout(Timeout::Resolve))));
        }
        let (hanging, waiting) = all.split_at(LOOKUPS_MAX);
        hanging
            .iter()
            .for_each(|(_, server)| server.wait_until_asked());
        assert!(
            waiting
                .iter()
                .all(|(_, server)| server.asked.try_recv().is_err())
        );
        hanging[0].1.answer(1);
        let (resolver, server) = &waiting[0];
        server.answer(7);
        assert_eq!(port(resolver), 7);
    }

    #[test]
    fn a_lookup_that_panics_is_one_that_fails() {
        let lookups = Box::leak(Box::default());
        let resolver = CachingResolver::looking_up(lookups, || panic!("expected by this test"));
        assert!(resolver.wait(within(MINUTE), |_| ()).is_err());
        assert!(resolver.lock().looking_since.is_none());
    }

    #[test]
    fn an_address_needs_no_lookup() {
        for (url, expected) in [
            ("http://192.0.2.1", "192.0.2.1:80"),
            ("https://192.0.2.1", "192.0.2.1:443"),
            ("http://[2001:db8::1]:81", "[2001:db8::1]:81"),
        ] {
            let resolver = CachingResolver::new(&url.parse().unwrap());
            let found = resolver.wait(within(Duration::ZERO), |found| found[0]);
            assert_eq!(found.unwrap().to_string(), expected);
            assert!(resolver.0.lookup.is_none());
        }
    }
}
