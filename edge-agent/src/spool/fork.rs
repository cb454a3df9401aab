//! A forked spool goes on under a new id (rule 8): a copy of this directory, or an older one that was restored, has used
//! the same numbers for other rows.
//!
//! All that is not committed goes to the new spool, without numbers. Rows that the cloud may have already, because a
//! batch of their number is there, get `quality = 'forked'`. The new directory is complete and synced before the file
//! `id` names it; a crash before that, or a disk without room for both, leaves the old spool as it was.

use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{RecordBatch, StringArray};
use segment_log::{FileLayer, Position};
use std::sync::Arc;
use wire::sealed::CutError;
use wire::{CutBatch, Seq, SpoolId, StreamName, StreamSchema};

use super::record::{self, Place};
use super::{Incident, OnFull, Spool, SpoolError, recover};

/// Compressed bytes in one record of the new spool.
const GROUP_BYTES: usize = 1 << 20;
/// What a batch takes there beside its body, at most.
const BATCH_OVERHEAD: usize = 512;
/// What a row's quality becomes when it may be there already.
const FORKED: &str = "forked";

/// A batch's place and rows, whether the cloud may have it, and when it was sealed if it has no number.
type Kept = (Place, u32, bool, Option<i64>);

impl<L: FileLayer> Spool<L> {
    /// Moves to a new spool in the same directory. `known` is the highest number that the cloud has of a stream: none when
    /// another directory has the same batches, and may send any of them under its own numbers.
    ///
    /// # Errors
    /// When the disk fails or has no room ([`SpoolError::is_full`]); the old spool then stands as it was, and the
    /// directory of the new one is the caller's to remove.
    pub fn fork(
        &mut self,
        layer: &L,
        directory: &Path,
        fresh: SpoolId,
        known: Option<&dyn Fn(&StreamName) -> Seq>,
    ) -> Result<(Self, Vec<Incident>), SpoolError> {
        let path = directory.join(fresh.to_string());
        let io = |source| SpoolError::Io { path: path.clone(), source };
        layer.create_dir(&path).map_err(io)?;
        layer.sync_dir(directory).map_err(io)?;
        // The copies lie less densely: what is in a lane must not find the new one full, or drop what is oldest.
        let mut roomy = self.settings.clone();
        for lane in &mut roomy.lanes {
            (lane.max_bytes, lane.on_full) = (lane.max_bytes.saturating_mul(2), OnFull::Refuse);
        }
        let (mut new, _) = Self::open_as(layer, directory, roomy, fresh)?;
        new.schemas = self.schemas.clone();
        for lane in 0..self.lanes.len() {
            let mut totals = self.lanes[lane].totals;
            let cut = self.lanes[lane].cut;
            let group_bytes = GROUP_BYTES.min(new.lanes[lane].log.options().payload_bytes_max() / 2);
            let mut group = Vec::new();
            let (mut bytes, mut sealed_us) = (0, None);
            for (place, rows, doubtful, sealed) in self.kept(lane, known)? {
                let Some(mut batch) = self.read(place)? else {
                    // It rotted, which was reported when the lane was opened.
                    totals.lost += u64::from(rows);
                    continue;
                };
                if doubtful {
                    batch = self.flagged(batch)?;
                }
                let batch_bytes = batch.body.len() + BATCH_OVERHEAD;
                if bytes + batch_bytes > group_bytes && !group.is_empty() {
                    new.append_copies(lane, cut, &std::mem::take(&mut group), sealed_us)?;
                    (bytes, sealed_us) = (0, None);
                }
                // The newest of them: rather too late for `max_age` than too early.
                sealed_us = sealed_us.max(sealed);
                bytes += batch_bytes;
                group.push(batch);
            }
            new.append_copies(lane, cut, &group, sealed_us)?;
            new.lanes[lane].totals = totals;
            new.put_state(lane)?;
        }
        new.mark()?;
        drop(new);
        let opened = Self::open_as(layer, directory, self.settings.clone(), fresh)?;
        recover::name(layer, directory, fresh)?;
        // The name is given: an error from here on is final, whatever its kind.
        layer.sync_dir(directory).map_err(|error| io(std::io::Error::other(error)))?;
        Ok(opened)
    }

    /// A lane's batches that are not committed, oldest first.
    fn kept(&mut self, lane: usize, known: Option<&dyn Fn(&StreamName) -> Seq>) -> Result<Vec<Kept>, SpoolError> {
        let mut kept = Vec::new();
        let doubtful = |stream: &StreamName, seq: Seq| known.is_none_or(|known| seq <= known(stream));
        for (stream, sequence) in &self.sequences {
            let numbered = sequence.numbered.iter().filter(|numbered| numbered.place.lane == lane);
            let numbered = numbered.filter(|numbered| numbered.void.is_none());
            let all = numbered.map(|n| (n.place, n.rows, doubtful(stream, n.mark.seq), None));
            kept.extend(all);
        }
        let super::Lane { waiting, log, .. } = &mut self.lanes[lane];
        for stream in waiting.streams().map(|(stream, _)| stream.clone()).collect::<Vec<_>>() {
            let visit = |w: super::Waiting| {
                kept.push((w.place, w.rows, known.is_none(), Some(w.sealed_us)));
                true
            };
            waiting.walk(log, &stream, (u64::MAX, false), visit).map_err(SpoolError::Read)?;
        }
        kept.sort_by_key(|(place, ..)| (place.group, place.index));
        Ok(kept)
    }

    fn append_copies(
        &mut self,
        lane: usize,
        cut: Position,
        batches: &[CutBatch],
        sealed_us: Option<i64>,
    ) -> Result<(), SpoolError> {
        let schemas = batches.iter().filter_map(|batch| self.schemas.get(&batch.schema));
        let schemas = schemas.filter_map(|text| StreamSchema::parse(text).ok()).collect::<Vec<_>>();
        self.append(lane, cut, batches, &schemas, sealed_us.unwrap_or(record::SEALED_UNKNOWN))
    }

    fn flagged(&self, batch: CutBatch) -> Result<CutBatch, SpoolError> {
        let schema = self.schemas.get(&batch.schema).and_then(|text| StreamSchema::parse(text).ok());
        let Some((schema, rows)) = schema.and_then(|schema| batch.decode(&schema).ok().map(|rows| (schema, rows)))
        else {
            // The cloud will say what it thinks of it.
            return Ok(batch);
        };
        let quality = rows.columns().last().expect("a schema ends with quality").as_string::<i32>();
        let quality = quality.iter().map(|quality| match quality {
            None | Some("good") => FORKED.to_owned(),
            Some(quality) => format!("{quality},{FORKED}"),
        });
        let mut columns = rows.columns().to_vec();
        let last = columns.len() - 1;
        columns[last] = Arc::new(StringArray::from_iter_values(quality));
        let rows = RecordBatch::try_new(schema.arrow().clone(), columns).map_err(CutError::from)?;
        let (watermark, agent, configuration) = (batch.watermark, batch.agent, batch.configuration);
        Ok(CutBatch::seal(batch.stream, &schema, &rows, watermark, &agent, configuration)?)
    }
}
