//! A batch between the edge's seal and the cloud's Parquet writer: the same bytes in spool, on the wire and in the WAL.
//!
//! A [`CutBatch`] is what the pipeline seals: rows of one stream, encoded, without a number. When the uplink first
//! sends it, [`CutBatch::number`] turns it into a [`SealedBatch`], a pure function of the cut batch, its number and
//! the CRC of its predecessor, so that a resend after a crash has the same bytes.
//!
//! Layout of a sealed batch, version 1, little-endian (`str8` is a length byte and UTF-8, `str16` a u16 length):
//! ```text
//! "WSB" | version u8 = 1 | kind u8 (0 rows, 1 void) | edge str8 | spool [16] | stream str8 | seq u64
//! | rows u32 | schema [16] | min_ts i64 | max_ts i64 | watermark i64 | agent str8 | configuration u64
//! | previous_crc u32 | reason str16 (void only) | replaces u32 (void only) | body_len u32 | body | crc u32
//! ```
//! `crc` is the CRC32C of everything before it; it covers `previous_crc`, so equal CRCs mean equal history.
//! The body is `message_len u32 | IPC message | IPC data`, one record batch without its schema.
//! Times are µs since 1970 UTC; `i64::MIN` as watermark means "none yet".

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::reader::read_record_batch;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_ipc::{CompressionType, MessageHeader, MetadataVersion, root_as_message};
use bytes::{Buf, Bytes};

use crate::ids::{EdgeId, Seq, SpoolId, StreamName};
use crate::schema::{SchemaId, StreamSchema};
use crate::{BATCH_BYTES_MAX, BATCH_DATES_MAX, BATCH_DECODED_BYTES_MAX, BATCH_ROWS_MAX, DAY_US, TS_MIN_US};

const MAGIC: [u8; 3] = *b"WSB";
const VERSION: u8 = 1;
const KIND_ROWS: u8 = 0;
const KIND_VOID: u8 = 1;
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

/// Why the rows of an undamaged batch are refused. A pure function of the batch: every node agrees (rule 6).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("the Arrow body does not decode: {0}")]
    Arrow(String),
    #[error("the header says {header} rows, the body has {body}")]
    Rows { header: u32, body: usize },
    #[error("{0} rows are more than {BATCH_ROWS_MAX}")]
    TooManyRows(usize),
    #[error("the body would take {0} bytes decoded, more than {BATCH_DECODED_BYTES_MAX}")]
    TooLarge(u64),
    #[error("{0} dates are more than the {BATCH_DATES_MAX} that a batch may span")]
    TooManyDates(usize),
    #[error("an event time is missing or outside what is stored")]
    EventTime,
}

/// Why rows cannot be sealed at the edge.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    #[error("encode batch: {0}")]
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
    pub body: Bytes,
}

impl CutBatch {
    /// Encodes rows, which have the columns of `schema`, under zstd.
    ///
    /// # Errors
    /// When Arrow cannot encode them or they are over a limit of a batch.
    pub fn seal(
        stream: StreamName,
        schema: &StreamSchema,
        rows: &RecordBatch,
        watermark: i64,
        agent: &str,
        configuration: u64,
    ) -> Result<Self, CutError> {
        let times = check_rows(rows)?;
        Ok(Self {
            stream,
            schema: schema.id(),
            rows: rows.num_rows() as u32,
            min_ts: times.0,
            max_ts: times.1,
            watermark,
            agent: agent.to_owned(),
            configuration,
            body: encode_body(rows)?,
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
            &self.body,
        )
    }

    /// Decodes the rows: the columns of `schema`, whose id must be the batch's.
    ///
    /// # Errors
    /// When the body is not what its header says.
    pub fn decode(&self, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
        debug_assert_eq!(schema.id(), self.schema, "the caller looks the schema up by its id");
        decode_body(&self.body, schema)
    }

    /// The batch as bytes for the spool: `stream str8 | rows u32 | schema | min | max | watermark | agent str8 |
    /// configuration u64 | body_len u32 | body`.
    pub fn write(&self, out: &mut Vec<u8>) {
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
    /// When the bytes are cut short or hold no valid name.
    pub fn read(bytes: &mut Bytes) -> Result<Self, SealedError> {
        Ok(Self {
            stream: take_str8(bytes)?.parse()?,
            rows: take_u32(bytes)?,
            schema: SchemaId(take_array(bytes)?),
            min_ts: take_u64(bytes)? as i64,
            max_ts: take_u64(bytes)? as i64,
            watermark: take_u64(bytes)? as i64,
            agent: take_str8(bytes)?,
            configuration: take_u64(bytes)?,
            body: {
                let len = take_u32(bytes)? as usize;
                take(bytes, len)?
            },
        })
    }
}

/// What a void batch stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Void {
    pub reason: String,
    /// CRC of the batch that had this number before; 0 when its bytes could no longer be read.
    pub replaces: u32,
}

/// Everything of a batch but its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchHeader {
    pub edge: EdgeId,
    pub spool: SpoolId,
    pub stream: StreamName,
    pub seq: Seq,
    pub rows: u32,
    pub schema: SchemaId,
    pub min_ts: i64,
    pub max_ts: i64,
    pub watermark: i64,
    pub agent: String,
    pub configuration: u64,
    /// CRC of the batch before it in (spool, stream); 0 for the first.
    pub previous_crc: u32,
    pub void: Option<Void>,
}

/// A numbered batch and its bytes. One that exists has a right checksum.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedBatch {
    header: BatchHeader,
    bytes: Bytes,
    body: Bytes,
    crc: u32,
}

impl fmt::Debug for SealedBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedBatch").field("header", &self.header).field("crc", &self.crc).finish_non_exhaustive()
    }
}

impl SealedBatch {
    fn encode(header: BatchHeader, body: &[u8]) -> Self {
        let mut out = Vec::with_capacity(256 + body.len());
        out.extend(MAGIC);
        out.push(VERSION);
        out.push(if header.void.is_some() { KIND_VOID } else { KIND_ROWS });
        put_str8(&mut out, header.edge.as_str());
        out.extend(header.spool.0);
        put_str8(&mut out, header.stream.as_str());
        out.extend(header.seq.0.to_le_bytes());
        out.extend(header.rows.to_le_bytes());
        out.extend(header.schema.0);
        for value in [header.min_ts, header.max_ts, header.watermark] {
            out.extend(value.to_le_bytes());
        }
        put_str8(&mut out, &header.agent);
        out.extend(header.configuration.to_le_bytes());
        out.extend(header.previous_crc.to_le_bytes());
        if let Some(void) = &header.void {
            let reason = clip(&void.reason, usize::from(u16::MAX));
            out.extend((reason.len() as u16).to_le_bytes());
            out.extend_from_slice(reason.as_bytes());
            out.extend(void.replaces.to_le_bytes());
        }
        out.extend((body.len() as u32).to_le_bytes());
        let body_at = out.len();
        out.extend_from_slice(body);
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        let bytes = Bytes::from(out);
        let body = bytes.slice(body_at..body_at + body.len());
        Self { header, bytes, body, crc }
    }

    /// The void batch that takes the place of a numbered batch: no rows, a reason, the CRC it replaces.
    pub fn void(mut header: BatchHeader, reason: &str, replaces: u32) -> Self {
        header.rows = 0;
        header.void = Some(Void { reason: clip(reason, 1_000).to_owned(), replaces });
        Self::encode(header, &[])
    }

    /// Reads one batch that fills `bytes`.
    ///
    /// # Errors
    /// When the bytes are not one undamaged batch of a known version.
    pub fn parse(bytes: Bytes) -> Result<Self, SealedError> {
        if bytes.len() < MAGIC.len() + 2 + 4 {
            return Err(SealedError::Short);
        }
        if bytes[..3] != MAGIC {
            return Err(SealedError::Magic);
        }
        if bytes[3] != VERSION {
            return Err(SealedError::Version(bytes[3]));
        }
        let end = bytes.len() - 4;
        let stored = u32::from_le_bytes([bytes[end], bytes[end + 1], bytes[end + 2], bytes[end + 3]]);
        let computed = crc32c::crc32c(&bytes[..end]);
        if stored != computed {
            return Err(SealedError::Crc { stored, computed });
        }
        let mut rest = bytes.slice(4..end);
        let kind = take(&mut rest, 1)?[0];
        let mut header = BatchHeader {
            edge: take_str8(&mut rest)?.parse()?,
            spool: SpoolId(take_array(&mut rest)?),
            stream: take_str8(&mut rest)?.parse()?,
            seq: Seq(take_u64(&mut rest)?),
            rows: take_u32(&mut rest)?,
            schema: SchemaId(take_array(&mut rest)?),
            min_ts: take_u64(&mut rest)? as i64,
            max_ts: take_u64(&mut rest)? as i64,
            watermark: take_u64(&mut rest)? as i64,
            agent: take_str8(&mut rest)?,
            configuration: take_u64(&mut rest)?,
            previous_crc: take_u32(&mut rest)?,
            void: None,
        };
        match kind {
            KIND_ROWS => {}
            KIND_VOID => {
                let len = u16::from_le_bytes(take_array(&mut rest)?);
                let reason = text(&take(&mut rest, usize::from(len))?)?;
                header.void = Some(Void { reason, replaces: take_u32(&mut rest)? });
            }
            other => return Err(SealedError::Kind(other)),
        }
        let len = take_u32(&mut rest)? as usize;
        let body = take(&mut rest, len)?;
        if !rest.is_empty() {
            return Err(SealedError::Trailing(rest.len()));
        }
        Ok(Self { header, bytes, body, crc: stored })
    }

    /// Everything but the rows.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The bytes that travel and are stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
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
        let mut data = self.body.clone();
        let message = take_u32(&mut data).and_then(|len| take(&mut data, len as usize)).unwrap_or_default();
        let batch = root_as_message(&message).ok().and_then(|message| message.header_as_record_batch());
        let bytes = batch.and_then(|batch| decoded_bytes(&batch, &data).ok()).unwrap_or(0);
        usize::try_from(bytes).map_or(BATCH_DECODED_BYTES_MAX, |bytes| bytes.min(BATCH_DECODED_BYTES_MAX))
    }

    /// Decodes the rows: the columns of `schema`, whose id must be the header's. A void batch has none.
    ///
    /// # Errors
    /// When the batch itself is at fault; every node gives the same answer for the same bytes.
    pub fn decode(&self, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
        debug_assert_eq!(schema.id(), self.header.schema, "the caller looks the schema up by its id");
        if self.header.void.is_some() {
            return Ok(RecordBatch::new_empty(schema.arrow().clone()));
        }
        let rows = decode_body(&self.body, schema)?;
        if rows.num_rows() != self.header.rows as usize {
            return Err(BodyError::Rows { header: self.header.rows, body: rows.num_rows() });
        }
        let times = check_rows(&rows)?;
        if times != (self.header.min_ts, self.header.max_ts) {
            return Err(BodyError::EventTime);
        }
        Ok(rows)
    }
}

/// The limits of a batch, and its smallest and largest event time.
fn check_rows(rows: &RecordBatch) -> Result<(i64, i64), BodyError> {
    if rows.num_rows() > BATCH_ROWS_MAX {
        return Err(BodyError::TooManyRows(rows.num_rows()));
    }
    let times = rows.column(0).as_primitive_opt::<TimestampMicrosecondType>().ok_or(BodyError::EventTime)?;
    if times.null_count() > 0 || times.is_empty() {
        return Err(BodyError::EventTime);
    }
    let (mut min, mut max) = (i64::MAX, i64::MIN);
    let mut dates = HashSet::new();
    let mut last_date = None;
    for &ts in times.values() {
        min = min.min(ts);
        max = max.max(ts);
        let date = ts.div_euclid(DAY_US);
        if last_date != Some(date) {
            last_date = Some(date);
            dates.insert(date);
        }
    }
    if min < TS_MIN_US {
        return Err(BodyError::EventTime);
    }
    if dates.len() > BATCH_DATES_MAX {
        return Err(BodyError::TooManyDates(dates.len()));
    }
    Ok((min, max))
}

fn encode_body(rows: &RecordBatch) -> Result<Bytes, CutError> {
    let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD))?;
    let mut context = IpcWriteContext::default();
    let (_, data) =
        IpcDataGenerator::default().encode(rows, &mut DictionaryTracker::new(false), &options, &mut context)?;
    let mut body = Vec::with_capacity(4 + data.ipc_message.len() + data.arrow_data.len());
    body.extend((data.ipc_message.len() as u32).to_le_bytes());
    body.extend_from_slice(&data.ipc_message);
    body.extend_from_slice(&data.arrow_data);
    if body.len() > BATCH_BYTES_MAX {
        return Err(BodyError::TooLarge(body.len() as u64).into());
    }
    Ok(body.into())
}

fn decode_body(body: &Bytes, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
    let broken = |reason: &str| BodyError::Arrow(reason.to_owned());
    let mut rest = body.clone();
    let message_len = take_u32(&mut rest).map_err(|_| broken("no message"))? as usize;
    let message = take(&mut rest, message_len).map_err(|_| broken("message cut short"))?;
    let message = root_as_message(&message).map_err(|error| BodyError::Arrow(error.to_string()))?;
    if message.header_type() != MessageHeader::RecordBatch {
        return Err(broken("not a record batch"));
    }
    let batch = message.header_as_record_batch().ok_or_else(|| broken("not a record batch"))?;
    // Any other codec may unpack to more than it says; and whether this build knows it must not decide (rule 6).
    if batch.compression().is_some_and(|compression| compression.codec() != CompressionType::ZSTD) {
        return Err(broken("compressed with another codec than Zstandard"));
    }
    let decoded = decoded_bytes(&batch, &rest)?;
    if decoded > BATCH_DECODED_BYTES_MAX as u64 {
        return Err(BodyError::TooLarge(decoded));
    }
    if batch.length() < 0 || batch.length() as usize > BATCH_ROWS_MAX {
        return Err(BodyError::TooManyRows(batch.length().max(0) as usize));
    }
    let columns = schema.arrow().fields().len();
    if batch.nodes().map_or(0, |nodes| nodes.len()) != columns {
        return Err(broken("the body has other columns than its schema"));
    }
    if batch
        .nodes()
        .into_iter()
        .flatten()
        .any(|node| node.length() != batch.length() || node.null_count() < 0 || node.null_count() > node.length())
    {
        return Err(broken("columns of different lengths"));
    }
    let arrow = Arc::clone(schema.arrow());
    // Arrow's decoder checks offsets, UTF-8 and lengths; a panic in it on hostile bytes becomes a refusal too.
    let decode =
        || read_record_batch(&Buffer::from(rest.clone()), batch, arrow, &HashMap::new(), None, &MetadataVersion::V5);
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(decode)) {
        Ok(Ok(rows)) => Ok(rows),
        Ok(Err(error)) => Err(BodyError::Arrow(error.to_string())),
        Err(_) => Err(broken("inconsistent buffers")),
    }
}

/// Sums what the buffers say they take once decompressed, before any memory is given to them.
fn decoded_bytes(batch: &arrow_ipc::RecordBatch<'_>, data: &[u8]) -> Result<u64, BodyError> {
    let broken = || BodyError::Arrow("a buffer lies outside the body".to_owned());
    let compressed = batch.compression().is_some();
    let mut total = 0_u64;
    for buffer in batch.buffers().into_iter().flatten() {
        let start = usize::try_from(buffer.offset()).map_err(|_| broken())?;
        let len = usize::try_from(buffer.length()).map_err(|_| broken())?;
        let bytes = start.checked_add(len).and_then(|end| data.get(start..end)).ok_or_else(broken)?;
        let decoded = match bytes.first_chunk::<8>() {
            Some(prefix) if compressed => match i64::from_le_bytes(*prefix) {
                -1 => len as u64,
                declared => u64::try_from(declared).map_err(|_| broken())?,
            },
            _ => len as u64,
        };
        total = total.saturating_add(decoded);
    }
    Ok(total)
}

fn clip(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn put_str8(out: &mut Vec<u8>, text: &str) {
    let text = clip(text, usize::from(u8::MAX));
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

fn take(bytes: &mut Bytes, len: usize) -> Result<Bytes, SealedError> {
    if bytes.len() < len { Err(SealedError::Short) } else { Ok(bytes.split_to(len)) }
}

fn take_array<const N: usize>(bytes: &mut Bytes) -> Result<[u8; N], SealedError> {
    let mut array = [0; N];
    if bytes.len() < N {
        return Err(SealedError::Short);
    }
    bytes.copy_to_slice(&mut array);
    Ok(array)
}

fn take_u32(bytes: &mut Bytes) -> Result<u32, SealedError> {
    Ok(u32::from_le_bytes(take_array(bytes)?))
}

fn take_u64(bytes: &mut Bytes) -> Result<u64, SealedError> {
    Ok(u64::from_le_bytes(take_array(bytes)?))
}

fn text(bytes: &[u8]) -> Result<String, SealedError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| SealedError::Text)
}

fn take_str8(bytes: &mut Bytes) -> Result<String, SealedError> {
    let len = take(bytes, 1)?[0];
    text(&take(bytes, usize::from(len))?)
}

#[cfg(test)]
mod tests;
