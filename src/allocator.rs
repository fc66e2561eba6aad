//! What the C library's allocator keeps of memory that was freed.
//!
//! As it comes, glibc raises the size from which an allocation is mapped by itself with each one
//! that is freed, up to 32 MiB. From then on large bodies lie among small things in one of its
//! arenas, which shrink from their ends alone: a burst of 128 MiB left 110 to 400 MB behind. A
//! size that is set stays. What is smaller is given back when asked for.
//!
//! The one module with unsafe code: these two functions of the C library, which have no safe
//! wrapper. Elsewhere than with glibc nothing is done: musl's allocator gives back by itself.
#![allow(
    unsafe_code,
    reason = "mallopt and malloc_trim take and return plain numbers"
)]

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

/// From this size on an allocation is a mapping of its own, which is gone when it is freed. Most
/// bodies are smaller: mapping costs more than the rest of such a request.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: std::ffi::c_int = 128 * 1024;

/// How long memory is left for what may come next. Giving it back holds up whoever allocates.
const PAUSE: Duration = Duration::from_secs(1);

/// Sets the bounds. To be called before there is a second thread.
#[cfg(target_env = "gnu")]
pub fn configure() {
    // SAFETY: a call by value, to a function that any thread may call; no Rust memory is involved.
    let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN) };
    debug_assert_eq!(is_set, 1);
}

/// Returns the pages that nothing lies on to the system.
#[cfg(target_env = "gnu")]
fn give_back() {
    // SAFETY: as above. It takes the allocator's own locks.
    unsafe { libc::malloc_trim(0) };
}

/// Nothing to set.
#[cfg(not(target_env = "gnu"))]
pub fn configure() {}

#[cfg(not(target_env = "gnu"))]
fn give_back() {}

/// Gives memory back a moment after each time it is told that much was freed, until `stop` is
/// closed.
pub fn run(freed: &Receiver<()>, stop: &Receiver<()>) {
    loop {
        crossbeam_channel::select! {
            recv(stop) -> _ => return,
            recv(freed) -> _ => {}
        }
        if stop.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        // What was told meanwhile is given back, too.
        let _ = freed.try_recv();
        give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_when_told_to_whatever_was_freed() {
        configure();
        let (told, freed) = crossbeam_channel::bounded(1);
        let (stopping, stop) = crossbeam_channel::bounded(0);
        told.send(()).unwrap();
        drop(stopping);
        run(&freed, &stop);
        give_back();
    }
}
