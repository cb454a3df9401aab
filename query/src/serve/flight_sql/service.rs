//! The calls of Flight SQL.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_server::FlightService;
use arrow_flight::sql::server::{FlightSqlService, PeekableFlightDataStream};
use arrow_flight::sql::{
    ActionCancelQueryRequest, ActionCancelQueryResult, ActionClosePreparedStatementRequest,
    ActionCreatePreparedStatementRequest, ActionCreatePreparedStatementResult, Any, Command, CommandGetCatalogs,
    CommandGetCrossReference, CommandGetDbSchemas, CommandGetExportedKeys, CommandGetImportedKeys,
    CommandGetPrimaryKeys, CommandGetSqlInfo, CommandGetTableTypes, CommandGetTables, CommandGetXdbcTypeInfo,
    CommandPreparedStatementQuery, CommandPreparedStatementUpdate, CommandStatementIngest, CommandStatementQuery,
    CommandStatementUpdate, DoPutPreparedStatementResult, ProstMessageExt, SqlInfo, TicketStatementQuery,
};
use arrow_flight::{
    Action, ActionType, BasicAuth, CancelFlightInfoRequest, CancelFlightInfoResult, CancelStatus, FlightDescriptor,
    FlightInfo, HandshakeRequest, HandshakeResponse, Ticket,
};
use arrow_schema::{DataType, Field, Schema};
use bytes::{BufMut, Bytes, BytesMut};
use datafusion::common::ParamValues;
use futures::{StreamExt, TryStreamExt, stream};
use prost::Message;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, Streaming};

use super::answer::{
    Answer, announced, encoded, info, parameter_types, parameters, sent, status, unknown_handle, wrong,
};
use super::catalogue::Question;
use super::entrance::{self, Entrance, peer};
use super::held::{self, Desk, Statement};
use crate::caller::Caller;
use crate::engine::{Engine, Prepared};
use crate::serve::Readers;
use crate::statements::Running;

/// How long the proof of a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Bytes of a handle in front of a ticket's statement.
const HANDLE_BYTES: usize = 16;
const CANCEL: &str = "CancelFlightInfo";

/// See the module.
#[derive(Debug)]
pub(super) struct Service {
    engine: Arc<Engine>,
    entrance: Entrance,
    desk: Desk,
}

impl Service {
    pub(super) fn new(engine: Arc<Engine>, readers: Readers) -> Self {
        Self { engine, entrance: Entrance::new(readers), desk: Desk::default() }
    }

    async fn begin(&self, caller: &Caller, text: &str) -> Result<Arc<Running>, Status> {
        let place = self.engine.enter(caller).await.map_err(|error| status(&error))?;
        Ok(self.engine.begin(caller, &place, text))
    }

    /// Plans a statement that is not to run now.
    async fn plan<T>(&self, request: &Request<T>, sql: &str) -> Result<Statement, Status> {
        let (caller, as_of) = (self.entrance.caller(request)?, entrance::as_of(request)?);
        let running = self.begin(&caller, sql).await?;
        let prepared = self.engine.prepare(&running, sql, as_of).await.map_err(|error| status(&error))?;
        running.planned();
        Ok(Statement { reader: caller.name().to_owned(), text: sql.into(), prepared, parameters: None })
    }

    /// Runs a statement and sends its rows under the columns that were announced.
    async fn rows(
        &self,
        ticket: Bytes,
        running: &Arc<Running>,
        prepared: &Prepared,
        parameters: Option<ParamValues>,
    ) -> Result<Answer, Status> {
        self.desk.runs(ticket, running);
        let rows = self.engine.execute(running, prepared, parameters).await.map_err(|error| status(&error))?;
        let (schema, engine) = (announced(prepared), Arc::clone(&self.engine));
        let told = Arc::clone(&schema);
        let rows = rows.map(move |batch| {
            let batch = batch.map_err(|error| FlightError::Tonic(Box::new(status(&engine.explain(error)))))?;
            let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            Ok(RecordBatch::try_new_with_options(Arc::clone(&told), batch.columns().to_vec(), &options)?)
        });
        Ok(sent(schema, rows))
    }

    /// Makes or drops a view; everything else has rows that are fetched.
    async fn change(&self, caller: &Caller, statement: &Statement) -> Result<i64, Status> {
        if statement.prepared.tag().is_none() {
            return Err(Status::permission_denied("Weir answers questions only: fetch the rows of this statement"));
        }
        let running = self.begin(caller, &statement.text).await?;
        let rows = self.engine.execute(&running, &statement.prepared, None).await.map_err(|error| status(&error))?;
        let done: Vec<_> = rows.try_collect().await.map_err(|error| status(&self.engine.explain(error)))?;
        drop(done);
        Ok(0)
    }

    async fn asked<T>(&self, request: &Request<T>, question: Question) -> Result<Answer, Status> {
        self.entrance.caller(request)?;
        let schema = question.schema();
        let answer = question.answer(&self.engine).await?;
        Ok(sent(schema, stream::iter([Ok(answer)])))
    }

    fn announce(
        &self,
        request: Request<FlightDescriptor>,
        question: &Question,
        ticket: &impl ProstMessageExt,
    ) -> Result<Response<FlightInfo>, Status> {
        self.entrance.caller(&request)?;
        info(&question.schema(), ticket, request.into_inner())
    }

    /// Ends the statement of a ticket, if it is one that the caller may end.
    fn cancel(&self, caller: &Caller, info: &FlightInfo) -> Result<(), Status> {
        let ticket = info.endpoint.first().and_then(|endpoint| endpoint.ticket.as_ref());
        let ticket = ticket.ok_or_else(|| wrong("it names no ticket"))?;
        let command = Any::decode(&*ticket.ticket).map_err(wrong)?;
        let handle = match Command::try_from(command).map_err(wrong)? {
            Command::TicketStatementQuery(ticket) => ticket.statement_handle,
            Command::CommandPreparedStatementQuery(statement) => statement.prepared_statement_handle,
            _ => return Err(wrong("it is no ticket of a statement")),
        };
        let running = self.desk.running(&handle);
        match running.filter(|running| self.engine.cancel(running.id(), caller)) {
            Some(_) => Ok(()),
            None => Err(Status::not_found("no statement of yours runs with this ticket")),
        }
    }
}

#[tonic::async_trait]
impl FlightSqlService for Service {
    type FlightService = Self;

    async fn get_flight_info_catalogs(
        &self,
        asked: CommandGetCatalogs,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::Catalogs(asked), &asked)
    }

    async fn do_get_catalogs(&self, asked: CommandGetCatalogs, request: Request<Ticket>) -> Result<Answer, Status> {
        self.asked(&request, Question::Catalogs(asked)).await
    }

    async fn get_flight_info_schemas(
        &self,
        asked: CommandGetDbSchemas,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::Schemas(asked.clone()), &asked)
    }

    async fn do_get_schemas(&self, asked: CommandGetDbSchemas, request: Request<Ticket>) -> Result<Answer, Status> {
        self.asked(&request, Question::Schemas(asked)).await
    }

    async fn get_flight_info_tables(
        &self,
        asked: CommandGetTables,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::Tables(asked.clone()), &asked)
    }

    async fn do_get_tables(&self, asked: CommandGetTables, request: Request<Ticket>) -> Result<Answer, Status> {
        self.asked(&request, Question::Tables(asked)).await
    }

    async fn get_flight_info_table_types(
        &self,
        asked: CommandGetTableTypes,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::TableTypes(asked), &asked)
    }

    async fn do_get_table_types(
        &self,
        asked: CommandGetTableTypes,
        request: Request<Ticket>,
    ) -> Result<Answer, Status> {
        self.asked(&request, Question::TableTypes(asked)).await
    }

    async fn get_flight_info_sql_info(
        &self,
        asked: CommandGetSqlInfo,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::Info(asked.clone()), &asked)
    }

    async fn do_get_sql_info(&self, asked: CommandGetSqlInfo, request: Request<Ticket>) -> Result<Answer, Status> {
        self.asked(&request, Question::Info(asked)).await
    }

    async fn get_flight_info_xdbc_type_info(
        &self,
        asked: CommandGetXdbcTypeInfo,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::Types(asked), &asked)
    }

    async fn do_get_xdbc_type_info(
        &self,
        asked: CommandGetXdbcTypeInfo,
        request: Request<Ticket>,
    ) -> Result<Answer, Status> {
        self.asked(&request, Question::Types(asked)).await
    }

    async fn get_flight_info_primary_keys(
        &self,
        asked: CommandGetPrimaryKeys,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::PrimaryKeys, &asked)
    }

    async fn do_get_primary_keys(&self, _: CommandGetPrimaryKeys, request: Request<Ticket>) -> Result<Answer, Status> {
        self.asked(&request, Question::PrimaryKeys).await
    }

    async fn get_flight_info_exported_keys(
        &self,
        asked: CommandGetExportedKeys,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::ForeignKeys, &asked)
    }

    async fn do_get_exported_keys(
        &self,
        _: CommandGetExportedKeys,
        request: Request<Ticket>,
    ) -> Result<Answer, Status> {
        self.asked(&request, Question::ForeignKeys).await
    }

    async fn get_flight_info_imported_keys(
        &self,
        asked: CommandGetImportedKeys,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::ForeignKeys, &asked)
    }

    async fn do_get_imported_keys(
        &self,
        _: CommandGetImportedKeys,
        request: Request<Ticket>,
    ) -> Result<Answer, Status> {
        self.asked(&request, Question::ForeignKeys).await
    }

    async fn get_flight_info_cross_reference(
        &self,
        asked: CommandGetCrossReference,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        self.announce(request, &Question::ForeignKeys, &asked)
    }

    async fn do_get_cross_reference(
        &self,
        _: CommandGetCrossReference,
        request: Request<Ticket>,
    ) -> Result<Answer, Status> {
        self.asked(&request, Question::ForeignKeys).await
    }

    async fn do_handshake(
        &self,
        request: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<<Self as FlightService>::HandshakeStream>, Status> {
        let (peer, headers) = (peer(&request), request.metadata().clone());
        // Without a header the proof is the first message.
        let said = match headers.get("authorization") {
            Some(_) => None,
            None => {
                let first = tokio::time::timeout(HANDSHAKE_MAX, request.into_inner().message()).await;
                let first = first.map_err(|_| Status::deadline_exceeded("the handshake took too long"))??;
                let proof = first.and_then(|first| BasicAuth::decode(first.payload).ok());
                proof.map(|proof| (proof.username, proof.password))
            }
        };
        let token = self.entrance.admit(&headers, peer, said)?;
        let answer = HandshakeResponse { protocol_version: 0, payload: token.clone().into() };
        let stream: <Self as FlightService>::HandshakeStream = Box::pin(stream::iter([Ok(answer)]));
        let mut response = Response::new(stream);
        let header = MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| Status::internal("no token"))?;
        response.metadata_mut().insert("authorization", header);
        Ok(response)
    }

    async fn get_flight_info_statement(
        &self,
        asked: CommandStatementQuery,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let statement = Box::pin(self.plan(&request, &asked.query)).await?;
        let mut handle = BytesMut::from(&held::handle()[..]);
        handle.put_slice(asked.query.as_bytes());
        let ticket = TicketStatementQuery { statement_handle: handle.freeze() };
        info(&announced(&statement.prepared), &ticket, request.into_inner())
    }

    async fn do_get_statement(&self, asked: TicketStatementQuery, request: Request<Ticket>) -> Result<Answer, Status> {
        let (caller, as_of) = (self.entrance.caller(&request)?, entrance::as_of(&request)?);
        let text = asked.statement_handle.get(HANDLE_BYTES..).and_then(|text| std::str::from_utf8(text).ok());
        let text = text.ok_or_else(|| wrong("the ticket holds no statement"))?;
        let running = self.begin(&caller, text).await?;
        let prepared = Box::pin(self.engine.prepare(&running, text, as_of)).await.map_err(|error| status(&error))?;
        self.rows(asked.statement_handle.clone(), &running, &prepared, None).await
    }

    async fn do_action_create_prepared_statement(
        &self,
        asked: ActionCreatePreparedStatementRequest,
        request: Request<Action>,
    ) -> Result<ActionCreatePreparedStatementResult, Status> {
        let statement = Box::pin(self.plan(&request, &asked.query)).await?;
        let types = parameter_types(&statement.prepared)?;
        let fields = types.into_iter().map(|(name, kind)| Field::new(name, kind.unwrap_or(DataType::Utf8), true));
        let parameters = Schema::new(fields.collect::<Vec<_>>());
        Ok(ActionCreatePreparedStatementResult {
            dataset_schema: encoded(&announced(&statement.prepared))?,
            parameter_schema: encoded(&parameters)?,
            prepared_statement_handle: self.desk.keep(statement),
        })
    }

    async fn do_put_prepared_statement_query(
        &self,
        asked: CommandPreparedStatementQuery,
        request: Request<PeekableFlightDataStream>,
    ) -> Result<DoPutPreparedStatementResult, Status> {
        let caller = self.entrance.caller(&request)?;
        let handle = asked.prepared_statement_handle;
        let statement = self.desk.find(&handle, caller.name()).ok_or_else(unknown_handle)?;
        let data = request.into_inner().map_err(|status| FlightError::Tonic(Box::new(status)));
        let mut batches = FlightRecordBatchStream::new_from_flight_data(data);
        let mut row = None;
        while let Some(batch) = batches.next().await {
            let batch = batch.map_err(wrong)?;
            if batch.num_rows() > 1 || row.is_some() && batch.num_rows() > 0 {
                return Err(wrong("a statement is executed with one row of parameters"));
            }
            if batch.num_rows() == 1 {
                row = Some(batch);
            }
        }
        let values = row.map(|row| parameters(&row, &statement.prepared)).transpose()?;
        if !self.desk.bind(&handle, caller.name(), values) {
            return Err(unknown_handle());
        }
        Ok(DoPutPreparedStatementResult { prepared_statement_handle: Some(handle) })
    }

    async fn get_flight_info_prepared_statement(
        &self,
        asked: CommandPreparedStatementQuery,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let caller = self.entrance.caller(&request)?;
        let statement = self.desk.find(&asked.prepared_statement_handle, caller.name()).ok_or_else(unknown_handle)?;
        info(&announced(&statement.prepared), &asked, request.into_inner())
    }

    async fn do_get_prepared_statement(
        &self,
        asked: CommandPreparedStatementQuery,
        request: Request<Ticket>,
    ) -> Result<Answer, Status> {
        let caller = self.entrance.caller(&request)?;
        let handle = asked.prepared_statement_handle;
        let statement = self.desk.find(&handle, caller.name()).ok_or_else(unknown_handle)?;
        let wanted = parameter_types(&statement.prepared)?.len();
        if wanted > 0 && statement.parameters.is_none() {
            return Err(wrong(format!("the statement has {wanted} parameters, and there are none")));
        }
        let running = self.begin(&caller, &statement.text).await?;
        self.rows(handle, &running, &statement.prepared, statement.parameters).await
    }

    async fn do_action_close_prepared_statement(
        &self,
        asked: ActionClosePreparedStatementRequest,
        request: Request<Action>,
    ) -> Result<(), Status> {
        let caller = self.entrance.caller(&request)?;
        self.desk.close(&asked.prepared_statement_handle, caller.name());
        Ok(())
    }

    async fn do_action_cancel_query(
        &self,
        asked: ActionCancelQueryRequest,
        request: Request<Action>,
    ) -> Result<ActionCancelQueryResult, Status> {
        let caller = self.entrance.caller(&request)?;
        self.cancel(&caller, &FlightInfo::decode(asked.info).map_err(wrong)?)?;
        Ok(ActionCancelQueryResult { result: CancelStatus::Cancelled as i32 })
    }

    async fn list_custom_actions(&self) -> Option<Vec<Result<ActionType, Status>>> {
        let description = "Ends the statement of a FlightInfo".to_owned();
        Some(vec![Ok(ActionType { r#type: CANCEL.to_owned(), description })])
    }

    async fn do_action_fallback(
        &self,
        request: Request<Action>,
    ) -> Result<Response<<Self as FlightService>::DoActionStream>, Status> {
        let caller = self.entrance.caller(&request)?;
        let action = request.into_inner();
        if action.r#type != CANCEL {
            return Err(Status::unimplemented(format!("no action `{}`", action.r#type)));
        }
        let asked = CancelFlightInfoRequest::decode(action.body).map_err(wrong)?;
        self.cancel(&caller, &asked.info.ok_or_else(|| wrong("it names no FlightInfo"))?)?;
        let result = CancelFlightInfoResult::new(CancelStatus::Cancelled);
        let answer = arrow_flight::Result::new(result.encode_to_vec());
        Ok(Response::new(Box::pin(stream::iter([Ok(answer)]))))
    }

    async fn do_put_statement_update(
        &self,
        asked: CommandStatementUpdate,
        request: Request<PeekableFlightDataStream>,
    ) -> Result<i64, Status> {
        // It says why: nothing but views can be changed.
        let statement = Box::pin(self.plan(&request, &asked.query)).await?;
        let caller = self.entrance.caller(&request)?;
        Box::pin(self.change(&caller, &statement)).await
    }

    async fn do_put_statement_ingest(
        &self,
        _: CommandStatementIngest,
        request: Request<PeekableFlightDataStream>,
    ) -> Result<i64, Status> {
        self.entrance.caller(&request)?;
        Err(Status::permission_denied("Weir answers questions only: rows come from edges, or `weir load`"))
    }

    async fn do_put_prepared_statement_update(
        &self,
        asked: CommandPreparedStatementUpdate,
        request: Request<PeekableFlightDataStream>,
    ) -> Result<i64, Status> {
        let caller = self.entrance.caller(&request)?;
        let statement = self.desk.find(&asked.prepared_statement_handle, caller.name()).ok_or_else(unknown_handle)?;
        Box::pin(self.change(&caller, &statement)).await
    }

    async fn register_sql_info(&self, _: i32, _: &SqlInfo) {}
}
