//! What windows a stream has: their kind, what they group by, and their aggregates.

use std::fmt;
use std::time::Duration;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use wire::{FieldName, FieldType};

use super::{FieldSettings, Span};

/// A window over event time. Tumbling (`size`), hopping (`size` and `every`), or a session (`gap`).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSettings {
    /// Zero for sessions.
    #[serde(default = "none")]
    pub size: Span,
    /// A window begins at each multiple of this since 1970 UTC; `size` unless set.
    #[serde(default)]
    pub every: Option<Span>,
    /// A session ends when nothing came for so long.
    #[serde(default)]
    pub gap: Option<Span>,
    #[serde(default)]
    pub by: By,
    #[serde(default = "usual")]
    pub aggregates: Vec<AggregateKind>,
}

/// What a window's rows stand for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum By {
    #[default]
    Device,
    All,
    /// These fields, and the device if `device` is among them.
    Fields {
        device: bool,
        fields: Vec<FieldName>,
    },
}

/// What is told of a field. Text and truth values have `first` and `last` alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AggregateKind {
    Min,
    Max,
    Avg,
    Sum,
    First,
    Last,
    /// Of a sample: null for one value.
    Stddev,
    P50,
    P95,
    P99,
    /// How much a counter grew; where it falls it began anew from 0.
    Increase,
    /// `increase` in a second, between the first and the last value.
    Rate,
}

fn none() -> Span {
    Span(Duration::ZERO)
}

fn usual() -> Vec<AggregateKind> {
    use AggregateKind::{Avg, First, Last, Max, Min, Sum};
    vec![Min, Max, Avg, Sum, First, Last]
}

impl AggregateKind {
    /// Behind the field's name in the column's.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Min => "min",
            Self::Max => "max",
            Self::Avg => "avg",
            Self::Sum => "sum",
            Self::First => "first",
            Self::Last => "last",
            Self::Stddev => "stddev",
            Self::P50 => "p50",
            Self::P95 => "p95",
            Self::P99 => "p99",
            Self::Increase => "increase",
            Self::Rate => "rate",
        }
    }

    /// The type of its column. None when fields of this type do not have it.
    pub fn of(self, kind: FieldType) -> Option<FieldType> {
        match (self, kind) {
            (Self::First | Self::Last, _) => Some(kind),
            (Self::Min | Self::Max | Self::Sum, FieldType::Int64) => Some(kind),
            (_, FieldType::Float64 | FieldType::Int64) => Some(FieldType::Float64),
            _ => None,
        }
    }
}

/// The longest window, and the most that one row may be in.
const WINDOW_MAX: Duration = Duration::from_secs(366 * 86_400);
const OVERLAP_MAX: u128 = 1_000;

impl WindowSettings {
    /// How far apart windows begin, in µs; 0 for sessions.
    pub fn every_us(&self) -> i64 {
        self.every.unwrap_or(self.size).micros()
    }

    /// The beginning of the last window that an event time lies in. None for sessions.
    pub fn last_start(&self, ts: i64) -> Option<i64> {
        self.gap.is_none().then(|| ts.div_euclid(self.every_us()) * self.every_us())
    }

    pub(super) fn check(&self, fields: &[(FieldName, FieldSettings)]) -> Result<(), String> {
        let every = self.every.map_or(self.size.0, |every| every.0);
        match self.gap {
            Some(gap) if !self.size.0.is_zero() || self.every.is_some() || gap.0.is_zero() || gap.0 > WINDOW_MAX => {
                return Err("a session has a gap from 1 ms to 366 days, and neither size nor every".to_owned());
            }
            None if self.size.0.is_zero() || self.size.0 > WINDOW_MAX => {
                return Err("size must be from 1 ms to 366 days".to_owned());
            }
            None if every.is_zero() || every > self.size.0 => {
                return Err("every must be more than 0 and at most size".to_owned());
            }
            None if self.size.0.as_micros().div_ceil(every.as_micros()) > OVERLAP_MAX => {
                return Err(format!("a reading would be in more than {OVERLAP_MAX} windows: make every longer"));
            }
            _ => {}
        }
        for (index, kind) in self.aggregates.iter().enumerate() {
            if self.aggregates[..index].contains(kind) {
                return Err(format!("aggregates has {} twice", kind.suffix()));
            }
        }
        for (field, settings) in fields {
            for kind in self.aggregates.iter().filter(|kind| kind.of(settings.kind).is_some()) {
                let column = format!("{field}_{}", kind.suffix());
                column.parse::<FieldName>().map_err(|error| format!("the column `{column}`: {error}"))?;
            }
        }
        let By::Fields { fields: by, .. } = &self.by else { return Ok(()) };
        for (index, field) in by.iter().enumerate() {
            let kind = fields.iter().find(|(name, _)| name == field).map(|(_, settings)| settings.kind);
            if !matches!(kind, Some(FieldType::Text | FieldType::Int64 | FieldType::Bool))
                || by[..index].contains(field)
            {
                return Err(format!("by: `{field}` must be a field of the stream, text, int64 or bool, named once"));
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for By {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;
        impl<'de> Visitor<'de> for Written {
            type Value = By;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"device\", \"all\", or a list of fields")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<By, E> {
                match text {
                    "device" => Ok(By::Device),
                    "all" => Ok(By::All),
                    _ => Err(E::custom(format!("`{text}`: by is \"device\", \"all\", or a list of fields"))),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<By, A::Error> {
                let (mut device, mut fields) = (false, Vec::new());
                while let Some(name) = list.next_element::<String>()? {
                    match name.as_str() {
                        "device" => device = true,
                        name => fields.push(name.parse().map_err(A::Error::custom)?),
                    }
                }
                match (device, fields.is_empty()) {
                    (true, true) => Ok(By::Device),
                    (false, true) => Err(A::Error::custom("by is empty: write \"all\"")),
                    (device, false) => Ok(By::Fields { device, fields }),
                }
            }
        }
        deserializer.deserialize_any(Written)
    }
}
