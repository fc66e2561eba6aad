//! `asyncproxy demo`: shows an outage, and leaves nothing behind.

use rustix::process::Signal;

use crate::support::process::Process;
use crate::support::proxy::{PATIENCE, Setup};

/// The program, with its temporary files in a directory of the setup's.
fn demo(setup: &Setup) -> Process {
    std::fs::create_dir(setup.path("tmp")).expect("directory");
    let mut command = setup.command();
    command.args(["demo", "--seconds", "8"]);
    // Settings in the environment are for the program, not for this.
    command
        .env("TMPDIR", setup.path("tmp"))
        .env("SERVER_BIND", "nonsense");
    Process::spawn(&mut command)
}

fn assert_nothing_left(setup: &Setup) {
    let mut left = std::fs::read_dir(setup.path("tmp")).expect("directory");
    assert!(left.next().is_none());
}

/// What the line says of each of these.
fn figures<const N: usize>(line: &str, names: [&str; N]) -> [usize; N] {
    let words: Vec<&str> = line.split_whitespace().collect();
    names.map(|name| {
        let place = words.iter().position(|word| *word == name).expect(name);
        words[place + 1].parse().expect("a number")
    })
}

#[test]
fn shows_the_queue_fill_and_drain() {
    let setup = Setup::empty();
    let mut demo = demo(&setup);
    demo.wait_for_line("arrived: POST /webhooks/github, ", PATIENCE);
    demo.wait_for_line("the destination goes down", PATIENCE);
    demo.wait_for_line("the destination is back", PATIENCE);
    demo.wait_for_line(" 0 lost", PATIENCE);
    let text = demo.text();
    assert!(demo.wait(PATIENCE).success(), "{text}");
    let seconds = text.lines().filter(|line| line.contains("  waiting "));
    let seconds: Vec<_> = seconds
        .map(|line| {
            (
                line,
                figures(line, ["sent", "answered", "delivered", "waiting"]),
            )
        })
        .collect();
    let fullest = seconds.iter().max_by_key(|(_, [.., waiting])| *waiting);
    let (line, [.., waiting]) = fullest.expect("a line for each second");
    assert!(*waiting > 0 && line.ends_with('#'), "{text}");
    let (_, [sent, answered, delivered, waiting]) = seconds.last().expect("a line");
    assert!(sent == answered && answered == delivered, "{text}");
    assert_eq!(*waiting, 0);
    assert!(
        text.contains(&format!("{sent} sent, {sent} answered 200")),
        "{text}"
    );
    assert!(text.contains(&format!("{sent} delivered")), "{text}");
    assert_nothing_left(&setup);
}

#[test]
fn ends_at_a_signal_and_leaves_nothing() {
    let setup = Setup::empty();
    let mut demo = demo(&setup);
    demo.wait_for_line("arrived: POST /webhooks/ebay", PATIENCE);
    demo.signal(Signal::INT);
    demo.wait_for_line("when it was interrupted", PATIENCE);
    assert_eq!(demo.wait(PATIENCE).code(), Some(1));
    assert_nothing_left(&setup);
}
