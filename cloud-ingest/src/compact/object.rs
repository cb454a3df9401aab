//! A Parquet file of the store: its bytes as Parquet's reader wants them, and whether they are those that were written.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use deltalake_core::logstore::ObjectStoreRef;
use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use super::{Pace, Progress};

/// One object of a known size.
#[derive(Debug)]
pub(super) struct ObjectReader {
    pub(super) store: ObjectStoreRef,
    pub(super) path: Path,
    pub(super) bytes: u64,
}

/// What is read at a time to compute a checksum.
const PART_BYTES: u64 = 8 << 20;

fn failed(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

impl ObjectReader {
    /// CRC32C of all of its bytes, at this pace; `progress` is told each part.
    pub(super) async fn checksum(&self, pace: &mut Pace, progress: Progress<'_>) -> Result<u32> {
        let (mut crc, mut at) = (0, 0);
        while at < self.bytes {
            let end = self.bytes.min(at + PART_BYTES);
            let part = self.store.get_range(&self.path, at..end).await.map_err(failed)?;
            crc = crc32c::crc32c_append(crc, &part);
            at = end;
            progress(0);
            // What is read at once is no work to pause for: of many small files the pauses would be most.
            if at < self.bytes {
                pace.breathe().await;
            }
        }
        Ok(crc)
    }
}

impl AsyncFileReader for ObjectReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        self.store.get_range(&self.path, range).map_err(failed).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        async move { self.store.get_ranges(&self.path, &ranges).await.map_err(failed) }.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        async move {
            let bytes = self.bytes;
            let reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            reader.load_and_finish(self, bytes).await.map(Arc::new)
        }
        .boxed()
    }
}
