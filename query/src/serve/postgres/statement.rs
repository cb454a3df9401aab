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
use datafusion::sql::sqlparser::ast::Statement;
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
use tokio::time::Instant;

use super::dialect::Dialect;
use super::{refusal, sql_error};
use crate::catalog::{CATALOG, SCHEMA};
use crate::engine::{Engine, Prepared, QueryError};

/// What a statement asks for.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Rows(Prepared),
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
    planner: SessionContext,
    dialect: Arc<Dialect>,
}

impl Debug for Statements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Statements").field("engine", &self.engine).finish_non_exhaustive()
    }
}

impl Statements {
    pub(super) fn new(engine: Arc<Engine>) -> Result<Self, QueryError> {
        let session = engine.session();
        let planner = SessionContext::new_with_config_rt(session.copied_config(), session.runtime_env());
        let catalog = MemoryCatalogProvider::new();
        if let Some(public) = session.catalog(CATALOG).and_then(|weir| weir.schema(SCHEMA)) {
            catalog.register_schema(SCHEMA, public).map_err(|error| engine.explain(error))?;
        }
        planner.register_catalog(CATALOG, Arc::new(catalog));
        engine.equip(&planner)?;
        setup_pg_catalog(&planner, CATALOG, EmptyContextProvider).map_err(|error| engine.explain(*error))?;
        let dialect = Arc::new(Dialect::new(Arc::clone(engine.tables())));
        Ok(Self { engine, planner, dialect })
    }

    async fn parse(&self, sql: &str, deadline: Instant) -> PgWireResult<Vec<Statement>> {
        self.engine.measure(&PostgreSqlDialect {}, sql).map_err(|error| sql_error(&error))?;
        let (dialect, sql) = (Arc::clone(&self.dialect), sql.to_owned());
        let parsed = self.engine.aside(deadline, async move { dialect.parse(&sql) }).await;
        parsed.map_err(|error| sql_error(&error))?.map_err(|error| refusal("ERROR", "42601", error.to_string()))
    }

    async fn understand(&self, statement: Statement, deadline: Instant) -> PgWireResult<Asked> {
        Ok(match statement {
            Statement::StartTransaction { .. } => Asked::Begin,
            Statement::Commit { .. } => Asked::End("COMMIT"),
            Statement::Rollback { savepoint: None, .. } => Asked::End("ROLLBACK"),
            Statement::Rollback { .. } => Asked::Done("ROLLBACK"),
            Statement::Savepoint { .. } => Asked::Done("SAVEPOINT"),
            Statement::ReleaseSavepoint { .. } => Asked::Done("RELEASE"),
            Statement::Set(_) => Asked::Done("SET"),
            Statement::Reset(_) => Asked::Done("RESET"),
            Statement::Discard { .. } => Asked::Done("DISCARD ALL"),
            Statement::Deallocate { .. } => Asked::Done("DEALLOCATE"),
            Statement::ShowVariable { variable } => {
                let words: Vec<String> = variable.iter().map(|word| word.value.to_lowercase()).collect();
                setting(&words.join("_"), self.engine.settings().timeout)?
            }
            Statement::Copy { .. } => return Err(refusal("ERROR", "0A000", "COPY is not offered: ask with SELECT")),
            statement => {
                let statement = Parsed::Statement(Box::new(statement));
                let state = self.planner.state();
                let plan = self.engine.plan(deadline, move || Ok((state, statement))).await;
                Asked::Rows(plan.map_err(|error| sql_error(&error))?)
            }
        })
    }

    async fn answer(
        &self,
        asked: &Asked,
        parameters: Option<ParamValues>,
        format: &Format,
        deadline: Instant,
    ) -> PgWireResult<Response> {
        match asked {
            Asked::Rows(prepared) => self.rows(prepared, parameters, format, deadline).await.map(Response::Query),
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
        prepared: &Prepared,
        parameters: Option<ParamValues>,
        format: &Format,
        deadline: Instant,
    ) -> PgWireResult<QueryResponse> {
        let rows = self.engine.execute(prepared, parameters, deadline).await.map_err(|error| sql_error(&error))?;
        let fields = Arc::new(arrow_schema_to_pg_fields(&rows.schema(), format, None)?);
        let (engine, of_rows) = (Arc::clone(&self.engine), Arc::clone(&fields));
        let rows = rows.flat_map(move |batch| match batch {
            Ok(batch) => stream::iter(encode_recordbatch(Arc::clone(&of_rows), batch)).boxed(),
            Err(error) => stream::iter([Err(sql_error(&engine.explain(error)))]).boxed(),
        });
        Ok(QueryResponse::new(fields, rows))
    }
}

/// What `SHOW` answers: the settings that drivers ask for.
fn setting(name: &str, timeout: Duration) -> PgWireResult<Asked> {
    let value = match name {
        "statement_timeout" => return Ok(Asked::Setting { name: name.to_owned(), value: span(timeout) }),
        "server_version" => "16.6",
        "server_encoding" | "client_encoding" => "UTF8",
        "search_path" => "public",
        "timezone" | "time_zone" => "UTC",
        "datestyle" => "ISO, MDY",
        "intervalstyle" => "postgres",
        "standard_conforming_strings" | "integer_datetimes" | "transaction_read_only" => "on",
        "default_transaction_read_only" => "on",
        "transaction_isolation" | "transaction_isolation_level" | "default_transaction_isolation" => "read committed",
        "lock_timeout" => "0",
        "max_identifier_length" => "63",
        "application_name" => "",
        _ => return Err(refusal("ERROR", "42704", format!("no setting `{name}`"))),
    };
    Ok(Asked::Setting { name: name.to_owned(), value: value.to_owned() })
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
        let mut responses = Vec::new();
        for statement in self.parse(query, self.engine.deadline()).await? {
            // Each statement has its time, as in PostgreSQL.
            let deadline = self.engine.deadline();
            let asked = Box::pin(self.understand(statement, deadline)).await?;
            responses.push(self.answer(&asked, None, &Format::UnifiedText, deadline).await?);
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
        let asked = &portal.statement.statement;
        let parameters = match asked {
            Asked::Rows(prepared) => {
                let types = parameter_types(prepared)?;
                if portal.parameter_len() < types.len() {
                    return Err(refusal("ERROR", "08P01", format!("the statement has {} parameters", types.len())));
                }
                let types: Vec<Option<&DataType>> = types.iter().map(Option::as_ref).collect();
                (portal.parameter_len() > 0).then(|| deserialize_parameters(portal, &types)).transpose()?
            }
            _ => None,
        };
        let deadline = self.engine.deadline();
        let response = self.answer(asked, parameters, &portal.result_column_format, deadline).await?;
        let cancelled = cancelled(client).await;
        Ok(cancellable(response, cancelled.as_ref()))
    }
}

/// Types of `$1`, `$2`, … as far as the plan tells.
fn parameter_types(prepared: &Prepared) -> PgWireResult<Vec<Option<DataType>>> {
    let found: HashMap<String, Option<DataType>> =
        prepared.plan().get_parameter_types().map_err(|error| refusal("ERROR", "42P18", error.strip_backtrace()))?;
    let mut numbered = Vec::with_capacity(found.len());
    for (name, kind) in found {
        let number = name.trim_start_matches('$').parse::<usize>();
        let number = number.map_err(|_| refusal("ERROR", "42P02", format!("no parameter `{name}`")))?;
        numbered.push((number, kind));
    }
    numbered.sort_by_key(|(number, _)| *number);
    Ok(numbered.into_iter().map(|(_, kind)| kind).collect())
}

/// Plans a statement once, at Parse.
#[derive(Debug)]
pub(super) struct Parser(Statements);

#[async_trait]
impl QueryParser for Parser {
    type Statement = Asked;

    async fn parse_sql<C>(&self, _client: &C, sql: &str, _types: &[Option<Type>]) -> PgWireResult<Option<Asked>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        let deadline = self.0.engine.deadline();
        let mut statements = self.0.parse(sql, deadline).await?;
        if statements.len() > 1 {
            return Err(refusal("ERROR", "42601", "a prepared statement is one statement"));
        }
        match statements.pop() {
            Some(statement) => Box::pin(self.0.understand(statement, deadline)).await.map(Some),
            None => Ok(None),
        }
    }

    fn get_parameter_types(&self, asked: &Asked) -> PgWireResult<Vec<Type>> {
        let Asked::Rows(prepared) = asked else {
            return Ok(Vec::new());
        };
        let types = parameter_types(prepared)?;
        types.iter().map(|kind| kind.as_ref().map_or(Ok(Type::TEXT), into_pg_type)).collect()
    }

    fn get_result_schema(&self, asked: &Asked, format: Option<&Format>) -> PgWireResult<Vec<FieldInfo>> {
        let format = format.unwrap_or(&Format::UnifiedText);
        match asked {
            Asked::Rows(prepared) => arrow_schema_to_pg_fields(prepared.plan().schema().as_arrow(), format, None),
            Asked::Setting { name, .. } => Ok(vec![setting_field(name, format.format_for(0))]),
            Asked::Done(_) | Asked::Begin | Asked::End(_) => Ok(Vec::new()),
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
