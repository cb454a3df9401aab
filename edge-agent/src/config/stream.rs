//! What a stream is: its fields, what a reading must satisfy, and its windows.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use wire::schema::{StreamField, StreamSchema, own};
use wire::{FieldName, FieldType, StreamName};

use super::{Number, Size, Span};

/// A stream and its checks.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamSettings {
    /// How far the watermark stays behind the newest event time: windows close this much later.
    pub lateness: Span,
    /// A row that is older than the watermark by more than this enters no window.
    pub reopen_within: Span,
    /// A reading that is older than this at its arrival goes to quarantine. Off unless set.
    pub max_age: Option<Span>,
    /// What the windows of this stream may hold; then the oldest are closed early and given up.
    pub windows_max_bytes: Size,
    /// In the order of the columns, which is that of the file.
    #[serde(deserialize_with = "in_order")]
    pub fields: Vec<(FieldName, FieldSettings)>,
    window: BTreeMap<String, WindowSettings>,
}

impl Default for StreamSettings {
    fn default() -> Self {
        Self {
            lateness: Span(Duration::from_secs(60)),
            reopen_within: Span(Duration::from_secs(24 * 3_600)),
            max_age: None,
            windows_max_bytes: Size(128 << 20),
            fields: Vec::new(),
            window: BTreeMap::new(),
        }
    }
}

/// A field: its type, and the checks that reject.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FieldSettings {
    #[serde(rename = "type")]
    pub kind: FieldType,
    /// A reading without it goes to quarantine.
    #[serde(default)]
    pub required: bool,
    #[serde(default)]
    pub min: Option<Number>,
    #[serde(default)]
    pub max: Option<Number>,
}

/// A tumbling window over event time, for each device; windows begin at multiples of their size since 1970 UTC.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSettings {
    pub size: Span,
}

/// Names of fields that windows append `_first` to.
const WINDOW_FIELD_BYTES_MAX: usize = wire::ids::NAME_BYTES_MAX - "_first".len();
/// Limits of `windows_max_bytes`: one long text fits, and a snapshot's section ([`crate::pipeline`]) is less than 4 GiB.
const WINDOWS_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;
/// The longest window.
const WINDOW_MAX: Duration = Duration::from_secs(366 * 86_400);

impl StreamSettings {
    /// A stream of these fields with the defaults for all else.
    pub fn of_fields(fields: Vec<(FieldName, FieldSettings)>) -> Self {
        Self { fields, ..Self::default() }
    }

    /// The windows of this stream with the names of their own streams: `<stream>_<window>`.
    pub fn windows(&self, stream: &StreamName) -> Vec<(StreamName, &WindowSettings)> {
        let name = |window: &str| format!("{stream}_{window}").parse().expect("checked when the settings were read");
        self.window.iter().map(|(window, settings)| (name(window), settings)).collect()
    }

    /// The columns of the stream.
    pub fn schema(&self) -> StreamSchema {
        let field = |(name, field): &(FieldName, FieldSettings)| StreamField { name: name.clone(), kind: field.kind };
        StreamSchema::new(self.fields.iter().map(field).collect()).expect("checked when the settings were read")
    }

    pub(super) fn check(&self, name: &StreamName) -> Result<(), String> {
        if matches!(name.as_str(), own::QUARANTINE | own::LOSSES | own::ALERTS | "host") {
            return Err(format!("[stream.{name}]: the name belongs to Weir; give the stream another"));
        }
        let fields = self.fields.iter().map(|(name, field)| StreamField { name: name.clone(), kind: field.kind });
        StreamSchema::new(fields.collect()).map_err(|error| format!("[stream.{name}.fields]: {error}"))?;
        for (field, settings) in &self.fields {
            if matches!(settings.kind, FieldType::Timestamp | FieldType::Binary) {
                return Err(format!("[stream.{name}.fields] {field}: the types are float64, int64, bool and text"));
            }
            let numeric = matches!(settings.kind, FieldType::Float64 | FieldType::Int64);
            let bounds = (settings.min, settings.max);
            if bounds != (None, None) && !numeric {
                return Err(format!("[stream.{name}.fields] {field}: min and max are for numbers"));
            }
            if [settings.min, settings.max].into_iter().flatten().any(Number::is_nan) {
                return Err(format!("[stream.{name}.fields] {field}: min and max must be numbers, not nan"));
            }
            if let (Some(min), Some(max)) = bounds
                && min > max
            {
                return Err(format!("[stream.{name}.fields] {field}: min is above max"));
            }
        }
        let longest = self.fields.iter().find(|(field, _)| field.as_str().len() > WINDOW_FIELD_BYTES_MAX);
        if let Some((field, _)) = longest.filter(|_| !self.window.is_empty()) {
            return Err(format!(
                "[stream.{name}.fields] {field}: with windows a name has at most {WINDOW_FIELD_BYTES_MAX} characters, so that \
                 `{field}_first` is one, too"
            ));
        }
        if !WINDOWS_BYTES.contains(&self.windows_max_bytes.0) {
            return Err(format!("[stream.{name}] windows_max_bytes must be from 1MiB to 1GiB"));
        }
        for (window, settings) in &self.window {
            format!("{name}_{window}")
                .parse::<StreamName>()
                .map_err(|error| format!("[stream.{name}.window]: {error}"))?;
            if settings.size.0.is_zero() || settings.size.0 > WINDOW_MAX {
                return Err(format!("[stream.{name}.window.{window}]: size must be from 1 ms to 366 days"));
            }
        }
        Ok(())
    }
}

fn in_order<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(FieldName, FieldSettings)>, D::Error> {
    struct Fields;
    impl<'de> Visitor<'de> for Fields {
        type Value = Vec<(FieldName, FieldSettings)>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of fields, each with its type")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut fields = Vec::new();
            while let Some(field) = map.next_entry()? {
                fields.push(field);
            }
            Ok(fields)
        }
    }
    deserializer.deserialize_map(Fields)
}
