//! Sparkplug B (3.0): births define metrics and aliases, data refer to them, deaths end them.
//!
//! The metrics of a message that have the same time become one reading; a metric that comes twice at one time begins a
//! reading of its own. A message without any metric that the mapping asks for is filtered, and so are commands, states, and
//! deaths, unless the mapping asks for `/online`. Data stand by themselves: a gap in `seq` does not make them wrong.
//!
//! What is known of each node is the decoder's state ([`Births`]), a function of the messages alone, kept in the pipeline's
//! snapshot. A gap, an unknown alias, or data of a node that was never born asks for its birth: a command `Node
//! Control/Rebirth`, again after `rebirth_every` as long as messages need it ([`Sparkplug::take_commands`]), unless `rebirth`
//! says that nobody is asked.

mod payload;

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use self::payload::{Metric, Payload, Raw};
use super::scalar::{Fault, Record, Scalar};
use crate::config::{FormatOptions, Pointer};

/// Metrics that are kept, unless set.
const METRICS_MAX: usize = 100_000;
/// A node is asked again after this, unless set.
const REBIRTH_EVERY_US: i64 = 30_000_000;
/// Longest topic that is read; its parts stand in each reading.
const TOPIC_BYTES_MAX: usize = 1_024;
/// So many bytes of a name count as one metric more, so that a number of metrics bounds what they take.
const NAME_BYTES: usize = 64;
/// What is asked for and not yet taken.
const COMMANDS_MAX: usize = 1_000;
const REBIRTH: &str = "Node Control/Rebirth";

/// A message that should be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub topic: String,
    pub payload: Vec<u8>,
}

/// What is known of the nodes, by `group/node`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Births {
    nodes: BTreeMap<String, Node>,
    /// What `nodes` count as, so that each birth need not count all.
    #[serde(skip)]
    kept: usize,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Node {
    /// Of the next message; None when it is not known.
    next_seq: Option<u8>,
    /// Of the birth; a death of another session is none.
    bd_seq: Option<u64>,
    /// When its birth was asked for and has not come since, µs.
    asked: Option<i64>,
    /// The metrics of the node itself (no name) and of its devices.
    devices: BTreeMap<String, Metrics>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Metrics {
    /// Name to type.
    types: BTreeMap<String, u32>,
    aliases: BTreeMap<u64, String>,
}

/// One place that is wanted.
#[derive(Debug)]
enum Place {
    Metric(String),
    Time,
    Id,
    Group,
    Node,
    Device,
    Type,
    Online,
    IsHistorical,
}

/// Reads messages. See the module's documentation.
#[derive(Debug)]
pub(super) struct Sparkplug {
    places: Vec<Place>,
    wants_online: bool,
    metrics_max: usize,
    rebirth: bool,
    rebirth_every_us: i64,
    pub(super) births: Births,
    commands: Vec<Command>,
}

/// Where a message belongs, from its topic.
#[derive(Clone, Copy)]
struct Address<'a> {
    group: &'a str,
    kind: &'a str,
    node: &'a str,
    device: Option<&'a str>,
}

/// What the metrics of a message are whose types it tells, each with a value of its kind as JSON has them, a large whole number
/// for those that are whole; None when the message is none, or of another form. For who looks at what nodes send.
pub(crate) fn defined(topic: &str, bytes: &[u8]) -> Option<Vec<(String, serde_json::Value)>> {
    let address = Address::of(topic).ok()??;
    let payload = Payload::read(bytes).ok()?;
    let metrics = payload.metrics.iter().filter(|_| address.is_birth()).filter_map(|metric| {
        let name = metric.name.filter(|name| !name.is_empty() && *name != "bdSeq" && !name.contains("Control/"))?;
        let value = match metric.datatype? {
            1..=8 | 13 => (i64::MAX / 2).into(),
            9 | 10 => 1.5.into(),
            11 => true.into(),
            12 | 14 | 15 => "".into(),
            _ => return None,
        };
        Some((name.to_owned(), value))
    });
    Some(metrics.collect())
}

impl Sparkplug {
    pub(super) fn new(places: &[Pointer], options: &FormatOptions) -> Self {
        let place = |pointer: &Pointer| match pointer.0[0].as_str() {
            "metrics" => Place::Metric(pointer.0[1..].join("/")),
            "id" => Place::Id,
            "group" => Place::Group,
            "node" => Place::Node,
            "device" => Place::Device,
            "type" => Place::Type,
            "online" => Place::Online,
            "is_historical" => Place::IsHistorical,
            _ => Place::Time,
        };
        let places = places.iter().map(place).collect::<Vec<_>>();
        Self {
            wants_online: places.iter().any(|place| matches!(place, Place::Online)),
            places,
            metrics_max: options.metrics_max.unwrap_or(METRICS_MAX),
            rebirth: options.rebirth.unwrap_or(true),
            rebirth_every_us: options.rebirth_every.map_or(REBIRTH_EVERY_US, |every| every.micros()),
            births: Births::default(),
            commands: Vec::new(),
        }
    }

    /// The commands since the last call.
    pub(super) fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// The state as it was.
    pub(super) fn restore(&mut self, births: Births) {
        self.births = births;
        self.births.kept = self.births.nodes.iter().map(|(key, node)| node.kept(key)).sum();
    }

    /// The readings of a message, and what is wrong with single metrics; nothing when the message is filtered.
    pub(super) fn records<'a>(
        &mut self,
        topic: &'a str,
        bytes: &'a [u8],
        arrival_us: i64,
    ) -> Result<Vec<Record<'a>>, Fault> {
        let Some(address) = Address::of(topic)? else { return Ok(Vec::new()) };
        let payload = Payload::read(bytes)?;
        if payload.uuid == Some("SPBV1.0_COMPRESSED") {
            return Err(("compressed", "compressed payloads are not read".to_owned()));
        }
        let message = Message { address, payload: &payload, bytes: bytes.len(), arrival_us };
        let key = format!("{}/{}", address.group, address.node);
        let device = address.device.unwrap_or_default();
        let gap = match address.kind {
            "NBIRTH" | "NDEATH" => false,
            _ => self.births.nodes.get_mut(&key).is_some_and(|node| node.follow(payload.seq)),
        };
        if gap {
            self.ask(&key, address, arrival_us);
        }
        if address.is_death() {
            if !self.births.death(&key, address, &payload) || !self.wants_online {
                return Ok(Vec::new());
            }
            let slots = self.places.iter().map(|place| place.of(&message, arrival_us, Some(false), None)).collect();
            return Ok(vec![Record { span: 0..bytes.len(), keys: &[], slots: Ok(slots) }]);
        }
        if address.is_birth() {
            self.births.birth(&key, address, &payload, self.metrics_max)?;
        }
        let node = self.births.nodes.get(&key);
        let known = node.and_then(|node| node.devices.get(device));
        let (records, unknown) = self.readings(&message, known);
        let waits = node.is_some_and(|node| node.asked.is_some());
        if unknown || known.is_none() || waits {
            self.ask(&key, address, arrival_us);
        }
        Ok(records)
    }

    /// The readings of births and data, and whether an alias is unknown.
    fn readings<'a>(&self, message: &Message<'a, '_>, known: Option<&Metrics>) -> (Vec<Record<'a>>, bool) {
        let whole = 0..message.bytes;
        let online = message.address.is_birth().then_some(true);
        let mut records = Vec::<Record<'a>>::new();
        let mut at = HashMap::new();
        let mut unknown = Vec::new();
        let fresh = |records: &mut Vec<Record<'a>>, time, historical| {
            let slots = self.places.iter().map(|place| place.of(message, time, online, Some(historical))).collect();
            records.push(Record { span: whole.clone(), keys: &[], slots: Ok(slots) });
            records.len() - 1
        };
        let mut faults = Vec::new();
        for metric in &message.payload.metrics {
            let by_alias = || metric.alias.and_then(|alias| known?.aliases.get(&alias)).map(String::as_str);
            let Some(name) = metric.name.filter(|name| !name.is_empty()).or_else(by_alias) else {
                unknown.push(metric.alias);
                continue;
            };
            let wanted = |place: &Place| matches!(place, Place::Metric(wanted) if wanted == name);
            let Some(slot) = self.places.iter().position(wanted) else { continue };
            let kind = metric.datatype.or_else(|| known?.types.get(name).copied());
            let value = match metric.scalar(kind) {
                Ok(value) => value,
                Err(what) => {
                    faults.push(("wrong_type", format!("the metric {name:?} {what}")));
                    continue;
                }
            };
            let time = metric.timestamp.or(message.payload.timestamp).map_or(message.arrival_us, micros);
            let key = (time, metric.is_historical);
            let mut record = *at.entry(key).or_insert_with(|| fresh(&mut records, time, metric.is_historical));
            // The same metric twice at one time: both are readings.
            if records[record].slots.as_ref().is_ok_and(|slots| slots[slot] != Scalar::Null) {
                record = fresh(&mut records, time, metric.is_historical);
                at.insert(key, record);
            }
            if let Ok(slots) = &mut records[record].slots {
                slots[slot] = value;
            }
        }
        if records.is_empty() && self.wants_online && online.is_some() {
            fresh(&mut records, message.payload.timestamp.map_or(message.arrival_us, micros), false);
        }
        if !unknown.is_empty() {
            let shown = unknown.iter().take(20).map(|alias| alias.map_or("none".to_owned(), |alias| alias.to_string()));
            let detail = format!("{} metrics without a known name, aliases {}", unknown.len(), join(shown));
            faults.push(("unknown_alias", detail));
        }
        let fault = |fault| Record { span: whole.clone(), keys: &[], slots: Err(fault) };
        records.extend(faults.into_iter().map(fault));
        (records, !unknown.is_empty())
    }

    /// Asks a node for its birth, not too often. When there is no room to remember that, it is not asked.
    fn ask(&mut self, key: &str, address: Address<'_>, arrival_us: i64) {
        if !self.rebirth {
            return;
        }
        if !self.births.nodes.contains_key(key) {
            if self.births.kept >= self.metrics_max {
                return;
            }
            self.births.insert(key, Node::default());
        }
        let Some(node) = self.births.nodes.get_mut(key) else { return };
        let again = |asked| arrival_us.saturating_sub(asked) >= self.rebirth_every_us || arrival_us < asked;
        if !node.asked.is_none_or(again) {
            return;
        }
        node.asked = Some(arrival_us);
        if self.commands.len() < COMMANDS_MAX {
            let topic = format!("spBv1.0/{}/NCMD/{}", address.group, address.node);
            let payload = payload::command(REBIRTH, u64::try_from(arrival_us / 1_000).unwrap_or(0));
            self.commands.push(Command { topic, payload });
        }
    }
}

impl Births {
    fn insert(&mut self, key: &str, node: Node) {
        self.kept += node.kept(key);
        self.kept -= self.nodes.insert(key.to_owned(), node).map_or(0, |old| old.kept(key));
    }

    fn birth(&mut self, key: &str, address: Address<'_>, payload: &Payload<'_>, max: usize) -> Result<(), Fault> {
        let mut metrics = Metrics::default();
        for metric in &payload.metrics {
            let Some(name) = metric.name.filter(|name| !name.is_empty()) else { continue };
            metrics.types.insert(name.to_owned(), metric.datatype.unwrap_or(0));
            metrics.aliases.extend(metric.alias.map(|alias| (alias, name.to_owned())));
        }
        let device = address.device.unwrap_or_default();
        // A node's birth ends all that was known of it, a device's what was known of the device.
        let old = self.nodes.get(key).map_or(0, |node| match address.device {
            None => node.kept(key),
            Some(device) => node.devices.get(device).map_or(0, |metrics| metrics.kept(device)),
        });
        if self.kept - old + weight(key) + metrics.kept(device) > max {
            let detail = format!("more than {max} metrics are defined by the births of this source");
            return Err(("too_many_metrics", detail));
        }
        match address.device {
            None => {
                let next_seq = payload.seq.map(|seq| (seq as u8).wrapping_add(1));
                let devices = BTreeMap::from([(device.to_owned(), metrics)]);
                let node = Node { next_seq, bd_seq: payload.bd_seq(), asked: None, devices };
                self.insert(key, node);
            }
            Some(_) => {
                if !self.nodes.contains_key(key) {
                    self.insert(key, Node::default());
                }
                self.kept += metrics.kept(device);
                let node = self.nodes.entry(key.to_owned()).or_default();
                self.kept -= node.devices.insert(device.to_owned(), metrics).map_or(0, |old| old.kept(device));
            }
        }
        Ok(())
    }

    /// Whether it ends something; the death of an earlier session does not.
    fn death(&mut self, key: &str, address: Address<'_>, payload: &Payload<'_>) -> bool {
        if let Some(device) = address.device {
            let removed = self.nodes.get_mut(key).and_then(|node| node.devices.remove(device));
            self.kept -= removed.map_or(0, |metrics| metrics.kept(device));
            return true;
        }
        let of_birth = self.nodes.get(key).and_then(|node| node.bd_seq);
        if of_birth.zip(payload.bd_seq()).is_some_and(|(birth, death)| birth != death) {
            return false;
        }
        self.kept -= self.nodes.remove(key).map_or(0, |node| node.kept(key));
        true
    }
}

impl Metrics {
    /// What the metrics of this device count as.
    fn kept(&self, device: &str) -> usize {
        let names = |names: &mut dyn Iterator<Item = &String>| names.map(|name| weight(name)).sum::<usize>();
        weight(device) + names(&mut self.types.keys()).max(names(&mut self.aliases.values()))
    }
}

impl Node {
    /// What a node and its devices count as.
    fn kept(&self, key: &str) -> usize {
        weight(key) + self.devices.iter().map(|(device, metrics)| metrics.kept(device)).sum::<usize>()
    }

    /// Whether messages before this one are missing.
    fn follow(&mut self, seq: Option<u64>) -> bool {
        let Some(seq) = seq else { return false };
        let expected = self.next_seq.replace((seq as u8).wrapping_add(1));
        expected.is_some_and(|expected| u64::from(expected) != seq)
    }
}

impl Payload<'_> {
    /// The session that a birth or death belongs to.
    fn bd_seq(&self) -> Option<u64> {
        let metric = self.metrics.iter().find(|metric| metric.name == Some("bdSeq"))?;
        match metric.value {
            Some(Raw::Long(number)) => Some(number),
            Some(Raw::Int(number)) => Some(u64::from(number)),
            _ => None,
        }
    }
}

impl<'a> Metric<'a> {
    /// Its value by its type; the types are those of Sparkplug 3.0, 6.4.16.
    fn scalar(&self, kind: Option<u32>) -> Result<Scalar<'a>, String> {
        let unsigned = |number: u64| i64::try_from(number).map_or(Scalar::Unsigned(number), Scalar::Int);
        Ok(match (&self.value, kind.unwrap_or(0)) {
            _ if self.is_null => Scalar::Null,
            (None, _) => return Err("has no value".to_owned()),
            // Small signed numbers are sent with their own bits, or with their sign in all of 32.
            (Some(Raw::Int(bits)), 1) => Scalar::Int(i64::from(*bits as u8 as i8)),
            (Some(Raw::Int(bits)), 2) => Scalar::Int(i64::from(*bits as u16 as i16)),
            (Some(Raw::Int(bits)), 3 | 4) => Scalar::Int(i64::from(*bits as i32)),
            (Some(Raw::Int(number)), _) => Scalar::Int(i64::from(*number)),
            (Some(Raw::Long(bits)), 1..=4) => Scalar::Int(*bits as i64),
            (Some(Raw::Long(ms)), 13) => Scalar::Time(micros(*ms)),
            (Some(Raw::Long(number)), _) => unsigned(*number),
            (Some(Raw::Float(value)), _) => Scalar::Float(f64::from(*value)),
            (Some(Raw::Double(value)), _) => Scalar::Float(*value),
            (Some(Raw::Boolean(value)), _) => Scalar::Bool(*value),
            (Some(Raw::String(text)), _) => Scalar::Text((*text).into()),
            (Some(Raw::Other(what)), _) => return Err(format!("is {what}")),
        })
    }
}

/// A message with what its readings need.
struct Message<'a, 'p> {
    address: Address<'a>,
    payload: &'p Payload<'a>,
    bytes: usize,
    arrival_us: i64,
}

impl Place {
    /// All but metrics.
    fn of<'a>(
        &self,
        message: &Message<'a, '_>,
        time: i64,
        online: Option<bool>,
        historical: Option<bool>,
    ) -> Scalar<'a> {
        let Address { group, kind, node, device } = message.address;
        match self {
            Self::Metric(_) => Scalar::Null,
            Self::Time => Scalar::Time(time),
            Self::Id => Scalar::Text(message.address.id().into()),
            Self::Group => Scalar::Text(group.into()),
            Self::Node => Scalar::Text(node.into()),
            Self::Device => device.map_or(Scalar::Null, |device| Scalar::Text(device.into())),
            Self::Type => Scalar::Text(kind.into()),
            Self::Online => online.map_or(Scalar::Null, Scalar::Bool),
            Self::IsHistorical => historical.map_or(Scalar::Null, Scalar::Bool),
        }
    }
}

impl<'a> Address<'a> {
    /// None for what holds no readings: commands and the states of hosts.
    fn of(topic: &'a str) -> Result<Option<Self>, Fault> {
        if topic.len() > TOPIC_BYTES_MAX {
            return Err(("bad_topic", format!("a topic of {} bytes, more than {TOPIC_BYTES_MAX}", topic.len())));
        }
        let levels = topic.split('/').collect::<Vec<_>>();
        let (group, kind, node, device) = match levels[..] {
            ["spBv1.0", "STATE", ..] => return Ok(None),
            ["spBv1.0", group, kind @ ("NBIRTH" | "NDEATH" | "NDATA" | "NCMD"), node] => (group, kind, node, None),
            ["spBv1.0", group, kind @ ("DBIRTH" | "DDEATH" | "DDATA" | "DCMD"), node, device] => {
                (group, kind, node, Some(device))
            }
            _ => {
                let shown = topic.chars().take(80).collect::<String>();
                return Err(("bad_topic", format!("`{shown}` is not spBv1.0/group/type/node[/device]")));
            }
        };
        Ok((!kind.ends_with("CMD")).then_some(Self { group, kind, node, device }))
    }

    fn id(&self) -> String {
        let Self { group, node, .. } = self;
        self.device.map_or_else(|| format!("{group}/{node}"), |device| format!("{group}/{node}/{device}"))
    }

    fn is_birth(&self) -> bool {
        self.kind.ends_with("BIRTH")
    }

    fn is_death(&self) -> bool {
        self.kind.ends_with("DEATH")
    }
}

/// What a name counts as.
fn weight(name: &str) -> usize {
    1 + name.len() / NAME_BYTES
}

/// Times beyond what an i64 of µs holds are checked as too far in the future.
fn micros(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX).saturating_mul(1_000)
}

fn join(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}
