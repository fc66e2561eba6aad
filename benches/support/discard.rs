//! An intake with nothing behind it: what is accepted is dropped.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use asyncproxy::admission::Admission;
use asyncproxy::breaker::Destination;
use asyncproxy::budget::Budget;
use asyncproxy::config::Bind;
use asyncproxy::direct;
use asyncproxy::intake::builtin::{self, Times};
use asyncproxy::intake::{Intake, tiny_http};
use asyncproxy::metrics::Metrics;
use asyncproxy::queue::health::StoreHealth;
use asyncproxy::queue::poller::Wake;
use asyncproxy::queue::sqlite::SqliteStore;
use asyncproxy::queue::writer::Writer;
use asyncproxy::thread::Threads;

pub const ACCEPTORS: [&str; 2] = ["builtin", "tiny_http"];

/// Serves on `bind` with the named acceptor until the process ends; returns the address.
pub fn serve(acceptor: &str, bind: &str) -> SocketAddr {
    let threads = Threads::default();
    let metrics = Arc::new(Metrics::new(50).unwrap());
    let (direct, deliveries, _overseer) = direct::bounded(1 << 18);
    // Comes by now and then instead of being woken for each, which would be measured, too.
    threads
        .spawn("drop", move || {
            loop {
                deliveries.try_iter().for_each(drop);
                std::thread::sleep(Duration::from_millis(1));
            }
        })
        .unwrap();
    // Never used: the direct channel is always faster.
    let (_writer, appender) = Writer::new(
        Arc::new(SqliteStore::new(
            "unused".into(),
            true,
            Duration::from_secs(5),
        )),
        None,
        Arc::new(StoreHealth::default()),
        Arc::clone(&metrics),
        Wake::new().0,
        Duration::from_secs(5),
    );
    let destination = Arc::new(Destination::new(0, Arc::clone(&metrics)));
    let intake = Arc::new(Intake {
        admission: Admission::new(None, direct, appender, destination, Arc::clone(&metrics)),
        metrics,
        budget: Budget::new(4 << 30),
        response_status: 200.into(),
        manners: 0.into(),
        mark: 0.into(),
        body_bytes_max: (10 << 20).into(),
        draining: Arc::new(AtomicBool::new(false)),
    });
    let listener = Bind::parse(bind).unwrap().listen().unwrap().socket;
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let times = Times {
        request: Duration::from_secs(5),
        idle: Duration::from_secs(60),
    };
    match acceptor {
        "builtin" => {
            let started =
                builtin::Acceptor::start("intake", listener, intake, times, 1024, &threads);
            // Its threads hold it.
            drop(started.unwrap());
        }
        "tiny_http" => {
            let acceptor = Arc::new(tiny_http::Acceptor::new(listener.into(), intake).unwrap());
            for number in 1..=tiny_http::THREADS {
                let acceptor = Arc::clone(&acceptor);
                threads
                    .spawn(format!("intake-{number}"), move || acceptor.run())
                    .unwrap();
            }
        }
        other => panic!("an acceptor is one of {ACCEPTORS:?}, not {other}"),
    }
    address
}
