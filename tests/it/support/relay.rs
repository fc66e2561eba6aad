//! A relay in front of a server, which can be frozen: connections stay, nothing moves.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Relays from a port of its own for as long as the process runs.
pub struct Relay {
    port: u16,
    frozen: Arc<(Mutex<bool>, Condvar)>,
}

impl Relay {
    /// Relays connections made to `listener` to `port` of this machine.
    pub fn start(listener: TcpListener, port: u16) -> Relay {
        let relay = Relay {
            port: listener.local_addr().expect("address").port(),
            frozen: Arc::default(),
        };
        let frozen = Arc::clone(&relay.frozen);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
                    continue;
                };
                copy(&client, &server, &frozen);
                copy(&server, &client, &frozen);
            }
        });
        relay
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn freeze(&self, frozen: bool) {
        *self.frozen.0.lock().unwrap_or_else(PoisonError::into_inner) = frozen;
        self.frozen.1.notify_all();
    }
}

fn copy(from: &TcpStream, to: &TcpStream, frozen: &Arc<(Mutex<bool>, Condvar)>) {
    let mut from = from.try_clone().expect("clone a socket");
    let mut to = to.try_clone().expect("clone a socket");
    let frozen = Arc::clone(frozen);
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            let state = frozen.0.lock().unwrap_or_else(PoisonError::into_inner);
            drop(frozen.1.wait_while(state, |frozen| *frozen));
            if to.write_all(&buffer[..bytes]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}
