//! A child process whose output can be waited for. Killed when dropped; what it wrote is shown
//! if the test failed.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

#[derive(Debug)]
pub struct Process {
    child: Child,
    output: Arc<Output>,
}

/// Lines of stdout and stderr, in the order they were read.
#[derive(Debug, Default)]
struct Output {
    state: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    /// Streams at their end: both, once the process has exited.
    ended: usize,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Process {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let output = Arc::new(Output::default());
        output.collect(child.stdout.take().expect("stdout"));
        output.collect(child.stderr.take().expect("stderr"));
        Process { child, output }
    }

    /// Starts a command that finds two sockets where its input and its output would be. Other
    /// descriptors would reach every process that is started at the same time.
    pub fn spawn_with_sockets(command: &mut Command, input: OwnedFd, output: OwnedFd) -> Process {
        let mut child = command
            .stdin(input)
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // It holds copies of the sockets.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let output = Arc::new(Output::default());
        output.lock().ended = 1;
        output.collect(child.stderr.take().expect("stderr"));
        Process { child, output }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains `part`, written before or later.
    pub fn wait_for_line(&self, part: &str, timeout: Duration) -> String {
        let found = |lines: &Lines| lines.lines.iter().find(|line| line.contains(part)).cloned();
        let lines = self
            .output
            .wait(timeout, |lines| found(lines).is_some() || lines.ended == 2);
        found(&lines).unwrap_or_else(|| {
            let ended = if lines.ended == 2 { "ended" } else { "ran on" };
            drop(lines);
            panic!("waited for a line with {part:?}; the process {ended}")
        })
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("signal");
    }

    /// Waits for the end. All output has been read by then.
    pub fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let ended = self.output.wait(timeout, |lines| lines.ended == 2).ended;
        assert_eq!(ended, 2, "the process did not end in {timeout:?}");
        self.child.wait().expect("wait")
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.output.lock().ended == 2
    }

    /// Everything it wrote so far.
    pub fn text(&self) -> String {
        self.output.lock().lines.join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- output of the process:\n{}\n---", self.text());
        }
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, timeout: Duration, done: impl Fn(&Lines) -> bool) -> MutexGuard<'_, Lines> {
        self.changed
            .wait_timeout_while(self.lock(), timeout, |lines| !done(lines))
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn collect(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let output = Arc::clone(self);
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                output.lock().lines.push(text);
                output.changed.notify_all();
            }
            output.lock().ended += 1;
            output.changed.notify_all();
        });
    }
}
