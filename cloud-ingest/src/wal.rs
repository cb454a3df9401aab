//! The cloud's write-ahead log: sealed batches as they came, with the moment of their arrival.
//!
//! Records of the segment log, kinds as in `wire::request`:
//! ```text
//! KIND_SCHEMA: canonical text of a schema; in every segment before its first use
//! KIND_BATCH:  received_at i64 LE, µs since 1970 | sealed bytes
//! ```
//! What is appended counts when [`Wal::sync`] has returned; a failed sync is final and the process has to stop.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use segment_log::{AppendError, Disk, OpenError, Opening, Options, Position, ReadError, SegmentLog, SyncError};
use wire::request::{KIND_BATCH, KIND_SCHEMA};
use wire::schema::SchemaId;
use wire::{SealedBatch, StreamSchema};

/// A batch on its way out of the WAL after a restart.
#[derive(Debug)]
pub struct Replayed {
    pub position: Position,
    pub received_at_us: i64,
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
pub struct Wal {
    log: SegmentLog<Disk>,
    in_segment: HashSet<SchemaId>,
}

impl Wal {
    /// Opens the log in a directory, or makes it there.
    ///
    /// # Errors
    /// When the disk does not let it, or another process has it open.
    pub fn open(directory: &Path, options: Options) -> Result<(Self, Opening), OpenError> {
        let (log, opening) = SegmentLog::open(Disk, directory, options)?;
        Ok((Self { log, in_segment: HashSet::new() }, opening))
    }

    /// Appends a batch, and its schema if the segment does not have it yet.
    ///
    /// # Errors
    /// [`AppendError::Full`] is a state: push back and try later.
    pub fn append(
        &mut self,
        batch: &SealedBatch,
        schema: &StreamSchema,
        received_at_us: i64,
    ) -> Result<Position, AppendError> {
        let mut payload = Vec::with_capacity(8 + batch.bytes().len());
        payload.extend(received_at_us.to_le_bytes());
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
        let appended = self.log.append(KIND_BATCH, &payload)?;
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

    /// Frees whole segments below a position. What cannot be freed now is freed later.
    pub fn free_before(&mut self, position: Position) {
        if let Err(error) = self.log.free_before(position) {
            tracing::warn!(%error, "wal segments are not freed yet");
        }
    }

    /// Reads everything that is there, oldest first, and hands it to `take`.
    ///
    /// # Errors
    /// When the disk does not answer, or `take` stops it.
    pub fn replay<E: From<ReadError>>(&self, mut take: impl FnMut(Found) -> Result<(), E>) -> Result<(), E> {
        let mut schemas = std::collections::HashMap::<SchemaId, Arc<StreamSchema>>::new();
        let mut reader = self.log.reader(self.log.start())?;
        loop {
            let record = match reader.next() {
                Ok(None) => return Ok(()),
                Ok(Some(record)) => record,
                Err(error @ ReadError::Damaged { .. }) => {
                    take(Found::Damaged(error.to_string()))?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let position = record.position;
            let found = match record.kind {
                KIND_SCHEMA => {
                    match std::str::from_utf8(record.payload).ok().and_then(|text| StreamSchema::parse(text).ok()) {
                        Some(schema) => {
                            schemas.insert(schema.id(), Arc::new(schema));
                            continue;
                        }
                        None => Found::Damaged(format!("the record at {position} holds no schema")),
                    }
                }
                KIND_BATCH => match read_batch(record.payload) {
                    Some((received_at_us, batch)) => match schemas.get(&batch.header().schema) {
                        Some(schema) => {
                            let schema = Arc::clone(schema);
                            Found::Batch(Box::new(Replayed { position, received_at_us, batch, schema }))
                        }
                        None => Found::Damaged(format!("the schema of the batch at {position} is missing")),
                    },
                    None => Found::Damaged(format!("the record at {position} holds no batch")),
                },
                other => Found::Damaged(format!("the record at {position} has the unknown kind {other}")),
            };
            take(found)?;
        }
    }
}

fn read_batch(payload: &[u8]) -> Option<(i64, SealedBatch)> {
    let (received_at, sealed) = payload.split_first_chunk::<8>()?;
    let batch = SealedBatch::parse(Bytes::copy_from_slice(sealed)).ok()?;
    Some((i64::from_le_bytes(*received_at), batch))
}
