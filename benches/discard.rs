//! A server to point a load generator at: `cargo bench --bench discard -- builtin 127.0.0.1:9000`
//! accepts requests with the named acceptor and drops them. `nginx.sh` compares it with nginx.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "a benchmark")]

mod support;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    if let [acceptor, bind] = arguments.as_slice() {
        support::discard::serve(acceptor, bind);
        loop {
            std::thread::park();
        }
    }
    // Run with all the others, it has nothing to measure.
}
