//! What is passed on, by its name and whatever way it comes.

use super::*;
use crate::request::{Manners, Mark};

fn pairs<'a>(
    fields: &'a [(&'a str, &'a str)],
) -> impl Iterator<Item = (&'a str, &'a [u8])> + Clone {
    fields.iter().map(|(name, value)| (*name, value.as_bytes()))
}

fn names(headers: &Headers) -> Vec<&str> {
    headers.iter().map(|(name, _)| name).collect()
}

#[test]
fn every_name_has_its_fate_in_any_spelling() {
    let table = [
        (Fate::Drop, &NEVER_FORWARDED[..]),
        (
            Fate::Drop,
            &[
                "x-asyncproxy-id",
                "x-asyncproxy-attempt",
                "x-asyncproxy-received",
                "x-asyncproxy-route",
                "x-asyncproxy-",
                "proxy_connection",
                "keep_alive",
                "transfer_encoding",
                "content_length",
                "proxy_authenticate",
                "x_asyncproxy_id",
                "x-asyncproxy_id",
                "x_asyncproxy-attempt",
                "x_asyncproxy_route",
                "x_forwarded_for",
                "x-forwarded_for",
                "x_forwarded-for",
                "x_forwarded_host",
                "x_forwarded_proto",
                "x_forwarded_port",
            ],
        ),
        (Fate::ForwardedFor, &["x-forwarded-for"]),
        (Fate::ForwardedHost, &["x-forwarded-host"]),
        (Fate::ForwardedProto, &["x-forwarded-proto"]),
        (Fate::Via, &["via"]),
        (
            Fate::Pass,
            &[
                "content-type",
                "content_type",
                "content-length-hint",
                "x-content-length",
                "hosts",
                "proxy-authorization",
                "x-forwarded-port",
                "x-forwarded",
                "forwarded",
                "x-asyncproxy",
                "x-asyncproxyid",
                "x-hub-signature-256",
                "x_id",
                "vias",
                "t",
                "-",
                "_",
            ],
        ),
    ];
    for (expected, names) in table {
        for name in names {
            assert_eq!(fate(name), expected, "{name}");
            assert_eq!(fate(&name.to_ascii_uppercase()), expected, "{name}");
        }
    }
}

#[test]
fn nothing_that_may_not_be_forwarded_comes_in_by_any_way() {
    let mut fields: Vec<(&str, &str)> = NEVER_FORWARDED.map(|name| (name, "1")).into();
    fields.extend([
        ("X-Asyncproxy-Id", "forged"),
        ("X_Forwarded_For", "forged"),
        ("Content_Length", "5"),
        ("Connection", "close, X-Hop"),
        ("X-Hop", "1"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Kept", "1"),
    ]);
    let kept = ["X-Forwarded-For", "X-Kept"];
    let restored = Headers::restored(pairs(&fields)).unwrap();
    assert_eq!(names(&restored), kept);
    let block: String = fields
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    assert_eq!(Headers::from_bytes(block.into()), Ok(restored));
    let mut pushed = Headers::default();
    for (name, value) in pairs(&fields).filter(|(name, _)| *name != "X-Hop") {
        pushed.push(name, value).unwrap();
    }
    assert_eq!(names(&pushed), kept);
    let forwarded = Headers::forwarded(pairs(&fields), Peer::default()).unwrap();
    assert_eq!(
        names(&forwarded),
        ["X-Kept", "X-Forwarded-For", "X-Forwarded-Proto"]
    );
    // What is left out is checked all the same.
    assert_eq!(pushed.push("Host", b"a\r\nb"), Err(Invalid::Header));
}

#[test]
fn our_own_via_comes_last_and_is_refused_when_it_comes_back() {
    let mark = Mark::of(&["a"]);
    let peer = |mark, is_10| Peer {
        mark: Some(mark),
        is_10,
        ..Peer::default()
    };
    let vias = |headers: &Headers| -> Vec<String> {
        let vias = headers
            .iter()
            .filter(|(name, _)| name.eq_ignore_ascii_case("via"));
        vias.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
            .collect()
    };
    let sent = [("Via", "1.0 fred"), ("VIA", "1.1 asyncproxy-00000000")];
    let headers = Headers::forwarded(pairs(&sent), peer(mark, false)).unwrap();
    let own = format!("1.1 {mark}");
    assert_eq!(
        vias(&headers),
        ["1.0 fred", "1.1 asyncproxy-00000000", &own]
    );
    let old = Headers::forwarded(pairs(&[]), peer(mark, true)).unwrap();
    assert_eq!(vias(&old), [format!("1.0 {mark}")]);
    // Once more through here, and through another of its kind.
    assert_eq!(
        Headers::forwarded(headers.iter(), peer(mark, false)),
        Err(Invalid::Loop)
    );
    let other = Mark::of(&["b"]);
    let chained = Headers::forwarded(headers.iter(), peer(other, false)).unwrap();
    assert_eq!(vias(&chained).len(), 4);
    assert_eq!(
        Headers::forwarded(chained.iter(), peer(mark, false)),
        Err(Invalid::Loop)
    );
    // Not even if a hop in between says that it was for itself only.
    let hidden = [("Connection", "via"), ("Via", &*own)];
    assert_eq!(
        Headers::forwarded(pairs(&hidden), peer(mark, false)),
        Err(Invalid::Loop)
    );
}

#[test]
fn there_are_never_more_than_can_be_sent() {
    let line = ("X", "y");
    for (lines, expected) in [
        (LINES_MAX, Ok(())),
        (LINES_MAX + 1, Err(Invalid::Fields)),
        (20_000, Err(Invalid::Fields)),
    ] {
        let fields = vec![line; lines];
        assert_eq!(
            Headers::restored(pairs(&fields)).map(|_| ()),
            expected,
            "{lines}"
        );
        let block = b"X: y\r\n".repeat(lines);
        assert_eq!(Headers::from_bytes(block).map(|_| ()), expected, "{lines}");
    }
    let received = vec![line; 20_000];
    assert_eq!(
        Headers::forwarded(pairs(&received), Peer::default()),
        Err(Invalid::Fields)
    );
    for (bytes, expected) in [
        (BLOCK_BYTES_MAX, Ok(())),
        (BLOCK_BYTES_MAX + 1, Err(Invalid::Fields)),
    ] {
        let value = "a".repeat(bytes - "X: \r\n".len());
        assert_eq!(
            Headers::restored(pairs(&[("X", &value)])).map(|_| ()),
            expected
        );
        let block = format!("X: {value}\r\n").into_bytes();
        assert_eq!(Headers::from_bytes(block).map(|_| ()), expected);
    }
}

#[test]
fn no_more_connection_options_than_can_be_compared_with_each_field() {
    let many = "a,".repeat(CONNECTION_OPTIONS_MAX + 1);
    let fields = [("Connection", &*many)];
    assert_eq!(Headers::restored(pairs(&fields)), Err(Invalid::Header));
    assert_eq!(
        Headers::forwarded(pairs(&fields), Peer::default()),
        Err(Invalid::Header)
    );
    let empty = [("Connection", ",,".repeat(1000))];
    assert!(Headers::restored(pairs(&[("Connection", &empty[0].1)])).is_ok());
}

#[test]
fn fields_are_those_that_the_client_library_takes() {
    use http::{HeaderName, HeaderValue};
    for byte in 0..=255 {
        let bytes = [b'a', byte, b'b'];
        assert_eq!(
            is_token(&bytes),
            HeaderName::from_bytes(&bytes).is_ok(),
            "{byte}"
        );
        let value = HeaderValue::from_bytes(&bytes);
        assert_eq!(is_value_byte(byte), value.is_ok(), "{byte}");
        assert_eq!(
            is_text(&byte),
            value.is_ok_and(|value| value.to_str().is_ok()),
            "{byte}"
        );
    }
    assert!(!is_token(b""));
}

#[test]
fn a_block_survives_a_store_and_damage_is_told() {
    let fields = [("X-Bin", "a: b"), ("Y", ""), ("x-bin", "\u{e4}\t:")];
    let headers = Headers::restored(pairs(&fields)).unwrap();
    assert!(headers.iter().eq(pairs(&fields)));
    assert_eq!(
        Headers::from_bytes(headers.as_bytes().to_vec()),
        Ok(headers)
    );
    for damaged in [
        "X",
        "X: y",
        "X: y\r\nZ",
        ": y\r\n",
        "X y: z\r\n",
        "X:y\r\n",
        "X: y\n",
        "X: a\rb\r\n",
        "X: a\nb\r\n",
        "X: a\0\r\n",
        "\r\n",
        "X: y\r\n\r\n",
        "X: y\r",
        "Host y\r\n",
    ] {
        assert_eq!(
            Headers::from_bytes(damaged.into()),
            Err(Invalid::Header),
            "{damaged:?}"
        );
    }
}

#[test]
fn the_host_that_came_in_is_kept_where_it_is_asked_for_and_nowhere_else() {
    let peer = |host, preserves_host| Peer {
        host: Some(host),
        manners: Manners {
            preserves_host,
            ..Manners::default()
        },
        ..Peer::default()
    };
    let plain = pairs(&[("X-Kept", "1"), ("Host", "b")]);
    let behind = pairs(&[("X-Forwarded-Host", "outer"), ("Host", "b")]);
    let evil = pairs(&[("X-Forwarded-Host", "a b")]);
    let forwarded = |fields: Vec<(&str, &[u8])>, host, preserves| {
        Headers::forwarded(fields.into_iter(), peer(host, preserves)).unwrap()
    };
    for (fields, host, preserves, names_kept, expected) in [
        (
            plain.clone().collect(),
            &b"b"[..],
            false,
            3,
            Some(&b"b"[..]),
        ),
        (plain.collect(), b"b", true, 3, Some(b"b")),
        (behind.clone().collect(), b"b", false, 2, Some(b"outer")),
        (behind.clone().collect(), b"b", true, 3, Some(b"b")),
        (evil.clone().collect(), b"b", false, 2, None),
        (evil.collect(), b"b:1", true, 3, Some(b"b:1")),
        (Vec::new(), b"", true, 2, None),
    ] {
        let headers = forwarded(fields, host, preserves);
        assert_eq!(headers.host(), expected, "{headers:?}");
        assert_eq!(headers.iter().count(), names_kept, "{headers:?}");
        assert!(!headers.to_send().starts_with(b"Host"), "{headers:?}");
        // Through a store, and through an export.
        let block = headers.as_bytes().to_vec();
        assert_eq!(Headers::from_bytes(block), Ok(headers.clone()));
        assert_eq!(Headers::restored(headers.iter()), Ok(headers));
    }
    // Only as the first, and in our spelling: whoever wrote the row.
    for block in [
        "A: 1\r\nHost: b\r\n",
        "host: b\r\n",
        "HOST: b\r\nA: 1\r\n",
        "Host: a\r\nHost: b\r\n",
    ] {
        let headers = Headers::from_bytes(block.as_bytes().to_vec()).unwrap();
        let sent = String::from_utf8_lossy(headers.to_send()).to_ascii_lowercase();
        assert!(!sent.contains("host"), "{block:?}: {sent}");
    }
    // With it there is no more room than without.
    let many = vec![("X-Forwarded-Host", &b"a"[..]); LINES_MAX - 1];
    let full = Headers::forwarded(many.into_iter(), peer(b"b", true));
    assert_eq!(full, Err(Invalid::Fields));
}
