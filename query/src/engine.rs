//! Plans a statement once, and runs it as often as it is asked, each time over fresh frozen tables.
//!
//! Read only: statements that would write, define or change something are refused when they are planned and again
//! when they run; but for those that make and drop views, which are carried out when they run, if the caller may. Each
//! statement has a caller, whose rows alone it sees, and a place in the caller's lane ([`enter`]), which limits its time from
//! parsing to the last row and its memory; it spills to disk when it can. Dropping a result stream cancels its statement.
//!
//! [`enter`]: Engine::enter

use std::path::PathBuf;
use std::sync::Arc;

use arrow_schema::SchemaRef;
use datafusion::catalog::CatalogProvider;
use datafusion::common::{DataFusionError, ParamValues};
use datafusion::execution::context::{SQLOptions, SessionState};
use datafusion::execution::memory_pool::{GreedyMemoryPool, MemoryPool};
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::execute_stream;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::dialect::{Dialect, GenericDialect};
use futures::StreamExt;
use tokio_util::sync::CancellationToken;
use wire::StreamName;

use crate::as_of::{self, AsOf};
use crate::breadth;
use crate::caller::{Caller, Right};
use crate::catalog::{CATALOG, PublicSchema, SCHEMA, Tables, WeirCatalog, is_table};
use crate::cold::KeptPages;
use crate::columns;
use crate::functions;
use crate::functions::asof::syntax;
use crate::functions::latest::cache::LatestCache;
use crate::functions::latest::distinct_on;
use crate::fused_table::{Newest, View, pin};
use crate::lanes::{LaneSettings, Lanes, Place};
use crate::links::board::Board;
use crate::memory::StatementPool;
use crate::names;
use crate::remark::{self, Remark};
use crate::sink::Sink;
use crate::statements::{Running, State, Statements};
use crate::system::SystemSchema;
use crate::uncounted;
use crate::views::definition::Command;
use crate::views::{ViewSettings, Views};

mod ask;
mod explain;
mod limited;
mod parts;
mod ready;

pub use ask::VIEWS_LANE;
pub(crate) use ask::{Question, States};
pub use explain::QueryError;
use explain::{Changes, Stopped};
pub(crate) use limited::bytes_of;
use limited::limited;
pub(crate) use parts::Parts;
pub(crate) use ready::Ready;

/// Longest statement in bytes.
pub const SQL_BYTES_MAX: usize = 1 << 20;

/// Beside the memory of statements this part of as much keeps pages that were read lately.
const PAGES_PART: usize = 16;

/// Limits of the engine. Those of one statement are its lane's.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Memory of all running statements together, bytes.
    pub memory_bytes_max: usize,
    /// What all of them may have spilled to disk at a time, bytes.
    pub spill_bytes_max: u64,
    /// Where they spill to: a directory of their own, which their owner empties at the start. The system's, if none is named.
    pub spill_directory: Option<PathBuf>,
    /// Rows and bytes of one answer.
    pub result_rows_max: u64,
    pub result_bytes_max: u64,
    /// Rows of one JSON answer.
    pub json_rows_max: usize,
    /// Rows that one `time_bucket_gapfill` may make.
    pub gapfill_rows_max: usize,
    /// Memory for the newest rows of all streams that `latest` keeps, bytes.
    pub latest_bytes_max: usize,
    /// Statements that `system.queries` remembers.
    pub recent_max: usize,
    /// At least one.
    pub lanes: Vec<LaneSettings>,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            memory_bytes_max: 1 << 30,
            spill_bytes_max: 16 << 30,
            spill_directory: None,
            result_rows_max: 1_000_000_000,
            result_bytes_max: 64 << 30,
            json_rows_max: 1_000_000,
            gapfill_rows_max: 1_000_000,
            latest_bytes_max: 256 << 20,
            recent_max: 1_000,
            lanes: vec![LaneSettings::default()],
        }
    }
}

/// A statement that is planned and not pinned: it may run many times.
#[derive(Debug, Clone)]
pub struct Prepared {
    plan: Arc<LogicalPlan>,
    columns: SchemaRef,
    /// What is done before its rows are given.
    command: Option<Arc<Command>>,
    /// What it says of a table, when it is done.
    remark: Option<Arc<Remark>>,
}

impl Prepared {
    /// The plan over live tables: for its parameters.
    pub fn plan(&self) -> &LogicalPlan {
        &self.plan
    }

    /// What is answered in place of rows, when it changes something.
    pub(crate) fn tag(&self) -> Option<&'static str> {
        self.command.as_ref().map(|command| command.tag())
    }

    /// The columns of its answer.
    pub fn columns(&self) -> &SchemaRef {
        &self.columns
    }
}

/// The engine: one session for everybody, since nothing in it can be changed.
#[derive(Debug)]
pub struct Engine {
    session: SessionContextDebug,
    tables: Arc<dyn Tables>,
    latest: Arc<LatestCache>,
    settings: EngineSettings,
    lanes: Lanes,
    statements: Arc<Statements>,
    views: Arc<Views>,
    links: Arc<Board>,
    /// Plans what is asked many times.
    planner: Arc<ready::Planner>,
    newest: Newest,
}

struct SessionContextDebug(SessionContext);
impl std::fmt::Debug for SessionContextDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionContext")
    }
}

impl Engine {
    /// An engine over these tables.
    ///
    /// # Errors
    /// When the limits cannot be set up (no place to spill to).
    pub fn new(tables: Arc<dyn Tables>, settings: EngineSettings) -> Result<Self, QueryError> {
        let mut config = SessionConfig::new()
            .with_default_catalog_and_schema(CATALOG, SCHEMA)
            .with_create_default_catalog_and_schema(false)
            .with_information_schema(true)
            .with_extension(Arc::new(KeptPages::new(settings.memory_bytes_max / PAGES_PART)));
        let options = config.options_mut();
        options.execution.parquet.schema_force_view_types = false;
        options.execution.parquet.pushdown_filters = true;
        // It refuses EXCEPT and INTERSECT of columns of which one side only may be null.
        options.execution.skip_physical_aggregate_schema_check = true;
        options.sql_parser.collect_spans = true;
        // Each sort of each thread sets so much aside for merging: the usual 10 MB are more than small lanes have.
        options.execution.sort_spill_reservation_bytes = 1 << 20;
        options.sql_parser.map_string_types_to_utf8view = false;
        let mut runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(GreedyMemoryPool::new(settings.memory_bytes_max)))
            .with_max_temp_directory_size(settings.spill_bytes_max);
        if let Some(directory) = &settings.spill_directory {
            runtime = runtime.with_temp_file_path(directory);
        }
        let runtime = runtime.build_arc().map_err(|error| QueryError::Failed { message: error.to_string() })?;
        let session = SessionContext::new_with_state(functions::state(config, runtime, settings.gapfill_rows_max));
        let views = Arc::<Views>::default();
        let public = Arc::new(PublicSchema { tables: Arc::clone(&tables), views: Arc::clone(&views) });
        let system = Arc::new(SystemSchema { tables: Arc::clone(&tables) });
        session.register_catalog(CATALOG, Arc::new(WeirCatalog { public, system }) as Arc<dyn CatalogProvider>);
        let lanes = Lanes::new(&settings.lanes)
            .map_err(|error| QueryError::Failed { message: format!("start threads for statements: {error}") })?;
        let latest = Arc::new(LatestCache::new(settings.latest_bytes_max));
        let statements = Statements::new(settings.recent_max);
        equip(&session, &tables, &latest)?;
        let planner = Arc::new(ready::Planner::of(&session));
        let session = SessionContextDebug(session);
        let links = Arc::default();
        let newest = Newest::default();
        Ok(Self { session, tables, latest, settings, lanes, statements, views, links, planner, newest })
    }

    /// Gives Weir's functions to a session that plans statements for this engine.
    ///
    /// # Errors
    /// When the session takes none.
    pub(crate) fn equip(&self, session: &SessionContext) -> Result<(), QueryError> {
        equip(session, &self.tables, &self.latest)
    }

    /// The session that statements are planned in.
    pub fn session(&self) -> &SessionContext {
        &self.session.0
    }

    /// The tables that statements may name.
    pub(crate) fn tables(&self) -> &Arc<dyn Tables> {
        &self.tables
    }

    /// The newest states of tables, frozen once for all views.
    pub(crate) fn newest(&self) -> &Newest {
        &self.newest
    }

    /// The views that are kept.
    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// Whether a stream has the name of a view, or of a view's results: nobody but the view writes there.
    pub fn is_of_a_view(&self, stream: &StreamName) -> bool {
        self.views.owns(stream)
    }

    /// How links stand.
    pub(crate) fn links(&self) -> &Arc<Board> {
        &self.links
    }

    /// Begins to keep views; they stop with the token.
    ///
    /// # Errors
    /// When a definition that is kept or configured cannot be read.
    pub fn keep_views(
        self: &Arc<Self>,
        sink: Arc<dyn Sink>,
        settings: ViewSettings,
        token: CancellationToken,
    ) -> Result<(), String> {
        self.views.start(self, sink, settings, token)
    }

    /// What `latest` keeps.
    #[cfg(test)]
    pub(crate) fn latest_cache(&self) -> &Arc<LatestCache> {
        &self.latest
    }

    /// The limits.
    pub fn settings(&self) -> &EngineSettings {
        &self.settings
    }

    /// Waits for a place in the caller's lane. Statements that begin in one place run beside each other.
    ///
    /// # Errors
    /// When too many wait, or none became free in time.
    pub async fn enter(&self, caller: &Caller) -> Result<Arc<Place>, QueryError> {
        self.lanes.enter(caller).await.map(Arc::new)
    }

    /// A statement begins: its time runs.
    pub fn begin(&self, caller: &Caller, place: &Arc<Place>, text: &str) -> Arc<Running> {
        self.statements.begin(caller, place, text, &self.session().runtime_env().memory_pool)
    }

    /// Ends a statement; false when there is none of this id that the caller may end.
    pub fn cancel(&self, id: u64, caller: &Caller) -> bool {
        self.statements.cancel(id, caller)
    }

    /// Whether a statement may be parsed in this dialect.
    ///
    /// # Errors
    /// When it is too long.
    pub fn measure(&self, dialect: &dyn Dialect, sql: &str) -> Result<(), QueryError> {
        if sql.len() > SQL_BYTES_MAX {
            return Err(QueryError::Invalid { message: format!("the statement has more than {SQL_BYTES_MAX} bytes") });
        }
        breadth::check(dialect, sql)
    }

    /// Plans a statement of Weir's own dialect, over tables as of `whole` where it says nothing else.
    ///
    /// # Errors
    /// When it does not parse, names what is not there, would change something, takes too long, or is cancelled.
    pub async fn prepare(
        &self,
        running: &Arc<Running>,
        sql: &str,
        whole: Option<AsOf>,
    ) -> Result<Prepared, QueryError> {
        let dialect = GenericDialect {};
        let named = self.measure(&dialect, sql).and_then(|()| as_of::name(&dialect, sql));
        let sql = named.inspect_err(|_| running.ended(State::Failed))?.into_owned();
        let command = Command::parse(&dialect, &sql).inspect_err(|_| running.ended(State::Failed))?;
        let sql = match &command {
            Some(Command::Show) => "SELECT * FROM system.views".to_owned(),
            Some(command) => format!("SELECT '{}' AS done", command.tag()),
            None => sql,
        };
        let command = command.filter(|command| *command != Command::Show).map(Arc::new);
        let sql = syntax::words(&dialect, &sql).unwrap_or(sql);
        let (state, tables, views) = (self.session().state(), Arc::clone(&self.tables), Arc::clone(&self.views));
        let parse = move || {
            let dialect = state.config().options().sql_parser.dialect;
            let mut statement = state.sql_to_statement(&sql, &dialect)?;
            as_of::apply(&mut statement, whole, &|name| views.has(name) || is_table(tables.as_ref(), name));
            Ok((state, statement))
        };
        let prepared = self.plan(running, parse).await?;
        Ok(Prepared { command, ..prepared })
    }

    /// Computes something where the statement runs, so that it holds up no door, and waits for it until its deadline.
    /// What cannot pause then ends by itself, unheard, and keeps its place in the lane until it has.
    ///
    /// # Errors
    /// When the deadline comes first, or somebody cancels.
    pub async fn aside<T, F>(&self, running: &Arc<Running>, work: F) -> Result<T, QueryError>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let place = running.place().ok_or_else(ended)?;
        let kept = Arc::clone(&place);
        let work = place.lane().execution.compute(async move {
            let done = work.await;
            drop(kept);
            done
        });
        let done = tokio::select! {
            biased;
            () = running.cancelled().cancelled() => Err(Stopped::Cancelled.told()),
            done = tokio::time::timeout_at(running.deadline(), work) => match done {
                Ok(done) => done.map_err(|error| self.explain(error)),
                Err(_) => Err(Stopped::Overdue(running.timeout()).told()),
            },
        };
        done.inspect_err(|error| running.ended(state_of(error)))
    }

    /// Plans a statement that is parsed by this, in a session with the engine's tables.
    ///
    /// # Errors
    /// As [`Engine::prepare`].
    pub async fn plan<F>(&self, running: &Arc<Running>, parse: F) -> Result<Prepared, QueryError>
    where
        F: FnOnce() -> Result<(SessionState, Statement), DataFusionError> + Send + 'static,
    {
        let (tables, latest) = (Arc::clone(&self.tables), Arc::clone(&self.latest));
        let plan = async move {
            let (state, statement) = parse()?;
            if let Some(remark) = remark::of(&statement, tables.as_ref())? {
                let plan = remark::plan()?;
                let columns = columns::of(&state, &plan);
                return Ok(Prepared { plan: Arc::new(plan), columns, command: None, remark: Some(Arc::new(remark)) });
            }
            let plan = columns::plain(names::plan(&state, statement).await?)?;
            let plan = distinct_on::rewrite(plan, &latest)?;
            read_only(&plan)?;
            uncounted::check(&plan)?;
            let columns = columns::of(&state, &plan);
            Ok(Prepared { plan: Arc::new(plan), columns, command: None, remark: None })
        };
        let planned = self.aside(running, Box::pin(plan)).await?.map_err(|error| self.explain(error));
        planned.inspect_err(|error| running.ended(state_of(error)))
    }

    /// Runs a statement over tables frozen now, as its caller may see them. Its limits hold for its last row, too.
    ///
    /// # Errors
    /// When it cannot start; errors later are items of the stream.
    pub async fn execute(
        &self,
        running: &Arc<Running>,
        prepared: &Prepared,
        parameters: Option<ParamValues>,
    ) -> Result<SendableRecordBatchStream, QueryError> {
        if let Some(command) = &prepared.command {
            let (views, caller, command) = (Arc::clone(&self.views), running.caller().clone(), Arc::clone(command));
            // To its end, also when nobody waits for it any more.
            let done = tokio::spawn(async move { Box::pin(views.carry_out(&caller, &command)).await });
            let done = done.await.unwrap_or_else(|error| Err(QueryError::Failed { message: error.to_string() }));
            done.inspect_err(|error| running.ended(state_of(error)))?;
        }
        if let Some(remark) = &prepared.remark {
            self.say(running, remark).await.inspect_err(|error| running.ended(state_of(error)))?;
        }
        let start = Start {
            views: Arc::clone(&self.views),
            links: Arc::clone(&self.links),
            session: self.session().clone(),
            tables: Arc::clone(&self.tables),
            statements: Arc::clone(&self.statements),
            running: Arc::clone(running),
        };
        let start = Box::pin(start.run(prepared.clone(), parameters));
        let (deadline, place) = (running.deadline(), running.place().ok_or_else(ended)?);
        let started = tokio::select! {
            biased;
            () = running.cancelled().cancelled() => Err(Stopped::Cancelled.told()),
            rows = tokio::time::timeout_at(deadline, place.lane().execution.run(start, deadline, running.cancelled().clone())) => match rows {
                Ok(rows) => rows.map_err(|error| self.explain(error)),
                Err(_) => Err(Stopped::Overdue(running.timeout()).told()),
            },
        };
        let rows = started.inspect_err(|error| running.ended(state_of(error)))?;
        Ok(limited(rows, Arc::clone(running), [self.settings.result_rows_max, self.settings.result_bytes_max]))
    }

    /// Writes what is said of a table into it, for a caller who may.
    async fn say(&self, running: &Arc<Running>, remark: &Arc<Remark>) -> Result<(), QueryError> {
        let caller = running.caller();
        if !caller.may(Right::Comment) {
            let message = format!("`{}` may not comment on tables", caller.name());
            return Err(QueryError::Denied { message });
        }
        let (tables, remark) = (Arc::clone(&self.tables), Arc::clone(remark));
        let said = self.aside(running, async move { tables.say(&remark).await }).await?;
        said.map_err(|error| QueryError::Failed { message: error.to_string() })
    }
}

fn equip(session: &SessionContext, tables: &Arc<dyn Tables>, latest: &Arc<LatestCache>) -> Result<(), QueryError> {
    let equipped = functions::register(session, tables, latest);
    equipped.map_err(|error| QueryError::Failed { message: error.to_string() })
}

/// Where a plan is carried out, in this memory. Functions are looked up when it is made: it goes without their names.
fn task(state: &SessionState, pool: &Arc<StatementPool>) -> Arc<TaskContext> {
    let memory_pool: Arc<dyn MemoryPool> = Arc::clone(pool) as _;
    let runtime = RuntimeEnv { memory_pool, ..RuntimeEnv::clone(state.runtime_env()) };
    let (id, config) = (state.session_id().to_owned(), state.config().clone());
    let (scalar, higher, aggregate, window) = Default::default();
    Arc::new(TaskContext::new(None, id, config, scalar, higher, aggregate, window, Arc::new(runtime)))
}

fn ended() -> QueryError {
    QueryError::Failed { message: "the statement has ended".to_owned() }
}

/// Gives a statement's place back when its task ends.
struct Leaves(Arc<Running>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.leave();
    }
}

fn state_of(error: &QueryError) -> State {
    if matches!(error, QueryError::Cancelled) { State::Cancelled } else { State::Failed }
}

/// What the execution of a statement needs.
struct Start {
    views: Arc<Views>,
    links: Arc<Board>,
    session: SessionContext,
    tables: Arc<dyn Tables>,
    statements: Arc<Statements>,
    running: Arc<Running>,
}

impl Start {
    /// Freezes the tables of a plan and begins to run it, in the statement's own memory.
    async fn run(
        self,
        prepared: Prepared,
        parameters: Option<ParamValues>,
    ) -> Result<SendableRecordBatchStream, DataFusionError> {
        let mut plan = LogicalPlan::clone(&prepared.plan);
        if let Some(parameters) = parameters {
            plan = plan.with_param_values(parameters)?;
        }
        // Checked again: parameters made another plan of it.
        read_only(&plan)?;
        uncounted::check(&plan)?;
        let state = self.session.state();
        let caller = self.running.caller();
        let (views, links) = (self.views.as_ref(), self.links.as_ref());
        let view = View { tables: self.tables.as_ref(), statements: &self.statements, views, links, caller };
        let pinned = pin(plan, &state, view).await?;
        let physical = state.create_physical_plan(&pinned).await?;
        let rows = execute_stream(physical, task(&state, self.running.pool()))?;
        // As long as it computes it has its place, and no longer: who does not take the rows keeps nobody out.
        let (schema, leaves) = (rows.schema(), Leaves(self.running));
        let rows = rows.inspect(move |_| {
            let _ = &leaves;
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }
}

fn read_only(plan: &LogicalPlan) -> Result<(), DataFusionError> {
    let options = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    options.verify_plan(plan).map_err(|error| DataFusionError::External(Box::new(Changes(error.strip_backtrace()))))
}

#[cfg(test)]
pub(crate) mod tests;
