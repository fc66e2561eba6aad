//! The direct channel: each request goes to the proxy worker that became idle last.
//!
//! Those who wait at a channel are woken in turns. A few requests at a time would so keep the
//! stack, buffers and connection of every worker in memory, and find each of them cold. Here as
//! many are busy as there is work for, and the others are never touched.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};

use crossbeam_channel::{TryRecvError, TrySendError};

/// A channel with room for so many, whose receivers wait last in, first out.
pub fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = crossbeam_channel::bounded(room);
    let idle = Arc::new(Idle::default());
    let sender = Sender {
        channel: sender,
        idle: Arc::clone(&idle),
    };
    let receiver = Receiver {
        channel: receiver,
        idle,
    };
    (sender, receiver)
}

/// The one end; dropped, it lets the receivers end when they have taken all.
#[derive(Debug)]
pub struct Sender<T> {
    channel: crossbeam_channel::Sender<T>,
    idle: Arc<Idle>,
}

impl<T> Sender<T> {
    /// # Errors
    /// Gives it back when there is no room.
    pub fn try_send(&self, value: T) -> Result<(), T> {
        self.channel
            .try_send(value)
            .map_err(TrySendError::into_inner)?;
        self.idle.wake_one();
        Ok(())
    }

    /// Waits for room.
    ///
    /// # Errors
    /// Gives it back when there are no receivers any more.
    pub fn send(&self, value: T) -> Result<(), T> {
        self.channel
            .send(value)
            .map_err(|refused| refused.into_inner())?;
        self.idle.wake_one();
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
        self.idle.close();
    }
}

/// An end that takes; each worker has one.
#[derive(Debug)]
pub struct Receiver<T> {
    channel: crossbeam_channel::Receiver<T>,
    idle: Arc<Idle>,
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        Receiver {
            channel: self.channel.clone(),
            idle: Arc::clone(&self.idle),
        }
    }
}

impl<T> Receiver<T> {
    /// Waits for one; `None` when there will be none.
    pub fn recv(&self) -> Option<T> {
        loop {
            match self.channel.try_recv() {
                Ok(value) => {
                    // Who sent it may have left the waking of others to us.
                    if !self.channel.is_empty() {
                        self.idle.wake_one();
                    }
                    return Some(value);
                }
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => self.idle.wait(|| !self.channel.is_empty()),
            }
        }
    }

    /// Takes what is there without waiting.
    pub fn try_iter(&self) -> impl Iterator<Item = T> {
        self.channel.try_iter()
    }
}

/// The receivers that wait, the last one on top.
#[derive(Debug, Default)]
struct Idle {
    stack: Mutex<Stack>,
    /// Someone was woken and has not looked yet. Who sends meanwhile need wake nobody else:
    /// whoever finds more than one wakes the next.
    is_waking: AtomicBool,
}

#[derive(Debug, Default)]
struct Stack {
    waiting: Vec<Arc<Waiting>>,
    is_closed: bool,
}

#[derive(Debug)]
struct Waiting {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Waiting {
    /// To be called by who took it off the stack.
    fn wake(&self) {
        self.is_woken.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

impl Idle {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_one(&self) {
        if self.is_waking.swap(true, Ordering::SeqCst) {
            return;
        }
        let top = self.stack().waiting.pop();
        match top {
            Some(waiting) => waiting.wake(),
            // Who is about to wait looks once more when it is on the stack.
            None => self.is_waking.store(false, Ordering::SeqCst),
        }
    }

    fn close(&self) {
        let mut stack = self.stack();
        stack.is_closed = true;
        stack.waiting.drain(..).for_each(|waiting| waiting.wake());
    }

    /// Returns when woken, or at once when there is something after all.
    fn wait(&self, is_something_there: impl Fn() -> bool) {
        let me = Arc::new(Waiting {
            thread: thread::current(),
            is_woken: AtomicBool::new(false),
        });
        let mut stack = self.stack();
        if stack.is_closed {
            return;
        }
        stack.waiting.push(Arc::clone(&me));
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
    fn leave(&self, me: &Arc<Waiting>) -> bool {
        let waiting = &mut self.stack().waiting;
        let place = waiting.iter().rposition(|other| Arc::ptr_eq(other, me));
        place.map(|place| waiting.remove(place)).is_some()
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
        let (sender, receiver) = bounded(4);
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
        let (sender, receiver) = bounded::<Arc<Barrier>>(4);
        let threads: Vec<_> = (0..4)
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
        for busy in [1, 4, 2, 4, 3] {
            let all = Arc::new(Barrier::new(busy + 1));
            for _ in 0..busy {
                sender.send(Arc::clone(&all)).unwrap();
            }
            all.wait();
        }
        drop(sender);
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn the_last_to_become_idle_is_woken_first() {
        let (sender, receiver) = bounded::<()>(1);
        let (tell, told) = crossbeam_channel::bounded(4);
        let waiting = |count| {
            while receiver.idle.stack().waiting.len() != count {
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
