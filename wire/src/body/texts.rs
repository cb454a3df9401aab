//! A row of texts or byte strings, each different one once.
//!
//! ```text
//! head: 0 all equal: entries (1) | 1 one by one: entries (count) | 2 a dictionary: varint n | entries (n) | integers: moves
//!       | 3 all are `good`
//! entries: form u8 = 0 | integers: lengths | the bytes
//!        | form u8 = 1 | varint length, front that all have | width u8 | integers: the decimal number behind it, with zeros
//!          in front up to `width` digits, none when 0
//! ```
//! A move is how far an index is from the one after the index before, modulo n: what comes round and round is all zeros.
//! Of byte strings and texts alike; that texts are UTF-8 is for the caller to see.

use std::collections::HashMap;

use super::BodyError;
use super::integers::{self, Layout};
use crate::bytes::{Reader, put_varint};

const EQUAL: u8 = 0;
const ONE_BY_ONE: u8 = 1;
const DICTIONARY: u8 = 2;
const GOOD: u8 = 3;
/// What `quality` says nearly always.
const GOOD_TEXT: &[u8] = b"good";
const FORM_BYTES: u8 = 0;
const FORM_NUMBERS: u8 = 1;
/// Any number of so many digits fits.
const DIGITS_MAX: usize = 18;

/// Appends texts and returns the head, which has 2 bits.
pub(super) fn put(texts: &[&[u8]], layout: Layout, out: &mut Vec<u8>) -> u8 {
    let first = texts.first().copied().unwrap_or_default();
    if texts.iter().all(|text| *text == first) {
        if first == GOOD_TEXT {
            return GOOD;
        }
        put_entries(&[first], layout, out);
        return EQUAL;
    }
    let Some((entries, moves)) = dictionary(texts) else {
        put_entries(texts, layout, out);
        return ONE_BY_ONE;
    };
    put_varint(out, entries.len() as u64);
    put_entries(&entries, layout, out);
    integers::put(&moves, 0, layout, out);
    DICTIONARY
}

/// The different texts, and the moves between them; none when too few come again.
fn dictionary<'a>(texts: &[&'a [u8]]) -> Option<(Vec<&'a [u8]>, Vec<i64>)> {
    let entries_max = texts.len() - texts.len() / 4;
    let mut known = HashMap::new();
    let mut entries = Vec::new();
    let mut indices = Vec::with_capacity(texts.len());
    // Devices report in turn, and a text often comes again at once: both are found without a look at the map.
    let mut last = 0;
    for &text in texts {
        let near = [last, last + 1].into_iter().find(|near| entries.get(*near) == Some(&text));
        last = near.unwrap_or_else(|| {
            *known.entry(text).or_insert_with(|| {
                entries.push(text);
                entries.len() - 1
            })
        });
        if entries.len() > entries_max {
            return None;
        }
        indices.push(last);
    }
    let n = entries.len() as i64;
    let mut before = n - 1;
    let to_move = |index| {
        let index = index as i64;
        let step = (index - before - 1).rem_euclid(n);
        before = index;
        step
    };
    let moves = indices.into_iter().map(to_move).collect();
    Some((entries, moves))
}

fn put_entries(entries: &[&[u8]], layout: Layout, out: &mut Vec<u8>) {
    if let Some((front, width, numbers)) = numbers(entries) {
        out.push(FORM_NUMBERS);
        put_varint(out, front.len() as u64);
        out.extend_from_slice(front);
        out.push(width as u8);
        integers::put(&numbers, 0, layout, out);
        return;
    }
    out.push(FORM_BYTES);
    let lengths = entries.iter().map(|entry| entry.len() as i64).collect::<Vec<_>>();
    integers::put(&lengths, 0, layout, out);
    entries.iter().for_each(|entry| out.extend_from_slice(entry));
}

/// The front that all entries have, the digits that each has at least, and the numbers behind the front, when every entry is
/// exactly what [`push_number`] makes of them.
fn numbers<'a>(entries: &[&'a [u8]]) -> Option<(&'a [u8], usize, Vec<i64>)> {
    let first = *entries.first()?;
    if entries.len() < 2 {
        return None;
    }
    let shared = |len, entry: &&[u8]| first[..len].iter().zip(*entry).take_while(|(a, b)| a == b).count();
    let front = entries.iter().fold(first.len(), shared);
    // The digits of the first number that are alike belong to the number.
    let front = first[..front].iter().rposition(|byte| !byte.is_ascii_digit()).map_or(0, |at| at + 1);
    let width = if entries.iter().all(|entry| entry.len() == first.len()) { first.len() - front } else { 0 };
    let number = |entry: &&[u8]| {
        let digits = &entry[front..];
        let exact = !digits.is_empty()
            && digits.len() <= DIGITS_MAX
            && digits.iter().all(u8::is_ascii_digit)
            && (width > 0 || digits == b"0" || digits[0] != b'0');
        exact.then(|| digits.iter().fold(0, |number, digit| number * 10 + i64::from(digit - b'0')))
    };
    let numbers = entries.iter().map(number).collect::<Option<Vec<_>>>()?;
    Some((&first[..front], width, numbers))
}

fn push_number(out: &mut Vec<u8>, front: &[u8], width: usize, number: i64) {
    use std::io::Write as _;
    out.extend_from_slice(front);
    // Into memory: it cannot fail.
    let _ = write!(out, "{number:0width$}");
}

/// Different texts one after another, and where each ends.
struct Entries {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Entries {
    fn take(reader: &mut Reader<'_>, count: usize, room: &mut Room) -> Result<Self, BodyError> {
        let mut ends = Vec::with_capacity(count);
        let mut bytes = Vec::new();
        match reader.byte()? {
            FORM_BYTES => {
                let mut end = 0_usize;
                for length in integers::take(reader, count, 0)? {
                    let length = usize::try_from(length).ok();
                    end = length.and_then(|length| end.checked_add(length)).ok_or(TOO_LONG)?;
                    ends.push(end);
                }
                room.take(end)?;
                bytes.extend_from_slice(reader.take(end)?);
            }
            FORM_NUMBERS => {
                let len = reader.len()?;
                let front = reader.take(len)?;
                let width = usize::from(reader.byte()?);
                if width > DIGITS_MAX {
                    return Err(BodyError::Columns("a number of too many digits"));
                }
                for number in integers::take(reader, count, 0)? {
                    let begin = bytes.len();
                    push_number(&mut bytes, front, width, number);
                    room.take(bytes.len() - begin)?;
                    ends.push(bytes.len());
                }
            }
            _ => return Err(BodyError::Columns("a form of texts that is not known")),
        }
        Ok(Self { bytes, ends })
    }

    fn get(&self, index: usize) -> &[u8] {
        let begin = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[begin..self.ends[index]]
    }
}

const TOO_LONG: BodyError = BodyError::Columns("texts are longer than the body");

/// What decoding may still put into memory.
#[derive(Debug)]
pub(super) struct Room(pub(super) u64);

impl Room {
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), BodyError> {
        let over = BodyError::Columns("the columns unpack to more than the body says");
        self.0 = self.0.checked_sub(bytes as u64).ok_or(over)?;
        Ok(())
    }
}

/// Reads `count` texts and hands each to `push`, which has room for it.
pub(super) fn take(
    reader: &mut Reader<'_>,
    head: u8,
    count: usize,
    room: &mut Room,
    mut push: impl FnMut(&[u8]),
) -> Result<(), BodyError> {
    match head {
        GOOD => {
            room.take(count.saturating_mul(GOOD_TEXT.len()))?;
            (0..count).for_each(|_| push(GOOD_TEXT));
        }
        EQUAL => {
            let entries = Entries::take(reader, 1, room)?;
            let text = entries.get(0);
            room.take(count.saturating_mul(text.len()))?;
            (0..count).for_each(|_| push(text));
        }
        ONE_BY_ONE => {
            let entries = Entries::take(reader, count, room)?;
            room.take(entries.bytes.len())?;
            (0..count).for_each(|index| push(entries.get(index)));
        }
        DICTIONARY => {
            let n = reader.len()?;
            if n == 0 || n > count {
                return Err(BodyError::Columns("a dictionary of more texts than rows"));
            }
            let entries = Entries::take(reader, n, room)?;
            let mut before = n - 1;
            for step in integers::take(reader, count, 0)? {
                before = (before as u64 + 1 + step as u64 % n as u64) as usize % n;
                let text = entries.get(before);
                room.take(text.len())?;
                push(text);
            }
        }
        _ => return Err(BodyError::Columns("a kind of texts that is not known")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(texts: &[&str], layout: Layout) -> usize {
        let texts = texts.iter().map(|text| text.as_bytes()).collect::<Vec<_>>();
        let mut bytes = Vec::new();
        let head = put(&texts, layout, &mut bytes);
        let decode = |bytes: &[u8], room: u64| {
            let (mut reader, mut room, mut back) = (Reader(bytes), Room(room), Vec::new());
            take(&mut reader, head, texts.len(), &mut room, |text| back.push(text.to_vec()))?;
            assert!(reader.0.is_empty());
            Ok::<_, BodyError>(back)
        };
        assert_eq!(decode(&bytes, 10_000).unwrap(), texts);
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len], 10_000).is_err(), "{len} of {}", bytes.len());
        }
        if texts.iter().any(|text| !text.is_empty()) {
            assert!(decode(&bytes, 0).is_err(), "no room");
        }
        bytes.len()
    }

    #[test]
    fn texts_come_back_and_every_cut_is_noticed() {
        for layout in [Layout::Bits, Layout::Bytes] {
            for texts in [
                &[] as &[&str],
                &[""],
                &["", ""],
                &["", "a"],
                &["good", "good"],
                &["good"],
                &["a", "b", "a", "c", "a", "b"],
                &["0", "00"],
                &["007", "012"],
                &["7", "12"],
                &["7", "012"],
                &["x1", "x"],
                &["-1", "-2"],
                &["gw-1", "gw-10", "gw-2"],
                &["999999999999999999", "999999999999999998"],
                &["9999999999999999990", "9999999999999999980"],
                &["00000000000000000001", "00000000000000000002"],
                &["ä1", "ä2", "ö1"],
            ] {
                bytes_of(texts, layout);
            }
        }
    }

    #[test]
    fn names_that_count_and_come_round_take_little() {
        let names = (0..40).map(|n| format!("sensor-{:04}", 100 + n * 3)).collect::<Vec<_>>();
        let rounds = names.iter().cycle().take(400).map(String::as_str).collect::<Vec<_>>();
        assert!(bytes_of(&rounds, Layout::Bits) < 30);
        let quality = ["good", "good", "late", "good", "good", "good", "late", "good"];
        assert!(bytes_of(&quality, Layout::Bits) < 20);
    }
}
