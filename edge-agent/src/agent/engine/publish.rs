//! The engine's status, put together from all that it owns and handed to whoever asks.
//!
//! The counters are read in one turn, so they balance (rule 6): rows sealed = committed + in the spool + lost + voided.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use wire::StreamName;

use super::super::status::{JournalStatus, LaneStatus, RowsStatus, SourceStatus, Status, StreamStatus, UplinkStatus};
use super::Engine;
use crate::decode::Value;
use crate::pipeline::{AGENT_VERSION, Pipeline};

impl Engine {
    /// Shows the state of this moment to status and metrics.
    pub(super) fn publish(&mut self) {
        self.published = Instant::now();
        let parts = &self.parts;
        let counters = parts.pipeline.counters();
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
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
                rate: self.rates.of(name, received, self.published),
                totals,
                last_arrival_us: state.last_arrival_us.load(Ordering::Relaxed),
                last_error: state.last_error.lock().clone(),
                address: *state.address.lock(),
            });
        }
        let streams = parts.pipeline.streams().map(|(name, watermark, pending)| StreamStatus {
            name: name.to_string(),
            totals: counters.streams.get(name).copied().unwrap_or_default(),
            pending: pending as u64,
            watermark_us: (watermark != wire::sealed::NO_WATERMARK).then_some(watermark),
            last: last_values(&parts.pipeline, name),
        });
        let streams = streams.collect::<Vec<_>>();
        let pending = streams.iter().map(|stream| stream.pending).sum::<u64>();
        let held = self.held.iter().flat_map(|(_, lane)| &lane.batches).map(|batch| u64::from(batch.rows)).sum::<u64>();
        let counted = parts.spool.rows_counted();
        let rows = RowsStatus {
            sealed: counters.streams.values().map(|totals| totals.rows).sum::<u64>() - pending - held,
            committed: counted.freed,
            spooled: counted.spooled,
            lost: counted.lost,
            voided: counted.voided,
        };
        let (bytes, bytes_written, syncs) = parts.journal.bytes_and_syncs();
        let lag_bytes = parts.journal.synced().borrow().0.saturating_sub(parts.pipeline.position().0);
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
            lanes: parts
                .spool
                .lanes()
                .enumerate()
                .map(|(index, lane)| LaneStatus {
                    name: lane.name,
                    bytes: lane.bytes,
                    bytes_max: lane.max_bytes,
                    batches_waiting: lane.batches_waiting as u64,
                    full: self.full_lanes.contains(&index),
                })
                .collect(),
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
                last_error: self.last_error.clone(),
            },
            rows,
            quarantined: counters.reasons.clone(),
            incidents: parts.incidents.clone(),
        };
        *parts.status.lock() = status;
    }
}

/// Fields that are shown of a reading, and how much of a text.
const SHOWN_MAX: usize = 8;
const SHOWN_BYTES_MAX: usize = 60;

fn last_values(pipeline: &Pipeline, stream: &StreamName) -> Vec<(String, String)> {
    let Some((reading, schema)) = pipeline.last(stream) else { return Vec::new() };
    let ts = chrono::DateTime::from_timestamp_micros(reading.ts);
    let ts = ts.map_or_else(|| reading.ts.to_string(), |ts| ts.to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
    let mut last = vec![("device".to_owned(), reading.device.clone()), ("ts".to_owned(), ts)];
    let values = schema.fields().iter().zip(&reading.values);
    let values = values.filter_map(|(field, value)| Some((field.name.to_string(), text(value.as_ref()?))));
    last.extend(values.take(SHOWN_MAX));
    last
}

fn text(value: &Value) -> String {
    match value {
        Value::Float(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Text(text) => text[..text.floor_char_boundary(SHOWN_BYTES_MAX)].to_owned(),
    }
}
