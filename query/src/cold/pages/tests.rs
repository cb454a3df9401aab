use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use arrow::compute::{cast, concat_batches, filter_record_batch, lexsort_to_indices, take_record_batch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, TimestampMicrosecondType};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, Int64Array, StringArray, TimestampMicrosecondArray};
use chrono::Utc;
use datafusion::common::DFSchema;
use datafusion::object_store::memory::InMemory;
use datafusion::object_store::path::Path;
use datafusion::object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::parquet::file::properties::{EnabledStatistics, WriterProperties};
use datafusion::prelude::{SessionConfig, SessionContext, col, lit};
use futures::TryStreamExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Rows as (ts, device, n), n telling them apart.
fn rows(random: &mut StdRng, first: i64, count: usize, devices: usize) -> RecordBatch {
    let device = |random: &mut StdRng| (!random.random_ratio(1, 20)).then(|| random.random_range(0..devices));
    let device = (0..count).map(|_| device(random).map(|device| format!("d{device:03}")));
    let device = StringArray::from_iter(device.collect::<Vec<_>>());
    let ts = (0..count).map(|_| random.random_range(0..1_000)).collect::<Vec<_>>();
    let ts = TimestampMicrosecondArray::from(ts).with_timezone("UTC");
    let n = Int64Array::from_iter_values(first..first + count as i64);
    let columns: [(&str, ArrayRef); 3] = [(TS, Arc::new(ts)), (DEVICE, Arc::new(device)), ("n", Arc::new(n))];
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, name != TS))).unwrap()
}

fn sorted(rows: &RecordBatch) -> RecordBatch {
    let by = [1, 0].map(|at| arrow::compute::SortColumn { values: Arc::clone(rows.column(at)), options: None });
    take_record_batch(rows, &lexsort_to_indices(&by, None).unwrap()).unwrap()
}

fn file(rows: &RecordBatch, properties: WriterProperties) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, rows.schema(), Some(properties)).unwrap();
    writer.write(rows).unwrap();
    writer.close().unwrap();
    bytes
}

/// What `n` has where the rows are wanted, those with such an `n`, each with how often it came.
fn wanted_of(rows: &RecordBatch, wanted: &Wanted, with: &RangeInclusive<i64>) -> BTreeMap<i64, usize> {
    let (ts, device) = (rows["ts"].as_primitive::<TimestampMicrosecondType>(), rows["device"].as_string::<i32>());
    let n = rows["n"].as_primitive::<Int64Type>();
    let is_wanted = (0..rows.num_rows()).map(|row| {
        let is_named = |devices: &Vec<_>| device.is_valid(row) && devices.iter().any(|one| one == device.value(row));
        let is_named = wanted.devices.as_ref().is_none_or(is_named);
        Some(is_named && (wanted.first..=wanted.last).contains(&ts.value(row)) && with.contains(&n.value(row)))
    });
    let found = filter_record_batch(rows, &BooleanArray::from_iter(is_wanted)).unwrap();
    let mut counts = BTreeMap::new();
    for n in found["n"].as_primitive::<Int64Type>().values() {
        *counts.entry(*n).or_insert(0) += 1;
    }
    counts
}

fn with_narrow_numbers(rows: &RecordBatch) -> RecordBatch {
    let schema = rows.schema();
    let columns = schema.fields().iter().zip(rows.columns()).map(|(field, column)| {
        let narrow = field.name() == "n";
        let column = if narrow { cast(column, &DataType::Int32).unwrap() } else { Arc::clone(column) };
        (field.name().clone(), column, field.is_nullable())
    });
    RecordBatch::try_from_iter_with_nullable(columns.collect::<Vec<_>>()).unwrap()
}

/// A condition on two columns, of which files have one.
fn numbers_in(
    range: &RangeInclusive<i64>,
    session: &SessionContext,
    table: &SchemaRef,
    schema: &SchemaRef,
) -> Condition {
    let holds = col("n").gt_eq(lit(*range.start())).and(col("n").lt_eq(lit(*range.end())));
    let table = DFSchema::try_from(Arc::clone(table)).unwrap();
    let holds = session.create_physical_expr(holds.and(col("missing").is_null()), &table).unwrap();
    Condition::of(&holds, schema).unwrap().unwrap()
}

#[tokio::test]
async fn every_wanted_row_comes_once_however_files_are_written() {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("WEIR_SEED={seed}");
    let random = &mut StdRng::seed_from_u64(seed);
    let (mut read, mut all) = (0, 0);
    for case in 0..60 {
        let store = Arc::new(InMemory::new());
        let (mut files, mut written, mut first) = (vec![Vec::new(); random.random_range(1..4)], Vec::new(), 0);
        for index in 0..random.random_range(1..9) {
            let (count, devices) = (random.random_range(1..600), random.random_range(1..60));
            let mut of_file = rows(random, first, count, devices);
            first += count as i64;
            if random.random_ratio(3, 4) {
                of_file = sorted(&of_file);
            }
            let told = [EnabledStatistics::Page, EnabledStatistics::Chunk, EnabledStatistics::None];
            let properties = WriterProperties::builder()
                .set_statistics_enabled(told[random.random_range(0..3_usize).min(random.random_range(0..3))])
                .set_max_row_group_row_count(Some(random.random_range(50..300)))
                .set_data_page_row_count_limit(random.random_range(5..80))
                .set_write_batch_size(random.random_range(1..16))
                .set_column_index_truncate_length(random.random_bool(0.3).then_some(2))
                .build();
            // A few have their columns in another order.
            let turned = random.random_ratio(1, 4);
            let stored = if turned { of_file.project(&[2, 1, 0]).unwrap() } else { of_file.clone() };
            // And a few a number of another type.
            let stored = if random.random_ratio(1, 4) { with_narrow_numbers(&stored) } else { stored };
            let bytes = file(&stored, properties);
            let location = Path::from(format!("{case}/{index}"));
            let object = ObjectMeta {
                location: location.clone(),
                last_modified: Utc::now(),
                size: bytes.len() as u64,
                e_tag: None,
                version: None,
            };
            let object = PartitionedFile::new_from_meta(object);
            let groups = files.len();
            if random.random_ratio(1, 3) {
                let (end, cut) = (bytes.len() as i64, random.random_range(0..bytes.len() as i64));
                files[index % groups].push(object.clone().with_range(0, cut));
                files[(index + 1) % groups].push(object.with_range(cut, end));
            } else {
                files[index % groups].push(object);
            }
            store.put(&location, PutPayload::from(bytes)).await.unwrap();
            written.push(of_file);
        }
        let written = concat_batches(&written[0].schema(), &written).unwrap();
        let devices = (0..random.random_range(1..4)).map(|_| format!("d{:03}", random.random_range(0..70))).collect();
        let ends = [random.random_range(0..1_000), random.random_range(0..1_000)];
        let (first, last) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
        let devices = random.random_bool(0.7).then_some(devices);
        // With a column that no file has.
        let mut fields = written.schema().fields().to_vec();
        fields.push(Arc::new(Field::new("missing", DataType::Float64, true)));
        let all_texts = Arc::new(Schema::new(fields.clone()));
        if devices.is_none() {
            fields[1] = Arc::new(fields[1].as_ref().clone().with_data_type(indices()));
        }
        let (mut found, mut rows_read) = (Vec::new(), 0);
        let kept_max = [0, 3_000, 100_000_000][random.random_range(0..3)];
        let mut pages = KeptPages::new(kept_max);
        if kept_max == 3_000 {
            pages.rows_max = random.random_range(0..30);
        }
        let config = SessionConfig::new().with_extension(Arc::new(pages));
        let (schema, session) = (Arc::new(Schema::new(fields)), SessionContext::new_with_config(config));
        let rows = written.num_rows() as i64;
        let with = match random.random_bool(0.5) {
            true => random.random_range(0..rows)..=random.random_range(0..rows),
            false => 0..=rows,
        };
        let condition = (with != (0..=rows)).then(|| numbers_in(&with, &session, &all_texts, &schema));
        let wanted = Wanted { devices, first, last, condition };
        let expected = wanted_of(&written, &wanted, &with);
        let url = ObjectStoreUrl::parse("memory://").unwrap();
        session.runtime_env().register_object_store(url.as_ref(), Arc::clone(&store) as _);
        let files = files.into_iter().map(FileGroup::new).collect();
        let plan = Arc::new(PagesExec::new(files, url, wanted, Arc::clone(&schema)));
        for round in 0..3 {
            // All that is asked for is kept by now.
            if round == 2 && kept_max > 3_000 && plan.wanted.devices.is_some() {
                for object in store.list(None).try_collect::<Vec<_>>().await.unwrap() {
                    store.delete(&object.location).await.unwrap();
                }
            }
            found.clear();
            for partition in 0..plan.properties().partitioning.partition_count() {
                let rows = plan.execute(partition, session.task_ctx()).unwrap();
                found.extend(rows.try_collect::<Vec<_>>().await.unwrap());
            }
            let found = typed(&concat_batches(&schema, &found).unwrap(), &all_texts).unwrap();
            assert!(found["n"].as_primitive::<Int64Type>().values().iter().all(|n| with.contains(n)));
            assert_eq!(found["missing"].null_count(), found.num_rows());
            assert_eq!(wanted_of(&found, &plan.wanted, &with), expected, "case {case}, round {round}");
            rows_read = found.num_rows();
        }
        if plan.wanted.devices.is_some() {
            (read, all) = (read + rows_read, all + written.num_rows());
        }
    }
    println!("{read} of {all} rows read");
    assert!(read * 2 < all, "bounds leave out most: {read} of {all} rows read");
}
