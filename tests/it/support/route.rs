//! The ways a request can take through the program. One place that knows how each is set up.

use super::destination::Destination;
use super::pgbouncer::Pgbouncer;
use super::postgres::cluster;
use super::proxy::Setup;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Straight to the destination; what fails is kept in SQLite.
    Direct,
    Sqlite,
    Postgres,
    Pgbouncer,
    /// Stored, and then sent without being claimed.
    SqliteFirst,
    PostgresFirst,
}

impl Route {
    /// A program that sends to `destination` on this route.
    pub fn to(self, destination: &Destination) -> Setup {
        let setup = Setup::new(&destination.url());
        match self {
            // Room for all that a test sends before it looks: none of it is to overflow.
            Route::Direct => setup.set("proxy.num_clients", 64),
            Route::Sqlite => setup.set("server.enqueue_rate", 0),
            Route::SqliteFirst => setup.set("server.ack", "stored"),
            Route::Postgres | Route::PostgresFirst => {
                let database = cluster().database();
                let (key, value) = match self {
                    Route::Postgres => ("server.enqueue_rate", "0"),
                    _ => ("server.ack", "stored"),
                };
                setup
                    .set(key, value)
                    .set("db.connection_string", database.url())
                    .keep(database)
            }
            Route::Pgbouncer => {
                let database = cluster().database();
                let bouncer = Pgbouncer::start(&database);
                setup
                    .set("server.enqueue_rate", 0)
                    .set("db.connection_string", bouncer.url())
                    .keep(bouncer)
                    .keep(database)
            }
        }
    }

    /// The label of `asyncproxy_requests_total` for requests on this route.
    pub fn admission(self) -> &'static str {
        match self {
            Route::Direct => "asyncproxy_requests_total{admission=\"direct\"}",
            _ => "asyncproxy_requests_total{admission=\"stored\"}",
        }
    }
}

/// Makes a test of `fn name(route: Route)` for each route listed, or for all.
macro_rules! on_routes {
    ($name:ident) => {
        on_routes!($name: direct Direct, sqlite Sqlite, postgres Postgres, pgbouncer Pgbouncer, first SqliteFirst);
    };
    ($name:ident: $($test:ident $route:ident),+) => {
        mod $name {
            use crate::support::route::Route;
            $(#[test]
            fn $test() {
                super::$name(Route::$route);
            })+
        }
    };
}
pub(crate) use on_routes;
