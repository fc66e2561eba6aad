//! The sockets beneath ureq. A connection has buffers only while bytes go through them: with
//! hundreds of workers that wait for answers, theirs would be most of the memory in use.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};
use ureq::{Error, Timeout};

/// Buffers that are kept for reuse: more threads hardly ever have bytes in hand at once.
const KEPT_MAX: usize = 8;

/// Opens TCP connections and counts them.
#[derive(Debug)]
pub(super) struct Tcp {
    pub(super) pool: Arc<Pool>,
    pub(super) opened: Arc<AtomicU64>,
}

impl Connector for Tcp {
    type Out = Connection;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _chained: Option<()>,
    ) -> Result<Option<Connection>, Error> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let stream = connect(&details.addrs, details.timeout)?;
        stream.set_nodelay(true)?;
        Ok(Some(Connection {
            stream,
            buffers: Pooled::new(&self.pool),
        }))
    }
}

/// Tries one address after the other; each but the last has half of the time that is left.
fn connect(addresses: &[SocketAddr], timeout: NextTimeout) -> Result<TcpStream, Error> {
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
            Ok(stream) => return Ok(stream),
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
    buffers: Pooled,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.stream).finish()
    }
}

impl Connection {
    /// Waits until the socket is ready, broken, or the time is over.
    fn wait(
        &self,
        flags: PollFlags,
        deadline: Option<Instant>,
        timeout: NextTimeout,
    ) -> Result<(), Error> {
        let mut socket = [PollFd::new(&self.stream, flags)];
        loop {
            let left = deadline.map(|deadline| left(deadline, timeout.reason));
            let left = left
                .transpose()?
                .and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut socket, left.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
    }
}

impl Transport for Connection {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let deadline = deadline(timeout);
        let mut sent = 0;
        while sent < amount {
            let rest = &self.buffers.memory().output[sent..amount];
            match send(
                &self.stream,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(bytes) => sent += bytes,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline, timeout)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let deadline = deadline(timeout);
        loop {
            self.buffers.give_back();
            self.wait(PollFlags::IN, deadline, timeout)?;
            match recv(
                &self.stream,
                self.buffers.input_append_buf(),
                RecvFlags::DONTWAIT,
            ) {
                Ok((bytes, _)) => {
                    self.buffers.input_appended(bytes);
                    return Ok(bytes > 0);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
    }

    /// Whether nothing has come in since the last answer, neither its end nor anything unasked.
    fn is_open(&mut self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(recv(&self.stream, &mut [0; 1], flags), Err(Errno::AGAIN))
    }
}

/// Buffers of one size, for all connections.
#[derive(Debug)]
pub(super) struct Pool {
    input_bytes: usize,
    output_bytes: usize,
    kept: Mutex<Vec<Memory>>,
}

impl Pool {
    pub(super) fn new(input_bytes: usize, output_bytes: usize) -> Arc<Pool> {
        Arc::new(Pool {
            input_bytes,
            output_bytes,
            kept: Mutex::default(),
        })
    }

    fn take(&self) -> Memory {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        kept.unwrap_or_else(|| Memory {
            input: vec![0; self.input_bytes],
            filled: 0,
            consumed: 0,
            output: vec![0; self.output_bytes],
        })
    }

    fn put(&self, memory: Memory) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(memory);
        }
    }
}

#[derive(Debug)]
struct Memory {
    input: Vec<u8>,
    filled: usize,
    consumed: usize,
    output: Vec<u8>,
}

impl Memory {
    /// Room for more input, behind what is not consumed yet.
    fn room(&mut self) -> &mut [u8] {
        self.input.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.consumed = 0;
        &mut self.input[self.filled..]
    }
}

/// A connection's part in the pool.
pub(super) struct Pooled {
    pool: Arc<Pool>,
    memory: Option<Memory>,
    /// Whether the last call of `input_consume` got on with what was there.
    has_consumed: bool,
}

impl Pooled {
    pub(super) fn new(pool: &Arc<Pool>) -> Pooled {
        Pooled {
            pool: Arc::clone(pool),
            memory: None,
            has_consumed: false,
        }
    }

    fn memory(&mut self) -> &mut Memory {
        self.memory.get_or_insert_with(|| self.pool.take())
    }

    /// Lets another have the buffers, if no input is left in them.
    pub(super) fn give_back(&mut self) {
        let is_done = |memory: &mut Memory| memory.filled == memory.consumed;
        if let Some(mut memory) = self.memory.take_if(is_done) {
            (memory.filled, memory.consumed) = (0, 0);
            self.pool.put(memory);
        }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.consumed = memory.filled;
            self.give_back();
        }
    }
}

impl Buffers for Pooled {
    fn output(&mut self) -> &mut [u8] {
        &mut self.memory().output
    }

    fn input(&self) -> &[u8] {
        let memory = self.memory.as_ref();
        memory.map_or(&[], |memory| &memory.input[memory.consumed..memory.filled])
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        self.memory().room()
    }

    fn input_appended(&mut self, amount: usize) {
        let memory = self.memory();
        memory.filled = (memory.filled + amount).min(memory.input.len());
    }

    fn input_consume(&mut self, amount: usize) {
        self.has_consumed = amount > 0;
        if let Some(memory) = &mut self.memory {
            memory.consumed = (memory.consumed + amount).min(memory.filled);
        }
        // The end of an answer is not told otherwise.
        self.give_back();
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        let memory = self.memory();
        memory.room();
        (&mut memory.input[memory.filled..], &mut memory.output)
    }

    fn can_use_input(&self) -> bool {
        self.has_consumed && !self.input().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_kept_until_it_is_consumed_and_then_the_buffers_are_free() {
        let pool = Pool::new(8, 4);
        let mut buffers = Pooled {
            pool: Arc::clone(&pool),
            memory: None,
            has_consumed: false,
        };
        let free = || pool.kept.lock().unwrap().len();
        assert_eq!(buffers.input(), b"");
        buffers.input_append_buf()[..6].copy_from_slice(b"answer");
        buffers.input_appended(6);
        buffers.give_back();
        assert_eq!((buffers.input(), free()), (b"answer".as_slice(), 0));
        assert!(!buffers.can_use_input());
        buffers.input_consume(2);
        assert!(buffers.can_use_input());
        assert_eq!(buffers.input_append_buf().len(), 4);
        assert_eq!(buffers.input(), b"swer");
        let (tmp, output) = buffers.tmp_and_output();
        assert_eq!((tmp.len(), output.len()), (4, 4));
        buffers.input_consume(4);
        assert_eq!((buffers.input(), free()), (b"".as_slice(), 1));
        buffers.input_append_buf();
        assert_eq!(free(), 0);
        drop(buffers);
        assert_eq!(free(), 1);
    }
}
