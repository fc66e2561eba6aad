//! asyncproxy answers an HTTP sender at once and proxies each request to its destination
//! afterwards, at a rate the destination can bear, through a queue that survives crashes.

pub mod admission;
pub mod app;
pub mod budget;
pub mod config;
pub mod control;
pub mod descriptors;
pub mod drain;
pub mod intake;
pub mod limiter;
pub mod logger;
pub mod metrics;
pub mod queue;
pub mod request;
pub mod settle;
pub mod thread;
pub mod upstream;
pub mod worker;
