//! Compaction, retention and vacuum on real directories, against a model. `LAKE_SEED=17` tries only one seed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use segment_log::sim::Random;
use wire::ack::Mark;
use wire::schema::{DEVICE, FieldType, QUALITY, SEQ, StreamField, StreamSchema, TS};
use wire::{DAY_US, Seq, SpoolId, StreamName};

use super::*;
use crate::config::{Keep, KeepSettings, Size, Span};
use crate::rescue::{Provenance, rescue};
use crate::store::Store;
use crate::{retain, vacuum};

const SEEDS: u64 = 12;
const STEPS: u64 = 40;
/// 2024-06-01
const FIRST_DAY: i64 = 19_875;
const DAYS: u64 = 3;

fn stream() -> StreamName {
    "traffic".parse().unwrap()
}

fn fields(names: &[&str]) -> Vec<StreamField> {
    let field = |name: &&str| StreamField { name: name.parse().unwrap(), kind: FieldType::Int64 };
    names.iter().map(field).collect()
}

fn settings() -> CompactSettings {
    CompactSettings { cpu_share: 1.0, min_files: 2, ..CompactSettings::default() }
}

fn open_store(directory: &tempfile::TempDir) -> Store {
    Store::open(url::Url::from_directory_path(directory.path()).unwrap().as_str()).unwrap()
}

/// Rows of one batch: (day, device, µs of the day, number).
type Rows = Vec<(i64, Option<String>, i64, i64)>;

fn random_rows(random: &mut Random, numbers: &mut i64) -> Rows {
    let count = 1 + random.below(200);
    let row = |_| {
        *numbers += 1;
        let device = (!random.one_in(20)).then(|| format!("d{}", random.below(7)));
        (FIRST_DAY + random.below(DAYS) as i64, device, random.below(500) as i64, *numbers)
    };
    (0..count).map(row).collect()
}

fn batch(spool: SpoolId, seq: u64, rows: &Rows, fields: &[StreamField]) -> RecordBatch {
    let schema = StreamSchema::new(fields.to_vec()).unwrap();
    let ts = rows.iter().map(|(day, _, us, _)| day * DAY_US + us);
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC")),
        Arc::new(rows.iter().map(|(_, device, ..)| device.as_deref()).collect::<StringArray>()),
    ];
    for _ in fields {
        columns.push(Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.3))));
    }
    columns.push(Arc::new(StringArray::from(vec!["good"; rows.len()])));
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
    let provenance = Provenance { edge: "gw-1".parse().unwrap(), spool, seq: Seq(seq), received_at_us: 0 };
    rescue(&rows, &provenance, fields)
}

fn mark(seq: u64) -> Mark {
    Mark { seq: Seq(seq), crc: seq as u32 ^ 0xffff_0000 }
}

/// The rows of a file, checked to be in order: (device, ts, number, seq).
fn read(path: PathBuf) -> Vec<(Option<String>, i64, Option<i64>, i64)> {
    let bytes = bytes::Bytes::from(std::fs::read(&path).unwrap());
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
    let mut rows = Vec::new();
    for batch in reader {
        let batch = batch.unwrap();
        let column = |name| batch.column_by_name(name).unwrap();
        let (ts, device) = (column(TS).as_primitive::<TimestampMicrosecondType>(), column(DEVICE).as_string::<i32>());
        let (number, seq) = (column("n").as_primitive::<Int64Type>(), column(SEQ).as_primitive::<Int64Type>());
        assert!(column(QUALITY).as_string::<i32>().iter().all(|quality| quality == Some("good")));
        rows.extend(
            device
                .iter()
                .zip(ts.values())
                .zip(number.iter().zip(seq.values()))
                .map(|((d, t), (n, s))| (d.map(str::to_owned), *t, n, *s)),
        );
    }
    assert!(rows.is_sorted_by_key(|row| (row.0.clone(), row.1)), "{}", path.display());
    rows
}

/// Numbers of all rows of a version, in order.
fn numbers(directory: &tempfile::TempDir, files: &DataFiles) -> Vec<i64> {
    let mut numbers = Vec::new();
    for file in files.iter() {
        let rows = read(directory.path().join("traffic").join(&file.path));
        assert_eq!(file.rows, Some(rows.len() as u64));
        let (first, last) = file.ts.unwrap();
        assert_eq!(rows.iter().map(|row| row.1).min(), Some(first), "{}", file.path);
        assert_eq!(rows.iter().map(|row| row.1).max(), Some(last), "{}", file.path);
        let devices = rows.iter().filter_map(|row| row.0.clone());
        assert_eq!(devices.clone().min().zip(devices.max()), file.device, "{}", file.path);
        assert_eq!(rows.iter().filter(|row| row.0.is_none()).count() as u64, file.device_nulls.unwrap());
        numbers.extend(rows.iter().map(|row| row.2.unwrap()));
    }
    numbers.sort_unstable();
    numbers
}

async fn merge_all(compactor: &Compactor, table: &mut DeltaTable) -> usize {
    let mut merges = 0;
    while let Some(inputs) = compactor.choose(&table.snapshot().files) {
        match compactor.merge(table, inputs, &|_| {}).await.unwrap() {
            Merged::Done { .. } => merges += 1,
            Merged::Overtaken => {}
        }
    }
    merges
}

#[tokio::test(flavor = "multi_thread")]
async fn small_files_become_one_in_order_and_say_that_no_data_changed() {
    let directory = tempfile::tempdir().unwrap();
    let mut table = DeltaTable::create(&open_store(&directory), &stream(), &fields(&["n"])).await.unwrap();
    let spool = SpoolId([1; 16]);
    let (mut random, mut count) = (Random::new(7), 0);
    for seq in 1..=9 {
        let rows = random_rows(&mut random, &mut count);
        table.commit(&[batch(spool, seq, &rows, &fields(&["n"]))], &[(spool, Seq(seq), mark(seq))]).await.unwrap();
    }
    let before = table.snapshot();
    let done = AtomicU64::new(0);
    let compactor = Compactor::new(&settings());
    let mut merged = 0;
    while let Some(inputs) = compactor.choose(&table.snapshot().files) {
        let progress = |rows| _ = done.fetch_add(rows, Ordering::Relaxed);
        assert!(matches!(compactor.merge(&mut table, inputs, &progress).await, Ok(Merged::Done { files_out: 1, .. })));
        merged += 1;
    }
    assert_eq!((merged, done.load(Ordering::Relaxed)), (DAYS as usize, count as u64));
    let after = table.snapshot();
    assert_eq!((after.files.len(), after.version), (DAYS as usize, before.version + DAYS));
    assert_eq!(numbers(&directory, &after.files), (1..=count).collect::<Vec<_>>());
    assert_eq!(after.txn, before.txn);
    for file in after.files.iter() {
        // Of rows with one device and time, the one that came first stands first.
        let rows = read(directory.path().join("traffic").join(&file.path));
        assert!(
            rows.windows(2).all(|pair| (&pair[0].0, pair[0].1) != (&pair[1].0, pair[1].1) || pair[0].3 <= pair[1].3)
        );
    }
    let entry = after.log_store.read_commit_entry(after.version).await.unwrap().unwrap();
    let entry = String::from_utf8(entry.to_vec()).unwrap();
    assert!(entry.contains("\"remove\"") && !entry.contains("\"dataChange\":true") && !entry.contains("\"txn\""));
    // The version before is as it was.
    assert_eq!(numbers(&directory, &before.files), numbers(&directory, &after.files));
    let opened = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!((opened.files, opened.txn), (after.files, after.txn));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_outputs_are_split_and_files_from_before_a_field_get_nulls() {
    let directory = tempfile::tempdir().unwrap();
    let mut table = DeltaTable::create(&open_store(&directory), &stream(), &fields(&["n"])).await.unwrap();
    let spool = SpoolId([1; 16]);
    let rows = |seq: i64| -> Rows {
        (0..20_000)
            .map(|row| (FIRST_DAY, Some(format!("d{row}")), (row * 7_919 * seq) % DAY_US, seq * 20_000 + row))
            .collect()
    };
    table.commit(&[batch(spool, 1, &rows(0), &fields(&["n"]))], &[(spool, Seq(1), mark(1))]).await.unwrap();
    table.add_fields(&fields(&["n", "m"])).await.unwrap();
    table.commit(&[batch(spool, 2, &rows(1), &fields(&["n", "m"]))], &[(spool, Seq(2), mark(2))]).await.unwrap();
    let bytes = table.snapshot().files.bytes();
    let compact = CompactSettings { file_bytes: Size(bytes / 5), small_bytes: Size(bytes), ..settings() };
    let inputs: Vec<_> = table.snapshot().files.iter().cloned().collect();
    let merged = Compactor::new(&compact).merge(&mut table, inputs, &|_| {}).await.unwrap();
    assert!(matches!(merged, Merged::Done { files_in: 2, rows: 40_000, files_out, .. } if files_out > 1), "{merged:?}");
    assert_eq!(numbers(&directory, &table.snapshot().files), (0..40_000).collect::<Vec<_>>());
    // Each has its own devices.
    let mut bounds: Vec<_> = table.snapshot().files.iter().map(|file| file.device.clone().unwrap()).collect();
    bounds.sort();
    assert!(bounds.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{bounds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_compactors_with_the_same_files_one_is_overtaken() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = DeltaTable::create(&open_store(&directory), &stream(), &fields(&["n"])).await.unwrap();
    let spool = SpoolId([1; 16]);
    let (mut random, mut count) = (Random::new(7), 0);
    for seq in 1..=4 {
        let rows = random_rows(&mut random, &mut count);
        first.commit(&[batch(spool, seq, &rows, &fields(&["n"]))], &[(spool, Seq(seq), mark(seq))]).await.unwrap();
    }
    let mut second = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap();
    let mut third = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap();
    let compactor = Compactor::new(&settings());
    let inputs = compactor.choose(&first.snapshot().files).unwrap();
    let (one, two) = tokio::join!(
        compactor.merge(&mut first, inputs.clone(), &|_| {}),
        compactor.merge(&mut second, inputs.clone(), &|_| {}),
    );
    let overtaken = [one.unwrap(), two.unwrap()].iter().filter(|merged| **merged == Merged::Overtaken).count();
    assert_eq!(overtaken, 1);
    assert_eq!(compactor.merge(&mut third, inputs, &|_| {}).await.unwrap(), Merged::Overtaken);
    assert_eq!(numbers(&directory, &third.snapshot().files), (1..=count).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_damaged_or_out_of_order_is_named_and_nothing_changes() {
    let directory = tempfile::tempdir().unwrap();
    let mut table = DeltaTable::create(&open_store(&directory), &stream(), &fields(&["n"])).await.unwrap();
    let spool = SpoolId([1; 16]);
    for seq in 1..=3 {
        let rows = (0..500).map(|row| (FIRST_DAY, Some(format!("d{}", row % 3)), row, row)).collect();
        table.commit(&[batch(spool, seq, &rows, &fields(&["n"]))], &[(spool, Seq(seq), mark(seq))]).await.unwrap();
    }
    let before = table.snapshot();
    let files: Vec<_> = before.files.iter().cloned().collect();
    let place = |file: &DataFile| directory.path().join("traffic").join(&file.path);
    let good = std::fs::read(place(&files[1])).unwrap();
    let mut compactor = Compactor::new(&settings());

    let mut bad = good.clone();
    bad[good.len() / 3..good.len() / 3 + 64].fill(0xa5);
    std::fs::write(place(&files[1]), &bad).unwrap();
    let error = compactor.merge(&mut table, files.clone(), &|_| {}).await.unwrap_err();
    assert!(matches!(&error, CompactError::Bytes { path, .. } if *path == files[1].path), "{error:?}");
    // Of a writer that says no checksum.
    let unsaid = |bytes: &dyn Fn(&DataFile) -> u64| -> Vec<_> {
        files.iter().map(|file| Arc::new(DataFile { bytes: bytes(file), crc: None, ..file.as_ref().clone() })).collect()
    };
    let error = compactor.merge(&mut table, unsaid(&|file| file.bytes), &|_| {}).await.unwrap_err();
    assert!(matches!(error, CompactError::Read { .. }), "{error:?}");
    assert_eq!(error.bad_file(), Some(files[1].path.as_str()), "{error:?}");

    std::fs::write(place(&files[1]), unsorted(&good)).unwrap();
    let error = compactor.merge(&mut table, unsaid(&|file| size(&place(file))), &|_| {}).await.unwrap_err();
    assert!(matches!(&error, CompactError::Unsorted { path } if *path == files[1].path), "{error:?}");
    assert_eq!(table.snapshot().version, before.version);

    compactor.leave_out(&files[1].path);
    assert_eq!(compactor.choose(&before.files).unwrap().len(), 2);
    std::fs::write(place(&files[1]), &good).unwrap();
    let missing = vec![files[0].clone(), Arc::new(DataFile { rows: Some(1), ..files[2].as_ref().clone() })];
    let error = compactor.merge(&mut table, missing, &|_| {}).await.unwrap_err();
    assert!(matches!(error, CompactError::Rows { expected: 501, got: 1_000, .. }), "{error:?}");
}

fn size(path: &std::path::Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

/// The same file with its rows the other way round.
fn unsorted(file: &[u8]) -> Vec<u8> {
    let bytes = bytes::Bytes::copy_from_slice(file);
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
    let rows = reader.map(Result::unwrap).next().unwrap();
    let backwards: arrow_array::UInt32Array = (0..rows.num_rows() as u32).rev().collect();
    let columns =
        rows.columns().iter().map(|column| arrow_select::take::take(column, &backwards, None).unwrap()).collect();
    let rows = RecordBatch::try_new(rows.schema(), columns).unwrap();
    let mut written = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut written, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    written
}

/// What the table must hold: numbers by day, and what each spool has committed.
#[derive(Default)]
struct Model {
    days: BTreeMap<i64, Vec<i64>>,
    marks: BTreeMap<u8, u64>,
}

impl Model {
    fn numbers(&self) -> Vec<i64> {
        let mut numbers: Vec<i64> = self.days.values().flatten().copied().collect();
        numbers.sort_unstable();
        numbers
    }
}

/// Three processes with their own handles do things in any order; after each, the table has the rows of the model, `txn`
/// never goes back, and a version that somebody holds can still be read.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_committed_compacted_retained_and_vacuumed_the_rows_are_those_of_the_model() {
    let only = std::env::var("LAKE_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    for seed in only.map_or(1..=SEEDS, |seed| seed..=seed) {
        println!("LAKE_SEED={seed}");
        let mut random = Random::new(seed);
        let directory = tempfile::tempdir().unwrap();
        let store = open_store(&directory);
        drop(DeltaTable::create(&store, &stream(), &fields(&["n"])).await.unwrap());
        let mut handles = Vec::new();
        for _ in 0..3 {
            handles.push(DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap());
        }
        let (mut model, mut numbers_given) = (Model::default(), 0);
        let mut held = (handles[0].snapshot(), Vec::new());
        let compactor = Compactor::new(&settings());
        for _ in 0..STEPS {
            let at = random.below(3) as usize;
            match random.below(12) {
                0..=5 => {
                    let id = random.below(2) as u8;
                    handles[at].reload().await.unwrap();
                    let seq = model.marks.get(&id).copied().unwrap_or(0) + 1;
                    let rows = random_rows(&mut random, &mut numbers_given);
                    let (spool, columns) = (SpoolId([id; 16]), fields(&["n"]));
                    let marks = [(spool, Seq(seq), mark(seq))];
                    if random.one_in(4) {
                        // Others commit between its look and its put.
                        let other = &mut handles[(at + 1) % 3];
                        other.reload().await.unwrap();
                        merge_all(&compactor, other).await;
                    }
                    handles[at].commit(&[batch(spool, seq, &rows, &columns)], &marks).await.unwrap();
                    model.marks.insert(id, seq);
                    for (day, _, _, number) in rows {
                        model.days.entry(day).or_default().push(number);
                    }
                }
                6 | 7 => drop(merge_all(&compactor, &mut handles[at]).await),
                8 => {
                    let mut pair = handles.iter_mut();
                    let (first, second) = (pair.next().unwrap(), pair.next().unwrap());
                    tokio::join!(merge_all(&compactor, first), merge_all(&compactor, second));
                }
                9 => {
                    let days = 1 + random.below(DAYS) as i64;
                    let now_us = (FIRST_DAY + days) * DAY_US;
                    let kept = KeepSettings { keep: Keep::For(Span(std::time::Duration::ZERO)), max_bytes: None };
                    if random.one_in(3) {
                        handles[at].reload().await.unwrap();
                        retain::retain(&mut handles[at], &kept, now_us).await.unwrap();
                        model.days.retain(|day, _| *day >= FIRST_DAY + days);
                    }
                }
                10 => {
                    handles[at].reload().await.unwrap();
                    let snapshot = handles[at].snapshot();
                    crate::delta::checkpoint(&stream(), &snapshot).await.unwrap();
                    if random.one_in(2) {
                        crate::delta::clean(&stream(), &snapshot, std::time::Duration::ZERO, &|| {}).await.unwrap();
                    }
                }
                _ => {
                    let plan = vacuum::plan(&store, &mut handles[at], std::time::Duration::from_secs(3_600), &|| {})
                        .await
                        .unwrap();
                    assert!(plan.is_empty(), "all files are young: {plan:?}");
                }
            }
            let handle = &mut handles[random.below(3) as usize];
            let before = handle.snapshot();
            let now = handle.reload().await.unwrap();
            assert!(now.version >= before.version);
            assert!(before.txn.iter().all(|(spool, mark)| now.txn[spool].seq >= mark.seq), "seed {seed}");
            let marks: BTreeMap<u8, u64> = now.txn.iter().map(|(spool, mark)| (spool.0[0], mark.seq.0)).collect();
            assert_eq!(marks, model.marks, "seed {seed}");
            assert_eq!(numbers(&directory, &now.files), model.numbers(), "seed {seed}");
            assert_eq!(now.files.rows(), model.numbers().len() as u64);
            assert_eq!(numbers(&directory, &held.0.files), held.1, "seed {seed}: a version that is held");
            if random.one_in(8) {
                held = (now, model.numbers());
            }
        }
        let opened = DeltaTable::open(&store, &stream()).await.unwrap().unwrap().snapshot();
        assert_eq!(numbers(&directory, &opened.files), model.numbers(), "seed {seed}");
    }
}

/// All files of a table as old as this.
fn age(directory: &std::path::Path, seconds: u64) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            age(&path, seconds);
        } else {
            let then = std::time::SystemTime::now() - Duration::from_secs(seconds);
            std::fs::File::options().append(true).open(&path).unwrap().set_modified(then).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_deletes_what_nothing_names_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let store = open_store(&directory);
    let mut table = DeltaTable::create(&store, &stream(), &fields(&["n"])).await.unwrap();
    let spool = SpoolId([1; 16]);
    let (mut random, mut count) = (Random::new(7), 0);
    for seq in 1..=4 {
        let rows = random_rows(&mut random, &mut count);
        table.commit(&[batch(spool, seq, &rows, &fields(&["n"]))], &[(spool, Seq(seq), mark(seq))]).await.unwrap();
    }
    let grace = Duration::from_secs(86_400);
    let partition = directory.path().join("traffic/_date=2024-06-01");
    for name in ["part-orphan.zstd.parquet", "part-staged.zstd.parquet#17", "notes.txt"] {
        std::fs::write(partition.join(name), b"left behind").unwrap();
    }
    let check = async |table: &mut DeltaTable, unused: usize, staged: usize, kept: usize| {
        let plan = vacuum::plan(&store, table, grace, &|| {}).await.unwrap();
        assert_eq!((plan.unused.len(), plan.staged.len(), plan.kept), (unused, staged, kept), "{plan:?}");
        plan
    };
    check(&mut table, 0, 0, 1).await;
    // Old, but only the orphan and the staged file are named by nothing; and not while a rewrite goes on that has lasted longer.
    age(directory.path(), 2 * 86_400);
    let note = directory.path().join("traffic/_underway/a");
    std::fs::create_dir(note.parent().unwrap()).unwrap();
    let began = chrono::Utc::now() - Duration::from_secs(3 * 86_400);
    std::fs::write(&note, began.timestamp_micros().to_string()).unwrap();
    check(&mut table, 0, 0, 1).await;
    let said = |seconds| std::time::SystemTime::now() - Duration::from_secs(seconds);
    std::fs::File::options().append(true).open(&note).unwrap().set_modified(said(3_500)).unwrap();
    check(&mut table, 0, 0, 1).await;
    std::fs::File::options().append(true).open(&note).unwrap().set_modified(said(3_700)).unwrap();
    check(&mut table, 2, 1, 0).await;
    std::fs::remove_file(&note).unwrap();
    let files = table.snapshot().files.len();
    let plan = check(&mut table, 1, 1, 0).await;
    assert_eq!((plan.in_use, plan.bytes()), (files, 22));
    // What is compacted now was current within the grace: the entry that removed it is young.
    merge_all(&Compactor::new(&settings()), &mut table).await;
    age(&partition, 2 * 86_400);
    let plan = check(&mut table, 1, 1, files).await;
    assert_eq!(vacuum::delete(&table, &plan, &|| {}).await.unwrap(), 2);
    assert_eq!(numbers(&directory, &table.snapshot().files), (1..=count).collect::<Vec<_>>());
    // A grace later they go, and what else is in the directory stays.
    age(directory.path(), 2 * 86_400);
    let plan = check(&mut table, files, 0, 0).await;
    assert_eq!(vacuum::delete(&table, &plan, &|| {}).await.unwrap(), files);
    check(&mut table, 0, 0, 0).await;
    assert!(partition.join("notes.txt").exists());
    assert_eq!(numbers(&directory, &table.snapshot().files), (1..=count).collect::<Vec<_>>());
    let opened = DeltaTable::open(&store, &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!(numbers(&directory, &opened.files), (1..=count).collect::<Vec<_>>());
}
