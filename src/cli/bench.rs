//! `asyncproxy bench`: a load generator for a deployment of one's own.
//!
//! Closed loop: each client sends its next request when the last was answered, so a slow target
//! gets less. Open loop (`--rate`): requests are due on a fixed schedule, and latency counts from
//! there, whether or not a client was free: waiting that a slow target causes is not left out.

mod load;
mod report;
mod schedule;

use std::net::{IpAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use http::uri::Scheme;
use lexopt::{Arg, Parser};

use super::help::{self, unexpected};
use super::{Command, next, text, value};
use crate::config::{RemoteUrl, parse_positive_duration};
use crate::regular_file;
use crate::request::{self, Headers, Request};
use crate::upstream;
pub use load::run;
pub use report::Report;
pub use schedule::Rate;

const CLIENTS_MAX: usize = 10_000;
const CLIENTS: usize = 64;
const DURATION: Duration = Duration::from_secs(10);
/// What is sent without `--body`.
const BODY_BYTES: usize = 1024;
/// As much as `asyncproxy sink` takes.
const BODY_BYTES_MAX: usize = 64 << 20;
const USER_AGENT: &str = concat!("asyncproxy/", env!("CARGO_PKG_VERSION"), " bench");

/// Options of `asyncproxy bench`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bench {
    pub remote: RemoteUrl,
    /// What every client sends, under an id of its own each time.
    pub request: Request,
    pub clients: usize,
    /// `None`: closed loop.
    pub rate: Option<Rate>,
    pub duration: Duration,
}

impl Bench {
    /// What to say before the start if this may load somebody else's machine.
    pub fn warning(&self) -> Option<String> {
        let authority = &self.remote.authority;
        let host = authority.host().trim_matches(['[', ']']);
        // What cannot be resolved is not loaded either.
        let addresses = (host, 0).to_socket_addrs().ok()?;
        let stranger = stranger(addresses.map(|address| address.ip()))?;
        let name = match host.parse::<IpAddr>() {
            Ok(_) => String::new(),
            Err(_) => format!("{host}: "),
        };
        Some(format!(
            "{name}{stranger} is not this machine: load only what is yours"
        ))
    }
}

/// The first address that is not of this machine's loopback.
fn stranger(mut addresses: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
    addresses.find(|address| !address.to_canonical().is_loopback())
}

pub(super) fn parse(parser: &mut Parser) -> Result<Command, String> {
    let mut url = None;
    let mut body = None;
    let (mut clients, mut rate, mut duration) = (CLIENTS, None, DURATION);
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Long("url") => {
                let parsed = parse_url(&text(parser)?);
                url = Some(parsed.map_err(|why| must_be("--url", &why))?);
            }
            Arg::Long("clients") => {
                let number = text(parser)?.parse().ok();
                clients = number
                    .filter(|number| (1..=CLIENTS_MAX).contains(number))
                    .ok_or("--clients: must be a whole number from 1 to 10000")?;
            }
            Arg::Long("rate") => {
                let parsed = Rate::parse(&text(parser)?);
                rate = Some(parsed.map_err(|why| must_be("--rate", &why))?);
            }
            Arg::Long("duration") => {
                duration = parse_positive_duration(&text(parser)?)
                    .map_err(|why| must_be("--duration", &why))?;
            }
            Arg::Long("body") => body = Some(PathBuf::from(value(parser)?)),
            Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help(help::of("bench"))),
            other => return Err(unexpected(other, "bench")),
        }
    }
    let (remote, target) = url.ok_or_else(|| must_be("--url", URL))?;
    let body = body.map_or_else(|| Ok(vec![b'x'; BODY_BYTES]), |path| read_body(&path))?;
    Ok(Command::Bench(Box::new(Bench {
        remote,
        request: request(target, body)?,
        clients,
        rate,
        duration,
    })))
}

fn must_be(option: &str, what: &str) -> String {
    format!("{option}: must be {what}")
}

const URL: &str = "a URL such as http://localhost:8080/hook?x=1, \
                   without credentials, fragment and spaces";

/// Takes the path and query off: they are the request's.
fn parse_url(text: &str) -> Result<(RemoteUrl, String), String> {
    let path = |rest: &str| rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (scheme, rest) = text.split_once("://").ok_or(URL)?;
    let (authority, target) = rest.split_at(path(rest));
    let remote = RemoteUrl::parse(&format!("{scheme}://{authority}")).map_err(|why| {
        let is_https = scheme.eq_ignore_ascii_case("https");
        match is_https && !upstream::supports(&Scheme::HTTPS) {
            true => why,
            false => URL.to_owned(),
        }
    })?;
    let slash = if target.starts_with('/') { "" } else { "/" };
    let target = format!("{slash}{target}");
    // The rest of the request is ours: only the target can be wrong.
    request(target.clone(), Vec::new()).map_err(|_| URL)?;
    Ok((remote, target))
}

fn request(target: String, body: Vec<u8>) -> Result<Request, String> {
    let received_at = SystemTime::now();
    let mut headers = Headers::default();
    let fields = [
        ("User-Agent", USER_AGENT),
        ("Content-Type", "application/octet-stream"),
    ];
    for (name, value) in fields {
        let pushed = headers.push(name, value.as_bytes());
        pushed.map_err(|error| error.to_string())?;
    }
    let request = Request {
        id: request::new_id(received_at),
        received_at,
        method: "POST".to_owned(),
        target,
        headers,
        body,
    };
    request.check().map_err(|error| error.to_string())?;
    Ok(request)
}

fn read_body(path: &PathBuf) -> Result<Vec<u8>, String> {
    let wrong = |why: &str| {
        format!("--body: {path:?}: {why}: must be a file that can be read, of at most 64MiB")
    };
    regular_file::read(path, BODY_BYTES_MAX).map_err(|error| wrong(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn parse_line(line: &str) -> Result<Bench, String> {
        match crate::cli::parse(line.split_whitespace().map(OsString::from))? {
            Command::Bench(bench) => Ok(*bench),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn defaults_are_a_closed_loop() {
        let bench = parse_line("bench --url http://127.0.0.1:8080").unwrap();
        assert_eq!((bench.clients, bench.rate), (64, None));
        assert_eq!(bench.duration, Duration::from_secs(10));
        assert_eq!(bench.request.target, "/");
        assert_eq!(bench.request.method, "POST");
        assert_eq!(bench.request.body, [b'x'; 1024]);
    }

    #[test]
    fn all_options_are_understood() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("body");
        let line = "bench --clients 3 --rate 0.5 --duration 1m30s --url=http://h:1/a/?b=/@ --body";
        for body in ["", "{}"] {
            std::fs::write(&file, body).unwrap();
            let bench = parse_line(&format!("{line} {}", file.display())).unwrap();
            assert_eq!(bench.clients, 3);
            assert_eq!(bench.rate, Some(Rate::parse("0.5").unwrap()));
            assert_eq!(bench.duration, Duration::from_secs(90));
            assert_eq!(bench.remote, RemoteUrl::parse("http://h:1").unwrap());
            assert_eq!(bench.request.target, "/a/?b=/@");
            assert_eq!(bench.request.body, body.as_bytes());
        }
    }

    #[test]
    fn paths_and_queries_are_the_target() {
        for (url, target) in [
            ("http://h", "/"),
            ("http://h/", "/"),
            ("http://h?a=b", "/?a=b"),
            ("http://[::1]:80/a//b/", "/a//b/"),
            ("HTTP://h/a?b?c://d", "/a?b?c://d"),
        ] {
            assert_eq!(parse_url(url).map(|(_, target)| target), Ok(target.into()));
        }
        let long = format!("http://h/{}", "a".repeat(request::TARGET_BYTES_MAX));
        for url in [
            "",
            "h",
            "/",
            "://",
            "http://",
            "http:///a",
            "http://u:p@h/",
            "http://h:x/",
            "http://h/#a",
            "http://h#a",
            "http://h/a b",
            "ftp://h/",
            "unix:/a",
            &long,
        ] {
            assert_eq!(parse_url(url), Err(URL.to_owned()), "{url:.20}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_accepted() {
        let many = "9".repeat(400);
        for (options, part) in [
            ("", "--url: must be a URL"),
            ("--url h", "--url: must be a URL"),
            ("--clients 0", "--clients: must be a whole number from 1 to"),
            ("--clients 10001", "1 to 10000"),
            ("--clients 1000000000", "1 to 10000"),
            (&format!("--clients {many}"), "1 to 10000"),
            ("--clients -1", "1 to 10000"),
            ("--rate 0", "--rate: must be a number of requests a second"),
            ("--rate 1e18", "0.001 to 1000000"),
            (&format!("--rate {many}"), "0.001 to 1000000"),
            ("--duration 0", "--duration: must be a duration"),
            ("--duration 99999d", "from 1ms to 10 years"),
            (&format!("--duration {many}"), "from 1ms to 10 years"),
            ("--method GET", "--method"),
            ("http://h", "unexpected argument"),
            ("--url http://h --body /nowhere", "--body: \"/nowhere\": "),
            ("--url http://h --body /", "must be a file"),
            ("--url http://h --body /dev/zero", "at most 64MiB"),
        ] {
            let error = parse_line(&format!("bench {options}")).unwrap_err();
            assert!(error.contains(part), "{options:.40}: {error}");
        }
    }

    #[test]
    fn only_loopback_is_this_machine() {
        let strange = |text: &str| stranger(text.split(' ').map(|ip| ip.parse().unwrap()));
        for ours in ["127.0.0.1", "127.9.9.9 ::1", "::ffff:127.0.0.1"] {
            assert_eq!(strange(ours), None, "{ours}");
        }
        for foreign in [
            "192.0.2.1",
            "10.0.0.1",
            "::",
            "2001:db8::1",
            "::1 192.0.2.1",
        ] {
            assert!(strange(foreign).is_some(), "{foreign}");
        }
        let warning = |url| parse_line(&format!("bench --url {url}")).unwrap().warning();
        assert_eq!(warning("http://[::1]:1/"), None);
        assert_eq!(warning("http://127.0.0.1/a"), None);
        assert!(warning("http://192.0.2.1:80/").is_some_and(|text| text.contains("192.0.2.1")));
    }
}
