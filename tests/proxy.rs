//! A proxy that harms what passes: it loses what goes up and cuts its connections, which is how a broker sees lost
//! acknowledgements; it flips bits in the bodies of requests, and ends connections in the middle of an answer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const BUFFER_BYTES: usize = 64 << 10;
/// One piece of this many is harmed.
const HARM_ONE_IN: u32 = 4;

/// What is done to some of the pieces that pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Harm {
    /// A bit of a request's body is another.
    FlipRequests,
    /// The connection ends in the middle of an answer.
    CutAnswers,
}

#[derive(Debug, Default)]
struct Faults {
    /// What clients send is thrown away while this is set.
    lossy: AtomicBool,
    harm: Mutex<Option<(Harm, StdRng)>>,
    harmed: AtomicU64,
}

/// Forwards a port of its own to another.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    faults: Arc<Faults>,
    /// Cancelled to end the connections of now.
    present: Arc<Mutex<CancellationToken>>,
}

impl Proxy {
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy =
            Self { port: listener.local_addr().unwrap().port(), faults: Arc::default(), present: Arc::default() };
        let (faults, present) = (Arc::clone(&proxy.faults), Arc::clone(&proxy.present));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                let token = present.lock().unwrap().clone();
                tokio::spawn(forward(client, server, Arc::clone(&faults), token));
            }
        });
        proxy
    }

    /// From now on nothing of what clients send arrives.
    pub(crate) fn lose(&self) {
        self.faults.lossy.store(true, Ordering::Relaxed);
    }

    /// Ends all connections, and forwards the next ones whole.
    pub(crate) fn cut(&self) {
        std::mem::take(&mut *self.present.lock().unwrap()).cancel();
        self.faults.lossy.store(false, Ordering::Relaxed);
    }

    /// From now on some pieces of HTTP are harmed.
    pub(crate) fn harm(&self, harm: Harm, random: &mut StdRng) {
        *self.faults.harm.lock().unwrap() = Some((harm, StdRng::from_rng(random)));
    }

    /// Ends that; returns how many pieces were harmed since the beginning.
    pub(crate) fn heal(&self) -> u64 {
        *self.faults.harm.lock().unwrap() = None;
        self.faults.harmed.load(Ordering::Relaxed)
    }
}

impl Faults {
    /// Flips a bit in the body, if there is one, of a piece that begins a request or goes on with its body.
    fn flip(&self, piece: &mut [u8]) {
        let begins = [&b"POST "[..], b"GET "].iter().any(|method| piece.starts_with(method));
        let head = piece.windows(4).position(|four| four == b"\r\n\r\n").filter(|_| begins);
        let body = match head {
            Some(end) => &mut piece[end + 4..],
            None if begins => return,
            None => piece,
        };
        let mut harm = self.harm.lock().unwrap();
        if let Some((Harm::FlipRequests, random)) = &mut *harm
            && !body.is_empty()
            && random.random_ratio(1, HARM_ONE_IN)
        {
            body[random.random_range(0..body.len())] ^= 1 << random.random_range(0..8);
            self.harmed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How much of a piece of an answer passes before its connection ends; None: all.
    fn cut(&self, length: usize) -> Option<usize> {
        let mut harm = self.harm.lock().unwrap();
        if let Some((Harm::CutAnswers, random)) = &mut *harm
            && random.random_ratio(1, HARM_ONE_IN)
        {
            self.harmed.fetch_add(1, Ordering::Relaxed);
            return Some(random.random_range(0..length));
        }
        None
    }
}

async fn forward(mut client: TcpStream, mut server: TcpStream, faults: Arc<Faults>, token: CancellationToken) {
    let (mut up, mut down) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(length @ 1..) = read else { return };
                faults.flip(&mut up[..length]);
                if !faults.lossy.load(Ordering::Relaxed) && server.write_all(&up[..length]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut down) => {
                let Ok(length @ 1..) = read else { return };
                let cut = faults.cut(length);
                if client.write_all(&down[..cut.unwrap_or(length)]).await.is_err() || cut.is_some() {
                    return;
                }
            }
            () = token.cancelled() => return,
        }
    }
}
