//! The cold half of a table as a plan: the Parquet files of one snapshot, read by DataFusion's own Parquet source.
//!
//! What the log says of a file prunes before anything is opened: its `_date`, and the first and last event time and device.
//! Files are dealt out to the partitions by size. Their footers are kept in the runtime's metadata cache; files never
//! change, so what is kept stays right. A column that a file does not have is null, and one of another type is cast.
//! When few devices are asked for and many files may have them, `pages` reads them.
//!
//! Row counts are those of the log and exact, so that a bare `count(*)` reads no file. Bounds of `ts` and `device` may be
//! wider than a file's rows (the log cuts times to milliseconds): they serve to leave out files, never as an answer.

mod condition;
mod devices;
mod kept;
mod pages;

use std::sync::Arc;

use arrow::compute::cast;
use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, Schema, SchemaRef};
use chrono::DateTime;
use datafusion::catalog::Session;
use datafusion::catalog::memory::DataSourceExec;
use datafusion::common::config::TableParquetOptions;
use datafusion::common::stats::Precision;
use datafusion::common::{ColumnStatistics, DataFusionError, Result, ScalarValue, Statistics};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::object_store::ObjectStoreUrl;
use datafusion::datasource::physical_plan::parquet::CachedParquetFileReaderFactory;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::datasource::table_schema::TableSchema;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr, Operator};
use datafusion::object_store::ObjectMeta;
use datafusion::object_store::path::Path;
use datafusion::physical_plan::ExecutionPlan;
use url::Position;
use wire::schema::{DATE, DEVICE, TS, timestamp_type};
use wire::{DAY_US, DataFile};

use crate::catalog::ColdTable;

pub(crate) use kept::KeptPages;
pub(crate) use pages::{PagesExec, with_indices};

/// With more devices than this, most of each file is read anyway.
const DEVICES_FEW: usize = 16;
/// With fewer files than this, what each of them costs does not matter.
const FILES_MANY: usize = 4;

/// A scan of the files that may have rows for these filters; `None` when there are none. `schema` is the table's, its last
/// column `_date`; `wanted` are columns of it, in this order.
///
/// # Errors
/// When the log names a file that no store can have.
pub(crate) fn scan(
    cold: &ColdTable,
    session: &dyn Session,
    schema: &SchemaRef,
    wanted: &SchemaRef,
    filters: &[Expr],
    limit: Option<usize>,
) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let bounds = Bounds::of(filters);
    let dates = cold.files.dates().filter(|(date, _)| bounds.may_have_date(*date));
    let files = dates.flat_map(|(_, files)| files).filter(|file| bounds.may_have(file));
    let mut files = files.collect::<Vec<_>>();
    if files.is_empty() {
        return Ok(None);
    }
    // Large ones first, each to the group that has the least: and in the same order whenever it is asked.
    files.sort_unstable_by(|a, b| (b.bytes, &b.path).cmp(&(a.bytes, &a.path)));
    let partitions = session.config().target_partitions().clamp(1, files.len());
    let mut groups = vec![(0, Vec::new()); partitions];
    let root = Path::from_url_path(cold.log_store.root_url().path()).map_err(external)?;
    for file in &files {
        let (bytes, group) = groups.iter_mut().min_by_key(|(bytes, _)| *bytes).expect("there is one at least");
        *bytes += file.bytes;
        group.push(*file);
    }
    let url = store_of(session, cold)?;
    let store = session.runtime_env().object_store(&url)?;
    let footers = session.runtime_env().cache_manager.get_file_metadata_cache();
    if let Some(devices) = bounds.devices.as_ref().filter(|devices| devices.len() <= DEVICES_FEW)
        && files.len() >= FILES_MANY
    {
        let groups = groups.iter().map(|(_, group)| {
            let files = group.iter().map(|file| Ok(PartitionedFile::new_from_meta(object(file, &root)?)));
            Ok(FileGroup::new(files.collect::<Result<_>>()?))
        });
        let few =
            pages::Wanted { devices: Some(devices.clone()), first: bounds.first, last: bounds.last, condition: None };
        let groups = groups.collect::<Result<Vec<_>>>()?;
        return Ok(Some(Arc::new(PagesExec::new(groups, url, few, Arc::clone(wanted)))));
    }
    let stored =
        Arc::new(Schema::new(schema.fields().iter().filter(|field| field.name() != DATE).cloned().collect::<Vec<_>>()));
    let ts_at = stored.index_of(TS)?;
    let groups = groups.iter().map(|(_, group)| {
        let files = group.iter().map(|file| partitioned(file, &root, &stored, ts_at));
        Ok(FileGroup::new(files.collect::<Result<_>>()?))
    });
    let groups = groups.collect::<Result<Vec<_>>>()?;
    let projection = wanted.fields().iter().map(|field| schema.index_of(field.name()));
    let projection = projection.collect::<Result<Vec<_>, _>>()?;
    let date = schema.field_with_name(DATE)?.clone();
    let options = session.config_options().execution.parquet.clone();
    let mut source = ParquetSource::new(
        TableSchema::builder(Arc::clone(&stored)).with_table_partition_cols(vec![Arc::new(date)]).build(),
    )
    .with_parquet_file_reader_factory(Arc::new(CachedParquetFileReaderFactory::new(store, footers)));
    source =
        source.with_table_parquet_options(TableParquetOptions { global: options, ..TableParquetOptions::default() });
    let mut statistics = Statistics::new_unknown(schema);
    let rows = files.iter().map(|file| file.rows).sum::<Option<u64>>();
    statistics.num_rows = count(rows);
    let config = FileScanConfigBuilder::new(url, Arc::new(source))
        .with_file_groups(groups)
        .with_statistics(statistics)
        .with_projection_indices(Some(projection))?
        .with_limit(limit)
        .build();
    Ok(Some(DataSourceExec::from_data_source(config)))
}

/// How many rows the files have at most that may have rows within these bounds; of a file that does not say, as many as there
/// can be.
pub(crate) fn rows_about(cold: &ColdTable, bounds: &Bounds) -> u64 {
    let dates = cold.files.dates().filter(|(date, _)| bounds.may_have_date(*date));
    let files = dates.flat_map(|(_, files)| files).filter(|file| bounds.may_have(file));
    files.map(|file| file.rows.unwrap_or(u64::MAX)).fold(0, u64::saturating_add)
}

/// A file as DataFusion takes it, with what is known of its columns but `_date`. `root` is the table's place in its store.
fn partitioned(file: &DataFile, root: &Path, stored: &Schema, ts_at: usize) -> Result<PartitionedFile> {
    let mut statistics = Statistics::new_unknown(stored);
    statistics.num_rows = count(file.rows);
    if let Some((first, last)) = file.ts {
        let time = |us: i64| {
            ScalarValue::Int64(Some(us)).cast_to(&timestamp_type()).map_or(Precision::Absent, Precision::Inexact)
        };
        statistics.column_statistics[ts_at] = ColumnStatistics {
            null_count: Precision::Exact(0),
            min_value: time(first),
            max_value: time(last),
            ..ColumnStatistics::new_unknown()
        };
    }
    Ok(PartitionedFile::new_from_meta(object(file, root)?)
        .with_partition_values(vec![ScalarValue::Date32(Some(file.date))])
        .with_statistics(Arc::new(statistics)))
}

/// What the store says of a file.
fn object(file: &DataFile, root: &Path) -> Result<ObjectMeta> {
    let within = Path::from_url_path(&file.path).map_err(external)?;
    Ok(ObjectMeta {
        location: root.parts().chain(within.parts()).collect(),
        last_modified: DateTime::from_timestamp_millis(file.modified_ms).unwrap_or_default(),
        size: file.bytes,
        e_tag: None,
        version: None,
    })
}

/// Rows of a file in the types of the table.
pub(crate) fn typed(rows: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let of_file = rows.schema();
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in of_file.fields().iter().zip(rows.columns()) {
        let kind = schema.field_with_name(field.name()).map_or(field.data_type(), |field| field.data_type());
        fields.push(field.as_ref().clone().with_data_type(kind.clone()));
        columns.push(if column.data_type() == kind { Arc::clone(column) } else { cast(column, kind)? });
    }
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    Ok(RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)?)
}

fn count(rows: Option<u64>) -> Precision<usize> {
    rows.and_then(|rows| usize::try_from(rows).ok()).map_or(Precision::Absent, Precision::Exact)
}

/// What comparisons with constants leave of event times and devices.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Microseconds, both ends included.
    first: i64,
    last: i64,
    /// None: all.
    devices: Option<Vec<String>>,
}

impl Bounds {
    pub(crate) fn of(filters: &[Expr]) -> Self {
        let mut bounds = Self { first: i64::MIN, last: i64::MAX, devices: None };
        for filter in filters.iter().flat_map(split_conjunction) {
            bounds.narrow(filter);
            // One list is enough: each leaves out some.
            bounds.devices = bounds.devices.or_else(|| devices(filter));
        }
        bounds
    }

    fn narrow(&mut self, filter: &Expr) {
        let (op, moment) = match filter {
            Expr::Between(between) if !between.negated => {
                let low = Moment::of(&between.expr, &between.low).map_or(i64::MIN, |moment| moment.first);
                let high = Moment::of(&between.expr, &between.high).map_or(i64::MAX, |moment| moment.last);
                self.first = self.first.max(low);
                self.last = self.last.min(high);
                return;
            }
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
                match (Moment::of(left, right), Moment::of(right, left)) {
                    (Some(moment), _) => (Some(*op), moment),
                    (None, Some(moment)) => (op.swap(), moment),
                    (None, None) => return,
                }
            }
            _ => return,
        };
        let (first, last) = match op {
            Some(Operator::Eq) => (moment.first, moment.last),
            Some(Operator::Gt) => (moment.after, i64::MAX),
            Some(Operator::GtEq) => (moment.first, i64::MAX),
            Some(Operator::Lt) => (i64::MIN, moment.before),
            Some(Operator::LtEq) => (i64::MIN, moment.last),
            _ => return,
        };
        self.first = self.first.max(first);
        self.last = self.last.min(last);
    }

    /// Whether rows from the first to the last of these event times may be wanted.
    pub(crate) fn may_have_times(&self, (first, last): (i64, i64)) -> bool {
        last >= self.first && first <= self.last
    }

    fn may_have_date(&self, date: i32) -> bool {
        let day = i64::from(date) * DAY_US;
        day <= self.last && day + DAY_US > self.first
    }

    fn may_have(&self, file: &DataFile) -> bool {
        let has_device = |(from, to): &(String, String)| {
            self.devices.as_ref().is_none_or(|devices| devices.iter().any(|device| (from..=to).contains(&device)))
        };
        self.may_have_times((file.earliest_us(), file.latest_us())) && file.device.as_ref().is_none_or(has_device)
    }
}

/// The devices that a filter names: of `device = 'a'` and `device IN ('a', 'b')`.
fn devices(filter: &Expr) -> Option<Vec<String>> {
    let is_device = |expr: &Expr| matches!(expr, Expr::Column(column) if column.name == DEVICE);
    let text = |expr: &Expr| match expr {
        Expr::Literal(value, _) => Some(value.try_as_str()??.to_owned()),
        _ => None,
    };
    match filter {
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) if is_device(left) => Some(vec![text(right)?]),
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) if is_device(right) => Some(vec![text(left)?]),
        Expr::InList(list) if is_device(&list.expr) && !list.negated => list.list.iter().map(text).collect(),
        // The optimizer writes a short list so.
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) => {
            let mut all = devices(left)?;
            all.extend(devices(right)?);
            Some(all)
        }
        _ => None,
    }
}

/// A constant that `ts` or `_date` is compared with, as event times, microseconds.
struct Moment {
    /// The last time before it.
    before: i64,
    first: i64,
    last: i64,
    /// The first time after it.
    after: i64,
}

impl Moment {
    fn of(column: &Expr, value: &Expr) -> Option<Self> {
        let (Expr::Column(column), Expr::Literal(value, _)) = (column, value) else { return None };
        match column.name.as_str() {
            TS => {
                let cut = value.cast_to(&timestamp_type()).ok()?;
                let ScalarValue::TimestampMicrosecond(Some(us), _) = cut else { return None };
                let next = us.saturating_add(1);
                Some(match cut.cast_to(&value.data_type()) {
                    Ok(back) if back == *value => {
                        Self { before: us.saturating_sub(1), first: us, last: us, after: next }
                    }
                    // A finer time than the column's lies between two of them.
                    _ => Self { before: us, first: us, last: next, after: us },
                })
            }
            DATE => match value.cast_to(&DataType::Date32).ok()? {
                ScalarValue::Date32(Some(days)) => {
                    let (first, next) = (i64::from(days) * DAY_US, (i64::from(days) + 1) * DAY_US);
                    Some(Self { before: first - 1, first, last: next - 1, after: next })
                }
                _ => None,
            },
            _ => None,
        }
    }
}

/// The store above the table, known to the session.
fn store_of(session: &dyn Session, cold: &ColdTable) -> Result<ObjectStoreUrl> {
    let root = cold.log_store.root_url();
    let url = ObjectStoreUrl::parse(&root[Position::BeforeScheme..Position::BeforePath])?;
    if session.runtime_env().object_store(&url).is_err() {
        session.runtime_env().register_object_store(url.as_ref(), cold.log_store.root_object_store(None));
    }
    Ok(url)
}

fn external(error: impl std::error::Error + Send + Sync + 'static) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}

#[cfg(test)]
mod tests {
    use datafusion::prelude::{col, lit};

    use super::*;

    fn time(us: i64) -> Expr {
        lit(ScalarValue::TimestampMicrosecond(Some(us), Some("UTC".into())))
    }

    fn day(days: i32) -> Expr {
        lit(ScalarValue::Date32(Some(days)))
    }

    #[test]
    fn comparisons_with_constants_narrow_the_times() {
        let check = |filters: &[Expr], first: i64, last: i64| {
            assert_eq!(Bounds::of(filters), Bounds { first, last, devices: None }, "{filters:?}");
        };
        check(&[], i64::MIN, i64::MAX);
        check(&[col("ts").gt_eq(time(5)), col("ts").lt(time(9))], 5, 8);
        check(&[col("ts").gt_eq(time(5)).and(col("ts").lt_eq(time(9)))], 5, 9);
        check(&[time(5).lt(col("ts"))], 6, i64::MAX);
        check(&[col("ts").between(time(5), time(9))], 5, 9);
        check(&[col("ts").not_between(time(5), time(9))], i64::MIN, i64::MAX);
        check(&[col("ts").eq(time(5))], 5, 5);
        check(&[col("_date").eq(day(2))], 2 * DAY_US, 3 * DAY_US - 1);
        check(&[col("_date").gt(day(2))], 3 * DAY_US, i64::MAX);
        check(&[col("_date").lt(day(2))], i64::MIN, 2 * DAY_US - 1);
        check(&[col("ts").gt(time(5)).or(col("ts").lt(time(1)))], i64::MIN, i64::MAX);
        check(&[col("speed").gt(time(5)), col("ts").not_eq(time(5)), col("ts").gt(col("other"))], i64::MIN, i64::MAX);
        // A finer constant lies between two microseconds.
        let finer = || lit(ScalarValue::TimestampNanosecond(Some(9_900), None));
        check(&[col("ts").lt(finer())], i64::MIN, 9);
        check(&[col("ts").gt(finer())], 9, i64::MAX);
    }

    fn file(ts: Option<(i64, i64)>, device: Option<(String, String)>) -> DataFile {
        let path = "x".to_owned();
        DataFile { path, date: 1, bytes: 1, rows: None, modified_ms: 0, ts, device, device_nulls: None, crc: None }
    }

    #[test]
    fn a_file_is_left_out_by_its_times_and_its_date() {
        let bounds = |first, last| Bounds { first, last, devices: None };
        let noon = DAY_US + DAY_US / 2;
        let of_noon = file(Some((noon, noon + 10)), None);
        assert!(bounds(noon + 10, i64::MAX).may_have(&of_noon));
        assert!(!bounds(noon + 11, i64::MAX).may_have(&of_noon));
        assert!(bounds(i64::MIN, noon).may_have(&of_noon));
        assert!(!bounds(i64::MIN, noon - 1).may_have(&of_noon));
        let may_have = |bounds: Bounds| {
            assert_eq!(bounds.may_have(&file(None, None)), bounds.may_have_date(1));
            bounds.may_have_date(1)
        };
        assert!(may_have(bounds(2 * DAY_US - 1, i64::MAX)));
        assert!(!may_have(bounds(2 * DAY_US, i64::MAX)));
        assert!(may_have(bounds(i64::MIN, DAY_US)));
        assert!(!may_have(bounds(i64::MIN, DAY_US - 1)));
    }

    #[test]
    fn a_file_is_left_out_by_its_devices() {
        let file = file(None, Some(("b".to_owned(), "d".to_owned())));
        let check = |filter: Expr, expected: bool| assert_eq!(Bounds::of(&[filter]).may_have(&file), expected);
        check(col("device").eq(lit("a")), false);
        check(lit("b").eq(col("device")), true);
        check(col("device").eq(lit("dd")), false);
        check(col("device").in_list(vec![lit("a"), lit("e")], false), false);
        check(col("device").in_list(vec![lit("a"), lit("c")], false), true);
        check(col("device").in_list(vec![lit("a")], true), true);
        check(col("device").eq(lit("a")).or(col("device").eq(lit("e"))), false);
        check(col("device").eq(lit("a")).or(col("speed").eq(lit(1))), true);
        check(col("device").eq(lit("a")).and(col("speed").eq(lit(1))), false);
        check(col("device").not_eq(lit("a")), true);
    }
}
