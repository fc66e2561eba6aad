//! Reads from a connection: heads and bodies, as the bytes come in, within all limits.

use std::io;

use super::head::{FIELDS_BYTES_MAX, FIELDS_MAX, Framing, Scan};
use crate::budget::Permit;
use crate::intake::Answer;

/// What one read takes at most, while nothing larger is under way.
const BUFFER_BYTES: usize = 16 * 1024;
/// What is received at once without waiting: most requests in whole.
const RECEIVED_BYTES: usize = 64 * 1024;
/// Empty lines before a request that are overlooked (RFC 9112 §2.2).
const EMPTY_LINES_MAX: usize = 2;
/// Longest line that tells a chunk's size, with its extensions.
const CHUNK_LINE_BYTES_MAX: usize = 4096;

/// Where bytes come from.
pub trait Source {
    /// Waits a moment for the first bytes of a request. 0 at the end of the connection.
    ///
    /// # Errors
    /// The system's; `TimedOut` or `WouldBlock` when the moment is over.
    fn read_first(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Waits for more of a request, until that request's deadline.
    ///
    /// # Errors
    /// As [`Source::read_first`]; `ConnectionAborted` when the place is needed for others.
    fn read_more(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Asks the sender for the body it holds back.
    ///
    /// # Errors
    /// The system's.
    fn send_continue(&mut self) -> io::Result<()>;

    /// Whether the others may be called at all. If not, a request that is not here in whole ends
    /// with [`Fault::Idle`], and what was received of it stays where it is.
    fn can_wait(&self) -> bool {
        true
    }
}

/// Why no request could be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// The sender has closed the connection. Nothing to answer.
    Gone,
    /// No request has begun within the moment, or what there is of one may not be waited for.
    Idle,
    Refused(Answer),
}

impl From<Answer> for Fault {
    fn from(answer: Answer) -> Fault {
        Fault::Refused(answer)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

fn interrupted(error: &io::Error) -> Fault {
    match error.kind() {
        _ if is_timeout(error) => Fault::Refused(Answer::Timeout),
        io::ErrorKind::ConnectionAborted => Fault::Refused(Answer::Overloaded),
        _ => Fault::Gone,
    }
}

/// A connection's bytes that were received and not yet used.
#[derive(Debug, Default)]
pub struct Input {
    buffer: Vec<u8>,
    /// What is filled and unused.
    start: usize,
    end: usize,
}

impl Input {
    /// Whether nothing was received beyond what was used.
    pub fn is_empty(&self) -> bool {
        self.unused().is_empty()
    }

    fn unused(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Makes room for a read behind what is unused.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 && self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.buffer.len() {
            // Zeroed by the allocator, mostly without touching it. Heads are limited, so this is, too.
            let grown = (2 * self.buffer.len()).max(BUFFER_BYTES);
            let mut larger = vec![0; grown];
            larger[..self.end].copy_from_slice(&self.buffer[..self.end]);
            self.buffer = larger;
        }
        &mut self.buffer[self.end..]
    }

    /// Forgets what it holds, for bytes that are received without waiting for them: the room for
    /// them, of which [`Input::received`] tells how much was filled.
    pub fn anew(&mut self) -> &mut [u8] {
        self.anew_after(&[])
    }

    /// The same, behind bytes that were received before; there is room for one more at least.
    pub fn anew_after(&mut self, before: &[u8]) -> &mut [u8] {
        let needed = RECEIVED_BYTES.max(before.len() + 1);
        if self.buffer.len() < needed {
            self.buffer = vec![0; needed];
        }
        self.buffer[..before.len()].copy_from_slice(before);
        (self.start, self.end) = (0, before.len());
        &mut self.buffer[before.len()..]
    }

    pub fn received(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// Where the unused bytes begin and end, for [`Input::since`].
    pub fn mark(&self) -> (usize, usize) {
        (self.start, self.end)
    }

    /// The bytes that were unused at `mark`, however many of them have been used since by a
    /// [`Source`] that cannot wait.
    pub fn since(&self, mark: (usize, usize)) -> &[u8] {
        &self.buffer[mark.0..mark.1]
    }

    /// An input that goes on with bytes that another received.
    pub fn holding(received: Vec<u8>) -> Input {
        Input {
            start: 0,
            end: received.len(),
            buffer: received,
        }
    }

    fn fill(&mut self, source: &mut impl Source) -> Result<(), Fault> {
        if !source.can_wait() {
            return Err(Fault::Idle);
        }
        self.forget_room();
        match source.read_more(self.room()) {
            Ok(0) => Err(Fault::Refused(Answer::CutShort)),
            Ok(bytes) => {
                self.end += bytes;
                Ok(())
            }
            Err(error) => Err(interrupted(&error)),
        }
    }

    /// Gives up the room for a large head, or for what was received at once, when it is used.
    fn forget_room(&mut self) {
        if self.is_empty() && self.buffer.len() > BUFFER_BYTES {
            *self = Input::default();
        }
    }

    /// Waits for the first bytes of a request.
    fn begin(&mut self, source: &mut impl Source) -> Result<(), Fault> {
        if !source.can_wait() {
            return Err(Fault::Idle);
        }
        self.forget_room();
        match source.read_first(self.room()) {
            Err(error) if is_timeout(&error) => Err(Fault::Idle),
            Ok(0) | Err(_) => Err(Fault::Gone),
            Ok(bytes) => {
                self.end += bytes;
                Ok(())
            }
        }
    }

    /// Reads the next request's head into `head`, within the memory limit as it comes in.
    ///
    /// # Errors
    /// [`Fault`]; the connection is then of no more use.
    pub fn read_head(
        &mut self,
        source: &mut impl Source,
        head: &mut Vec<u8>,
        permit: &mut Permit,
    ) -> Result<(), Fault> {
        let mut empty_lines = 0;
        loop {
            if self.unused().is_empty() {
                self.begin(source)?;
            }
            if self.unused() == b"\r" {
                self.fill(source)?;
            }
            if !self.unused().starts_with(b"\r\n") {
                break;
            }
            if empty_lines == EMPTY_LINES_MAX {
                return Err(Answer::Malformed("empty lines before the request").into());
            }
            self.consume(2);
            empty_lines += 1;
        }
        let mut scan = Scan::default();
        loop {
            if let Some(length) = scan.end(self.unused())? {
                head.clear();
                head.extend_from_slice(&self.unused()[..length]);
                self.consume(length);
                return cover(permit, length);
            }
            cover(permit, self.unused().len())?;
            self.fill(source)?;
        }
    }

    /// Reads a body of at most `bytes_max` bytes, each of them within the memory limit.
    ///
    /// # Errors
    /// [`Fault`]; the connection is then of no more use.
    pub fn read_body(
        &mut self,
        source: &mut impl Source,
        framing: Framing,
        bytes_max: usize,
        permit: &mut Permit,
    ) -> Result<Vec<u8>, Fault> {
        let mut body = Vec::new();
        match framing {
            Framing::Length(length) => {
                let length = within(0, length, bytes_max)?;
                if !source.can_wait() && length > self.unused().len() {
                    return Err(Fault::Idle);
                }
                self.read_bytes(source, length, length, &mut body, permit)?;
            }
            Framing::Chunked => self.read_chunks(source, bytes_max, &mut body, permit)?,
        }
        // What is counted is what is held.
        body.shrink_to_fit();
        Ok(body)
    }

    /// Whether the next `framing` is here in whole, so that nobody need be asked for it.
    pub fn holds(&self, framing: Framing) -> bool {
        match framing {
            Framing::Length(length) => self.unused().len() as u64 >= length,
            Framing::Chunked => !self.unused().is_empty(),
        }
    }

    /// Reads `length` bytes of a body that has at most `bytes_max` in the end.
    fn read_bytes(
        &mut self,
        source: &mut impl Source,
        mut length: usize,
        bytes_max: usize,
        body: &mut Vec<u8>,
        permit: &mut Permit,
    ) -> Result<(), Fault> {
        loop {
            let bytes = length.min(self.unused().len());
            if !permit.try_grow(bytes) {
                return Err(Answer::Overloaded.into());
            }
            if body.capacity() - body.len() < bytes {
                // As it comes: what is only announced costs nothing.
                let doubled = body.len().min(bytes_max - body.len());
                body.reserve_exact(bytes.max(doubled));
            }
            body.extend_from_slice(&self.unused()[..bytes]);
            self.consume(bytes);
            length -= bytes;
            if length == 0 {
                return Ok(());
            }
            self.fill(source)?;
        }
    }

    fn read_chunks(
        &mut self,
        source: &mut impl Source,
        bytes_max: usize,
        body: &mut Vec<u8>,
        permit: &mut Permit,
    ) -> Result<(), Fault> {
        loop {
            let size = self.read_line(source, CHUNK_LINE_BYTES_MAX, chunk_size)??;
            if size == 0 {
                return self.skip_trailers(source);
            }
            let size = within(body.len(), size, bytes_max)?;
            self.read_bytes(source, size, bytes_max, body, permit)?;
            let is_end = self.read_line(source, 0, <[u8]>::is_empty)?;
            if !is_end {
                return Err(Answer::Malformed("chunk longer than its size").into());
            }
        }
    }

    fn skip_trailers(&mut self, source: &mut impl Source) -> Result<(), Fault> {
        let mut left = FIELDS_BYTES_MAX;
        for _ in 0..=FIELDS_MAX {
            let length = self.read_line(source, left, <[u8]>::len)?;
            if length == 0 {
                return Ok(());
            }
            left = left.saturating_sub(length + 2);
        }
        Err(Answer::FieldsTooLarge.into())
    }

    /// Reads a line of at most `bytes_max` bytes without its end, and hands it to `use_line`.
    fn read_line<T>(
        &mut self,
        source: &mut impl Source,
        bytes_max: usize,
        use_line: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, Fault> {
        let mut seen = 0;
        loop {
            let unused = self.unused();
            if let Some(at) = unused[seen..].iter().position(|byte| *byte == b'\n') {
                let line = unused[..seen + at]
                    .strip_suffix(b"\r")
                    .filter(|line| !line.contains(&b'\r') && !line.contains(&0))
                    .ok_or(Answer::Malformed("malformed line end in a chunked body"))?;
                if line.len() > bytes_max {
                    return Err(Answer::Malformed("chunk line too long").into());
                }
                let bytes = line.len() + 2;
                let result = use_line(line);
                self.consume(bytes);
                return Ok(result);
            }
            seen = unused.len();
            if seen > bytes_max + 1 {
                return Err(Answer::Malformed("chunk line too long").into());
            }
            self.fill(source)?;
        }
    }
}

/// Makes `permit` one for so many bytes.
fn cover(permit: &mut Permit, bytes: usize) -> Result<(), Fault> {
    permit.shrink_to(bytes);
    match permit.try_grow(bytes - permit.bytes()) {
        true => Ok(()),
        false => Err(Answer::Overloaded.into()),
    }
}

/// The sum of what is there and what is to come, if a body may have so many bytes: what comes.
fn within(there: usize, to_come: u64, bytes_max: usize) -> Result<usize, Answer> {
    usize::try_from(to_come)
        .ok()
        .filter(|to_come| {
            there
                .checked_add(*to_come)
                .is_some_and(|sum| sum <= bytes_max)
        })
        .ok_or(Answer::TooLarge)
}

/// The size in a chunk's first line; extensions (RFC 9112 §7.1.1) are dropped.
fn chunk_size(line: &[u8]) -> Result<u64, Answer> {
    let size = line.split(|byte| *byte == b';').next().unwrap_or_default();
    // White space before an extension is allowed, though none should send it.
    let size = if size.len() < line.len() {
        size.trim_ascii_end()
    } else {
        size
    };
    let digits = str::from_utf8(size)
        .ok()
        .filter(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .ok_or(Answer::Malformed("malformed chunk size"))?;
    u64::from_str_radix(digits, 16).map_err(|_| Answer::TooLarge)
}
