//! The direct channel: each request goes to the proxy worker that became idle last.
//!
//! Those who wait at a channel are woken in turns, and all of them under load. So a few requests
//! would keep the stack and the connection of every worker in memory, and hundreds of workers
//! would hinder each other where a few dozen send as much. Here as many are busy as there is work
//! for, but more than a few dozen only if those are not fast enough.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use crossbeam_channel::{SendError, TryRecvError, TrySendError};

/// Receivers for each core that are woken as soon as there is something.
const EAGER_PER_CORE: usize = 32;
/// A core does not get much more than so many attempts a second through: while as many are made,
/// further receivers would be of no use.
const ATTEMPTS_PER_CORE: u32 = 7000;

/// A channel with room for so many, whose receivers wait last in, first out. The overseer wants a
/// thread.
pub fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>, Overseer<T>) {
    let (sender, channel) = crossbeam_channel::bounded(room);
    let (look, asked) = crossbeam_channel::bounded(1);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let cores_u32 = u32::try_from(cores).unwrap_or(u32::MAX);
    let attempts_per_second = ATTEMPTS_PER_CORE.saturating_mul(cores_u32);
    let full = u32::try_from(room).unwrap_or(u32::MAX);
    let crew = Arc::new(Crew {
        eager: cores.saturating_mul(EAGER_PER_CORE),
        patience: Duration::from_secs(1) / attempts_per_second * full,
        look,
        stack: Mutex::default(),
        is_waking: AtomicBool::new(false),
        is_short: AtomicBool::new(false),
        busy: AtomicUsize::new(0),
    });
    let sender = Sender {
        channel: sender,
        crew: Arc::clone(&crew),
    };
    let overseer = Overseer {
        channel: channel.clone(),
        asked,
        crew: Arc::clone(&crew),
    };
    let receiver = Receiver {
        channel,
        crew,
        is_busy: AtomicBool::new(false),
    };
    (sender, receiver, overseer)
}

/// The one end; dropped, it lets the receivers end when they have taken all.
#[derive(Debug)]
pub struct Sender<T> {
    channel: crossbeam_channel::Sender<T>,
    crew: Arc<Crew>,
}

impl<T> Sender<T> {
    /// # Errors
    /// Gives it back when there is no room.
    pub fn try_send(&self, value: T) -> Result<(), T> {
        self.channel
            .try_send(value)
            .map_err(TrySendError::into_inner)?;
        self.crew.see_to_it();
        Ok(())
    }

    /// Waits for room.
    ///
    /// # Errors
    /// Gives it back when there are no receivers any more.
    pub fn send(&self, value: T) -> Result<(), T> {
        self.channel.send(value).map_err(SendError::into_inner)?;
        self.crew.see_to_it();
        Ok(())
    }

    pub fn is_full(&self) -> bool {
        self.channel.is_full()
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        // Those who are woken must find the channel without a sender.
        self.channel = crossbeam_channel::bounded(0).0;
        self.crew.close();
    }
}

/// An end that takes; each worker has one.
#[derive(Debug)]
pub struct Receiver<T> {
    channel: crossbeam_channel::Receiver<T>,
    crew: Arc<Crew>,
    /// With what it received last, until it comes for the next.
    is_busy: AtomicBool,
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        Receiver {
            channel: self.channel.clone(),
            crew: Arc::clone(&self.crew),
            is_busy: AtomicBool::new(false),
        }
    }
}

impl<T> Receiver<T> {
    /// Waits for one; `None` when there will be none.
    pub fn recv(&self) -> Option<T> {
        if self.is_busy.swap(false, Ordering::SeqCst) {
            self.crew.busy.fetch_sub(1, Ordering::SeqCst);
        }
        loop {
            match self.channel.try_recv() {
                Ok(value) => {
                    self.is_busy.store(true, Ordering::SeqCst);
                    self.crew.busy.fetch_add(1, Ordering::SeqCst);
                    // Who sent the next may have left it to us to wake another.
                    if !self.channel.is_empty() {
                        self.crew.see_to_it();
                    }
                    return Some(value);
                }
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => self.crew.wait(|| !self.channel.is_empty()),
            }
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.channel.is_empty()
    }

    /// Takes what is there without waiting.
    pub fn try_iter(&self) -> impl Iterator<Item = T> {
        self.channel.try_iter()
    }
}

/// Looks after what waits while no more receivers are woken for it at once.
#[derive(Debug)]
pub struct Overseer<T> {
    channel: crossbeam_channel::Receiver<T>,
    asked: crossbeam_channel::Receiver<()>,
    crew: Arc<Crew>,
}

impl<T> Overseer<T> {
    /// Runs until the sender is gone; sleeps unless it is asked to look. `attempts` tells how many
    /// have been made so far, by these receivers and by all others the cores work for.
    pub fn run(&self, attempts: impl Fn() -> u64) {
        while self.asked.recv().is_ok() {
            while !self.channel.is_empty() {
                let (waiting, before) = (self.channel.len() as u64, attempts());
                thread::sleep(self.crew.patience);
                let is_short = attempts().saturating_sub(before) < waiting;
                self.crew.is_short.store(is_short, Ordering::SeqCst);
                if is_short {
                    // Who is woken wakes the next, as long as something waits.
                    self.crew.wake_one();
                }
            }
            self.crew.is_short.store(false, Ordering::SeqCst);
            if self.crew.stack().is_closed {
                return;
            }
        }
    }
}

/// The receivers: how many are busy, and those that wait.
#[derive(Debug)]
struct Crew {
    /// How many are woken as soon as there is something, and how long it waits for further ones:
    /// the time in which busy cores would have got all through that there is room for.
    eager: usize,
    patience: Duration,
    /// Asks the overseer to look.
    look: crossbeam_channel::Sender<()>,
    stack: Mutex<Stack>,
    /// Someone was woken and has not looked yet. Who sends meanwhile need wake nobody else:
    /// whoever finds more than one wakes the next.
    is_waking: AtomicBool,
    /// Whether further ones than the eager are wanted.
    is_short: AtomicBool,
    busy: AtomicUsize,
}

/// Those that wait, the last one on top.
#[derive(Debug, Default)]
struct Stack {
    idle: Vec<Arc<Idle>>,
    is_closed: bool,
}

#[derive(Debug)]
struct Idle {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Idle {
    /// To be called by who took it off the stack.
    fn wake(&self) {
        self.is_woken.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

impl Crew {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to something that waits.
    fn see_to_it(&self) {
        let is_short = self.is_short.load(Ordering::SeqCst);
        if is_short || self.busy.load(Ordering::SeqCst) < self.eager {
            self.wake_one();
        } else {
            // Full: it has been asked already.
            let _ = self.look.try_send(());
        }
    }

    fn wake_one(&self) {
        if self.is_waking.swap(true, Ordering::SeqCst) {
            return;
        }
        let top = self.stack().idle.pop();
        match top {
            Some(idle) => idle.wake(),
            // Who is about to wait looks once more when it is on the stack.
            None => self.is_waking.store(false, Ordering::SeqCst),
        }
    }

    fn close(&self) {
        let mut stack = self.stack();
        stack.is_closed = true;
        stack.idle.drain(..).for_each(|idle| idle.wake());
        drop(stack);
        // It need not be told twice.
        let _ = self.look.try_send(());
    }

    /// Returns when woken, or at once when there is something after all.
    fn wait(&self, is_something_there: impl Fn() -> bool) {
        let me = Arc::new(Idle {
            thread: thread::current(),
            is_woken: AtomicBool::new(false),
        });
        let mut stack = self.stack();
        if stack.is_closed {
            return;
        }
        stack.idle.push(Arc::clone(&me));
        drop(stack);
        if is_something_there() && self.leave(&me) {
            return;
        }
        // `park` may return for no reason.
        while !me.is_woken.load(Ordering::SeqCst) {
            thread::park();
        }
        // Before looking: what is sent from now on wakes another.
        self.is_waking.store(false, Ordering::SeqCst);
    }

    /// Takes a receiver off the stack; false if another has, who then wakes it.
    fn leave(&self, me: &Arc<Idle>) -> bool {
        let idle = &mut self.stack().idle;
        let place = idle.iter().rposition(|other| Arc::ptr_eq(other, me));
        place.map(|place| idle.remove(place)).is_some()
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "no part of the program")]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::time::Duration;

    use super::*;

    #[test]
    fn all_that_is_sent_is_received_once_and_then_the_receivers_end() {
        let (sender, receiver, _overseer) = bounded(4);
        let sender = Arc::new(sender);
        let receivers: Vec<_> = (0..8)
            .map(|_| {
                let receiver: Receiver<u32> = receiver.clone();
                thread::spawn(move || {
                    let mut received = Vec::new();
                    while let Some(value) = receiver.recv() {
                        received.push(value);
                    }
                    received
                })
            })
            .collect();
        let senders: Vec<_> = (0..4)
            .map(|number| {
                let sender = Arc::clone(&sender);
                thread::spawn(move || {
                    for value in 0..20_000 {
                        let value = number * 20_000 + value;
                        if let Err(value) = sender.try_send(value) {
                            sender.send(value).unwrap();
                        }
                        if value % 500 == 0 {
                            // Lets the receivers run dry and fall asleep.
                            thread::sleep(Duration::from_micros(200));
                        }
                    }
                })
            })
            .collect();
        senders
            .into_iter()
            .for_each(|sender| sender.join().unwrap());
        drop(sender);
        let received = receivers.into_iter().map(|thread| thread.join().unwrap());
        let received: Vec<u32> = received.flatten().collect();
        assert_eq!(received.len(), 80_000);
        assert_eq!(received.into_iter().collect::<HashSet<_>>().len(), 80_000);
    }

    #[test]
    fn as_many_are_busy_as_there_is_work_for() {
        let eager = bounded::<()>(1).1.crew.eager;
        let receivers = eager + 40;
        let (sender, receiver, overseer) = bounded::<Arc<Barrier>>(receivers);
        let overseer = thread::spawn(move || overseer.run(|| 0));
        let threads: Vec<_> = (0..receivers)
            .map(|_| {
                let receiver = receiver.clone();
                thread::spawn(move || {
                    while let Some(all) = receiver.recv() {
                        // Passed only once as many are here as were sent.
                        all.wait();
                    }
                })
            })
            .collect();
        for busy in [1, 4, 2, eager, eager + 1, receivers, 3, receivers] {
            let all = Arc::new(Barrier::new(busy + 1));
            for _ in 0..busy {
                sender.send(Arc::clone(&all)).unwrap();
            }
            all.wait();
        }
        drop((sender, receiver));
        let all = threads.into_iter().chain([overseer]);
        all.for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn the_last_to_become_idle_is_woken_first() {
        let (sender, receiver, _overseer) = bounded::<()>(1);
        let (tell, told) = crossbeam_channel::bounded(4);
        let waiting = |count| {
            while receiver.crew.stack().idle.len() != count {
                thread::yield_now();
            }
        };
        for number in 1..=3 {
            let (receiver, tell) = (receiver.clone(), tell.clone());
            thread::spawn(move || {
                while receiver.recv().is_some() {
                    tell.send(number).unwrap();
                }
            });
            waiting(number);
        }
        for _ in 0..50 {
            sender.send(()).unwrap();
            assert_eq!(told.recv(), Ok(3));
            waiting(3);
        }
    }
}
