//! The protobuf of a Sparkplug B payload, read by hand: of a payload and its metrics only what becomes readings.
//!
//! ```text
//! Payload  1 timestamp u64 | 2 metrics | 3 seq u64 | 4 uuid text | 5 body bytes
//! Metric   1 name | 2 alias u64 | 3 timestamp u64 | 4 datatype u32 | 5 is_historical | 7 is_null
//!          10 int u32 | 11 long u64 | 12 float f32 | 13 double f64 | 14 boolean | 15 string | 16 bytes
//!          17 dataset | 18 template
//! ```
//! Unknown fields are passed over. Limits: [`METRICS_MAX`] metrics. Times are ms since 1970 UTC.

use super::super::scalar::Fault;

/// Metrics of one payload.
pub(super) const METRICS_MAX: usize = 65_536;

/// A payload.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Payload<'a> {
    pub(super) timestamp: Option<u64>,
    pub(super) metrics: Vec<Metric<'a>>,
    pub(super) seq: Option<u64>,
    pub(super) uuid: Option<&'a str>,
}

/// A metric as it was sent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Metric<'a> {
    pub(super) name: Option<&'a str>,
    pub(super) alias: Option<u64>,
    pub(super) timestamp: Option<u64>,
    pub(super) datatype: Option<u32>,
    pub(super) is_historical: bool,
    pub(super) is_null: bool,
    pub(super) value: Option<Raw<'a>>,
}

/// A value before its type is known.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw<'a> {
    Int(u32),
    Long(u64),
    Float(f32),
    Double(f64),
    Boolean(bool),
    String(&'a str),
    /// Bytes, data sets, templates, extensions.
    Other(&'static str),
}

/// A field's content, by its wire type.
enum Field<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

impl<'a> Payload<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        let mut payload = Self::default();
        let mut reader = Reader { bytes };
        while let Some((number, field)) = reader.field()? {
            match (number, field) {
                (1, Field::Varint(ms)) => payload.timestamp = Some(ms),
                (2, Field::Bytes(metric)) => {
                    if payload.metrics.len() >= METRICS_MAX {
                        return Err(("too_many", format!("more than {METRICS_MAX} metrics")));
                    }
                    payload.metrics.push(Metric::read(metric)?);
                }
                (3, Field::Varint(seq)) => payload.seq = Some(seq),
                (4, Field::Bytes(uuid)) => payload.uuid = Some(text(uuid)?),
                (1..=4, _) => return Err(malformed(format!("field {number} of the payload has another wire type"))),
                _ => {}
            }
        }
        Ok(payload)
    }
}

impl<'a> Metric<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        let mut metric = Self::default();
        let mut reader = Reader { bytes };
        while let Some((number, field)) = reader.field()? {
            match (number, field) {
                (1, Field::Bytes(name)) => metric.name = Some(text(name)?),
                (2, Field::Varint(alias)) => metric.alias = Some(alias),
                (3, Field::Varint(ms)) => metric.timestamp = Some(ms),
                (4, Field::Varint(datatype)) => metric.datatype = Some(u32::try_from(datatype).unwrap_or(u32::MAX)),
                (5, Field::Varint(set)) => metric.is_historical = set != 0,
                (7, Field::Varint(set)) => metric.is_null = set != 0,
                // A negative number may be written with all its 64 bits.
                (10, Field::Varint(number)) => metric.value = Some(Raw::Int(number as u32)),
                (11, Field::Varint(number)) => metric.value = Some(Raw::Long(number)),
                (12, Field::Fixed32(bits)) => metric.value = Some(Raw::Float(f32::from_bits(bits))),
                (13, Field::Fixed64(bits)) => metric.value = Some(Raw::Double(f64::from_bits(bits))),
                (14, Field::Varint(set)) => metric.value = Some(Raw::Boolean(set != 0)),
                (15, Field::Bytes(value)) => metric.value = Some(Raw::String(text(value)?)),
                (16, Field::Bytes(_)) => metric.value = Some(Raw::Other("bytes")),
                (17, Field::Bytes(_)) => metric.value = Some(Raw::Other("a data set")),
                (18, Field::Bytes(_)) => metric.value = Some(Raw::Other("a template")),
                (1..=5 | 7 | 10..=18, _) => {
                    return Err(malformed(format!("field {number} of a metric has another wire type")));
                }
                _ => {}
            }
        }
        Ok(metric)
    }
}

fn malformed(detail: impl Into<String>) -> Fault {
    ("malformed", detail.into())
}

fn text(bytes: &[u8]) -> Result<&str, Fault> {
    std::str::from_utf8(bytes).map_err(|error| ("not_utf8", error.to_string()))
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// The next field with its number; None at the end.
    fn field(&mut self) -> Result<Option<(u64, Field<'a>)>, Fault> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let number = tag >> 3;
        if number == 0 {
            return Err(malformed("a field has the number 0"));
        }
        let field = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => Field::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(usize::try_from(len).unwrap_or(usize::MAX))?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.array()?)),
            other => return Err(malformed(format!("field {number} has the wire type {other}"))),
        };
        Ok(Some((number, field)))
    }

    fn varint(&mut self) -> Result<u64, Fault> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let [byte] = self.array()?;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed("a number of more than 64 bits"))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| malformed("cut short"))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        if len > self.bytes.len() {
            return Err(malformed(format!("{len} bytes are expected, and {} are left", self.bytes.len())));
        }
        let (taken, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        Ok(taken)
    }
}

/// A command that sets one metric to true.
pub(super) fn command(name: &str, timestamp_ms: u64) -> Vec<u8> {
    /// Boolean.
    const DATATYPE: u64 = 11;
    let mut metric = vec![1 << 3 | 2];
    varint(&mut metric, name.len() as u64);
    metric.extend_from_slice(name.as_bytes());
    for (field, value) in [(3, timestamp_ms), (4, DATATYPE), (14, 1)] {
        varint(&mut metric, field << 3);
        varint(&mut metric, value);
    }
    let mut payload = vec![1 << 3];
    varint(&mut payload, timestamp_ms);
    payload.push(2 << 3 | 2);
    varint(&mut payload, metric.len() as u64);
    payload.extend(metric);
    payload
}

pub(super) fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
