//! A stream read on from where one stood: each row once, whether it is hot or in a file by then.
//!
//! A [`Position`] is the last batch of each spool that was read. Batches of a spool are shown in the order of their numbers,
//! and committed in it (rule 3), so a row is behind a position if and only if its `_seq` is above that of its `_spool`;
//! commits and compactions change nothing about that.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{BooleanArray, RecordBatch};
use arrow_schema::{Schema, SchemaRef};
use arrow_select::filter::filter_record_batch;
use datafusion::common::{DataFusionError, Result};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::physical_plan::execute_stream;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use wire::hot::{HotAnswer, HotRun};
use wire::schema::{SEQ, SPOOL, TS};
use wire::{DataFile, DataFiles, Seq, SpoolId, StreamName};

use crate::catalog::ColdTable;
use crate::cold;
use crate::engine::Engine;
use crate::fused_table::{Frozen, hot_columns};

/// Files that were written so long before the newest that a position knew are older than it: what clocks may be wrong by.
const CLOCK_MS: i64 = 24 * 3_600 * 1_000;

/// Up to where a stream was read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    spools: BTreeMap<SpoolId, Seq>,
    /// The table's version then.
    version: u64,
    /// When the newest of the files was written that were known then, ms since 1970; 0 when there was none.
    files_ms: i64,
}

impl Position {
    /// Everything that a frozen state shows: [`Frozen::position`].
    pub(crate) fn of(frozen: &Frozen) -> Self {
        let cold = frozen.cold();
        let files_ms = cold.files.iter().map(|file| file.modified_ms).max().unwrap_or(0);
        let mut spools: BTreeMap<_, _> = cold.txn.iter().map(|(spool, mark)| (*spool, mark.seq)).collect();
        for run in frozen.runs().iter().flatten() {
            let seq = spools.entry(run.spool).or_default();
            *seq = run.seq.max(*seq);
        }
        Self { spools, version: cold.version, files_ms }
    }

    /// The last batch of each spool.
    pub(crate) fn into_seqs(self) -> BTreeMap<SpoolId, Seq> {
        self.spools
    }

    /// This batch was read, and all of its spool before it.
    pub(crate) fn cover(&mut self, spool: SpoolId, seq: Seq) {
        let read = self.spools.entry(spool).or_default();
        *read = seq.max(*read);
    }

    /// Whether this batch was read.
    pub(crate) fn covers(&self, spool: SpoolId, seq: Seq) -> bool {
        self.spools.get(&spool).is_some_and(|read| seq <= *read)
    }

    /// Whether a file may have rows that were not read.
    fn may_lack(&self, file: &DataFile) -> bool {
        file.modified_ms >= self.files_ms.saturating_sub(CLOCK_MS)
    }

    /// Whether all that is in files was read.
    fn covers_files(&self, cold: &ColdTable) -> bool {
        cold.txn.iter().all(|(spool, mark)| self.covers(*spool, mark.seq))
    }
}

/// Rows of one batch that are behind a position.
#[derive(Debug, Clone)]
pub(crate) struct Unread {
    pub(crate) spool: SpoolId,
    pub(crate) seq: Seq,
    pub(crate) rows: RecordBatch,
}

/// The rows of a frozen state of a stream that are behind a position, in these columns, in batches as they come. Files are
/// read only when they have what was not read, and the node's hot rows have it no longer.
///
/// # Errors
/// When a file cannot be read, then or while the rows are taken.
pub(crate) async fn behind(
    engine: &Engine,
    stream: &StreamName,
    frozen: &Frozen,
    position: &Position,
    wanted: &SchemaRef,
) -> Result<SendableRecordBatchStream> {
    let given = |unread: Vec<Unread>| stream::iter(unread.into_iter().map(|unread| Ok(unread.rows)));
    if let Some(unread) = in_memory(engine, stream, frozen, position, wanted).await? {
        return Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(wanted), given(unread))));
    }
    let hot = hot_behind(frozen, position, wanted)?;
    let cold = in_files(engine, frozen.cold(), position, wanted)?;
    Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(wanted), cold.chain(given(hot)))))
}

/// As [`behind`], batch by batch, of what the node has in memory; None when some of it is in files alone.
///
/// # Errors
/// When hot rows cannot be asked for.
pub(crate) async fn in_memory(
    engine: &Engine,
    stream: &StreamName,
    frozen: &Frozen,
    position: &Position,
    wanted: &SchemaRef,
) -> Result<Option<Vec<Unread>>> {
    if position.covers_files(frozen.cold()) {
        return hot_behind(frozen, position, wanted).map(Some);
    }
    // What was hot then and was committed since is still told for a while; what came after the frozen state, too.
    let shown = frozen.position();
    let hot = engine.tables().hot().hot(stream, position.version).await;
    let HotAnswer::Rows(hot) = hot.map_err(|error| DataFusionError::External(Box::new(error)))? else {
        return Ok(None);
    };
    let mut unread = Vec::new();
    for hot in &hot {
        let of_both = |run: &HotRun| !position.covers(run.spool, run.seq) && shown.covers(run.spool, run.seq);
        parts(&hot.rows, &hot.runs, of_both, wanted, &mut unread)?;
    }
    Ok(Some(unread))
}

/// Event times between which the rows lie that are behind a position, the last included, in no order; files that may have
/// such rows count with all of theirs.
pub(crate) fn times_behind(frozen: &Frozen, position: &Position) -> Vec<(i64, i64)> {
    let cold = frozen.cold();
    let files = cold.files.iter().filter(|file| !position.covers_files(cold) && position.may_lack(file));
    let mut times: Vec<_> = files.map(|file| (file.earliest_us(), file.latest_us())).collect();
    for (rows, runs) in frozen.hot().iter().zip(frozen.runs()) {
        let ts = rows.column_by_name(TS).and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>());
        let Some(ts) = ts else { continue };
        for run in runs.iter().filter(|run| run.rows > 0 && !position.covers(run.spool, run.seq)) {
            let ts = ts.slice(run.start, run.rows);
            times.extend(arrow::compute::min(&ts).zip(arrow::compute::max(&ts)));
        }
    }
    times
}

fn hot_behind(frozen: &Frozen, position: &Position, wanted: &SchemaRef) -> Result<Vec<Unread>> {
    let mut unread = Vec::new();
    for (hot, runs) in frozen.hot().iter().zip(frozen.runs()) {
        parts(hot, runs, |run| !position.covers(run.spool, run.seq), wanted, &mut unread)?;
    }
    Ok(unread)
}

/// Adds the rows of the batches that are chosen.
fn parts(
    rows: &RecordBatch,
    runs: &[HotRun],
    chosen: impl Fn(&HotRun) -> bool,
    wanted: &SchemaRef,
    unread: &mut Vec<Unread>,
) -> Result<()> {
    for run in runs.iter().filter(|run| run.rows > 0 && chosen(run)) {
        let rows = hot_columns(&rows.slice(run.start, run.rows), wanted)?;
        unread.push(Unread { spool: run.spool, seq: run.seq, rows });
    }
    Ok(())
}

fn in_files(
    engine: &Engine,
    cold: &ColdTable,
    position: &Position,
    wanted: &SchemaRef,
) -> Result<SendableRecordBatchStream> {
    let newer = cold.files.iter().filter(|file| position.may_lack(file)).cloned();
    let cold = ColdTable { files: DataFiles::default().with(newer, &[]), ..cold.clone() };
    let lacking = [SPOOL, SEQ].into_iter().filter(|name| wanted.index_of(name).is_err());
    let lacking = lacking.map(|name| cold.schema.field_with_name(name).cloned().map(Arc::new));
    let fields = wanted.fields().iter().cloned().map(Ok).chain(lacking).collect::<Result<Vec<_>, _>>()?;
    let read: SchemaRef = Arc::new(Schema::new(fields));
    let (state, schema) = (engine.session().state(), Arc::clone(wanted));
    let Some(plan) = cold::scan(&cold, &state, &cold.schema, &read, &[], None)? else {
        return Ok(Box::pin(RecordBatchStreamAdapter::new(schema, stream::empty())));
    };
    let rows = execute_stream(plan, engine.session().task_ctx())?;
    let (position, columns) = (position.clone(), (0..wanted.fields().len()).collect::<Vec<_>>());
    let rows = rows.map(move |rows| {
        let rows = rows?;
        let kept = filter_record_batch(&rows, &unread(&rows, &position)?)?;
        Ok(kept.project(&columns)?)
    });
    let some = rows.filter(|rows| futures::future::ready(rows.as_ref().map_or(true, |rows| rows.num_rows() > 0)));
    Ok(Box::pin(RecordBatchStreamAdapter::new(schema, some)))
}

/// The newest event time that was read up to a position, or somewhat more: files count with all of theirs. The least number
/// when nothing was.
pub(crate) fn newest_read(frozen: &Frozen, position: &Position) -> i64 {
    if *position == Position::default() {
        return i64::MIN;
    }
    let mut newest = frozen.cold().files.iter().map(|file| file.latest_us()).max().unwrap_or(i64::MIN);
    for (rows, runs) in frozen.hot().iter().zip(frozen.runs()) {
        let ts = rows.column_by_name(TS).and_then(|ts| ts.as_primitive_opt::<TimestampMicrosecondType>());
        let Some(ts) = ts else { continue };
        for run in runs.iter().filter(|run| position.covers(run.spool, run.seq)) {
            newest = arrow::compute::max(&ts.slice(run.start, run.rows)).unwrap_or(newest).max(newest);
        }
    }
    newest
}

/// Which rows are not behind the position: those that were read by then.
///
/// # Errors
/// When they are without provenance.
pub(crate) fn read_by(rows: &RecordBatch, position: &Position) -> Result<BooleanArray> {
    Ok(arrow::compute::not(&unread(rows, position)?)?)
}

/// Which rows are behind the position.
fn unread(rows: &RecordBatch, position: &Position) -> Result<BooleanArray> {
    let missing = || DataFusionError::Internal("a table without provenance".to_owned());
    let spools = rows.column_by_name(SPOOL).and_then(|column| column.as_string_opt::<i32>()).ok_or_else(missing)?;
    let seqs =
        rows.column_by_name(SEQ).and_then(|column| column.as_primitive_opt::<Int64Type>()).ok_or_else(missing)?;
    // Rows of one spool follow each other.
    let mut last: Option<(&str, Option<Seq>)> = None;
    let unread = spools.iter().zip(seqs).map(|(spool, seq)| {
        let (Some(spool), Some(seq)) = (spool, seq) else { return Some(true) };
        let read = match last {
            Some((known, read)) if known == spool => read,
            _ => spool.parse::<SpoolId>().ok().and_then(|spool| position.spools.get(&spool).copied()),
        };
        last = Some((spool, read));
        Some(read.is_none_or(|read| u64::try_from(seq).is_ok_and(|seq| seq > read.0)))
    });
    Ok(unread.collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use arrow_array::Int64Array;
    use futures::TryStreamExt;

    use super::*;
    use crate::engine::tests::{Traffic, engine};

    /// The numbers of the rows behind a position.
    async fn numbers(engine: &Engine, frozen: &Frozen, position: &Position) -> Vec<i64> {
        let schema = &frozen.cold().schema;
        let wanted = Arc::new(schema.project(&[schema.index_of("vehicle_count").unwrap()]).unwrap());
        let stream = "traffic".parse().unwrap();
        let rows = behind(engine, &stream, frozen, position, &wanted).await.unwrap();
        let rows = rows.try_collect::<Vec<RecordBatch>>().await.unwrap();
        assert!(rows.iter().all(|rows| rows.schema() == wanted));
        let all = rows.iter().flat_map(|rows| rows.column(0).as_primitive::<Int64Type>().values().to_vec());
        let mut all = all.collect::<Vec<_>>();
        all.sort_unstable();
        all
    }

    async fn frozen(engine: &Engine) -> Frozen {
        Frozen::take(engine.tables().as_ref(), &"traffic".parse().unwrap()).await.unwrap()
    }

    async fn follow(steps: &[usize]) -> usize {
        let (engine, traffic) = engine(0, 0, Duration::from_secs(60)).await;
        let traffic: Arc<Traffic> = traffic;
        let (mut position, mut read) = (Position::default(), 0);
        for step in steps {
            traffic.arrive(*step);
            let state = frozen(&engine).await;
            let new = numbers(&engine, &state, &position).await;
            let expected = (read..read + new.len() as i64).collect::<Vec<_>>();
            assert_eq!(new, expected, "after {read}");
            // What came since the state was frozen is behind it.
            traffic.arrive(1);
            assert_eq!(numbers(&engine, &state, &position).await, expected);
            read += new.len() as i64;
            position = Position::of(&state);
            let read_again: Position = serde_json::from_str(&serde_json::to_string(&position).unwrap()).unwrap();
            assert_eq!(read_again, position);
        }
        read as usize
    }

    #[tokio::test]
    async fn each_row_comes_once_whether_it_is_committed_or_not() {
        // One commit behind, the hot half still knows; more, and the files are read.
        for steps in [&[0, 2, 2, 2, 2, 2, 1][..], &[3, 0, 0, 9, 1, 1], &[1, 18, 0], &[19, 0, 0]] {
            let read = follow(steps).await;
            assert!(read >= 170, "{read}");
        }
    }

    #[test]
    fn a_row_without_provenance_is_new() {
        let spools = arrow_array::StringArray::from(vec![Some("00000000000000000000000000000001"), None]);
        let rows = RecordBatch::try_from_iter([
            (SPOOL, Arc::new(spools) as arrow_array::ArrayRef),
            (SEQ, Arc::new(Int64Array::from(vec![1, 1]))),
        ]);
        let mut position = Position::default();
        let mut id = [0; 16];
        id[15] = 1;
        position.spools.insert(SpoolId(id), Seq(1));
        let new = unread(&rows.unwrap(), &position).unwrap();
        assert_eq!(new.iter().map(Option::unwrap).collect::<Vec<_>>(), [false, true]);
    }
}
