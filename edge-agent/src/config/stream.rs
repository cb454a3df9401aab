//! What a stream is: its fields, what a reading must satisfy, and its windows.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use wire::schema::{StreamField, StreamSchema, is_own_stream};
use wire::{FieldName, FieldType, StreamName};

use super::{Allowed, Conversion, Duplicates, FieldCheck, Fill, Number, Size, Span, StreamCheck, Unit, WindowSettings};

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
    /// A reading that is so far ahead of its arrival is suspect. Off unless set; more than a day is always rejected.
    pub max_future: Option<Span>,
    /// A reading that is older than the newest of its device is suspect.
    pub in_order: bool,
    /// What becomes of readings of one device and event time, and how long one waits for the last.
    pub duplicates: Duplicates,
    pub duplicates_within: Span,
    /// Checks whose failure rejects, and checks whose failure flags, where that is not the default.
    pub reject: Vec<StreamCheck>,
    pub flag: Vec<StreamCheck>,
    /// Of how many devices something is remembered, and how many readings of each.
    pub devices_max: usize,
    pub remember: usize,
    /// How often each device sends; after `absent_after` (twice that, unless set) of silence it is absent.
    pub expected_every: Option<Span>,
    pub absent_after: Option<Span>,
    /// Of devices that send in another interval: by name, in which `*` stands for any letters. Of several that fit the one
    /// with most letters counts.
    pub expected_every_of: BTreeMap<String, Span>,
    /// How gaps are filled, with at most so many rows, and whether windows count them.
    pub fill: Option<Fill>,
    pub fill_steps: u32,
    pub fill_in_windows: bool,
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
            max_future: None,
            in_order: false,
            duplicates: Duplicates::All,
            duplicates_within: Span(Duration::from_secs(10)),
            reject: Vec::new(),
            flag: Vec::new(),
            devices_max: 10_000,
            remember: 64,
            expected_every: None,
            absent_after: None,
            expected_every_of: BTreeMap::new(),
            fill: None,
            fill_steps: 12,
            fill_in_windows: false,
            windows_max_bytes: Size(128 << 20),
            fields: Vec::new(),
            window: BTreeMap::new(),
        }
    }
}

/// A field: its type, its units, and its checks.
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
    /// What the values are in as they come, and as they are kept; limits are in the latter.
    #[serde(default)]
    pub unit: Option<Unit>,
    #[serde(default)]
    pub store_unit: Option<Unit>,
    /// The largest step between neighbouring readings of a device.
    #[serde(default)]
    pub max_step: Option<Number>,
    /// A value that stays the same for so long is suspect.
    #[serde(default)]
    pub stuck_after: Option<Span>,
    /// The values that it may have. Empty: any.
    #[serde(default)]
    pub allowed: Vec<Allowed>,
    /// Checks whose failure rejects, and checks whose failure flags, where that is not the default.
    #[serde(default)]
    pub reject: Vec<FieldCheck>,
    #[serde(default)]
    pub flag: Vec<FieldCheck>,
}

impl FieldSettings {
    /// A field of this type, with nothing to check.
    pub fn of(kind: FieldType) -> Self {
        Self {
            kind,
            required: false,
            min: None,
            max: None,
            unit: None,
            store_unit: None,
            max_step: None,
            stuck_after: None,
            allowed: Vec::new(),
            reject: Vec::new(),
            flag: Vec::new(),
        }
    }

    /// How values become values in the unit that is kept. None when they are kept as they come.
    ///
    /// # Errors
    /// What is wrong with the units, for people.
    pub fn conversion(&self) -> Result<Option<Conversion>, String> {
        let numeric = matches!(self.kind, FieldType::Float64 | FieldType::Int64);
        match (self.unit, self.store_unit) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err("store_unit needs `unit`: in what do the values come?".to_owned()),
            _ if !numeric => Err("units are for numbers".to_owned()),
            (Some(unit), store_unit) => match store_unit.filter(|store| *store != unit) {
                None => Ok(None),
                Some(_) if self.kind == FieldType::Int64 => {
                    Err("a converted value is seldom a whole number: make the type float64".to_owned())
                }
                Some(store) => unit.to(store).map(Some),
            },
        }
    }
}

/// Limits of `windows_max_bytes`: one long text fits, and a snapshot's section ([`crate::pipeline`]) is less than 4 GiB.
const WINDOWS_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;
/// Behind the name of a stream: where its absent devices are told.
const ABSENT: &str = "absent";
/// Limits of how often the journal is told the time.
const TICK_MIN: Duration = Duration::from_secs(1);
const TICK_MAX: Duration = Duration::from_secs(60);

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

    /// The stream of what its devices owe, when it is known how often they send.
    pub fn absent_stream(&self, stream: &StreamName) -> Option<StreamName> {
        let name = || format!("{stream}_{ABSENT}").parse().expect("checked when the settings were read");
        self.expected_every.map(|_| name())
    }

    /// How often the pipeline must be told the time, when nothing else comes.
    pub fn tick_every(&self) -> Option<Duration> {
        let every = self.expected_every.iter().chain(self.expected_every_of.values()).map(|every| every.0).min();
        let absence = every.map(|every| every / 4);
        let hold = (self.duplicates == Duplicates::Last).then_some(self.duplicates_within.0 / 4);
        let most = absence.into_iter().chain(hold).min()?;
        Some(most.clamp(TICK_MIN, TICK_MAX))
    }

    /// The columns of the stream.
    pub fn schema(&self) -> StreamSchema {
        let field = |(name, field): &(FieldName, FieldSettings)| StreamField { name: name.clone(), kind: field.kind };
        StreamSchema::new(self.fields.iter().map(field).collect()).expect("checked when the settings were read")
    }

    pub(super) fn check(&self, name: &StreamName) -> Result<(), String> {
        if is_own_stream(name) {
            return Err(format!("[stream.{name}]: the name belongs to Weir; give the stream another"));
        }
        let fields = self.fields.iter().map(|(name, field)| StreamField { name: name.clone(), kind: field.kind });
        StreamSchema::new(fields.collect()).map_err(|error| format!("[stream.{name}.fields]: {error}"))?;
        for (field, settings) in &self.fields {
            if matches!(settings.kind, FieldType::Timestamp | FieldType::Binary) {
                return Err(format!("[stream.{name}.fields] {field}: the types are float64, int64, bool and text"));
            }
            settings.check_checks().map_err(|error| format!("[stream.{name}.fields] {field}: {error}"))?;
        }
        if !WINDOWS_BYTES.contains(&self.windows_max_bytes.0) {
            return Err(format!("[stream.{name}] windows_max_bytes must be from 1MiB to 1GiB"));
        }
        self.check_checks().map_err(|error| format!("[stream.{name}] {error}"))?;
        if self.expected_every.is_some() {
            if self.window.contains_key(ABSENT) {
                return Err(format!("[stream.{name}.window.{ABSENT}]: with expected_every the name is taken"));
            }
            format!("{name}_{ABSENT}").parse::<StreamName>().map_err(|error| format!("[stream.{name}]: {error}"))?;
        }
        for (window, settings) in &self.window {
            let here = |error: String| format!("[stream.{name}.window.{window}]: {error}");
            format!("{name}_{window}").parse::<StreamName>().map_err(|error| here(error.to_string()))?;
            settings.check(&self.fields).map_err(here)?;
            crate::window::schema(self, settings).map_err(|error| here(error.to_string()))?;
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
