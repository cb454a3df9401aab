//! Lanes: statements of one lane wait for each other and never for those of another, so that a heavy report holds up no
//! dashboard. Each lane has threads of its own, a number of places, and a queue in front of them. Where processors are
//! short, threads of a nicer lane get less of them: rules go before views, and views before readers.
//!
//! The queue is fair among readers: whoever has a free turn goes next, however many statements somebody else has put
//! in. A place is given back when the last row is sent, or nobody wants it any more.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::caller::{Caller, DEFAULT_LANE};
use crate::engine::QueryError;
use crate::execution::Execution;

/// Limits of one lane.
#[derive(Debug, Clone)]
pub struct LaneSettings {
    pub name: String,
    /// Statements that run at a time.
    pub running: usize,
    /// Statements that wait; one more is refused.
    pub waiting: usize,
    /// From a statement's place in the lane to its last row; and as long it waits for the place.
    pub timeout: Duration,
    /// Memory of one statement, bytes.
    pub memory_bytes_max: usize,
    /// Up to so much that all statements have together its statements may ask for more, bytes. What is above is for the lanes
    /// that may go higher.
    pub common_bytes_max: usize,
    /// Threads that its statements run on.
    pub threads: usize,
    /// How far its threads stand back behind others, as `nice` says it: from 0 to 19.
    pub nice: i32,
}

impl Default for LaneSettings {
    fn default() -> Self {
        Self {
            name: DEFAULT_LANE.to_owned(),
            running: 8,
            waiting: 64,
            timeout: Duration::from_secs(300),
            memory_bytes_max: 512 << 20,
            common_bytes_max: usize::MAX,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            nice: 0,
        }
    }
}

/// All lanes.
#[derive(Debug)]
pub(crate) struct Lanes(BTreeMap<String, Arc<Lane>>);

impl Lanes {
    pub(crate) fn new(lanes: &[LaneSettings]) -> std::io::Result<Self> {
        let lane = |settings: &LaneSettings| Ok((settings.name.clone(), Arc::new(Lane::new(settings.clone())?)));
        lanes.iter().map(lane).collect::<std::io::Result<_>>().map(Self)
    }

    /// Waits for a place in the caller's lane.
    pub(crate) async fn enter(&self, caller: &Caller) -> Result<Place, QueryError> {
        let known = |name: &str| self.0.get(name);
        let lane = known(caller.lane()).or_else(|| known(DEFAULT_LANE)).or_else(|| self.0.values().next());
        let Some(lane) = lane else {
            return Err(QueryError::Failed { message: "there is no lane for statements".to_owned() });
        };
        Lane::enter(lane, caller.name()).await
    }
}

#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) settings: LaneSettings,
    pub(crate) execution: Execution,
    queue: Mutex<Queue>,
}

/// Who waits, reader by reader; a reader in it has somebody waiting.
#[derive(Debug)]
struct Queue {
    free: usize,
    turns: VecDeque<(String, VecDeque<oneshot::Sender<Place>>)>,
}

impl Queue {
    /// Forgets those who no longer wait; how many are left.
    fn waiting(&mut self) -> usize {
        for (_, waiting) in &mut self.turns {
            waiting.retain(|sender| !sender.is_closed());
        }
        self.turns.retain(|(_, waiting)| !waiting.is_empty());
        self.turns.iter().map(|(_, waiting)| waiting.len()).sum()
    }

    fn push(&mut self, reader: &str, sender: oneshot::Sender<Place>) {
        match self.turns.iter_mut().find(|(name, _)| name == reader) {
            Some((_, waiting)) => waiting.push_back(sender),
            None => self.turns.push_back((reader.to_owned(), VecDeque::from([sender]))),
        }
    }

    /// The one whose turn it is; its reader goes to the end.
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        let (reader, mut waiting) = self.turns.pop_front()?;
        let next = waiting.pop_front();
        if !waiting.is_empty() {
            self.turns.push_back((reader, waiting));
        }
        next
    }
}

impl Lane {
    fn new(settings: LaneSettings) -> std::io::Result<Self> {
        let execution = Execution::new(settings.threads, settings.nice)?;
        let queue = Mutex::new(Queue { free: settings.running.max(1), turns: VecDeque::new() });
        Ok(Self { settings, execution, queue })
    }

    /// Who waits for a place.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.queue.lock().waiting()
    }

    async fn enter(lane: &Arc<Self>, reader: &str) -> Result<Place, QueryError> {
        let turn = {
            let mut queue = lane.queue.lock();
            if queue.free > 0 {
                queue.free -= 1;
                return Ok(Place { lane: Some(Arc::clone(lane)) });
            }
            if queue.waiting() >= lane.settings.waiting {
                return Err(QueryError::Busy { lane: lane.settings.name.clone() });
            }
            let (sender, turn) = oneshot::channel();
            queue.push(reader, sender);
            turn
        };
        match tokio::time::timeout(lane.settings.timeout, turn).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(QueryError::Busy { lane: lane.settings.name.clone() }),
        }
    }

    /// Gives a place to the next who still waits.
    fn leave(lane: &Arc<Self>) {
        loop {
            let next = {
                let mut queue = lane.queue.lock();
                let next = if queue.waiting() > 0 { queue.next() } else { None };
                if next.is_none() {
                    queue.free += 1;
                }
                next
            };
            let Some(sender) = next else { return };
            match sender.send(Place { lane: Some(Arc::clone(lane)) }) {
                Ok(()) => return,
                // Gone: the place that comes back is for the one after it, and is not given up here.
                Err(mut place) => place.lane = None,
            }
        }
    }
}

/// A place among the statements of a lane that run.
#[derive(Debug)]
pub struct Place {
    lane: Option<Arc<Lane>>,
}

impl Place {
    pub(crate) fn lane(&self) -> &Lane {
        self.lane.as_ref().expect("only a place that is given on has none")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            Lane::leave(&lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::caller::Door;

    fn lanes(running: usize, waiting: usize) -> Lanes {
        let timeout = Duration::from_secs(60);
        Lanes::new(&[LaneSettings { running, waiting, timeout, threads: 1, ..LaneSettings::default() }]).unwrap()
    }

    fn caller(name: &str) -> Caller {
        Caller::new(name, Door::Http, None, Arc::new([]))
    }

    #[tokio::test]
    async fn readers_take_turns() {
        let lanes = lanes(1, 10);
        let (greedy, modest) = (caller("greedy"), caller("modest"));
        let first = lanes.enter(&greedy).await.unwrap();
        let mut waiting = Vec::new();
        for reader in [&greedy, &greedy, &greedy, &modest] {
            let mut place = Box::pin(lanes.enter(reader));
            assert!(place.as_mut().now_or_never().is_none());
            waiting.push((reader.name(), place));
        }
        // One gives up; its turn passes to nobody's harm.
        drop(waiting.remove(0));
        drop(first);
        let mut order = Vec::new();
        while !waiting.is_empty() {
            let ready = waiting.iter_mut().position(|(_, place)| {
                let place = place.as_mut().now_or_never();
                place.map(|place| drop(place.unwrap())).is_some()
            });
            order.push(waiting.remove(ready.expect("a place was given back")).0);
        }
        assert_eq!(order, ["greedy", "modest", "greedy"]);
        assert!(lanes.enter(&modest).now_or_never().is_some(), "the place is free again");
    }

    #[tokio::test]
    async fn a_full_queue_refuses() {
        let lanes = lanes(1, 1);
        let one = caller("one");
        let _runs = lanes.enter(&one).await.unwrap();
        let mut waits = Box::pin(lanes.enter(&one));
        assert!(waits.as_mut().now_or_never().is_none());
        let refused = lanes.enter(&one).await.unwrap_err();
        assert!(matches!(refused, QueryError::Busy { .. }), "{refused}");
        // Who gave up leaves room.
        drop(waits);
        let mut waits = Box::pin(lanes.enter(&one));
        assert!(waits.as_mut().now_or_never().is_none());
    }
}
