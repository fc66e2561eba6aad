//! A connection, each transaction of which is READ COMMITTED.
//!
//! That is what the statements are written for: another level, which a database may have as its
//! default, makes those of several instances fail each other. Nothing is set on the session, which
//! PgBouncer shares. Where the default is right a single statement goes as it is, in one round trip.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::postgres::{CancelToken, Client, Error, GenericClient, IsolationLevel, Row, Transaction};

use super::Parameter;

pub(super) struct Session {
    client: Client,
    /// Whether single statements need a transaction that asks for the level: it is not the default.
    asks: Arc<AtomicBool>,
    /// Bytes of requests that were sent or received since [`Session::take_carried`].
    carried_bytes: usize,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    pub(super) fn new(client: Client, asks: Arc<AtomicBool>) -> Session {
        Session {
            client,
            asks,
            carried_bytes: 0,
        }
    }

    pub(super) fn query_typed(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>, Error> {
        self.alone(|client| client.query_typed(statement, parameters))
    }

    pub(super) fn query_typed_one(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Row, Error> {
        self.alone(|client| client.query_typed_one(statement, parameters))
    }

    pub(super) fn execute_typed(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<u64, Error> {
        self.alone(|client| client.execute_typed(statement, parameters))
    }

    pub(super) fn transaction(&mut self) -> Result<Transaction<'_>, Error> {
        self.client
            .build_transaction()
            .isolation_level(IsolationLevel::ReadCommitted)
            .start()
    }

    /// Notes that a request of so many bytes was sent or received.
    pub(super) fn carries(&mut self, bytes: usize) {
        self.carried_bytes = self.carried_bytes.saturating_add(bytes);
    }

    pub(super) fn take_carried(&mut self) -> usize {
        std::mem::take(&mut self.carried_bytes)
    }

    pub(super) fn cancel_token(&self) -> CancelToken {
        self.client.cancel_token()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// One statement, which is a transaction by itself.
    fn alone<T>(
        &mut self,
        run: impl FnOnce(&mut dyn Statements) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if !self.asks.load(Ordering::Relaxed) {
            return run(&mut self.client);
        }
        let mut transaction = self.transaction()?;
        let result = run(&mut transaction)?;
        transaction.commit()?;
        Ok(result)
    }
}

/// What a connection and a transaction on it have in common. The library's trait is for generics.
trait Statements {
    fn query_typed(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>, Error>;
    fn query_typed_one(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Row, Error>;
    fn execute_typed(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<u64, Error>;
}

impl<C: GenericClient> Statements for C {
    fn query_typed(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>, Error> {
        GenericClient::query_typed(self, statement, parameters)
    }

    fn query_typed_one(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Row, Error> {
        GenericClient::query_typed_one(self, statement, parameters)
    }

    fn execute_typed(
        &mut self,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<u64, Error> {
        GenericClient::execute_typed(self, statement, parameters)
    }
}
