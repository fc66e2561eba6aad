//! The sockets that systemd hands over (sd_listen_fds(3)). Who names one takes it; what nobody takes can
//! be told of: connections to it wait, and nobody comes.

use std::fmt;
use std::io;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use listenfd::ListenFd;
use socket2::Socket;

use super::{Bind, refused, shown_address};

/// Asked for once: that takes them out of the environment.
static HANDED_OVER: LazyLock<Mutex<HandedOver>> =
    LazyLock::new(|| Mutex::new(HandedOver::from_env()));

/// Takes the socket of that name, or the first; `None` if there is no such one.
///
/// # Errors
/// It is there, but cannot be taken.
pub(super) fn take(name: Option<&str>) -> io::Result<Option<Socket>> {
    handed_over().take(name)
}

/// The sockets that nobody has taken.
pub fn left() -> Vec<Left> {
    handed_over().left()
}

/// What helps against an error of listening as `setting` says.
pub fn advice(setting: &str, bind: &Bind, error: &io::Error) -> Option<String> {
    let is_alone = matches!(
        bind,
        Bind::Systemd {
            otherwise: None,
            ..
        }
    );
    match error.kind() {
        io::ErrorKind::NotFound if is_alone => Some(no_socket(setting, bind)),
        io::ErrorKind::AddrInUse => taken_by(setting, bind.itself()?, &left()),
        _ => None,
    }
    .or_else(|| refused::advice(setting, bind, error))
}

/// The units of ours that hand over a socket for each setting.
fn no_socket(setting: &str, bind: &Bind) -> String {
    let (unit, address) = match setting {
        "metrics.bind" => ("asyncproxy-metrics.socket", ":8081"),
        _ => ("asyncproxy.socket", ":8080"),
    };
    format!(
        "start the unit that has it (systemctl start {unit}), or write {setting}: {bind},{address} to \
         listen on {address} when there is none"
    )
}

fn taken_by(setting: &str, bind: &Bind, left: &[Left]) -> Option<String> {
    let port = bind.port()?;
    let Left { name, .. } = left.iter().find(|left| left.port == Some(port))?;
    Some(format!(
        "by systemd, which has handed over its socket {name}: write {setting}: systemd:{name},{bind} to \
         take it (not with server.acceptor tiny_http), or stop and disable the unit that has it"
    ))
}

fn handed_over() -> MutexGuard<'static, HandedOver> {
    HANDED_OVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that nobody has taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    pub name: String,
    /// Where it listens.
    pub address: String,
    port: Option<u16>,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.address)
    }
}

enum State {
    Waiting(Socket),
    Taken,
    /// A datagram socket, a FIFO or the like.
    Strange,
}

/// All of them in their order, by name.
struct HandedOver(Vec<(String, State)>);

impl HandedOver {
    fn from_env() -> HandedOver {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').map(str::to_owned);
        let mut sockets = ListenFd::from_env();
        let all = (0..sockets.len()).map(|index| {
            let name = names.next().unwrap_or_default();
            let tcp = sockets.take_tcp_listener(index).ok().flatten();
            let socket = tcp.map(Socket::from).or_else(|| {
                let unix = sockets.take_unix_listener(index).ok().flatten();
                unix.map(Socket::from)
            });
            (name, socket.map_or(State::Strange, State::Waiting))
        });
        HandedOver(all.collect())
    }

    fn take(&mut self, name: Option<&str>) -> io::Result<Option<Socket>> {
        let is_it = |(other, _): &&mut (String, State)| name.is_none_or(|name| name == other);
        let Some((name, state)) = self.0.iter_mut().find(is_it) else {
            return Ok(None);
        };
        if matches!(state, State::Strange) {
            let what = format!("what systemd handed over as {name} is no socket to listen on");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        match std::mem::replace(state, State::Taken) {
            State::Waiting(socket) => Ok(Some(socket)),
            _ => Err(io::Error::other(format!(
                "the socket {name} that systemd handed over is taken by another setting"
            ))),
        }
    }

    fn left(&self) -> Vec<Left> {
        let left = self.0.iter().filter_map(|(name, state)| {
            let (address, port) = match state {
                State::Taken => return None,
                State::Strange => ("no socket to listen on".to_owned(), None),
                State::Waiting(socket) => {
                    let address = socket.local_addr().ok();
                    let port = address.and_then(|address| Some(address.as_socket()?.port()));
                    (shown_address(socket).unwrap_or_default(), port)
                }
            };
            Some(Left {
                name: name.clone(),
                address,
                port,
            })
        });
        left.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening() -> (Socket, u16) {
        let socket = Bind::parse("127.0.0.1:0").unwrap().listen().unwrap().socket;
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        (socket, port)
    }

    #[test]
    fn each_socket_is_taken_once_and_the_others_are_left() {
        let ((first, _), (second, port)) = (listening(), listening());
        let mut all = HandedOver(vec![
            ("http".into(), State::Waiting(first)),
            ("other".into(), State::Waiting(second)),
            ("log".into(), State::Strange),
        ]);
        assert!(all.take(Some("nobody")).unwrap().is_none());
        assert!(all.take(Some("http")).unwrap().is_some());
        for name in [Some("http"), None] {
            let error = all.take(name).unwrap_err().to_string();
            assert!(error.contains("taken by another setting"), "{error}");
        }
        let error = all.take(Some("log")).unwrap_err().to_string();
        assert!(error.contains("log is no socket"), "{error}");
        let left = all.left();
        let shown: Vec<_> = left.iter().map(Left::to_string).collect();
        let other = format!("other (127.0.0.1:{port})");
        assert_eq!(shown, [&other, "log (no socket to listen on)"]);

        let advice = taken_by("server.bind", &Bind::All(port), &left).unwrap();
        let written = format!("write server.bind: systemd:other,:{port} to take it");
        assert!(advice.contains(&written), "{advice}");
        assert_eq!(
            taken_by("server.bind", &Bind::Unix("/a".into()), &left),
            None
        );
    }

    #[test]
    fn nothing_is_taken_where_nothing_was_handed_over() {
        let mut none = HandedOver(Vec::new());
        assert!(none.take(None).unwrap().is_none());
        assert!(none.left().is_empty());
    }

    #[test]
    fn a_missing_socket_has_its_unit_named() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        for (setting, bind, said) in [
            ("server.bind", "systemd", "start asyncproxy.socket"),
            (
                "server.bind",
                "systemd:http",
                "write server.bind: systemd:http,:8080",
            ),
            (
                "metrics.bind",
                "systemd:metrics",
                "start asyncproxy-metrics.socket",
            ),
        ] {
            let bind = Bind::parse(bind).unwrap();
            let advice = advice(setting, &bind, &missing).unwrap();
            assert!(advice.contains(said), "{advice}");
        }
        // A path whose directory is missing is no fault of systemd's.
        for bind in ["unix:/a/b", "systemd:http,unix:/a/b"] {
            let advice = advice("server.bind", &Bind::parse(bind).unwrap(), &missing);
            assert!(!advice.unwrap_or_default().contains("systemctl"), "{bind}");
        }
    }
}
