//! `queue ls` and `queue show`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::credentials::{REDACTED, is_credential, redacted};
use super::{Failure, curl};
use crate::config::Proxy;
use crate::printable;
use crate::queue::BATCH_ROWS_MAX;
use crate::queue::operate::{Filter, Operate, Row, State};
use crate::request::Headers;
use crate::status::about;

pub(super) fn list(
    store: &dyn Operate,
    filter: &Filter,
    limit: usize,
    is_json: bool,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let (mut left, mut after) = (limit, None);
    if !is_json {
        let titles = ["id", "state", "age", "attempt", "last", "bytes"];
        let [id, state, age, attempt, last, bytes] = titles;
        writeln!(
            output,
            "{id:36}  {state:7}  {age:>7}  {attempt:>7}  {last:>4}  {bytes:>8}  request"
        )?;
    }
    while left > 0 {
        let rows = store.list(filter, after, left.min(BATCH_ROWS_MAX))?;
        let Some(last) = rows.last() else { break };
        after = Some(last.position());
        left -= rows.len();
        for row in &rows {
            if is_json {
                let mut shown = summary(row);
                redact(&mut shown);
                writeln!(output, "{}", printable::json(&Value::Object(shown)))?;
            } else {
                print_line(row, output)?;
            }
        }
    }
    Ok(())
}

fn print_line(row: &Row, output: &mut dyn Write) -> Result<(), Failure> {
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let last = match (row.last_status, &row.last_error) {
        (Some(status), _) => Some(status.to_string()),
        (None, Some(_)) => Some("none".to_owned()),
        (None, None) => None,
    };
    Ok(writeln!(
        output,
        "{}  {:7}  {:>7}  {:>7}  {:>4}  {:>8}  {}",
        row.id,
        row.state,
        or_none(age(row).map(about)),
        or_none(row.attempt.map(|attempt| attempt.to_string())),
        or_none(last),
        row.body_bytes,
        request_line(row, false),
    )?)
}

fn request_line(row: &Row, has_credentials: bool) -> String {
    let part = |part: &Option<String>| match part {
        Some(text) => printable::line(text.as_bytes()),
        None => "?".to_owned(),
    };
    let target = row.target.as_deref().map(|target| match has_credentials {
        true => target.to_owned(),
        false => redacted(target),
    });
    format!("{} {}", part(&row.method), part(&target))
}

fn age(row: &Row) -> Option<Duration> {
    let received_at = row.received_at?;
    // Another machine's clock may be ahead.
    Some(
        SystemTime::now()
            .duration_since(received_at)
            .unwrap_or_default(),
    )
}

/// A time as documents and other programs know it.
pub(super) fn rfc3339(time: SystemTime) -> Option<String> {
    let is_shown = time >= SystemTime::UNIX_EPOCH
        && time
            .duration_since(SystemTime::UNIX_EPOCH)
            .is_ok_and(|since| since.as_secs() <= 253_402_300_799);
    is_shown.then(|| humantime::format_rfc3339_micros(time).to_string())
}

/// All but headers and body.
pub(super) fn summary(row: &Row) -> Map<String, Value> {
    let at = match row.state {
        State::Waiting => "due_at",
        State::Leased => "leased_until",
        State::Dead => "died_at",
    };
    let mut summary = Map::new();
    let mut put = |key: &str, value: Value| summary.insert(key.to_owned(), value);
    put("id", json!(row.id.to_string()));
    put("state", json!(row.state.as_str()));
    put("received_at", json!(row.received_at.and_then(rfc3339)));
    put(at, json!(rfc3339(row.at)));
    put("attempt", json!(row.attempt));
    put("last_status", json!(row.last_status));
    put("last_error", json!(row.last_error));
    put("method", json!(row.method));
    put("target", json!(row.target));
    put("body_bytes", json!(row.body_bytes));
    summary
}

/// Leaves out of a summary what its target lets someone in with.
fn redact(summary: &mut Map<String, Value>) {
    if let Some(Value::String(target)) = summary.get_mut("target") {
        *target = redacted(target);
    }
}

/// One request.
pub(super) struct Shown<'a> {
    pub row: &'a Row,
    pub has_credentials: bool,
}

impl Shown<'_> {
    /// The header fields; a value that is a credential is replaced.
    fn headers(&self) -> Vec<(String, Vec<u8>)> {
        let block = self.row.headers.clone().unwrap_or_default();
        let Ok(headers) = Headers::from_bytes(block) else {
            return Vec::new();
        };
        let shown = |(name, value): (&str, &[u8])| {
            let is_hidden = !self.has_credentials && is_credential(name);
            let value = if is_hidden {
                REDACTED.as_bytes()
            } else {
                value
            };
            (name.to_owned(), value.to_vec())
        };
        headers.iter().map(shown).collect()
    }

    pub(super) fn print(&self, is_json: bool, output: &mut dyn Write) -> Result<(), Failure> {
        let row = self.row;
        if is_json {
            let mut shown = summary(row);
            if !self.has_credentials {
                redact(&mut shown);
            }
            let headers = self.headers();
            let headers = headers
                .iter()
                .map(|(name, value)| json!([name, String::from_utf8_lossy(value)]));
            shown.insert("headers".into(), headers.collect());
            return Ok(writeln!(
                output,
                "{}",
                printable::json(&Value::Object(shown))
            )?);
        }
        let mut line = |name: &str, value: &str| writeln!(output, "{name:12} {value}");
        line("id", &row.id.to_string())?;
        line("state", &state(row))?;
        if let (Some(received), Some(age)) = (row.received_at.and_then(rfc3339), age(row)) {
            line("received", &format!("{received}, {} ago", about(age)))?;
        }
        if let Some(attempt) = row.attempt {
            line("attempts", &attempt.to_string())?;
        }
        if let Some(status) = row.last_status {
            line("last status", &status.to_string())?;
        }
        if let Some(error) = &row.last_error {
            line("last error", &printable::line(error.as_bytes()))?;
        }
        line("request", &request_line(row, self.has_credentials))?;
        for (name, value) in self.headers() {
            writeln!(
                output,
                "  {}: {}",
                printable::line(name.as_bytes()),
                printable::line(&value)
            )?;
        }
        Ok(writeln!(
            output,
            "{:12} {}",
            "body",
            printable::count(row.body_bytes, "byte")
        )?)
    }

    pub(super) fn print_body(
        &self,
        store: &dyn Operate,
        output: &mut dyn Write,
    ) -> Result<(), Failure> {
        let body = self.body(store)?;
        // A file gets what was received; a terminal, what it can bear.
        if std::io::stdout().is_terminal() {
            return Ok(writeln!(output, "{}", printable::text(&body))?);
        }
        Ok(output.write_all(&body)?)
    }

    pub(super) fn print_curl(
        &self,
        store: &dyn Operate,
        proxy: &Proxy,
        output: &mut dyn Write,
    ) -> Result<(), Failure> {
        let (Some(method), Some(target)) = (&self.row.method, &self.row.target) else {
            return Err(Failure::Failed(format!(
                "{}: has no method or target",
                self.row.id
            )));
        };
        let target = match self.has_credentials {
            true => target.clone(),
            false => redacted(target),
        };
        let remote = &proxy.remote_url;
        let url = format!(
            "{}://{}{}{target}",
            remote.scheme, remote.authority, remote.path_prefix
        );
        let mut headers = self.headers();
        // As it would be sent, or curl takes it from the URL.
        headers.retain(|(name, _)| name != "Host");
        let kept = Headers::from_bytes(self.row.headers.clone().unwrap_or_default());
        if proxy.preserve_host
            && let Some(host) = kept.ok().as_ref().and_then(Headers::host)
        {
            headers.insert(0, ("Host".to_owned(), host.to_vec()));
        }
        headers.push((
            crate::request::ID_HEADER.to_owned(),
            self.row.id.to_string().into_bytes(),
        ));
        let command = curl::command(method, &url, &headers, &self.body(store)?);
        Ok(writeln!(output, "{command}")?)
    }

    fn body(&self, store: &dyn Operate) -> Result<Vec<u8>, Failure> {
        let body = store.body(self.row.position())?;
        body.ok_or_else(|| super::not_found(self.row.id))
    }
}

fn state(row: &Row) -> String {
    let now = SystemTime::now();
    match (row.state, row.at.duration_since(now)) {
        (State::Waiting, Ok(left)) => format!("waiting, due in {}", about(left)),
        (State::Waiting, Err(_)) => "waiting, due".to_owned(),
        (State::Leased, Ok(left)) => format!("being sent, for {} at most", about(left)),
        (State::Leased, Err(_)) => "being sent".to_owned(),
        (State::Dead, Ok(_)) => "dead".to_owned(),
        (State::Dead, Err(since)) => format!("dead since {}", about(since.duration())),
    }
}
