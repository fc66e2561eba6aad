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

/// A metric as an expression names it, with the labels it must have and, where they are given
/// literally, their values.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Selector {
    name: String,
    labels: Vec<(String, Option<String>)>,
}

/// The metrics in a PromQL expression. Knows as much of the language as is used here.
fn selectors(expression: &str) -> Vec<Selector> {
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
    let mut found: Vec<Selector> = Vec::new();
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
                rest = after.split_once(')').expect("labels in parentheses").1;
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
    found
}

fn matcher(text: &str) -> (String, Option<String>) {
    let end = text.find(['=', '!']).expect("a matcher");
    let (name, condition) = text.split_at(end);
    let value = condition
        .trim_start_matches(['=', '!', '~'])
        .trim_matches('"');
    let is_literal = condition.starts_with("=\"");
    let value = is_literal.then(|| value.to_owned());
    (name.trim().to_owned(), value)
}

#[test]
fn metrics_are_found_in_expressions() {
    let names = |expression| {
        let names = selectors(expression)
            .into_iter()
            .map(|selector| selector.name);
        names.collect::<Vec<_>>()
    };
    assert_eq!(names("up == 0"), ["up"]);
    assert_eq!(
        names("histogram_quantile(0.99, sum by (le, b) (rate(c_bucket{x=~\"$y\"}[5m]))) > 1e3"),
        ["c_bucket"]
    );
    assert_eq!(names("a > 900 and on (instance) b == 0"), ["a", "b"]);
    let found = selectors("a{b=\"c\", d=~\"e|f\", g!=\"h\"}");
    let labels = [("b", Some("c")), ("d", None), ("g", None)];
    let labels = labels.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
    assert_eq!(found[0].labels, labels);
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

/// Whether a line of the exposition is a sample of the metric with these labels.
fn is_sample(line: &str, selector: &Selector) -> bool {
    let end = line.find(['{', ' ']).unwrap_or(line.len());
    let (name, labels) = line.split_at(end);
    name == selector.name
        && selector
            .labels
            .iter()
            .all(|(label, value)| match (label.as_str(), value) {
                // Prometheus' own.
                ("instance" | "job", _) => true,
                (label, None) => labels.contains(&format!("{label}=\"")),
                (label, Some(value)) => labels.contains(&format!("{label}=\"{value}\"")),
            })
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
    let mut missing = BTreeSet::new();
    for (place, expression) in expressions() {
        let found = selectors(&expression);
        assert!(!found.is_empty(), "{place}: {expression}");
        for selector in found {
            let is_there = exposition.lines().any(|line| is_sample(line, &selector));
            // Of the scrape itself.
            if !is_there && selector.name != "up" {
                missing.insert((place.clone(), selector));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    let misspelt = selectors("asyncproxy_store_upp");
    assert!(!exposition.lines().any(|line| is_sample(line, &misspelt[0])));

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
