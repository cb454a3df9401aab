//! `weir verify`: reads every entry and checkpoint of a table's log and every row of its files, and names what is damaged.
//!
//! An entry is damaged when it is not understood, or missing between others; a checkpoint, too, when it says something else
//! than the entries before it. A file is damaged when it is not there, has
//! another size or CRC32C than the log says, cannot be decoded, has other columns than its table, other rows or bounds than the log
//! says, rows that are not in order of device and time, or rows of another date. Nothing is written.

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use chrono::DateTime;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use wire::schema::TS;
use wire::{DAY_US, DataFile, StreamName};

use crate::compact::scan;
use crate::delta::{DeltaTable, TableError, TableSnapshot, audit};
use crate::errors::chain;
use crate::rescue::row_schema;
use crate::store::Store;

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file or entry, relative to the table.
    pub what: String,
    pub detail: String,
}

/// What was read of a table.
#[derive(Debug, Default)]
pub struct Report {
    pub entries: usize,
    pub files: usize,
    pub rows: u64,
    pub bytes: u64,
    pub damage: Vec<Damage>,
}

/// Reads all of a table. `progress` is told the bytes of each file that is done, after it was told of all with `begin`.
///
/// # Errors
/// When the store does not answer.
pub async fn verify(
    store: &Store,
    stream: &StreamName,
    begin: &(dyn Fn(u64) + Send + Sync),
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Report, TableError> {
    let mut report = Report::default();
    let (entries, damage) = audit(stream, &store.log_store(stream)).await?;
    report.entries = entries;
    report
        .damage
        .extend(damage.into_iter().map(|found| Damage { what: found.object.to_string(), detail: found.detail }));
    let damaged = |detail: String| Damage { what: "_delta_log".to_owned(), detail };
    let table = match DeltaTable::open(store, stream).await {
        Ok(Some(table)) => table,
        Ok(None) => {
            report.damage.push(damaged("there is no table".to_owned()));
            return Ok(report);
        }
        Err(error @ (TableError::Entry { .. } | TableError::Log { .. } | TableError::Foreign { .. })) => {
            // Mostly what is named already is why.
            report
                .damage
                .push(damaged(format!("the table cannot be opened, its files are not read: {}", chain(&error))));
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    let snapshot = table.snapshot();
    begin(snapshot.files.bytes());
    for file in snapshot.files.iter() {
        if let Err(detail) = verify_file(&snapshot, file, &mut report.rows).await {
            report.damage.push(Damage { what: file.path.clone(), detail });
        }
        report.files += 1;
        report.bytes += file.bytes;
        progress(file.bytes);
    }
    Ok(report)
}

/// What is wrong with a file.
async fn verify_file(snapshot: &TableSnapshot, file: &DataFile, rows: &mut u64) -> Result<(), String> {
    let store = snapshot.log_store.object_store(None);
    let place = Path::from_url_path(&file.path).map_err(|error| error.to_string())?;
    let there = store.head(&place).await.map_err(|error| match error {
        object_store::Error::NotFound { .. } => "it is not there".to_owned(),
        other => chain(&other),
    })?;
    if there.size != file.bytes {
        return Err(format!("it has {} bytes, the log says {}", there.size, file.bytes));
    }
    let (mut count, mut wrong) = (0, None);
    let (first, last) = (file.earliest_us(), file.latest_us());
    let mut look = |batch: &arrow_array::RecordBatch| {
        count += batch.num_rows() as u64;
        let ts = batch.column_by_name(TS).expect("the table has it").as_primitive::<TimestampMicrosecondType>();
        let outside =
            ts.values().iter().find(|us| us.div_euclid(DAY_US) != i64::from(file.date) || **us < first || **us > last);
        if let Some(us) = outside {
            wrong.get_or_insert_with(|| {
                let time =
                    DateTime::from_timestamp_micros(*us).map_or_else(|| us.to_string(), |time| time.to_rfc3339());
                format!("a row of {time} is outside of the file's date, or of what the log says of it")
            });
        }
    };
    let schema = row_schema(&snapshot.fields);
    scan(&store, &schema, file, &mut look).await.map_err(|error| chain(&error))?;
    *rows += count;
    if let Some(expected) = file.rows.filter(|expected| *expected != count) {
        return Err(format!("it has {count} rows, the log says {expected}"));
    }
    wrong.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::tests::{place, rows, span, speed, stream};

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_damaged_is_named_and_nothing_else() {
        let place = place();
        let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
        for seq in 1..=3 {
            table.commit(&[rows(1, seq, &speed())], &[span(1, seq, seq)]).await.unwrap();
        }
        let files: Vec<DataFile> = table.snapshot().files.iter().map(|file| file.as_ref().clone()).collect();
        let check = async |expected: &[(&str, &str)]| {
            let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
            assert_eq!(report.damage.len(), expected.len(), "{:?}", report.damage);
            for (damage, (what, detail)) in report.damage.iter().zip(expected) {
                assert!(damage.what == *what && damage.detail.contains(detail), "{damage:?}: {what} {detail}");
            }
            report
        };
        let report = check(&[]).await;
        assert_eq!((report.entries, report.files, report.rows), (4, 9, 30));

        let at = |file: &DataFile| place.table().join(&file.path);
        std::fs::remove_file(at(&files[0])).unwrap();
        let whole = std::fs::read(at(&files[1])).unwrap();
        std::fs::write(at(&files[1]), &whole[..whole.len() - 1]).unwrap();
        let mut flipped = std::fs::read(at(&files[4])).unwrap();
        flipped[40..60].fill(0xff);
        std::fs::write(at(&files[4]), flipped).unwrap();
        // The file of another batch, of the same size or not: its rows are not those that the log says.
        std::fs::copy(at(&files[8]), at(&files[5])).unwrap();
        let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
        let named: Vec<&str> = report.damage.iter().map(|damage| damage.what.as_str()).collect();
        assert_eq!(named, [0, 1, 4, 5].map(|index: usize| files[index].path.as_str()), "{:?}", report.damage);
        assert!(report.damage[0].detail.contains("not there") && report.damage[1].detail.contains("bytes"));
    }

    /// Also where what was changed can still be read.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_bit_that_flipped_anywhere_in_a_file_is_found() {
        let place = place();
        let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
        let file = table.commit(&[rows(1, 1, &speed())], &[span(1, 1, 1)]).await.unwrap().files;
        let file = file.iter().next().unwrap().clone();
        crate::delta::checkpoint(&stream(), &table.snapshot()).await.unwrap();
        let at = place.table().join(&file.path);
        let good = std::fs::read(&at).unwrap();
        for byte in (0..good.len()).step_by(1 + good.len() / 100) {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            std::fs::write(&at, bad).unwrap();
            let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
            let found: Vec<&str> = report.damage.iter().map(|damage| damage.what.as_str()).collect();
            assert_eq!(found, [file.path.as_str()], "byte {byte} of {}", good.len());
            assert!(report.damage[0].detail.contains("CRC32C"), "{:?}", report.damage);
        }
    }

    /// Each object of the log is damaged in many ways, one at a time: it is named, or the table is what it was all the same.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_damaged_log_is_named_by_its_object() {
        let place = place();
        let mut table = DeltaTable::create(&place.store, &stream(), &speed()).await.unwrap();
        for seq in 1..=6 {
            table.commit(&[rows(1, seq, &speed())], &[span(1, seq, seq)]).await.unwrap();
            if seq == 3 {
                crate::delta::checkpoint(&stream(), &table.snapshot()).await.unwrap();
            }
        }
        let whole = table.snapshot();
        let log = place.table().join("_delta_log");
        let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
        assert_eq!((report.entries, report.damage.len()), (7, 0), "{:?}", report.damage);
        let mut found = 0;
        for name in
            ["00000000000000000002.json", "00000000000000000003.checkpoint.parquet", "00000000000000000005.json"]
        {
            let good = std::fs::read(log.join(name)).unwrap();
            for at in (0..good.len()).step_by(1 + good.len() / 150) {
                let mut bad = good.clone();
                bad[at] ^= 0x40;
                std::fs::write(log.join(name), bad).unwrap();
                let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
                if report.damage.is_empty() {
                    let opened = DeltaTable::open(&place.store, &stream()).await.unwrap().unwrap().snapshot();
                    assert_eq!((opened.version, &opened.txn), (whole.version, &whole.txn), "{name}: byte {at}");
                    let paths = |snapshot: &TableSnapshot| -> std::collections::BTreeSet<String> {
                        snapshot.files.iter().map(|file| file.path.clone()).collect()
                    };
                    assert_eq!(paths(&opened), paths(&whole), "{name}: byte {at}");
                    continue;
                }
                let named = |damage: &Damage| damage.what == format!("_delta_log/{name}");
                found += usize::from(report.damage.iter().any(named));
            }
            std::fs::write(log.join(name), good).unwrap();
        }
        assert!(found > 100, "{found}");
        // A whole checkpoint, of another version than its name says: whoever begins with it lacks what came since.
        let [of, named] = [3, 5].map(|version| format!("{version:020}.checkpoint.parquet"));
        std::fs::copy(log.join(of), log.join(&named)).unwrap();
        let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
        let told = &report.damage[0];
        assert!(told.what.ends_with(&named) && told.detail.contains("something else"), "{:?}", report.damage);
        std::fs::remove_file(log.join(named)).unwrap();
        std::fs::remove_file(log.join("00000000000000000005.json")).unwrap();
        let report = verify(&place.store, &stream(), &|_| {}, &|_| {}).await.unwrap();
        let missing = &report.damage[0];
        assert!(missing.what.ends_with("6.json") && missing.detail.contains("missing"), "{:?}", report.damage);
    }
}
