//! How the classes share what may be claimed. Pure: what the store has is asked through a closure.
//!
//! While both classes wait, each gets one of two tokens, whatever the limit of one claim is; what
//! one does not need goes to the other at once. A second attempt comes with the fresh rows, but
//! counts against the retried ones: so what was never tried gets half of all, however much has
//! failed before.

use std::time::Duration;

use super::{BATCH_ROWS_MAX, Class};

/// By how much one class may be ahead. Whatever happened before, the other catches up with it
/// within so many tokens.
const AHEAD_MAX: i64 = 100;

/// What one claim of one class brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Got {
    pub rows: usize,
    /// Those among them that were never tried.
    pub first: usize,
    /// No more were taken because their bodies were enough for one claim.
    pub is_cut_short: bool,
    /// How long nothing will come, whoever asks.
    pub held_back: Option<Duration>,
    /// Asking for more is in vain: the store does not work.
    pub is_over: bool,
}

/// What came of a look into the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Looked {
    pub claimed: usize,
    /// Of either class there may be more at once.
    pub is_more: bool,
    /// How long nothing will come, whoever asks.
    pub held_back: Option<Duration>,
    /// Retried ones were asked for, and there are none.
    pub no_retried: bool,
}

/// Remembers which class has had more while both waited.
#[derive(Debug, Default)]
pub struct Shares {
    /// Rows never tried that were claimed beyond the others; negative: as many fewer.
    ahead: i64,
}

/// A claim of one class: what was asked for, and what came.
#[derive(Debug, Clone, Copy)]
struct Asked {
    class: Class,
    limit: usize,
    got: Got,
}

impl Asked {
    /// Whether it got all that it asked for, so that more may wait.
    fn is_filled(&self) -> bool {
        self.limit > 0 && (self.got.rows >= self.limit || self.got.is_cut_short)
    }

    /// Whether less is there than was asked for.
    fn is_exhausted(&self) -> bool {
        self.got.rows < self.limit && !self.got.is_cut_short && self.got.held_back.is_none()
    }
}

impl Shares {
    /// Claims up to `limit` rows, of which up to `retried_max` may be retried ones, by `claim`: at
    /// most once of each class. The store is asked in any case, if only for nothing.
    pub fn claim(
        &mut self,
        limit: usize,
        retried_max: usize,
        mut claim: impl FnMut(Class, usize) -> Got,
    ) -> Looked {
        let (class, share) = self.first(limit, retried_max);
        let got = claim(class, share);
        let first = Asked {
            class,
            limit: share,
            got,
        };
        let rest = limit.saturating_sub(got.rows);
        let (class, rest) = match class {
            Class::Fresh => (Class::Retried, rest.min(retried_max)),
            Class::Retried => (Class::Fresh, rest),
        };
        let is_over = got.is_over || got.held_back.is_some() || rest == 0;
        let second = (!is_over).then(|| Asked {
            class,
            limit: rest,
            got: claim(class, rest),
        });
        let asked: Vec<Asked> = [Some(first), second].into_iter().flatten().collect();
        self.note(&asked, retried_max);
        Looked {
            claimed: asked.iter().map(|asked| asked.got.rows).sum(),
            is_more: asked.iter().any(Asked::is_filled),
            held_back: asked.iter().find_map(|asked| asked.got.held_back),
            no_retried: asked.iter().any(|asked| {
                asked.class == Class::Retried && asked.limit > 0 && asked.got.rows == 0
            }),
        }
    }

    /// Who is asked first, and for how many: so many that both have had as much afterwards.
    fn first(&self, limit: usize, retried_max: usize) -> (Class, usize) {
        let ahead = usize::try_from(self.ahead.unsigned_abs()).unwrap_or(BATCH_ROWS_MAX);
        if limit == 0 || retried_max == 0 {
            (Class::Fresh, limit)
        } else if self.ahead <= 0 {
            (Class::Fresh, (limit + ahead).div_ceil(2).min(limit))
        } else {
            let share = ((limit + ahead) / 2).max(1);
            (Class::Retried, share.min(limit).min(retried_max))
        }
    }

    fn note(&mut self, asked: &[Asked], retried_max: usize) {
        let is_alone = retried_max == 0
            || asked.iter().any(|asked| match asked.class {
                Class::Fresh => asked.is_exhausted(),
                // As many as there are workers for is all that it needs.
                Class::Retried => asked.is_exhausted() || asked.got.rows == retried_max,
            });
        if is_alone {
            self.ahead = 0;
            return;
        }
        let count = |rows: usize| i64::try_from(rows).unwrap_or(i64::MAX);
        for Asked { got, .. } in asked {
            let others = got.rows.saturating_sub(got.first);
            self.ahead = self.ahead.saturating_add(count(got.first));
            self.ahead = self.ahead.saturating_sub(count(others));
        }
        self.ahead = self.ahead.clamp(-AHEAD_MAX, AHEAD_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What waits, and what was claimed of it.
    #[derive(Debug, Default)]
    struct Waiting {
        first: usize,
        second: usize,
        retried: usize,
    }

    impl Waiting {
        fn claim(&mut self, class: Class, limit: usize) -> Got {
            let take = |rows: &mut usize, limit: usize| {
                let taken = limit.min(*rows);
                *rows -= taken;
                taken
            };
            if class == Class::Retried {
                let rows = take(&mut self.retried, limit);
                return Got {
                    rows,
                    ..Got::default()
                };
            }
            // One of each, as if they had come in turns.
            let second = take(&mut self.second, limit / 2);
            let first = take(&mut self.first, limit - second);
            let rest = take(&mut self.second, limit - first - second);
            Got {
                rows: first + second + rest,
                first,
                ..Got::default()
            }
        }
    }

    /// Claims as often as there are limits; returns what was claimed: first, second, retried.
    fn claimed(before: &Waiting, limits: &[usize], retried_max: usize) -> [usize; 3] {
        let mut waiting = Waiting { ..*before };
        let mut shares = Shares::default();
        for limit in limits {
            shares.claim(*limit, retried_max, |class, limit| {
                waiting.claim(class, limit)
            });
        }
        [
            before.first - waiting.first,
            before.second - waiting.second,
            before.retried - waiting.retried,
        ]
    }

    #[test]
    fn with_one_token_at_a_time_the_classes_alternate() {
        let both = Waiting {
            first: 100,
            retried: 100,
            ..Waiting::default()
        };
        assert_eq!(claimed(&both, &[1; 9], usize::MAX), [5, 0, 4]);
        let fresh = Waiting {
            first: 100,
            ..Waiting::default()
        };
        assert_eq!(claimed(&fresh, &[1; 9], usize::MAX), [9, 0, 0]);
        let retried = Waiting {
            retried: 100,
            ..Waiting::default()
        };
        assert_eq!(claimed(&retried, &[1; 9], usize::MAX), [0, 0, 9]);
    }

    #[test]
    fn what_one_does_not_need_goes_to_the_other_at_once() {
        let waiting = Waiting {
            first: 2,
            retried: 100,
            ..Waiting::default()
        };
        assert_eq!(claimed(&waiting, &[10], usize::MAX), [2, 0, 8]);
        let waiting = Waiting {
            first: 100,
            retried: 2,
            ..Waiting::default()
        };
        // Those asked first have got their share, so it takes further claims.
        assert_eq!(claimed(&waiting, &[10, 3, 1], usize::MAX), [8, 0, 2]);
        let no_workers = Waiting {
            first: 100,
            retried: 100,
            ..Waiting::default()
        };
        assert_eq!(claimed(&no_workers, &[10, 7], 0), [17, 0, 0]);
    }

    /// Whatever the limits are: over any stretch, and however much waits.
    #[test]
    fn what_was_never_tried_gets_half_of_any_stretch() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let largest = random.usize(1..=60);
            let mut waiting = Waiting {
                first: usize::MAX / 4,
                second: if random.bool() { usize::MAX / 4 } else { 0 },
                retried: usize::MAX / 4,
            };
            let has_second = waiting.second > 0;
            let mut shares = Shares::default();
            let mut sums = Vec::from([(0_usize, 0_usize)]);
            for _ in 0..300 {
                let limit = random.usize(1..=largest);
                let before = waiting.first;
                let looked = shares.claim(limit, usize::MAX, |class, limit| {
                    waiting.claim(class, limit)
                });
                let (first, all) = sums.last().copied().unwrap();
                sums.push((first + before - waiting.first, all + looked.claimed));
            }
            for (begin, (first, all)) in sums.iter().enumerate() {
                for (first_after, all_after) in &sums[begin..] {
                    let got = 2 * (first_after - first);
                    // One claim may come before its turn.
                    let slack = if has_second { 2 * largest } else { 2 } + 2;
                    assert!(got + slack >= all_after - all, "seed {seed} from {begin}");
                }
            }
        }
    }

    /// What is held back for want of shared tokens is made up for by the next claims.
    #[test]
    fn tokens_that_instances_share_are_shared_by_the_classes_too() {
        let mut shares = Shares::default();
        let mut claimed = [0, 0];
        for tokens in (1..=7).cycle().take(700) {
            shares.claim(240, 180, |class, limit| {
                let rows = limit.min(tokens);
                claimed[usize::from(class == Class::Retried)] += rows;
                Got {
                    rows,
                    first: if class == Class::Fresh { rows } else { 0 },
                    held_back: Some(Duration::from_millis(50)),
                    ..Got::default()
                }
            });
        }
        assert!(claimed[0].abs_diff(claimed[1]) <= 8, "{claimed:?}");
    }

    #[test]
    fn a_store_that_does_not_work_is_asked_once() {
        let mut asked = 0;
        let looked = Shares::default().claim(0, 8, |_, limit| {
            asked += 1;
            assert_eq!(limit, 0);
            Got {
                is_over: true,
                ..Got::default()
            }
        });
        assert_eq!((asked, looked), (1, Looked::default()));
    }
}
