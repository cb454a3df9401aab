//! The engine's status, put together from all that it owns and handed to whoever asks.
//!
//! The counters are read in one turn, so they balance (rule 6): rows sealed = committed + in the spool + lost + voided.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use wire::StreamName;

use super::super::history::History;
use super::super::status::{
    ConfigurationStatus, FIRING_MAX, FiringStatus, JournalStatus, LaneStatus, LastValue, RowsStatus, RuleStatus,
    SourceStatus, Status, StreamStatus, UplinkStatus,
};
use super::Engine;
use super::forerun::Forerunner;
use crate::clock::{ClockStatus, ahead};
use crate::decode::Value;
use crate::pipeline::{AGENT_VERSION, LaneCut, Pipeline};

impl Engine {
    /// Shows the state of this moment to status and metrics.
    pub(super) fn publish(&mut self) {
        self.published = Instant::now();
        let parts = &self.parts;
        let pipeline = self.forerunner.as_ref().map_or(&parts.pipeline, |runner| &runner.pipeline);
        let counters = pipeline.counters();
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let clock = parts.journal.clock().status();
        let now_us = clock.time_us;
        // From what arrivals carry.
        let correction_us = now_us.saturating_sub(parts.journal.clock().now_us());
        let mut sources = Vec::new();
        for (name, state) in &parts.sources {
            let mut totals = counters.sources.get(name).copied().unwrap_or_default();
            totals.redelivered = load(&state.redelivered);
            let received = load(&state.received);
            sources.push(SourceStatus {
                name: name.clone(),
                connected: state.connected.load(Ordering::Relaxed),
                connects: load(&state.connects),
                received,
                rate: self.rates.of(&format!("source {name}"), received, self.published),
                totals,
                last_arrival_us: match state.last_arrival_us.load(Ordering::Relaxed) {
                    0 => 0,
                    us => us.saturating_add(correction_us),
                },
                last_error: state.last_error.lock().clone(),
                address: *state.address.lock(),
                commands_sent: load(&state.commands_sent),
            });
        }
        let spooled = parts.spool.rows_of_streams();
        let mut streams = Vec::new();
        for (name, watermark, pending) in pipeline.streams() {
            let totals = counters.streams.get(name).copied().unwrap_or_default();
            let watermark_us = (watermark != wire::sealed::NO_WATERMARK).then_some(watermark);
            let rate = self.rates.of(&format!("stream {name}"), totals.rows, self.published);
            streams.push(StreamStatus {
                name: name.to_string(),
                rate,
                rates: self.history.note(name.as_str(), rate, self.published),
                last: last_values(pipeline, name, &mut self.history, self.published),
                totals,
                pending: pending as u64,
                uncommitted: pending as u64 + spooled.get(name).copied().unwrap_or(0) + held_of(&self.held, name),
                watermark_us,
                lag_s: watermark_us.map(|us| (now_us.saturating_sub(us) / 1_000) as f64 / 1e3),
                last_error: pipeline.last_error(name).map(str::to_owned),
            });
        }
        let mut lanes = Vec::new();
        for (index, lane) in parts.spool.lanes().enumerate() {
            lanes.push(LaneStatus {
                rate: self.rates.of(&format!("lane {}", lane.name), lane.bytes_written, self.published),
                name: lane.name,
                bytes: lane.bytes,
                bytes_max: lane.max_bytes,
                bytes_written: lane.bytes_written,
                batches_waiting: lane.batches_waiting as u64,
                full: self.full_lanes.contains(&index),
            });
        }
        let pending = streams.iter().map(|stream| stream.pending).sum::<u64>();
        let held = self.held.iter().flat_map(|(_, lane)| &lane.batches).map(|batch| u64::from(batch.rows)).sum::<u64>();
        let counted = parts.spool.rows_counted();
        let out = counters.streams.values().map(|totals| totals.rows).sum::<u64>() - pending - held;
        // What entries became that the journal has lost since, only the spool knows; and what lanes have that are ahead.
        let is_ahead = parts.spool.cut_positions().values().any(|stands| *stands > parts.pipeline.position());
        let out = if is_ahead || self.forerunner.is_some() {
            counted.cut
        } else if counters.journal_bytes_damaged > 0 {
            out.max(counted.cut)
        } else {
            out
        };
        let rows = RowsStatus {
            sealed: out.wrapping_add_signed(counted.made),
            committed: counted.freed,
            spooled: counted.spooled,
            lost: counted.lost,
            voided: counted.voided,
        };
        let (bytes, bytes_written, syncs) = parts.journal.bytes_and_syncs();
        // The reader's position: behind the last entry there may be the log's own markers, which nothing applies.
        let lag_bytes = parts.journal.synced().borrow().0.saturating_sub(parts.reader.position().0);
        let (node, url) = parts.uplink.node();
        let status = Status {
            edge: parts.edge.clone(),
            agent: AGENT_VERSION.to_owned(),
            spool: parts.spool.id().to_string(),
            uptime_s: self.started.elapsed().as_secs(),
            published: parts.status.lock().published + 1,
            drained: lag_bytes == 0 && pending == 0 && held == 0 && rows.spooled == 0,
            sources,
            streams,
            lanes,
            journal: JournalStatus {
                bytes,
                bytes_max: parts.journal_bytes_max,
                lag_bytes,
                full: parts.journal.is_full(),
                bytes_written,
                syncs,
            },
            uplink: UplinkStatus {
                url: parts.cloud.urls()[url].to_string(),
                node: node.map(str::to_owned),
                in_flight: self.in_flight,
                bytes_sent: self.bytes_sent,
                last_error: self.last_error.as_ref().map(|complaint| complaint.text.clone()),
            },
            rows,
            configuration: ConfigurationStatus {
                version: parts.in_force.version,
                ..parts.configuration.lock().clone()
            },
            quarantined: counters.reasons.clone(),
            problems: self.problems(&clock),
            clock,
            incidents: parts.incidents.clone(),
            rules: pipeline.rules().map(RuleStatus::from).collect(),
            firing: pipeline.firing().take(FIRING_MAX).map(FiringStatus::from).collect(),
            publisher: parts.outbox.as_ref().map(|outbox| outbox.status()),
            commands: parts.remote.lock().clone(),
        };
        *parts.status.lock() = status;
    }

    fn problems(&self, clock: &ClockStatus) -> Vec<String> {
        let max_s = self.parts.settings.clock.max_skew.0.as_secs_f64();
        let time = match (clock.by, clock.waits_s) {
            (Some(_), _) if clock.machine_ahead_s.abs() > max_s => Some(format!(
                "the machine's clock is {} of the time that is known: the agent goes by that; start NTP \
                 (timedatectl set-ntp true)",
                ahead(clock.machine_ahead_s)
            )),
            (Some(_), _) => None,
            (None, Some(waits_s)) => Some(format!(
                "nobody says what time it is, neither NTP nor the cloud: all that comes waits in the journal, for \
                 {waits_s:.0} s more at most"
            )),
            (None, None) => Some(
                "nobody says what time it is, neither NTP nor the cloud: readings that are stamped by their arrival \
                 have quality `clock`"
                    .to_owned(),
            ),
        };
        let skew = clock.skew_s.filter(|_| clock.is_off && time.is_none()).map(|skew_s| {
            format!("the machine's clock is {} of the cloud's, more than max_skew; start NTP", ahead(skew_s))
        });
        let lanes = self.parts.spool.lanes().enumerate();
        let full = lanes.filter(|(index, _)| self.full_lanes.contains(index));
        let full = full.map(|(_, lane)| format!("lane {} is full", lane.name));
        let journal = self.parts.journal.is_full().then(|| "the journal is full".to_owned());
        let snapshot = self.no_snapshot.as_ref().map(|(text, _)| text.clone());
        let fork = "a new spool finds no room on the disk: nothing is sent until it does";
        // Rules read what is journalled (rule 1).
        let waits = !self.held.is_empty() && !self.parts.in_force.rule.is_empty();
        let why = match &self.forerunner {
            _ if self.parts.journal.is_full() => Some("nothing more is taken"),
            None | Some(Forerunner { stands: true, .. }) => Some("the next configuration is taken only then"),
            Some(_) => None,
        };
        let stands = why
            .filter(|_| waits)
            .map(|why| format!("rules stand still, too: no alert fires or ends until that lane has room, as {why}"));
        full.chain(stands)
            .chain(journal)
            .chain(time)
            .chain(skew)
            .chain(snapshot)
            .chain(self.forking.map(|_| fork.to_owned()))
            .collect()
    }
}

/// Rows of a stream in a cut that a full lane holds back.
fn held_of(held: &[(usize, LaneCut)], stream: &StreamName) -> u64 {
    let batches = held.iter().flat_map(|(_, lane)| &lane.batches).filter(|batch| batch.stream == *stream);
    batches.map(|batch| u64::from(batch.rows)).sum()
}

/// Fields that are shown of a reading, and how much of a text.
const SHOWN_MAX: usize = 8;
const SHOWN_BYTES_MAX: usize = 60;

fn last_values(pipeline: &Pipeline, stream: &StreamName, history: &mut History, now: Instant) -> Vec<LastValue> {
    let Some((reading, schema)) = pipeline.last(stream) else { return Vec::new() };
    let ts = chrono::DateTime::from_timestamp_micros(reading.ts);
    let ts = ts.map_or_else(|| reading.ts.to_string(), |ts| ts.to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
    let plain = |name: &str, value: String| LastValue { name: name.to_owned(), value, samples: Vec::new() };
    let mut last = vec![plain("device", shortened(&reading.device)), plain("ts", ts)];
    for (field, value) in schema.fields().iter().zip(&reading.values).take(SHOWN_MAX) {
        let Some(value) = value else { continue };
        let number = match value {
            Value::Float(value) => Some(*value),
            Value::Int(value) => Some(*value as f64),
            Value::Bool(_) | Value::Text(_) => None,
        };
        let note = |number| history.note(&format!("{stream}/{}", field.name), number, now);
        last.push(LastValue {
            name: field.name.to_string(),
            value: text(value),
            samples: number.map(note).unwrap_or_default(),
        });
    }
    last
}

fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(SHOWN_BYTES_MAX)].to_owned()
}

fn text(value: &Value) -> String {
    match value {
        Value::Float(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Text(text) => shortened(text),
    }
}
