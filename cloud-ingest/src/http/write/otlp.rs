//! OTLP over HTTP: `POST /v1/metrics`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsPartialSuccess, ExportMetricsServiceResponse};
use prost::Message;
use wire::EdgeId;

use super::{Door, Parameters, Refused, Text, add_headers, add_renamed, now_us, sender, take};
use crate::doors::otlp::OtlpError;
use crate::doors::rows::Gathering;
use crate::doors::{self, Origin, Told};

const PROTOBUF: &str = "application/x-protobuf";

pub(super) async fn metrics(State(door): State<Arc<Door>>, headers: HeaderMap, body: Body) -> Response {
    let outcome = take_metrics(&door, &headers, body).await;
    let protobuf = [(header::CONTENT_TYPE, PROTOBUF)];
    match outcome {
        Ok(told) => {
            let why = told.reasons.first().map(|(number, reason)| format!("data point {number}: {reason}"));
            let partial_success = why.map(|error_message| ExportMetricsPartialSuccess {
                rejected_data_points: i64::try_from(told.rejected).unwrap_or(i64::MAX),
                error_message,
            });
            let answer = ExportMetricsServiceResponse { partial_success }.encode_to_vec();
            let mut response = (protobuf, answer).into_response();
            add_renamed(&mut response, &told);
            response
        }
        Err(refused) => {
            door.metrics.refuse(refused.code().1);
            let message = refused.to_string();
            let status = Status { code: 0, message: message.clone() }.encode_to_vec();
            let mut response = (refused.status(), protobuf, status).into_response();
            add_headers(&mut response, &refused, &message);
            response
        }
    }
}

/// `google.rpc.Status`, as OTLP answers errors.
#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

async fn take_metrics(door: &Arc<Door>, headers: &HeaderMap, body: Body) -> Result<Told, Refused> {
    let edge = sender(door, headers, &Parameters::default())?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or(PROTOBUF);
    if kind.split(';').next().unwrap_or_default().trim() != PROTOBUF {
        return Err(Refused::Encoding(format!("{}; send {PROTOBUF}", kind.chars().take(80).collect::<String>())));
    }
    let bytes_max = doors::otlp::BYTES_MAX.min(door.write.max_bytes.bytes());
    let text = Text::read(door, headers, body, bytes_max).await?;
    let (devices, own_names) = (door.write.device.clone(), door.own_names.clone());
    let read = move |body: &[u8], edge: &EdgeId, rows: &mut Gathering| {
        let origin = Origin { edge, own_names: &own_names, source: "otlp", topic: "", arrival_us: now_us() };
        let told = doors::otlp::read(body, &devices, origin, rows).map_err(|error| match error {
            OtlpError::Rows(error) => error.into(),
            error => Refused::Wrong(error.to_string()),
        })?;
        Ok((told, "otlp".to_owned()))
    };
    take(door, edge, "otlp", text, read).await
}
