//! asyncproxy answers an HTTP sender at once and proxies each request to its destination
//! afterwards, at a rate the destination can bear, through a queue that survives crashes.
//!
//! ```text
//! sender ─▶ intake ─▶ admission ─┬─ direct channel ─▶ proxy workers ─▶ destination
//!                                │                        │ failed
//!                                └─▶ store ◀──────────────┘
//!                                      │ claim (token bucket, lease)
//!                                      ▼
//!                                   queue workers ─▶ destination ─▶ settle (delivered, later, dead)
//! ```
//!
//! Each arrow is a bounded channel or a call; data only moves forward. One value, the recorded
//! [`request::Request`], travels the whole way.
//!
//! # Modules in reading order
//!
//! 1. Pure, no I/O: [`request`], [`limiter`], [`settle`], [`breaker`], [`trend`].
//! 2. The outside: [`queue`] (the [`queue::Store`] contract, its two stores, and the threads
//!    that write, claim and settle), [`upstream`] (the destination).
//! 3. The pipeline: [`admission`], [`direct`], [`worker`], [`intake`], [`control`], [`drain`].
//! 4. What all use: [`metrics`], [`status`], [`progress`], [`systemd`], [`logger`], [`lines`], [`printable`], [`thread`],
//!    [`clock`], [`budget`], [`allocator`], [`machine`], [`descriptors`], [`regular_file`].
//! 5. The whole: [`config`], [`cli`], [`app`].
//!
//! # Invariants
//!
//! - A sender is told of success only for what is in the direct channel or committed.
//! - An accepted request is in the store, or counted: in flight (direct) or in the room (claimed)
//!   until it is settled; a shutdown waits for the counts, and stores what channels and slots hold.
//! - A claim is a lease, never a delete; no transaction or connection is held during a send.
//! - Settling names row id *and* attempt, so that a late settlement changes nothing.
//! - No SQL outside [`queue`], no parsing of HTTP requests outside [`intake`] and of answers outside
//!   [`upstream`] (but for [`control::ask`], which reads what our own control port answers), no ureq
//!   outside [`upstream`].
//! - Every channel is bounded, every thread is spawned by [`thread`], and one that ends
//!   unexpectedly ends the program with an error.
//! - Time enters pure code as an argument.
//! - Header values and bodies reach no log.

pub mod admission;
pub mod allocator;
pub mod app;
pub mod breaker;
pub mod budget;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod descriptors;
pub mod direct;
pub mod drain;
pub mod intake;
pub mod limiter;
pub mod lines;
pub mod logger;
pub mod machine;
pub mod metrics;
pub mod printable;
pub mod progress;
pub mod queue;
pub mod regular_file;
pub mod request;
pub mod settle;
pub mod status;
pub mod systemd;
pub mod thread;
pub mod tls;
pub mod trend;
pub mod upstream;
pub mod worker;
