//! Resolves the destination's name, seldom: every worker would otherwise ask for each request.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::Uri;
use http::uri::Authority;
use ureq::config::Config;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// How long an answer is used while the destination can be reached.
const FRESH_FOR: Duration = Duration::from_secs(30);
/// How long it is used at least when it cannot: its address may have changed.
const SUSPECT_FOR: Duration = Duration::from_secs(1);

/// Shared by all clients. There is one destination, so there is one entry.
#[derive(Debug, Clone)]
pub(super) struct CachingResolver {
    cached: Arc<Mutex<Option<Cached>>>,
    /// An address needs no resolving, and cannot change.
    is_literal: bool,
}

#[derive(Debug)]
struct Cached {
    addresses: ResolvedSocketAddrs,
    resolved_at: Instant,
    use_for: Duration,
}

impl CachingResolver {
    pub(super) fn new(authority: &Authority) -> CachingResolver {
        let host = authority.host().trim_matches(['[', ']']);
        CachingResolver {
            cached: Arc::default(),
            is_literal: host.parse::<IpAddr>().is_ok(),
        }
    }

    /// A request has failed: resolve again soon.
    pub(super) fn suspect(&self) {
        if let Some(cached) = &mut *self.cached.lock().unwrap_or_else(PoisonError::into_inner) {
            cached.use_for = SUSPECT_FOR;
        }
    }

    /// What is known, if it may still be used. When it no longer may, the first to ask is told
    /// to resolve it, and all others go on using it meanwhile.
    fn known(&self, now: Instant) -> Option<ResolvedSocketAddrs> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        let cached = cached.as_mut()?;
        if !self.is_literal && now.duration_since(cached.resolved_at) >= cached.use_for {
            cached.resolved_at = now;
            return None;
        }
        Some(cached.addresses.clone())
    }
}

impl Resolver for CachingResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        if let Some(addresses) = self.known(Instant::now()) {
            return Ok(addresses);
        }
        // In a thread of its own within the timeout: getaddrinfo has none.
        let addresses = DefaultResolver::default().resolve(uri, config, timeout)?;
        *self.cached.lock().unwrap_or_else(PoisonError::into_inner) = Some(Cached {
            addresses: addresses.clone(),
            resolved_at: Instant::now(),
            use_for: FRESH_FOR,
        });
        Ok(addresses)
    }
}
