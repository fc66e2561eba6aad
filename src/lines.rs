//! Lines on their way out of the program, written by a thread of its own: who has a line never
//! waits for whoever reads them.
//!
//! Keeps them in order and in bounds. While there is no room, lines are dropped and counted; when
//! there is again, a line in their place says how many. What cannot be written is lost in silence.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr, write};

/// What is kept of lines that nobody has read yet, at most.
const BYTES_MAX: usize = 256 * 1024;
const LINES_MAX: usize = 2000;

/// Lines that wait to be written. Made for statics: lives as long as the program.
#[derive(Debug)]
pub struct Lines {
    state: Mutex<State>,
    /// A line has come.
    filled: Condvar,
    /// All lines are written.
    emptied: Condvar,
    /// The line that tells of so many that were dropped.
    notice: fn(u64) -> String,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<String>,
    /// Of those, and of the one that is being written.
    bytes: usize,
    being_written: usize,
    /// Dropped since the last that there was room for.
    dropped: u64,
}

impl State {
    /// Room for one more. Once lines have been dropped, half of all has to be free first: else
    /// with a slow reader each second line would tell of one that was dropped.
    fn has_room(&self, bytes: usize) -> bool {
        let part = if self.dropped == 0 { 1 } else { 2 };
        self.bytes + bytes <= BYTES_MAX / part && self.waiting.len() < LINES_MAX / part
    }

    fn push(&mut self, line: String) {
        self.bytes += line.capacity();
        self.waiting.push_back(line);
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.being_written == 0 && self.dropped == 0
    }
}

impl Lines {
    /// `notice` makes the line that tells of so many that were dropped. All lines end with a line
    /// end.
    pub const fn new(notice: fn(u64) -> String) -> Lines {
        Lines {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                bytes: 0,
                being_written: 0,
                dropped: 0,
            }),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            notice,
            dropped: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over a line, if there is room for it.
    pub fn push(&self, line: String) {
        let mut state = self.state();
        if !state.has_room(line.capacity()) {
            state.dropped += 1;
            drop(state);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.tell_of_dropped(&mut state);
        state.push(line);
        drop(state);
        self.filled.notify_one();
    }

    /// Hands over the last words of the program, for which there is always room.
    pub fn push_last(&self, line: String) {
        let mut state = self.state();
        self.tell_of_dropped(&mut state);
        state.push(line);
        drop(state);
        self.filled.notify_one();
    }

    /// In their place: behind what was there before them, and before what comes after.
    fn tell_of_dropped(&self, state: &mut State) {
        if state.dropped > 0 {
            let notice = (self.notice)(std::mem::take(&mut state.dropped));
            state.push(notice);
        }
    }

    /// How many lines were dropped or could not be written, so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all lines are written, for so long at most; tells whether they are.
    pub fn flush(&self, timeout: Duration) -> bool {
        let (state, _) = self
            .emptied
            .wait_timeout_while(self.state(), timeout, |state| !state.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.is_empty()
    }

    /// The thread's side: writes lines as they come, one write for each, for ever.
    pub fn write_to(&self, output: impl AsFd) {
        loop {
            let line = self.next();
            if write_whole(output.as_fd(), line.as_bytes()).is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits for a line. The one before counts as written.
    fn next(&self) -> String {
        let mut state = self.state();
        state.bytes -= std::mem::take(&mut state.being_written);
        loop {
            if state.waiting.is_empty() {
                self.tell_of_dropped(&mut state);
            }
            if let Some(line) = state.waiting.pop_front() {
                state.being_written = line.capacity();
                return line;
            }
            self.emptied.notify_all();
            state = self
                .filled
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Not through [`io::Stderr`], whose lock all would wait for who use it while this waits.
fn write_whole(output: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match retry_on_intr(|| write(&output, bytes)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            // Somebody who shares it has made it so.
            Err(Errno::AGAIN) => {
                let mut ready = [PollFd::new(&output, PollFlags::OUT)];
                retry_on_intr(|| poll(&mut ready, None))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read};

    use super::*;
    use crate::thread::Threads;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn write(lines: &'static Lines, writer: PipeWriter) {
        let write = || lines.write_to(writer);
        Threads::default()
            .spawn_spare("lines".to_owned(), write)
            .unwrap();
    }

    /// Lines that are written into a pipe.
    fn piped() -> (&'static Lines, PipeReader) {
        let lines = Box::leak(Box::new(Lines::new(|count| format!("dropped {count}\n"))));
        let (reader, writer) = io::pipe().unwrap();
        write(lines, writer);
        (lines, reader)
    }

    #[test]
    fn lines_come_out_in_order_and_at_once() {
        let (lines, reader) = piped();
        let mut reader = BufReader::new(reader);
        for number in 0..5000 {
            lines.push(format!("line {number}\n"));
            if number % 100 == 0 {
                assert!(lines.flush(PATIENCE));
            }
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, format!("line {number}\n"));
        }
        assert_eq!(lines.dropped(), 0);
    }

    /// All lines are there or counted, in their order, whatever the size of a line.
    #[test]
    fn what_nobody_reads_is_dropped_counted_and_told_of_in_its_place() {
        for padding in [100, 3000] {
            let (lines, reader) = piped();
            let line = |number| format!("{number} {}\n", "x".repeat(padding));
            const COUNT: u64 = 10_000;
            for number in 0..COUNT {
                lines.push(line(number));
            }
            assert!(!lines.flush(Duration::from_millis(10)), "nobody has read");
            assert!(lines.state().bytes <= BYTES_MAX);
            assert!(lines.state().waiting.len() <= LINES_MAX);
            assert!(lines.dropped() > 0);
            let total = lines.dropped();
            lines.push_last("last\n".to_owned());
            let (mut next, mut told) = (0, 0);
            for read in BufReader::new(reader).lines() {
                let read = read.unwrap();
                if read == "last" {
                    break;
                }
                if let Some(count) = read.strip_prefix("dropped ") {
                    let count: u64 = count.parse().unwrap();
                    (next, told) = (next + count, told + count);
                } else {
                    assert_eq!(format!("{read}\n"), line(next));
                    next += 1;
                }
            }
            assert_eq!((next, told), (COUNT, total));
            assert!(lines.flush(PATIENCE));
        }
    }

    #[test]
    fn the_dropped_are_told_of_though_no_line_follows() {
        let (lines, mut reader) = piped();
        while lines.dropped() < 3 {
            lines.push("x".repeat(1000) + "\n");
        }
        let expected = format!("dropped {}\n", lines.dropped());
        let mut text = Vec::new();
        while !text.ends_with(expected.as_bytes()) {
            let mut bytes = [0; 4096];
            let read = reader.read(&mut bytes).unwrap();
            text.extend_from_slice(&bytes[..read]);
        }
        assert!(lines.flush(PATIENCE));
    }

    #[test]
    fn a_reader_that_is_gone_stops_nothing() {
        let (lines, reader) = piped();
        drop(reader);
        for _ in 0..10 {
            lines.push("line\n".to_owned());
        }
        assert!(lines.flush(PATIENCE));
        assert_eq!(lines.dropped(), 10);
    }

    #[test]
    fn a_pipe_that_does_not_block_gets_each_line_whole() {
        let lines: &Lines = Box::leak(Box::new(Lines::new(|_| String::new())));
        let (reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        write(lines, writer);
        // More than a pipe holds, less than is kept.
        let line = "x".repeat(2000);
        for _ in 0..50 {
            lines.push(format!("{line}\n"));
        }
        assert_eq!(lines.dropped(), 0);
        let read = BufReader::new(reader).lines().take(50);
        assert!(read.map(Result::unwrap).all(|read| read == line));
    }
}
