//! A proxy that loses what goes up, and cuts its connections: how a broker sees lost acknowledgements.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const BUFFER_BYTES: usize = 64 << 10;

/// Forwards a port of its own to another.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    /// What clients send is thrown away while this is set.
    lossy: Arc<AtomicBool>,
    /// Cancelled to end the connections of now.
    present: Arc<std::sync::Mutex<CancellationToken>>,
}

impl Proxy {
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy =
            Self { port: listener.local_addr().unwrap().port(), lossy: Arc::default(), present: Arc::default() };
        let (lossy, present) = (Arc::clone(&proxy.lossy), Arc::clone(&proxy.present));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                let token = present.lock().unwrap().clone();
                tokio::spawn(forward(client, server, Arc::clone(&lossy), token));
            }
        });
        proxy
    }

    /// From now on nothing of what clients send arrives.
    pub(crate) fn lose(&self) {
        self.lossy.store(true, Ordering::Relaxed);
    }

    /// Ends all connections, and forwards the next ones whole.
    pub(crate) fn cut(&self) {
        std::mem::take(&mut *self.present.lock().unwrap()).cancel();
        self.lossy.store(false, Ordering::Relaxed);
    }
}

async fn forward(mut client: TcpStream, mut server: TcpStream, lossy: Arc<AtomicBool>, token: CancellationToken) {
    let (mut up, mut down) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(length @ 1..) = read else { return };
                if !lossy.load(Ordering::Relaxed) && server.write_all(&up[..length]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut down) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&down[..length]).await.is_err() {
                    return;
                }
            }
            () = token.cancelled() => return,
        }
    }
}
