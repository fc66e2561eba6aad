//! Addresses: where to listen, and where to send to.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use http::uri::{Authority, Scheme, Uri};
use listenfd::ListenFd;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::upstream;

/// Connections that may wait to be accepted; the kernel may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// `:port`: all addresses, IPv6 and IPv4.
    All(u16),
    /// `host:port`.
    Host(String, u16),
    /// `unix:/path`.
    Unix(PathBuf),
    /// The socket systemd hands over: the first, or the one that `FileDescriptorName=` gives
    /// this name.
    Systemd(Option<String>),
}

impl Bind {
    /// # Errors
    /// What it must be.
    pub fn parse(text: &str) -> Result<Bind, String> {
        const ACCEPTED: &str =
            "host:port, :port for all addresses, unix:/path, systemd or systemd:NAME";
        if let Some(path) = text.strip_prefix("unix:") {
            return match Path::new(path).is_absolute() {
                true => Ok(Bind::Unix(path.into())),
                false => Err(ACCEPTED.into()),
            };
        }
        if let Some(name) = text.strip_prefix("systemd") {
            return match name.strip_prefix(':') {
                None if name.is_empty() => Ok(Bind::Systemd(None)),
                Some(name) if !name.is_empty() => Ok(Bind::Systemd(Some(name.into()))),
                _ => Err(ACCEPTED.into()),
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or(ACCEPTED)?;
        let port = port
            .parse()
            .ok()
            .filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))
            .ok_or(ACCEPTED)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        match bare {
            _ if host.is_empty() => Ok(Bind::All(port)),
            Some(bare) if bare.parse::<Ipv6Addr>().is_ok() => Ok(Bind::Host(bare.into(), port)),
            None if host.bytes().all(is_host_byte) => Ok(Bind::Host(host.into(), port)),
            _ => Err(ACCEPTED.into()),
        }
    }

    /// Listens.
    ///
    /// # Errors
    /// The system's, for the last of the addresses tried.
    pub fn listen(&self) -> io::Result<Socket> {
        match self {
            Bind::All(port) => listen_tcp((Ipv6Addr::UNSPECIFIED, *port).into())
                // A machine without IPv6.
                .or_else(|_| listen_tcp((Ipv4Addr::UNSPECIFIED, *port).into())),
            Bind::Host(host, port) => {
                let mut result = Err(io::Error::other("no address for this host"));
                let mut addresses: Vec<_> = (host.as_str(), *port).to_socket_addrs()?.collect();
                // `localhost` is looked for under its IPv4 address by most.
                addresses.sort_by_key(SocketAddr::is_ipv6);
                for address in addresses {
                    result = listen_tcp(address);
                    if result.is_ok() {
                        break;
                    }
                }
                result
            }
            Bind::Unix(path) => listen_unix(path),
            Bind::Systemd(name) => take_over(name.as_deref()),
        }
    }
}

/// The address that a socket listens on, with the port it was given.
///
/// # Errors
/// The system's.
pub fn shown_address(socket: &Socket) -> io::Result<String> {
    let address = socket.local_addr()?;
    Ok(match (address.as_socket(), address.as_pathname()) {
        (Some(address), _) => address.to_string(),
        (None, Some(path)) => format!("unix:{}", path.display()),
        (None, None) => "unix:".to_owned(),
    })
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bind::All(port) => write!(f, ":{port}"),
            Bind::Host(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Bind::Host(host, port) => write!(f, "{host}:{port}"),
            Bind::Unix(path) => write!(f, "unix:{}", path.display()),
            Bind::Systemd(None) => f.write_str("systemd"),
            Bind::Systemd(Some(name)) => write!(f, "systemd:{name}"),
        }
    }
}

fn listen_tcp(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn listen_unix(path: &Path) -> io::Result<Socket> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let mut bound = socket.bind(&address);
    if let Err(error) = &bound
        && error.kind() == io::ErrorKind::AddrInUse
        && Socket::new(Domain::UNIX, Type::STREAM, None)?
            .connect(&address)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        // A socket that nobody listens on any more, left behind by a crash.
        std::fs::remove_file(path)?;
        bound = socket.bind(&address);
    }
    bound?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// What systemd handed over. Asked for once: that takes it out of the environment.
static HANDED_OVER: LazyLock<Mutex<ListenFd>> = LazyLock::new(|| Mutex::new(ListenFd::from_env()));

/// Takes over a socket as sd_listen_fds(3) describes.
fn take_over(name: Option<&str>) -> io::Result<Socket> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let index = match name {
        None => 0,
        Some(name) => names
            .split(':')
            .position(|other| other == name)
            .ok_or_else(|| io::Error::other("systemd handed over no socket of this name"))?,
    };
    let mut handed_over = HANDED_OVER.lock().unwrap_or_else(PoisonError::into_inner);
    let socket: Socket = match handed_over.take_tcp_listener(index) {
        Ok(Some(listener)) => listener.into(),
        _ => match handed_over.take_unix_listener(index)? {
            Some(listener) => listener.into(),
            None => return Err(io::Error::other("systemd handed over no socket")),
        },
    };
    Ok(socket)
}

/// `proxy.remote_url`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteUrl {
    pub scheme: Scheme,
    pub authority: Authority,
    /// Put before each target; empty, or begins with `/` and does not end with one.
    pub path_prefix: String,
}

impl RemoteUrl {
    /// # Errors
    /// What it must be.
    pub fn parse(text: &str) -> Result<RemoteUrl, String> {
        const ACCEPTED: &str = "a URL such as http://localhost:5000 or https://host/path, \
                                without credentials, query and fragment";
        let uri = Uri::try_from(text).map_err(|_| ACCEPTED)?;
        let parts = uri.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(ACCEPTED.into());
        };
        let has_bad_port =
            authority.port_u16().is_none() && authority.as_str().len() > authority.host().len();
        if authority.host().is_empty() || has_bad_port || text.contains(['@', '?', '#']) {
            return Err(ACCEPTED.into());
        }
        if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
            return Err(ACCEPTED.into());
        }
        if !upstream::supports(&scheme) {
            return Err("an http:// URL: this build has no TLS".into());
        }
        let path = parts.path_and_query.map(|path| path.path().to_owned());
        Ok(RemoteUrl {
            scheme,
            authority,
            path_prefix: path.unwrap_or_default().trim_end_matches('/').to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_shown_as_they_are_written() {
        for text in [
            ":8080",
            "127.0.0.1:0",
            "localhost:80",
            "[::1]:8080",
            "unix:/run/a.sock",
            "systemd",
            "systemd:http",
        ] {
            assert_eq!(Bind::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            "8080",
            ":",
            ":x",
            ":65536",
            ":+1",
            "::1:80",
            "[::1]",
            "a b:80",
            "unix:",
            "unix:a",
            "systemd:",
            "systemdx",
            "[x]:1",
            "http://a:80",
            "\n:80",
        ] {
            assert!(Bind::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn all_addresses_are_listened_on_at_once() {
        let socket = Bind::All(0).listen().unwrap();
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    #[test]
    fn a_unix_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let bind = Bind::Unix(directory.path().join("a.sock"));
        drop(bind.listen().unwrap());
        let _listening = bind.listen().unwrap();
        assert_eq!(bind.listen().unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn remote_urls_are_taken_apart() {
        let parse = |text: &str| RemoteUrl::parse(text).map(|url| url.path_prefix);
        for (text, prefix) in [
            ("http://localhost:5000", ""),
            ("http://localhost:5000/", ""),
            ("HTTP://h/a/b/", "/a/b"),
            ("http://[::1]:80/a%2Fb", "/a%2Fb"),
        ] {
            assert_eq!(parse(text), Ok(prefix.into()), "{text}");
        }
        for text in [
            "",
            "localhost:5000",
            "/a",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://u@h/",
            "http://h?a",
            "http://h/#a",
            "http://h:x",
            "http://h:99999",
            "http://h:",
            "http://h/a b",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
