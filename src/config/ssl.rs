//! `sslmode` and what belongs to it in a connection string, as libpq means them.

use std::sync::Arc;

use postgres::config::SslMode;

use crate::tls::ClientConfig;

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
        use crate::tls::{self, Identity, Verification};
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
