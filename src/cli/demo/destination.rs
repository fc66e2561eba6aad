//! The destination of the demo: takes note of what arrives, and can go down.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::ledger::Ledger;
use super::{print, webhook};
use crate::budget::{Budget, Permit};
use crate::intake::Answer;
use crate::intake::builtin::{Acceptor, Received, Service, Times};
use crate::printable;
use crate::thread::Threads;

const CONNECTIONS_MAX: usize = 128;
const BACKLOG: i32 = 128;
const TIMES: Times = Times {
    request: Duration::from_secs(5),
    idle: Duration::from_secs(60),
};
const BODY_BYTES_MAX: usize = 64 * 1024;
const HELD_BYTES_MAX: usize = 16 * 1024 * 1024;

pub(super) struct Destination {
    address: SocketAddr,
    /// Bound to it all the time, so that nobody else gets the port while it is down.
    socket: Socket,
    ledger: Arc<Ledger>,
    /// While it is up.
    serving: Option<(Arc<Acceptor<Listener>>, Arc<Listener>)>,
}

impl Destination {
    /// Not up yet.
    pub(super) fn new(ledger: Arc<Ledger>) -> io::Result<Destination> {
        // A port that was asked for by its number is kept when the listening ends.
        let chosen = bound((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = chosen.local_addr()?.as_socket();
        let address = address.ok_or_else(|| io::Error::other("no address"))?;
        Ok(Destination {
            address,
            socket: bound(address)?,
            ledger,
            serving: None,
        })
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn open(&mut self, threads: &Threads) -> io::Result<()> {
        self.socket.listen(BACKLOG)?;
        let listener = Arc::new(Listener {
            ledger: Arc::clone(&self.ledger),
            budget: Budget::new(HELD_BYTES_MAX),
            is_closing: AtomicBool::new(false),
        });
        let acceptor = Acceptor::start(
            "destination",
            self.socket.try_clone()?,
            Arc::clone(&listener),
            TIMES,
            CONNECTIONS_MAX,
            threads,
        )?;
        self.serving = Some((acceptor, listener));
        Ok(())
    }

    /// From now on connections are refused.
    pub(super) fn close(&mut self) {
        if let Some((acceptor, listener)) = self.serving.take() {
            listener.is_closing.store(true, Ordering::SeqCst);
            acceptor.close();
        }
    }
}

fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

struct Listener {
    ledger: Arc<Ledger>,
    budget: Arc<Budget>,
    is_closing: AtomicBool,
}

impl Service for Listener {
    fn body_bytes_max(&self) -> usize {
        BODY_BYTES_MAX
    }

    fn permit(&self) -> Permit {
        self.budget.permit()
    }

    fn serve(&self, received: Received<'_>) -> Answer {
        let field = |name: &str| {
            let fields = received.head.fields.iter();
            let mut values = fields.filter(|field| field.name.eq_ignore_ascii_case(name));
            values.find_map(|field| std::str::from_utf8(field.value).ok())
        };
        let Some(id) = webhook::id(field, &received.body) else {
            return Answer::Accepted(400);
        };
        if self.ledger.arrived(id) {
            print(format!(
                "       arrived: {} {}, {}, attempt {}",
                received.head.method,
                received.head.target.escape_debug(),
                printable::count(received.body.len() as u64, "byte"),
                field("X-Asyncproxy-Attempt")
                    .unwrap_or_default()
                    .escape_debug(),
            ));
        }
        Answer::Accepted(200)
    }

    fn refuse(&self, answer: Answer) -> Answer {
        answer
    }

    fn is_draining(&self) -> bool {
        self.is_closing.load(Ordering::SeqCst)
    }
}
