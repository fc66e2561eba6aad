//! Requests never go round in circles: a destination that is the program itself is refused, and
//! what comes back another way is, too.

use std::net::SocketAddr;

use crate::listening::listener;
use crate::support::destination::{Answer, Destination, Seen};
use crate::support::http;
use crate::support::metrics;
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Proxy, Setup, wait_until};
use crate::support::route::{Route, on_routes};

/// The program on a socket that was handed over, as `setting` asks, and sending to it.
fn started_on_itself(setting: &str, url: impl Fn(SocketAddr) -> String) -> (i32, String) {
    let socket = listener();
    let address = socket.local_addr().expect("address");
    let setup = Setup::new(&url(address)).set(setting, "systemd:own");
    let script = "exec 3<&0 0</dev/null
        export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=own
        exec \"$0\"";
    let mut shell = setup.shell(script);
    let other = socket.try_clone().expect("clone");
    let mut process = Process::spawn_with_sockets(&mut shell, socket.into(), other.into());
    let status = process.wait(PATIENCE).code().expect("an exit status");
    (status, process.text())
}

#[test]
fn a_destination_that_is_the_program_itself_is_refused_at_the_start() {
    for setting in ["server.bind", "metrics.bind"] {
        for host in ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]"] {
            let (status, text) =
                started_on_itself(setting, |own| format!("http://{host}:{}/path", own.port()));
            assert_eq!(status, 1, "{host}: {text}");
            let complaint = text
                .lines()
                .find(|line| line.starts_with("asyncproxy: proxy.remote_url: "));
            let complaint = complaint.unwrap_or_else(|| panic!("{host}: {text}"));
            assert!(complaint.contains(&format!("({setting})")), "{complaint}");
            assert!(complaint.contains("name the application"), "{complaint}");
            assert!(!text.contains("msg=\"listening\""), "{text}");
        }
    }
}

/// Rewrites the file with another destination, and waits until it is taken over or refused.
fn send_to(proxy: &Proxy, setup: Setup, url: &str, result: &str) -> Setup {
    let setup = setup.set("proxy.remote_url", url);
    let name = format!("asyncproxy_config_reloads_total{{result=\"{result}\"}}");
    let before = proxy.metrics().get(&name);
    setup.write();
    proxy.sighup();
    wait_until("the reload", || proxy.metrics().get(&name) == before + 1.0);
    setup
}

#[test]
fn a_destination_that_becomes_the_program_itself_is_refused() {
    let destination = Destination::start();
    let mut setup = Setup::new(&destination.url());
    let proxy = setup.start();
    for (number, own) in [proxy.intake, proxy.control].into_iter().enumerate() {
        let url = format!("http://localhost:{}", own.port());
        setup = send_to(
            &proxy,
            setup.set("server.response_status", 202),
            &url,
            "failed",
        );
        // Nothing of it holds: neither this setting nor the others.
        assert_eq!(proxy.send(&http::numbered(number)).status, 200);
        destination.wait_for(number + 1, PATIENCE);
    }
    proxy.wait_for_log("settings not reloaded");
    send_to(&proxy, setup, &destination.url(), "ok");
    assert_eq!(proxy.send(&http::numbered(2)).status, 202);
    proxy.stop();
}

/// A request as it arrived, for someone who sends it on.
fn again(seen: &Seen) -> Vec<u8> {
    let mut bytes = format!("{} {} HTTP/1.1\r\n", seen.method, seen.target()).into_bytes();
    for line in &seen.lines {
        bytes.extend_from_slice(line);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(&seen.body);
    bytes
}

#[test]
fn what_comes_back_is_refused_and_counted() {
    for acceptor in ["builtin", "tiny_http"] {
        let destination = Destination::start();
        let setup = Setup::new(&destination.url()).set("server.acceptor", acceptor);
        let proxy = setup.start();
        proxy.accept(0..1);
        let seen = destination.wait_for(1, PATIENCE);
        let answer = proxy.send(&again(&seen[0]));
        assert_eq!(answer.status, 508, "{acceptor}");
        assert!(answer.text().contains("has been here before"), "{answer:?}");
        // The same again after a restart, and a good one is taken as ever.
        proxy.stop();
        let proxy = setup.start();
        assert_eq!(proxy.send(&http::numbered(1)).status, 200);
        assert_eq!(destination.wait_for(2, PATIENCE)[1].vias(), seen[0].vias());
        assert_eq!(proxy.send(&again(&seen[0])).status, 508, "{acceptor}");
        let metrics = proxy.metrics();
        assert_eq!(metrics.refused("loop"), 1.0);
        assert_eq!(metrics.accepted(), 1.0);
        proxy.stop();
    }
}

#[test]
fn via_tells_the_protocol_that_a_request_came_in_with() {
    for acceptor in ["builtin", "tiny_http"] {
        let destination = Destination::start();
        let setup = Setup::new(&destination.url()).set("server.acceptor", acceptor);
        let proxy = setup.start();
        for (number, version) in ["1.0", "1.1"].into_iter().enumerate() {
            let request = format!("GET / HTTP/{version}\r\nHost: h\r\nVia: 1.1 fred\r\n\r\n");
            assert_eq!(proxy.send(request.as_bytes()).status, 200, "{acceptor}");
            let vias = destination.wait_for(number + 1, PATIENCE)[number].vias();
            assert_eq!(vias.len(), 2, "{acceptor}: {vias:?}");
            assert_eq!(vias[0], "1.1 fred");
            let own = format!("{version} asyncproxy-");
            assert!(vias[1].starts_with(&own), "{acceptor}: {vias:?}");
        }
        proxy.stop();
    }
}

/// Two that send to each other: each request goes round once and stays until there is a way out.
fn a_ring_of_two_takes_each_request_once(route: Route) {
    const REQUESTS: usize = 3;
    let destination = Destination::answering(|_| Answer::ok());
    let first_setup = route.to(&destination);
    let first = first_setup.start();
    let url = |proxy: &Proxy| format!("http://{}", proxy.intake);
    let second_setup = Setup::new(&url(&first));
    let second = second_setup.start();
    let _first_setup = send_to(&first, first_setup, &url(&second), "ok");
    first.accept(0..REQUESTS);
    metrics::wait_for(&first, "requests that came back", |metrics| {
        metrics.refused("loop") >= 3.0 * REQUESTS as f64
    });
    assert_eq!(first.metrics().accepted(), REQUESTS as f64);
    assert_eq!(second.metrics().accepted(), REQUESTS as f64);
    let _second_setup = send_to(&second, second_setup, &destination.url(), "ok");
    // Through two of a kind, one after the other, is no loop.
    let seen = destination.wait_for_numbers(REQUESTS, PATIENCE);
    for seen in seen {
        let vias = seen.vias();
        assert_eq!(vias.len(), 2, "{vias:?}");
        assert_ne!(vias[0], vias[1]);
    }
    second.stop();
    first.stop();
}
on_routes!(a_ring_of_two_takes_each_request_once: direct Direct, postgres Postgres);
