//! Where in a nested message the wanted values stand, and where its readings.

use std::ops::Range;
use std::rc::Rc;

use super::READINGS_MAX;
use super::scalar::{Fault, Scalar};
use crate::config::{Pointer, Readings};

/// The places that are wanted, as a tree.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) children: Vec<(String, Node)>,
    pub(super) slot: Option<usize>,
    /// The array of readings stands here.
    pub(super) readings: bool,
    /// It stands here or below.
    pub(super) leads_to_readings: bool,
}

/// What a value holds.
pub(super) enum Members {
    None,
    Object(Vec<(String, Range<usize>)>),
    Array(Vec<Range<usize>>),
}

/// A reading's place in a message, and what the `*` of `readings` stand for there. The readings of one array share them: a
/// key may be as long as the message.
pub(super) type Located = (Range<usize>, Rc<[String]>);

impl Node {
    pub(super) fn at(&mut self, pointer: &Pointer) -> &mut Self {
        pointer.0.iter().fold(self, |node, step| {
            let index = node.children.iter().position(|(key, _)| key == step).unwrap_or_else(|| {
                node.children.push((step.clone(), Self::default()));
                node.children.len() - 1
            });
            &mut node.children[index].1
        })
    }

    /// The places in the order of their slots.
    pub(super) fn of(places: &[Pointer]) -> Self {
        let mut root = Self::default();
        for (slot, pointer) in places.iter().enumerate() {
            root.at(pointer).slot = Some(slot);
        }
        root
    }

    pub(super) fn child(&self, key: &str) -> Option<&Self> {
        self.children.iter().find(|(step, _)| step == key).map(|(_, node)| node)
    }
}

/// What an earlier value had at and below a node is gone.
pub(super) fn forget(node: &Node, slots: &mut [Scalar<'_>]) {
    for (_, child) in &node.children {
        if let Some(slot) = child.slot {
            slots[slot] = Scalar::Null;
        }
        forget(child, slots);
    }
}

/// Where the readings stand; `members` opens the value at a range. A path that leads nowhere holds none.
pub(super) fn locate(
    readings: &Readings,
    whole: &Range<usize>,
    members: &impl Fn(&Range<usize>) -> Result<Members, Fault>,
) -> Result<Vec<Located>, Fault> {
    let mut found = Found { list: Vec::new(), any: false };
    for pointer in &readings.0 {
        found.follow(whole, &pointer.0, &mut Vec::new(), members)?;
    }
    if !found.any {
        return Err(("no_readings", "nothing stands where `readings` points".to_owned()));
    }
    Ok(found.list)
}

struct Found {
    list: Vec<Located>,
    /// A path led to readings, or to an array of none.
    any: bool,
}

impl Found {
    fn follow(
        &mut self,
        at: &Range<usize>,
        steps: &[String],
        keys: &mut Vec<String>,
        members: &impl Fn(&Range<usize>) -> Result<Members, Fault>,
    ) -> Result<(), Fault> {
        let Some((step, rest)) = steps.split_first() else {
            self.any = true;
            return match members(at)? {
                Members::Array(elements) => {
                    let keys = Rc::from(&keys[..]);
                    elements.into_iter().try_for_each(|span| self.push(span, &keys))
                }
                // Behind a * what is no array is a reading; a pointer without one says where the array is.
                _ if !keys.is_empty() => self.push(at.clone(), &Rc::from(&keys[..])),
                _ => Err(("no_readings", "no array stands where `readings` points".to_owned())),
            };
        };
        match members(at)? {
            Members::Object(list) if step == "*" => {
                for (key, span) in list {
                    keys.push(key);
                    self.follow(&span, rest, keys, members)?;
                    keys.pop();
                }
                Ok(())
            }
            Members::Array(list) if step == "*" => {
                for (index, span) in list.into_iter().enumerate() {
                    keys.push(index.to_string());
                    self.follow(&span, rest, keys, members)?;
                    keys.pop();
                }
                Ok(())
            }
            // Of equal keys the last counts.
            Members::Object(list) => match list.into_iter().rev().find(|(key, _)| key == step) {
                Some((_, span)) => self.follow(&span, rest, keys, members),
                None => Ok(()),
            },
            Members::Array(list) => match step.parse().ok().and_then(|index: usize| list.into_iter().nth(index)) {
                Some(span) => self.follow(&span, rest, keys, members),
                None => Ok(()),
            },
            Members::None => Ok(()),
        }
    }

    fn push(&mut self, span: Range<usize>, keys: &Rc<[String]>) -> Result<(), Fault> {
        if self.list.len() >= READINGS_MAX {
            return Err(too_many(self.list.len() + 1));
        }
        self.list.push((span, Rc::clone(keys)));
        Ok(())
    }
}

/// A message with more readings than are read.
pub(super) fn too_many(readings: usize) -> Fault {
    ("too_many", format!("{readings} readings are more than {READINGS_MAX}"))
}
