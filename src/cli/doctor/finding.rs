//! One thing that was looked at, and how it is shown.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::printable;

/// Columns of what a finding is about.
const ABOUT_COLUMNS: usize = 26;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As it should be, or could not be looked at: what was found says which.
    Ok,
    Warning,
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        }
    }

    fn color(self) -> &'static str {
        match self {
            Level::Ok => "\x1b[32m",
            Level::Warning => "\x1b[33m",
            Level::Error => "\x1b[31m",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A setting's key, or a word or two.
    pub about: &'static str,
    pub level: Level,
    pub found: String,
    /// In one line.
    pub mend: Option<String>,
}

impl Finding {
    pub(super) fn ok(about: &'static str, found: impl Into<String>) -> Finding {
        Finding {
            about,
            level: Level::Ok,
            found: found.into(),
            mend: None,
        }
    }

    pub(super) fn warning(
        about: &'static str,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding {
            about,
            level: Level::Warning,
            found: found.into(),
            mend: Some(mend.into()),
        }
    }

    pub(super) fn error(
        about: &'static str,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding {
            level: Level::Error,
            ..Finding::warning(about, found, mend)
        }
    }
}

/// A line for each, and one more for how to mend it. Nothing in it can steer the terminal.
pub fn to_text(findings: &[Finding], is_coloured: bool) -> String {
    let mut text = String::new();
    for finding in findings {
        let level = finding.level.name();
        let (color, end) = match is_coloured {
            true => (finding.level.color(), "\x1b[0m"),
            false => ("", ""),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{color}{level:<7}{end}  {:<ABOUT_COLUMNS$}  {}",
            finding.about,
            printable::line(finding.found.as_bytes())
        );
        if let Some(mend) = &finding.mend {
            let _ = writeln!(
                text,
                "{:<9}{:<ABOUT_COLUMNS$}  -> {}",
                "",
                "",
                printable::line(mend.as_bytes())
            );
        }
    }
    text
}

pub fn to_json(findings: &[Finding]) -> Value {
    let each = findings.iter().map(|finding| {
        json!({
            "about": finding.about,
            "level": finding.level.name(),
            "found": finding.found,
            "mend": finding.mend,
        })
    });
    Value::Array(each.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_aligned_and_cannot_steer_the_terminal() {
        let findings = [
            Finding::ok("a", "fine"),
            Finding::error("b", "it's \x1b[2J\n\"bad\"", "do this"),
        ];
        let expected = format!(
            "ok       a{pad}  fine\n\
             error    b{pad}  it's \\u{{1b}}[2J\\n\"bad\"\n\
             {margin}-> do this\n",
            pad = " ".repeat(25),
            margin = " ".repeat(37),
        );
        assert_eq!(to_text(&findings, false), expected);
        assert!(to_text(&findings, true).starts_with("\x1b[32mok     \x1b[0m  a"));
    }

    #[test]
    fn json_has_all_of_it() {
        let findings = [Finding::warning("a", "x", "y")];
        let expected = json!([{ "about": "a", "level": "warning", "found": "x", "mend": "y" }]);
        assert_eq!(to_json(&findings), expected);
    }
}
