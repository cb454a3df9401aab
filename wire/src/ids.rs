//! Names and numbers that identify things on the way: edge, spool, stream, field, sequence number.
//!
//! A value of these types is valid: it was checked when it was parsed. Streams and fields match
//! `[a-z][a-z0-9_]{0,62}`; names beginning with `_`, and `ts`, `device`, `quality` for fields, are Weir's own.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest name in bytes.
pub const NAME_BYTES_MAX: usize = 63;
/// Field names that every table has and no configuration may take.
pub const RESERVED_FIELDS: [&str; 3] = ["ts", "device", "quality"];

/// Why a name is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("`{0}` is not a name: it must match [a-z][a-z0-9_]{{0,62}}")]
    Shape(String),
    #[error("`{0}` is reserved: ts, device, quality and names beginning with _ belong to Weir")]
    Reserved(String),
    #[error("`{0}` is not an edge id: it must match [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}")]
    Edge(String),
    #[error("`{0}` is not a spool id: 32 hexadecimal digits are needed")]
    Spool(String),
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= NAME_BYTES_MAX
        && bytes[0].is_ascii_lowercase()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'_')
}

fn clipped(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_default).collect()
}

macro_rules! text_id {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.to_string()
            }
        }
    };
}

/// The edge that a node's own streams come from: results of views, alerts.
pub const OWN_EDGE: &str = "weir";

text_id!(StreamName, "A stream, and so a table: `[a-z][a-z0-9_]{0,62}`.");
text_id!(FieldName, "A field of a stream that the user named; never one of Weir's own columns.");
text_id!(EdgeId, "One edge agent, as its operator calls it: `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`.");

impl FromStr for StreamName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if is_name(text) { Ok(Self(text.into())) } else { Err(NameError::Shape(clipped(text))) }
    }
}

impl FromStr for FieldName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.starts_with('_') || RESERVED_FIELDS.contains(&text) {
            return Err(NameError::Reserved(clipped(text)));
        }
        if is_name(text) { Ok(Self(text.into())) } else { Err(NameError::Shape(clipped(text))) }
    }
}

impl FromStr for EdgeId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = text.as_bytes();
        let valid = !bytes.is_empty()
            && bytes.len() <= NAME_BYTES_MAX
            && bytes[0].is_ascii_alphanumeric()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
        if valid { Ok(Self(text.into())) } else { Err(NameError::Edge(clipped(text))) }
    }
}

/// The identity of one spool directory: 128 random bits made with it. A copy of a directory has the same id,
/// which is how a fork is noticed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpoolId(pub [u8; 16]);

impl fmt::Display for SpoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
impl fmt::Debug for SpoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for SpoolId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NameError::Spool(clipped(text)));
        }
        let mut id = [0; 16];
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| NameError::Spool(clipped(text)))?;
        }
        Ok(Self(id))
    }
}
impl TryFrom<String> for SpoolId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}
impl From<SpoolId> for String {
    fn from(id: SpoolId) -> String {
        id.to_string()
    }
}

/// The number of a batch in its (spool, stream), counted from 1 without holes. Zero stands for "none yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// The number that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_when_they_are_parsed() {
        for good in ["a", "traffic_5m", "x1"] {
            assert!(good.parse::<StreamName>().is_ok(), "{good}");
        }
        for bad in ["", "A", "1a", "_x", "a-b", "a b", "é", "a/../b", &"a".repeat(64)] {
            assert!(bad.parse::<StreamName>().is_err(), "{bad}");
        }
        for reserved in ["ts", "device", "quality", "_date"] {
            assert_eq!(reserved.parse::<FieldName>(), Err(NameError::Reserved(reserved.into())));
        }
        for bad in ["", "-a", "a/b", "../x", "a\nb"] {
            assert!(bad.parse::<EdgeId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn spool_ids_survive_text() {
        let id = SpoolId([0xab; 16]);
        assert_eq!(id.to_string().parse::<SpoolId>(), Ok(id));
        assert!("xyz".parse::<SpoolId>().is_err());
        assert!("é".repeat(16).parse::<SpoolId>().is_err());
    }
}
