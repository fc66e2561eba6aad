//! The bytes beneath the postgres crate, with a limit to how long they are waited for.
//!
//! That crate waits for an answer without one, and a frozen server answers nothing. It takes its
//! connections from a "TLS connector", which is here, whether there is TLS or not: so every read
//! and write passes a [`Limit`], and fails when that is over. Through a unix socket it takes none:
//! there, what a frozen server on this machine does not answer ends when that resumes or ends.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ::postgres::Socket;
use ::postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
#[cfg(feature = "tls")]
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Sleep;

use crate::tls::ClientConfig;

/// `SSLRequest` of the protocol: its length, and the code that no version has.
#[cfg(feature = "tls")]
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Until when a connection's bytes are waited for. All copies are one.
#[derive(Debug, Clone, Default)]
pub(super) struct Limit(Arc<Mutex<Wait>>);

#[derive(Debug, Clone, Copy, Default)]
struct Wait {
    /// `None`: without end.
    until: Option<Instant>,
    /// Begins anew with whatever comes.
    silence: Option<Duration>,
}

impl Limit {
    pub(super) fn until(until: Instant) -> Limit {
        let limit = Limit::default();
        limit.set(until);
        limit
    }

    fn wait(&self) -> MutexGuard<'_, Wait> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, until: Instant) {
        *self.wait() = Wait {
            until: Some(until),
            silence: None,
        };
    }

    /// Limits how long the server may say nothing, not how long all takes.
    pub(super) fn set_silence(&self, silence: Duration) {
        *self.wait() = Wait {
            until: Some(Instant::now() + silence),
            silence: Some(silence),
        };
    }

    pub(super) fn lift(&self) {
        *self.wait() = Wait::default();
    }

    fn heard(&self) {
        let mut wait = self.wait();
        if let Some(silence) = wait.silence {
            wait.until = Some(Instant::now() + silence);
        }
    }
}

/// How a connection is made secure, if it is.
#[derive(Debug, Clone, Default)]
pub(super) enum Security {
    #[default]
    Plain,
    /// If the server can do it.
    Preferred(Arc<ClientConfig>),
    Required(Arc<ClientConfig>),
}

/// Makes the connections' streams. The crate's own negotiation of TLS has to be off (`direct`),
/// as it would wait for its answer without a limit.
#[derive(Debug, Clone, Default)]
pub(super) struct Connector {
    pub(super) security: Security,
    pub(super) limit: Limit,
}

impl MakeTlsConnect<Socket> for Connector {
    type Stream = Stream;
    type TlsConnect = Connecting;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Connecting> {
        Ok(Connecting {
            connector: self.clone(),
            domain: domain.to_owned(),
        })
    }
}

/// One connection to come.
#[derive(Debug)]
pub(super) struct Connecting {
    connector: Connector,
    domain: String,
}

impl TlsConnect<Socket> for Connecting {
    type Stream = Stream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        Box::pin(async move {
            let Connector { security, limit } = self.connector;
            let until = limit.wait().until;
            let secured = secure(socket, security, self.domain);
            let bytes = match until {
                Some(until) => tokio::time::timeout_at(until.into(), secured)
                    .await
                    .map_err(|_| no_answer())??,
                None => secured.await?,
            };
            Ok(Stream {
                bytes,
                limit,
                alarm: Box::pin(tokio::time::sleep(Duration::ZERO)),
            })
        })
    }
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

#[cfg(feature = "tls")]
async fn secure(mut socket: Socket, security: Security, host: String) -> io::Result<Bytes> {
    let (config, is_required) = match security {
        Security::Plain => return Ok(Bytes::Plain(socket)),
        Security::Preferred(config) => (config, false),
        Security::Required(config) => (config, true),
    };
    if !asks_for_tls(&mut socket).await? {
        return match is_required {
            true => Err(io::Error::other("server does not support TLS")),
            false => Ok(Bytes::Plain(socket)),
        };
    }
    let stream = super::tls::handshake(config, host, socket).await?;
    Ok(Bytes::Secure(Box::new(stream)))
}

#[cfg(not(feature = "tls"))]
async fn secure(socket: Socket, security: Security, _host: String) -> io::Result<Bytes> {
    match security {
        Security::Plain => Ok(Bytes::Plain(socket)),
        // Without TLS there is no configuration of it.
        Security::Preferred(config) | Security::Required(config) => match *config {},
    }
}

/// Whether the server is ready for a handshake.
#[cfg(feature = "tls")]
async fn asks_for_tls(socket: &mut Socket) -> io::Result<bool> {
    socket.write_all(&SSL_REQUEST).await?;
    let mut answer = [0];
    socket.read_exact(&mut answer).await?;
    Ok(answer == *b"S")
}

enum Bytes {
    Plain(Socket),
    #[cfg(feature = "tls")]
    Secure(Box<tokio_rustls::client::TlsStream<Socket>>),
}

/// A connection whose waits are limited.
pub(super) struct Stream {
    bytes: Bytes,
    limit: Limit,
    alarm: Pin<Box<Sleep>>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Stream {
    fn limited<T>(
        &mut self,
        context: &mut Context<'_>,
        operation: impl FnOnce(Pin<&mut Bytes>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let result = operation(Pin::new(&mut self.bytes), context);
        if result.is_ready() {
            self.limit.heard();
            return result;
        }
        let until = self.limit.wait().until;
        let Some(until) = until.map(tokio::time::Instant::from_std) else {
            return Poll::Pending;
        };
        if self.alarm.deadline() != until {
            self.alarm.as_mut().reset(until);
        }
        self.alarm.as_mut().poll(context).map(|()| Err(no_answer()))
    }
}

impl TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.bytes {
            Bytes::Plain(_) => ChannelBinding::none(),
            #[cfg(feature = "tls")]
            Bytes::Secure(stream) => super::tls::channel_binding(stream),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.limited(context, |bytes, context| bytes.poll_read(context, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.limited(context, |bytes, context| bytes.poll_write(context, buffer))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.limited(context, Bytes::poll_flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.limited(context, Bytes::poll_shutdown)
    }
}

/// Calls a method of whichever of the two it is.
macro_rules! either {
    ($bytes:expr, $stream:ident => $call:expr) => {
        match $bytes.get_mut() {
            Bytes::Plain(socket) => {
                let $stream = Pin::new(socket);
                $call
            }
            #[cfg(feature = "tls")]
            Bytes::Secure(stream) => {
                let $stream = Pin::new(stream.as_mut());
                $call
            }
        }
    };
}

impl Bytes {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(context, buffer))
    }

    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(context, buffer))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(context))
    }
}
