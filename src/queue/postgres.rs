//! The Postgres store.

use std::time::Duration;

use super::{Claim, NewRow, Sample, Settled, Settlement, Store, StoreError};

#[derive(Debug)]
pub struct PostgresStore;

impl PostgresStore {
    pub fn new(
        _config: ::postgres::Config,
        _max_connections: u32,
        _use_index: bool,
        _timeout: Duration,
    ) -> PostgresStore {
        PostgresStore
    }
}

impl Store for PostgresStore {
    fn append(&self, _rows: &[NewRow]) -> Result<(), StoreError> {
        unimplemented!()
    }
    fn claim(&self, _limit: usize, _lease: Duration) -> Result<Claim, StoreError> {
        unimplemented!()
    }
    fn settle(&self, _settlements: &[Settlement]) -> Result<Settled, StoreError> {
        unimplemented!()
    }
    fn sample(&self) -> Result<Sample, StoreError> {
        unimplemented!()
    }
}
