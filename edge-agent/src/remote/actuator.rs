//! The connection by which commands reach the local broker: one publication at a time, at QoS 1, within its time.
//!
//! Each connection has a client of its own, so that the client library keeps nothing for the next: what was handed over when a
//! connection was lost, or is not acknowledged in time, is not published again. Ends with the token.

use std::pin::pin;
use std::time::Duration;

use rand::Rng;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Shown;
use super::allowed::Publication;
use crate::config::MqttSettings;
use crate::source::mqtt::client::{self, Client, Event};

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What became of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Published {
    /// On this topic.
    Acknowledged(String),
    Refused(String),
    /// There was no connection in time: it was never handed over.
    TooLate,
    /// It was handed over, and nothing was heard of it.
    Unknown,
}

#[derive(Debug)]
struct Job {
    publication: Publication,
    until: Instant,
    handed: bool,
    reply: oneshot::Sender<Published>,
}

impl Job {
    fn end(self, published: Published) {
        // Who asked may be gone.
        let _ = self.reply.send(published);
    }

    fn fail(self) {
        let published = if self.handed { Published::Unknown } else { Published::TooLate };
        self.end(published);
    }

    /// Gives it to the client, if its time is not over and there is room.
    fn hand_over(&mut self, client: &Client) {
        if !self.handed && Instant::now() < self.until {
            let Publication { topic, payload, retain } = &self.publication;
            self.handed = client.publish(topic, payload.clone(), *retain);
        }
    }
}

/// The way to the broker.
#[derive(Debug)]
pub(super) struct Actuator(mpsc::Sender<Job>);

impl Actuator {
    /// Connects, again and again, as this client.
    pub(super) fn start(
        broker: MqttSettings,
        client: String,
        status: Shown,
        token: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let (jobs, received) = mpsc::channel(1);
        (Self(jobs), tokio::spawn(run(broker, client, received, status, token)))
    }

    /// Publishes before a moment, or not.
    pub(super) async fn publish(&self, publication: Publication, until: Instant) -> Published {
        let (reply, published) = oneshot::channel();
        let job = Job { publication, until, handed: false, reply };
        if self.0.send(job).await.is_err() {
            return Published::TooLate;
        }
        published.await.unwrap_or(Published::Unknown)
    }
}

async fn run(broker: MqttSettings, id: String, mut jobs: mpsc::Receiver<Job>, status: Shown, token: CancellationToken) {
    let mut job = None::<Job>;
    let mut failures = 0_u32;
    while !token.is_cancelled() {
        let lost = match connection(&broker, &id, &mut jobs, &mut job, &status, &token).await {
            Ok(was_connected) => {
                failures = if was_connected { 0 } else { failures.saturating_add(1) };
                None
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                Some(error)
            }
        };
        {
            let mut status = status.lock();
            status.connected = false;
            status.last_error = lost.or(status.last_error.take());
        }
        if let Some(handed) = job.take_if(|job| job.handed) {
            handed.fail();
        }
        let wait = (BACKOFF_MIN * 2_u32.pow(failures.min(8))).min(BACKOFF_MAX);
        let retry = Instant::now() + wait.mul_f64(rand::rng().random_range(0.5..=1.0));
        // Meanwhile the time of one that waits may be over.
        loop {
            let over = job.as_ref().map_or(retry, |job| job.until.min(retry));
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep_until(over) => {}
                Some(next) = jobs.recv(), if job.is_none() => job = Some(next),
            }
            if let Some(over) = job.take_if(|job| job.until <= Instant::now()) {
                over.fail();
            }
            if Instant::now() >= retry {
                break;
            }
        }
    }
}

/// One connection, to its end: whether it was made.
async fn connection(
    broker: &MqttSettings,
    id: &str,
    jobs: &mut mpsc::Receiver<Job>,
    job: &mut Option<Job>,
    status: &Shown,
    token: &CancellationToken,
) -> Result<bool, String> {
    let (client, mut events) = client::without_session(broker, id).map_err(|error| error.to_string())?;
    let mut connected = false;
    loop {
        let event = {
            // It is not dropped half way: it might have read something.
            let mut next = pin!(events.next());
            loop {
                let until = job.as_ref().map(|job| job.until);
                let over = async {
                    match until {
                        Some(until) => tokio::time::sleep_until(until).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    event = &mut next => break event,
                    () = token.cancelled() => {
                        // What is handed over may still go, or not.
                        if let Some(job) = job.take() {
                            job.fail();
                        }
                        return Ok(connected);
                    }
                    () = over => {
                        let Some(over) = job.take() else { continue };
                        let handed = over.handed;
                        over.fail();
                        if handed {
                            // Its acknowledgement would be taken for that of the next.
                            return Ok(connected);
                        }
                    }
                    Some(mut fresh) = jobs.recv(), if job.is_none() => {
                        if connected {
                            fresh.hand_over(&client);
                        }
                        *job = Some(fresh);
                    }
                }
            }
        };
        match event {
            Event::Connected { .. } => {
                connected = true;
                let mut status = status.lock();
                (status.connected, status.last_error) = (true, None);
            }
            Event::Acknowledged { refused } => {
                if let Some(job) = job.take_if(|job| job.handed) {
                    let topic = job.publication.topic.clone();
                    job.end(refused.map_or(Published::Acknowledged(topic), Published::Refused));
                }
            }
            Event::Lost(reason) => return if connected { Ok(true) } else { Err(reason) },
            _ => {}
        }
        if let Some(job) = job.as_mut().filter(|_| connected) {
            job.hand_over(&client);
        }
    }
}
