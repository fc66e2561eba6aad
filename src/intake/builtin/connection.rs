//! One connection on a thread of its own: requests in, answers out, one after the other, each
//! within its time.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Shutdown};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::net::{RecvFlags, recv};
use socket2::Socket;

use super::body::{Fault, Input, Source};
use super::head::{FIELDS_MAX, Framing, Head};
use super::seat::Seat;
use super::{Received, Service, Times};
use crate::intake::Answer;

/// After a refusal, so long and so many bytes more of the request are taken in and thrown away:
/// closing at once would reset the connection, and the answer with it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A connection that waits for its next request keeps no larger head than this.
const HEAD_BYTES_KEPT: usize = 4096;

/// An open connection, wherever it is.
#[derive(Debug)]
pub(super) struct Link {
    pub socket: Arc<Socket>,
    pub peer: Option<IpAddr>,
    pub opened_at: Instant,
    /// Counts it as open.
    pub _open: Open,
}

/// Counts one open connection until it is dropped.
#[derive(Debug)]
pub(super) struct Open(Arc<AtomicUsize>);

impl Open {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Open {
        count.fetch_add(1, Ordering::SeqCst);
        Open(Arc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is left to be done on a connection that must be waited for.
#[derive(Debug)]
pub(super) struct Rest {
    /// Received and not used. Of a request that began at `begun`.
    pub input: Vec<u8>,
    pub begun: Instant,
    /// Still to be sent of an answer.
    pub output: Vec<u8>,
    /// Whether more requests may come.
    pub is_kept: bool,
}

/// Serves a connection until it ends (`None`) or is idle.
pub(super) fn serve(
    service: &impl Service,
    times: &Times,
    link: Link,
    rest: Rest,
    seat: &Seat,
) -> Option<Link> {
    let mut connection = Connection {
        service,
        peer: link.peer,
        wire: Wire {
            socket: &link.socket,
            times,
            seat,
            deadline: Some(rest.begun + times.request),
            has_other_timeout: true,
        },
        input: Input::holding(rest.input),
        head: Vec::new(),
    };
    if !rest.output.is_empty() {
        seat.writing();
        connection.wire.write(&rest.output).ok()?;
    }
    if !rest.is_kept {
        connection.linger_if(false);
        return None;
    }
    let is_idle = connection.run();
    is_idle.then_some(link)
}

/// Reads the next request and has it served.
pub(super) fn receive<S: Service, A>(
    service: &S,
    peer: Option<IpAddr>,
    input: &mut Input,
    source: &mut impl Source,
    bytes: &mut Vec<u8>,
    serve: impl FnOnce(Received<'_>) -> A,
) -> Result<(A, Form), Fault> {
    let mut permit = service.permit();
    input.read_head(source, bytes, &mut permit)?;
    let started = Instant::now();
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let head = Head::parse(bytes, &mut fields)?;
    let bytes_max = service.body_bytes_max();
    if let Framing::Length(length) = head.framing
        && length > bytes_max as u64
    {
        return Err(Answer::TooLarge.into());
    }
    if head.expects_continue && !input.holds(head.framing) {
        source.send_continue().map_err(|_| Fault::Gone)?;
    }
    let body = input.read_body(source, head.framing, bytes_max, &mut permit)?;
    let served = serve(Received {
        head: &head,
        peer,
        body,
        permit,
        started,
    });
    let form = Form {
        is_head: head.method == "HEAD",
        is_11: head.is_11,
        is_kept: head.keep_alive,
    };
    Ok((served, form))
}

/// What the form of an answer depends on, besides the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    is_head: bool,
    is_11: bool,
    pub(super) is_kept: bool,
}

impl Form {
    /// For a request that was not understood.
    pub(super) const LAST: Form = Form {
        is_head: false,
        is_11: true,
        is_kept: false,
    };

    fn connection(self) -> Option<&'static str> {
        match (self.is_kept, self.is_11) {
            (false, _) => Some("close"),
            // Not what HTTP/1.0 does by itself, so its senders look for it.
            (true, false) => Some("keep-alive"),
            (true, true) => None,
        }
    }
}

/// The last answer as it was sent: within a second nearly all are alike.
#[derive(Default)]
pub(super) struct Rendered {
    of: Option<(Answer, Form, u64)>,
    bytes: Vec<u8>,
}

impl Rendered {
    pub(super) fn bytes(&mut self, answer: Answer, form: Form) -> &[u8] {
        let now = SystemTime::now();
        let since = now.duration_since(SystemTime::UNIX_EPOCH);
        let of = Some((answer, form, since.unwrap_or_default().as_secs()));
        if self.of != of
            && let Some((answer, ..)) = &of
        {
            self.bytes = answer.to_bytes(form.connection(), form.is_head, now);
            self.of = of;
        }
        &self.bytes
    }
}

struct Connection<'a, S> {
    service: &'a S,
    peer: Option<IpAddr>,
    wire: Wire<'a>,
    input: Input,
    head: Vec<u8>,
}

impl<S: Service> Connection<'_, S> {
    /// Serves requests as long as they come; tells whether the connection is idle, not over.
    fn run(&mut self) -> bool {
        let mut rendered = Rendered::default();
        loop {
            let (answer, mut form, is_refusal) = match self.next() {
                Ok((answer, form)) => (answer, form, false),
                Err(Fault::Idle) => return true,
                Err(Fault::Gone) => return false,
                // Nobody knows how much of the request is still to come.
                Err(Fault::Refused(answer)) => (self.service.refuse(answer), Form::LAST, true),
            };
            form.is_kept &= !self.service.is_draining() && !self.wire.seat.is_asked_to_leave();
            self.wire.seat.writing();
            let bytes = rendered.bytes(answer, form);
            if self.wire.write(bytes).is_err() {
                return false;
            }
            if !form.is_kept {
                self.linger_if(is_refusal);
                return false;
            }
            self.wire.deadline = None;
            // What need not wait is for the front.
            if self.input.is_empty() && self.service.is_quick() {
                return true;
            }
        }
    }

    fn linger_if(&mut self, is_refusal: bool) {
        if is_refusal || !self.input.is_empty() {
            // What was received is of no more use, and this takes a while.
            (self.input, self.head) = (Input::default(), Vec::new());
            self.wire.linger();
        }
    }

    fn next(&mut self) -> Result<(Answer, Form), Fault> {
        let seat = self.wire.seat;
        if self.input.is_empty() {
            seat.idle();
        } else {
            seat.reading(Instant::now());
        }
        if self.head.capacity() > HEAD_BYTES_KEPT {
            self.head = Vec::new();
        }
        if self.input.is_empty() && self.service.is_draining() && !has_received(self.wire.socket) {
            // Idle too late to be found by whoever closes idle connections. A request that has
            // begun is waited for.
            let _ = self.wire.socket.shutdown(Shutdown::Read);
        }
        let service = self.service;
        receive(
            service,
            self.peer,
            &mut self.input,
            &mut self.wire,
            &mut self.head,
            |received| {
                seat.serving();
                service.serve(received)
            },
        )
    }
}

/// The socket, and until when it may be read from.
struct Wire<'a> {
    socket: &'a Arc<Socket>,
    times: &'a Times,
    seat: &'a Seat,
    /// Of the request under way; `None` between requests.
    deadline: Option<Instant>,
    /// Whether the socket's timeout is another than [`Times::moment`].
    has_other_timeout: bool,
}

impl Wire<'_> {
    /// Writes all, within the send timeout that the socket has.
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        (&**self.socket).write_all(bytes)
    }

    fn set_read_timeout(&mut self, timeout: Duration) -> io::Result<()> {
        self.has_other_timeout = true;
        // Less than a microsecond would count as none at all, and so as no limit.
        self.socket
            .set_read_timeout(Some(timeout.max(Duration::from_millis(1))))
    }

    fn linger(&mut self) {
        if self.socket.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let now = Instant::now();
        // What is thrown away is worth no place that others wait for.
        self.seat.reading(now);
        self.deadline = Some(now + LINGER);
        let mut sink = [0; 4096];
        let mut left = LINGER_BYTES_MAX;
        while let Ok(bytes @ 1..) = self.read_more(&mut sink) {
            left = left.saturating_sub(bytes);
            if left == 0 {
                return;
            }
        }
    }
}

impl Source for Wire<'_> {
    fn read_first(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if std::mem::take(&mut self.has_other_timeout) {
            self.set_read_timeout(self.times.moment())?;
            self.has_other_timeout = false;
        }
        let bytes = read(self.socket, buffer)?;
        let now = Instant::now();
        self.deadline = Some(now + self.times.request);
        self.seat.reading(now);
        Ok(bytes)
    }

    fn read_more(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.times.request);
        let left = deadline.saturating_duration_since(now);
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.set_read_timeout(left)?;
        match read(self.socket, buffer)? {
            // Not the sender's end of it, but ours.
            0 if self.seat.is_evicted() => Err(io::ErrorKind::ConnectionAborted.into()),
            bytes => Ok(bytes),
        }
    }

    fn send_continue(&mut self) -> io::Result<()> {
        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    }
}

/// Whether something has arrived that nobody has read.
pub(super) fn has_received(socket: &Socket) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(recv(socket, &mut [0; 1], flags), Ok((1.., _)))
}

fn read(mut socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
