//! The Go program's database is taken over as it is, waiting rows included.

use postgres::{Client, NoTls};

use crate::support::destination::{Destination, Seen};
use crate::support::http;
use crate::support::metrics;
use crate::support::postgres::{TestDb, cluster};
use crate::support::proxy::{PATIENCE, Setup};
use crate::support::store;

/// The schema as its last migration left it.
const SCHEMA: &str = "
    CREATE TABLE goose_db_version (
        id serial PRIMARY KEY,
        version_id bigint NOT NULL,
        is_applied boolean NOT NULL,
        tstamp timestamp NULL DEFAULT now()
    );
    INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, true), (20210101000000, true);
    CREATE TABLE proxy_requests (
        id varchar PRIMARY KEY,
        timestamp timestamp DEFAULT now(),
        method varchar,
        header varchar,
        body text,
        origin_url varchar,
        attempt smallint DEFAULT 1
    );
    CREATE INDEX proxy_requests_timestamp_idx ON proxy_requests (date_trunc('minute', timestamp));
";

const INSERT: &str = "
    INSERT INTO proxy_requests (id, timestamp, method, header, body, origin_url, attempt)
    VALUES ($1, now() - interval '1 hour', $2, $3, $4, $5, $6)
";

struct Row {
    id: &'static str,
    method: &'static str,
    header: &'static str,
    body: &'static str,
    origin_url: &'static str,
    attempt: i16,
}

const ROWS: [Row; 5] = [
    Row {
        id: "0b8a5f0e-1111-4222-8333-444455556666",
        method: "POST",
        header: r#"{"X-Id":["0"],"Content-Type":["application/json"],"X-Multi":["b","a","b"],"Accept-Encoding":["gzip"]}"#,
        body: "{\"ä\":\"\u{1f600}\\n\"}\r\n\t",
        origin_url: "/hooks//a%2Fb?x=1&y=%20;z",
        attempt: 1,
    },
    Row {
        id: "not-a-uuid",
        method: "DELETE",
        header: r#"{"X-Id":["1"],"Content-Length":["0"],"Connection":["close, X-Hop"],"X-Hop":["1"],"Transfer-Encoding":["chunked"]}"#,
        body: "",
        origin_url: "/",
        attempt: 3,
    },
    Row {
        id: "2",
        method: "GET",
        header: r#"{"X-Id":["2"],"User-Agent":["Go-http-client/1.1"],"X-Quote":["\"\\é\u0041"],"X-Empty":[""],"X-None":[]}"#,
        body: "a body",
        origin_url: "/?q",
        attempt: 0,
    },
    Row {
        id: "broken header",
        method: "POST",
        header: "no JSON",
        body: "kept",
        origin_url: "/broken",
        attempt: 0,
    },
    Row {
        id: "broken target",
        method: "POST",
        header: "{}",
        body: "kept, too",
        origin_url: "no target",
        attempt: 0,
    },
];

/// A database as that program leaves it, with `ROWS`.
pub fn go_database() -> TestDb {
    let database = cluster().database();
    let mut client = Client::connect(&database.url(), NoTls).expect("connect");
    client.batch_execute(SCHEMA).expect("schema");
    for row in &ROWS {
        let Row {
            id,
            method,
            header,
            body,
            origin_url,
            attempt,
        } = row;
        client
            .execute(INSERT, &[id, method, header, body, origin_url, attempt])
            .expect("insert");
    }
    database
}

#[test]
fn rows_of_the_go_program_are_delivered() {
    let destination = Destination::start();
    let database = go_database();
    let setup = Setup::new(&destination.url())
        .set("server.enqueue_rate", 0)
        .set("db.connection_string", database.url())
        .keep(database);
    let proxy = setup.start();
    let seen = destination.wait_for_numbers(3, PATIENCE);
    for (number, row) in ROWS.iter().enumerate().take(3) {
        let arrived: Vec<_> = seen.iter().filter(|seen| seen.number() == number).collect();
        assert_eq!(arrived.len(), 1, "row {number}");
        assert_arrived(arrived[0], row);
    }
    assert_values(&seen, 0, "X-Multi", &["b", "a", "b"]);
    assert_values(&seen, 0, "Content-Type", &["application/json"]);
    assert_values(&seen, 0, "Accept-Encoding", &["gzip"]);
    for gone in ["X-Hop", "Connection", "Transfer-Encoding"] {
        assert_values(&seen, 1, gone, &[]);
    }
    assert_values(&seen, 2, "User-Agent", &["Go-http-client/1.1"]);
    assert_values(&seen, 2, "X-Quote", &["\"\\éA"]);
    assert_values(&seen, 2, "X-Empty", &[""]);
    assert_values(&seen, 2, "X-None", &[]);

    // What can never be sent is kept, not dropped.
    metrics::wait_for(&proxy, "two dead letters", |metrics| {
        metrics.rows("dead") == 2.0 && metrics.get("queue_total_size") == 0.0
    });
    // And the queue goes on as the program's own.
    proxy.accept(3..10);
    destination.wait_for_numbers(10, PATIENCE);
    proxy.stop();
    assert_eq!(store::rows(&setup), 0);
    // A second start finds nothing left to do.
    let proxy = setup.start();
    assert_eq!(proxy.send(&http::numbered(10)).status, 200);
    destination.wait_for_numbers(11, PATIENCE);
    proxy.stop();
}

fn assert_arrived(seen: &Seen, row: &Row) {
    assert_eq!(seen.method, row.method);
    assert_eq!(seen.target(), row.origin_url);
    assert_eq!(String::from_utf8_lossy(&seen.body), row.body);
    // It counted from 1 the attempt to be made next.
    let attempt = u32::try_from(row.attempt).expect("attempt");
    assert_eq!(seen.attempt(), attempt.max(1));
    assert!(!seen.id().is_empty());
}

fn assert_values(seen: &[std::sync::Arc<Seen>], number: usize, name: &str, values: &[&str]) {
    let seen = seen.iter().find(|seen| seen.number() == number);
    let lines = &seen.expect("the row's request").lines;
    let found: Vec<_> = lines
        .iter()
        .map(|line| String::from_utf8_lossy(line))
        .filter_map(|line| {
            let (found, value) = line.split_once(':')?;
            (found == name).then(|| value.trim().to_owned())
        })
        .collect();
    assert_eq!(found, values, "{name} of row {number}");
}
