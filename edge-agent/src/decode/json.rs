//! JSON, read once from left to right: only the places that the mapping names are kept, the rest is passed over.
//!
//! The pointers of a mapping make a tree; a visitor walks it along with the document, and a value that is wanted is read
//! from its own characters: integers are exact, floats are the nearest (serde_json's own floats may differ in the last
//! bit); a number too large for a float is an error of the whole document. Of equal keys the last counts. What is passed
//! over takes no stack, and what is walked is as deep as the mapping.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::scalar::{Fault, Scalar};
use super::tree::{Located, Members, Node, forget, locate};
use crate::config::{Pointer, Readings};

/// What is wanted of each message and of each reading.
#[derive(Debug)]
pub(super) struct Scan {
    message: Node,
    message_slots: usize,
    reading: Node,
    reading_slots: usize,
    /// Whether a mapping says where readings stand; if not, the root is one or an array of them.
    nested: bool,
    /// Where they stand, when it is not one array.
    spread: Option<Readings>,
}

/// A message, read.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) slots: Vec<Scalar<'a>>,
    /// When the message is one reading: its values.
    pub(super) reading: Vec<Scalar<'a>>,
    /// Else where each reading stands in the text.
    pub(super) readings: Option<Vec<Located>>,
}

impl Scan {
    /// For these places in the message and in each reading.
    pub(super) fn new(readings: Option<&Readings>, message: &[Pointer], reading: &[Pointer]) -> Self {
        let mut root = Node::of(message);
        let (mut nested, mut spread) = (false, None);
        match readings {
            None => {}
            Some(Readings(pointers)) if pointers.len() == 1 && !pointers[0].0.iter().any(|step| step == "*") => {
                nested = true;
                let pointer = &pointers[0];
                for steps in 0..=pointer.0.len() {
                    root.at(&Pointer(pointer.0[..steps].to_vec())).leads_to_readings = true;
                }
                root.at(pointer).readings = true;
            }
            Some(readings) => spread = Some(readings.clone()),
        }
        let (message_slots, reading_slots) = (message.len(), reading.len());
        Self { message: root, message_slots, reading: Node::of(reading), reading_slots, nested, spread }
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
        if let Some(readings) = &self.spread {
            let mut slots = vec![Scalar::Null; self.message_slots];
            // Also without slots: what is no JSON is rejected whole.
            walk(text, &self.message, &mut slots, None)?;
            let located = locate(readings, &trimmed(text), &|span| members(text, span))?;
            return Ok(Message { slots, reading: Vec::new(), readings: Some(located) });
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

fn spans(text: &str, readings: &[&RawValue]) -> Vec<Located> {
    let keys = Rc::<[String]>::default();
    readings.iter().map(|reading| (span(text, reading), Rc::clone(&keys))).collect()
}

/// Where a text stands without the spaces around it; nowhere when it is nothing else.
pub(super) fn trimmed(text: &str) -> Range<usize> {
    let end = text.trim_end().len();
    text[..end].len() - text[..end].trim_start().len()..end
}

/// A borrowed raw value is a part of the text that it was read from.
fn span(text: &str, value: &RawValue) -> Range<usize> {
    let start = value.get().as_ptr().addr() - text.as_ptr().addr();
    start..start + value.get().len()
}

/// What the value at a range holds; keys that come twice are there twice.
pub(super) fn members(text: &str, at: &Range<usize>) -> Result<Members, Fault> {
    struct Entries<'a>(Vec<(String, &'a RawValue)>);
    impl<'a> serde::Deserialize<'a> for Entries<'a> {
        fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
            struct Each;
            impl<'a> Visitor<'a> for Each {
                type Value = Entries<'a>;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Entries<'a>, A::Error> {
                    let mut entries = Vec::new();
                    while let Some(entry) = map.next_entry()? {
                        entries.push(entry);
                    }
                    Ok(Entries(entries))
                }
            }
            deserializer.deserialize_map(Each)
        }
    }
    let value = &text[at.clone()];
    Ok(match value.as_bytes().first() {
        Some(b'{') => {
            let Entries(entries) = serde_json::from_str(value).map_err(fault)?;
            Members::Object(entries.into_iter().map(|(key, value)| (key, span(text, value))).collect())
        }
        Some(b'[') => {
            let elements: Vec<&RawValue> = serde_json::from_str(value).map_err(fault)?;
            Members::Array(elements.into_iter().map(|value| span(text, value)).collect())
        }
        _ => Members::None,
    })
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
pub(super) fn scalar(text: &str) -> Option<Scalar<'_>> {
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
