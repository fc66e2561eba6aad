//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz requests`: any bytes as a connection's input.

#![no_main]

#[path = "../check.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::check(bytes));
