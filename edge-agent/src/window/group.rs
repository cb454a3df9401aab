//! What a result stands for, as one text: the device, all, or values of fields.
//!
//! Of several parts each begins with its kind: `n`, `b0`, `b1`, `i-5;`, `t3:abc`. A text counts by its first
//! [`TEXT_BYTES_MAX`] bytes.

use crate::config::By;
use crate::decode::{Reading, Value};

const TEXT_BYTES_MAX: usize = 256;
/// `device` of rows that stand for several.
const ANY: &str = "*";

/// [`By`], with places of fields.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Grouping {
    Device,
    All,
    Fields { device: bool, fields: Vec<usize> },
}

impl Grouping {
    pub(super) fn new(by: &By, names: &[String]) -> Self {
        match by {
            By::Device => Self::Device,
            By::All => Self::All,
            By::Fields { device, fields } => {
                let place = |field: &wire::FieldName| names.iter().position(|name| name == field.as_str());
                Self::Fields { device: *device, fields: fields.iter().filter_map(place).collect() }
            }
        }
    }

    pub(super) fn key(&self, reading: &Reading) -> String {
        match self {
            Self::Device => reading.device.clone(),
            Self::All => ANY.to_owned(),
            Self::Fields { device, fields } => {
                let mut key = String::new();
                if *device {
                    put(&mut key, Some(&Value::Text(reading.device.clone())));
                }
                for field in fields {
                    put(&mut key, reading.values.get(*field).and_then(Option::as_ref));
                }
                key
            }
        }
    }

    /// Device and values of a key.
    pub(super) fn parts(&self, key: &str) -> (String, Vec<Option<Value>>) {
        let Self::Fields { device, fields } = self else { return (key.to_owned(), Vec::new()) };
        let mut rest = key;
        let name = match device.then(|| take(&mut rest)).flatten() {
            Some(Value::Text(name)) => name,
            _ => ANY.to_owned(),
        };
        (name, fields.iter().map(|_| take(&mut rest)).collect())
    }
}

fn put(key: &mut String, value: Option<&Value>) {
    match value {
        None | Some(Value::Float(_)) => key.push('n'),
        Some(Value::Bool(value)) => key.push_str(if *value { "b1" } else { "b0" }),
        Some(Value::Int(value)) => key.push_str(&format!("i{value};")),
        Some(Value::Text(text)) => {
            let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
            key.push_str(&format!("t{}:{text}", text.len()));
        }
    }
}

/// None for null, and for what [`put`] did not write.
fn take(rest: &mut &str) -> Option<Value> {
    let (kind, after) = rest.split_at_checked(1)?;
    *rest = after;
    match kind {
        "b" => {
            let (value, after) = after.split_at_checked(1)?;
            *rest = after;
            Some(Value::Bool(value == "1"))
        }
        "i" => {
            let (value, after) = after.split_once(';')?;
            *rest = after;
            value.parse().ok().map(Value::Int)
        }
        "t" => {
            let (len, after) = after.split_once(':')?;
            let (text, after) = after.split_at_checked(len.parse().ok()?)?;
            *rest = after;
            Some(Value::Text(text.to_owned()))
        }
        _ => None,
    }
}
