//! Statements as Postgres clients send them: parsed with its dialect, planned, and run by the engine.
//!
//! Planning has a session of its own: the engine's tables, and `pg_catalog` beside them. Plans hold no rows; the
//! engine checks that they only read, and pins them each time they run.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::sync::Arc;
use std::time::Duration;

use arrow_pg::datatypes::df::deserialize_parameters;
use arrow_pg::datatypes::{arrow_schema_to_pg_fields, encode_recordbatch, into_pg_type};
use arrow_schema::DataType;
use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, MemoryCatalogProvider};
use datafusion::common::ParamValues;
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as Parsed;
use datafusion::sql::sqlparser::ast::{CreateView, Expr, ObjectType, Set, Statement};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion_pg_catalog::pg_catalog::context::EmptyContextProvider;
use datafusion_pg_catalog::pg_catalog::setup_pg_catalog;
use futures::channel::oneshot;
use futures::future::Shared;
use futures::{FutureExt, Sink, StreamExt, future, stream};
use pgwire::api::portal::{Format, Portal};
use pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use pgwire::api::results::{DataRowEncoder, FieldFormat, FieldInfo, QueryResponse, Response, Tag};
use pgwire::api::stmt::QueryParser;
use pgwire::api::store::PortalStore;
use pgwire::api::{ClientInfo, ClientPortalStore, ConnectionHandle, Type};
use pgwire::error::{PgWireError, PgWireResult};
use pgwire::messages::PgWireBackendMessage;

use super::described::Described;
use super::dialect::Dialect;
use super::session::Session;
use super::{copy, functions, refusal, sql_error};
use crate::as_of;
use crate::catalog::{CATALOG, SCHEMA, SYSTEM};
use crate::engine::{Engine, Prepared, QueryError};
use crate::serve::Readers;
use crate::statements::Running;

/// The schema of PostgreSQL's own tables.
const PG_CATALOG: &str = "pg_catalog";
/// Parameters of one statement, as many as the protocol can number.
const PARAMETERS_MAX: usize = 65_535;
/// `weir.lane`, as the words of a setting are joined.
const LANE_SETTING: &str = "weir_lane";

/// What a statement asks for.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Rows {
        prepared: Prepared,
        text: Arc<str>,
    },
    Copy {
        prepared: Prepared,
        text: Arc<str>,
        form: copy::Form,
    },
    /// A view is made or dropped.
    Command {
        prepared: Prepared,
        text: Arc<str>,
        tag: &'static str,
    },
    /// What a table or a column is.
    Comment {
        prepared: Prepared,
        text: Arc<str>,
    },
    /// The session's statements go to another lane.
    Lane(String),
    /// A statement about the session: answered, without effect.
    Done(&'static str),
    Begin,
    /// COMMIT or ROLLBACK.
    End(&'static str),
    Setting {
        name: String,
        value: String,
    },
}

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Statements {
    engine: Arc<Engine>,
    readers: Readers,
    planner: SessionContext,
    dialect: Arc<Dialect>,
}

impl Debug for Statements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Statements").field("engine", &self.engine).finish_non_exhaustive()
    }
}

impl Statements {
    pub(super) fn new(engine: Arc<Engine>, readers: Readers) -> Result<Self, QueryError> {
        let session = engine.session();
        let planner = SessionContext::new_with_config_rt(session.copied_config(), session.runtime_env());
        let catalog = MemoryCatalogProvider::new();
        for name in [SCHEMA, SYSTEM] {
            if let Some(schema) = session.catalog(CATALOG).and_then(|weir| weir.schema(name)) {
                catalog.register_schema(name, schema).map_err(|error| engine.explain(error))?;
            }
        }
        planner.register_catalog(CATALOG, Arc::new(catalog));
        engine.equip(&planner)?;
        setup_pg_catalog(&planner, CATALOG, EmptyContextProvider).map_err(|error| engine.explain(*error))?;
        if let Some(catalog) = planner.catalog(CATALOG)
            && let Some(inner) = catalog.schema(PG_CATALOG)
        {
            let described = Arc::new(Described::new(inner, planner.state_weak_ref()));
            catalog.register_schema(PG_CATALOG, described).map_err(|error| engine.explain(error))?;
        }
        for function in functions::all() {
            planner.register_udf(function);
        }
        let dialect = Arc::new(Dialect::new(Arc::clone(engine.tables())));
        Ok(Self { engine, readers, planner, dialect })
    }

    /// Every statement of a text.
    async fn parse(&self, running: &Arc<Running>, sql: &str) -> PgWireResult<Vec<Statement>> {
        self.engine.measure(&PostgreSqlDialect {}, sql).map_err(|error| sql_error(&error))?;
        let sql = as_of::name(&PostgreSqlDialect {}, sql).map_err(|error| sql_error(&error))?.into_owned();
        let dialect = Arc::clone(&self.dialect);
        let parsed = self.engine.aside(running, async move { dialect.parse(&sql) }).await;
        parsed.map_err(|error| sql_error(&error))?.map_err(|error| refusal("ERROR", "42601", error.to_string()))
    }

    async fn plan(&self, running: &Arc<Running>, mut statement: Statement) -> PgWireResult<Prepared> {
        as_of::apply_to(&mut statement, None, &|_| false);
        let (state, statement) = (self.planner.state(), Parsed::Statement(Box::new(statement)));
        let planned = self.engine.plan(running, move || Ok((state, statement))).await;
        planned.map_err(|error| sql_error(&error))
    }

    async fn understand(&self, session: &Session, running: &Arc<Running>, statement: Statement) -> PgWireResult<Asked> {
        let text = Arc::clone(running.text());
        Ok(match statement {
            Statement::StartTransaction { .. } => Asked::Begin,
            Statement::Commit { .. } => Asked::End("COMMIT"),
            Statement::Rollback { savepoint: None, .. } => Asked::End("ROLLBACK"),
            Statement::Rollback { .. } => Asked::Done("ROLLBACK"),
            Statement::Savepoint { .. } => Asked::Done("SAVEPOINT"),
            Statement::ReleaseSavepoint { .. } => Asked::Done("RELEASE"),
            Statement::Set(set) => lane(&set).map_or(Asked::Done("SET"), Asked::Lane),
            Statement::Reset(_) => Asked::Done("RESET"),
            Statement::Discard { .. } => Asked::Done("DISCARD ALL"),
            Statement::Deallocate { .. } => Asked::Done("DEALLOCATE"),
            Statement::ShowVariable { variable } => {
                let words: Vec<String> = variable.iter().map(|word| word.value.to_lowercase()).collect();
                match words.join("_").as_str() {
                    LANE_SETTING => Asked::Setting { name: "weir.lane".to_owned(), value: session.lane() },
                    name => setting(name, running.timeout())?,
                }
            }
            Statement::Copy { .. } => {
                let (statement, form) = copy::understand(statement)?;
                Asked::Copy { prepared: self.plan(running, statement).await?, text, form }
            }
            Statement::CreateView(CreateView { materialized: true, .. })
            | Statement::Drop { object_type: ObjectType::MaterializedView, .. }
            | Statement::ShowViews { materialized: true, .. } => {
                let prepared = Box::pin(self.engine.prepare(running, &statement.to_string(), None)).await;
                let prepared = prepared.map_err(|error| sql_error(&error))?;
                match prepared.tag() {
                    Some(tag) => Asked::Command { prepared, text, tag },
                    None => Asked::Rows { prepared, text },
                }
            }
            Statement::Comment { .. } => Asked::Comment { prepared: self.plan(running, statement).await?, text },
            statement => Asked::Rows { prepared: self.plan(running, statement).await?, text },
        })
    }

    /// Runs what was asked. A COPY goes out through the client at once.
    async fn answer<C>(
        &self,
        client: &mut C,
        session: &Session,
        asked: &Asked,
        parameters: Option<ParamValues>,
        format: &Format,
    ) -> PgWireResult<Response>
    where
        C: Sink<PgWireBackendMessage> + Unpin,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        match asked {
            Asked::Rows { prepared, text } => {
                let running = session.begin(&self.engine, text).await?;
                self.rows(&running, prepared, parameters, format).await.map(Response::Query)
            }
            Asked::Copy { prepared, text, form } => {
                let running = session.begin(&self.engine, text).await?;
                let rows = self.rows(&running, prepared, parameters, &form.fields()).await?;
                copy::send(client, form, rows).await
            }
            Asked::Command { prepared, text, tag } => {
                let running = session.begin(&self.engine, text).await?;
                let mut rows =
                    self.engine.execute(&running, prepared, None).await.map_err(|error| sql_error(&error))?;
                while let Some(batch) = rows.next().await {
                    batch.map_err(|error| sql_error(&self.engine.explain(error)))?;
                }
                Ok(Response::Execution(Tag::new(tag)))
            }
            Asked::Comment { prepared, text } => {
                let running = session.begin(&self.engine, text).await?;
                let mut none = self.rows(&running, prepared, None, format).await?.data_rows;
                while none.next().await.transpose()?.is_some() {}
                Ok(Response::Execution(Tag::new("COMMENT")))
            }
            Asked::Lane(lane) => session.change_lane(lane).map(|()| Response::Execution(Tag::new("SET"))),
            Asked::Done(tag) => Ok(Response::Execution(Tag::new(tag))),
            Asked::Begin => Ok(Response::TransactionStart(Tag::new("BEGIN"))),
            Asked::End(tag) => Ok(Response::TransactionEnd(Tag::new(tag))),
            Asked::Setting { name, value } => {
                let fields = Arc::new(vec![setting_field(name, format.format_for(0))]);
                let mut row = DataRowEncoder::new(Arc::clone(&fields));
                row.encode_field(value)?;
                let row = row.take_row();
                let mut response = QueryResponse::new(fields, stream::iter([Ok(row)]));
                response.set_command_tag("SHOW");
                Ok(Response::Query(response))
            }
        }
    }

    async fn rows(
        &self,
        running: &Arc<Running>,
        prepared: &Prepared,
        parameters: Option<ParamValues>,
        format: &Format,
    ) -> PgWireResult<QueryResponse> {
        let rows = self.engine.execute(running, prepared, parameters).await.map_err(|error| sql_error(&error))?;
        let fields = Arc::new(arrow_schema_to_pg_fields(&rows.schema(), format, None)?);
        let (engine, of_rows) = (Arc::clone(&self.engine), Arc::clone(&fields));
        let rows = rows.flat_map(move |batch| match batch {
            Ok(batch) => stream::iter(encode_recordbatch(Arc::clone(&of_rows), batch)).boxed(),
            Err(error) => stream::iter([Err(sql_error(&engine.explain(error)))]).boxed(),
        });
        Ok(QueryResponse::new(fields, rows))
    }
}

/// The lane that `SET weir.lane = …` names.
fn lane(set: &Set) -> Option<String> {
    let Set::SingleAssignment { variable, values, .. } = set else {
        return None;
    };
    let name: Vec<String> = variable.0.iter().map(|part| part.to_string().to_lowercase()).collect();
    let ([value], LANE_SETTING) = (&values[..], name.join("_").as_str()) else {
        return None;
    };
    Some(match value {
        Expr::Value(value) => value.value.clone().into_string().unwrap_or_else(|| value.to_string()),
        Expr::Identifier(word) => word.value.clone(),
        other => other.to_string(),
    })
}

/// What `SHOW` answers.
fn setting(name: &str, timeout: Duration) -> PgWireResult<Asked> {
    let value = match name {
        "statement_timeout" => Some(span(timeout)),
        _ => functions::fixed(name).map(str::to_owned),
    };
    let value = value.ok_or_else(|| refusal("ERROR", "42704", format!("no setting `{name}`")))?;
    Ok(Asked::Setting { name: name.to_owned(), value })
}

/// A time as PostgreSQL writes it: in the largest unit that leaves a whole number.
fn span(time: Duration) -> String {
    let ms = time.as_millis();
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"), (1, "ms")];
    let unit = units.into_iter().find(|(length, _)| ms > 0 && ms.is_multiple_of(*length));
    unit.map_or_else(|| "0".to_owned(), |(length, name)| format!("{}{name}", ms / length))
}

fn setting_field(name: &str, format: FieldFormat) -> FieldInfo {
    FieldInfo::new(name.to_owned(), None, None, Type::TEXT, format)
}

/// Resolves when the caller cancels. Must be the last await before the response is handed over: it takes over from
/// the receiver that pgwire drops at that moment.
async fn cancelled<C: ClientInfo>(client: &C) -> Option<Shared<oneshot::Receiver<()>>> {
    let handle = client.session_extensions().get::<Arc<ConnectionHandle>>()?;
    Some(handle.start_query().await.shared())
}

fn cancellable(response: Response, cancelled: Option<&Shared<oneshot::Receiver<()>>>) -> Response {
    let (mut query, cancelled) = match (response, cancelled.cloned()) {
        (Response::Query(query), Some(cancelled)) => (query, cancelled),
        (response, _) => return response,
    };
    let rows = std::mem::replace(&mut query.data_rows, Box::pin(stream::empty()));
    // A sender that is gone means that the next statement has begun, not that this one is cancelled.
    let stop = cancelled
        .then(|word| async move {
            if word.is_err() {
                future::pending::<()>().await;
            }
        })
        .boxed();
    query.data_rows = Box::pin(stream::unfold(Some((rows, stop)), |state| async move {
        let (mut rows, mut stop) = state?;
        let row = tokio::select! {
            biased;
            () = &mut stop => return Some((Err(refusal("ERROR", "57014", "the statement was cancelled")), None)),
            row = rows.next() => row?,
        };
        Some((row, Some((rows, stop))))
    }));
    Response::Query(query)
}

#[async_trait]
impl SimpleQueryHandler for Statements {
    async fn do_query<C>(&self, client: &mut C, query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let session = Session::of(client, &self.readers)?;
        let running = session.begin(&self.engine, query).await?;
        let statements = self.parse(&running, query).await?;
        running.planned();
        drop(running);
        let several = statements.len() > 1;
        let mut responses = Vec::new();
        for statement in statements {
            let text = if several { &statement.to_string() } else { query };
            // Each statement has its time, as in PostgreSQL.
            let running = session.begin(&self.engine, text).await?;
            let asked = Box::pin(self.understand(&session, &running, statement)).await?;
            running.planned();
            drop(running);
            if several && matches!(asked, Asked::Copy { .. }) {
                return Err(refusal("ERROR", "0A000", "COPY is sent alone, not among other statements"));
            }
            responses.push(Box::pin(self.answer(client, &session, &asked, None, &Format::UnifiedText)).await?);
        }
        if responses.is_empty() {
            return Ok(vec![Response::EmptyQuery]);
        }
        let cancelled = cancelled(client).await;
        Ok(responses.into_iter().map(|response| cancellable(response, cancelled.as_ref())).collect())
    }
}

#[async_trait]
impl ExtendedQueryHandler for Statements {
    type Statement = Asked;
    type QueryParser = Parser;

    fn query_parser(&self) -> Arc<Self::QueryParser> {
        Arc::new(Parser(self.clone()))
    }

    async fn do_query<C>(
        &self,
        client: &mut C,
        portal: &Portal<Self::Statement>,
        _max_rows: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let session = Session::of(client, &self.readers)?;
        let asked = &portal.statement.statement;
        let parameters = match asked {
            Asked::Rows { prepared, .. } | Asked::Copy { prepared, .. } => {
                let types = parameter_types(prepared)?;
                if portal.parameter_len() < types.len() {
                    return Err(refusal("ERROR", "08P01", format!("the statement has {} parameters", types.len())));
                }
                let mut types: Vec<Option<&DataType>> = types.iter().map(Option::as_ref).collect();
                types.resize(portal.parameter_len(), None);
                (portal.parameter_len() > 0).then(|| deserialize_parameters(portal, &types)).transpose()?
            }
            _ => None,
        };
        let answer = self.answer(client, &session, asked, parameters, &portal.result_column_format);
        let response = Box::pin(answer).await?;
        let cancelled = cancelled(client).await;
        Ok(cancellable(response, cancelled.as_ref()))
    }
}

/// Types of `$1`, `$2`, … as far as the plan tells.
fn parameter_types(prepared: &Prepared) -> PgWireResult<Vec<Option<DataType>>> {
    let found: HashMap<String, Option<DataType>> =
        prepared.plan().get_parameter_types().map_err(|error| refusal("ERROR", "42P18", error.strip_backtrace()))?;
    let mut types = Vec::new();
    for (name, kind) in found {
        let number =
            name.trim_start_matches('$').parse::<usize>().ok().filter(|number| (1..=PARAMETERS_MAX).contains(number));
        let number = number.ok_or_else(|| refusal("ERROR", "42P02", format!("no parameter `{name}`")))?;
        // One that nothing depends on has none.
        types.resize(types.len().max(number), None);
        types[number - 1] = kind;
    }
    Ok(types)
}

/// Plans a statement once, at Parse.
#[derive(Debug)]
pub(super) struct Parser(Statements);

#[async_trait]
impl QueryParser for Parser {
    type Statement = Asked;

    async fn parse_sql<C>(&self, client: &C, sql: &str, _types: &[Option<Type>]) -> PgWireResult<Option<Asked>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        let session = Session::of(client, &self.0.readers)?;
        let running = session.begin(&self.0.engine, sql).await?;
        let mut statements = self.0.parse(&running, sql).await?;
        if statements.len() > 1 {
            return Err(refusal("ERROR", "42601", "a prepared statement is one statement"));
        }
        let asked = match statements.pop() {
            Some(statement) => Some(Box::pin(self.0.understand(&session, &running, statement)).await?),
            None => None,
        };
        running.planned();
        Ok(asked)
    }

    fn get_parameter_types(&self, asked: &Asked) -> PgWireResult<Vec<Type>> {
        let (Asked::Rows { prepared, .. } | Asked::Copy { prepared, .. }) = asked else {
            return Ok(Vec::new());
        };
        let types = parameter_types(prepared)?;
        types.iter().map(|kind| kind.as_ref().map_or(Ok(Type::TEXT), into_pg_type)).collect()
    }

    fn get_result_schema(&self, asked: &Asked, format: Option<&Format>) -> PgWireResult<Vec<FieldInfo>> {
        let format = format.unwrap_or(&Format::UnifiedText);
        match asked {
            Asked::Rows { prepared, .. } => arrow_schema_to_pg_fields(prepared.columns(), format, None),
            Asked::Setting { name, .. } => Ok(vec![setting_field(name, format.format_for(0))]),
            Asked::Command { .. }
            | Asked::Copy { .. }
            | Asked::Comment { .. }
            | Asked::Lane(_)
            | Asked::Done(_)
            | Asked::Begin
            | Asked::End(_) => Ok(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_postgresql_does() {
        for (ms, expected) in [(0, "0"), (300_000, "5min"), (90_000, "90s"), (1_500, "1500ms"), (86_400_000, "1d")] {
            assert_eq!(span(Duration::from_millis(ms)), expected);
        }
        let Asked::Setting { value, .. } = setting("statement_timeout", Duration::from_secs(300)).unwrap() else {
            panic!("a setting");
        };
        assert_eq!(value, "5min");
    }
}
