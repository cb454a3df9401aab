//! The command line of the agent, for its own binary and for `weir edge`.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::agent;
use crate::config::{OnFull, Settings, SourceSettings};
use crate::discover::{self, DiscoverArguments};
use crate::notify::Notifier;
use crate::offline::{self, SpoolCommand};
use crate::{doctor, profile, source, trial};

/// What the agent is asked to do.
#[derive(Debug, clap::Subcommand)]
pub enum EdgeCommand {
    /// Collect until SIGINT or SIGTERM; on SIGHUP, or when the file changes, take over the configuration
    Run(ConfigArguments),
    /// Read the configuration, say what it means, and end
    Check(ConfigArguments),
    /// Show what becomes of one message: readings, checks, windows, or why it goes to quarantine
    Try(TryArguments),
    /// Read history and propose checks, as TOML to paste
    Profile(ProfileArguments),
    /// Try what the agent needs: brokers, topics, cloud, clock, disk, limits; one line each
    Doctor(ConfigArguments),
    /// Hear a broker, and write a configuration to begin with
    Discover(DiscoverArguments),
    /// Look at the data directory of a stopped agent: status, verify, repair, export
    Spool {
        #[command(subcommand)]
        command: SpoolCommand,
        /// Configuration, as in configs/edge.toml
        #[arg(long, global = true, default_value = "edge.toml")]
        config: PathBuf,
    },
}

/// Arguments of `profile`.
#[derive(Debug, clap::Args)]
pub struct ProfileArguments {
    /// Configuration with a source that says how a row is read
    #[arg(long)]
    config: PathBuf,
    /// History: a CSV with a header, or a message on each line; .gz or not
    #[arg(long)]
    file: PathBuf,
    /// The source whose mapping is meant, when it is not the first
    #[arg(long)]
    source: Option<String>,
    /// The topic of each row, with columns in braces: 'city/traffic/{REPORT_ID}'
    #[arg(long)]
    topic: Option<String>,
}

/// Arguments of both.
#[derive(Debug, clap::Args)]
pub struct ConfigArguments {
    /// Configuration, as in configs/edge.toml
    #[arg(long)]
    config: PathBuf,
}

/// Arguments of `try`.
#[derive(Debug, clap::Args)]
pub struct TryArguments {
    /// Configuration, as in configs/edge.toml
    #[arg(long)]
    config: PathBuf,
    /// File with the payload of one message; - reads it from the standard input
    #[arg(long)]
    message: PathBuf,
    /// Topic that it came with; only MQTT sources that subscribe to it are tried
    #[arg(long)]
    topic: Option<String>,
    /// Only the source of this name
    #[arg(long)]
    source: Option<String>,
}

/// Does it.
///
/// # Errors
/// When the configuration is wrong, or the agent does not start or stops by itself.
pub async fn execute(command: EdgeCommand) -> anyhow::Result<()> {
    match command {
        EdgeCommand::Run(arguments) => {
            let settings = Settings::load(&arguments.config)?;
            settings.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
            let stop_within = settings.edge.stop_within.0;
            let token = CancellationToken::new();
            let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
            let handle = agent::start(settings, token.clone()).await.context("start the agent")?;
            let reload = handle.reload();
            tokio::spawn(async move {
                while hangup.recv().await.is_some() {
                    reload.notify_one();
                }
            });
            let (systemd, beats) = (Notifier::from_environment(), handle.beats());
            systemd.iter().for_each(Notifier::ready);
            let watch = async {
                match &systemd {
                    Some(systemd) => systemd.watch(beats).await,
                    None => std::future::pending().await,
                }
            };
            let mut stopped = std::pin::pin!(handle.stopped());
            tokio::select! {
                result = &mut stopped => return result.context("the agent stopped by itself"),
                signal = stop_signal() => signal?,
                never = watch => match never {},
            }
            systemd.iter().for_each(Notifier::stopping);
            tracing::info!("stopping: what came in goes to the spool");
            token.cancel();
            tokio::time::timeout(stop_within, stopped)
                .await
                .context("stop in time; the next start goes on from disk")??;
            Ok(())
        }
        EdgeCommand::Doctor(arguments) => {
            let settings = Settings::load(&arguments.config)?;
            let lines = doctor::examine(&settings).await;
            let mark = match std::io::stdout().is_terminal() {
                true => ["\x1b[31m!!\x1b[0m", "\x1b[32mok\x1b[0m"],
                false => ["!!", "ok"],
            };
            lines.iter().for_each(|line| say(&format!("{} {}", mark[usize::from(line.good)], line.text)));
            let bad = lines.iter().filter(|line| !line.good).count();
            anyhow::ensure!(bad == 0, "{bad} of {} lines say what to do", lines.len());
            Ok(())
        }
        EdgeCommand::Discover(arguments) => {
            say(&discover::discover(&arguments).await?);
            Ok(())
        }
        EdgeCommand::Spool { command, config } => {
            let settings = Settings::load(&config)?;
            let answer = tokio::task::spawn_blocking(move || offline::execute(&command, &settings)).await??;
            say(&answer.text);
            answer.failed.map_or(Ok(()), |failed| Err(anyhow::anyhow!(failed)))
        }
        EdgeCommand::Check(arguments) => {
            let settings = Settings::load(&arguments.config)?;
            say(&describe(&settings));
            Ok(())
        }
        EdgeCommand::Try(arguments) => {
            let settings = Settings::load(&arguments.config)?;
            let mut payload = Vec::new();
            if arguments.message.as_os_str() == "-" {
                std::io::stdin().read_to_end(&mut payload).context("read the message")?;
            } else {
                payload = std::fs::read(&arguments.message).context("read the message")?;
            }
            let (topic, source) = (arguments.topic.as_deref(), arguments.source.as_deref());
            let shown = trial::explain(&settings, source, topic, payload.into(), source::now_us());
            say(&shown.map_err(anyhow::Error::msg)?);
            Ok(())
        }
        EdgeCommand::Profile(arguments) => {
            let settings = Settings::load(&arguments.config)?;
            let (source, topic) = (arguments.source.as_deref(), arguments.topic.as_deref());
            say(profile::profile(&settings, source, topic, &arguments.file)?.trim_end());
            Ok(())
        }
    }
}

/// What a configuration means, for people.
fn describe(settings: &Settings) -> String {
    let mut lines = vec![format!("edge {}: the configuration is right", settings.edge.id)];
    for source in &settings.source {
        lines.push(match source {
            SourceSettings::Mqtt(mqtt) => {
                let clients = (0..mqtt.connections).map(|index| mqtt.client(&settings.edge.id, index));
                let clients = clients.collect::<Vec<_>>().join(", ");
                format!("source {}: {} {:?} as {clients}", mqtt.name, mqtt.url, mqtt.filters())
            }
            SourceSettings::Http(http) => {
                let open = if http.token.is_some() { "with its token" } else { "without a token" };
                format!("source {}: POST http://{}/ingest/{} {open}", http.name, http.listen, http.name)
            }
            SourceSettings::File(file) => {
                let how = if file.follow { "as it grows" } else { "once" };
                let header = if file.header() { ", with its first line before each" } else { "" };
                format!("source {}: the lines of {} {how}{header}", file.name, file.path.display())
            }
            SourceSettings::Exec(exec) => format!("source {}: the lines of {:?}", exec.name, exec.command),
            SourceSettings::Modbus(modbus) => {
                let (units, registers) = (modbus.unit.len(), modbus.register.len());
                let every = modbus.every.0;
                format!(
                    "source {}: {registers} values of {units} devices at {:?}, every {every:?}",
                    modbus.name, modbus.url
                )
            }
            SourceSettings::Host(host) => format!("source {}: this machine, every {:?}", host.name, host.every.0),
        });
    }
    for (name, stream) in &settings.stream {
        let fields = stream.fields.iter().map(|(field, settings)| format!("{field} {}", settings.kind));
        lines.push(format!("stream {name}: {}", fields.collect::<Vec<_>>().join(", ")));
        for (window, settings) in stream.windows(name) {
            let cut = match (settings.gap, settings.every) {
                (Some(gap), _) => format!("sessions that end after {:?}", gap.0),
                (None, Some(every)) => format!("windows of {:?}, every {:?}", settings.size.0, every.0),
                (None, None) => format!("windows of {:?}", settings.size.0),
            };
            lines.push(format!("stream {window}: {cut}"));
        }
    }
    for rule in &settings.rule {
        let topic =
            rule.topic.as_deref().map_or_else(|| "not published".to_owned(), |topic| format!("published to {topic}"));
        lines.push(format!("rule {} on {}: {}, {topic}", rule.name, rule.on, rule.severity.word()));
    }
    for command in &settings.command {
        lines.push(format!("command {} of the cloud: published on {}", command.name, command.publish.topic));
    }
    for lane in settings.lanes() {
        let streams = lane.streams.iter().map(|stream| stream.as_str()).collect::<Vec<_>>().join(", ");
        let streams = if streams.is_empty() { "all others" } else { &streams };
        let full = match lane.on_full {
            OnFull::Refuse => "then sources wait",
            OnFull::DropOldest => "then the oldest go, counted in losses",
            OnFull::Thin => "then the oldest readings go, counted in losses",
        };
        lines.push(format!("lane {}: {streams}; at most {} MiB, {full}", lane.name, lane.max_bytes() >> 20));
    }
    lines.extend(settings.warnings().into_iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n")
}

fn say(text: &str) {
    // Who has closed the pipe wants no more.
    let _ = writeln!(std::io::stdout(), "{text}");
}

async fn stop_signal() -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        _ = term.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted.context("listen for SIGINT")?,
    }
    Ok(())
}
