//! Asks a running instance, on its control port, what it is at.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::config::Bind;

const TIMEOUT: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: u64 = 1024 * 1024;

const REQUEST: &[u8] = b"GET /status HTTP/1.0\r\nHost: localhost\r\n\r\n";

/// What `/status` says on the port that `metrics.bind` names.
///
/// # Errors
/// Why there is no answer, in a few words.
pub fn status(bind: &Bind) -> Result<Value, String> {
    // A socket of systemd's is wherever its unit says; ours is where it would be without one.
    let Some(bind) = bind.itself() else {
        return Err("metrics.bind is a socket of systemd's".into());
    };
    let answer = match bind {
        Bind::All(port) => exchange_tcp("localhost", *port),
        Bind::Host(host, port) => {
            let host = match host.as_str() {
                "0.0.0.0" | "::" => "localhost",
                host => host,
            };
            exchange_tcp(host, *port)
        }
        Bind::Unix(path) => UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            exchange(stream)
        }),
        Bind::Systemd { .. } => return Err("metrics.bind is a socket of systemd's".into()),
    };
    let answer = answer.map_err(|error| format!("{bind}: {error}"))?;
    let strange = || format!("{bind}: the answer is none of asyncproxy's");
    let is_good = answer.starts_with("HTTP/1.1 200 ");
    let (_, body) = answer.split_once("\r\n\r\n").ok_or_else(strange)?;
    serde_json::from_str(body)
        .ok()
        .filter(|_| is_good)
        .ok_or_else(strange)
}

fn exchange_tcp(host: &str, port: u16) -> io::Result<String> {
    use std::net::ToSocketAddrs;
    let mut failed = io::Error::other("no address for this host");
    for address in (host, port).to_socket_addrs()? {
        let stream = TcpStream::connect_timeout(&address, TIMEOUT).and_then(|stream| {
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => return exchange(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn exchange(mut stream: impl Read + Write) -> io::Result<String> {
    stream.write_all(REQUEST)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
