//! Where the tables are: a directory whose files are synced before they count, or an S3 bucket.
//!
//! A [`Store`] hands each table its log store; everything that delta-rs writes goes through it. On a local file
//! system that is [`SyncedFiles`], because `object_store` never syncs: a put that returned `Ok`
//! is on disk, with its name and all directories above it. A failed sync is never retried: the store refuses every
//! later write, [`Store::sync_failure`] says why, and the process must stop.
//! On S3 a commit is a conditional put, so several nodes may share a table.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore};
use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use segment_log::{Disk, FileLayer};
use url::Url;
use wire::ids::StreamName;

mod files;

use files::SyncedFiles;

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("`{url}` is not the address of a store: file:///path or s3://bucket/prefix is needed")]
    Address { url: String },
    #[error("open the store {url}")]
    Open { url: String, source: std::io::Error },
    #[error("use the store {url}")]
    Object { url: String, source: Box<object_store::Error> },
}

/// How to reach an S3 store. What is not set comes from the environment (`AWS_ACCESS_KEY_ID`, …).
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Settings {
    /// Address of the service, for those that are not Amazon's.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// Allows an endpoint without TLS.
    pub allow_http: bool,
}

/// Makes names durable again that a process which died may have left unsynced.
trait Settle: Send + Sync + std::fmt::Debug {
    fn settle(&self, directory: &Path) -> std::io::Result<()>;
}

/// The place of all tables. Clones are the same place.
#[derive(Debug, Clone)]
pub struct Store {
    /// Rooted at `/`, or at the bucket.
    root: Arc<dyn ObjectStore>,
    /// Ends with `/`.
    url: Url,
    /// The local directory of the tables; none on S3, where a put is durable when it is answered.
    local: Option<(PathBuf, Arc<dyn Settle>)>,
    sync_failure: Arc<OnceLock<String>>,
}

impl Store {
    /// Opens the store at `file:///path` (made if it is not there) or `s3://bucket/prefix`.
    ///
    /// # Errors
    /// When the address is neither, or the directory cannot be made or synced.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, &S3Settings::default())
    }

    /// Opens the store with settings for S3.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(url: &str, s3: &S3Settings) -> Result<Self, StoreError> {
        let address = || StoreError::Address { url: url.to_owned() };
        let mut parsed = Url::parse(url).map_err(|_| address())?;
        if !parsed.path().ends_with('/') {
            parsed.set_path(&format!("{}/", parsed.path()));
        }
        match parsed.scheme() {
            "file" if url.starts_with("file:///") => {
                let directory = parsed.to_file_path().map_err(|()| address())?;
                std::fs::create_dir_all(&directory)
                    .map_err(|source| StoreError::Open { url: url.to_owned(), source })?;
                Self::on_files(Disk, &directory, parsed, Arc::new(LocalFileSystem::new()))
            }
            "s3" => Self::on_s3(parsed, s3),
            _ => Err(address()),
        }
    }

    /// A store in `directory` of a file layer, which tables know by the address `url`, whose path is that directory.
    /// `reads` is an object store that shows the same files, rooted at `/`.
    ///
    /// # Errors
    /// When a directory above cannot be synced.
    pub fn on_files<L: FileLayer>(
        layer: L,
        directory: &Path,
        url: Url,
        reads: Arc<dyn ObjectStore>,
    ) -> Result<Self, StoreError> {
        let sync_failure = Arc::new(OnceLock::new());
        let files = SyncedFiles::open(layer, directory, reads, sync_failure.clone())
            .map_err(|source| StoreError::Open { url: url.to_string(), source })?;
        let settle = files.names();
        Ok(Self { root: Arc::new(files), url, local: Some((directory.to_owned(), settle)), sync_failure })
    }

    fn on_s3(url: Url, s3: &S3Settings) -> Result<Self, StoreError> {
        let bucket = url.host_str().ok_or_else(|| StoreError::Address { url: url.to_string() })?;
        let mut builder =
            AmazonS3Builder::from_env().with_bucket_name(bucket).with_conditional_put(S3ConditionalPut::ETagMatch);
        if s3.allow_http {
            builder = builder.with_allow_http(true);
        }
        if let Some(endpoint) = &s3.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &s3.region {
            builder = builder.with_region(region);
        }
        let bucket =
            builder.build().map_err(|source| StoreError::Object { url: url.to_string(), source: Box::new(source) })?;
        Ok(Self::on_objects(url, Arc::new(bucket)))
    }

    /// A store whose puts are durable when they are answered. `root` is rooted at the bucket, and `url` ends with `/`.
    pub fn on_objects(url: Url, root: Arc<dyn ObjectStore>) -> Self {
        Self { root, url, local: None, sync_failure: Arc::default() }
    }

    /// The address of a stream's table, with a `/` at its end.
    pub fn table_url(&self, stream: &StreamName) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}{stream}/", self.url.path()));
        url
    }

    /// The log store of a stream's table.
    pub fn log_store(&self, stream: &StreamName) -> LogStoreRef {
        let url = self.table_url(stream);
        let prefix = object_path(&url);
        let table = PrefixStore::new(self.root.clone(), prefix);
        default_logstore(Arc::new(table), self.root.clone(), &url, &StorageConfig::default())
    }

    /// Why a sync failed; from then on nothing is written, and the process must stop.
    pub fn sync_failure(&self) -> Option<&str> {
        self.sync_failure.get().map(String::as_str)
    }

    /// Syncs the names in a table's log. What a commit of another process shows may not be durable yet: its
    /// transactions count only after this.
    pub(crate) async fn settle(&self, stream: &StreamName) -> Result<(), StoreError> {
        let Some((directory, names)) = &self.local else { return Ok(()) };
        let log = directory.join(stream.as_str()).join("_delta_log");
        let names = names.clone();
        let settled = files::blocking(move || names.settle(&log)).await;
        settled.map_err(|source| StoreError::Open { url: self.table_url(stream).to_string(), source })
    }

    /// Files of a table on this machine that are staged since before, with their bytes: their process has died.
    pub(crate) fn staged(&self, stream: &StreamName, before: SystemTime) -> Vec<(PathBuf, u64)> {
        let Some((directory, _)) = &self.local else { return Vec::new() };
        let table = directory.join(stream.as_str());
        let mut directories = vec![table];
        let mut found = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    directories.push(entry.path());
                } else if is_staged(&entry.file_name()) && meta.modified().is_ok_and(|modified| modified < before) {
                    found.push((entry.path(), meta.len()));
                }
            }
        }
        found
    }

    async fn table_names(&self) -> Result<Vec<String>, StoreError> {
        let prefix = object_path(&self.url);
        let listed = self.root.list_with_delimiter(Some(&prefix)).await;
        let listed =
            listed.map_err(|source| StoreError::Object { url: self.url.to_string(), source: Box::new(source) })?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned));
        Ok(names.collect())
    }
}

/// Whether a name is one that [`SyncedFiles`] gives to what it has not completed: `name#number`.
fn is_staged(name: &std::ffi::OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The path of an address below the root of its object store. Names in it are used as they stand, as by delta-rs.
fn object_path(url: &Url) -> object_store::path::Path {
    match object_store::ObjectStoreScheme::parse(url) {
        Ok((_, path)) => path,
        Err(_) => object_store::path::Path::from(url.path()),
    }
}

/// The streams that may have a table in this store, in order of name: each directory that is named like a stream.
///
/// # Errors
/// When the store does not answer.
pub async fn list_streams(store: &Store) -> Result<Vec<StreamName>, StoreError> {
    let mut streams: Vec<StreamName> = store.table_names().await?.iter().filter_map(|name| name.parse().ok()).collect();
    streams.sort();
    Ok(streams)
}

#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
pub(crate) mod unkind;
