//! How fast requests come and go: rates over the last counts of the store. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::queue::Sample;

/// How far back rates look, and how many counts that is at most: one a second.
const WINDOW: Duration = Duration::from_secs(30);
const MOMENTS_MAX: usize = 31;

/// What has been counted up to some moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moment {
    pub at: Instant,
    pub received: u64,
    pub queued: u64,
    pub delivered: u64,
    /// Rows that waited or were leased.
    pub rows: u64,
}

/// How fast things move, per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    pub received: f64,
    pub delivered: f64,
    /// Rows stored by this instance.
    pub arriving: f64,
    /// Rows that went, whoever delivered them.
    pub leaving: f64,
    /// Rows more than before; negative while the queue shrinks.
    pub growth: f64,
    /// How long the queue will last if it goes on like this; `None` if it does not shrink.
    pub empty_in: Option<Duration>,
}

impl Rates {
    /// Between two moments. `None`: they lie too close together.
    fn between(from: Moment, to: Moment) -> Option<Rates> {
        let seconds = to.at.saturating_duration_since(from.at).as_secs_f64();
        if seconds < 0.1 {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts, shown rounded")]
        let growth = |from: u64, to: u64| (to as f64 - from as f64) / seconds;
        let arriving = growth(from.queued, to.queued);
        let rows = growth(from.rows, to.rows);
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let left = to.rows as f64 / -rows;
        Some(Rates {
            received: growth(from.received, to.received),
            delivered: growth(from.delivered, to.delivered),
            arriving,
            // What others store is not known here: it would count as negative.
            leaving: (arriving - rows).max(0.0),
            growth: rows,
            empty_in: (rows < 0.0)
                .then(|| Duration::try_from_secs_f64(left).ok())
                .flatten(),
        })
    }
}

/// The last counts.
#[derive(Debug, Clone, Default)]
pub struct Trend {
    sample: Sample,
    moments: VecDeque<Moment>,
}

impl Trend {
    /// Takes over a count of the rows, and what else had been counted then.
    pub fn add(&mut self, sample: &Sample, moment: Moment) {
        self.sample = *sample;
        self.moments.push_back(moment);
        let is_before_window = |other: &Moment| moment.at - other.at >= WINDOW;
        // The last one before the window is kept: so all of it is seen.
        while self.moments.len() > MOMENTS_MAX || self.moments.get(1).is_some_and(is_before_window)
        {
            self.moments.pop_front();
        }
    }

    /// The last count of the rows; empty before there was one.
    pub fn sample(&self) -> &Sample {
        &self.sample
    }

    /// When it was made.
    pub fn counted_at(&self) -> Option<Instant> {
        self.moments.back().map(|last| last.at)
    }

    pub fn rates(&self) -> Rates {
        let ends = self.moments.front().zip(self.moments.back());
        ends.and_then(|(first, last)| Rates::between(*first, *last))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(at: Instant, queued: u64, rows: u64) -> Moment {
        Moment {
            at,
            received: 2 * queued,
            queued,
            delivered: 0,
            rows,
        }
    }

    #[test]
    fn a_queue_that_shrinks_has_an_end() {
        let now = Instant::now();
        let later = now + Duration::from_secs(10);
        let rates = Rates::between(moment(now, 100, 1000), moment(later, 150, 900)).unwrap();
        assert_eq!(rates.received, 10.0);
        assert_eq!(rates.arriving, 5.0);
        assert_eq!(rates.leaving, 15.0);
        assert_eq!(rates.growth, -10.0);
        assert_eq!(rates.empty_in, Some(Duration::from_secs(90)));
        let growing = Rates::between(moment(now, 0, 0), moment(later, 0, 0)).unwrap();
        assert_eq!(growing.empty_in, None);
        // Another instance has stored more than this one sent.
        let others = Rates::between(moment(now, 0, 0), moment(later, 0, 500)).unwrap();
        assert_eq!((others.leaving, others.empty_in), (0.0, None));
        assert_eq!(Rates::between(moment(now, 0, 0), moment(now, 9, 9)), None);
    }

    #[test]
    fn rates_are_those_of_the_window() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut trend = Trend::default();
        assert_eq!(
            (trend.rates(), trend.counted_at()),
            (Rates::default(), None)
        );
        trend.add(&Sample::default(), moment(now, 1000, 0));
        assert_eq!(trend.rates(), Rates::default());
        for second in 1..=100 {
            trend.add(&Sample::default(), moment(at(second), 1000 + second, 0));
        }
        assert_eq!(trend.rates().arriving, 1.0);
        assert_eq!(trend.moments.len(), MOMENTS_MAX);
        assert_eq!(trend.moments[0].at, at(70));
        // A count that took minutes.
        trend.add(&Sample::default(), moment(at(1000), 2000, 0));
        assert_eq!(trend.moments.len(), 2);
        assert_eq!(trend.counted_at(), Some(at(1000)));
    }
}
