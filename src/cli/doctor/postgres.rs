//! The database server: what it is set to, and what wears the queue's tables out.

use std::time::Duration;

use super::file::schema;
use super::{Finding, size};
use crate::config::{Config, PostgresServer};
use crate::queue::StoreError;
use crate::queue::migrate::Policy;
use crate::queue::postgres::inspect::{
    Fact, Holder, Observation, Pooling, Rights, Server, Snapshot, Table, inspect,
};
use crate::status::about;

const ABOUT: &str = "db.connection_string";
/// The first with `AS MATERIALIZED`, which the statements have.
const OLDEST: (i32, &str) = (120_000, "12");
/// A connection to a server nearby takes a few milliseconds.
const CONNECT_SLOW: Duration = Duration::from_secs(1);
/// Claims walk through what died since a snapshot.
const SNAPSHOT_SECONDS: f64 = 60.0;
const SNAPSHOT_TRANSACTIONS: i64 = 10_000;
/// Vacuum comes after 5,000.
const DEAD_ROWS: i64 = 50_000;
/// Bytes of indexes for each row that are still in order, and in all.
const INDEX_BYTES_A_ROW: i64 = 2048;
const INDEX_BYTES: i64 = 64 << 20;
/// SQLSTATE, as errors have it.
const PERMISSION_DENIED: &str = "(SQLSTATE 42501)";
const CLOCK_SECONDS: f64 = 2.0;

pub(super) fn findings(database: &PostgresServer, config: &Config) -> Vec<Finding> {
    let observations = inspect(database, config.db.timeout);
    let mut findings = Vec::new();
    for observation in observations {
        findings.extend(judge(observation, config));
    }
    findings
}

fn judge(observation: Observation, config: &Config) -> Vec<Finding> {
    let fact = match observation {
        Ok(fact) => fact,
        Err((what, error)) => return vec![unknown(what, &error)],
    };
    match fact {
        Fact::Connected(took) => vec![connected(took)],
        Fact::Server(server) => judge_server(&server, config),
        Fact::Schema(version) => vec![schema(ABOUT, version, config.db.migrate)],
        Fact::Rights(rights) => judge_rights(&rights, config.db.migrate),
        Fact::Pooling(pooling) => vec![pooler(pooling)],
        Fact::Snapshots { held, hidden } => snapshots(&held, hidden),
        Fact::Tables(tables) => tables.iter().flat_map(judge_table).collect(),
        Fact::Clock { ahead, exact_to } => vec![clock(ahead, exact_to)],
    }
}

fn unknown(what: &str, error: &StoreError) -> Finding {
    match what {
        "connection" => Finding::error(
            ABOUT,
            error.to_string(),
            "see that the server runs and lets this user in: psql with the same host, port, user and dbname",
        ),
        _ if error.to_string().contains(PERMISSION_DENIED) => Finding::warning(
            ABOUT,
            format!("{what}: not visible to this user: {error}"),
            "GRANT pg_monitor to the user, or run this as one that may",
        ),
        _ => Finding::warning(
            ABOUT,
            format!("{what}: not looked at: {error}"),
            "see the server's log, or raise db.timeout",
        ),
    }
}

fn connected(took: Duration) -> Finding {
    let found = format!("connected in {:.1} ms", took.as_secs_f64() * 1000.0);
    match took > CONNECT_SLOW {
        true => Finding::warning(ABOUT, found, "look for a slow name server or network"),
        false => Finding::ok(ABOUT, found),
    }
}

fn judge_server(server: &Server, config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        server_version(server),
        takes_writes(server),
        isolation(server),
        connections(server, config.db.max_connections),
    ];
    findings.push(match server.synchronous_commit.as_str() {
        "off" => Finding::error(
            "synchronous_commit",
            "off: a crash of the server loses requests that senders were told are stored",
            "ALTER ROLE … SET synchronous_commit = on, for the user of db.connection_string",
        ),
        value => Finding::ok("synchronous_commit", value),
    });
    for (name, is_on) in [
        ("fsync", server.fsync),
        ("full_page_writes", server.full_page_writes),
    ] {
        findings.push(match is_on {
            true => Finding::ok(name, "on"),
            false => Finding::error(
                name,
                "off: a power loss can destroy the database",
                format!("ALTER SYSTEM SET {name} = on, and SELECT pg_reload_conf()"),
            ),
        });
    }
    findings.push(match server.autovacuum {
        true => Finding::ok("autovacuum", "on"),
        false => Finding::error(
            "autovacuum",
            "off: the queue's tables only grow, and claims get slower",
            "ALTER SYSTEM SET autovacuum = on, and SELECT pg_reload_conf()",
        ),
    });
    findings
}

fn server_version(server: &Server) -> Finding {
    let (oldest, name) = OLDEST;
    match server.version_num < oldest {
        true => Finding::error(
            ABOUT,
            format!(
                "PostgreSQL {}: its SQL lacks AS MATERIALIZED",
                server.version
            ),
            format!("upgrade the server to {name} or later"),
        ),
        false => Finding::ok(ABOUT, format!("PostgreSQL {}", server.version)),
    }
}

fn takes_writes(server: &Server) -> Finding {
    match (server.is_standby, server.is_read_only) {
        (true, _) => Finding::error(
            ABOUT,
            "the server is a standby: it takes nothing",
            "name the primary, or all hosts: then the one that takes writes is found, also after a failover",
        ),
        (false, true) => Finding::error(
            ABOUT,
            "transactions are read-only by default: nothing can be stored",
            "ALTER ROLE … or ALTER DATABASE … SET default_transaction_read_only = off, whichever has set it",
        ),
        (false, false) => Finding::ok(ABOUT, "the server takes writes"),
    }
}

fn isolation(server: &Server) -> Finding {
    const ABOUT: &str = "default isolation";
    match server.isolation.as_str() {
        "read committed" => Finding::ok(ABOUT, "read committed"),
        level => Finding::warning(
            ABOUT,
            format!(
                "{level}: each statement has to ask for read committed, in two round trips more"
            ),
            "ALTER ROLE … SET default_transaction_isolation = 'read committed', for the user of db.connection_string",
        ),
    }
}

fn judge_rights(rights: &Rights, policy: Policy) -> Vec<Finding> {
    const ABOUT: &str = "rights";
    let Rights { user, version, .. } = rights;
    let mut findings = Vec::new();
    if !rights.missing.is_empty() {
        let missing = rights.missing.join(", ");
        findings.push(Finding::error(
            ABOUT,
            format!("{user} lacks {missing}"),
            format!("GRANT SELECT, INSERT, UPDATE, DELETE on the tables TO {user}"),
        ));
    }
    let schema = rights.schema.as_deref().unwrap_or("public");
    let is_pending = version.applied < version.wanted && policy == Policy::Apply;
    if is_pending && !rights.may_create {
        findings.push(Finding::error(
            ABOUT,
            format!("tables are still to be made, and {user} may make none in the schema {schema}"),
            format!("GRANT CREATE ON SCHEMA {schema} TO {user}, or run asyncproxy migrate as one who may"),
        ));
    } else if is_pending && !rights.owns_tables {
        findings.push(Finding::error(
            ABOUT,
            format!("tables are still to be changed, and {user} does not own them"),
            "run asyncproxy migrate as their owner",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(ABOUT, format!("{user} has all that is needed")));
    }
    findings
}

fn connections(server: &Server, ours: u32) -> Finding {
    const ABOUT: &str = "db.max_connections";
    let free = server.connections_max - server.connections;
    let found = format!(
        "{ours}; the server has {} of {} free",
        free.max(0),
        server.connections_max
    );
    match free < i64::from(ours) {
        true => Finding::warning(
            ABOUT,
            found,
            "raise max_connections of the server, put PgBouncer before it, or lower it",
        ),
        false => Finding::ok(ABOUT, found),
    }
}

fn pooler(pooling: Pooling) -> Finding {
    const ABOUT: &str = "pooler";
    match pooling {
        Pooling::Session => Finding::ok(ABOUT, "none, or one that pools by session"),
        Pooling::Transaction => Finding::ok(ABOUT, "one that pools by transaction, which is fine"),
        Pooling::Statement => Finding::error(
            ABOUT,
            "one that pools by statement: it refuses transactions, which the store needs",
            "set pool_mode = transaction in PgBouncer for this database",
        ),
    }
}

fn snapshots(held: &[Snapshot], hidden: i64) -> Vec<Finding> {
    const ABOUT: &str = "old snapshots";
    let is_old = |snapshot: &&Snapshot| {
        snapshot.seconds > SNAPSHOT_SECONDS || snapshot.transactions > SNAPSHOT_TRANSACTIONS
    };
    let mut findings: Vec<Finding> = held.iter().filter(is_old).take(5).map(old).collect();
    if findings.is_empty() {
        findings.push(Finding::ok(ABOUT, "none keeps vacuum from its work"));
    }
    if hidden > 0 {
        findings.push(Finding {
            mend: Some("GRANT pg_read_all_stats to the user to have them looked at".into()),
            ..Finding::ok(
                ABOUT,
                format!("{hidden} sessions of others are not visible to this user"),
            )
        });
    }
    findings
}

fn old(snapshot: &Snapshot) -> Finding {
    let (holder, mend) = match &snapshot.holder {
        Holder::Session {
            pid,
            application,
            state,
        } => (
            format!("pid {pid} ({application}, {state})"),
            format!(
                "SELECT pg_terminate_backend({pid}), and set idle_in_transaction_session_timeout"
            ),
        ),
        Holder::Prepared(id) => (
            format!("the prepared transaction {id:?}"),
            "COMMIT PREPARED or ROLLBACK PREPARED it".to_owned(),
        ),
        Holder::Slot(name) => (
            format!("the replication slot {name:?}"),
            "let its consumer catch up, or pg_drop_replication_slot it".to_owned(),
        ),
    };
    let found = format!(
        "{holder} has held one for {}, {} transactions: vacuum cannot remove what died since",
        about(Duration::try_from_secs_f64(snapshot.seconds).unwrap_or_default()),
        snapshot.transactions
    );
    Finding::warning("old snapshots", found, mend)
}

fn judge_table(table: &Table) -> Vec<Finding> {
    let about = match table.name.as_str() {
        "proxy_requests" => "proxy_requests",
        _ => "proxy_dead_letters",
    };
    let bytes = |bytes: i64| size(u64::try_from(bytes).unwrap_or(0));
    let found = format!(
        "{} live rows, {} dead; table {}, indexes {}",
        table.live,
        table.dead,
        bytes(table.table_bytes),
        bytes(table.index_bytes)
    );
    let mut findings = Vec::new();
    if !table.autovacuum {
        let mend = format!("ALTER TABLE {about} RESET (autovacuum_enabled)");
        findings.push(Finding::error(about, "autovacuum is off for it", mend));
    }
    let is_bloated = table.index_bytes > INDEX_BYTES
        && table.index_bytes / INDEX_BYTES_A_ROW > table.live.max(1);
    findings.push(match table {
        _ if table.dead > DEAD_ROWS && table.dead > table.live => Finding::warning(
            about,
            found,
            format!("end what holds an old snapshot, if anything does, then VACUUM {about}"),
        ),
        _ if is_bloated => Finding::warning(
            about,
            found,
            format!("REINDEX TABLE CONCURRENTLY {about}, at any time"),
        ),
        _ => Finding::ok(about, found),
    });
    findings
}

fn clock(ahead: f64, exact_to: f64) -> Finding {
    const ABOUT: &str = "database clock";
    let found = format!("{ahead:+.3} s from this machine's, to within {exact_to:.3} s");
    match ahead.abs() - exact_to > CLOCK_SECONDS {
        true => Finding::warning(
            ABOUT,
            found,
            "synchronise both with NTP: ages of requests are told by both clocks",
        ),
        false => Finding::ok(ABOUT, found),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::queue::migrate::Version;

    fn server() -> Server {
        Server {
            version: "15.1".into(),
            version_num: 150_001,
            connections_max: 97,
            connections: 5,
            autovacuum: true,
            fsync: true,
            full_page_writes: true,
            synchronous_commit: "on".into(),
            is_standby: false,
            is_read_only: false,
            isolation: "read committed".into(),
        }
    }

    fn levels(findings: &[Finding]) -> Vec<Level> {
        findings.iter().map(|finding| finding.level).collect()
    }

    /// Of what is not as it should be.
    fn about_faults(findings: &[Finding]) -> Vec<&'static str> {
        let faults = findings.iter().filter(|finding| finding.level != Level::Ok);
        faults.map(|finding| finding.about).collect()
    }

    #[test]
    fn each_setting_of_the_server_is_judged() {
        let config = Config::from_yaml("", &|_| None).unwrap();
        let faults = |server: Server| about_faults(&judge_server(&server, &config));
        assert_eq!(faults(server()), [""; 0]);
        let broken = Server {
            version_num: 110_022,
            connections: 96,
            autovacuum: false,
            fsync: false,
            full_page_writes: false,
            synchronous_commit: "off".into(),
            is_read_only: true,
            isolation: "serializable".into(),
            ..server()
        };
        let expected = [
            ABOUT,
            ABOUT,
            "default isolation",
            "db.max_connections",
            "synchronous_commit",
            "fsync",
            "full_page_writes",
            "autovacuum",
        ];
        assert_eq!(faults(broken), expected);
    }

    #[test]
    fn a_standby_and_one_that_only_reads_are_errors() {
        for (is_standby, is_read_only, level) in [
            (false, false, Level::Ok),
            (false, true, Level::Error),
            (true, true, Level::Error),
        ] {
            let server = Server {
                is_standby,
                is_read_only,
                ..server()
            };
            assert_eq!(takes_writes(&server).level, level);
        }
    }

    #[test]
    fn rights_are_judged_by_what_is_still_to_be_done() {
        let rights = |applied, may_create, owns_tables, missing: &[&str]| Rights {
            user: "me".into(),
            schema: Some("public".into()),
            may_create,
            owns_tables,
            missing: missing.iter().map(|&right| right.to_owned()).collect(),
            version: Version { applied, wanted: 2 },
        };
        let judged = |rights: Rights, policy| levels(&judge_rights(&rights, policy));
        let (ok, error) = ([Level::Ok], [Level::Error]);
        assert_eq!(judged(rights(2, false, false, &[]), Policy::Apply), ok);
        assert_eq!(judged(rights(0, true, true, &[]), Policy::Apply), ok);
        assert_eq!(judged(rights(0, false, true, &[]), Policy::Apply), error);
        assert_eq!(judged(rights(1, true, false, &[]), Policy::Apply), error);
        // Someone else does it.
        assert_eq!(judged(rights(1, false, false, &[]), Policy::Require), ok);
        let missing = ["UPDATE ON proxy_requests"];
        assert_eq!(
            judged(rights(2, true, true, &missing), Policy::Apply),
            error
        );
    }

    #[test]
    fn old_snapshots_are_named_with_their_end() {
        let session = Holder::Session {
            pid: "42".into(),
            application: "psql".into(),
            state: "idle in transaction".into(),
        };
        let held = |holder: &Holder, transactions, seconds| Snapshot {
            holder: holder.clone(),
            transactions,
            seconds,
        };
        assert_eq!(
            levels(&snapshots(&[held(&session, 10, 1.0)], 0)),
            [Level::Ok]
        );
        for (holder, mend) in [
            (session, "pg_terminate_backend(42)"),
            (Holder::Prepared("g".into()), "PREPARED"),
            (Holder::Slot("s".into()), "pg_drop_replication_slot"),
        ] {
            for held in [held(&holder, 1, 3600.0), held(&holder, 10_001, 1.0)] {
                let findings = snapshots(&[held], 0);
                assert_eq!(levels(&findings), [Level::Warning]);
                assert!(
                    findings[0]
                        .mend
                        .as_ref()
                        .is_some_and(|text| text.contains(mend))
                );
            }
        }
        let hidden = snapshots(&[], 3);
        assert_eq!(levels(&hidden), [Level::Ok, Level::Ok]);
        assert!(
            hidden[1]
                .found
                .contains("3 sessions of others are not visible")
        );
    }

    #[test]
    fn worn_tables_are_told() {
        let table = Table {
            name: "proxy_requests".into(),
            live: 10,
            dead: 10,
            table_bytes: 1 << 20,
            index_bytes: 1 << 20,
            autovacuum: true,
        };
        assert_eq!(levels(&judge_table(&table)), [Level::Ok]);
        let mend = |table: Table| judge_table(&table)[0].mend.clone().unwrap_or_default();
        let dead = DEAD_ROWS + 1;
        assert!(
            mend(Table {
                dead,
                ..table.clone()
            })
            .contains("VACUUM proxy_requests")
        );
        let index_bytes = INDEX_BYTES + 1;
        assert!(
            mend(Table {
                index_bytes,
                ..table.clone()
            })
            .contains("CONCURRENTLY")
        );
        let autovacuum = false;
        assert!(
            mend(Table {
                autovacuum,
                ..table
            })
            .contains("autovacuum_enabled")
        );
    }

    #[test]
    fn connecting_pooling_and_clocks_are_judged() {
        assert_eq!(connected(Duration::from_millis(3)).level, Level::Ok);
        assert_eq!(connected(Duration::from_secs(2)).level, Level::Warning);
        assert_eq!(pooler(Pooling::Session).level, Level::Ok);
        assert_eq!(pooler(Pooling::Transaction).level, Level::Ok);
        assert_eq!(pooler(Pooling::Statement).level, Level::Error);
        assert_eq!(clock(1.0, 0.1).level, Level::Ok);
        assert_eq!(clock(-3.0, 0.1).level, Level::Warning);
        assert_eq!(clock(3.0, 2.0).level, Level::Ok);
        let error = StoreError::Refused(format!("permission denied {PERMISSION_DENIED}"));
        assert_eq!(unknown("connection", &error).level, Level::Error);
        assert!(
            unknown("snapshots", &error)
                .found
                .contains("not visible to this user")
        );
    }
}
