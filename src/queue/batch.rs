//! One policy for a batch that the store does not take as a whole, for all who bring batches.
//!
//! A refusal may be about one item among hundreds: halves are tried, and their halves, until the
//! refused one stands alone. Only that one is judged, by whoever brought it; the others go on.
//! Anything else is the store's, and says nothing about any item: what has not been carried out then
//! is for another time. A busy one may take a half where the whole took it too long. Nothing is tried twice here.

use std::ops::Range;

use super::StoreError;

/// Items refused alone one after the other, with none taken in between, after which no further one is
/// asked about: such a store refuses whatever it is given, and nobody is to be judged by it.
pub const REFUSED_IN_A_ROW_MAX: usize = 8;

/// What became of one part of a batch; the parts come in order and leave none out.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<T> {
    Taken(Range<usize>, T),
    /// One item, refused alone, and why.
    Refused(usize, String),
}

/// Why a batch was not carried out to its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The first item that nothing is known about.
    pub from: usize,
    /// An outage, a store that is busy, or the last refusal of a store that takes nothing.
    pub error: StoreError,
}

/// Carries out `operation` with all items, in as few calls as it takes, and tells of each part.
/// One refused item among n costs about 1.5 log2 n further calls, a store that refuses all of them
/// log2 n + [`REFUSED_IN_A_ROW_MAX`].
///
/// # Errors
/// [`Stopped`].
pub fn carry_out<I, T>(
    items: &[I],
    mut operation: impl FnMut(&[I]) -> Result<T, StoreError>,
    mut tell: impl FnMut(Part<T>),
) -> Result<(), Stopped> {
    let (mut from, mut size, mut in_a_row) = (0, items.len(), 0);
    // The end of a part that was refused: somewhere before it lies what was.
    let mut suspect = None;
    while from < items.len() {
        let len = match suspect {
            Some(end) => usize::max((end - from) / 2, 1),
            None => size.min(items.len() - from),
        };
        let part = from..from + len;
        match operation(&items[part.clone()]) {
            Ok(value) => {
                from = part.end;
                // Together they may have been too much.
                suspect = suspect.filter(|end| *end > from);
                size = size.saturating_mul(4);
                in_a_row = 0;
                tell(Part::Taken(part, value));
            }
            Err(StoreError::Refused(_) | StoreError::Busy(_)) if len > 1 => {
                suspect = Some(part.end);
            }
            Err(StoreError::Refused(why)) if in_a_row < REFUSED_IN_A_ROW_MAX => {
                tell(Part::Refused(from, why));
                from += 1;
                // Its neighbours may be no better: the next part is small, and then they grow.
                (suspect, size) = (None, 1);
                in_a_row += 1;
            }
            Err(error) => return Err(Stopped { from, error }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A store that refuses what is `true`; counts the calls.
    fn run(items: &[bool]) -> (Vec<usize>, Vec<usize>, usize, Result<(), Stopped>) {
        let (mut taken, mut refused, mut calls) = (Vec::new(), Vec::new(), 0);
        let result = carry_out(
            items,
            |part| {
                calls += 1;
                match part.contains(&true) {
                    true => Err(StoreError::Refused("bad".into())),
                    false => Ok(part.len()),
                }
            },
            |part| match part {
                Part::Taken(range, len) => {
                    assert_eq!(range.len(), len);
                    taken.extend(range);
                }
                Part::Refused(index, why) => {
                    assert_eq!(why, "bad");
                    refused.push(index);
                }
            },
        );
        (taken, refused, calls, result)
    }

    #[test]
    fn a_busy_store_judges_nobody_and_takes_in_halves_what_was_too_much() {
        let carry_out = |most: usize| {
            let mut told = Vec::new();
            let result = carry_out(
                &[(); 100],
                |part| match part.len() > most {
                    true => Err(StoreError::Busy("statement timeout".into())),
                    false => Ok(()),
                },
                |part| told.push(part),
            );
            (told, result)
        };
        let (told, result) = carry_out(10);
        assert_eq!(result, Ok(()));
        assert!(told.iter().all(|part| matches!(part, Part::Taken(..))));
        let (told, result) = carry_out(0);
        assert!(told.is_empty());
        let error = StoreError::Busy("statement timeout".into());
        assert_eq!(result, Err(Stopped { from: 0, error }));
    }

    #[test]
    fn a_good_batch_is_one_call() {
        let (taken, refused, calls, result) = run(&[false; 500]);
        assert_eq!((taken.len(), refused.len(), calls), (500, 0, 1));
        assert_eq!(result, Ok(()));
        assert_eq!(run(&[]).2, 0);
    }

    #[test]
    fn one_refused_item_stands_alone_wherever_it_lies() {
        for bad in [0, 1, 249, 250, 255, 498, 499] {
            let mut items = [false; 500];
            items[bad] = true;
            let (taken, refused, calls, result) = run(&items);
            assert_eq!((taken.len(), refused), (499, vec![bad]));
            assert!(calls <= 20, "{calls} calls for number {bad}");
            assert_eq!(result, Ok(()));
        }
    }

    #[test]
    fn a_store_that_refuses_all_is_not_asked_about_each() {
        let (taken, refused, calls, result) = run(&[true; 500]);
        assert_eq!((taken.len(), refused.len()), (0, REFUSED_IN_A_ROW_MAX));
        assert!(calls <= 20, "{calls}");
        let error = StoreError::Refused("bad".into());
        let from = REFUSED_IN_A_ROW_MAX;
        assert_eq!(result, Err(Stopped { from, error }));
    }

    #[test]
    fn an_outage_ends_it_and_judges_nobody() {
        let mut calls = 0;
        let mut told = Vec::new();
        let result = carry_out(
            &[0; 8],
            |part| {
                calls += 1;
                match (calls, part.len()) {
                    (1, _) => Err(StoreError::Refused("bad".into())),
                    (2, 4) => Ok(()),
                    _ => Err(StoreError::Unavailable("away".into())),
                }
            },
            |part| told.push(part),
        );
        let error = StoreError::Unavailable("away".into());
        assert_eq!(result, Err(Stopped { from: 4, error }));
        assert_eq!(told, [Part::Taken(0..4, ())]);
    }

    proptest! {
        #[test]
        fn each_item_is_told_of_once_and_judged_alone(
            items in prop::collection::vec(prop::bool::weighted(0.1), 0..300)
        ) {
            let (taken, refused, calls, result) = run(&items);
            let until = result.map_or_else(|stopped| stopped.from, |()| items.len());
            let expected = |bad| (0..until).filter(|at| items[*at] == bad).collect::<Vec<_>>();
            prop_assert_eq!(taken, expected(false));
            let bad = expected(true);
            prop_assert_eq!(&refused, &bad);
            prop_assert!(calls <= 1 + 20 * (bad.len() + 1), "{} calls", calls);
        }
    }
}
