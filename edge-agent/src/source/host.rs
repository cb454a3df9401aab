//! The machine's own state as readings of the stream `host`: load, memory, disks, network, temperatures.
//!
//! Every `every` one message: an array with a reading for the machine (device `<edge>`), each disk (`<edge>/disk/<mount>`),
//! each network interface (`<edge>/net/<name>`) and each temperature sensor (`<edge>/temperature/<label>`). What the machine does not have is null or missing.
//! It cannot wait: what comes while the journal is full is counted (`missed.rs`).
//!
//! The machine is read on a thread of its own: a disk that does not answer holds neither the other sources nor the stop.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};

use bytes::Bytes;
use serde_json::{Value, json};
use sysinfo::{Components, Disks, Networks, System};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use wire::{EdgeId, FieldName, FieldType};

use super::SourceState;
use super::missed::Giver;
use crate::config::{FieldSettings, HostSettings, MapSettings, Place, Pointer, StreamSettings, TimePlace};
use crate::journal::JournalSender;

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
    let field = |(name, kind): &(&str, FieldType)| (field_name(name), FieldSettings::of(*kind));
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
    journal: JournalSender,
    state: Arc<SourceState>,
    token: CancellationToken,
) {
    let requests = match machine_thread(edge) {
        Ok(requests) => requests,
        Err(error) => return state.error(format!("start a thread: {error}")),
    };
    let mut giver = Giver::new(settings.name, journal);
    let mut ticks = tokio::time::interval(settings.every.0);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    state.connected.store(true, Ordering::Relaxed);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = token.cancelled() => break,
        }
        let (answer, payload) = oneshot::channel();
        if requests.try_send(answer).is_err() {
            state.error("the thread that reads the machine has ended".to_owned());
            break;
        }
        let payload = tokio::select! {
            payload = payload => payload,
            () = token.cancelled() => break,
        };
        let Ok(payload) = payload else { continue };
        if giver.give(payload, &state).is_err() {
            break;
        }
    }
    giver.finish().await;
    state.connected.store(false, Ordering::Relaxed);
}

/// A thread that reads the machine once for each request, and ends with the sender. One that waits for a dead disk is left
/// behind: it holds nothing but itself.
fn machine_thread(edge: EdgeId) -> std::io::Result<SyncSender<oneshot::Sender<Bytes>>> {
    let (requests, inbox) = sync_channel::<oneshot::Sender<Bytes>>(1);
    std::thread::Builder::new().name("host".to_owned()).spawn(move || {
        let mut machine = Machine::new(edge);
        while let Ok(answer) = inbox.recv() {
            // Nobody listens any more when the source stops meanwhile.
            let _ = answer.send(Bytes::from(machine.read().to_string()));
        }
    })?;
    Ok(requests)
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
    use std::time::Duration;

    use segment_log::{Options, Position};

    use super::*;
    use crate::config::Span;
    use crate::decode::Decoder;
    use crate::entry::Entry;
    use crate::journal::OpenJournal;

    #[test]
    fn every_reading_of_this_machine_decodes() {
        let payload = Bytes::from(Machine::new("gw".parse().unwrap()).read().to_string());
        let mut out = Vec::new();
        let decoding = crate::config::Decoding { map: map(), ..Default::default() };
        Decoder::new(&decoding, &stream_settings()).decode("", &payload, 1, &mut out);
        assert!(out.iter().all(Result::is_ok), "{out:?}");
        let machine = out[0].as_ref().unwrap();
        assert_eq!(machine.device, "gw");
        assert!(machine.values[6].is_some(), "memory");
    }

    #[tokio::test]
    async fn what_a_full_journal_missed_is_told_at_the_stop() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { segment_bytes: 8 << 10, max_bytes: 16 << 10, reserve_bytes: 64 };
        let open = OpenJournal::open(directory.path().join("journal"), options).unwrap().0;
        let mut reader = open.reader(Position(0)).unwrap();
        let journal = open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap();
        let mut filler = journal.sender();
        while !journal.is_full() {
            // Until it is full there is room in its queue.
            let _ = filler.try_append(&Entry::Forgotten { client: "x".repeat(200) });
            tokio::task::yield_now().await;
        }
        let settings =
            HostSettings { name: "h".into(), every: Span(Duration::from_secs(3_600)), stream: "host".parse().unwrap() };
        let (state, token) = (Arc::new(SourceState::default()), CancellationToken::new());
        let edge = "gw".parse().unwrap();
        let source = tokio::spawn(run(settings, edge, journal.sender(), Arc::clone(&state), token.clone()));
        while state.last_error.lock().is_none() {
            tokio::task::yield_now().await;
        }
        let mut entries = Vec::new();
        let mut read = || {
            let from = reader.position();
            while let Some(record) = reader.next().unwrap() {
                entries.push(Entry::read(Bytes::copy_from_slice(record.payload)).unwrap());
            }
            (from != reader.position()).then(|| journal.free_before(reader.position()));
        };
        // The next reading is an hour away: only the stop can tell it.
        while journal.is_full() {
            read();
            tokio::task::yield_now().await;
        }
        token.cancel();
        source.await.unwrap();
        read();
        let told = entries.iter().filter(|entry| matches!(entry, Entry::Missed { messages: 1, .. })).count();
        assert_eq!(told, 1, "{:?}", entries.last());
    }
}
