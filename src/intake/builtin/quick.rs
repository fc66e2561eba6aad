//! What the front does with a connection that has received something: answers what can be answered
//! without waiting, and says what else is to be done.

use std::io;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::Socket;

use super::Service;
use super::body::{Fault, Input, Source};
use super::connection::{Form, Link, Rendered, Rest, receive};
use crate::intake::Answer;

/// The front keeps no more than this of a request that it waits for: half of what it receives at
/// once, so that there is always room for more.
const HELD_BYTES_MAX: usize = 32 * 1024;

/// Why a connection is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// Something has arrived.
    Arrived,
    /// And nothing more will.
    HungUp,
    /// Its place is needed, or it has been idle for long: over, but for what has arrived already.
    Leaving,
    /// The request that has begun has taken its time.
    Late,
}

impl Cause {
    fn is_end(self) -> bool {
        matches!(self, Cause::Leaving | Cause::Late)
    }
}

/// The beginning of a request whose rest the front itself waits for.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) at: Instant,
    input: Vec<u8>,
}

/// What became of a connection that was looked at.
#[derive(Debug)]
pub(super) enum Visit {
    /// Nothing was there.
    Unchanged,
    /// All that was there is answered.
    Served(Instant),
    /// A request has begun, and is to be waited for here.
    Begun(Box<Begun>),
    Over,
    HandOver(Rest),
}

/// Holds nothing of a connection from one visit to the next.
#[derive(Default)]
pub(super) struct Quick {
    input: Input,
    head: Vec<u8>,
    rendered: Rendered,
}

impl Quick {
    /// `begun` is what an earlier visit has left of a request.
    pub(super) fn visit(
        &mut self,
        service: &impl Service,
        link: &Link,
        begun: Option<Box<Begun>>,
        cause: Cause,
    ) -> Visit {
        let mut visit = Visit::Unchanged;
        let mut begun = begun;
        loop {
            let held = begun.as_ref().map_or(&[][..], |begun| &begun.input);
            let room = self.input.anew_after(held);
            let room_bytes = room.len();
            let bytes = match recv(&link.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    if begun.is_some() {
                        self.refuse(service, link, Answer::CutShort);
                    }
                    return Visit::Over;
                }
                Ok((bytes, _)) => bytes,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    return match begun {
                        Some(begun) => self.wait_for(service, link, begun, cause),
                        None if cause.is_end() => Visit::Over,
                        None => visit,
                    };
                }
                Err(_) => return Visit::Over,
            };
            let now = Instant::now();
            self.input.received(bytes);
            let begun_at = begun.take().map_or(now, |begun| begun.at);
            match self.answer(service, link, begun_at, cause) {
                Some(Visit::Begun(newer)) if newer.input.len() > HELD_BYTES_MAX => {
                    self.refuse(service, link, Answer::FieldsTooLarge);
                    return Visit::Over;
                }
                Some(Visit::Begun(newer)) => begun = Some(newer),
                Some(end) => return end,
                None => visit = Visit::Served(now),
            }
            // Less than there was room for is all there was.
            if bytes < room_bytes && cause != Cause::HungUp {
                return match begun {
                    Some(begun) => self.wait_for(service, link, begun, cause),
                    None => visit,
                };
            }
        }
    }

    /// A request of which no more is here.
    fn wait_for(
        &mut self,
        service: &impl Service,
        link: &Link,
        begun: Box<Begun>,
        cause: Cause,
    ) -> Visit {
        let answer = match cause {
            Cause::Late => Answer::Timeout,
            Cause::Leaving => Answer::Overloaded,
            Cause::Arrived | Cause::HungUp => return Visit::Begun(begun),
        };
        self.refuse(service, link, answer);
        Visit::Over
    }

    /// Sends a last answer, as far as it can be sent at once.
    pub(super) fn refuse(&mut self, service: &impl Service, link: &Link, answer: Answer) {
        let bytes = self.rendered.bytes(service.refuse(answer), Form::LAST);
        // Who does not take it is gone.
        let _ = send_now(&link.socket, bytes);
    }

    /// Answers all that was received; `None` if the connection goes on.
    fn answer(
        &mut self,
        service: &impl Service,
        link: &Link,
        begun: Instant,
        cause: Cause,
    ) -> Option<Visit> {
        let mut begun = begun;
        while !self.input.is_empty() {
            let mark = self.input.mark();
            let (input, head) = (&mut self.input, &mut self.head);
            let served = service.is_quick().then(|| {
                receive(service, link.peer, input, &mut Here, head, |received| {
                    service.serve_quickly(received)
                })
            });
            let (answer, mut form) = match served {
                Some(Ok((Some(answer), form))) => (answer, form),
                Some(Err(Fault::Idle)) if service.threads_max().is_some() => {
                    return Some(Visit::Begun(Box::new(Begun {
                        at: begun,
                        input: self.input.since(mark).to_vec(),
                    })));
                }
                // No thread waits for what else it sends: there are too few.
                Some(Err(Fault::Refused(answer))) if service.threads_max().is_some() => {
                    self.refuse(service, link, answer);
                    return Some(Visit::Over);
                }
                // Not whole, not valid, or not to be answered at once: a thread begins anew with it.
                _ => {
                    return Some(Visit::HandOver(Rest {
                        input: self.input.since(mark).to_vec(),
                        begun,
                        output: Vec::new(),
                        is_kept: true,
                    }));
                }
            };
            form.is_kept &= !cause.is_end() && !service.is_draining();
            let bytes = self.rendered.bytes(answer, form);
            let sent = match send_now(&link.socket, bytes) {
                Ok(sent) => sent,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                Err(_) => return Some(Visit::Over),
            };
            if sent == bytes.len() && form.is_kept {
                if !self.input.is_empty() {
                    // The next one's time is its own.
                    begun = Instant::now();
                }
                continue;
            }
            if sent == bytes.len() && self.input.is_empty() {
                return Some(Visit::Over);
            }
            return Some(Visit::HandOver(Rest {
                input: self.input.since(self.input.mark()).to_vec(),
                begun,
                output: bytes[sent..].to_vec(),
                is_kept: form.is_kept,
            }));
        }
        None
    }
}

fn send_now(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
    send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

/// Nothing but what is here already.
struct Here;

impl Source for Here {
    fn read_first(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn read_more(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send_continue(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn can_wait(&self) -> bool {
        false
    }
}
