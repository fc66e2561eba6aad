//! What the dashboard and the alerts ask for is what a running instance tells.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::Setup;

/// Names that were the Go program's, and what promtool has against them.
const KNOWN: [&str; 1] = ["queue_total_size"];

fn root(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Runs promtool; tells whether it was content, and what it said.
fn promtool(arguments: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, of the package prometheus");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// A metric as an expression names it, with the labels it must have and the values that are given
/// literally, one by one: some series must have each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Selector {
    name: String,
    labels: Vec<(String, Vec<String>)>,
}

/// The metrics in a PromQL expression, and the labels it groups by. Knows as much of the language as is
/// used here.
fn selectors(expression: &str) -> (Vec<Selector>, Vec<String>) {
    const WORDS: [&str; 14] = [
        "by",
        "without",
        "on",
        "ignoring",
        "group_left",
        "group_right",
        "and",
        "or",
        "unless",
        "bool",
        "offset",
        "inf",
        "nan",
        "le",
    ];
    let (mut found, mut grouped): (Vec<Selector>, Vec<String>) = (Vec::new(), Vec::new());
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        if first == '[' {
            rest = rest.split_once(']').expect("]").1;
        } else if first == '{' {
            let (labels, after) = rest[1..].split_once('}').expect("}");
            let selector = found.last_mut().expect("a metric before its labels");
            selector.labels = labels.split(',').map(matcher).collect();
            rest = after;
        } else if first.is_ascii_alphabetic() || first == '_' {
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            let after = after.trim_start();
            if matches!(word, "by" | "without" | "on" | "ignoring") {
                let (labels, after) = after[1..].split_once(')').expect("labels in parentheses");
                grouped.extend(labels.split(',').map(|label| label.trim().to_owned()));
                rest = after;
                continue;
            }
            rest = after;
            let is_function = ["(", "by ", "without "]
                .iter()
                .any(|next| after.starts_with(next));
            if !is_function && !WORDS.contains(&word) {
                found.push(Selector {
                    name: word.to_owned(),
                    labels: Vec::new(),
                });
            }
        } else if first.is_ascii_digit() {
            rest = rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '.');
        } else {
            rest = &rest[first.len_utf8()..];
        }
    }
    (found, grouped)
}

fn matcher(text: &str) -> (String, Vec<String>) {
    let end = text.find(['=', '!']).expect("a matcher");
    let (name, condition) = text.split_at(end);
    let value = condition
        .trim_start_matches(['=', '!', '~'])
        .trim_matches('"');
    // A variable of the dashboard's stands for anything.
    let values = value.split('|').filter(|value| !value.starts_with('$'));
    let values = values.map(str::to_owned).collect();
    (name.trim().to_owned(), values)
}

#[test]
fn metrics_are_found_in_expressions() {
    let names = |expression| {
        let (found, grouped) = selectors(expression);
        let names = found.into_iter().map(|selector| selector.name);
        (names.collect::<Vec<_>>().join(" "), grouped.join(" "))
    };
    let both = |names: &str, labels: &str| (names.to_owned(), labels.to_owned());
    assert_eq!(names("up == 0"), both("up", ""));
    assert_eq!(
        names("histogram_quantile(0.99, sum by (le, b) (rate(c_bucket{x=~\"$y\"}[5m]))) > 1e3"),
        both("c_bucket", "le b")
    );
    assert_eq!(
        names("a > 900 and on (instance) b == 0"),
        both("a b", "instance")
    );
    let (found, _) = selectors("a{b=\"c\", d=~\"e|f\", g!=\"h\", i=~\"$j\"}");
    let labels = found[0]
        .labels
        .iter()
        .map(|(name, values)| (name.as_str(), values.join(" ")));
    let labels: Vec<_> = labels.collect();
    let expected = [("b", "c"), ("d", "e f"), ("g", "h"), ("i", "")];
    assert_eq!(
        labels,
        expected.map(|(name, values)| (name, values.to_owned()))
    );
}

/// All expressions, with where they stand.
fn expressions() -> Vec<(String, String)> {
    let read = |name: &str| std::fs::read_to_string(root(name)).expect(name);
    let mut all = Vec::new();
    let dashboard: Value = serde_json::from_str(&read("dist/grafana.json")).unwrap();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().unwrap_or(&Vec::new()) {
            all.push((
                title.to_owned(),
                target["expr"].as_str().unwrap().to_owned(),
            ));
        }
    }
    let panels = all.len();
    let alerts: Value = serde_yaml::from_str(&read("dist/alerts.yaml")).unwrap();
    for rule in alerts["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap().to_owned();
        all.push((name, rule["expr"].as_str().unwrap().to_owned()));
    }
    assert!(panels >= 20 && all.len() >= panels + 10, "{}", all.len());
    all
}

/// Labels that are Prometheus' own, or a histogram's.
const GIVEN: [&str; 3] = ["instance", "job", "le"];

/// The labels of each series of a metric, as they stand in the exposition.
fn series<'a>(exposition: &'a str, name: &str) -> Vec<&'a str> {
    let lines = exposition
        .lines()
        .filter_map(|line| line.strip_prefix(name));
    lines.filter(|rest| rest.starts_with(['{', ' '])).collect()
}

/// What of an expression is not there.
fn missing(exposition: &str, expression: &str) -> Vec<String> {
    let (found, grouped) = selectors(expression);
    let mut missing = Vec::new();
    let mut labels_of_all = String::new();
    for Selector { name, labels } in found.iter().filter(|selector| selector.name != "up") {
        let series = series(exposition, name);
        if series.is_empty() {
            missing.push(name.clone());
        }
        for (label, values) in labels
            .iter()
            .filter(|(label, _)| !GIVEN.contains(&label.as_str()))
        {
            let wanted = values.iter().map(|value| format!("{label}=\"{value}\""));
            let wanted = wanted.chain([format!("{label}=\"")]);
            let absent = wanted.filter(|part| !series.iter().any(|labels| labels.contains(part)));
            missing.extend(absent.map(|part| format!("{name}{{{part}")));
        }
        labels_of_all += &series.concat();
    }
    let grouped = grouped
        .iter()
        .filter(|label| !GIVEN.contains(&label.as_str()));
    let absent = grouped.filter(|label| !labels_of_all.contains(&format!("{label}=\"")));
    missing.extend(absent.cloned());
    missing
}

#[test]
fn each_metric_that_is_named_is_there() {
    let destination = Destination::answering(|_| Answer::ok());
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    // Series with the labels of an attempt are there after the first.
    proxy.accept(0..2);
    metrics::assert_settled(&proxy, 2);
    let exposition = http::get(proxy.control, "/metrics").text();
    for (place, expression) in expressions() {
        assert!(
            !selectors(&expression).0.is_empty(),
            "{place}: {expression}"
        );
        assert_eq!(missing(&exposition, &expression), [""; 0], "{place}");
    }
    for (misspelt, part) in [
        ("asyncproxy_store_upp == 0", "asyncproxy_store_upp"),
        (
            "asyncproxy_queue_rows{stat=\"dead\"}",
            "asyncproxy_queue_rows{stat=\"",
        ),
        (
            "asyncproxy_queue_rows{state=~\"waiting|leasd\"}",
            "asyncproxy_queue_rows{state=\"leasd\"",
        ),
        ("sum by (instance, stat) (asyncproxy_queue_rows)", "stat"),
    ] {
        assert!(
            missing(&exposition, misspelt).contains(&part.to_owned()),
            "{misspelt}"
        );
    }

    // And the exposition is as it should be.
    let (_, complaints) = promtool(&["check", "metrics"], &exposition);
    for line in complaints.lines() {
        assert!(KNOWN.iter().any(|name| line.starts_with(name)), "{line}");
    }
    proxy.stop();
}

#[test]
fn alerts_fire_for_what_they_are_about() {
    let path = root("dist/alerts.yaml");
    let (is_valid, text) = promtool(&["check", "rules", path.to_str().unwrap()], "");
    assert!(is_valid, "{text}");
    let path = root("tests/alerts_test.yaml");
    let (is_good, text) = promtool(&["test", "rules", path.to_str().unwrap()], "");
    assert!(is_good, "{text}");
}

#[test]
fn the_dashboard_can_be_imported() {
    let text = std::fs::read_to_string(root("dist/grafana.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let mut ids = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        if panel["type"] != "row" {
            assert_eq!(panel["datasource"]["uid"], "${datasource}");
            assert!(
                panel["description"].as_str().unwrap().ends_with('.'),
                "{panel}"
            );
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string());
        }
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["datasource", "instance"]);
}
