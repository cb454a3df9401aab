//! The lines of a file: of one that grows and is rotated, or of one that is read once.
//!
//! A line that has its end is a message; a place in the file stands in the same journal record, so that after a crash
//! reading goes on behind the last line that the journal has, and no line is lost or stored twice. With `header` the
//! first line of the file stands before each line in its message. Blank lines are skipped. When the journal is full this
//! waits.
//!
//! A growing file is looked at every `poll`. When another file has taken its name, the old one is read to its end, then
//! those that were rotated after it, then the new one (`rotation.rs`). A file that became shorter, or whose last line is
//! no longer where it was, is read from its beginning: what was written into it and cut off between two looks is lost.
//! The last line of a file that is read once, or was rotated away, needs no end.
//!
//! It runs on a thread of its own and ends by its token, at the end of a file that is read once, or with the journal.

mod rotation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use self::rotation::{Part, id_of};
use super::SourceState;
use super::lines::{Line, Splitter};
use crate::config::FileSettings;
use crate::entry::{Entry, Message, Payload, Place};
use crate::journal::JournalSender;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// A longer first line is no header.
const HEADER_BYTES_MAX: usize = 64 << 10;
/// How long a file that cannot be read is left alone.
const RETRY: Duration = Duration::from_secs(2);

/// A file source.
#[derive(Debug)]
pub struct Follow {
    pub settings: FileSettings,
    pub journal: JournalSender,
    pub state: Arc<SourceState>,
    /// Behind the last line that the journal has.
    pub place: Option<Place>,
}

/// Why reading ended.
enum Ended {
    /// The token, or the journal.
    Stopped,
    /// A file that is read once was read.
    AtItsEnd,
    /// The file cannot be read now.
    Io(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Follow {
    /// Runs until the token is cancelled, the file is read once, or the journal has ended.
    pub async fn run(self, token: CancellationToken) {
        let (done, ended) = oneshot::channel::<()>();
        let state = Arc::clone(&self.state);
        let reader = Reader { follow: self, runtime: Handle::current(), token };
        let thread = std::thread::Builder::new().name("file".to_owned()).spawn(move || {
            reader.run();
            drop(done);
        });
        match thread {
            // It never sends: its end is the answer.
            Ok(_) => drop(ended.await),
            Err(error) => state.error(format!("start a thread: {error}")),
        }
    }
}

struct Reader {
    follow: Follow,
    runtime: Handle,
    token: CancellationToken,
}

/// A file that is being read.
struct Open {
    file: File,
    /// Behind the last whole line.
    offset: u64,
    splitter: Splitter,
    /// The first line and its end, when there is one to stand before each line.
    header: Option<Bytes>,
}

impl Reader {
    fn run(mut self) {
        let state = Arc::clone(&self.follow.state);
        loop {
            match self.follow() {
                Ended::Stopped => break,
                Ended::AtItsEnd => {
                    tracing::info!(source = self.follow.settings.name, "the file was read to its end");
                    // Nothing is missing: the source stays ready.
                    return;
                }
                Ended::Io(error) => {
                    let path = self.follow.settings.path.display();
                    if state.connected.swap(false, Ordering::Relaxed) || state.last_error.lock().is_none() {
                        tracing::warn!(%path, %error, "the file cannot be read; it is tried again");
                    }
                    state.error(format!("{path}: {error}"));
                    if !self.wait(RETRY.min(self.follow.settings.poll.0 * 8)) {
                        break;
                    }
                }
            }
        }
        state.connected.store(false, Ordering::Relaxed);
    }

    fn follow(&mut self) -> Ended {
        let mut told = false;
        loop {
            let found = rotation::find(&self.follow.settings, self.follow.place.as_ref());
            let found = match found {
                Ok(found) => found,
                Err(error) => return error.into(),
            };
            if found.gone && !told {
                let place = self.follow.place;
                tracing::warn!(source = self.follow.settings.name, ?place, "the file that was read before is gone");
            }
            let mut parts = VecDeque::from(found.parts);
            while let Some(part) = parts.pop_front() {
                let last = parts.is_empty();
                if let Err(ended) = self.read_part(part, last) {
                    return ended;
                }
            }
            // Another file has taken the name, and the one before was read to its end.
            told = true;
        }
    }

    /// Reads one file to its end; the last of them until another takes its name.
    fn read_part(&mut self, part: Part, last: bool) -> Result<(), Ended> {
        let settings = &self.follow.settings;
        let (max, header, follow) = (settings.max_payload.0 as usize, settings.header(), settings.follow);
        let mut open = Open { file: part.file, offset: 0, splitter: Splitter::new(max), header: None };
        if header && !self.read_header(&mut open, follow && last)? {
            // It was rotated away, or is read once, without a whole line.
            return if follow { Ok(()) } else { Err(Ended::AtItsEnd) };
        }
        open.offset = open.offset.max(part.from);
        self.follow.state.connected.store(true, Ordering::Relaxed);
        *self.follow.state.last_error.lock() = None;
        loop {
            self.read_to_end(&mut open)?;
            if !follow {
                self.take_rest(&mut open)?;
                return Err(Ended::AtItsEnd);
            }
            if !last {
                return self.take_rest(&mut open);
            }
            if !self.wait(self.follow.settings.poll.0) {
                return Err(Ended::Stopped);
            }
            if rotation::was_rotated(&self.follow.settings.path, &open.file)? {
                // Who wrote into it may still do so for a moment.
                if !self.wait(self.follow.settings.poll.0) {
                    return Err(Ended::Stopped);
                }
                self.read_to_end(&mut open)?;
                return self.take_rest(&mut open);
            }
            let place = self.follow.place.filter(|place| place.file == id_of(&open.file).unwrap_or(place.file));
            let len = open.file.metadata()?.len();
            let shorter = len < open.offset;
            if shorter || len > open.offset && place.is_some_and(|place| !rotation::holds(&open.file, &place)) {
                tracing::info!(source = self.follow.settings.name, "the file begins anew");
                self.follow.place = None;
                return Ok(());
            }
        }
    }

    /// The first line; waits for its end while the file may grow. False: it has none.
    fn read_header(&mut self, open: &mut Open, may_grow: bool) -> Result<bool, Ended> {
        loop {
            let mut bytes = Vec::new();
            open.file.seek(SeekFrom::Start(0))?;
            (&open.file).take(HEADER_BYTES_MAX as u64).read_to_end(&mut bytes)?;
            if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
                // A mark that some programs write at the beginning of a file is none of its text.
                let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
                let mut header = BytesMut::from(line);
                header.put_u8(b'\n');
                open.header = Some(header.freeze());
                open.offset = end as u64 + 1;
                return Ok(true);
            }
            if bytes.len() >= HEADER_BYTES_MAX {
                return Err(Ended::Io(io::Error::other("its first line is too long for a header")));
            }
            if !may_grow || rotation::was_rotated(&self.follow.settings.path, &open.file)? {
                return Ok(false);
            }
            if !self.wait(self.follow.settings.poll.0) {
                return Err(Ended::Stopped);
            }
        }
    }

    /// Journals all whole lines from the offset on.
    fn read_to_end(&mut self, open: &mut Open) -> Result<(), Ended> {
        open.splitter.clear();
        open.file.seek(SeekFrom::Start(open.offset))?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = match open.file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let mut bytes = &chunk[..count];
            while !bytes.is_empty() {
                if let Some(line) = open.splitter.next(&mut bytes) {
                    self.take(open, line)?;
                }
            }
        }
    }

    /// A last line without an end.
    fn take_rest(&mut self, open: &mut Open) -> Result<(), Ended> {
        match open.splitter.rest() {
            Some(line) => self.take(open, line),
            None => Ok(()),
        }
    }

    fn take(&mut self, open: &mut Open, line: Line) -> Result<(), Ended> {
        open.offset += line.bytes;
        let text = match &line.payload {
            Payload::Whole(text) if text.iter().all(u8::is_ascii_whitespace) => return Ok(()),
            Payload::Whole(text) | Payload::Oversized { head: text, .. } => text,
        };
        let place = Place::new(id_of(&open.file)?, open.offset, line.bytes, text);
        let payload = match (&open.header, line.payload) {
            (Some(header), Payload::Whole(text)) => {
                let mut whole = BytesMut::with_capacity(header.len() + text.len());
                whole.extend_from_slice(header);
                whole.extend_from_slice(&text);
                Payload::Whole(whole.freeze())
            }
            (_, payload) => payload,
        };
        let Follow { settings, journal, state, place: known } = &mut self.follow;
        let name = settings.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let arrival_us = journal.now_us();
        let entry = Entry::Line {
            place,
            message: Message {
                source: settings.name.clone(),
                topic: name.unwrap_or_default(),
                payload,
                arrival_us,
                delivery: None,
            },
        };
        let token = &self.token;
        let given = self.runtime.block_on(async {
            tokio::select! {
                biased;
                // Not journalled: the next start reads it again.
                () = token.cancelled() => None,
                ticket = journal.append(&entry) => ticket.ok(),
            }
        });
        given.ok_or(Ended::Stopped)?;
        *known = Some(place);
        state.received.fetch_add(1, Ordering::Relaxed);
        state.last_arrival_us.store(arrival_us, Ordering::Relaxed);
        Ok(())
    }

    /// False: the token was cancelled.
    fn wait(&self, time: Duration) -> bool {
        self.runtime.block_on(async {
            tokio::select! {
                () = tokio::time::sleep(time) => true,
                () = self.token.cancelled() => false,
            }
        })
    }
}
