//! Certificates and keys, read from files, and the client configurations made of them.
//!
//! Opens no connection. One crypto provider in the whole program: ring.

use std::sync::Arc;

#[cfg(feature = "tls")]
pub use rustls::ClientConfig;
#[cfg(feature = "tls")]
pub(crate) use with_tls::{Identity, Verification, client, roots, system_roots};

/// For destinations of this scheme, by the system's roots. `None`: TLS is not spoken to them.
///
/// # Errors
/// There are no roots.
pub(crate) fn for_system(scheme: &http::uri::Scheme) -> Result<Option<Arc<ClientConfig>>, String> {
    if *scheme != http::uri::Scheme::HTTPS {
        return Ok(None);
    }
    #[cfg(feature = "tls")]
    return client(Verification::IssuerAndName(system_roots()?), None)
        .map(|client| Some(Arc::new(client)));
    #[cfg(not(feature = "tls"))]
    Err("this build has no TLS (cargo feature tls)".into())
}

/// Stands for a configuration in a build that cannot have one.
#[cfg(not(feature = "tls"))]
#[derive(Debug)]
pub enum ClientConfig {}

#[cfg(feature = "tls")]
mod with_tls {
    use std::io;
    use std::path::Path;
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::client::verify_server_cert_signed_by_trust_anchor;
    use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
    use rustls::pki_types::pem::{Error as PemError, PemObject};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
    use rustls::server::ParsedCertificate;
    use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

    use crate::regular_file;

    /// A system's roots are some 200 KB.
    const PEM_BYTES_MAX: usize = 8 * 1024 * 1024;

    /// What a server's certificate must be.
    #[derive(Debug)]
    pub(crate) enum Verification {
        /// Anything: the connection is encrypted, with whom is not known.
        None,
        /// Issued by one of these, for whatever name.
        Issuer(RootCertStore),
        /// Issued by one of these for the server's name.
        IssuerAndName(RootCertStore),
    }

    /// A client's certificate with those of its issuers, and its key.
    #[derive(Debug)]
    pub(crate) struct Identity {
        certificates: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    }

    impl Identity {
        /// # Errors
        /// Which file cannot be used, and why.
        pub(crate) fn read(certificate: &Path, key: &Path) -> Result<Identity, String> {
            Ok(Identity {
                certificates: certificates(certificate)?,
                key: private_key(key)?,
            })
        }
    }

    /// Builds what connections share, session tickets included.
    ///
    /// # Errors
    /// What is wrong with the certificate and its key.
    pub(crate) fn client(
        verification: Verification,
        identity: Option<Identity>,
    ) -> Result<ClientConfig, String> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let roots = match verification {
            Verification::IssuerAndName(roots) => Ok(roots),
            Verification::Issuer(roots) => Err(Some(roots)),
            Verification::None => Err(None),
        };
        let builder = match roots {
            Ok(roots) => builder.with_root_certificates(roots),
            Err(roots) => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyName { provider, roots })),
        };
        match identity {
            None => Ok(builder.with_no_client_auth()),
            Some(identity) => builder
                .with_client_auth_cert(identity.certificates, identity.key)
                .map_err(|error| format!("the certificate and its key: {error}")),
        }
    }

    /// The certificates in a PEM file, as roots.
    ///
    /// # Errors
    /// The file, and why it cannot be used.
    pub(crate) fn roots(path: &Path) -> Result<RootCertStore, String> {
        let mut store = RootCertStore::empty();
        for certificate in certificates(path)? {
            store
                .add(certificate)
                .map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(store)
    }

    /// The system's roots: `SSL_CERT_FILE` and `SSL_CERT_DIR` if set, else the usual places.
    ///
    /// # Errors
    /// There are none, or the file cannot be read.
    pub(crate) fn system_roots() -> Result<RootCertStore, String> {
        if let Some(path) = std::env::var_os("SSL_CERT_FILE") {
            // Whoever reads it below would wait for the end of whatever it is.
            let path = Path::new(&path);
            if let Err(error) = regular_file::open(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                let path = path.display();
                return Err(format!("SSL_CERT_FILE={path}: {error}; set it to one"));
            }
        }
        let found = rustls_native_certs::load_native_certs();
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(found.certs);
        if store.is_empty() {
            return Err("the system has no root certificates; set SSL_CERT_FILE".into());
        }
        Ok(store)
    }

    fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
        let failed = |error: PemError| format!("{}: {}", path.display(), pem_error(&error));
        let found = CertificateDer::pem_slice_iter(&pem(path)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        if found.is_empty() {
            return Err(format!("{}: no certificate in it (PEM)", path.display()));
        }
        Ok(found)
    }

    fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
        PrivateKeyDer::from_pem_slice(&pem(path)?).map_err(|error| match error {
            PemError::NoItemsFound => format!(
                "{}: no private key without a passphrase in it (PEM)",
                path.display()
            ),
            error => format!("{}: {}", path.display(), pem_error(&error)),
        })
    }

    fn pem(path: &Path) -> Result<Vec<u8>, String> {
        regular_file::read(path, PEM_BYTES_MAX)
            .map_err(|error| format!("{}: {error}", path.display()))
    }

    fn pem_error(error: &PemError) -> String {
        match error {
            PemError::Io(error) => error.to_string(),
            _ => "not PEM".into(),
        }
    }

    /// Does not ask for whom a certificate is, and without `roots` not by whom. That the server has its key is always asked.
    #[derive(Debug)]
    struct AnyName {
        provider: Arc<CryptoProvider>,
        roots: Option<RootCertStore>,
    }

    impl ServerCertVerifier for AnyName {
        fn verify_server_cert(
            &self,
            end_entity: &CertificateDer<'_>,
            intermediates: &[CertificateDer<'_>],
            _server_name: &ServerName<'_>,
            _ocsp_response: &[u8],
            now: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            if let Some(roots) = &self.roots {
                verify_server_cert_signed_by_trust_anchor(
                    &ParsedCertificate::try_from(end_entity)?,
                    roots,
                    intermediates,
                    now,
                    self.provider.signature_verification_algorithms.all,
                )?;
            }
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            verify_tls12_signature(message, certificate, signed, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            verify_tls13_signature(message, certificate, signed, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider
                .signature_verification_algorithms
                .supported_schemes()
        }
    }
}
