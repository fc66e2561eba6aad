//! Which rows find out whether the destination works. Pure: what the store has is asked through a
//! closure.
//!
//! Those that made the breaker open may be among what waits, and many of them in a row. So probes
//! come from the front of the queue, its end and anywhere in turns, what was never tried comes
//! first, and no row is taken twice while others wait.

use std::collections::VecDeque;

use uuid::Uuid;

use super::{Class, Spot};

/// So many probes are remembered: more than there are in a quarter of an hour.
const TRIED_MAX: usize = 500;
/// Where one after another comes from.
const TURNS: [Spot; 5] = [
    Spot::Front,
    Spot::Anywhere,
    Spot::End,
    Spot::Anywhere,
    Spot::Anywhere,
];

/// Remembers what was tried since the breaker opened.
#[derive(Debug, Default)]
pub struct Probes {
    turn: usize,
    tried: VecDeque<Uuid>,
}

impl Probes {
    /// For when the breaker is closed.
    pub fn forget(&mut self) {
        self.tried.clear();
    }

    /// Claims up to `limit` rows by `claim`, which is told of what class, at what spot, how many
    /// and which not, and returns the ids; `None` if it is in vain to go on. Returns how many.
    pub fn claim(
        &mut self,
        limit: usize,
        mut claim: impl FnMut(Class, Spot, usize, &[Uuid]) -> Option<Vec<Uuid>>,
    ) -> usize {
        let mut claimed = 0;
        for class in [Class::Fresh, Class::Retried] {
            let [front, end, anywhere] = self.shares(limit - claimed);
            // What the others miss is looked for at the front.
            for (spot, share) in [
                (Spot::Anywhere, anywhere),
                (Spot::End, end),
                (Spot::Front, front),
            ] {
                let left = limit - claimed;
                let share = if spot == Spot::Front {
                    left
                } else {
                    share.min(left)
                };
                if share == 0 {
                    continue;
                }
                let Some(ids) = claim(class, spot, share, self.tried.make_contiguous()) else {
                    return claimed;
                };
                claimed += ids.len();
                self.tried.extend(ids);
            }
        }
        if claimed == 0 {
            // Nothing waits but what was tried before: then that may be tried again.
            self.tried.clear();
        }
        let excess = self.tried.len().saturating_sub(TRIED_MAX);
        self.tried.drain(..excess);
        claimed
    }

    /// How many of the next ones come from the front, the end, and anywhere.
    fn shares(&mut self, count: usize) -> [usize; 3] {
        let mut shares = [0; 3];
        for _ in 0..count {
            match TURNS[self.turn] {
                Spot::Front => shares[0] += 1,
                Spot::End => shares[1] += 1,
                Spot::Anywhere => shares[2] += 1,
            }
            self.turn = (self.turn + 1) % TURNS.len();
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    /// Rows that wait, by their numbers, the oldest first; a claim takes them out.
    struct Waiting {
        fresh: Vec<u128>,
        retried: Vec<u128>,
        random: fastrand::Rng,
    }

    impl Waiting {
        fn new(fresh: Range<u128>, retried: Range<u128>) -> Waiting {
            Waiting {
                fresh: fresh.collect(),
                retried: retried.collect(),
                random: fastrand::Rng::with_seed(1),
            }
        }

        fn claim(&mut self, class: Class, spot: Spot, limit: usize, except: &[Uuid]) -> Vec<Uuid> {
            let rows = match class {
                Class::Fresh => &mut self.fresh,
                Class::Retried => &mut self.retried,
            };
            let mut wanted: Vec<u128> = rows.clone();
            match spot {
                Spot::Front => {}
                Spot::End => wanted.reverse(),
                Spot::Anywhere => self.random.shuffle(&mut wanted),
            }
            wanted.retain(|row| !except.contains(&Uuid::from_u128(*row)));
            wanted.truncate(limit);
            rows.retain(|row| !wanted.contains(row));
            wanted.into_iter().map(Uuid::from_u128).collect()
        }

        /// The numbers that a round takes, which then wait for the third attempt.
        fn round(&mut self, probes: &mut Probes, limit: usize) -> Vec<u128> {
            let mut taken = Vec::new();
            let count = probes.claim(limit, |class, spot, limit, except| {
                let ids = self.claim(class, spot, limit, except);
                taken.extend(ids.iter().map(Uuid::as_u128));
                Some(ids)
            });
            assert_eq!(count, taken.len());
            self.retried.extend(&taken);
            taken
        }
    }

    #[test]
    fn single_probes_come_from_front_and_end_and_anywhere_in_turns() {
        let mut waiting = Waiting::new(0..100, 0..0);
        let mut probes = Probes::default();
        let taken: Vec<_> = (0..10)
            .flat_map(|_| waiting.round(&mut probes, 1))
            .collect();
        assert_eq!((taken[0], taken[2]), (0, 99));
        let inside = [1, 3, 4, 6, 8, 9]
            .iter()
            .filter(|turn| (3..97).contains(&taken[**turn]));
        assert!(inside.count() >= 5, "{taken:?}");
    }

    #[test]
    fn fresh_ones_come_first_and_what_is_missing_is_made_up_for() {
        let mut waiting = Waiting::new(0..9, 20..40);
        let mut probes = Probes::default();
        let taken = waiting.round(&mut probes, 5);
        assert!(taken.iter().all(|row| *row < 9), "{taken:?}");
        let taken = waiting.round(&mut probes, 5);
        assert_eq!(taken.iter().filter(|row| **row < 9).count(), 4, "{taken:?}");
        assert_eq!(taken.len(), 5);
    }

    /// However they lie: a tenth of them are found within a few rounds.
    #[test]
    fn a_tenth_of_the_rows_is_found_wherever_it_lies() {
        for begin in (0..=900).step_by(30) {
            let mut waiting = Waiting::new(0..1000, 0..0);
            let mut probes = Probes::default();
            let good = begin..begin + 100;
            let rounds = (1..).find(|_| {
                let taken = waiting.round(&mut probes, 10);
                taken.iter().any(|row| good.contains(row))
            });
            assert!(rounds <= Some(12), "{begin}: {rounds:?}");
        }
    }

    #[test]
    fn no_row_is_taken_twice_while_others_wait() {
        let mut waiting = Waiting::new(0..3, 10..40);
        let mut probes = Probes::default();
        let mut taken: Vec<_> = (0..33)
            .flat_map(|_| waiting.round(&mut probes, 1))
            .collect();
        assert_eq!(waiting.round(&mut probes, 1), [0; 0], "all were tried");
        taken.sort_unstable();
        let all: Vec<_> = (0..3).chain(10..40).collect();
        assert_eq!(taken, all);
        assert_eq!(waiting.round(&mut probes, 1).len(), 1, "nothing else waits");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut probes = Probes::default();
        for row in 0..2000 {
            probes.claim(1, |_, _, _, except| {
                assert!(except.len() <= TRIED_MAX);
                Some(vec![Uuid::from_u128(row)])
            });
        }
        assert_eq!(probes.tried.len(), TRIED_MAX);
    }

    #[test]
    fn a_store_that_does_not_work_is_asked_once() {
        let mut probes = Probes::default();
        let mut asked = 0;
        let claimed = probes.claim(4, |_, _, _, _| {
            asked += 1;
            None
        });
        assert_eq!((claimed, asked), (0, 1));
    }
}
