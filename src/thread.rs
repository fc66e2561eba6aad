//! Threads: each named, spawned here, and missed when it ends before it should.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

/// Stack of every thread, in bytes. Untouched pages cost address space, not memory.
const STACK_BYTES: usize = 256 * 1024;

/// The program's threads. Whoever waits on [`Threads::ended`] learns of each that ends.
#[derive(Debug)]
pub struct Threads {
    handles: Vec<(String, JoinHandle<()>)>,
    ended: (Sender<String>, Receiver<String>),
}

impl Default for Threads {
    fn default() -> Self {
        Threads {
            handles: Vec::new(),
            ended: bounded(64),
        }
    }
}

impl Threads {
    /// Starts a thread.
    ///
    /// # Errors
    /// The system's, when it gives no more threads.
    pub fn spawn(
        &mut self,
        name: impl Into<String>,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let name = name.into();
        let farewell = Farewell(name.clone(), self.ended.0.clone());
        let handle = std::thread::Builder::new()
            .name(name.clone())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _farewell = farewell;
                body();
            })?;
        self.handles.push((name, handle));
        Ok(())
    }

    /// Receives the name of each thread that ended, in good order or by a panic.
    pub fn ended(&self) -> &Receiver<String> {
        &self.ended.1
    }

    /// Whether all threads whose name starts with `prefix` have ended.
    pub fn all_ended(&self, prefix: &str) -> bool {
        self.handles
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .all(|(_, handle)| handle.is_finished())
    }

    /// Waits until all threads whose name starts with `prefix` have ended or the deadline is
    /// over; tells which.
    pub fn wait_for(&self, prefix: &str, deadline: Instant) -> bool {
        while !self.all_ended(prefix) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            // Each end is announced; the pause only bounds the wait for one that was missed.
            let _ = self
                .ended()
                .recv_timeout(left.min(Duration::from_millis(50)));
        }
        true
    }
}

/// Dropped when its thread ends, however it ends.
struct Farewell(String, Sender<String>);

impl Drop for Farewell {
    fn drop(&mut self) {
        // A full channel means that the end of others is already known, which is enough.
        let _ = self.1.try_send(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_announced_like_any_end() {
        let mut threads = Threads::default();
        threads.spawn("good", || {}).unwrap();
        assert_eq!(threads.ended().recv().unwrap(), "good");
        threads
            .spawn("bad", || panic!("expected by this test"))
            .unwrap();
        assert_eq!(threads.ended().recv().unwrap(), "bad");
        assert!(threads.wait_for("", Instant::now() + Duration::from_secs(60)));
    }
}
