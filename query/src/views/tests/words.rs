//! Names, fields and times of the tests.

use wire::{FieldType, StreamField, StreamName};

pub(super) fn stream(name: &str) -> StreamName {
    name.parse().unwrap()
}

fn field(name: &str, kind: FieldType) -> StreamField {
    StreamField { name: name.parse().unwrap(), kind }
}

pub(super) fn traffic_fields() -> Vec<StreamField> {
    vec![field("speed", FieldType::Float64), field("road", FieldType::Text)]
}

pub(super) fn weather_fields() -> Vec<StreamField> {
    vec![field("temperature", FieldType::Float64)]
}

pub(super) fn revision_fields() -> Vec<StreamField> {
    vec![field("valid_from", FieldType::Timestamp), field("most", FieldType::Float64)]
}

/// A time as rows are shown with it.
pub(super) fn time(text: &str) -> i64 {
    let time = chrono::DateTime::parse_from_rfc3339(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    time.timestamp_micros()
}
