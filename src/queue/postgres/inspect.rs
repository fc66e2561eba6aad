//! What `asyncproxy doctor` asks a database. Changes nothing, and judges nothing.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::super::StoreError;
use super::super::migrate::Version;
use super::errors::{self, Fault};
use super::hosts::Link;
use super::session::Session as Connection;
use super::{connections, schema};
use crate::config::PostgresServer;
use crate::thread::Threads;

/// Two clients that get the same session of the server one after the other share it through a
/// pooler. Others may come between, so it is tried more than once.
const POOLING_TRIES: usize = 5;

const PID: &str = "SELECT pg_backend_pid()";

const SERVER: &str = "
    SELECT current_setting('server_version'),
           current_setting('server_version_num')::integer,
           current_setting('max_connections')::bigint
               - current_setting('superuser_reserved_connections')::bigint,
           (SELECT sum(numbackends)::bigint FROM pg_stat_database),
           current_setting('autovacuum') = 'on',
           current_setting('fsync') = 'on',
           current_setting('full_page_writes') = 'on',
           current_setting('synchronous_commit'),
           pg_is_in_recovery(),
           current_setting('transaction_read_only') = 'on',
           current_setting('default_transaction_isolation')";

/// What the store does to its tables, and whether the user may.
const RIGHTS: &str = "
    SELECT current_schema()::text,
           current_user::text,
           coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
           coalesce((SELECT pg_has_role(relowner, 'USAGE')
                       FROM pg_class
                      WHERE oid = to_regclass('proxy_requests')), true),
           ARRAY(
               SELECT upper(kind) || ' ON ' || name
                 FROM (VALUES ('proxy_requests', ARRAY['select', 'insert', 'update', 'delete']),
                              ('proxy_dead_letters', ARRAY['select', 'insert', 'update', 'delete']),
                              ('proxy_rate', ARRAY['select', 'insert', 'update']),
                              ('proxy_pause', ARRAY['select', 'insert', 'delete']),
                              ('proxy_instances', ARRAY['select', 'insert', 'update', 'delete']),
                              ('asyncproxy_migrations', ARRAY['select'])
                      ) AS needed (name, kinds),
                      unnest(kinds) AS kind
                WHERE NOT coalesce(has_table_privilege(to_regclass(name), kind), true)
           )";

/// Who keeps vacuum from removing what died since. Workers of autovacuum do not.
const SNAPSHOTS: &str = "
    SELECT kind, name, application, state, transactions, seconds
      FROM (
        SELECT 'session' AS kind, pid::text AS name,
               coalesce(application_name, '') AS application, coalesce(state, '') AS state,
               greatest(age(backend_xmin), age(backend_xid))::bigint AS transactions,
               coalesce(extract(epoch FROM clock_timestamp() - xact_start), 0)::double precision
                   AS seconds
          FROM pg_stat_activity
         WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
           AND pid <> pg_backend_pid()
           AND backend_type <> 'autovacuum worker'
           AND (datname IS NULL OR datname = current_database())
         UNION ALL
        SELECT 'prepared', gid, '', '', age(transaction)::bigint,
               extract(epoch FROM clock_timestamp() - prepared)::double precision
          FROM pg_prepared_xacts
         WHERE database = current_database()
         UNION ALL
        SELECT 'slot', slot_name::text, '', '', age(xmin)::bigint, 0
          FROM pg_replication_slots
         WHERE xmin IS NOT NULL
      ) AS held
     ORDER BY transactions DESC, seconds DESC
     LIMIT 100";

const HIDDEN: &str = "
    SELECT count(*)
      FROM pg_stat_activity
     WHERE query = '<insufficient privilege>' AND datname = current_database()";

const TABLES: &str = "
    SELECT relname::text, n_live_tup, n_dead_tup,
           pg_table_size(relid), pg_indexes_size(relid),
           NOT coalesce((SELECT reloptions @> ARRAY['autovacuum_enabled=false']
                           FROM pg_class
                          WHERE oid = relid), false)
      FROM pg_stat_user_tables
     WHERE schemaname = current_schema()
       AND relname IN ('proxy_requests', 'proxy_dead_letters')
     ORDER BY relname DESC";

const CLOCK: &str = "SELECT extract(epoch FROM clock_timestamp())::double precision";

/// Something that was found out.
#[derive(Debug, Clone, PartialEq)]
pub enum Fact {
    /// How long connecting took.
    Connected(Duration),
    Server(Server),
    Schema(Version),
    Rights(Rights),
    Pooling(Pooling),
    Snapshots {
        /// The one that goes back furthest first.
        held: Vec<Snapshot>,
        /// Sessions that this user is not told of.
        hidden: i64,
    },
    Tables(Vec<Table>),
    /// Seconds that the server's clock is ahead of this machine's, and how exactly that is known.
    Clock {
        ahead: f64,
        exact_to: f64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub version: String,
    pub version_num: i32,
    /// For users without special rights.
    pub connections_max: i64,
    pub connections: i64,
    pub autovacuum: bool,
    pub fsync: bool,
    pub full_page_writes: bool,
    pub synchronous_commit: String,
    pub is_standby: bool,
    pub is_read_only: bool,
    /// The default of the database's transactions.
    pub isolation: String,
}

/// What the user may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rights {
    pub user: String,
    /// Where tables are looked for and made; none if it is not there.
    pub schema: Option<String>,
    pub may_create: bool,
    /// Also if there are no tables.
    pub owns_tables: bool,
    /// Such as `UPDATE ON proxy_requests`.
    pub missing: Vec<String>,
    pub version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// A session of its own, as far as that can be seen.
    Session,
    /// A pooler that hands out sessions by transaction.
    Transaction,
    /// One that does so by statement: there are no transactions.
    Statement,
}

/// Keeps vacuum from removing rows that died after it was taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    pub holder: Holder,
    /// Transactions begun since.
    pub transactions: i64,
    pub seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    Session {
        pid: String,
        application: String,
        state: String,
    },
    Prepared(String),
    Slot(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub name: String,
    pub live: i64,
    pub dead: i64,
    pub table_bytes: i64,
    pub index_bytes: i64,
    pub autovacuum: bool,
}

/// A fact, or what could not be found out and why.
pub type Observation = Result<Fact, (&'static str, StoreError)>;

type Step = (&'static str, fn(&mut Session) -> Result<Fact, Fault>);

const STEPS: [Step; 7] = [
    ("server", server),
    ("schema", |session| {
        Ok(Fact::Schema(schema::version(&mut session.link.session)?))
    }),
    ("rights", rights),
    ("pooler", pooling),
    ("snapshots", snapshots),
    ("tables", tables),
    ("clock", clock),
];
const CONNECTION: &str = "connection";

struct Session {
    server: PostgresServer,
    timeout: Duration,
    link: Link,
}

/// Finds out all that can be, each within `timeout`; after one that takes longer no more.
pub fn inspect(server: &PostgresServer, timeout: Duration) -> Vec<Observation> {
    let (sender, receiver) = bounded(STEPS.len() + 1);
    let owned = server.clone();
    let spawned = Threads::default().spawn_spare("inspect".to_owned(), move || {
        for_each_fact(owned, timeout, |observation| {
            let _ = sender.send(observation);
        });
    });
    if let Err(error) = spawned {
        let why = StoreError::Unavailable(format!("no thread for it: {error}"));
        return vec![Err((CONNECTION, why))];
    }
    let mut observations = Vec::new();
    loop {
        match receiver.recv_timeout(timeout) {
            Ok(observation) => observations.push(observation),
            Err(RecvTimeoutError::Disconnected) => return observations,
            Err(RecvTimeoutError::Timeout) => {
                let mut names = std::iter::once(CONNECTION).chain(STEPS.map(|step| step.0));
                let name = names.nth(observations.len()).unwrap_or(CONNECTION);
                let why = format!("no answer within {timeout:?}");
                observations.push(Err((name, StoreError::Unavailable(why))));
                return observations;
            }
        }
    }
}

fn for_each_fact(server: PostgresServer, timeout: Duration, report: impl Fn(Observation)) {
    let began = Instant::now();
    let link = match connections::connect(&server, timeout) {
        Ok(link) => link,
        Err(error) => return report(Err((CONNECTION, error))),
    };
    report(Ok(Fact::Connected(began.elapsed())));
    let mut session = Session {
        server,
        timeout,
        link,
    };
    for (name, step) in STEPS {
        report(step(&mut session).map_err(|fault| (name, errors::describe(fault))));
    }
}

fn server(session: &mut Session) -> Result<Fact, Fault> {
    let row = session.link.session.query_typed_one(SERVER, &[])?;
    Ok(Fact::Server(Server {
        version: row.try_get(0)?,
        version_num: row.try_get(1)?,
        connections_max: row.try_get(2)?,
        connections: row.try_get(3)?,
        autovacuum: row.try_get(4)?,
        fsync: row.try_get(5)?,
        full_page_writes: row.try_get(6)?,
        synchronous_commit: row.try_get(7)?,
        is_standby: row.try_get(8)?,
        is_read_only: row.try_get(9)?,
        isolation: row.try_get(10)?,
    }))
}

fn rights(session: &mut Session) -> Result<Fact, Fault> {
    let version = schema::version(&mut session.link.session)?;
    let row = session.link.session.query_typed_one(RIGHTS, &[])?;
    Ok(Fact::Rights(Rights {
        schema: row.try_get(0)?,
        user: row.try_get(1)?,
        may_create: row.try_get(2)?,
        owns_tables: row.try_get(3)?,
        missing: row.try_get(4)?,
        version,
    }))
}

fn pooling(session: &mut Session) -> Result<Fact, Fault> {
    let pid = |connection: &mut Connection| -> Result<i32, Fault> {
        Ok(connection.query_typed_one(PID, &[])?.try_get(0)?)
    };
    let (mut other, mut is_refused) = has_transactions(session)?;
    if is_refused {
        // It may have been an accident that has nothing to do with transactions.
        pid(&mut session.link.session)?;
        (other, is_refused) = has_transactions(session)?;
    }
    if is_refused {
        return Ok(Fact::Pooling(Pooling::Statement));
    }
    for _ in 0..POOLING_TRIES {
        if pid(&mut session.link.session)? == pid(&mut other.session)? {
            return Ok(Fact::Pooling(Pooling::Transaction));
        }
    }
    Ok(Fact::Pooling(Pooling::Session))
}

/// A client more, and whether a transaction on it was refused. PgBouncer ends the connection for
/// it, and its reason gets lost on the way.
fn has_transactions(session: &Session) -> Result<(Link, bool), Fault> {
    let link = connections::connect(&session.server, session.timeout);
    let mut link = link.map_err(Fault::Store)?;
    let begun = link.session.transaction().and_then(|mut transaction| {
        transaction.query_typed_one(PID, &[])?;
        transaction.commit()
    });
    match begun {
        Ok(()) => Ok((link, false)),
        Err(error) if error.is_closed() || error.as_db_error().is_some() => Ok((link, true)),
        Err(error) => Err(error.into()),
    }
}

fn snapshots(session: &mut Session) -> Result<Fact, Fault> {
    let mut held = Vec::new();
    for row in session.link.session.query_typed(SNAPSHOTS, &[])? {
        let (kind, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        held.push(Snapshot {
            holder: match kind.as_str() {
                "session" => Holder::Session {
                    pid: name,
                    application: row.try_get(2)?,
                    state: row.try_get(3)?,
                },
                "prepared" => Holder::Prepared(name),
                _ => Holder::Slot(name),
            },
            transactions: row.try_get(4)?,
            seconds: row.try_get(5)?,
        });
    }
    let hidden = session
        .link
        .session
        .query_typed_one(HIDDEN, &[])?
        .try_get(0)?;
    Ok(Fact::Snapshots { held, hidden })
}

fn tables(session: &mut Session) -> Result<Fact, Fault> {
    let mut tables = Vec::new();
    for row in session.link.session.query_typed(TABLES, &[])? {
        tables.push(Table {
            name: row.try_get(0)?,
            live: row.try_get(1)?,
            dead: row.try_get(2)?,
            table_bytes: row.try_get(3)?,
            index_bytes: row.try_get(4)?,
            autovacuum: row.try_get(5)?,
        });
    }
    Ok(Fact::Tables(tables))
}

fn clock(session: &mut Session) -> Result<Fact, Fault> {
    let began = (Instant::now(), SystemTime::now());
    let theirs: f64 = session
        .link
        .session
        .query_typed_one(CLOCK, &[])?
        .try_get(0)?;
    let exact_to = began.0.elapsed().as_secs_f64() / 2.0;
    let ours = began.1.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Fact::Clock {
        ahead: theirs - ours.as_secs_f64() - exact_to,
        exact_to,
    })
}
