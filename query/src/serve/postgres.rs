//! The Postgres wire protocol: psql, Grafana, DBeaver and every driver ask here.
//!
//! Simple and extended queries run through [`Engine`], so each execution sees tables frozen at that moment, however
//! long ago it was prepared. `pg_catalog` answers the questions that clients ask about tables. With readers set, a
//! caller proves its password by SCRAM-SHA-256; otherwise only this machine may ask. No TLS, COPY, DDL or DML.
//! Transaction and session statements (BEGIN, SET, DISCARD) are answered and change nothing.
//! A cancel request ends a running statement, in the middle of its rows too.

mod dialect;
mod startup;
mod statement;

use std::sync::Arc;
use std::time::Duration;

use pgwire::api::cancel::{CancelHandler, DefaultCancelHandler};
use pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use pgwire::api::{ConnectionManager, PgWireServerHandlers};
use pgwire::error::{ErrorInfo, PgWireError};
use pgwire::tokio::process_socket;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::engine::{Engine, QueryError};
use crate::serve::Readers;
use startup::Startup;
use statement::Statements;

/// Connections at one time; one more is closed at once.
const CONNECTIONS_MAX: usize = 256;
/// After `accept` failed (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers callers until the token is cancelled.
///
/// # Errors
/// When the session for catalogue queries cannot be set up.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<Engine>,
    readers: Readers,
    token: CancellationToken,
) -> Result<(), QueryError> {
    let manager = Arc::new(ConnectionManager::new());
    let statements = Arc::new(Statements::new(engine)?);
    let door = Arc::new(Door { statements, readers, manager });
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = token.cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept a postgres connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(%peer, limit = CONNECTIONS_MAX, "too many postgres connections");
            continue;
        };
        let (door, token) = (Arc::clone(&door), token.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = token.cancelled() => {}
                ended = Box::pin(process_socket(socket, None, door)) => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, %error, "postgres connection ended");
                    }
                }
            }
        });
    }
}

#[derive(Debug)]
struct Door {
    statements: Arc<Statements>,
    readers: Readers,
    manager: Arc<ConnectionManager>,
}

impl PgWireServerHandlers for Door {
    fn simple_query_handler(&self) -> Arc<impl SimpleQueryHandler> {
        Arc::clone(&self.statements)
    }

    fn extended_query_handler(&self) -> Arc<impl ExtendedQueryHandler> {
        Arc::clone(&self.statements)
    }

    fn startup_handler(&self) -> Arc<impl pgwire::api::auth::StartupHandler> {
        // One for each connection: it holds how far the exchange of proofs has come.
        Arc::new(Startup::new(self.readers.clone(), Arc::clone(&self.manager)))
    }

    fn cancel_handler(&self) -> Arc<impl CancelHandler> {
        Arc::new(DefaultCancelHandler::new(Arc::clone(&self.manager)))
    }
}

/// An error as the protocol carries it.
fn refusal(severity: &str, code: &str, message: impl Into<String>) -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new(severity.to_owned(), code.to_owned(), message.into())))
}

/// The engine's error with its SQLSTATE and hint.
fn sql_error(error: &QueryError) -> PgWireError {
    let code = match error {
        QueryError::Syntax { .. } => "42601",
        QueryError::UnknownTable { .. } => "42P01",
        QueryError::UnknownColumn { .. } => "42703",
        QueryError::ReadOnly { .. } => "25006",
        QueryError::Timeout { .. } => "57014",
        QueryError::Memory { .. } => "53200",
        QueryError::Invalid { .. } => "42000",
        QueryError::Failed { .. } => "XX000",
    };
    let mut info = ErrorInfo::new("ERROR".to_owned(), code.to_owned(), error.to_string());
    info.hint = error.hint().map(str::to_owned);
    PgWireError::UserError(Box::new(info))
}

#[cfg(test)]
mod tests;
