//! TLS beneath the postgres crate: what it asks of a handshake, and channel binding.

use std::io;
use std::sync::Arc;

use ::postgres::Socket;
use ::postgres::tls::ChannelBinding;
use ring::digest;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio_rustls::client::TlsStream;

/// Secures a connection to the host of that name.
pub(super) async fn handshake(
    config: Arc<ClientConfig>,
    host: String,
    socket: Socket,
) -> io::Result<TlsStream<Socket>> {
    let name = ServerName::try_from(host)
        .map_err(|_| io::Error::other("the host is not a name that TLS can verify"))?;
    let connector = tokio_rustls::TlsConnector::from(config);
    connector.connect(name, socket).await
}

/// What ties a password to this connection.
pub(super) fn channel_binding(stream: &TlsStream<Socket>) -> ChannelBinding {
    let certificates = stream.get_ref().1.peer_certificates();
    let hash = certificates
        .and_then(<[_]>::first)
        .and_then(|certificate| Some((certificate, hash_for(certificate)?)));
    match hash {
        Some((certificate, hash)) => ChannelBinding::tls_server_end_point(
            digest::digest(hash, certificate).as_ref().to_vec(),
        ),
        None => ChannelBinding::none(),
    }
}

/// The hash that `tls-server-end-point` takes of a certificate (RFC 5929 §4.1): that of its
/// signature, but SHA-256 in place of weaker ones. `None`: not defined for its signature.
fn hash_for(certificate: &[u8]) -> Option<&'static digest::Algorithm> {
    // Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE { OID, … }, … }
    let (body, _) = der(certificate, 0x30)?;
    let (_, after_tbs) = der(body, 0x30)?;
    let (algorithm, _) = der(after_tbs, 0x30)?;
    let (oid, _) = der(algorithm, 0x06)?;
    match oid {
        // PKCS #1 (1.2.840.113549.1.1): with MD5, SHA-1, SHA-256, SHA-384, SHA-512.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4 | 5 | 11] => Some(&digest::SHA256),
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 12] => Some(&digest::SHA384),
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 13] => Some(&digest::SHA512),
        // ECDSA (1.2.840.10045.4): with SHA-1, SHA-256, SHA-384, SHA-512.
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1] => Some(&digest::SHA256),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2] => Some(&digest::SHA256),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3] => Some(&digest::SHA384),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 4] => Some(&digest::SHA512),
        _ => None,
    }
}

/// The contents of the DER value in front, which must have this tag, and what follows it.
fn der(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, first], rest) = bytes.split_first_chunk()?;
    if found != tag {
        return None;
    }
    let (length, rest) = match first {
        short @ 0..=0x7f => (usize::from(short), rest),
        long @ 0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
            let add = |sum: usize, &digit: &u8| sum << 8 | usize::from(digit);
            (digits.iter().fold(0, add), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn der_is_read_within_its_bounds() {
        assert_eq!(
            der(&[0x30, 2, 1, 2, 3], 0x30),
            Some((&[1, 2][..], &[3][..]))
        );
        assert_eq!(der(&[0x30, 0x81, 1, 9], 0x30), Some((&[9][..], &[][..])));
        let bad: [&[u8]; 6] = [
            &[],
            &[0x30],
            &[0x30, 3, 1],
            &[0x06, 0],
            &[0x30, 0x82, 1],
            &[0x30, 0x84, 0, 0, 0, 0],
        ];
        for bytes in bad {
            assert_eq!(der(bytes, 0x30), None, "{bytes:?}");
        }
    }

    #[test]
    fn hash_follows_the_signature() {
        let certificate = |oid: &[u8]| {
            let oid = [&[0x06, u8::try_from(oid.len()).unwrap()], oid].concat();
            let algorithm = [&[0x30, u8::try_from(oid.len()).unwrap()], &oid[..]].concat();
            let body = [&[0x30, 0], &algorithm[..]].concat();
            [&[0x30, u8::try_from(body.len()).unwrap()], &body[..]].concat()
        };
        let hash = |oid: &[u8]| hash_for(&certificate(oid));
        let sha384 = [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
        assert_eq!(hash(&sha384), Some(&digest::SHA384));
        // Ed25519 has none.
        assert_eq!(hash(&[0x2b, 0x65, 0x70]), None);
    }
}
