//! What stands before the rows of a batch, in its two layouts, little-endian (`str8` is a length byte and UTF-8, `str16` a u16
//! length; varint, zigzag and time as in `bytes`):
//! ```text
//! "WSB" | version u8 = 1 | kind u8 (0 rows, 1 void) | edge str8 | spool [16] | stream str8 | seq u64
//! | rows u32 | schema [16] | min_ts i64 | max_ts i64 | watermark i64 | agent str8 | configuration u64
//! | previous_crc u32 | reason str16 (void only) | replaces u32 (void only) | body_len u32 | body | crc u32
//!
//! "WSB" | version u8 = 2 | edge str8 | spool [16] | stream str8 | schema [16] | agent str8 | configuration u64
//! | seq varint | rows varint | min_ts time | max_ts - min_ts time | max_ts - watermark time or none
//! | previous_crc u32 | body | crc u32
//! ```
//! The first line of version 2 is its *origin*: the same for all batches of a stream until agent or configuration change. A
//! request may leave it out when the other end has it.

use crate::bytes::{Reader, clip, put_str8, put_time, put_varint};
use crate::ids::{EdgeId, Seq, SpoolId, StreamName};
use crate::schema::SchemaId;

use super::{BodyFormat, NO_WATERMARK, SealedError};

const MAGIC: [u8; 3] = *b"WSB";
const KIND_ROWS: u8 = 0;
const KIND_VOID: u8 = 1;

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

/// The format of the body, which is that of the whole batch.
pub(super) fn format(bytes: &[u8]) -> Result<BodyFormat, SealedError> {
    match bytes {
        [a, b, c, ..] if [*a, *b, *c] != MAGIC => Err(SealedError::Magic),
        [_, _, _, version, ..] if *version == BodyFormat::Arrow as u8 => Ok(BodyFormat::Arrow),
        [_, _, _, version, ..] if *version == BodyFormat::Columns as u8 => Ok(BodyFormat::Columns),
        [_, _, _, version, ..] => Err(SealedError::Version(*version)),
        _ => Err(SealedError::Short),
    }
}

/// Appends the header of a body of so many bytes; returns the length of the origin.
pub(super) fn put(header: &BatchHeader, format: BodyFormat, body_len: usize, out: &mut Vec<u8>) -> usize {
    out.extend(MAGIC);
    out.push(format as u8);
    match format {
        BodyFormat::Arrow => {
            put_first(header, body_len, out);
            0
        }
        BodyFormat::Columns => put_second(header, out),
    }
}

/// The header, the length of its origin, and where the body begins.
pub(super) fn take(content: &[u8], format: BodyFormat) -> Result<(BatchHeader, usize, usize), SealedError> {
    let mut reader = Reader(content);
    reader.take(MAGIC.len() + 1)?;
    match format {
        BodyFormat::Arrow => take_first(&mut reader).map(|header| (header, 0, content.len() - reader.0.len())),
        BodyFormat::Columns => {
            let (header, behind) = take_second(&mut reader)?;
            Ok((header, content.len() - behind, content.len() - reader.0.len()))
        }
    }
}

fn put_first(header: &BatchHeader, body_len: usize, out: &mut Vec<u8>) {
    out.push(if header.void.is_some() { KIND_VOID } else { KIND_ROWS });
    put_str8(out, header.edge.as_str());
    out.extend(header.spool.0);
    put_str8(out, header.stream.as_str());
    out.extend(header.seq.0.to_le_bytes());
    out.extend(header.rows.to_le_bytes());
    out.extend(header.schema.0);
    for value in [header.min_ts, header.max_ts, header.watermark] {
        out.extend(value.to_le_bytes());
    }
    put_str8(out, &header.agent);
    out.extend(header.configuration.to_le_bytes());
    out.extend(header.previous_crc.to_le_bytes());
    if let Some(void) = &header.void {
        let reason = clip(&void.reason, usize::from(u16::MAX));
        out.extend((reason.len() as u16).to_le_bytes());
        out.extend_from_slice(reason.as_bytes());
        out.extend(void.replaces.to_le_bytes());
    }
    out.extend((body_len as u32).to_le_bytes());
}

fn take_first(reader: &mut Reader<'_>) -> Result<BatchHeader, SealedError> {
    let kind = reader.byte()?;
    let mut header = BatchHeader {
        edge: take_str8(reader)?.parse()?,
        spool: SpoolId(reader.array()?),
        stream: take_str8(reader)?.parse()?,
        seq: Seq(reader.u64()?),
        rows: reader.u32()?,
        schema: SchemaId(reader.array()?),
        min_ts: reader.u64()? as i64,
        max_ts: reader.u64()? as i64,
        watermark: reader.u64()? as i64,
        agent: take_str8(reader)?,
        configuration: reader.u64()?,
        previous_crc: reader.u32()?,
        void: None,
    };
    match kind {
        KIND_ROWS => {}
        KIND_VOID => {
            let len = u16::from_le_bytes(reader.array()?);
            let reason = text(reader.take(usize::from(len))?)?;
            header.void = Some(Void { reason, replaces: reader.u32()? });
        }
        other => return Err(SealedError::Kind(other)),
    }
    let len = reader.u32()? as usize;
    match reader.0.len().checked_sub(len) {
        None => Err(SealedError::Short),
        Some(0) => Ok(header),
        Some(more) => Err(SealedError::Trailing(more)),
    }
}

fn put_second(header: &BatchHeader, out: &mut Vec<u8>) -> usize {
    debug_assert!(header.void.is_none(), "a void batch is of version 1");
    put_str8(out, header.edge.as_str());
    out.extend(header.spool.0);
    put_str8(out, header.stream.as_str());
    out.extend(header.schema.0);
    put_str8(out, &header.agent);
    out.extend(header.configuration.to_le_bytes());
    let origin_len = out.len();
    put_varint(out, header.seq.0);
    put_varint(out, u64::from(header.rows));
    put_time(out, Some(header.min_ts));
    put_time(out, Some(header.max_ts.wrapping_sub(header.min_ts)));
    let behind = (header.watermark != NO_WATERMARK).then(|| header.max_ts.wrapping_sub(header.watermark));
    put_time(out, behind);
    out.extend(header.previous_crc.to_le_bytes());
    origin_len
}

/// The header, and how many bytes follow its origin.
fn take_second(reader: &mut Reader<'_>) -> Result<(BatchHeader, usize), SealedError> {
    let (edge, spool) = (take_str8(reader)?.parse()?, SpoolId(reader.array()?));
    let (stream, schema) = (take_str8(reader)?.parse()?, SchemaId(reader.array()?));
    let (agent, configuration) = (take_str8(reader)?, reader.u64()?);
    let behind = reader.0.len();
    let seq = Seq(reader.varint()?);
    let rows = u32::try_from(reader.varint()?).map_err(|_| SealedError::Short)?;
    let min_ts = reader.time()?.ok_or(SealedError::Short)?;
    let max_ts = min_ts.wrapping_add(reader.time()?.ok_or(SealedError::Short)?);
    let watermark = reader.time()?.map_or(NO_WATERMARK, |behind| max_ts.wrapping_sub(behind));
    let previous_crc = reader.u32()?;
    let void = None;
    let header = BatchHeader {
        edge,
        spool,
        stream,
        seq,
        rows,
        schema,
        min_ts,
        max_ts,
        watermark,
        agent,
        configuration,
        previous_crc,
        void,
    };
    Ok((header, behind))
}

fn text(bytes: &[u8]) -> Result<String, SealedError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| SealedError::Text)
}

pub(super) fn take_str8(reader: &mut Reader<'_>) -> Result<String, SealedError> {
    let len = reader.byte()?;
    text(reader.take(usize::from(len))?)
}
