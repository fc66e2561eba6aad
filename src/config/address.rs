//! Addresses: where to listen, and where to send to.

use std::fmt;
use std::fs::Metadata;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use http::uri::{Authority, Scheme, Uri};
use socket2::{Domain, SockAddr, Socket, Type};

use super::handed_over;
use crate::regular_file::kind_of;
use crate::upstream;

/// Connections that may wait to be accepted; the kernel may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Of a socket (unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// `:port`: all addresses, IPv6 and IPv4.
    All(u16),
    /// `host:port`.
    Host(String, u16),
    /// `unix:/path`.
    Unix(PathBuf),
    /// `systemd` or `systemd:NAME`, and perhaps `,` and one of the others.
    Systemd {
        /// The one that `FileDescriptorName=` gives this name of the sockets that systemd hands over;
        /// or the first.
        name: Option<String>,
        /// Where to listen when there is no such socket; none of systemd's itself.
        otherwise: Option<Box<Bind>>,
    },
}

/// A socket that is listened on.
#[derive(Debug)]
pub struct Listening {
    pub socket: Socket,
    /// It outlives the program, which must not end its listening.
    pub is_handed_over: bool,
}

impl Bind {
    /// # Errors
    /// What it must be.
    pub fn parse(text: &str) -> Result<Bind, String> {
        const ACCEPTED: &str = "host:port, :port for all addresses, unix:/path, systemd, systemd:NAME, or both as in \
             systemd:NAME,:8080";
        if let Some(path) = text.strip_prefix("unix:") {
            return match Path::new(path).is_absolute() {
                true if path.len() > PATH_BYTES_MAX => Err(format!(
                    "unix:/path with a path of at most {PATH_BYTES_MAX} bytes, this one has {}",
                    path.len()
                )),
                true => Ok(Bind::Unix(path.into())),
                false => Err(ACCEPTED.into()),
            };
        }
        if let Some(rest) = text.strip_prefix("systemd") {
            return parse_systemd(rest).ok_or_else(|| ACCEPTED.into());
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

    /// Where it listens itself, if it does: not on a socket of systemd's.
    pub fn itself(&self) -> Option<&Bind> {
        match self {
            Bind::Systemd { otherwise, .. } => otherwise.as_deref(),
            itself => Some(itself),
        }
    }

    /// Of TCP.
    pub fn port(&self) -> Option<u16> {
        match self {
            Bind::All(port) | Bind::Host(_, port) => Some(*port),
            Bind::Unix(_) | Bind::Systemd { .. } => None,
        }
    }

    /// Whether both would take the same socket, as far as can be told from how they are written.
    pub fn clashes_with(&self, other: &Bind) -> bool {
        let is_same_name = match (self, other) {
            (Bind::Systemd { name, .. }, Bind::Systemd { name: other, .. }) => name == other,
            _ => false,
        };
        let is_same_address = match (self.itself(), other.itself()) {
            // Of port 0 there is one for each.
            (Some(one), Some(other)) => one == other && one.port() != Some(0),
            _ => false,
        };
        is_same_name || is_same_address
    }

    /// Listens.
    ///
    /// # Errors
    /// The system's, for the last of the addresses tried; `NotFound` if systemd handed over no such
    /// socket and there is nothing else.
    pub fn listen(&self) -> io::Result<Listening> {
        let (name, otherwise) = match self {
            Bind::Systemd { name, otherwise } => (name, otherwise),
            itself => return itself.listen_itself(),
        };
        match (handed_over::take(name.as_deref())?, otherwise) {
            (Some(socket), _) => Ok(Listening {
                socket,
                is_handed_over: true,
            }),
            (None, Some(otherwise)) => otherwise.listen_itself(),
            (None, None) => {
                let what = match name {
                    None => "systemd handed over no socket",
                    Some(_) => "systemd handed over no socket of this name",
                };
                Err(io::Error::new(io::ErrorKind::NotFound, what))
            }
        }
    }

    fn listen_itself(&self) -> io::Result<Listening> {
        let socket = match self {
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
            Bind::Systemd { .. } => Err(io::Error::other("a socket of systemd's")),
        };
        Ok(Listening {
            socket: socket?,
            is_handed_over: false,
        })
    }
}

/// What comes after `systemd`. A name has no colon: systemd joins names with them.
fn parse_systemd(text: &str) -> Option<Bind> {
    let (name, otherwise) = match text.split_once(',') {
        None => (text, None),
        Some((name, otherwise)) => {
            let otherwise = Bind::parse(otherwise.trim()).ok()?;
            if matches!(otherwise, Bind::Systemd { .. }) {
                return None;
            }
            (name, Some(Box::new(otherwise)))
        }
    };
    let name = match name.strip_prefix(':') {
        None if name.is_empty() => None,
        Some(name) if !name.is_empty() && !name.contains(':') => Some(name.to_owned()),
        _ => return None,
    };
    Some(Bind::Systemd { name, otherwise })
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
            Bind::Systemd { name, otherwise } => {
                f.write_str("systemd")?;
                if let Some(name) = name {
                    write!(f, ":{name}")?;
                }
                match otherwise {
                    None => Ok(()),
                    Some(otherwise) => write!(f, ",{otherwise}"),
                }
            }
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
    remove_abandoned(path, &address)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&address)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Makes way: removes a socket that nobody listens on, such as a crash leaves behind, and nothing
/// else, whatever it may be.
fn remove_abandoned(path: &Path, address: &SockAddr) -> io::Result<()> {
    let Some(found) = found_at(path)? else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        let kind = kind_of(found.file_type());
        let why = format!("{path:?} is {kind}, not a socket, and is left as it is");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    }
    if is_abandoned(address)? {
        // Another that starts at the same time may have replaced it by now.
        let is_same = |now: Metadata| (now.dev(), now.ino()) == (found.dev(), found.ino());
        if found_at(path)?.is_some_and(is_same) {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// What is there already; a symbolic link is not followed, as `bind` does not follow it.
fn found_at(path: &Path) -> io::Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether nobody listens on a socket any more. Any other answer, or none, means that somebody may.
fn is_abandoned(address: &SockAddr) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Or it would wait for room in the backlog of one who listens.
    socket.set_nonblocking(true)?;
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    Ok(socket.connect(address).is_err_and(refused))
}

/// What a host and a port alone were probably to be. Nothing else is quoted: it may hold a password.
fn without_scheme(text: &str) -> Option<String> {
    let (host, port) = text.split_once(':').unwrap_or((text, ""));
    let is_host = !host.is_empty() && host.bytes().all(is_host_byte);
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit());
    (is_host && is_port && !text.ends_with(':')).then(|| format!("http://{text}"))
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
        if let Some(meant) = without_scheme(text) {
            return Err(format!("{ACCEPTED}; did you mean {meant}?"));
        }
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
            "systemd,127.0.0.1:0",
            "systemd:http,:8080",
            "systemd:http,[::1]:8080",
            "systemd:a,unix:/run/a.sock",
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
            "systemd:http:8080",
            "systemd:http,",
            "systemd:http,systemd",
            "systemd:http,systemd:b,:80",
            "systemd:http,8080",
            "systemd:,:80",
            ",:80",
            "[x]:1",
            "http://a:80",
            "\n:80",
        ] {
            assert!(Bind::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_space_after_the_comma_is_none_of_the_address() {
        let bind = Bind::parse("systemd:http, :8080").unwrap();
        assert_eq!(bind.to_string(), "systemd:http,:8080");
    }

    #[test]
    fn addresses_that_are_the_same_are_known_from_how_they_are_written() {
        for (one, other, is_same) in [
            (":80", ":80", true),
            (":80", ":81", false),
            (":0", ":0", false),
            ("unix:/a", "unix:/a", true),
            ("systemd", "systemd", true),
            ("systemd:a", "systemd:b", false),
            ("systemd:a,:80", "systemd:a,:81", true),
            ("systemd:a,:80", "systemd:b,:80", true),
            ("systemd:a,:80", ":80", true),
            ("systemd:a,:0", "systemd:b,:0", false),
        ] {
            let parse = |text| Bind::parse(text).unwrap();
            let (one, other) = (parse(one), parse(other));
            assert_eq!(one.clashes_with(&other), is_same, "{one} {other}");
            assert_eq!(other.clashes_with(&one), is_same, "{other} {one}");
        }
    }

    #[test]
    fn without_a_socket_of_systemds_it_listens_itself_or_says_that_there_is_none() {
        let listening = Bind::parse("systemd:a,127.0.0.1:0")
            .unwrap()
            .listen()
            .unwrap();
        assert!(!listening.is_handed_over);
        let error = Bind::parse("systemd:a").unwrap().listen().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn all_addresses_are_listened_on_at_once() {
        let socket = Bind::All(0).listen().unwrap().socket;
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    /// Listens as soon as a socket that was closed is closed everywhere: a process that another
    /// test starts at this moment has a copy of it between fork and exec.
    fn listen_again(bind: &Bind) -> Socket {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            match bind.listen() {
                Ok(listening) => return listening.socket,
                Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn a_unix_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let bind = Bind::Unix(directory.path().join("a.sock"));
        drop(bind.listen().unwrap());
        let listening = listen_again(&bind);
        assert_eq!(bind.listen().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // Nor when there is no room for another who wants to connect.
        listening.listen(0).unwrap();
        let connect = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let connected = socket.connect(&listening.local_addr().unwrap());
            (socket, connected)
        };
        let mut connected = vec![connect()];
        while connected.iter().all(|(_, connected)| connected.is_ok()) {
            connected.push(connect());
        }
        assert_eq!(bind.listen().unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn what_is_no_socket_is_left_as_it_is_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("file"), "precious").unwrap();
        std::fs::write(path("empty"), "").unwrap();
        std::fs::create_dir(path("directory")).unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path("dangling")).unwrap();
        // A link to an abandoned socket is somebody's, too.
        drop(Bind::Unix(path("socket")).listen().unwrap());
        std::os::unix::fs::symlink(path("socket"), path("to-socket")).unwrap();
        let status = std::process::Command::new("mkfifo")
            .arg(path("fifo"))
            .status();
        assert!(status.unwrap().success());
        for (name, kind) in [
            ("file", "a regular file"),
            ("empty", "a regular file"),
            ("directory", "a directory"),
            ("link", "a symbolic link"),
            ("dangling", "a symbolic link"),
            ("to-socket", "a symbolic link"),
            ("fifo", "a FIFO"),
            ("/dev/null", "a character device"),
        ] {
            let path = path(name);
            let before = std::fs::symlink_metadata(&path).unwrap();
            let error = Bind::Unix(path.clone()).listen().unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(name), "{error}");
            let after = std::fs::symlink_metadata(&path).unwrap();
            assert_eq!(
                (before.ino(), before.file_type()),
                (after.ino(), after.file_type())
            );
        }
        assert_eq!(std::fs::read(path("file")).unwrap(), b"precious");
        assert!(!path("nowhere").exists());
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
