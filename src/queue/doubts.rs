//! Appends whose end is not known: nobody may send those rows to the store again before it is.
//!
//! An append that did not answer in time may be committed all the same, a second or a minute later,
//! and its rows be delivered and deleted before anybody looks. Appending them again would bring them
//! back. So they are remembered here until the append is over: the thread that carries it out tells
//! its [`End`], a row that is claimed shows that it was committed, and what cannot be told any more,
//! because the connection broke, is asked for by id.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::StoreError;
use crate::metrics::Metrics;

/// How long the end of an append is waited for; then its rows are asked for as if it had broken.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// How soon rows are asked for whose append broke: the server may be at it yet, and a claim may show it.
const BROKEN_MIN: Duration = Duration::from_secs(3);
/// Appends remembered that are kept nowhere else: beyond so many the oldest is forgotten.
const UNKEPT_MAX: usize = 64;
/// How long such a one is remembered whose end will not be told.
const UNKEPT_TIME_MAX: Duration = Duration::from_secs(600);
/// Rows remembered that were claimed last: whoever waits for an append may hear that its connection
/// broke only after its rows have been claimed over another.
const CLAIMED_KEPT: usize = 4096;

/// How an append ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Committed,
    /// The store said so: nothing is committed.
    Nothing,
    /// There was no connection to begin with it.
    NotBegun,
    /// The connection broke: committed or not.
    Unknown,
}

#[derive(Debug, Default)]
struct Told {
    has_begun: AtomicBool,
    /// A connection broke under it.
    has_broken: AtomicBool,
    is_running: AtomicBool,
    end: OnceLock<End>,
}

/// The end of an append, as far as it is known by now.
#[derive(Debug, Clone)]
pub struct Ending(Arc<Told>);

/// Goes with the append, and tells its end: at the latest by being dropped.
#[derive(Debug)]
pub struct Teller(Arc<Told>);

/// An append's two ends.
pub fn ending() -> (Teller, Ending) {
    let told: Arc<Told> = Arc::default();
    (Teller(Arc::clone(&told)), Ending(told))
}

impl Ending {
    /// Of an append that is over.
    pub fn over(end: End) -> Ending {
        let ending = Ending(Arc::default());
        let _ = ending.0.end.set(end);
        ending
    }

    /// Whether the store is at it; else there is no connection for it, or no more.
    pub fn is_running(&self) -> bool {
        self.0.is_running.load(Ordering::Acquire)
    }

    /// `None`: it goes on.
    pub fn look(&self) -> Option<End> {
        self.0.end.get().copied()
    }
}

impl Teller {
    /// From now on the rows may be committed.
    pub fn begin(&self) {
        self.0.has_begun.store(true, Ordering::Release);
        self.0.is_running.store(true, Ordering::Release);
    }

    /// The connection broke: there may be another try on the next.
    pub fn broke(&self) {
        self.0.has_broken.store(true, Ordering::Release);
        self.0.is_running.store(false, Ordering::Release);
    }

    /// The store said that nothing of this try is committed. There may be another.
    pub fn rolled_back(&self) {
        self.0.is_running.store(false, Ordering::Release);
    }

    /// What is told first counts.
    pub fn tell(&self, end: End) {
        let _ = self.0.end.set(end);
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        let is_set = |flag: &AtomicBool| flag.load(Ordering::Acquire);
        let is_cut_off = is_set(&self.0.has_broken) || is_set(&self.0.is_running);
        self.tell(match is_set(&self.0.has_begun) {
            true if is_cut_off => End::Unknown,
            true => End::Nothing,
            false => End::NotBegun,
        });
    }
}

/// What to do about an append whose connection broke before it was answered. It may have been idle
/// and dead for long; or the rows are committed, and then delivered before the append is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// Repeat it on another connection: a duplicate, now and then, rather than a sender refused.
    Repeat,
    /// Tell: the rows are kept elsewhere until it is known.
    Tell,
}

/// Why an append did not succeed, and whether its rows may be committed all the same.
#[derive(Debug, Clone)]
pub struct NotAppended {
    pub error: StoreError,
    pub ending: Ending,
    /// Whether it shows that the store does not work, rather than that this took too long or that a
    /// connection broke while others can be made.
    pub is_away: bool,
}

impl NotAppended {
    /// Of an append that could not begin.
    pub fn not_begun(error: StoreError) -> NotAppended {
        NotAppended {
            is_away: error.is_outage(),
            ending: Ending::over(End::NotBegun),
            error,
        }
    }

    /// Of an append that nobody goes on with.
    pub fn over(error: StoreError) -> NotAppended {
        let end = match error {
            StoreError::Refused(_) | StoreError::Busy(_) => End::Nothing,
            _ => End::Unknown,
        };
        NotAppended {
            is_away: error.is_outage(),
            ending: Ending::over(end),
            error,
        }
    }
}

/// Where the rows of a doubtful append are beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// In the spool: to be removed there once they are known to be committed.
    InSpool,
    /// In memory, or the sender was refused: once committed they come on top of what was accepted.
    Elsewhere,
}

#[derive(Debug)]
struct Doubt {
    number: u64,
    ids: HashSet<Uuid>,
    ending: Ending,
    since: Instant,
    kept: Kept,
}

impl Doubt {
    /// One of its rows, perhaps, was claimed.
    fn claimed(&mut self, id: &Uuid, committed: &mut HashSet<Uuid>, metrics: &Metrics) {
        match (self.ids.remove(id), self.kept) {
            (true, Kept::InSpool) => {
                committed.insert(*id);
            }
            (true, Kept::Elsewhere) => metrics.late_commits.inc(),
            (false, _) => {}
        }
    }
}

#[derive(Debug, Default)]
struct State {
    last_number: u64,
    doubts: Vec<Doubt>,
    /// Known to be in the store, and still in the spool.
    committed: HashSet<Uuid>,
    /// The last ones.
    claimed: VecDeque<Uuid>,
}

/// All appends in doubt.
#[derive(Debug, Default)]
pub struct Doubts {
    state: Mutex<State>,
    /// Of doubts: usually none, and then nobody takes the lock.
    count: AtomicUsize,
}

/// An append in the spool whose end is known, or will not be told any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) number: u64,
    pub(super) ids: Vec<Uuid>,
    pub(super) end: End,
}

impl Doubts {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self, state: &State) {
        self.count.store(state.doubts.len(), Ordering::Release);
    }

    /// Remembers an append; gives the number to name it by. What was claimed already was committed.
    pub(super) fn add(&self, ids: Vec<Uuid>, ending: Ending, kept: Kept, metrics: &Metrics) -> u64 {
        let mut state = self.state();
        state.last_number += 1;
        let number = state.last_number;
        let mut doubt = Doubt {
            number,
            ids: ids.into_iter().collect(),
            ending,
            since: Instant::now(),
            kept,
        };
        let State {
            claimed, committed, ..
        } = &mut *state;
        for id in claimed.iter() {
            doubt.claimed(id, committed, metrics);
        }
        state.doubts.push(doubt);
        let unkept = |doubt: &Doubt| doubt.kept == Kept::Elsewhere;
        if state.doubts.iter().filter(|doubt| unkept(doubt)).count() > UNKEPT_MAX
            && let Some(oldest) = state.doubts.iter().position(unkept)
        {
            state.doubts.remove(oldest);
        }
        self.counted(&state);
        number
    }

    /// The spool did not take its rows after all.
    pub(super) fn not_spooled(&self, number: u64) {
        let mut state = self.state();
        let doubts = &mut state.doubts;
        if let Some(doubt) = doubts.iter_mut().find(|doubt| doubt.number == number) {
            doubt.kept = Kept::Elsewhere;
        }
    }

    /// Notes rows that were claimed, which shows that their append was committed, and looks for
    /// ends that have been told since.
    pub(super) fn seen(&self, ids: impl Iterator<Item = Uuid>, metrics: &Metrics) {
        let mut state = self.state();
        let State {
            doubts,
            committed,
            claimed,
            ..
        } = &mut *state;
        for id in ids {
            for doubt in &mut *doubts {
                doubt.claimed(&id, committed, metrics);
            }
            if claimed.len() >= CLAIMED_KEPT {
                claimed.pop_front();
            }
            claimed.push_back(id);
        }
        doubts.retain(|doubt| match (doubt.kept, doubt.ending.look()) {
            (Kept::InSpool, _) => true,
            (Kept::Elsewhere, Some(End::Committed)) => {
                metrics.late_commits.inc_by(doubt.ids.len() as u64);
                false
            }
            (Kept::Elsewhere, Some(End::Nothing | End::NotBegun)) => false,
            (Kept::Elsewhere, None | Some(End::Unknown)) => {
                !doubt.ids.is_empty() && doubt.since.elapsed() < UNKEPT_TIME_MAX
            }
        });
        self.counted(&state);
    }

    /// Rows that were appended again, and so are no longer in doubt as far as they are kept
    /// elsewhere.
    pub(super) fn appended(&self, ids: impl Iterator<Item = Uuid>) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut state = self.state();
        for id in ids {
            for doubt in &mut state.doubts {
                if doubt.kept == Kept::Elsewhere {
                    doubt.ids.remove(&id);
                }
            }
        }
    }

    /// Whether the append of this number is still in doubt.
    pub(super) fn has(&self, number: u64) -> bool {
        let state = self.state();
        state.doubts.iter().any(|doubt| doubt.number == number)
    }

    /// Appends of spooled rows that are over, or have been waited for long enough.
    pub(super) fn ended(&self) -> Vec<Ended> {
        let state = self.state();
        let spooled = state.doubts.iter();
        let spooled = spooled.filter(|doubt| doubt.kept == Kept::InSpool);
        spooled
            .filter_map(|doubt| {
                let age = doubt.since.elapsed();
                let end = match doubt.ending.look() {
                    Some(End::Unknown) if age < BROKEN_MIN => None,
                    None if age > OPEN_MAX => Some(End::Unknown),
                    end => end,
                }?;
                Some(Ended {
                    number: doubt.number,
                    ids: doubt.ids.iter().copied().collect(),
                    end,
                })
            })
            .collect()
    }

    /// Ends a doubt: these of its rows are in the store. The others may be appended again.
    pub(super) fn close(&self, number: u64, committed: impl IntoIterator<Item = Uuid>) {
        let mut state = self.state();
        state.doubts.retain(|doubt| doubt.number != number);
        state.committed.extend(committed);
        self.counted(&state);
    }

    /// Rows that are in the store and are to be removed from the spool.
    pub(super) fn committed(&self) -> Vec<Uuid> {
        self.state().committed.iter().copied().collect()
    }

    /// Rows that were appended without doubt, but are still in the spool.
    pub(super) fn add_committed(&self, ids: &[Uuid]) {
        self.state().committed.extend(ids);
    }

    /// They have been removed from the spool.
    pub(super) fn removed(&self, ids: &[Uuid]) {
        let mut state = self.state();
        for id in ids {
            state.committed.remove(id);
        }
    }

    /// Rows in the spool that must not be appended now.
    pub(super) fn held_back(&self) -> HashSet<Uuid> {
        let state = self.state();
        let doubts = state.doubts.iter();
        let spooled = doubts.filter(|doubt| doubt.kept == Kept::InSpool);
        let ids = spooled.flat_map(|doubt| doubt.ids.iter());
        ids.chain(&state.committed).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: usize) -> Vec<Uuid> {
        (0..count).map(|_| Uuid::now_v7()).collect()
    }

    #[test]
    fn an_append_tells_its_end_however_it_ends() {
        let told = |act: fn(&Teller)| {
            let (teller, ending) = ending();
            act(&teller);
            let before = ending.look();
            drop(teller);
            (before, ending.look())
        };
        assert_eq!(told(|_| {}), (None, Some(End::NotBegun)));
        assert_eq!(told(Teller::begin), (None, Some(End::Unknown)));
        let committed = Some(End::Committed);
        let commits = |teller: &Teller| {
            teller.begin();
            teller.tell(End::Committed);
        };
        assert_eq!(told(commits), (committed, committed));
    }

    #[test]
    fn spooled_rows_are_held_back_until_the_end_is_known_and_they_are_removed() {
        let (doubts, ids) = (Doubts::default(), ids(3));
        let (teller, ending) = ending();
        let metrics = Metrics::new(1).unwrap();
        let number = doubts.add(ids.clone(), ending, Kept::InSpool, &metrics);
        assert_eq!(doubts.ended(), []);
        assert_eq!(doubts.held_back().len(), 3);
        teller.tell(End::Committed);
        let ended = doubts.ended();
        assert_eq!((ended[0].number, ended[0].end), (number, End::Committed));
        doubts.close(number, ids[..2].iter().copied());
        assert_eq!(doubts.held_back(), ids[..2].iter().copied().collect());
        doubts.removed(&ids);
        assert!(doubts.held_back().is_empty());
    }

    #[test]
    fn a_claimed_row_was_committed() {
        let metrics = Metrics::new(1).unwrap();
        let (doubts, ids) = (Doubts::default(), ids(4));
        let unknown = || Ending::over(End::Unknown);
        doubts.add(ids[..2].to_vec(), unknown(), Kept::InSpool, &metrics);
        doubts.add(ids[2..].to_vec(), unknown(), Kept::Elsewhere, &metrics);
        doubts.seen([ids[0], ids[2]].into_iter(), &metrics);
        assert_eq!(doubts.committed(), [ids[0]]);
        // Not asked for yet: the server may be at it.
        assert_eq!(doubts.ended(), []);
        assert!(doubts.held_back().contains(&ids[1]));
        assert_eq!(metrics.late_commits.get(), 1);
        // Nobody counts a row twice, nor one that was appended again by who had kept it.
        doubts.appended([ids[3]].into_iter());
        doubts.seen(ids.iter().copied(), &metrics);
        assert_eq!(metrics.late_commits.get(), 1);
    }

    /// The rows may be claimed, delivered and deleted before their writer hears that its connection
    /// broke.
    #[test]
    fn a_row_claimed_before_its_append_was_in_doubt_was_committed_as_well() {
        let metrics = Metrics::new(1).unwrap();
        let (doubts, ids) = (Doubts::default(), ids(4));
        doubts.seen(ids[..2].iter().copied(), &metrics);
        let unknown = || Ending::over(End::Unknown);
        doubts.add(ids[1..3].to_vec(), unknown(), Kept::InSpool, &metrics);
        doubts.add(vec![ids[0], ids[3]], unknown(), Kept::Elsewhere, &metrics);
        assert_eq!(doubts.committed(), [ids[1]]);
        assert!(doubts.held_back().contains(&ids[2]));
        assert_eq!(metrics.late_commits.get(), 1);
        // However much is claimed, what is remembered has a bound.
        doubts.seen((0..2 * CLAIMED_KEPT).map(|_| Uuid::now_v7()), &metrics);
        assert_eq!(doubts.state().claimed.len(), CLAIMED_KEPT);
    }

    #[test]
    fn what_is_kept_nowhere_is_late_when_committed_and_forgotten_when_not() {
        let metrics = Metrics::new(1).unwrap();
        let doubts = Doubts::default();
        for end in [End::Committed, End::Nothing, End::NotBegun] {
            doubts.add(ids(2), Ending::over(end), Kept::Elsewhere, &metrics);
        }
        doubts.seen(std::iter::empty(), &metrics);
        assert_eq!(metrics.late_commits.get(), 2);
        assert!(doubts.state().doubts.is_empty());
        (0..2 * UNKEPT_MAX).for_each(|_| {
            doubts.add(
                ids(1),
                Ending::over(End::Unknown),
                Kept::Elsewhere,
                &metrics,
            );
        });
        assert_eq!(doubts.state().doubts.len(), UNKEPT_MAX);
    }
}
