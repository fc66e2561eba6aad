//! The head of a request as it goes out. Pure.

use uuid::Uuid;

use crate::config::RemoteUrl;
use crate::request::{ATTEMPT_HEADER, ID_HEADER, Request};

/// Which `Host` is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// The destination's own.
    Own,
    /// The one that came in.
    Preserved,
}

/// The head of attempt number `attempt` of `request`, under `id`.
///
/// # Errors
/// Why it cannot be sent, to whatever destination: rows come from anywhere, and from programs
/// that refused less.
///
/// Out of line: what it takes of the stack, all workers that wait for an answer would have as well.
#[inline(never)]
pub(super) fn write(
    (remote, host): (&RemoteUrl, Host),
    id: Uuid,
    request: &Request,
    attempt: u32,
) -> Result<Vec<u8>, String> {
    let checked = request.check();
    checked.map_err(|invalid| format!("cannot be sent: {invalid}"))?;
    let length = if request.body.is_empty() && !announces_empty_body(&request.method) {
        String::new()
    } else {
        format!("content-length: {}\r\n", request.body.len())
    };
    let mut id_text = Uuid::encode_buffer();
    let ours = format!(
        "{ID_HEADER}: {}\r\n{ATTEMPT_HEADER}: {attempt}\r\n\r\n",
        id.hyphenated().encode_lower(&mut id_text)
    );
    let own = remote.authority.as_str().as_bytes();
    let host = match host {
        Host::Own => own,
        // HTTP/1.0 needs none.
        Host::Preserved => request.headers.host().unwrap_or(own),
    };
    Ok([
        request.method.as_bytes(),
        b" ",
        remote.path_prefix.as_bytes(),
        request.target.as_bytes(),
        b" HTTP/1.1\r\n",
        length.as_bytes(),
        b"host: ",
        host,
        b"\r\n",
        request.headers.to_send(),
        ours.as_bytes(),
    ]
    .concat())
}

/// Methods whose empty body is announced with `Content-Length: 0` (RFC 9110 §8.6).
fn announces_empty_body(method: &str) -> bool {
    matches!(method, "POST" | "PUT" | "PATCH")
}
