//! A destination that answers 200 after a fixed time, with a thread for each connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::tally::Tally;

/// As many as there may be workers: all of them may connect at once.
const BACKLOG: i32 = 1024;
/// It does next to nothing.
const STACK_BYTES: usize = 64 * 1024;
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// Closed when dropped. Its connections end when the program closes them.
pub struct Destination {
    address: SocketAddr,
    is_closed: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Destination {
    /// Answers each request `latency` after it came in, and tells `tally`.
    pub fn start(latency: Duration, tally: Arc<Tally>) -> Destination {
        let listener = listen().expect("listen");
        let address = listener.local_addr().expect("address");
        let is_closed = Arc::new(AtomicBool::new(false));
        let closed = Arc::clone(&is_closed);
        let acceptor = thread::spawn(move || {
            for stream in listener.incoming() {
                if closed.load(Ordering::Relaxed) {
                    return;
                }
                let (stream, tally) = (stream.expect("accept"), Arc::clone(&tally));
                thread::Builder::new()
                    .stack_size(STACK_BYTES)
                    // It ends with an error when the program is killed.
                    .spawn(move || drop(serve(stream, latency, &tally)))
                    .expect("a thread");
            }
        });
        Destination {
            address,
            is_closed,
            acceptor: Some(acceptor),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::Relaxed);
        // Wakes the acceptor, which then sees that it is to end.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn serve(stream: TcpStream, latency: Duration, tally: &Tally) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(16 * 1024, stream);
    let mut line = Vec::new();
    while skip_request(&mut reader, &mut line)? {
        thread::sleep(latency);
        reader.get_mut().write_all(ANSWER)?;
        tally.answer();
    }
    Ok(())
}

/// Reads one request whose body has a length, and forgets it; false at the end.
fn skip_request(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    let mut length = 0;
    loop {
        line.clear();
        if reader.read_until(b'\n', line)? == 0 {
            return Ok(false);
        }
        if line.as_slice() == b"\r\n" {
            break;
        }
        if let Some(value) = value(line, "content-length") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    io::copy(&mut reader.take(length), &mut io::sink())?;
    Ok(true)
}

fn value<'a>(line: &'a [u8], name: &str) -> Option<&'a str> {
    let (found, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
    found.eq_ignore_ascii_case(name).then_some(value)
}
