use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{ArrayRef, Float64Array, StringArray, TimestampMicrosecondArray};
use datafusion::prelude::SessionContext;
use deltalake_core::delta_datafusion::TableProviderBuilder;
use deltalake_core::table::state::DeltaTableState;
use wire::schema::StreamSchema;

use super::*;
use crate::rescue::{Provenance, rescue};
use crate::store::list_streams;
use crate::store::tests::{sim_machine, sim_store};
use crate::store::unkind::Unkind;

const DAY_US: i64 = 86_400_000_000;
/// 2024-06-01T00:00:00Z
const START_US: i64 = 1_717_200_000_000_000;

pub(crate) struct Place {
    pub(crate) store: Store,
    directory: tempfile::TempDir,
}

impl Place {
    /// The directory of the table.
    pub(crate) fn table(&self) -> std::path::PathBuf {
        self.directory.path().join("tables with a space/traffic")
    }
}

pub(crate) fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    Place { store: reopen(&directory), directory }
}

fn reopen(directory: &tempfile::TempDir) -> Store {
    let path = directory.path().join("tables with a space");
    Store::open(url::Url::from_directory_path(path).unwrap().as_str()).unwrap()
}

pub(crate) fn stream() -> StreamName {
    "traffic".parse().unwrap()
}

fn field(name: &str, kind: FieldType) -> StreamField {
    StreamField { name: name.parse().unwrap(), kind }
}

pub(crate) fn speed() -> Vec<StreamField> {
    vec![field("speed", FieldType::Float64)]
}

pub(crate) fn spool(id: u8) -> SpoolId {
    SpoolId([id; 16])
}

pub(crate) fn mark(seq: u64) -> Mark {
    Mark { seq: Seq(seq), crc: 0xffff_0000 + seq as u32 }
}

pub(crate) fn span(id: u8, first: u64, last: u64) -> (SpoolId, Seq, Mark) {
    (spool(id), Seq(first), mark(last))
}

/// Batch `seq` of a spool: ten rows over three dates, speeds 10·seq … 10·seq + 9.
pub(crate) fn rows(id: u8, seq: u64, fields: &[StreamField]) -> RecordBatch {
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
    let state = DeltaTableState::try_new(&snapshot.log_store, Some(snapshot.version)).await.unwrap();
    let provider = TableProviderBuilder::default()
        .with_log_store(snapshot.log_store.clone())
        .with_eager_snapshot(state.snapshot().clone())
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

    let files: Vec<String> = snapshot.files.iter().map(|file| file.path.clone()).collect();
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
    let lost = [&one, &two].iter().filter(|result| matches!(result, Err(CommitError::Covered { .. }))).count();
    assert_eq!(lost, 1, "{one:?} {two:?}");
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
    let (batch, marks) = ([rows(1, 1, &speed())], [span(1, 1, 1)]);
    let mut hidden = 0;
    // A sync fails after each number of them; only the last of a commit's syncs is behind the entry's name.
    for syncs in 0..30 {
        let layer = sim_machine();
        let mut table = DeltaTable::create(&sim_store(&layer).unwrap(), &stream(), &speed()).await.unwrap();
        layer.fail_sync_after(syncs);
        let Err(error) = table.commit(&batch, &marks).await else { break };
        assert!(matches!(error, CommitError::Unknown { .. } | CommitError::Rows { .. }), "{error:?}");
        assert_eq!(table.snapshot().version, 0);
        layer.fail_sync_after(u64::MAX);

        let mut table = DeltaTable::open(&sim_store(&layer).unwrap(), &stream()).await.unwrap().unwrap();
        if table.snapshot().version == 0 {
            continue;
        }
        hidden += 1;
        assert_eq!((table.snapshot().version, table.snapshot().txn[&spool(1)]), (1, mark(1)));
        let again = table.commit(&batch, &marks).await;
        assert!(matches!(again, Err(CommitError::Covered { .. })), "{again:?}");
    }
    assert!(hidden > 0, "no sync failed behind the entry's name: nothing was tried");
}

/// Of writers that lose, each goes on with the files that it has; the entry says nothing else than it would have.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_loses_to_others_writes_its_rows_once() {
    let place = place();
    let mut first = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let mut second = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
    drop(first.commit(&[rows(1, 1, &speed())], &[span(1, 1, 1)]).await.unwrap());
    let after = second.commit(&[rows(2, 1, &speed())], &[span(2, 1, 1)]).await.unwrap();
    assert_eq!((after.version, after.files.len(), after.files.rows()), (2, 6, 20));
    assert_eq!(*after.txn, HashMap::from([(spool(1), mark(1)), (spool(2), mark(1))]));
    assert_eq!(count(&after).await, 20);
    let opened = DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!((opened.files, opened.txn), (after.files, after.txn));
    let written = std::fs::read_dir(place.directory.path().join("tables with a space/traffic/_date=2024-06-01"));
    assert_eq!(written.unwrap().count(), 2);
}

/// A name that was cleaned away from the log is free, and no next version.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_slept_longer_than_the_log_is_kept_makes_no_entry_in_the_past() {
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let mut asleep = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
    for seq in 1..=5 {
        drop(table.commit(&[rows(1, seq, &speed())], &[span(1, seq, seq)]).await.unwrap());
    }
    checkpoint(&stream(), &table.snapshot()).await.unwrap();
    assert_eq!(clean(&stream(), &table.snapshot(), Duration::ZERO, &|| {}).await.unwrap(), 5);
    asleep.seen = SystemTime::UNIX_EPOCH;
    let covered = asleep.commit(&[rows(1, 1, &speed())], &[span(1, 1, 1)]).await;
    assert!(matches!(covered, Err(CommitError::Covered { committed: Seq(5), .. })), "{covered:?}");
    assert!(!place.table().join("_delta_log/00000000000000000001.json").exists(), "an entry in the past");
    let next = asleep.commit(&[rows(1, 6, &speed())], &[span(1, 6, 6)]).await.unwrap();
    assert_eq!((next.version, next.files.rows()), (6, 60));
    assert_eq!(count(&DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot()).await, 60);
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
                    Err(CommitError::Covered { .. }) => {}
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
async fn a_list_that_was_read_while_others_committed_is_asked_for_again() {
    let objects = Arc::new(Unkind::default());
    let store = Store::on_objects("memory:///tables/".parse().unwrap(), objects.clone());
    let mut table = DeltaTable::create(&store, &stream(), &speed()).await.unwrap();
    for seq in 1..=4 {
        table.commit(&[rows(1, seq, &speed())], &[span(1, seq, seq)]).await.unwrap();
    }
    objects.lists_with_gaps.store(2, Ordering::Relaxed);
    assert_eq!(DeltaTable::open(&store, &stream()).await.unwrap().unwrap().snapshot().version, 4);
    // An entry that is not there is none that was overlooked.
    objects.lists_with_gaps.store(usize::MAX, Ordering::Relaxed);
    let told = DeltaTable::open(&store, &stream()).await.unwrap_err();
    assert!(matches!(told, TableError::Log { .. }), "{told:?}");
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
async fn files_and_transactions_survive_checkpoints_and_a_log_that_was_cleaned() {
    const COMMITS: u64 = 33;
    let place = place();
    let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
    let mut stale = DeltaTable::open(&reopen(&place.directory), &stream()).await.unwrap().unwrap();
    for seq in 1..=COMMITS {
        let id = (seq % 2) as u8;
        let number = seq.div_ceil(2);
        let snapshot = table.commit(&[rows(id, number, &speed())], &[span(id, number, number)]).await.unwrap();
        if seq % 10 == 0 {
            checkpoint(&stream(), &snapshot).await.unwrap();
            assert_eq!(last_checkpoint(&stream(), &snapshot.log_store).await.unwrap(), seq);
        }
    }
    let expected = table.snapshot();
    assert_eq!((expected.version, expected.txn.len(), expected.files.len()), (COMMITS, 2, 3 * COMMITS as usize));
    // Entries 0 to 29 and the checkpoints of 10 and 20.
    assert_eq!(clean(&stream(), &expected, Duration::ZERO, &|| {}).await.unwrap(), 32);
    assert_eq!(clean(&stream(), &expected, Duration::ZERO, &|| {}).await.unwrap(), 0);
    let by_path = |snapshot: &TableSnapshot| {
        let mut files: Vec<DataFile> = snapshot.files.iter().map(|file| file.as_ref().clone()).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files
    };
    for seen in
        [DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot(), stale.reload().await.unwrap()]
    {
        assert_eq!((seen.version, &seen.txn), (COMMITS, &expected.txn));
        assert_eq!(by_path(&seen), by_path(&expected));
        assert_eq!(count(&seen).await, 10 * COMMITS as i64);
    }
}
