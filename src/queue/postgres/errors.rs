//! What the server's errors say: about the connection, about the store, and whether to ask again.

use ::postgres::error::{DbError, Severity, SqlState};

use super::super::StoreError;

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum Fault {
    Postgres(::postgres::Error),
    Store(StoreError),
}

impl From<::postgres::Error> for Fault {
    fn from(error: ::postgres::Error) -> Fault {
        Fault::Postgres(error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Fault {
        Fault::Store(error)
    }
}

/// What is to be done about a fault, beside telling it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    None,
    /// Two transactions met, and the server let one of them go on: the other may try again.
    Again,
    /// A table or a column is not there: the schema is not what it was when it was looked at.
    Migrate,
}

impl Fault {
    fn database(&self) -> Option<&DbError> {
        match self {
            Fault::Postgres(error) => error.as_db_error(),
            Fault::Store(_) => None,
        }
    }

    pub(super) fn is_code(&self, code: &SqlState) -> bool {
        self.database().is_some_and(|error| error.code() == code)
    }

    pub(super) fn remedy(&self) -> Remedy {
        match self.database().map(|error| error.code().code()) {
            Some("40001" | "40P01") => Remedy::Again,
            Some("42P01" | "42703") => Remedy::Migrate,
            _ => Remedy::None,
        }
    }

    /// Whether the server is no longer one to ask: it did not answer, or has become a standby.
    pub(super) fn is_of_host(&self) -> bool {
        match self {
            Fault::Postgres(error) => {
                is_late(error) || self.is_code(&SqlState::READ_ONLY_SQL_TRANSACTION)
            }
            Fault::Store(_) => false,
        }
    }
}

/// Whether the time was over in which the server's bytes were waited for.
pub(super) fn is_late(error: &::postgres::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let io = cause.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| io.kind() == std::io::ErrorKind::TimedOut) {
            return true;
        }
        source = cause.source();
    }
    false
}

/// Whether the connection is not to be used again. An error that the server reported ends the
/// statement, a fatal one the connection; any other leaves the two sides out of step.
pub(super) fn is_broken(fault: &Fault) -> bool {
    match fault {
        Fault::Store(_) => false,
        Fault::Postgres(error) => error.as_db_error().is_none_or(|error| {
            is_fatal(error)
                // Connected to what has become a standby: the next connection may find better.
                || *error.code() == SqlState::READ_ONLY_SQL_TRANSACTION
        }),
    }
}

fn is_fatal(error: &DbError) -> bool {
    matches!(
        error.parsed_severity(),
        Some(Severity::Fatal | Severity::Panic)
    ) || matches!(error.severity(), "FATAL" | "PANIC")
}

pub(super) fn describe(fault: Fault) -> StoreError {
    let error = match fault {
        Fault::Store(error) => return error,
        Fault::Postgres(error) => error,
    };
    let text = one_line(&error);
    match error.as_db_error() {
        Some(db) if is_fatal(db) => StoreError::Unavailable(text),
        Some(db) => classify(db.code().code(), text),
        None => {
            let is_io = std::error::Error::source(&error)
                .is_some_and(<dyn std::error::Error>::is::<std::io::Error>);
            match error.is_closed() || is_io {
                true => StoreError::Unavailable(text),
                false => StoreError::Refused(text),
            }
        }
    }
}

/// What to do about a server that only reads.
const READ_ONLY: &str = "it is a standby, or default_transaction_read_only is on: name the primary, \
                         or all hosts, of which then the one that takes writes is found";

/// What to do about a right that is missing.
const RIGHTS: &str = "the role needs SELECT, INSERT, UPDATE and DELETE on the tables, and to make or \
                      change them the rights of their owner; asyncproxy doctor tells what is missing";

/// What an SQLSTATE says about the server, by its class (PostgreSQL's appendix A).
fn classify(sqlstate: &str, text: String) -> StoreError {
    match sqlstate {
        // A statement that was cancelled or took too long, did not get its lock, or met another
        // transaction: another time it may go through.
        "57014" | "55P03" | "40001" | "40P01" => StoreError::Busy(text),
        // A relation, column or right that is not there: no operation of ours will do better.
        "42P01" | "42703" => StoreError::Schema(format!("{text}: run asyncproxy migrate")),
        "42501" => StoreError::Schema(format!("{text}: {RIGHTS}")),
        "25006" => StoreError::Unavailable(format!("{text}: {READ_ONLY}")),
        // 08: the connection, PgBouncer's own errors among them. 53: disk, memory or connections
        // are exhausted. 57: an operator or a shutdown. 58: the system's errors.
        code => match code.get(..2) {
            Some("08" | "53" | "57" | "58") => StoreError::Unavailable(text),
            Some("3D" | "3F") => StoreError::Schema(text),
            _ => StoreError::Refused(text),
        },
    }
}

/// Why there is no connection, and what to do about it.
pub(super) fn of_connecting(error: &::postgres::Error) -> String {
    let text = one_line(error);
    let code = error.code().map(SqlState::code);
    match advice(code, &text) {
        None => text,
        Some(advice) => format!("{text}: {advice}"),
    }
}

/// What those who set up a database meet first. The server judges password, role and database in this
/// order, and tells the first that is wrong.
fn advice(code: Option<&str>, text: &str) -> Option<&'static str> {
    match code {
        Some("28P01") => Some(
            "correct user and password in db.connection_string (in a URL, percent-encoded), or set it \
             with ALTER ROLE; whether the database is there is told after that",
        ),
        Some("28000") => Some(
            "the role must be there and may log in (CREATE ROLE … LOGIN), and pg_hba.conf must let it \
             in from this machine",
        ),
        Some("3D000") => {
            Some("make it (CREATE DATABASE), or correct dbname in db.connection_string")
        }
        Some("53300") => Some(
            "the server's max_connections is reached: raise it, or use fewer (db.max_connections of \
             each instance, and what others have)",
        ),
        // Of the client library, which finds that it has none to answer with.
        None if text.ends_with("password missing") => {
            Some("the server asks for one: put it into db.connection_string")
        }
        _ => None,
    }
}

/// The error with its causes. Not the server's DETAIL, which quotes rows.
pub(super) fn one_line(error: &::postgres::Error) -> String {
    let mut text = match error.as_db_error() {
        Some(db) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        None => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        }
    };
    // Whatever a server says stays one line of the log.
    text.retain(|character| character != '\0');
    text.replace(['\r', '\n'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_a_connection_from_being_made_has_its_advice() {
        for (code, text, part) in [
            (Some("28P01"), "", "password in db.connection_string"),
            (Some("28000"), "", "pg_hba.conf"),
            (Some("3D000"), "", "CREATE DATABASE"),
            (Some("53300"), "", "max_connections"),
            (
                None,
                "invalid configuration: password missing",
                "asks for one",
            ),
        ] {
            assert!(
                advice(code, text).is_some_and(|advice| advice.contains(part)),
                "{code:?}"
            );
        }
        assert_eq!(advice(Some("57P03"), ""), None);
        assert_eq!(advice(None, "connection refused"), None);
    }

    #[test]
    fn what_passes_by_itself_is_neither_a_refusal_nor_an_outage() {
        for (sqlstate, is_outage, is_refusal) in [
            // Passing: a limit of time, a lock, another transaction.
            ("57014", false, false),
            ("55P03", false, false),
            ("40001", false, false),
            ("40P01", false, false),
            // About what was brought.
            ("23514", false, true),
            ("22021", false, true),
            ("P0001", false, true),
            // About the server.
            ("08006", true, false),
            ("53100", true, false),
            ("57P01", true, false),
            ("58030", true, false),
            ("25006", true, false),
            ("42P01", true, false),
            ("42501", true, false),
        ] {
            let error = classify(sqlstate, String::new());
            let seen = (error.is_outage(), error.is_refusal());
            assert_eq!(seen, (is_outage, is_refusal), "{sqlstate}");
        }
    }
}
