//! The destination, and an instance that may be running here.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

#[cfg(feature = "tls")]
use http::uri::Scheme;
use serde_json::Value;

use super::{Finding, PATIENCE, within};
use crate::config::own::{self, Listener, OwnAddress, host_and_port};
use crate::config::{Bind, Config, Database, Db, RemoteUrl};
use crate::printable;
use crate::queue::sqlite::server_of;
use crate::upstream;
#[cfg(feature = "tls")]
use crate::upstream::handshake::{self, Cause, Insecure};

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let remote = &config.proxy.remote_url;
    let shown = format!("{}://{}", remote.scheme, remote.authority);
    let listeners = [
        Listener::of_setting("server.bind", &config.server.bind),
        Listener::of_setting("metrics.bind", &config.metrics.bind),
    ];
    let mut findings = Vec::new();
    match own::check(remote, &listeners) {
        Err(own) => findings.push(itself(&shown, &own)),
        Ok(()) => {
            let reached = reach(remote);
            let is_reached = reached.is_ok();
            findings.push(destination(&shown, reached));
            if is_reached {
                findings.extend(secured(&shown, config));
            }
        }
    }
    let answer = asked(&config.metrics.bind);
    match &answer {
        Answer::Instance(status) => {
            findings.extend(clock(status));
            findings.extend(store(status));
            findings.extend(other_process(status));
        }
        Answer::Nothing(_) => findings.extend(served_without_answer(&config.db)),
        Answer::Strange(_) | Answer::NotAsked(_) => {}
    }
    findings.push(instance(answer));
    findings
}

/// Whether the clock was set while the instance ran.
fn clock(status: &Value) -> Option<Finding> {
    let by = status["clock"]["set_by_seconds"].as_i64()?;
    let ago = status["clock"]["seconds_ago"].as_f64().unwrap_or(0.0);
    let how = if by < 0 { "back" } else { "forward" };
    Some(Finding::warning(
        "clock",
        format!(
            "it was set {how} by {} s, {ago:.0} s ago: times of receipt before and after do not compare",
            by.unsigned_abs()
        ),
        "see that the machine keeps the time (chrony, systemd-timesyncd)",
    ))
}

/// What the instance says of its store.
fn store(status: &Value) -> Option<Finding> {
    let found = status["store"]["fault"].as_str();
    let found = found.or(status["store"]["shortage"].as_str())?;
    let found = printable::line(found.as_bytes());
    let mend = "see what it says, and its log";
    Some(Finding::error(
        "store",
        format!("the instance: {found}"),
        mend,
    ))
}

/// What the instance says of another that serves the same file.
fn other_process(status: &Value) -> Option<Finding> {
    let other = status["store"]["other_process"].as_str()?;
    Some(Finding::warning(
        "store",
        format!("the instance: {}", printable::line(other.as_bytes())),
        "one file has one instance: stop one of them, or name another file in its db.connection_string",
    ))
}

/// No instance answers where these settings have it, and a file of theirs is in use.
fn served_without_answer(db: &Db) -> Option<Finding> {
    let queue = match &db.database {
        Database::Sqlite(path) => Some(("db.connection_string", path)),
        Database::Postgres(_) => None,
    };
    let (about, path) = queue.or(db.spool.as_ref().map(|path| ("db.spool", path)))?;
    let path = path.clone();
    let served = within(PATIENCE, move || server_of(&path))??;
    Some(Finding::warning(
        about,
        format!(
            "{served}, and does not answer on metrics.bind: with these settings, a second one would serve it"
        ),
        "stop it, or give each instance a file of its own",
    ))
}

/// A handshake with the certificates of the settings.
#[cfg(feature = "tls")]
fn secured(shown: &str, config: &Config) -> Option<Finding> {
    let proxy = &config.proxy;
    (proxy.remote_url.scheme == Scheme::HTTPS).then(|| {
        let shaken = handshake::shake_hands(&proxy.remote_url, proxy.tls.clone(), PATIENCE);
        handshake(shown, shaken)
    })
}

#[cfg(not(feature = "tls"))]
fn secured(_shown: &str, _config: &Config) -> Option<Finding> {
    None
}

#[cfg(feature = "tls")]
fn handshake(shown: &str, shaken: Result<(), Insecure>) -> Finding {
    const ABOUT: &str = "proxy.remote_url";
    let Insecure { cause, why } = match shaken {
        Ok(()) => return Finding::ok(ABOUT, "its certificate is trusted; no request was sent"),
        Err(insecure) => insecure,
    };
    let why = match cause {
        Cause::NoTls => String::new(),
        _ => format!(" ({why})"),
    };
    let (what, mend) = match cause {
        Cause::NoTls => (
            "does not speak TLS: is it http://?",
            "write http:// in proxy.remote_url, or name the port that speaks TLS",
        ),
        Cause::UnknownIssuer => (
            "has a certificate of an authority that is not trusted",
            "name a PEM file with the certificate of its authority in proxy.ca_file",
        ),
        Cause::OtherName => (
            "has a certificate for other names",
            "write one of these in proxy.remote_url, or have a certificate issued for this one",
        ),
        Cause::Expired => ("has a certificate that has expired", "renew it"),
        Cause::NotYetValid => (
            "has a certificate that is not valid yet",
            "see that both machines keep the time (chrony, systemd-timesyncd)",
        ),
        Cause::OwnCertificate => (
            "does not accept the certificate it is shown, or is shown none",
            "set proxy.client_cert_file and proxy.client_key_file to a certificate that it trusts",
        ),
        Cause::Other => (
            "cannot be spoken TLS to",
            "see what it says, and `openssl s_client` to the same host and port",
        ),
    };
    Finding::error(ABOUT, format!("{shown} {what}{why}"), mend)
}

/// Resolves and connects; sends nothing.
fn reach(remote: &RemoteUrl) -> Result<(SocketAddr, Duration), String> {
    let (host, port) = host_and_port(remote);
    let resolved = within(PATIENCE, move || {
        let addresses = (host.as_str(), port).to_socket_addrs();
        addresses.map(|addresses| addresses.take(ADDRESSES_MAX).collect::<Vec<_>>())
    });
    let addresses = resolved
        .ok_or_else(|| format!("its name is not resolved within {PATIENCE:?}"))?
        .map_err(|error| format!("its name is not resolved: {error}"))?;
    let deadline = Instant::now() + PATIENCE;
    let mut last = "its name has no address".to_owned();
    for address in addresses {
        let began = Instant::now();
        let left = deadline.saturating_duration_since(began);
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(_) => return Ok((address, began.elapsed())),
            Err(error) => last = format!("{address}: {error}"),
        }
    }
    Err(last)
}

fn itself(shown: &str, own: &OwnAddress) -> Finding {
    Finding::error(
        "proxy.remote_url",
        format!(
            "{shown} is this program itself, which listens on {} ({}): it does not start",
            own.address, own.setting
        ),
        "name the application that requests are for, or listen elsewhere",
    )
}

fn destination(shown: &str, reached: Result<(SocketAddr, Duration), String>) -> Finding {
    const ABOUT: &str = "proxy.remote_url";
    match reached {
        Ok((address, took)) => Finding::ok(
            ABOUT,
            format!(
                "{shown} accepts connections on {address}, after {:.1} ms; nothing was sent",
                took.as_secs_f64() * 1000.0
            ),
        ),
        Err(error) => Finding::error(
            ABOUT,
            format!("{shown} cannot be reached: {error}"),
            "start it, or correct the URL; requests wait in the queue meanwhile",
        ),
    }
}

/// What answered on the control port.
#[derive(Debug)]
enum Answer {
    /// What `/status` tells.
    Instance(Value),
    Nothing(String),
    /// Something that is no asyncproxy.
    Strange(String),
    NotAsked(String),
}

fn asked(bind: &Bind) -> Answer {
    let address = match bind.itself() {
        Some(Bind::All(port)) => format!("localhost:{port}"),
        Some(Bind::Host(host, port)) if host.contains(':') => format!("[{host}]:{port}"),
        Some(Bind::Host(host, port)) => format!("{host}:{port}"),
        Some(Bind::Unix(_) | Bind::Systemd { .. }) | None => {
            return Answer::NotAsked(bind.to_string());
        }
    };
    let told = match upstream::get_text(&format!("http://{address}/status"), PATIENCE) {
        Ok(told) => told,
        Err(error) => return Answer::Nothing(format!("{address}: {error}")),
    };
    match serde_json::from_str::<Value>(&told) {
        Ok(status) if status["version"].is_string() => Answer::Instance(status),
        _ => Answer::Strange(address),
    }
}

fn instance(answer: Answer) -> Finding {
    const ABOUT: &str = "metrics.bind";
    const OWN: &str = env!("CARGO_PKG_VERSION");
    match answer {
        Answer::Instance(status) if status["version"] == OWN => {
            Finding::ok(ABOUT, format!("an instance runs here, version {OWN}"))
        }
        Answer::Instance(status) => {
            let version = status["version"].as_str().unwrap_or_default();
            Finding::warning(
                ABOUT,
                format!("the instance that runs here has version {version}, this is {OWN}"),
                "restart it, so that it runs what is installed",
            )
        }
        Answer::Nothing(error) => Finding::ok(ABOUT, format!("no instance runs here ({error})")),
        Answer::Strange(address) => Finding::error(
            ABOUT,
            format!("what answers on {address} is not asyncproxy"),
            "set metrics.bind to an address that is free",
        ),
        Answer::NotAsked(bind) => Finding::ok(ABOUT, format!("not asked: it is {bind}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Level;
    use super::*;

    #[test]
    fn what_an_instance_says_of_its_clock_and_store_is_passed_on() {
        let well = json!({ "clock": null, "store": { "fault": null, "shortage": null } });
        assert_eq!((clock(&well), store(&well)), (None, None));
        let jumped = json!({ "clock": { "set_by_seconds": -3600, "seconds_ago": 5.2 } });
        let found = clock(&jumped).unwrap();
        assert_eq!(found.level, Level::Warning);
        assert!(
            found
                .found
                .starts_with("it was set back by 3600 s, 5 s ago")
        );
        for ill in [
            json!({ "store": { "fault": "damaged" } }),
            json!({ "store": { "fault": null, "shortage": "full" } }),
        ] {
            assert_eq!(store(&ill).unwrap().level, Level::Error, "{ill}");
        }
    }

    #[test]
    fn what_answers_is_told_apart() {
        let level = |answer| instance(answer).level;
        let version = |version: &str| Answer::Instance(json!({ "version": version }));
        assert_eq!(level(version(env!("CARGO_PKG_VERSION"))), Level::Ok);
        assert_eq!(level(version("0.0.1")), Level::Warning);
        assert_eq!(level(Answer::Nothing("refused".into())), Level::Ok);
        assert_eq!(level(Answer::Strange("a:1".into())), Level::Error);
        assert_eq!(level(asked(&Bind::Unix("/a".into()))), Level::Ok);
        let reached = Ok((([127, 0, 0, 1], 1).into(), Duration::ZERO));
        assert_eq!(destination("a", reached).level, Level::Ok);
        assert_eq!(destination("a", Err("refused".into())).level, Level::Error);
    }
}
