//! What the sender sent is what the destination gets, byte for byte, on every route.

use crate::support::destination::{Answer, Destination, Seen};
use crate::support::http::{self, Connection};
use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Proxy, Setup};
use crate::support::route::{Route, on_routes};

/// What the program adds for a sender on this machine.
const ADDED: [&[u8]; 3] = [
    b"X-Forwarded-For: 127.0.0.1",
    b"X-Forwarded-Host: hooks.example",
    b"X-Forwarded-Proto: http",
];

/// One request as sent and as it must arrive.
struct Case {
    name: &'static str,
    method: &'static str,
    target: &'static str,
    arrives_at: &'static str,
    lines: Vec<&'static [u8]>,
    arriving: Vec<&'static [u8]>,
    body: Vec<u8>,
    chunked: bool,
}

impl Case {
    fn new(name: &'static str, method: &'static str, target: &'static str) -> Case {
        Case {
            name,
            method,
            target,
            arrives_at: target,
            lines: Vec::new(),
            arriving: ADDED.to_vec(),
            body: b"body".to_vec(),
            chunked: false,
        }
    }

    /// A POST to `/` with these field lines, of which those in `arriving` are passed on.
    fn fields(name: &'static str, lines: &[&'static [u8]], arriving: &[&'static [u8]]) -> Case {
        Case {
            lines: lines.to_vec(),
            arriving: arriving.to_vec(),
            ..Case::new(name, "POST", "/")
        }
    }

    fn body(name: &'static str, method: &'static str, body: Vec<u8>, chunked: bool) -> Case {
        Case {
            body,
            chunked,
            ..Case::new(name, method, "/")
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let (method, target, name) = (self.method, self.target, self.name);
        let mut bytes =
            format!("{method} {target} HTTP/1.1\r\nHost: hooks.example\r\n").into_bytes();
        for line in &self.lines {
            bytes.extend_from_slice(line);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(format!("X-Case: {name}\r\n").as_bytes());
        if self.chunked {
            bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            for chunk in self.body.chunks(1000) {
                bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                bytes.extend_from_slice(chunk);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
        } else {
            if !self.body.is_empty() {
                let length = format!("Content-Length: {}\r\n", self.body.len());
                bytes.extend_from_slice(length.as_bytes());
            }
            bytes.extend_from_slice(b"\r\n");
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }

    fn assert_arrived(&self, seen: &Seen, prefix: &str, host: &str) {
        let name = self.name;
        assert_eq!(seen.method, self.method, "{name}");
        assert_eq!(
            seen.target(),
            format!("{prefix}{}", self.arrives_at),
            "{name}"
        );
        assert_eq!(seen.field("host"), Some(host), "{name}");
        assert_eq!(seen.attempt(), 1, "{name}");
        let vias = seen.vias();
        assert!(
            vias.last()
                .is_some_and(|via| via.starts_with("1.1 asyncproxy-") && via.len() == 23),
            "{name}: {vias:?}"
        );
        // Not assert_eq!: nobody wants to read 10 MiB.
        assert!(seen.body == self.body, "{name}: {} bytes", seen.body.len());
        let case = format!("X-Case: {name}").into_bytes();
        let mut expected: Vec<_> = self.arriving.iter().map(|line| line.to_vec()).collect();
        // Sent after the case's own fields, before those that the program adds.
        let sent = self
            .arriving
            .iter()
            .filter(|line| self.lines.contains(line));
        expected.insert(sent.count(), case);
        assert_eq!(seen.passed_on(), http::grouped(expected), "{name}");
    }
}

/// `lines` and then what the program adds.
fn and_added(lines: &[&'static [u8]]) -> Vec<&'static [u8]> {
    [lines, &ADDED[..]].concat()
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<_> = [
        "POST", "GET", "DELETE", "PUT", "PATCH", "PROPFIND", "OPTIONS", "m-x!",
    ]
    .map(|method| Case::new(method, method, "/with/body"))
    .into();
    cases.extend(
        [
            "/%2F%41%e4%zz?%20=%",
            "//a//b",
            "/a/../b/./c/..",
            "/a;p=1;q?x=1;y=2",
            "/?",
            "/a?b?c=d/e&&=&f",
            "/a|b^c{d}\"?e=[1]{2}^`|\\'",
            "/~!$&'()*+,;=:@",
        ]
        .map(|target| Case::new(target, "POST", target)),
    );
    let hooks: &[u8] = b"X-Forwarded-Host: hooks.example";
    for (target, arrives_at, host) in [
        ("http://hooks.example/a?b", "/a?b", hooks),
        // What was asked for, and not what the Host field says.
        ("HTTPS://other:1/", "/", b"X-Forwarded-Host: other:1"),
        ("http://hooks.example", "/", hooks),
    ] {
        cases.push(Case {
            arrives_at,
            arriving: ADDED
                .into_iter()
                .map(|line| if line == hooks { host } else { line })
                .collect(),
            ..Case::new(target, "POST", target)
        });
    }
    cases.extend(body_cases());
    cases.extend(field_cases());
    cases
}

fn body_cases() -> Vec<Case> {
    let all_bytes: Vec<u8> = (0..=255).collect();
    vec![
        Case::body("GET without body", "GET", Vec::new(), false),
        Case::body("HEAD without body", "HEAD", Vec::new(), false),
        Case::body("POST without body", "POST", Vec::new(), false),
        Case::body("every byte", "POST", all_bytes.clone(), false),
        Case::body("every byte chunked", "PUT", all_bytes.repeat(20), true),
        Case::body("nothing chunked", "POST", Vec::new(), true),
        Case::body("GET chunked", "GET", b"chunked".to_vec(), true),
        Case::body("10 MiB", "POST", all_bytes.repeat(40 * 1024), false),
    ]
}

fn field_cases() -> Vec<Case> {
    const KEPT: &[&[u8]] = &[
        b"x-lower: 1",
        b"X-Multi: one",
        b"X-UPPER: a, b;c=\"d\"",
        b"X-Multi: two",
        b"x-multi: three",
        b"Cookie: a=b; c=d",
        b"Content-Type: text/plain; charset=latin-1",
        b"Content-Encoding: br",
        b"Accept-Encoding: gzip",
        b"Authorization: Basic dTpw",
        b"User-Agent: sender/1",
        b"X-Hub-Signature-256: sha256=00ff",
    ];
    vec![
        Case::fields("order, repeats and case", KEPT, &and_added(KEPT)),
        Case::fields(
            "fields of the hop",
            &[
                b"Connection: keep-alive, X-Hop",
                b"X-Hop: 1",
                b"Keep-Alive: timeout=5",
                b"TE: trailers",
                b"Trailer: X-Sum",
                b"Upgrade: h2c",
                b"Proxy-Connection: keep-alive",
                b"X-Asyncproxy-Id: forged",
                b"X-Asyncproxy-Attempt: 9",
                b"X-Asyncproxy-Route: forged",
            ],
            &ADDED,
        ),
        Case::fields(
            "names that CGI takes for ours or for the framing",
            &[
                b"X_Asyncproxy_Id: forged",
                b"X_Forwarded_For: 192.0.2.1",
                b"x_forwarded_host: forged",
                b"X_Forwarded_Proto: https",
                b"Content_Length: 1",
                b"Transfer_Encoding: chunked",
                b"Proxy: http://192.0.2.1/",
                b"X_Kept: 1",
            ],
            &and_added(&[b"X_Kept: 1"]),
        ),
        Case::fields(
            "other proxies before this one",
            &[b"Via: 1.0 fred, 1.1 p.example.net", b"via: 1.1 asyncproxy"],
            &and_added(&[b"Via: 1.0 fred, 1.1 p.example.net", b"via: 1.1 asyncproxy"]),
        ),
        Case::fields(
            "a chain of proxies",
            &[b"X-Forwarded-For: 192.0.2.1", b"x-forwarded-for: 192.0.2.2"],
            &[
                b"X-Forwarded-For: 192.0.2.1, 192.0.2.2, 127.0.0.1",
                b"X-Forwarded-Host: hooks.example",
                b"X-Forwarded-Proto: http",
            ],
        ),
        Case::fields(
            "a proxy that names host and protocol",
            &[
                b"X-Forwarded-Proto: https",
                b"x-forwarded-host: shop.example",
            ],
            &[
                b"X-Forwarded-Proto: https",
                b"x-forwarded-host: shop.example",
                b"X-Forwarded-For: 127.0.0.1",
            ],
        ),
    ]
}

fn assert_faithful(
    setup: &Setup,
    route: Route,
    cases: &[Case],
    destination: &Destination,
    prefix: &str,
) {
    let proxy = setup.start();
    let mut connection = Connection::open(proxy.intake);
    for (number, case) in cases.iter().enumerate() {
        connection.send(&case.bytes());
        // An answer to HEAD announces a body that does not follow: nothing more can be read.
        if case.method == "HEAD" {
            destination.wait_for(number + 1, PATIENCE);
            connection = Connection::open(proxy.intake);
            continue;
        }
        let answer = connection.response().expect(case.name);
        assert_eq!(answer.status, 200, "{}: {}", case.name, answer.text());
    }
    let seen = destination.wait_for(cases.len(), PATIENCE);
    let host = destination.address.to_string();
    for case in cases {
        let arrived = seen
            .iter()
            .find(|seen| seen.field("x-case") == Some(case.name));
        case.assert_arrived(arrived.expect(case.name), prefix, &host);
    }
    assert_eq!(seen.len(), cases.len());
    assert_eq!(proxy.metrics().get(route.admission()), cases.len() as f64);
}

fn every_request_arrives_as_sent(route: Route) {
    let destination = Destination::start();
    let mut cases = cases();
    let bytes: &[&[u8]] = &[
        b"X-Latin: caf\xe9 \xff",
        b"X-Multi: \x80",
        b"x-multi: a\t\xc3\xa4",
    ];
    cases.push(Case::fields("bytes in fields", bytes, &and_added(bytes)));
    assert_faithful(&route.to(&destination), route, &cases, &destination, "");
}
on_routes!(every_request_arrives_as_sent);

#[test]
fn a_path_in_remote_url_goes_before_the_target() {
    let destination = Destination::start();
    let remote_url = format!("{}/base/v1", destination.url());
    let setup = Setup::new(&remote_url).set("proxy.num_clients", 64);
    assert_faithful(&setup, Route::Direct, &cases(), &destination, "/base/v1");
}

/// Without bytes in fields that are not ASCII: it closes the connection then.
#[test]
fn the_other_acceptor_is_as_faithful() {
    let destination = Destination::start();
    let setup = Route::Direct
        .to(&destination)
        .set("server.acceptor", "tiny_http");
    assert_faithful(&setup, Route::Direct, &cases(), &destination, "");
}

#[test]
fn configured_status_is_the_answer() {
    let destination = Destination::answering(|_| Answer::status(500));
    let setup = Setup::new(&destination.url()).set("server.response_status", 202);
    let proxy = setup.start();
    assert_eq!(proxy.send(&http::numbered(0)).status, 202);
}

#[test]
fn what_can_never_be_sent_on_is_refused_before_it_is_acknowledged() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let start_lines = [
        "CONNECT hooks.example:80",
        "CONNECT /",
        "GE(T /",
        concat!(
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA /"
        ),
        "OPTIONS *",
        "POST hooks.example",
        "POST ?a",
        "POST /a#b",
        "POST /a?b#c",
        "POST /a<b",
        "POST /a>b",
        "POST /a?b<c",
        "POST /a?b\"c",
        "POST /a\tb",
        "POST /a?b\x01c",
        "POST /a\x7fb",
        "POST http://hooks.example?x",
        "POST ftp://hooks.example/",
        "POST http://user:password@hooks.example/",
        "POST http://hooks.example:x/",
        "POST http://hooks\"example/",
        "POST http://hooks<example/",
        "POST http:///",
    ];
    let field_lines = [
        "X-A: 1\0",
        "X-A: 1\x1b2",
        "X-A: 1\x7f",
        "X-A: 1\n2",
        "X(A: 1",
        "\"A\": 1",
    ];
    let mut requests: Vec<Vec<u8>> = start_lines
        .map(|start| format!("{start} HTTP/1.1\r\nHost: hooks.example\r\n\r\n").into_bytes())
        .into();
    requests.extend(field_lines.map(|line| http::request("POST", "/", &[line], b"body")));
    for request in &requests {
        let answer = proxy.send(request);
        let start: Vec<u8> = request.iter().copied().take(80).collect();
        assert_eq!(answer.status, 400, "{}", start.escape_ascii());
        assert!(!answer.text().is_empty(), "{}", start.escape_ascii());
    }
    // A good one last: whatever arrived, arrived before it.
    assert_eq!(proxy.send(&http::numbered(0)).status, 200);
    assert_eq!(destination.wait_for(1, PATIENCE)[0].number(), 0);
    let metrics = proxy.metrics();
    assert_eq!(metrics.refused("invalid"), requests.len() as f64);
    assert_eq!(metrics.accepted(), 1.0);
}

#[test]
fn what_cannot_be_read_is_refused() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    for head in [
        "POST / HTTP/1.1\r\nHost: a\r\nX A: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nX-A : 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nX-A\r\n\r\n",
        "POST /\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n",
    ] {
        let answer = proxy.send(head.as_bytes());
        assert_eq!(answer.status, 400, "{head:?}");
    }
    proxy.accept(0..1);
    assert_eq!(destination.wait_for(1, PATIENCE)[0].number(), 0);
    assert_eq!(proxy.metrics().accepted(), 1.0);
}

#[test]
fn what_is_too_long_or_too_new_is_refused() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let long = format!("POST /{} HTTP/1.1", "a".repeat(32 * 1024));
    for (start, status) in [(&*long, 414), ("POST / HTTP/1.7", 505)] {
        let request = format!("{start}\r\nHost: a\r\n\r\n");
        assert_eq!(proxy.send(request.as_bytes()).status, status);
    }
    assert_eq!(proxy.metrics().accepted(), 0.0);
}

#[test]
fn a_body_that_breaks_off_is_not_accepted() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    for head in ["Content-Length: 2000", "Transfer-Encoding: chunked"] {
        let mut connection = Connection::open(proxy.intake);
        connection
            .send(format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n7d0\r\nab").as_bytes());
        connection.end();
        // Answered or not, it is no success.
        match connection.response() {
            Ok(answer) => assert_eq!(answer.status, 400, "{head}"),
            Err(_closed) => {}
        }
    }
    proxy.accept(0..1);
    assert_eq!(destination.wait_for(1, PATIENCE)[0].number(), 0);
    assert_eq!(proxy.metrics().accepted(), 1.0);
}

#[test]
fn bodies_over_the_limit_are_refused() {
    const LIMIT: usize = 64 * 1024;
    let destination = Destination::start();
    let setup = Setup::new(&destination.url()).set("server.max_body_size", "64KiB");
    let proxy = setup.start();
    for chunked in [false, true] {
        for (length, status) in [(LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413)] {
            let case = Case::body("limit", "POST", vec![b'x'; length], chunked);
            let answer = proxy.send(&case.bytes());
            assert_eq!(answer.status, status, "{length} bytes, chunked: {chunked}");
        }
    }
    let seen = destination.wait_for(4, PATIENCE);
    assert!(seen.iter().all(|seen| seen.body.len() <= LIMIT));
    assert_eq!(proxy.metrics().refused("too_large"), 2.0);
}

#[test]
fn a_sender_that_expects_to_continue_is_told_to() {
    let destination = Destination::start();
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    let mut connection = Connection::open(proxy.intake);
    for (number, expect) in ["100-continue", ", 100-continue ,"].into_iter().enumerate() {
        let head =
            format!("POST / HTTP/1.1\r\nHost: a\r\nExpect: {expect}\r\nContent-Length: 4\r\n\r\n");
        connection.send(head.as_bytes());
        assert_eq!(connection.interim().expect("an interim answer"), 100);
        assert_eq!(connection.exchange(b"body").status, 200);
        let seen = &destination.wait_for(number + 1, PATIENCE)[number];
        assert_eq!((&*seen.body, seen.field("expect")), (&b"body"[..], None));
    }
    // Nothing is expected here: no interim answer is waited for.
    connection.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: ,\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(connection.interim().expect("an answer"), 200);
}

/// What a destination that computes a signature over the URL has to know: the host that was asked
/// for and the protocol, also where a proxy in front, or TLS that ends there, says something else.
fn the_host_and_the_protocol_are_those_of_the_sender_if_asked_for(route: Route) {
    for acceptor in ["builtin", "tiny_http"] {
        let destination = Destination::start();
        let own = destination.address.to_string();
        let setup = route.to(&destination).set("server.acceptor", acceptor);
        let mut count = 0;
        for (preserve, proto) in [(false, "http"), (true, "https")] {
            let setup = &setup;
            let mut command = setup.command();
            command.env("PROXY_PRESERVE_HOST", preserve.to_string());
            command.env("SERVER_FORWARDED_PROTO", proto);
            let proxy = Proxy::of(Process::spawn(&mut command));
            let mut send = |request: &str| {
                assert_eq!(proxy.send(request.as_bytes()).status, 200, "{request}");
                count += 1;
                let seen = destination.wait_for(count, PATIENCE).swap_remove(count - 1);
                let told = |name| seen.field(name).unwrap_or_default().to_owned();
                (
                    told("host"),
                    told("x-forwarded-host"),
                    told("x-forwarded-proto"),
                )
            };
            let host = |sent: &str| match preserve {
                true => sent.to_owned(),
                false => own.clone(),
            };
            let expect = |host: String, forwarded: &str, proto: &str| {
                (host, forwarded.to_owned(), proto.to_owned())
            };
            assert_eq!(
                send("GET /a HTTP/1.1\r\nHost: hooks.example:8443\r\n\r\n"),
                expect(host("hooks.example:8443"), "hooks.example:8443", proto),
            );
            // What a proxy in front says is passed on, and is not what came in.
            assert_eq!(
                send(
                    "GET /b HTTP/1.1\r\nHost: inner\r\nX-Forwarded-Host: outer\r\n\
                     X-Forwarded-Proto: wss\r\n\r\n"
                ),
                expect(host("inner"), "outer", "wss"),
            );
            // Without one there is nothing to preserve.
            assert_eq!(
                send("GET /c HTTP/1.0\r\n\r\n"),
                expect(own.clone(), "", proto)
            );
            proxy.stop();
        }
    }
}
on_routes!(the_host_and_the_protocol_are_those_of_the_sender_if_asked_for: direct Direct, sqlite Sqlite, postgres Postgres, first SqliteFirst);

/// What was stored before the settings changed is sent as they are by then.
#[test]
fn a_stored_request_is_sent_with_the_host_that_is_asked_for_by_then() {
    let mut destination = Destination::down();
    let own = destination.address.to_string();
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("proxy.preserve_host", true)
        .set("queue.backoff_max", "1s")
        .set("queue.backoff_min", "1s");
    let proxy = setup.start();
    for target in ["/a", "/b"] {
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: inner\r\nX-Forwarded-Host: outer\r\n\r\n");
        assert_eq!(proxy.send(request.as_bytes()).status, 200);
    }
    let curl = |setup: &Setup| {
        let ls = setup.command().args(["queue", "ls", "--json"]).output();
        let ls = String::from_utf8(ls.unwrap().stdout).unwrap();
        let first: serde_json::Value = serde_json::from_str(ls.lines().next().unwrap()).unwrap();
        let id = first["id"].as_str().unwrap().to_owned();
        let shown = setup
            .command()
            .args(["queue", "show", &id, "--curl"])
            .output();
        String::from_utf8(shown.unwrap().stdout).unwrap()
    };
    assert!(
        curl(&setup).contains("--header 'Host: inner'"),
        "{}",
        curl(&setup)
    );
    let setup = setup.set("proxy.preserve_host", false);
    setup.write();
    assert!(!curl(&setup).contains("Host: inner"), "{}", curl(&setup));
    proxy.sighup();
    proxy.wait_for_log("key=proxy.preserve_host");
    proxy.wait_for_log("settings reloaded");
    destination.open();
    for seen in destination.wait_for(2, PATIENCE) {
        assert_eq!(seen.field("host"), Some(&*own));
        assert_eq!(seen.field("x-forwarded-host"), Some("outer"));
    }
    proxy.stop();
}
