//! Threads: each named, spawned here, and missed when it ends before it should.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

/// Stack of every thread, in bytes. Untouched pages cost address space, not memory.
const STACK_BYTES: usize = 256 * 1024;

type Handles = Vec<(String, JoinHandle<()>)>;

/// The program's threads, for all who spawn some. Whoever waits on [`Threads::ended`] learns of
/// each that ends and should not.
#[derive(Debug, Clone)]
pub struct Threads {
    handles: Arc<Mutex<Handles>>,
    ended: (Sender<String>, Receiver<String>),
    #[cfg(test)]
    left: Option<Arc<std::sync::atomic::AtomicUsize>>,
}

impl Default for Threads {
    fn default() -> Self {
        Threads {
            handles: Arc::default(),
            ended: bounded(64),
            #[cfg(test)]
            left: None,
        }
    }
}

impl Threads {
    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of a system that gives no more than so many.
    #[cfg(test)]
    pub(crate) fn of_at_most(count: usize) -> Threads {
        Threads {
            left: Some(Arc::new(count.into())),
            ..Threads::default()
        }
    }

    fn start(
        &self,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        #[cfg(test)]
        if let Some(left) = &self.left {
            use std::sync::atomic::Ordering::SeqCst;
            let one_less = |left: usize| left.checked_sub(1);
            left.fetch_update(SeqCst, SeqCst, one_less)
                .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        }
        start(name, body)
    }

    /// Starts a thread that runs until the end of the program.
    ///
    /// # Errors
    /// The system's, when it gives no more threads.
    pub fn spawn(
        &self,
        name: impl Into<String>,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let name = name.into();
        let farewell = Farewell::new(&name, self);
        let handle = self.start(name.clone(), move || {
            let _farewell = farewell;
            body();
        })?;
        self.handles().push((name, handle));
        Ok(())
    }

    /// Starts a thread that may end when it is no longer needed: only a panic is unexpected.
    ///
    /// # Errors
    /// As [`Threads::spawn`].
    pub fn spawn_spare(
        &self,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let farewell = Farewell::new(&name, self);
        self.start(name, move || {
            let mut farewell = farewell;
            body();
            farewell.name = None;
        })?;
        Ok(())
    }

    /// Receives the name of each thread that ended, in good order or by a panic.
    pub fn ended(&self) -> &Receiver<String> {
        &self.ended.1
    }

    /// Whether all threads whose name starts with `prefix` have ended.
    pub fn all_ended(&self, prefix: &str) -> bool {
        self.handles()
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

/// Starts a thread for one call that ends by itself, and whose end nobody waits for.
///
/// # Errors
/// As [`Threads::spawn`].
pub fn spawn_brief(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    start(name.to_owned(), body).map(drop)
}

fn start(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .stack_size(STACK_BYTES)
        .spawn(body)
}

/// Dropped when its thread ends, however it ends.
struct Farewell {
    /// `None`: this end is nobody's business.
    name: Option<String>,
    ended: Sender<String>,
}

impl Farewell {
    fn new(name: &str, threads: &Threads) -> Farewell {
        Farewell {
            name: Some(name.to_owned()),
            ended: threads.ended.0.clone(),
        }
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            // A full channel means that the end of others is already known, which is enough.
            let _ = self.ended.try_send(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_announced_like_any_end() {
        let threads = Threads::default();
        threads.spawn("good", || {}).unwrap();
        assert_eq!(threads.ended().recv().unwrap(), "good");
        threads
            .spawn("bad", || panic!("expected by this test"))
            .unwrap();
        assert_eq!(threads.ended().recv().unwrap(), "bad");
        assert!(threads.wait_for("", Instant::now() + Duration::from_secs(60)));
    }

    #[test]
    fn the_end_of_a_spare_thread_is_announced_only_if_it_panics() {
        let threads = Threads::default();
        let spare = |body: fn()| threads.spawn_spare("spare".into(), body).unwrap();
        spare(|| {});
        threads.spawn("other", || {}).unwrap();
        assert_eq!(threads.ended().recv().unwrap(), "other");
        spare(|| panic!("expected by this test"));
        assert_eq!(threads.ended().recv().unwrap(), "spare");
    }
}
