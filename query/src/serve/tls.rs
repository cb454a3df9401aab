//! Connections as they come in: how many at a time, and with TLS when a certificate is set.
//!
//! A task accepts; a handshake is made aside, within [`HANDSHAKE_MAX`], so that one who says nothing holds up nobody; and whose
//! first word does not come within [`FIRST_BYTE_MAX`] loses the connection. So does who takes nothing of what is written to it for
//! [`STUCK_MAX`]; what the kernel has room for counts as taken. One above the limit is closed at once.

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

use crate::places::{Place, Places};

/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long the first byte may take, so that who says nothing keeps no place.
pub(super) const FIRST_BYTE_MAX: Duration = Duration::from_secs(10);
/// How long nothing may be written of what is to be, so that who stopped reading keeps no place.
const STUCK_MAX: Duration = Duration::from_secs(60);
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
        Self::within(STUCK_MAX, listener, tls, connections_max)
    }

    fn within(
        stuck_max: Duration,
        listener: TcpListener,
        tls: Option<Arc<ServerConfig>>,
        connections_max: usize,
    ) -> io::Result<Self> {
        let local = listener.local_addr()?;
        let (sender, accepted) = mpsc::channel(AHEAD);
        tokio::spawn(accept((listener, stuck_max), tls.map(TlsAcceptor::from), connections_max, sender));
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
    (listener, stuck_max): (TcpListener, Duration),
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
            sender.send((Io { socket, local, peer, silent, stuck_max, stuck: None, _place: place }, peer)).await.ok();
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
    stuck_max: Duration,
    /// While nothing can be written.
    stuck: Option<Pin<Box<Sleep>>>,
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

impl Io {
    /// A write as it went, or its end when it has waited for too long.
    fn unless_stuck<T>(&mut self, wrote: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if wrote.is_ready() {
            self.stuck = None;
            return wrote;
        }
        let stuck_max = self.stuck_max;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(tokio::time::sleep(stuck_max)));
        stuck.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Socket::Tls(socket) => Pin::new(socket).poll_write(context, bytes),
        };
        self.unless_stuck(wrote, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wrote = match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket).poll_flush(context),
            Socket::Tls(socket) => Pin::new(socket).poll_flush(context),
        };
        self.unless_stuck(wrote, context)
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Instant;

    use axum::Router;
    use axum::body::Body;
    use axum::extract::ConnectInfo;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::get;
    use axum::serve::ListenerExt;
    use bytes::Bytes;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Asks for what never ends; the connection, and the beginning of the answer.
    async fn listens(address: SocketAddr) -> (TcpStream, String) {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET / HTTP/1.1\r\nhost: weir\r\n\r\n").await.unwrap();
        let mut head = [0; 12];
        socket.read_exact(&mut head).await.unwrap();
        (socket, String::from_utf8_lossy(&head).into_owned())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_stops_reading_loses_its_place_and_who_reads_keeps_it() {
        let places = Places::new(2);
        let endless = async move |ConnectInfo(peer): ConnectInfo<SocketAddr>| {
            let Some(place) = places.take(peer.ip()) else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
            let events = futures::stream::unfold(place, |place| async move {
                Some((Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 16_384])), place))
            });
            Body::from_stream(events).into_response()
        };
        let router = Router::new().route("/", get(endless)).into_make_service_with_connect_info::<SocketAddr>();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let incoming = Incoming::within(Duration::from_millis(500), listener, None, 64).unwrap();
        let address = axum::serve::Listener::local_addr(&incoming).unwrap();
        tokio::spawn(async move { axum::serve(incoming.tap_io(|_| {}), router).await });

        let (mut reads, head) = listens(address).await;
        assert!(head.ends_with("200"), "{head}");
        let reads = tokio::spawn(async move {
            let mut part = vec![0; 1 << 20];
            while reads.read(&mut part).await.is_ok_and(|count| count > 0) {}
        });
        let (mut stopped, head) = listens(address).await;
        assert!(head.ends_with("200"), "{head}");
        assert!(listens(address).await.1.ends_with("503"), "both places are taken");
        let begun = Instant::now();
        while !listens(address).await.1.ends_with("200") {
            assert!(begun.elapsed() < PATIENCE, "its place is never free");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!reads.is_finished(), "who reads goes on");
        let mut rest = Vec::new();
        // However it ends: what was on its way may be lost.
        let ended = tokio::time::timeout(PATIENCE, stopped.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection never ends");
        reads.abort();
    }
}
