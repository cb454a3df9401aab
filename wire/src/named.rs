//! Names that other systems gave, as names of streams and fields (rule 9).
//!
//! `CPU Load` becomes `cpu_load`, `°C` becomes `c`, `1m` becomes `x1m`, `ts` becomes `ts_`, `_value` becomes `value`: letters
//! are made small, everything else but digits becomes `_`, what stands at the ends as `_` goes. A name that is too long keeps
//! 54 bytes of it, and the CRC32C of the whole. Two names may become one; who has both in one row tells them apart with
//! [`other_field`]. Pure, so that every node gives the same name.

use crate::ids::{FieldName, NAME_BYTES_MAX, RESERVED_FIELDS, StreamName};
use crate::schema::is_cloud_stream;

const KEPT_BYTES: usize = 54;

/// The stream of that name; never one that the cloud alone fills.
pub fn stream(text: &str) -> StreamName {
    let name: StreamName = text.parse().unwrap_or_else(|_| shaped(text).parse().expect("it was shaped to be one"));
    if !is_cloud_stream(&name) {
        return name;
    }
    format!("{name}_").parse().expect("they are short")
}

/// The field of that name.
pub fn field(text: &str) -> FieldName {
    text.parse().unwrap_or_else(|_| {
        let name = shaped(text);
        let name = if RESERVED_FIELDS.contains(&name.as_str()) { format!("{name}_") } else { name };
        name.parse().expect("it was shaped to be one")
    })
}

/// Another name for a field whose own is taken in its row; `what` says what it is.
pub fn other_field(text: &str, what: &str) -> FieldName {
    field(&format!("{text}_{what}"))
}

fn shaped(text: &str) -> String {
    let mut name = String::with_capacity(text.len().min(NAME_BYTES_MAX));
    for character in text.chars() {
        match character.to_ascii_lowercase() {
            small @ ('a'..='z' | '0'..='9') => name.push(small),
            _ if name.ends_with('_') => {}
            _ => name.push('_'),
        }
    }
    let mut name = name.trim_matches('_').to_owned();
    if !name.starts_with(|first: char| first.is_ascii_lowercase()) {
        name.insert(0, 'x');
    }
    if name.len() > KEPT_BYTES {
        name.truncate(KEPT_BYTES);
        name.push_str(&format!("_{:08x}", crc32c::crc32c(text.as_bytes())));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_a_name() {
        let check = |text: &str, expected: &str| {
            assert_eq!(field(text).as_str(), expected, "{text:?}");
        };
        check("usage_idle", "usage_idle");
        check("CPU Load", "cpu_load");
        check("°C", "c");
        check("1m", "x1m");
        check("_value", "value");
        check("ts", "ts_");
        check("Device", "device_");
        check("", "x");
        check("温度", "x");
        check("a.b--c__", "a_b_c");
        let long = "Long".repeat(30);
        assert_eq!(field(&long).as_str().len(), NAME_BYTES_MAX);
        assert_ne!(field(&long), field(&format!("{long}2")), "both are cut, and told apart");
        assert_eq!(stream("Device").as_str(), "device");
        assert_eq!(stream("quarantine").as_str(), "quarantine");
        assert_eq!(stream("Alert Log").as_str(), "alert_log_");
        assert_eq!(other_field("host", "tag").as_str(), "host_tag");
        assert!(other_field(&"a".repeat(63), "tag").as_str().len() <= NAME_BYTES_MAX);
    }
}
