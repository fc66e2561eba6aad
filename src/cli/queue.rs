//! `asyncproxy queue`: looks into a queue and changes it, beside the instances that serve it.

mod act;
mod credentials;
mod curl;
mod filter;
mod show;
mod state;
mod transfer;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use lexopt::{Arg, Parser};
use uuid::Uuid;

use super::help::{nearest, unexpected};
use super::instance::{self, OtherStore};
use super::{Failure, next, text, value};
use crate::app::visited_store;
use crate::config::Config;
use crate::queue::operate::{Action, Filter, Operate};

pub const HELP: &str = "\
Looks into the queue and changes it. Takes the settings of the program; it may run meanwhile.

Usage:
  asyncproxy queue status                   what waits, how fast it moves, when it will be empty
  asyncproxy queue ls [FILTER] [--limit N]  one line for each request, by arrival
  asyncproxy queue show ID [--body | --curl] [--show-credentials]
                                            one request; its body as it is; as a curl command
  asyncproxy queue retry [ID ...] [FILTER] [--all] [--dry-run]
                                            makes requests due at once; without --state, dead
                                            letters: they go back, and their attempts begin anew
  asyncproxy queue drop [ID ...] [FILTER] [--all] [--dry-run]
                                            deletes requests for good
  asyncproxy queue bury [ID ...] [FILTER] [--all] [--dry-run]
                                            moves waiting requests to the dead letters
  asyncproxy queue pause | resume           no instance sends anything, until resumed
  asyncproxy queue export [FILTER] [--output FILE]
                                            all requests, as lines of JSON
  asyncproxy queue import [FILE]            takes in what export wrote; what is there stays

Requests that are being sent are left alone by retry, drop and bury.

Filters (all that are given must hold):
  --state S        waiting, leased (being sent) or dead
  --older-than D   received longer ago than this: 90s, 15m, 2h, 7d
  --newer-than D   received not longer ago than this
  --path PREFIX    the target begins so
  --status N       status of the last attempt; none: it got no answer

Options:
  --config PATH    settings, in YAML [./config.yaml, else those of the service that runs here]
  --limit N        lines of ls, 0 for all                 [50]
  --all            without ids or filter: every request
  --dry-run        only count
  --other-store    go on though the running instance has another store than these settings
  --json           print JSON: for ls one object a line
  -h, --help       this text

Example:
  asyncproxy queue retry --state dead --status 503 --newer-than 2h --dry-run

Exit status: 0 done; 1 the database cannot be used, or a request is not there; 2 wrong arguments
or settings.
";

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    pub config: Option<PathBuf>,
    verb: Verb,
    is_json: bool,
    other_store: OtherStore,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verb {
    Status,
    List {
        filter: Filter,
        limit: usize,
    },
    Show {
        id: Uuid,
        form: Form,
        has_credentials: bool,
    },
    Act {
        action: Action,
        selection: Selection,
        is_dry_run: bool,
    },
    Pause(bool),
    Export {
        filter: Filter,
        output: Option<PathBuf>,
    },
    Import(Option<PathBuf>),
}

/// How a request is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Body,
    Curl,
}

/// Which requests something is done to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Selection {
    Ids(Vec<Uuid>),
    Filter(Filter),
}

/// All that can be given.
#[derive(Default)]
struct Arguments {
    config: Option<PathBuf>,
    verb: Option<String>,
    values: Vec<String>,
    filter: filter::Parts,
    flags: Vec<&'static str>,
    limit: Option<usize>,
    output: Option<PathBuf>,
}

const VERBS: [&str; 10] = [
    "status", "ls", "show", "retry", "drop", "bury", "pause", "resume", "export", "import",
];

/// The flags, and the verbs that know them.
const FLAGS: [(&str, &[&str]); 7] = [
    ("other-store", &VERBS),
    (
        "json",
        &[
            "status", "ls", "show", "retry", "drop", "bury", "pause", "resume", "import",
        ],
    ),
    ("body", &["show"]),
    ("curl", &["show"]),
    ("show-credentials", &["show"]),
    ("all", &["retry", "drop", "bury"]),
    ("dry-run", &["retry", "drop", "bury"]),
];

/// Understands what follows `queue`. `None`: the help is wanted.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(parser: &mut Parser) -> Result<Option<Queue>, String> {
    let mut given = Arguments::default();
    while let Some(argument) = next(parser)? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            Arg::Long("config") => given.config = Some(value(parser)?.into()),
            Arg::Long("limit") => {
                let limit = text(parser)?.parse();
                given.limit = Some(limit.map_err(|_| "--limit: must be a whole number")?);
            }
            Arg::Long("output") => given.output = Some(value(parser)?.into()),
            Arg::Long(name) if filter::NAMES.contains(&name) => {
                let name = name.to_owned();
                let value = text(parser)?;
                given.filter.set(&name, &value)?;
            }
            Arg::Long(name) => match FLAGS.iter().find(|(flag, _)| *flag == name) {
                Some((flag, _)) => given.flags.push(flag),
                None => return Err(unexpected(Arg::Long(name), "queue")),
            },
            Arg::Value(value) => {
                let value = value
                    .into_string()
                    .map_err(|value| format!("{value:?} is no text"))?;
                match given.verb {
                    None => given.verb = Some(value),
                    Some(_) => given.values.push(value),
                }
            }
            other @ Arg::Short(_) => return Err(unexpected(other, "queue")),
        }
    }
    understand(given).map(Some)
}

fn understand(given: Arguments) -> Result<Queue, String> {
    let verb = given
        .verb
        .as_deref()
        .ok_or("queue: what? See asyncproxy queue --help")?;
    let has = |flag| given.flags.contains(&flag);
    check(&given, verb)?;
    let verb = match verb {
        "status" => Verb::Status,
        "ls" => Verb::List {
            filter: given.filter.filter()?,
            limit: match given.limit.unwrap_or(50) {
                0 => usize::MAX,
                limit => limit,
            },
        },
        "show" => Verb::Show {
            id: match given.values.as_slice() {
                [id] => parse_id(id)?,
                _ => return Err("queue show: needs one id".into()),
            },
            form: match (has("body"), has("curl")) {
                (true, true) => return Err("queue show: either --body or --curl".into()),
                (true, false) => Form::Body,
                (false, true) => Form::Curl,
                (false, false) => Form::Text,
            },
            has_credentials: has("show-credentials"),
        },
        "retry" => act(Action::Retry, &given)?,
        "drop" => act(Action::Drop, &given)?,
        "bury" => act(Action::Bury, &given)?,
        "pause" => Verb::Pause(true),
        "resume" => Verb::Pause(false),
        "export" => Verb::Export {
            filter: given.filter.filter()?,
            output: given.output.clone(),
        },
        "import" => match given.values.as_slice() {
            [] => Verb::Import(None),
            [path] => Verb::Import(Some(path.into())),
            _ => return Err("queue import: takes one file".into()),
        },
        other => {
            let meant = nearest(other, VERBS.into_iter());
            let meant = meant.map(|meant| format!("; did you mean {meant}?"));
            return Err(format!(
                "queue: unknown command {other:?}, must be status, ls, show, retry, drop, bury, \
                 pause, resume, export or import{}",
                meant.unwrap_or_default()
            ));
        }
    };
    Ok(Queue {
        is_json: has("json"),
        other_store: match has("other-store") {
            true => OtherStore::Use,
            false => OtherStore::Refuse,
        },
        config: given.config.clone(),
        verb,
    })
}

/// Whether a command takes all that was given.
fn check(given: &Arguments, verb: &str) -> Result<(), String> {
    let takes_filter = matches!(verb, "ls" | "retry" | "drop" | "bury" | "export");
    let takes_values = matches!(verb, "show" | "retry" | "drop" | "bury" | "import");
    let unknown = |what: &str| {
        Err(format!(
            "queue {verb}: does not take {what}, see asyncproxy queue --help"
        ))
    };
    for flag in &given.flags {
        let (_, verbs) = FLAGS.iter().find(|(name, _)| name == flag).ok_or("")?;
        if !verbs.contains(&verb) {
            return unknown(&format!("--{flag}"));
        }
    }
    if !takes_filter && let Some(name) = given.filter.first() {
        return unknown(&format!("--{name}"));
    }
    if !takes_values && let Some(value) = given.values.first() {
        return unknown(&format!("{value:?}"));
    }
    if given.limit.is_some() && verb != "ls" {
        return unknown("--limit");
    }
    if given.output.is_some() && verb != "export" {
        return unknown("--output");
    }
    Ok(())
}

fn act(action: Action, given: &Arguments) -> Result<Verb, String> {
    let verb = given.verb.as_deref().unwrap_or_default();
    let filter = given.filter.filter()?;
    let is_all = given.flags.contains(&"all");
    let has_filter = given.filter.first().is_some();
    let selection = match (given.values.as_slice(), has_filter, is_all) {
        ([], false, false) => {
            return Err(format!("queue {verb}: needs ids, a filter, or --all"));
        }
        ([], ..) => Selection::Filter(act::preset(action, filter, is_all)?),
        (ids, false, false) => {
            let ids: Result<Vec<Uuid>, String> = ids.iter().map(|id| parse_id(id)).collect();
            Selection::Ids(ids?)
        }
        _ => return Err(format!("queue {verb}: either ids, or a filter or --all")),
    };
    Ok(Verb::Act {
        action,
        selection,
        is_dry_run: given.flags.contains(&"dry-run"),
    })
}

fn parse_id(text: &str) -> Result<Uuid, String> {
    Uuid::parse_str(text)
        .map_err(|_| format!("{text:?} is no id, such as 01a207b7-e515-7429-b231-ee29857c0400"))
}

/// Carries it out.
///
/// # Errors
/// [`Failure`].
pub fn run(queue: &Queue, config: &Config, output: &mut dyn Write) -> Result<(), Failure> {
    let store: Arc<dyn Operate> = visited_store(config);
    let store = &*store;
    let instance = instance::agree(config, store, queue.other_store)?;
    match &queue.verb {
        Verb::Status => state::print(
            store,
            instance.map(|found| found.status),
            queue.is_json,
            output,
        ),
        Verb::List { filter, limit } => show::list(store, filter, *limit, queue.is_json, output),
        Verb::Show {
            id,
            form,
            has_credentials,
        } => {
            let row = store.find(*id)?.ok_or_else(|| not_found(*id))?;
            let shown = show::Shown {
                row: &row,
                has_credentials: *has_credentials,
            };
            match form {
                Form::Text => shown.print(queue.is_json, output),
                Form::Body => shown.print_body(store, output),
                Form::Curl => shown.print_curl(store, &config.proxy, output),
            }
        }
        Verb::Act {
            action,
            selection,
            is_dry_run,
        } => act::run(
            store,
            *action,
            selection,
            *is_dry_run,
            queue.is_json,
            output,
        ),
        Verb::Pause(is_paused) => {
            let is_new = store.set_paused(*is_paused)?;
            state::print_pause(*is_paused, is_new, queue.is_json, output)
        }
        Verb::Export {
            filter,
            output: path,
        } => transfer::export(store, filter, path.as_deref(), output),
        Verb::Import(path) => transfer::import(store, path.as_deref(), queue.is_json, output),
    }
}

fn not_found(id: Uuid) -> Failure {
    Failure::Failed(format!(
        "{id}: neither in the queue nor among the dead letters; if it was there, it has been delivered"
    ))
}
