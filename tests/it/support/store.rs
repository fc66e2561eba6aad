//! What is in a store, read past the program.

use rusqlite::OpenFlags;

use super::proxy::{Setup, wait_until};

/// A request that was given up.
#[derive(Debug, PartialEq, Eq)]
pub struct Dead {
    pub attempt: i32,
    pub status: Option<i32>,
    pub error: String,
    pub method: String,
    pub target: String,
    pub body: Vec<u8>,
}

const COUNT: &str = "SELECT count(*) FROM proxy_requests";
// As text: one store has a boolean, the other a number.
const COUNT_LEASED: &str =
    "SELECT count(*) FROM proxy_requests WHERE CAST(leased AS text) IN ('1', 'true')";
const COUNT_TRIED: &str = "SELECT count(*) FROM proxy_requests WHERE attempt > 0 \
                           AND CAST(leased AS text) NOT IN ('1', 'true')";
const DEAD: &str = "SELECT attempt, last_status, last_error, method, target, body \
                    FROM proxy_dead_letters ORDER BY received_at, body";

// As many as `$1`, the oldest, die 31 days earlier.
const AGE_SQLITE: &str = "UPDATE proxy_dead_letters SET died_at = died_at - 31 * 86400000 \
                          WHERE id IN (SELECT id FROM proxy_dead_letters \
                                       ORDER BY received_at, id LIMIT $1)";
const AGE_POSTGRES: &str = "UPDATE proxy_dead_letters SET died_at = died_at - interval '31 days' \
                            WHERE id IN (SELECT id FROM proxy_dead_letters \
                                         ORDER BY received_at, id LIMIT $1)";

/// Makes `count` dead letters a month older.
pub fn age_dead(setup: &Setup, count: i64) {
    let aged = match Store::of(setup) {
        Store::Sqlite(store) => store.execute(AGE_SQLITE, [count]).expect(AGE_SQLITE) as u64,
        Store::Postgres(mut store) => store.execute(AGE_POSTGRES, &[&count]).expect(AGE_POSTGRES),
    };
    assert_eq!(aged, count.unsigned_abs());
}

/// Runs SQL that returns nothing.
pub fn execute(setup: &Setup, sql: &str) {
    match Store::of(setup) {
        Store::Sqlite(store) => store.execute_batch(sql).expect(sql),
        Store::Postgres(mut store) => store.batch_execute(sql).expect(sql),
    }
}

/// Rows that wait or are leased.
pub fn rows(setup: &Setup) -> i64 {
    count(setup, COUNT)
}

/// Rows that are leased, whether the lease is over or not.
pub fn leased(setup: &Setup) -> i64 {
    count(setup, COUNT_LEASED)
}

/// Waits until all of `count` rows have been tried and wait for another attempt: with a backoff that
/// is long enough, nothing moves any more. Metrics are of no use for that, as rows are counted a
/// second before now and then.
pub fn wait_for_tried(setup: &Setup, count: usize) {
    wait_until("each row to have been tried", || {
        usize::try_from(self::count(setup, COUNT_TRIED)) == Ok(count)
    });
}

fn count(setup: &Setup, query: &str) -> i64 {
    match Store::of(setup) {
        Store::Sqlite(store) => store.query_row(query, [], |row| row.get(0)).expect(query),
        Store::Postgres(mut store) => store.query_one(query, &[]).expect(query).get(0),
    }
}

/// The dead letters, oldest first.
pub fn dead(setup: &Setup) -> Vec<Dead> {
    match Store::of(setup) {
        Store::Sqlite(store) => {
            let mut statement = store.prepare(DEAD).expect(DEAD);
            let rows = statement.query_map([], |row| {
                Ok(Dead {
                    attempt: row.get(0)?,
                    status: row.get(1)?,
                    error: row.get(2)?,
                    method: row.get(3)?,
                    target: row.get(4)?,
                    body: row.get(5)?,
                })
            });
            let rows = rows.expect(DEAD).collect::<Result<_, _>>();
            rows.expect(DEAD)
        }
        Store::Postgres(mut store) => {
            let rows = store.query(DEAD, &[]).expect(DEAD).into_iter();
            rows.map(|row| Dead {
                attempt: row.get(0),
                status: row.get(1),
                error: row.get(2),
                method: row.get(3),
                target: row.get(4),
                body: row.get(5),
            })
            .collect()
        }
    }
}

enum Store {
    Sqlite(rusqlite::Connection),
    Postgres(Box<postgres::Client>),
}

impl Store {
    fn of(setup: &Setup) -> Store {
        let connection = setup.get("db.connection_string");
        match connection.strip_prefix("sqlite:") {
            Some(path) => {
                let path = setup.path(path);
                let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
                Store::Sqlite(rusqlite::Connection::open_with_flags(path, flags).expect("open"))
            }
            None => {
                let client = postgres::Client::connect(connection, postgres::NoTls);
                Store::Postgres(Box::new(client.expect("connect")))
            }
        }
    }
}
