//! One connection: its messages, each within [`MESSAGE_BYTES_MAX`], which no length in a header raises.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Buf;
use pgwire::api::{ClientInfo, PgWireConnectionState, PgWireServerHandlers};
use pgwire::error::PgWireError;
use pgwire::messages::PgWireFrontendMessage;
use pgwire::tokio::TlsAcceptor;
use pgwire::tokio::server::{MaybeTls, PgWireMessageServerCodec, negotiate_tls, process_error, process_message};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_util::codec::{Decoder, Framed};

use super::{Door, refusal};
use crate::engine::SQL_BYTES_MAX;
use crate::serve::tls::FIRST_BYTE_MAX;

/// A statement or its parameters, with what is around them.
const MESSAGE_BYTES_MAX: usize = 4 * SQL_BYTES_MAX;
/// How long a caller may take until it has said who it is.
const STARTUP_MAX: Duration = Duration::from_secs(30);
/// Read at a time, at least.
const READ_BYTES: usize = 8 << 10;

type Socket<S> = Framed<MaybeTls, PgWireMessageServerCodec<S>>;

/// Answers one caller until it goes.
pub(super) async fn answer(socket: TcpStream, tls: Option<TlsAcceptor>, door: Arc<Door>) -> io::Result<()> {
    let startup = tokio::time::Instant::now() + STARTUP_MAX;
    if tokio::time::timeout(FIRST_BYTE_MAX, socket.peek(&mut [0])).await.is_err() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it said nothing"));
    }
    let Ok(negotiated) = tokio::time::timeout_at(startup, negotiate_tls(socket, tls)).await else { return Ok(()) };
    let Some(mut socket) = negotiated? else { return Ok(()) };
    let startup_handler = door.startup_handler();
    let (simple, extended) = (door.simple_query_handler(), door.extended_query_handler());
    let (copy, cancel) = (door.copy_handler(), door.cancel_handler());
    loop {
        let state = socket.state();
        let begins =
            matches!(state, PgWireConnectionState::AwaitingStartup | PgWireConnectionState::AuthenticationInProgress);
        let message = if begins {
            match tokio::time::timeout_at(startup, next(&mut socket, state)).await {
                Ok(message) => message,
                Err(_) => return Ok(()),
            }
        } else {
            next(&mut socket, state).await
        };
        let message = match message {
            Ok(Some(PgWireFrontendMessage::Terminate(_)) | None) => return Ok(()),
            Ok(Some(message)) => message,
            // What follows cannot be told apart any more.
            Err(error @ PgWireError::UserError(_)) => return process_error(&mut socket, error, false).await,
            Err(error) => return Err(io::Error::other(error)),
        };
        let is_extended = match state {
            PgWireConnectionState::CopyInProgress(is_extended) => is_extended,
            _ => message.is_extended_query(),
        };
        let handled = process_message(
            message,
            &mut socket,
            Arc::clone(&startup_handler),
            Arc::clone(&simple),
            Arc::clone(&extended),
            Arc::clone(&copy),
            Arc::clone(&cancel),
        );
        if let Err(error) = handled.await {
            process_error(&mut socket, error, is_extended).await?;
        }
    }
}

/// The next message; None when the caller has gone.
async fn next<S>(
    socket: &mut Socket<S>,
    state: PgWireConnectionState,
) -> Result<Option<PgWireFrontendMessage>, PgWireError> {
    loop {
        let mut read = std::mem::take(socket.read_buffer_mut());
        // Messages before that have no kind, and the codec's own limit is small.
        if !matches!(state, PgWireConnectionState::AwaitingStartup)
            && let Some(mut length) = read.get(1..5)
            && length.get_u32() as usize > MESSAGE_BYTES_MAX
        {
            let message = format!("a message has at most {MESSAGE_BYTES_MAX} bytes");
            return Err(refusal("FATAL", "54000", message));
        }
        let decoded = socket.codec_mut().decode(&mut read);
        read.reserve(READ_BYTES);
        *socket.read_buffer_mut() = read;
        if let Some(message) = decoded? {
            return Ok(Some(message));
        }
        let mut read = std::mem::take(socket.read_buffer_mut());
        let got = socket.get_mut().read_buf(&mut read).await;
        *socket.read_buffer_mut() = read;
        if got.map_err(PgWireError::IoError)? == 0 {
            return Ok(None);
        }
    }
}
