//! HTTP/1.1 as bytes: exactly what is given is sent, exactly what came is shown. Knows nothing
//! of the program's own parsing, so that the two can disagree.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

/// How long any one answer may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request or a response as it stood on the wire, its body unchunked.
#[derive(Debug)]
pub struct Message {
    pub start: Vec<u8>,
    /// Field lines in order, without their line ends.
    pub lines: Vec<Vec<u8>>,
    pub body: Vec<u8>,
}

/// How a body without length ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Request,
    Response,
}

impl Message {
    /// Reads one message; `None` if the other side closed before it began.
    pub fn read(reader: &mut impl BufRead, kind: Kind) -> io::Result<Option<Message>> {
        if is_at_end(reader)? {
            return Ok(None);
        }
        let start = line(reader)?;
        let mut lines = Vec::new();
        loop {
            let field = line(reader)?;
            if field.is_empty() {
                break;
            }
            lines.push(field);
        }
        let mut body = Vec::new();
        if field(&lines, "transfer-encoding").is_some_and(|value| value == "chunked") {
            read_chunks(reader, &mut body)?;
        } else if let Some(length) = field(&lines, "content-length") {
            body.resize(length.parse().map_err(invalid)?, 0);
            reader.read_exact(&mut body)?;
        } else if kind == Kind::Response && !has_no_body(&start) {
            reader.read_to_end(&mut body)?;
        }
        Ok(Some(Message { start, lines, body }))
    }
}

fn is_at_end(reader: &mut impl BufRead) -> io::Result<bool> {
    loop {
        // Alone among the calls here it does not go on by itself after a signal.
        match reader.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return Ok(result?.is_empty()),
        }
    }
}

/// Interim answers, 204 and 304 have none (RFC 9112 §6.3).
fn has_no_body(start: &[u8]) -> bool {
    status(start).is_ok_and(|status| matches!(status, 100..=199 | 204 | 304))
}

fn status(start: &[u8]) -> io::Result<u16> {
    let start = String::from_utf8_lossy(start);
    start
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .ok_or_else(|| invalid(format!("status line: {start}")))
}

/// The first value of field `name`, whatever its case; `None` too if it is not UTF-8.
pub fn field<'a>(lines: &'a [Vec<u8>], name: &str) -> Option<&'a str> {
    lines.iter().find_map(|line| {
        let (found, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Field lines by name and, among those of one name, in their order: all that RFC 9110 §5.3 gives
/// a meaning to. Shown as text, byte for byte.
pub fn grouped<L: AsRef<[u8]>>(lines: impl IntoIterator<Item = L>) -> Vec<String> {
    let lines = lines.into_iter();
    let mut lines: Vec<_> = lines
        .map(|line| line.as_ref().escape_ascii().to_string())
        .collect();
    // Stable, so that lines of one name stay as they are.
    lines.sort_by_key(|line| line.split(':').next().map(str::to_ascii_lowercase));
    lines
}

fn line(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line)?;
    match line.strip_suffix(b"\r\n") {
        Some(line) => Ok(line.to_vec()),
        None => Err(invalid(format!("line without CR LF: {line:?}"))),
    }
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let size = String::from_utf8(line(reader)?).map_err(invalid)?;
        let size = u64::from_str_radix(size.trim(), 16).map_err(invalid)?;
        reader.by_ref().take(size).read_to_end(body)?;
        line(reader)?;
        if size == 0 {
            return Ok(());
        }
    }
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// What the program answered.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub lines: Vec<Vec<u8>>,
    pub body: Vec<u8>,
}

impl Response {
    /// The first value of field `name`.
    pub fn field(&self, name: &str) -> Option<&str> {
        field(&self.lines, name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One connection to the program, kept open until dropped.
#[derive(Debug)]
pub struct Connection<S = TcpStream>(BufReader<S>);

impl Connection {
    pub fn open(to: SocketAddr) -> Connection {
        Connection::try_open(to).expect("connect")
    }

    /// `None` if nobody listens.
    pub fn try_open(to: SocketAddr) -> Option<Connection> {
        let stream = TcpStream::connect(to).ok()?;
        stream.set_nodelay(true).expect("TCP_NODELAY");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
        Some(Connection(BufReader::new(stream)))
    }

    /// Says that nothing more will be sent.
    pub fn end(&mut self) {
        let _ = self.0.get_ref().shutdown(Shutdown::Write);
    }

    /// The other way to the same connection, for a thread that sends while this one reads.
    pub fn sender(&self) -> TcpStream {
        self.0.get_ref().try_clone().expect("clone a socket")
    }
}

impl Connection<UnixStream> {
    pub fn open_unix(path: &Path) -> Connection<UnixStream> {
        let stream = UnixStream::connect(path).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
        Connection(BufReader::new(stream))
    }
}

impl<S: Read + Write> Connection<S> {
    /// Sends these bytes. A failure is not reported here: the other side may refuse a request
    /// before it has read all of it, and then the answer tells more.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.0.get_mut().write_all(bytes);
    }

    /// Reads one final answer, skipping interim ones.
    pub fn response(&mut self) -> io::Result<Response> {
        loop {
            let message = Message::read(&mut self.0, Kind::Response)?
                .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            let status = status(&message.start)?;
            if status >= 200 {
                return Ok(Response {
                    status,
                    lines: message.lines,
                    body: message.body,
                });
            }
        }
    }

    /// Reads the status of one interim answer, which has neither fields nor a body.
    pub fn interim(&mut self) -> io::Result<u16> {
        let start = line(&mut self.0)?;
        while !line(&mut self.0)?.is_empty() {}
        status(&start)
    }

    /// Everything until the other side closes; an error if it resets the connection.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest)?;
        Ok(rest)
    }

    /// Sends a request and reads its answer.
    pub fn exchange(&mut self, bytes: &[u8]) -> Response {
        self.send(bytes);
        self.response().expect("an answer")
    }
}

/// A connection that takes in very little of what it does not read.
pub fn narrow(to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("socket");
    socket.set_recv_buffer_size(4096).expect("SO_RCVBUF");
    socket.connect(&to.into()).expect("connect");
    socket.set_write_timeout(Some(PATIENCE)).expect("timeout");
    socket.into()
}

/// Sends one request on a connection of its own.
pub fn exchange(to: SocketAddr, bytes: &[u8]) -> Response {
    Connection::open(to).exchange(bytes)
}

/// `GET target` on a connection of its own.
pub fn get(to: SocketAddr, target: &str) -> Response {
    exchange(
        to,
        format!("GET {target} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").as_bytes(),
    )
}

/// The bytes of a request with `lines` after `Host` and a body of declared length.
pub fn request(method: &str, target: &str, lines: &[&str], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{method} {target} HTTP/1.1\r\nHost: hooks.example\r\n").into_bytes();
    for line in lines {
        bytes.extend_from_slice(line.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A small POST that can be recognised by its number: `X-Id: n` and the body `body n`.
pub fn numbered(number: usize) -> Vec<u8> {
    let id = format!("X-Id: {number}");
    request("POST", "/hook", &[&id], format!("body {number}").as_bytes())
}

/// Sends requests `0..threads * each` over one keep-alive connection per thread; returns the
/// status of each.
pub fn load(
    to: SocketAddr,
    threads: usize,
    each: usize,
    make: impl Fn(usize) -> Vec<u8> + Sync,
) -> Vec<u16> {
    let make = &make;
    thread::scope(|scope| {
        let senders: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mut connection = Connection::open(to);
                    let numbers = thread * each..(thread + 1) * each;
                    numbers
                        .map(|number| connection.exchange(&make(number)).status)
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let joined = senders.into_iter().map(|sender| sender.join());
        joined
            .flat_map(|statuses| statuses.expect("sender"))
            .collect()
    })
}
