//! `edge-agent spool …`: what an operator does with a data directory while its agent is stopped.
//!
//! `status` and `verify` write nothing (`untouched.rs`). `verify` names each range that cannot be read. `repair` opens
//! the logs that are damaged as a start does: it cuts a torn tail, writes a damaged header or the spool's name anew, and
//! leaves every record where it is; the files of such a log are copied aside first, and a log that is whole is not opened
//! for writing. `export` writes the rows that the cloud has not committed as Arrow IPC files, one for each stream and
//! schema. A running agent holds its logs' locks: then all of them refuse.

#[cfg(test)]
mod tests;
mod untouched;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use arrow_ipc::writer::FileWriter;
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use segment_log::{Disk, FileLayer, Opening, Options, ReadError, SegmentLog};
use wire::{CutBatch, SchemaId, SpoolId, StreamName, StreamSchema};

use self::untouched::Untouched;
use crate::agent::{journal_options, spool_directory, spool_settings};
use crate::config::Settings;
use crate::entry::Entry;
use crate::spool::{Spool, SpoolError};

/// What is asked.
#[derive(Debug, clap::Subcommand)]
pub enum SpoolCommand {
    /// What the data directory holds
    Status,
    /// Read every record, and name each range that cannot be read
    Verify,
    /// Make damaged logs usable again; keeps everything readable, and copies of the files
    Repair,
    /// Write the rows that the cloud has not committed as Arrow IPC files
    Export {
        /// Where to, a directory that is made
        #[arg(long)]
        out: PathBuf,
    },
}

/// Does it; the text is the answer.
///
/// # Errors
/// When an agent runs there, the disk does not answer, or `verify` found damage.
pub fn execute(command: &SpoolCommand, settings: &Settings) -> anyhow::Result<String> {
    match command {
        SpoolCommand::Status => status(settings),
        SpoolCommand::Verify => {
            let findings = verify_all(settings)?;
            let text = findings.iter().map(Finding::describe).collect::<Vec<_>>().join("\n");
            if findings.iter().any(Finding::is_damaged) {
                bail!("{text}\ndamage was found: `edge-agent spool repair` makes the logs usable again");
            }
            Ok(text)
        }
        SpoolCommand::Repair => repair(settings),
        SpoolCommand::Export { out } => export(settings, out),
    }
}

/// One log of the data directory.
#[derive(Debug, Clone)]
struct Log {
    name: String,
    path: PathBuf,
    options: Options,
    is_journal: bool,
}

/// What reading a log found.
#[derive(Debug)]
struct Finding {
    log: Log,
    /// Why it does not even open.
    broken: Option<String>,
    opening: Option<Opening>,
    /// Bad ranges of good records' bytes: what another version wrote, or what is no content.
    unknown: Vec<String>,
    records: u64,
    bytes: u64,
    /// Of all records, in order: equal when the same can be read.
    crc: u32,
}

impl Finding {
    fn is_damaged(&self) -> bool {
        let opening = self.opening.as_ref();
        self.broken.is_some() || opening.is_some_and(|found| !found.incidents.is_empty() || found.torn_tail.is_some())
    }

    fn describe(&self) -> String {
        let name = &self.log.name;
        let mut lines = Vec::new();
        if let Some(broken) = &self.broken {
            lines.push(format!("{name}: {broken}"));
        }
        if let Some(opening) = &self.opening {
            let Opening { start, end, .. } = opening;
            let health = if self.is_damaged() { "damaged" } else { "whole" };
            let (records, bytes) = (self.records, self.bytes);
            lines.push(format!("{name}: {health}; {records} records, {bytes} bytes from {start} to {end}"));
            lines.extend(opening.incidents.iter().map(|damage| format!("{name}: {damage}")));
            let torn = opening.torn_tail.map(|damage| format!("{name}: torn tail, never synced: {damage}"));
            lines.extend(torn);
        }
        lines.extend(self.unknown.iter().map(|unknown| format!("{name}: {unknown}")));
        lines.join("\n")
    }
}

/// The journal, and the lanes that lie on disk.
fn logs(settings: &Settings) -> anyhow::Result<Vec<Log>> {
    let data_dir = &settings.edge.data_dir;
    if !data_dir.is_dir() {
        bail!("{} is no directory: no agent has run there", data_dir.display());
    }
    let mut logs = Vec::new();
    let journal = data_dir.join("journal");
    if journal.is_dir() {
        let options = journal_options(settings);
        logs.push(Log { name: "journal".to_owned(), path: journal, options, is_journal: true });
    }
    let spools = spool_directory(data_dir);
    let Some(id) = spool_id(&spools)? else { return Ok(logs) };
    let lanes = spools.join(id.to_string());
    let mut names = if lanes.is_dir() { Disk.list(&lanes)? } else { Vec::new() };
    names.sort();
    for name in names.into_iter().filter(|name| lanes.join(name).is_dir()) {
        // Only for reading: a lane's own numbers matter when it is written.
        let options = Options { segment_bytes: settings.lane_segment_bytes(), max_bytes: u64::MAX, reserve_bytes: 0 };
        logs.push(Log { path: lanes.join(&name), name: format!("lane {name}"), options, is_journal: false });
    }
    Ok(logs)
}

/// The spool in force: what the file `id` names, or the only one.
fn spool_id(spools: &Path) -> anyhow::Result<Option<SpoolId>> {
    if !spools.is_dir() {
        return Ok(None);
    }
    let named = fs::read_to_string(spools.join("id")).ok().and_then(|text| text.parse::<SpoolId>().ok());
    if named.is_some() {
        return Ok(named);
    }
    let found = Disk.list(spools)?.iter().filter_map(|name| name.parse::<SpoolId>().ok()).collect::<Vec<_>>();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(*one)),
        several => bail!("{} is damaged, and {} spools lie there", spools.join("id").display(), several.len()),
    }
}

fn bar(len: u64) -> anyhow::Result<ProgressBar> {
    // It is drawn only on a terminal.
    let bar = ProgressBar::new(len);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes} of {total_bytes}  {msg}  {elapsed}, {eta} to go")?);
    Ok(bar)
}

fn verify_all(settings: &Settings) -> anyhow::Result<Vec<Finding>> {
    let logs = logs(settings)?;
    let bytes = |log: &Log| Disk.list(&log.path).map(|names| names.len() as u64 * log.options.segment_bytes);
    let bar = bar(logs.iter().filter_map(|log| bytes(log).ok()).sum())?;
    let findings = logs.into_iter().map(|log| verify(log, &bar)).collect();
    bar.finish_and_clear();
    findings
}

/// Reads all of a log and writes nothing.
fn verify(log: Log, bar: &ProgressBar) -> anyhow::Result<Finding> {
    bar.set_message(log.name.clone());
    let opened = SegmentLog::open(Untouched, log.path.clone(), log.options.clone());
    let none = Finding { log, broken: None, opening: None, unknown: Vec::new(), records: 0, bytes: 0, crc: 0 };
    let (opened, opening) = match opened {
        Ok(opened) => opened,
        Err(error @ segment_log::OpenError::Locked(_)) => return Err(error).context("stop the agent first"),
        Err(error @ segment_log::OpenError::Io { .. }) => return Err(error.into()),
        Err(error) => return Ok(Finding { broken: Some(error.to_string()), ..none }),
    };
    let mut finding = Finding { opening: Some(opening.clone()), ..none };
    let mut reader = opened.reader(opening.start)?;
    while reader.position() < opening.end {
        match reader.next() {
            Ok(Some(record)) => {
                let len = record.next.0 - record.position.0;
                finding.records += 1;
                finding.bytes += len;
                finding.crc = crc32c::crc32c_append(finding.crc, &record.position.0.to_le_bytes());
                finding.crc = crc32c::crc32c_append(finding.crc, record.payload);
                bar.inc(len);
                if finding.log.is_journal
                    && let Err(error) = Entry::read(Bytes::copy_from_slice(record.payload))
                {
                    finding.unknown.push(format!("from {} to {}: {error}", record.position, record.next));
                }
            }
            Ok(None) => break,
            // Named by the opening already.
            Err(ReadError::Damaged { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(finding)
}

fn status(settings: &Settings) -> anyhow::Result<String> {
    let mut lines = Vec::new();
    for finding in verify_all(settings)? {
        lines.push(finding.describe());
    }
    let Some(mut spool) = open_spool(settings)? else { return Ok(lines.join("\n")) };
    let rows = spool.rows_counted();
    lines.push(format!("spool {}: {} rows wait for the cloud's commit", spool.id(), rows.spooled));
    lines.push(format!(
        "since it was made: {} rows committed, {} dropped or rotted, {} refused by the cloud",
        rows.freed, rows.lost, rows.voided
    ));
    for lane in spool.lanes() {
        lines.push(format!(
            "lane {}: {} of {} MiB, {} batches were never sent",
            lane.name,
            lane.bytes >> 20,
            lane.max_bytes >> 20,
            lane.batches_waiting
        ));
    }
    let mut streams = std::collections::BTreeMap::<StreamName, (u64, u64, i64, i64)>::new();
    spool.export(|_, stream, batch| {
        let (batches, rows, min, max) = streams.entry(stream.clone()).or_insert((0, 0, i64::MAX, i64::MIN));
        (*batches, *rows) = (*batches + 1, *rows + u64::from(batch.rows));
        (*min, *max) = ((*min).min(batch.min_ts), (*max).max(batch.max_ts));
        Ok::<_, SpoolError>(())
    })?;
    for (stream, (batches, rows, min, max)) in streams {
        lines.push(format!("stream {stream}: {rows} rows in {batches} batches, {} to {}", time(min), time(max)));
    }
    Ok(lines.join("\n"))
}

fn time(us: i64) -> String {
    chrono::DateTime::from_timestamp_micros(us)
        .map_or_else(|| us.to_string(), |time| time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
}

/// The spool as it stands, to be read.
fn open_spool(settings: &Settings) -> anyhow::Result<Option<Spool<Untouched>>> {
    let directory = spool_directory(&settings.edge.data_dir);
    let Some(id) = spool_id(&directory)? else { return Ok(None) };
    if !directory.join("id").is_file() {
        bail!("{} is missing: `edge-agent spool repair` writes it anew", directory.join("id").display());
    }
    let mut wanted = spool_settings(settings);
    // A lane that never got anything is not there, and must not seem to be made.
    wanted.lanes.retain(|lane| directory.join(id.to_string()).join(&lane.name).is_dir());
    let opened = Spool::open(&Untouched, &directory, wanted, id);
    Ok(Some(opened.context("open the spool")?.0))
}

fn repair(settings: &Settings) -> anyhow::Result<String> {
    let mut lines = Vec::new();
    let spools = spool_directory(&settings.edge.data_dir);
    let named = fs::read_to_string(spools.join("id")).ok().and_then(|text| text.parse::<SpoolId>().ok());
    let findings = verify_all(settings)?;
    if named.is_none()
        && let Some(id) = spool_id(&spools)?
    {
        fs::write(spools.join("id.new"), id.to_string()).context("write the spool's name")?;
        File::open(spools.join("id.new")).and_then(|file| file.sync_all()).context("write the spool's name")?;
        fs::rename(spools.join("id.new"), spools.join("id")).context("write the spool's name")?;
        Disk.sync_dir(&spools).context("write the spool's name")?;
        lines.push(format!("spool: its name {id} was written anew"));
    }
    for before in findings {
        let name = before.log.name.clone();
        if !before.is_damaged() {
            lines.push(format!("{name}: whole, not touched"));
            continue;
        }
        lines.push(before.describe());
        let aside = copy_aside(settings, &before.log.path)?;
        lines.push(format!("{name}: its files are kept in {}", aside.display()));
        if let Some(broken) = before.broken {
            lines.push(format!("{name}: {broken}; move {} away to begin anew", before.log.path.display()));
            continue;
        }
        // As a start does it, and nothing more: no record moves.
        drop(SegmentLog::open(Disk, before.log.path.clone(), before.log.options.clone())?);
        let after = verify(before.log, &ProgressBar::hidden())?;
        if (after.records, after.crc) != (before.records, before.crc) {
            bail!("{}\n{name}: not all that was readable still is: put the copies back", lines.join("\n"));
        }
        lines.push(format!("{name}: repaired; all {} records that could be read still can", after.records));
    }
    Ok(lines.join("\n"))
}

/// Copies a log's files to a directory of their own.
fn copy_aside(settings: &Settings, log: &Path) -> anyhow::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = log.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let to = settings.edge.data_dir.join(format!("before-repair-{seconds}")).join(name);
    fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
    for entry in fs::read_dir(log)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))
                .with_context(|| format!("copy {}", entry.path().display()))?;
        }
    }
    Ok(to)
}

fn export(settings: &Settings, out: &Path) -> anyhow::Result<String> {
    let Some(mut spool) = open_spool(settings)? else { bail!("there is no spool") };
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let total = spool.rows();
    let bar = ProgressBar::new(total);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos} of {len} rows  {msg}  {elapsed}, {eta} to go")?);
    let mut files = Files { out, open: HashMap::new(), streams: HashMap::new(), lines: Vec::new() };
    let mut bad = 0_u64;
    let unreadable = spool.export(|spool, stream, batch| {
        bar.inc(u64::from(batch.rows));
        let schema = spool.schema(batch.schema).and_then(|text| StreamSchema::parse(text).ok());
        match schema.and_then(|schema| Some((batch.decode(&schema).ok()?, schema))) {
            Some((rows, schema)) => files.write(stream, &batch, &schema, &rows),
            None => {
                bad += 1;
                Ok(())
            }
        }
    })?;
    bar.finish_and_clear();
    let mut lines = files.finish()?;
    if unreadable + bad > 0 {
        lines.push(format!("{} batches cannot be read and are left out", unreadable + bad));
    }
    Ok(lines.join("\n"))
}

/// The files of an export; each is written to the end before the next stream begins.
struct Files<'a> {
    out: &'a Path,
    open: HashMap<(StreamName, SchemaId), (PathBuf, FileWriter<BufWriter<File>>, u64)>,
    /// How many schemas each stream has had.
    streams: HashMap<StreamName, u32>,
    lines: Vec<String>,
}

impl Files<'_> {
    fn write(
        &mut self,
        stream: &StreamName,
        batch: &CutBatch,
        schema: &StreamSchema,
        rows: &arrow_array::RecordBatch,
    ) -> anyhow::Result<()> {
        let key = (stream.clone(), batch.schema);
        if !self.open.contains_key(&key) {
            let count = self.streams.entry(stream.clone()).or_default();
            *count += 1;
            let name = if *count == 1 { format!("{stream}.arrow") } else { format!("{stream}-{count}.arrow") };
            let path = self.out.join(name);
            let file = File::create_new(&path).with_context(|| format!("make {}", path.display()))?;
            let writer = FileWriter::try_new(BufWriter::new(file), schema.arrow())?;
            self.open.insert(key.clone(), (path, writer, 0));
        }
        let (_, writer, count) = self.open.get_mut(&key).expect("it was put there");
        writer.write(rows)?;
        *count += rows.num_rows() as u64;
        Ok(())
    }

    fn finish(mut self) -> anyhow::Result<Vec<String>> {
        for (path, mut writer, rows) in self.open.into_values() {
            writer.finish()?;
            writer.into_inner()?.into_inner().context("write an export")?.sync_all().context("sync an export")?;
            self.lines.push(format!("{}: {rows} rows", path.display()));
        }
        self.lines.sort();
        Ok(self.lines)
    }
}
