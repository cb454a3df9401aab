//! Rows of few devices out of many files, of which only the pages that may have them are read; and all rows of files, with
//! devices as indices.
//!
//! A question about one device over a year meets a file for each day, and takes a page out of each. DataFusion's Parquet
//! source prepares each file anew (its predicates, its pruning, two dozen counters), which costs more than to read the
//! page. Here a file costs a look at its footer, which is kept, and one request for the bytes of its pages. Devices are
//! read as indices into the page's dictionary, so that its other rows are left out before a text is made for any. Other
//! times that a page has go with them: whoever asks filters.
//!
//! Bounds of row groups and pages leave out what they can; a file without them is read whole. So the answer does not
//! depend on the order of a file's rows.
//!
//! Who groups by device takes the indices as they are (`groups`): no text is made of any row.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use arrow::buffer::BooleanBuffer;
use arrow::datatypes::{ArrowNativeType, DataType, Field, FieldRef, Int32Type, Schema, SchemaRef};
use arrow_array::builder::{ArrayBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow_schema::ArrowError;
use arrow_select::filter::filter_record_batch;
use datafusion::common::Result;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::listing::{FileRange, PartitionedFile};
use datafusion::datasource::object_store::ObjectStoreUrl;
use datafusion::datasource::physical_plan::parquet::metadata::DFParquetMetadata;
use datafusion::datasource::physical_plan::parquet::{ParquetFileMetrics, RowGroupAccess};
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfig, ParquetSource};
use datafusion::datasource::source::DataSourceExec;
use datafusion::execution::cache::cache_manager::FileMetadataCache;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::object_store::{ObjectMeta, ObjectStore};
use datafusion::parquet::DecodeResult;
use datafusion::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, RowSelection, RowSelector,
};
use datafusion::parquet::arrow::push_decoder::{ParquetPushDecoder, ParquetPushDecoderBuilder};
use datafusion::parquet::arrow::{FieldLevels, ProjectionMask, parquet_to_arrow_field_levels, parquet_to_arrow_schema};
use datafusion::parquet::basic::{LogicalType, TimeUnit};
use datafusion::parquet::errors::ParquetError;
use datafusion::parquet::file::metadata::{PageIndexPolicy, ParquetMetaData};
use datafusion::parquet::file::page_index::column_index::ColumnIndexMetaData;
use datafusion::parquet::file::statistics::Statistics as ColumnBounds;
use datafusion::parquet::schema::types::TypePtr;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::projection::ProjectionExpr;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_expr::{EquivalenceProperties, Partitioning, PhysicalExpr};
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType, ReplaceChildrenOptions};
use datafusion::physical_plan::metrics::{ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use wire::schema::{DATE, DEVICE, TS};

use super::condition::Condition;
use super::kept::{KeptPages, ranges};
use super::typed;
use crate::execution::counted;
use crate::fused_table::hot_columns;

/// Files of a partition that are opened before their rows are asked for.
const AHEAD: usize = 4;

/// What devices are read as: indices into the texts of a page's dictionary.
fn indices() -> DataType {
    DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
}

/// A scan of all of DataFusion's files, in the same parts and order, whose column of devices comes as indices; none where that
/// is not one, or the scan does more than to read columns and to look at values.
pub(crate) fn with_indices(scan: &DataSourceExec, column: usize) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let Some(config) = scan.data_source().downcast_ref::<FileScanConfig>() else { return Ok(None) };
    let source = config.file_source();
    let schema = scan.schema();
    let of_table = source.table_schema().table_schema();
    let reads = source.projection().is_some_and(|columns| {
        let named = |(column, field): (&ProjectionExpr, &FieldRef)| {
            let at = column.expr.downcast_ref::<Column>().map(Column::index);
            at.is_some_and(|at| of_table.field(at).name() == field.name())
        };
        columns.iter().zip(schema.fields()).all(named)
    });
    let device = schema.field(column);
    // Where a file has no time, a date that the log says is better than none.
    let has_date = schema.index_of(DATE).is_ok();
    if !reads || has_date || config.limit.is_some() {
        return Ok(None);
    }
    if !source.is::<ParquetSource>() || device.name() != DEVICE || *device.data_type() != DataType::Utf8 {
        return Ok(None);
    }
    let mut fields = schema.fields().to_vec();
    fields[column] = Arc::new(device.clone().with_data_type(indices()));
    let condition = source.filter();
    // What only the condition looks at is read and left out.
    let names = condition.iter().flat_map(collect_columns).map(|column| column.name().to_owned());
    let unread = names.filter(|name| schema.index_of(name).is_err()).collect::<BTreeSet<_>>();
    for name in unread {
        fields.push(Arc::new(of_table.field_with_name(&name)?.clone()));
    }
    let read = Arc::new(Schema::new(fields));
    let condition = match condition {
        None => None,
        Some(condition) => match Condition::of(&condition, &read)? {
            None => return Ok(None),
            condition => condition,
        },
    };
    let (files, url) = (config.file_groups.clone(), config.object_store_url.clone());
    let wanted = Wanted { devices: None, first: i64::MIN, last: i64::MAX, condition };
    let pages = PagesExec::new(files, url, wanted, Arc::clone(&read));
    let pages: Arc<dyn ExecutionPlan> = Arc::new(CooperativeExec::new(Arc::new(pages)));
    if read.fields().len() == schema.fields().len() {
        return Ok(Some(pages));
    }
    let columns = schema.fields().iter().enumerate().map(|(at, field)| {
        let column: Arc<dyn PhysicalExpr> = Arc::new(Column::new(field.name(), at));
        (column, field.name().clone())
    });
    Ok(Some(Arc::new(ProjectionExec::try_new(columns.collect::<Vec<_>>(), pages)?)))
}

/// What is wanted: rows of these devices, or of all, with event times from `first` to `last`, microseconds, both included, for
/// which a condition holds. Of other times some may come, of other devices none.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) devices: Option<Vec<String>>,
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) condition: Option<Condition>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PagesExec {
    /// Of each partition.
    files: Vec<FileGroup>,
    url: ObjectStoreUrl,
    wanted: Arc<Wanted>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

struct Read {
    wanted: Arc<Wanted>,
    schema: SchemaRef,
    store: Arc<dyn ObjectStore>,
    footers: Arc<FileMetadataCache>,
    /// None: none are kept.
    pages: Option<Arc<KeptPages>>,
    /// The last file's: files of a table mostly have the same.
    columns: Mutex<Option<Arc<Columns>>>,
    /// What a condition leaves out.
    metrics: Option<ParquetFileMetrics>,
}

/// The columns of a file that are read.
struct Columns {
    /// What the file says of all.
    root: TypePtr,
    /// What all are read as.
    types: SchemaRef,
    mask: ProjectionMask,
    /// Those that are read, and what as; those of them that are not the device; the device.
    all: Leaves,
    others: Leaves,
    device: Option<Leaves>,
}

/// Columns by their numbers, and what they are read as.
type Leaves = (Vec<usize>, FieldLevels);

type Batches = BoxStream<'static, Result<RecordBatch>>;

impl PagesExec {
    /// A scan of these files, or of those of their row groups that begin within a range, dealt out to partitions. `schema` is
    /// what comes out: devices as texts, or as indices into a dictionary.
    pub(super) fn new(files: Vec<FileGroup>, url: ObjectStoreUrl, wanted: Wanted, schema: SchemaRef) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            Partitioning::UnknownPartitioning(files.len()),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Self {
            files,
            url,
            wanted: Arc::new(wanted),
            schema,
            properties: Arc::new(properties),
            metrics: ExecutionPlanMetricsSet::new(),
        }
    }

    /// How many files are read.
    pub(crate) fn files(&self) -> usize {
        self.files.iter().map(FileGroup::len).sum()
    }
}

impl DisplayAs for PagesExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.wanted.devices {
            Some(devices) => write!(f, "PagesExec: files={}, devices={}", self.files(), devices.len())?,
            None => write!(f, "PagesExec: files={}, devices=all", self.files())?,
        }
        match &self.wanted.condition {
            Some(condition) => write!(f, ", predicate={}", condition.expr),
            None => Ok(()),
        }
    }
}

impl ExecutionPlan for PagesExec {
    fn name(&self) -> &str {
        "PagesExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        self.wanted.condition.as_ref().map_or(Ok(TreeNodeRecursion::Continue), |condition| f(&condition.expr))
    }

    fn replace_children(
        self: Arc<Self>,
        _: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn with_new_children(self: Arc<Self>, _: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let (runtime, rows_max) = (context.runtime_env(), context.session_config().batch_size());
        let read = Arc::new(Read {
            wanted: Arc::clone(&self.wanted),
            schema: Arc::clone(&self.schema),
            store: runtime.object_store(&self.url)?,
            footers: runtime.cache_manager.get_file_metadata_cache(),
            pages: context.session_config().get_extension::<KeptPages>(),
            columns: Mutex::default(),
            metrics: self.wanted.condition.is_some().then(|| ParquetFileMetrics::new(partition, "", &self.metrics)),
        });
        let opened = stream::iter(self.files[partition].clone().into_inner()).map(move |file| {
            let read = Arc::clone(&read);
            async move { read.open(file, rows_max).await }
        });
        let rows = opened.buffered(AHEAD).try_flatten();
        let rows = Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), rows));
        Ok(counted(rows, &self.metrics, partition))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

impl Read {
    /// The rows of a file: what its pages take is read before the first is asked for.
    async fn open(self: Arc<Self>, file: PartitionedFile, rows_max: usize) -> Result<Batches> {
        let (file, range) = (file.object_meta, file.range);
        let footer = DFParquetMetadata::new(&*self.store, &file)
            .with_file_metadata_cache(Some(Arc::clone(&self.footers)))
            .with_page_index_policy(Some(PageIndexPolicy::Optional))
            .fetch_metadata()
            .await?;
        let mut places = self.wanted.places(&footer, range.as_ref());
        let columns = self.columns(&footer)?;
        if let Some((condition, metrics)) = self.wanted.condition.as_ref().zip(self.metrics.as_ref()) {
            let groups = places.iter().map(|(group, _)| *group);
            let mut left = condition.places(&footer, &columns.types, groups, metrics);
            places.retain_mut(|(group, selection)| match &mut left[*group] {
                RowGroupAccess::Skip => false,
                RowGroupAccess::Scan => true,
                RowGroupAccess::Selection(rows) => {
                    *selection = selection.intersection(rows);
                    selection.selects_any()
                }
            });
        }
        if places.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let rows = match self.kept(&file, &footer, &places, &columns, rows_max).await? {
            Some(rows) => rows,
            None => self.streamed(file, footer, places, &columns, rows_max).await?,
        };
        let rows = rows.map(move |rows| {
            let rows = self.wanted.of_devices(&rows?)?;
            let rows = hot_columns(&typed(&rows, &self.schema)?, &self.schema)?;
            self.wanted.condition.as_ref().map_or(Ok(rows.clone()), |condition| condition.filter(&rows))
        });
        Ok(rows.boxed())
    }

    /// Rows out of pages that are kept for the next who asks; none where the file does not tell where its pages are, or all
    /// of them are asked for. What the first row group has is read at once, what the others have when it is their turn.
    async fn kept(
        self: &Arc<Self>,
        file: &ObjectMeta,
        footer: &Arc<ParquetMetaData>,
        places: &[(usize, RowSelection)],
        columns: &Arc<Columns>,
        rows_max: usize,
    ) -> Result<Option<Batches>> {
        let Some(pages) = self.pages.as_ref().filter(|_| self.wanted.devices.is_some()) else { return Ok(None) };
        let of_group = |group: &usize| footer.offset_index().and_then(|index| index.get(*group));
        let is_told = |(group, _): &(usize, _)| {
            of_group(group).is_some_and(|index| columns.all.0.iter().all(|column| index.get(*column).is_some()))
        };
        if !places.iter().all(is_told) {
            return Ok(None);
        }
        let (read, pages, file, footer) = (Arc::clone(self), Arc::clone(pages), file.clone(), Arc::clone(footer));
        let columns = Arc::clone(columns);
        let open = move |place: (usize, RowSelection)| {
            let (read, pages, file, footer) =
                (Arc::clone(&read), Arc::clone(&pages), file.clone(), Arc::clone(&footer));
            let columns = Arc::clone(&columns);
            async move { read.of_group(&pages, &file, &footer, place, &columns, rows_max).await }
        };
        let Some((first, others)) = places.split_first() else { return Ok(None) };
        let first = open(first.clone()).await?;
        let others = stream::iter(others.to_vec()).then(open).try_flatten();
        Ok(Some(first.chain(others).boxed()))
    }

    /// As [`Read::kept`], of one row group.
    async fn of_group(
        self: &Arc<Self>,
        pages: &KeptPages,
        file: &ObjectMeta,
        footer: &Arc<ParquetMetaData>,
        (group, selection): (usize, RowSelection),
        columns: &Columns,
        rows_max: usize,
    ) -> Result<Batches> {
        let devices = match (&columns.device, &self.wanted.devices) {
            (Some(device), Some(wanted)) if !columns.others.0.is_empty() => {
                let devices = pages.devices(&*self.store, file, footer, group, device).await?;
                devices.map(|devices| (devices.rows_of(wanted), devices))
            }
            _ => None,
        };
        let rows = usize::try_from(footer.row_group(group).num_rows()).unwrap_or(0);
        let (selection, (leaves, levels)) = match &devices {
            None => (selection, &columns.all),
            Some((of_devices, _)) => {
                let of_devices = RowSelection::from_consecutive_ranges(of_devices.iter().cloned(), rows);
                (of_devices.intersection(&selection), &columns.others)
            }
        };
        if !selection.selects_any() {
            return Ok(stream::empty().boxed());
        }
        if selection.row_count() > pages.rows_max {
            return self.streamed(file.clone(), Arc::clone(footer), vec![(group, selection)], columns, rows_max).await;
        }
        let read = pages.read(&*self.store, file, footer, group, leaves, &selection).await?;
        let mut texts = devices.map(|(_, devices)| devices.texts(&ranges(&selection)).into());
        let rows = ParquetRecordBatchReader::try_new_with_row_groups(levels, &read, rows_max, Some(selection))?;
        let rows = rows.map(move |rows| match &mut texts {
            Some(texts) => Ok(with_devices(&rows?, texts)?),
            None => Ok(rows?),
        });
        Ok(stream::iter(rows).boxed())
    }

    /// Rows as they are read.
    async fn streamed(
        self: &Arc<Self>,
        file: ObjectMeta,
        footer: Arc<ParquetMetaData>,
        places: Vec<(usize, RowSelection)>,
        columns: &Columns,
        rows_max: usize,
    ) -> Result<Batches> {
        let options = ArrowReaderOptions::new().with_schema(Arc::clone(&columns.types));
        let (groups, selections): (Vec<_>, Vec<_>) = places.into_iter().unzip();
        let mut decoder = ParquetPushDecoderBuilder::new_with_metadata(ArrowReaderMetadata::try_new(footer, options)?)
            .with_projection(columns.mask.clone())
            .with_row_groups(groups)
            .with_row_selection(selections.into_iter().flat_map(Vec::from).collect::<Vec<_>>().into())
            .with_batch_size(rows_max)
            .build()?;
        let first = self.next(&mut decoder, &file).await?;
        let opened = first.map(|first| (first, decoder, file));
        let read = Arc::clone(self);
        let rows = stream::try_unfold(opened, move |opened| {
            let read = Arc::clone(&read);
            async move {
                let Some((batch, mut decoder, file)) = opened else { return Ok(None) };
                let next = read.next(&mut decoder, &file).await?;
                Ok(Some((batch, next.map(|next| (next, decoder, file)))))
            }
        });
        Ok(rows.boxed())
    }

    /// Which columns of a file are read, and what as: their own types, but that devices are indices into a dictionary.
    fn columns(&self, footer: &ParquetMetaData) -> Result<Arc<Columns>> {
        let of_file = footer.file_metadata().schema_descr();
        let mut known = self.columns.lock();
        if let Some(columns) = known.as_ref().filter(|columns| *columns.root == *of_file.root_schema()) {
            return Ok(Arc::clone(columns));
        }
        let own = parquet_to_arrow_schema(of_file, None)?;
        let fields = own.fields().iter().map(|field| match field.data_type() {
            DataType::Utf8 if field.name() == DEVICE => Arc::new(field.as_ref().clone().with_data_type(indices())),
            _ => Arc::clone(field),
        });
        let types = Arc::new(Schema::new_with_metadata(fields.collect::<Vec<_>>(), own.metadata().clone()));
        let names = self.schema.fields().iter().map(|field| field.name().as_str());
        // Dates are told by times.
        let names = names.map(|name| if name == DATE { TS } else { name });
        let mask = ProjectionMask::columns(of_file, names.chain(self.wanted.devices.is_some().then_some(DEVICE)));
        let leaves = (0..of_file.num_columns()).filter(|leaf| mask.leaf_included(*leaf)).collect::<Vec<_>>();
        let read = |leaves: Vec<usize>| {
            let mask = ProjectionMask::leaves(of_file, leaves.iter().copied());
            let levels = parquet_to_arrow_field_levels(of_file, mask, Some(types.fields()))?;
            Ok::<Leaves, ParquetError>((leaves, levels))
        };
        let is_device = |leaf: &usize| of_file.column(*leaf).path().string() == DEVICE;
        let (device, others) = leaves.iter().partition::<Vec<_>, _>(|leaf| is_device(leaf));
        let device = (!device.is_empty()).then(|| read(device)).transpose()?;
        let (all, others) = (read(leaves)?, read(others)?);
        let root = of_file.root_schema_ptr();
        let columns = Arc::new(Columns { root, types: Arc::clone(&types), mask, all, others, device });
        *known = Some(Arc::clone(&columns));
        Ok(columns)
    }

    async fn next(&self, decoder: &mut ParquetPushDecoder, file: &ObjectMeta) -> Result<Option<RecordBatch>> {
        loop {
            match decoder.try_decode()? {
                DecodeResult::Data(batch) => return Ok(Some(batch)),
                DecodeResult::Finished => return Ok(None),
                DecodeResult::NeedsData(ranges) => {
                    let bytes = self.store.get_ranges(&file.location, &ranges).await?;
                    decoder.push_ranges(ranges, bytes)?;
                }
            }
        }
    }
}

/// Rows with their devices, of which so many come next.
fn with_devices(rows: &RecordBatch, texts: &mut VecDeque<(Arc<str>, usize)>) -> Result<RecordBatch, ArrowError> {
    let mut devices = StringBuilder::new();
    while devices.len() < rows.num_rows() {
        let Some((device, left)) = texts.front_mut() else { break };
        let next = (*left).min(rows.num_rows() - devices.len());
        devices.append_value_n(device.as_ref(), next);
        *left -= next;
        if *left == 0 {
            texts.pop_front();
        }
    }
    let (fields, columns) = (rows.schema().fields().to_vec(), rows.columns().to_vec());
    let device = Arc::new(Field::new(DEVICE, DataType::Utf8, true));
    let schema = Schema::new(fields.into_iter().chain([device]).collect::<Vec<_>>());
    let columns = columns.into_iter().chain([Arc::new(devices.finish()) as ArrayRef]);
    RecordBatch::try_new(Arc::new(schema), columns.collect())
}

impl Wanted {
    /// The row groups of a file that may have wanted rows, and which of their rows.
    fn places(&self, footer: &ParquetMetaData, range: Option<&FileRange>) -> Vec<(usize, RowSelection)> {
        let columns = footer.file_metadata().schema_descr();
        let find = |name: &str| columns.columns().iter().position(|column| column.path().string() == name);
        let is_micros = |at: &usize| matches!(columns.column(*at).logical_type_ref(), Some(LogicalType::Timestamp(kind)) if kind.unit == TimeUnit::MICROS);
        let (device, ts) = (find(DEVICE), find(TS).filter(is_micros));
        let mut places = Vec::new();
        for (index, group) in footer.row_groups().iter().enumerate() {
            let bounds = |column: Option<usize>| group.column(column?).statistics();
            let begins = |range: &FileRange| {
                let first = group.columns().first();
                let start =
                    first.map(|first| first.dictionary_page_offset().unwrap_or_else(|| first.data_page_offset()));
                start.is_some_and(|start| range.contains(start))
            };
            if range.is_some_and(|range| !begins(range)) {
                continue;
            }
            if !self.may_have_device(bounds(device)) || !self.may_have_time(bounds(ts)) {
                continue;
            }
            let rows = usize::try_from(group.num_rows()).unwrap_or(0);
            let pages = |column: Option<usize>| Pages::of(footer, index, column?, rows);
            let of_device = self.devices.as_ref().zip(pages(device));
            let of_device = of_device.map(|(devices, pages)| pages.select(|page| pages.has_device(page, devices)));
            let of_time = self.some_times().then(|| pages(ts)).flatten();
            let of_time = of_time.map(|pages| pages.select(|page| pages.has_time(page, self.first, self.last)));
            let selected = match (of_device, of_time) {
                (Some(one), Some(other)) => one.intersection(&other),
                (one, other) => one.or(other).unwrap_or_else(|| vec![RowSelector::select(rows)].into()),
            };
            if selected.selects_any() {
                places.push((index, selected));
            }
        }
        places
    }

    /// Leaves out rows of other devices.
    fn of_devices(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        let indices = rows.column_by_name(DEVICE).and_then(|column| column.as_dictionary_opt::<Int32Type>());
        let (Some(devices), Some(indices)) = (&self.devices, indices) else { return Ok(rows.clone()) };
        let Some(texts) = indices.values().as_string_opt::<i32>() else { return Ok(rows.clone()) };
        let named = texts.iter().map(|text| text.is_some_and(|text| devices.iter().any(|device| device == text)));
        let named = named.collect::<Vec<_>>();
        let keys = indices.keys();
        let is_named = |row: usize| named.get(keys.value(row).as_usize()).copied().unwrap_or(false);
        let kept = BooleanBuffer::collect_bool(keys.len(), is_named);
        // Where there is none, the index is of any.
        Ok(filter_record_batch(rows, &BooleanArray::new(kept, keys.nulls().cloned()))?)
    }

    /// Whether not every time is wanted.
    fn some_times(&self) -> bool {
        (self.first, self.last) != (i64::MIN, i64::MAX)
    }

    fn may_have_device(&self, bounds: Option<&ColumnBounds>) -> bool {
        let bounds = bounds.and_then(|bounds| Some((bounds.min_bytes_opt()?, bounds.max_bytes_opt()?)));
        let (Some(devices), Some((min, max))) = (&self.devices, bounds) else { return true };
        devices.iter().any(|device| (min..=max).contains(&device.as_bytes()))
    }

    fn may_have_time(&self, bounds: Option<&ColumnBounds>) -> bool {
        let Some(ColumnBounds::Int64(bounds)) = bounds else { return true };
        bounds.min_opt().is_none_or(|min| *min <= self.last) && bounds.max_opt().is_none_or(|max| *max >= self.first)
    }
}

/// The pages of a column in a row group.
struct Pages<'a> {
    index: &'a ColumnIndexMetaData,
    /// The first row of each, and where the last one ends.
    starts: Vec<usize>,
}

impl<'a> Pages<'a> {
    fn of(footer: &'a ParquetMetaData, group: usize, column: usize, rows: usize) -> Option<Self> {
        let index = footer.column_index()?.get(group)?.get(column)?;
        let pages = footer.offset_index()?.get(group)?.get(column)?.page_locations();
        let starts = pages.iter().map(|page| usize::try_from(page.first_row_index).ok());
        let starts = starts.chain([Some(rows)]).collect::<Option<Vec<_>>>()?;
        // What is not there, or contradicts itself, says nothing.
        let is_there = !matches!(index, ColumnIndexMetaData::NONE) && index.num_pages() == pages.len() as u64;
        (is_there && starts.first() == Some(&0) && starts.is_sorted_by(|one, next| one < next))
            .then_some(Self { index, starts })
    }

    fn select(&self, has: impl Fn(usize) -> bool) -> RowSelection {
        let pages = self.starts.windows(2).enumerate();
        let ranges = pages.filter(|(page, _)| has(*page)).map(|(_, rows)| rows[0]..rows[1]);
        RowSelection::from_consecutive_ranges(ranges, self.starts.last().copied().unwrap_or(0))
    }

    fn has_device(&self, page: usize, devices: &[String]) -> bool {
        let ColumnIndexMetaData::BYTE_ARRAY(index) = self.index else { return true };
        match (index.min_value(page), index.max_value(page)) {
            (Some(min), Some(max)) => devices.iter().any(|device| (min..=max).contains(&device.as_bytes())),
            _ => !index.is_null_page(page),
        }
    }

    fn has_time(&self, page: usize, first: i64, last: i64) -> bool {
        let ColumnIndexMetaData::INT64(index) = self.index else { return true };
        match (index.min_value(page), index.max_value(page)) {
            (Some(min), Some(max)) => *min <= last && *max >= first,
            _ => !index.is_null_page(page),
        }
    }
}

#[cfg(test)]
mod tests;
