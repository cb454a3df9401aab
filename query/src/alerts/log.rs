//! The stream `alert_log`: every change in order, from which subscribers catch up and a restarted node goes on.
//!
//! A batch of changes is written whole or not at all, and its last row says how far each stream had been read when they were
//! decided. So after a crash everything behind that position is looked at again, by alerts as they stood then: nothing is lost
//! and nothing is decided twice. State of the node is nothing but this stream: the last row of each alert has it as JSON.
//! Restart costs one aggregation over the stream; its retention bounds that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::builder::{BooleanBuilder, Float64Builder, Int64Builder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, ArrayRef, RecordBatch, TimestampMicrosecondArray};
use serde::de::DeserializeOwned;
use wire::schema::own;
use wire::{DAY_US, StreamName, StreamSchema, TS_MIN_US};

use super::episode::{Episode, Phase, Quiet};
use super::episodes::{Change, Episodes, Subject, Transition};
use super::late::Lates;
use super::rule::caller;
use super::silence::Silence;
use crate::engine::{Engine, QueryError};
use crate::follow::Position;
use crate::links::event::LinkEvent;

/// Rows of one batch, their text in bytes, and dates, of which a batch may have 64.
const ROWS_MAX: usize = 4_096;
const BYTES_MAX: usize = 8 << 20;
const DATES_MAX: usize = 60;
/// Ended alerts of this age may still be extended after a restart, µs.
const ENDED_US: i64 = 3_600_000_000;
/// Later than any event time: the year 9999.
const TS_FAR_US: i64 = 253_402_300_799_000_000;

/// How far each stream was read.
pub(crate) type Positions = BTreeMap<StreamName, Position>;

/// How far each stream was read, and what of it is to be judged again.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Read {
    pub(crate) positions: Positions,
    /// The newest event time that was read of each.
    pub(crate) newest: BTreeMap<StreamName, i64>,
    pub(crate) late: Lates,
}

/// Beside the names of streams, none of which begins so.
const LATE: &str = "_late";
const NEWEST: &str = "_newest";

impl Read {
    /// As the column `position` has it: a position by the name of each stream, and what is to be judged again.
    fn text(&self) -> String {
        let mut text = serde_json::to_value(&self.positions).unwrap_or_default();
        if !self.newest.is_empty() {
            text[NEWEST] = serde_json::to_value(&self.newest).unwrap_or_default();
        }
        if !self.late.is_empty() {
            text[LATE] = serde_json::to_value(&self.late).unwrap_or_default();
        }
        text.to_string()
    }

    fn parse(text: &str) -> serde_json::Result<Self> {
        let mut streams: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
        let late = streams.remove(LATE).map(serde_json::from_value).transpose()?.unwrap_or_default();
        let newest = streams.remove(NEWEST).map(serde_json::from_value).transpose()?.unwrap_or_default();
        Ok(Self { positions: serde_json::from_value(streams.into())?, newest, late })
    }
}

/// The name of the stream.
pub(crate) fn stream() -> StreamName {
    own::ALERT_LOG.parse().expect("own names are valid")
}

/// Its schema.
pub(crate) fn schema() -> Arc<StreamSchema> {
    Arc::new(own::alert_log())
}

/// Changes as batches, in order; the last row of the last one has the position.
pub(crate) fn batches(changes: &[Change], read: &Read, schema: &StreamSchema) -> Vec<RecordBatch> {
    let mut batches = Vec::new();
    let mut rest = changes;
    while !rest.is_empty() {
        let (mut dates, mut bytes) = (std::collections::HashSet::new(), 0);
        let one_too_many = |change: &Change| {
            bytes += size(change);
            dates.insert(change.ts.div_euclid(DAY_US));
            dates.len() > DATES_MAX || bytes > BYTES_MAX
        };
        let count = rest.iter().take(ROWS_MAX).position(one_too_many).unwrap_or(rest.len().min(ROWS_MAX));
        let (now, later) = rest.split_at(count.max(1));
        let position = later.is_empty().then(|| read.text());
        batches.push(batch(now, position.as_deref(), schema));
        rest = later;
    }
    batches
}

/// What a change takes as a row, about: what is long in it is there twice, once as JSON within JSON.
fn size(change: &Change) -> usize {
    let said = change.note.as_ref().map_or(0, String::len);
    let about = match &change.subject {
        Subject::Alert(alert) => {
            let aliases = alert.aliases.iter().map(String::len).sum::<usize>();
            3 * alert.labels.len() + 2 * (alert.message.len() + alert.topic.len() + aliases + alert.rule.len())
        }
        Subject::Event(event) => 4 * serde_json::to_string(event).map_or(0, |text| text.len()),
        _ => 0,
    };
    1_000 + said + about
}

fn batch(changes: &[Change], position: Option<&str>, schema: &StreamSchema) -> RecordBatch {
    let alert = |change: &Change| match &change.subject {
        Subject::Alert(episode) => Some(Episode::clone(episode)),
        _ => None,
    };
    let alerts: Vec<Option<Episode>> = changes.iter().map(alert).collect();
    let columns = schema.arrow().fields().iter().map(|field| -> ArrayRef {
        let name = field.name().as_str();
        let rows = || changes.iter().zip(&alerts);
        match name {
            "ts" | "at" | "from_ts" | "to_ts" => {
                let time = |(change, alert): (&Change, &Option<Episode>)| match name {
                    "ts" => Some(change.ts),
                    "at" => Some(change.at),
                    "from_ts" => alert.as_ref().map(|alert| alert.from),
                    _ => alert.as_ref().and_then(|alert| alert.to),
                };
                let times = rows().map(|row| time(row).map(|us| us.max(TS_MIN_US)));
                Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
            }
            "sequence" => {
                let mut column = Int64Builder::new();
                changes.iter().for_each(|change| column.append_value(change.sequence));
                Arc::new(column.finish())
            }
            "told" => {
                let mut column = BooleanBuilder::new();
                changes.iter().for_each(|change| column.append_value(change.told));
                Arc::new(column.finish())
            }
            "value" => {
                let mut column = Float64Builder::new();
                let finite = |alert: &Option<Episode>| alert.as_ref()?.value.filter(|value| value.is_finite());
                alerts.iter().for_each(|alert| column.append_option(finite(alert)));
                Arc::new(column.finish())
            }
            _ => {
                let mut column = StringBuilder::new();
                for (index, (change, alert)) in rows().enumerate() {
                    let last = index + 1 == changes.len();
                    column.append_option(text(name, change, alert.as_ref(), position.filter(|_| last)));
                }
                Arc::new(column.finish())
            }
        }
    });
    let columns = columns.collect();
    RecordBatch::try_new(Arc::clone(schema.arrow()), columns).expect("the columns are the schema's")
}

fn text(name: &str, change: &Change, alert: Option<&Episode>, position: Option<&str>) -> Option<String> {
    let own = |text: &str| Some(text.to_owned());
    match (name, &change.subject) {
        ("quality", _) => own("good"),
        ("transition", _) => own(change.transition.word()),
        ("actor", _) => change.actor.clone(),
        ("note", _) => change.note.clone(),
        ("position", _) => position.and_then(own),
        ("alert_id", Subject::Silence(silence)) => own(&silence.id),
        ("rule", Subject::Silence(silence)) => silence.rule.clone(),
        ("state", Subject::Silence(_)) => own("silence"),
        ("detail", Subject::Silence(silence)) => serde_json::to_string(silence).ok(),
        ("state", Subject::Event(_)) => own("event"),
        ("severity", Subject::Event(event)) => own(event.severity.word()),
        ("topic", Subject::Event(event)) => own(&event.topic),
        ("message", Subject::Event(event)) => own(&event.payload),
        ("detail", Subject::Event(event)) => serde_json::to_string(event).ok(),
        _ => {
            let alert = alert?;
            match name {
                "device" => alert.device.clone(),
                "state" => own(state(change.transition, alert)),
                "alert_id" => own(&alert.id),
                "rule" => own(&alert.rule),
                "rule_hash" => own(&alert.hash),
                "severity" => own(alert.severity.word()),
                "stream" => own(&alert.stream),
                "labels" => own(&alert.labels),
                "message" => own(&alert.message),
                "topic" => own(&alert.topic),
                "quiet" => alert.quiet.filter(|_| !change.told).map(|quiet| quiet.word().to_owned()),
                "aliases" => serde_json::to_string(&alert.aliases).ok(),
                "detail" => serde_json::to_string(alert).ok(),
                _ => None,
            }
        }
    }
}

/// The word of the column `state`: as at the edge, what was found too late is `backfill`; what turned out to be one with another
/// is `merged`.
pub(crate) fn state(transition: Transition, alert: &Episode) -> &'static str {
    match transition {
        Transition::Dropped => "dropped",
        _ if alert.merged_into.is_some() => "merged",
        _ if alert.phase != Phase::Pending && !alert.told && alert.quiet == Some(Quiet::Backfill) => "backfill",
        _ => alert.phase.word(),
    }
}

/// Why a restarted node cannot go on from the stream. It is never begun anew: that would decide everything twice.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    #[error(transparent)]
    Asked(#[from] QueryError),
    #[error("the {what} of change {sequence} in alert_log is not understood: {error}")]
    Unreadable { what: &'static str, sequence: i64, error: serde_json::Error },
}

fn understood<T: DeserializeOwned>(what: &'static str, sequence: i64, text: &str) -> Result<T, RecoverError> {
    serde_json::from_str(text).map_err(|error| RecoverError::Unreadable { what, sequence, error })
}

/// What a restarted node finds.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) sequence: i64,
    pub(crate) read: Read,
    alerts: Vec<Episode>,
    silences: Vec<Silence>,
}

/// What the last row of an alert or a silence says.
#[derive(Debug)]
struct Last {
    sequence: i64,
    state: String,
    transition: String,
    detail: String,
}

impl Recovered {
    /// From the last position, with its sequence, and the last row of each alert and silence.
    fn read(sequence: i64, position: Option<(i64, String)>, last: Vec<Last>, now: i64) -> Result<Self, RecoverError> {
        let mut found = Self { sequence, ..Self::default() };
        if let Some((sequence, text)) = position {
            found.read =
                Read::parse(&text).map_err(|error| RecoverError::Unreadable { what: "position", sequence, error })?;
        }
        for Last { sequence, state, transition, detail } in last {
            match (state.as_str(), transition.as_str()) {
                ("dropped" | "merged", _) | ("silence", "unsilence") => {}
                ("silence", _) => found.silences.push(understood("silence", sequence, &detail)?),
                _ => found.alerts.push(understood("alert", sequence, &detail)?),
            }
        }
        found.silences.retain(|silence| !silence.is_over(now));
        // A record of the past that never ended is none of the present.
        found.alerts.retain(|alert| alert.watch.is_some() || !alert.raised.is_empty());
        Ok(found)
    }

    /// Puts back what was open.
    pub(crate) fn into_episodes(self, horizon: i64, now: i64) -> (Episodes, Read) {
        let mut episodes = Episodes::new(horizon, self.sequence, now);
        self.alerts.into_iter().for_each(|alert| episodes.restore(alert));
        self.silences.into_iter().for_each(|silence| episodes.restore_silence(silence));
        (episodes, self.read)
    }
}

/// Reads what the stream says of the last moment.
///
/// # Errors
/// When it cannot be asked, or says what is not understood.
pub(crate) async fn recover(engine: &Engine, now: i64) -> Result<Recovered, RecoverError> {
    if engine.tables().cold(&stream()).is_none() {
        return Ok(Recovered::default());
    }
    let numbers = |rows: &[RecordBatch]| {
        let of = |batch: &RecordBatch| batch.column(0).as_primitive::<Int64Type>().iter().flatten().collect::<Vec<_>>();
        rows.iter().flat_map(of).collect::<Vec<_>>()
    };
    let sequence = numbers(&ask(engine, "SELECT max(sequence) AS sequence FROM alert_log").await?);
    let sequence = sequence.into_iter().max().unwrap_or(0);
    let position = "SELECT sequence, position FROM alert_log WHERE position IS NOT NULL ORDER BY sequence DESC LIMIT 1";
    let rows = ask(engine, position).await?;
    let position = numbers(&rows).into_iter().zip(texts(&rows, 1)).next();
    let since = now - ENDED_US;
    let last = format!(
        "SELECT sequence, state, transition, detail FROM alert_log WHERE sequence IN \
         (SELECT max(sequence) FROM alert_log WHERE alert_id IS NOT NULL GROUP BY alert_id) \
         AND (state IN ('pending', 'firing', 'silence') OR state = 'backfill' AND to_ts IS NULL \
         OR at > to_timestamp_micros({since})) ORDER BY sequence"
    );
    let rows = ask(engine, &last).await?;
    let [states, transitions, details] = [1, 2, 3].map(|column| texts(&rows, column));
    let last = numbers(&rows).into_iter().zip(states).zip(transitions).zip(details);
    let last = last.map(|(((sequence, state), transition), detail)| Last { sequence, state, transition, detail });
    Recovered::read(sequence, position, last.collect(), now)
}

const TOLD: &str = "SELECT transition, actor, note, detail, sequence, ts, at FROM alert_log WHERE told";

/// What was told behind a sequence: the next so many, in so many bytes, and whether that is all.
///
/// # Errors
/// When the stream cannot be asked.
pub(crate) async fn told_after(
    engine: &Engine,
    sequence: i64,
    (count, bytes_max): (usize, usize),
) -> Result<(Vec<Change>, bool), QueryError> {
    if engine.tables().cold(&stream()).is_none() {
        return Ok((Vec::new(), true));
    }
    let told = format!("{TOLD} AND sequence > {sequence} ORDER BY sequence LIMIT {count}");
    let rows = ask(engine, &told).await?;
    let found = rows.iter().map(RecordBatch::num_rows).sum::<usize>();
    let mut bytes = 0;
    let mut changes = Vec::new();
    for change in rows.iter().flat_map(changes_of) {
        bytes += size(&change);
        if bytes > bytes_max && !changes.is_empty() {
            return Ok((changes, false));
        }
        changes.push(change);
    }
    Ok((changes, found < count))
}

/// The last that was told of an alert.
///
/// # Errors
/// When the stream cannot be asked.
pub(crate) async fn last_told(engine: &Engine, id: &str) -> Result<Option<Change>, QueryError> {
    if engine.tables().cold(&stream()).is_none() {
        return Ok(None);
    }
    let id = id.replace('\'', "''");
    let told = format!("{TOLD} AND alert_id = '{id}' ORDER BY sequence DESC LIMIT 1");
    Ok(ask(engine, &told).await?.iter().flat_map(changes_of).next())
}

/// Rows of [`TOLD`].
fn changes_of(batch: &RecordBatch) -> Vec<Change> {
    let text = |column: usize, row: usize| {
        let column = batch.column(column).as_string::<i32>();
        column.is_valid(row).then(|| column.value(row).to_owned())
    };
    let change = |row: usize| {
        let sequence = batch.column(4).as_primitive::<Int64Type>().value(row);
        let transition = serde_json::from_value(serde_json::Value::String(text(0, row).unwrap_or_default()));
        let detail = text(3, row).unwrap_or_default();
        let subject = match transition {
            Ok(Transition::Event) => {
                serde_json::from_str::<LinkEvent>(&detail).map(|event| Subject::Event(event.into()))
            }
            _ => serde_json::from_str::<Episode>(&detail).map(|episode| Subject::Alert(episode.into())),
        };
        let (transition, subject) = match (transition, subject) {
            (Ok(transition), Ok(subject)) => (transition, subject),
            (Err(error), _) | (_, Err(error)) => {
                // It would hold up everyone behind it for ever.
                tracing::error!(sequence, %error, "a change in alert_log is not understood, and told to nobody");
                return None;
            }
        };
        Some(Change {
            sequence,
            transition,
            ts: batch.column(5).as_primitive::<TimestampMicrosecondType>().value(row),
            at: batch.column(6).as_primitive::<TimestampMicrosecondType>().value(row),
            told: true,
            actor: text(1, row),
            note: text(2, row),
            subject,
        })
    };
    (0..batch.num_rows()).filter_map(change).collect()
}

/// The sequence of what a hop of a link has told, if it has.
///
/// # Errors
/// When the stream cannot be asked.
pub(crate) async fn sequence_of_event(engine: &Engine, id: &str) -> Result<Option<i64>, QueryError> {
    if engine.tables().cold(&stream()).is_none() {
        return Ok(None);
    }
    let id = id.replace('\'', "''");
    let told = format!("SELECT sequence FROM alert_log WHERE transition = 'event' AND note = '{id}' LIMIT 1");
    let rows = ask(engine, &told).await?;
    Ok(rows.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().iter().flatten()).next())
}

/// The alerts of rules of these hashes that fired, and ended, and have something between these event times, as they are recorded.
///
/// # Errors
/// When the stream cannot be asked, or says what is not understood.
pub(crate) async fn ended_between(
    engine: &Engine,
    hashes: &BTreeSet<String>,
    (from, to): (i64, i64),
) -> Result<Vec<Episode>, QueryError> {
    if engine.tables().cold(&stream()).is_none() {
        return Ok(Vec::new());
    }
    // Hashes are hexadecimal.
    let quoted: Vec<String> = hashes.iter().map(|hash| format!("'{hash}'")).collect();
    let ended = format!(
        "SELECT detail FROM alert_log WHERE sequence IN \
         (SELECT max(sequence) FROM alert_log WHERE rule_hash IN ({}) GROUP BY alert_id) \
         AND state IN ('resolved', 'backfill') AND from_ts < to_timestamp_micros({}) AND to_ts >= to_timestamp_micros({})",
        quoted.join(", "),
        to.clamp(TS_MIN_US, TS_FAR_US),
        from.clamp(TS_MIN_US, TS_FAR_US),
    );
    let details = texts(&ask(engine, &ended).await?, 0);
    let understood = |detail: &String| serde_json::from_str(detail).map_err(|error| unreadable(&error));
    details.iter().map(understood).collect()
}

fn unreadable(error: &serde_json::Error) -> QueryError {
    QueryError::Failed { message: format!("an alert in alert_log is not understood: {error}") }
}

/// In the lane of the rules: no reader holds it up.
async fn ask(engine: &Engine, sql: &str) -> Result<Vec<RecordBatch>, QueryError> {
    engine.rows_as(&caller(), sql, usize::MAX).await
}

fn texts(rows: &[RecordBatch], column: usize) -> Vec<String> {
    let of = |batch: &RecordBatch| {
        let column = batch.column(column).as_string::<i32>();
        column.iter().map(|text| text.unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    rows.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::super::episode::Severity;
    use super::*;

    #[test]
    fn what_is_to_be_judged_again_is_kept_with_the_positions() {
        let stream: StreamName = "field".parse().unwrap();
        let rules = BTreeSet::from([("r".to_owned(), "00".to_owned())]);
        let late = super::super::late::Late { from: -1, to: 7, rules, devices: None, rows: 3 };
        let positions = Positions::from([(stream.clone(), Position::default())]);
        let plain = Read { positions, ..Read::default() };
        let before: Positions = serde_json::from_str(&plain.text()).unwrap();
        assert_eq!(before, plain.positions, "as nodes before have written it");
        let newest = BTreeMap::from([(stream.clone(), 5)]);
        let read = Read { late: Lates::from([(stream, late)]), newest, ..plain.clone() };
        for read in [Read::default(), plain, read] {
            assert_eq!(Read::parse(&read.text()).unwrap(), read);
        }
    }

    #[test]
    fn what_is_not_understood_is_said_and_never_taken_for_nothing() {
        let last = |detail: &str| {
            vec![Last {
                sequence: 3,
                state: "firing".to_owned(),
                transition: "firing".to_owned(),
                detail: detail.to_owned(),
            }]
        };
        let position = |text: &str| Some((7, text.to_owned()));
        let known = Recovered::read(9, position("{}"), Vec::new(), 0).unwrap();
        assert_eq!((known.sequence, known.read), (9, Read::default()));
        for (position, last, expected) in [
            (position("{\"field\": 5}"), Vec::new(), "the position of change 7"),
            (position(""), Vec::new(), "the position of change 7"),
            (None, last("{\"id\": 5}"), "the alert of change 3"),
        ] {
            let error = Recovered::read(9, position, last, 0).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn batches_are_as_large_as_a_batch_may_be() {
        let candidate = |device: String| super::super::episode::Candidate {
            edge: "e".to_owned(),
            id: device.clone(),
            rule: "r".to_owned(),
            hash: "00".repeat(16),
            stream: "s".to_owned(),
            labels: serde_json::json!({ "device": device, "text": "\"".repeat(10_000) }).to_string(),
            device: Some(device),
            severity: Severity::Warning,
            message: "m".repeat(4_096),
            backfill: false,
            ts: TS_MIN_US,
            from: TS_MIN_US,
            to: None,
        };
        let mut episodes = Episodes::new(i64::MAX, 0, TS_MIN_US);
        for device in 0..3_000 {
            episodes.candidate(&candidate(format!("d{device}")), TS_MIN_US);
        }
        let (changes, schema) = (episodes.take(), schema());
        let batches = batches(&changes, &Read::default(), &schema);
        assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 3_000);
        for (index, batch) in batches.iter().enumerate() {
            assert!(batch.get_array_memory_size() < wire::BATCH_DECODED_BYTES_MAX / 2, "{}", batch.num_rows());
            let positions = batch.column_by_name("position").unwrap();
            let last = usize::from(index + 1 == batches.len());
            assert_eq!(positions.len() - positions.null_count(), last, "the position is with the last change");
        }
    }
}
