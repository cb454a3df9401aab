//! The cloud's write-ahead log: sealed batches as they came, with the moment of their arrival.
//!
//! Records of the segment log, kinds as in `wire::request`:
//! ```text
//! KIND_SCHEMA: canonical text of a schema; in every segment before its first use
//! KIND_BATCH:  received_at i64 LE, µs since 1970 | sealed bytes
//! KIND_WRITE:  received_at i64 LE | id of what a door was sent [16] | sealed bytes
//! ```
//! What is appended counts when [`Wal::sync`] has returned; a failed sync is final and the process has to stop.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use segment_log::{
    AppendError, FileLayer, FreeError, OpenError, Opening, Options, Position, ReadError, Reader, SegmentLog, SyncError,
};
use wire::request::{KIND_BATCH, KIND_SCHEMA};
use wire::schema::SchemaId;
use wire::{SealedBatch, StreamSchema};

use crate::repeats::WriteId;

/// A batch that a door of this node made. 3 is a kind of frame.
const KIND_WRITE: u8 = 4;

/// Schemas by their id.
pub type Schemas = HashMap<SchemaId, Arc<StreamSchema>>;

/// A batch on its way out of the WAL.
#[derive(Debug)]
pub struct Replayed {
    /// Where reading must begin to find it: its record, or that of its schema if the segment before holds that.
    pub from: Position,
    /// Behind its record.
    pub next: Position,
    pub received_at_us: i64,
    /// Of a batch that a door made.
    pub write: Option<WriteId>,
    pub batch: SealedBatch,
    pub schema: Arc<StreamSchema>,
}

/// What recovery reads, record by record.
#[derive(Debug)]
pub enum Found {
    Batch(Box<Replayed>),
    /// This range could not be read; what is behind it follows.
    Damaged(String),
}

/// The log and the schemas that its newest segment has.
#[derive(Debug)]
pub struct Wal<L: FileLayer> {
    log: SegmentLog<L>,
    in_segment: HashSet<SchemaId>,
}

impl<L: FileLayer> Wal<L> {
    /// Opens the log in a directory, or makes it there.
    ///
    /// # Errors
    /// When the disk does not let it, or another process has it open.
    pub fn open(layer: L, directory: &Path, options: Options) -> Result<(Self, Opening), OpenError> {
        let (log, opening) = SegmentLog::open(layer, directory, options)?;
        Ok((Self { log, in_segment: HashSet::new() }, opening))
    }

    /// Appends a batch, and its schema if the segment does not have it yet; with the id of what a door was sent, if one made
    /// it. Returns where reading must begin to find it.
    ///
    /// # Errors
    /// [`AppendError::Full`] is a state: push back and try later.
    pub fn append(
        &mut self,
        batch: &SealedBatch,
        schema: &StreamSchema,
        received_at_us: i64,
        write: Option<WriteId>,
    ) -> Result<Position, AppendError> {
        let mut payload = Vec::with_capacity(24 + batch.bytes().len());
        payload.extend(received_at_us.to_le_bytes());
        if let Some(WriteId(id)) = write {
            payload.extend(id);
        }
        payload.extend_from_slice(batch.bytes());
        if self.log.starts_segment(payload.len()) {
            self.in_segment.clear();
            self.log.start_segment()?;
        }
        let mut first = None;
        if !self.in_segment.contains(&schema.id()) {
            let appended = self.log.append(KIND_SCHEMA, schema.canonical().as_bytes())?;
            first = Some(appended.position);
            if appended.new_segment {
                self.in_segment.clear();
            }
            self.in_segment.insert(schema.id());
        }
        let kind = if write.is_some() { KIND_WRITE } else { KIND_BATCH };
        let appended = self.log.append(kind, &payload)?;
        if appended.new_segment {
            // The schema filled the segment up: it has to stand in this one, too, before the next batch.
            self.in_segment.clear();
        }
        Ok(first.unwrap_or(appended.position))
    }

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// Final: the process has to stop (rule 2).
    pub fn sync(&mut self) -> Result<(), SyncError> {
        self.log.sync().map(|_| ())
    }

    /// Writes a marker, so that damage in what is there now will never pass for a torn tail.
    ///
    /// # Errors
    /// Final, as for [`Wal::sync`].
    pub fn mark(&mut self) -> Result<(), SyncError> {
        self.log.mark()
    }

    /// Where the next record will stand.
    pub fn end(&self) -> Position {
        self.log.end()
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.log.bytes_on_disk()
    }

    /// Syncs since the start.
    pub fn syncs(&self) -> u64 {
        self.log.counters().syncs
    }

    /// Where the newest segment begins: nothing from here on can be freed.
    pub fn newest_segment(&self) -> Position {
        self.log.newest_segment()
    }

    /// Whether a segment lies wholly below a position.
    pub fn has_before(&self, position: Position) -> bool {
        self.log.second_segment().is_some_and(|second| second <= position)
    }

    /// Frees whole segments below a position.
    ///
    /// # Errors
    /// Final, as for [`Wal::sync`].
    pub fn free_before(&mut self, position: Position) -> Result<(), FreeError> {
        self.log.free_before(position).map(|_| ())
    }

    /// Reads all that is there, oldest first.
    ///
    /// # Errors
    /// When the disk does not answer.
    pub fn replay(&self) -> Result<Replay<L>, ReadError> {
        self.replay_from(self.log.start(), Schemas::new())
    }

    /// Reads on from a position that an append returned, with the schemas of the batches that are looked for.
    ///
    /// # Errors
    /// When the disk does not answer, or the position was freed.
    pub fn replay_from(&self, from: Position, schemas: Schemas) -> Result<Replay<L>, ReadError> {
        let schemas = schemas.into_iter().map(|(id, schema)| (id, (from, schema))).collect();
        Ok(Replay { reader: self.log.reader(from)?, schemas })
    }
}

/// A walk over what was synced.
#[derive(Debug)]
pub struct Replay<L: FileLayer> {
    reader: Reader<L>,
    /// With the position of the record that was met last.
    schemas: HashMap<SchemaId, (Position, Arc<StreamSchema>)>,
}

impl<L: FileLayer> Replay<L> {
    /// The next batch, or a range that cannot be read; none at the synced end.
    ///
    /// # Errors
    /// When the disk does not answer.
    #[allow(clippy::should_implement_trait, reason = "it can fail")]
    pub fn next(&mut self) -> Result<Option<Found>, ReadError> {
        loop {
            let record = match self.reader.next() {
                Ok(None) => return Ok(None),
                Ok(Some(record)) => record,
                Err(error @ ReadError::Damaged { .. }) => return Ok(Some(Found::Damaged(error.to_string()))),
                Err(error) => return Err(error),
            };
            let (position, next) = (record.position, record.next);
            let damaged = |what: &str| Ok(Some(Found::Damaged(format!("the record at {position} {what}"))));
            match record.kind {
                KIND_SCHEMA => {
                    let text = std::str::from_utf8(record.payload).ok();
                    let Some(schema) = text.and_then(|text| StreamSchema::parse(text).ok()) else {
                        return damaged("holds no schema");
                    };
                    self.schemas.insert(schema.id(), (position, Arc::new(schema)));
                }
                KIND_BATCH | KIND_WRITE => {
                    let Some((received_at_us, write, batch)) = read_batch(record.kind, record.payload) else {
                        return damaged("holds no batch");
                    };
                    let Some((schema_at, schema)) = self.schemas.get(&batch.header().schema) else {
                        return damaged("holds a batch whose schema is missing");
                    };
                    let (from, schema) = (position.min(*schema_at), Arc::clone(schema));
                    return Ok(Some(Found::Batch(Box::new(Replayed {
                        from,
                        next,
                        received_at_us,
                        write,
                        batch,
                        schema,
                    }))));
                }
                other => return damaged(&format!("has the unknown kind {other}")),
            }
        }
    }
}

fn read_batch(kind: u8, payload: &[u8]) -> Option<(i64, Option<WriteId>, SealedBatch)> {
    let (received_at, rest) = payload.split_first_chunk::<8>()?;
    let (write, sealed) = match kind {
        KIND_WRITE => rest.split_first_chunk::<16>().map(|(id, sealed)| (Some(WriteId(*id)), sealed))?,
        _ => (None, rest),
    };
    let batch = SealedBatch::parse(Bytes::copy_from_slice(sealed)).ok()?;
    Some((i64::from_le_bytes(*received_at), write, batch))
}
