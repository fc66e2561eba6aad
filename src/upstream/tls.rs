//! TLS over the sockets of `transport`. All connections share one configuration: roots are held
//! once, sessions are resumed. As beneath it, buffers are there only while bytes go through.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, NextTimeout, Transport, TransportAdapter,
};

use super::transport::{Connection, Pool, Pooled, deadline, left};

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
        let Some(connection) = chained else {
            return Ok(None);
        };
        let host = details.uri.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).map_err(io::Error::other)?;
        let client = ClientConnection::new(Arc::clone(&self.config), name);
        let mut client = client.map_err(io::Error::other)?;
        let clock = details.current_time.clone();
        let mut socket = TransportAdapter::new(connection.boxed(), clock);
        shake_hands(&mut client, &mut socket, details.timeout)?;
        Ok(Some(Secured {
            stream: Box::new(StreamOwned::new(client, socket)),
            buffers: Pooled::new(&self.pool),
        }))
    }
}

/// Within `timeout` as a whole, however the other side trickles.
fn shake_hands(
    client: &mut ClientConnection,
    socket: &mut TransportAdapter,
    timeout: NextTimeout,
) -> Result<(), Error> {
    let deadline = deadline(timeout);
    while client.is_handshaking() || client.wants_write() {
        let mut timeout = timeout;
        if let Some(deadline) = deadline {
            timeout.after = left(deadline, timeout.reason)?.into();
        }
        socket.set_timeout(timeout);
        if client.wants_write() {
            client.write_tls(socket)?;
            continue;
        }
        if client.read_tls(socket)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if let Err(error) = client.process_new_packets() {
            // Best effort: tells the other side why.
            let _ = client.write_tls(socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error).into());
        }
    }
    Ok(())
}

/// A connection over which TLS is spoken.
pub(super) struct Secured {
    stream: Box<StreamOwned<ClientConnection, TransportAdapter>>,
    buffers: Pooled,
}

impl fmt::Debug for Secured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secured").finish_non_exhaustive()
    }
}

impl Secured {
    /// Why the other side has closed the connection that was being written to, if it has said so:
    /// with TLS 1.3 it may refuse a certificate after the handshake.
    fn refusal(&mut self) -> Option<io::Error> {
        let StreamOwned { conn, sock } = &mut *self.stream;
        conn.read_tls(sock).ok()?;
        let refusal = conn.process_new_packets().err()?;
        Some(io::Error::new(io::ErrorKind::InvalidData, refusal))
    }
}

impl Transport for Secured {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.sock.set_timeout(timeout);
        let output = &self.buffers.output()[..amount];
        let sent = self.stream.write_all(output);
        let sent = sent.and_then(|()| self.stream.flush());
        sent.map_err(|error| Error::Io(self.refusal().unwrap_or(error)))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.sock.set_timeout(timeout);
        self.buffers.give_back();
        // Nothing is buffered while it waits: first the socket, then the place for what it says.
        let mut first = [0];
        let bytes = self.stream.read(&mut first)?;
        if bytes == 0 {
            return Ok(false);
        }
        let room = self.buffers.input_append_buf();
        let Some((place, rest)) = room.split_first_mut() else {
            return Err(io::Error::other("no room for input").into());
        };
        *place = first[0];
        // What is there already, without waiting for more.
        let more = self.stream.conn.reader().read(rest).unwrap_or_default();
        self.buffers.input_appended(1 + more);
        Ok(true)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
