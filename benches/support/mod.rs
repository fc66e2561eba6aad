//! What the benchmarks share; each uses a part of it.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_debug_implementations,
    reason = "a benchmark: its threads are its own, its results are printed, nobody uses it as a library"
)]

pub mod criteria;
pub mod destination;
pub mod discard;
pub mod load;
pub mod pipeline;
pub mod plot;
pub mod report;
pub mod table;
pub mod tally;

/// What the tests drive the real program with.
#[allow(unused_imports, unused_macros, reason = "of no use here")]
#[path = "../../tests/it/support/mod.rs"]
pub mod program;
