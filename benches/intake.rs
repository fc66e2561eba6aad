//! How many requests a second each acceptor takes in, with nothing behind it: by number of
//! connections, kept open or not, and size of the body. Clients and server share the machine.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    unreachable_pub,
    reason = "a benchmark"
)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const CONNECTIONS: [u64; 4] = [1, 16, 64, 256];
const BODIES: [(&str, usize); 2] = [("small", 100), ("8.9KB", 8900)];

fn intake(criterion: &mut Criterion) {
    for acceptor in support::discard::ACCEPTORS {
        for (mode, is_kept) in [("keep-alive", true), ("close", false)] {
            for (size, bytes) in BODIES {
                let mut group = criterion.benchmark_group(format!("{acceptor}/{mode}/{size}"));
                group
                    .throughput(Throughput::Elements(1))
                    .sample_size(10)
                    .warm_up_time(Duration::from_millis(200))
                    .measurement_time(Duration::from_secs(1));
                for connections in CONNECTIONS {
                    // A server of its own: tiny_http keeps threads for connections that are gone.
                    let address = support::discard::serve(acceptor, "127.0.0.1:0");
                    let id = BenchmarkId::from_parameter(connections);
                    group.bench_function(id, |bencher| {
                        bencher.iter_custom(|requests| {
                            load(address, connections, requests, bytes, is_kept)
                        });
                    });
                }
            }
        }
    }
}

/// Sends at least `requests` over so many connections at once; the time for exactly that many.
fn load(
    address: SocketAddr,
    connections: u64,
    requests: u64,
    bytes: usize,
    is_kept: bool,
) -> Duration {
    // Enough for each, or opening the connections would be what is measured.
    let each = requests.div_ceil(connections).max(100);
    let connection = if is_kept { "keep-alive" } else { "close" };
    let mut request = format!(
        "POST /hook HTTP/1.1\r\nHost: h\r\nContent-Length: {bytes}\r\nConnection: {connection}\r\n\r\n"
    )
    .into_bytes();
    request.resize(request.len() + bytes, b'x');
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| client(address, &request, each, is_kept));
        }
    });
    started
        .elapsed()
        .mul_f64(requests as f64 / (each * connections) as f64)
}

fn client(address: SocketAddr, request: &[u8], requests: u64, is_kept: bool) {
    let connect = || {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    };
    let mut stream = connect();
    let mut answer = [0; 4096];
    for number in 0..requests {
        if number > 0 && !is_kept {
            stream = connect();
        }
        stream.write_all(request).unwrap();
        // An answer is small and comes in one piece.
        let bytes = stream.read(&mut answer).unwrap();
        assert!(answer[..bytes].starts_with(b"HTTP/1.1 200 "));
    }
}

criterion_group!(benches, intake);
criterion_main!(benches);
