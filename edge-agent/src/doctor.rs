//! `edge-agent doctor`: one line for each thing that an agent needs, `ok` or `!!` and what to do.
//!
//! It changes nothing but a file of its own in the data directory, which it removes, and may run beside the agent: at a
//! broker it is a client of its own, of which the broker keeps nothing.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use reqwest::StatusCode;
use rustix::fs::{Access, access};
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream};

use crate::clock;
use crate::config::{
    ExecSettings, LaneSettings, ModbusAddress, ModbusSettings, MqttSettings, Settings, SourceSettings, TrustSettings,
};
use crate::source::mqtt::probe::{Heard, hear, reach};
use crate::trial::matches;

/// How long a topic may be silent.
const HEAR: Duration = Duration::from_secs(5);
/// A slower disk holds up every group of messages.
const SYNC_SLOW: Duration = Duration::from_millis(50);
const SYNCS: usize = 20;
/// Fewer are not enough for lanes, sources and callers.
const FILES_MIN: u64 = 1_024;
/// Messages that are looked at.
const MESSAGES_MAX: usize = 1_000;

/// A line, and whether it is good.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    pub good: bool,
    pub text: String,
}

fn ok(text: String) -> Line {
    Line { good: true, text }
}

fn bad(text: String) -> Line {
    Line { good: false, text }
}

/// All lines.
pub async fn examine(settings: &Settings) -> Vec<Line> {
    let mut lines = Vec::new();
    // All at once: each is heard for seconds.
    let brokers = settings.source.iter().filter_map(|source| match source {
        SourceSettings::Mqtt(mqtt) => Some(broker(settings, mqtt)),
        _ => None,
    });
    lines.extend(futures::future::join_all(brokers).await.into_iter().flatten());
    for source in &settings.source {
        lines.extend(match source {
            SourceSettings::File(file) => Some(match File::open(&file.path) {
                Ok(_) => ok(format!("source {}: {} can be read", file.name, file.path.display())),
                Err(error) => bad(format!("source {}: {}: {error}", file.name, file.path.display())),
            }),
            SourceSettings::Modbus(modbus) => Some(bus(modbus).await),
            SourceSettings::Exec(exec) => Some(program(exec)),
            SourceSettings::Http(http) => Some(door(settings, &format!("source {}", http.name), http.listen).await),
            SourceSettings::Mqtt(_) | SourceSettings::Host(_) => None,
        });
    }
    lines.push(door(settings, "admin", settings.admin.listen).await);
    lines.extend(publisher(settings).await);
    lines.extend(cloud(settings).await);
    lines.extend(clock(settings, kernel_clock::is_synchronised()));
    lines.extend(disk(settings));
    let files = getrlimit(Resource::Nofile).current;
    lines.push(match files {
        Some(files) if files < FILES_MIN => bad(format!(
            "files: only {files} may be open; set LimitNOFILE={FILES_MIN} in the unit, or `ulimit -n {FILES_MIN}`"
        )),
        Some(files) => ok(format!("files: {files} may be open")),
        None => ok("files: no limit".to_owned()),
    });
    lines
}

/// Whether somebody keeps the clock right; none when nobody is asked.
fn clock(settings: &Settings, is_synchronised: Option<bool>) -> Option<Line> {
    let wait = settings.clock.wait.0;
    match (settings.clock.trust, is_synchronised) {
        (TrustSettings::Always, _) => None,
        (_, Some(true)) => Some(ok("clock: the kernel calls it synchronised".to_owned())),
        (TrustSettings::Ntp, _) => Some(bad(format!(
            "clock: not synchronised, and clock.trust is \"ntp\": after each start all waits for {wait:?}; start NTP \
             (timedatectl set-ntp true)"
        ))),
        _ => Some(ok(format!(
            "clock: nobody keeps it right by NTP; at each start the cloud is asked, and all waits for its answer, {wait:?} at \
             most"
        ))),
    }
}

async fn broker(settings: &Settings, mqtt: &MqttSettings) -> Vec<Line> {
    let name = &mqtt.name;
    let client = format!("weir-{}-{name}-doctor", settings.edge.id);
    let Heard { subscribed, messages, retained, error } = hear(mqtt, &client, HEAR, MESSAGES_MAX).await;
    if !subscribed {
        let why = error.unwrap_or_default();
        return vec![bad(format!(
            "source {name}: {}: {why}; is the address right, are username and password?",
            mqtt.url
        ))];
    }
    let mut lines = vec![ok(format!("source {name}: {} takes our subscriptions", mqtt.url))];
    lines.extend(mqtt.topics.iter().map(|filter| topic(name, filter, &messages, &retained)));
    lines
}

fn topic(name: &str, filter: &str, messages: &[(String, Bytes)], retained: &[(String, Bytes)]) -> Line {
    let count = |heard: &[(String, Bytes)]| heard.iter().filter(|(topic, _)| matches(filter, topic)).count();
    match (count(messages), count(retained)) {
        (0, 0) => {
            bad(format!("source {name}: nothing on {filter} within {HEAR:?}; is the topic right, do devices send?"))
        }
        (0, kept) => bad(format!(
            "source {name}: on {filter} nothing but {kept} retained messages within {HEAR:?}, which tell what was; do \
             devices still send?"
        )),
        (count, _) => ok(format!("source {name}: {count} messages on {filter} within {HEAR:?}")),
    }
}

/// Whether it could be listened there; a running agent already does.
async fn door(settings: &Settings, what: &str, listen: SocketAddr) -> Line {
    match TcpListener::bind(listen).await {
        Ok(_) => ok(format!("{what}: {listen} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse && runs(settings).await => {
            ok(format!("{what}: {listen} is taken, and the agent runs"))
        }
        Err(error) if error.kind() == ErrorKind::AddrInUse => bad(format!(
            "{what}: {listen} is taken by another program (`ss -ltnp` says which); end it, or change `listen`"
        )),
        Err(error) => bad(format!("{what}: {listen}: {error}; is it an address of this machine?")),
    }
}

/// Whether the agent of this configuration answers.
async fn runs(settings: &Settings) -> bool {
    let ask = async {
        let answer = reqwest::get(format!("http://{}/status", settings.admin.listen)).await.ok()?;
        serde_json::from_slice::<serde_json::Value>(&answer.bytes().await.ok()?).ok()
    };
    let status = tokio::time::timeout(HEAR, ask).await.ok().flatten();
    status.is_some_and(|status| status["edge"] == settings.edge.id.as_str())
}

/// Whether something takes connections where the devices should be; no register is read, as the agent may be polling.
async fn bus(modbus: &ModbusSettings) -> Line {
    let name = &modbus.name;
    match &modbus.url {
        ModbusAddress::Tcp(address) => {
            let connected = tokio::time::timeout(modbus.timeout.0, TcpStream::connect(address)).await;
            match connected {
                Ok(Ok(_)) => ok(format!("source {name}: {address} takes connections")),
                Ok(Err(error)) => bad(format!("source {name}: {address}: {error}; is the address right, is it on?")),
                Err(_) => bad(format!("source {name}: {address} does not answer within {:?}", modbus.timeout.0)),
            }
        }
        // To open it would change the lines that the agent may be using.
        ModbusAddress::Rtu(path) => match access(path, Access::READ_OK | Access::WRITE_OK) {
            Ok(()) => ok(format!("source {name}: {} can be used", path.display())),
            Err(error) => bad(format!(
                "source {name}: {}: {error}; is it plugged in, is the agent's user in its group (dialout)?",
                path.display()
            )),
        },
    }
}

/// Whether the program is there and may be started.
fn program(exec: &ExecSettings) -> Line {
    let (name, program) = (&exec.name, Path::new(&exec.command[0]));
    let can_start = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    let found = if program.components().count() > 1 {
        let path = exec.directory.as_deref().map_or_else(|| program.to_owned(), |directory| directory.join(program));
        can_start(&path).then_some(path)
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| can_start(path))
    };
    match found {
        Some(path) => ok(format!("source {name}: {} can be started", path.display())),
        None => bad(format!(
            "source {name}: {} is no program that can be started; is it installed, is the path right?",
            program.display()
        )),
    }
}

/// The broker that gets alerts, where it is one of its own: that of a source was looked at.
async fn publisher(settings: &Settings) -> Option<Line> {
    settings.publish.as_ref()?.url.as_ref()?;
    let broker = match settings.publisher() {
        Ok(broker) => broker,
        Err(error) => return Some(bad(error)),
    };
    let client = format!("weir-{}-alerts-doctor", settings.edge.id);
    Some(match reach(&broker, &client, HEAR).await {
        Ok(()) => ok(format!("publish: {} takes us", broker.url)),
        Err(error) => {
            bad(format!("publish: {}: {error}; is the address right, are username and password?", broker.url))
        }
    })
}

async fn cloud(settings: &Settings) -> Vec<Line> {
    let mut lines = Vec::new();
    let spool = wire::SpoolId([0; 16]);
    for url in &settings.cloud.urls {
        let cloud = crate::config::CloudSettings { urls: vec![url.clone()], ..settings.cloud.clone() };
        let asked = match crate::uplink::http::CloudClient::new(&cloud, &settings.edge.id) {
            Ok(client) => client.look(spool).await,
            Err(error) => Err(error.to_string()),
        };
        let (status, date) = match asked {
            Ok(answer) => answer,
            Err(error) => {
                lines
                    .push(bad(format!("cloud {url}: {error}; is the address right, does the network let it through?")));
                continue;
            }
        };
        lines.push(match status {
            status if status.is_success() => {
                ok(format!("cloud {url}: it knows edge {} and its token", settings.edge.id))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => bad(format!(
                "cloud {url}: {status}; its [[edge]] must have id = \"{}\" and this token",
                settings.edge.id
            )),
            status => bad(format!("cloud {url}: {status}; is this the address of a Weir cloud?")),
        });
        let date = date.and_then(|date| chrono::DateTime::parse_from_rfc2822(&date).ok());
        if let Some(date) = date {
            let now = chrono::DateTime::<chrono::Utc>::from(SystemTime::now());
            let (skew, most) = (now.timestamp() - date.timestamp(), settings.clock.max_skew.0.as_secs());
            lines.push(match skew.unsigned_abs() <= most {
                true => ok(format!("clock: within {most} s of the cloud's")),
                false => bad(format!(
                    "clock: {} of the cloud's; start NTP (timedatectl set-ntp true)",
                    clock::ahead(skew as f64)
                )),
            });
        }
    }
    lines
}

fn disk(settings: &Settings) -> Vec<Line> {
    let data_dir = &settings.edge.data_dir;
    let shown = data_dir.display();
    let mut lines = Vec::new();
    match sync_times(data_dir) {
        Ok((median, longest)) if median > SYNC_SLOW => {
            lines.push(bad(format!("disk {shown}: a sync takes {median:?}, at most {longest:?}; use a faster disk, or a longer journal.group_wait")));
        }
        Ok((median, longest)) => lines.push(ok(format!("disk {shown}: a sync takes {median:?}, at most {longest:?}"))),
        Err(error) => lines.push(bad(format!("disk {shown}: {error}; make it, and give it to the agent's user"))),
    }
    let wanted = settings.journal.max_bytes.0 + settings.lanes().iter().map(LaneSettings::max_bytes).sum::<u64>();
    if let Ok(space) = rustix::fs::statvfs(data_dir) {
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let (free_mib, wanted_mib) = (free >> 20, wanted >> 20);
        lines.push(if free < wanted {
            bad(format!("space: {free_mib} MiB are free, journal and lanes may take {wanted_mib} MiB; free some, or lower max_bytes"))
        } else {
            ok(format!("space: {free_mib} MiB are free, journal and lanes may take {wanted_mib} MiB"))
        });
    }
    lines
}

/// The median and the longest of some syncs of a page.
fn sync_times(data_dir: &Path) -> std::io::Result<(Duration, Duration)> {
    let path = data_dir.join("doctor.tmp");
    let times = (|| -> std::io::Result<Vec<Duration>> {
        let mut file = File::create(&path)?;
        let mut times = Vec::new();
        for _ in 0..SYNCS {
            let started = Instant::now();
            file.write_all(&[0x5a; 4_096])?;
            file.sync_data()?;
            times.push(started.elapsed());
        }
        Ok(times)
    })();
    // Also after an error: nothing of it is needed.
    let _ = std::fs::remove_file(&path);
    let mut times = times?;
    times.sort();
    Ok((times[times.len() / 2], times[times.len() - 1]))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderMap;
    use axum::routing::get;

    use super::*;

    #[tokio::test]
    async fn devices_programs_and_the_broker_of_alerts_are_looked_at() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        let modbus = |url: &str| {
            format!(
                "[[source]]\nkind = \"modbus\"\nname = \"m\"\nurl = \"{url}\"\nstream = \"s\"\n[[source.unit]]\nid = 1\n\
                 device = \"d\"\n[[source.register]]\nfield = \"v\"\naddress = 1\n"
            )
        };
        let exec = |program: &str| {
            format!(
                "[[source]]\nkind = \"exec\"\nname = \"e\"\ncommand = [\"{program}\"]\nstream = \"s\"\n[source.map]\ndevice = \"const:d\"\nv = \"/v\"\n"
            )
        };
        let sources = async |sources: &[String]| {
            let text = format!(
                "[edge]\nid = \"e\"\ndata_dir = '/none'\n[cloud]\nurls = [\"http://127.0.0.1:1\"]\ntoken = \"t\"\n{}\
                 [stream.s.fields]\nv = {{ type = \"int64\" }}\n[publish]\nurl = \"mqtt://127.0.0.1:1\"\n",
                sources.concat()
            );
            rustls::crypto::ring::default_provider().install_default().ok();
            examine(&Settings::parse(&text).unwrap()).await
        };
        let lines = sources(&[modbus(&format!("tcp://{open}")), exec("sh")]).await;
        let is = |lines: &[Line], good: bool, text: &str| {
            let found = lines.iter().any(|line| line.good == good && line.text.contains(text));
            assert!(found, "{text}: {lines:?}");
        };
        is(&lines, true, "takes connections");
        is(&lines, true, "sh can be started");
        is(&lines, false, "publish: mqtt://127.0.0.1:1");
        let lines = sources(&[modbus("tcp://127.0.0.1:1"), exec("/none/program")]).await;
        is(&lines, false, "is it on?");
        is(&lines, false, "/none/program is no program");
        let lines = sources(&[modbus("rtu:///dev/none"), exec("no-such-program")]).await;
        is(&lines, false, "(dialout)");
        is(&lines, false, "no-such-program is no program");
    }

    #[test]
    fn what_a_broker_has_kept_does_not_pass_for_a_device_that_sends() {
        let heard =
            |topics: &[&str]| topics.iter().map(|topic| ((*topic).to_owned(), Bytes::new())).collect::<Vec<_>>();
        let line = |live: &[&str], kept: &[&str]| topic("s", "a/+", &heard(live), &heard(kept));
        assert!(line(&["a/1", "b/1"], &["a/2"]).text.contains("1 messages on a/+"));
        let kept = line(&["b/1"], &["a/1", "a/2"]);
        assert!(!kept.good && kept.text.contains("nothing but 2 retained"), "{kept:?}");
        assert!(!line(&["b/1"], &["b/1"]).good);
    }

    #[tokio::test]
    async fn a_door_is_free_or_it_is_said_who_has_it() {
        rustls::crypto::ring::default_provider().install_default().ok();
        let door_there = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin_there = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (listen, admin) = (door_there.local_addr().unwrap(), admin_there.local_addr().unwrap());
        let status = get(async || r#"{"edge":"e"}"#);
        tokio::spawn(async move { axum::serve(admin_there, axum::Router::new().route("/status", status)).await });
        let settings = |edge: &str| {
            let settings = Settings::parse(&format!(
                "[edge]\nid = \"{edge}\"\ndata_dir = '/none'\n[admin]\nlisten = \"{admin}\"\n[cloud]\nurls = [\"http://127.0.0.1:1\"]\n\
                 token = \"t\"\n[[source]]\nkind = \"http\"\nlisten = \"{listen}\"\nstream = \"s\"\n[source.map]\n\
                 device = \"const:d\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n"
            ));
            settings.unwrap()
        };
        let line_of = async |what: &str, edge: &str| {
            let mut lines = examine(&settings(edge)).await.into_iter();
            lines.find(|line| line.text.starts_with(what)).unwrap()
        };
        let line = async |edge: &str| line_of("source s: ", edge).await;
        let taken = line("e").await;
        assert!(taken.good && taken.text.contains("the agent runs"), "{taken:?}");
        assert!(line_of("admin: ", "e").await.good);
        for what in ["source s: ", "admin: "] {
            let taken = line_of(what, "another").await;
            assert!(!taken.good && taken.text.contains("by another program"), "{taken:?}");
        }
        drop(door_there);
        let free = line("e").await;
        assert!(free.good && free.text.contains("is free"), "{free:?}");
    }

    #[tokio::test]
    async fn what_is_wrong_is_told_with_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let app = axum::Router::new().route(
            "/v1/edges/{edge}/positions",
            get(async |headers: HeaderMap| {
                let right = headers.get("authorization").is_some_and(|token| token == "Bearer right");
                let status = if right { 200 } else { 401 };
                ([("date", "Sat, 21 Nov 2026 00:00:00 GMT")], axum::http::StatusCode::from_u16(status).unwrap())
            }),
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cloud = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await });
        let settings = |token: &str, data_dir: &Path| {
            Settings::parse(&format!(
                "[edge]\nid = \"e\"\ndata_dir = '{}'\n[cloud]\nurls = [\"http://{cloud}\"]\ntoken = \"{token}\"\n\
                 [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://127.0.0.1:1\"\ntopics = [\"#\"]\nstream = \"s\"\n[source.map]\n\
                 device = \"topic:0\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n",
                data_dir.display()
            ))
            .unwrap()
        };
        rustls::crypto::ring::default_provider().install_default().ok();
        let find = |lines: &[Line], text: &str| {
            let line = lines.iter().find(|line| line.text.contains(text));
            line.unwrap_or_else(|| panic!("{text}: {lines:?}")).good
        };
        let lines = examine(&settings("right", directory.path())).await;
        assert!(!find(&lines, "is the address right, are username"), "no broker is there");
        assert!(find(&lines, "it knows edge e and its token"));
        assert!(!find(&lines, "start NTP"), "the clock is that of another day");
        find(&lines, "a sync takes");
        assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none(), "its file is gone");
        let clock = |trust: &str, synchronised| {
            let text = format!("{}\n[clock]\ntrust = \"{trust}\"\n", settings("right", directory.path()).text);
            clock(&Settings::parse(&text).unwrap(), synchronised).map(|line| line.good)
        };
        assert_eq!((clock("ntp", Some(true)), clock("ntp", Some(false))), (Some(true), Some(false)));
        assert_eq!((clock("any", None), clock("always", Some(false))), (Some(true), None));
        let lines = examine(&settings("wrong", &directory.path().join("none"))).await;
        assert!(!find(&lines, "401"));
        assert!(!find(&lines, "make it, and give it"));
    }
}
