//! Lines out of a stream of bytes, each at most so many bytes long; of a longer one only the beginning is kept.

use bytes::Bytes;

use crate::entry::Payload;

/// How much of a line that is too long is kept.
const HEAD_BYTES: usize = 4 << 10;
/// A long line's room is given back after it.
const KEEP_BYTES: usize = 64 << 10;

/// A line without its end (`\n` or `\r\n`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) payload: Payload,
    /// What it takes where it came from, its end included.
    pub(super) bytes: u64,
}

/// Puts lines together.
#[derive(Debug)]
pub(super) struct Splitter {
    line: Vec<u8>,
    max: usize,
    /// Length and checksum of a line that is longer than `max`, and so only begins in `line`.
    long: Option<(u64, u32)>,
}

impl Splitter {
    pub(super) fn new(max: usize) -> Self {
        Self { line: Vec::new(), max, long: None }
    }

    /// Takes bytes up to the next end of a line from the front of `bytes`; None when it stands in none of them.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Option<Line> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
        self.add(part);
        *bytes = rest.get(1..).unwrap_or_default();
        end.map(|_| self.take(1))
    }

    /// The last line, when it has no end.
    pub(super) fn rest(&mut self) -> Option<Line> {
        (!self.line.is_empty()).then(|| self.take(0))
    }

    /// Forgets what was begun.
    pub(super) fn clear(&mut self) {
        self.line.clear();
        self.long = None;
    }

    fn add(&mut self, part: &[u8]) {
        match &mut self.long {
            Some((len, crc)) => {
                *len += part.len() as u64;
                *crc = crc32c::crc32c_append(*crc, part);
            }
            // One byte more may be the \r of its end.
            None if self.line.len() + part.len() > self.max + 1 => {
                let crc = crc32c::crc32c_append(crc32c::crc32c(&self.line), part);
                self.long = Some(((self.line.len() + part.len()) as u64, crc));
                self.line.extend_from_slice(&part[..part.len().min(HEAD_BYTES)]);
                self.line.truncate(HEAD_BYTES);
            }
            None => self.line.extend_from_slice(part),
        }
    }

    fn take(&mut self, end: u64) -> Line {
        let bytes = self.long.map_or(self.line.len() as u64, |(len, _)| len) + end;
        let line = std::mem::take(&mut self.line);
        let long = self.long.take();
        if let Some((len, crc)) = long {
            return Line { payload: Payload::Oversized { head: Bytes::from(line), len, crc }, bytes };
        }
        let text = line.strip_suffix(b"\r").unwrap_or(&line);
        let payload = if text.len() > self.max {
            let head = Bytes::copy_from_slice(&text[..text.len().min(HEAD_BYTES)]);
            Payload::Oversized { head, len: text.len() as u64, crc: crc32c::crc32c(text) }
        } else {
            Payload::Whole(Bytes::copy_from_slice(text))
        };
        if line.capacity() <= KEEP_BYTES {
            self.line = line;
            self.line.clear();
        }
        Line { payload, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_however_the_bytes_come() {
        let text = b"one\n\ntwo\r\n12345678\r\n123456789\nlast";
        for size in 1..=text.len() {
            let (mut splitter, mut lines) = (Splitter::new(8), Vec::new());
            for chunk in text.chunks(size) {
                let mut rest = chunk;
                while !rest.is_empty() {
                    lines.extend(splitter.next(&mut rest));
                }
            }
            lines.extend(splitter.rest());
            assert_eq!(lines.iter().map(|line| line.bytes).sum::<u64>(), text.len() as u64);
            let whole = |text: &'static str| Payload::Whole(Bytes::from_static(text.as_bytes()));
            let crc = crc32c::crc32c(b"123456789");
            let long = Payload::Oversized { head: Bytes::from_static(b"123456789"), len: 9, crc };
            let expected = [whole("one"), whole(""), whole("two"), whole("12345678"), long, whole("last")];
            assert_eq!(lines.into_iter().map(|line| line.payload).collect::<Vec<_>>(), expected, "{size}");
            assert_eq!(splitter.rest(), None);
        }
    }

    #[test]
    fn of_a_long_line_only_the_beginning_is_held() {
        let mut splitter = Splitter::new(8 << 10);
        let mut crc = 0;
        for _ in 0..1_000 {
            let mut bytes = [7_u8; 1_000].as_slice();
            crc = crc32c::crc32c_append(crc, bytes);
            assert_eq!(splitter.next(&mut bytes), None);
            assert!(splitter.line.len() <= 10 << 10);
        }
        let line = splitter.next(&mut b"\n".as_slice()).unwrap();
        let Payload::Oversized { head, len, crc: of_all } = line.payload else { panic!() };
        assert_eq!((head.len(), len, of_all, line.bytes), (HEAD_BYTES, 1_000_000, crc, 1_000_001));
    }
}
