//! `asyncproxy sink`: a destination that prints what reaches it, for trying things out.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use super::Sink;
use crate::budget::{Budget, Permit};
use crate::config::shown_address;
use crate::intake::Answer;
use crate::intake::builtin::{Acceptor, Received, Service, Times};
use crate::printable;
use crate::thread::Threads;

/// Connections at once: more than proxies usually have workers.
const CONNECTIONS_MAX: usize = 2048;
const TIMES: Times = Times {
    request: Duration::from_secs(60),
    idle: Duration::from_secs(600),
};
/// Bytes of a body that are accepted, of all bodies under way, and of each that are printed.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
const HELD_BYTES_MAX: usize = 1024 * 1024 * 1024;
const PRINTED_BYTES_MAX: usize = 4096;

/// Runs until the process is told to stop.
///
/// # Errors
/// The system's, when the address cannot be listened on.
pub fn run(sink: &Sink) -> io::Result<()> {
    let listener = sink.bind.listen()?.socket;
    print(&format!("listening on {}\n", shown_address(&listener)?));
    let threads = Threads::default();
    let printer = Arc::new(Printer {
        sink: sink.clone(),
        budget: Budget::new(HELD_BYTES_MAX),
    });
    let _acceptor = Acceptor::start("sink", listener, printer, TIMES, CONNECTIONS_MAX, &threads)?;
    let _ = threads.ended().recv();
    Err(io::Error::other("a thread ended unexpectedly"))
}

struct Printer {
    sink: Sink,
    budget: Arc<Budget>,
}

impl Service for Printer {
    fn body_bytes_max(&self) -> usize {
        BODY_BYTES_MAX
    }

    fn permit(&self) -> Permit {
        self.budget.permit()
    }

    fn serve(&self, received: Received<'_>) -> Answer {
        print(&describe(&received));
        std::thread::sleep(self.sink.delay);
        Answer::Accepted(self.sink.status)
    }

    fn refuse(&self, answer: Answer) -> Answer {
        print(&format!("[refused with {}]\n\n", answer.status()));
        answer
    }

    fn is_draining(&self) -> bool {
        false
    }
}

/// One request as text; nothing in it can steer the terminal.
fn describe(received: &Received<'_>) -> String {
    let head = received.head;
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} {}",
        head.method,
        printable::line(head.target.as_bytes())
    );
    for field in head.fields {
        let _ = writeln!(text, "{}: {}", field.name, printable::line(field.value));
    }
    let body = &received.body;
    let printed = &body[..body.len().min(PRINTED_BYTES_MAX)];
    let _ = writeln!(text, "\n{}", printable::text(printed));
    let more = body.len() - printed.len();
    if more > 0 {
        let _ = writeln!(text, "[{} more]", printable::count(more as u64, "byte"));
    }
    text.push('\n');
    text
}

fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    // Nobody looks at it any more: go on answering.
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}
