//! From the engine's words to those of Flight: statuses, columns, tickets, rows and parameters.

use std::pin::Pin;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::sql::ProstMessageExt;
use arrow_flight::{FlightData, FlightDescriptor, FlightEndpoint, FlightInfo, IpcMessage, SchemaAsIpc, Ticket};
use arrow_ipc::writer::IpcWriteOptions;
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use datafusion::common::{ParamValues, ScalarValue};
use futures::{Stream, TryStreamExt};
use prost::Message;
use tonic::{Response, Status};

use crate::engine::{Prepared, QueryError};

pub(super) type Answer = Response<Pin<Box<dyn Stream<Item = Result<FlightData, Status>> + Send>>>;

/// The engine's error with its gRPC status, and its hint behind it.
pub(super) fn status(error: &QueryError) -> Status {
    let text = match error.hint() {
        Some(hint) => format!("{error} ({hint})"),
        None => error.to_string(),
    };
    match error {
        QueryError::UnknownTable { .. } | QueryError::UnknownColumn { .. } => Status::not_found(text),
        QueryError::Syntax { .. } | QueryError::Invalid { .. } => Status::invalid_argument(text),
        QueryError::ReadOnly { .. } | QueryError::Denied { .. } => Status::permission_denied(text),
        QueryError::Timeout { .. } => Status::deadline_exceeded(text),
        QueryError::Cancelled => Status::cancelled(text),
        QueryError::Memory { .. } | QueryError::TooMuch { .. } | QueryError::Busy { .. } => {
            Status::resource_exhausted(text)
        }
        QueryError::Failed { .. } => Status::internal(text),
    }
}

pub(super) fn wrong(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn unknown_handle() -> Status {
    Status::not_found("no prepared statement of yours has this handle: prepare it again")
}

/// The columns of a statement as they are announced and as they are sent. What may be null is known only when it runs.
pub(super) fn announced(prepared: &Prepared) -> SchemaRef {
    let fields = prepared.columns().fields().iter();
    Arc::new(Schema::new(
        fields.map(|field| Field::new(field.name(), field.data_type().clone(), true)).collect::<Vec<_>>(),
    ))
}

pub(super) fn encoded(schema: &Schema) -> Result<Bytes, Status> {
    let options = IpcWriteOptions::default();
    let message = IpcMessage::try_from(SchemaAsIpc::new(schema, &options));
    message.map(|IpcMessage(bytes)| bytes).map_err(|error| Status::internal(error.to_string()))
}

pub(super) fn info(
    schema: &Schema,
    ticket: &impl ProstMessageExt,
    descriptor: FlightDescriptor,
) -> Result<Response<FlightInfo>, Status> {
    let endpoint = FlightEndpoint::new().with_ticket(Ticket::new(ticket.as_any().encode_to_vec()));
    let info = FlightInfo::new().try_with_schema(schema).map_err(|error| Status::internal(error.to_string()))?;
    Ok(Response::new(info.with_endpoint(endpoint).with_descriptor(descriptor)))
}

pub(super) fn sent(
    schema: SchemaRef,
    rows: impl Stream<Item = Result<RecordBatch, FlightError>> + Send + 'static,
) -> Answer {
    let data = FlightDataEncoderBuilder::new().with_schema(schema).build(rows);
    Response::new(Box::pin(data.map_err(Status::from)))
}

/// Types of `$1`, `$2`, … as far as the plan tells.
pub(super) fn parameter_types(prepared: &Prepared) -> Result<Vec<(String, Option<DataType>)>, Status> {
    let found = prepared.plan().get_parameter_types().map_err(|error| wrong(error.strip_backtrace()))?;
    let mut types: Vec<(String, Option<DataType>)> = found.into_iter().collect();
    types.sort_by_key(|(name, _)| (name.trim_start_matches('$').parse::<usize>().unwrap_or(usize::MAX), name.clone()));
    Ok(types)
}

/// The values of one row, as the types of the parameters.
pub(super) fn parameters(rows: &RecordBatch, prepared: &Prepared) -> Result<ParamValues, Status> {
    let types = parameter_types(prepared)?;
    if rows.num_columns() < types.len() {
        let message = format!("the statement has {} parameters, and there are {}", types.len(), rows.num_columns());
        return Err(wrong(message));
    }
    let mut values = Vec::with_capacity(rows.num_columns());
    for (index, column) in rows.columns().iter().enumerate() {
        let value = ScalarValue::try_from_array(column, 0).map_err(|error| wrong(error.strip_backtrace()))?;
        let wanted = types.get(index).and_then(|(_, kind)| kind.as_ref());
        let wanted = wanted.filter(|kind| *kind != column.data_type());
        values.push(match wanted {
            Some(kind) => value.cast_to(kind).map_err(|error| wrong(error.strip_backtrace()))?,
            None => value,
        });
    }
    Ok(ParamValues::from(values))
}
