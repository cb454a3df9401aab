//! Views that run for ever: a SELECT whose rows are kept up to date with what arrives. For windows that have closed they equal,
//! at any moment, what the same SELECT gives when it is run over everything (docs/decisions/0016-views.md).
//!
//! [`Views`] are all views of a node: it makes and drops them ([`definition`]), proves that each can be kept ([`shape`]), keeps
//! their definitions ([`kept`]), and has a task for each ([`run`]). What a view finds goes through the [`Sink`] into the
//! stream `<v>_changes` like every other row; `v` itself is a table over that stream ([`columns`]). No other state is kept.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use datafusion::catalog::TableProvider;
use datafusion::common::Result as DataFusionResult;
use parking_lot::{Mutex, RwLock};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::StreamName;
use wire::schema::is_own_stream;

use crate::caller::{Caller, Right};
use crate::catalog::Tables;
use crate::clock::now_us;
use crate::engine::{Engine, QueryError};
use crate::references;
use crate::sink::Sink;

pub(crate) mod definition;

mod columns;
mod emitted;
mod ending;
mod grid;
mod intervals;
mod kept;
mod partials;
mod run;
pub(crate) mod shape;
mod state;
mod steady;
mod view;
mod watermark;

pub(crate) use columns::{EMPTY, END, POSITION, REVISION, WINDOW};
use definition::{Command, Definition};
pub(crate) use intervals::Intervals;
pub(crate) use run::Progress;
use run::{Round, RunLimits, Runner, ViewError};
use shape::{Known, Shape};
use steady::Steady;
use view::View;
pub(crate) use view::{among, changes};
use watermark::Moment;

/// How soon a view that cannot go on is tried again: from the first of these to the last.
const RETRY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];
/// Who asks for a view that starts waits so long for its plan, and looks so often.
const PLANNED_WITHIN: Duration = Duration::from_secs(5);
const PLANNED_POLL: Duration = Duration::from_millis(10);
/// Memory for what was computed of windows that are asked more than once, bytes: of one view, and of as many as there may be.
const PARTIALS_BYTES_MAX: [usize; 2] = [16 << 20, 256 << 20];
/// How often time is looked at when nothing comes.
const TICK: Duration = Duration::from_secs(1);

/// Limits of all views of a node, and where their definitions are.
#[derive(Debug, Clone)]
pub struct ViewSettings {
    /// Where definitions that were made by statement are kept.
    pub kept: PathBuf,
    /// A directory of `.sql` files, a view each, that are there from the start.
    pub directory: Option<PathBuf>,
    /// Shortest time between two looks at what is new.
    pub pause: Duration,
    pub count_max: usize,
    pub definition_bytes_max: usize,
    /// Of one question that a view asks.
    pub answer_rows_max: usize,
    pub answer_bytes_max: usize,
    /// Windows of each view whose last word is remembered.
    pub windows_max: usize,
    /// How often a view writes down how far it has read when it has nothing to say.
    pub record_every: Duration,
}

#[cfg(test)]
impl ViewSettings {
    /// Of tests.
    pub(crate) fn in_directory(kept: &std::path::Path) -> Self {
        Self {
            kept: kept.to_owned(),
            directory: None,
            pause: Duration::from_millis(5),
            count_max: 4,
            definition_bytes_max: 1_000,
            answer_rows_max: 100_000,
            answer_bytes_max: 64 << 20,
            windows_max: 1_000,
            record_every: Duration::from_secs(1),
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Views {
    entries: RwLock<BTreeMap<StreamName, Arc<Entry>>>,
    running: OnceLock<Running>,
    /// One statement about views at a time.
    changing: tokio::sync::Mutex<()>,
}

/// What the tasks of views stand on.
#[derive(Debug)]
struct Running {
    engine: Weak<Engine>,
    sink: Arc<dyn Sink>,
    settings: ViewSettings,
    token: CancellationToken,
    began: Instant,
}

impl Running {
    /// How often each table of a view has moved on; None when others may concern it too. What another view has settled
    /// may change without a row of it.
    fn moves(&self, entry: &Entry) -> Option<Vec<u64>> {
        let (engine, view) = (self.engine.upgrade()?, entry.planned()?);
        let Shape { streams, references, views, .. } = &view.shape;
        let tables = engine.tables();
        views.is_empty().then(|| streams.iter().chain(references).map(|stream| tables.moves(stream)).collect())
    }

    fn now(&self) -> Moment {
        let since_us = i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX);
        Moment { wall_us: now_us(), since_us }
    }
}

/// What a view does at the moment.
#[derive(Debug, Clone, Default)]
pub(crate) enum Doing {
    /// Its streams, or its own, are not there yet.
    #[default]
    Starting,
    Running(Progress),
    Failed(String, Progress),
}

/// One view of the node.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) definition: Definition,
    /// It comes from a file that an operator wrote.
    is_configured: bool,
    /// As it was planned last; planned anew when its tables have got other types.
    view: RwLock<Option<Arc<View>>>,
    sink: Arc<Steady>,
    doing: Mutex<Doing>,
    task: Mutex<Option<JoinHandle<()>>>,
    stop: CancellationToken,
}

impl Entry {
    fn new(running: &Running, definition: Definition, is_configured: bool) -> Arc<Self> {
        Arc::new(Self {
            is_configured,
            view: RwLock::default(),
            sink: Arc::new(Steady::new(Arc::clone(&running.sink))),
            doing: Mutex::default(),
            task: Mutex::default(),
            stop: running.token.child_token(),
            definition,
        })
    }

    pub(crate) fn doing(&self) -> Doing {
        self.doing.lock().clone()
    }

    fn planned(&self) -> Option<Arc<View>> {
        self.view.read().clone()
    }

    fn settled(&self) -> Option<i64> {
        match &*self.doing.lock() {
            Doing::Running(progress) | Doing::Failed(_, progress) => progress.settled,
            Doing::Starting => None,
        }
    }

    fn failed(&self, error: &ViewError) {
        let mut doing = self.doing.lock();
        let progress = match &*doing {
            Doing::Running(progress) | Doing::Failed(_, progress) => progress.clone(),
            Doing::Starting => Progress::default(),
        };
        if !matches!(&*doing, Doing::Failed(..)) {
            tracing::warn!(view = %self.definition.name, %error, "view does not go on; it is tried again");
        }
        *doing = Doing::Failed(error.to_string(), progress);
    }
}

fn refused(message: impl Into<String>) -> QueryError {
    QueryError::Invalid { message: message.into() }
}

impl Views {
    /// All views, in order of name.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.entries.read().values().cloned().collect()
    }

    /// Names of the views that can be asked.
    pub(crate) fn names(&self, tables: &dyn Tables) -> Vec<String> {
        let shown = |entry: &&Arc<Entry>| entry.planned().is_some_and(|view| tables.cold(&view.changes).is_some());
        self.entries.read().values().filter(shown).map(|entry| entry.definition.name.to_string()).collect()
    }

    /// The table of a view. Just after a start one that has told something before is waited for.
    pub(crate) async fn table(
        &self,
        tables: &dyn Tables,
        name: &str,
    ) -> DataFusionResult<Option<Arc<dyn TableProvider>>> {
        let asked = Instant::now();
        let view = loop {
            if let Some(view) = self.planned(name) {
                break view;
            }
            if !self.comes(tables, name) || asked.elapsed() > PLANNED_WITHIN {
                return Ok(None);
            }
            tokio::time::sleep(PLANNED_POLL).await;
        };
        let Some(cold) = tables.cold(&view.changes) else { return Ok(None) };
        view.columns.view(&view.changes, &cold.schema).map(Some)
    }

    /// Whether a view that is not planned yet will be: its results are there, and nothing was wrong with it.
    fn comes(&self, tables: &dyn Tables, name: &str) -> bool {
        let Ok(stream) = name.parse::<StreamName>() else { return false };
        let starts = self.entries.read().get(&stream).is_some_and(|entry| matches!(entry.doing(), Doing::Starting));
        let changes = format!("{name}{}", view::CHANGES).parse::<StreamName>();
        starts && changes.is_ok_and(|changes| tables.cold(&changes).is_some())
    }

    /// Whether there is a view of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        name.parse::<StreamName>().is_ok_and(|name| self.entries.read().contains_key(&name))
    }

    /// Whether this is the name of a view, or of its results.
    pub(crate) fn owns(&self, stream: &StreamName) -> bool {
        let of = stream.as_str().strip_suffix(view::CHANGES);
        self.entries.read().contains_key(stream) || of.is_some_and(|view| self.has(view))
    }

    fn planned(&self, name: &str) -> Option<Arc<View>> {
        let name: StreamName = name.parse().ok()?;
        self.entries.read().get(&name).and_then(|entry| entry.planned())
    }

    /// What a name in FROM is, when the plan under it is that of a view or a reference table.
    fn look(
        &self,
        tables: &dyn Tables,
        name: &str,
        plan: &datafusion::logical_expr::LogicalPlan,
    ) -> DataFusionResult<Option<Known>> {
        if let Some(view) = self.planned(name)
            && let Some(cold) = tables.cold(&view.changes)
            && view.columns.plan(&view.changes, &cold.schema)? == *plan
        {
            return Ok(Some(Known::View(view.as_source())));
        }
        references::known(tables, name, plan)
    }

    async fn plan(&self, engine: &Engine, definition: &Definition) -> Result<Arc<View>, QueryError> {
        let look = |name: &str, plan: &_| self.look(engine.tables().as_ref(), name, plan);
        View::of(engine, definition.clone(), &look).await.map(Arc::new)
    }

    /// Begins to keep views: those whose definitions are kept, those of the configured directory, and those that are made
    /// later. They stop with the token.
    ///
    /// # Errors
    /// When a definition cannot be read.
    pub(crate) fn start(
        self: &Arc<Self>,
        engine: &Arc<Engine>,
        sink: Arc<dyn Sink>,
        settings: ViewSettings,
        token: CancellationToken,
    ) -> Result<(), String> {
        let mut definitions = kept::load(&settings.kept)?.into_iter().map(|own| (own, false)).collect::<Vec<_>>();
        if let Some(directory) = &settings.directory {
            if !directory.is_dir() {
                return Err(format!("[views] directory: {} is no directory", directory.display()));
            }
            definitions.extend(kept::load(directory)?.into_iter().map(|configured| (configured, true)));
        }
        if definitions.len() > settings.count_max {
            return Err(format!("{} views, and [views] max = {}", definitions.len(), settings.count_max));
        }
        let running = Running { engine: Arc::downgrade(engine), sink, settings, token, began: Instant::now() };
        self.running.set(running).map_err(|_| "views run already".to_owned())?;
        let running = self.running.get().expect("it was just set");
        for (definition, is_configured) in definitions {
            let name = definition.name.clone();
            if self.entries.read().contains_key(&name) {
                return Err(format!("view {name} is defined twice: by statement, and in a file of [views] directory"));
            }
            let entry = Entry::new(running, definition, is_configured);
            self.entries.write().insert(name, Arc::clone(&entry));
            self.spawn(&entry, None);
        }
        Ok(())
    }

    fn spawn(self: &Arc<Self>, entry: &Arc<Entry>, runner: Option<Runner>) {
        let (views, of_entry) = (Arc::clone(self), Arc::clone(entry));
        let task = tokio::spawn(async move {
            tokio::select! {
                () = of_entry.stop.cancelled() => {}
                () = views.keep(&of_entry, runner) => {}
            }
        });
        *entry.task.lock() = Some(task);
    }

    /// Carries out a statement about views.
    ///
    /// # Errors
    /// When the caller may not, or it cannot be done.
    pub(crate) async fn carry_out(self: &Arc<Self>, caller: &Caller, command: &Command) -> Result<(), QueryError> {
        if matches!(command, Command::Show) {
            return Ok(());
        }
        if !caller.may(Right::Views) {
            let message =
                format!("`{}` may ask and not make views: give this [[reader]] rights = [\"views\"]", caller.name());
            return Err(QueryError::Denied { message });
        }
        let running = self.running.get().ok_or_else(|| refused("this node keeps no views"))?;
        let _one = self.changing.lock().await;
        match command {
            Command::Create { definition, if_not_exists } => self.create(running, definition, *if_not_exists).await,
            Command::Drop { name, if_exists } => self.drop_view(running, name, *if_exists).await,
            Command::Show => Ok(()),
        }
    }

    async fn create(
        self: &Arc<Self>,
        running: &Running,
        definition: &Definition,
        if_not_exists: bool,
    ) -> Result<(), QueryError> {
        let engine = running.engine.upgrade().ok_or_else(|| refused("this node stops"))?;
        let (name, settings) = (&definition.name, &running.settings);
        if self.entries.read().contains_key(name) {
            return if if_not_exists { Ok(()) } else { Err(refused(format!("view {name} is there already"))) };
        }
        let tables = engine.tables().as_ref();
        if is_own_stream(name) {
            return Err(refused(format!("{name} is what Weir itself writes: choose another name")));
        }
        let is_taken =
            tables.cold(name).is_some() || references::view(tables, name.as_str()).is_ok_and(|view| view.is_some());
        if is_taken {
            return Err(refused(format!("{name} is a table already: choose another name")));
        }
        let (changes, below) = (view::changes(name), name.as_str().strip_suffix(view::CHANGES));
        let is_results = |of: &str| self.has(of);
        if changes.as_ref().is_ok_and(|changes| self.has(changes.as_str())) || below.is_some_and(is_results) {
            return Err(refused(format!(
                "{name} and its results would be mixed up with another view: choose another name"
            )));
        }
        if self.entries.read().len() >= settings.count_max {
            return Err(refused(format!("there are {} views, as many as [views] max allows", settings.count_max)));
        }
        if definition.text.len() > settings.definition_bytes_max {
            let max = settings.definition_bytes_max;
            return Err(refused(format!(
                "the definition has more than {max} bytes, which [views] definition_bytes allows"
            )));
        }
        let view = self.plan(&engine, definition).await?;
        let failed = |message: String| QueryError::Failed { message };
        // Its definition first: a view that was answered for is there after a crash.
        let kept = (settings.kept.clone(), definition.clone());
        let saved = tokio::task::spawn_blocking(move || kept::save(&kept.0, &kept.1)).await;
        saved.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
        let entry = Entry::new(running, definition.clone(), false);
        match self.open(running, &engine, &entry, &view).await {
            Ok(runner) => {
                *entry.view.write() = Some(view);
                self.entries.write().insert(name.clone(), Arc::clone(&entry));
                self.spawn(&entry, Some(runner));
                tracing::info!(view = %name, "view created");
                Ok(())
            }
            Err(error) => {
                kept::remove(&settings.kept, name).map_err(failed)?;
                Err(match error {
                    ViewError::Query(error) => error,
                    ViewError::Stuck(message) => refused(message),
                    error @ ViewError::Sink(_) => failed(error.to_string()),
                })
            }
        }
    }

    async fn drop_view(&self, running: &Running, name: &StreamName, if_exists: bool) -> Result<(), QueryError> {
        let Some(entry) = self.entries.read().get(name).cloned() else {
            return if if_exists { Ok(()) } else { Err(refused(format!("there is no view {name}"))) };
        };
        if entry.is_configured {
            return Err(refused(format!("view {name} stands in a file of [views] directory: remove it there")));
        }
        let others = self.all();
        let over = others
            .iter()
            .find(|other| other.planned().is_some_and(|view| view.shape.views.values().any(|source| source == name)));
        if let Some(over) = over {
            return Err(refused(format!("view {} reads {name}: drop it first", over.definition.name)));
        }
        entry.stop.cancel();
        let task = entry.task.lock().take();
        if let Some(task) = task {
            // Ended by the word above; that it was in the middle of something does not matter.
            let _ = task.await;
        }
        entry.sink.idle().await;
        kept::remove(&running.settings.kept, name).map_err(|message| QueryError::Failed { message })?;
        self.entries.write().remove(name);
        if let Some(engine) = running.engine.upgrade() {
            engine.newest().forget();
        }
        tracing::info!(view = %name, "view dropped; its stream stays");
        Ok(())
    }

    async fn open(
        self: &Arc<Self>,
        running: &Running,
        engine: &Arc<Engine>,
        entry: &Entry,
        view: &Arc<View>,
    ) -> Result<Runner, ViewError> {
        let settings = &running.settings;
        let [of_one, of_all] = PARTIALS_BYTES_MAX;
        let limits = RunLimits {
            rows_max: settings.answer_rows_max,
            bytes_max: settings.answer_bytes_max,
            windows_max: settings.windows_max,
            partials_bytes_max: of_one.min(of_all / settings.count_max.max(1)),
            record_every_us: i64::try_from(settings.record_every.as_micros()).unwrap_or(i64::MAX),
        };
        let views = Arc::downgrade(self);
        let settled = Arc::new(move |name: &StreamName| {
            let views = views.upgrade()?;
            let entry = views.entries.read().get(name).cloned();
            entry.and_then(|entry| entry.settled())
        });
        let sink = Arc::clone(&entry.sink);
        Runner::open(Arc::clone(engine), sink, Arc::clone(view), settled, limits, running.now()).await
    }

    /// The task of one view: it wakes when one of its tables changes or a second has gone, and ends when it is dropped.
    async fn keep(self: &Arc<Self>, entry: &Arc<Entry>, mut runner: Option<Runner>) {
        let Some(running) = self.running.get() else { return };
        let mut retry = RETRY[0];
        let Some(mut changed) = running.engine.upgrade().map(|engine| engine.tables().changed()) else { return };
        loop {
            changed.mark_unchanged();
            let seen = running.moves(entry);
            let turn = match self.turn(running, entry, &mut runner).await {
                Some(turn) => turn,
                None => return,
            };
            match turn {
                Ok(Round::More) => {
                    retry = RETRY[0];
                    tokio::task::yield_now().await;
                }
                Ok(Round::Done) => {
                    retry = RETRY[0];
                    let tick = tokio::time::sleep(TICK);
                    tokio::pin!(tick);
                    loop {
                        tokio::time::sleep(running.settings.pause).await;
                        tokio::select! {
                            change = changed.changed() => match change {
                                Ok(()) if seen.is_some() && running.moves(entry) == seen => {}
                                Ok(()) => break,
                                Err(_) => return,
                            },
                            () = &mut tick => break,
                        }
                    }
                }
                Err(error) => {
                    entry.failed(&error);
                    // Whether its last append is there is read again.
                    runner = None;
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY[1]);
                }
            }
        }
    }

    /// One round; None when the engine is gone.
    async fn turn(
        self: &Arc<Self>,
        running: &Running,
        entry: &Arc<Entry>,
        runner: &mut Option<Runner>,
    ) -> Option<Result<Round, ViewError>> {
        let engine = running.engine.upgrade()?;
        let turn = async {
            let view = match entry.planned() {
                Some(view) if view.is_current(engine.tables().as_ref()) => view,
                before => {
                    *runner = None;
                    let (tables, name) = (engine.tables(), &entry.definition.name);
                    let began = view::changes(name).is_ok_and(|changes| tables.cold(&changes).is_some());
                    if before.is_none() && !began && tables.cold(name).is_some() {
                        return Err(refused(format!("{name} is a table already: choose another name")).into());
                    }
                    let view = self.plan(&engine, &entry.definition).await?;
                    // Whoever asks it sees what is there, whether it goes on or not.
                    if before.is_none() {
                        *entry.view.write() = Some(Arc::clone(&view));
                    }
                    view
                }
            };
            let open = match runner {
                Some(runner) => runner,
                None => {
                    let open = self.open(running, &engine, entry, &view).await?;
                    *entry.view.write() = Some(view);
                    runner.insert(open)
                }
            };
            let round = open.round(running.now()).await?;
            *entry.doing.lock() = Doing::Running(open.progress().clone());
            Ok(round)
        };
        Some(turn.await)
    }
}

#[cfg(test)]
pub(crate) mod tests;
