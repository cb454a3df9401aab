//! The agent's sources, begun: one task for each connection, and one for each client id that is no longer configured.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::AtEnd;
use crate::config::{ModbusSettings, MqttSettings, Settings, SourceSettings};
use crate::journal::Journal;
use crate::source::exec::Exec;
use crate::source::file::Follow;
use crate::source::modbus::Poll;
use crate::source::mqtt::{Connection, Task};
use crate::source::{SourceState, host, http, tick};

/// Starts every source of the settings; the tasks end with the token, or with the journal.
pub(super) fn start_sources(
    settings: &Settings,
    journal: &Journal,
    at_end: AtEnd,
    states: &[(String, Arc<SourceState>)],
    token: &CancellationToken,
) -> JoinSet<()> {
    let AtEnd { mut lists, places, .. } = at_end;
    let mut tasks = JoinSet::new();
    let edge = &settings.edge.id;
    let connect = |tasks: &mut JoinSet<()>, connection: Connection| {
        let token = token.clone();
        tasks.spawn(async move {
            let (client, state) = (connection.client.clone(), Arc::clone(&connection.state));
            if let Err(error) = connection.run(token).await {
                tracing::error!(%client, %error, "the source does not run");
                *state.last_error.lock() = Some(error.to_string());
            }
        });
    };
    let mut doors = BTreeMap::<SocketAddr, Vec<http::Push>>::new();
    for (source, (_, state)) in settings.source.iter().zip(states) {
        match source {
            SourceSettings::Host(host) => {
                let (host, state, token) = (host.clone(), Arc::clone(state), token.clone());
                tasks.spawn(host::run(host, edge.clone(), journal.sender(), state, token));
            }
            SourceSettings::Exec(exec) => {
                let (settings, state, token) = ((**exec).clone(), Arc::clone(state), token.clone());
                tasks.spawn(Exec { settings, journal: journal.sender(), state }.run(token));
            }
            SourceSettings::Modbus(modbus) => {
                let (state, token) = (Arc::clone(state), token.clone());
                let marks = settings.stream.get(&modbus.stream).is_some_and(ModbusSettings::marks);
                let poll = Poll { settings: (**modbus).clone(), marks, journal: journal.sender(), state };
                tasks.spawn(poll.run(token));
            }
            SourceSettings::File(file) => {
                let (settings, state, token) = ((**file).clone(), Arc::clone(state), token.clone());
                let place = places.0.get(&file.name).copied();
                tasks.spawn(Follow { settings, journal: journal.sender(), state, place }.run(token));
            }
            SourceSettings::Http(http) => {
                let (settings, state) = ((**http).clone(), Arc::clone(state));
                doors.entry(http.listen).or_default().push(http::Push { settings, journal: journal.sender(), state });
            }
            SourceSettings::Mqtt(mqtt) => {
                for index in 0..mqtt.connections {
                    let client = mqtt.client(edge, index);
                    let known = lists.0.remove(&client).unwrap_or_default();
                    let (settings, state) = ((**mqtt).clone(), Arc::clone(state));
                    connect(
                        &mut tasks,
                        Connection { settings, client, journal: journal.sender(), known, state, task: Task::Collect },
                    );
                }
            }
        }
    }
    for (listen, pushes) in doors {
        tasks.spawn(http::run(listen, pushes, token.clone()));
    }
    if let Some(every) = settings.tick_every() {
        tasks.spawn(tick::run(every, journal.sender(), token.clone()));
    }
    // What is left belongs to clients that are not configured any more.
    for (client, known) in lists.0 {
        let Some(mqtt) = same_broker(settings, &known.source) else {
            tracing::warn!(client, source = known.source, "its broker is not configured any more: it is not drained");
            continue;
        };
        tracing::info!(client, "is no longer configured: what the broker holds for it is taken");
        let settings = MqttSettings { name: known.source.clone(), ..mqtt.clone() };
        // Its messages count for the source that they belonged to.
        let state = states.iter().find(|(name, _)| *name == known.source).map(|(_, state)| Arc::clone(state));
        let state = state.unwrap_or_default();
        connect(
            &mut tasks,
            Connection { settings, client, journal: journal.sender(), known, state, task: Task::Drain },
        );
    }
    tasks
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
