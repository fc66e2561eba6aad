//! Reads an answer: its status, when to come again, and where it ends. Pure: bytes in, what they
//! say out.
//!
//! The status is what a delivery depends on, so it is believed whatever else the head holds. Of
//! the field lines only those count that say where the answer ends, whether the connection is
//! kept, and `Retry-After`; any other may be malformed. When it is not clear where the answer ends,
//! it is over with its head, and the connection can serve no other.

use memchr::memchr;

/// Most bytes of one head.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Most field lines of one head.
pub const LINES_MAX: usize = 256;
/// Most bytes of a line that are looked at.
pub const LINE_BYTES_MAX: usize = 8 * 1024;
/// Most interim answers (1xx) before the final one.
pub const INTERIM_MAX: u32 = 32;

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// The value of `Retry-After` as it came.
    pub retry_after: Option<Vec<u8>>,
}

/// Why there is no answer in what has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    StatusLine,
    /// An alert of TLS instead, as whoever speaks that answers to what is none.
    Tls,
    /// An interim answer whose end was not found.
    EndlessInterim,
    TooManyInterim,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Fault::Tls => "it speaks TLS: is it https://?",
            Fault::StatusLine => "answer without an HTTP/1 status line",
            Fault::EndlessInterim => "interim answer of more than 64 KiB or 256 lines",
            Fault::TooManyInterim => "more than 32 interim answers",
        })
    }
}

/// Reads one answer, and any interim ones before it, from bytes that come bit by bit.
#[derive(Debug)]
pub struct Reader {
    /// The answer is one to HEAD.
    is_to_head: bool,
    stage: Stage,
    /// The rest of the current line does not count.
    is_skipping: bool,
    head: Head,
    interim: u32,
    answer: Option<Answer>,
    keeps_alive: bool,
    body_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    StatusLine,
    FieldLines,
    /// So many more bytes, at least 1.
    Length(u64),
    ToClose,
    ChunkSize,
    /// So many more bytes, at least 1.
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    /// Its end was reached.
    Whole,
    /// Nobody knows where it ends.
    Lost,
}

impl Reader {
    pub fn new(is_to_head: bool) -> Reader {
        Reader {
            is_to_head,
            stage: Stage::StatusLine,
            is_skipping: false,
            head: Head::default(),
            interim: 0,
            answer: None,
            keeps_alive: false,
            body_bytes: 0,
        }
    }

    /// Reads on; returns how many bytes of `input` were used. The rest, less than
    /// [`LINE_BYTES_MAX`] while the answer is not over, has to come again with what follows it.
    ///
    /// # Errors
    /// [`Fault`] if there can be no answer any more.
    pub fn read(&mut self, input: &[u8]) -> Result<usize, Fault> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            let bytes = match self.stage {
                Stage::StatusLine | Stage::FieldLines => self.read_line(rest)?,
                Stage::Whole | Stage::Lost => 0,
                _ => {
                    let bytes = self.read_body(rest);
                    self.body_bytes = self.body_bytes.saturating_add(bytes);
                    bytes
                }
            };
            if bytes == 0 {
                return Ok(used);
            }
            used += bytes;
        }
    }

    /// Nothing more will come.
    pub fn end(&mut self) {
        self.stage = match self.stage {
            Stage::ToClose | Stage::Whole => Stage::Whole,
            _ => Stage::Lost,
        };
    }

    /// The final answer, as soon as its head is read.
    pub fn answer(&self) -> Option<&Answer> {
        self.answer.as_ref()
    }

    /// Whether nothing more is to be read.
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Whole | Stage::Lost)
    }

    /// Whether the connection can serve another exchange, if nothing follows the answer.
    pub fn keeps_alive(&self) -> bool {
        self.keeps_alive && self.stage == Stage::Whole
    }

    /// Bytes of the body that have been read, framing included.
    pub fn body_bytes(&self) -> usize {
        self.body_bytes
    }

    fn read_line(&mut self, input: &[u8]) -> Result<usize, Fault> {
        if self.stage == Stage::StatusLine && self.head.bytes == 0 && is_tls_alert(input) {
            return Err(Fault::Tls);
        }
        let end = memchr(b'\n', input);
        let (line, bytes) = match end {
            _ if self.is_skipping => (None, end.map_or(input.len(), |end| end + 1)),
            Some(end) if end < LINE_BYTES_MAX => (Some(&input[..end]), end + 1),
            _ if input.len() >= LINE_BYTES_MAX => (Some(&input[..LINE_BYTES_MAX]), LINE_BYTES_MAX),
            _ => return Ok(0),
        };
        self.is_skipping = !input[..bytes].ends_with(b"\n");
        self.head.bytes += bytes;
        if self.head.bytes > HEAD_BYTES_MAX {
            self.give_up()?;
        } else if let Some(line) = line {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            match self.stage {
                Stage::StatusLine => self.status_line(line)?,
                _ => self.field_line(line)?,
            }
        }
        Ok(bytes)
    }

    fn status_line(&mut self, line: &[u8]) -> Result<(), Fault> {
        // As before a request (RFC 9112 §2.2): left over from what came before.
        if line.is_empty() && !self.is_skipping {
            return Ok(());
        }
        let (status, is_11) = parse_status_line(line).ok_or(Fault::StatusLine)?;
        self.head = Head {
            status,
            is_11,
            bytes: self.head.bytes,
            ..Head::default()
        };
        self.stage = Stage::FieldLines;
        Ok(())
    }

    fn field_line(&mut self, line: &[u8]) -> Result<(), Fault> {
        if line.is_empty() && !self.is_skipping {
            return self.end_head();
        }
        self.head.lines += 1;
        if self.head.lines > LINES_MAX {
            return self.give_up();
        }
        self.head.take(line, !self.is_skipping);
        Ok(())
    }

    /// The head does not end: what its status line said is believed, and nothing else is read.
    fn give_up(&mut self) -> Result<(), Fault> {
        match self.stage {
            Stage::FieldLines if self.head.is_interim() => return Err(Fault::EndlessInterim),
            Stage::FieldLines => {}
            _ => return Err(Fault::StatusLine),
        }
        self.head.is_ambiguous = true;
        self.end_head()?;
        self.stage = Stage::Lost;
        Ok(())
    }

    fn end_head(&mut self) -> Result<(), Fault> {
        let head = std::mem::take(&mut self.head);
        if head.is_interim() {
            self.interim += 1;
            if self.interim > INTERIM_MAX {
                return Err(Fault::TooManyInterim);
            }
            self.stage = Stage::StatusLine;
            return Ok(());
        }
        self.stage = head.framing(self.is_to_head);
        self.keeps_alive = head.keeps_alive() && self.stage != Stage::ToClose;
        self.answer = Some(Answer {
            status: head.status,
            retry_after: head.retry_after,
        });
        Ok(())
    }

    fn read_body(&mut self, input: &[u8]) -> usize {
        match &mut self.stage {
            Stage::Length(left) => {
                let bytes = take(left, input);
                if *left == 0 {
                    self.stage = Stage::Whole;
                }
                bytes
            }
            Stage::ChunkData(left) => {
                let bytes = take(left, input);
                if *left == 0 {
                    self.stage = Stage::ChunkEnd;
                }
                bytes
            }
            Stage::ToClose => input.len(),
            _ => self.read_chunk_line(input),
        }
    }

    /// A line of the chunked coding (RFC 9112 §7.1): a size, the end of a chunk, or a trailer.
    fn read_chunk_line(&mut self, input: &[u8]) -> usize {
        let Some(end) = memchr(b'\n', input).filter(|end| *end < LINE_BYTES_MAX) else {
            if input.len() >= LINE_BYTES_MAX {
                self.stage = Stage::Lost;
            }
            return 0;
        };
        let line = &input[..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        self.stage = match (self.stage, line) {
            (Stage::ChunkEnd, []) => Stage::ChunkSize,
            (Stage::Trailers, []) => Stage::Whole,
            (Stage::Trailers, _) => Stage::Trailers,
            (Stage::ChunkSize, _) => match chunk_size(line) {
                Some(0) => Stage::Trailers,
                Some(size) => Stage::ChunkData(size),
                None => Stage::Lost,
            },
            _ => Stage::Lost,
        };
        end + 1
    }
}

/// What an alert begins with: its kind, and the version of TLS (RFC 8446 §5.1).
fn is_tls_alert(input: &[u8]) -> bool {
    matches!(input, [21, 3, 0..=4, ..])
}

/// As many bytes of `input` as are still `left`.
fn take(left: &mut u64, input: &[u8]) -> usize {
    let bytes = usize::try_from(*left).map_or(input.len(), |left| left.min(input.len()));
    *left = left.saturating_sub(bytes as u64);
    bytes
}

/// Status, and whether the version is HTTP/1.1. Anything may follow: the reason is for people.
fn parse_status_line(line: &[u8]) -> Option<(u16, bool)> {
    let [minor, rest @ ..] = line.strip_prefix(b"HTTP/1.")? else {
        return None;
    };
    let blank = rest.iter().take_while(|byte| is_blank(byte)).count();
    let [hundreds @ b'1'..=b'9', tens, ones, rest @ ..] = &rest[blank..] else {
        return None;
    };
    let is_status = blank > 0 && [minor, tens, ones].iter().all(|byte| byte.is_ascii_digit());
    if !is_status || rest.first().is_some_and(|byte| !is_blank(byte)) {
        return None;
    }
    let digit = |byte: &u8| u16::from(byte - b'0');
    let status = digit(hundreds) * 100 + digit(tens) * 10 + digit(ones);
    Some((status, *minor != b'0'))
}

/// Hexadecimal digits, and extensions that nobody knows.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit());
    let (digits, rest) = line.split_at(digits.count());
    let is_end = rest
        .trim_ascii_start()
        .first()
        .is_none_or(|byte| *byte == b';');
    let digits = str::from_utf8(digits).ok().filter(|_| is_end)?;
    u64::from_str_radix(digits, 16).ok()
}

fn is_blank(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// What has been read of one head.
#[derive(Debug, Default)]
struct Head {
    status: u16,
    is_11: bool,
    bytes: usize,
    lines: usize,
    /// `Content-Length`.
    length: Option<u64>,
    has_coding: bool,
    /// The last coding is `chunked`.
    is_chunked: bool,
    /// It cannot be told where the answer ends.
    is_ambiguous: bool,
    says_close: bool,
    says_keep_alive: bool,
    retry_after: Option<Vec<u8>>,
    /// Of the line before, which a folded one belongs to.
    last: Field,
}

/// The fields that count.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Field {
    #[default]
    Other,
    ContentLength,
    TransferEncoding,
    Connection,
    RetryAfter,
}

impl Field {
    fn named(name: &[u8]) -> Field {
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        match name.len() {
            14 if is("content-length") => Field::ContentLength,
            17 if is("transfer-encoding") => Field::TransferEncoding,
            10 if is("connection") => Field::Connection,
            11 if is("retry-after") => Field::RetryAfter,
            _ => Field::Other,
        }
    }
}

impl Head {
    /// Interim answers say nothing about how it ends (RFC 9110 §15.2). 101 does: it would be the
    /// last of this protocol, and nobody has asked for another.
    fn is_interim(&self) -> bool {
        matches!(self.status, 100..=199) && self.status != 101
    }

    /// Takes up a field line, or as much of it as there is.
    fn take(&mut self, line: &[u8], is_whole: bool) {
        if line.first().is_some_and(is_blank) {
            return self.fold(line, is_whole);
        }
        let name = line.iter().take_while(|byte| is_token_byte(**byte)).count();
        let (name, rest) = line.split_at(name);
        self.last = Field::named(name);
        if self.last == Field::Other {
            return;
        }
        let value = rest.trim_ascii_start().strip_prefix(b":");
        let value = value.filter(|value| is_whole && !value.iter().any(is_control));
        // What others may read as a field, and others not, is neither taken up nor passed over.
        let is_clear = rest.first() == Some(&b':');
        match (self.last, value.map(<[u8]>::trim_ascii)) {
            (Field::Other, _) | (Field::RetryAfter, None) => {}
            (Field::RetryAfter, Some(value)) => {
                self.retry_after.get_or_insert_with(|| value.to_vec());
            }
            (Field::Connection, Some(value)) if is_clear => self.connection(value),
            (Field::Connection, _) => self.says_close = true,
            (Field::ContentLength, Some(value)) if is_clear => self.content_length(value),
            (Field::TransferEncoding, Some(value)) if is_clear => self.transfer_encoding(value),
            (Field::ContentLength | Field::TransferEncoding, _) => self.is_ambiguous = true,
        }
    }

    /// A line that goes on with the one before (RFC 9112 §5.2).
    fn fold(&mut self, line: &[u8], is_whole: bool) {
        match self.last {
            Field::Other => {}
            Field::RetryAfter => {
                if let Some(value) = self.retry_after.as_mut().filter(|_| is_whole) {
                    value.push(b' ');
                    value.extend_from_slice(line.trim_ascii());
                }
            }
            Field::Connection => self.says_close = true,
            Field::ContentLength | Field::TransferEncoding => self.is_ambiguous = true,
        }
    }

    /// One number, which may be repeated (RFC 9110 §8.6).
    fn content_length(&mut self, value: &[u8]) {
        for element in value.split(|byte| *byte == b',') {
            let length = digits(element.trim_ascii());
            self.is_ambiguous |=
                length.is_none() || self.length.is_some_and(|known| Some(known) != length);
            self.length = self.length.or(length);
        }
    }

    fn transfer_encoding(&mut self, value: &[u8]) {
        self.has_coding = true;
        for coding in elements(value) {
            // It is applied last, and once (RFC 9112 §6.1).
            self.is_ambiguous |= self.is_chunked;
            self.is_chunked = coding.eq_ignore_ascii_case(b"chunked");
        }
    }

    fn connection(&mut self, value: &[u8]) {
        for option in elements(value) {
            self.says_close |= option.eq_ignore_ascii_case(b"close");
            self.says_keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }

    /// Where the answer ends (RFC 9112 §6.3).
    fn framing(&self, is_to_head: bool) -> Stage {
        match self.length {
            _ if self.status == 101 => Stage::Lost,
            _ if is_to_head || matches!(self.status, 204 | 304) => Stage::Whole,
            _ if self.is_unclear() => Stage::Lost,
            _ if self.is_chunked => Stage::ChunkSize,
            Some(0) => Stage::Whole,
            Some(length) => Stage::Length(length),
            None => Stage::ToClose,
        }
    }

    /// Two framings at once, or one that its version does not have.
    fn is_unclear(&self) -> bool {
        self.is_ambiguous || (self.has_coding && (self.length.is_some() || !self.is_11))
    }

    /// RFC 9112 §9.3.
    fn keeps_alive(&self) -> bool {
        !self.is_unclear() && !self.says_close && (self.is_11 || self.says_keep_alive)
    }
}

/// The elements of a list; empty ones do not count (RFC 9110 §5.6.1).
fn elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|element| !element.is_empty())
}

/// `None`: something else, or more than anybody sends.
fn digits(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

fn is_control(byte: &u8) -> bool {
    byte.is_ascii_control() && *byte != b'\t'
}

/// RFC 9110 §5.6.2.
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests;
