//! `weir cloud --config FILE`: ingest and SQL in one process.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use cloud_ingest::config::{
    DEFAULT_LANE, DoorName, ListenSettings, PublishKind, PublishSettings, ReaderRight, ReaderSettings,
    ViewPublishSettings, Way,
};
use cloud_ingest::{Cloud, CloudHandle, Settings};
use query::alerts::{Severity, TopicFilter};
use query::engine::VIEWS_LANE;
use query::links::LinkRoom;
use query::publish::target::{BrokerTls, TargetKind, TargetSettings};
use query::publish::views::{ViewTargetSettings, ViewTargets};
use query::serve::tls::Incoming;
use query::serve::{House, Reader, Readers};
use query::{Alerts, Engine, EngineSettings, LaneSettings, Links, Right, Scope, ViewSettings};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::broker::{self, BrokerPlace};
use crate::embedded::{Embedded, Running};
use crate::links::NodeCourier;
use crate::sink::NodeSink;
use crate::tables::NodeTables;

/// Where processors are short, rules and what takes rows get them before views, and views before readers (decision 0019): with
/// these a thread has 0.64 and 0.41 of what one of theirs has.
const VIEWS_NICE: i32 = 2;
const READERS_NICE: i32 = 4;

/// Arguments of `weir cloud`.
#[derive(Debug, clap::Args)]
pub(crate) struct CloudArguments {
    /// Configuration, as in configs/cloud.toml
    #[arg(long)]
    config: PathBuf,
}

/// A cloud that runs in this process.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) http: SocketAddr,
    pub(crate) postgres: SocketAddr,
    cloud: CloudHandle,
}

impl Node {
    /// Waits until it has stopped, after its token was cancelled: what is hot is committed.
    pub(crate) async fn stopped(self) {
        self.cloud.stopped().await;
    }
}

/// Runs until SIGINT or SIGTERM.
pub(crate) async fn cloud(arguments: CloudArguments) -> anyhow::Result<()> {
    let mut settings = Settings::load(&arguments.config)?;
    let directories = [&mut settings.alerts.directory, &mut settings.views.directory, &mut settings.links.directory];
    for directory in directories.into_iter().flatten() {
        // Beside the file that names it, from wherever it is started.
        *directory = arguments.config.parent().unwrap_or(Path::new("")).join(&*directory);
    }
    let agent = Embedded::prepare(&arguments.config, &mut settings)?;
    let token = CancellationToken::new();
    let node = start(settings, token.clone()).await?;
    // Whatever happens to the agent, what is hot is committed.
    let mut agent = match agent {
        None => None,
        Some(agent) => match agent.start(node.http).await {
            Ok(agent) => Some(agent),
            Err(error) => {
                token.cancel();
                node.stopped().await;
                return Err(error);
            }
        },
    };
    let ended = tokio::select! {
        signal = stop_signal() => {
            if let Some(agent) = agent {
                agent.stop().await;
            }
            signal
        }
        error = Running::ended(&mut agent) => Err(error),
        () = token.cancelled() => Err(anyhow::anyhow!("a part of the node has ended: the log says which")),
    };
    tracing::info!("stopping: what is hot is committed");
    token.cancel();
    node.stopped().await;
    ended
}

/// Starts ingest and the doors of SQL.
pub(crate) async fn start(settings: Settings, token: CancellationToken) -> anyhow::Result<Node> {
    let readers = readers(&settings)?;
    if !readers.are_set() {
        tracing::warn!("no [[reader]] is set: only callers on this machine may ask");
    }
    if settings.edge.is_empty() {
        tracing::warn!("no [[edge]] is set: nobody may write");
    }
    let spill = settings.data_dir.join("spill");
    let (listen, limits, alerts) = (settings.listen.clone(), limits(&settings, &spill), alert_settings(&settings)?);
    let (links, broker) = (link_room(&settings), broker_place(&settings)?);
    let certificate = |door: DoorName| certificate(&listen, door);
    let (kept, of_views) = (views(&settings), view_targets(&settings)?);
    let cloud = Cloud::open(settings).await.context("start the cloud")?;
    let catalogue = cloud.catalogue();
    let tables = Arc::new(NodeTables(Arc::clone(&catalogue), cloud.remarks(), cloud.metrics()));
    let sink = Arc::new(NodeSink(cloud.writer()));
    if let Some(place) = broker {
        tokio::task::spawn_blocking(|| broker::start(place)).await.context("start the broker")??;
    }
    // The directory is this node's alone since its log is open.
    empty(&spill)?;
    let engine = Arc::new(Engine::new(tables, limits).context("start the engine")?);
    engine
        .keep_views(Arc::clone(&sink) as _, kept, token.clone())
        .map_err(anyhow::Error::msg)
        .context("start the views")?;
    let named = Arc::downgrade(&engine);
    catalogue.own_names().set(move |stream| named.upgrade().is_some_and(|engine| engine.is_of_a_view(stream)));
    // Rules that are wrong end it before any port opens.
    let alerts = Alerts::start(Arc::clone(&engine), Arc::clone(&sink) as _, alerts, token.clone());
    let alerts = alerts.map_err(anyhow::Error::msg)?;
    let courier = Arc::new(NodeCourier(cloud.commands()));
    let of_views = ViewTargets::start(&engine, &(Arc::clone(&sink) as _), of_views, &token);
    let links = Links::start(Arc::clone(&engine), sink, &alerts, courier, links, token.clone());
    let links = links.map_err(anyhow::Error::msg).context("start the links")?;
    let counted = Arc::clone(&links);
    cloud.metrics().host(move || counted.metrics());
    let counted = Arc::clone(&alerts);
    cloud.metrics().host(move || counted.metrics());
    let house = |door, connections_max| {
        let (engine, readers) = (Arc::clone(&engine), readers.clone());
        anyhow::Ok(House { engine, readers, tls: certificate(door)?, connections_max })
    };

    let address = listen.postgres;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address} for Postgres"))?;
    let postgres = listener.local_addr()?;
    let door =
        query::serve::postgres::serve(listener, house(DoorName::Postgres, listen.postgres_connections)?, token.clone());
    tokio::spawn(async move {
        if let Err(error) = door.await {
            tracing::error!(%error, "the postgres door ended");
        }
    });
    let address = listen.flight_sql;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address} for Flight SQL"))?;
    let flight_sql = listener.local_addr()?;
    let door = query::serve::flight_sql::serve(
        listener,
        house(DoorName::FlightSql, listen.flight_sql_connections)?,
        token.clone(),
    );
    tokio::spawn(async move {
        if let Err(error) = door.await {
            tracing::error!(error = %format!("{:#}", anyhow::Error::new(error)), "the Flight SQL door ended");
        }
    });
    tracing::info!(%postgres, %flight_sql, "psql and ADBC may connect");

    let address = listen.http;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address} for HTTP"))?;
    let tls = certificate(DoorName::Http)?.map(|tls| query::serve::tls::speaking(&tls, "http/1.1"));
    let incoming = Incoming::new(listener, tls, listen.http_connections)?;
    let questions = query::serve::http::router(Arc::clone(&engine), readers.clone())
        .merge(query::serve::views::router(engine, of_views, readers.clone(), token.clone()))
        .merge(query::serve::links::router(links, readers.clone()))
        .merge(query::serve::alerts::router(alerts, readers));
    let cloud = cloud.listen(incoming, questions, token)?;
    tracing::info!(http = %cloud.http, "ready");
    Ok(Node { http: cloud.http, postgres, cloud })
}

/// Makes the directory, without what a process that was killed has left there.
fn empty(directory: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("empty {}", directory.display()))
        }
        _ => std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display())),
    }
}

fn readers(settings: &Settings) -> anyhow::Result<Readers> {
    let reader = |reader: &ReaderSettings| {
        let limited = reader.edges.is_some() || reader.scope.is_some();
        let scope = Scope::new(reader.edges.clone(), reader.scope.clone());
        let scope = scope.map_err(|error| anyhow::anyhow!("[[reader]] `{}`: {error}", reader.name))?;
        Ok(Reader {
            name: reader.name.clone(),
            password: reader.password.clone(),
            scope: limited.then(|| Arc::new(scope)),
            lanes: reader.lanes.clone().into(),
            rights: reader.rights.iter().copied().map(right).collect(),
        })
    };
    let readers = settings.reader.iter().map(reader).collect::<anyhow::Result<_>>()?;
    // Who asks without a name may use every lane.
    let others = settings.query.lane.iter().map(|lane| lane.name.clone()).filter(|name| name != DEFAULT_LANE);
    Ok(Readers::new(readers, std::iter::once(DEFAULT_LANE.to_owned()).chain(others).collect()))
}

fn right(right: ReaderRight) -> Right {
    match right {
        ReaderRight::Comment => Right::Comment,
        ReaderRight::Views => Right::Views,
        ReaderRight::Rules => Right::Rules,
        ReaderRight::Alerts => Right::Alerts,
        ReaderRight::Links => Right::Links,
    }
}

/// What `[broker]` says, and who may come in.
fn broker_place(settings: &Settings) -> anyhow::Result<Option<BrokerPlace>> {
    let Some(broker) = &settings.broker else { return Ok(None) };
    // Whoever is in hears everything.
    let sees_all = |reader: &&ReaderSettings| reader.edges.is_none() && reader.scope.is_none();
    let readers = settings.reader.iter().filter(sees_all).map(|reader| (reader.name.clone(), reader.password.clone()));
    let mut guests = HashMap::new();
    for (name, password) in settings.edge.iter().map(|edge| (edge.id.to_string(), edge.token.clone())).chain(readers) {
        anyhow::ensure!(
            guests.insert(name.clone(), password).is_none(),
            "[broker]: an [[edge]] and a [[reader]] are both called `{name}`: one needs another name"
        );
    }
    anyhow::ensure!(!guests.is_empty(), "[broker]: there is no [[edge]] and no [[reader]] who could come in");
    for listen in std::iter::once(broker.listen).chain(broker.listen_v4) {
        if !listen.ip().is_loopback() {
            tracing::warn!(%listen, "[broker] carries passwords in the clear: only in a network that is trusted");
        }
    }
    Ok(Some(BrokerPlace {
        name: "site",
        listen: broker.listen,
        listen_v4: broker.listen_v4,
        guests: Some(guests),
        connections_max: broker.connections,
    }))
}

/// What `[links]` says, and where links may lead.
fn link_room(settings: &Settings) -> LinkRoom {
    let targets = settings.alerts.publish.iter().filter(|target| target.kind == PublishKind::Webhook);
    LinkRoom {
        data_dir: settings.data_dir.clone(),
        directory: settings.links.directory.clone(),
        webhooks: targets.map(|target| target.name.clone()).collect(),
    }
}

/// What `[alerts]` says, as the room wants it.
fn alert_settings(settings: &Settings) -> anyhow::Result<query::alerts::AlertSettings> {
    let of = &settings.alerts;
    let target = |target: &PublishSettings| {
        let here = || format!("[[alerts.publish]] `{}`", target.name);
        let kind = target_kind(&target.way(), &target.name).with_context(here)?;
        let topic = TopicFilter::parse(&target.topic).map_err(anyhow::Error::msg).with_context(here)?;
        let severities = target.severity.iter().map(|word| {
            Severity::of(word)
                .with_context(|| format!("{}: severity `{word}` is none of info, warning, critical", here()))
        });
        let severities = severities.collect::<anyhow::Result<_>>()?;
        Ok(TargetSettings { name: target.name.clone(), kind, topic, severities, max_age: target.max_age.0 })
    };
    Ok(query::alerts::AlertSettings {
        data_dir: settings.data_dir.clone(),
        directory: of.directory.clone(),
        horizon: of.horizon.0,
        late_max: of.late_max.0,
        late_rows_max: of.late_rows_max,
        stale_after: of.stale_after.0,
        devices_max: of.devices_max,
        subscribers_max: of.subscribers_max.unwrap_or(settings.listen.http_connections.div_ceil(2)),
        targets: of.publish.iter().map(target).collect::<anyhow::Result<_>>()?,
    })
}

/// What `[[views.publish]]` says.
fn view_targets(settings: &Settings) -> anyhow::Result<Vec<ViewTargetSettings>> {
    let target = |target: &ViewPublishSettings| {
        let here = || format!("[[views.publish]] `{}`", target.name);
        let kind = target_kind(&target.way(), &target.name).with_context(here)?;
        let topic = target.topic.clone().unwrap_or_else(|| format!("views/{}", target.view));
        Ok(ViewTargetSettings { name: target.name.clone(), view: target.view.clone(), kind, topic })
    };
    settings.views.publish.iter().map(target).collect()
}

/// How somebody of this name is reached.
fn target_kind(way: &Way<'_>, name: &str) -> anyhow::Result<TargetKind> {
    let Way { url, timeout, attempts, .. } = *way;
    let (url, secret) = (url.clone(), way.secret.map(str::to_owned));
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("read {}", path.display()));
    Ok(match way.kind {
        PublishKind::Webhook => TargetKind::Webhook { url, secret, timeout, attempts },
        PublishKind::Alertmanager => TargetKind::Alertmanager { url, timeout, attempts },
        PublishKind::Mqtt => {
            let is_tls = url.scheme() == "mqtts";
            let own = way.cert_file.zip(way.key_file).map(|(cert, key)| anyhow::Ok((read(cert)?, read(key)?)));
            let tls = BrokerTls { ca: way.ca_file.map(read).transpose()?, own: own.transpose()? };
            TargetKind::Mqtt {
                host: url.host_str().context("its url has no host")?.trim_matches(['[', ']']).to_owned(),
                port: url.port().unwrap_or(if is_tls { 8883 } else { 1883 }),
                tls: is_tls.then_some(tls),
                client_id: way.client_id.map_or_else(|| format!("weir-{name}"), str::to_owned),
                username: way.username.map(str::to_owned),
                password: way.password.map(str::to_owned),
                attempts,
            }
        }
    })
}

fn limits(settings: &Settings, spill: &Path) -> EngineSettings {
    let of_all = &settings.query;
    let mut lanes = of_all.lane.clone();
    if !lanes.iter().any(|lane| lane.name == DEFAULT_LANE) {
        lanes.push(cloud_ingest::config::LaneSettings::default_lane());
    }
    // Rules ask in a lane of their own, so that no reader holds them up, nor they a reader. Two are asked at a time: the other
    // places are for rules that are being understood.
    if !lanes.iter().any(|lane| lane.name == query::alerts::LANE) {
        let mut own = cloud_ingest::config::LaneSettings::default_lane();
        (own.name, own.running, own.threads) = (query::alerts::LANE.to_owned(), 4, Some(1));
        lanes.push(own);
    }
    let (of_pressure, max_bytes) = (&settings.pressure, of_all.max_bytes.bytes());
    let all_but = |kept: f64| max_bytes - (max_bytes as f64 * kept) as usize;
    let (for_readers, for_views) = (all_but(of_pressure.alerts + of_pressure.views), all_but(of_pressure.alerts));
    let lane = |lane: cloud_ingest::config::LaneSettings| {
        let (usual, is_of_rules) = (LaneSettings::default(), lane.name == query::alerts::LANE);
        LaneSettings {
            name: lane.name,
            running: lane.running,
            waiting: lane.waiting,
            timeout: lane.timeout.unwrap_or(of_all.timeout).0,
            memory_bytes_max: lane.statement_bytes.unwrap_or(of_all.statement_bytes).bytes(),
            common_bytes_max: if is_of_rules { max_bytes } else { for_readers },
            threads: lane.threads.unwrap_or(usual.threads),
            nice: if is_of_rules { 0 } else { READERS_NICE },
        }
    };
    let views = &settings.views;
    let lanes = lanes.into_iter().map(lane).chain([LaneSettings {
        name: VIEWS_LANE.to_owned(),
        running: views.running,
        // Each view asks one question at a time, and so does who follows one.
        waiting: views.max.max(views.running) + views.publish.len(),
        timeout: views.timeout.0,
        memory_bytes_max: views.statement_bytes.bytes(),
        common_bytes_max: for_views,
        threads: views.threads,
        nice: VIEWS_NICE,
    }]);
    EngineSettings {
        memory_bytes_max: of_all.max_bytes.bytes(),
        spill_bytes_max: of_all.spill_bytes.0,
        spill_directory: Some(spill.to_owned()),
        result_rows_max: of_all.result_rows,
        result_bytes_max: of_all.result_bytes.0,
        json_rows_max: of_all.json_rows,
        gapfill_rows_max: of_all.gapfill_rows,
        latest_bytes_max: of_all.latest_memory.bytes(),
        recent_max: of_all.recent,
        lanes: lanes.collect(),
    }
}

/// What views may take, and where their definitions are.
fn views(settings: &Settings) -> ViewSettings {
    let views = &settings.views;
    ViewSettings {
        kept: settings.data_dir.join("views"),
        directory: views.directory.clone(),
        pause: views.pause.0,
        count_max: views.max,
        definition_bytes_max: views.definition_bytes.bytes(),
        answer_rows_max: views.answer_rows,
        answer_bytes_max: views.answer_bytes.bytes(),
        windows_max: views.windows,
        record_every: views.record_every.0,
    }
}

/// The certificate of a door, when it has one.
fn certificate(listen: &ListenSettings, door: DoorName) -> anyhow::Result<Option<Arc<rustls::ServerConfig>>> {
    let Some(tls) = listen.tls.as_ref().filter(|tls| tls.doors.contains(&door)) else {
        return Ok(None);
    };
    query::serve::tls::load(&tls.certificate, &tls.key).map(Some).map_err(anyhow::Error::msg).context("[listen.tls]")
}

/// Returns at SIGINT or SIGTERM.
pub(crate) async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        _ = term.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted.context("listen for SIGINT")?,
    }
    Ok(())
}
