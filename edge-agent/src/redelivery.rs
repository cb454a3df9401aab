//! What the journal says of each client: its deliveries, so that a redelivery is acknowledged and not stored twice, and what
//! the broker may have subscribed for it.
//!
//! The rule and its limits are in `docs/decisions/0001-redelivery.md`: a delivery with DUP set whose packet id and
//! checksum are those of the newest entry of that id is one that the journal has. The list reaches back
//! [`ID_SPAN_MAX`] packet ids; a new session empties it. A source keeps its own list to decide; the pipeline keeps the
//! same from what was journalled, for the snapshot, and at the start a scan of the journal brings it up to its end.
//!
//! A list as bytes: `last_id u16 | at u64 | count u32 | first at u64 | (id u16 | crc u32 | step u16)*`, all lists, version 2:
//! `version u8 = 2 | (client_len u8 | client | source_len u8 | source | session u64 | filters u16 | (len u16 | filter)* | list)*`.
//! Version 1, which is read, had no filters.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, Bytes};

use crate::entry::Entry;

/// Packet ids are 1 to 65,535; one that comes again after so many others is a new message.
pub const ID_SPAN_MAX: u64 = 61_440;
const IDS: u64 = 65_535;
const VERSION: u8 = 2;
/// Without filters.
const VERSION_1: u8 = 1;

/// One journalled delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    id: u16,
    crc: u32,
    /// How far the broker's counter had moved.
    at: u64,
    /// When its journal record is durable; 0 when it is.
    ticket: u64,
}

/// The deliveries of one client. See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct List {
    entries: VecDeque<Seen>,
    /// Entries dropped from the front so far: `entries[n]` is number `dropped + n`.
    dropped: u64,
    /// For each packet id the number of its newest entry, plus one; made with the first entry.
    newest: Vec<u64>,
    last_id: u16,
    at: u64,
}

/// A client, and the source that it belongs to.
#[derive(Debug, Clone, Default)]
pub struct Client {
    pub source: String,
    pub session: u64,
    /// At least what the broker has subscribed for it.
    pub filters: Vec<String>,
    pub list: List,
}

/// All clients, by their ids.
#[derive(Debug, Clone, Default)]
pub struct Lists(pub BTreeMap<String, Client>);

/// The bytes are no lists of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no redelivery lists of version {VERSION}")]
pub struct ListsError;

impl List {
    /// The ticket of the journalled original, if this delivery is a redelivery.
    pub fn recognise(&self, id: u16, dup: bool, crc: u32) -> Option<u64> {
        if !dup {
            return None;
        }
        let number = self.newest.get(usize::from(id)).copied()?.checked_sub(1)?;
        let seen = self.entries.get(usize::try_from(number.checked_sub(self.dropped)?).ok()?)?;
        (seen.crc == crc).then_some(seen.ticket)
    }

    /// A delivery was given to the journal.
    pub fn add(&mut self, id: u16, dup: bool, crc: u32, ticket: u64) {
        if self.last_id == 0 {
            self.last_id = id;
        } else {
            let step = match (u64::from(id) + IDS - u64::from(self.last_id)) % IDS {
                0 => IDS,
                step => step,
            };
            if step <= IDS / 2 {
                self.at += step;
                self.last_id = id;
            } else if !dup {
                // This broker does not count, or was rolled back: nothing that it sent before says anything now.
                self.clear();
                self.last_id = id;
            }
            // Else an old one that had left the list: neither moves.
        }
        if self.newest.is_empty() {
            self.newest = vec![0; usize::from(u16::MAX) + 1];
        }
        self.entries.push_back(Seen { id, crc, at: self.at, ticket });
        self.newest[usize::from(id)] = self.dropped + self.entries.len() as u64;
        while self.entries.front().is_some_and(|front| self.at - front.at >= ID_SPAN_MAX) {
            self.entries.pop_front();
            self.dropped += 1;
        }
    }

    /// A new session: what was delivered before says nothing any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.last_id.to_le_bytes());
        out.extend(self.at.to_le_bytes());
        out.extend((self.entries.len() as u32).to_le_bytes());
        let mut at = self.entries.front().map_or(0, |first| first.at);
        out.extend(at.to_le_bytes());
        for seen in &self.entries {
            out.extend(seen.id.to_le_bytes());
            out.extend(seen.crc.to_le_bytes());
            // One step of the counter is at most half of all ids.
            out.extend(((seen.at - at) as u16).to_le_bytes());
            at = seen.at;
        }
    }

    fn read(bytes: &mut Bytes) -> Option<Self> {
        let mut list = Self { last_id: bytes.try_get_u16_le().ok()?, ..Self::default() };
        list.at = bytes.try_get_u64_le().ok()?;
        let count = bytes.try_get_u32_le().ok()?;
        let mut at = bytes.try_get_u64_le().ok()?;
        if count > 0 {
            list.newest = vec![0; usize::from(u16::MAX) + 1];
        }
        for number in 1..=u64::from(count) {
            let (id, crc) = (bytes.try_get_u16_le().ok()?, bytes.try_get_u32_le().ok()?);
            at += u64::from(bytes.try_get_u16_le().ok()?);
            list.entries.push_back(Seen { id, crc, at, ticket: 0 });
            list.newest[usize::from(id)] = number;
        }
        // The newest entry cannot stand behind the counter.
        (at <= list.at || count == 0).then_some(list)
    }
}

impl Lists {
    /// Takes note of what the journal has.
    pub fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Message(message) => {
                let Some(delivery) = &message.delivery else { return };
                if !self.0.contains_key(&delivery.client) {
                    self.0.insert(delivery.client.clone(), Client::default());
                }
                let client = self.0.get_mut(&delivery.client).expect("it was put there");
                client.session = delivery.session;
                if client.source != message.source {
                    client.source.clone_from(&message.source);
                }
                client.list.add(delivery.packet_id, delivery.dup, delivery.crc, 0);
            }
            Entry::Session { client, session, resumed } => {
                let client = self.0.entry(client.clone()).or_default();
                client.session = *session;
                if !resumed {
                    client.list.clear();
                    client.filters.clear();
                }
            }
            Entry::Forgotten { client } => {
                self.0.remove(client);
            }
            Entry::Subscribed { client, filters } => {
                self.0.entry(client.clone()).or_default().filters.clone_from(filters);
            }
            Entry::Line { .. }
            | Entry::Refused { .. }
            | Entry::Missed { .. }
            | Entry::Tick { .. }
            | Entry::Configured { .. }
            | Entry::Clock(_) => {}
        }
    }

    /// Appends all lists as bytes.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        for (name, client) in &self.0 {
            for text in [name, &client.source] {
                let text = &text[..text.floor_char_boundary(usize::from(u8::MAX))];
                out.push(text.len() as u8);
                out.extend_from_slice(text.as_bytes());
            }
            out.extend(client.session.to_le_bytes());
            out.extend((client.filters.len() as u16).to_le_bytes());
            for filter in &client.filters {
                let filter = &filter[..filter.floor_char_boundary(usize::from(u16::MAX))];
                out.extend((filter.len() as u16).to_le_bytes());
                out.extend_from_slice(filter.as_bytes());
            }
            client.list.write(out);
        }
    }

    /// Reads what [`Lists::write`] wrote.
    ///
    /// # Errors
    /// When the bytes are something else.
    pub fn read(bytes: &Bytes) -> Result<Self, ListsError> {
        let mut bytes = bytes.clone();
        let version =
            bytes.try_get_u8().ok().filter(|version| matches!(*version, VERSION_1 | VERSION)).ok_or(ListsError)?;
        let mut lists = Self::default();
        while !bytes.is_empty() {
            let (name, client) = read_client(&mut bytes, version).ok_or(ListsError)?;
            lists.0.insert(name, client);
        }
        Ok(lists)
    }
}

fn read_client(bytes: &mut Bytes, version: u8) -> Option<(String, Client)> {
    let text = |bytes: &mut Bytes, len: usize| {
        let text = (bytes.len() >= len).then(|| bytes.split_to(len))?;
        String::from_utf8(text.to_vec()).ok()
    };
    let len = usize::from(bytes.try_get_u8().ok()?);
    let name = text(bytes, len)?;
    let len = usize::from(bytes.try_get_u8().ok()?);
    let source = text(bytes, len)?;
    let session = bytes.try_get_u64_le().ok()?;
    let mut filters = Vec::new();
    let count = if version == VERSION_1 { 0 } else { bytes.try_get_u16_le().ok()? };
    for _ in 0..count {
        let len = usize::from(bytes.try_get_u16_le().ok()?);
        filters.push(text(bytes, len)?);
    }
    Some((name, Client { source, session, filters, list: List::read(bytes)? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redelivery_is_one_with_dup_and_the_same_bytes() {
        let mut list = List::default();
        list.add(1, false, 10, 7);
        list.add(2, false, 20, 8);
        assert_eq!(list.recognise(1, true, 10), Some(7));
        assert_eq!(list.recognise(1, false, 10), None, "without dup it is new");
        assert_eq!(list.recognise(1, true, 11), None, "other bytes");
        assert_eq!(list.recognise(3, true, 10), None, "another id");
        list.clear();
        assert_eq!(list.recognise(1, true, 10), None, "another session");
    }

    #[test]
    fn the_same_bytes_one_wrap_later_are_new() {
        let mut list = List::default();
        list.add(1, false, 5, 0);
        for id in 2..=61_440_u16 {
            list.add(id, false, 9, 0);
        }
        assert_eq!(list.recognise(1, true, 5), Some(0));
        list.add(61_441, false, 9, 0);
        assert_eq!(list.recognise(1, true, 5), None, "61,440 ids later it may be another message");
        assert_eq!(list.recognise(2, true, 9), Some(0));
        for id in 61_442..=65_535_u16 {
            list.add(id, false, 9, 0);
        }
        list.add(1, false, 6, 0);
        assert_eq!(list.recognise(1, true, 6), Some(0));
        assert!(list.entries.len() <= ID_SPAN_MAX as usize);
    }

    #[test]
    fn a_counter_that_goes_back_empties_the_list_unless_it_is_a_redelivery() {
        let mut list = List::default();
        list.add(100, false, 1, 0);
        list.add(50, true, 2, 0);
        assert_eq!(list.recognise(100, true, 1), Some(0));
        list.add(50, false, 3, 0);
        assert_eq!(list.recognise(100, true, 1), None);
        assert_eq!(list.recognise(50, true, 3), Some(0));
    }

    #[test]
    fn lists_survive_their_bytes() {
        let mut lists = Lists::default();
        let client = lists.0.entry("c".to_owned()).or_default();
        client.source = "s".to_owned();
        client.session = 4;
        client.filters = vec!["city/traffic/+".to_owned(), "$share/g/#".to_owned()];
        for id in (1..=65_535_u16).chain(1..=30_000) {
            client.list.add(id, false, u32::from(id) * 3, 9);
        }
        lists.0.insert("empty".to_owned(), Client::default());
        let mut bytes = Vec::new();
        lists.write(&mut bytes);
        let back = Lists::read(&Bytes::from(bytes)).unwrap();
        let (one, other) = (&lists.0["c"], &back.0["c"]);
        assert_eq!((&one.source, one.session, &one.filters), (&other.source, other.session, &other.filters));
        for id in 1..=65_535_u16 {
            let crc = u32::from(id) * 3;
            let recognised = one.list.recognise(id, true, crc);
            assert_eq!(recognised.is_some(), other.list.recognise(id, true, crc).is_some(), "{id}");
        }
        assert_eq!(other.list.recognise(30_000, true, 90_000), Some(0), "what was read is durable");
        assert!(back.0["empty"].list.entries.is_empty());
    }

    #[test]
    fn lists_of_version_1_are_read() {
        let mut bytes = b"\x01\x01c\x01s".to_vec();
        bytes.extend(7_u64.to_le_bytes());
        // last id 3, at 2, one entry at 2: id 3, crc 9, step 0.
        bytes.extend(b"\x03\x00\x02\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00");
        bytes.extend(b"\x03\x00\x09\x00\x00\x00\x00\x00");
        let lists = Lists::read(&Bytes::from(bytes)).unwrap();
        let client = &lists.0["c"];
        assert_eq!((client.source.as_str(), client.session, client.filters.len()), ("s", 7, 0));
        assert_eq!(client.list.recognise(3, true, 9), Some(0));
        assert!(Lists::read(&Bytes::from_static(b"\x03")).is_err());
    }

    #[test]
    fn what_is_subscribed_is_what_was_said_last_until_the_session_ends() {
        let mut lists = Lists::default();
        let subscribed = |filters: &[&str]| Entry::Subscribed {
            client: "c".to_owned(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        };
        let session = |resumed| Entry::Session { client: "c".to_owned(), session: 1, resumed };
        lists.apply(&subscribed(&["a", "b"]));
        lists.apply(&subscribed(&["b"]));
        lists.apply(&session(true));
        assert_eq!(lists.0["c"].filters, ["b"]);
        lists.apply(&session(false));
        assert!(lists.0["c"].filters.is_empty(), "a new session has none");
    }
}
