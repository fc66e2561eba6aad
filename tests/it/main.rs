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
mod answers;
mod bench;
mod beside;
mod breaker;
mod cli;
mod clock;
mod cluster_rate;
mod contract;
mod control;
mod crowd;
mod dashboards;
mod delivery;
mod demo;
mod descriptors;
mod docs;
mod doctor;
mod failover;
mod fair_model;
mod fairness;
mod fault_table;
mod faults;
mod fidelity;
mod files;
mod framing;
mod growth;
mod instances;
mod intake;
mod isolation;
mod kills;
mod listening;
mod log;
mod loops;
mod memory;
mod metrics;
mod migrate;
mod model;
mod operate;
mod outage;
mod owner;
mod package;
mod postgres_store;
mod probes;
mod purge;
mod queue_commands;
mod readiness;
mod refusals;
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
mod unanswered;
