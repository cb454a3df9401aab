//! Records into a lane's log: each after the state and the schemas that its segment still lacks.
//!
//! So a segment can be read without those before it, and they can be freed. Control records (numbers, freed marks, voids)
//! may use the lane's reserve; cuts may not.

use std::collections::HashMap;
use std::path::Path;

use segment_log::{AppendError, Appended, FileLayer, SegmentLog};
use wire::SchemaId;

use super::record;
use super::{Heads, Lane, LaneSettings, OnFull, Spool, SpoolError};

impl<L: FileLayer> Spool<L> {
    /// Appends a record, and before it what its segment still lacks: the state, and the schemas it uses.
    pub(super) fn put(
        &mut self,
        lane: usize,
        kind: u8,
        payload: &[u8],
        ids: &[SchemaId],
        control: bool,
    ) -> Result<Appended, SpoolError> {
        let texts = |id: &SchemaId| self.schemas.get(id).map_or(0, |text| text.len() + 64);
        let needed = payload.len() + ids.iter().map(texts).sum::<usize>();
        let starts = self.lanes[lane].log.starts_segment(needed);
        if starts && !control && !self.has_spare(lane) {
            return Err(SpoolError::Full(self.lanes[lane].settings.name.clone()));
        }
        // Only the first record of a segment needs it.
        let state = starts.then(|| self.state(lane));
        let schemas = &self.schemas;
        let lane = &mut self.lanes[lane];
        let name = &lane.settings.name;
        let full = |error| match error {
            AppendError::Full => SpoolError::Full(name.clone()),
            other => SpoolError::Append(other),
        };
        if let Some(state) = state {
            match lane.log.start_segment() {
                Ok(()) => {
                    lane.log.append_control(record::STATE, &state).map_err(full)?;
                }
                Err(AppendError::Full) if control => {}
                Err(error) => return Err(full(error)),
            }
        }
        if lane.schemas.0 != lane.log.newest_segment() {
            lane.schemas = (lane.log.newest_segment(), Vec::new());
        }
        for id in ids {
            if let Some(text) = schemas.get(id).filter(|_| !lane.schemas.1.contains(id)) {
                lane.log.append_control(record::SCHEMA, text.as_bytes()).map_err(full)?;
                lane.schemas.1.push(*id);
            }
        }
        if control { lane.log.append_control(kind, payload) } else { lane.log.append(kind, payload) }.map_err(full)
    }

    /// Opens a segment in the room that the lane keeps for what must stay; false when there is none.
    pub(super) fn open_spare(&mut self, lane: usize) -> Result<bool, SpoolError> {
        let state = self.state(lane);
        let log = &mut self.lanes[lane].log;
        let opened = log.start_segment_in_spare().map_err(SpoolError::Append)?;
        if opened {
            log.append_control(record::STATE, &state).map_err(SpoolError::Append)?;
        }
        Ok(opened)
    }

    /// Writes the lane's state where it stands, not synced.
    pub(super) fn put_state(&mut self, lane: usize) -> Result<(), SpoolError> {
        let state = self.state(lane);
        self.put(lane, record::STATE, &state, &[], true).map(|_| ())
    }

    /// Whether a segment may be begun by a cut: a lane that drops keeps the last one for what must move ([`super::room`]).
    fn has_spare(&self, lane: usize) -> bool {
        let Lane { settings, log, .. } = &self.lanes[lane];
        let spare = if settings.on_full == OnFull::Refuse { 0 } else { settings.segment_bytes };
        log.bytes_on_disk() + settings.segment_bytes + spare <= settings.max_bytes
    }

    fn state(&self, lane: usize) -> Vec<u8> {
        let heads = self.sequences.iter().map(|(stream, s)| (stream, Heads { head: s.head, freed: s.freed }));
        let mut out = record::with_totals(self.lanes[lane].totals, &self.lanes[lane].cut.0.to_le_bytes());
        let json = serde_json::to_vec(&heads.collect::<HashMap<_, _>>()).expect("names and numbers are JSON");
        out.extend(json);
        out
    }
}

/// A lane that drops keeps a segment ready on disk: [`super::room`].
pub(super) fn keep_spare<L: FileLayer>(
    log: &mut SegmentLog<L>,
    lane: &LaneSettings,
    directory: &Path,
) -> Result<(), SpoolError> {
    let kept = if lane.on_full == OnFull::Refuse { log.give_spare_back() } else { log.keep_spare() };
    kept.map_err(|source| SpoolError::Io { path: directory.join(&lane.name), source })
}
