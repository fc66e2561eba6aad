//! Takes over the table of the Go program whose place this one takes, with the rows in it.
//!
//! Its rows wait, so they are due, the oldest first. One that could not be sent goes to the dead
//! letters. Its table is dropped in the same transaction; `goose_db_version`, its record of
//! migrations, is left: without it that program, started again by mistake, would try to
//! create its tables over ours, and with it its statements fail on the columns, harmlessly.

use std::time::{Duration, SystemTime};

use ::postgres::{Row, Transaction};
use serde_json::Value;
use uuid::Uuid;

use super::super::StoreError;
use super::super::migrate::Adopted;
use super::append::NewRows;
use super::errors::Fault;
use super::statements::{APPEND, APPEND_DEAD};
use super::to_storable;
use crate::request::{Peer, Request};

/// Rows in memory at once.
const BATCH_ROWS: i32 = 100;

/// The columns of its table, in its last version.
const GO_COLUMNS: [&str; 7] = [
    "id",
    "timestamp",
    "method",
    "header",
    "body",
    "origin_url",
    "attempt",
];

const COLUMNS: &str = "
    SELECT column_name::text
      FROM information_schema.columns
     WHERE table_schema = current_schema()
       AND table_name = 'proxy_requests'";

/// Its indexes have names that ours need.
const SET_ASIDE: &str = "
    ALTER TABLE proxy_requests RENAME TO asyncproxy_go_requests;
    DO $$
    DECLARE
        place integer := 0;
        index regclass;
    BEGIN
        FOR index IN
            SELECT indexrelid::regclass
              FROM pg_index
             WHERE indrelid = 'asyncproxy_go_requests'::regclass
        LOOP
            place := place + 1;
            EXECUTE format('ALTER INDEX %s RENAME TO asyncproxy_go_requests_%s', index, place);
        END LOOP;
    END
    $$";

/// Reads the whole table once. Texts come as bytes, since a database in SQL_ASCII checks none.
/// `timestamp` was filled in by its session's time zone, which is this session's, too.
const OPEN: &str = r#"
    DECLARE asyncproxy_go_rows NO SCROLL CURSOR FOR
     SELECT convert_to(id::text, encoding.name) AS id,
            CASE WHEN isfinite("timestamp") THEN "timestamp"::timestamptz
                 ELSE now()
             END AS received_at,
            CASE WHEN isfinite("timestamp")
                 THEN extract(epoch FROM now() - "timestamp"::timestamptz)
                 ELSE 0
             END::double precision AS age,
            convert_to(method::text, encoding.name) AS method,
            convert_to(header::text, encoding.name) AS header,
            convert_to(body::text, encoding.name) AS body,
            convert_to(origin_url::text, encoding.name) AS origin_url,
            coalesce(greatest(attempt::integer - 1, 0), 0) AS attempt
       FROM asyncproxy_go_requests,
            (SELECT CASE getdatabaseencoding()
                        WHEN 'SQL_ASCII' THEN 'SQL_ASCII'
                        ELSE 'UTF8'
                    END AS name) AS encoding"#;

const CLOSE: &str = "
    CLOSE asyncproxy_go_rows;
    DROP TABLE asyncproxy_go_requests";

/// Its table, renamed.
pub(super) struct Adoption(());

/// Renames its table, if there is one.
///
/// # Errors
/// [`StoreError::Schema`] if there is a table of that name that is not its.
pub(super) fn set_aside(transaction: &mut Transaction<'_>) -> Result<Option<Adoption>, Fault> {
    let mut found = Vec::new();
    for row in transaction.query_typed(COLUMNS, &[])? {
        found.push(row.try_get::<_, String>(0)?);
    }
    if found.is_empty() {
        return Ok(None);
    }
    if let Some(missing) = GO_COLUMNS
        .iter()
        .find(|name| !found.iter().any(|column| column == *name))
    {
        return Err(Fault::Store(StoreError::Schema(format!(
            "there is a table proxy_requests without the column {missing}; one to be taken over \
             has the columns {}: rename the table, or bring it up to the Go program's last version",
            GO_COLUMNS.join(", ")
        ))));
    }
    transaction.batch_execute(SET_ASIDE)?;
    Ok(Some(Adoption(())))
}

impl Adoption {
    /// Moves its rows to our tables and drops its table.
    pub(super) fn convert(self, transaction: &mut Transaction<'_>) -> Result<Adopted, Fault> {
        transaction.batch_execute(OPEN)?;
        let fetch = format!("FETCH {BATCH_ROWS} FROM asyncproxy_go_rows");
        let mut adopted = Adopted::default();
        loop {
            let rows = transaction.query_typed(&fetch, &[])?;
            if rows.is_empty() {
                break;
            }
            let mut good = Vec::new();
            let mut bad = Vec::new();
            for row in &rows {
                let row = GoRow::read(row)?;
                match row.convert() {
                    Ok(request) => good.push((row, request)),
                    Err(why) => bad.push((row, format!("not taken over: {why}"))),
                }
            }
            adopted.waiting += append(transaction, &good)?;
            adopted.dead += append_dead(transaction, &bad)?;
        }
        transaction.batch_execute(CLOSE)?;
        Ok(adopted)
    }
}

/// A row of its table; any of the texts may be missing.
struct GoRow {
    id: Uuid,
    received_at: SystemTime,
    age_seconds: f64,
    attempt: i32,
    method: Vec<u8>,
    target: Vec<u8>,
    header: Vec<u8>,
    body: Vec<u8>,
}

impl GoRow {
    fn read(row: &Row) -> Result<GoRow, Fault> {
        let bytes = |column| {
            row.try_get::<_, Option<Vec<u8>>>(column)
                .map(Option::unwrap_or_default)
        };
        let age: f64 = row.try_get("age")?;
        Ok(GoRow {
            id: to_id(&bytes("id")?),
            received_at: to_storable(row.try_get("received_at")?),
            age_seconds: age.max(0.0),
            attempt: row.try_get("attempt")?,
            method: bytes("method")?,
            target: bytes("origin_url")?,
            header: bytes("header")?,
            body: bytes("body")?,
        })
    }

    /// The request in it.
    ///
    /// # Errors
    /// Why it could never be sent.
    fn convert(&self) -> Result<Request, String> {
        let text = |bytes, name| str::from_utf8(bytes).map_err(|_| format!("{name} is not UTF-8"));
        let method = text(&self.method, "method")?;
        let target = text(&self.target, "origin_url")?;
        // It was joined to the destination's URL as it was.
        let target = if target.is_empty() || target.starts_with('?') {
            format!("/{target}")
        } else {
            target.to_owned()
        };
        let fields = fields(&self.header)?;
        let fields = fields
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_bytes()));
        let body = self.body.clone();
        // Who sent it is not known any more.
        let peer = Peer::default();
        let recorded = Request::record(method, &target, fields, peer, body, self.received_at)
            .map_err(|error| error.to_string())?;
        Ok(Request {
            id: self.id,
            ..recorded
        })
    }

    fn age(&self) -> Duration {
        Duration::try_from_secs_f64(self.age_seconds).unwrap_or_default()
    }
}

/// An id in the usual spelling is kept. Others are replaced, so that no two become one.
fn to_id(text: &[u8]) -> Uuid {
    Uuid::try_parse_ascii(text)
        .ok()
        .filter(|id| id.hyphenated().to_string().as_bytes() == text)
        .unwrap_or_else(Uuid::now_v7)
}

/// Go's `http.Header` in JSON: name → list of values. Sorted by name, as a map has no order.
fn fields(header: &[u8]) -> Result<Vec<(String, String)>, String> {
    if header.is_empty() {
        return Ok(Vec::new());
    }
    let parsed = serde_json::from_slice(header).map_err(|error| format!("header: {error}"))?;
    let map = match parsed {
        Value::Null => return Ok(Vec::new()),
        Value::Object(map) => map,
        _ => return Err("header is not a JSON object".into()),
    };
    let mut fields = Vec::new();
    for (name, values) in map {
        let values = match values {
            Value::Null => Vec::new(),
            Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let Value::String(value) = value else {
                return Err("header value is not a string".into());
            };
            fields.push((name.clone(), value));
        }
    }
    fields.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(fields)
}

fn append(transaction: &mut Transaction<'_>, rows: &[(GoRow, Request)]) -> Result<u64, Fault> {
    let mut new = NewRows::default();
    for (row, request) in rows {
        new.ids.push(request.id);
        new.received_at.push(request.received_at);
        // Due since it was received: that keeps the order.
        new.after.push(-row.age().as_secs_f64());
        new.attempts.push(row.attempt);
        new.statuses.push(None);
        new.errors.push(None);
        new.methods.push(&request.method);
        new.targets.push(&request.target);
        new.headers.push(request.headers.as_bytes());
        new.bodies.push(&request.body);
        new.leased.push(false);
    }
    Ok(transaction.execute_typed(APPEND, &new.due_parameters(&None))?)
}

/// Keeps the row as it was, header included.
fn append_dead(transaction: &mut Transaction<'_>, rows: &[(GoRow, String)]) -> Result<u64, Fault> {
    let texts: Vec<_> = rows
        .iter()
        .map(|(row, _)| {
            let text = String::from_utf8_lossy;
            (text(&row.method), text(&row.target))
        })
        .collect();
    let mut new = NewRows::default();
    for ((row, why), (method, target)) in rows.iter().zip(&texts) {
        new.ids.push(row.id);
        new.received_at.push(row.received_at);
        new.after.push(0.0);
        new.attempts.push(row.attempt);
        new.statuses.push(None);
        new.errors.push(Some(why.clone()));
        new.methods.push(method);
        new.targets.push(target);
        new.headers.push(&row.header);
        new.bodies.push(&row.body);
        new.leased.push(false);
    }
    if new.ids.is_empty() {
        return Ok(0);
    }
    Ok(transaction.execute_typed(APPEND_DEAD, &new.parameters())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_maps_become_fields_sorted_by_name() {
        let parsed = fields(br#"{"B":["2","1"],"A":["x"],"C":[],"D":null,"E":"y"}"#).unwrap();
        let seen: Vec<_> = parsed
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(seen, [("A", "x"), ("B", "2"), ("B", "1"), ("E", "y")]);
        for none in ["", "null", "{}"] {
            assert_eq!(fields(none.as_bytes()), Ok(Vec::new()), "{none}");
        }
        for bad in ["{", "[]", "1", r#"{"A":[1]}"#, r#"{"A":{}}"#, "\u{1}"] {
            assert!(fields(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_ids_in_the_usual_spelling_are_kept() {
        let usual = "0190b6a0-0000-7000-8000-00000000000a";
        assert_eq!(to_id(usual.as_bytes()).to_string(), usual);
        for other in [usual.to_uppercase(), usual.replace('-', ""), "1".into()] {
            assert_ne!(to_id(other.as_bytes()).to_string(), usual);
        }
    }
}
