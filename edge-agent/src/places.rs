//! How far each file source is in its file, by what the journal says: a line and its place are one record, so a crash
//! neither loses a line nor repeats one. In the snapshot, and at the start brought up to the journal's end by a scan.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::entry::{Entry, Place};

/// The place of each file source, by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places(pub BTreeMap<String, Place>);

impl Places {
    /// Takes note of what the journal has.
    pub fn apply(&mut self, entry: &Entry) {
        let Entry::Line { place, message } = entry else { return };
        match self.0.get_mut(&message.source) {
            Some(known) => *known = *place,
            None => {
                self.0.insert(message.source.clone(), *place);
            }
        }
    }
}
