//! A batch between the edge's seal and the cloud's Parquet writer: the same bytes in spool, on the wire and in the WAL.
//!
//! A [`CutBatch`] is what the pipeline seals: rows of one stream, encoded, without a number. When the uplink first
//! sends it, [`CutBatch::number`] turns it into a [`SealedBatch`], a pure function of the cut batch, its number and
//! the CRC of its predecessor, so that a resend after a crash has the same bytes.
//!
//! A batch has one of two layouts, which stand in [`header`]: version 1 with a body of format 1, and all void
//! batches; version 2 with a body of format 2. Both end in the CRC32C of everything before it; it covers that of the batch
//! before, so equal CRCs mean equal history. Times are µs since 1970 UTC; `i64::MIN` as watermark means "none yet".

mod cut;
mod header;

use std::fmt;

use arrow_array::RecordBatch;
use bytes::Bytes;

pub use cut::{CutBatch, CutError};
pub use header::{BatchHeader, Void};

use crate::body::{self, Frame};
pub use crate::body::{BodyError, BodyFormat};
use crate::bytes::{Short, clip};
use crate::schema::StreamSchema;

/// Watermark of a stream that has none yet.
pub const NO_WATERMARK: i64 = i64::MIN;

/// Why bytes are not a sealed batch. Such bytes were damaged on the way or never were one: the sender tries again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealedError {
    #[error("the batch is cut short")]
    Short,
    #[error("not a sealed batch")]
    Magic,
    #[error("format version {0} is not known")]
    Version(u8),
    #[error("the checksum of the batch is wrong: {stored:08x} stored, {computed:08x} computed")]
    Crc { stored: u32, computed: u32 },
    #[error("batch kind {0} is not known")]
    Kind(u8),
    #[error("a text in the batch header is not UTF-8")]
    Text,
    #[error(transparent)]
    Name(#[from] crate::ids::NameError),
    #[error("{0} bytes follow the batch")]
    Trailing(usize),
}

impl From<Short> for SealedError {
    fn from(_: Short) -> Self {
        Self::Short
    }
}

/// A numbered batch and its bytes. One that exists has a right checksum.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedBatch {
    header: BatchHeader,
    format: BodyFormat,
    bytes: Bytes,
    /// How many bytes in front are those of every batch like it; 0 in version 1.
    origin_len: usize,
    body: Bytes,
    crc: u32,
}

impl fmt::Debug for SealedBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedBatch").field("header", &self.header).field("crc", &self.crc).finish_non_exhaustive()
    }
}

impl SealedBatch {
    fn encode(header: BatchHeader, format: BodyFormat, body: &[u8]) -> Self {
        let mut out = Vec::with_capacity(256 + body.len());
        let origin_len = header::put(&header, format, body.len(), &mut out);
        let body_at = out.len();
        out.extend_from_slice(body);
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        let bytes = Bytes::from(out);
        let body = bytes.slice(body_at..body_at + body.len());
        Self { header, format, bytes, origin_len, body, crc }
    }

    /// The void batch that takes the place of a numbered batch: no rows, a reason, the CRC it replaces.
    pub fn void(mut header: BatchHeader, reason: &str, replaces: u32) -> Self {
        header.rows = 0;
        header.void = Some(Void { reason: clip(reason, 1_000).to_owned(), replaces });
        Self::encode(header, BodyFormat::Arrow, &[])
    }

    /// Reads one batch that fills `bytes`.
    ///
    /// # Errors
    /// When the bytes are not one undamaged batch of a known version.
    pub fn parse(bytes: Bytes) -> Result<Self, SealedError> {
        let format = header::format(&bytes)?;
        let (content, stored) = bytes.split_last_chunk().ok_or(SealedError::Short)?;
        let (stored, computed) = (u32::from_le_bytes(*stored), crc32c::crc32c(content));
        if stored != computed {
            return Err(SealedError::Crc { stored, computed });
        }
        let (header, origin_len, body_at) = header::take(content, format)?;
        let body = bytes.slice(body_at..content.len());
        Ok(Self { header, format, bytes, origin_len, body, crc: stored })
    }

    /// Everything but the rows.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The bytes that travel and are stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The part of the bytes that every batch of this stream has from this spool, agent and configuration, and what follows
    /// it; none in version 1. The one is enough once, when the other end keeps it.
    pub fn split(&self) -> Option<(Bytes, Bytes)> {
        let at = self.origin_len;
        (at > 0).then(|| (self.bytes.slice(..at), self.bytes.slice(at..)))
    }

    /// The checksum, which names this batch and all of its sequence before it.
    pub fn crc(&self) -> u32 {
        self.crc
    }

    /// The checksum that stands for this number in the chain: a void batch has that of the batch it replaces, so that
    /// nodes that took the one and nodes that took the other agree on what follows.
    pub fn chain_crc(&self) -> u32 {
        self.header.void.as_ref().map(|void| void.replaces).filter(|replaced| *replaced != 0).unwrap_or(self.crc)
    }

    /// Bytes that the columns say they take once decoded; 0 when that cannot be told, and [`SealedBatch::decode`] will
    /// refuse them.
    pub fn decoded_bytes(&self) -> usize {
        body::decoded_bytes(&self.body, self.format)
    }

    /// Decodes the rows: the columns of `schema`, whose id must be the header's. A void batch has none.
    ///
    /// # Errors
    /// When the batch itself is at fault; every node gives the same answer for the same bytes.
    pub fn decode(&self, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
        debug_assert_eq!(schema.id(), self.header.schema, "the caller looks the schema up by its id");
        let header = &self.header;
        if header.void.is_some() {
            return Ok(RecordBatch::new_empty(schema.arrow().clone()));
        }
        let rows =
            body::decode(&self.body, Frame { format: self.format, rows: header.rows, min_ts: header.min_ts }, schema)?;
        if rows.num_rows() != header.rows as usize {
            return Err(BodyError::Rows { header: header.rows, body: rows.num_rows() });
        }
        let times = body::check(&rows)?;
        if times != (header.min_ts, header.max_ts) {
            return Err(BodyError::EventTime);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests;
