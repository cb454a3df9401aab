//! The disk, read and never written: opening a log on it finds what a start would find and repairs nothing. What is
//! written goes nowhere, so only what lay before the opening's end may be read. A bar follows what is read.

use std::fs::File;
use std::io;
use std::path::Path;

use indicatif::ProgressBar;
use segment_log::{Disk, FileLayer, LayerFile};

#[derive(Debug, Clone)]
pub(super) struct Untouched(pub(super) ProgressBar);

/// None: a file that would have been made.
#[derive(Debug)]
pub(super) struct Shown(Option<File>, ProgressBar);

impl FileLayer for Untouched {
    type File = Shown;

    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Disk.exists(path)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        Disk.list(directory)
    }

    fn create(&self, path: &Path) -> io::Result<Shown> {
        if path.try_exists()? {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Ok(Shown(None, self.0.clone()))
    }

    fn open(&self, path: &Path) -> io::Result<Shown> {
        Ok(Shown(Some(File::open(path)?), self.0.clone()))
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn link(&self, _: &Path, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

impl LayerFile for Shown {
    fn size(&self) -> io::Result<u64> {
        self.0.as_ref().map_or(Ok(0), LayerFile::size)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = self.0.as_ref().map_or(Ok(0), |file| LayerFile::read_at(file, buffer, offset))?;
        self.1.inc(read as u64);
        Ok(read)
    }

    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    /// Two may look at once, but nobody while an agent runs.
    fn try_lock(&self) -> io::Result<bool> {
        self.0.as_ref().map_or(Ok(true), LayerFile::try_lock)
    }
}
