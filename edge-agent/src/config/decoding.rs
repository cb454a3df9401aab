//! How the messages of a source become readings: their format, where readings stand, which of them are meant, and the
//! mapping. The places that a mapping may name depend on the format and are checked here:
//!
//! ```text
//! json, cbor         any pointer; "message:/…" and "key:0" when `readings` says where readings stand
//! senml, senml_cbor  /name /unit /value /sum /time /update_time; with `spread` /values/<name or unit> instead of /value
//! influx             /measurement /tags/<tag> /fields/<field> /time
//! csv                /<column>
//! raw                /value
//! sparkplug          /metrics/<name, slashes as they are> /time /id /group /node /device /type /online /is_historical
//! ```

use std::fmt;
use std::time::Duration;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
pub use wire::line::Precision;

use super::source::{MapSettings, Place, Pointer, TimePlace};
use super::{Span, StreamSettings};

/// How the messages of a source become readings.
#[derive(Debug, Clone, Default)]
pub struct Decoding {
    pub format: Format,
    pub readings: Option<Readings>,
    pub when: When,
    pub options: FormatOptions,
    pub map: MapSettings,
}

/// How a payload is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    #[default]
    Json,
    Senml,
    SenmlCbor,
    Cbor,
    Influx,
    Csv,
    Raw,
    Sparkplug,
}

/// What some formats need to be told; each key belongs to its format.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FormatOptions {
    /// CSV: the columns. Without it the first line of each message names them.
    pub header: Option<Vec<String>>,
    /// CSV: `,` unless set.
    pub delimiter: Option<char>,
    /// CSV: `"` unless set.
    pub quote: Option<char>,
    /// Influx: the unit of times; ns unless set.
    pub precision: Option<Precision>,
    /// SenML: the records of one time become one reading. Without it each record is a reading.
    pub spread: Option<Spread>,
    /// Sparkplug: metrics of all births that are kept; a birth beyond goes to quarantine. 100,000 unless set.
    pub metrics_max: Option<usize>,
    /// Sparkplug: whether nodes whose birth is not known are asked for it; they are unless set.
    pub rebirth: Option<bool>,
    /// Sparkplug: a node that does not answer a request for its birth is asked again after this; 30 s unless set.
    pub rebirth_every: Option<Span>,
}

/// Which SenML records are one reading, and what tells its fields apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// Same base name and time: `/values/<n>`; `/name` is the base name without a `:` or `/` at its end.
    Name,
    /// Same name and time: `/values/<unit>`.
    Unit,
}

/// Where the readings of a message stand: one pointer or several. A step `*` is each member of an object and each element
/// of an array; what stands at the end is a reading, or an array of readings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readings(pub Vec<Pointer>);

/// What a reading must satisfy to be meant: all of the conditions. The others are counted as filtered.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct When(pub Vec<Condition>);

/// One comparison of a place with constants.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    pub at: Place,
    pub test: Test,
}

/// What must hold of the value at a place. Numbers compare as numbers; a missing value is none of any constants.
#[derive(Debug, Clone, PartialEq)]
pub enum Test {
    Is(Constant),
    IsNot(Constant),
    AnyOf(Vec<Constant>),
    Above(f64),
    Below(f64),
    Exists(bool),
}

/// A constant of a condition.
#[derive(Debug, Clone, PartialEq)]
pub enum Constant {
    Text(String),
    Bool(bool),
    Number(f64),
}

impl Decoding {
    /// What is wrong with it, for people.
    pub(super) fn check(&self, stream_name: &str, stream: Option<&StreamSettings>) -> Result<(), String> {
        let Some(stream) = stream else {
            return Err(format!("there is no [stream.{stream_name}]: say there which fields it has"));
        };
        let map = &self.map;
        if map.device.is_none() {
            return Err("map has no `device`: say where its name stands, or write device = \"const:name\"".to_owned());
        }
        for (field, _) in &map.fields {
            if !stream.fields.iter().any(|(name, _)| name == field) {
                let near = stream.fields.iter().map(|(name, _)| name.as_str());
                let near = near.max_by(|a, b| {
                    let likeness = |name| strsim::jaro_winkler(field.as_str(), name);
                    likeness(a).total_cmp(&likeness(b))
                });
                let hint = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                return Err(format!("map: [stream.{stream_name}.fields] has no `{field}`{hint}"));
            }
        }
        self.check_options()?;
        let time = match &map.ts {
            TimePlace::Arrival => None,
            TimePlace::At(place, _) => Some(place),
        };
        let places = map.device.iter().chain(time).chain(map.fields.iter().map(|(_, place)| place));
        places.chain(self.when.0.iter().map(|condition| &condition.at)).try_for_each(|place| self.check_place(place))
    }

    /// What is right and can give no reading that is taken: `topics` are the filters of a broker's source.
    pub(super) fn warnings(&self, stream: &StreamSettings, topics: &[String]) -> Vec<String> {
        let map = &self.map;
        let unmapped = stream
            .fields
            .iter()
            .filter(|(name, field)| field.required && !map.fields.iter().any(|(mapped, _)| mapped == name));
        let unmapped = unmapped
            .map(|(name, _)| format!("`{name}` is required and map does not name it: every reading is rejected"));
        let time = match &map.ts {
            TimePlace::Arrival => None,
            TimePlace::At(place, _) => Some(place),
        };
        let places = map.device.iter().chain(time).chain(map.fields.iter().map(|(_, place)| place));
        let levels = places.filter_map(|place| if let Place::Topic(level) = place { Some(*level) } else { None });
        let beyond = levels.flat_map(|level| {
            let ends_before = move |topic: &&String| !topic.ends_with('#') && topic.split('/').count() <= level;
            topics.iter().filter(ends_before).map(move |topic| {
                let last = topic.split('/').count() - 1;
                format!("\"topic:{level}\": the levels of `{topic}` are 0 to {last}")
            })
        });
        unmapped.chain(beyond).collect()
    }

    fn check_options(&self) -> Result<(), String> {
        use Format::{Csv, Influx, Senml, SenmlCbor, Sparkplug};
        let options = &self.options;
        let of: [(&str, bool, &[Format]); 8] = [
            ("header", options.header.is_some(), &[Csv]),
            ("delimiter", options.delimiter.is_some(), &[Csv]),
            ("quote", options.quote.is_some(), &[Csv]),
            ("precision", options.precision.is_some(), &[Influx]),
            ("spread", options.spread.is_some(), &[Senml, SenmlCbor]),
            ("metrics_max", options.metrics_max.is_some(), &[Sparkplug]),
            ("rebirth", options.rebirth.is_some(), &[Sparkplug]),
            ("rebirth_every", options.rebirth_every.is_some(), &[Sparkplug]),
        ];
        if let Some((key, ..)) = of.iter().find(|(_, set, formats)| *set && !formats.contains(&self.format)) {
            return Err(format!("options: `{key}` has no meaning with format = \"{}\"", self.format));
        }
        let (delimiter, quote) = (options.delimiter.unwrap_or(','), options.quote.unwrap_or('"'));
        if !delimiter.is_ascii() || !quote.is_ascii() || delimiter == quote || "\r\n".contains([delimiter, quote]) {
            return Err("options: delimiter and quote are two different ASCII characters within a line".to_owned());
        }
        if options.header.as_ref().is_some_and(Vec::is_empty) {
            return Err("options: header is empty".to_owned());
        }
        if options.metrics_max == Some(0) || options.rebirth_every.is_some_and(|every| every.0 < Duration::from_secs(1))
        {
            return Err("options: metrics_max must be at least 1, rebirth_every at least 1 s".to_owned());
        }
        if self.readings.is_some() && !self.format.is_tree() {
            return Err(format!("readings has no meaning with format = \"{}\"", self.format));
        }
        Ok(())
    }

    fn check_place(&self, place: &Place) -> Result<(), String> {
        match place {
            Place::Topic(_) | Place::Constant(_) => Ok(()),
            Place::Message(_) if self.format.is_tree() => Ok(()),
            Place::Message(_) => Err(format!("\"message:…\" has no meaning with format = \"{}\"", self.format)),
            Place::Key(level) => {
                let stars = |pointer: &Pointer| pointer.0.iter().filter(|step| *step == "*").count();
                let levels = self.readings.iter().flat_map(|readings| &readings.0).map(stars).min().unwrap_or(0);
                if *level < levels {
                    return Ok(());
                }
                Err(format!(
                    "\"key:{level}\" is the name that a * in `readings` stands for, counted from 0: there is none"
                ))
            }
            Place::Reading(pointer) => self.check_pointer(pointer),
        }
    }

    fn check_pointer(&self, pointer: &Pointer) -> Result<(), String> {
        let steps = pointer.0.iter().map(String::as_str).collect::<Vec<_>>();
        let (right, places) = match self.format {
            Format::Json | Format::Cbor => return Ok(()),
            Format::Senml | Format::SenmlCbor => match (&steps[..], self.options.spread) {
                (["name" | "time"], _) => (true, ""),
                (["unit" | "value" | "sum" | "update_time"], None) | (["values", _], Some(_)) => (true, ""),
                (_, None) => (false, "/name, /unit, /value, /sum, /time, /update_time (or set options.spread)"),
                (_, Some(_)) => (false, "/name, /time, /values/… with spread"),
            },
            Format::Influx => (
                matches!(&steps[..], ["measurement" | "time"] | ["tags" | "fields", _]),
                "/measurement, /tags/…, /fields/…, /time",
            ),
            Format::Csv => {
                let named =
                    |header: &Vec<String>| steps.first().is_some_and(|step| header.iter().any(|name| name == step));
                (steps.len() == 1 && self.options.header.as_ref().is_none_or(named), "/column, as the header has it")
            }
            Format::Raw => (steps == ["value"], "/value"),
            Format::Sparkplug => (
                matches!(
                    &steps[..],
                    ["metrics", _, ..]
                        | ["time" | "id" | "group" | "node" | "device" | "type" | "online" | "is_historical"]
                ),
                "/metrics/…, /time, /id, /group, /node, /device, /type, /online, /is_historical",
            ),
        };
        if right {
            return Ok(());
        }
        Err(format!("`{pointer}` is no place with format = \"{}\": there are {places}", self.format))
    }
}

impl Format {
    /// Whether its messages are nested, so that pointers have a meaning.
    pub fn is_tree(self) -> bool {
        matches!(self, Self::Json | Self::Cbor)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Senml => "senml",
            Self::SenmlCbor => "senml_cbor",
            Self::Cbor => "cbor",
            Self::Influx => "influx",
            Self::Csv => "csv",
            Self::Raw => "raw",
            Self::Sparkplug => "sparkplug",
        })
    }
}

impl<'de> Deserialize<'de> for Readings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pointers;
        impl<'de> Visitor<'de> for Pointers {
            type Value = Readings;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pointer, or a list of pointers")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Readings, E> {
                Ok(Readings(vec![text.parse().map_err(E::custom)?]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Readings, A::Error> {
                let pointers = Vec::<Pointer>::deserialize(SeqAccessDeserializer::new(seq))?;
                if pointers.is_empty() {
                    return Err(A::Error::custom("`readings` names no place"));
                }
                Ok(Readings(pointers))
            }
        }
        deserializer.deserialize_any(Pointers)
    }
}

impl<'de> Deserialize<'de> for When {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Conditions;
        impl<'de> Visitor<'de> for Conditions {
            type Value = When;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a condition as { at = \"/type\", is = \"traffic\" }, or a list of them")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<When, A::Error> {
                Ok(When(vec![Condition::deserialize(MapAccessDeserializer::new(map))?]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<When, A::Error> {
                Ok(When(Vec::deserialize(SeqAccessDeserializer::new(seq))?))
            }
        }
        deserializer.deserialize_any(Conditions)
    }
}

impl<'de> Deserialize<'de> for Condition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            at: Place,
            is: Option<Constant>,
            is_not: Option<Constant>,
            any_of: Option<Vec<Constant>>,
            above: Option<f64>,
            below: Option<f64>,
            exists: Option<bool>,
        }
        let written = Written::deserialize(deserializer)?;
        let mut tests = [
            written.is.map(Test::Is),
            written.is_not.map(Test::IsNot),
            written.any_of.map(Test::AnyOf),
            written.above.map(Test::Above),
            written.below.map(Test::Below),
            written.exists.map(Test::Exists),
        ]
        .into_iter()
        .flatten();
        match (tests.next(), tests.next()) {
            (Some(test), None) => Ok(Self { at: written.at, test }),
            _ => Err(D::Error::custom("a condition has one of is, is_not, any_of, above, below, exists")),
        }
    }
}

impl<'de> Deserialize<'de> for Constant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Simple;
        impl Visitor<'_> for Simple {
            type Value = Constant;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, true or false")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Constant, E> {
                Ok(Constant::Text(text.to_owned()))
            }
            fn visit_bool<E: Error>(self, value: bool) -> Result<Constant, E> {
                Ok(Constant::Bool(value))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Constant, E> {
                Ok(Constant::Number(value as f64))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Constant, E> {
                Ok(Constant::Number(value))
            }
        }
        deserializer.deserialize_any(Simple)
    }
}
