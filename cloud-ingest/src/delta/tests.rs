use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{ArrayRef, Float64Array, StringArray, TimestampMicrosecondArray};
use datafusion::prelude::SessionContext;
use deltalake_core::delta_datafusion::TableProviderBuilder;
use wire::schema::StreamSchema;

use super::*;
use crate::rescue::{Provenance, rescue};
use crate::store::list_streams;
use crate::store::tests::{sim_machine, sim_store, sim_store_whose_lists_fail};

const DAY_US: i64 = 86_400_000_000;
/// 2024-06-01T00:00:00Z
const START_US: i64 = 1_717_200_000_000_000;

struct Place {
    store: Store,
    directory: tempfile::TempDir,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    Place { store: reopen(&directory), directory }
}

fn reopen(directory: &tempfile::TempDir) -> Store {
    let path = directory.path().join("tables with a space");
    Store::open(url::Url::from_directory_path(path).unwrap().as_str()).unwrap()
}

pub(super) fn stream() -> StreamName {
    "traffic".parse().unwrap()
}

fn field(name: &str, kind: FieldType) -> StreamField {
    StreamField { name: name.parse().unwrap(), kind }
}

pub(super) fn speed() -> Vec<StreamField> {
    vec![field("speed", FieldType::Float64)]
}

pub(super) fn spool(id: u8) -> SpoolId {
    SpoolId([id; 16])
}

pub(super) fn mark(seq: u64) -> Mark {
    Mark { seq: Seq(seq), crc: 0xffff_0000 + seq as u32 }
}

pub(super) fn span(id: u8, first: u64, last: u64) -> (SpoolId, Seq, Mark) {
    (spool(id), Seq(first), mark(last))
}

/// Batch `seq` of a spool: ten rows over three dates, speeds 10·seq … 10·seq + 9.
pub(super) fn rows(id: u8, seq: u64, fields: &[StreamField]) -> RecordBatch {
    let schema = StreamSchema::new(speed()).unwrap();
    let ts = (0..10).map(|row: i64| START_US + (row % 3) * DAY_US + seq as i64);
    let devices: StringArray = (0..10).map(|row| Some(format!("d{}", (row * 7) % 4))).collect();
    let speeds = Float64Array::from_iter_values((0..10).map(|row| (seq * 10 + row) as f64));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC")),
        Arc::new(devices),
        Arc::new(speeds),
        Arc::new(StringArray::from(vec!["good"; 10])),
    ];
    let batch = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
    let edge = "gw-1".parse().unwrap();
    let provenance = Provenance { edge, spool: spool(id), seq: Seq(seq), received_at_us: START_US };
    rescue(&batch, &provenance, fields)
}

async fn ask(snapshot: &TableSnapshot, sql: &str) -> Vec<RecordBatch> {
    let provider = TableProviderBuilder::default()
        .with_log_store(snapshot.log_store.clone())
        .with_eager_snapshot(snapshot.state.snapshot().clone())
        .build()
        .await
        .unwrap();
    let context = SessionContext::new();
    context.register_table("t", Arc::new(provider)).unwrap();
    context.sql(sql).await.unwrap().collect().await.unwrap()
}

async fn number(snapshot: &TableSnapshot, sql: &str) -> i64 {
    ask(snapshot, sql).await[0].column(0).as_primitive::<Int64Type>().value(0)
}

async fn count(snapshot: &TableSnapshot) -> i64 {
    number(snapshot, "SELECT count(*) FROM t").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_made_committed_to_and_opened_again() {
    let place = place();
    assert!(DeltaTable::open(&place.store, &stream()).await.unwrap().is_none());
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    assert_eq!(table.snapshot().version, 0);
    assert_eq!(*table.snapshot().schema, table_schema(&speed()));

    let batches = [rows(1, 1, &speed()), rows(1, 2, &speed()), rows(2, 1, &speed())];
    let after = table.commit(&batches, &[span(1, 1, 2), span(2, 1, 1)]).await.unwrap();
    assert_eq!(after.version, 1);
    assert_eq!(count(&after).await, 30);

    let again = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!(again.version, 1);
    assert_eq!(*again.txn, HashMap::from([(spool(1), mark(2)), (spool(2), mark(1))]));
    assert_eq!(again.txn, after.txn);
    assert_eq!((again.fields, again.schema), (after.fields, after.schema));
    assert_eq!(list_streams(&place.store).await.unwrap(), [stream()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_read_back_as_they_were_and_sorted_in_their_files() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let batches: Vec<RecordBatch> = (1..=5).map(|seq| rows(1, seq, &speed())).collect();
    let snapshot = table.commit(&batches, &[span(1, 1, 5)]).await.unwrap();
    let sums = ask(&snapshot, "SELECT sum(speed), min(speed), max(speed) FROM t").await;
    let sums: Vec<f64> = sums[0].columns().iter().map(|column| column.as_primitive::<Float64Type>().value(0)).collect();
    assert_eq!(sums, [(10..60).sum::<i32>() as f64, 10.0, 59.0]);
    assert_eq!(number(&snapshot, "SELECT count(DISTINCT _date) FROM t").await, 3);
    assert_eq!(number(&snapshot, "SELECT count(*) FROM t WHERE _date = DATE '2024-06-02'").await, 15);
    assert_eq!(number(&snapshot, "SELECT count(*) FROM t WHERE CAST(ts AS DATE) <> CAST(_date AS DATE)").await, 0);
    assert_eq!(number(&snapshot, "SELECT count(*) FROM t WHERE _seq = 5 AND _edge = 'gw-1'").await, 10);

    let files: Vec<String> = snapshot.state.log_data().iter().map(|file| file.path().into_owned()).collect();
    assert_eq!(files.len(), 3, "one file a date");
    for file in files {
        let bytes = std::fs::read(place.directory.path().join("tables with a space/traffic").join(&file)).unwrap();
        let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(bytes));
        let batches: Vec<RecordBatch> = reader.unwrap().build().unwrap().map(Result::unwrap).collect();
        let mut keys = Vec::new();
        for batch in &batches {
            let ts = batch.column_by_name(TS).unwrap().as_primitive::<arrow_array::types::TimestampMicrosecondType>();
            let devices = batch.column_by_name(DEVICE).unwrap().as_string::<i32>();
            keys.extend((0..batch.num_rows()).map(|row| (devices.value(row).to_owned(), ts.value(row))));
        }
        assert!(keys.is_sorted() && !keys.is_empty(), "{file}: {keys:?}");
    }
}

/// Statistics with less than µs would prune a file that has the row.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_found_by_its_time_to_the_microsecond() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let snapshot = table.commit(&[rows(1, 321, &speed())], &[span(1, 1, 1)]).await.unwrap();
    let at = |compare: &str| {
        format!("SELECT count(*) FROM t WHERE ts {compare} to_timestamp_micros({})", START_US + 2 * DAY_US + 321)
    };
    assert_eq!(number(&snapshot, &at("=")).await, 3);
    assert_eq!(number(&snapshot, &at(">=")).await, 3);
    assert_eq!(number(&snapshot, &at(">")).await, 0);
    assert_eq!(number(&snapshot, &at("<")).await, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_with_one_snapshot_one_has_to_start_again() {
    let place = place();
    let mut first = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let mut second = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
    let (batch, marks) = ([rows(1, 1, &speed())], [span(1, 1, 1)]);
    let (one, two) = tokio::join!(first.commit(&batch, &marks), second.commit(&batch, &marks));
    let moved = [&one, &two].iter().filter(|result| matches!(result, Err(CommitError::Moved { .. }))).count();
    assert_eq!(moved, 1, "{one:?} {two:?}");
    for table in [&mut first, &mut second] {
        let now = table.reload().await.unwrap();
        assert_eq!((now.version, now.txn[&spool(1)]), (1, mark(1)));
        assert_eq!(count(&now).await, 10);
        let again = table.commit(&batch, &[span(1, 1, 1)]).await;
        assert!(matches!(again, Err(CommitError::Covered { committed: Seq(1), .. })), "{again:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_hides_a_success_does_not_make_a_second_commit() {
    let layer = sim_machine();
    let gone_at = std::path::Path::new("/tables/traffic/_delta_log/00000000000000000001.json");
    let cut_off = sim_store_whose_lists_fail(&layer, Some(gone_at)).unwrap();
    let mut table = DeltaTable::create(&cut_off, &stream(), &speed()).await.unwrap();
    let (batch, marks) = ([rows(1, 1, &speed())], [span(1, 1, 1)]);
    let unknown = table.commit(&batch, &marks).await;
    assert!(matches!(unknown, Err(CommitError::Unknown { .. })), "{unknown:?}");
    table.reload().await.unwrap_err();
    assert_eq!(table.snapshot().version, 0);

    let mut table = DeltaTable::open(&sim_store(&layer).unwrap(), &stream()).await.unwrap().unwrap();
    assert_eq!((table.snapshot().version, table.snapshot().txn[&spool(1)]), (1, mark(1)));
    let again = table.commit(&batch, &marks).await;
    assert!(matches!(again, Err(CommitError::Covered { .. })), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn marks_of_one_spool_in_pieces_are_one_transaction() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    table.commit(&[], &[span(1, 1, 2), span(2, 1, 1), span(1, 3, 7)]).await.unwrap();
    let opened = DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!(*opened.txn, HashMap::from([(spool(1), mark(7)), (spool(2), mark(1))]));
    let log = opened.log_store.read_commit_entry(1).await.unwrap().unwrap();
    assert_eq!(String::from_utf8(log.to_vec()).unwrap().matches("\"txn\"").count(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_that_race_without_pause_store_each_batch_once() {
    const BATCHES: u64 = 12;
    let place = place();
    drop(DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap());
    let mut writers = Vec::new();
    for _ in 0..3 {
        let mut table = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
        writers.push(tokio::spawn(async move {
            loop {
                let next = table.snapshot().txn.get(&spool(1)).map_or(1, |mark| mark.seq.0 + 1);
                if next > BATCHES {
                    return;
                }
                match table.commit(&[rows(1, next, &speed())], &[span(1, next, next)]).await {
                    Ok(_) => {}
                    Err(CommitError::Moved { .. }) => drop(table.reload().await.unwrap()),
                    Err(other) => panic!("{other:?}"),
                }
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let end = DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!(end.version, BATCHES);
    assert_eq!(count(&end).await, 10 * BATCHES as i64);
    assert_eq!(number(&end, "SELECT count(DISTINCT _seq) FROM t").await, BATCHES as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_never_committed() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    for marks in [vec![span(1, 2, 2)], vec![span(1, 1, 1), span(1, 3, 3)], vec![span(1, 1, 0)], vec![span(1, 0, 0)]] {
        let refused = table.commit(&[rows(1, 2, &speed())], &marks).await;
        assert!(matches!(refused, Err(CommitError::Gap { .. } | CommitError::Covered { .. })), "{marks:?}");
    }
    assert_eq!(table.reload().await.unwrap().version, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn void_batches_commit_their_numbers_alone() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let snapshot = table.commit(&[], &[span(1, 1, 4)]).await.unwrap();
    assert_eq!((snapshot.version, snapshot.txn[&spool(1)]), (1, mark(4)));
    assert_eq!(count(&snapshot).await, 0);
    let opened = DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap();
    assert_eq!(opened.snapshot().txn, snapshot.txn);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_two_nodes_make_is_one_table() {
    let (place, name) = (place(), stream());
    let (fields, others) = (speed(), [field("count", FieldType::Int64)]);
    let store = reopen(&place.directory);
    let (one, two) =
        tokio::join!(DeltaTable::create(&place.store, &name, &fields), DeltaTable::create(&store, &name, &others));
    let (one, two) = (one.unwrap().snapshot(), two.unwrap().snapshot());
    assert_eq!((one.version, two.version), (0, 0));
    assert_eq!(one.fields, two.fields);
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_two_nodes_add_at_once_are_all_there() {
    let place = place();
    let mut first = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    drop(first.commit(&[rows(1, 1, &speed())], &[span(1, 1, 1)]).await.unwrap());
    let mut second = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
    let count_field = field("vehicles", FieldType::Int64);
    let taken = field("speed", FieldType::Text);
    let added = first.add_fields(&[count_field.clone(), taken]).await.unwrap();
    assert_eq!(added.fields.to_vec(), [speed(), vec![count_field.clone()]].concat());
    assert_eq!(*added.schema, table_schema(&added.fields));

    let other = field("gap", FieldType::Timestamp);
    let lost = second.add_fields(std::slice::from_ref(&other)).await;
    assert!(matches!(lost, Err(CommitError::Moved { .. })), "{lost:?}");
    second.reload().await.unwrap();
    let all = second.add_fields(&[other.clone(), count_field.clone()]).await.unwrap();
    assert_eq!(all.fields.to_vec(), [speed(), vec![count_field, other]].concat());
    assert_eq!(second.add_fields(&all.fields).await.unwrap().version, all.version, "nothing to add is no commit");

    // A writer that has not seen the new fields has to look first.
    let stale = first.commit(&[rows(1, 2, &added.fields)], &[span(1, 2, 2)]).await;
    assert!(matches!(stale, Err(CommitError::Moved { .. })), "{stale:?}");
    let now = first.reload().await.unwrap();
    let after = first.commit(&[rows(1, 2, &now.fields)], &[span(1, 2, 2)]).await.unwrap();
    assert_eq!(number(&after, "SELECT count(*) FROM t WHERE vehicles IS NULL").await, 20);
    assert_eq!(number(&after, "SELECT count(speed) FROM t").await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_schema_are_not_written() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let refused = table.commit(&[rows(1, 1, &[])], &[span(1, 1, 1)]).await;
    assert!(matches!(refused, Err(CommitError::Rows { .. })), "{refused:?}");
    assert_eq!(table.reload().await.unwrap().version, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_survive_checkpoints_and_a_log_that_was_cleaned() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let mut stale = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
    let mut written = 0;
    for seq in 1..=2 * CHECKPOINT_EVERY + 3 {
        let id = (seq % 2) as u8;
        let number = seq.div_ceil(2);
        let snapshot = table.commit(&[], &[span(id, number, number)]).await.unwrap();
        written += u32::from(maintain(&stream(), &snapshot).await.unwrap());
    }
    assert_eq!(written, 2);
    let log = place.directory.path().join("tables with a space/traffic/_delta_log");
    for version in 0..CHECKPOINT_EVERY {
        std::fs::remove_file(log.join(format!("{version:020}.json"))).unwrap();
    }
    let expected = table.snapshot().txn;
    assert_eq!(expected.len(), 2);
    let opened = DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!((opened.version, opened.txn), (table.snapshot().version, expected.clone()));
    let reloaded = stale.reload().await.unwrap();
    assert_eq!((reloaded.version, reloaded.txn), (table.snapshot().version, expected));
}
