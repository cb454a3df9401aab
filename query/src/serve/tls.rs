//! Connections as they come in: how many at a time, and with TLS when a certificate is set.
//!
//! A task accepts; a handshake is made aside, within [`HANDSHAKE_MAX`], so that one who says nothing holds up nobody; and whose
//! first word does not come within [`FIRST_BYTE_MAX`] loses the connection. One above the limit is closed at once.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::places::{Place, Places};

/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long the first byte may take, so that who says nothing keeps no place.
pub(super) const FIRST_BYTE_MAX: Duration = Duration::from_secs(10);
/// After `accept` failed (out of descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that are accepted before somebody takes them.
const AHEAD: usize = 16;

/// The certificate chain and the private key, both PEM.
///
/// # Errors
/// What is wrong with them, in words.
pub fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, String> {
    let of = |path: &Path, what: &str| format!("read the {what} {}", path.display());
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| format!("{}: {error}", of(certificate, "certificate")))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{}: {error}", of(key, "private key")))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("set up TLS: {error}"))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| format!("certificate and key do not fit: {error}"))?;
    Ok(Arc::new(config))
}

/// The same certificate for a door that speaks this protocol.
pub fn speaking(config: &ServerConfig, protocol: &str) -> Arc<ServerConfig> {
    let mut config = config.clone();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Arc::new(config)
}

/// Connections, one after the other.
#[derive(Debug)]
pub struct Incoming {
    accepted: mpsc::Receiver<(Io, SocketAddr)>,
    local: SocketAddr,
}

impl Incoming {
    /// Accepts until it is dropped.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn new(listener: TcpListener, tls: Option<Arc<ServerConfig>>, connections_max: usize) -> io::Result<Self> {
        let local = listener.local_addr()?;
        let (sender, accepted) = mpsc::channel(AHEAD);
        tokio::spawn(accept(listener, tls.map(TlsAcceptor::from), connections_max, sender));
        Ok(Self { accepted, local })
    }
}

/// The next connection for which there is a place; those for which there is none are closed.
pub(super) async fn next(listener: &TcpListener, places: &Places) -> (TcpStream, SocketAddr, Place) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => match places.take(peer.ip()) {
                Some(place) => return (socket, peer, place),
                None => tracing::warn!(%peer, "too many connections"),
            },
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    connections_max: usize,
    sender: mpsc::Sender<(Io, SocketAddr)>,
) {
    let places = Places::new(connections_max);
    loop {
        let (socket, peer, place) = tokio::select! {
            () = sender.closed() => return,
            connection = next(&listener, &places) => connection,
        };
        socket.set_nodelay(true).ok();
        let (tls, sender) = (tls.clone(), sender.clone());
        tokio::spawn(async move {
            let local = socket.local_addr().ok();
            let socket = match tls {
                None => Socket::Plain(socket),
                Some(tls) => match tokio::time::timeout(HANDSHAKE_MAX, tls.accept(socket)).await {
                    Ok(Ok(socket)) => Socket::Tls(Box::new(socket)),
                    Ok(Err(error)) => return tracing::debug!(%peer, %error, "no TLS"),
                    Err(_) => return tracing::debug!(%peer, "TLS handshake took too long"),
                },
            };
            // Nobody takes it: the door is closing.
            let silent = Some(Box::pin(tokio::time::sleep(FIRST_BYTE_MAX)));
            sender.send((Io { socket, local, peer, silent, _place: place }, peer)).await.ok();
        });
    }
}

#[derive(Debug)]
enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection; it counts as long as it lives.
#[derive(Debug)]
pub struct Io {
    socket: Socket,
    local: Option<SocketAddr>,
    peer: SocketAddr,
    /// Until the first byte has come.
    silent: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket).poll_read(context, into),
            Socket::Tls(socket) => Pin::new(socket).poll_read(context, into),
        };
        match (&mut self.silent, read) {
            (None, read) => read,
            (Some(_), Poll::Ready(read)) => {
                self.silent = None;
                Poll::Ready(read)
            }
            (Some(silent), Poll::Pending) => {
                silent.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Socket::Tls(socket) => Pin::new(socket).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket).poll_flush(context),
            Socket::Tls(socket) => Pin::new(socket).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Socket::Tls(socket) => Pin::new(socket).poll_shutdown(context),
        }
    }
}

/// For gRPC.
impl Connected for Io {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo { local_addr: self.local, remote_addr: Some(self.peer) }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Io>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.accepted.poll_recv(context).map(|accepted| accepted.map(|(io, _)| Ok(io)))
    }
}

/// For HTTP.
impl axum::serve::Listener for Incoming {
    type Io = Io;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Io, SocketAddr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            // The runtime is ending.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }
}
