//! Whether a destination is one of our own listeners: each request would come back to us, be
//! acknowledged once more, and so on without end.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use crossbeam_channel::bounded;
use http::uri::Scheme;
use socket2::Socket;

use super::{Bind, RemoteUrl};
use crate::thread::Threads;

/// How long a destination's name is waited for; one that cannot be resolved now is no fault.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);

/// What one of our sockets takes connections on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    setting: &'static str,
    /// None if it is a unix socket.
    addresses: Vec<SocketAddr>,
}

impl Listener {
    /// What `socket`, which `setting` asked for, listens on.
    pub fn of_socket(setting: &'static str, socket: &Socket) -> Listener {
        let address = socket.local_addr().ok();
        let address = address.and_then(|address| address.as_socket());
        let takes_both = address.is_some_and(|address| address.is_ipv6())
            && socket.only_v6().is_ok_and(|only_v6| !only_v6);
        Listener::new(setting, Vec::from_iter(address), takes_both)
    }

    /// What it will listen on, as far as the settings tell: nothing is known of what systemd hands
    /// over.
    pub fn of_setting(setting: &'static str, bind: &Bind) -> Listener {
        let addresses = match bind.itself() {
            Some(Bind::All(port)) => vec![(Ipv6Addr::UNSPECIFIED, *port).into()],
            Some(Bind::Host(host, port)) => resolve(host, *port),
            Some(Bind::Unix(_) | Bind::Systemd { .. }) | None => Vec::new(),
        };
        Listener::new(setting, addresses, true)
    }

    fn new(setting: &'static str, mut addresses: Vec<SocketAddr>, takes_both: bool) -> Listener {
        let all_v6 = |address: &&SocketAddr| address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        if let Some(port) = addresses.iter().find(all_v6).map(SocketAddr::port)
            && takes_both
        {
            addresses.push((Ipv4Addr::UNSPECIFIED, port).into());
        }
        Listener { setting, addresses }
    }

    /// The address among them that takes connections to `destination`.
    fn taking(&self, destination: SocketAddr) -> Option<SocketAddr> {
        let takes = |own: &&SocketAddr| {
            let (own_ip, ip) = (own.ip().to_canonical(), destination.ip());
            let is_same = match own_ip.is_unspecified() {
                true => own_ip.is_ipv4() == ip.is_ipv4() && is_local(ip),
                false => own_ip == ip,
            };
            own.port() == destination.port() && is_same
        };
        self.addresses.iter().find(takes).copied()
    }
}

/// A destination that is this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnAddress {
    pub setting: &'static str,
    pub address: SocketAddr,
}

impl fmt::Display for OwnAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OwnAddress { setting, address } = self;
        // The URL itself may have come from a file of its own, and is not shown then.
        write!(
            f,
            "proxy.remote_url: is this program itself, which listens on {address} ({setting}): \
             name the application that requests are for, or listen elsewhere"
        )
    }
}

impl std::error::Error for OwnAddress {}

/// # Errors
/// [`OwnAddress`] if `remote` resolves to what one of `listeners` listens on.
pub fn check(remote: &RemoteUrl, listeners: &[Listener]) -> Result<(), OwnAddress> {
    let (host, port) = host_and_port(remote);
    for destination in resolve(&host, port).into_iter().map(as_connected) {
        for listener in listeners {
            if let Some(address) = listener.taking(destination) {
                return Err(OwnAddress {
                    setting: listener.setting,
                    address,
                });
            }
        }
    }
    Ok(())
}

/// Where `remote` is to be found: its host, without the brackets of an IPv6 address, and its port.
pub fn host_and_port(remote: &RemoteUrl) -> (String, u16) {
    let default_port = match remote.scheme == Scheme::HTTPS {
        true => 443,
        false => 80,
    };
    let port = remote.authority.port_u16().unwrap_or(default_port);
    let host = remote.authority.host().trim_matches(['[', ']']);
    (host.to_owned(), port)
}

/// The addresses of a name; none if it cannot be resolved now.
fn resolve(host: &str, port: u16) -> Vec<SocketAddr> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return vec![(ip, port).into()];
    }
    let (sender, resolved) = bounded(1);
    let host = host.to_owned();
    // The resolver knows no time limit.
    let spawned = Threads::default().spawn_spare("resolve".to_owned(), move || {
        if let Ok(addresses) = (host.as_str(), port).to_socket_addrs() {
            let _ = sender.send(addresses.collect());
        }
    });
    match spawned {
        Ok(()) => resolved.recv_timeout(RESOLVE_TIMEOUT).unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

/// Where a connection to this address ends: at loopback, if it is the one that stands for all.
fn as_connected(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip().to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    (ip, address.port()).into()
}

/// Whether it is an address of this machine: the kernel sends from there to there. Nothing is sent.
fn is_local(ip: IpAddr) -> bool {
    let any: IpAddr = match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        // Any port but 0 will do.
        socket.connect((ip, 9))?;
        socket.local_addr()
    };
    ip.is_loopback() || source().is_ok_and(|source| source.ip() == ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_own(remote: &str, binds: &[&str]) -> bool {
        let remote = RemoteUrl::parse(remote).unwrap();
        let listeners: Vec<_> = binds
            .iter()
            .map(|bind| Listener::of_setting("server.bind", &Bind::parse(bind).unwrap()))
            .collect();
        check(&remote, &listeners).is_err()
    }

    /// An address of this machine besides loopback, if it has one.
    fn outward() -> Option<IpAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    }

    #[test]
    fn destinations_that_are_ourselves_are_found() {
        for (remote, bind) in [
            ("http://localhost:8080", ":8080"),
            ("http://LOCALHOST:8080/path", "localhost:8080"),
            ("http://127.0.0.1:8080", ":8080"),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://127.9.9.9:8080", "0.0.0.0:8080"),
            ("http://0.0.0.0:8080", "127.0.0.1:8080"),
            ("http://[::]:8080", "[::1]:8080"),
            ("http://[::1]:8080", ":8080"),
            ("http://[::ffff:127.0.0.1]:8080", "0.0.0.0:8080"),
            ("http://localhost", ":80"),
            ("http://localhost:5000", "localhost:5000"),
            ("http://localhost:8080", "systemd:http,:8080"),
        ] {
            assert!(is_own(remote, &[":1", bind]), "{remote} {bind}");
        }
        if let Some(ip) = outward() {
            assert!(is_own(&format!("http://{ip}:8080"), &[":8080"]), "{ip}");
        }
    }

    #[test]
    fn others_are_not_taken_for_us() {
        for (remote, bind) in [
            ("http://localhost:5000", ":8080"),
            ("http://127.0.0.2:8080", "127.0.0.1:8080"),
            ("http://192.0.2.1:8080", ":8080"),
            ("http://[2001:db8::1]:8080", ":8080"),
            ("http://[::1]:8080", "0.0.0.0:8080"),
            ("http://localhost:8080", "unix:/run/a.sock"),
            ("http://localhost:8080", "systemd"),
            ("http://nowhere.invalid:8080", ":8080"),
        ] {
            assert!(!is_own(remote, &[bind]), "{remote} {bind}");
        }
    }

    #[test]
    fn a_socket_tells_what_it_takes() {
        let listener = |bind: &str| {
            let socket = Bind::parse(bind).unwrap().listen().unwrap().socket;
            let port = socket.local_addr().unwrap().as_socket().unwrap().port();
            (Listener::of_socket("metrics.bind", &socket), port, socket)
        };
        let remote = |host: &str, port| RemoteUrl::parse(&format!("http://{host}:{port}")).unwrap();
        let (all, port, _all) = listener(":0");
        let error = check(&remote("127.0.0.1", port), &[all]).unwrap_err();
        let text = error.to_string();
        let expected = format!(":{port} (metrics.bind): name ");
        assert!(text.contains(&expected), "{text}");
        let (one, port, _one) = listener("127.0.0.1:0");
        let one = [one];
        assert!(check(&remote("127.0.0.1", port), &one).is_err());
        assert!(check(&remote("127.0.0.2", port), &one).is_ok());
    }
}
