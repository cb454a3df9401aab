//! The machine's own state as readings of the stream `host`: load, memory, disks, network, temperatures.
//!
//! Every `every` one message: an array with a reading for the machine (device `<edge>`), each disk (`<edge>/disk/<mount>`),
//! each network interface (`<edge>/net/<name>`) and each temperature sensor (`<edge>/temperature/<label>`). What the machine does not have is null or missing.
//! It cannot wait: what comes while the journal is full is counted and told to it afterwards ([`Entry::Missed`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use serde_json::{Value, json};
use sysinfo::{Components, Disks, Networks, System};
use tokio_util::sync::CancellationToken;
use wire::{EdgeId, FieldName, FieldType};

use super::{SourceState, now_us};
use crate::config::{FieldSettings, HostSettings, MapSettings, Place, Pointer, StreamSettings, TimePlace};
use crate::entry::{Entry, Message, Payload};
use crate::journal::{JournalSender, TryAppendError};

/// Fields of the stream with their types. Bytes are counted since the machine's start where they grow.
const FIELDS: [(&str, FieldType); 15] = [
    ("kind", FieldType::Text),
    ("load_1m", FieldType::Float64),
    ("load_5m", FieldType::Float64),
    ("load_15m", FieldType::Float64),
    ("cpu_percent", FieldType::Float64),
    ("memory_used_bytes", FieldType::Int64),
    ("memory_total_bytes", FieldType::Int64),
    ("swap_used_bytes", FieldType::Int64),
    ("uptime_s", FieldType::Int64),
    ("disk_used_bytes", FieldType::Int64),
    ("disk_total_bytes", FieldType::Int64),
    ("received_bytes", FieldType::Int64),
    ("sent_bytes", FieldType::Int64),
    ("network_errors", FieldType::Int64),
    ("temperature_c", FieldType::Float64),
];

/// The stream `host`.
pub fn stream_settings() -> StreamSettings {
    let field = |(name, kind): &(&str, FieldType)| {
        (field_name(name), FieldSettings { kind: *kind, required: false, min: None, max: None })
    };
    StreamSettings::of_fields(FIELDS.iter().map(field).collect())
}

/// Where its values stand in a message of this source.
pub fn map() -> MapSettings {
    let place = |name: &str| Place::Reading(Pointer(vec![name.to_owned()]));
    MapSettings {
        device: Some(place("device")),
        ts: TimePlace::Arrival,
        fields: FIELDS.iter().map(|(name, _)| (field_name(name), place(name))).collect(),
    }
}

fn field_name(name: &str) -> FieldName {
    name.parse().expect("own names are valid")
}

/// Reads the machine until the token is cancelled or the journal has ended.
pub async fn run(
    settings: HostSettings,
    edge: EdgeId,
    mut journal: JournalSender,
    state: Arc<SourceState>,
    token: CancellationToken,
) {
    let mut machine = Machine::new(edge);
    let mut missed: Option<(u64, u64, i64, i64)> = None;
    let mut ticks = tokio::time::interval(settings.every.0);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    state.connected.store(true, Ordering::Relaxed);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = token.cancelled() => break,
        }
        // Reading /proc and /sys takes milliseconds; it is not worth a thread.
        let payload = Bytes::from(machine.read().to_string());
        let arrival_us = now_us();
        let bytes = payload.len() as u64;
        if let Some((messages, bytes, first_us, last_us)) = missed {
            let entry = Entry::Missed { source: settings.name.clone(), messages, bytes, first_us, last_us };
            match journal.try_append(&entry) {
                Ok(_) => missed = None,
                Err(TryAppendError::Full) => {}
                Err(TryAppendError::Closed(_)) => break,
            }
        }
        let entry = Entry::Message(Message {
            source: settings.name.clone(),
            topic: String::new(),
            payload: Payload::Whole(payload),
            arrival_us,
            delivery: None,
        });
        match journal.try_append(&entry) {
            Ok(_) => {
                state.received.fetch_add(1, Ordering::Relaxed);
                state.last_arrival_us.store(arrival_us, Ordering::Relaxed);
            }
            Err(TryAppendError::Full) => {
                let (messages, all, first, _) = missed.unwrap_or((0, 0, arrival_us, arrival_us));
                missed = Some((messages + 1, all + bytes, first, arrival_us));
            }
            Err(TryAppendError::Closed(_)) => break,
        }
    }
    state.connected.store(false, Ordering::Relaxed);
}

/// What is read.
struct Machine {
    edge: EdgeId,
    system: System,
    disks: Disks,
    networks: Networks,
    components: Components,
}

impl Machine {
    fn new(edge: EdgeId) -> Self {
        Self {
            edge,
            system: System::new(),
            disks: Disks::new_with_refreshed_list(),
            networks: Networks::new_with_refreshed_list(),
            components: Components::new_with_refreshed_list(),
        }
    }

    fn read(&mut self) -> Value {
        self.system.refresh_cpu_usage();
        self.system.refresh_memory();
        self.disks.refresh(true);
        self.networks.refresh(true);
        self.components.refresh(true);
        let load = System::load_average();
        let mut readings = vec![json!({
            "device": self.edge.as_str(),
            "kind": "machine",
            "load_1m": load.one,
            "load_5m": load.five,
            "load_15m": load.fifteen,
            "cpu_percent": self.system.global_cpu_usage(),
            "memory_used_bytes": self.system.used_memory(),
            "memory_total_bytes": self.system.total_memory(),
            "swap_used_bytes": self.system.used_swap(),
            "uptime_s": System::uptime(),
        })];
        for disk in self.disks.list() {
            readings.push(json!({
                "device": self.device("disk", &disk.mount_point().display().to_string()),
                "kind": "disk",
                "disk_used_bytes": disk.total_space().saturating_sub(disk.available_space()),
                "disk_total_bytes": disk.total_space(),
            }));
        }
        for (name, network) in self.networks.list() {
            readings.push(json!({
                "device": self.device("net", name),
                "kind": "network",
                "received_bytes": network.total_received(),
                "sent_bytes": network.total_transmitted(),
                "network_errors": network.total_errors_on_received() + network.total_errors_on_transmitted(),
            }));
        }
        for component in self.components.list() {
            let temperature = component.temperature().filter(|temperature| temperature.is_finite());
            readings.push(json!({
                "device": self.device("temperature", component.label()),
                "kind": "temperature",
                "temperature_c": temperature,
            }));
        }
        Value::Array(readings)
    }

    fn device(&self, kind: &str, name: &str) -> String {
        let name = name.replace(['+', '#'], "_");
        format!("{}/{kind}/{}", self.edge, name.trim_start_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Decoder;

    #[test]
    fn every_reading_of_this_machine_decodes() {
        let payload = Bytes::from(Machine::new("gw".parse().unwrap()).read().to_string());
        let mut out = Vec::new();
        Decoder::new(&map(), None, &stream_settings()).decode("", &payload, 1, &mut out);
        assert!(out.iter().all(Result::is_ok), "{out:?}");
        let machine = out[0].as_ref().unwrap();
        assert_eq!(machine.device, "gw");
        assert!(machine.values[6].is_some(), "memory");
    }
}
