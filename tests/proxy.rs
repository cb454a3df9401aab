//! A link that fails: what goes one way or both comes late or never, connections are cut, refused, or fall silent for
//! ever without anyone being told. It also harms what passes: it flips bits in the bodies of requests, and ends
//! connections in the middle of an answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::Cloud;

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
    /// What was done is answered 503, and the connection ends.
    FailAnswers,
}

/// The directions of a link; up is from those who connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
    Both,
}

/// What a link does with what its connections carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Whole,
    /// What goes this way waits, and comes when the link is whole again, as packets that are sent again do.
    Held(Way),
    /// What goes this way is thrown away, and nothing after it comes that way on the same connection, whatever the link
    /// becomes: who waits for it is told nothing.
    Lost(Way),
    /// Connections have ended, and new ones end at once.
    Cut,
}

impl Link {
    fn holds(self, way: Way) -> bool {
        self == Self::Held(way) || self == Self::Held(Way::Both)
    }

    fn loses(self, way: Way) -> bool {
        self == Self::Lost(way) || self == Self::Lost(Way::Both)
    }
}

#[derive(Debug, Default)]
struct Faults {
    harm: Mutex<Option<(Harm, StdRng)>>,
    harmed: AtomicU64,
    thrown_away: AtomicU64,
}

/// Forwards a port of its own to another.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    faults: Arc<Faults>,
    /// The link of the connections of now and of those that come; those of before keep what they had.
    link: Arc<Mutex<watch::Sender<Link>>>,
    /// Links of connections that were left silent: they must not end.
    silent: Mutex<Vec<watch::Sender<Link>>>,
}

impl Proxy {
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            faults: Arc::default(),
            link: Arc::new(Mutex::new(watch::Sender::new(Link::Whole))),
            silent: Mutex::default(),
        };
        let (faults, link) = (Arc::clone(&proxy.faults), Arc::clone(&proxy.link));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let link = link.lock().unwrap().subscribe();
                if *link.borrow() == Link::Cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
                tokio::spawn(forward(client, server, Arc::clone(&faults), link));
            }
        });
        proxy
    }

    /// One to the HTTP door of a node.
    pub(crate) async fn to_cloud(cloud: &Cloud) -> Self {
        Self::to(cloud.http.rsplit(':').next().unwrap().parse().unwrap()).await
    }

    /// The address of a node behind it.
    pub(crate) fn http(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on the link is so.
    pub(crate) fn set(&self, link: Link) {
        self.link.lock().unwrap().send_replace(link);
    }

    /// From now on nothing of what clients send arrives.
    pub(crate) fn lose(&self) {
        self.set(Link::Lost(Way::Up));
    }

    /// Ends all connections, and forwards the next ones whole.
    pub(crate) fn cut(&self) {
        self.replace().send_replace(Link::Cut);
    }

    /// Half-open: nothing comes over the connections of now any more, in either direction, and nobody is told; the next
    /// ones are whole.
    pub(crate) fn silence(&self) {
        let link = self.replace();
        link.send_replace(Link::Lost(Way::Both));
        self.silent.lock().unwrap().push(link);
    }

    /// How many pieces were thrown away since the beginning.
    pub(crate) fn thrown_away(&self) -> u64 {
        self.faults.thrown_away.load(Ordering::Relaxed)
    }

    fn replace(&self) -> watch::Sender<Link> {
        std::mem::replace(&mut *self.link.lock().unwrap(), watch::Sender::new(Link::Whole))
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

    fn throw_away(&self) -> std::io::Result<()> {
        self.thrown_away.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Whether an answer that begins here is replaced by [`FAILED`].
    fn fails(&self, piece: &[u8]) -> bool {
        let mut harm = self.harm.lock().unwrap();
        let fails = match &mut *harm {
            Some((Harm::FailAnswers, random)) => {
                piece.starts_with(b"HTTP/1.1 2") && random.random_ratio(1, HARM_ONE_IN)
            }
            _ => false,
        };
        self.harmed.fetch_add(u64::from(fails), Ordering::Relaxed);
        fails
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

/// What is answered in place of the truth.
const FAILED: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

async fn forward(mut client: TcpStream, mut server: TcpStream, faults: Arc<Faults>, mut link: watch::Receiver<Link>) {
    let (mut up, mut down) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    // A stream with a hole in it is none.
    let (mut lost_up, mut lost_down) = (false, false);
    // That a side has closed is lost with the rest.
    let (mut client_open, mut server_open) = (true, true);
    loop {
        let state = *link.borrow_and_update();
        if state == Link::Cut {
            return;
        }
        tokio::select! {
            read = client.read(&mut up), if client_open && !state.holds(Way::Up) => {
                lost_up |= state.loses(Way::Up);
                let Ok(length @ 1..) = read else {
                    if !lost_up { return }
                    client_open = false;
                    continue;
                };
                faults.flip(&mut up[..length]);
                let passed = if lost_up { faults.throw_away() } else { server.write_all(&up[..length]).await };
                if passed.is_err() {
                    return;
                }
            }
            read = server.read(&mut down), if server_open && !state.holds(Way::Down) => {
                lost_down |= state.loses(Way::Down);
                let Ok(length @ 1..) = read else {
                    if !lost_down { return }
                    server_open = false;
                    continue;
                };
                if !lost_down && faults.fails(&down[..length]) {
                    client.write_all(FAILED).await.ok();
                    return;
                }
                let cut = faults.cut(length);
                let passed = if lost_down { faults.throw_away() } else { client.write_all(&down[..cut.unwrap_or(length)]).await };
                if passed.is_err() || cut.is_some() {
                    return;
                }
            }
            changed = link.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}
