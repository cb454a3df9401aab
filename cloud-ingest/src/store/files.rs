//! An object store over a file layer that syncs.
//!
//! An object is staged under `name#number` beside its place (names that `LocalFileSystem` hides from lists), synced,
//! then linked (create if absent) or renamed (overwrite) into place, and its directory is synced. Directories are
//! synced into their parents the first time that this process writes into them, even when they were there: the
//! process that made them may have died before it could.
//! Reads, lists and deletes go to another object store that shows the same files; a delete is not synced.
//! A process that dies in between leaves its staged file behind; nothing reads it.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, TryFutureExt};
use object_store::path::Path;
use object_store::{
    CopyMode, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use parking_lot::Mutex;
use segment_log::{FileLayer, LayerFile};

use super::Settle;
use crate::failpoint;

const STORE: &str = "synced files";

/// Runs `work` where it may block: on a thread for it, or right here outside of a runtime.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => runtime.spawn_blocking(work).await.map_err(io::Error::other)?,
        Err(_) => work(),
    }
}

/// The object store, rooted at `/`; it writes only below its base directory.
#[derive(Debug)]
pub(super) struct SyncedFiles<L: FileLayer> {
    names: Arc<Names<L>>,
    reads: Arc<dyn ObjectStore>,
}

impl<L: FileLayer> SyncedFiles<L> {
    pub(super) fn open(
        layer: L,
        base: &FilePath,
        reads: Arc<dyn ObjectStore>,
        failure: Arc<OnceLock<String>>,
    ) -> io::Result<Self> {
        let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let names = Names {
            layer,
            base: base.to_owned(),
            durable: Mutex::default(),
            next_staged: AtomicU64::new(seed.as_nanos() as u64),
            failure,
        };
        names.sync_above(base)?;
        Ok(Self { names: Arc::new(names), reads })
    }

    pub(super) fn names(&self) -> Arc<dyn Settle> {
        self.names.clone()
    }
}

/// The part that writes; shared with uploads in progress.
#[derive(Debug)]
struct Names<L: FileLayer> {
    layer: L,
    base: PathBuf,
    /// Directories below the base whose own name is known to be durable.
    durable: Mutex<HashSet<PathBuf>>,
    next_staged: AtomicU64,
    failure: Arc<OnceLock<String>>,
}

impl<L: FileLayer> Names<L> {
    /// Syncs the directories from the root down to `base`, as far as they may be opened: a directory that belongs to
    /// someone else was there before us.
    fn sync_above(&self, base: &FilePath) -> io::Result<()> {
        let mut above: Vec<&FilePath> = base.ancestors().skip(1).collect();
        above.reverse();
        for directory in above {
            match self.layer.sync_dir(directory) {
                Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput) => {
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn place(&self, location: &Path) -> io::Result<PathBuf> {
        let place = FilePath::new("/").join(location.as_ref());
        if place.starts_with(&self.base) { Ok(place) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }

    fn check(&self) -> io::Result<()> {
        match self.failure.get() {
            Some(failure) => Err(io::Error::other(format!("an earlier sync failed: {failure}"))),
            None => Ok(()),
        }
    }

    /// Remembers the first sync that failed.
    fn synced(&self, path: &FilePath, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result {
            let _ = self.failure.set(format!("{}: {error}", path.display()));
        }
        result
    }

    fn sync_file(&self, file: &L::File, path: &FilePath) -> io::Result<()> {
        let result = file.sync_data(); // mutation: file sync of the store
        self.synced(path, result)
    }

    fn sync_directory(&self, directory: &FilePath) -> io::Result<()> {
        let result = self.layer.sync_dir(directory); // mutation: directory sync of the store
        self.synced(directory, result)
    }

    /// Makes `directory` and what is missing above it, and makes all these names durable.
    fn make_directory(&self, directory: &FilePath) -> io::Result<()> {
        if directory == self.base || self.durable.lock().contains(directory) {
            return Ok(());
        }
        let parent = directory.parent().ok_or(io::ErrorKind::NotFound)?;
        self.make_directory(parent)?;
        match self.layer.create_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        self.sync_directory(parent)?;
        self.durable.lock().insert(directory.to_owned());
        Ok(())
    }

    fn stage(&self, place: &FilePath) -> io::Result<Staged<L>> {
        self.check()?;
        let directory = place.parent().ok_or(io::ErrorKind::NotFound)?;
        self.make_directory(directory)?;
        loop {
            let mut name = place.as_os_str().to_owned();
            name.push(format!("#{}", self.next_staged.fetch_add(1, Ordering::Relaxed)));
            match self.layer.create(FilePath::new(&name)) {
                Ok(file) => return Ok(Staged { file, at: name.into(), place: place.to_owned() }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Puts a staged file into its place, durably. Whatever the error, the object may be there.
    fn publish(&self, staged: &Staged<L>, create: bool) -> io::Result<()> {
        failpoint::reach("store.staged");
        self.sync_file(&staged.file, &staged.at)?;
        if create {
            let linked = self.layer.link(&staged.at, &staged.place);
            let _ = self.layer.remove(&staged.at);
            linked?;
        } else {
            self.layer.rename(&staged.at, &staged.place)?;
        }
        failpoint::reach("store.named");
        self.sync_directory(staged.place.parent().ok_or(io::ErrorKind::NotFound)?)
    }

    fn put(&self, location: &Path, payload: &PutPayload, create: bool) -> io::Result<()> {
        let staged = self.stage(&self.place(location)?)?;
        let mut offset = 0;
        for bytes in payload {
            if let Err(error) = staged.file.write_all_at(bytes, offset) {
                let _ = self.layer.remove(&staged.at);
                return Err(error);
            }
            offset += bytes.len() as u64;
        }
        self.publish(&staged, create)
    }
}

impl<L: FileLayer> Settle for Names<L> {
    fn settle(&self, directory: &FilePath) -> io::Result<()> {
        self.check()?;
        if !self.layer.exists(directory)? {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.make_directory(directory)?;
        self.sync_directory(directory)
    }
}

/// A file that is being written.
#[derive(Debug)]
struct Staged<L: FileLayer> {
    file: L::File,
    at: PathBuf,
    place: PathBuf,
}

fn object_error(location: &Path, error: io::Error) -> object_store::Error {
    let path = location.to_string();
    match error.kind() {
        io::ErrorKind::AlreadyExists => object_store::Error::AlreadyExists { path, source: error.into() },
        io::ErrorKind::NotFound => object_store::Error::NotFound { path, source: error.into() },
        _ => object_store::Error::Generic { store: STORE, source: format!("{path}: {error}").into() },
    }
}

fn unsupported(operation: &str) -> object_store::Error {
    object_store::Error::NotImplemented { operation: operation.to_owned(), implementer: STORE.to_owned() }
}

impl<L: FileLayer> fmt::Display for SyncedFiles<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{STORE} in {}", self.names.base.display())
    }
}

#[async_trait::async_trait]
impl<L: FileLayer> ObjectStore for SyncedFiles<L> {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let create = match options.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => return Err(unsupported("put in mode update")),
        };
        let (names, place) = (self.names.clone(), location.clone());
        let put = blocking(move || names.put(&place, &payload, create)).await;
        put.map_err(|error| object_error(location, error))?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        _options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let (names, at) = (self.names.clone(), location.clone());
        let staged = blocking(move || names.stage(&names.place(&at)?)).await;
        let staged = staged.map_err(|error| object_error(location, error))?;
        let upload =
            Upload { names: self.names.clone(), staged: Some(Arc::new(staged)), location: location.clone(), offset: 0 };
        Ok(Box::new(upload))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.reads.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.reads.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.reads.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.reads.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.reads.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.reads.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let bytes = self.reads.get_opts(from, GetOptions::default()).await?.bytes().await?;
        let mode = match options.mode {
            CopyMode::Create => PutMode::Create,
            CopyMode::Overwrite => PutMode::Overwrite,
        };
        self.put_opts(to, bytes.into(), mode.into()).await?;
        Ok(())
    }
}

/// An object that comes in parts. Nothing of it shows before `complete`.
#[derive(Debug)]
struct Upload<L: FileLayer> {
    names: Arc<Names<L>>,
    /// None when it was completed or aborted.
    staged: Option<Arc<Staged<L>>>,
    location: Path,
    offset: u64,
}

#[async_trait::async_trait]
impl<L: FileLayer> MultipartUpload for Upload<L> {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let start = self.offset;
        self.offset += data.content_length() as u64;
        let (staged, location) = (self.staged.clone(), self.location.clone());
        let write = move || {
            let staged = staged.ok_or(io::ErrorKind::NotFound)?;
            let mut offset = start;
            for bytes in &data {
                staged.file.write_all_at(bytes, offset)?;
                offset += bytes.len() as u64;
            }
            Ok(())
        };
        blocking(write).map_err(move |error| object_error(&location, error)).boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let (names, staged) = (self.names.clone(), self.staged.take());
        let publish = move || names.publish(&*staged.ok_or(io::ErrorKind::NotFound)?, false);
        blocking(publish).await.map_err(|error| object_error(&self.location, error))?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn abort(&mut self) -> Result<()> {
        let (names, staged) = (self.names.clone(), self.staged.take());
        let remove = move || names.layer.remove(&staged.ok_or(io::ErrorKind::NotFound)?.at);
        blocking(remove).await.map_err(|error| object_error(&self.location, error))
    }
}

impl<L: FileLayer> Drop for Upload<L> {
    fn drop(&mut self) {
        if let Some(staged) = self.staged.take() {
            // Best effort: nothing reads a staged file.
            let _ = self.names.layer.remove(&staged.at);
        }
    }
}
