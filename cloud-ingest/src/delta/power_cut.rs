//! Power cuts and killed processes at random points of a table's life, on the simulated disk: what a commit or an
//! opened table has shown as committed is there ever after, with all of its rows; a number is never there twice.
//! `POWER_CUT_SEED=17` tries only one seed.

use std::path::Path;

use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use segment_log::sim::{Random, SimLayer};
use segment_log::{FileLayer, LayerFile};

use super::tests::{rows, span, speed, spool, stream};
use super::*;
use crate::store::tests::{sim_machine, sim_store};

const SEEDS: u64 = 500;
const CYCLES: u64 = 4;
const COMMITS: u64 = 4;

/// Rows of a table's files, read from the simulated disk; none when the power goes meanwhile.
pub(crate) fn rows_on_disk(layer: &SimLayer, stream: &StreamName, snapshot: &TableSnapshot) -> Option<u64> {
    let mut rows = 0;
    for file in snapshot.files.iter() {
        let path = Path::new("/tables").join(stream.as_str()).join(&file.path);
        let read = || {
            let file = layer.open(&path)?;
            let mut bytes = vec![0; file.size()? as usize];
            file.read_at(&mut bytes, 0)?;
            Ok::<_, std::io::Error>(bytes::Bytes::from(bytes))
        };
        let bytes = match read() {
            Err(_) if !layer.powered() => return None,
            bytes => bytes.unwrap(),
        };
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
        rows += reader.map(|batch| batch.unwrap().num_rows() as u64).sum::<u64>();
    }
    Some(rows)
}

/// One life of a process: opens the table, checks it, makes `commits` commits or until something fails. What it saw committed.
async fn life(layer: &SimLayer, committed: u64, commits: u64, random: &mut Random) -> Result<u64, (u64, String)> {
    let failed = |seen: u64| move |error: &dyn std::fmt::Debug| (seen, format!("{error:?}"));
    let store = sim_store(layer).map_err(|error| failed(committed)(&error))?;
    let table = DeltaTable::create(&store, &stream(), &speed()).await;
    let mut table = table.map_err(|error| failed(committed)(&error))?;
    let mut seen = table.snapshot().txn.get(&spool(1)).map_or(0, |mark| mark.seq.0);
    assert!(seen >= committed, "{committed} was committed, {seen} is there");
    if let Some(on_disk) = rows_on_disk(layer, &stream(), &table.snapshot()) {
        assert_eq!(on_disk, 10 * seen);
    }
    for _ in 0..commits {
        let last = seen + 1 + random.below(2);
        let batches: Vec<RecordBatch> = (seen + 1..=last).map(|seq| rows(1, seq, &speed())).collect();
        let snapshot = table.commit(&batches, &[span(1, seen + 1, last)]).await;
        seen = snapshot.map_err(|error| failed(seen)(&error))?.txn[&spool(1)].seq.0;
    }
    Ok(seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_survives_power_cuts() {
    let seeds = match std::env::var("POWER_CUT_SEED") {
        Ok(seed) => seed.parse().map(|seed| seed..=seed).unwrap(),
        Err(_) => 1..=SEEDS,
    };
    let mut commits = 0;
    for seed in seeds {
        println!("POWER_CUT_SEED={seed}");
        let mut random = Random::new(seed);
        let layer = sim_machine();
        let mut committed = 0;
        for _ in 0..CYCLES {
            // A sync that fails ends the process, as a kill in the middle of a commit would: the next one sees names
            // that are not durable yet.
            let killed = random.one_in(2);
            if killed {
                layer.fail_sync_after(random.below(40));
            } else {
                layer.fail_after(random.below(110));
            }
            committed = match life(&layer, committed, COMMITS, &mut random).await {
                Ok(seen) => seen,
                Err((seen, _)) => seen,
            };
            if killed {
                layer.fail_sync_after(u64::MAX);
                committed = match life(&layer, committed, 0, &mut random).await {
                    Ok(seen) => seen,
                    Err((seen, _)) => seen,
                };
            }
            layer.power_cut(&mut random);
        }
        layer.power_cut(&mut random);
        layer.fail_after(u64::MAX);
        commits += life(&layer, committed, COMMITS, &mut random).await.unwrap();
    }
    assert!(commits > 0);
}
