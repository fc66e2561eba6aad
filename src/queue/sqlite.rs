//! The SQLite store.

use std::path::PathBuf;
use std::time::Duration;

use super::{Claim, NewRow, Sample, Settled, Settlement, Store, StoreError};

#[derive(Debug)]
pub struct SqliteStore;

impl SqliteStore {
    pub fn new(_path: PathBuf, _use_index: bool, _timeout: Duration) -> SqliteStore {
        SqliteStore
    }
}

impl Store for SqliteStore {
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
