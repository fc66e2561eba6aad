//! What the tests are run with.

pub mod pgbouncer;
pub mod postgres;
pub mod relay;
