//! What helps when an address cannot be listened on.

use std::io;
use std::path::Path;

use super::Bind;

/// Ports below are root's, unless the system says otherwise (`net.ipv4.ip_unprivileged_port_start`).
const FREE_PORTS: u16 = 1024;

/// In words for whoever wrote `setting`, if anything can be said.
pub(super) fn advice(setting: &str, bind: &Bind, error: &io::Error) -> Option<String> {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, NotFound, PermissionDenied};
    match (bind.itself()?, error.kind()) {
        (Bind::Unix(_), AddrInUse) => Some(format!(
            "another program listens there: stop it, or set {setting} to another path"
        )),
        (tcp, AddrInUse) => {
            let port = tcp.port()?;
            Some(format!(
                "another program listens there (ss -ltnp 'sport = :{port}' as root tells which): stop it, \
                 or set {setting} to another port"
            ))
        }
        (Bind::Unix(path), PermissionDenied) => Some(format!(
            "this user may not make a socket in {:?}: give it the directory, or set {setting} to a path \
             elsewhere",
            directory(path)
        )),
        (tcp, PermissionDenied) if tcp.port()? < FREE_PORTS => Some(format!(
            "ports below {FREE_PORTS} are root's: set {setting} to another, have systemd listen (a socket \
             unit), or give the service the right (AmbientCapabilities=CAP_NET_BIND_SERVICE)"
        )),
        (Bind::Unix(path), NotFound) => Some(format!(
            "there is no directory {:?}: make it, such as with RuntimeDirectory= of the unit",
            directory(path)
        )),
        (_, AddrNotAvailable) => Some(format!(
            "this machine does not have that address (ip address shows those it has): set {setting} to \
             one of them, or to :PORT for all"
        )),
        _ => None,
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_helps_is_said_for_each_kind_of_refusal() {
        use io::ErrorKind::{AddrInUse, AddrNotAvailable, NotFound, Other, PermissionDenied};
        for (bind, kind, said) in [
            (":8080", AddrInUse, Some("ss -ltnp 'sport = :8080'")),
            ("systemd:http,127.0.0.1:80", AddrInUse, Some("sport = :80'")),
            ("unix:/run/a.sock", AddrInUse, Some("another path")),
            (":80", PermissionDenied, Some("CAP_NET_BIND_SERVICE")),
            (":8080", PermissionDenied, None),
            ("unix:/run/a.sock", PermissionDenied, Some("\"/run\"")),
            ("unix:/nowhere/a.sock", NotFound, Some("\"/nowhere\"")),
            ("192.0.2.1:80", AddrNotAvailable, Some(":PORT for all")),
            ("systemd:http", AddrInUse, None),
            (":8080", Other, None),
        ] {
            let bind = Bind::parse(bind).unwrap();
            let advice = advice("server.bind", &bind, &io::Error::from(kind));
            match said {
                Some(said) => assert!(
                    advice.as_ref().is_some_and(|text| text.contains(said)),
                    "{bind}: {advice:?}"
                ),
                None => assert_eq!(advice, None, "{bind}"),
            }
        }
    }
}
