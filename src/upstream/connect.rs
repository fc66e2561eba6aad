//! Opens connections to the destination with ureq's connectors: one for TCP, and one for TLS on
//! top of it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use http::Uri;
#[cfg(feature = "tls")]
use http::uri::Scheme;
use ureq::config::Config;
use ureq::unversioned::resolver::Resolver;
use ureq::unversioned::transport::{ConnectionDetails, Connector, NextTimeout, time};
use ureq::{Agent, Error, Timeout};

use super::buffers::Pool;
use super::resolver::CachingResolver;
#[cfg(feature = "tls")]
use super::tls::Tls;
use super::transport::{Line, Tcp, left};
#[cfg(feature = "tls")]
use crate::tls::ClientConfig;

/// All that is needed to reach one destination.
#[derive(Debug)]
pub(super) struct Connect {
    uri: Uri,
    config: Config,
    tcp: Tcp,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
}

impl Connect {
    /// Without TLS.
    pub(super) fn new(uri: Uri, pool: &Arc<Pool>) -> Connect {
        Connect {
            uri,
            config: Agent::config_builder().proxy(None).build(),
            tcp: Tcp {
                pool: Arc::clone(pool),
            },
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    #[cfg(feature = "tls")]
    pub(super) fn secured(self, config: Arc<ClientConfig>) -> Connect {
        let pool = Arc::clone(&self.tcp.pool);
        Connect {
            tls: Some(Tls { config, pool }),
            ..self
        }
    }

    /// Opens a connection to one of the name's addresses by `deadline`.
    ///
    /// # Errors
    /// Why there is none. Nothing was sent on it.
    ///
    /// Out of line: what it takes of the stack, all workers that wait for an answer would have
    /// as well.
    #[inline(never)]
    pub(super) fn connect(
        &self,
        resolver: &CachingResolver,
        deadline: Option<Instant>,
    ) -> Result<Box<dyn Line>, Error> {
        #[cfg(feature = "tls")]
        if self.tls.is_none() && self.uri.scheme() == Some(&Scheme::HTTPS) {
            // What was to be encrypted is not sent in the clear.
            let why = "no https destination is trusted: there are no root certificates";
            return Err(io::Error::other(why).into());
        }
        let timeout = by(deadline, Timeout::Resolve)?;
        let addrs = resolver.resolve(&self.uri, &self.config, timeout)?;
        #[allow(unused_mut, reason = "changed for TLS only")]
        let mut details = ConnectionDetails {
            uri: &self.uri,
            addrs,
            config: &self.config,
            request_level: false,
            resolver,
            now: time::Instant::now(),
            timeout: by(deadline, Timeout::Connect)?,
            current_time: Arc::new(time::Instant::now),
            run_connector: Arc::new(|_| Err(Error::ConnectionFailed)),
            register_shutdown: Arc::new(|_| Ok(())),
        };
        let connection = self
            .tcp
            .connect(&details, None)?
            .ok_or_else(no_connection)?;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            details.timeout = by(deadline, Timeout::Connect)?;
            let secured = tls.connect(&details, Some(connection))?;
            return Ok(Box::new(secured.ok_or_else(no_connection)?));
        }
        Ok(Box::new(connection))
    }
}

fn no_connection() -> Error {
    Error::Io(io::Error::from(io::ErrorKind::NotConnected))
}

/// What is left of the time until then.
pub(super) fn by(deadline: Option<Instant>, reason: Timeout) -> Result<NextTimeout, Error> {
    let mut timeout = NextTimeout {
        reason,
        ..NextTimeout::default()
    };
    if let Some(deadline) = deadline {
        timeout.after = left(deadline, reason)?.into();
    }
    Ok(timeout)
}
