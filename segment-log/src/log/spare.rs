//! The room of one segment that a log keeps on disk beside its cap, for an owner that must write more than the reserve takes
//! before it can free anything.
//!
//! It is a file of a segment's size that recovery passes over. A segment that is freed becomes the next one by its name alone,
//! so nobody else takes the room in between; it is blanked and synced before it gets the name of a segment again.

use std::io;
use std::path::Path;

use super::{AppendError, SegmentLog, SyncError, is_full, sync_file};
use crate::format::{self, SegmentHeader};
use crate::layer::{FileLayer, LayerFile};
use crate::recover;

/// The room of one segment that a log keeps on disk: [`SegmentLog::keep_spare`]. Recovery passes it over.
pub(super) const SPARE: &str = "spare";

/// Whether a log keeps a file of a segment's size ready, and has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spare {
    Unwanted,
    Wanted,
    There,
}

impl<L: FileLayer> SegmentLog<L> {
    /// From now on the log keeps the room of one more segment on disk, beside its cap, as soon as there is some: what
    /// [`free_before`](Self::free_before) removes gives it back. For an owner that must write more than the reserve takes before
    /// it can free anything, also when the disk is full.
    ///
    /// # Errors
    /// When the disk does not answer; a full one is none.
    pub fn keep_spare(&mut self) -> io::Result<()> {
        if self.spare == Spare::There {
            return Ok(());
        }
        let path = self.shared.directory.join(SPARE);
        // Of a run before; after a power cut it may be a segment's, too, by another name.
        self.remove_spare(&path)?;
        self.spare = Spare::Wanted;
        match self.layer.create(&path).and_then(|file| file.allocate(self.options.segment_bytes)) {
            Ok(()) => self.spare = Spare::There,
            Err(error) if is_full(&error) => self.remove_spare(&path)?,
            // A layer that removes nothing: who only reads needs none.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Keeps no such room, or no more.
    ///
    /// # Errors
    /// When the disk does not answer.
    pub fn give_spare_back(&mut self) -> io::Result<()> {
        self.spare = Spare::Unwanted;
        self.remove_spare(&self.shared.directory.join(SPARE))
    }

    /// Nothing counts on it: it need not be gone for sure.
    fn remove_spare(&self, path: &Path) -> io::Result<()> {
        match self.layer.remove(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Opens a new segment in the room that was kept; false when there is none, or the newest segment is empty.
    ///
    /// # Errors
    /// Any is final, as one of its steps is a sync.
    pub fn start_segment_in_spare(&mut self) -> Result<bool, AppendError> {
        if self.failed {
            return Err(SyncError::Poisoned.into());
        }
        if self.spare != Spare::There || self.end == self.active().first {
            return Ok(false);
        }
        self.write_buffer().map_err(|source| self.fail(source))?;
        let directory = &self.shared.directory;
        let (spare, path) = (directory.join(SPARE), directory.join(format::segment_name(self.end)));
        self.spare = Spare::Wanted;
        // What stood there before must be gone for sure before it gets the name of a segment.
        let made = self.layer.open(&spare).and_then(|file| {
            recover::blank(&file, 0, false)?;
            file.write_all_at(&SegmentHeader::encode(self.shared.id, self.end), 0)?;
            sync_file(&file)?;
            self.layer.rename(&spare, &path)?;
            Ok(file)
        });
        self.names_changed = true;
        match made {
            Ok(file) => self.add_segment(file),
            Err(source) => return Err(self.fail(source).into()),
        }
        Ok(true)
    }
}
