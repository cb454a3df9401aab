//! What stands in the tables that are filled when they are asked: their columns in order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::{ArrayRef, Date32Array, Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};
use datafusion::common::Result;
use wire::DataFile;
use wire::schema::FieldType;

use crate::catalog::{ClassFacts, SpoolFacts};
use crate::clock::{now_us, us};
use crate::fused_table::{Frozen, View};
use crate::links::LinkStatus;
use crate::remark::ColumnNote;
use crate::views::{Doing, Progress};

fn texts<T: Into<Option<String>>>(values: impl IntoIterator<Item = T>) -> ArrayRef {
    Arc::new(values.into_iter().map(Into::into).collect::<StringArray>())
}

fn integers<T: Into<Option<i64>>>(values: impl IntoIterator<Item = T>) -> ArrayRef {
    Arc::new(values.into_iter().map(Into::into).collect::<Int64Array>())
}

fn times<T: Into<Option<i64>>>(values: impl IntoIterator<Item = T>) -> ArrayRef {
    let values: TimestampMicrosecondArray = values.into_iter().map(Into::into).collect();
    Arc::new(values.with_timezone("UTC"))
}

fn count<T: TryInto<i64>>(value: T) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

pub(super) async fn streams(view: View<'_>) -> Result<Vec<ArrayRef>> {
    struct Row {
        name: String,
        description: Option<String>,
        columns: i64,
        /// Rows, bytes, files, hot rows, first and last event time, version; none of it for a caller with a scope.
        numbers: Option<[Option<i64>; 7]>,
    }
    let mut rows = Vec::new();
    for stream in view.tables.streams() {
        let Some(cold) = view.tables.cold(&stream) else { continue };
        let description = cold.description.clone();
        let mut row =
            Row { name: stream.to_string(), description, columns: count(cold.schema.fields().len()), numbers: None };
        if view.caller.scope().is_none() {
            let frozen = Frozen::take(view.tables, &stream).await?;
            let (cold, hot) = (frozen.cold(), frozen.hot());
            let (first, last) = frozen.span().unzip();
            let hot_rows = count(hot.iter().map(|rows| rows.num_rows()).sum::<usize>());
            let files = &cold.files;
            let numbers = [count(files.rows()), count(files.bytes()), count(files.len()), hot_rows].map(Some);
            let [stored, bytes, files, hot_rows] = numbers;
            row.numbers = Some([stored, bytes, files, hot_rows, first, last, Some(count(cold.version))]);
        }
        rows.push(row);
    }
    let number = |index: usize| rows.iter().map(move |row: &Row| row.numbers.and_then(|numbers| numbers[index]));
    Ok(vec![
        texts(rows.iter().map(|row| row.name.clone())),
        texts(rows.iter().map(|row| row.description.clone())),
        integers(rows.iter().map(|row| row.columns)),
        integers(number(0)),
        integers(number(1)),
        integers(number(2)),
        integers(number(3)),
        times(number(4)),
        times(number(5)),
        integers(number(6)),
    ])
}

/// Names, types and what is said of them are for everybody who may ask.
pub(super) fn columns(view: View<'_>) -> Vec<ArrayRef> {
    struct Row {
        stream: String,
        name: String,
        position: usize,
        kind: String,
        note: ColumnNote,
    }
    let mut rows = Vec::new();
    for stream in view.tables.streams() {
        let Some(cold) = view.tables.cold(&stream) else { continue };
        let mut notes = view.tables.notes(&stream);
        for (index, field) in cold.schema.fields().iter().enumerate() {
            // `_date` alone has a type that no field can have.
            let kind =
                FieldType::from_arrow(field.data_type()).map_or_else(|| "date".to_owned(), |kind| kind.to_string());
            let (stream, name, position) = (stream.to_string(), field.name().clone(), index + 1);
            let note = notes.remove(&name).unwrap_or_default();
            rows.push(Row { stream, name, position, kind, note });
        }
    }
    vec![
        texts(rows.iter().map(|row| row.stream.clone())),
        texts(rows.iter().map(|row| row.name.clone())),
        integers(rows.iter().map(|row| count(row.position))),
        texts(rows.iter().map(|row| row.kind.clone())),
        texts(rows.iter().map(|row| row.note.unit().map(str::to_owned))),
        texts(rows.iter().map(|row| row.note.description.clone())),
        times(rows.iter().map(|row| row.note.since_us)),
    ]
}

pub(super) fn files(view: View<'_>) -> Result<Vec<ArrayRef>> {
    struct Row {
        stream: String,
        file: Arc<DataFile>,
    }
    let mut rows = Vec::new();
    // A file has rows of every edge: its numbers are nobody's alone.
    let streams = if view.caller.scope().is_none() { view.tables.streams() } else { Vec::new() };
    for stream in streams {
        let Some(cold) = view.tables.cold(&stream) else { continue };
        rows.extend(cold.files.iter().map(|file| Row { stream: stream.to_string(), file: Arc::clone(file) }));
    }
    let files = || rows.iter().map(|row| &row.file);
    Ok(vec![
        texts(rows.iter().map(|row| row.stream.clone())),
        texts(files().map(|file| file.path.clone())),
        Arc::new(Date32Array::from_iter_values(files().map(|file| file.date))),
        integers(files().map(|file| file.rows.map(count))),
        integers(files().map(|file| count(file.bytes))),
        times(files().map(|file| file.modified_ms.saturating_mul(1_000))),
        times(files().map(|file| file.ts.map(|(first, _)| first))),
        times(files().map(|file| file.ts.map(|(_, last)| last))),
    ])
}

/// What the caller may be told of spools.
fn spools(view: View<'_>) -> Vec<SpoolFacts> {
    let mut spools = view.tables.spools();
    if let Some(scope) = view.caller.scope() {
        spools.retain(|spool| scope.admits_edge(spool.edge.as_str()));
    }
    spools
}

pub(super) fn edges(view: View<'_>) -> Vec<ArrayRef> {
    let mut edges: BTreeMap<String, Vec<SpoolFacts>> = BTreeMap::new();
    for spool in spools(view) {
        edges.entry(spool.edge.to_string()).or_default().push(spool);
    }
    let distinct = |spools: &[SpoolFacts], of: fn(&SpoolFacts) -> String| {
        count(spools.iter().map(of).collect::<BTreeSet<_>>().len())
    };
    let last = |spools: &[SpoolFacts]| spools.iter().max_by_key(|spool| spool.received_at_us).cloned();
    let lasts: Vec<Option<SpoolFacts>> = edges.values().map(|spools| last(spools)).collect();
    vec![
        texts(edges.keys().cloned()),
        integers(edges.values().map(|spools| distinct(spools, |spool| spool.stream.to_string()))),
        integers(edges.values().map(|spools| distinct(spools, |spool| spool.spool.to_string()))),
        integers(edges.values().map(|spools| count(spools.iter().map(|spool| spool.rows).sum::<u64>()))),
        integers(edges.values().map(|spools| count(spools.iter().map(|spool| spool.batches).sum::<u64>()))),
        times(lasts.iter().map(|last| last.as_ref().map(|spool| spool.received_at_us))),
        texts(lasts.iter().map(|last| last.as_ref().map(|spool| spool.agent.clone()))),
        integers(lasts.iter().map(|last| last.as_ref().map(|spool| spool.configuration.cast_signed()))),
    ]
}

pub(super) fn ingest(view: View<'_>) -> Vec<ArrayRef> {
    let spools = spools(view);
    let now = now_us();
    let lag = spools.iter().map(|spool| Some((now - spool.max_ts?) as f64 / 1e6));
    vec![
        texts(spools.iter().map(|spool| spool.edge.to_string())),
        texts(spools.iter().map(|spool| spool.stream.to_string())),
        texts(spools.iter().map(|spool| spool.spool.to_string())),
        integers(spools.iter().map(|spool| count(spool.rows))),
        integers(spools.iter().map(|spool| count(spool.batches))),
        times(spools.iter().map(|spool| spool.received_at_us)),
        times(spools.iter().map(|spool| spool.max_ts)),
        Arc::new(lag.collect::<Float64Array>()),
        integers(spools.iter().map(|spool| count(spool.durable.0))),
        integers(spools.iter().map(|spool| count(spool.committed.0))),
        texts(spools.iter().map(|spool| spool.agent.clone())),
        integers(spools.iter().map(|spool| spool.configuration.cast_signed())),
    ]
}

pub(super) fn pressure(view: View<'_>) -> Vec<ArrayRef> {
    // Numbers are of rows of everybody.
    let classes = if view.caller.scope().is_none() { view.tables.classes() } else { Vec::new() };
    let number = |of: fn(&ClassFacts) -> u64| integers(classes.iter().map(|class| Some(count(of(class)))));
    vec![
        integers((1..=classes.len()).map(|place| Some(count(place)))),
        texts(classes.iter().map(|class| class.class.to_owned())),
        number(|class| class.received),
        number(|class| class.durable),
        number(|class| class.duplicate),
        number(|class| class.refused),
        number(|class| class.pushed_back),
        number(|class| class.committed),
        number(|class| class.hot_rows),
        number(|class| class.hot_bytes),
        number(|class| class.hot_kept_bytes),
        number(|class| class.hot_free_bytes),
        number(|class| class.wal_bytes),
        number(|class| class.wal_free_bytes),
    ]
}

pub(super) fn queries(view: View<'_>) -> Vec<ArrayRef> {
    let told = view.statements.told(view.caller);
    vec![
        integers(told.iter().map(|told| count(told.id))),
        texts(told.iter().map(|told| told.state.name().to_owned())),
        texts(told.iter().map(|told| told.text.to_string())),
        texts(told.iter().map(|told| told.reader.clone())),
        texts(told.iter().map(|told| told.door.to_string())),
        texts(told.iter().map(|told| told.lane.clone())),
        times(told.iter().map(|told| us(told.started))),
        Arc::new(told.iter().map(|told| Some(told.took.as_secs_f64() * 1e3)).collect::<Float64Array>()),
        integers(told.iter().map(|told| count(told.rows))),
        integers(told.iter().map(|told| count(told.bytes))),
        integers(told.iter().map(|told| count(told.memory))),
    ]
}

pub(super) fn views(view: View<'_>) -> Vec<ArrayRef> {
    let now = now_us();
    let entries = view.views.all();
    // Numbers are of rows of everybody.
    let sees = view.caller.scope().is_none();
    let told: Vec<(&'static str, Option<String>, Progress)> = entries
        .iter()
        .map(|entry| match entry.doing() {
            Doing::Starting => ("starting", None, Progress::default()),
            Doing::Running(progress) if !progress.begun => ("waiting", None, progress),
            Doing::Running(progress) if progress.past.is_some() => ("backfill", progress.reason(), progress),
            Doing::Running(progress) => ("running", progress.reason(), progress),
            Doing::Failed(reason, progress) => ("failed", Some(reason), progress),
        })
        .collect();
    let progress = || told.iter().map(|(_, _, progress)| progress);
    let number = |of: fn(&Progress) -> u64| integers(progress().map(|progress| sees.then(|| count(of(progress)))));
    let time = |of: fn(&Progress) -> Option<i64>| times(progress().map(|progress| of(progress).filter(|_| sees)));
    let lag = progress().map(|progress| Some((now - progress.watermark.filter(|_| sees)?) as f64 / 1e6));
    vec![
        texts(entries.iter().map(|entry| entry.definition.name.to_string())),
        texts(entries.iter().map(|entry| sees.then(|| entry.definition.text.clone()))),
        texts(told.iter().map(|(state, _, _)| (*state).to_owned())),
        texts(told.iter().map(|(_, reason, _)| reason.clone().filter(|_| sees))),
        time(|progress| progress.watermark),
        Arc::new(lag.collect::<Float64Array>()),
        texts(progress().map(|progress| progress.held_by.clone().filter(|_| sees))),
        number(|progress| progress.dirty_windows),
        time(|progress| progress.past.map(|(from, _)| from)),
        time(|progress| progress.past.map(|(_, to)| to)),
        number(|progress| progress.rows_in),
        Arc::new(progress().map(|progress| progress.rows_per_second.filter(|_| sees)).collect::<Float64Array>()),
        number(|progress| progress.rows_out),
        number(|progress| progress.revisions),
        number(|progress| progress.memory_bytes),
        Arc::new(progress().map(|progress| sees.then_some(progress.computed.as_secs_f64())).collect::<Float64Array>()),
    ]
}

pub(super) fn links(view: View<'_>) -> Vec<ArrayRef> {
    // They are about alerts, which are for callers who see everything.
    let all = if view.caller.scope().is_none() { view.links.all() } else { Vec::new() };
    let number = |of: fn(&LinkStatus) -> u64| integers(all.iter().map(|link| Some(count(of(link)))));
    vec![
        texts(all.iter().map(|link| link.name.clone())),
        texts(all.iter().map(|link| link.state.to_owned())),
        texts(all.iter().map(|link| link.reason.clone())),
        texts(all.iter().map(|link| link.from.clone())),
        texts(all.iter().map(|link| link.when.clone())),
        texts(all.iter().map(|link| link.to_kind.to_owned())),
        texts(all.iter().map(|link| link.to.clone())),
        number(|link| link.open),
        number(|link| link.told),
        number(|link| link.answered),
        number(|link| link.refused),
        number(|link| link.timed_out),
        number(|link| link.rate_limited),
        number(|link| link.failed),
        times(all.iter().map(|link| link.last_at)),
        texts(all.iter().map(|link| link.last_outcome.map(str::to_owned))),
        texts(all.iter().map(|link| link.last_answer.clone())),
        texts(all.iter().map(|link| link.last_error.clone())),
    ]
}
