//! A TLS handshake with the destination, and what is wrong with it, for `asyncproxy doctor`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use ureq::Timeout;

use super::tls::NoTls;
use super::transport::{Input, Line};
use super::{Upstream, describe};
use crate::config::RemoteUrl;

/// How long the other side's word on our certificate is waited for: with TLS 1.3 it comes after the
/// handshake, and there need not be one.
const VERDICT_PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no secure connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Insecure {
    pub cause: Cause,
    pub why: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Something else is spoken there.
    NoTls,
    UnknownIssuer,
    OtherName,
    Expired,
    NotYetValid,
    /// The other side does not accept the certificate that it was shown, or wants one.
    OwnCertificate,
    Other,
}

/// Connects and shakes hands, within `timeout`. Sends no request.
///
/// # Errors
/// [`Insecure`].
pub fn shake_hands(
    remote: &RemoteUrl,
    tls: Option<Arc<ClientConfig>>,
    timeout: Duration,
) -> Result<(), Insecure> {
    let deadline = Instant::now().checked_add(timeout);
    let upstream = Upstream::new(remote.clone(), timeout, tls);
    let connected = upstream.connect.connect(&upstream.resolver, deadline);
    let heard = connected.and_then(|mut line| hear_verdict(&mut *line));
    heard.map_err(|error| Insecure {
        cause: cause(&error),
        why: describe(&error),
    })
}

fn hear_verdict(line: &mut dyn Line) -> Result<(), ureq::Error> {
    let deadline = Some(Instant::now() + VERDICT_PATIENCE);
    let socket = line.socket();
    if socket
        .wait(PollFlags::IN, deadline, Timeout::Connect)
        .is_err()
    {
        return Ok(());
    }
    match line.receive()? {
        Input::End => {
            let why = "connection closed after the TLS handshake";
            Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, why).into())
        }
        Input::None | Input::More => Ok(()),
    }
}

fn cause(error: &ureq::Error) -> Cause {
    let ureq::Error::Io(error) = error else {
        return Cause::Other;
    };
    let Some(inner) = error.get_ref() else {
        return Cause::Other;
    };
    if inner.is::<NoTls>() {
        return Cause::NoTls;
    }
    match inner.downcast_ref::<rustls::Error>() {
        Some(rustls::Error::InvalidCertificate(error)) => match error {
            CertificateError::UnknownIssuer => Cause::UnknownIssuer,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Cause::OtherName
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Cause::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Cause::NotYetValid
            }
            _ => Cause::Other,
        },
        Some(rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied,
        )) => Cause::OwnCertificate,
        _ => Cause::Other,
    }
}
