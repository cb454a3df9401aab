//! Keeps the tables of a node in shape: checkpoints, retention, the log's clean-up, vacuum, compaction.
//!
//! One thread for all tables, which take turns: what it takes of this machine is then bounded by one core, of which
//! compaction leaves a configured part, however many streams there are; and it runs at a lower priority than ingest. What
//! is short comes first in a turn (checkpoints, then what is looked at every `lake.every`), then one merge, of the table
//! that has most small files to get rid of. What wakes it: a tick, at which it only compares numbers. It owns no state of
//! a table: it starts from what the catalogue shows, commits like any other writer, and tells the ingest thread, which
//! alone replaces what readers see. When it is stopped, what it was at is given up; a kill leaves no more.
//! A table that fails waits longer each time and holds up no other; one whose store does not answer for `lake.patience`
//! has failed ([`pulse`]), and waits at least four times as long as it took. The next time it may be silent for twice as long:
//! a checkpoint of many files says nothing while it is written, and on a slow machine it has to end at some time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use wire::StreamName;

use crate::catalog::Catalogue;
use crate::compact::{Compactor, Merged, small_files};
use crate::config::Settings;
use crate::delta::{self, DeltaTable, TableSnapshot};
use crate::errors::chain;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::{retain, vacuum};

mod pulse;

use pulse::{Pulse, Silent};

const TICK: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// A table that failed waits at least so many times as long as it took, for others to have their turn.
const TURNS_OF_OTHERS: u32 = 4;
/// However often it was given up, it may be silent for at most so many times `lake.patience`.
const PATIENCE_MAX: u32 = 16;
/// So often, at least, it is looked for what others have committed to a table.
const FOLLOW: Duration = Duration::from_secs(10);
/// After a start, so that a node that is started often vacuums, too.
const FIRST_VACUUM: Duration = Duration::from_secs(900);
/// A table that had nothing to merge is looked at again when it has another version, or so much later: its day may be over.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// What is told of a table that was changed.
pub(crate) type Adopt = Box<dyn Fn(StreamName, DeltaTable) + Send + Sync>;

/// The task; see the module.
pub(crate) struct Maintenance {
    settings: Settings,
    store: Store,
    catalogue: Arc<Catalogue>,
    metrics: Arc<Metrics>,
    adopt: Adopt,
    tables: BTreeMap<StreamName, Care>,
    pulse: Pulse,
}

/// What is known of one table.
#[derive(Debug)]
struct Care {
    compactor: Compactor,
    /// As this task left it: the catalogue may not show it yet.
    left: Option<TableSnapshot>,
    /// The version of its newest checkpoint, once that was looked up.
    checkpoint: Option<u64>,
    followed: Instant,
    looked_at: Option<Instant>,
    vacuum_at: Instant,
    /// The version that had nothing to merge, when, and its small files.
    nothing: Option<(u64, Instant, usize)>,
    upkeep: Backoff,
    merging: Backoff,
}

/// How long to wait after failures.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
    /// Of these so many were for silence.
    silences: u32,
    until: Option<Instant>,
}

impl Backoff {
    fn waits(&self) -> bool {
        self.until.is_some_and(|until| until > Instant::now())
    }

    /// How long it may be silent, when that is `patience` the first time.
    fn patience(&self, patience: Duration) -> Duration {
        patience.saturating_mul(1_u32.checked_shl(self.silences).unwrap_or(PATIENCE_MAX).min(PATIENCE_MAX))
    }

    /// `took` is how long the others have waited for it.
    fn failed(&mut self, error: &Failure, took: Duration) {
        self.failures += 1;
        self.silences += u32::from(error.is::<Silent>());
        let wait = RETRY_MIN.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX).max(took * TURNS_OF_OTHERS);
        self.until = Some(Instant::now() + wait);
    }
}

impl std::fmt::Debug for Maintenance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maintenance").field("tables", &self.tables.len()).finish_non_exhaustive()
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Maintenance {
    pub(crate) fn new(
        settings: Settings,
        store: Store,
        catalogue: Arc<Catalogue>,
        metrics: Arc<Metrics>,
        adopt: Adopt,
    ) -> Self {
        Self { settings, store, catalogue, metrics, adopt, tables: BTreeMap::new(), pulse: Pulse::default() }
    }

    /// Runs until the token is cancelled.
    pub(crate) async fn run(mut self, token: CancellationToken) {
        lower_priority();
        loop {
            let turn = async {
                if !self.turn().await {
                    tokio::time::sleep(TICK).await;
                }
            };
            tokio::select! {
                () = token.cancelled() => return,
                () = turn => {}
            }
        }
    }

    /// All that is due, and one merge. False when there was none.
    async fn turn(&mut self) -> bool {
        let (pulse, patience) = (self.pulse.clone(), self.settings.lake.patience.0);
        for stream in self.catalogue.streams() {
            if self.care(&stream).upkeep.waits() {
                continue;
            }
            let (patience, began) = (self.care(&stream).upkeep.patience(patience), Instant::now());
            match pulse.heard(patience, self.look_after(&stream)).await {
                Ok(()) => self.care(&stream).upkeep = Backoff::default(),
                Err(error) => {
                    self.care(&stream).upkeep.failed(&error, began.elapsed());
                    self.tell(&stream, "table not kept in shape; it is tried again", error.as_ref());
                }
            }
        }
        let Some(stream) = self.neediest() else { return false };
        let (patience, began) = (self.care(&stream).merging.patience(patience), Instant::now());
        match pulse.heard(patience, self.compact(&stream)).await {
            Ok(()) => self.care(&stream).merging = Backoff::default(),
            Err(error) => {
                self.care(&stream).merging.failed(&error, began.elapsed());
                self.tell(&stream, "files not merged; they are tried again", error.as_ref());
            }
        }
        true
    }

    fn tell(&mut self, stream: &StreamName, what: &str, error: &(dyn std::error::Error + 'static)) {
        self.metrics.maintenance_failed.add(1);
        if self.store.sync_failure().is_some()
            && let Some(table) = self.table(stream)
        {
            // The ingest thread looks at the store whenever it hears of a table, and stops the process.
            (self.adopt)(stream.clone(), table);
        }
        tracing::warn!(%stream, error = chain(error), "{what}");
    }

    fn care(&mut self, stream: &StreamName) -> &mut Care {
        let (compact, vacuum_every) = (&self.settings.compact, self.settings.lake.vacuum_every.0);
        self.tables.entry(stream.clone()).or_insert_with(|| Care {
            compactor: Compactor::new(compact),
            left: None,
            checkpoint: None,
            followed: Instant::now(),
            looked_at: None,
            vacuum_at: Instant::now() + vacuum_every.min(FIRST_VACUUM),
            nothing: None,
            upkeep: Backoff::default(),
            merging: Backoff::default(),
        })
    }

    /// The table as it is now, as far as this node knows.
    fn snapshot(&mut self, stream: &StreamName) -> Option<TableSnapshot> {
        let shown = self.catalogue.state(stream)?.snapshot.clone();
        let left = &mut self.care(stream).left;
        match left {
            Some(left) if left.version > shown.version => Some(left.clone()),
            _ => {
                *left = None;
                Some(shown)
            }
        }
    }

    fn table(&mut self, stream: &StreamName) -> Option<DeltaTable> {
        let snapshot = self.snapshot(stream)?;
        Some(DeltaTable::at(&self.store, stream, snapshot))
    }

    /// A table that this task has changed or read anew.
    fn leave(&mut self, stream: &StreamName, table: DeltaTable) {
        self.care(stream).left = Some(table.snapshot());
        (self.adopt)(stream.clone(), table);
    }

    /// What others did, checkpoint, and now and then retention, the log, and unused files.
    async fn look_after(&mut self, stream: &StreamName) -> Result<(), Failure> {
        self.follow(stream).await?;
        self.pulse.beat();
        let Some(snapshot) = self.snapshot(stream) else { return Ok(()) };
        let every = self.settings.lake.checkpoint_commits;
        let known = self.care(stream).checkpoint;
        // Another node may have written one: looked up before one is written, not at every tick.
        if known.is_none_or(|last| snapshot.version >= last + every) {
            let last = delta::last_checkpoint(stream, &snapshot.log_store).await?;
            self.care(stream).checkpoint = Some(last);
            self.pulse.beat();
            if snapshot.version >= last + every {
                let started = Instant::now();
                delta::checkpoint(stream, &snapshot).await?;
                self.pulse.beat();
                self.care(stream).checkpoint = Some(snapshot.version);
                self.metrics.checkpoints.add(1);
                tracing::debug!(%stream, version = snapshot.version, took = ?started.elapsed(), "checkpoint");
            }
        }
        let lake = &self.settings.lake;
        let (every, vacuum_every) = (lake.every.0, lake.vacuum_every.0);
        let now = Instant::now();
        if self.care(stream).looked_at.is_none_or(|at| at + every <= now) {
            self.retain(stream).await?;
            self.pulse.beat();
            let pulse = self.pulse.clone();
            let beat = || pulse.beat();
            let gone = delta::clean(stream, &snapshot, self.settings.lake.log_keep.0, &beat).await?;
            self.metrics.log_objects_deleted.add(gone as u64);
            self.care(stream).looked_at = Some(now);
        }
        if self.care(stream).vacuum_at <= now {
            self.vacuum(stream).await?;
            self.care(stream).vacuum_at = now + vacuum_every;
        }
        Ok(())
    }

    /// A table that nobody sends to is changed by others all the same: by another node, or by hand.
    async fn follow(&mut self, stream: &StreamName) -> Result<(), Failure> {
        let (now, every) = (Instant::now(), self.settings.lake.every.0.min(FOLLOW));
        if self.care(stream).followed + every > now {
            return Ok(());
        }
        let Some(mut table) = self.table(stream) else { return Ok(()) };
        let before = table.snapshot().version;
        if table.reload().await?.version > before {
            self.leave(stream, table);
        }
        self.care(stream).followed = now;
        Ok(())
    }

    async fn retain(&mut self, stream: &StreamName) -> Result<(), Failure> {
        let Some(mut table) = self.table(stream) else { return Ok(()) };
        let kept = self.settings.keep_of(stream);
        let gone = retain::retain(&mut table, &kept, chrono::Utc::now().timestamp_micros()).await?;
        if !gone.is_empty() {
            let rows = gone.iter().filter_map(|file| file.rows).sum();
            let bytes: u64 = gone.iter().map(|file| file.bytes).sum();
            tracing::info!(%stream, files = gone.len(), rows, bytes, "rows are past their time");
            self.metrics.rows_retired.add(rows);
            self.leave(stream, table);
        }
        Ok(())
    }

    async fn vacuum(&mut self, stream: &StreamName) -> Result<(), Failure> {
        let Some(mut table) = self.table(stream) else { return Ok(()) };
        let pulse = self.pulse.clone();
        let beat = || pulse.beat();
        let plan = vacuum::plan(&self.store, &mut table, self.settings.lake.grace.0, &beat).await?;
        if !plan.is_empty() {
            let gone = vacuum::delete(&table, &plan, &beat).await?;
            tracing::info!(%stream, files = gone, bytes = plan.bytes(), "files that nothing names are deleted");
            self.metrics.files_vacuumed.add(gone as u64);
            self.metrics.bytes_vacuumed.add(plan.bytes());
        }
        Ok(())
    }

    /// The table whose next merge gets rid of most files.
    fn neediest(&mut self) -> Option<StreamName> {
        if !self.settings.compact.enabled {
            return None;
        }
        let (mut most, mut neediest, mut small) = (1, None, 0);
        for stream in self.catalogue.streams() {
            let Some(TableSnapshot { files, version, .. }) = self.snapshot(&stream) else { continue };
            let small_bytes = self.settings.compact.small_bytes.0;
            let care = self.care(&stream);
            if let Some((looked_at, when, count)) = care.nothing
                && looked_at == version
                && when.elapsed() < LOOK_AGAIN
            {
                small += count;
                continue;
            }
            let count = small_files(&files, small_bytes);
            small += count;
            match care.compactor.choose(&files) {
                None => care.nothing = Some((version, Instant::now(), count)),
                Some(_) if care.merging.waits() => {}
                Some(merge) if merge.len() > most => (most, neediest) = (merge.len(), Some(stream)),
                Some(_) => {}
            }
        }
        self.metrics.small_files.set(small as u64);
        neediest
    }

    async fn compact(&mut self, stream: &StreamName) -> Result<(), Failure> {
        let Some(mut table) = self.table(stream) else { return Ok(()) };
        let compactor = self.care(stream).compactor.clone();
        let Some(inputs) = compactor.choose(&table.snapshot().files) else { return Ok(()) };
        let (started, pulse) = (Instant::now(), self.pulse.clone());
        let merged = match compactor.merge(&mut table, inputs, &|_| pulse.beat()).await {
            Ok(merged) => merged,
            Err(error) => {
                if let Some(path) = error.bad_file() {
                    tracing::error!(%stream, path, error = chain(&error), "a file cannot be compacted: see `weir verify`");
                    self.care(stream).compactor.leave_out(path);
                }
                return Err(error.into());
            }
        };
        match merged {
            Merged::Done { files_in, files_out, bytes_in, bytes_out, rows } => {
                self.metrics.compactions.add(1);
                self.metrics.compacted_files.add(files_in as u64);
                self.metrics.compacted_bytes_in.add(bytes_in);
                self.metrics.compacted_bytes_out.add(bytes_out);
                tracing::info!(%stream, files_in, files_out, bytes_in, bytes_out, rows, took = ?started.elapsed(), "compacted");
            }
            Merged::Overtaken => self.metrics.compactions_overtaken.add(1),
        }
        self.leave(stream, table);
        Ok(())
    }
}

/// Ingest and queries come first on a machine that has no core to spare.
fn lower_priority() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 10) {
        tracing::debug!(%error, "maintenance runs at the usual priority");
    }
}

#[cfg(test)]
mod tests;
