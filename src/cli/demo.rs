//! `asyncproxy demo`: the whole program at work, in one process: a sender of webhooks, the proxy with
//! a queue in a temporary directory, and a destination that goes down for a while.

mod destination;
mod ledger;
mod webhook;

use std::fmt::Display;
use std::fs::DirBuilder;
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::app::App;
use crate::config::{Config, RemoteUrl};
use crate::request;
use crate::settle::Outcome;
use crate::thread::Threads;
use crate::upstream::Upstream;
use destination::Destination;
use ledger::{Counts, Ledger};

pub const SECONDS: RangeInclusive<u64> = 8..=3600;
/// Webhooks a second: enough to see a queue, few enough to follow.
const PER_SECOND: u32 = 20;
const OUTAGE_SECONDS_MAX: u64 = 20;
/// How long what was sent is waited for after the last.
const PATIENCE_SECONDS: u64 = 60;
/// Longer than any answer takes here.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests for each `#`, and how many of these fit beside the figures.
const PER_MARK: usize = 8;
const MARKS_MAX: usize = 26;

/// What makes the outage visible within seconds.
const SHOWN_SETTINGS: &str = "\
proxy: {num_clients: 20, breaker_failures: 3}
queue: {workers: 20, handle_per_second: 200, backoff_min: 200ms, backoff_max: 1s}";

/// Options of `asyncproxy demo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demo {
    /// How long webhooks are sent; in [`SECONDS`].
    pub seconds: u64,
}

impl Default for Demo {
    fn default() -> Demo {
        Demo { seconds: 15 }
    }
}

impl Demo {
    /// The seconds after which the destination goes down, and comes back.
    fn outage(self) -> (u64, u64) {
        let quarter = self.seconds.div_ceil(4);
        (quarter, quarter + quarter.min(OUTAGE_SECONDS_MAX))
    }
}

/// Shows it, and returns whether all that was sent was answered and delivered.
///
/// # Errors
/// What the system refused: a directory, an address, a thread.
pub fn run(demo: Demo) -> io::Result<bool> {
    let threads = Threads::default();
    let signals = signals(&threads)?;
    let folder = Folder::create()?;
    let ledger = Arc::new(Ledger::default());
    let mut destination = Destination::new(Arc::clone(&ledger))?;
    destination.open(&threads)?;
    let yaml = yaml(&folder.0, &destination.url());
    let load = || Config::from_yaml(&yaml, &|_| None);
    let config = load().map_err(io::Error::other)?;
    let (stop, stopped) = bounded(1);
    let app = App::start(config, Threads::default(), stopped).map_err(io::Error::other)?;
    let (sending, stop_sending) = bounded(0);
    print_start(app.address(), &destination.url(), demo);
    start_sender(&threads, app.address(), &ledger, stop_sending)?;
    let mut show = Show {
        demo,
        threads,
        signals,
        ledger,
        destination,
        sending: Some(sending),
    };
    let is_whole = show.run()?;
    // Both ends are told of each webhook before this: what is left is to be stored and thrown away.
    let _ = stop.send(SIGTERM);
    app.run(&never(), &load).map_err(io::Error::other)?;
    print_summary(&show.ledger.counts(), is_whole);
    Ok(is_whole && show.ledger.counts().is_complete())
}

fn yaml(folder: &Path, destination: &str) -> String {
    // In quotes that JSON and YAML share: a temporary directory may have any name.
    let queue =
        serde_json::Value::from(format!("sqlite:{}", folder.join("queue.sqlite").display()));
    let proxy = format!("proxy: {{remote_url: '{destination}', ");
    SHOWN_SETTINGS.replace("proxy: {", &proxy)
        + &format!(
            "\nserver: {{bind: '127.0.0.1:0', shutdown_timeout: 2s}}\n\
             metrics: {{bind: '127.0.0.1:0'}}\n\
             db: {{connection_string: {queue}}}\n"
        )
}

fn signals(threads: &Threads) -> io::Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (sender, receiver) = bounded(1);
    threads.spawn("signals", move || {
        for signal in signals.forever() {
            // More signals than fit say nothing new.
            let _ = sender.try_send(signal);
        }
    })?;
    Ok(receiver)
}

/// A directory for this user's eyes only, gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn create() -> io::Result<Folder> {
        let name = format!("asyncproxy-demo-{}", request::new_id(SystemTime::now()));
        let path = std::env::temp_dir().join(name);
        let created = DirBuilder::new().mode(0o700).create(&path);
        created.map_err(|error| io::Error::other(format!("{path:?}: {error}")))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // It is in the system's directory for what may be thrown away.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Sends webhooks at an even rate until `stop` is closed.
fn start_sender(
    threads: &Threads,
    address: &str,
    ledger: &Arc<Ledger>,
    stop: Receiver<()>,
) -> io::Result<()> {
    let proxy = RemoteUrl::parse(&format!("http://{address}")).map_err(io::Error::other)?;
    let mut client = Upstream::new(proxy, ANSWER_TIMEOUT, None).client();
    let ledger = Arc::clone(ledger);
    threads.spawn("sender", move || {
        let start = Instant::now();
        for number in 0.. {
            let due = start + Duration::from_secs(1) * number / PER_SECOND;
            if stop.recv_deadline(due) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let Ok(webhook) = webhook::make(number as usize) else {
                return;
            };
            ledger.send();
            let began = Instant::now();
            let outcome = client.send(&webhook.request, 1);
            if matches!(
                outcome,
                Outcome::Answered {
                    status: 200..=299,
                    ..
                }
            ) {
                ledger.answered(webhook.id, began.elapsed());
            }
        }
    })
}

/// What happens meanwhile, second by second.
struct Show {
    demo: Demo,
    threads: Threads,
    signals: Receiver<i32>,
    ledger: Arc<Ledger>,
    destination: Destination,
    /// Dropped to stop the sender.
    sending: Option<Sender<()>>,
}

impl Show {
    /// Returns whether it came to its end: `false` after a signal.
    fn run(&mut self) -> io::Result<bool> {
        let start = Instant::now();
        let (down, up) = self.demo.outage();
        for second in 1..=self.demo.seconds + PATIENCE_SECONDS {
            let tick = start + Duration::from_secs(second);
            if self.signals.recv_deadline(tick).is_ok() {
                self.sending = None;
                return Ok(false);
            }
            let is_sending = self.sending.is_some();
            let counts = self.ledger.counts();
            print(tick_line(second, &counts));
            if second == down {
                print("-- the destination goes down: connections are refused --");
                self.destination.close();
            }
            if second == up {
                print(
                    "-- the destination is back; a probe will find out, then the queue drains --",
                );
                self.ledger.show_arrivals();
                self.destination.open(&self.threads)?;
            }
            if second == self.demo.seconds {
                print("-- nothing more is sent --");
                self.stop_sending(tick);
            }
            // As shown: the last line is the one that tells that all has arrived.
            if !is_sending && counts.waiting == 0 {
                break;
            }
        }
        Ok(true)
    }

    fn stop_sending(&mut self, now: Instant) {
        self.sending = None;
        self.threads.wait_for("sender", now + ANSWER_TIMEOUT);
    }
}

fn tick_line(second: u64, counts: &Counts) -> String {
    let Counts {
        sent,
        answered,
        delivered,
        waiting,
        ..
    } = counts;
    let marks = "#".repeat(waiting.div_ceil(PER_MARK).min(MARKS_MAX));
    let line = format!(
        "{second:>3} s  sent {sent:>4}  answered {answered:>4}  delivered {delivered:>4}  waiting {waiting:>4}  {marks}"
    );
    line.trim_end().to_owned()
}

fn print_start(proxy: &str, destination: &str, demo: Demo) {
    let (down, up) = demo.outage();
    print(format!(
        "A sender posts {PER_SECOND} webhooks a second to asyncproxy on {proxy}, which passes them on to\n\
         a destination on {destination}. It is down from second {down} to {up}.\n\
         {SHOWN_SETTINGS}\n"
    ));
}

fn print_summary(counts: &Counts, is_whole: bool) {
    let Counts {
        sent,
        answered,
        delivered,
        twice,
        slowest,
        waiting,
    } = counts;
    let left = match is_whole {
        true => format!("{waiting} lost"),
        false => format!("{waiting} still waited when it was interrupted"),
    };
    print(format!(
        "\n{sent} sent, {answered} answered 200, the slowest after {:.1} ms\n\
         {delivered} delivered, {twice} of them twice, {left}",
        slowest.as_secs_f64() * 1000.0,
    ));
}

fn print(line: impl Display) {
    let mut stdout = io::stdout().lock();
    // Nobody looks at it any more: the end comes soon.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outage_ends_before_the_end() {
        for seconds in SECONDS {
            let (down, up) = Demo { seconds }.outage();
            assert!(0 < down && down < up && up < seconds, "{seconds}");
        }
        assert_eq!(Demo::default().outage(), (4, 8));
    }

    #[test]
    fn its_settings_are_accepted() {
        let folder = Path::new("/tmp/a: 'b' \"c\"");
        let config = Config::from_yaml(&yaml(folder, "http://127.0.0.1:1"), &|_| None).unwrap();
        let crate::config::Database::Sqlite(path) = config.db.database else {
            panic!("not SQLite");
        };
        assert_eq!(path, folder.join("queue.sqlite"));
        assert_eq!(config.proxy.breaker_failures, 3);
    }

    #[test]
    fn lines_fit_a_terminal() {
        let counts = Counts {
            sent: 9999,
            answered: 9999,
            waiting: 9999,
            ..Counts::default()
        };
        let line = tick_line(100, &counts);
        assert!(line.len() <= 100 && line.ends_with("##"), "{line}");
        let idle = tick_line(1, &Counts::default());
        assert!(idle.ends_with("waiting    0"), "{idle}");
    }
}
