//! The body of a request as it goes, and when to give it up.
//!
//! A request may take as long as its bytes keep going: what counts is how long the connection has taken none of them, and
//! when it has all, how long the answer is away. What it has taken may still lie in buffers of this machine, up to
//! [`BUFFERED_MAX`] as far as we know; they are given the time that the bytes before them needed, on the slowest link as
//! if it took [`LINK_BYTES_PER_S_MIN`]. A larger buffer makes a request that would have gone fail, and the next is half as
//! large.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use parking_lot::Mutex;
use reqwest::Body;
use tokio::time::Instant;

/// Bytes that the connection takes at once.
const PART_BYTES: usize = 16 << 10;
/// What may lie between the connection and the link.
const BUFFERED_MAX: u64 = 512 << 10;
/// The slowest link that is waited for.
const LINK_BYTES_PER_S_MIN: f64 = 8.0 * 1024.0;

/// One body on its way.
#[derive(Debug)]
pub(super) struct Upload {
    timeout: Duration,
    begun: Instant,
    /// How much the connection has taken, and when it took the last of it.
    taken: Mutex<(u64, Instant)>,
}

impl Upload {
    pub(super) fn new(timeout: Duration) -> Arc<Self> {
        let begun = Instant::now();
        Arc::new(Self { timeout, begun, taken: Mutex::new((0, begun)) })
    }

    /// The bytes, for one request.
    pub(super) fn body(self: &Arc<Self>, bytes: Bytes) -> Body {
        let upload = Arc::clone(self);
        Body::wrap_stream(stream::iter(std::iter::from_fn({
            let mut left = bytes;
            move || {
                let part = left.split_to(left.len().min(PART_BYTES));
                if part.is_empty() {
                    return None;
                }
                let mut taken = upload.taken.lock();
                *taken = (taken.0 + part.len() as u64, Instant::now());
                Some(Ok::<_, std::convert::Infallible>(part))
            }
        })))
    }

    /// Ends when the request is to be given up.
    pub(super) async fn stalled(&self) {
        loop {
            let until = self.until();
            if Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }

    fn until(&self) -> Instant {
        let (taken, at) = *self.taken.lock();
        let buffered = taken.min(BUFFERED_MAX);
        let seconds = (at - self.begun).as_secs_f64().max(1e-3);
        let bytes_per_s = ((taken - buffered) as f64 / seconds).max(LINK_BYTES_PER_S_MIN);
        at + self.timeout + Duration::from_secs_f64(buffered as f64 / bytes_per_s)
    }
}
