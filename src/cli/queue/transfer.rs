//! `queue export` and `queue import`: requests as lines of JSON.
//!
//! What is text stands as it is; what is not, as `{"base64": "…"}`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Failure;
use super::show::summary;
use crate::printable;
use crate::queue::batch::{self, Part};
use crate::queue::operate::{Filter, Operate, Position, Row};
use crate::queue::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, Fate, NewRow, StoreError};
use crate::request::{Headers, Request};
use crate::settle;

/// Longest line: the largest body in base64, and as much again.
const LINE_BYTES_MAX: u64 = 1536 * 1024 * 1024;
/// Faulty lines that are told of one by one.
const FAULTS_SHOWN: u64 = 10;

/// How far it is, on a terminal, now and then.
pub(super) struct Progress {
    what: &'static str,
    count: usize,
    shown_at: Option<Instant>,
}

impl Progress {
    const PAUSE: Duration = Duration::from_millis(250);

    pub(super) fn new(what: &'static str) -> Progress {
        let is_shown = io::stderr().is_terminal();
        Progress {
            what,
            count: 0,
            shown_at: is_shown.then(Instant::now),
        }
    }

    pub(super) fn add(&mut self, count: usize) {
        self.count += count;
        if let Some(shown_at) = &mut self.shown_at
            && shown_at.elapsed() >= Progress::PAUSE
        {
            *shown_at = Instant::now();
            // A terminal that is gone changes nothing.
            let _ = write!(io::stderr(), "\r{} {} ", self.count, self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown_at.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

pub(super) fn export(
    store: &dyn Operate,
    filter: &Filter,
    path: Option<&Path>,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let Some(path) = path else {
        return write_all(store, filter, output);
    };
    let describe = |error: io::Error| Failure::Failed(format!("{}: {error}", path.display()));
    // Requests carry secrets.
    let file = create_private(path).map_err(describe)?;
    let mut file = BufWriter::new(file);
    // Of a damaged store as far as it got, too.
    let written = write_all(store, filter, &mut file);
    file.flush()
        .and_then(|()| file.get_ref().sync_all())
        .map_err(describe)?;
    written
}

fn create_private(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn write_all(store: &dyn Operate, filter: &Filter, output: &mut dyn Write) -> Result<(), Failure> {
    let mut export = Export {
        output,
        progress: Progress::new("requests"),
        last: None,
    };
    match export.write_listed(store, filter) {
        Err(Stopped::Damaged(why)) => {
            let why = printable::line(why.as_bytes());
            let _ = writeln!(io::stderr(), "asyncproxy: {why}");
            export.write_salvaged(store, filter)
        }
        Err(Stopped::Failed(failure)) => Err(failure),
        Ok(()) => Ok(()),
    }
}

/// An export under way.
struct Export<'a> {
    output: &'a mut dyn Write,
    progress: Progress,
    /// The last row that was looked at: all before it were, too.
    last: Option<Position>,
}

/// Why a listing ended early.
enum Stopped {
    /// The store's file cannot be read here.
    Damaged(String),
    Failed(Failure),
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Stopped {
        match error {
            StoreError::Damaged(why) => Stopped::Damaged(why),
            error => Stopped::Failed(error.into()),
        }
    }
}

impl Export<'_> {
    fn write_listed(&mut self, store: &dyn Operate, filter: &Filter) -> Result<(), Stopped> {
        loop {
            let rows = store.list(filter, self.last, BATCH_ROWS_MAX)?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in &rows {
                let body = store.body(row.position())?;
                // One that may not lack it was delivered meanwhile.
                if body.is_some() || may_lack_body(store, row)? {
                    self.write(row, body).map_err(Stopped::Failed)?;
                }
                self.last = Some(row.position());
            }
        }
    }

    /// Goes on past what is damaged, with what was not looked at yet.
    fn write_salvaged(&mut self, store: &dyn Operate, filter: &Filter) -> Result<(), Failure> {
        let (now, last) = (SystemTime::now(), self.last);
        let mut result = Ok(());
        let unread = store.salvage(&mut |row, body| {
            let is_written = last.is_some_and(|last| row.position() <= last);
            if is_written || !filter.passes(&row, now) {
                return ControlFlow::Continue(());
            }
            result = self.write(&row, body);
            match result {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        result?;
        let written = self.progress.count;
        let lost = match unread {
            0 => "a part of the file cannot be read".to_owned(),
            1 => "1 request cannot be read".to_owned(),
            unread => format!("{} cannot be read", printable::count(unread, "request")),
        };
        Err(Failure::Failed(format!(
            "the file is damaged: {lost}, {written} were written"
        )))
    }

    fn write(&mut self, row: &Row, body: Option<Vec<u8>>) -> Result<(), Failure> {
        let mut line = summary(row);
        line.remove("body_bytes");
        let headers = Headers::from_bytes(row.headers.clone().unwrap_or_default());
        let headers = headers.map(|headers| {
            let field = |(name, value): (&str, &[u8])| json!([name, of_bytes(value)]);
            headers.iter().map(field).collect::<Value>()
        });
        line.insert("headers".into(), headers.unwrap_or(Value::Null));
        let body = body.map_or(Value::Null, |body| of_bytes(&body));
        line.insert("body".into(), body);
        writeln!(self.output, "{}", printable::json(&Value::Object(line)))?;
        self.progress.add(1);
        Ok(())
    }
}

/// Whether a row without a body is one that was kept so.
fn may_lack_body(store: &dyn Operate, row: &Row) -> Result<bool, StoreError> {
    Ok(row.position().is_dead && store.find(row.id)?.is_some())
}

fn of_bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({ "base64": STANDARD.encode(bytes) }),
    }
}

fn to_bytes(value: &Value) -> Result<Vec<u8>, String> {
    if let Some(text) = value.as_str() {
        return Ok(text.as_bytes().to_vec());
    }
    let encoded = value["base64"]
        .as_str()
        .ok_or("must be text or {\"base64\": …}")?;
    STANDARD.decode(encoded).map_err(|error| error.to_string())
}

pub(super) fn import(
    store: &dyn Operate,
    path: Option<&Path>,
    is_json: bool,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let (imported, faulty) = match path {
        None => read_all(store, io::stdin().lock())?,
        Some(path) => {
            let file = File::open(path)
                .map_err(|error| Failure::Failed(format!("{}: {error}", path.display())))?;
            read_all(store, BufReader::new(file))?
        }
    };
    if is_json {
        writeln!(
            output,
            "{}",
            json!({ "imported": imported, "faulty": faulty })
        )?;
    } else {
        let requests = printable::count(imported, "request");
        writeln!(output, "{requests} imported, or there already")?;
    }
    match faulty {
        0 => Ok(()),
        _ => Err(Failure::Failed(format!(
            "{} could not be imported",
            printable::count(faulty, "line")
        ))),
    }
}

/// Returns how many lines were taken in, and how many could not be.
fn read_all(store: &dyn Operate, mut input: impl BufRead) -> Result<(u64, u64), Failure> {
    let (mut batch, mut bytes, mut imported, mut faulty) = (Vec::new(), 0, 0, 0);
    let mut progress = Progress::new("requests");
    let mut line = String::new();
    for number in 1_u64.. {
        line.clear();
        let read = (&mut input).take(LINE_BYTES_MAX).read_line(&mut line);
        let is_end = read.map_err(|error| Failure::Failed(format!("line {number}: {error}")))? == 0;
        if !is_end && !line.trim().is_empty() {
            match parse(&line, SystemTime::now()) {
                Ok(row) => {
                    bytes += row.request.body.len();
                    batch.push(row);
                }
                Err(why) => {
                    faulty += 1;
                    complain(faulty, &format!("line {number}"), &why);
                }
            }
        }
        if batch.len() >= BATCH_ROWS_MAX || bytes >= BATCH_BYTES_MAX || is_end {
            imported += take_in(store, &batch, &mut faulty)?;
            progress.add(batch.len());
            batch.clear();
            bytes = 0;
        }
        if is_end {
            break;
        }
    }
    Ok((imported, faulty))
}

fn headers(listed: &Value) -> Result<Headers, String> {
    let mut fields = Vec::new();
    for field in listed.as_array().ok_or("are missing")? {
        let name = field[0].as_str().ok_or("must be [name, value] each")?;
        fields.push((name, to_bytes(&field[1])?));
    }
    let fields = fields.iter().map(|(name, value)| (*name, value.as_slice()));
    Headers::restored(fields).map_err(|why| why.to_string())
}

/// Appends rows, and returns how many: one that the store refuses is as a faulty line.
fn take_in(store: &dyn Operate, rows: &[NewRow], faulty: &mut u64) -> Result<u64, Failure> {
    let mut imported = 0;
    batch::carry_out(
        rows,
        |part| store.append(part),
        |part| match part {
            Part::Taken(range, ()) => imported += range.len() as u64,
            Part::Refused(at, why) => {
                *faulty += 1;
                complain(*faulty, &rows[at].request.id.to_string(), &why);
            }
        },
    )
    .map_err(|stopped| stopped.error)?;
    Ok(imported)
}

fn complain(faulty: u64, what: &str, why: &str) {
    if faulty <= FAULTS_SHOWN {
        let why = printable::line(why.as_bytes());
        let _ = writeln!(io::stderr(), "asyncproxy: {what}: {why}");
    }
}

/// One line of an export. What was leased is due.
fn parse(line: &str, now: SystemTime) -> Result<NewRow, String> {
    let row: Value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
    let text = |key: &str| {
        row[key]
            .as_str()
            .ok_or_else(|| format!("{key}: is missing"))
    };
    let time =
        |key: &str| humantime::parse_rfc3339(text(key)?).map_err(|error| format!("{key}: {error}"));
    let request = Request {
        id: Uuid::parse_str(text("id")?).map_err(|error| format!("id: {error}"))?,
        received_at: time("received_at")?,
        method: text("method")?.to_owned(),
        target: text("target")?.to_owned(),
        headers: headers(&row["headers"]).map_err(|why| format!("headers: {why}"))?,
        body: to_bytes(&row["body"]).map_err(|why| format!("body: {why}"))?,
    };
    request.check().map_err(|why| why.to_string())?;
    let failure = row["last_error"].as_str().map(|error| settle::Failure {
        status: row["last_status"]
            .as_u64()
            .and_then(|status| u16::try_from(status).ok()),
        error: error.to_owned(),
    });
    let attempt = row["attempt"]
        .as_u64()
        .and_then(|attempt| i32::try_from(attempt).ok());
    let attempt = attempt.ok_or("attempt: must be a whole number from 0 to 2147483647")?;
    let due = |after| Fate::Due {
        after,
        failure: failure.clone(),
    };
    let fate = match text("state")? {
        "waiting" => due(time("due_at")?.duration_since(now).unwrap_or_default()),
        "leased" => due(Duration::ZERO),
        "dead" => Fate::Dead(failure.clone().ok_or("last_error: is missing")?),
        _ => return Err("state: must be waiting, leased or dead".into()),
    };
    Ok(NewRow {
        request: Arc::new(request),
        attempt: attempt.unsigned_abs(),
        fate,
    })
}
