//! `weir load`: files of history into a stream, Parquet, CSV or NDJSON, exactly once.
//!
//! It is an edge of its own that needs no disk. A file is read twice: first for its hash and the types of its columns, then
//! for its rows. Spool and batches follow from the content alone (file, stream, mapping), so whoever loads the same file
//! again makes the same batches with the same numbers: the node has them and takes none twice, whether the first run ended
//! well or was killed in the middle. A row without a time that can be stored is a row of `quarantine`. Done means durable on
//! the node; until it is committed, too, the file is what a lost node's rows could come from again.

mod file;
mod mapping;
mod send;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use cloud_ingest::doors::rows::{Cell, Gathered, Gathering, Maker};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use wire::schema::own;
use wire::{FieldName, SpoolId, StreamName, TS_FUTURE_MAX_US, TS_MIN_US, named};

use self::file::{Found, Input};
use self::mapping::{Mapping, Placed};
use self::send::{Link, Sent};

/// Stands in every batch, and changes when the same file would make other ones.
const AGENT: &str = "weir load 1";
/// Rows of a batch.
const BATCH_ROWS: usize = 32_768;
/// All that is gathered and not sent.
const BYTES_MAX: usize = 512 << 20;
/// Full batches that wait for the link.
const WAITING_MAX: usize = 8;
/// Rows that are further ahead than this go into quarantine: they will be too far ahead as long as a load may have to be resumed.
const SOON_US: i64 = 30 * wire::DAY_US;
/// A bad row is kept up to here.
const PAYLOAD_BYTES_MAX: usize = 64 << 10;

/// Arguments of `weir load`.
#[derive(Debug, clap::Args)]
pub(crate) struct LoadArguments {
    /// .parquet, .csv, .ndjson or .jsonl; the last three with .gz or not
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The stream, and so the table
    #[arg(long, required_unless_present = "reference")]
    stream: Option<StreamName>,
    /// Where Weir listens
    #[arg(long, default_value = "http://127.0.0.1:7300")]
    url: String,
    /// As which edge of Weir's configuration
    #[arg(long, default_value = "load")]
    edge: wire::EdgeId,
    /// File that holds the edge's token; or the variable WEIR_TOKEN
    #[arg(long)]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    mapping: mapping::MappingArguments,
    /// A table of things, not of readings: each load is a new version of the rows that it has
    #[arg(long, requires = "key", conflicts_with = "stream")]
    reference: bool,
    /// With --reference: the column that says which thing a row is about
    #[arg(long)]
    key: Option<String>,
    /// With --reference: its name in SQL; that of the file unless set
    #[arg(long, requires = "reference")]
    name: Option<String>,
    /// With --reference: since when the rows hold, as 2026-11-21 or 2026-11-21T08:30:00Z; for what is new for ever, for what is known since it was loaded, unless set
    #[arg(long, requires = "reference")]
    valid_from: Option<String>,
}

/// Loads each file.
pub(crate) async fn load(arguments: LoadArguments) -> anyhow::Result<()> {
    let link = Link::new(&arguments.url, &arguments.edge, token(arguments.token_file.as_deref())?)?;
    for file in &arguments.files {
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {percent}%  {msg}  {elapsed}, {eta} to go")?);
        let loaded = load_file(&arguments, file, &link, &bar).await;
        bar.finish_and_clear();
        let (stream, sent) = loaded.with_context(|| format!("load {}", file.display()))?;
        say(&sentence(file, &stream, &sent));
        if arguments.reference && sent.rows == 0 && sent.known > 0 && arguments.valid_from.is_none() {
            say(
                "If others were loaded since, and these are to hold again: load them with --valid-from, and since when.",
            );
        }
    }
    Ok(())
}

fn sentence(file: &Path, stream: &StreamName, sent: &Sent) -> String {
    let Sent { rows, known, quarantined } = *sent;
    let file = file.display();
    let bad = match quarantined {
        0 => String::new(),
        bad => format!(", {bad} of them in quarantine"),
    };
    match (rows, known) {
        (0, 0) => format!("{file}: no rows"),
        (0, known) => format!("{file}: nothing to do, its {known} rows are there already{bad}"),
        (rows, 0) => format!("{file}: {rows} rows loaded into {stream}{bad}"),
        (rows, known) => format!("{file}: {rows} rows loaded into {stream}, {known} were there already{bad}"),
    }
}

async fn load_file(
    arguments: &LoadArguments,
    path: &Path,
    link: &Link,
    bar: &ProgressBar,
) -> anyhow::Result<(StreamName, Sent)> {
    let (owned, shown) = (path.to_owned(), bar.clone());
    let input = tokio::task::spawn_blocking(move || Input::survey(&owned, &shown)).await??;
    let (stream, mapping) = plan(arguments, path, &input)?;
    let spool = spool(&input, &stream, &mapping);
    let known = link.positions(spool).await?;
    let (batches, waiting) = tokio::sync::mpsc::channel(WAITING_MAX);
    let (into, shown) = (stream.clone(), bar.clone());
    let reading = tokio::task::spawn_blocking(move || read(&input, &mapping, &into, &shown, &batches));
    let sent = link.send_all(spool, known, waiting).await;
    match (reading.await?, sent) {
        // A link that gave up is why the reader could not go on.
        (_, Err(error)) => Err(error),
        (Err(error), _) => Err(error),
        (Ok(()), Ok(sent)) => Ok((stream, sent)),
    }
}

/// Where the rows go, and how.
fn plan(arguments: &LoadArguments, path: &Path, input: &Input) -> anyhow::Result<(StreamName, Mapping)> {
    let Some(key) = arguments.key.as_ref().filter(|_| arguments.reference) else {
        let stream = arguments.stream.clone().context("name the stream with --stream")?;
        return Ok((stream, Mapping::of_readings(&arguments.mapping, input)?));
    };
    let stem = || path.file_name().and_then(|name| name.to_str()?.split('.').next()).unwrap_or_default().to_owned();
    let name = named::stream(&arguments.name.clone().unwrap_or_else(stem));
    let stream = wire::reference::revisions(&name)?;
    Ok((stream, Mapping::of_reference(&arguments.mapping, input, key, arguments.valid_from.as_deref())?))
}

fn spool(input: &Input, stream: &StreamName, mapping: &Mapping) -> SpoolId {
    let mut hash = Sha256::new();
    for part in [AGENT, stream.as_str(), &mapping.describe()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(input.hash);
    SpoolId(hash.finalize()[..16].try_into().expect("a SHA-256 has 32 bytes"))
}

/// Reads the rows into batches, and gives each to the link when it is full.
fn read(
    input: &Input,
    mapping: &Mapping,
    stream: &StreamName,
    bar: &ProgressBar,
    batches: &tokio::sync::mpsc::Sender<Gathered>,
) -> anyhow::Result<()> {
    let maker = Maker { agent: AGENT.to_owned(), configuration: 0 };
    let mut rows = Gathering::new(maker, BYTES_MAX).with_rows_max(BATCH_ROWS);
    rows.declare(stream.clone(), mapping.schema()?);
    let quarantine = named::stream(own::QUARANTINE);
    rows.declare(quarantine.clone(), own::quarantine());
    let names: Vec<FieldName> = own::quarantine().fields().iter().map(|field| field.name.clone()).collect();
    let now_max = chrono::Utc::now().timestamp_micros().saturating_add(TS_FUTURE_MAX_US);
    let ts_max = now_max.saturating_add(SOON_US);
    let (mut bytes, mut newest, mut number) = (0, TS_MIN_US, 0_u64);
    let source = input.name();
    input.rows(bar, &mut |found| {
        number += 1;
        let (reason, detail, payload) = match found {
            Found::Bad { detail, payload } => ("malformed", detail, payload),
            Found::Row(cells) => match mapping.place(cells, ts_max) {
                // In quarantine today and a row tomorrow: what was sent before would get another content under the same number.
                Ok(Placed { ts, .. }) if ts > now_max => anyhow::bail!(
                    "row {number} is of {}, which is too far ahead: mend it, or load the file again later. It goes on where it was",
                    chrono::DateTime::from_timestamp_micros(ts).unwrap_or_default().to_rfc3339()
                ),
                Ok(Placed { ts, device, cells }) => {
                    newest = newest.max(ts);
                    bytes += cells.len();
                    rows.add(stream, ts, device.as_deref(), cells.iter().map(|(name, cell)| (*name, *cell)))?;
                    return give(&mut rows, batches);
                }
                Err((reason, detail)) => (reason, detail, mapping.as_json(cells)),
            },
        };
        let payload = &payload[..payload.len().min(PAYLOAD_BYTES_MAX)];
        let topic = format!("row {number}");
        let cells = [
            Cell::Text(stream.as_str()),
            Cell::Text(&source),
            Cell::Text(&topic),
            Cell::Text(reason),
            Cell::Text(&detail),
            Cell::Bytes(payload),
            Cell::Int(payload.len() as i64),
        ];
        // Not the arrival, which would be another one the next time.
        rows.add(&quarantine, newest, None, names.iter().zip(cells))?;
        give(&mut rows, batches)
    })?;
    for batch in rows.finish()? {
        batches.blocking_send(batch).ok().context("the link has given up")?;
    }
    Ok(())
}

fn give(rows: &mut Gathering, batches: &tokio::sync::mpsc::Sender<Gathered>) -> anyhow::Result<()> {
    for batch in rows.take_closed() {
        batches.blocking_send(batch).ok().context("the link has given up")?;
    }
    Ok(())
}

fn token(file: Option<&Path>) -> anyhow::Result<String> {
    let token = match file {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?,
        None => match std::env::var("WEIR_TOKEN") {
            Ok(token) => token,
            Err(_) => {
                bail!("no token: put that of an [[edge]] into a file and name it with --token-file, or set WEIR_TOKEN")
            }
        },
    };
    Ok(token.trim().to_owned())
}

#[allow(clippy::print_stdout, reason = "what the user asked to see")]
fn say(text: &str) {
    println!("{text}");
}
