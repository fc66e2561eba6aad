//! What `--help` prints: of the program, and of each command. Which options there are for a
//! suggestion is read from these texts.

use lexopt::Arg;

use super::queue;

pub const PROGRAM: &str = "\
Answers HTTP requests at once and proxies each to its destination afterwards.

Usage:
  asyncproxy [--config PATH]                  run
  asyncproxy [--config PATH] --check-config [--quiet]
                                              print the effective settings, secrets masked
  asyncproxy [--config PATH] queue ...        look into the queue and change it
  asyncproxy demo [--seconds N]               see it work: proxy, sender and a destination that
                                              goes down for a while, all in this process
  asyncproxy [--config PATH] doctor [--json] [--deep]
                                              look at settings, machine, database and destination,
                                              and say how to mend what is wrong
  asyncproxy [--config PATH] migrate [--status] [--json] [--other-store]
                                              create or change the tables of db.connection_string,
                                              or with --status tell what is pending
  asyncproxy reload PID                       have the service PID read its settings again, and tell
                                              how that ended: for systemd's ExecReload=
  asyncproxy sink [--bind ADDR] [--status N] [--delay D]
                                              a destination for trying things out: prints
                                              what reaches it, answers N after D
  asyncproxy bench --url URL [--clients N] [--rate R] [--duration D] [--body FILE]
                                              a load generator: POSTs to URL for D, and
                                              prints rate, errors and latencies
  asyncproxy COMMAND --help                   what that command takes, with an example

Options:
  --config PATH    settings, in YAML                      [./config.yaml; for queue, doctor and
                   migrate else those of the service that runs here]
  --quiet          print only what is wrong with the settings
  -h, --help       this text
  -V, --version    the version

Each setting can be given as an environment variable, too: server.bind as SERVER_BIND.
LOG_COLOR=false keeps colours out of the log.

Exit status: 0 stopped, and nothing that was acknowledged is lost; 1 could not start or go on,
or lost something; 2 wrong arguments or settings.
";

const DEMO: &str = "\
Shows it at work in one process: a proxy, a sender of webhooks, and a destination that goes down
for a while and comes back. Leaves nothing behind.

Usage:
  asyncproxy demo [--seconds N]

Options:
  --seconds N      how long webhooks are sent, 8 to 3600  [15]
  -h, --help       this text

Example:
  asyncproxy demo --seconds 30

Exit status: 0 all was delivered; 1 not so, or could not start; 2 wrong arguments.
";

const DOCTOR: &str = "\
Looks at settings, machine, database and destination, and says how to mend what is wrong. Changes
nothing.

Usage:
  asyncproxy [--config PATH] doctor [--json] [--deep]

Options:
  --config PATH    settings, in YAML [./config.yaml, else those of the service that runs here]
  --json           print JSON
  --deep           read a SQLite file whole
  -h, --help       this text

Example:
  asyncproxy --config /etc/asyncproxy/config.yaml doctor

Exit status: 0 no errors; 1 errors; 2 wrong arguments or unreadable settings.
";

const MIGRATE: &str = "\
Creates or changes the tables of db.connection_string, for those who do not let services do that.

Usage:
  asyncproxy [--config PATH] migrate [--status] [--json] [--other-store]

Options:
  --config PATH    settings, in YAML [./config.yaml, else those of the service that runs here]
  --status         write nothing, tell what is pending
  --json           print JSON
  --other-store    go on though the running instance has another store than these settings
  -h, --help       this text

Example:
  asyncproxy migrate --status || asyncproxy migrate

Exit status: 0 done, or with --status nothing is pending; 1 the database cannot be used, or with
--status something is pending; 2 wrong arguments or settings.
";

const RELOAD: &str = "\
Has a service read its settings again, and tells how that ended. Only where systemd has given it a
directory at run time (RuntimeDirectory=).

Usage:
  asyncproxy reload PID

Options:
  -h, --help       this text

Example, in a unit:
  ExecReload=/usr/bin/asyncproxy reload $MAINPID

Exit status: 0 it has taken the settings over; 1 they are not valid and nothing has changed, or it
does not answer; 2 wrong arguments.
";

const SINK: &str = "\
A destination for trying things out: prints what reaches it, and answers.

Usage:
  asyncproxy sink [--bind ADDR] [--status N] [--delay D]

Options:
  --bind ADDR      host:port, or :port for all addresses  [:5000]
  --status N       status to answer with, 200 to 599      [200]
  --delay D        time before the answer: 500ms, 1m30s   [0s]
  -h, --help       this text

Example:
  asyncproxy sink --bind 127.0.0.1:5001 --status 503 --delay 2s

Exit status: 1 could not listen; 2 wrong arguments.
";

const BENCH: &str = "\
A load generator: POSTs to a URL for some time, and prints rate, errors and latencies.

Usage:
  asyncproxy bench --url URL [--clients N] [--rate R] [--duration D] [--body FILE]

Options:
  --url URL        where to send, with path and query
  --clients N      connections, 1 to 10000                [64]
  --rate R         requests a second over all clients, 0.001 to 1000000; latency counts
                   from when a request was due            [each sends when it was answered]
  --duration D     time in which requests are sent        [10s]
  --body FILE      body of each request, at most 64MiB    [1024 times x]
  -h, --help       this text

Example:
  asyncproxy bench --url http://localhost:8080/hook --rate 500 --duration 30s

Exit status: 0 each request that was due was sent and answered 2xx; 1 not so, or could not start;
2 wrong arguments.
";

const COMMANDS: [(&str, &str); 8] = [
    ("bench", BENCH),
    ("demo", DEMO),
    ("doctor", DOCTOR),
    ("help", PROGRAM),
    ("migrate", MIGRATE),
    ("queue", queue::HELP),
    ("reload", RELOAD),
    ("sink", SINK),
];

/// The text of a command, or of the program for what is none.
pub fn of(command: &str) -> &'static str {
    let found = COMMANDS.iter().find(|(name, _)| *name == command);
    found.map_or(PROGRAM, |(_, text)| text)
}

pub(super) fn is_command(name: &str) -> bool {
    COMMANDS.iter().any(|(command, _)| *command == name)
}

/// What is said of an argument that `command` does not take; of the program itself, if that is empty.
pub(super) fn unexpected(argument: Arg<'_>, command: &str) -> String {
    // Debug form of what is not ours to print: no control character gets through.
    let (what, meant) = match argument {
        Arg::Short(letter) => (format!("option {:?}", format!("-{letter}")), None),
        Arg::Long(name) => {
            let given = format!("--{name}");
            let meant = nearest(&given, options(of(command)));
            (format!("option {given:?}"), meant)
        }
        Arg::Value(value) => {
            let names = COMMANDS
                .iter()
                .map(|(name, _)| *name)
                .filter(|_| command.is_empty());
            let meant = value.to_str().and_then(|given| nearest(given, names));
            (format!("argument {value:?}"), meant)
        }
    };
    let meant = meant.map(|meant| format!(", did you mean {meant}?"));
    let space = if command.is_empty() { "" } else { " " };
    format!(
        "unexpected {what}{} See asyncproxy {command}{space}--help",
        meant.as_deref().unwrap_or(".")
    )
}

fn options(text: &str) -> impl Iterator<Item = &str> {
    let words =
        text.split(|character: char| !character.is_ascii_alphanumeric() && character != '-');
    words.filter(|word| word.len() > 2 && word.starts_with("--"))
}

/// Of what is known, that which was probably meant.
pub(super) fn nearest<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = |text: &str| text.trim_start_matches('-').len();
    known
        .map(|known| (strsim::damerau_levenshtein(known, given), known))
        .min()
        .filter(|(distance, known)| *distance <= 2 && *distance < name(known))
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_text_with_usage_options_and_an_example() {
        for (name, text) in COMMANDS.iter().filter(|(name, _)| *name != "help") {
            assert!(text.contains(&format!("{name} ")), "{name}");
            for part in ["Usage:\n", "Options:\n", "--help", "Exit status: "] {
                assert!(text.contains(part), "{name}: {part}");
            }
            assert!(text.contains("Example"), "{name}");
            assert!(text.lines().all(|line| line.len() <= 100), "{name}");
            assert!(PROGRAM.contains(&format!(" {name} ")), "{name}");
        }
    }

    #[test]
    fn what_was_probably_meant_is_said() {
        let said = |line: &str, command: &str| {
            let mut parser = lexopt::Parser::from_args([line]);
            unexpected(parser.next().unwrap().unwrap(), command)
        };
        for (argument, command, meant) in [
            ("queu", "", Some("queue")),
            ("docter", "", Some("doctor")),
            ("start", "", None),
            ("run", "", None),
            ("--confg", "", Some("--config")),
            ("--check-confg", "", Some("--check-config")),
            ("--jsno", "doctor", Some("--json")),
            ("--stat", "queue", Some("--state")),
            ("--verbose", "queue", None),
            ("-x", "queue", None),
            ("more", "doctor", None),
        ] {
            let said = said(argument, command);
            match meant {
                Some(meant) => assert!(said.contains(&format!("did you mean {meant}?")), "{said}"),
                None => assert!(!said.contains("did you mean"), "{said}"),
            }
            assert!(said.contains("--help"), "{said}");
        }
    }
}
