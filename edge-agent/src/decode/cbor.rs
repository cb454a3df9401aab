//! CBOR (RFC 8949), read where it stands: only the places that the mapping names are kept, as with JSON.
//!
//! Keys that are whole numbers are written in decimal in a pointer (`/-1`); other keys are passed over. Tags are passed
//! over, bytes are text in hex, half and single floats are what they are as doubles. Nothing is allocated by a length that
//! a message claims. Limits: [`DEPTH_MAX`] levels, [`READINGS_MAX`] members of an array or map that a path leads through.

use std::borrow::Cow;
use std::ops::Range;
use std::rc::Rc;

use super::READINGS_MAX;
use super::scalar::{Fault, Scalar};
use super::tree::{Located, Members, Node, forget, locate, too_many};
use crate::config::{Pointer, Readings};

/// Levels of arrays, maps and tags.
const DEPTH_MAX: usize = 64;

/// What is wanted of each message and of each reading.
#[derive(Debug)]
pub(super) struct Scan {
    message: Node,
    message_slots: usize,
    reading: Node,
    reading_slots: usize,
    readings: Option<Readings>,
}

/// A message, read.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) slots: Vec<Scalar<'a>>,
    pub(super) readings: Vec<Located>,
    /// It is an array of readings, not one reading.
    pub(super) several: bool,
}

impl Scan {
    /// For these places in the message and in each reading.
    pub(super) fn new(readings: Option<&Readings>, message: &[Pointer], reading: &[Pointer]) -> Self {
        Self {
            message: Node::of(message),
            message_slots: message.len(),
            reading: Node::of(reading),
            reading_slots: reading.len(),
            readings: readings.cloned(),
        }
    }

    /// Reads a message.
    pub(super) fn message<'a>(&self, bytes: &'a [u8]) -> Result<Message<'a>, Fault> {
        let mut slots = vec![Scalar::Null; self.message_slots];
        let whole = one(bytes, Some(&self.message), &mut slots)?;
        let members = |span: &Range<usize>| members(bytes, span);
        let (readings, several) = match &self.readings {
            Some(readings) => (locate(readings, &whole, &members)?, true),
            None => match members(&whole)? {
                Members::Array(spans) => {
                    let keys = Rc::<[String]>::default();
                    (spans.into_iter().map(|span| (span, Rc::clone(&keys))).collect(), true)
                }
                _ => (vec![(whole, Rc::default())], false),
            },
        };
        Ok(Message { slots, readings, several })
    }

    /// Reads one reading.
    pub(super) fn reading<'a>(&self, bytes: &'a [u8]) -> Result<Vec<Scalar<'a>>, Fault> {
        let mut slots = vec![Scalar::Null; self.reading_slots];
        Reader { bytes, at: 0 }.value(Some(&self.reading), &mut slots, 0)?;
        Ok(slots)
    }
}

/// Reads all of a message, which is one value.
fn one<'a>(bytes: &'a [u8], node: Option<&Node>, slots: &mut [Scalar<'a>]) -> Result<Range<usize>, Fault> {
    let mut reader = Reader { bytes, at: 0 };
    reader.value(node, slots, 0)?;
    if reader.at != bytes.len() {
        return Err(malformed(format!("{} bytes follow the value", bytes.len() - reader.at)));
    }
    Ok(0..bytes.len())
}

/// The range of a message, when it is one value.
pub(super) fn whole(bytes: &[u8]) -> Result<Range<usize>, Fault> {
    one(bytes, None, &mut [])
}

/// What the value at a range holds; the bytes must have been read before.
pub(super) fn members(bytes: &[u8], at: &Range<usize>) -> Result<Members, Fault> {
    let mut reader = Reader { bytes: &bytes[..at.end], at: at.start };
    let mut head = reader.head()?;
    for _ in 0..DEPTH_MAX {
        if !matches!(head, Head::Tag) {
            break;
        }
        head = reader.head()?;
    }
    Ok(match head {
        Head::Array(len) => {
            let mut spans = Vec::new();
            while reader.more(len, spans.len() as u64)? {
                if spans.len() >= READINGS_MAX {
                    return Err(too_many(spans.len() + 1));
                }
                let start = reader.at;
                reader.value(None, &mut [], 1)?;
                spans.push(start..reader.at);
            }
            Members::Array(spans)
        }
        Head::Map(len) => {
            let (mut entries, mut pairs) = (Vec::new(), 0);
            while reader.more(len, pairs)? {
                if entries.len() >= READINGS_MAX {
                    return Err(too_many(entries.len() + 1));
                }
                let key = reader.key(1)?;
                let start = reader.at;
                reader.value(None, &mut [], 1)?;
                entries.extend(key.map(|key| (key.into_owned(), start..reader.at)));
                pairs += 1;
            }
            Members::Object(entries)
        }
        _ => Members::None,
    })
}

/// The value at a range, without what is in it.
pub(super) fn scalar<'a>(bytes: &'a [u8], at: &Range<usize>) -> Result<Scalar<'a>, Fault> {
    let mut slots = [Scalar::Null];
    let root = Node { slot: Some(0), ..Node::default() };
    Reader { bytes: &bytes[..at.end], at: at.start }.value(Some(&root), &mut slots, 0)?;
    let [value] = slots;
    Ok(value)
}

/// A message as JSON would have it, so many levels of it; None when it is none. For who looks at what devices send.
pub(crate) fn as_json(bytes: &[u8], levels: usize) -> Option<serde_json::Value> {
    fn value(bytes: &[u8], at: &Range<usize>, levels: usize) -> Option<serde_json::Value> {
        use serde_json::Value;
        if levels == 0 {
            return Some(Value::Null);
        }
        let deeper = |at: &Range<usize>| value(bytes, at, levels - 1);
        Some(match members(bytes, at).ok()? {
            Members::Object(entries) => {
                let entries = entries.into_iter().map(|(key, at)| Some((key, deeper(&at)?)));
                Value::Object(entries.collect::<Option<_>>()?)
            }
            Members::Array(spans) => Value::Array(spans.iter().map(deeper).collect::<Option<_>>()?),
            Members::None => match scalar(bytes, at).ok()? {
                Scalar::Bool(value) => value.into(),
                Scalar::Int(value) => value.into(),
                Scalar::Unsigned(value) => value.into(),
                Scalar::Float(value) => value.into(),
                Scalar::Text(text) => text.into_owned().into(),
                _ => Value::Null,
            },
        })
    }
    value(bytes, &whole(bytes).ok()?, levels)
}

fn malformed(detail: impl Into<String>) -> Fault {
    ("malformed", detail.into())
}

/// The first bytes of a value. A length of None: until the break.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Head {
    Unsigned(u64),
    /// -1 - n.
    Negative(u64),
    Bytes(Option<u64>),
    Text(Option<u64>),
    Array(Option<u64>),
    Map(Option<u64>),
    Tag,
    Bool(bool),
    Null,
    Float(f64),
    Break,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], Fault> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| malformed(format!("{len} bytes are expected at byte {}", self.at)))?;
        self.at += taken.len();
        Ok(taken)
    }

    fn head(&mut self) -> Result<Head, Fault> {
        let first = self.take(1)?[0];
        let (major, low) = (first >> 5, first & 31);
        let argument = match low {
            0..=23 => Some(u64::from(low)),
            24..=27 => {
                let bytes = self.take(1 << (low - 24))?;
                Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
            }
            31 => None,
            _ => return Err(malformed(format!("the reserved byte {first:#04x} at byte {}", self.at - 1))),
        };
        Ok(match (major, argument) {
            (0, Some(number)) => Head::Unsigned(number),
            (1, Some(number)) => Head::Negative(number),
            (2, len) => Head::Bytes(len),
            (3, len) => Head::Text(len),
            (4, len) => Head::Array(len),
            (5, len) => Head::Map(len),
            (6, Some(_)) => Head::Tag,
            (7, None) => Head::Break,
            (7, Some(bits)) => match low {
                20 => Head::Bool(false),
                21 => Head::Bool(true),
                25 => Head::Float(half(bits as u16)),
                26 => Head::Float(f64::from(f32::from_bits(bits as u32))),
                27 => Head::Float(f64::from_bits(bits)),
                _ => Head::Null,
            },
            _ => return Err(malformed(format!("the byte {first:#04x} has no length at byte {}", self.at - 1))),
        })
    }

    /// Whether another member follows, when `read` have been.
    fn more(&mut self, len: Option<u64>, read: u64) -> Result<bool, Fault> {
        match len {
            Some(len) => Ok(read < len),
            None if self.bytes.get(self.at) == Some(&0xff) => {
                self.at += 1;
                Ok(false)
            }
            None => Ok(true),
        }
    }

    /// Bytes or text, whole or in pieces.
    fn string(&mut self, len: Option<u64>, text: bool) -> Result<Cow<'a, [u8]>, Fault> {
        if let Some(len) = len {
            return self.take(len).map(Cow::Borrowed);
        }
        let mut whole = Vec::new();
        while self.more(None, 0)? {
            match self.head()? {
                Head::Text(Some(len)) if text => whole.extend_from_slice(self.take(len)?),
                Head::Bytes(Some(len)) if !text => whole.extend_from_slice(self.take(len)?),
                _ => return Err(malformed("a piece of a string is of another kind")),
            }
        }
        Ok(Cow::Owned(whole))
    }

    fn text(&mut self, len: Option<u64>) -> Result<Cow<'a, str>, Fault> {
        match self.string(len, true)? {
            Cow::Borrowed(bytes) => std::str::from_utf8(bytes).map(Cow::Borrowed).map_err(|error| error.to_string()),
            Cow::Owned(bytes) => String::from_utf8(bytes).map(Cow::Owned).map_err(|error| error.to_string()),
        }
        .map_err(|detail| ("not_utf8", detail))
    }

    /// A key as a step of a pointer; None when it is neither text nor a whole number.
    fn key(&mut self, depth: usize) -> Result<Option<Cow<'a, str>>, Fault> {
        let start = self.at;
        Ok(match self.head()? {
            Head::Text(len) => Some(self.text(len)?),
            Head::Unsigned(number) => Some(number.to_string().into()),
            Head::Negative(number) => Some((-1 - i128::from(number)).to_string().into()),
            _ => {
                self.at = start;
                self.value(None, &mut [], depth)?;
                None
            }
        })
    }

    /// Reads one value along with a node; with None it is passed over.
    fn value(&mut self, node: Option<&Node>, slots: &mut [Scalar<'a>], depth: usize) -> Result<(), Fault> {
        if depth > DEPTH_MAX {
            return Err(malformed(format!("nested deeper than {DEPTH_MAX} levels")));
        }
        let wanted = node.is_some_and(|node| node.slot.is_some());
        let head = self.head()?;
        let value = match head {
            Head::Tag => return self.value(node, slots, depth + 1),
            Head::Break => return Err(malformed(format!("a break that ends nothing at byte {}", self.at - 1))),
            Head::Unsigned(number) => i64::try_from(number).map_or(Scalar::Unsigned(number), Scalar::Int),
            Head::Negative(number) => match i64::try_from(-1 - i128::from(number)) {
                Ok(number) => Scalar::Int(number),
                Err(_) => Scalar::Float(-1.0 - number as f64),
            },
            Head::Bool(value) => Scalar::Bool(value),
            Head::Null => Scalar::Null,
            Head::Float(value) => Scalar::Float(value),
            Head::Text(len) => Scalar::Text(self.text(len)?),
            Head::Bytes(len) => {
                let bytes = self.string(len, false)?;
                let hex = || bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                if wanted { Scalar::Text(hex().into()) } else { Scalar::Null }
            }
            Head::Array(_) => Scalar::Array,
            Head::Map(_) => Scalar::Object,
        };
        if let Some(node) = node {
            if let Some(slot) = node.slot {
                slots[slot] = value;
            }
            forget(node, slots);
        }
        let mut read = 0;
        match head {
            Head::Array(len) => {
                while self.more(len, read)? {
                    let child = node.filter(|node| !node.children.is_empty());
                    self.value(child.and_then(|node| node.child(&read.to_string())), slots, depth + 1)?;
                    read += 1;
                }
            }
            Head::Map(len) => {
                while self.more(len, read)? {
                    let key = self.key(depth + 1)?;
                    let child = node.zip(key).and_then(|(node, key)| node.child(&key));
                    self.value(child, slots, depth + 1)?;
                    read += 1;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A half-precision float.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let value = match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (fraction + 1024.0) * 2_f64.powi(exponent - 25),
    };
    if bits >> 15 == 1 { -value } else { value }
}
