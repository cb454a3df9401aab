//! Connections at the agent's own doors, as they come in.
//!
//! Each takes a file of the process, and without files no log goes on: so there are places for so many, one above them is
//! closed at once, and one on which nothing moves for too long ends, that devices which never hang up keep no places.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// After `accept` failed (no files are left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long nothing may move on a connection: the longest that any of its users has asked for.
#[derive(Debug, Clone)]
pub(crate) struct Silence(Arc<AtomicU64>);

impl Silence {
    pub(crate) fn new(least: Duration) -> Self {
        let silence = Self(Arc::default());
        silence.at_least(least);
        silence
    }

    /// Connections that come from now on may be silent for as long as this.
    pub(crate) fn at_least(&self, least: Duration) {
        self.0.fetch_max(least.as_millis() as u64, Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// A listener with these limits; several may share their places.
#[derive(Debug)]
pub(crate) struct Limited {
    pub(crate) listener: TcpListener,
    pub(crate) places: Arc<Semaphore>,
    pub(crate) silence: Silence,
}

impl axum::serve::Listener for Limited {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let mut told = false;
        loop {
            let (socket, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
                let silence = self.silence.get();
                let until = Box::pin(tokio::time::sleep(silence));
                return (Connection { socket, silence, until, _place: place }, peer);
            }
            if !told {
                tracing::warn!(%peer, "too many connections: those that come are closed");
                told = true;
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection; it has its place as long as it lives.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: TcpStream,
    silence: Duration,
    /// It ends here, unless something moves before.
    until: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// What became of moving bytes: as it was, or the end when nothing has moved for too long.
    fn moved<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            let until = Instant::now() + self.silence;
            self.until.as_mut().reset(until);
            return result;
        }
        self.until.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.socket).poll_read(context, into);
        self.moved(context, read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(context, bytes);
        self.moved(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(context, pieces);
        self.moved(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PLACES: usize = 3;

    async fn door(silence: Duration) -> (SocketAddr, Arc<Semaphore>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, places) = (listener.local_addr().unwrap(), Arc::new(Semaphore::new(PLACES)));
        let limited = Limited { listener, places: Arc::clone(&places), silence: Silence::new(silence) };
        let router = Router::new().route("/", get(async || "ok"));
        tokio::spawn(async move { axum::serve(limited, router).await });
        (address, places)
    }

    /// Whether a whole request is answered.
    async fn is_answered(connection: &mut TcpStream) -> bool {
        let request = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        let mut answer = [0; 12];
        connection.write_all(request).await.is_ok()
            && connection.read_exact(&mut answer).await.is_ok()
            && answer == *b"HTTP/1.1 200"
    }

    #[tokio::test]
    async fn one_above_the_places_is_closed_and_a_place_that_is_left_is_taken_again() {
        let (address, places) = door(Duration::from_secs(3_600)).await;
        let mut held = Vec::new();
        for _ in 0..PLACES {
            let mut connection = TcpStream::connect(address).await.unwrap();
            assert!(is_answered(&mut connection).await);
            held.push(connection);
        }
        assert!(!is_answered(&mut TcpStream::connect(address).await.unwrap()).await, "there is no place");
        held.pop();
        while places.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(is_answered(&mut TcpStream::connect(address).await.unwrap()).await, "there is one again");
    }

    /// One says nothing, one stops in the middle of a request, one has had its answer and stays.
    #[tokio::test]
    async fn a_connection_on_which_nothing_moves_leaves_its_place() {
        let (address, places) = door(Duration::from_millis(50)).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
        let mut idle = TcpStream::connect(address).await.unwrap();
        assert!(is_answered(&mut idle).await);
        let mut rest = Vec::new();
        for connection in [&mut silent, &mut half, &mut idle] {
            let ended = connection.read_to_end(&mut rest);
            assert!(tokio::time::timeout(Duration::from_secs(20), ended).await.is_ok(), "it stays for ever");
        }
        while places.available_permits() < PLACES {
            tokio::task::yield_now().await;
        }
    }
}
