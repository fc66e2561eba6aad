//! Tests against real stores, and of the program from outside: its binary, over sockets.
#![allow(
    clippy::unwrap_used,
    clippy::too_many_lines,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a test says what is wrong by panicking, its threads are its own, its tables may be long"
)]
#![allow(
    unreachable_pub,
    missing_debug_implementations,
    reason = "nobody uses this as a library"
)]

mod support;

mod ack;
mod adopt;
mod bench;
mod breaker;
mod cli;
mod clock;
mod cluster_rate;
mod contract;
mod crowd;
mod dashboards;
mod delivery;
mod demo;
mod descriptors;
mod docs;
mod doctor;
mod fault_table;
mod faults;
mod fidelity;
mod framing;
mod growth;
mod instances;
mod intake;
mod kills;
mod listening;
mod log;
mod metrics;
mod migrate;
mod model;
mod operate;
mod outage;
mod package;
mod postgres_store;
mod purge;
mod queue_commands;
mod reload;
mod retry;
mod secrets;
mod selftest;
mod shutdown;
mod spool;
mod sqlite_faults;
mod sqlite_store;
mod systemd;
#[cfg(feature = "tls")]
mod tls;
#[cfg(feature = "tls")]
mod tls_destination;
