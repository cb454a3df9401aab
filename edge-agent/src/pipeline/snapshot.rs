//! The pipeline's state as bytes, taken when no row is pending, and back.
//!
//! ```text
//! version u8 = 1 | meta_len u32 | meta (JSON) | lists_len u32 | lists | (name_len u8 | name | len u32 | windows)*
//! ```
//! The meta data hold the position, counters, watermarks, refusals, and which lane each stream went to. A stream that the
//! configuration has since moved to another lane is skipped by what its *old* lane has, until the new lane is cut.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};
use segment_log::Position;
use serde::{Deserialize, Serialize};
use wire::{Seq, SpoolId, StreamName};

use super::{Counters, Pipeline};
use crate::config::Settings;
use crate::redelivery::Lists;

const VERSION: u8 = 1;

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
}

/// A stream that changed its lane: its rows below `has` are in the spool, as long as its new lane stands at `lane_at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Moved {
    has: u64,
    lane_at: u64,
}

impl Pipeline {
    /// The state as bytes. No row may be pending, or [`Pipeline::apply`] not have been called since
    /// [`Pipeline::restore`].
    pub fn snapshot(&self) -> Vec<u8> {
        debug_assert_eq!(self.pending_rows, 0, "pending rows would be lost");
        let outputs = || self.outputs.iter();
        let meta = Meta {
            position: self.position.0,
            counters: self.counters.clone(),
            watermarks: outputs().map(|output| (output.stream.clone(), output.watermark)).collect(),
            refused: self.refused.iter().map(|((spool, stream), seq)| (*spool, stream.clone(), *seq)).collect(),
            lanes: outputs().map(|output| (output.stream.clone(), self.lane_names[output.lane].clone())).collect(),
            moved: self.moved.clone(),
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
        }
        out
    }

    /// The pipeline as it was. `lanes` are the positions up to which each lane has its rows.
    ///
    /// # Errors
    /// When the bytes are none that [`Pipeline::snapshot`] made.
    pub fn restore(settings: &Settings, lanes: &[Position], bytes: Bytes) -> Result<Self, SnapshotError> {
        let mut bytes = bytes;
        let version = bytes.try_get_u8().map_err(|_| SnapshotError::Short)?;
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let meta: Meta = serde_json::from_slice(&section(&mut bytes)?)?;
        let mut pipeline = Self::new(settings, Position(meta.position), lanes);
        pipeline.counters = meta.counters;
        pipeline.refused = meta.refused.into_iter().map(|(spool, stream, seq)| ((spool, stream), seq)).collect();
        pipeline.lists = Lists::read(&section(&mut bytes)?).map_err(|_| SnapshotError::Lists)?;
        while !bytes.is_empty() {
            let name = section(&mut bytes)?;
            let windows = section(&mut bytes)?;
            let stream = pipeline.streams.iter_mut().find(|stream| stream.name.as_str().as_bytes() == name);
            // A stream that is no longer configured takes its open windows with it.
            if let Some(stream) = stream
                && let Err(error) = stream.windows.restore(&windows)
            {
                tracing::warn!(stream = %stream.name, %error, "its windows begin anew");
            }
        }
        for output in &mut pipeline.outputs {
            output.watermark = meta.watermarks.get(&output.stream).copied().unwrap_or(output.watermark);
            let now = output.skip_before;
            let was = meta.lanes.get(&output.stream);
            let old = was.and_then(|name| pipeline.lane_names.iter().position(|lane| lane == name));
            let earlier = meta.moved.get(&output.stream).filter(|moved| moved.lane_at == now.0);
            let has = match (earlier, old) {
                (Some(moved), _) => Position(moved.has),
                (None, Some(old)) if old != output.lane => lanes.get(old).copied().unwrap_or(now),
                _ => continue,
            };
            output.skip_before = has;
            pipeline.moved.insert(output.stream.clone(), Moved { has: has.0, lane_at: now.0 });
        }
        Ok(pipeline)
    }
}

fn section(bytes: &mut Bytes) -> Result<Bytes, SnapshotError> {
    let len = bytes.try_get_u32_le().map_err(|_| SnapshotError::Short)? as usize;
    if bytes.len() < len {
        return Err(SnapshotError::Short);
    }
    Ok(bytes.split_to(len))
}
