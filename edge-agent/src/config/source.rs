//! Where readings come from, and where in a message each value stands.

mod exec;
mod file;
mod http;
mod modbus;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use url::Url;
use wire::{EdgeId, FieldName, StreamName};

pub use self::exec::ExecSettings;
pub use self::file::FileSettings;
pub use self::http::HttpSettings;
pub use self::modbus::{
    ModbusAddress, ModbusSettings, Order, Parity, RegisterSettings, RegisterType, STATUS, Table, UnitSettings,
};
use super::decoding::{Decoding, Format, FormatOptions, Readings, When};
use super::{Size, Span, StreamSettings};

/// One source.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SourceSettings {
    Mqtt(Box<MqttSettings>),
    Http(Box<HttpSettings>),
    File(Box<FileSettings>),
    Exec(Box<ExecSettings>),
    Modbus(Box<ModbusSettings>),
    Host(HostSettings),
}

/// Topics of a broker.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqttSettings {
    /// Part of the client id, and the column `source` of quarantine; the name of the stream unless set.
    #[serde(default)]
    pub name: String,
    /// `mqtt://host:1883` or `mqtts://host:8883`.
    #[serde(deserialize_with = "url")]
    pub url: Url,
    #[serde(default)]
    pub version: MqttVersion,
    #[serde(default)]
    pub username: Option<String>,
    #[serde(default)]
    pub password: Option<String>,
    /// Instead of `password`: the first line of a file.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Certificates (PEM) to trust for mqtts.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// The client's own certificate and key (PEM), both or none.
    #[serde(default)]
    pub cert_file: Option<PathBuf>,
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// Fixed for ever: the broker keeps a session for it. With several connections `-2`, `-3`, … are appended.
    #[serde(default)]
    pub client_id: Option<String>,
    pub topics: Vec<String>,
    /// More than one share the topics as `$share/<group>/…`.
    #[serde(default = "one")]
    pub connections: u16,
    /// The group of a shared subscription; needed with several connections, allowed with one.
    #[serde(default)]
    pub share: Option<String>,
    /// MQTT 5: how many messages the broker may send without an acknowledgement.
    #[serde(default = "receive_maximum")]
    pub receive_maximum: u16,
    #[serde(default = "keep_alive")]
    pub keep_alive: Span,
    /// A longer payload goes to quarantine: its head, its length and its checksum.
    #[serde(default = "max_payload")]
    pub max_payload: Size,
    pub stream: StreamName,
    #[serde(default)]
    pub format: Format,
    /// Where the readings of a message stand. Without it a message that is an array holds readings, and any other message
    /// is one reading.
    #[serde(default)]
    pub readings: Option<Readings>,
    #[serde(default)]
    pub when: When,
    #[serde(default)]
    pub options: FormatOptions,
    #[serde(default)]
    pub map: MapSettings,
}

impl fmt::Debug for MqttSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("MqttSettings");
        shown.field("name", &self.name).field("host", &self.url.host_str()).field("topics", &self.topics);
        shown.field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// The protocol's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum MqttVersion {
    #[default]
    #[serde(rename = "5")]
    V5,
    #[serde(rename = "3.1.1")]
    V311,
}

/// The machine's own load, memory, disks, network and temperatures; the stream is always `host`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSettings {
    #[serde(default)]
    pub name: String,
    #[serde(default = "host_every")]
    pub every: Span,
    #[serde(skip, default = "host_stream")]
    pub stream: StreamName,
}

pub(super) fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Url, D::Error> {
    let text = String::deserialize(deserializer)?;
    Url::parse(&text).map_err(|error| {
        // Before an @ there may be a password.
        let shown = if text.contains('@') { "this".to_owned() } else { format!("`{text}`") };
        D::Error::custom(format!("{shown} is no address: {error}"))
    })
}

fn one() -> u16 {
    1
}

fn receive_maximum() -> u16 {
    1_000
}

fn keep_alive() -> Span {
    Span(Duration::from_secs(30))
}

fn max_payload() -> Size {
    Size(1 << 20)
}

fn host_every() -> Span {
    Span(Duration::from_secs(10))
}

fn host_stream() -> StreamName {
    "host".parse().expect("a name")
}

/// Where the values of a reading stand: `device`, `ts`, and each field by its name.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MapSettings {
    pub device: Option<Place>,
    pub ts: TimePlace,
    pub fields: Vec<(FieldName, Place)>,
}

/// A JSON pointer (RFC 6901), split into its steps; none is the whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pointer(pub Vec<String>);

/// Where one value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `"/speed/avg"`: in the reading.
    Reading(Pointer),
    /// `"message:/gateway/id"`: in the whole message, when it holds an array of readings.
    Message(Pointer),
    /// `"topic:2"`: a level of the topic, counted from 0.
    Topic(usize),
    /// `"key:0"`: the name that a `*` of `readings` stands for, counted from 0.
    Key(usize),
    /// `"const:north"`: always this.
    Constant(String),
}

/// Where the event time stands, and how it is written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum TimePlace {
    /// `ts = "arrival"`: when the message came in.
    #[default]
    Arrival,
    At(Place, TimeFormat),
}

/// How a time is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimeFormat {
    Rfc3339,
    /// A number since 1970 UTC, fractions allowed; so many of its units are a second.
    Epoch {
        per_second: i64,
    },
    /// strftime of chrono. `zone` is needed unless the format itself has an offset; in the hour that comes twice in
    /// autumn the earlier one is meant.
    Written {
        format: String,
        zone: Option<chrono_tz::Tz>,
    },
}

impl FromStr for Pointer {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let steps = text.strip_prefix('/').ok_or_else(|| format!("`{text}` is no JSON pointer: it begins with /"))?;
        Ok(Self(steps.split('/').map(|step| step.replace("~1", "/").replace("~0", "~")).collect()))
    }
}

impl FromStr for Place {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Reading(text.parse()?));
        }
        let help = || {
            format!(
                "`{text}` names no place: write \"/pointer\" (in the reading), \"message:/pointer\" (in the whole \
                 message), \"topic:2\" (a level of the topic, from 0), \"key:0\" (what a * in `readings` stands for), \
                 or \"const:text\""
            )
        };
        match text.split_once(':').ok_or_else(help)? {
            ("message", pointer) => Ok(Self::Message(pointer.parse()?)),
            ("topic", level) => level.parse().map(Self::Topic).map_err(|_| help()),
            ("key", level) => level.parse().map(Self::Key).map_err(|_| help()),
            ("const", value) => Ok(Self::Constant(value.to_owned())),
            _ => Err(help()),
        }
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|step| write!(f, "/{}", step.replace('~', "~0").replace('/', "~1")))
    }
}

impl<'de> Deserialize<'de> for Pointer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for TimePlace {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            at: Place,
            #[serde(default)]
            format: Option<String>,
            #[serde(default)]
            zone: Option<String>,
        }
        struct Time;
        impl<'de> Visitor<'de> for Time {
            type Value = TimePlace;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"arrival\", a place, or { at = …, format = …, zone = … }")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<TimePlace, E> {
                if text == "arrival" {
                    return Ok(TimePlace::Arrival);
                }
                Ok(TimePlace::At(text.parse().map_err(E::custom)?, TimeFormat::Rfc3339))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TimePlace, A::Error> {
                let written = Written::deserialize(MapAccessDeserializer::new(map))?;
                let format = TimeFormat::new(written.format.as_deref(), written.zone.as_deref());
                Ok(TimePlace::At(written.at, format.map_err(A::Error::custom)?))
            }
        }
        deserializer.deserialize_any(Time)
    }
}

impl TimeFormat {
    fn new(format: Option<&str>, zone: Option<&str>) -> Result<Self, String> {
        let zone = zone
            .map(|zone| zone.parse().map_err(|_| format!("`{zone}` is no time zone: write it as Europe/Copenhagen")))
            .transpose()?;
        let named = match format.unwrap_or("rfc3339") {
            "rfc3339" => Self::Rfc3339,
            "epoch_s" => Self::Epoch { per_second: 1 },
            "epoch_ms" => Self::Epoch { per_second: 1_000 },
            "epoch_us" => Self::Epoch { per_second: 1_000_000 },
            "epoch_ns" => Self::Epoch { per_second: 1_000_000_000 },
            written if written.contains('%') => {
                let items = chrono::format::StrftimeItems::new(written).parse();
                items.map_err(|_| format!("`{written}` is no strftime format"))?;
                let has_offset = ["%z", "%:z", "%::z", "%#z", "%+", "%s"].iter().any(|with| written.contains(with));
                if zone.is_none() && !has_offset {
                    return Err(format!("the time format `{written}` has no offset: add zone = \"Europe/Copenhagen\""));
                }
                return Ok(Self::Written { format: written.to_owned(), zone });
            }
            other => {
                return Err(format!(
                    "`{other}` is no time format: rfc3339, epoch_s, epoch_ms, epoch_us, epoch_ns, or one with %"
                ));
            }
        };
        match zone {
            Some(zone) => Err(format!("zone = \"{zone}\" has no meaning with a format that says its own offset")),
            None => Ok(named),
        }
    }
}

impl<'de> Deserialize<'de> for MapSettings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Places;
        impl<'de> Visitor<'de> for Places {
            type Value = MapSettings;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of places: device, ts, and the fields")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MapSettings, A::Error> {
                let mut places = MapSettings::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "device" => places.device = Some(map.next_value()?),
                        "ts" => places.ts = map.next_value()?,
                        name => places.fields.push((name.parse().map_err(A::Error::custom)?, map.next_value()?)),
                    }
                }
                Ok(places)
            }
        }
        deserializer.deserialize_map(Places)
    }
}

impl SourceSettings {
    /// Its name, unique among the sources.
    pub fn name(&self) -> &str {
        match self {
            Self::Mqtt(mqtt) => &mqtt.name,
            Self::Http(http) => &http.name,
            Self::File(file) => &file.name,
            Self::Exec(exec) => &exec.name,
            Self::Modbus(modbus) => &modbus.name,
            Self::Host(host) => &host.name,
        }
    }

    /// A source without a name takes that of its stream: it is part of client ids, paths and what the journal says, so
    /// it must not depend on the order in the file.
    pub(super) fn name_by_stream(&mut self) {
        let (name, stream) = match self {
            Self::Mqtt(mqtt) => (&mut mqtt.name, &mqtt.stream),
            Self::Http(http) => (&mut http.name, &http.stream),
            Self::File(file) => (&mut file.name, &file.stream),
            Self::Exec(exec) => (&mut exec.name, &exec.stream),
            Self::Modbus(modbus) => (&mut modbus.name, &modbus.stream),
            Self::Host(host) => (&mut host.name, &host.stream),
        };
        if name.is_empty() {
            *name = stream.to_string();
        }
    }

    /// The stream that its readings go to.
    pub fn stream(&self) -> &StreamName {
        match self {
            Self::Mqtt(mqtt) => &mqtt.stream,
            Self::Http(http) => &http.stream,
            Self::File(file) => &file.stream,
            Self::Exec(exec) => &exec.stream,
            Self::Modbus(modbus) => &modbus.stream,
            Self::Host(host) => &host.stream,
        }
    }

    /// How its messages are read; None for the host, whose mapping is its own.
    pub fn decoding(&self) -> Option<Decoding> {
        let (format, readings, when, options, map) = match self {
            Self::Mqtt(mqtt) => (mqtt.format, &mqtt.readings, &mqtt.when, &mqtt.options, &mqtt.map),
            Self::Http(http) => (http.format, &http.readings, &http.when, &http.options, &http.map),
            Self::File(file) => (file.format, &file.readings, &file.when, &file.options, &file.map),
            Self::Exec(exec) => (exec.format, &exec.readings, &exec.when, &exec.options, &exec.map),
            Self::Modbus(modbus) => return Some(Decoding { map: modbus.map(), ..Decoding::default() }),
            Self::Host(_) => return None,
        };
        let (readings, when, options, map) = (readings.clone(), when.clone(), options.clone(), map.clone());
        Some(Decoding { format, readings, when, options, map })
    }

    /// Whether messages come in as by the other settings, whatever is made of them then.
    pub fn comes_in_like(&self, other: &Self) -> bool {
        self.without_mapping() == other.without_mapping()
    }

    fn without_mapping(&self) -> Self {
        let mut settings = self.clone();
        let (readings, when, map) = match &mut settings {
            Self::Mqtt(mqtt) => (&mut mqtt.readings, &mut mqtt.when, &mut mqtt.map),
            Self::Http(http) => (&mut http.readings, &mut http.when, &mut http.map),
            Self::File(file) => (&mut file.readings, &mut file.when, &mut file.map),
            Self::Exec(exec) => (&mut exec.readings, &mut exec.when, &mut exec.map),
            Self::Modbus(_) | Self::Host(_) => return settings,
        };
        (*readings, *when, *map) = Default::default();
        settings
    }

    /// The longest message that is kept whole.
    pub fn max_payload(&self) -> Size {
        match self {
            Self::Mqtt(mqtt) => mqtt.max_payload,
            Self::Http(http) => http.max_payload,
            Self::File(file) => file.max_payload,
            Self::Exec(exec) => exec.max_payload,
            Self::Modbus(_) | Self::Host(_) => Size(0),
        }
    }

    pub(super) fn check(&self, stream: Option<&StreamSettings>, segment_bytes: Size) -> Result<(), String> {
        let own = match self {
            Self::Mqtt(mqtt) => mqtt.check(),
            Self::Http(http) => http.check(),
            Self::File(file) => file.check(),
            Self::Exec(exec) => exec.check(),
            Self::Modbus(modbus) => modbus.check(stream),
            Self::Host(host) if host.every.0 < HOST_EVERY_MIN => Err(format!("every is less than {HOST_EVERY_MIN:?}")),
            Self::Host(_) => Ok(()),
        };
        let read = || {
            let Some(mut decoding) = self.decoding() else { return Ok(()) };
            if matches!(self, Self::Modbus(_)) {
                // How a device answered is for streams that have a field for it.
                let has = |name: &FieldName| {
                    stream.is_some_and(|stream| stream.fields.iter().any(|(field, _)| field == name))
                };
                decoding.map.fields.retain(|(name, _)| name.as_str() != STATUS || has(name));
            }
            decoding.check(self.stream().as_str(), stream)
        };
        own.and_then(|()| self.check_payload(segment_bytes))
            .and_then(|()| read())
            .map_err(|error| format!("[[source]] `{}`: {error}", self.name()))
    }

    fn check_payload(&self, segment_bytes: Size) -> Result<(), String> {
        if self.max_payload().0 > MAX_PAYLOAD_MAX {
            return Err(format!("max_payload must be at most {} MiB", MAX_PAYLOAD_MAX >> 20));
        }
        if self.max_payload().0.saturating_mul(4) > segment_bytes.0 {
            return Err("max_payload must be at most a quarter of journal.segment_bytes".to_owned());
        }
        Ok(())
    }
}

/// The host is not read more often: its counters change no faster.
const HOST_EVERY_MIN: Duration = Duration::from_millis(200);
/// A payload is a value of one row, and a row fits into one batch.
const MAX_PAYLOAD_MAX: u64 = wire::BATCH_BYTES_MAX as u64 / 2;
/// Connections of one source.
const CONNECTIONS_MAX: u16 = 16;

impl MqttSettings {
    /// The client id of a connection, counted from 0.
    pub fn client(&self, edge: &EdgeId, connection: u16) -> String {
        let id = self.client_id.clone().unwrap_or_else(|| format!("weir-{edge}-{}", self.name));
        if connection == 0 { id } else { format!("{id}-{}", connection + 1) }
    }

    /// What is subscribed to.
    pub fn filters(&self) -> Vec<String> {
        let shared = |topic: &String| match &self.share {
            Some(group) => format!("$share/{group}/{topic}"),
            None => topic.clone(),
        };
        self.topics.iter().map(shared).collect()
    }

    /// One that only names a broker, for a client that publishes.
    pub(crate) fn of_broker(url: Url) -> Self {
        Self {
            name: String::new(),
            url,
            version: MqttVersion::default(),
            username: None,
            password: None,
            password_file: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            client_id: None,
            topics: Vec::new(),
            connections: one(),
            share: None,
            receive_maximum: receive_maximum(),
            keep_alive: keep_alive(),
            max_payload: max_payload(),
            stream: "alerts".parse().expect("a name"),
            format: Format::default(),
            readings: None,
            when: When::default(),
            options: FormatOptions::default(),
            map: MapSettings::default(),
        }
    }

    /// What is said of the broker itself.
    pub(super) fn check_broker(&self) -> Result<(), String> {
        if self.url.password().is_some() || !self.url.username().is_empty() {
            return Err("put user and password into `username` and `password`, not into the url".to_owned());
        }
        if self.password.is_some() && self.password_file.is_some() {
            return Err("it has both password and password_file: leave one out".to_owned());
        }
        if !matches!(self.url.scheme(), "mqtt" | "mqtts") || self.url.host_str().is_none() {
            return Err(format!("`{}` is no broker: write mqtt://host:1883 or mqtts://host:8883", self.url));
        }
        if self.url.scheme() == "mqtt" && (self.ca_file.is_some() || self.cert_file.is_some()) {
            return Err("certificates are for mqtts://".to_owned());
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return Err("cert_file and key_file go together".to_owned());
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        self.check_broker()?;
        if self.topics.is_empty() {
            return Err("topics is empty".to_owned());
        }
        if let Some(topic) = self.topics.iter().find(|topic| !is_filter(topic)) {
            return Err(format!("`{topic}` is no topic filter (for a shared one, set `share`)"));
        }
        if self.connections == 0 || self.connections > CONNECTIONS_MAX {
            return Err(format!("connections must be from 1 to {CONNECTIONS_MAX}"));
        }
        match &self.share {
            None if self.connections > 1 => return Err("several connections need `share`".to_owned()),
            Some(group) if group.is_empty() || group.contains(['/', '+', '#']) => {
                return Err(format!("`{group}` is no group of a shared subscription"));
            }
            _ => {}
        }
        if self.receive_maximum == 0 || self.keep_alive.0 < Duration::from_secs(5) {
            return Err("receive_maximum must be at least 1, keep_alive at least 5 s".to_owned());
        }
        Ok(())
    }
}

fn is_filter(topic: &str) -> bool {
    let levels = topic.split('/').collect::<Vec<_>>();
    let whole = |level: &str| !level.contains(['+', '#']) || level == "+" || level == "#";
    !topic.is_empty()
        && topic.len() <= usize::from(u16::MAX)
        && !topic.starts_with('$')
        && !topic.contains('\0')
        && levels.iter().all(|level| whole(level))
        && levels[..levels.len() - 1].iter().all(|level| *level != "#")
}
