//! Where in a YAML file settings stand, for messages. Sees the block style that settings are written
//! in, a section's name in the first column and its settings indented below; of any other it finds
//! nothing.

/// Lines, counted from 1, on which a section is opened, or a setting of it set.
pub(super) fn lines_of(yaml: &str, section: &str, name: Option<&str>) -> Vec<usize> {
    let mut lines = Vec::new();
    let mut is_inside = false;
    for (number, line) in yaml.lines().enumerate() {
        let Some(key) = key_of(line) else {
            continue;
        };
        let is_section = !line.starts_with([' ', '\t']);
        if is_section {
            is_inside = key == section;
        }
        let is_meant = match name {
            None => is_section && is_inside,
            Some(name) => !is_section && is_inside && key == name,
        };
        if is_meant {
            lines.push(number + 1);
        }
    }
    lines
}

/// What stands before the colon, if anything does.
fn key_of(line: &str) -> Option<&str> {
    let text = line.trim_start();
    if text.starts_with('#') {
        return None;
    }
    let (key, rest) = text.split_once(':')?;
    let is_key = rest.is_empty() || rest.starts_with(char::is_whitespace);
    is_key.then(|| key.trim_end().trim_matches(['"', '\'']))
}

/// What is wrong with a file that is no YAML, in words for one who wrote it by hand. `error` is the
/// parser's.
pub(super) fn not_yaml(yaml: &str, error: &str) -> String {
    if let Some(told) = set_twice(yaml, error) {
        return told;
    }
    let line = line_in(error);
    let text = line
        .and_then(|line| yaml.lines().nth(line - 1))
        .unwrap_or_default();
    let indent = &text[..text.len() - text.trim_start().len()];
    match line {
        Some(line) if indent.contains('\t') => {
            format!("line {line}: indented with a tab, YAML takes spaces only")
        }
        Some(line) => format!("line {line}: not YAML: {error}"),
        None => format!("not YAML: {error}"),
    }
}

/// The parser says which key it has met again, and where the first of them stood.
fn set_twice(yaml: &str, error: &str) -> Option<String> {
    let (before, after) = error.split_once("duplicate entry with key \"")?;
    let (key, _) = after.split_once('"')?;
    let (lines, whole) = match before.trim_end().strip_suffix(':') {
        Some(section) => (
            lines_of(yaml, section, Some(key)),
            format!("{section}.{key}"),
        ),
        None => (lines_of(yaml, key, None), key.to_owned()),
    };
    match lines.as_slice() {
        [first, .., last] => Some(format!(
            "line {last}: {whole} stands here again, after line {first}: leave one of them"
        )),
        _ => Some(format!("{whole} stands there twice: leave one of them")),
    }
}

/// The first line that an error names.
fn line_in(error: &str) -> Option<usize> {
    let (_, after) = error.split_once(" at line ")?;
    let digits = after
        .split(|character: char| !character.is_ascii_digit())
        .next()?;
    digits.parse().ok().filter(|line| *line > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found_where_they_stand() {
        let yaml = "# server:\nserver:\n  # bind: x\n  bind: :80\n\n  'ack' : stored\nmetrics:\n  bind: :81\n  bind: :82\n";
        for (section, name, lines) in [
            ("server", None, &[2][..]),
            ("server", Some("bind"), &[4]),
            ("server", Some("ack"), &[6]),
            ("metrics", Some("bind"), &[8, 9]),
            ("metrics", Some("ack"), &[]),
            ("queue", None, &[]),
        ] {
            assert_eq!(lines_of(yaml, section, name), lines, "{section} {name:?}");
        }
        // Nothing that could be misleading.
        assert_eq!(
            lines_of("server: {bind: ':80'}", "server", Some("bind")),
            [0; 0]
        );
        assert_eq!(
            lines_of("\u{feff}server:\n\t:\n::\n:", "server", None),
            [0; 0]
        );
    }

    #[test]
    fn what_is_no_yaml_is_told_in_words_with_its_line() {
        let told = |yaml: &str| {
            let error = serde_yaml::from_str::<serde_yaml::Value>(yaml).unwrap_err();
            not_yaml(yaml, &error.to_string())
        };
        for (yaml, expected) in [
            ("server:\n\tbind: :80\n", "line 2: indented with a tab"),
            (
                "server:\n  bind: :80\n \t ack: x\n",
                "line 3: indented with a tab",
            ),
            (
                "server:\n  bind: :80\n  ack: stored\n  bind: :81\n",
                "line 4: server.bind stands here again, after line 2",
            ),
            (
                "server:\nqueue:\nserver:\n",
                "line 3: server stands here again, after line 1",
            ),
            (
                "server: {bind: a, bind: b}\n",
                "server.bind stands there twice",
            ),
            ("server:\n  bind: @x\n", "line 2: not YAML: "),
            ("server:\n bind: a\n  ack: b\n", "line 3: not YAML: "),
        ] {
            let told = told(yaml);
            assert!(told.starts_with(expected), "{yaml:?}: {told}");
        }
        // Whatever the parser says of whatever it is given.
        for error in [
            "",
            " at line ",
            " at line 0",
            " at line 99999999999999999999999",
            "duplicate entry with key \"",
        ] {
            not_yaml("\t", error);
        }
    }
}
