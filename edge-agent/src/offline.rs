//! `edge-agent spool …`: what an operator does with a data directory while its agent is stopped.
//!
//! `status`, `verify` and `export` write nothing into it (`untouched.rs`). `verify` names each range that cannot be read.
//! `repair` opens the logs that are damaged as a start does: it cuts a torn tail, writes a damaged header or the spool's
//! name anew, and leaves every record where it is; the files of such a log are copied aside first, and a log that is whole
//! is not opened for writing. `export` writes the rows that the cloud has not committed as Parquet. A running agent holds
//! its logs' locks: then all of them refuse. Memory is that of a start: one read buffer, one record, and some bytes for
//! each batch that waits.

mod export;
#[cfg(test)]
mod tests;
mod untouched;
mod verify;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use segment_log::{Disk, FileLayer, OpenError, Options, SegmentLog};
use wire::SpoolId;

use self::untouched::Untouched;
use self::verify::{Finding, verify};
use crate::agent::{journal_options, spool_directory, spool_settings};
use crate::config::Settings;
use crate::spool::{Spool, SpoolError};

const MIB: f64 = (1 << 20) as f64;

/// What is asked.
#[derive(Debug, clap::Subcommand)]
pub enum SpoolCommand {
    /// What the data directory holds
    Status,
    /// Read every record, and name each range that cannot be read
    Verify,
    /// Make damaged logs usable again; keeps everything readable, and copies of the files
    Repair,
    /// Write the rows that the cloud has not committed as Parquet files
    Export {
        /// Where to, a directory; it is made
        #[arg(long)]
        out: PathBuf,
    },
}

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    /// Why the command's exit code is not 0.
    pub failed: Option<&'static str>,
}

/// Does it.
///
/// # Errors
/// When an agent runs there, or the disk does not answer.
pub fn execute(command: &SpoolCommand, settings: &Settings) -> anyhow::Result<Answer> {
    let answer = |lines: Vec<String>, failed| Answer { text: lines.join("\n"), failed };
    match command {
        SpoolCommand::Status => Ok(answer(status(settings)?, None)),
        SpoolCommand::Verify => {
            let findings = verify_all(settings)?;
            let damaged = findings.iter().any(Finding::is_damaged);
            let failed = damaged.then_some("damage was found: `edge-agent spool repair` makes the logs usable again");
            Ok(answer(findings.iter().flat_map(Finding::describe).collect(), failed))
        }
        SpoolCommand::Repair => {
            let (lines, all) = repair(settings)?;
            Ok(answer(lines, (!all).then_some("not everything could be repaired")))
        }
        SpoolCommand::Export { out } => {
            let (lines, all) = export(settings, out)?;
            Ok(answer(lines, (!all).then_some("some batches cannot be read and are not in the files")))
        }
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

impl Log {
    fn bytes(&self) -> u64 {
        let files = fs::read_dir(&self.path).into_iter().flatten().flatten();
        files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
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
        several => bail!(
            "{} is damaged, and {} spools lie there: write the name of the right one into it",
            spools.join("id").display(),
            several.len()
        ),
    }
}

/// A bar of bytes that are read; it is drawn only on a terminal.
fn bytes_bar(bytes: u64) -> anyhow::Result<ProgressBar> {
    let style = "{wide_bar} {bytes} of {total_bytes}  {msg}  {elapsed}, {eta} to go";
    Ok(ProgressBar::new(bytes).with_style(ProgressStyle::with_template(style)?))
}

fn agent_runs(settings: &Settings) -> String {
    format!("an agent runs with {}: stop it first", settings.edge.data_dir.display())
}

fn verify_all(settings: &Settings) -> anyhow::Result<Vec<Finding>> {
    let logs = logs(settings)?;
    let bar = bytes_bar(logs.iter().map(Log::bytes).sum::<u64>() * verify::PASSES)?;
    let findings = logs.into_iter().map(|log| {
        bar.set_message(log.name.clone());
        match verify(log, &bar) {
            Err(OpenError::Locked(_)) => bail!(agent_runs(settings)),
            found => Ok(found?),
        }
    });
    let findings = findings.collect();
    bar.finish_and_clear();
    findings
}

fn status(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let mut lines = verify_all(settings)?.iter().flat_map(Finding::describe).collect::<Vec<_>>();
    let Some(mut spool) = open_spool(settings)? else { return Ok(lines) };
    let rows = spool.rows_counted();
    lines.push(format!("spool {}: {} rows wait for the cloud's commit", spool.id(), rows.spooled));
    lines.push(format!(
        "since it was made: {} rows committed, {} dropped or rotted, {} refused by the cloud",
        rows.freed, rows.lost, rows.voided
    ));
    for lane in spool.lanes() {
        lines.push(format!(
            "lane {}: {:.1} of {:.1} MiB, {} batches were never sent",
            lane.name,
            lane.bytes as f64 / MIB,
            lane.max_bytes as f64 / MIB,
            lane.batches_waiting
        ));
    }
    for stream in spool.streams() {
        let (mut batches, mut rows, mut min, mut max) = (0_u64, 0, i64::MAX, i64::MIN);
        let unreadable = spool.each(&stream, |_, batch| {
            (batches, rows) = (batches + 1, rows + u64::from(batch.rows));
            (min, max) = (min.min(batch.min_ts), max.max(batch.max_ts));
            Ok::<_, SpoolError>(true)
        })?;
        let times = if batches > 0 { format!(", {} to {}", time(min), time(max)) } else { String::new() };
        let bad = if unreadable > 0 { format!("; {unreadable} batches cannot be read") } else { String::new() };
        lines.push(format!("stream {stream}: {rows} rows in {batches} batches{times}{bad}"));
    }
    Ok(lines)
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
    let bar = bytes_bar(logs(settings)?.iter().filter(|log| !log.is_journal).map(Log::bytes).sum::<u64>() * 2)?;
    let opened = Spool::open(&Untouched(bar.clone()), &directory, wanted, id);
    bar.finish_and_clear();
    match opened {
        Err(SpoolError::Open(OpenError::Locked(_))) => bail!(agent_runs(settings)),
        opened => Ok(Some(opened.context("open the spool")?.0)),
    }
}

/// What was done, and whether all is whole now.
fn repair(settings: &Settings) -> anyhow::Result<(Vec<String>, bool)> {
    let (mut lines, mut all) = (Vec::new(), true);
    let spools = spool_directory(&settings.edge.data_dir);
    let named = fs::read_to_string(spools.join("id")).ok().and_then(|text| text.parse::<SpoolId>().ok());
    let findings = verify_all(settings)?;
    if named.is_none()
        && let Some(id) = spool_id(&spools)?
    {
        name_spool(&spools, id).context("write the spool's name")?;
        lines.push(format!("spool: its name {id} was written anew"));
    }
    for before in findings {
        let name = before.log.name.clone();
        if !before.is_damaged() {
            lines.push(format!("{name}: whole, not touched"));
            continue;
        }
        lines.extend(before.describe());
        if before.broken.is_some() {
            let path = before.log.path.display();
            lines.push(format!("{name}: not touched; move {path} away to begin it anew"));
            all = false;
            continue;
        }
        let aside = copy_aside(settings, &before.log.path)?;
        lines.push(format!("{name}: its files are kept in {}", aside.display()));
        // As a start does it, and nothing more: no record moves.
        drop(SegmentLog::open(Disk, before.log.path.clone(), before.log.options)?);
        let after = verify(before.log, &ProgressBar::hidden())?;
        if (after.records, after.crc) != (before.records, before.crc) {
            bail!("{}\n{name}: not all that was readable still is: put the copies back", lines.join("\n"));
        }
        lines.push(format!("{name}: repaired; all {} records that could be read still can", after.records));
    }
    Ok((lines, all))
}

fn name_spool(spools: &Path, id: SpoolId) -> std::io::Result<()> {
    let temporary = spools.join("id.new");
    fs::write(&temporary, id.to_string())?;
    File::open(&temporary)?.sync_all()?;
    fs::rename(&temporary, spools.join("id"))?;
    Disk.sync_dir(spools)
}

/// Copies a log's files to a directory of their own.
fn copy_aside(settings: &Settings, log: &Path) -> anyhow::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = log.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let to = settings.edge.data_dir.join(format!("before-repair-{seconds}")).join(name);
    let copied = fs::create_dir_all(&to).and_then(|()| {
        for entry in fs::read_dir(log)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    });
    if let Err(error) = copied {
        // Half a copy helps nobody, and takes room.
        let _ = fs::remove_dir_all(&to);
        return Err(error).with_context(|| format!("copy {} to {}; nothing was changed", log.display(), to.display()));
    }
    Ok(to)
}

/// What was written, and whether that is all.
fn export(settings: &Settings, out: &Path) -> anyhow::Result<(Vec<String>, bool)> {
    let Some(mut spool) = open_spool(settings)? else { bail!("there is no spool") };
    let style = "{wide_bar} {pos} of {len} rows  {msg}  {elapsed}, {eta} to go";
    let bar = ProgressBar::new(spool.rows()).with_style(ProgressStyle::with_template(style)?);
    let exported = export::write(&mut spool, out, |stream, rows| {
        bar.set_message(stream.to_string());
        bar.inc(rows);
    });
    bar.finish_and_clear();
    let exported = exported?;
    let mut lines = Vec::new();
    lines.extend(exported.files.iter().map(|(path, rows)| format!("{}: {rows} rows", path.display())));
    if exported.files.is_empty() {
        lines.push("the spool has no rows".to_owned());
    }
    if exported.left_out > 0 {
        lines.push(format!("{} batches cannot be read and are left out", exported.left_out));
    }
    Ok((lines, exported.left_out == 0))
}
