//! Readings that wait for a later one of the same device and event time: `duplicates = "last"`.
//!
//! A reading waits `within` of the agent's listening time (the pipeline's clock) from its first arrival; one that repeats
//! it takes its place. At most so many wait, and 16 MiB of them; then the oldest go on early.

use std::collections::{BTreeMap, VecDeque};

use crate::decode::{Reading, Value};

/// What the readings that wait may hold in texts and names.
const BYTES_MAX: usize = 16 << 20;

/// A reading that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// Its source.
    pub source: String,
    pub reading: Reading,
    /// What checks found, as in the column `quality`; empty when nothing.
    pub quality: String,
}

/// The readings of one stream that wait, in the order of their first arrival.
#[derive(Debug)]
pub struct Hold {
    within_us: i64,
    most: usize,
    pub(super) order: VecDeque<(i64, String, i64)>,
    pub(super) held: BTreeMap<(String, i64), Held>,
    bytes: usize,
}

fn bytes_of(held: &Held) -> usize {
    let text = |value: &Option<Value>| if let Some(Value::Text(text)) = value { text.len() } else { 0 };
    let values = held.reading.values.iter().map(text).sum::<usize>();
    held.source.len() + 2 * held.reading.device.len() + held.quality.len() + values
}

impl Hold {
    pub(super) fn new(within_us: i64, most: usize) -> Self {
        Self { within_us, most, order: VecDeque::new(), held: BTreeMap::new(), bytes: 0 }
    }

    /// Puts a reading there; returns the one that it replaces.
    pub fn put(&mut self, held: Held, clock_us: i64) -> Option<Held> {
        let key = (held.reading.device.clone(), held.reading.ts);
        self.bytes += bytes_of(&held);
        let before = self.held.insert(key.clone(), held);
        match &before {
            Some(before) => self.bytes -= bytes_of(before),
            None => self.order.push_back((clock_us, key.0, key.1)),
        }
        before
    }

    /// The next whose time is over.
    pub fn due(&mut self, clock_us: i64) -> Option<Held> {
        let (at, ..) = self.order.front()?;
        if clock_us.saturating_sub(*at) < self.within_us && self.order.len() <= self.most && self.bytes <= BYTES_MAX {
            return None;
        }
        let (_, device, ts) = self.order.pop_front()?;
        let held = self.held.remove(&(device, ts))?;
        self.bytes -= bytes_of(&held);
        Some(held)
    }
}
