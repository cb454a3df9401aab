//! Commands that wait for edges: an edge lets nobody in, so it fetches them (`wire::command`).
//!
//! Whoever asks waits for the answer, and no longer than the command's time: then it is gone, and no edge is handed it any
//! more. Nothing here is on disk. Who must know after a crash asks again, with the same id, which the edge recognises.
//! Each edge has `waiting_max` commands; one more is refused. Commands are handed out in order, until they are answered.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::command::COMMAND_WAIT_MAX;
use wire::{Command, CommandReply, CommandsAnswer, EdgeId, Handed};

use crate::delta::file::new_name;

/// Questions of one edge that wait at a time: a connection that died without a word, and those that come after it.
const POLLS_MAX: usize = 4;

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    Answered(CommandReply),
    /// Its time was over; whether the edge had fetched it.
    TimedOut {
        fetched: bool,
    },
    /// It never waited: why.
    Refused(String),
}

/// As many questions of this edge wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{POLLS_MAX} questions of this edge wait already")]
pub struct TooManyPolls;

/// See the module.
#[derive(Debug)]
pub struct Commands {
    /// Tells this start of the node from others.
    run: String,
    edges: BTreeMap<EdgeId, Edge>,
    waiting_max: usize,
    closed: CancellationToken,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicU64,
    timed_out: AtomicU64,
    refused: AtomicU64,
}

/// One edge.
#[derive(Debug)]
struct Edge {
    waiting: Mutex<Waiting>,
    /// The number of the newest.
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Waiting {
    numbered: u64,
    commands: BTreeMap<u64, Open>,
    polls: usize,
}

#[derive(Debug)]
struct Open {
    command: Command,
    until: Instant,
    fetched: bool,
    reply: oneshot::Sender<CommandReply>,
}

impl Commands {
    /// Nothing waits yet for these edges.
    pub fn new(edges: impl IntoIterator<Item = EdgeId>, waiting_max: usize) -> Self {
        let edge = |id| (id, Edge { waiting: Mutex::default(), newest: watch::Sender::new(0) });
        Self {
            run: new_name(),
            edges: edges.into_iter().map(edge).collect(),
            waiting_max,
            closed: CancellationToken::new(),
            counts: Counts::default(),
        }
    }

    /// Whether there is an edge of this name.
    pub fn knows(&self, edge: &str) -> bool {
        self.edge(edge).is_some()
    }

    fn edge(&self, edge: &str) -> Option<&Edge> {
        self.edges.get(&edge.parse::<EdgeId>().ok()?)
    }

    /// Has an edge do something, and waits for what it says, at most so long. A caller that gives up takes the command back.
    pub async fn ask(&self, edge: &str, command: Command, within: Duration) -> Ended {
        let ended = self.wait(edge, command, within).await;
        let count = match &ended {
            Ended::Answered(_) => &self.counts.answered,
            Ended::TimedOut { .. } => &self.counts.timed_out,
            Ended::Refused(_) => &self.counts.refused,
        };
        count.fetch_add(1, Ordering::Relaxed);
        ended
    }

    async fn wait(&self, edge: &str, command: Command, within: Duration) -> Ended {
        let Some(edge) = self.edge(edge) else { return Ended::Refused(format!("there is no edge `{edge:.80}`")) };
        let until = Instant::now() + within;
        let (reply, answered) = oneshot::channel();
        let number = {
            let mut waiting = edge.waiting.lock();
            if waiting.commands.len() >= self.waiting_max {
                return Ended::Refused(format!("{} commands wait for it already", self.waiting_max));
            }
            if waiting.commands.values().any(|open| open.command.id == command.id) {
                return Ended::Refused("it waits already".to_owned());
            }
            waiting.numbered += 1;
            let number = waiting.numbered;
            waiting.commands.insert(number, Open { command, until, fetched: false, reply });
            number
        };
        edge.newest.send_replace(number);
        let place = Place { edge, number };
        match tokio::time::timeout_at(until, answered).await {
            Ok(Ok(reply)) => Ended::Answered(reply),
            _ => Ended::TimedOut { fetched: place.leave() },
        }
    }

    /// The commands behind a number, in order: at once when there are some, else when one comes, and none after `wait`.
    ///
    /// # Errors
    /// When too many questions of the edge wait.
    pub async fn fetch(
        &self,
        edge: &EdgeId,
        run: &str,
        after: u64,
        wait: Duration,
    ) -> Result<CommandsAnswer, TooManyPolls> {
        let begun = Instant::now();
        let answer = |commands| CommandsAnswer { run: self.run.clone(), waited_ms: ms(begun.elapsed()), commands };
        let Some(edge) = self.edges.get(edge) else { return Ok(answer(Vec::new())) };
        let _poll = Poll::begin(edge)?;
        let after = if run == self.run { after } else { 0 };
        let until = begun + wait.min(COMMAND_WAIT_MAX);
        let mut newest = edge.newest.subscribe();
        loop {
            newest.mark_unchanged();
            let commands = edge.hand_out(after);
            if !commands.is_empty() || self.closed.is_cancelled() {
                return Ok(answer(commands));
            }
            tokio::select! {
                // The sender lives as long as the edge.
                _ = newest.changed() => {}
                () = tokio::time::sleep_until(until) => return Ok(answer(Vec::new())),
                () = self.closed.cancelled() => {}
            }
        }
    }

    /// An edge says what became of a command; false when nobody waits for it any more.
    pub fn reply(&self, edge: &EdgeId, id: &str, reply: CommandReply) -> bool {
        let Some(edge) = self.edges.get(edge) else { return false };
        let mut waiting = edge.waiting.lock();
        let number = waiting.commands.iter().find(|(_, open)| open.command.id == id).map(|(number, _)| *number);
        let Some(open) = number.and_then(|number| waiting.commands.remove(&number)) else { return false };
        open.until > Instant::now() && open.reply.send(reply).is_ok()
    }

    /// The node stops: questions that wait are answered.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// As Prometheus reads it. Every name stands here, once.
    pub(crate) fn metrics(&self) -> String {
        let waiting = self.edges.values().map(|edge| edge.waiting.lock().commands.len()).sum::<usize>();
        let mut text = format!("# TYPE weir_cloud_commands_waiting gauge\nweir_cloud_commands_waiting {waiting}\n");
        text.push_str("# TYPE weir_cloud_commands_total counter\n");
        let counts = &self.counts;
        let outcomes = [("answered", &counts.answered), ("timed_out", &counts.timed_out), ("refused", &counts.refused)];
        for (outcome, count) in outcomes {
            let count = count.load(Ordering::Relaxed);
            // Writing to a String cannot fail.
            writeln!(text, "weir_cloud_commands_total{{outcome=\"{outcome}\"}} {count}").ok();
        }
        text
    }
}

impl Edge {
    fn hand_out(&self, after: u64) -> Vec<Handed> {
        let now = Instant::now();
        let mut waiting = self.waiting.lock();
        let behind = waiting.commands.range_mut(after.saturating_add(1)..).filter(|(_, open)| open.until > now);
        let handed = behind.map(|(number, open)| {
            open.fetched = true;
            // Rather less than is left than more.
            Handed { number: *number, left_ms: ms(open.until - now), command: open.command.clone() }
        });
        handed.collect()
    }
}

/// A command's place among those that wait.
struct Place<'e> {
    edge: &'e Edge,
    number: u64,
}

impl Place<'_> {
    /// Whether it was fetched.
    fn leave(&self) -> bool {
        self.edge.waiting.lock().commands.remove(&self.number).is_some_and(|open| open.fetched)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A question that waits.
struct Poll<'e>(&'e Edge);

impl<'e> Poll<'e> {
    fn begin(edge: &'e Edge) -> Result<Self, TooManyPolls> {
        let mut waiting = edge.waiting.lock();
        if waiting.polls >= POLLS_MAX {
            return Err(TooManyPolls);
        }
        waiting.polls += 1;
        Ok(Self(edge))
    }
}

impl Drop for Poll<'_> {
    fn drop(&mut self) {
        self.0.waiting.lock().polls -= 1;
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(200);

    fn edge(name: &str) -> EdgeId {
        name.parse().unwrap()
    }

    fn command(id: &str) -> Command {
        Command { id: id.to_owned(), name: "plan".to_owned(), device: None, payload: String::new() }
    }

    fn commands(waiting_max: usize) -> Arc<Commands> {
        Arc::new(Commands::new([edge("a"), edge("b")], waiting_max))
    }

    fn asked(commands: &Arc<Commands>, to: &str, id: &str, within: Duration) -> tokio::task::JoinHandle<Ended> {
        let (commands, to, command) = (Arc::clone(commands), to.to_owned(), command(id));
        tokio::spawn(async move { commands.ask(&to, command, within).await })
    }

    fn ids(answer: &CommandsAnswer) -> Vec<&str> {
        answer.commands.iter().map(|handed| handed.command.id.as_str()).collect()
    }

    #[tokio::test]
    async fn a_command_is_handed_out_until_it_is_answered_and_to_its_own_edge() {
        let all = commands(8);
        let one = asked(&all, "a", "1", LONG);
        let first = all.fetch(&edge("a"), "", 0, LONG).await.unwrap();
        assert_eq!(ids(&first), ["1"]);
        // An answer that was lost on its way is asked for again; what the edge has is not handed out once more.
        assert_eq!(ids(&all.fetch(&edge("a"), &first.run, 0, LONG).await.unwrap()), ["1"]);
        let two = asked(&all, "a", "2", LONG);
        let next = all.fetch(&edge("a"), &first.run, first.commands[0].number, LONG).await.unwrap();
        assert_eq!(ids(&next), ["2"]);
        assert_eq!(ids(&all.fetch(&edge("a"), "another run", 99, LONG).await.unwrap()), ["1", "2"]);
        assert!(all.fetch(&edge("b"), "", 0, SHORT).await.unwrap().commands.is_empty());
        assert!(!all.reply(&edge("b"), "1", CommandReply::done("")), "another edge answers nothing");
        assert!(all.reply(&edge("a"), "1", CommandReply::done("yes")));
        assert_eq!(one.await.unwrap(), Ended::Answered(CommandReply::done("yes")));
        assert!(!all.reply(&edge("a"), "1", CommandReply::done("yes")), "once");
        assert!(all.reply(&edge("a"), "2", CommandReply::refused("no")));
        assert_eq!(two.await.unwrap(), Ended::Answered(CommandReply::refused("no")));
    }

    #[tokio::test]
    async fn what_is_over_is_handed_out_to_nobody() {
        let all = commands(8);
        let short = asked(&all, "a", "1", SHORT);
        let fetched = all.fetch(&edge("a"), "", 0, LONG).await.unwrap();
        assert!(fetched.commands[0].left_ms <= 200);
        let unheard = asked(&all, "b", "2", SHORT);
        assert_eq!(short.await.unwrap(), Ended::TimedOut { fetched: true });
        assert_eq!(unheard.await.unwrap(), Ended::TimedOut { fetched: false });
        for name in ["a", "b"] {
            let answer = all.fetch(&edge(name), "", 0, SHORT).await.unwrap();
            assert!(answer.commands.is_empty() && answer.waited_ms >= 200, "{answer:?}");
        }
        assert!(!all.reply(&edge("a"), "1", CommandReply::done("late")));
        assert!(all.metrics().contains("weir_cloud_commands_waiting 0"), "{}", all.metrics());
    }

    #[tokio::test]
    async fn commands_and_questions_of_an_edge_are_bounded() {
        let all = commands(2);
        let held = [asked(&all, "a", "1", LONG), asked(&all, "a", "2", LONG)];
        tokio::task::yield_now().await;
        let refused = |ended| matches!(ended, Ended::Refused(_));
        assert!(refused(all.ask("a", command("3"), LONG).await), "too many");
        assert!(refused(all.ask("nobody", command("3"), LONG).await), "no such edge");
        let other = asked(&all, "b", "1", LONG);
        tokio::task::yield_now().await;
        assert!(refused(all.ask("b", command("1"), LONG).await), "the same again");
        // Who gives up takes its command back.
        held.iter().chain([&other]).for_each(|asked| asked.abort());
        for asked in held {
            assert!(asked.await.is_err());
        }
        assert!(all.edges[&edge("a")].waiting.lock().commands.is_empty());
        let polls: Vec<_> = (0..POLLS_MAX)
            .map(|_| {
                let all = Arc::clone(&all);
                tokio::spawn(async move { all.fetch(&edge("a"), "", 0, LONG).await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert_eq!(all.fetch(&edge("a"), "", 0, LONG).await, Err(TooManyPolls));
        all.close();
        for poll in polls {
            assert!(poll.await.unwrap().unwrap().commands.is_empty());
        }
        assert!(all.fetch(&edge("a"), "", 0, LONG).await.is_ok());
    }
}
