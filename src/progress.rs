//! Whether the stages of the pipeline get on with their work: for systemd's watchdog and
//! `/healthz`.
//!
//! A stage is stuck when it is at something, or something waits for it, and nothing has begun or
//! ended there for longer than its work can take. A destination that is slow and a store that is
//! down have limits of their own, which are shorter. Ends nothing by itself.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Counts what one stage begins and ends. Many threads may share it.
#[derive(Debug, Default)]
pub struct Stage {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Stage {
    /// One piece of work, until what it returns is dropped.
    pub fn work(&self) -> Work<'_> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        Work(self)
    }

    fn counts(&self) -> (u64, u64) {
        // What ended has begun: read the other way round, more might seem to have ended.
        let ended = self.ended.load(Ordering::Relaxed);
        (self.begun.load(Ordering::Relaxed), ended)
    }
}

/// See [`Stage::work`].
#[derive(Debug)]
pub struct Work<'a>(&'a Stage);

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A stage that has stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    pub stage: &'static str,
    pub since: Duration,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is stuck for {} s", self.stage, self.since.as_secs())
    }
}

/// What goes on around a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Around {
    /// Nothing that matters: it is at work or it is not.
    Nothing,
    /// Something waits for it that it could begin with.
    Waited,
    /// Something holds it up of which others know already, and for which nobody is to end the
    /// program.
    Excused,
}

/// All stages that are watched.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Vec<Watched>>);

struct Watched {
    name: &'static str,
    stage: Arc<Stage>,
    around: Box<dyn Fn() -> Around + Send>,
    /// How long a piece of work may take.
    limit: Duration,
    seen: Seen,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watched").field(&self.name).finish()
    }
}

impl Progress {
    /// Watches one more. `around` tells what its own counts do not.
    pub fn watch(
        &self,
        name: &'static str,
        stage: &Arc<Stage>,
        limit: Duration,
        around: impl Fn() -> Around + Send + 'static,
    ) {
        self.watched().push(Watched {
            name,
            stage: Arc::clone(stage),
            around: Box::new(around),
            limit,
            seen: Seen::default(),
        });
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, Vec<Watched>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stage that has been stuck longest. To be asked more often than stages take.
    pub fn stuck(&self, now: Instant) -> Option<Stuck> {
        let mut watched = self.watched();
        let stuck = watched.iter_mut().filter_map(|watched| {
            let counts = watched.stage.counts();
            let since = watched.seen.look(counts, (watched.around)(), now);
            (since > watched.limit).then_some(Stuck {
                stage: watched.name,
                since,
            })
        });
        stuck.max_by_key(|stuck| stuck.since)
    }
}

/// What was seen of a stage. Pure.
#[derive(Debug, Default)]
struct Seen {
    counts: (u64, u64),
    /// Since when it is at the same.
    since: Option<Instant>,
}

impl Seen {
    /// How long it has had something to do and done nothing.
    fn look(&mut self, counts: (u64, u64), around: Around, now: Instant) -> Duration {
        let (begun, ended) = counts;
        let has_work = match around {
            Around::Nothing => begun != ended,
            Around::Waited => true,
            Around::Excused => false,
        };
        if !has_work || counts != self.counts {
            self.since = None;
        }
        self.counts = counts;
        if !has_work {
            return Duration::ZERO;
        }
        let since = *self.since.get_or_insert(now);
        now.saturating_duration_since(since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn an_idle_stage_is_never_stuck() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        for hours in 0..10 {
            let since = seen.look((7, 7), Around::Nothing, after(start, hours * 3600));
            assert_eq!(since, Duration::ZERO);
        }
    }

    #[test]
    fn work_that_does_not_end_is_counted_from_when_it_was_seen() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        assert_eq!(seen.look((1, 0), Around::Nothing, start), Duration::ZERO);
        assert_eq!(
            seen.look((1, 0), Around::Nothing, after(start, 9)),
            Duration::from_secs(9)
        );
        // One of several threads ends something, or begins something new: it moves.
        assert_eq!(
            seen.look((2, 0), Around::Nothing, after(start, 10)),
            Duration::ZERO
        );
        assert_eq!(
            seen.look((2, 1), Around::Nothing, after(start, 11)),
            Duration::ZERO
        );
        assert_eq!(
            seen.look((2, 1), Around::Nothing, after(start, 13)),
            Duration::from_secs(2)
        );
        assert_eq!(
            seen.look((2, 2), Around::Nothing, after(start, 14)),
            Duration::ZERO
        );
        // Idle for long, then at work again: only the work counts.
        assert_eq!(
            seen.look((3, 2), Around::Nothing, after(start, 999)),
            Duration::ZERO
        );
    }

    #[test]
    fn work_that_nobody_begins_is_as_bad() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        assert_eq!(seen.look((5, 5), Around::Waited, start), Duration::ZERO);
        assert_eq!(
            seen.look((5, 5), Around::Waited, after(start, 60)),
            Duration::from_secs(60)
        );
        assert_eq!(
            seen.look((5, 5), Around::Nothing, after(start, 61)),
            Duration::ZERO
        );
        assert_eq!(
            seen.look((5, 5), Around::Waited, after(start, 62)),
            Duration::ZERO
        );
    }

    #[test]
    fn what_holds_a_stage_up_for_a_known_reason_does_not_count() {
        use std::sync::atomic::AtomicBool;
        let (progress, start) = (Progress::default(), Instant::now());
        let (writer, hangs) = (Arc::new(Stage::default()), Arc::new(AtomicBool::new(true)));
        let its_disk = Arc::clone(&hangs);
        let around = move || match its_disk.load(Ordering::Relaxed) {
            true => Around::Excused,
            false => Around::Nothing,
        };
        progress.watch("writer", &writer, Duration::from_secs(10), around);
        let _held = writer.work();
        assert_eq!(progress.stuck(start), None);
        assert_eq!(progress.stuck(after(start, 99)), None);
        // From now on it has no excuse.
        hangs.store(false, Ordering::Relaxed);
        assert_eq!(progress.stuck(after(start, 100)), None);
        assert_eq!(progress.stuck(after(start, 110)), None);
        assert_eq!(progress.stuck(after(start, 111)).unwrap().stage, "writer");
    }

    #[test]
    fn the_longest_stuck_is_named_and_recovers() {
        let (progress, start) = (Progress::default(), Instant::now());
        let (writer, front) = (Arc::new(Stage::default()), Arc::new(Stage::default()));
        progress.watch("writer", &writer, Duration::from_secs(10), || {
            Around::Nothing
        });
        progress.watch("front", &front, Duration::from_secs(1), || Around::Nothing);
        let held = writer.work();
        assert_eq!(progress.stuck(start), None);
        assert_eq!(progress.stuck(after(start, 10)), None);
        let _also_held = front.work();
        assert_eq!(progress.stuck(after(start, 11)).unwrap().stage, "writer");
        let stuck = progress.stuck(after(start, 20)).unwrap();
        assert_eq!(stuck.to_string(), "writer is stuck for 20 s");
        drop(held);
        assert_eq!(progress.stuck(after(start, 21)).unwrap().stage, "front");
    }
}
