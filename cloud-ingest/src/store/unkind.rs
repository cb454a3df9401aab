//! An object store for tests, in memory, that is not as one would wish.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};

/// While it hangs, what is asked about the table `a_stuck` is never answered. As many lists as `lists_with_gaps` says lack
/// the entry before the last one.
#[derive(Debug, Default)]
pub(crate) struct Unkind {
    inner: InMemory,
    pub(crate) hangs: AtomicBool,
    pub(crate) lists_with_gaps: AtomicUsize,
}

impl fmt::Display for Unkind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an unkind store")
    }
}

impl Unkind {
    async fn answers(&self, path: &Path) {
        if self.hangs.load(Ordering::Relaxed) && path.as_ref().contains("a_stuck") {
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait::async_trait]
impl ObjectStore for Unkind {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.answers(path).await;
        self.inner.put_opts(path, payload, options).await
    }
    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.answers(path).await;
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.answers(path).await;
        self.inner.get_opts(path, options).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let hangs = self.hangs.load(Ordering::Relaxed) && prefix.is_some_and(|path| path.as_ref().contains("a_stuck"));
        if hangs {
            return futures::stream::pending().boxed();
        }
        let listed = self.inner.list(prefix);
        let less = |left: usize| left.checked_sub(1);
        if self.lists_with_gaps.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_err() {
            return listed;
        }
        let gap = async move {
            let mut all: Vec<_> = listed.collect().await;
            drop(all.remove(all.len() - 2));
            futures::stream::iter(all)
        };
        futures::stream::once(gap).flatten().boxed()
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
}
