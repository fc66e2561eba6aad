//! The databases without our code: the same tables and indexes, the simplest statements that do
//! the work, on one connection.

use std::path::Path;
use std::time::SystemTime;

use asyncproxy::queue::NewRow;
use postgres::{Client, Row, Statement};
use rusqlite::{Connection, TransactionBehavior, params};
use uuid::Uuid;

/// In one bare claim.
pub const CLAIM_ROWS: u64 = 100;

const SQLITE_APPEND: &str = "
    INSERT INTO proxy_requests
           (id, received_at, next_attempt_at, attempt, method, target, headers, body)
    VALUES (?1, ?2, ?2, 0, ?3, ?4, ?5, ?6)";

const POSTGRES_APPEND: &str = "
    INSERT INTO proxy_requests
           (id, received_at, next_attempt_at, attempt, method, target, headers, body)
    SELECT id, now(), now(), 0, method, target, headers, body
      FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bytea[])
           AS new (id, method, target, headers, body)";

/// Up to `CLAIM_ROWS`, which the planner knows so.
const POSTGRES_CLAIM: &str = "
    UPDATE proxy_requests
       SET attempt = attempt + 1, leased = true, next_attempt_at = now() + interval '1 hour'
     WHERE id IN (SELECT id
                    FROM proxy_requests
                   WHERE next_attempt_at <= now() AND attempt <= 1
                   ORDER BY next_attempt_at
                   LIMIT 100
                     FOR UPDATE SKIP LOCKED)
 RETURNING id, attempt, received_at, method, target, headers, body";

const POSTGRES_DELETE: &str = "DELETE FROM proxy_requests WHERE id = ANY($1)";

/// A database that a store has given its schema.
pub enum Database {
    Sqlite(Connection),
    Postgres(Box<Bare>),
}

/// A connection with its statements.
pub struct Bare {
    client: Client,
    append: Statement,
    claim: Statement,
    delete: Statement,
}

impl Database {
    pub fn sqlite(path: &Path) -> Database {
        let connection = Connection::open(path).unwrap();
        for (name, value) in [("journal_mode", "WAL"), ("synchronous", "FULL")] {
            connection.pragma_update(None, name, value).unwrap();
        }
        // As the store has it: what differs shall be the code.
        connection
            .pragma_update(None, "wal_autocheckpoint", 4000)
            .unwrap();
        Database::Sqlite(connection)
    }

    pub fn postgres(mut client: Client) -> Database {
        Database::Postgres(Box::new(Bare {
            append: client.prepare(POSTGRES_APPEND).unwrap(),
            claim: client.prepare(POSTGRES_CLAIM).unwrap(),
            delete: client.prepare(POSTGRES_DELETE).unwrap(),
            client,
        }))
    }

    /// In one transaction.
    pub fn append(&mut self, rows: &[NewRow]) {
        match self {
            Database::Sqlite(connection) => append(connection, rows),
            Database::Postgres(bare) => bare.append(rows),
        }
    }

    /// Removes all rows.
    pub fn clear(&mut self) {
        match self {
            Database::Sqlite(connection) => connection
                .execute_batch("DELETE FROM proxy_requests")
                .unwrap(),
            Database::Postgres(bare) => bare.run("TRUNCATE proxy_requests"),
        }
    }

    /// Makes the room of rows that are no more free for others.
    pub fn sweep(&mut self) {
        if let Database::Postgres(bare) = self {
            bare.run("VACUUM ANALYZE proxy_requests");
        }
    }

    /// Writes what was changed to its place, or whatever is measured next would pay for it.
    pub fn flush(&mut self) {
        match self {
            Database::Sqlite(connection) => connection
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
                .unwrap(),
            Database::Postgres(bare) => bare.run("CHECKPOINT"),
        }
    }
}

fn append(connection: &mut Connection, rows: &[NewRow]) {
    let transaction = connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .unwrap();
    let mut insert = transaction.prepare(SQLITE_APPEND).unwrap();
    for NewRow { request, .. } in rows {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        insert
            .execute(params![
                request.id.as_bytes(),
                i64::try_from(now.unwrap().as_millis()).unwrap(),
                request.method,
                request.target,
                request.headers.as_bytes(),
                request.body,
            ])
            .unwrap();
    }
    drop(insert);
    transaction.commit().unwrap();
}

impl Bare {
    fn run(&mut self, sql: &str) {
        self.client.batch_execute(sql).unwrap();
    }

    fn append(&mut self, rows: &[NewRow]) {
        let requests = || rows.iter().map(|row| &row.request);
        let ids: Vec<Uuid> = requests().map(|request| request.id).collect();
        let methods: Vec<&str> = requests().map(|request| &*request.method).collect();
        let targets: Vec<&str> = requests().map(|request| &*request.target).collect();
        let headers: Vec<&[u8]> = requests().map(|it| it.headers.as_bytes()).collect();
        let bodies: Vec<&[u8]> = requests().map(|request| &*request.body).collect();
        let values: [&(dyn postgres::types::ToSql + Sync); 5] =
            [&ids, &methods, &targets, &headers, &bodies];
        let appended = self.client.execute(&self.append, &values).unwrap();
        assert_eq!(appended, rows.len() as u64);
    }

    /// As many as there are, up to `CLAIM_ROWS`.
    pub fn claim_and_delete(&mut self) -> Vec<Row> {
        let claimed = self.client.query(&self.claim, &[]).unwrap();
        let ids: Vec<Uuid> = claimed.iter().map(|row| row.get("id")).collect();
        let deleted = self.client.execute(&self.delete, &[&ids]).unwrap();
        assert_eq!(deleted, ids.len() as u64);
        claimed
    }
}
