//! The Postgres wire protocol: psql, Grafana, DBeaver and every driver ask here.
//!
//! Simple and extended queries run through [`crate::Engine`], so each execution sees tables frozen at that moment, however
//! long ago it was prepared. `pg_catalog` answers the questions that clients ask about tables. With readers set, a
//! caller proves its password by SCRAM-SHA-256; otherwise only this machine may ask. With a certificate set, a caller
//! without TLS is refused. No DDL or DML; `COPY … TO STDOUT` is answered. Transaction and session statements (BEGIN, SET,
//! DISCARD) are answered and change nothing but `weir.lane`. A cancel request ends a running statement, in the middle of
//! its rows too.

mod connection;
mod copy;
mod described;
mod dialect;
mod functions;
mod reflection;
mod session;
mod startup;
mod statement;

use std::sync::Arc;

use pgwire::api::cancel::{CancelHandler, DefaultCancelHandler};
use pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use pgwire::api::{ConnectionManager, PgWireServerHandlers};
use pgwire::error::{ErrorInfo, PgWireError};
use pgwire::tokio::TlsAcceptor;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::engine::QueryError;
use crate::places::Places;
use crate::serve::tls::next;
use crate::serve::{House, Readers};
use startup::Startup;
use statement::Statements;

/// Answers callers until the token is cancelled.
///
/// # Errors
/// When the session for catalogue queries cannot be set up.
pub async fn serve(listener: TcpListener, house: House, token: CancellationToken) -> Result<(), QueryError> {
    let manager = Arc::new(ConnectionManager::new());
    let statements = Arc::new(Statements::new(house.engine, house.readers.clone())?);
    let acceptor = house.tls.map(TlsAcceptor::from);
    let door = Arc::new(Door { statements, readers: house.readers, needs_tls: acceptor.is_some(), manager });
    let places = Places::new(house.connections_max);
    loop {
        let (socket, peer, place) = tokio::select! {
            () = token.cancelled() => return Ok(()),
            connection = next(&listener, &places) => connection,
        };
        let (door, acceptor, token) = (Arc::clone(&door), acceptor.clone(), token.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = token.cancelled() => {}
                ended = Box::pin(connection::answer(socket, acceptor, door)) => {
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
    needs_tls: bool,
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
        Arc::new(Startup::new(self.readers.clone(), self.needs_tls, Arc::clone(&self.manager)))
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
        QueryError::Denied { .. } => "42501",
        QueryError::Timeout { .. } | QueryError::Cancelled => "57014",
        QueryError::Memory { .. } => "53200",
        QueryError::Busy { .. } => "53300",
        QueryError::TooMuch { .. } => "53400",
        QueryError::Invalid { message } => code_of(message),
        QueryError::Failed { .. } => "XX000",
    };
    let mut info = ErrorInfo::new("ERROR".to_owned(), code.to_owned(), error.to_string());
    info.hint = error.hint().map(str::to_owned);
    PgWireError::UserError(Box::new(info))
}

/// The SQLSTATE of an error that has no kind of its own, by DataFusion's and Arrow's words for it.
fn code_of(message: &str) -> &'static str {
    let words = message.to_lowercase();
    let has = |part: &str| words.contains(part);
    if has("prepare it again") {
        "0A000"
    } else if has("divide by zero") {
        "22012"
    } else if has("overflow") || has("out of range") {
        "22003"
    } else if has("error parsing timestamp") || has("error parsing date") {
        "22007"
    } else if has("cannot cast") || has("can't cast") || has("could not convert") || has("invalid input") {
        "22P02"
    } else if has("invalid function") || has("no function matches") || has("failed to coerce arguments") {
        "42883"
    } else if has("ambiguous") {
        "42702"
    } else if has("must appear in the group by clause") || has("must be part of group by") {
        "42803"
    } else if has("not supported") {
        "0A000"
    } else {
        "42000"
    }
}

#[cfg(test)]
mod tests;
