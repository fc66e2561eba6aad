//! `db.connection_string`: `sqlite:PATH`, a Postgres URL, or libpq keywords.

use std::path::PathBuf;
use std::sync::Arc;

use postgres::config::{Host, SslMode, TargetSessionAttrs};

use super::ssl::Ssl;
use crate::tls::ClientConfig;

/// The store that a connection string names.
#[derive(Debug)]
pub enum Database {
    Sqlite(PathBuf),
    Postgres(Box<PostgresServer>),
}

impl Database {
    /// Whether the connection string holds a password.
    pub(super) fn has_password(&self) -> bool {
        match self {
            Database::Sqlite(_) => false,
            Database::Postgres(server) => server.config.get_password().is_some(),
        }
    }
}

/// A Postgres server and how to speak to it.
#[derive(Debug, Clone)]
pub struct PostgresServer {
    pub config: postgres::Config,
    /// For all connections; `None`: plain ones.
    pub tls: Option<Arc<ClientConfig>>,
}

impl std::str::FromStr for PostgresServer {
    type Err = String;

    fn from_str(text: &str) -> Result<PostgresServer, String> {
        match parse(text, "postgres")?.database {
            Database::Postgres(server) => Ok(*server),
            Database::Sqlite(_) => Err("a Postgres URL or libpq keywords".into()),
        }
    }
}

/// Keywords of libpq that the client library knows. `sslmode` and its like are dealt with in `ssl`.
const KNOWN: [&str; 17] = [
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
    "channel_binding",
];

/// Those of libpq and other clients that mean nothing here.
const IGNORED: [&str; 27] = [
    "binary_parameters",
    "client_encoding",
    "datestyle",
    "disable_prepared_binary_result",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "krbsrvname",
    "passfile",
    "replication",
    "require_auth",
    "requirepeer",
    "requiressl",
    "search_path",
    "service",
    "servicefile",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslinline",
    "sslpassword",
    "sslsni",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "timezone",
];

const ACCEPTED: &str = "sqlite:PATH, a URL such as postgres://user:password@host/dbname, \
                        or libpq keywords such as host=localhost user=postgres dbname=asyncproxy";

/// What a connection string says, and the keywords in it that are ignored.
pub(super) struct Parsed {
    pub(super) database: Database,
    pub(super) ignored: Vec<String>,
    /// `sslkey`.
    pub(super) key_file: Option<PathBuf>,
}

/// What was seen of a string's keywords.
#[derive(Debug, Default)]
struct Keywords {
    ignored: Vec<String>,
    /// `target_session_attrs` is among them.
    has_target: bool,
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
            key_file: None,
        });
    }
    let mut keywords = Keywords::default();
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let (rewritten, ssl) = if is_url {
        check_encoding(text)?;
        filter_url(text, &mut keywords)
    } else {
        filter_keywords(text, &mut keywords)?
    };
    let key_file = ssl.key_file();
    let (ssl_mode, tls) = ssl.resolve()?;
    let mut config: postgres::Config = rewritten.parse().map_err(|error: postgres::Error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!(
            "{ACCEPTED}; {}",
            cause.unwrap_or_else(|| "this one cannot be read".into())
        )
    })?;
    set_hosts(&mut config);
    // Of several hosts all but one are standbys: whoever says nothing means the one that writes.
    if config.get_hosts().len() > 1 && !keywords.has_target {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    let is_local = |host: &Host| matches!(host, Host::Unix(_));
    // Nobody listens in on a unix socket: libpq disregards the mode there.
    let is_plain = config.get_hosts().iter().all(is_local);
    config.ssl_mode(if is_plain { SslMode::Disable } else { ssl_mode });
    if config.get_user().is_none() {
        config.user(default_user);
    }
    Ok(Parsed {
        database: Database::Postgres(Box::new(PostgresServer { config, tls })),
        ignored: keywords.ignored,
        key_file,
    })
}

/// Gives each address a name: TLS verifies the address itself if there is no other.
fn set_hosts(config: &mut postgres::Config) {
    if !config.get_hosts().is_empty() {
        return;
    }
    let addresses: Vec<String> = config
        .get_hostaddrs()
        .iter()
        .map(ToString::to_string)
        .collect();
    if addresses.is_empty() {
        config.host("localhost");
    }
    for address in addresses {
        config.host(&address);
    }
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
        path => Ok(followed(path.into())),
    }
}

/// The file itself where a symbolic link leads to one: what lies beside it, such as its log and its
/// lock, has its name.
fn followed(path: PathBuf) -> PathBuf {
    match path.is_symlink() {
        true => path.canonicalize().unwrap_or(path),
        false => path,
    }
}

/// Refuses a URL that could be read in two ways: its password would be taken for a host, which is
/// asked and shown. An `@` stands for itself only before the host.
fn check_encoding(url: &str) -> Result<(), String> {
    const MUST_BE: &str = "a URL in which one @ at most, that before the host, and no # stands for itself: \
        in user, password and all else write %40 for @, %23 for #, %2F for /, %3F for ?, %3A for : and %25 \
        for %; or libpq keywords with the password in single quotes, which needs no such encoding";
    let (_, rest) = url.split_once("://").unwrap_or_default();
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, after) = rest.split_at(end);
    let is_clear =
        authority.matches('@').count() <= 1 && !after.contains('@') && !rest.contains('#');
    is_clear.then_some(()).ok_or_else(|| MUST_BE.to_owned())
}

/// Keeps the parameters of a URL that are known; returns `sslmode` and its like apart.
fn filter_url(text: &str, keywords: &mut Keywords) -> (String, Ssl) {
    let mut ssl = Ssl::default();
    let Some((base, query)) = text.split_once('?') else {
        return (text.to_owned(), ssl);
    };
    let kept: Vec<&str> = query
        .split('&')
        .filter(|parameter| {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            !ssl.take(key, &percent_decoded(value)) && keep(key, keywords)
        })
        .collect();
    let separator = if kept.is_empty() { "" } else { "?" };
    (format!("{base}{separator}{}", kept.join("&")), ssl)
}

/// What is no escape stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = (first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() {
            &after[2..]
        } else {
            after
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The same for keywords.
fn filter_keywords(text: &str, keywords: &mut Keywords) -> Result<(String, Ssl), String> {
    let mut ssl = Ssl::default();
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
        if !ssl.take(key, &value) && keep(key, keywords) {
            let escaped = value.replace('\\', "\\\\").replace('\'', "\\'");
            kept.push_str(&format!("{key}='{escaped}' "));
        }
        rest = after.trim_start();
    }
    Ok((kept, ssl))
}

fn keep(key: &str, keywords: &mut Keywords) -> bool {
    keywords.has_target |= key == "target_session_attrs";
    let is_known = KNOWN.contains(&key);
    if !is_known && !key.is_empty() {
        keywords.ignored.push(shown(key));
    }
    is_known
}

/// The name of a keyword that is ignored. One that nobody knows may be a part of the password: what
/// follows white space in it, or a `&`.
fn shown(key: &str) -> String {
    if IGNORED.contains(&key.to_ascii_lowercase().as_str()) {
        return key.to_owned();
    }
    let names = KNOWN
        .into_iter()
        .chain(["sslmode", "sslrootcert", "sslcert", "sslkey"]);
    let near = names
        .map(|name| (strsim::damerau_levenshtein(name, key), name))
        .min()
        .filter(|(distance, _)| *distance <= 2);
    match near {
        Some((_, name)) => format!("a keyword that is not known (did you mean {name}?)"),
        None => {
            "a keyword that is not known, and not shown, as it may be of the password: in libpq \
                 keywords put that in single quotes, in a URL write %26 for &"
                .to_owned()
        }
    }
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
        Database::Postgres(server) => &server.config,
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
                database: Database::Postgres(server),
                ignored,
                ..
            }) => (server.config, ignored),
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
    fn a_url_that_can_be_read_in_two_ways_is_refused_without_a_part_of_it() {
        for password in [
            "p@ss",
            "p@ss/w#rd",
            "pa/ss@x",
            "pa?ss@",
            "12?ss",
            "12/ss",
            "pa#ss",
            "@",
            "@@",
            "a:b@c",
            "[::1]@",
        ] {
            for url in [
                format!("postgres://alice:{password}@host:5432/orders?sslmode=disable"),
                format!("postgresql://{password}:secret@host/orders"),
                format!("postgres://alice:{password}@host"),
            ] {
                let error = parse(&url, "me").map(|_| ()).unwrap_err();
                assert!(error.contains("%40 for @"), "{url}: {error}");
                for part in ["ss", "alice", "host:", "12", "[::1]", "w#rd", "orders"] {
                    let shown = error.replace("password", "").replace("pass", "");
                    assert!(!shown.contains(part), "{url}, {part}: {error}");
                }
            }
        }
        let encoded = "postgres://alice:p%40ss%2Fw%23rd%3F%3A%25@host/orders?options=%40";
        let (config, _) = postgres(encoded);
        assert_eq!(config.get_password(), Some(&b"p@ss/w#rd?:%"[..]));
        assert_eq!(config.get_hosts(), [Host::Tcp("host".into())]);
        // No password, several hosts, a socket's directory.
        for url in [
            "postgres://host/orders",
            "postgres://a:1,b:2/orders",
            "postgres://u@%2Frun/n",
            "postgres:///n",
        ] {
            postgres(url);
        }
    }

    #[test]
    fn an_ignored_keyword_is_named_only_if_it_is_no_part_of_a_password() {
        for (text, named) in [
            ("password=my secret=hush host=a", None),
            ("postgres://u:p@h/d?password=a&hush=1", None),
            ("host=a sslmod=require", Some("sslmode")),
            ("host=a hots=b", Some("host")),
            ("host=a sslcrl=x", Some("sslcrl")),
            ("host=a TimeZone=UTC", Some("TimeZone")),
        ] {
            let (_, ignored) = postgres(text);
            let [told] = ignored.as_slice() else {
                panic!("{text}: {ignored:?}")
            };
            match named {
                Some(name) => assert!(told.contains(name), "{text}: {told}"),
                None => assert!(
                    !told.contains("secret") && !told.contains("hush"),
                    "{text}: {told}"
                ),
            }
        }
    }

    #[test]
    fn what_is_left_out_is_filled_in() {
        let (config, _) = postgres("dbname=a");
        assert_eq!(config.get_user(), Some("me"));
        assert_eq!(config.get_hosts(), [Host::Tcp("localhost".into())]);
    }

    #[test]
    fn of_several_hosts_the_one_that_writes_is_meant_unless_it_is_said() {
        use TargetSessionAttrs::{Any, ReadOnly, ReadWrite};
        for (text, expected) in [
            ("host=a", Any),
            ("host=a target_session_attrs=read-write", ReadWrite),
            ("host=a,b", ReadWrite),
            (
                "hostaddr=192.0.2.1,192.0.2.2 password='x target_session_attrs=any'",
                ReadWrite,
            ),
            ("host=a,b target_session_attrs = any", Any),
            ("host=a,b target_session_attrs='read-only'", ReadOnly),
            ("postgres://u@a,b/d", ReadWrite),
            (
                "postgres://u@a:1,b:2/d?connect_timeout=3&target_session_attrs=any",
                Any,
            ),
            ("postgres://u@a/d", Any),
        ] {
            assert_eq!(
                postgres(text).0.get_target_session_attrs(),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn sslmodes_are_libpqs() {
        let modes = [
            ("disable", SslMode::Disable),
            ("allow", SslMode::Prefer),
            ("prefer", SslMode::Prefer),
            ("require", SslMode::Require),
        ];
        for (mode, expected) in modes {
            if cfg!(not(feature = "tls")) && mode != "disable" {
                continue;
            }
            let keywords = format!("host=h sslmode={mode}");
            assert_eq!(postgres(&keywords).0.get_ssl_mode(), expected, "{keywords}");
            let url = format!("postgres://h/d?sslmode={mode}");
            assert_eq!(postgres(&url).0.get_ssl_mode(), expected, "{url}");
        }
        let (local, _) = postgres("host=/run/postgresql sslmode=prefer");
        assert_eq!(local.get_ssl_mode(), SslMode::Disable);
        let (addressed, _) = postgres("hostaddr=127.0.0.1");
        assert_eq!(addressed.get_hosts(), [Host::Tcp("127.0.0.1".into())]);
        assert_eq!(percent_decoded("%2Fa%zz%"), "/a%zz%");
    }

    #[test]
    fn what_tls_cannot_use_is_refused() {
        for (text, telling) in [
            ("sslmode=sometimes", "disable, allow"),
            ("sslmode=verify-ca", "sslrootcert=PATH"),
            ("sslmode=verify-full", "sslrootcert=PATH"),
            ("sslmode=require sslrootcert=system", "verify-full"),
            ("sslmode=require sslrootcert=/no/such", "/no/such"),
            ("sslmode=require sslrootcert=/dev/null", "no certificate"),
            ("sslmode=require sslcert=/a", "both of"),
        ] {
            let text = format!("host=h password=secret {text}");
            let error = parse(&text, "me").map(|_| ()).unwrap_err();
            let telling =
                match cfg!(feature = "tls") || text.contains("some") || text.contains("system") {
                    true => telling,
                    false => "this build has no TLS",
                };
            assert!(error.contains(telling), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
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
