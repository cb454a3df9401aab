//! Commands of the cloud, fetched and done: the agent asks for them, because it lets nobody in.
//!
//! For each address of the cloud a question waits (`channel`); what comes is judged by the configuration (`allowed`), noted on
//! disk (`memory`), published on the local broker (`actuator`), and answered. One after the other, in their order.
//!
//! The promise is *at most once, and within its time*: a command that was begun is not begun again, also not by the agent after
//! a crash; what then is not known is answered so. One whose time is over is not handed to the broker any more. The same
//! command that comes again is answered as before. With no `[[command]]` nobody is asked and nothing is done.

mod actuator;
mod allowed;
mod channel;
mod memory;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::CommandReply;
use wire::command::is_command_id;

use self::actuator::{Actuator, Published};
use self::allowed::Allowed;
pub(crate) use self::allowed::check;
use self::channel::{Channel, Fetched};
use self::memory::{Known, Memory};
use crate::config::Settings;

/// Commands that were fetched and wait.
const WAITING_MAX: usize = 256;
/// Commands that the status shows.
const SHOWN_MAX: usize = 20;

/// What the agent tells of commands. Counts are since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RemoteStatus {
    /// Addresses of the cloud at which a question waits.
    pub asking: usize,
    /// Whether the local broker is connected.
    pub connected: bool,
    pub received: u64,
    pub done: u64,
    pub refused: u64,
    /// Their time was over.
    pub expired: u64,
    /// Of those that were handed over nobody knows what became: the broker did not acknowledge, or the agent was stopped.
    pub unknown: u64,
    /// The same again.
    pub repeated: u64,
    pub last_error: Option<String>,
    /// The last ones, the newest first.
    pub last: VecDeque<LastCommand>,
}

/// A command, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LastCommand {
    pub id: String,
    pub name: String,
    pub device: Option<String>,
    pub ok: bool,
    pub answer: String,
}

type Shown = Arc<Mutex<RemoteStatus>>;

/// What became of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Became {
    Done,
    Refused,
    Expired,
    Unknown,
}

/// Does commands by the newest settings until the token ends it.
pub async fn run(mut settings: watch::Receiver<Settings>, status: Shown, token: CancellationToken) {
    let mut memory = None;
    while !token.is_cancelled() {
        let now = settings.borrow_and_update().clone();
        let ends = token.child_token();
        let work = async {
            if now.command.is_empty() {
                return ends.cancelled().await;
            }
            if memory.is_none() {
                memory = open(now.edge.data_dir.join("commands"), &status).await;
            }
            match memory.as_mut() {
                Some(memory) => work(&now, memory, &status, &ends).await,
                // Without it a command could be done twice.
                None => ends.cancelled().await,
            }
        };
        let change = async {
            tokio::select! {
                () = token.cancelled() => {}
                // The sender is gone when the agent stops.
                changed = settings.changed() => if changed.is_err() { token.cancelled().await },
            }
            ends.cancel();
        };
        tokio::join!(work, change);
    }
}

async fn open(directory: PathBuf, status: &Shown) -> Option<Memory> {
    let opened = tokio::task::spawn_blocking(move || Memory::open(&directory)).await;
    match opened {
        Ok(Ok(memory)) => Some(memory),
        Ok(Err(error)) => {
            tracing::error!(%error, "the record of commands cannot be used: none are done");
            status.lock().last_error = Some(error.to_string());
            None
        }
        Err(_) => None,
    }
}

/// With these settings, until the token ends it.
async fn work(settings: &Settings, memory: &mut Memory, status: &Shown, token: &CancellationToken) {
    let stopped = |error: String| {
        tracing::error!(error, "commands are not done");
        status.lock().last_error = Some(error);
    };
    let (channel, broker) = match (Channel::new(settings), settings.publisher()) {
        (Ok(channel), Ok(broker)) => (Arc::new(channel), broker),
        (Err(error), _) => {
            stopped(error);
            return token.cancelled().await;
        }
        (_, Err(error)) => {
            stopped(error);
            return token.cancelled().await;
        }
    };
    let client = format!("weir-{}-commands", settings.edge.id);
    let (actuator, acting) = Actuator::start(broker, client, Arc::clone(status), token.clone());
    let (fetched, mut commands) = mpsc::channel(WAITING_MAX);
    let asking: Vec<_> = (0..channel.nodes())
        .map(|node| tokio::spawn(Arc::clone(&channel).ask(node, fetched.clone(), Arc::clone(status), token.clone())))
        .collect();
    drop(fetched);
    let mut hand = Hand { allowed: Allowed::new(&settings.command, Instant::now()), memory, actuator };
    loop {
        let fetched = tokio::select! {
            () = token.cancelled() => break,
            fetched = commands.recv() => match fetched {
                Some(fetched) => fetched,
                None => break,
            },
        };
        let reply = tokio::select! {
            // What was handed over is noted as begun: the next start says that it does not know.
            () = token.cancelled() => break,
            reply = hand.take(&fetched, status) => reply,
        };
        let (channel, token) = (Arc::clone(&channel), token.clone());
        // As many as there are commands; each ends with the command's time.
        tokio::spawn(async move { channel.answer(&fetched, &reply, &token).await });
    }
    drop(hand);
    for task in asking.into_iter().chain([acting]) {
        // They end by the same token.
        let _ = task.await;
    }
}

/// Does one command at a time.
struct Hand<'m> {
    allowed: Allowed,
    memory: &'m mut Memory,
    actuator: Actuator,
}

impl Hand<'_> {
    async fn take(&mut self, fetched: &Fetched, status: &Shown) -> CommandReply {
        let command = &fetched.command;
        status.lock().received += 1;
        if let Some(known) = self.memory.known(&command.id) {
            status.lock().repeated += 1;
            return match known {
                Known::Ended(reply) => reply,
                Known::Begun => CommandReply::refused(
                    "nobody knows: the agent was stopped while it did it, and does not do it again",
                ),
            };
        }
        let (became, reply) = self.decide(fetched).await;
        let mut status = status.lock();
        let count = match became {
            Became::Done => &mut status.done,
            Became::Refused => &mut status.refused,
            Became::Expired => &mut status.expired,
            Became::Unknown => &mut status.unknown,
        };
        *count += 1;
        let (id, name, device) = (command.id.clone(), command.name.clone(), command.device.clone());
        tracing::info!(id, name, ok = reply.ok, answer = reply.answer, "a command of the cloud");
        let last = LastCommand { id, name, device, ok: reply.ok, answer: reply.answer.clone() };
        status.last.push_front(last);
        status.last.truncate(SHOWN_MAX);
        reply
    }

    async fn decide(&mut self, fetched: &Fetched) -> (Became, CommandReply) {
        let refused = |text: &str| (Became::Refused, CommandReply::refused(text));
        let over = || (Became::Expired, CommandReply::refused("its time was over before it was done"));
        let (command, until) = (&fetched.command, fetched.until);
        if !is_command_id(&command.id) {
            return refused("its id is none");
        }
        if Instant::now() >= until {
            return over();
        }
        let publication = match self.allowed.judge(command, Instant::now()) {
            Ok(publication) => publication,
            Err(reason) => return refused(&reason),
        };
        // Before it is done: after a crash it is not done again.
        if let Err(error) = self.memory.begin(&command.id).await {
            tracing::error!(%error, "a command could not be noted, and is not done");
            return refused("the edge cannot note it on its disk");
        }
        let (became, reply) = match self.actuator.publish(publication, until).await {
            Published::Acknowledged(topic) => (Became::Done, CommandReply::done(format!("published on {topic}"))),
            Published::Refused(reason) => refused(&format!("the local broker refused it: {reason}")),
            Published::TooLate => {
                (Became::Expired, CommandReply::refused("the local broker was not there in time: it was not published"))
            }
            Published::Unknown => {
                (Became::Unknown, CommandReply::refused("nobody knows: the local broker has not acknowledged it"))
            }
        };
        if let Err(error) = self.memory.end(&command.id, &reply).await {
            tracing::error!(%error, "what became of a command is not noted: after a restart nobody knows");
        }
        (became, reply)
    }
}

#[cfg(test)]
mod tests;
