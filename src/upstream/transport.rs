//! The sockets beneath a request. They are written to and read from without waiting, so that an
//! answer is seen while its request is still being sent.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use socket2::SockRef;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};
use ureq::{Error, Timeout};

use super::buffers::{Pool, Pooled};

/// What has come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// Nothing yet.
    None,
    /// More, which is in the buffers now.
    More,
    /// The other side sends nothing more.
    End,
}

/// A connection that can be sent to and listened to at the same time.
pub(super) trait Line: Transport {
    /// Takes what it can of these, in order, without waiting; returns how many bytes. Nothing of
    /// what it has not taken was sent.
    ///
    /// # Errors
    /// The connection's. What was taken before may have been sent.
    fn send(&mut self, parts: [&[u8]; 2]) -> io::Result<usize>;

    /// Sends what it has taken, without waiting; returns whether all of it is out.
    ///
    /// # Errors
    /// The connection's.
    fn flush(&mut self) -> io::Result<bool>;

    /// Takes in what has come, without waiting.
    ///
    /// # Errors
    /// The connection's.
    fn receive(&mut self) -> io::Result<Input>;

    /// The connection beneath, to wait on and to ask where it leads.
    fn socket(&self) -> &Connection;
}

/// Opens TCP connections.
#[derive(Debug)]
pub(super) struct Tcp {
    pub(super) pool: Arc<Pool>,
}

impl Connector for Tcp {
    type Out = Connection;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _chained: Option<()>,
    ) -> Result<Option<Connection>, Error> {
        let (stream, address) = connect(&details.addrs, details.timeout)?;
        stream.set_nodelay(true)?;
        Ok(Some(Connection {
            stream,
            address,
            buffers: Pooled::new(&self.pool),
        }))
    }
}

/// Tries one address after the other; each but the last has half of the time that is left.
fn connect(
    addresses: &[SocketAddr],
    timeout: NextTimeout,
) -> Result<(TcpStream, SocketAddr), Error> {
    let deadline = deadline(timeout);
    let mut failed = io::Error::from(io::ErrorKind::ConnectionRefused);
    for (number, address) in addresses.iter().enumerate() {
        let is_last = number + 1 == addresses.len();
        let result = match deadline {
            None => TcpStream::connect(address),
            Some(deadline) => {
                let left = left(deadline, timeout.reason)?;
                TcpStream::connect_timeout(address, if is_last { left } else { left / 2 })
            }
        };
        match result {
            Ok(stream) => return Ok((stream, *address)),
            Err(error) => failed = error,
        }
    }
    Err(match failed.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Error::Timeout(Timeout::Connect),
        _ => Error::Io(failed),
    })
}

/// `None`: there is no limit.
pub(super) fn deadline(timeout: NextTimeout) -> Option<Instant> {
    Instant::now().checked_add(*timeout.after)
}

/// The time until then.
pub(super) fn left(deadline: Instant, reason: Timeout) -> Result<Duration, Error> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::Timeout(reason));
    }
    Ok(left)
}

/// One connection. Its socket is in blocking mode, but no call on it blocks.
pub(super) struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    buffers: Pooled,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.stream).finish()
    }
}

impl Connection {
    /// The address it was opened to.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Has it reset when it is closed: what was not sent yet never will be, and the other side
    /// need not read what it has refused to learn of the end.
    pub(super) fn abandon(&self) {
        // Without it, the rest only takes longer.
        let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// Waits until the socket is ready for one of these, or broken; tells which.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the reason given, when the time is over.
    pub(super) fn wait(
        &self,
        flags: PollFlags,
        deadline: Option<Instant>,
        reason: Timeout,
    ) -> Result<PollFlags, Error> {
        let mut socket = [PollFd::new(&self.stream, flags)];
        loop {
            let left = deadline
                .map(|deadline| left(deadline, reason))
                .transpose()?;
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut socket, left.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(socket[0].revents()),
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
    }

    /// Receives what is there, without waiting: 0 bytes are the end.
    fn receive_into(&self, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match recv(&self.stream, &mut *buffer, flags | RecvFlags::DONTWAIT) {
                Ok((bytes, _)) => return Ok(bytes),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends as much as there is room for, without waiting.
    fn send_from(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let mut nothing = SendAncillaryBuffer::default();
            match sendmsg(&self.stream, parts, &mut nothing, flags) {
                Ok(bytes) => return Ok(bytes),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Without waiting: [`io::ErrorKind::WouldBlock`].
impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive_into(buffer, RecvFlags::empty())
    }
}

/// As above.
impl Write for &Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send_from(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send_from(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Line for Connection {
    fn send(&mut self, parts: [&[u8]; 2]) -> io::Result<usize> {
        let sent = match parts {
            [part, []] | [[], part] => self.send_from(&[IoSlice::new(part)]),
            [head, body] => self.send_from(&[IoSlice::new(head), IoSlice::new(body)]),
        };
        or_nothing(sent)
    }

    fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    fn receive(&mut self) -> io::Result<Input> {
        let buffer = self.buffers.input_append_buf();
        let flags = RecvFlags::DONTWAIT;
        let received = recv(&self.stream, buffer, flags);
        let input = match received {
            Ok((0, _)) => Ok(Input::End),
            Ok((bytes, _)) => {
                self.buffers.input_appended(bytes);
                return Ok(Input::More);
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Input::None),
            Err(error) => Err(error.into()),
        };
        self.buffers.give_back();
        input
    }

    fn socket(&self) -> &Connection {
        self
    }
}

/// Of what would have had to wait, nothing was done.
pub(super) fn or_nothing(done: io::Result<usize>) -> io::Result<usize> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        done => done,
    }
}

/// [`Transport::transmit_output`] of all lines: sends all of `bytes`.
pub(super) fn transmit(
    line: &mut impl Line,
    bytes: &[u8],
    timeout: NextTimeout,
) -> Result<(), Error> {
    let deadline = deadline(timeout);
    let mut sent = 0;
    loop {
        if sent < bytes.len() {
            sent += line.send([&bytes[sent..], &[]])?;
        }
        if line.flush()? && sent == bytes.len() {
            return Ok(());
        }
        line.socket()
            .wait(PollFlags::OUT, deadline, timeout.reason)?;
    }
}

/// [`Transport::await_input`] of all lines: waits for more; returns whether there is any.
pub(super) fn await_input(line: &mut impl Line, timeout: NextTimeout) -> Result<bool, Error> {
    let deadline = deadline(timeout);
    loop {
        line.socket()
            .wait(PollFlags::IN, deadline, timeout.reason)?;
        match line.receive()? {
            Input::None => {}
            input => return Ok(input == Input::More),
        }
    }
}

impl Transport for Connection {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let output = self.buffers.output()[..amount].to_vec();
        transmit(self, &output, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.buffers.give_back();
        await_input(self, timeout)
    }

    /// Whether nothing has come in since the last answer, neither its end nor anything unasked.
    fn is_open(&mut self) -> bool {
        let nothing = self.receive_into(&mut [0; 1], RecvFlags::PEEK);
        nothing.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}
