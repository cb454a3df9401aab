//! What a view says, append by append, for whoever follows it: [`serve::views`](crate::serve::views) and [`super::views`].
//!
//! One append to `<view>_changes` is a JSON object with the `view` and the `rows` of that append, which have the columns of
//! docs/views.md and none of Weir's own but those that tell the window. Its id is how far one has read with it:
//! `<spool>:<number>` of each spool that has written the view, joined by commas; a node has one as long as it keeps its
//! `data_dir`. Appends that only say how far a view has read are not told. There is no queue for anyone: who follows asks for
//! one page of appends at a time, in its own lane and within its limits.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use arrow::json::writer::{JsonArray, WriterBuilder};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use wire::ids::OWN_EDGE;
use wire::schema::{EDGE, SEQ, SPOOL};
use wire::{Seq, SpoolId, StreamName};

use crate::caller::Caller;
use crate::engine::{Engine, QueryError};
use crate::follow::Position;
use crate::fused_table::Frozen;
use crate::views::{EMPTY, POSITION, WINDOW};

/// Appends that are asked for at a time; one, when that is too much.
const PAGE: u64 = 16;
/// Shortest time between two looks.
const PAUSE: Duration = Duration::from_millis(20);
/// After it could not be asked.
const RETRY: Duration = Duration::from_secs(1);
/// Spools that may have written a view; more are of no node's making.
const SPOOLS_MAX: usize = 64;

/// The last append that was read, of each spool.
pub(crate) type Read = BTreeMap<SpoolId, Seq>;

/// The last append of each spool that statements see now.
pub(crate) async fn newest(engine: &Engine, changes: &StreamName) -> Result<Read, QueryError> {
    if engine.tables().cold(changes).is_none() {
        return Ok(Read::new());
    }
    let frozen = Frozen::take(engine.tables().as_ref(), changes).await.map_err(|error| engine.explain(error))?;
    Ok(Position::of(&frozen).into_seqs())
}

/// Reads the id of an event.
pub(crate) fn read_id(text: &str) -> Option<Read> {
    let marks = text.split(',').take(SPOOLS_MAX + 1).map(|mark| {
        let (spool, seq) = mark.split_once(':')?;
        Some((spool.parse().ok()?, Seq(seq.parse().ok()?)))
    });
    marks.collect::<Option<Read>>().filter(|read| read.len() <= SPOOLS_MAX)
}

pub(crate) fn id(read: &Read) -> String {
    let marks: Vec<String> = read.iter().map(|(spool, seq)| format!("{spool}:{}", seq.0)).collect();
    marks.join(",")
}

/// One append as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Append {
    /// How far one has read with it.
    pub(crate) id: String,
    /// A JSON object with the `view` and the `rows`.
    pub(crate) data: String,
}

/// Whoever goes over the appends of a view, one after the other.
#[derive(Debug)]
pub(crate) struct Follower {
    engine: Arc<Engine>,
    caller: Caller,
    view: String,
    changes: StreamName,
    read: Read,
    page: VecDeque<Append>,
    /// Asked for at a time.
    appends: u64,
    token: CancellationToken,
}

impl Follower {
    /// From behind `read` on; it ends with the token. `changes` is the stream of the view's results.
    pub(crate) fn new(
        (engine, caller): (Arc<Engine>, Caller),
        (view, changes): (String, StreamName),
        read: Read,
        token: CancellationToken,
    ) -> Self {
        Self { engine, caller, view, changes, read, page: VecDeque::new(), appends: PAGE, token }
    }

    /// The next append; none when the view is dropped, or the node stops.
    pub(crate) async fn next(&mut self) -> Option<Append> {
        let mut changed = self.engine.tables().changed();
        loop {
            if let Some(told) = self.page.pop_front() {
                return Some(told);
            }
            // Marked as seen first: what comes while it is asked is seen then, or wakes.
            changed.mark_unchanged();
            let moves = self.engine.tables().moves(&self.changes);
            let token = self.token.clone();
            let turned = tokio::select! {
                () = token.cancelled() => return None,
                turned = self.turn() => turned,
            };
            let wait = match turned {
                Ok(true) => continue,
                Ok(false) if !self.engine.views().has(&self.view) => return None,
                Ok(false) => Duration::MAX,
                Err(error) if error.is_too_much() && self.appends > 1 => {
                    self.appends = 1;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(view = self.view, %error, "a subscriber does not get on yet");
                    RETRY
                }
            };
            let until = tokio::time::sleep(wait);
            tokio::pin!(until);
            loop {
                tokio::select! {
                    () = self.token.cancelled() => return None,
                    gone = changed.changed() => gone.ok()?,
                    () = &mut until => break,
                }
                tokio::time::sleep(PAUSE).await;
                // Of other tables there is nothing to ask, but whether the view is still there.
                if self.engine.tables().moves(&self.changes) != moves || !self.engine.views().has(&self.view) {
                    break;
                }
            }
        }
    }

    /// Asks for the next appends of a spool; whether there was something to ask for.
    async fn turn(&mut self) -> Result<bool, QueryError> {
        let newest = newest(&self.engine, &self.changes).await?;
        let behind = newest.into_iter().find_map(|(spool, newest)| {
            let read = self.read.get(&spool).copied().unwrap_or_default();
            (read < newest).then(|| (spool, read, Seq(newest.0.min(read.0 + self.appends))))
        });
        let Some((spool, read, to)) = behind else { return Ok(false) };
        let statement = format!(
            "SELECT * FROM \"{}\" WHERE {EDGE} = '{OWN_EDGE}' AND {SPOOL} = '{spool}' AND {SEQ} > {} AND {SEQ} <= {} \
             AND ({EMPTY} IS NOT TRUE OR {WINDOW} IS NOT NULL) ORDER BY {SEQ}",
            self.changes, read.0, to.0,
        );
        let rows = self.engine.rows_as(&self.caller, &statement, usize::MAX).await?;
        for (seq, rows) in by_append(&rows) {
            self.read.insert(spool, Seq(seq));
            let data = format!("{{\"view\":{},\"rows\":{}}}", json!(self.view), as_json(&rows)?);
            self.page.push_back(Append { id: id(&self.read), data });
        }
        self.read.insert(spool, to);
        Ok(true)
    }
}

/// Rows that are ordered by their number, append by append.
fn by_append(rows: &[RecordBatch]) -> Vec<(u64, Vec<RecordBatch>)> {
    let mut appends: Vec<(u64, Vec<RecordBatch>)> = Vec::new();
    for batch in rows {
        let Some(seqs) = batch.column_by_name(SEQ).and_then(|seqs| seqs.as_primitive_opt::<Int64Type>()) else {
            continue;
        };
        let mut from = 0;
        for run in seqs.values().chunk_by(|a, b| a == b) {
            let part = batch.slice(from, run.len());
            from += run.len();
            let seq = run[0].cast_unsigned();
            match appends.last_mut() {
                Some((last, parts)) if *last == seq => parts.push(part),
                _ => appends.push((seq, vec![part])),
            }
        }
    }
    appends
}

/// An array of objects, without the columns that are Weir's own business.
fn as_json(rows: &[RecordBatch]) -> Result<String, QueryError> {
    let unwritable = |error| QueryError::Failed { message: format!("write the rows: {error}") };
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(Vec::new());
    for batch in rows {
        let schema = batch.schema();
        let names = schema.fields().iter().enumerate();
        let shown = names.filter(|(_, field)| !field.name().starts_with('_') && field.name() != POSITION);
        let shown: Vec<usize> = shown.map(|(index, _)| index).collect();
        writer.write(&batch.project(&shown).map_err(unwritable)?).map_err(unwritable)?;
    }
    writer.finish().map_err(unwritable)?;
    String::from_utf8(writer.into_inner()).map_err(|error| QueryError::Failed { message: error.to_string() })
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int64Array, StringArray};

    use super::*;

    #[test]
    fn an_id_says_how_far_one_has_read() {
        let (a, b) = (SpoolId([1; 16]), SpoolId([2; 16]));
        let read = Read::from([(a, Seq(7)), (b, Seq(1))]);
        assert_eq!(read_id(&id(&read)), Some(read));
        for wrong in ["", "7", "x:7", &format!("{a}:"), &format!("{a}:-1"), &format!("{a}:1,"), &"é".repeat(100)] {
            assert_eq!(read_id(wrong), None, "{wrong}");
        }
        let many: Vec<String> = (0..100).map(|n| format!("{}:1", SpoolId([n; 16]))).collect();
        assert_eq!(read_id(&many.join(",")), None);
    }

    #[test]
    fn an_append_is_told_whole_and_without_what_is_weirs_own() {
        let batch = |seqs: Vec<i64>| {
            let n = Arc::new(Int64Array::from_iter_values(seqs.iter().map(|seq| seq * 10))) as ArrayRef;
            let position = Arc::new(StringArray::from_iter_values(seqs.iter().map(|_| "{}"))) as ArrayRef;
            let seqs = Arc::new(Int64Array::from(seqs)) as ArrayRef;
            RecordBatch::try_from_iter([("n", n), (POSITION, position), (SEQ, seqs)]).unwrap()
        };
        let appends = by_append(&[batch(vec![1, 1, 2]), batch(vec![2]), batch(Vec::new()), batch(vec![5])]);
        let told = appends.iter().map(|(seq, rows)| (*seq, as_json(rows).unwrap())).collect::<Vec<_>>();
        let expected = [(1, r#"[{"n":10},{"n":10}]"#), (2, r#"[{"n":20},{"n":20}]"#), (5, r#"[{"n":50}]"#)];
        assert_eq!(told, expected.map(|(seq, text)| (seq, text.to_owned())));
    }
}
