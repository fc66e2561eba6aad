//! `queue status`, and what `pause` and `resume` say.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Failure;
use crate::printable;
use crate::queue::Sample;
use crate::queue::operate::Operate;
use crate::status::about;
use crate::trend::{Moment, Trend};

/// Between two counts, when no instance tells how fast the queue moves.
const PAUSE: Duration = Duration::from_secs(2);

pub(super) fn print(
    store: &dyn Operate,
    instance: Result<Value, String>,
    is_json: bool,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let mut trend = Trend::default();
    let mut sample = count(store, &mut trend)?;
    if instance.is_err() {
        std::thread::sleep(PAUSE);
        sample = count(store, &mut trend)?;
    }
    if is_json {
        let status = to_json(&sample, &trend, &instance);
        return Ok(writeln!(output, "{}", printable::json(&status))?);
    }
    let mut line = |name: &str, value: &str| writeln!(output, "{name:12} {value}");
    line(
        "queue",
        &format!(
            "{} waiting, {} being sent, {}",
            sample.waiting,
            sample.leased,
            printable::count(sample.dead, "dead letter")
        ),
    )?;
    line("oldest", &sample.oldest.map_or("none".to_owned(), about))?;
    let forecast = match &instance {
        Ok(instance) => {
            let queue = &instance["queue"];
            line("arriving", &format!("{}/s", queue["arriving_per_second"]))?;
            line(
                "leaving",
                &format!(
                    "{}/s, at most {}/s ({})",
                    queue["leaving_per_second"],
                    queue["rate_per_second"],
                    plain(&queue["rate_scope"])
                ),
            )?;
            queue["empty_in_seconds"]
                .as_f64()
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        }
        Err(_) => {
            line("growing", &format!("{:.1}/s", trend.rates().growth))?;
            trend.rates().empty_in
        }
    };
    let is_empty = sample.waiting + sample.leased == 0;
    line(
        "forecast",
        &match (forecast, is_empty, sample.is_paused) {
            (_, true, _) => "empty".to_owned(),
            (_, false, true) => {
                "paused: nothing is sent until `asyncproxy queue resume`".to_owned()
            }
            (Some(left), false, false) => format!("empty in about {}", about(left)),
            (None, false, false) => "does not shrink at the moment".to_owned(),
        },
    )?;
    print_instance(&instance, output)
}

fn print_instance(instance: &Result<Value, String>, output: &mut dyn Write) -> Result<(), Failure> {
    let mut line = |name: &str, value: &str| writeln!(output, "{name:12} {value}");
    match instance {
        Err(why) => line(
            "instance",
            &format!("none answers: {}", printable::line(why.as_bytes())),
        )?,
        Ok(instance) => {
            let uptime =
                Duration::try_from_secs_f64(instance["uptime_seconds"].as_f64().unwrap_or(0.0));
            line(
                "instance",
                &format!(
                    "{}, {} for {}",
                    plain(&instance["version"]),
                    plain(&instance["state"]),
                    about(uptime.unwrap_or_default())
                ),
            )?;
            line("destination", &working(&instance["destination"], "breaker"))?;
            line("store", &store(&instance["store"]))?;
            if let Some(error) = instance["failed_reload"]["error"].as_str() {
                let error = printable::line(error.as_bytes());
                line("settings", &format!("the last reload failed: {error}"))?;
            }
            if let Some(rows) = instance["spool"]["rows"].as_u64() {
                line("spool", &printable::count(rows, "request"))?;
            }
        }
    }
    Ok(())
}

fn count(store: &dyn Operate, trend: &mut Trend) -> Result<Sample, Failure> {
    let sample = store.sample()?;
    let moment = Moment {
        at: Instant::now(),
        received: 0,
        queued: 0,
        delivered: 0,
        rows: sample.waiting + sample.leased,
    };
    trend.add(&sample, moment);
    Ok(sample)
}

fn plain(value: &Value) -> String {
    let text = value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned);
    printable::line(text.as_bytes())
}

fn working(part: &Value, state: &str) -> String {
    match (part["fault"].as_str(), part[state].as_str()) {
        (Some(fault), Some(state)) => {
            format!("breaker {state}: {}", printable::line(fault.as_bytes()))
        }
        (Some(fault), None) => printable::line(fault.as_bytes()),
        (None, Some(state)) => format!("breaker {}", printable::line(state.as_bytes())),
        (None, None) => "works".to_owned(),
    }
}

fn store(told: &Value) -> String {
    let works = working(told, "");
    match &told["name"] {
        // Of a version that does not tell it.
        Value::Null => works,
        name => format!("{}, {works}", plain(name)),
    }
}

fn to_json(sample: &Sample, trend: &Trend, instance: &Result<Value, String>) -> Value {
    json!({
        "queue": {
            "waiting": sample.waiting,
            "leased": sample.leased,
            "dead": sample.dead,
            "oldest_seconds": sample.oldest.map(|age| age.as_secs_f64()),
            "paused": sample.is_paused,
            "empty_in_seconds": match instance {
                Ok(instance) => instance["queue"]["empty_in_seconds"].clone(),
                Err(_) => json!(trend.rates().empty_in.map(|left| left.as_secs_f64())),
            },
        },
        "instance": instance.as_ref().ok(),
        "instance_error": instance.as_ref().err(),
    })
}

pub(super) fn print_pause(
    is_paused: bool,
    is_new: bool,
    is_json: bool,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    if is_json {
        let state = json!({ "paused": is_paused, "changed": is_new });
        return Ok(writeln!(output, "{state}")?);
    }
    let text = match (is_paused, is_new) {
        (true, true) => {
            "paused: nothing is claimed from now on, and new requests are stored within about a second"
        }
        (true, false) => "it was paused already",
        (false, true) => "resumed",
        (false, false) => "it was not paused",
    };
    Ok(writeln!(output, "{text}")?)
}
