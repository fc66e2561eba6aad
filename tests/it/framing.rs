//! The builtin acceptor's reading of HTTP: framing cases, limits at their edges, any cut.

#[path = "../fuzz/check.rs"]
mod check;

use asyncproxy::intake::builtin::head::{FIELDS_BYTES_MAX, FIELDS_MAX, LINE_BYTES_MAX};
use check::{BODY_BYTES_MAX, read_all, status};
use proptest::prelude::*;

/// What becomes of bytes: how many requests are understood, and the status that ends them.
fn outcome(bytes: &[u8]) -> (usize, Option<u16>) {
    check::check(bytes);
    let (seen, end) = read_all(bytes, &[usize::MAX]);
    (seen.len(), status(&end))
}

fn body(bytes: &[u8]) -> Vec<u8> {
    let (mut seen, _) = read_all(bytes, &[usize::MAX]);
    assert_eq!(seen.len(), 1);
    seen.remove(0).body
}

/// A request with these field lines, and whatever follows.
fn with(fields: &str, rest: &str) -> Vec<u8> {
    format!("POST /a HTTP/1.1\r\nHost: h\r\n{fields}\r\n{rest}").into_bytes()
}

const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";

#[test]
fn ambiguous_or_malformed_requests_are_refused() {
    let fields = [
        ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", 400),
        ("Content-Length: 1\r\nContent-Length: 2\r\n", 400),
        ("Content-Length: 1, 1\r\n", 400),
        ("Content-Length: +1\r\n", 400),
        ("Content-Length: -1\r\n", 400),
        ("Content-Length: 0x1\r\n", 400),
        ("Content-Length: 1 1\r\n", 400),
        ("Content-Length:\r\n", 400),
        ("Content-Length: 99999999999999999999999\r\n", 413),
        ("Content-Length: 70368744177664\r\n", 413),
        ("Transfer-Encoding: gzip, chunked\r\n", 400),
        ("Transfer-Encoding: chunked, chunked\r\n", 400),
        ("Transfer-Encoding: chunked, identity\r\n", 400),
        ("Transfer-Encoding: identity\r\n", 400),
        // Lists in all but the strictest reading, and not read alike by all.
        ("Transfer-Encoding: chunked,\r\n", 400),
        ("Transfer-Encoding: , chunked\r\n", 400),
        ("Transfer-Encoding:\r\n", 400),
        ("Content-Length: 1,\r\n", 400),
        ("Content-Length: , 1\r\n", 400),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            400,
        ),
        ("Transfer-Encoding: \x0bchunked\r\n", 400),
        ("Transfer-Encoding : chunked\r\n", 400),
        ("X: a\r\n b\r\n", 400),
        (" X: a\r\n", 400),
        ("X: a\rb\r\n", 400),
        ("X: a\nY: b\r\n", 400),
        ("X: a\0b\r\n", 400),
        ("X: a\x01b\r\n", 400),
        ("X: a\x7fb\r\n", 400),
        ("X y: a\r\n", 400),
        (": a\r\n", 400),
        ("no colon\r\n", 400),
        ("Host: h2\r\n", 400),
        ("Connection: \u{e9}\x01\r\n", 400),
        ("Expect: 200-ok\r\n", 417),
        ("Expect: 100-continue\r\nExpect: x\r\n", 417),
        ("Expect: 100-continue, x\r\n", 417),
        ("Expect: , x\r\n", 417),
        ("Expect: 100-continue 100-continue\r\n", 417),
    ];
    for (lines, status) in fields {
        assert_eq!(outcome(&with(lines, "abc")), (0, Some(status)), "{lines:?}");
    }
    let heads: [(&[u8], u16); 28] = [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: h\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/11\r\nHost: h\r\n\r\n", 400),
        (b"GET / http/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400),
        (b"GET /\r\nHost: h\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b" GET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /\x01 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /\x7f HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"G\xc3\xa9T / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"GET / HTTP/1.1\r\nHost: h", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h/<\"@\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h:x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h:1:1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h%4\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: u@h\r\n\r\n", 400),
    ];
    for (bytes, status) in heads {
        assert_eq!(
            outcome(bytes),
            (0, Some(status)),
            "{}",
            bytes.escape_ascii()
        );
    }
}

#[test]
fn malformed_chunks_are_refused() {
    for (rest, status) in [
        ("", 400),
        ("5\r\nabc", 400),
        ("g\r\n", 400),
        ("\r\n", 400),
        ("-1\r\n", 400),
        ("+1\r\na\r\n0\r\n\r\n", 400),
        ("0x1\r\na\r\n0\r\n\r\n", 400),
        (" 1\r\na\r\n0\r\n\r\n", 400),
        ("1 \r\na\r\n0\r\n\r\n", 400),
        ("1\na\r\n0\r\n\r\n", 400),
        ("1\r\nab\r\n0\r\n\r\n", 400),
        ("1\r\na0\r\n\r\n", 400),
        ("1\r\na\n0\r\n\r\n", 400),
        ("1;a\rb\r\na\r\n0\r\n\r\n", 400),
        ("0\r\nX: a\nY: b\r\n\r\n", 400),
        ("0\r\nX: a", 400),
        ("fffffffffffffffffff\r\n", 413),
        ("ffffffffffffffff\r\n", 413),
        ("10001\r\n", 413),
        ("1\r\na\r\n10000\r\n", 413),
    ] {
        assert_eq!(outcome(&with(CHUNKED, rest)), (0, Some(status)), "{rest:?}");
    }
}

#[test]
fn well_formed_bodies_are_read_whole() {
    for (fields, rest, expected) in [
        ("", "", ""),
        ("Content-Length: 0\r\n", "", ""),
        ("Content-Length: 3\r\n", "abc", "abc"),
        ("content-length: 03\r\n", "abc", "abc"),
        ("Content-Length: 3\r\nContent-Length: 3\r\n", "abc", "abc"),
        (CHUNKED, "0\r\n\r\n", ""),
        (
            "transfer-encoding: CHUNKED\r\n",
            "3\r\nabc\r\n0\r\n\r\n",
            "abc",
        ),
        (CHUNKED, "1\r\na\r\n02\r\nbc\r\n000\r\n\r\n", "abc"),
        (
            CHUNKED,
            "3;ext=\"v\"\r\nabc\r\n0;x\r\nTrailer: t\r\n\r\n",
            "abc",
        ),
        (CHUNKED, "3 ;ext\r\nabc\r\n0\r\n\r\n", "abc"),
        (
            CHUNKED,
            "A\r\n\r\n\r\n\r\n\r\n\0\n\r\n0\r\n\r\n",
            "\r\n\r\n\r\n\r\n\0\n",
        ),
    ] {
        let bytes = with(fields, rest);
        assert_eq!(outcome(&bytes), (1, None), "{fields:?} {rest:?}");
        assert_eq!(body(&bytes), expected.as_bytes(), "{fields:?} {rest:?}");
    }
}

/// RFC 9110 §5.6.1: empty members of a list count for nothing.
#[test]
fn empty_members_of_a_list_are_ignored() {
    for (fields, is_kept) in [
        ("Expect:\r\n", true),
        ("Expect: ,\r\n", true),
        ("Expect: 100-continue,\r\n", true),
        ("Expect: ,100-Continue\r\n", true),
        (
            "Expect: , \t,100-continue ,, 100-continue\r\nExpect:\r\n",
            true,
        ),
        ("Connection:\r\n", true),
        ("Connection: ,\r\n", true),
        ("Connection: close,\r\n", false),
        ("Connection: ,, Close\r\n", false),
        ("TE: ,\r\nTrailer: ,\r\nUpgrade:\r\n", true),
    ] {
        let bytes = with(&format!("{fields}Content-Length: 3\r\n"), "abc");
        assert_eq!(outcome(&bytes), (1, None), "{fields:?}");
        let (seen, _) = read_all(&bytes, &[usize::MAX]);
        assert_eq!(seen[0].keep_alive, is_kept, "{fields:?}");
        assert_eq!(seen[0].body, b"abc", "{fields:?}");
    }
}

#[test]
fn requests_that_follow_one_another_are_told_apart() {
    let bytes = [
        with("Content-Length: 3\r\n", "abc"),
        b"\r\n".to_vec(),
        with(CHUNKED, "1\r\nx\r\n0\r\n\r\n"),
        b"GET /last HTTP/1.0\r\n\r\n".to_vec(),
    ]
    .concat();
    check::check(&bytes);
    let (seen, end) = read_all(&bytes, &[5]);
    assert_eq!(status(&end), None);
    let bodies: Vec<_> = seen.iter().map(|request| request.body.as_slice()).collect();
    assert_eq!(bodies, [&b"abc"[..], b"x", b""]);
    let kept: Vec<_> = seen.iter().map(|request| request.keep_alive).collect();
    assert_eq!(kept, [true, true, false]);
}

#[test]
fn keep_alive_follows_version_and_connection() {
    for (version, fields, expected) in [
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: Keep-Alive, CLOSE\r\n", false),
        ("1.1", "Connection: closed\r\n", true),
        ("1.0", "", false),
        ("1.0", "Connection: keep-alive\r\n", true),
        (
            "1.0",
            "Connection: keep-alive\r\nConnection: close\r\n",
            false,
        ),
    ] {
        let bytes = format!("GET / HTTP/{version}\r\nHost: h\r\n{fields}\r\n").into_bytes();
        let (seen, _) = read_all(&bytes, &[usize::MAX]);
        assert_eq!(seen[0].keep_alive, expected, "{version} {fields:?}");
    }
}

#[test]
fn bytes_beyond_ascii_pass_in_values() {
    let (seen, _) = read_all(
        b"GET / HTTP/1.1\r\nHost: h\r\nX: \t\x80\xff\xc3\xa9 \r\n\r\n",
        &[usize::MAX],
    );
    assert_eq!(
        seen[0].fields[1],
        ("X".into(), b"\x80\xff\xc3\xa9".to_vec())
    );
}

#[test]
fn every_limit_holds_at_its_edge() {
    let line = |bytes: usize| {
        let target = "a".repeat(bytes - "GET / HTTP/1.1".len());
        format!("GET /{target} HTTP/1.1\r\nHost: h\r\n\r\n").into_bytes()
    };
    let fields_bytes = |bytes: usize| {
        let value = "a".repeat(bytes - "Host: h\r\nX: \r\n".len());
        with("", "").len();
        format!("GET / HTTP/1.1\r\nHost: h\r\nX: {value}\r\n\r\n").into_bytes()
    };
    let fields = |count: usize| with(&"X: a\r\n".repeat(count - 1), "");
    let length = |bytes: usize| with(&format!("Content-Length: {bytes}\r\n"), &"b".repeat(bytes));
    let chunked = |bytes: usize| {
        let first = bytes / 2;
        let (a, b) = ("b".repeat(first), "b".repeat(bytes - first));
        with(
            CHUNKED,
            &format!(
                "{first:x}\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n",
                bytes - first
            ),
        )
    };
    let chunk_line = |bytes: usize| {
        with(
            CHUNKED,
            &format!("1;{}\r\na\r\n0\r\n\r\n", "e".repeat(bytes - 2)),
        )
    };
    let trailers = |count: usize| with(CHUNKED, &format!("0\r\n{}\r\n", "X: a\r\n".repeat(count)));
    type Make<'a> = &'a dyn Fn(usize) -> Vec<u8>;
    let limits: [(&str, usize, u16, Make<'_>); 7] = [
        ("request line", LINE_BYTES_MAX, 414, &line),
        ("bytes of fields", FIELDS_BYTES_MAX, 431, &fields_bytes),
        ("fields", FIELDS_MAX, 431, &fields),
        ("body by length", BODY_BYTES_MAX, 413, &length),
        ("body by chunks", BODY_BYTES_MAX, 413, &chunked),
        ("chunk line", 4096, 400, &chunk_line),
        ("trailers", FIELDS_MAX, 431, &trailers),
    ];
    for (what, limit, status, make) in limits {
        assert_eq!(outcome(&make(limit - 1)), (1, None), "{what}: one under");
        assert_eq!(outcome(&make(limit)), (1, None), "{what}: at the limit");
        assert_eq!(
            outcome(&make(limit + 1)),
            (0, Some(status)),
            "{what}: one over"
        );
    }
}

#[test]
fn the_sender_is_asked_for_a_body_it_holds_back() {
    use asyncproxy::budget::Budget;
    use asyncproxy::intake::builtin::body::Input;
    use asyncproxy::intake::builtin::head::Framing;
    let mut input = Input::default();
    let mut source = check::Pieces::new(b"GET / HTTP/1.1\r\nHost: h\r\n\r\nab", &[usize::MAX]);
    let mut permit = Budget::new(100).permit();
    input
        .read_head(&mut source, &mut Vec::new(), &mut permit)
        .unwrap();
    assert_eq!(permit.bytes(), b"GET / HTTP/1.1\r\nHost: h\r\n\r\n".len());
    assert!(input.holds(Framing::Length(2)));
    assert!(!input.holds(Framing::Length(3)));
    assert!(input.holds(Framing::Chunked));
    let mut permit = Budget::new(1).permit();
    let overloaded = input.read_body(&mut source, Framing::Length(2), 10, &mut permit);
    assert_eq!(status(&overloaded.unwrap_err()), Some(503));
}

#[test]
fn the_fuzzers_corpus_holds() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/requests");
    let mut count = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        check::check(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "no corpus in {corpus}");
}

prop_compose! {
    fn any_request()(
        method in "[A-Z]{1,10}",
        target in "/[!-~]{0,40}",
        fields in prop::collection::vec(("[a-zA-Z][a-zA-Z0-9-]{0,20}", "([!-~]([ -~\t]{0,30}[!-~])?)?"), 0..20),
        body in prop::collection::vec(any::<u8>(), 0..3000),
        chunks in prop::option::of(prop::collection::vec(1usize..700, 1..5)),
    ) -> (Vec<u8>, check::Seen) {
        let framing = ["content-length", "transfer-encoding", "host", "connection", "expect"];
        let fields: Vec<_> = fields
            .into_iter()
            .filter(|(name, _)| !framing.contains(&name.to_ascii_lowercase().as_str()))
            .collect();
        let mut bytes = format!("{method} {target} HTTP/1.1\r\nHost: h\r\n").into_bytes();
        for (name, value) in &fields {
            bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
        let mut expected = vec![("Host".to_owned(), b"h".to_vec())];
        expected.extend(fields.into_iter().map(|(name, value)| (name, value.into_bytes())));
        let framing = match &chunks {
            None => ("Content-Length".to_owned(), body.len().to_string().into_bytes()),
            Some(_) => ("Transfer-Encoding".to_owned(), b"chunked".to_vec()),
        };
        bytes.extend_from_slice(format!("{}: {}\r\n\r\n", framing.0, framing.1.escape_ascii()).as_bytes());
        expected.push(framing);
        match chunks {
            None => bytes.extend_from_slice(&body),
            Some(sizes) => {
                let mut rest = body.as_slice();
                for size in sizes.iter().cycle() {
                    if rest.is_empty() { break; }
                    let (chunk, later) = rest.split_at((*size).min(rest.len()));
                    bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    bytes.extend_from_slice(chunk);
                    bytes.extend_from_slice(b"\r\n");
                    rest = later;
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
        }
        (bytes, check::Seen { method, target, fields: expected, body, keep_alive: true })
    }
}

proptest! {
    #[test]
    fn any_request_in_any_pieces_is_the_same(
        (bytes, expected) in any_request(),
        sizes in prop::collection::vec(1usize..200, 1..20),
    ) {
        let (seen, end) = read_all(&bytes, &sizes);
        prop_assert_eq!(status(&end), None);
        prop_assert_eq!(&seen, &vec![expected]);
        let received = sizes[0] * 16;
        let (in_front, end) = check::read_in_front(&bytes, received);
        prop_assert_eq!(status(&end), None);
        prop_assert_eq!(in_front, seen);
    }

    #[test]
    fn any_bytes_are_read_soundly(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        check::check(&bytes);
    }
}
