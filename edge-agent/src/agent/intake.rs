//! The agent's sources: one task for each connection, one for each client id that is no longer configured, the doors, and the
//! ticks. With another configuration only what it changes is stopped and begun: a source whose messages come in as before
//! runs through.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use super::AtEnd;
use crate::config::{ModbusSettings, MqttSettings, Settings, SourceSettings};
use crate::journal::Journal;
use crate::places::Places;
use crate::redelivery::{self, Lists};
use crate::source::exec::Exec;
use crate::source::file::Follow;
use crate::source::http::{self, Door, Push};
use crate::source::modbus::Poll;
use crate::source::mqtt::{Connection, Task};
use crate::source::{SourceState, host, tick};

/// One thing that runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Source(String),
    /// A client id that is no longer configured.
    Drain(String),
    Door(SocketAddr),
    Ticks,
}

#[derive(Debug)]
struct Running {
    token: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// What runs. It ends by its token, or with the journal.
#[derive(Debug)]
pub(super) struct Intake {
    token: CancellationToken,
    /// What runs goes by these.
    settings: Settings,
    running: BTreeMap<Key, Running>,
    doors: BTreeMap<SocketAddr, Arc<Door>>,
    connections: http::Places,
}

impl Intake {
    /// Nothing yet.
    pub(super) fn new(settings: Settings, token: CancellationToken) -> Self {
        Self { token, settings, running: BTreeMap::new(), doors: BTreeMap::new(), connections: http::Places::default() }
    }

    /// Stops what does not run on unchanged by other settings, and waits for it: when this returns, the journal has been
    /// given all that it gives.
    pub(super) async fn stop_what_changes(&mut self, next: &Settings) {
        for source in &self.settings.source {
            if let SourceSettings::Http(http) = source
                && !runs_on(source, &self.settings, next)
                && let Some(door) = self.doors.get(&http.listen)
                && !door.remove(&http.name)
                && !next.source.iter().any(|other| matches!(other, SourceSettings::Http(o) if o.listen == http.listen))
            {
                self.doors.remove(&http.listen);
            }
        }
        let clients = mqtt_clients(next).collect::<Vec<_>>();
        let stays = |key: &Key| match key {
            Key::Source(name) => {
                let source = self.settings.source.iter().find(|source| source.name() == name);
                source.is_some_and(|source| runs_on(source, &self.settings, next))
            }
            Key::Drain(client) => !clients.contains(client),
            Key::Door(listen) => self.doors.contains_key(listen),
            Key::Ticks => self.settings.tick_every() == next.tick_every(),
        };
        let gone = self.running.keys().filter(|key| !stays(key)).cloned().collect::<Vec<_>>();
        let gone = gone.iter().filter_map(|key| self.running.remove(key)).collect::<Vec<_>>();
        gone.iter().for_each(|running| running.token.cancel());
        for task in gone.into_iter().flat_map(|running| running.tasks) {
            ended(task.await);
        }
    }

    /// Starts all of these settings that does not run.
    pub(super) fn start(
        &mut self,
        settings: &Settings,
        journal: &Journal,
        at_end: AtEnd,
        states: &[(String, Arc<SourceState>)],
    ) {
        self.settings = settings.clone();
        let AtEnd { mut lists, places, .. } = at_end;
        for (source, (_, state)) in settings.source.iter().zip(states) {
            let key = Key::Source(source.name().to_owned());
            if !self.running.contains_key(&key) {
                let running = self.begin(source, settings, journal, (&mut lists, &places), Arc::clone(state));
                self.running.insert(key, running);
            }
        }
        if let Some(every) = settings.tick_every()
            && !self.running.contains_key(&Key::Ticks)
        {
            let token = self.token.child_token();
            let tasks = vec![tokio::spawn(tick::run(every, journal.sender(), token.clone()))];
            self.running.insert(Key::Ticks, Running { token, tasks });
        }
        // Those of sources that run on.
        mqtt_clients(settings).for_each(|client| drop(lists.0.remove(&client)));
        for (client, known) in lists.0 {
            let key = Key::Drain(client.clone());
            if !self.running.contains_key(&key)
                && let Some(running) = self.drain(client, known, settings, journal, states)
            {
                self.running.insert(key, running);
            }
        }
    }

    /// Stops all, and waits for it.
    pub(super) async fn stop(self) {
        self.token.cancel();
        for task in self.running.into_values().flat_map(|running| running.tasks) {
            ended(task.await);
        }
    }

    fn begin(
        &mut self,
        source: &SourceSettings,
        settings: &Settings,
        journal: &Journal,
        (lists, places): (&mut Lists, &Places),
        state: Arc<SourceState>,
    ) -> Running {
        let token = self.token.child_token();
        let (ends, sender) = (token.clone(), journal.sender());
        let tasks = match source {
            SourceSettings::Host(host) => {
                vec![tokio::spawn(host::run(host.clone(), settings.edge.id.clone(), sender, state, ends))]
            }
            SourceSettings::Exec(exec) => {
                vec![tokio::spawn(Exec { settings: (**exec).clone(), journal: sender, state }.run(ends))]
            }
            SourceSettings::Modbus(modbus) => {
                let marks = marks(modbus, settings);
                vec![tokio::spawn(Poll { settings: (**modbus).clone(), marks, journal: sender, state }.run(ends))]
            }
            SourceSettings::File(file) => {
                let (settings, place) = ((**file).clone(), places.0.get(&file.name).copied());
                vec![tokio::spawn(Follow { settings, journal: sender, state, place }.run(ends))]
            }
            SourceSettings::Http(http) => {
                self.door(http.listen).put(Push { settings: (**http).clone(), journal: sender, state });
                Vec::new()
            }
            SourceSettings::Mqtt(mqtt) => {
                let connection = |index| {
                    let client = mqtt.client(&settings.edge.id, index);
                    let known = lists.0.remove(&client).unwrap_or_default();
                    let (settings, journal, state) = ((**mqtt).clone(), journal.sender(), Arc::clone(&state));
                    let connection = Connection { settings, client, journal, known, state, task: Task::Collect };
                    tokio::spawn(run(connection, ends.clone()))
                };
                (0..mqtt.connections).map(connection).collect()
            }
        };
        Running { token, tasks }
    }

    fn door(&mut self, listen: SocketAddr) -> Arc<Door> {
        if let Some(door) = self.doors.get(&listen) {
            return Arc::clone(door);
        }
        let (door, token) = (Arc::new(Door::new(self.connections.clone())), self.token.child_token());
        let tasks = vec![tokio::spawn(Arc::clone(&door).run(listen, token.clone()))];
        self.doors.insert(listen, Arc::clone(&door));
        self.running.insert(Key::Door(listen), Running { token, tasks });
        door
    }

    fn drain(
        &self,
        client: String,
        known: redelivery::Client,
        settings: &Settings,
        journal: &Journal,
        states: &[(String, Arc<SourceState>)],
    ) -> Option<Running> {
        let Some(mqtt) = same_broker(settings, &known.source) else {
            tracing::warn!(client, source = known.source, "its broker is not configured any more: it is not drained");
            return None;
        };
        tracing::info!(client, "is no longer configured: what the broker holds for it is taken");
        let settings = MqttSettings { name: known.source.clone(), ..mqtt.clone() };
        // Its messages count for the source that they belonged to.
        let state = states.iter().find(|(name, _)| *name == known.source).map(|(_, state)| Arc::clone(state));
        let (state, journal, token) = (state.unwrap_or_default(), journal.sender(), self.token.child_token());
        let connection = Connection { settings, client, journal, known, state, task: Task::Drain };
        let tasks = vec![tokio::spawn(run(connection, token.clone()))];
        Some(Running { token, tasks })
    }
}

async fn run(connection: Connection, token: CancellationToken) {
    let (client, state) = (connection.client.clone(), Arc::clone(&connection.state));
    if let Err(error) = connection.run(token).await {
        tracing::error!(%client, %error, "the source does not run");
        *state.last_error.lock() = Some(error.to_string());
    }
}

fn ended(result: Result<(), JoinError>) {
    if let Err(error) = result {
        tracing::error!(%error, "a source ended in a way that it should not");
    }
}

/// Whether a source of the settings goes on under others as it is.
fn runs_on(source: &SourceSettings, settings: &Settings, next: &Settings) -> bool {
    let Some(other) = next.source.iter().find(|other| other.name() == source.name()) else { return false };
    let same_marks = match (source, other) {
        (SourceSettings::Modbus(one), SourceSettings::Modbus(two)) => marks(one, settings) == marks(two, next),
        _ => true,
    };
    source.comes_in_like(other) && same_marks
}

fn marks(modbus: &ModbusSettings, settings: &Settings) -> bool {
    settings.stream.get(&modbus.stream).is_some_and(ModbusSettings::marks)
}

fn mqtt_clients(settings: &Settings) -> impl Iterator<Item = String> {
    let mqtt = settings.source.iter().filter_map(|source| match source {
        SourceSettings::Mqtt(mqtt) => Some(mqtt),
        _ => None,
    });
    mqtt.flat_map(|mqtt| (0..mqtt.connections).map(|index| mqtt.client(&settings.edge.id, index)))
}

/// The broker of a client that is no longer configured: that of the source that it belonged to, or the only one.
fn same_broker<'a>(settings: &'a Settings, source: &str) -> Option<&'a MqttSettings> {
    let mqtt = settings.source.iter().filter_map(|source| match source {
        SourceSettings::Mqtt(mqtt) => Some(&**mqtt),
        _ => None,
    });
    let mqtt = mqtt.collect::<Vec<_>>();
    let named = mqtt.iter().find(|mqtt| mqtt.name == source).copied();
    let one = mqtt.first().filter(|first| mqtt.iter().all(|other| other.url == first.url)).copied();
    named.or(one)
}
