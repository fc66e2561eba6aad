//! A relay in front of a server, which can be frozen (connections stay, nothing moves), cut, or narrow.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Relays from a port of its own for as long as the process runs.
pub struct Relay {
    port: u16,
    link: Arc<Link>,
}

#[derive(Default)]
struct Link {
    frozen: Mutex<bool>,
    thawed: Condvar,
    open: Mutex<Vec<TcpStream>>,
}

/// One way of a link that all connections share: when it will be free.
#[derive(Clone)]
struct Way {
    bytes_per_second: Option<u32>,
    free_at: Arc<Mutex<Instant>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Way {
    fn new(bytes_per_second: Option<u32>) -> Way {
        Way {
            bytes_per_second,
            free_at: Arc::new(Mutex::new(Instant::now())),
        }
    }

    /// Takes as long as the bytes do.
    fn pass(&self, bytes: usize) {
        let Some(bytes_per_second) = self.bytes_per_second else {
            return;
        };
        let time = Duration::from_secs_f64(bytes as f64 / f64::from(bytes_per_second));
        let free_at = {
            let mut free_at = lock(&self.free_at);
            *free_at = (*free_at).max(Instant::now()) + time;
            *free_at
        };
        thread::sleep(free_at.saturating_duration_since(Instant::now()));
    }
}

impl Relay {
    /// Relays connections made to `listener` to `port` of this machine.
    pub fn start(listener: TcpListener, port: u16) -> Relay {
        Relay::start_with(listener, port, None)
    }

    /// The same over a link that takes so many bytes a second each way, for all connections together.
    pub fn narrow(listener: TcpListener, port: u16, bytes_per_second: u32) -> Relay {
        Relay::start_with(listener, port, Some(bytes_per_second))
    }

    fn start_with(listener: TcpListener, port: u16, bytes_per_second: Option<u32>) -> Relay {
        let relay = Relay {
            port: listener.local_addr().expect("address").port(),
            link: Arc::default(),
        };
        let link = Arc::clone(&relay.link);
        let (up, down) = (Way::new(bytes_per_second), Way::new(bytes_per_second));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
                    continue;
                };
                copy(&client, &server, &link, &up);
                copy(&server, &client, &link, &down);
                lock(&link.open).extend([client, server]);
            }
        });
        relay
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn freeze(&self, frozen: bool) {
        *lock(&self.link.frozen) = frozen;
        self.link.thawed.notify_all();
    }

    /// Closes all connections that are open.
    pub fn cut(&self) {
        for end in lock(&self.link.open).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn copy(from: &TcpStream, to: &TcpStream, link: &Arc<Link>, way: &Way) {
    let mut from = from.try_clone().expect("clone a socket");
    let mut to = to.try_clone().expect("clone a socket");
    let (link, way) = (Arc::clone(link), way.clone());
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            drop(link.thawed.wait_while(lock(&link.frozen), |frozen| *frozen));
            way.pass(bytes);
            if to.write_all(&buffer[..bytes]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}
