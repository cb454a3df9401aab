//! What the journal records, in the order in which it happened: the only input of the pipeline.
//!
//! Layout, version 1, little-endian (`str8` is a length byte and UTF-8, `str16` a u16 length, `bytes32` a u32 length):
//! ```text
//! version u8 = 1 | kind u8
//! kind 1 message   source str8 | topic str16 | arrival i64 | delivery? u8
//!                  [ client str8 | session u64 | packet id u16 | dup u8 | crc u32 ]
//!                  | oversized? u8 [ length u64 | crc u32 ] | payload, or its head, to the end
//! kind 2 session   client str8 | session u64 | resumed u8
//! kind 3 forgotten client str8
//! kind 4 refused   spool [16] | seq u64 | reason str16 | schema str16 | one cut batch (wire::CutBatch::write) to the end
//! kind 5 missed    source str8 | messages u64 | bytes u64 | first i64 | last i64
//! kind 6 subscribed client str8 | (filter str16)* to the end
//! kind 7 line      device u64 | inode u64 | offset u64 | line u64 | checked u16 | crc u32 | a message, as of kind 1
//! kind 8 tick      now i64
//! kind 9 configured configuration u64 | its text, to the end
//! kind 10 clock    boot [16] | monotonic i64 | arrival i64 | correction i64 | error i64 | trust u8
//! ```
//! Times are µs since 1970 UTC, by a clock of the agent's own that never steps; what is behind a `clock` entry is corrected by
//! what that says (`clock.rs`). A journal without one goes by the gateway's clock.

use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};
use wire::{CutBatch, Seq, SpoolId};

use crate::clock::{Mark, Trust};

/// The journal's record kind of an entry.
pub const RECORD_KIND: u8 = 1;
const VERSION: u8 = 1;
const CLOCK_KIND: u8 = 10;
/// How much of an oversized payload is kept.
pub const HEAD_BYTES: usize = 4 << 10;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Message(Message),
    /// A message that is a line of a file, and where the file goes on behind it.
    Line {
        place: Place,
        message: Message,
    },
    /// A broker answered a connection: it kept the client's session, or began the one with this number.
    Session {
        client: String,
        session: u64,
        resumed: bool,
    },
    /// A client id is no longer configured, and its session has been ended.
    Forgotten {
        client: String,
    },
    /// The cloud refused a batch for good: its rows go to quarantine before the batch becomes void.
    Refused {
        spool: SpoolId,
        seq: Seq,
        reason: String,
        /// Canonical text of the schema of the batch.
        schema: String,
        batch: CutBatch,
    },
    /// Messages of a source that cannot wait, while the journal was full.
    Missed {
        source: String,
        messages: u64,
        bytes: u64,
        first_us: i64,
        last_us: i64,
    },
    /// All that the broker may have subscribed for a client: before more is subscribed, and after some are unsubscribed.
    Subscribed {
        client: String,
        filters: Vec<String>,
    },
    /// Nothing but the time: what the pipeline does when nothing comes goes by it.
    Tick {
        now_us: i64,
    },
    /// What comes behind goes by this configuration: its version, and its text without secrets.
    Configured {
        version: u64,
        text: String,
    },
    /// How far the times of what comes behind are off.
    Clock(Mark),
}

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub source: String,
    pub topic: String,
    pub payload: Payload,
    pub arrival_us: i64,
    /// None where nothing is redelivered.
    pub delivery: Option<Delivery>,
}

/// Which file on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

/// A place in a file, behind a line, and what that line is recognised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub file: FileId,
    /// Where the next line begins.
    pub offset: u64,
    /// What the line takes, its end included.
    pub line_bytes: u64,
    /// CRC32C of so many bytes of the line's beginning.
    pub check_bytes: u16,
    pub check_crc: u32,
}

/// What of a line is checked at most.
const CHECK_BYTES_MAX: usize = 1 << 10;

impl Place {
    /// Behind a line whose text begins with `text`.
    pub fn new(file: FileId, offset: u64, line_bytes: u64, text: &[u8]) -> Self {
        let checked = &text[..text.len().min(CHECK_BYTES_MAX)];
        Self { file, offset, line_bytes, check_bytes: checked.len() as u16, check_crc: crc32c::crc32c(checked) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        for number in [self.file.device, self.file.inode, self.offset, self.line_bytes] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.check_bytes.to_le_bytes());
        out.extend(self.check_crc.to_le_bytes());
    }

    fn read(bytes: &mut Bytes) -> Option<Self> {
        let mut number = || bytes.try_get_u64_le().ok();
        let file = FileId { device: number()?, inode: number()? };
        let (offset, line_bytes) = (number()?, number()?);
        let (check_bytes, check_crc) = (bytes.try_get_u16_le().ok()?, bytes.try_get_u32_le().ok()?);
        Some(Self { file, offset, line_bytes, check_bytes, check_crc })
    }
}

/// The bytes of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    Whole(Bytes),
    /// Longer than the source's `max_payload`: its beginning, its length, the CRC32C of all of it.
    Oversized {
        head: Bytes,
        len: u64,
        crc: u32,
    },
}

/// How a broker delivered it: what a redelivery is recognised by (decision 0001).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    pub client: String,
    pub session: u64,
    pub packet_id: u16,
    pub dup: bool,
    /// CRC32C of topic, 0x00 and payload.
    pub crc: u32,
}

/// Why bytes are no entry: the record's checksum was right, so another version wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a journal record of another version (version {version}, kind {kind})")]
pub struct EntryError {
    pub version: u8,
    pub kind: u8,
}

impl Entry {
    /// The message that it brings.
    pub fn message(&self) -> Option<&Message> {
        match self {
            Self::Message(message) | Self::Line { message, .. } => Some(message),
            _ => None,
        }
    }

    /// Appends the entry's bytes.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        match self {
            Self::Message(message) => {
                out.push(1);
                message.write(out);
            }
            Self::Session { client, session, resumed } => {
                out.push(2);
                put_str8(out, client);
                out.extend(session.to_le_bytes());
                out.push(u8::from(*resumed));
            }
            Self::Forgotten { client } => {
                out.push(3);
                put_str8(out, client);
            }
            Self::Refused { spool, seq, reason, schema, batch } => {
                out.push(4);
                out.extend(spool.0);
                out.extend(seq.0.to_le_bytes());
                put_str16(out, reason);
                put_str16(out, schema);
                batch.write(out);
            }
            Self::Missed { source, messages, bytes, first_us, last_us } => {
                out.push(5);
                put_str8(out, source);
                out.extend(messages.to_le_bytes());
                out.extend(bytes.to_le_bytes());
                out.extend(first_us.to_le_bytes());
                out.extend(last_us.to_le_bytes());
            }
            Self::Subscribed { client, filters } => {
                out.push(6);
                put_str8(out, client);
                filters.iter().for_each(|filter| put_str16(out, filter));
            }
            Self::Line { place, message } => {
                out.push(7);
                place.write(out);
                message.write(out);
            }
            Self::Tick { now_us } => {
                out.push(8);
                out.extend(now_us.to_le_bytes());
            }
            Self::Configured { version, text } => {
                out.push(9);
                out.extend(version.to_le_bytes());
                out.extend_from_slice(text.as_bytes());
            }
            Self::Clock(mark) => {
                out.push(CLOCK_KIND);
                out.extend(mark.boot);
                for number in [mark.monotonic_us, mark.arrival_us, mark.correction_us, mark.error_us] {
                    out.extend(number.to_le_bytes());
                }
                out.push(mark.trust as u8);
            }
        }
    }

    /// Reads an entry if it is about the clock, without a look at others.
    pub fn read_clock(bytes: &[u8]) -> Option<Mark> {
        match bytes {
            [VERSION, CLOCK_KIND, rest @ ..] => read_clock(rest),
            _ => None,
        }
    }

    /// Reads what [`Entry::write`] wrote; payloads are slices of `bytes`.
    ///
    /// # Errors
    /// When the bytes are of another version or kind, or cut short.
    pub fn read(bytes: Bytes) -> Result<Self, EntryError> {
        let error =
            EntryError { version: bytes.first().copied().unwrap_or(0), kind: bytes.get(1).copied().unwrap_or(0) };
        if error.version != VERSION || bytes.len() < 2 {
            return Err(error);
        }
        let rest = bytes.slice(2..);
        match error.kind {
            1 => Message::read(rest).map(Self::Message),
            2 => read_session(rest),
            3 => read_forgotten(rest),
            4 => read_refused(rest),
            5 => read_missed(rest),
            6 => read_subscribed(rest),
            7 => read_line(rest),
            8 => read_tick(rest),
            9 => read_configured(rest),
            CLOCK_KIND => read_clock(&rest).map(Self::Clock),
            _ => None,
        }
        .ok_or(error)
    }
}

impl Message {
    fn write(&self, out: &mut Vec<u8>) {
        put_str8(out, &self.source);
        put_str16(out, &self.topic);
        out.extend(self.arrival_us.to_le_bytes());
        out.push(u8::from(self.delivery.is_some()));
        if let Some(delivery) = &self.delivery {
            put_str8(out, &delivery.client);
            out.extend(delivery.session.to_le_bytes());
            out.extend(delivery.packet_id.to_le_bytes());
            out.push(u8::from(delivery.dup));
            out.extend(delivery.crc.to_le_bytes());
        }
        match &self.payload {
            Payload::Whole(payload) => {
                out.push(0);
                out.extend_from_slice(payload);
            }
            Payload::Oversized { head, len, crc } => {
                out.push(1);
                out.extend(len.to_le_bytes());
                out.extend(crc.to_le_bytes());
                out.extend_from_slice(head);
            }
        }
    }

    fn read(mut bytes: Bytes) -> Option<Self> {
        let source = take_str8(&mut bytes)?;
        let topic = take_str16(&mut bytes)?;
        let arrival_us = bytes.try_get_i64_le().ok()?;
        let delivery = match bytes.try_get_u8().ok()? {
            0 => None,
            _ => Some(Delivery {
                client: take_str8(&mut bytes)?,
                session: bytes.try_get_u64_le().ok()?,
                packet_id: bytes.try_get_u16_le().ok()?,
                dup: bytes.try_get_u8().ok()? == 1,
                crc: bytes.try_get_u32_le().ok()?,
            }),
        };
        let payload = match bytes.try_get_u8().ok()? {
            0 => Payload::Whole(bytes),
            _ => {
                let (len, crc) = (bytes.try_get_u64_le().ok()?, bytes.try_get_u32_le().ok()?);
                Payload::Oversized { head: bytes, len, crc }
            }
        };
        Some(Self { source, topic, payload, arrival_us, delivery })
    }
}

fn read_session(mut bytes: Bytes) -> Option<Entry> {
    let client = take_str8(&mut bytes)?;
    let session = bytes.try_get_u64_le().ok()?;
    Some(Entry::Session { client, session, resumed: bytes.try_get_u8().ok()? == 1 })
}

fn read_forgotten(mut bytes: Bytes) -> Option<Entry> {
    Some(Entry::Forgotten { client: take_str8(&mut bytes)? })
}

fn read_refused(mut bytes: Bytes) -> Option<Entry> {
    let mut spool = [0; 16];
    bytes.try_copy_to_slice(&mut spool).ok()?;
    let seq = Seq(bytes.try_get_u64_le().ok()?);
    let reason = take_str16(&mut bytes)?;
    let schema = take_str16(&mut bytes)?;
    let batch = CutBatch::read(&mut bytes).ok()?;
    Some(Entry::Refused { spool: SpoolId(spool), seq, reason, schema, batch })
}

fn read_missed(mut bytes: Bytes) -> Option<Entry> {
    Some(Entry::Missed {
        source: take_str8(&mut bytes)?,
        messages: bytes.try_get_u64_le().ok()?,
        bytes: bytes.try_get_u64_le().ok()?,
        first_us: bytes.try_get_i64_le().ok()?,
        last_us: bytes.try_get_i64_le().ok()?,
    })
}

fn read_subscribed(mut bytes: Bytes) -> Option<Entry> {
    let client = take_str8(&mut bytes)?;
    let mut filters = Vec::new();
    while !bytes.is_empty() {
        filters.push(take_str16(&mut bytes)?);
    }
    Some(Entry::Subscribed { client, filters })
}

fn read_line(mut bytes: Bytes) -> Option<Entry> {
    let place = Place::read(&mut bytes)?;
    Some(Entry::Line { place, message: Message::read(bytes)? })
}

fn read_tick(mut bytes: Bytes) -> Option<Entry> {
    Some(Entry::Tick { now_us: bytes.try_get_i64_le().ok()? })
}

fn read_configured(mut bytes: Bytes) -> Option<Entry> {
    let version = bytes.try_get_u64_le().ok()?;
    Some(Entry::Configured { version, text: String::from_utf8(bytes.into()).ok()? })
}

fn read_clock(mut bytes: &[u8]) -> Option<Mark> {
    let mut boot = [0; 16];
    bytes.try_copy_to_slice(&mut boot).ok()?;
    let mut number = || bytes.try_get_i64_le().ok();
    let (monotonic_us, arrival_us) = (number()?, number()?);
    let (correction_us, error_us) = (number()?, number()?);
    let trust = Trust::from_byte(bytes.try_get_u8().ok()?)?;
    Some(Mark { boot, monotonic_us, arrival_us, correction_us, error_us, trust })
}

fn clip(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

fn put_str8(out: &mut Vec<u8>, text: &str) {
    let text = clip(text, usize::from(u8::MAX));
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

fn put_str16(out: &mut Vec<u8>, text: &str) {
    let text = clip(text, usize::from(u16::MAX));
    out.extend((text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn take_text(bytes: &mut Bytes, len: usize) -> Option<String> {
    if bytes.len() < len {
        return None;
    }
    std::str::from_utf8(&bytes.split_to(len)).ok().map(str::to_owned)
}

fn take_str8(bytes: &mut Bytes) -> Option<String> {
    let len = bytes.try_get_u8().ok()?;
    take_text(bytes, usize::from(len))
}

fn take_str16(bytes: &mut Bytes) -> Option<String> {
    let len = bytes.try_get_u16_le().ok()?;
    take_text(bytes, usize::from(len))
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn entries() -> Vec<Entry> {
        let delivery = Delivery { client: "weir-gw".into(), session: 3, packet_id: 65_535, dup: true, crc: 9 };
        let message = |payload, delivery| {
            Entry::Message(Message { source: "s".into(), topic: "a/ü".into(), payload, arrival_us: -5, delivery })
        };
        let batch = CutBatch {
            stream: "traffic".parse().unwrap(),
            schema: wire::SchemaId([1; 16]),
            rows: 2,
            min_ts: 1,
            max_ts: 2,
            watermark: 3,
            agent: "0".into(),
            configuration: 7,
            format: wire::BodyFormat::Arrow,
            body: Bytes::from_static(b"body"),
        };
        vec![
            message(Payload::Whole(Bytes::from_static(b"{}")), Some(delivery)),
            message(Payload::Oversized { head: Bytes::from_static(b"x"), len: 1 << 40, crc: 8 }, None),
            Entry::Session { client: "c".into(), session: 1, resumed: true },
            Entry::Forgotten { client: "c".into() },
            Entry::Refused { spool: SpoolId([4; 16]), seq: Seq(6), reason: "no".into(), schema: "s".into(), batch },
            Entry::Missed { source: "host".into(), messages: 1, bytes: 2, first_us: 3, last_us: 4 },
        ]
    }

    fn line() -> Entry {
        let place = Place::new(FileId { device: 1, inode: 2 }, 300, 3, b"{}");
        let payload = Payload::Whole(Bytes::from_static(b"{}"));
        let message = Message { source: "f".into(), topic: "a".into(), payload, arrival_us: 5, delivery: None };
        Entry::Line { place, message }
    }

    fn clock() -> Entry {
        let trust = Trust::Cloud;
        Entry::Clock(Mark { boot: [7; 16], monotonic_us: 1, arrival_us: 2, correction_us: -3, error_us: 4, trust })
    }

    #[test]
    fn entries_come_back_as_they_were_written() {
        let subscribed = |filters: &[&str]| Entry::Subscribed {
            client: "c".into(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        };
        let tick = Entry::Tick { now_us: -7 };
        let configured = Entry::Configured { version: 1 << 40, text: "[edge]\nid = \"ü\"".into() };
        let more = [subscribed(&[]), subscribed(&["a/+", "$share/g/ü"]), line(), tick, configured, clock()];
        for entry in entries().into_iter().chain(more) {
            let mut bytes = Vec::new();
            entry.write(&mut bytes);
            assert_eq!(Entry::read(Bytes::from(bytes)).unwrap(), entry);
        }
    }

    #[test]
    fn the_bytes_of_version_1_never_change() {
        let mut bytes = Vec::new();
        entries().iter().for_each(|entry| entry.write(&mut bytes));
        assert_eq!(crc32c::crc32c(&bytes), 3_648_170_795, "{} bytes", bytes.len());
        let mut bytes = Vec::new();
        Entry::Subscribed { client: "c".into(), filters: vec!["a".into(), "b/#".into()] }.write(&mut bytes);
        assert_eq!(bytes, b"\x01\x06\x01c\x01\x00a\x03\x00b/#");
        let mut bytes = Vec::new();
        line().write(&mut bytes);
        let numbers = [1_u64, 2, 300, 3].map(u64::to_le_bytes).concat();
        let check = [b"\x02\x00".as_slice(), &crc32c::crc32c(b"{}").to_le_bytes()].concat();
        let message = b"\x01f\x01\x00a\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00{}";
        assert_eq!(bytes, [b"\x01\x07".as_slice(), &numbers, &check, message].concat());
        bytes.clear();
        Entry::Tick { now_us: 258 }.write(&mut bytes);
        assert_eq!(bytes, b"\x01\x08\x02\x01\0\0\0\0\0\0");
        bytes.clear();
        Entry::Configured { version: 3, text: "a = 1".into() }.write(&mut bytes);
        assert_eq!(bytes, b"\x01\x09\x03\0\0\0\0\0\0\0a = 1");
        let numbers = [1_i64, 2, -3, 4].map(i64::to_le_bytes).concat();
        assert_eq!(bytes_of(&clock()), [b"\x01\x0a".as_slice(), &[7; 16], &numbers, b"\x03"].concat());
    }

    #[test]
    fn what_is_cut_short_or_of_another_version_is_no_entry() {
        for entry in &entries()[2..] {
            let mut bytes = Vec::new();
            entry.write(&mut bytes);
            for cut in 0..bytes.len() {
                assert!(Entry::read(Bytes::copy_from_slice(&bytes[..cut])).is_err(), "{entry:?} {cut}");
            }
        }
        assert_eq!(Entry::read(Bytes::from_static(&[2, 1])), Err(EntryError { version: 2, kind: 1 }));
    }

    #[test]
    fn changed_bytes_are_an_entry_or_none() {
        let seed = rand::random::<u64>();
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let mut written = [entries(), vec![line(), clock()]].concat().iter().map(bytes_of).collect::<Vec<_>>();
        written.push(b"\x01\x06\x01c\x01\x00a\x03\x00b/#".to_vec());
        for _ in 0..50_000 {
            let mut bytes = written.choose(&mut random).unwrap().clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..4) {
                    0 => bytes.insert(at, random.random()),
                    1 if bytes.len() > 1 => drop(bytes.remove(at)),
                    2 => bytes.truncate(at + 1),
                    _ => bytes[at] = random.random(),
                }
            }
            if let Ok(entry) = Entry::read(Bytes::copy_from_slice(&bytes)) {
                assert_eq!(Entry::read(bytes_of(&entry).into()).as_ref(), Ok(&entry), "{bytes:?}");
            }
        }
    }

    fn bytes_of(entry: &Entry) -> Vec<u8> {
        let mut bytes = Vec::new();
        entry.write(&mut bytes);
        bytes
    }
}
