//! What the tests are run with. None of it knows the program's code.

pub mod certificates;
pub mod cgroup;
pub mod crowd;
pub mod dedicated;
pub mod destination;
pub mod disk;
pub mod hang;
pub mod http;
pub mod load;
pub mod metrics;
pub mod pgbouncer;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod relay;
pub mod route;
pub mod seen;
pub mod store;
pub mod usage;
