//! What the documentation says of the settings and metrics is what the code has.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use asyncproxy::config::SETTINGS;
use serde_json::Value;

use crate::support::destination::{Answer, Destination};
use crate::support::http;
use crate::support::metrics;
use crate::support::proxy::Setup;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The code in the first cells of each row of the README's tables.
fn table_rows(readme: &str) -> Vec<Vec<&str>> {
    let rows = readme.lines().filter_map(|line| line.strip_prefix('|'));
    rows.map(|row| row.split('|').map(code).collect()).collect()
}

/// A cell without the backticks around it.
fn code(cell: &str) -> &str {
    cell.trim().trim_matches('`')
}

#[test]
fn readme_has_each_setting_with_env_name_default_and_meaning() {
    let readme = file("README.md");
    let rows = table_rows(&readme);
    let is_key = |row: &&Vec<&str>| SETTINGS.iter().any(|setting| setting.key == row[0]);
    let documented: Vec<_> = rows
        .iter()
        .filter(is_key)
        .map(|row| [0, 1, 2, 3].map(|column| row[column].to_owned()))
        .collect();
    let expected: Vec<_> = SETTINGS
        .iter()
        .map(|setting| {
            [
                setting.key.to_owned(),
                setting.env(),
                setting.default.to_owned(),
                setting.about.trim_matches('`').to_owned(),
            ]
        })
        .collect();
    assert_eq!(documented, expected);
}

#[test]
fn readme_names_each_setting_that_needs_a_restart() {
    let readme = file("README.md");
    let (_, rest) = readme
        .split_once("These take effect with the next restart only")
        .unwrap();
    let (list, _) = rest.split_once("\n\n").unwrap();
    let named: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
    assert_eq!(named, asyncproxy::config::NEEDS_RESTART);
    for key in asyncproxy::config::NEEDS_RESTART {
        assert!(SETTINGS.iter().any(|setting| setting.key == *key), "{key}");
    }
}

#[test]
fn env_names_follow_from_the_keys() {
    for setting in SETTINGS {
        let name = setting.key.replace('.', "_").to_uppercase();
        assert_eq!(setting.env(), name);
    }
}

/// `section.name` and value of each line that sets something, or would without the `#` before it.
fn yaml_settings(yaml: &str) -> Vec<(String, String)> {
    let mut section = "";
    let mut settings = Vec::new();
    for line in yaml.lines() {
        let indented = line.starts_with([' ', '#']);
        if let Some(name) = line.strip_suffix(':').filter(|_| !indented) {
            section = name;
        } else if let Some((name, value)) = line.trim_start_matches([' ', '#']).split_once(": ") {
            let value = value.split(" #").next().unwrap_or_default();
            let value = value.trim().trim_matches(['"', '\'', '[', ']']);
            settings.push((format!("{section}.{name}"), value.to_owned()));
        }
    }
    settings
}

#[test]
fn shipped_configuration_names_each_setting_with_its_default() {
    let yaml = file("config.yaml");
    let named = yaml_settings(&yaml);
    let known = |(key, _): &&(String, String)| SETTINGS.iter().any(|setting| setting.key == key);
    let keys: BTreeSet<_> = named
        .iter()
        .filter(known)
        .map(|(key, _)| key.clone())
        .collect();
    let expected: BTreeSet<_> = SETTINGS
        .iter()
        .map(|setting| setting.key.to_owned())
        .collect();
    assert_eq!(keys, expected);
    for setting in SETTINGS {
        let mut values = named.iter().filter(|(key, _)| key == setting.key);
        assert!(
            values.any(|(_, value)| value == setting.default),
            "{}: {} is the default",
            setting.key,
            setting.default
        );
    }
}

#[test]
fn readme_and_program_have_the_same_metrics() {
    let destination = Destination::answering(|seen| match seen.attempt() {
        1 => Answer::status(500),
        _ => Answer::ok(),
    });
    let setup = Setup::new(&destination.url());
    let proxy = setup.start();
    proxy.accept(0..1);
    metrics::assert_settled(&proxy, 1);
    let text = http::get(proxy.control, "/metrics").text();
    let exported: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let readme = file("README.md");
    let rows = table_rows(&readme);
    let documented: BTreeSet<_> = rows
        .iter()
        .filter_map(|row| row[0].split('{').next())
        .filter(|name| {
            ["asyncproxy_", "http_", "queue_total_size"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .collect();
    assert_eq!(documented, exported);
}

/// `1.91` and `1.91.0` as numbers.
fn rust_version(text: &str) -> Vec<u32> {
    let parts = text.split('.').map(|part| part.parse().expect("a number"));
    parts.chain([0]).take(3).collect()
}

/// The Rust that README and Cargo.toml name builds each package of the lock file.
#[test]
fn the_rust_version_is_enough_for_each_dependency() {
    let own = env!("CARGO_PKG_RUST_VERSION");
    let readme = file("README.md");
    assert_eq!(
        readme.matches(&format!("Rust {own} or later")).count(),
        readme.matches("or later and a C compiler").count(),
        "README.md names another Rust than {own}"
    );
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--offline", "--format-version=1"])
        .args(["--filter-platform", &platform])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(packages.len() > 50, "{}", packages.len());
    let newer: Vec<_> = packages
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package["rust_version"].as_str()?)))
        .filter(|(_, needed)| rust_version(needed) > rust_version(own))
        .collect();
    assert!(newer.is_empty(), "need more than Rust {own}: {newer:?}");
}
