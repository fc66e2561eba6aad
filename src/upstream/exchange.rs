//! One request and its answer on a connection. Listens while it sends (RFC 9112 §9.5): a
//! destination may answer before it has read all, and close.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use ureq::{Error, Timeout};

use super::answer::{Answer, Fault, Reader};
use super::connect::by;
use super::transport::{Input, Line};

/// What is read of an answer's body, so that its connection can be used again.
const DRAIN_BYTES_MAX: usize = 64 * 1024;
/// How long the rest of an answer is waited for once its status is known.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// A destination that has answered 2xx, and takes nothing more of the request for this time, has
/// all that it wants of it.
const TAKES_NOTHING_FOR: Duration = Duration::from_secs(2);

/// How an exchange ended.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) answer: Answer,
    /// The connection can serve another exchange.
    pub(super) is_reusable: bool,
}

/// Why an exchange came to no answer.
#[derive(Debug)]
pub(super) struct Unanswered {
    pub(super) error: Error,
    /// Something of the request may have arrived.
    pub(super) is_sent: bool,
    /// Something has come in.
    pub(super) is_heard: bool,
}

/// Sends head and body and reads the answer, until `deadline`.
///
/// # Errors
/// [`Unanswered`]: no answer, or none that could be read.
pub(super) fn exchange(
    line: &mut dyn Line,
    message: [&[u8]; 2],
    is_head: bool,
    deadline: Option<Instant>,
) -> Result<Answered, Unanswered> {
    let mut exchange = Exchange {
        line,
        reader: Reader::new(is_head),
        deadline,
        sent: 0,
        is_heard: false,
        is_early: false,
        has_surplus: false,
    };
    let sent = exchange.send(message);
    let is_whole = matches!(sent, Ok(true));
    let answered = sent.and_then(|_| exchange.await_answer());
    let result = match answered {
        Ok(answer) => Ok(Answered {
            is_reusable: exchange.finish(is_whole, &answer),
            answer,
        }),
        Err(error) => Err(Unanswered {
            error,
            is_sent: exchange.sent > 0,
            is_heard: exchange.is_heard,
        }),
    };
    if !is_whole {
        line.socket().abandon();
    }
    result
}

struct Exchange<'a> {
    line: &'a mut dyn Line,
    reader: Reader,
    deadline: Option<Instant>,
    /// Bytes of the request that the connection has taken.
    sent: usize,
    is_heard: bool,
    /// The answer began before all of the request was out.
    is_early: bool,
    /// More has come than an answer.
    has_surplus: bool,
}

impl Exchange<'_> {
    /// Sends until all is out, or an answer makes it pointless; returns whether all is out.
    fn send(&mut self, message: [&[u8]; 2]) -> Result<bool, Error> {
        let mut answered_at = None;
        let mut flags = PollFlags::IN | PollFlags::OUT;
        loop {
            let sent_before = self.sent;
            match self.push(message) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => return self.broken_off(error).map(|()| false),
            }
            if self.sent > sent_before {
                answered_at = answered_at.map(|_| Instant::now());
            }
            let deadline = match answered_at {
                None => self.deadline,
                Some(at) => earlier(self.deadline, at + TAKES_NOTHING_FOR),
            };
            match self.wait(flags, deadline) {
                Ok(ready) if ready == PollFlags::OUT => continue,
                Ok(_) => {}
                Err(Error::Timeout(_)) if self.reader.answer().is_some() => return Ok(false),
                Err(error) => return Err(error),
            }
            let heard = self.hear();
            match (self.reader.answer(), heard) {
                // Refused, or given up by the other side: it wants nothing more of it.
                (Some(answer), _) if !is_success(answer) => return Ok(false),
                (Some(_), Err(_)) => return Ok(false),
                (Some(_), Ok(input)) => {
                    self.is_early = true;
                    answered_at.get_or_insert_with(Instant::now);
                    if input == Input::End {
                        // It may go on reading: only what it sends has ended.
                        flags = PollFlags::OUT;
                    }
                }
                (None, Ok(Input::End)) => return Err(closed()),
                (None, heard) => {
                    heard?;
                }
            }
        }
    }

    /// Sends what is taken at once; returns whether all is out.
    fn push(&mut self, [head, body]: [&[u8]; 2]) -> io::Result<bool> {
        while self.sent < head.len() + body.len() {
            let rest = match self.sent.checked_sub(head.len()) {
                None => [&head[self.sent..], body],
                Some(sent) => [&[][..], &body[sent..]],
            };
            match self.line.send(rest)? {
                0 => return Ok(false),
                bytes => self.sent += bytes,
            }
        }
        self.line.flush()
    }

    /// Sending has failed. Whoever refuses a request may have said so before closing: what has
    /// come in already is read before anything else is said about it.
    fn broken_off(&mut self, error: io::Error) -> Result<(), Error> {
        while self.reader.answer().is_none() {
            match self.hear() {
                Ok(Input::More) => {}
                Err(Error::Io(told)) if told.kind() == io::ErrorKind::InvalidData => {
                    return Err(Error::Io(told));
                }
                _ => return Err(Error::Io(error)),
            }
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags, deadline: Option<Instant>) -> Result<PollFlags, Error> {
        let socket = self.line.socket();
        socket.wait(flags, deadline, Timeout::SendBody)
    }

    /// Takes in what has come, without waiting.
    fn hear(&mut self) -> Result<Input, Error> {
        let input = self.line.receive()?;
        self.digest(input)?;
        Ok(input)
    }

    fn digest(&mut self, input: Input) -> Result<(), Error> {
        match input {
            Input::None => return Ok(()),
            Input::End => {
                self.reader.end();
                return Ok(());
            }
            Input::More => self.is_heard = true,
        }
        let buffers = self.line.buffers();
        let mut used = self.reader.read(buffers.input()).map_err(unreadable)?;
        if self.reader.is_over() {
            self.has_surplus |= used < buffers.input().len();
            used = buffers.input().len();
        }
        buffers.input_consume(used);
        Ok(())
    }

    fn await_answer(&mut self) -> Result<Answer, Error> {
        loop {
            if let Some(answer) = self.reader.answer() {
                return Ok(answer.clone());
            }
            if !self.await_input(self.deadline, Timeout::RecvResponse)? {
                return Err(closed());
            }
        }
    }

    /// Waits for more; returns whether there is any.
    fn await_input(&mut self, deadline: Option<Instant>, reason: Timeout) -> Result<bool, Error> {
        let has_more = self.line.await_input(by(deadline, reason)?)?;
        self.digest(if has_more { Input::More } else { Input::End })?;
        Ok(has_more)
    }

    /// Reads what little else the answer has to say; returns whether the connection can be kept.
    /// The status is the answer. A body that breaks off, or does not end, changes nothing but that.
    fn finish(&mut self, is_whole: bool, answer: &Answer) -> bool {
        if !is_whole && !is_success(answer) {
            return false;
        }
        // Closing with something unread would take back what of the request is still on its way.
        let bytes_max = if self.is_early {
            usize::MAX
        } else {
            DRAIN_BYTES_MAX
        };
        let deadline = earlier(self.deadline, Instant::now() + DRAIN_TIMEOUT);
        while !self.reader.is_over() && self.reader.body_bytes() < bytes_max {
            if self.await_input(deadline, Timeout::RecvBody).is_err() {
                return false;
            }
        }
        is_whole && self.reader.keeps_alive() && !self.has_surplus
    }
}

fn is_success(answer: &Answer) -> bool {
    (200..300).contains(&answer.status)
}

fn earlier(deadline: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(deadline.map_or(other, |deadline| deadline.min(other)))
}

fn closed() -> Error {
    let why = "connection closed without an answer";
    Error::Io(io::Error::new(io::ErrorKind::UnexpectedEof, why))
}

fn unreadable(fault: Fault) -> Error {
    Error::Io(io::Error::other(fault.to_string()))
}
