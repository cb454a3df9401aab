//! OTLP metrics (opentelemetry-proto 1, protobuf) as rows: a metric is a stream, a data point is a row.
//!
//! ```text
//! gauge, sum       value (float64 or int64), sum also: temporality, monotonic
//! histogram        count, sum, min, max, bounds and buckets (JSON arrays), temporality
//! exponential h.   count, sum, min, max, scale, zero_count, positive and negative (JSON), temporality
//! summary          count, sum, quantiles (JSON object)
//! all              start_ts when it is set, unit when there is one
//! ```
//! Attributes of the resource, the scope and the point, in this order, are fields; of equal names the last counts. The
//! device is the first of the configured names among them, or `host.name`, `service.instance.id`, `service.name`. A point
//! without a time has that of its arrival; one that is flagged as "no value" has none.

use indexmap::IndexMap;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::exponential_histogram_data_point::Buckets;
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::metrics::v1::{AggregationTemporality, DataPointFlags, Metric, NumberDataPoint};
use prost::Message;
use serde_json::json;
use wire::{FIELDS_MAX, FieldName, TS_MIN_US, named};

use super::rows::{Cell, Gathering, RowsError};
use super::{Origin, Rejected, Told, check_time, reject};
use crate::own_names;

/// Bytes of a request, unpacked: what gRPC takes unless told otherwise. Decoded it may take fifty times as much.
pub(crate) const BYTES_MAX: usize = 4 << 20;
/// Who measured, where nothing that is configured says it.
const DEVICES: [&str; 3] = ["host.name", "service.instance.id", "service.name"];

/// Why a request is not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OtlpError {
    #[error("the body is no ExportMetricsServiceRequest: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error(transparent)]
    Rows(#[from] RowsError),
}

/// Reads a request: rows go into `rows`; what is to be told of it comes back.
pub(crate) fn read(
    body: &[u8],
    devices: &[String],
    origin: Origin<'_>,
    rows: &mut Gathering,
) -> Result<Told, OtlpError> {
    let request = ExportMetricsServiceRequest::decode(body)?;
    let mut reader = Reader { devices, origin, rows, told: Told::default(), number: 0 };
    for resource in &request.resource_metrics {
        let attributes = resource.resource.as_ref().map_or(&[][..], |resource| &resource.attributes);
        for scope in &resource.scope_metrics {
            let of_scope = scope.scope.as_ref().map_or(&[][..], |scope| &scope.attributes);
            for metric in &scope.metrics {
                reader.metric(metric, [attributes, of_scope])?;
            }
        }
    }
    Ok(reader.told)
}

struct Reader<'r, 'o> {
    devices: &'o [String],
    origin: Origin<'o>,
    rows: &'r mut Gathering,
    told: Told,
    /// Data points so far.
    number: usize,
}

/// A value of a point's own.
#[derive(Debug, Clone)]
enum Own {
    Int(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Time(i64),
}

impl Own {
    fn cell(&self) -> Cell<'_> {
        match self {
            Self::Int(value) => Cell::Int(*value),
            Self::Float(value) => Cell::Float(*value),
            Self::Bool(value) => Cell::Bool(*value),
            Self::Text(value) => Cell::Text(value),
            Self::Time(value) => Cell::Time(*value),
        }
    }
}

/// One data point of any kind.
struct Point<'a> {
    attributes: &'a [KeyValue],
    time_ns: u64,
    start_ns: u64,
    values: Vec<(&'static str, Own)>,
}

fn count(value: u64) -> Own {
    Own::Int(i64::try_from(value).unwrap_or(i64::MAX))
}

fn floats(values: &mut Vec<(&'static str, Own)>, named: [(&'static str, Option<f64>); 3]) {
    values.extend(named.into_iter().filter_map(|(name, value)| Some((name, Own::Float(value?)))));
}

fn temporality(value: i32) -> (&'static str, Own) {
    let text = match AggregationTemporality::try_from(value) {
        Ok(AggregationTemporality::Delta) => "delta",
        Ok(AggregationTemporality::Cumulative) => "cumulative",
        _ => "unspecified",
    };
    ("temporality", Own::Text(text.to_owned()))
}

fn buckets(buckets: Option<&Buckets>) -> Own {
    let empty = Buckets::default();
    let buckets = buckets.unwrap_or(&empty);
    Own::Text(json!({ "offset": buckets.offset, "counts": buckets.bucket_counts }).to_string())
}

fn number(point: &NumberDataPoint) -> Vec<(&'static str, Own)> {
    if point.flags & DataPointFlags::NoRecordedValueMask as u32 != 0 {
        return Vec::new();
    }
    let value = point.value.map(|value| match value {
        Number::AsDouble(value) => Own::Float(value),
        Number::AsInt(value) => Own::Int(value),
    });
    value.map(|value| vec![("value", value)]).unwrap_or_default()
}

impl Reader<'_, '_> {
    fn metric(&mut self, metric: &Metric, shared: [&[KeyValue]; 2]) -> Result<(), RowsError> {
        match metric.data.as_ref() {
            None => Ok(()),
            Some(Data::Gauge(gauge)) => gauge.data_points.iter().try_for_each(|point| {
                let (attributes, values) = (&point.attributes[..], number(point));
                let (time_ns, start_ns) = (point.time_unix_nano, point.start_time_unix_nano);
                self.point(metric, shared, &Point { attributes, time_ns, start_ns, values })
            }),
            Some(Data::Sum(sum)) => sum.data_points.iter().try_for_each(|point| {
                let mut values = number(point);
                values.push(temporality(sum.aggregation_temporality));
                values.push(("monotonic", Own::Bool(sum.is_monotonic)));
                let (time_ns, start_ns) = (point.time_unix_nano, point.start_time_unix_nano);
                self.point(metric, shared, &Point { attributes: &point.attributes, time_ns, start_ns, values })
            }),
            Some(Data::Histogram(histogram)) => histogram.data_points.iter().try_for_each(|point| {
                let mut values = vec![("count", count(point.count)), temporality(histogram.aggregation_temporality)];
                floats(&mut values, [("sum", point.sum), ("min", point.min), ("max", point.max)]);
                values.push(("bounds", Own::Text(json!(point.explicit_bounds).to_string())));
                values.push(("buckets", Own::Text(json!(point.bucket_counts).to_string())));
                let (time_ns, start_ns) = (point.time_unix_nano, point.start_time_unix_nano);
                self.point(metric, shared, &Point { attributes: &point.attributes, time_ns, start_ns, values })
            }),
            Some(Data::ExponentialHistogram(histogram)) => histogram.data_points.iter().try_for_each(|point| {
                let mut values = vec![("count", count(point.count)), temporality(histogram.aggregation_temporality)];
                floats(&mut values, [("sum", point.sum), ("min", point.min), ("max", point.max)]);
                values.push(("scale", Own::Int(point.scale.into())));
                values.push(("zero_count", count(point.zero_count)));
                values.push(("positive", buckets(point.positive.as_ref())));
                values.push(("negative", buckets(point.negative.as_ref())));
                let (time_ns, start_ns) = (point.time_unix_nano, point.start_time_unix_nano);
                self.point(metric, shared, &Point { attributes: &point.attributes, time_ns, start_ns, values })
            }),
            Some(Data::Summary(summary)) => summary.data_points.iter().try_for_each(|point| {
                let quantiles = point.quantile_values.iter().map(|at| (at.quantile.to_string(), json!(at.value)));
                let quantiles = serde_json::Value::Object(quantiles.collect()).to_string();
                let values = vec![
                    ("count", count(point.count)),
                    ("sum", Own::Float(point.sum)),
                    ("quantiles", Own::Text(quantiles)),
                ];
                let (time_ns, start_ns) = (point.time_unix_nano, point.start_time_unix_nano);
                self.point(metric, shared, &Point { attributes: &point.attributes, time_ns, start_ns, values })
            }),
        }
    }

    fn point(&mut self, metric: &Metric, shared: [&[KeyValue]; 2], point: &Point<'_>) -> Result<(), RowsError> {
        self.number += 1;
        let us = |ns: u64| i64::try_from(ns / 1_000).unwrap_or(i64::MAX);
        let ts = if point.time_ns == 0 { self.origin.arrival_us } else { us(point.time_ns) };
        let stream = named::stream(&metric.name);
        let attributes = || shared.iter().chain([&point.attributes]).flat_map(|some| some.iter());
        let mut cells: IndexMap<FieldName, Own> = IndexMap::new();
        for KeyValue { key, value, .. } in attributes() {
            if let Some(value) = value.as_ref().and_then(own) {
                let field = named::field(key);
                self.told.rename(key, field.as_str());
                cells.insert(field, value);
            }
        }
        if point.start_ns >= TS_MIN_US as u64 * 1_000 {
            cells.insert(named::field("start_ts"), Own::Time(us(point.start_ns)));
        }
        if !metric.unit.is_empty() {
            cells.insert(named::field("unit"), Own::Text(metric.unit.clone()));
        }
        for (name, value) in &point.values {
            cells.insert(named::field(name), value.clone());
        }
        let names = self.devices.iter().map(String::as_str).chain(DEVICES);
        let device = names.filter_map(|name| cells.get(&named::field(name))).find_map(|value| match value {
            Own::Text(text) => Some(text.clone()),
            Own::Int(value) => Some(value.to_string()),
            _ => None,
        });
        let device = device.unwrap_or_else(|| self.origin.edge.to_string());
        let wrong = match check_time(ts, self.origin.arrival_us) {
            Ok(()) if cells.len() > FIELDS_MAX => Some(("malformed", format!("more than {FIELDS_MAX} attributes"))),
            Ok(()) if metric.name.is_empty() => Some(("malformed", "the metric has no name".to_owned())),
            Ok(()) if self.origin.own_names.has(&stream) => Some(("reserved", own_names::refusal(&stream))),
            outcome => outcome.err(),
        };
        if let Some((reason, detail)) = wrong {
            let text = |value: &Own| match value {
                Own::Int(value) => json!(value),
                Own::Float(value) => json!(value),
                Own::Bool(value) => json!(value),
                Own::Text(value) => json!(value),
                Own::Time(us) => json!(us),
            };
            let fields: serde_json::Map<_, _> =
                cells.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
            let payload = json!({ "metric": metric.name, "time_ns": point.time_ns, "fields": fields }).to_string();
            let rejected = Rejected {
                number: self.number,
                stream: Some(stream.as_str()),
                reason,
                detail: &detail,
                payload: payload.as_bytes(),
            };
            return reject(self.rows, &mut self.told, self.origin, &rejected);
        }
        self.told.rename(&metric.name, stream.as_str());
        self.told.rows += 1;
        self.told.by_arrival |= point.time_ns == 0;
        self.rows.add(&stream, ts, Some(&device), cells.iter().map(|(name, value)| (name, value.cell())))
    }
}

/// An attribute's value; lists and maps as JSON, bytes as hexadecimal digits in it.
fn own(value: &AnyValue) -> Option<Own> {
    Some(match value.value.as_ref()? {
        Value::StringValue(text) => Own::Text(text.clone()),
        Value::BoolValue(value) => Own::Bool(*value),
        Value::IntValue(value) => Own::Int(*value),
        Value::DoubleValue(value) => Own::Float(*value),
        _ => Own::Text(as_json(value).to_string()),
    })
}

fn as_json(value: &AnyValue) -> serde_json::Value {
    match value.value.as_ref() {
        None => serde_json::Value::Null,
        Some(Value::StringValue(text)) => json!(text),
        Some(Value::BoolValue(value)) => json!(value),
        Some(Value::IntValue(value)) => json!(value),
        Some(Value::DoubleValue(value)) => json!(value),
        Some(Value::BytesValue(bytes)) => json!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        Some(Value::StringValueStrindex(index)) => json!(index),
        Some(Value::ArrayValue(list)) => list.values.iter().map(as_json).collect(),
        Some(Value::KvlistValue(map)) => {
            let member = |pair: &KeyValue| (pair.key.clone(), pair.value.as_ref().map(as_json).unwrap_or_default());
            serde_json::Value::Object(map.values.iter().map(member).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::metrics::v1::{
        Gauge, Histogram, HistogramDataPoint, ResourceMetrics, ScopeMetrics,
    };
    use opentelemetry_proto::tonic::resource::v1::Resource;

    use super::*;
    use crate::doors::gathering;
    use crate::own_names::OwnNames;

    const ARRIVAL: i64 = TS_MIN_US + 1_000_000_000;

    fn text(key: &str, value: &str) -> KeyValue {
        let value = Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) });
        KeyValue { key: key.to_owned(), value, ..KeyValue::default() }
    }

    #[test]
    fn points_are_rows_and_bad_ones_are_quarantined() {
        let ns = TS_MIN_US as u64 * 1_000;
        let point = |time_unix_nano, value| NumberDataPoint {
            attributes: vec![text("cpu.mode", "user")],
            time_unix_nano,
            value: Some(value),
            ..NumberDataPoint::default()
        };
        let gauge = Gauge {
            data_points: vec![
                point(ns, Number::AsDouble(0.5)),
                point(1, Number::AsInt(2)),
                point(ns, Number::AsInt(3)),
            ],
        };
        let of_histogram = HistogramDataPoint {
            time_unix_nano: ns,
            count: 3,
            sum: Some(4.5),
            bucket_counts: vec![1, 2],
            explicit_bounds: vec![1.0],
            ..HistogramDataPoint::default()
        };
        let histogram = Histogram { data_points: vec![of_histogram], aggregation_temporality: 1 };
        let metric = |name: &str, data| Metric { name: name.to_owned(), data: Some(data), ..Metric::default() };
        let forged = Gauge { data_points: vec![point(ns, Number::AsInt(1))] };
        let metrics = vec![
            metric("system.cpu", Data::Gauge(gauge)),
            metric("http.time", Data::Histogram(histogram)),
            metric("calm.5m", Data::Gauge(forged)),
        ];
        let resource = Resource { attributes: vec![text("host.name", "web-1")], ..Resource::default() };
        let request = ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: Some(resource),
                scope_metrics: vec![ScopeMetrics { metrics, ..ScopeMetrics::default() }],
                ..ResourceMetrics::default()
            }],
        };
        let mut rows = gathering("otlp", 1 << 20);
        let edge = "gw".parse().unwrap();
        let own_names = &OwnNames::default();
        own_names.set(|stream| stream.as_str() == "calm_5m");
        let origin = Origin { edge: &edge, own_names, source: "otlp", topic: "", arrival_us: ARRIVAL };
        let told = read(&request.encode_to_vec(), &[], origin, &mut rows).unwrap();
        assert_eq!((told.rows, told.rejected), (3, 2));
        let batches = rows.finish().unwrap();
        let of = |stream: &'static str| batches.iter().filter(move |batch| batch.cut.stream.as_str() == stream);
        assert_eq!(of("system_cpu").count(), 2, "one of floats, one of integers");
        let schema = of("http_time").next().unwrap().schema.canonical().replace('\n', ",");
        assert_eq!(
            schema,
            "ts timestamp,device text,host_name text,count int64,temporality text,sum float64,bounds text,buckets text,quality text,"
        );
        assert_eq!(of("quarantine").map(|batch| batch.rows.num_rows()).sum::<usize>(), 2);
        assert_eq!(of("calm_5m").count(), 0);
        assert!(read(b"\xff\xff", &[], origin, &mut gathering("otlp", 1 << 20)).is_err());
    }
}
