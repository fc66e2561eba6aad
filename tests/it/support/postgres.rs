//! A stand-in, until the store has its own test support.

use super::dedicated::DedicatedCluster;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

#[derive(Debug)]
pub struct Cluster {
    url: String,
}
#[derive(Debug)]
pub struct TestDb {
    url: String,
}
static HELD: Mutex<Option<DedicatedCluster>> = Mutex::new(None);
static N: AtomicUsize = AtomicUsize::new(0);

pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        let mut c = DedicatedCluster::create();
        c.start();
        let url = c.url();
        *HELD.lock().unwrap() = Some(c);
        Cluster { url }
    })
}
impl Cluster {
    pub fn database(&self) -> TestDb {
        let name = format!("t{}", N.fetch_add(1, Ordering::Relaxed));
        let mut c = postgres::Client::connect(&self.url, postgres::NoTls).unwrap();
        c.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
        TestDb {
            url: self.url.replace("/postgres", &format!("/{name}")),
        }
    }
}
impl TestDb {
    pub fn url(&self) -> String {
        self.url.clone()
    }
}
