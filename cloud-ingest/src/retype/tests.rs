//! Retyping on real directories, with others at work.

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{ArrayRef, Int64Array, StringArray, TimestampMicrosecondArray};
use wire::ack::Mark;
use wire::schema::{DEVICE, QUALITY, RESCUED, SEQ, StreamSchema, TS};
use wire::{Seq, SpoolId};

use super::*;
use crate::compact::{Compactor, Merged, scan};
use crate::config::CompactSettings;
use crate::rescue::{Provenance, rescue};
use crate::store::Store;
use crate::verify::verify;

/// 2024-06-01
const FIRST_US: i64 = 1_717_200_000_000_000;
const DAY_US: i64 = 86_400_000_000;

fn stream() -> StreamName {
    "traffic".parse().unwrap()
}

fn column(name: &str) -> FieldName {
    name.parse().unwrap()
}

fn field(name: &str, kind: FieldType) -> StreamField {
    StreamField { name: column(name), kind }
}

fn open_store(directory: &tempfile::TempDir) -> Store {
    Store::open(url::Url::from_directory_path(directory.path()).unwrap().as_str()).unwrap()
}

fn spool() -> SpoolId {
    SpoolId([1; 16])
}

/// Commits batch `seq` of a column `n`, over two days.
async fn commit(table: &mut DeltaTable, seq: u64, n: ArrayRef) {
    let kind = FieldType::from_arrow(n.data_type()).unwrap();
    let schema = StreamSchema::new(vec![field("n", kind)]).unwrap();
    let count = n.len();
    let ts = (0..count as i64).map(|row| FIRST_US + (row % 2) * DAY_US + seq as i64 * 1_000 + row);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values((0..count).map(|row| format!("d{}", row % 3)))),
        n,
        Arc::new(StringArray::from(vec!["good"; count])),
    ];
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
    let provenance = Provenance { edge: "gw".parse().unwrap(), spool: spool(), seq: Seq(seq), received_at_us: 0 };
    loop {
        let fields = table.reload().await.unwrap().fields;
        let rows = rescue(&rows, &provenance, &fields);
        let mark = Mark { seq: Seq(seq), crc: seq as u32 };
        match table.commit(&[rows], &[(spool(), Seq(seq), mark)]).await {
            Ok(_) => return,
            Err(CommitError::Moved { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn ints(values: impl IntoIterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(values))
}

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// Number of the batch, `n` as text, quality, `_rescued`, of all rows, in order.
async fn rows(snapshot: &TableSnapshot) -> Vec<[String; 4]> {
    let (store, schema) = (snapshot.log_store.object_store(None), row_schema(&snapshot.fields));
    let mut all = Vec::new();
    for file in snapshot.files.iter() {
        let mut take = |rows: &RecordBatch| {
            let as_text =
                |name: &str| arrow_cast::cast(rows.column_by_name(name).unwrap(), &arrow_schema::DataType::Utf8);
            let columns = [SEQ, "n", QUALITY, RESCUED].map(|name| as_text(name).unwrap());
            for row in 0..rows.num_rows() {
                let value = |column: &ArrayRef| match column.is_valid(row) {
                    true => column.as_string::<i32>().value(row).to_owned(),
                    false => "-".to_owned(),
                };
                all.push([0, 1, 2, 3].map(|at: usize| value(&columns[at])));
            }
        };
        scan(&store, &schema, file, &mut take).await.unwrap();
    }
    all.sort_unstable();
    all
}

async fn to(table: &mut DeltaTable, kind: FieldType) -> Result<Retyped, RetypeError> {
    retype(table, &column("n"), kind, &mut Pace::new(1.0), &|_| {}).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fits_comes_in_what_does_not_goes_out_and_all_of_it_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = open_store(&directory);
    let mut table = DeltaTable::create(&store, &stream(), &[field("n", FieldType::Int64)]).await.unwrap();
    commit(&mut table, 1, ints([7, 8])).await;
    commit(&mut table, 2, texts(&["9", "fast"])).await;
    let before = table.snapshot();
    let was = rows(&before).await;
    let row = |cells: [&str; 4]| cells.map(str::to_owned);
    assert_eq!(
        was,
        [
            row(["1", "7", "good", "-"]),
            row(["1", "8", "good", "-"]),
            row(["2", "-", "type:n", "{\"n\":\"fast\"}"]),
            row(["2", "9", "good", "-"]),
        ]
    );
    let told = to(&mut table, FieldType::Text).await.unwrap();
    assert_eq!(told, Retyped::Done { files: 4, rows: 4, values_before: 3, values_after: 4 });
    let now = table.snapshot();
    assert_eq!((now.version, &now.txn), (before.version + 1, &before.txn));
    assert_eq!(rows(&now).await.iter().map(|row| row[1].as_str()).collect::<Vec<_>>(), ["7", "8", "9", "fast"]);
    assert!(rows(&now).await.iter().all(|row| row[2] == "good" && row[3] == "-"));
    // Readers that follow the log learn that the rows are others.
    let entry = now.log_store.read_commit_entry(now.version).await.unwrap().unwrap();
    let entry = String::from_utf8(entry.to_vec()).unwrap();
    assert_eq!((entry.matches("\"dataChange\":true").count(), entry.matches("\"metaData\"").count()), (8, 1));
    assert!(!entry.contains("\"txn\"") && entry.contains("CHANGE COLUMN"), "{entry}");
    // Opened by others it is the same, and the version of before is as it was.
    let opened = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap().snapshot();
    assert_eq!((opened.version, &opened.fields, &opened.schema), (now.version, &now.fields, &now.schema));
    assert_eq!((&opened.txn, opened.files.len()), (&now.txn, now.files.len()));
    assert_eq!(rows(&before).await, was);

    assert_eq!(to(&mut table, FieldType::Text).await.unwrap(), Retyped::Same);
    to(&mut table, FieldType::Bool).await.unwrap();
    assert!(rows(&table.snapshot()).await.iter().all(|row| row[1] == "-" && row[2] == "type:n"));
    let told = to(&mut table, FieldType::Int64).await.unwrap();
    assert_eq!(told, Retyped::Done { files: 4, rows: 4, values_before: 0, values_after: 3 });
    assert_eq!(rows(&table.snapshot()).await, was);
    let report = verify(&store, &stream(), &|_| {}, &|_| {}).await.unwrap();
    assert!(report.damage.is_empty(), "{:?}", report.damage);
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_and_merges_that_run_beside_it_lose_and_double_nothing() {
    const BATCHES: u64 = 60;
    let directory = tempfile::tempdir().unwrap();
    let fields = [field("n", FieldType::Int64)];
    let mut table = DeltaTable::create(&open_store(&directory), &stream(), &fields).await.unwrap();
    let batch = |seq: u64| ints((0..50).map(move |row| seq as i64 * 100 + row));
    commit(&mut table, 1, batch(1)).await;
    let mut second = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap();
    let commits = tokio::spawn(async move {
        for seq in 2..=BATCHES {
            commit(&mut second, seq, batch(seq)).await;
        }
    });
    let mut third = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap();
    let settings = CompactSettings { cpu_share: 1.0, min_files: 2, ..CompactSettings::default() };
    let merges = tokio::spawn(async move {
        let (compactor, mut merged) = (Compactor::new(&settings), 0);
        loop {
            let snapshot = third.reload().await.unwrap();
            match compactor.choose(&snapshot.files) {
                Some(inputs) => match compactor.merge(&mut third, inputs, &|_| {}).await.unwrap() {
                    Merged::Done { .. } => merged += 1,
                    Merged::Overtaken => {}
                },
                None if snapshot.txn[&spool()].seq.0 == BATCHES => return merged,
                None => tokio::task::yield_now().await,
            }
        }
    });
    let kinds = [FieldType::Text, FieldType::Float64, FieldType::Int64];
    let mut changed = 0;
    while !commits.is_finished() || changed < 3 {
        let told = to(&mut table, kinds[changed % 3]).await.unwrap();
        assert!(matches!(told, Retyped::Done { .. }), "{told:?}");
        changed += 1;
        // A batch is committed between two changes: a commit that changes without end overtake never lands.
        let committed = table.snapshot().txn[&spool()].seq;
        while table.reload().await.unwrap().txn[&spool()].seq == committed && !commits.is_finished() {
            tokio::task::yield_now().await;
        }
    }
    commits.await.unwrap();
    assert!(merges.await.unwrap() > 0);
    table.reload().await.unwrap();
    let told = to(&mut table, FieldType::Int64).await.unwrap();
    assert!(matches!(told, Retyped::Done { .. } | Retyped::Same), "{told:?}");
    let snapshot = table.snapshot();
    let mut numbers = Vec::new();
    let (store, schema) = (snapshot.log_store.object_store(None), row_schema(&snapshot.fields));
    for file in snapshot.files.iter() {
        let mut take = |rows: &RecordBatch| {
            numbers.extend_from_slice(rows.column_by_name("n").unwrap().as_primitive::<Int64Type>().values());
        };
        scan(&store, &schema, file, &mut take).await.unwrap();
    }
    numbers.sort_unstable();
    let expected = (1..=BATCHES as i64).flat_map(|seq| (0..50).map(move |row| seq * 100 + row));
    assert_eq!(numbers, expected.collect::<Vec<_>>());
    assert_eq!(snapshot.txn[&spool()].seq, Seq(BATCHES));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_change_one_column_both_end_with_a_whole_table() {
    let directory = tempfile::tempdir().unwrap();
    let fields = [field("n", FieldType::Int64)];
    let mut first = DeltaTable::create(&open_store(&directory), &stream(), &fields).await.unwrap();
    for seq in 1..=4 {
        commit(&mut first, seq, ints([1, 2, 3])).await;
    }
    let mut second = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap();
    let (one, two) = tokio::join!(to(&mut first, FieldType::Text), to(&mut second, FieldType::Float64));
    assert!(matches!((one.unwrap(), two.unwrap()), (Retyped::Done { .. }, Retyped::Done { .. })));
    let snapshot = first.reload().await.unwrap();
    assert_eq!((snapshot.version, rows(&snapshot).await.len()), (6, 12));
    let (one, two) = tokio::join!(to(&mut first, FieldType::Int64), async {
        second.reload().await.unwrap();
        to(&mut second, FieldType::Int64).await
    });
    let told = [one.unwrap(), two.unwrap()];
    assert_eq!(told.iter().filter(|told| matches!(told, Retyped::Same)).count(), 1, "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_keep_its_type_keeps_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = open_store(&directory);
    let fields = [field("n", FieldType::Int64), field("window_start", FieldType::Timestamp)];
    let mut table = DeltaTable::create(&store, &stream(), &fields).await.unwrap();
    let mut check = async |name: &str, kind: FieldType, expected: &str| {
        let error =
            retype(&mut table, &column(name), kind, &mut Pace::new(1.0), &|_| {}).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("speed", FieldType::Int64, "traffic has no field speed; its fields are: n, window_start").await;
    check("n", FieldType::Timestamp, "a field is float64, int64, bool or text, not timestamp").await;
    check("n", FieldType::Binary, "not binary").await;
    check("window_start", FieldType::Text, "window_start is timestamp").await;
    assert_eq!(table.reload().await.unwrap().version, 0);
    let own = "quarantine".parse().unwrap();
    let mut own = DeltaTable::create(&store, &own, wire::schema::own::quarantine().fields()).await.unwrap();
    let error = retype(&mut own, &column("detail"), FieldType::Int64, &mut Pace::new(1.0), &|_| {}).await.unwrap_err();
    assert!(matches!(error, RetypeError::Own(_)), "{error:?}");
    assert!([TS, DEVICE, QUALITY].iter().all(|name| name.parse::<FieldName>().is_err()), "they cannot even be named");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_beside_a_column_in_the_log_stays() {
    let directory = tempfile::tempdir().unwrap();
    let fields = [field("n", FieldType::Int64)];
    let mut table = DeltaTable::create(&open_store(&directory), &stream(), &fields).await.unwrap();
    commit(&mut table, 1, ints([1])).await;
    let path = directory.path().join("traffic/_delta_log/00000000000000000000.json");
    let entry = std::fs::read_to_string(&path).unwrap();
    let noted = entry.replace(
        r#"{\"name\":\"n\",\"type\":\"long\",\"nullable\":true,\"metadata\":{"#,
        r#"{\"name\":\"n\",\"type\":\"long\",\"nullable\":true,\"metadata\":{\"comment\":\"how many\","#,
    );
    assert_ne!(noted, entry, "{entry}");
    std::fs::write(&path, noted).unwrap();
    let mut table = DeltaTable::open(&open_store(&directory), &stream()).await.unwrap().unwrap();
    to(&mut table, FieldType::Text).await.unwrap();
    table.add_fields(&[field("m", FieldType::Bool)]).await.unwrap();
    for version in [2, 3] {
        let entry = table.snapshot().log_store.read_commit_entry(version).await.unwrap().unwrap();
        let entry = String::from_utf8(entry.to_vec()).unwrap();
        assert!(entry.contains(r#"\"comment\":\"how many\""#), "{entry}");
    }
}
