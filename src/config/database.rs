//! `db.connection_string`: `sqlite:PATH`, a Postgres URL, or libpq keywords.

use std::path::PathBuf;

use postgres::config::{Host, SslMode};

/// The store that a connection string names.
#[derive(Debug)]
pub enum Database {
    Sqlite(PathBuf),
    Postgres(Box<postgres::Config>),
}

/// Keywords of libpq that the client library knows. `sslmode` is dealt with here.
const KNOWN: [&str; 16] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "target_session_attrs",
    "load_balance_hosts",
];

const ACCEPTED: &str = "sqlite:PATH, a URL such as postgres://user:password@host/dbname, \
                        or libpq keywords such as host=localhost user=postgres dbname=asyncproxy";

/// What a connection string says, and the keywords in it that are ignored.
pub(super) struct Parsed {
    pub(super) database: Database,
    pub(super) ignored: Vec<String>,
}

/// `default_user` is who connects if the string does not say.
///
/// # Errors
/// What it must be, without quoting it: it may hold a password.
pub(super) fn parse(text: &str, default_user: &str) -> Result<Parsed, String> {
    if let Some(path) = text.strip_prefix("sqlite:") {
        return Ok(Parsed {
            database: Database::Sqlite(file(path, ACCEPTED)?),
            ignored: Vec::new(),
        });
    }
    let mut ignored = Vec::new();
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let (rewritten, ssl_mode) = if is_url {
        filter_url(text, &mut ignored)
    } else {
        filter_keywords(text, &mut ignored)?
    };
    refuse_tls(ssl_mode.as_deref())?;
    let mut config: postgres::Config = rewritten.parse().map_err(|error: postgres::Error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!(
            "{ACCEPTED}; {}",
            cause.unwrap_or_else(|| "this one cannot be read".into())
        )
    })?;
    config.ssl_mode(SslMode::Disable);
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        config.host("localhost");
    }
    if config.get_user().is_none() {
        config.user(default_user);
    }
    Ok(Parsed {
        database: Database::Postgres(Box::new(config)),
        ignored,
    })
}

/// `db.spool`.
///
/// # Errors
/// What it must be.
pub(super) fn spool(text: &str) -> Result<Option<PathBuf>, String> {
    const ACCEPTED: &str = "empty or sqlite:PATH";
    match text.strip_prefix("sqlite:") {
        Some(path) => file(path, ACCEPTED).map(Some),
        None if text.is_empty() => Ok(None),
        None => Err(ACCEPTED.into()),
    }
}

/// What follows `sqlite:`.
fn file(path: &str, accepted: &str) -> Result<PathBuf, String> {
    match path.strip_prefix("//").unwrap_or(path) {
        "" => Err(accepted.into()),
        ":memory:" => {
            Err("sqlite: with the path of a file: a queue in memory would not survive".into())
        }
        path => Ok(path.into()),
    }
}

fn refuse_tls(ssl_mode: Option<&str>) -> Result<(), String> {
    match ssl_mode {
        None | Some("disable" | "allow" | "prefer") => Ok(()),
        Some("require" | "verify-ca" | "verify-full") => Err(
            "without sslmode=require or above: this version has no TLS to Postgres; \
             use a private network or a unix socket with sslmode=disable"
                .into(),
        ),
        Some(_) => Err("with an sslmode of disable, allow or prefer".into()),
    }
}

/// Keeps the parameters of a URL that are known; returns `sslmode` apart.
fn filter_url(text: &str, ignored: &mut Vec<String>) -> (String, Option<String>) {
    let Some((base, query)) = text.split_once('?') else {
        return (text.to_owned(), None);
    };
    let mut ssl_mode = None;
    let kept: Vec<&str> = query
        .split('&')
        .filter(|parameter| {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            if key == "sslmode" {
                ssl_mode = Some(value.to_owned());
            }
            keep(key, ignored)
        })
        .collect();
    let separator = if kept.is_empty() { "" } else { "?" };
    (format!("{base}{separator}{}", kept.join("&")), ssl_mode)
}

/// The same for keywords.
fn filter_keywords(
    text: &str,
    ignored: &mut Vec<String>,
) -> Result<(String, Option<String>), String> {
    let mut ssl_mode = None;
    let mut kept = String::new();
    let mut rest = text.trim_start();
    if rest.is_empty() {
        return Err(ACCEPTED.into());
    }
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').ok_or(ACCEPTED)?;
        let key = key.trim_end();
        if key.is_empty()
            || !key
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        {
            return Err(ACCEPTED.into());
        }
        let (value, after) = value(after.trim_start())?;
        if key == "sslmode" {
            ssl_mode = Some(value.clone());
        }
        if keep(key, ignored) {
            let escaped = value.replace('\\', "\\\\").replace('\'', "\\'");
            kept.push_str(&format!("{key}='{escaped}' "));
        }
        rest = after.trim_start();
    }
    Ok((kept, ssl_mode))
}

fn keep(key: &str, ignored: &mut Vec<String>) -> bool {
    let is_known = KNOWN.contains(&key);
    if !is_known && !matches!(key, "sslmode" | "") {
        ignored.push(key.to_owned());
    }
    is_known
}

/// Reads one value as libpq does: bare up to white space, or in single quotes, with backslash
/// escapes in both. Returns it and what follows.
fn value(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let is_quoted = text.starts_with('\'');
    let mut characters = text.char_indices().skip(usize::from(is_quoted));
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if is_quoted => return Ok((value, &text[at + 1..])),
            _ if !is_quoted && character.is_whitespace() => return Ok((value, &text[at..])),
            _ => value.push(character),
        }
    }
    if is_quoted {
        return Err("a connection string whose quotes are closed".into());
    }
    Ok((value, ""))
}

/// The string made anew without the password, for showing: nothing of the original is quoted.
pub(super) fn masked(database: &Database) -> String {
    let config = match database {
        Database::Sqlite(path) => return format!("sqlite:{}", path.display()),
        Database::Postgres(config) => config,
    };
    let join = |parts: Vec<String>| parts.join(",");
    let mut shown = Vec::new();
    let hosts = config.get_hosts().iter().map(|host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    });
    let addresses = config.get_hostaddrs().iter().map(ToString::to_string);
    let ports = config.get_ports().iter().map(ToString::to_string);
    for (key, value) in [
        ("host", join(hosts.collect())),
        ("hostaddr", join(addresses.collect())),
        ("port", join(ports.collect())),
        ("user", config.get_user().unwrap_or_default().to_owned()),
        ("dbname", config.get_dbname().unwrap_or_default().to_owned()),
    ] {
        if !value.is_empty() {
            shown.push(format!("{key}={value}"));
        }
    }
    if config.get_password().is_some() {
        shown.push("password=<sensitive>".to_owned());
    }
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn postgres(text: &str) -> (postgres::Config, Vec<String>) {
        match parse(text, "me") {
            Ok(Parsed {
                database: Database::Postgres(config),
                ignored,
            }) => (*config, ignored),
            Ok(_) => panic!("{text} is not Postgres"),
            Err(error) => panic!("{text}: {error}"),
        }
    }

    #[test]
    fn sqlite_has_a_path() {
        for text in ["sqlite:a.sqlite", "sqlite:///var/lib/a.sqlite"] {
            assert!(matches!(
                parse(text, ""),
                Ok(Parsed {
                    database: Database::Sqlite(_),
                    ..
                })
            ));
        }
        for text in ["sqlite:", "sqlite::memory:"] {
            assert!(parse(text, "").is_err(), "{text}");
        }
    }

    #[test]
    fn the_go_programs_string_is_understood() {
        let (config, ignored) = postgres(
            "host=localhost port=5432 user=postgres password=postgres dbname=asyncproxy sslmode=disable binary_parameters=yes",
        );
        assert_eq!(config.get_hosts(), [Host::Tcp("localhost".into())]);
        assert_eq!(config.get_ports(), [5432]);
        assert_eq!(config.get_password(), Some(&b"postgres"[..]));
        assert_eq!(ignored, ["binary_parameters"]);
    }

    #[test]
    fn quotes_and_escapes_are_libpqs() {
        let (config, _) = postgres(r"user = 'a b' password='it\'s \\ x' dbname=c\ d host=''");
        assert_eq!(config.get_user(), Some("a b"));
        assert_eq!(config.get_password(), Some(&br"it's \ x"[..]));
        assert_eq!(config.get_dbname(), Some("c d"));
    }

    #[test]
    fn urls_lose_what_is_not_known() {
        let (config, ignored) = postgres(
            "postgres://u:p%40@h:1/d?binary_parameters=yes&connect_timeout=3&sslmode=prefer",
        );
        assert_eq!(config.get_password(), Some(&b"p@"[..]));
        assert_eq!(
            config
                .get_connect_timeout()
                .map(std::time::Duration::as_secs),
            Some(3)
        );
        assert_eq!(ignored, ["binary_parameters"]);
    }

    #[test]
    fn what_is_left_out_is_filled_in() {
        let (config, _) = postgres("dbname=a");
        assert_eq!(config.get_user(), Some("me"));
        assert_eq!(config.get_hosts(), [Host::Tcp("localhost".into())]);
    }

    #[test]
    fn errors_and_masks_never_show_a_password() {
        for text in [
            "host=h password=secret port=x",
            "password=secret",
            "password='secret",
            "secret",
            "=secret",
            "postgres://u:secret@h:x/d",
            "postgres://u:secret@h/d?sslmode=require",
            "host=h password=secret sslmode=verify-full",
            "host=h password=secret keepalives=secret",
            "",
        ] {
            match parse(text, "me") {
                Ok(parsed) => assert!(!masked(&parsed.database).contains("secret"), "{text}"),
                Err(error) => assert!(!error.contains("secret"), "{text}: {error}"),
            }
        }
        let shown = masked(
            &parse("postgres://u:secret@h:1/d", "")
                .unwrap_or_else(|error| panic!("{error}"))
                .database,
        );
        assert_eq!(shown, "host=h port=1 user=u dbname=d password=<sensitive>");
    }
}
