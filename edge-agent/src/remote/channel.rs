//! The questions for commands, and their answers, over HTTP (`wire::command`).
//!
//! The time of a command is counted from the moment at which the question for it began: the cloud got it no earlier. Each address
//! of the cloud is asked by a task of its own; a node that nobody gives commands has none.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::{Command, CommandReply};

use super::Shown;
use crate::config::Settings;
use crate::uplink::http::CloudClient;

/// How long a question waits for a command.
const WAIT: Duration = Duration::from_secs(25);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// An answer is brought for so long, also when the command's time is over by then: the next start of the cloud may ask.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A command, who gave it, and when it is over.
#[derive(Debug, Clone)]
pub(super) struct Fetched {
    pub(super) node: usize,
    pub(super) command: Command,
    pub(super) until: Instant,
}

/// The way to the cloud.
#[derive(Debug)]
pub(super) struct Channel(CloudClient);

impl Channel {
    /// To the addresses of the settings, with connections of its own.
    ///
    /// # Errors
    /// When certificates cannot be read or the token cannot be sent.
    pub(super) fn new(settings: &Settings) -> Result<Self, String> {
        CloudClient::new(&settings.cloud, &settings.edge.id).map(Self).map_err(|error| error.to_string())
    }

    /// Nodes that are asked.
    pub(super) fn nodes(&self) -> usize {
        self.0.urls().len()
    }

    /// Asks one node until the token ends it.
    pub(super) async fn ask(
        self: Arc<Self>,
        node: usize,
        fetched: mpsc::Sender<Fetched>,
        status: Shown,
        token: CancellationToken,
    ) {
        let (mut run, mut after, mut backoff, mut is_asked) = (String::new(), 0, BACKOFF_MIN, false);
        let show = |is_asked: &mut bool, asked: bool| {
            let mut status = status.lock();
            status.asking = status.asking + usize::from(asked) - usize::from(*is_asked);
            *is_asked = asked;
        };
        loop {
            let begun = Instant::now();
            let answer = tokio::select! {
                () = token.cancelled() => break,
                answer = self.0.commands(node, &run, after, WAIT) => answer,
            };
            match answer {
                Ok(answer) => {
                    show(&mut is_asked, true);
                    backoff = BACKOFF_MIN;
                    if run != answer.run {
                        (run, after) = (answer.run, 0);
                    }
                    let waited = Duration::from_millis(answer.waited_ms);
                    for handed in answer.commands {
                        after = handed.number.max(after);
                        let until = begun + waited + Duration::from_millis(handed.left_ms);
                        let command = Fetched { node, command: handed.command, until };
                        tokio::select! {
                            () = token.cancelled() => break,
                            // Nobody takes them any more when the agent stops.
                            sent = fetched.send(command) => if sent.is_err() { break },
                        }
                    }
                }
                Err(error) => {
                    show(&mut is_asked, false);
                    tracing::debug!(node, error, "no commands can be asked for");
                    let wait = backoff.mul_f64(rand::rng().random_range(0.5..=1.0));
                    backoff = (2 * backoff).min(BACKOFF_MAX);
                    tokio::select! {
                        () = token.cancelled() => break,
                        () = tokio::time::sleep(wait) => {}
                    }
                }
            }
        }
        show(&mut is_asked, false);
    }

    /// Says what became of a command, until the cloud has heard it or has no use for it.
    pub(super) async fn answer(&self, fetched: &Fetched, reply: &CommandReply, token: &CancellationToken) {
        let until = Instant::now() + ANSWER_WITHIN;
        let mut backoff = BACKOFF_MIN;
        while Instant::now() < until {
            let answered = tokio::select! {
                () = token.cancelled() => return,
                answered = self.0.answer_command(fetched.node, &fetched.command.id, reply) => answered,
            };
            match answered {
                Ok(()) => return,
                Err(error) => tracing::debug!(error, "an answer is not heard yet"),
            }
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(backoff.mul_f64(rand::rng().random_range(0.5..=1.0))) => {}
            }
            backoff = (2 * backoff).min(BACKOFF_MAX);
        }
    }
}
