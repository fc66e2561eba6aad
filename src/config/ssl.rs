//! What is to be verified and shown when TLS is spoken: `proxy.ca_file` and its like, and in a connection
//! string `sslmode` and its like, as libpq means them.

use std::path::PathBuf;
use std::sync::Arc;

use postgres::config::SslMode;

use super::address::RemoteUrl;
use super::raw::{ConfigError, Raw};
use crate::tls::{self, ClientConfig};

/// The keywords that are understood here.
#[derive(Debug, Default)]
pub(super) struct Ssl {
    mode: Option<String>,
    root_cert: Option<String>,
    cert: Option<String>,
    key: Option<String>,
}

/// What the connections need: the mode, and with whom to speak TLS.
pub(super) type Resolved = (SslMode, Option<Arc<ClientConfig>>);

/// What a mode asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Ssl {
    /// Whether the keyword is one of these; an empty value counts as none.
    pub(super) fn take(&mut self, keyword: &str, value: &str) -> bool {
        let place = match keyword {
            "sslmode" => &mut self.mode,
            "sslrootcert" => &mut self.root_cert,
            "sslcert" => &mut self.cert,
            "sslkey" => &mut self.key,
            _ => return false,
        };
        *place = Some(value.to_owned()).filter(|value| !value.is_empty());
        true
    }

    /// `sslkey`.
    pub(super) fn key_file(&self) -> Option<PathBuf> {
        self.key.as_ref().map(PathBuf::from)
    }

    /// # Errors
    /// What the string must be.
    pub(super) fn resolve(self) -> Result<Resolved, String> {
        let mode = self.mode()?;
        let ssl_mode = match mode {
            Mode::Disable => return Ok((SslMode::Disable, None)),
            Mode::Prefer => SslMode::Prefer,
            _ => SslMode::Require,
        };
        let config = self.client(mode)?;
        if config.is_none() && mode == Mode::Prefer {
            return Ok((SslMode::Disable, None));
        }
        Ok((ssl_mode, config))
    }

    fn mode(&self) -> Result<Mode, String> {
        let is_system = self.root_cert.as_deref() == Some("system");
        let mode = match self.mode.as_deref() {
            None if is_system => Mode::VerifyFull,
            // Its only difference to prefer is which of the two is tried first.
            None | Some("allow" | "prefer") => Mode::Prefer,
            Some("disable") => Mode::Disable,
            Some("require") => Mode::Require,
            Some("verify-ca") => Mode::VerifyCa,
            Some("verify-full") => Mode::VerifyFull,
            Some(_) => {
                return Err(
                    "with an sslmode of disable, allow, prefer, require, verify-ca \
                            or verify-full"
                        .into(),
                );
            }
        };
        if is_system && mode != Mode::VerifyFull {
            return Err("with sslmode=verify-full if sslrootcert=system".into());
        }
        Ok(mode)
    }

    #[cfg(not(feature = "tls"))]
    fn client(self, mode: Mode) -> Result<Option<Arc<ClientConfig>>, String> {
        let Ssl { .. } = self;
        match mode {
            Mode::Disable | Mode::Prefer => Ok(None),
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => Err(
                "without sslmode=require or above: this build has no TLS (cargo feature tls)"
                    .into(),
            ),
        }
    }

    #[cfg(feature = "tls")]
    fn client(self, mode: Mode) -> Result<Option<Arc<ClientConfig>>, String> {
        use crate::tls::{Identity, Verification};
        use std::path::Path;

        let roots = match self.root_cert.as_deref() {
            Some("system") => Some(tls::system_roots()),
            path => path.map(|path| tls::roots(Path::new(path))),
        };
        let roots = roots
            .transpose()
            .map_err(|why| format!("with an sslrootcert that can be used: {why}"))?;
        let verification = match (mode, roots) {
            (Mode::VerifyFull, Some(roots)) => Verification::IssuerAndName(roots),
            (Mode::VerifyFull | Mode::VerifyCa, None) => {
                return Err("with sslrootcert=PATH for sslmode=verify-ca, \
                            or also sslrootcert=system for verify-full"
                    .into());
            }
            // With roots require is as verify-ca, in libpq as well.
            (_, Some(roots)) => Verification::Issuer(roots),
            (_, None) => Verification::None,
        };
        let identity = match (self.cert, self.key) {
            (Some(cert), Some(key)) => Some(
                Identity::read(Path::new(&cert), Path::new(&key))
                    .map_err(|why| format!("with an sslcert and sslkey that can be used: {why}"))?,
            ),
            (None, None) => None,
            _ => return Err("with both of sslcert and sslkey, or none".into()),
        };
        let client = tls::client(verification, identity)
            .map_err(|why| format!("with an sslcert and sslkey that fit: {why}"))?;
        Ok(Some(Arc::new(client)))
    }
}

const CA: &str = "proxy.ca_file";
const CERT: &str = "proxy.client_cert_file";
const KEY: &str = "proxy.client_key_file";

/// For the destination, if it is an https one or files are given for one.
pub(super) fn destination(
    raw: &Raw,
    warnings: &mut Vec<String>,
) -> Result<Option<Arc<ClientConfig>>, ConfigError> {
    let scheme = raw.get_secret("proxy.remote_url", RemoteUrl::parse)?.scheme;
    let Some(first) = [CA, CERT, KEY]
        .into_iter()
        .find(|key| !raw.text(key).is_empty())
    else {
        return tls::for_system(&scheme).or_else(|why| {
            warnings.push(format!(
                "proxy.remote_url: no https destination is trusted: {why} or proxy.ca_file"
            ));
            Ok(None)
        });
    };
    if scheme != http::uri::Scheme::HTTPS {
        warnings.push(format!("{first}: not used: the destination is not https"));
    }
    from_files(raw, first)
}

#[cfg(not(feature = "tls"))]
fn from_files(raw: &Raw, first: &'static str) -> Result<Option<Arc<ClientConfig>>, ConfigError> {
    Err(raw.error(
        first,
        "must be empty: this build has no TLS (cargo feature tls)",
    ))
}

#[cfg(feature = "tls")]
fn from_files(raw: &Raw, _first: &'static str) -> Result<Option<Arc<ClientConfig>>, ConfigError> {
    use crate::tls::{Identity, Verification};
    use std::path::Path;

    let (ca, cert, key) = (raw.text(CA), raw.text(CERT), raw.text(KEY));
    let roots = match ca {
        "" => tls::system_roots(),
        path => tls::roots(Path::new(path)),
    };
    let roots = roots.map_err(|why| raw.error(CA, &format!("cannot be used: {why}")))?;
    let identity = match (cert, key) {
        ("", "") => None,
        ("", _) => return Err(raw.error(CERT, "must be given with proxy.client_key_file")),
        (_, "") => return Err(raw.error(KEY, "must be given with proxy.client_cert_file")),
        (cert, key) => {
            let identity = Identity::read(Path::new(cert), Path::new(key));
            Some(identity.map_err(|why| raw.error(CERT, &format!("cannot be used: {why}")))?)
        }
    };
    let client = tls::client(Verification::IssuerAndName(roots), identity)
        .map_err(|why| raw.error(KEY, &format!("cannot be used: {key}: {why}")))?;
    Ok(Some(Arc::new(client)))
}
