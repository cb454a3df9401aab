//! JSON, read once from left to right: only the places that the mapping names are kept, the rest is passed over.
//!
//! The pointers of a mapping make a tree; a visitor walks it along with the document, and a value that is wanted is read
//! from its own characters: integers are exact, floats are the nearest (serde_json's own floats may differ in the last
//! bit); a number too large for a float is an error of the whole document. Of equal keys the last counts. What is passed
//! over takes no stack, and what is walked is as deep as the mapping.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::config::Pointer;

/// A value at a place.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scalar<'a> {
    /// Null, or nothing there.
    Null,
    Bool(bool),
    Int(i64),
    /// Above what an i64 holds.
    Unsigned(u64),
    Float(f64),
    Text(Cow<'a, str>),
    Object,
    Array,
}

/// A fault of a document: reason and detail.
pub(super) type Fault = (&'static str, String);

/// The places that are wanted, as a tree.
#[derive(Debug, Default)]
struct Node {
    children: Vec<(String, Node)>,
    slot: Option<usize>,
    /// The array of readings stands here.
    readings: bool,
    /// It stands here or below.
    leads_to_readings: bool,
}

/// What is wanted of each message and of each reading.
#[derive(Debug)]
pub(super) struct Scan {
    message: Node,
    message_slots: usize,
    reading: Node,
    reading_slots: usize,
    /// Whether a mapping says where readings stand; if not, the root is one or an array of them.
    nested: bool,
}

/// A message, read.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) slots: Vec<Scalar<'a>>,
    /// When the message is one reading: its values.
    pub(super) reading: Vec<Scalar<'a>>,
    /// Else where each reading stands in the text.
    pub(super) readings: Option<Vec<Range<usize>>>,
}

impl Scalar<'_> {
    pub(super) fn reborrow(&self) -> Scalar<'_> {
        match self {
            Scalar::Text(text) => Scalar::Text(Cow::Borrowed(text)),
            Scalar::Null => Scalar::Null,
            Scalar::Bool(value) => Scalar::Bool(*value),
            Scalar::Int(value) => Scalar::Int(*value),
            Scalar::Unsigned(value) => Scalar::Unsigned(*value),
            Scalar::Float(value) => Scalar::Float(*value),
            Scalar::Object => Scalar::Object,
            Scalar::Array => Scalar::Array,
        }
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        match self {
            Scalar::Null => "null".to_owned(),
            Scalar::Bool(value) => format!("{value}"),
            Scalar::Int(value) => format!("{value}"),
            Scalar::Unsigned(value) => format!("{value}"),
            Scalar::Float(value) => format!("{value}"),
            Scalar::Text(text) => format!("the text {:?}", text.chars().take(80).collect::<String>()),
            Scalar::Object => "an object".to_owned(),
            Scalar::Array => "an array".to_owned(),
        }
    }
}

impl Node {
    fn at(&mut self, pointer: &Pointer) -> &mut Self {
        pointer.0.iter().fold(self, |node, step| {
            let index = node.children.iter().position(|(key, _)| key == step).unwrap_or_else(|| {
                node.children.push((step.clone(), Self::default()));
                node.children.len() - 1
            });
            &mut node.children[index].1
        })
    }

    fn slot(&mut self, pointer: &Pointer, slots: &mut usize) -> usize {
        *self.at(pointer).slot.get_or_insert_with(|| {
            *slots += 1;
            *slots - 1
        })
    }

    fn child(&self, key: &str) -> Option<&Self> {
        self.children.iter().find(|(step, _)| step == key).map(|(_, node)| node)
    }
}

impl Scan {
    pub(super) fn new(readings: Option<&Pointer>) -> Self {
        let mut message = Node::default();
        if let Some(pointer) = readings {
            for steps in 0..=pointer.0.len() {
                message.at(&Pointer(pointer.0[..steps].to_vec())).leads_to_readings = true;
            }
            message.at(pointer).readings = true;
        }
        Self { message, message_slots: 0, reading: Node::default(), reading_slots: 0, nested: readings.is_some() }
    }

    pub(super) fn of_reading(&mut self, pointer: &Pointer) -> usize {
        self.reading.slot(pointer, &mut self.reading_slots)
    }

    pub(super) fn of_message(&mut self, pointer: &Pointer) -> usize {
        self.message.slot(pointer, &mut self.message_slots)
    }

    /// Reads a message, and with it its only reading.
    pub(super) fn message<'a>(&self, text: &'a str) -> Result<Message<'a>, Fault> {
        let array = text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('[');
        if self.nested {
            let mut slots = vec![Scalar::Null; self.message_slots];
            let mut readings = None;
            walk(text, &self.message, &mut slots, Some(&mut readings))?;
            let readings = readings.ok_or(("no_readings", "no array stands where `readings` points".to_owned()))?;
            return Ok(Message { slots, reading: Vec::new(), readings: Some(spans(text, &readings)) });
        }
        if array {
            let readings: Vec<&RawValue> = serde_json::from_str(text).map_err(fault)?;
            let slots = vec![Scalar::Null; self.message_slots];
            return Ok(Message { slots, reading: Vec::new(), readings: Some(spans(text, &readings)) });
        }
        let reading = self.reading(text)?;
        let mut slots = vec![Scalar::Null; self.message_slots];
        if self.message_slots > 0 {
            walk(text, &self.message, &mut slots, None)?;
        }
        Ok(Message { slots, reading, readings: None })
    }

    /// Reads one reading.
    pub(super) fn reading<'a>(&self, text: &'a str) -> Result<Vec<Scalar<'a>>, Fault> {
        let mut slots = vec![Scalar::Null; self.reading_slots];
        walk(text, &self.reading, &mut slots, None)?;
        Ok(slots)
    }
}

fn spans(text: &str, readings: &[&RawValue]) -> Vec<Range<usize>> {
    let base = text.as_ptr().addr();
    readings
        .iter()
        .map(|reading| {
            // A borrowed raw value is a part of the text that it was read from.
            let start = reading.get().as_ptr().addr() - base;
            start..start + reading.get().len()
        })
        .collect()
}

fn walk<'a>(
    text: &'a str,
    node: &Node,
    slots: &mut [Scalar<'a>],
    readings: Option<&mut Option<Vec<&'a RawValue>>>,
) -> Result<(), Fault> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Walk { node, slots, readings }.deserialize(&mut deserializer).map_err(fault)?;
    deserializer.end().map_err(fault)
}

fn fault(error: serde_json::Error) -> Fault {
    ("malformed", error.to_string())
}

/// Walks one value along with one node.
struct Walk<'n, 's, 'a, 'r> {
    node: &'n Node,
    slots: &'s mut [Scalar<'a>],
    readings: Option<&'r mut Option<Vec<&'a RawValue>>>,
}

impl<'a> DeserializeSeed<'a> for Walk<'_, '_, 'a, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.node.readings {
            // What is no array is no error of the document: the caller finds no readings.
            let raw: &RawValue = serde::Deserialize::deserialize(deserializer)?;
            if let Some(readings) = self.readings {
                *readings = serde_json::from_str(raw.get()).ok();
            }
            return Ok(());
        }
        if self.node.children.is_empty() {
            let raw: &RawValue = serde::Deserialize::deserialize(deserializer)?;
            let value = scalar(raw.get()).ok_or_else(|| D::Error::custom("number out of range"))?;
            self.put(value);
            return Ok(());
        }
        deserializer.deserialize_any(self)
    }
}

/// A value from its characters, which are right; None when a number is too large for a float.
fn scalar(text: &str) -> Option<Scalar<'_>> {
    Some(match text.as_bytes().first() {
        Some(b'n') | None => Scalar::Null,
        Some(b't') => Scalar::Bool(true),
        Some(b'f') => Scalar::Bool(false),
        Some(b'{') => Scalar::Object,
        Some(b'[') => Scalar::Array,
        Some(b'"') if !text.contains('\\') => Scalar::Text(Cow::Borrowed(&text[1..text.len() - 1])),
        Some(b'"') => Scalar::Text(Cow::Owned(serde_json::from_str(text).ok()?)),
        Some(_) => match text.parse::<i64>() {
            // A float: "-0" is not the integer 0.
            Ok(0) if text.starts_with('-') => Scalar::Float(-0.0),
            Ok(number) => Scalar::Int(number),
            Err(_) => match text.parse::<u64>() {
                Ok(number) => Scalar::Unsigned(number),
                Err(_) => Scalar::Float(text.parse::<f64>().ok().filter(|number| number.is_finite())?),
            },
        },
    })
}

impl<'a> Walk<'_, '_, 'a, '_> {
    fn put(mut self, value: Scalar<'a>) {
        self.begin(value);
    }

    /// Of equal keys the last counts: what an earlier value had here and below is gone.
    fn begin(&mut self, value: Scalar<'a>) {
        if let Some(slot) = self.node.slot {
            self.slots[slot] = value;
        }
        forget(self.node, self.slots);
        if self.node.leads_to_readings
            && let Some(readings) = &mut self.readings
        {
            **readings = None;
        }
    }
}

fn forget(node: &Node, slots: &mut [Scalar<'_>]) {
    for (_, child) in &node.children {
        if let Some(slot) = child.slot {
            slots[slot] = Scalar::Null;
        }
        forget(child, slots);
    }
}

impl<'a> Visitor<'a> for Walk<'_, '_, 'a, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.put(Scalar::Null);
        Ok(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.put(Scalar::Bool(value));
        Ok(())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.put(Scalar::Int(value));
        Ok(())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.put(i64::try_from(value).map_or(Scalar::Unsigned(value), Scalar::Int));
        Ok(())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.put(Scalar::Float(value));
        Ok(())
    }

    fn visit_borrowed_str<E: Error>(self, value: &'a str) -> Result<(), E> {
        self.put(Scalar::Text(Cow::Borrowed(value)));
        Ok(())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.put(Scalar::Text(Cow::Owned(value.to_owned())));
        Ok(())
    }

    fn visit_map<A: MapAccess<'a>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.begin(Scalar::Object);
        let Self { node, slots, mut readings } = self;
        while let Some(child) = map.next_key_seed(Step(node))? {
            match child {
                Some(node) => map.next_value_seed(Walk { node, slots, readings: readings.as_deref_mut() })?,
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'a>>(mut self, mut seq: A) -> Result<(), A::Error> {
        self.begin(Scalar::Array);
        let Self { node, slots, mut readings } = self;
        for index in 0_usize.. {
            let child = if node.children.is_empty() { None } else { node.child(&index.to_string()) };
            let more = match child {
                Some(node) => seq.next_element_seed(Walk { node, slots, readings: readings.as_deref_mut() })?.is_some(),
                None => seq.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                break;
            }
        }
        Ok(())
    }
}

/// Reads a key without keeping it: the node below it, if that is wanted.
struct Step<'n>(&'n Node);

impl<'a, 'n> DeserializeSeed<'a> for Step<'n> {
    type Value = Option<&'n Node>;
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'n> Visitor<'_> for Step<'n> {
    type Value = Option<&'n Node>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.child(key))
    }
}
