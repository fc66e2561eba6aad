//! Databases without our code, to compare with what the program does with them: `targets.sh` runs
//! it. `cargo bench --bench bare -- append STORE SECONDS BYTES` appends by 200 rows and prints
//! rows a second; `drain STORE` claims and deletes by 100 until nothing waits. STORE is the path of
//! a SQLite file or the connection string of a Postgres database, with the program's tables in it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a benchmark"
)]

#[allow(dead_code, reason = "what only the bench of the stores needs")]
#[path = "support/bare.rs"]
mod bare;
#[allow(dead_code, reason = "what only the bench of the stores needs")]
#[path = "support/rows.rs"]
mod rows;

use std::time::{Duration, Instant};

use bare::Database;
use rows::Body;

const APPEND_ROWS: u64 = 200;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (rows, took) = match *arguments.as_slice() {
        ["append", store, seconds, bytes] => append(
            &mut open(store),
            Duration::from_secs(seconds.parse().unwrap()),
            &Body::new("bare", bytes.parse().unwrap()),
        ),
        ["drain", store] => drain(&mut open(store)),
        // Run with all the others, it has nothing to measure.
        _ => return,
    };
    println!("{:.0}", rows as f64 / took.as_secs_f64());
}

fn open(store: &str) -> Database {
    if store.contains('=') {
        Database::postgres(postgres::Client::connect(store, postgres::NoTls).unwrap())
    } else {
        Database::sqlite(store.as_ref())
    }
}

/// Making the rows is not counted.
fn append(database: &mut Database, at_least: Duration, body: &Body) -> (u64, Duration) {
    let (mut rows, mut took) = (0, Duration::ZERO);
    while took < at_least {
        let batch = body.rows(APPEND_ROWS);
        let started = Instant::now();
        database.append(&batch);
        took += started.elapsed();
        rows += APPEND_ROWS;
    }
    (rows, took)
}

fn drain(database: &mut Database) -> (u64, Duration) {
    let Database::Postgres(bare) = database else {
        panic!("only Postgres is drained");
    };
    let started = Instant::now();
    let mut rows = 0;
    loop {
        let claimed = bare.claim_and_delete().len() as u64;
        if claimed == 0 {
            return (rows, started.elapsed());
        }
        rows += claimed;
    }
}
