//! What the tests drive the program with. None of it knows the program's code.

pub mod destination;
pub mod disk;
pub mod http;
pub mod metrics;
pub mod process;
pub mod proxy;
