//! Files and directories of the simulated disk, each with what is seen and what is on disk.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::Random;

/// The disk writes this much at once or tears it.
const SECTOR: usize = 512;

#[derive(Clone, Debug, Default)]
pub(super) struct FileNode {
    /// What programs see.
    pub(super) seen: Vec<u8>,
    /// What is on disk.
    pub(super) disk: Vec<u8>,
    /// The contents that each sector has had since it was last on disk, oldest first.
    dirty: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    /// The lengths that the file has had since its length was last on disk.
    lengths: Vec<usize>,
    pub(super) locked: bool,
}

impl FileNode {
    pub(super) fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        if end > self.seen.len() {
            self.resize(end);
        }
        self.seen[offset..end].copy_from_slice(bytes);
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let start = sector * SECTOR;
            let stop = self.seen.len().min(start + SECTOR);
            let mut version = [0; SECTOR];
            version[..stop - start].copy_from_slice(&self.seen[start..stop]);
            self.dirty.entry(sector).or_default().push(version);
        }
    }

    pub(super) fn resize(&mut self, length: usize) {
        self.seen.resize(length, 0);
        self.lengths.push(length);
    }

    pub(super) fn sync(&mut self) {
        self.disk.resize(self.seen.len(), 0);
        for (sector, versions) in std::mem::take(&mut self.dirty) {
            if let Some(version) = versions.last() {
                self.put_on_disk(sector, version);
            }
        }
        self.lengths.clear();
    }

    pub(super) fn forget_unsynced(&mut self) {
        self.dirty.clear();
        self.lengths.clear();
    }

    fn put_on_disk(&mut self, sector: usize, version: &[u8; SECTOR]) {
        let start = sector * SECTOR;
        if start < self.disk.len() {
            let stop = self.disk.len().min(start + SECTOR);
            self.disk[start..stop].copy_from_slice(&version[..stop - start]);
        }
    }

    pub(super) fn cut_power(&mut self, mode: u64, random: &mut Random) {
        let lengths = std::mem::take(&mut self.lengths);
        let choice = match mode {
            0 => 0,
            1 => lengths.len(),
            _ => random.below(lengths.len() as u64 + 1) as usize,
        };
        if let Some(length) = choice.checked_sub(1).map(|index| lengths[index]) {
            self.disk.resize(length, 0);
        }
        for (sector, versions) in std::mem::take(&mut self.dirty) {
            let newest = versions.len() - 1;
            match mode {
                0 => {}
                1 => self.put_on_disk(sector, &versions[newest]),
                _ => match random.below(8) {
                    0..3 => {}
                    3..6 => self.put_on_disk(sector, &versions[newest]),
                    6 => {
                        let any = random.below(versions.len() as u64) as usize;
                        self.put_on_disk(sector, &versions[any]);
                    }
                    _ => self.tear(sector, &versions[newest], random),
                },
            }
        }
        self.seen.clone_from(&self.disk);
        self.locked = false;
    }

    /// Part of the sector is new, the rest as it was.
    fn tear(&mut self, sector: usize, version: &[u8; SECTOR], random: &mut Random) {
        let mut torn = [0; SECTOR];
        let start = sector * SECTOR;
        if start < self.disk.len() {
            let stop = self.disk.len().min(start + SECTOR);
            torn[..stop - start].copy_from_slice(&self.disk[start..stop]);
        }
        let at = random.below(SECTOR as u64) as usize;
        if random.one_in(2) {
            torn[..at].copy_from_slice(&version[..at]);
        } else {
            torn[at..].copy_from_slice(&version[at..]);
        }
        self.put_on_disk(sector, &torn);
    }
}

#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Set(OsString, usize),
    Unset(OsString),
    /// A rename: both or neither.
    Move(OsString, OsString, usize),
}

#[derive(Clone, Debug, Default)]
pub(super) struct DirNode {
    pub(super) seen: BTreeMap<OsString, usize>,
    pub(super) disk: BTreeMap<OsString, usize>,
    pub(super) pending: Vec<NameChange>,
}

fn apply(names: &mut BTreeMap<OsString, usize>, change: &NameChange) {
    match change {
        NameChange::Set(name, node) => {
            names.insert(name.clone(), *node);
        }
        NameChange::Unset(name) => {
            names.remove(name);
        }
        NameChange::Move(from, to, node) => {
            names.remove(from);
            names.insert(to.clone(), *node);
        }
    }
}

impl DirNode {
    pub(super) fn change(&mut self, change: NameChange) {
        apply(&mut self.seen, &change);
        self.pending.push(change);
    }

    pub(super) fn sync(&mut self) {
        self.disk.clone_from(&self.seen);
        self.pending.clear();
    }

    pub(super) fn cut_power(&mut self, mode: u64, random: &mut Random) {
        for change in std::mem::take(&mut self.pending) {
            if mode == 1 || (mode > 1 && random.one_in(2)) {
                apply(&mut self.disk, &change);
            }
        }
        self.seen.clone_from(&self.disk);
    }
}
