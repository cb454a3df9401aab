//! A forked spool goes on under a new id (rule 8): a copy of this directory, or an older one that was restored, has used
//! the same numbers for other rows.
//!
//! All that is not committed goes to the new spool, without numbers. Rows that the cloud may have already, because a
//! batch of their number is there, get `quality = 'forked'`. The new directory is complete and synced before the file
//! `id` names it; a crash before that leaves the old spool as it was.

use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{RecordBatch, StringArray};
use segment_log::{FileLayer, Position};
use std::sync::Arc;
use wire::sealed::CutError;
use wire::{CutBatch, Seq, SpoolId, StreamName, StreamSchema};

use super::{Incident, Spool, SpoolError, recover};

/// Compressed bytes in one record of the new spool.
const GROUP_BYTES: usize = 1 << 20;
/// What a row's quality becomes when it may be there already.
const FORKED: &str = "forked";

impl<L: FileLayer> Spool<L> {
    /// Moves to a new spool in the same directory. `known` is the highest number that the cloud has of a stream.
    ///
    /// # Errors
    /// When the disk fails or has no room; the old spool then stands as it was.
    pub fn fork(
        &mut self,
        layer: &L,
        directory: &Path,
        fresh: SpoolId,
        known: &dyn Fn(&StreamName) -> Seq,
    ) -> Result<(Self, Vec<Incident>), SpoolError> {
        let path = directory.join(fresh.to_string());
        let io = |source| SpoolError::Io { path: path.clone(), source };
        layer.create_dir(&path).map_err(io)?;
        layer.sync_dir(directory).map_err(io)?;
        let (mut new, incidents) = Self::open_as(layer, directory, self.settings.clone(), fresh)?;
        new.schemas = self.schemas.clone();
        for lane in 0..self.lanes.len() {
            new.lanes[lane].totals = self.lanes[lane].totals;
            let cut = self.lanes[lane].cut;
            let mut group = Vec::new();
            let mut bytes = 0;
            for (place, doubtful) in self.kept(lane, known) {
                // What rotted was reported when the lane was opened, and is counted as lost by its number there.
                let Some(mut batch) = self.read(place)? else { continue };
                if doubtful {
                    batch = self.flagged(batch)?;
                }
                bytes += batch.body.len();
                group.push(batch);
                if bytes >= GROUP_BYTES {
                    new.append_copies(lane, cut, &std::mem::take(&mut group))?;
                    bytes = 0;
                }
            }
            new.append_copies(lane, cut, &group)?;
        }
        new.mark()?;
        recover::name(layer, directory, fresh)?;
        layer.sync_dir(directory).map_err(io)?;
        Ok((new, incidents))
    }

    /// Places of a lane's batches that are not committed, oldest first, and whether the cloud may have them.
    fn kept(&self, lane: usize, known: &dyn Fn(&StreamName) -> Seq) -> Vec<(super::Place, bool)> {
        let mut kept = Vec::new();
        for (stream, sequence) in &self.sequences {
            let numbered = sequence.numbered.iter().filter(|numbered| numbered.place.lane == lane);
            let numbered = numbered.filter(|numbered| numbered.void.is_none());
            kept.extend(numbered.map(|numbered| (numbered.place, numbered.mark.seq <= known(stream))));
        }
        kept.extend(self.lanes[lane].waiting.values().flatten().map(|waiting| (waiting.place, false)));
        kept.sort_by_key(|(place, _)| (place.group, place.index));
        kept
    }

    fn append_copies(&mut self, lane: usize, cut: Position, batches: &[CutBatch]) -> Result<(), SpoolError> {
        let schemas = batches.iter().filter_map(|batch| self.schemas.get(&batch.schema));
        let schemas = schemas.filter_map(|text| StreamSchema::parse(text).ok()).collect::<Vec<_>>();
        self.append(lane, cut, batches, &schemas, 0)
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
