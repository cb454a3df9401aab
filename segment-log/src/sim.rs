//! A file system in memory that can lose power, for tests of whatever stands on [`FileLayer`].
//!
//! It keeps apart what programs see (the page cache) and what is on disk. When the power is cut,
//! each unsynced 512-byte sector keeps its old bytes, one of the versions written since, or a torn
//! mixture of the two; a file keeps its old length or one set since; each unsynced change of a name
//! has happened or not. This is harsher than any real file system: whatever survives it relies on
//! nothing but `sync_data` and `sync_dir`. All chance comes from the seed of the [`Random`] that the
//! test hands in. A failed sync behaves as on Linux: the bytes stay readable, look clean, and are
//! never written.

mod nodes;

use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::layer::{FileLayer, LayerFile};

use nodes::{DirNode, FileNode, NameChange};

/// A small seeded generator (SplitMix64), the same on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is above 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug)]
enum Node {
    File(FileNode),
    Dir(DirNode),
}

#[derive(Clone, Debug)]
struct World {
    /// By number; the root directory is 0. Nodes are never reused.
    nodes: Vec<Node>,
    /// Counts power cuts; handles from before one are dead.
    boot: u64,
    powered: bool,
    /// Changes left until the power goes.
    changes_left: Option<u64>,
    /// Syncs left until one fails.
    syncs_left: Option<u64>,
    syncs_failed: u64,
    /// Bytes that all files together may have.
    capacity: u64,
    /// Files made or lengthened until the disk is full.
    growths_left: Option<u64>,
    changes: u64,
}

/// The simulated file system; clones are the same one.
#[derive(Clone, Debug)]
pub struct SimLayer {
    world: Arc<Mutex<World>>,
}

impl Default for SimLayer {
    fn default() -> Self {
        Self::new()
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

fn power_is_off() -> io::Error {
    io::Error::other("the power is off")
}

impl SimLayer {
    /// An empty file system.
    pub fn new() -> Self {
        let world = World {
            nodes: vec![Node::Dir(DirNode::default())],
            boot: 0,
            powered: true,
            changes_left: None,
            syncs_left: None,
            syncs_failed: 0,
            capacity: u64::MAX,
            growths_left: None,
            changes: 0,
        };
        Self { world: Arc::new(Mutex::new(world)) }
    }

    /// Another file system with the same contents: a copied disk image.
    pub fn copy(&self) -> Self {
        let world = self.world().clone();
        Self { world: Arc::new(Mutex::new(world)) }
    }

    /// The power goes in the middle of the change (write, allocation, sync, change of a name) after
    /// the next `changes` ones. From then on all calls fail until [`power_cut`](Self::power_cut).
    pub fn fail_after(&self, changes: u64) {
        self.world().changes_left = Some(changes);
    }

    /// The sync after the next `syncs` ones fails, of a file or a directory.
    pub fn fail_sync_after(&self, syncs: u64) {
        self.world().syncs_left = Some(syncs);
    }

    /// Whether the power is on.
    pub fn powered(&self) -> bool {
        self.world().powered
    }

    /// Changes made so far.
    pub fn changes(&self) -> u64 {
        self.world().changes
    }

    /// Syncs that were made to fail so far.
    pub fn syncs_failed(&self) -> u64 {
        self.world().syncs_failed
    }

    /// The bytes that all files together may have; allocating more meets a full disk.
    pub fn set_capacity(&self, bytes: u64) {
        self.world().capacity = bytes;
    }

    /// The bytes that all files together have.
    pub fn bytes(&self) -> u64 {
        self.world().used()
    }

    /// Cuts the power, if it is still on, and starts the machine again with what the disk has kept.
    /// All open handles are dead.
    pub fn power_cut(&self, random: &mut Random) {
        let world = &mut *self.world();
        // Now and then nothing of it has reached the disk, or all.
        let mode = random.below(8);
        for node in &mut world.nodes {
            match node {
                Node::File(file) => file.cut_power(mode, random),
                Node::Dir(dir) => dir.cut_power(mode, random),
            }
        }
        world.boot += 1;
        world.powered = true;
        world.changes_left = None;
        world.syncs_left = None;
    }

    /// Changes the bytes of a file behind everyone's back, on disk and as seen: rot.
    pub fn edit(&self, path: &Path, edit: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let world = &mut *self.world();
        let node = world.find(path)?;
        let Node::File(file) = &mut world.nodes[node] else {
            return Err(not_found());
        };
        edit(&mut file.seen);
        file.disk.clone_from(&file.seen);
        file.forget_unsynced();
        Ok(())
    }

    /// The disk is full after the next `growths` files were made or lengthened, and stays so until [`empty`](Self::empty).
    pub fn fill_after(&self, growths: u64) {
        self.world().growths_left = Some(growths);
    }

    /// Whether [`fill_after`](Self::fill_after) has come about.
    pub fn is_full(&self) -> bool {
        self.world().growths_left == Some(0)
    }

    /// The disk has room again.
    pub fn empty(&self) {
        self.world().growths_left = None;
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl World {
    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut node = 0;
        for component in path.components() {
            if let Component::Normal(name) = component {
                let Node::Dir(dir) = &self.nodes[node] else {
                    return Err(not_found());
                };
                node = *dir.seen.get(name).ok_or_else(not_found)?;
            }
        }
        Ok(node)
    }

    fn grow(&mut self) -> io::Result<()> {
        match &mut self.growths_left {
            Some(0) => Err(io::ErrorKind::StorageFull.into()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn dir(&mut self, path: &Path) -> io::Result<&mut DirNode> {
        let node = self.find(path)?;
        match &mut self.nodes[node] {
            Node::Dir(dir) => Ok(dir),
            Node::File(_) => Err(not_found()),
        }
    }

    /// The directory of a name, and the name.
    fn entry(&mut self, path: &Path) -> io::Result<(&mut DirNode, OsString)> {
        let name = path.file_name().ok_or_else(not_found)?.to_os_string();
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok((self.dir(parent)?, name))
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        let number = self.nodes.len();
        let (dir, name) = self.entry(path)?;
        if dir.seen.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        dir.change(NameChange::Set(name, number));
        self.nodes.push(node);
        Ok(number)
    }

    fn check_power(&self) -> io::Result<()> {
        if self.powered { Ok(()) } else { Err(power_is_off()) }
    }

    /// Called before each change.
    fn begin(&mut self) -> io::Result<()> {
        self.check_power()?;
        self.changes += 1;
        Ok(())
    }

    /// Called after each change: whether the power lasted through it.
    fn finish(&mut self) -> io::Result<()> {
        match &mut self.changes_left {
            Some(0) => self.powered = false,
            Some(left) => *left -= 1,
            None => {}
        }
        self.check_power()
    }

    /// Called before each sync: an error without effect when the power goes in the middle of it,
    /// since what is pending then survives by chance anyway. The second answer is whether the
    /// sync is to fail.
    fn begin_sync(&mut self) -> io::Result<bool> {
        self.begin()?;
        self.finish()?;
        Ok(match &mut self.syncs_left {
            Some(0) => {
                self.syncs_left = None;
                self.syncs_failed += 1;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        })
    }

    fn used(&self) -> u64 {
        let mut named = vec![false; self.nodes.len()];
        for node in &self.nodes {
            if let Node::Dir(dir) = node {
                dir.seen.values().for_each(|node| named[*node] = true);
            }
        }
        let files = self.nodes.iter().zip(named).filter(|(_, named)| *named);
        files
            .map(|(node, _)| match node {
                Node::File(file) => file.seen.len() as u64,
                Node::Dir(_) => 0,
            })
            .sum()
    }
}

impl FileLayer for SimLayer {
    type File = SimFile;

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.begin()?;
        world.add(path, Node::Dir(DirNode::default()))?;
        world.finish()
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let world = self.world();
        world.check_power()?;
        Ok(world.find(path).is_ok())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let mut world = self.world();
        world.check_power()?;
        let dir = world.dir(directory)?;
        Ok(dir.seen.keys().filter_map(|name| name.to_str().map(str::to_owned)).collect())
    }

    fn create(&self, path: &Path) -> io::Result<SimFile> {
        let mut world = self.world();
        world.begin()?;
        world.grow()?;
        let node = world.add(path, Node::File(FileNode::default()))?;
        world.finish()?;
        Ok(self.handle(&world, node, path))
    }

    fn open(&self, path: &Path) -> io::Result<SimFile> {
        let world = self.world();
        world.check_power()?;
        let node = world.find(path)?;
        Ok(self.handle(&world, node, path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.begin()?;
        let (dir, name) = world.entry(path)?;
        if !dir.seen.contains_key(&name) {
            return Err(not_found());
        }
        dir.change(NameChange::Unset(name));
        world.finish()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.begin()?;
        if from.parent() != to.parent() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let node = world.find(from)?;
        let (_, new_name) = world.entry(to)?;
        let (dir, old_name) = world.entry(from)?;
        dir.change(NameChange::Move(old_name, new_name, node));
        world.finish()
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.begin()?;
        if from.parent() != to.parent() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let node = world.find(from)?;
        let (dir, name) = world.entry(to)?;
        if dir.seen.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        dir.change(NameChange::Set(name, node));
        world.finish()
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        let mut world = self.world();
        let fails = world.begin_sync()?;
        let dir = world.dir(directory)?;
        if fails {
            dir.pending.clear();
            return Err(io::Error::other("directory sync"));
        }
        dir.sync();
        Ok(())
    }
}

impl SimLayer {
    fn handle(&self, world: &World, node: usize, path: &Path) -> SimFile {
        SimFile {
            layer: self.clone(),
            node,
            boot: world.boot,
            path: path.to_path_buf(),
            holds_lock: AtomicBool::new(false),
        }
    }
}

/// An open file of a [`SimLayer`].
#[derive(Debug)]
pub struct SimFile {
    layer: SimLayer,
    node: usize,
    boot: u64,
    path: PathBuf,
    holds_lock: AtomicBool,
}

impl SimFile {
    fn with<R>(&self, work: impl FnOnce(&mut World, usize) -> io::Result<R>) -> io::Result<R> {
        let mut world = self.layer.world();
        if world.boot != self.boot {
            return Err(io::Error::other(format!("{}: handle of an earlier boot", self.path.display())));
        }
        world.check_power()?;
        work(&mut world, self.node)
    }
}

fn file(world: &mut World, node: usize) -> io::Result<&mut FileNode> {
    match &mut world.nodes[node] {
        Node::File(file) => Ok(file),
        Node::Dir(_) => Err(io::ErrorKind::IsADirectory.into()),
    }
}

impl LayerFile for SimFile {
    fn size(&self) -> io::Result<u64> {
        self.with(|world, node| Ok(file(world, node)?.seen.len() as u64))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|world, node| {
            let bytes = &file(world, node)?.seen;
            let rest = bytes.get(offset as usize..).unwrap_or(&[]);
            let count = rest.len().min(buffer.len());
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        })
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(|world, node| {
            world.begin()?;
            file(world, node)?.write(bytes, offset as usize);
            world.finish()
        })
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.with(|world, node| {
            world.begin()?;
            world.grow()?;
            let room = world.capacity.saturating_sub(world.used());
            let file = file(world, node)?;
            let more = bytes.saturating_sub(file.seen.len() as u64);
            if more > room {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if more > 0 {
                file.resize(bytes as usize);
            }
            world.finish()
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|world, node| {
            let fails = world.begin_sync()?;
            let file = file(world, node)?;
            if fails {
                file.forget_unsynced();
                return Err(io::Error::other("file sync"));
            }
            file.sync();
            Ok(())
        })
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.with(|world, node| {
            let file = file(world, node)?;
            let free = !file.locked;
            file.locked = true;
            if free {
                self.holds_lock.store(true, Ordering::Relaxed);
            }
            Ok(free)
        })
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        if self.holds_lock.load(Ordering::Relaxed) {
            let mut world = self.layer.world();
            if world.boot == self.boot
                && let Node::File(file) = &mut world.nodes[self.node]
            {
                file.locked = false;
            }
        }
    }
}
