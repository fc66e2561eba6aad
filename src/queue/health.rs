//! What is known of the store: whether it works, as the last operation on it showed, and how many
//! rows it holds.
//!
//! While it does not, only the poller goes on trying: nobody else waits out a timeout that
//! another has waited out already. An operation that the store refuses shows that it works.

use std::sync::{Mutex, PoisonError};

use super::StoreError;
use super::depth::Depth;
use super::doubts::Doubts;
use crate::logger::LogLimit;
use crate::metrics::Metrics;

static FAILURES: LogLimit = LogLimit::new();
/// Apart from these: however many there are, they hide no outage.
static REFUSALS: LogLimit = LogLimit::new();

/// Shared by all who use the store.
#[derive(Debug, Default)]
pub struct StoreHealth {
    state: Mutex<State>,
    pub depth: Depth,
    pub doubts: Doubts,
}

#[derive(Debug, Clone, Default)]
enum State {
    /// Not tried yet: taken for working.
    #[default]
    Unknown,
    Up,
    Down(StoreError),
}

impl StoreHealth {
    pub fn new(depth: Depth) -> StoreHealth {
        StoreHealth {
            state: Mutex::default(),
            depth,
            doubts: Doubts::default(),
        }
    }

    /// Why the store cannot be used, if it cannot.
    pub fn fault(&self) -> Option<StoreError> {
        match &*self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Down(error) => Some(error.clone()),
            State::Unknown | State::Up => None,
        }
    }

    /// Notes how an operation ended, logs a change and passes the result on.
    ///
    /// # Errors
    /// The operation's own.
    pub fn note<T>(
        &self,
        operation: &str,
        result: Result<T, StoreError>,
        metrics: &Metrics,
    ) -> Result<T, StoreError> {
        let outage = result.as_ref().err().filter(|error| error.is_outage());
        let now = match outage {
            None => State::Up,
            Some(error) => State::Down(error.clone()),
        };
        let before = {
            // Every admission looks in here: nothing is logged meanwhile.
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, now)
        };
        metrics.store_up.set(i64::from(outage.is_none()));
        match (outage, before) {
            (None, State::Unknown) => log::info!("store is ready"),
            (None, State::Down(_)) => log::warn!("store works again"),
            (None, State::Up) | (Some(_), _) => {}
        }
        if let Err(error) = &result {
            metrics.store_errors.inc();
            let (limit, what) = match outage {
                Some(_) => (&FAILURES, "store does not work"),
                None => (&REFUSALS, "store refused an operation"),
            };
            if let Some(suppressed) = limit.allow() {
                log::error!(operation, error:%, suppressed; "{what}");
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_last_operation() {
        let metrics = Metrics::new(1).unwrap();
        let health = StoreHealth::default();
        assert_eq!(health.fault(), None);
        let down = StoreError::Unavailable("refused".into());
        let noted = health.note::<()>("append", Err(down.clone()), &metrics);
        assert_eq!(noted, Err(down.clone()));
        assert_eq!(health.fault(), Some(down));
        assert_eq!(metrics.store_up.get(), 0);
        assert_eq!(health.note("claim", Ok(1), &metrics), Ok(1));
        assert_eq!(health.fault(), None);
        assert_eq!(metrics.store_up.get(), 1);
    }

    #[test]
    fn what_it_refuses_is_no_outage() {
        let metrics = Metrics::new(1).unwrap();
        let health = StoreHealth::default();
        let refused = StoreError::Refused("value too long".into());
        let noted = health.note::<()>("append", Err(refused.clone()), &metrics);
        assert_eq!(noted, Err(refused));
        assert_eq!(health.fault(), None);
        assert_eq!(metrics.store_up.get(), 1);
        assert_eq!(metrics.store_errors.get(), 1);
    }
}
