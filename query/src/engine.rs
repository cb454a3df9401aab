//! Plans a statement once, and runs it as often as it is asked, each time over fresh frozen tables.
//!
//! Read only: statements that would write, define or change something are refused when they are planned and again
//! when they run. A time limit covers everything from parsing to the last row; memory is one pool for all statements,
//! which spill to disk when they can. Dropping a result stream cancels its statement.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::RecordBatch;
use datafusion::catalog::CatalogProvider;
use datafusion::common::{DataFusionError, ParamValues, SchemaError};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::context::{SQLOptions, SessionState};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::execute_stream;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::dialect::{Dialect, GenericDialect};
use futures::StreamExt;
use futures::stream;
use tokio::time::Instant;

use crate::breadth;
use crate::catalog::{CATALOG, PublicSchema, SCHEMA, Tables, WeirCatalog};
use crate::execution::Execution;
use crate::functions;
use crate::functions::asof::syntax;
use crate::functions::latest::cache::LatestCache;
use crate::fused_table::pin;
use crate::names;

/// Longest statement in bytes.
pub const SQL_BYTES_MAX: usize = 1 << 20;

/// Limits of the engine.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Memory of all running statements together, bytes.
    pub memory_bytes_max: usize,
    /// From parsing to the last row; what was prepared earlier has it anew at each execution.
    pub timeout: Duration,
    /// Rows of one JSON answer.
    pub json_rows_max: usize,
    /// Rows that one `time_bucket_gapfill` may make.
    pub gapfill_rows_max: usize,
    /// Memory for the newest rows of all streams that `latest` keeps, bytes.
    pub latest_bytes_max: usize,
    /// Threads that statements run on, beside those of the doors.
    pub threads: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            memory_bytes_max: 1 << 30,
            timeout: Duration::from_secs(300),
            json_rows_max: 1_000_000,
            gapfill_rows_max: 1_000_000,
            latest_bytes_max: 256 << 20,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// Why a statement has no answer. The text is meant for the person who asked.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    #[error("{message}")]
    Syntax { message: String },
    #[error("{message}")]
    UnknownTable { message: String, hint: Option<String> },
    #[error("{message}")]
    UnknownColumn { message: String, hint: Option<String> },
    #[error("Weir answers questions only: {message}")]
    ReadOnly { message: String },
    #[error("the statement ran longer than {}", humane(*limit))]
    Timeout { limit: Duration },
    #[error("the statement needs more memory than is set aside: {message}")]
    Memory { message: String },
    #[error("{message}")]
    Invalid { message: String },
    #[error("{message}")]
    Failed { message: String },
}

impl QueryError {
    /// What to do about it, when that is known.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::UnknownTable { hint, .. } | Self::UnknownColumn { hint, .. } => hint.as_deref(),
            _ => None,
        }
    }
}

fn humane(limit: Duration) -> String {
    if limit.subsec_nanos() == 0 { format!("{} s", limit.as_secs()) } else { format!("{} ms", limit.as_millis()) }
}

/// A statement that is planned and not pinned: it may run many times.
#[derive(Debug, Clone)]
pub struct Prepared {
    plan: Arc<LogicalPlan>,
}

impl Prepared {
    /// The plan over live tables: for its columns and parameters.
    pub fn plan(&self) -> &LogicalPlan {
        &self.plan
    }
}

/// The engine: one session for everybody, since nothing in it can be changed.
#[derive(Debug)]
pub struct Engine {
    session: SessionContextDebug,
    tables: Arc<dyn Tables>,
    latest: Arc<LatestCache>,
    settings: EngineSettings,
    execution: Execution,
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
            .with_information_schema(true);
        let options = config.options_mut();
        options.execution.parquet.schema_force_view_types = false;
        options.execution.parquet.pushdown_filters = true;
        options.sql_parser.collect_spans = true;
        options.sql_parser.map_string_types_to_utf8view = false;
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(FairSpillPool::new(settings.memory_bytes_max)))
            .build_arc()
            .map_err(|error| QueryError::Failed { message: error.to_string() })?;
        let session = SessionContext::new_with_state(functions::state(config, runtime, settings.gapfill_rows_max));
        let public = Arc::new(PublicSchema { tables: Arc::clone(&tables) });
        session.register_catalog(CATALOG, Arc::new(WeirCatalog { public }) as Arc<dyn CatalogProvider>);
        let execution = Execution::new(settings.threads)
            .map_err(|error| QueryError::Failed { message: format!("start threads for statements: {error}") })?;
        let latest = Arc::new(LatestCache::new(settings.latest_bytes_max));
        let engine = Self { session: SessionContextDebug(session), tables, latest, settings, execution };
        engine.equip(engine.session())?;
        Ok(engine)
    }

    /// Gives Weir's functions to a session that plans statements for this engine.
    ///
    /// # Errors
    /// When the session takes none.
    pub(crate) fn equip(&self, session: &SessionContext) -> Result<(), QueryError> {
        functions::register(session, &self.tables, &self.latest)
            .map_err(|error| QueryError::Failed { message: error.to_string() })
    }

    /// The session that statements are planned in.
    pub fn session(&self) -> &SessionContext {
        &self.session.0
    }

    /// The tables that statements may name.
    pub(crate) fn tables(&self) -> &Arc<dyn Tables> {
        &self.tables
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

    /// When a statement that begins now must have given its last row.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.settings.timeout
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

    /// Plans a statement, until the deadline.
    ///
    /// # Errors
    /// When it does not parse, names what is not there, would change something, or takes too long.
    pub async fn prepare(&self, sql: &str, deadline: Instant) -> Result<Prepared, QueryError> {
        self.measure(&GenericDialect {}, sql)?;
        let sql = syntax::words(&GenericDialect {}, sql).unwrap_or_else(|| sql.to_owned());
        let state = self.session().state();
        let parse = move || {
            let dialect = state.config().options().sql_parser.dialect;
            state.sql_to_statement(&sql, &dialect).map(|statement| (state, statement))
        };
        self.plan(deadline, parse).await
    }

    /// Computes something where statements run, so that it holds up no door, and waits for it until the deadline.
    /// What cannot pause then ends by itself, unheard.
    ///
    /// # Errors
    /// When the deadline comes first.
    pub async fn aside<T, F>(&self, deadline: Instant, work: F) -> Result<T, QueryError>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        tokio::time::timeout_at(deadline, self.execution.compute(work))
            .await
            .map_err(|_| QueryError::Timeout { limit: self.settings.timeout })?
            .map_err(|error| self.explain(error))
    }

    /// Plans a statement that is parsed by this, in a session with the engine's tables.
    ///
    /// # Errors
    /// As [`Engine::prepare`].
    pub async fn plan<F>(&self, deadline: Instant, parse: F) -> Result<Prepared, QueryError>
    where
        F: FnOnce() -> Result<(SessionState, Statement), DataFusionError> + Send + 'static,
    {
        let planned = self.aside(deadline, async move {
            let (state, statement) = parse()?;
            let plan = names::plan(&state, statement).await?;
            read_only(&plan)?;
            Ok(Prepared { plan: Arc::new(plan) })
        });
        planned.await?.map_err(|error| self.explain(error))
    }

    /// Runs a statement over tables frozen now; the deadline holds for its last row, too.
    ///
    /// # Errors
    /// When it cannot start; errors later are items of the stream.
    pub async fn execute(
        &self,
        prepared: &Prepared,
        parameters: Option<ParamValues>,
        deadline: Instant,
    ) -> Result<SendableRecordBatchStream, QueryError> {
        let start = start(self.session().clone(), Arc::clone(&self.tables), prepared.clone(), parameters);
        let rows = tokio::time::timeout_at(deadline, self.execution.run(Box::pin(start), deadline))
            .await
            .map_err(|_| QueryError::Timeout { limit: self.settings.timeout })?
            .map_err(|error| self.explain(error))?;
        Ok(limited(rows, deadline, self.settings.timeout))
    }

    /// All rows of a statement: for small answers and tests.
    ///
    /// # Errors
    /// As [`Engine::prepare`] and [`Engine::execute`].
    pub async fn rows(&self, sql: &str) -> Result<Vec<RecordBatch>, QueryError> {
        let deadline = self.deadline();
        let prepared = self.prepare(sql, deadline).await?;
        let mut stream = self.execute(&prepared, None, deadline).await?;
        let mut rows = Vec::new();
        while let Some(batch) = stream.next().await {
            rows.push(batch.map_err(|error| self.explain(error))?);
        }
        Ok(rows)
    }

    /// An error in the words of the person who asked, with the nearest name when one is unknown.
    pub fn explain(&self, error: DataFusionError) -> QueryError {
        let place = error
            .diagnostic()
            .and_then(|diagnostic| diagnostic.span)
            .map(|span| format!(" at line {}, column {}", span.start.line, span.start.column))
            .unwrap_or_default();
        let root = error.find_root();
        match root {
            DataFusionError::SQL(parser, _) => QueryError::Syntax { message: format!("{parser}{place}") },
            DataFusionError::SchemaError(schema, _) => match schema.as_ref() {
                SchemaError::FieldNotFound { field, valid_fields } => {
                    let names: Vec<&str> = valid_fields.iter().map(|column| column.name.as_str()).collect();
                    QueryError::UnknownColumn {
                        message: format!("no column `{}`{place}", field.name),
                        hint: nearest(&field.name, &names).or_else(|| {
                            Some("there are no columns here: name a table after FROM, or put text into 'quotes'".into())
                        }),
                    }
                }
                other => QueryError::Invalid { message: format!("{other}{place}") },
            },
            DataFusionError::ResourcesExhausted(message) => QueryError::Memory { message: message.clone() },
            DataFusionError::Plan(message) => self.explain_plan(message, &place),
            DataFusionError::NotImplemented(message) => {
                QueryError::Invalid { message: format!("not supported: {message}") }
            }
            DataFusionError::External(external) if external.is::<Overdue>() => {
                QueryError::Timeout { limit: self.settings.timeout }
            }
            DataFusionError::External(external) if external.is::<Changes>() => {
                QueryError::ReadOnly { message: external.to_string() }
            }
            DataFusionError::Execution(message) | DataFusionError::Configuration(message) => {
                QueryError::Invalid { message: message.clone() }
            }
            DataFusionError::ArrowError(arrow, _) => QueryError::Invalid { message: arrow.to_string() },
            other => QueryError::Failed { message: other.strip_backtrace() },
        }
    }

    fn explain_plan(&self, message: &str, place: &str) -> QueryError {
        let quoted = message.split('\'').nth(1);
        match quoted {
            Some(table) if message.contains("not found") && message.starts_with("table ") => {
                let name = table.rsplit('.').next().unwrap_or(table);
                let streams = self.tables.streams();
                let names: Vec<&str> = streams.iter().map(wire::StreamName::as_str).collect();
                let none = || "there is no table yet: a table appears with its first batch".to_owned();
                QueryError::UnknownTable {
                    message: format!("no table `{name}`{place}"),
                    hint: nearest(name, &names).or_else(|| Some(none())),
                }
            }
            _ => QueryError::Invalid { message: format!("{message}{place}") },
        }
    }
}

/// Freezes the tables of a plan and begins to run it.
async fn start(
    session: SessionContext,
    tables: Arc<dyn Tables>,
    prepared: Prepared,
    parameters: Option<ParamValues>,
) -> Result<SendableRecordBatchStream, DataFusionError> {
    let mut plan = LogicalPlan::clone(&prepared.plan);
    if let Some(parameters) = parameters {
        plan = plan.with_param_values(parameters)?;
    }
    // Checked again: parameters made another plan of it.
    read_only(&plan)?;
    let pinned = pin(plan, tables.as_ref()).await?;
    let state = session.state();
    let physical = state.create_physical_plan(&pinned).await?;
    execute_stream(physical, state.task_ctx())
}

fn read_only(plan: &LogicalPlan) -> Result<(), DataFusionError> {
    let options = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    options.verify_plan(plan).map_err(|error| DataFusionError::External(Box::new(Changes(error.strip_backtrace()))))
}

/// A plan that would change something.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Changes(String);

/// "did you mean" for a name, or the names there are, if any.
fn nearest(name: &str, names: &[&str]) -> Option<String> {
    let best = names
        .iter()
        .map(|candidate| (strsim::jaro_winkler(&name.to_lowercase(), candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, candidate)) if likeness > 0.7 => Some(format!("did you mean `{candidate}`?")),
        Some(_) => Some(format!("there are: {}", names.join(", "))),
        None => None,
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the statement ran too long")]
struct Overdue;

fn limited(rows: SendableRecordBatchStream, deadline: Instant, limit: Duration) -> SendableRecordBatchStream {
    let schema = rows.schema();
    tracing::trace!(?limit, "statement started");
    let limited = stream::unfold(Some(rows), move |rows| async move {
        let mut rows = rows?;
        let overdue = || Some((Err(DataFusionError::External(Box::new(Overdue))), None));
        // Also when the next rows are ready: a slow reader must not get more time than the others.
        if Instant::now() >= deadline {
            return overdue();
        }
        match tokio::time::timeout_at(deadline, rows.next()).await {
            Ok(Some(item)) => Some((item, Some(rows))),
            // The statement's own task ends at the deadline, too: what it sent is then not all.
            Ok(None) if Instant::now() < deadline => None,
            Ok(None) | Err(_) => overdue(),
        }
    });
    Box::pin(RecordBatchStreamAdapter::new(schema, limited))
}

#[cfg(test)]
pub(crate) mod tests;
