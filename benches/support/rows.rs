//! Rows to be stored.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use asyncproxy::queue::{Fate, NewRow};
use asyncproxy::request::{Headers, Request};
use uuid::Uuid;

/// What the rows carry.
pub struct Body {
    pub name: &'static str,
    bytes: Vec<u8>,
}

impl Body {
    pub fn new(name: &'static str, bytes: usize) -> Body {
        // Neither the file system nor the server can make it smaller.
        let bytes = std::iter::repeat_with(|| fastrand::u8(..)).take(bytes);
        let bytes = bytes.collect();
        Body { name, bytes }
    }

    /// New rows that are due at once.
    pub fn rows(&self, count: u64) -> Vec<NewRow> {
        (0..count).map(|_| self.row()).collect()
    }

    fn row(&self) -> NewRow {
        let mut headers = Headers::default();
        for (name, value) in [
            ("Content-Type", "application/json"),
            ("User-Agent", "sender/1.0"),
            ("X-Forwarded-For", "192.0.2.1"),
        ] {
            headers.push(name, value.as_bytes()).unwrap();
        }
        let request = Request {
            id: Uuid::now_v7(),
            received_at: SystemTime::now(),
            method: "POST".into(),
            target: "/hook?source=bench".into(),
            headers,
            body: self.bytes.clone(),
        };
        NewRow {
            request: Arc::new(request),
            attempt: 0,
            fate: Fate::Due {
                after: Duration::ZERO,
                failure: None,
            },
        }
    }
}
