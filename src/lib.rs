//! asyncproxy answers an HTTP sender at once and proxies each request to its destination
//! afterwards, at a rate the destination can bear, through a queue that survives crashes.

pub mod limiter;
pub mod queue;
pub mod request;
pub mod settle;
