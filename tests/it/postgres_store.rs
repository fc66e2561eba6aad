//! What the Postgres store does beyond the contract: it takes over the Go program's table, and
//! lives through a server that is down, restarted, locked or frozen.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use asyncproxy::queue::migrate::POSTGRES;
use asyncproxy::queue::postgres::PostgresStore;
use asyncproxy::queue::{Claimed, Class, Store, StoreError};

use crate::contract::{
    LEASE, PATIENCE, TIMEOUT, append_one, claim, counts, delivered, request, row,
};
use crate::support::pgbouncer::Pgbouncer;
use crate::support::postgres::{Port, TestDb, cluster};
use crate::support::relay::Relay;

/// The Go program's migrations, in their final state.
const GO_SCHEMA: &str = "
    CREATE TABLE goose_db_version (
        id serial PRIMARY KEY, version_id bigint NOT NULL, is_applied boolean NOT NULL,
        tstamp timestamp DEFAULT now());
    INSERT INTO goose_db_version (version_id, is_applied) VALUES (0, true), (1, true);
    CREATE TABLE proxy_requests (
        id varchar PRIMARY KEY, timestamp timestamp DEFAULT now(), method varchar,
        header varchar, body text, origin_url varchar, attempt smallint DEFAULT 1);
    CREATE INDEX proxy_requests_due
        ON proxy_requests (date_trunc('minute', timestamp));";

const SHORT_TIMEOUT: Duration = Duration::from_millis(300);

fn open_with(url: &str, max_connections: u32, timeout: Duration) -> PostgresStore {
    PostgresStore::new(url.parse().unwrap(), max_connections, true, timeout)
}

fn open(database: &TestDb) -> PostgresStore {
    open_with(&database.url(), 5, TIMEOUT)
}

fn count(database: &TestDb, query: &str) -> i64 {
    database.client().query_one(query, &[]).unwrap().get(0)
}

fn fields(row: &Claimed) -> Vec<(String, String)> {
    row.request
        .headers
        .iter()
        .map(|(name, value)| (name.into(), String::from_utf8_lossy(value).into()))
        .collect()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Adds a row as the Go program would have, `age` minutes ago.
fn add_go_row(
    database: &TestDb,
    (id, age, attempt): (&str, f64, Option<i16>),
    header: Option<&str>,
    body: Option<&str>,
    origin_url: &str,
) {
    let insert = "
        INSERT INTO proxy_requests (id, timestamp, method, header, body, origin_url, attempt)
        VALUES ($1, now() - $2 * interval '1 minute', 'POST', $3, $4, $5, $6)";
    database
        .client()
        .execute(insert, &[&id, &age, &header, &body, &origin_url, &attempt])
        .unwrap();
}

#[test]
fn takes_over_the_waiting_rows_of_the_go_program() {
    let database = cluster().database();
    database.client().batch_execute(GO_SCHEMA).unwrap();
    let header = r#"{
        "X-B": ["2", "1"], "A": ["\u003cb\u003e"], "X-Forwarded-For": ["192.0.2.1"],
        "Connection": ["close, X-Hop"], "X-Hop": ["1"], "Content-Length": ["4"]}"#;
    let id = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let old = "http://old.example/x?y=1";
    add_go_row(&database, ("c", 1.0, Some(-3)), Some("null"), None, old);
    let body = Some("b\u{f6}dy");
    add_go_row(
        &database,
        (id, 3.0, Some(4)),
        Some(header),
        body,
        "/hook?a=%20b",
    );
    add_go_row(&database, ("", 2.0, None), None, Some(""), "");
    database
        .client()
        .batch_execute(
            "INSERT INTO proxy_requests (id, timestamp, method, origin_url)
             VALUES ('infinite', '-infinity', 'GET', '/infinite')",
        )
        .unwrap();

    let store = open(&database);
    assert_eq!(counts(&store), (4, 0, 0));
    let rows = claim(&store, 10);
    let targets: Vec<_> = rows.iter().map(|row| row.request.target.as_str()).collect();
    // The oldest, but one that was tried before, and so is claimed apart.
    assert_eq!(targets, ["/", "/x?y=1", "/infinite", "/hook?a=%20b"]);
    assert!(rows[..3].iter().all(|row| row.attempt == 1));
    let first = &rows[3];
    assert_eq!(first.request.id.to_string(), id);
    assert_eq!(first.attempt, 4);
    assert_eq!(first.request.method, "POST");
    assert_eq!(first.request.body, "b\u{f6}dy".as_bytes());
    let expected = [
        ("A", "<b>"),
        ("X-B", "2"),
        ("X-B", "1"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Forwarded-Proto", "http"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(fields(first), expected);
    let age = first.request.received_at.elapsed().unwrap();
    assert!((180..240).contains(&age.as_secs()), "{age:?}");
    let left = "SELECT count(*) FROM pg_class WHERE relname LIKE '%go_requests%'";
    assert_eq!(count(&database, left), 0);
    let goose = "SELECT count(*) FROM goose_db_version";
    assert_eq!(count(&database, goose), 2);
}

#[test]
fn go_rows_that_could_not_be_sent_become_dead_letters() {
    let database = cluster().database();
    database.client().batch_execute(GO_SCHEMA).unwrap();
    let headers = [
        "{",
        "[]",
        r#"{"A":["b\nc"]}"#,
        r#"{"A B":["c"]}"#,
        r#"{"A":[1]}"#,
    ];
    for header in headers {
        add_go_row(
            &database,
            (header, 9.0, Some(2)),
            Some(header),
            Some("kept"),
            "/",
        );
    }
    add_go_row(&database, ("url", 9.0, Some(2)), None, Some("kept"), "/a b");
    database
        .client()
        .batch_execute("INSERT INTO proxy_requests (id) VALUES ('nothing')")
        .unwrap();
    assert_eq!(counts(&open(&database)), (0, 0, 7));
    let kept = "
        SELECT count(*) FROM proxy_dead_letters
         WHERE last_error LIKE 'not taken over: %' AND died_at <= now()
           AND (method = '' OR method = 'POST' AND attempt = 1 AND body = 'kept')";
    assert_eq!(count(&database, kept), 7);
}

#[test]
fn takes_over_a_long_queue_once_though_two_start() {
    let database = cluster().database();
    database.client().batch_execute(GO_SCHEMA).unwrap();
    database
        .client()
        .batch_execute(
            r#"INSERT INTO proxy_requests (id, method, header, body, origin_url)
               SELECT gen_random_uuid(), 'POST', '{"A":["1"]}', repeat('x', 1000), '/' || n
                 FROM generate_series(1, 3210) AS n"#,
        )
        .unwrap();
    let stores = [open(&database), open(&database)];
    std::thread::scope(|scope| {
        for store in &stores {
            scope.spawn(|| assert_eq!(counts(store), (3210, 0, 0)));
        }
    });
}

#[test]
fn bodies_of_a_database_that_checks_no_encoding_are_kept_as_they_are() {
    let database = cluster().database();
    let name = format!("{}_ascii", database.name());
    database
        .client()
        .batch_execute(&format!(
            "CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0"
        ))
        .unwrap();
    let url = database.url().replace(database.name(), &name);
    let mut client = postgres::Client::connect(&url, postgres::NoTls).unwrap();
    client.batch_execute(GO_SCHEMA).unwrap();
    client
        .batch_execute(
            r"INSERT INTO proxy_requests (id, method, header, body, origin_url)
              VALUES ('a', 'POST', '{}', convert_from('\xff41fe', 'SQL_ASCII'), '/')",
        )
        .unwrap();
    let store = open_with(&url, 2, TIMEOUT);
    assert_eq!(claim(&store, 1)[0].request.body, b"\xff\x41\xfe");
    drop((store, client));
    database
        .client()
        .batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)"))
        .unwrap();
}

#[test]
fn a_table_of_someone_else_is_left_alone() {
    let database = cluster().database();
    let theirs = "CREATE TABLE proxy_requests (id int); INSERT INTO proxy_requests VALUES (7)";
    database.client().batch_execute(theirs).unwrap();
    let store = open(&database);
    for _ in 0..2 {
        let Err(StoreError::Schema(why)) = store.sample() else {
            panic!("it must be refused");
        };
        assert!(why.contains("origin_url"), "{why}");
    }
    assert_eq!(count(&database, "SELECT id::bigint FROM proxy_requests"), 7);
    let made = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(count(&database, made), 1);
    database
        .client()
        .batch_execute("DROP TABLE proxy_requests")
        .unwrap();
    assert_eq!(counts(&store), (0, 0, 0));
}

#[test]
fn many_stores_start_at_once_on_an_empty_database() {
    let database = cluster().database();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| append_one(&open_with(&database.url(), 2, TIMEOUT)));
        }
    });
    assert_eq!(counts(&open(&database)), (8, 0, 0));
    let applied = "SELECT count(*) FROM asyncproxy_migrations";
    assert_eq!(count(&database, applied), POSTGRES.len() as i64);
}

#[test]
fn needs_no_right_to_create_tables_once_they_are_there() {
    let database = cluster().database();
    append_one(&open(&database));
    let name = format!("{}_user", database.name());
    database
        .client()
        .batch_execute(&format!(
            "CREATE ROLE {name} LOGIN;
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}"
        ))
        .unwrap();
    let store = open_with(
        &database.url().replace("test@", &format!("{name}@")),
        2,
        TIMEOUT,
    );
    append_one(&store);
    assert_eq!(
        store
            .settle(&[delivered(&claim(&store, 1)[0])])
            .unwrap()
            .delivered,
        1
    );
}

#[test]
fn other_encodings_are_refused_by_name() {
    let database = cluster().database();
    let name = format!("{}_latin1", database.name());
    let create = format!("CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0");
    database.client().batch_execute(&create).unwrap();
    let store = open_with(&database.url().replace(database.name(), &name), 2, TIMEOUT);
    let refused = store.sample();
    assert!(matches!(&refused, Err(StoreError::Schema(why)) if why.contains("LATIN1")));
    drop(store);
    let remove = format!("DROP DATABASE {name} WITH (FORCE)");
    database.client().batch_execute(&remove).unwrap();
}

#[test]
fn connections_that_died_while_idle_are_replaced_unnoticed() {
    let database = cluster().database();
    survives_dead_connections(&database, &open(&database));
}

#[test]
fn connections_that_died_behind_pgbouncer_are_replaced_unnoticed() {
    let database = cluster().database();
    let bouncer = Pgbouncer::start(&database);
    survives_dead_connections(&database, &open_with(&bouncer.url(), 5, TIMEOUT));
}

fn survives_dead_connections(database: &TestDb, store: &PostgresStore) {
    let others = "
         FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()";
    for round in 1..4 {
        // As many connections as there are.
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| append_one(store));
            }
        });
        let kill = format!("SELECT count(pg_terminate_backend(pid)) {others}");
        assert!(count(database, &kill) >= 1);
        // Again and again: PgBouncer may just have been opening one more.
        wait_until("the connections to be gone", || count(database, &kill) == 0);
        assert_eq!(counts(store).0, 5 * round);
    }
}

#[test]
fn a_dropped_store_closes_its_connections() {
    let database = cluster().database();
    let store = open(&database);
    append_one(&store);
    let others = "
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()";
    assert!(count(&database, others) >= 1);
    drop(store);
    wait_until("the connections to be gone", || {
        count(&database, others) == 0
    });
}

#[test]
fn a_server_that_comes_up_late_is_used() {
    let database = cluster().database();
    let port = Port::take();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.number()));
    let url = database
        .url()
        .replace(&database.port().to_string(), &address.port().to_string());
    let store = open_with(&url, 3, TIMEOUT);
    for _ in 0..2 {
        let started = Instant::now();
        let result = store.append(&[row(request(b"down"))]);
        let Err(StoreError::Unavailable(why)) = result else {
            panic!("{result:?}");
        };
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(why.contains(&address.to_string()), "{why}");
        assert!(why.contains("refused"), "{why}");
    }
    let _relay = Relay::start(TcpListener::bind(address).unwrap(), database.port());
    wait_until("the store to work", || {
        store.append(&[row(request(b"up"))]).is_ok()
    });
    assert_eq!(counts(&store), (1, 0, 0));
}

#[test]
fn a_database_that_is_not_there_is_named() {
    let database = cluster().database();
    let store = open_with(
        &database.url().replace(database.name(), "nowhere"),
        2,
        TIMEOUT,
    );
    let result = store.sample();
    let Err(StoreError::Unavailable(why)) = result else {
        panic!("{result:?}");
    };
    assert!(why.contains("database \"nowhere\" does not exist"), "{why}");
}

#[test]
fn a_frozen_server_holds_up_nobody_and_no_row_is_left_leased() {
    let database = cluster().database();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let relay = Relay::start(listener, database.port());
    let url = database
        .url()
        .replace(&database.port().to_string(), &relay.port().to_string());
    let store = open_with(&url, 2, SHORT_TIMEOUT);
    // Connecting may take longer than so short a timeout.
    wait_until("the store to work", || {
        store.append(&[row(request(b"a"))]).is_ok()
    });
    wait_until("the store to count", || store.sample().is_ok());
    let before = open(&database).sample().unwrap().waiting;
    relay.freeze(true);
    for _ in 0..4 {
        let started = Instant::now();
        let result = store.claim(Class::Fresh, 10, usize::MAX, LEASE);
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
        assert!(
            started.elapsed() < 10 * SHORT_TIMEOUT,
            "{:?}",
            started.elapsed()
        );
    }
    relay.freeze(false);
    // What the abandoned claims got is given back, as if they had not been.
    let other = open(&database);
    wait_until("the claims to end", || {
        count(
            &database,
            "SELECT count(*) FROM pg_stat_activity
              WHERE datname = current_database() AND state = 'active'
                AND pid <> pg_backend_pid()",
        ) == 0
            && counts(&other) == (before, 0, 0)
    });
    wait_until("the store to work", || store.sample().is_ok());
    let mut rows = Vec::new();
    wait_until("the rows to be claimed", || {
        if let Ok(claim) = store.claim(Class::Fresh, 10, usize::MAX, LEASE) {
            rows.extend(claim.rows);
        }
        rows.len() as u64 == before
    });
    assert!(rows.iter().all(|row| row.attempt == 1));
}

#[test]
fn a_locked_table_holds_up_nobody() {
    let database = cluster().database();
    let store = open_with(&database.url(), 2, Duration::from_secs(2));
    wait_until("the store to work", || {
        store.append(&[row(request(b"a"))]).is_ok()
    });
    let mut locker = database.client();
    let mut lock = locker.transaction().unwrap();
    lock.batch_execute("LOCK TABLE proxy_requests").unwrap();
    for _ in 0..3 {
        let started = Instant::now();
        let result = store.sample();
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    lock.rollback().unwrap();
    wait_until("the store to work", || store.sample().is_ok());
    assert_eq!(counts(&store), (1, 0, 0));
}

/// Rows of the queue that were read, from the table or an index, by those who have gone.
fn rows_read(database: &TestDb) -> i64 {
    let others = "
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()";
    // They tell what they have read when they leave.
    wait_until("the connections to be gone", || {
        count(database, others) == 0
    });
    count(
        database,
        "SELECT (seq_tup_read + idx_tup_fetch)::bigint
                + (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes
                    WHERE relname = 'proxy_requests')
           FROM pg_stat_user_tables
          WHERE relname = 'proxy_requests'",
    )
}

/// Has so many rows wait until tomorrow.
fn postpone(database: &TestDb, rows: i64) {
    let sql = format!(
        "INSERT INTO proxy_requests
                (id, received_at, next_attempt_at, attempt, method, target, headers, body)
         SELECT gen_random_uuid(), now(), now() + interval '1 day', 1, 'POST', '/', '', ''
           FROM generate_series(1, {rows})"
    );
    let mut client = database.client();
    client.batch_execute(&sql).unwrap();
    client
        .batch_execute("VACUUM ANALYZE proxy_requests")
        .unwrap();
}

/// Between its beat and its look for the dead an instance, or the server, may be frozen for long.
/// Nobody has been heard of then, and nobody is dead for that.
#[test]
fn who_has_been_silent_itself_takes_over_nothing() {
    let silence = Duration::from_millis(100);
    let database = cluster().database();
    let [one, other] = [(); 2].map(|()| open(&database).with_silence(silence));
    for store in [&one, &other] {
        append_one(store);
        assert_eq!(claim(store, 1).len(), 1);
        store.beat().unwrap();
    }
    // What a beat has written is old by the time of the look.
    let freeze = "
        CREATE FUNCTION age() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.last_seen := NEW.last_seen - interval '1 hour'; RETURN NEW; END $$;
        CREATE TRIGGER age BEFORE INSERT OR UPDATE ON proxy_instances
        FOR EACH ROW EXECUTE FUNCTION age();
        UPDATE proxy_instances SET last_seen = last_seen;";
    database.client().batch_execute(freeze).unwrap();
    let judges_from = Instant::now() + 2 * silence;
    let mut beats = 0;
    while Instant::now() < judges_from || beats < 20 {
        assert_eq!(one.beat().unwrap(), 0);
        beats += 1;
    }
    let thaw = "
        DROP TRIGGER age ON proxy_instances;
        UPDATE proxy_instances SET last_seen = '-infinity'";
    database.client().batch_execute(thaw).unwrap();
    wait_until("what the other has to be taken over", || {
        one.beat().unwrap() == 1
    });
}

/// However much waits, what was leased is found without reading it: that would take longer than a
/// statement may.
#[test]
fn what_the_dead_had_leased_is_found_among_any_number_of_rows() {
    const WAITING: i64 = 20_000;
    let silence = Duration::from_secs(1);
    let database = cluster().database();
    let silent = open(&database).with_silence(silence);
    for _ in 0..3 {
        append_one(&silent);
    }
    assert_eq!(claim(&silent, 10).len(), 3);
    drop(silent);
    postpone(&database, WAITING);
    let before = rows_read(&database);
    let other = open(&database).with_silence(silence);
    let mut taken = 0;
    wait_until("its rows to be taken over", || {
        taken += other.beat().unwrap();
        taken == 3
    });
    drop(other);
    let read = rows_read(&database) - before;
    assert!((3..WAITING / 10).contains(&read), "{read} rows read");
}

/// The same for rows of a claim whose answer was lost.
#[test]
fn what_a_lost_claim_had_leased_is_found_among_any_number_of_rows() {
    const WAITING: i64 = 20_000;
    let database = cluster().database();
    append_one(&open(&database));
    postpone(&database, WAITING);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let relay = Relay::start(listener, database.port());
    let url = database
        .url()
        .replace(&database.port().to_string(), &relay.port().to_string());
    let before = rows_read(&database);
    let store = open_with(&url, 2, SHORT_TIMEOUT);
    let claimed = || {
        let claim = store.claim(Class::Fresh, 10, usize::MAX, LEASE);
        claim.map_or(0, |claim| claim.rows.len())
    };
    wait_until("the row to be claimed", || claimed() == 1);
    // Held by nobody that the store knows of, as if the answer had not arrived.
    database
        .client()
        .batch_execute("UPDATE proxy_requests SET id = gen_random_uuid() WHERE leased")
        .unwrap();
    relay.freeze(true);
    assert_eq!(claimed(), 0);
    relay.freeze(false);
    wait_until("the row to be given back", || claimed() == 1);
    drop(store);
    let read = rows_read(&database) - before;
    assert!((2..WAITING / 10).contains(&read), "{read} rows read");
}
