//! The clients: threads that send and count, each with one connection, and the wait for them.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, select};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Bench;
use super::report::{Report, Tally, per_second};
use super::schedule::Schedule;
use crate::descriptors;
use crate::printable;
use crate::request::{self, Request};
use crate::thread::Threads;
use crate::upstream::Upstream;

/// A request that has no answer by then has none. Longer than any sender of webhooks waits.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long answers are waited for after that, and after a signal.
const LAST_ANSWERS: Duration = Duration::from_secs(5);
const LAST_ANSWERS_INTERRUPTED: Duration = Duration::from_secs(2);
/// From when all clients are there to when the first request is due: time for them to wait for it.
const HEAD_START: Duration = Duration::from_millis(50);
/// Bounds the memory of latencies; so many clients have a tally for themselves.
const TALLIES_MAX: usize = 64;
/// How often the end is looked for.
const LOOK: Duration = Duration::from_millis(50);
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// Columns a progress line is padded to, to cover the one before it.
const PROGRESS_COLUMNS: usize = 70;
const CLIENTS: &str = "client-";

/// What the clients share.
struct Load {
    request: Request,
    upstream: Upstream,
    /// `None`: closed loop.
    schedule: Option<Schedule>,
    duration: Duration,
    start: OnceLock<Instant>,
    /// Of the open loop: the number of the next request.
    next: AtomicU64,
    /// Disconnected: stop.
    stop: Receiver<()>,
    tallies: Vec<Mutex<Tally>>,
}

/// A client's turn to send.
struct Turn {
    /// Latency counts from here.
    due: Instant,
    is_late: bool,
}

/// Sends until the duration is over or a signal comes.
///
/// # Errors
/// The system's, when it gives not enough threads or open files.
pub fn run(bench: Bench) -> io::Result<Report> {
    raise_limit(bench.clients)?;
    let threads = Threads::default();
    let signals = signals(&threads)?;
    let (stop, stopped) = bounded(1);
    let tls = crate::tls::for_system(&bench.remote.scheme).map_err(io::Error::other)?;
    let load = Arc::new(Load {
        request: bench.request,
        upstream: Upstream::new(bench.remote, REQUEST_TIMEOUT, tls),
        schedule: bench.rate.map(|rate| Schedule::new(rate, bench.duration)),
        duration: bench.duration,
        start: OnceLock::new(),
        next: AtomicU64::new(0),
        stop: stopped,
        tallies: (0..bench.clients.min(TALLIES_MAX))
            .map(|_| Mutex::new(Tally::new()))
            .collect(),
    });
    for number in 0..bench.clients {
        let load = Arc::clone(&load);
        threads.spawn(format!("{CLIENTS}{number}"), move || load.client(number))?;
    }
    let start = *load.start.get_or_init(|| Instant::now() + HEAD_START);
    let ended_at = load.wait(start, &threads, &signals, stop);
    Ok(load.report(ended_at.saturating_duration_since(start)))
}

fn raise_limit(clients: usize) -> io::Result<()> {
    descriptors::raise_for_clients(clients as u64).map_err(|fitting| {
        io::Error::other(format!(
            "{} would need more open files than the limit (ulimit -Hn) allows: \
             raise it, or use at most {fitting} --clients",
            printable::count(clients as u64, "client")
        ))
    })
}

fn signals(threads: &Threads) -> io::Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (sender, receiver) = bounded(8);
    threads.spawn("signals", move || {
        for signal in signals.forever() {
            // More signals than fit say nothing new.
            let _ = sender.try_send(signal);
        }
    })?;
    Ok(receiver)
}

impl Load {
    fn client(&self, number: usize) {
        let start = *self.start.wait();
        let tally = &self.tallies[number % self.tallies.len()];
        let mut client = self.upstream.client();
        // In the open loop, the first requests are taken before they are due, as all others.
        if self.schedule.is_none() && !self.wait_until(start) {
            return;
        }
        while let Some(turn) = self.turn(start) {
            {
                let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.sent += 1;
                tally.late += u64::from(turn.is_late);
            }
            let id = request::new_id(SystemTime::now());
            let outcome = client.send_as(id, &self.request, 1);
            let latency = turn.due.elapsed();
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally.record(outcome, latency);
        }
    }

    /// Waits for this client's next turn; `None` at the end.
    fn turn(&self, start: Instant) -> Option<Turn> {
        let now = Instant::now();
        if now >= start + self.duration || self.is_stopped() {
            return None;
        }
        let Some(schedule) = &self.schedule else {
            return Some(Turn {
                due: now,
                is_late: false,
            });
        };
        // Taken before it is due if a client is free: then it is sent, however late this thread
        // wakes up.
        let due = start + schedule.due(self.next.fetch_add(1, Ordering::Relaxed))?;
        let turn = Turn {
            due,
            is_late: due < now,
        };
        self.wait_until(due).then_some(turn)
    }

    /// Returns whether to go on.
    fn wait_until(&self, due: Instant) -> bool {
        if due <= Instant::now() {
            return !self.is_stopped();
        }
        self.stop.recv_deadline(due) == Err(RecvTimeoutError::Timeout)
    }

    fn is_stopped(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Waits for the clients and returns when they stopped to send. The first signal stops them,
    /// and they get a moment for the answers they wait for; the second ends the wait.
    fn wait(
        &self,
        start: Instant,
        threads: &Threads,
        signals: &Receiver<i32>,
        stop: Sender<()>,
    ) -> Instant {
        let mut stop = Some(stop);
        let mut ended_at = start + self.duration;
        let mut give_up_at = ended_at + REQUEST_TIMEOUT + LAST_ANSWERS;
        let mut progress = Progress::new(start);
        while !threads.all_ended(CLIENTS) && Instant::now() < give_up_at {
            select! {
                recv(signals) -> _ => {
                    if stop.take().is_none() {
                        break;
                    }
                    ended_at = ended_at.min(Instant::now());
                    give_up_at = Instant::now() + LAST_ANSWERS_INTERRUPTED;
                }
                recv(threads.ended()) -> _ => {}
                default(LOOK) => {}
            }
            progress.show(|| self.sum(Tally::add_counts));
        }
        progress.clear();
        ended_at
    }

    fn sum(&self, add: fn(&mut Tally, &Tally)) -> Tally {
        let mut sum = Tally::new();
        for tally in &self.tallies {
            add(
                &mut sum,
                &tally.lock().unwrap_or_else(PoisonError::into_inner),
            );
        }
        sum
    }

    fn report(&self, sending: Duration) -> Report {
        let taken = self.next.load(Ordering::Relaxed);
        Report {
            tally: self.sum(Tally::add),
            sending,
            unsent: self
                .schedule
                .map(|schedule| schedule.due_before(sending).saturating_sub(taken)),
        }
    }
}

/// A line on the terminal, rewritten once a second. Nothing if stderr is none.
struct Progress {
    start: Instant,
    next_at: Option<Instant>,
}

impl Progress {
    fn new(start: Instant) -> Progress {
        let is_shown = io::stderr().is_terminal();
        Progress {
            start,
            next_at: is_shown.then_some(start + PROGRESS_EVERY),
        }
    }

    fn show(&mut self, tally: impl FnOnce() -> Tally) {
        let now = Instant::now();
        if let Some(next_at) = &mut self.next_at
            && *next_at <= now
        {
            *next_at = now + PROGRESS_EVERY;
            write_over(&progress_line(&tally(), now - self.start));
        }
    }

    fn clear(&self) {
        if self.next_at.is_some() {
            write_over("");
            write_over("");
        }
    }
}

fn progress_line(tally: &Tally, elapsed: Duration) -> String {
    let answered = tally.answered();
    format!(
        "{} s: sent {}, answered {answered}, errors {}, {:.0} answers a second",
        elapsed.as_secs(),
        tally.sent,
        tally.failed(),
        per_second(answered, elapsed)
    )
}

/// Leaves the cursor at the line's beginning, where the next text goes.
fn write_over(line: &str) {
    let mut stderr = io::stderr().lock();
    // Nobody looks at it any more: go on.
    let _ = write!(stderr, "{line:PROGRESS_COLUMNS$}\r").and_then(|()| stderr.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_one_line_that_covers_the_one_before() {
        let mut tally = Tally::new();
        tally.sent = 1_234_567_890;
        let line = progress_line(&tally, Duration::from_millis(99_999_900));
        assert_eq!(
            line,
            "99999 s: sent 1234567890, answered 0, errors 0, 0 answers a second"
        );
        assert!(line.len() <= PROGRESS_COLUMNS);
    }
}
