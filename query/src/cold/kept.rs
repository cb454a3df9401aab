//! Pages of files that were read lately are kept as they are decoded from: decompressed, not yet rows.
//!
//! A dashboard asks about the same devices again, and about others beside them in the same pages. To open the decompressor of
//! a page, to fetch it and to decompress it takes more time than to decode its rows. Files never change, so what is kept stays
//! right. Of the column of devices it is kept which rows are of which device (`devices`), in place of its pages.
//!
//! What is kept lies in two halves. What is asked for goes into the younger one; when that is full, it becomes the older one,
//! and what was in that and was not asked for since is gone.

use std::collections::{HashMap, VecDeque};
use std::iter;
use std::mem::take;
use std::ops::Range;
use std::sync::Arc;

use bytes::buf::Reader;
use bytes::{Buf, Bytes};
use datafusion::common::{HashMap as FastMap, Result};
use datafusion::object_store::{ObjectMeta, ObjectStore};
use datafusion::parquet::arrow::FieldLevels;
use datafusion::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, RowGroups, RowSelection, RowSelector};
use datafusion::parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use datafusion::parquet::errors::{ParquetError, Result as ParquetResult};
use datafusion::parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use datafusion::parquet::file::page_index::offset_index::PageLocation;
use datafusion::parquet::file::reader::{ChunkReader, Length};
use datafusion::parquet::file::serialized_reader::SerializedPageReader;
use parking_lot::Mutex;

use super::devices::Devices;

/// Pieces of a selection that have fewer rows than this on average may be read as one: twice what the reader goes by.
const PIECE_ROWS: usize = 64;
/// Who asks for more rows of a row group asks for most of it.
const ROWS_MAX: usize = 1 << 16;
/// Rows of which devices are looked at at a time.
const BATCH_ROWS: usize = 8_192;
/// What a page takes beside its bytes.
const ENTRY_BYTES: usize = 256;

/// See the module.
#[derive(Debug)]
pub(crate) struct KeptPages {
    bytes_max: usize,
    /// Of a row group, pages for more rows than this are not kept.
    pub(super) rows_max: usize,
    halves: Mutex<Halves>,
}

#[derive(Debug, Default)]
struct Halves {
    young: FastMap<Place, Kept>,
    young_bytes: usize,
    old: FastMap<Place, Kept>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    file: Arc<str>,
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    /// A page, by where it begins.
    Page(i64),
    /// The devices of a row group.
    Devices(usize),
}

#[derive(Debug, Clone)]
enum Kept {
    Page(Page),
    /// None: those of the group are not told by runs.
    Devices(Option<Arc<Devices>>),
}

impl Kept {
    fn bytes(&self) -> usize {
        let own = match self {
            Self::Page(page) => page.buffer().len(),
            Self::Devices(devices) => devices.as_ref().map_or(0, |devices| devices.bytes()),
        };
        own + ENTRY_BYTES
    }
}

impl KeptPages {
    /// Keeps no more bytes than so many.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, rows_max: ROWS_MAX, halves: Mutex::default() }
    }

    fn get(&self, place: &Place) -> Option<Kept> {
        let mut halves = self.halves.lock();
        if let Some(kept) = halves.young.get(place) {
            return Some(kept.clone());
        }
        let kept = halves.old.remove(place)?;
        self.add(&mut halves, place, kept.clone());
        Some(kept)
    }

    fn put(&self, place: &Place, kept: Kept) {
        self.add(&mut self.halves.lock(), place, kept);
    }

    fn add(&self, halves: &mut Halves, place: &Place, kept: Kept) {
        let (bytes, half) = (kept.bytes(), self.bytes_max / 2);
        if bytes > half {
            return;
        }
        if halves.young_bytes + bytes > half {
            (halves.old, halves.young_bytes) = (take(&mut halves.young), 0);
        }
        if halves.young.insert(place.clone(), kept).is_none() {
            halves.young_bytes += bytes;
        }
    }

    fn page(&self, place: &Place) -> Option<Page> {
        match self.get(place)? {
            Kept::Page(page) => Some(page),
            Kept::Devices(_) => None,
        }
    }

    /// Which rows of a row group are of which device; none where it is not told by runs. `leaves` is that column, `levels`
    /// what it is read as: indices.
    ///
    /// # Errors
    /// As [`KeptPages::read`].
    pub(super) async fn devices(
        &self,
        store: &dyn ObjectStore,
        file: &ObjectMeta,
        footer: &Arc<ParquetMetaData>,
        group: usize,
        (leaves, levels): &(Vec<usize>, FieldLevels),
    ) -> Result<Option<Arc<Devices>>> {
        let place = Place { file: name_of(file), part: Part::Devices(group) };
        if let Some(Kept::Devices(devices)) = self.get(&place) {
            return Ok(devices);
        }
        let rows = usize::try_from(footer.row_group(group).num_rows()).unwrap_or(0);
        let all = RowSelection::from(vec![RowSelector::select(rows)]);
        // Its pages are not asked for again.
        let pages = KeptPages::new(0).read(store, file, footer, group, leaves, &all).await?;
        let batches = ParquetRecordBatchReader::try_new_with_row_groups(levels, &pages, BATCH_ROWS, None)?;
        let devices = Devices::of(batches, rows)?.map(Arc::new);
        self.put(&place, Kept::Devices(devices.clone()));
        Ok(devices)
    }

    /// The selected pages of some columns in a row group: those that are kept, and the others out of the file, which has to tell
    /// where its pages are.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what it says.
    pub(super) async fn read(
        &self,
        store: &dyn ObjectStore,
        file: &ObjectMeta,
        footer: &Arc<ParquetMetaData>,
        group: usize,
        columns: &[usize],
        selection: &RowSelection,
    ) -> Result<Group> {
        let indices = footer.offset_index().and_then(|index| index.get(group)).ok_or_else(|| lacks("pages"))?;
        let name = name_of(file);
        let of_group = footer.row_group(group);
        let rows = usize::try_from(of_group.num_rows()).unwrap_or(0);
        let selected = pieces(selection);
        let (mut chunks, mut missing) = (HashMap::new(), Vec::new());
        for column in columns {
            let locations = indices.get(*column).ok_or_else(|| lacks("pages"))?.page_locations();
            let mut slots = VecDeque::new();
            let (start, _) = of_group.column(*column).byte_range();
            let start = i64::try_from(start).map_err(|_| lacks("a dictionary"))?;
            let dictionary = locations.first().filter(|first| first.offset != start).map(|first| PageLocation {
                offset: start,
                compressed_page_size: i32::try_from(first.offset.saturating_sub(start)).unwrap_or(0),
                first_row_index: 0,
            });
            let ends = locations.iter().skip(1).map(|next| next.first_row_index as usize).chain([rows]);
            let data = locations.iter().zip(ends).map(|(page, end)| {
                let of_page = page.first_row_index as usize..end;
                let wanted = selected.iter().any(|rows| rows.start < of_page.end && of_page.start < rows.end);
                (page, Some(of_page.len()), wanted)
            });
            for (location, rows, wanted) in dictionary.iter().map(|page| (page, None, true)).chain(data) {
                let place = Place { file: Arc::clone(&name), part: Part::Page(location.offset) };
                let page = wanted.then(|| self.page(&place)).flatten();
                if wanted && page.is_none() {
                    let bytes = bytes_of(location, file).ok_or_else(|| lacks("bytes"))?;
                    missing.push((*column, slots.len(), place, bytes));
                }
                slots.push_back(Slot { rows, page });
            }
            chunks.insert(*column, (slots, locations));
        }
        if !missing.is_empty() {
            let wanted = missing.iter().map(|(.., bytes)| bytes.clone()).collect::<Vec<_>>();
            let found = store.get_ranges(&file.location, &wanted).await?;
            let sparse = wanted.iter().map(|bytes| bytes.start).zip(found).collect();
            let sparse = Arc::new(Sparse { size: file.size, parts: sparse });
            for of_column in missing.chunk_by(|one, other| one.0 == other.0) {
                let Some((slots, locations)) = chunks.get_mut(&of_column[0].0) else { continue };
                let (sparse, column) = (Arc::clone(&sparse), of_group.column(of_column[0].0));
                let mut pages = SerializedPageReader::new(sparse, column, rows, Some(locations.to_vec()))?;
                let mut at = 0;
                for (_, index, place, _) in of_column {
                    for _ in at..*index {
                        pages.skip_next_page()?;
                    }
                    at = index + 1;
                    let page = pages.get_next_page()?.ok_or_else(|| lacks("a page"))?;
                    self.put(place, Kept::Page(page.clone()));
                    slots[*index].page = Some(page);
                }
            }
        }
        let chunks = chunks.into_iter().map(|(column, (slots, _))| (column, slots)).collect();
        Ok(Group { footer: Arc::clone(footer), group, chunks })
    }
}

/// One that another file does not have, nor the same one when something else was written to its place.
fn name_of(file: &ObjectMeta) -> Arc<str> {
    format!("{} {} {}", file.location, file.size, file.last_modified.timestamp_micros()).into()
}

/// Where a page is in a file; none when that has no such place.
fn bytes_of(page: &PageLocation, file: &ObjectMeta) -> Option<Range<u64>> {
    let start = u64::try_from(page.offset).ok()?;
    let end = start.checked_add(u64::try_from(page.compressed_page_size).ok()?)?;
    (start < end && end <= file.size).then_some(start..end)
}

/// The rows that are read for a selection. Of small pieces the reader takes what lies between, too, and leaves it out later.
fn pieces(selection: &RowSelection) -> Vec<Range<usize>> {
    let rows = ranges(selection);
    let (parts, all) = selection.iter().fold((0, 0), |(parts, all), part| (parts + 1, all + part.row_count));
    match (rows.first(), rows.last()) {
        (Some(first), Some(last)) if all < parts * PIECE_ROWS => iter::once(first.start..last.end).collect(),
        _ => rows,
    }
}

/// The rows that a selection takes.
pub(super) fn ranges(selection: &RowSelection) -> Vec<Range<usize>> {
    let mut at = 0;
    let parts = selection.iter().map(|part| {
        at += part.row_count;
        (!part.skip).then_some(at - part.row_count..at)
    });
    parts.flatten().collect()
}

fn lacks(what: &str) -> ParquetError {
    ParquetError::General(format!("a Parquet file lacks {what} that its index names"))
}

/// The pages of a row group that were asked for.
pub(super) struct Group {
    footer: Arc<ParquetMetaData>,
    group: usize,
    /// Of each column.
    chunks: HashMap<usize, VecDeque<Slot>>,
}

/// A page of a column.
#[derive(Debug, Clone)]
struct Slot {
    /// How many it has; none for a dictionary.
    rows: Option<usize>,
    /// None: it is not asked for.
    page: Option<Page>,
}

impl RowGroups for Group {
    fn num_rows(&self) -> usize {
        usize::try_from(self.footer.row_group(self.group).num_rows()).unwrap_or(0)
    }

    fn column_chunks(&self, column: usize) -> ParquetResult<Box<dyn PageIterator>> {
        let slots = self.chunks.get(&column).ok_or_else(|| lacks("a column"))?;
        Ok(Box::new(One(Some(Slots(slots.clone())))))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(iter::once(self.footer.row_group(self.group)))
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.footer
    }
}

/// The one chunk of a column.
struct One(Option<Slots>);

impl Iterator for One {
    type Item = ParquetResult<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(|slots| Ok(Box::new(slots) as _))
    }
}

impl PageIterator for One {}

struct Slots(VecDeque<Slot>);

impl Iterator for Slots {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Slots {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let next = self.0.pop_front().map(|slot| slot.page.ok_or_else(|| lacks("rows")));
        next.transpose()
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        let next = self.0.front();
        Ok(next.map(|slot| PageMetadata { num_rows: slot.rows, num_levels: None, is_dict: slot.rows.is_none() }))
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.0.pop_front();
        Ok(())
    }

    /// Pages that an index names begin with a row.
    fn at_record_boundary(&mut self) -> ParquetResult<bool> {
        Ok(true)
    }
}

/// Parts of a file, each by where it begins.
struct Sparse {
    size: u64,
    parts: HashMap<u64, Bytes>,
}

impl Length for Sparse {
    fn len(&self) -> u64 {
        self.size
    }
}

impl ChunkReader for Sparse {
    type T = Reader<Bytes>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(self.parts.get(&start).ok_or_else(|| lacks("bytes"))?.clone().reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let part = self.parts.get(&start).and_then(|part| part.get(..length)).ok_or_else(|| lacks("bytes"))?;
        // It may be a piece of more that was fetched at once, all of which it would keep.
        Ok(Bytes::copy_from_slice(part))
    }
}

#[cfg(test)]
mod tests;
