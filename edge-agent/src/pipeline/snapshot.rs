//! The pipeline's state as bytes, taken when no row is pending, and back.
//!
//! ```text
//! version u8 = 1 | meta_len u32 | meta (JSON) | lists_len u32 | lists | (name_len u32 | name | len u32 | state)*
//! ```
//! The state of a stream's windows goes by its name, that of its checks by `<name>/checks`, that of the rules by `/rules`.
//! The meta data hold the position, counters, watermarks, refusals, places in files, births, the clock, and which lane each
//! stream went to; what an older agent did not write is as it is at the beginning. A stream that the
//! configuration has since moved to another lane is skipped by what its *old* lane has, until the new lane is cut.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};
use segment_log::Position;
use serde::{Deserialize, Serialize};
use wire::{Seq, SpoolId, StreamName};

use super::judging::Clock;
use super::output::Output;
use super::{Counters, Pipeline, Source};
use crate::clock::Told;
use crate::config::Settings;
use crate::decode::Births;
use crate::places::Places;
use crate::redelivery::Lists;

const VERSION: u8 = 1;
/// Behind a stream's name; no name has a slash.
const CHECKS: &str = "/checks";
const RULES: &str = "/rules";

/// Why bytes are no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("the snapshot is of version {0}")]
    Version(u8),
    #[error("the snapshot is cut short")]
    Short,
    #[error("read the snapshot's meta data")]
    Meta(#[from] serde_json::Error),
    #[error("read the snapshot's redelivery lists")]
    Lists,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    position: u64,
    counters: Counters,
    watermarks: BTreeMap<StreamName, i64>,
    refused: Vec<(SpoolId, StreamName, Seq)>,
    /// Lane of each stream, by name.
    lanes: BTreeMap<StreamName, String>,
    moved: BTreeMap<StreamName, Moved>,
    /// Missing in a snapshot of an agent that read no files.
    #[serde(default)]
    places: Places,
    /// What decoders remember, by source. Snapshots of before Sparkplug have none.
    #[serde(default)]
    births: BTreeMap<String, Births>,
    #[serde(default)]
    clock: Clock,
    /// Missing in a snapshot of an agent that believed the gateway's clock.
    #[serde(default)]
    told: Told,
}

/// A stream that changed its lane when the new one stood at `lane_at`: its rows below `has` are in the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Moved {
    pub(super) has: u64,
    lane_at: u64,
}

impl Moved {
    /// Up to where the spool has the stream's rows when its lane stands at `now`: a cut since the move brought them there.
    fn has(self, now: Position) -> Position {
        Position(if now.0 == self.lane_at { self.has } else { self.has.max(now.0) })
    }

    /// Whether a cut at this position is told from the lane as it stood.
    pub(super) fn shows_at(self, cut: Position) -> bool {
        self.lane_at <= self.has || cut.0 > self.lane_at
    }
}

impl Pipeline {
    /// The state as bytes. No row may be pending, or [`Pipeline::apply`] not have been called since
    /// [`Pipeline::restore`].
    pub fn snapshot(&self) -> Vec<u8> {
        debug_assert_eq!(self.pending_rows, 0, "pending rows would be lost");
        let outputs = || self.outputs.iter();
        let births = |(name, source): (&String, &Source)| Some((name.clone(), source.decoder.births()?.clone()));
        let meta = Meta {
            position: self.position.0,
            counters: self.counters.clone(),
            watermarks: outputs().map(|output| (output.stream.clone(), output.watermark)).collect(),
            refused: self.refused.iter().map(|((spool, stream), seq)| (*spool, stream.clone(), *seq)).collect(),
            lanes: outputs().map(|output| (output.stream.clone(), self.lane_names[output.lane].clone())).collect(),
            moved: self.moved.clone(),
            places: self.places.clone(),
            births: self.sources.iter().filter_map(births).collect(),
            clock: self.clock,
            told: self.told.clone(),
        };
        let mut out = vec![VERSION];
        let mut section = |bytes: &[u8]| {
            out.extend((bytes.len() as u32).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        section(&serde_json::to_vec(&meta).expect("names and numbers are JSON"));
        let mut lists = Vec::new();
        self.lists.write(&mut lists);
        section(&lists);
        for stream in &self.streams {
            section(stream.name.as_str().as_bytes());
            let mut windows = Vec::new();
            stream.windows.write(&mut windows);
            section(&windows);
            if stream.judge.remembers() {
                section(format!("{}{CHECKS}", stream.name).as_bytes());
                let mut judge = Vec::new();
                stream.judge.write(&mut judge);
                section(&judge);
            }
        }
        for (name, state) in &self.orphans {
            section(name);
            section(state);
        }
        section(RULES.as_bytes());
        let mut rules = Vec::new();
        self.rules.write(&mut rules);
        section(&rules);
        out
    }

    /// The pipeline as it was. `lanes` are the positions up to which each lane has its rows, by name; also lanes that the
    /// configuration no longer has.
    ///
    /// # Errors
    /// When the bytes are none that [`Pipeline::snapshot`] made.
    pub fn restore(
        settings: &Settings,
        lanes: &BTreeMap<String, Position>,
        bytes: Bytes,
    ) -> Result<Self, SnapshotError> {
        let mut bytes = bytes;
        let version = bytes.try_get_u8().map_err(|_| SnapshotError::Short)?;
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let meta: Meta = serde_json::from_slice(&section(&mut bytes)?)?;
        let mut pipeline = Self::new(settings, Position(meta.position), lanes);
        pipeline.counters = meta.counters;
        pipeline.places = meta.places;
        pipeline.refused = meta.refused.into_iter().map(|(spool, stream, seq)| ((spool, stream), seq)).collect();
        pipeline.lists = Lists::read(&section(&mut bytes)?).map_err(|_| SnapshotError::Lists)?;
        for (name, births) in meta.births {
            if let Some(source) = pipeline.sources.get_mut(&name) {
                source.decoder.restore(births);
            }
        }
        pipeline.clock = meta.clock;
        pipeline.told = meta.told;
        while !bytes.is_empty() {
            let name = section(&mut bytes)?;
            let windows = section(&mut bytes)?;
            if name == RULES.as_bytes() {
                if let Err(error) = pipeline.rules.restore(&windows) {
                    tracing::warn!(%error, "the rules begin anew");
                }
                continue;
            }
            if let Some(name_of) = name.strip_suffix(CHECKS.as_bytes()) {
                match pipeline.streams.iter_mut().find(|stream| stream.name.as_str().as_bytes() == name_of) {
                    // Readings may wait in it, which are counted as waiting until the stream is configured again.
                    None => pipeline.orphans.push((name, windows)),
                    Some(stream) => {
                        if let Err(error) = stream.judge.restore(&windows) {
                            tracing::warn!(stream = %stream.name, %error, "its checks begin anew");
                        }
                    }
                }
                continue;
            }
            let stream = pipeline.streams.iter_mut().find(|stream| stream.name.as_str().as_bytes() == name);
            // A stream that is no longer configured takes its open windows with it.
            if let Some(stream) = stream
                && let Err(error) = stream.windows.restore(&windows)
            {
                tracing::warn!(stream = %stream.name, %error, "its windows begin anew");
            }
        }
        pipeline.find_by_clock();
        let stored = |output: &Output| meta.lanes.get(&output.stream) == Some(&pipeline.lane_names[output.lane]);
        pipeline.as_stored = pipeline.outputs.iter().all(stored);
        for output in &mut pipeline.outputs {
            output.watermark = meta.watermarks.get(&output.stream).copied().unwrap_or(output.watermark);
            let Some(was) = meta.lanes.get(&output.stream) else { continue };
            let is = &pipeline.lane_names[output.lane];
            let stands = |lane: &String| lanes.get(lane).copied().unwrap_or_default();
            let earlier = meta.moved.get(&output.stream).copied();
            let has = earlier.map_or_else(|| stands(was), |moved| moved.has(stands(was)));
            output.skip_before = has;
            let moved = if was == is { earlier } else { Some(Moved { has: has.0, lane_at: stands(is).0 }) };
            pipeline.moved.extend(moved.map(|moved| (output.stream.clone(), moved)));
        }
        Ok(pipeline)
    }
}

/// What a start needs to know of a state: where the journal stood, what it had of each client and of each file, counters.
///
/// # Errors
/// When the bytes are none that [`Pipeline::snapshot`] made.
pub fn known_to_sources(mut bytes: Bytes) -> Result<(Position, Lists, Places, Counters), SnapshotError> {
    let version = bytes.try_get_u8().map_err(|_| SnapshotError::Short)?;
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let meta: Meta = serde_json::from_slice(&section(&mut bytes)?)?;
    let lists = Lists::read(&section(&mut bytes)?).map_err(|_| SnapshotError::Lists)?;
    Ok((Position(meta.position), lists, meta.places, meta.counters))
}

fn section(bytes: &mut Bytes) -> Result<Bytes, SnapshotError> {
    let len = bytes.try_get_u32_le().map_err(|_| SnapshotError::Short)? as usize;
    if bytes.len() < len {
        return Err(SnapshotError::Short);
    }
    Ok(bytes.split_to(len))
}
