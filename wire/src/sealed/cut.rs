//! Rows of one stream, sealed at a cut and not yet numbered, and their bytes in the spool:
//! ```text
//! format u8 = 0x80 + body format (not before format 1) | stream str8 | rows u32 | schema [16] | min_ts i64 | max_ts i64
//! | watermark i64 | agent str8 | configuration u64 | body_len u32 | body
//! ```
//! No stream's name has 0x80 bytes, so what begins with the length of one is of format 1.

use arrow_array::RecordBatch;
use bytes::{Buf, Bytes};

use super::header::take_str8;
use super::{BatchHeader, BodyError, BodyFormat, SealedBatch, SealedError};
use crate::body::{self, Frame};
use crate::bytes::{Reader, put_str8};
use crate::ids::{EdgeId, Seq, SpoolId, StreamName};
use crate::schema::{SchemaId, StreamSchema};

const FORMAT: u8 = 0x80;

/// Why rows cannot be sealed at the edge.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    #[error("rows that do not fit their schema")]
    Arrow(#[from] arrow_schema::ArrowError),
    #[error(transparent)]
    Body(#[from] BodyError),
}

/// Rows of one stream, sealed at a cut, not yet numbered. Made by [`CutBatch::seal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutBatch {
    pub stream: StreamName,
    pub schema: SchemaId,
    pub rows: u32,
    pub min_ts: i64,
    pub max_ts: i64,
    pub watermark: i64,
    /// Version of the agent that sealed it.
    pub agent: String,
    /// Hash of the configuration that it was sealed under.
    pub configuration: u64,
    /// Chosen when it was sealed; the numbered batch has it, too, so a newer agent numbers it to the same bytes.
    pub format: BodyFormat,
    pub body: Bytes,
}

impl CutBatch {
    /// Encodes rows, which have the columns of `schema`.
    ///
    /// # Errors
    /// When they are over a limit of a batch.
    pub fn seal(
        stream: StreamName,
        schema: &StreamSchema,
        rows: &RecordBatch,
        watermark: i64,
        agent: &str,
        configuration: u64,
    ) -> Result<Self, CutError> {
        let (min_ts, max_ts) = body::check(rows)?;
        Ok(Self {
            stream,
            schema: schema.id(),
            rows: rows.num_rows() as u32,
            min_ts,
            max_ts,
            watermark,
            agent: agent.to_owned(),
            configuration,
            format: BodyFormat::Columns,
            body: body::encode(rows, min_ts)?,
        })
    }

    /// Gives the batch its number: pure, so the same arguments always give the same bytes.
    pub fn number(&self, edge: &EdgeId, spool: SpoolId, seq: Seq, previous_crc: u32) -> SealedBatch {
        SealedBatch::encode(
            BatchHeader {
                edge: edge.clone(),
                spool,
                stream: self.stream.clone(),
                seq,
                rows: self.rows,
                schema: self.schema,
                min_ts: self.min_ts,
                max_ts: self.max_ts,
                watermark: self.watermark,
                agent: self.agent.clone(),
                configuration: self.configuration,
                previous_crc,
                void: None,
            },
            self.format,
            &self.body,
        )
    }

    /// Decodes the rows: the columns of `schema`, whose id must be the batch's.
    ///
    /// # Errors
    /// When the body is not what its header says.
    pub fn decode(&self, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
        debug_assert_eq!(schema.id(), self.schema, "the caller looks the schema up by its id");
        body::decode(&self.body, Frame { format: self.format, rows: self.rows, min_ts: self.min_ts }, schema)
    }

    /// The batch as bytes for the spool.
    pub fn write(&self, out: &mut Vec<u8>) {
        if self.format != BodyFormat::Arrow {
            out.push(FORMAT | self.format as u8);
        }
        put_str8(out, self.stream.as_str());
        out.extend(self.rows.to_le_bytes());
        out.extend(self.schema.0);
        for value in [self.min_ts, self.max_ts, self.watermark] {
            out.extend(value.to_le_bytes());
        }
        put_str8(out, &self.agent);
        out.extend(self.configuration.to_le_bytes());
        out.extend((self.body.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.body);
    }

    /// Reads back what [`CutBatch::write`] wrote, and moves `bytes` behind it.
    ///
    /// # Errors
    /// When the bytes are cut short, of a format that is not known, or hold no valid name.
    pub fn read(bytes: &mut Bytes) -> Result<Self, SealedError> {
        let format = match bytes.first() {
            Some(first) if first & FORMAT == 0 => BodyFormat::Arrow,
            Some(first) if *first == FORMAT | BodyFormat::Columns as u8 => BodyFormat::Columns,
            Some(first) => return Err(SealedError::Version(first & !FORMAT)),
            None => return Err(SealedError::Short),
        };
        let mut reader = Reader(bytes);
        reader.take(usize::from(format != BodyFormat::Arrow))?;
        let mut batch = Self {
            stream: take_str8(&mut reader)?.parse()?,
            rows: reader.u32()?,
            schema: SchemaId(reader.array()?),
            min_ts: reader.u64()? as i64,
            max_ts: reader.u64()? as i64,
            watermark: reader.u64()? as i64,
            agent: take_str8(&mut reader)?,
            configuration: reader.u64()?,
            format,
            body: Bytes::new(),
        };
        let len = reader.u32()? as usize;
        let left = reader.0.len();
        if left < len {
            return Err(SealedError::Short);
        }
        bytes.advance(bytes.len() - left);
        batch.body = bytes.split_to(len);
        Ok(batch)
    }
}
