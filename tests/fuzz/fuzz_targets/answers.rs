//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz answers`: any bytes as a destination's answer.

#![no_main]

#[path = "../answers.rs"]
mod answers;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| answers::check(bytes));
