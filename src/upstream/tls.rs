//! TLS over the sockets of `transport`. All connections share one configuration: roots are held
//! once, sessions are resumed. As beneath it, buffers are there only while bytes go through.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use rustix::event::PollFlags;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use ureq::Error;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use super::buffers::{Pool, Pooled};
use super::transport::{Connection, Input, Line, await_input, deadline, or_nothing, transmit};

/// What is encrypted ahead of what the socket takes: one full record (RFC 8446 §5.1).
const AHEAD_BYTES: usize = 16 * 1024;

/// What stands before a record of TLS: its kind and the first part of its version (RFC 8446 §5.1).
const RECORD_KINDS: std::ops::RangeInclusive<u8> = 20..=24;
const RECORD_VERSION: u8 = 3;

/// Secures connections.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) pool: Arc<Pool>,
}

impl Connector<Connection> for Tls {
    type Out = Secured;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<Connection>,
    ) -> Result<Option<Secured>, Error> {
        let Some(socket) = chained else {
            return Ok(None);
        };
        let host = details.uri.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).map_err(io::Error::other)?;
        let client = ClientConnection::new(Arc::clone(&self.config), name);
        let mut client = client.map_err(io::Error::other)?;
        client.set_buffer_limit(Some(AHEAD_BYTES));
        shake_hands(&mut client, &socket, details.timeout)?;
        Ok(Some(Secured {
            client: Box::new(client),
            socket,
            buffers: Pooled::new(&self.pool),
        }))
    }
}

/// The other side speaks something else.
#[derive(Debug)]
pub(super) struct NoTls;

impl fmt::Display for NoTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it does not speak TLS: is it http://?")
    }
}

impl std::error::Error for NoTls {}

/// Reads, and remembers what came first.
struct Hearing<'a> {
    socket: &'a Connection,
    first: [u8; 2],
    bytes: usize,
}

impl Hearing<'_> {
    /// Whether what came is no TLS, whoever has sent it.
    fn hears_no_tls(&self) -> bool {
        match &self.first[..self.bytes] {
            [] => false,
            [kind, rest @ ..] => {
                !RECORD_KINDS.contains(kind) || rest.first().is_some_and(|v| *v != RECORD_VERSION)
            }
        }
    }
}

impl Read for Hearing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.socket.read(buffer)?;
        for byte in &buffer[..bytes] {
            let Some(place) = self.first.get_mut(self.bytes) else {
                break;
            };
            *place = *byte;
            self.bytes += 1;
        }
        Ok(bytes)
    }
}

/// Within `timeout` as a whole, however the other side trickles.
fn shake_hands(
    client: &mut ClientConnection,
    mut socket: &Connection,
    timeout: NextTimeout,
) -> Result<(), Error> {
    let deadline = deadline(timeout);
    let mut hearing = Hearing {
        socket,
        first: [0; 2],
        bytes: 0,
    };
    while client.is_handshaking() || client.wants_write() {
        let (done, flag) = if client.wants_write() {
            (client.write_tls(&mut socket), PollFlags::OUT)
        } else {
            (client.read_tls(&mut hearing), PollFlags::IN)
        };
        match done {
            Ok(0) if hearing.hears_no_tls() => return Err(no_tls()),
            Ok(0) => {
                let why = match hearing.bytes {
                    0 => "connection closed before any word of TLS came: is it http://?",
                    _ => "connection closed during the TLS handshake",
                };
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why).into());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                socket.wait(flag, deadline, timeout.reason)?;
                continue;
            }
            done => done?,
        };
        if let Err(error) = client.process_new_packets() {
            if hearing.hears_no_tls() {
                return Err(no_tls());
            }
            // Best effort: tells the other side why.
            let _ = client.write_tls(&mut socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error).into());
        }
    }
    Ok(())
}

fn no_tls() -> Error {
    io::Error::new(io::ErrorKind::InvalidData, NoTls).into()
}

/// A connection over which TLS is spoken.
pub(super) struct Secured {
    client: Box<ClientConnection>,
    socket: Connection,
    buffers: Pooled,
}

impl fmt::Debug for Secured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secured").finish_non_exhaustive()
    }
}

impl Secured {
    /// What is decrypted already. Nothing is buffered while there is nothing: first its first
    /// byte, then the place for the rest.
    fn decrypted(&mut self) -> io::Result<Input> {
        let mut reader = self.client.reader();
        let mut first = [0];
        match reader.read(&mut first) {
            Ok(0) => return Ok(Input::End),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Input::None),
            // Closed without saying so. What is missing of an answer shows in its framing.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Input::End),
            Err(error) => return Err(error),
        }
        let room = self.buffers.input_append_buf();
        let Some((place, rest)) = room.split_first_mut() else {
            return Err(io::Error::other("no room for input"));
        };
        *place = first[0];
        let more = reader.read(rest).unwrap_or_default();
        self.buffers.input_appended(1 + more);
        Ok(Input::More)
    }
}

impl Line for Secured {
    fn send(&mut self, parts: [&[u8]; 2]) -> io::Result<usize> {
        if !Line::flush(self)? {
            return Ok(0);
        }
        // Sent with the next flush, or not at all.
        let parts = parts.map(IoSlice::new);
        or_nothing(self.client.writer().write_vectored(&parts))
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.client.wants_write() {
            if or_nothing(self.client.write_tls(&mut &self.socket))? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn receive(&mut self) -> io::Result<Input> {
        loop {
            let input = self.decrypted()?;
            if input != Input::None {
                return Ok(input);
            }
            match self.client.read_tls(&mut &self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Input::None),
                read => read?,
            };
            self.client
                .process_new_packets()
                .map_err(|refusal| io::Error::new(io::ErrorKind::InvalidData, refusal))?;
        }
    }

    fn socket(&self) -> &Connection {
        &self.socket
    }
}

impl Transport for Secured {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let output = self.buffers.output()[..amount].to_vec();
        transmit(self, &output, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.buffers.give_back();
        match self.decrypted()? {
            Input::None => await_input(self, timeout),
            input => Ok(input == Input::More),
        }
    }

    fn is_open(&mut self) -> bool {
        let state = self.client.process_new_packets();
        let has_nothing = |state: rustls::IoState| state.plaintext_bytes_to_read() == 0;
        state.is_ok_and(has_nothing) && self.socket.is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
