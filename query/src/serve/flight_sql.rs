//! Flight SQL: Arrow batches over gRPC, for ADBC, JDBC and whoever wants many rows fast.
//!
//! A statement is planned when it is announced and again when its rows are fetched: a ticket holds the statement itself,
//! and nothing is kept for a caller that never comes back. Prepared statements are kept, [`held::HELD_MAX`] of them; the
//! one that was used longest ago gives way. Every fetch sees tables frozen at that moment. Rows are sent as fast as
//! the caller takes them, and a caller that goes away ends its statement.
//!
//! With readers set, a caller proves itself by name and password, with each call or once for a token (handshake).
//! The headers `x-weir-lane` and `x-weir-as-of` choose lane and time. Nothing can be written.

mod answer;
mod catalogue;
mod entrance;
mod held;
mod service;

use std::sync::Arc;
use std::time::Duration;

use arrow_flight::flight_service_server::FlightServiceServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::engine::SQL_BYTES_MAX;
use crate::serve::House;
use crate::serve::tls::{Incoming, speaking};
use service::Service;

/// Calls at one time on one connection.
const CALLS_MAX: u32 = 64;
/// A statement or its parameters, with what is around them.
const MESSAGE_BYTES_MAX: usize = 4 * SQL_BYTES_MAX;
/// What may be under way to a caller that has not taken it yet: of one answer, and of all on one connection.
const ANSWER_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// A connection that does not answer so often is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// Answers callers until the token is cancelled.
///
/// # Errors
/// When the listener is of no use.
pub async fn serve(listener: TcpListener, house: House, token: CancellationToken) -> Result<(), FlightError> {
    let tls = house.tls.as_ref().map(|tls| speaking(tls, "h2"));
    let incoming = Incoming::new(listener, tls, house.connections_max)?;
    let service = FlightServiceServer::new(Service::new(Arc::clone(&house.engine), house.readers))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    Server::builder()
        .max_concurrent_streams(CALLS_MAX)
        .initial_stream_window_size(ANSWER_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, token.cancelled_owned())
        .await?;
    Ok(())
}

/// Why the door ended.
#[derive(Debug, thiserror::Error)]
pub enum FlightError {
    #[error("listen for Flight SQL")]
    Listen(#[from] std::io::Error),
    #[error("serve Flight SQL")]
    Serve(#[from] tonic::transport::Error),
}

#[cfg(test)]
mod tests;
