//! Senders that go on whatever happens, and what they were told.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::http::{self, Connection};

/// How long senders wait before they look again for a program that is not there.
const AWAY: Duration = Duration::from_millis(2);

/// What senders were told.
#[derive(Debug, Default, Clone)]
pub struct Told {
    /// Numbers (see [`http::numbered`]) that were answered with 2xx, and the phase they were
    /// sent in.
    pub acknowledged: Vec<(usize, usize)>,
    /// Answered otherwise.
    pub refused: usize,
    /// Not answered: the connection broke.
    pub unanswered: usize,
    /// How long each answer took, 2xx or not.
    pub times: Vec<Duration>,
}

impl Told {
    /// The 99th percentile of the times, and the longest.
    pub fn p99_and_slowest(&self) -> (Duration, Duration) {
        let mut times = self.times.clone();
        times.sort();
        let p99 = times.get(times.len() * 99 / 100);
        (
            p99.copied().unwrap_or_default(),
            times.last().copied().unwrap_or_default(),
        )
    }
}

#[derive(Debug, Default)]
struct Shared {
    to: Mutex<Option<SocketAddr>>,
    phase: AtomicUsize,
    next: AtomicUsize,
    stop: AtomicBool,
    told: Mutex<Told>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Senders of numbered requests, each on a connection of its own that is kept open.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    senders: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts so many senders, each with a pause between its requests. They wait for
    /// [`Load::send_to`].
    pub fn start(senders: usize, pause: Duration) -> Load {
        let shared: Arc<Shared> = Arc::default();
        let senders = (0..senders)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    while !shared.stop.load(Ordering::Relaxed) {
                        send(&shared, pause);
                    }
                })
            })
            .collect();
        Load { shared, senders }
    }

    /// Where the program is now. What is sent from now on belongs to `phase`.
    pub fn send_to(&self, to: SocketAddr, phase: usize) {
        self.shared.phase.store(phase, Ordering::Relaxed);
        *lock(&self.shared.to) = Some(to);
    }

    /// How many were acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        lock(&self.shared.told).acknowledged.len()
    }

    /// Ends all senders after their answers.
    pub fn stop(self) -> Told {
        self.shared.stop.store(true, Ordering::Relaxed);
        for sender in self.senders {
            sender.join().expect("sender");
        }
        lock(&self.shared.told).clone()
    }
}

/// Sends over one connection until it breaks.
fn send(shared: &Shared, pause: Duration) {
    let to = *lock(&shared.to);
    let Some(mut connection) = to.and_then(Connection::try_open) else {
        return thread::sleep(AWAY);
    };
    while !shared.stop.load(Ordering::Relaxed) {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let phase = shared.phase.load(Ordering::Relaxed);
        let begun = Instant::now();
        connection.send(&http::numbered(number));
        let answer = connection.response();
        let took = begun.elapsed();
        let mut told = lock(&shared.told);
        match answer {
            Ok(answer) => {
                told.times.push(took);
                match answer.status {
                    200..=299 => told.acknowledged.push((number, phase)),
                    _ => told.refused += 1,
                }
            }
            Err(_) => {
                told.unanswered += 1;
                return;
            }
        }
        drop(told);
        thread::sleep(pause);
    }
}

/// What a destination has taken, as it says itself.
#[derive(Debug, Default, Clone)]
pub struct Ledger(Arc<Mutex<HashMap<usize, usize>>>);

impl Ledger {
    /// Notes that a number was taken.
    pub fn take(&self, number: usize) {
        *lock(&self.0).entry(number).or_default() += 1;
    }

    /// Different numbers taken.
    pub fn taken(&self) -> usize {
        lock(&self.0).len()
    }

    /// How often a number was taken that had been taken before.
    pub fn doubled(&self) -> usize {
        lock(&self.0).values().map(|times| times - 1).sum()
    }

    /// Those acknowledged that were not taken.
    pub fn missing(&self, told: &Told) -> Vec<(usize, usize)> {
        let taken = lock(&self.0);
        let acknowledged = told.acknowledged.iter();
        acknowledged
            .filter(|(number, _)| !taken.contains_key(number))
            .copied()
            .collect()
    }
}
