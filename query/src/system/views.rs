//! The tables of the schema `system` that are questions about tables of `public`: they are pinned, and cut to what the
//! caller may see, like every other question.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::catalog::view::ViewTable;
use datafusion::common::{Column, JoinType, Result};
use datafusion::datasource::provider_as_source;
use datafusion::functions_aggregate::expr_fn::{count, last_value, max, min};
use datafusion::functions_window::expr_fn::lead;
use datafusion::logical_expr::{Expr, ExprFunctionExt, LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::{col, lit};
use wire::StreamName;
use wire::schema::own::{ALERT_LOG, BATCH_ORIGINS, QUARANTINE};
use wire::schema::{DEVICE, EDGE, QUALITY, RECEIVED_AT, SEQ, SPOOL, TS, timestamp_type};

use crate::catalog::Tables;
use crate::fused_table::LiveTable;

/// A column that is the same in every branch of a question, under a plain name.
fn plain(column: &str, name: &str) -> Expr {
    col(column).alias(name)
}

fn scan(tables: &dyn Tables, stream: &StreamName) -> Result<Option<LogicalPlanBuilder>> {
    let Some(cold) = tables.cold(stream) else {
        return Ok(None);
    };
    let live = Arc::new(LiveTable::new(stream.clone(), cold.schema));
    LogicalPlanBuilder::scan(stream.as_str(), provider_as_source(live), None).map(Some)
}

/// The rows of all branches; none of these columns when there is no branch.
fn all(branches: Vec<LogicalPlanBuilder>, columns: Vec<(&str, DataType)>) -> Result<LogicalPlan> {
    let joined = branches.into_iter().map(Ok).reduce(|all, branch| all?.union(branch?.build()?));
    joined.map_or_else(|| empty(columns), |all| all?.build())
}

fn empty(columns: Vec<(&str, DataType)>) -> Result<LogicalPlan> {
    let fields: Vec<Field> = columns.into_iter().map(|(name, kind)| Field::new(name, kind, true)).collect();
    let schema: SchemaRef = Arc::new(Schema::new(fields));
    let none = Arc::new(datafusion::catalog::MemTable::try_new(schema, vec![Vec::new()])?);
    LogicalPlanBuilder::scan("nothing", provider_as_source(none), None)?.build()
}

/// A row for each batch of each stream: from `_edge`, `_spool` and `_seq` of a row to when it came, with how many, and which agent
/// sealed it with which configuration.
pub(super) fn batches(tables: &dyn Tables) -> Result<Arc<dyn TableProvider>> {
    let mut branches = Vec::new();
    for stream in tables.streams() {
        let Some(scan) = scan(tables, &stream)? else { continue };
        let rows = vec![
            count(lit(1)).alias("rows"),
            min(col(TS)).alias("first_ts"),
            max(col(TS)).alias("last_ts"),
            max(col(RECEIVED_AT)).alias("received_at"),
        ];
        branches.push(scan.aggregate(vec![col(EDGE), col(SPOOL), col(SEQ)], rows)?.project(vec![
            lit(stream.as_str()).alias("stream"),
            plain(EDGE, "edge"),
            plain(SPOOL, "spool"),
            plain(SEQ, "seq"),
            col("rows"),
            col("first_ts"),
            col("last_ts"),
            col("received_at"),
        ])?);
    }
    let columns = vec![
        ("stream", DataType::Utf8),
        ("edge", DataType::Utf8),
        ("spool", DataType::Utf8),
        ("seq", DataType::Int64),
        ("rows", DataType::Int64),
        ("first_ts", timestamp_type()),
        ("last_ts", timestamp_type()),
        ("received_at", timestamp_type()),
    ];
    let plan = all(branches, columns)?;
    let batches = LogicalPlanBuilder::from(plan).alias("batch")?;
    let sealed_there = [("stream", "stream"), ("spool", "spool")]
        .into_iter()
        .map(|(batch, origin)| col(Column::new(Some("batch"), batch)).eq(col(Column::new(Some("origin"), origin))));
    let (seq, from) = (col(Column::new(Some("batch"), "seq")), col(Column::new(Some("origin"), "from_seq")));
    let next = col(Column::new(Some("origin"), "next_seq"));
    let then = seq.clone().gt_eq(from).and(next.clone().is_null().or(seq.lt(next)));
    let on = sealed_there.chain([then]).collect::<Vec<_>>();
    let batch = ["stream", "edge", "spool", "seq", "rows", "first_ts", "last_ts", "received_at"];
    let batch = batch.map(|name| col(Column::new(Some("batch"), name)));
    let origin = ["agent", "configuration"].map(|name| col(Column::new(Some("origin"), name)));
    let plan =
        batches.join_on(origins(tables)?, JoinType::Left, on)?.project(batch.into_iter().chain(origin))?.build()?;
    Ok(Arc::new(ViewTable::new(plan, None)))
}

/// Of each stream and spool, from which batch to before which other, which agent with which configuration.
fn origins(tables: &dyn Tables) -> Result<LogicalPlan> {
    let stream: StreamName = BATCH_ORIGINS.parse().expect("own names are valid");
    let plan = match scan(tables, &stream)? {
        Some(scan) => {
            let next = lead(col("from_seq"), Some(1), None)
                .partition_by(vec![col("stream"), col("spool")])
                .order_by(vec![col("from_seq").sort(true, false), col(TS).sort(true, false)])
                .build()?;
            let columns = ["stream", "spool", "from_seq", "agent", "configuration"].map(col);
            let windowed = scan.window(vec![next.alias("next_seq")])?;
            windowed.project(columns.into_iter().chain([col("next_seq")]))?.build()?
        }
        None => empty(vec![
            ("stream", DataType::Utf8),
            ("spool", DataType::Utf8),
            ("from_seq", DataType::Int64),
            ("agent", DataType::Utf8),
            ("configuration", DataType::Int64),
            ("next_seq", DataType::Int64),
        ])?,
    };
    LogicalPlanBuilder::from(plan).alias("origin")?.build()
}

/// A row for each column of a stream and edge that has sent a value of it: how many rows, and when the first and the last came. It is
/// read from the rows, so it is what is stored, whatever the node has seen since its start.
pub(super) fn sources(tables: &dyn Tables) -> Result<Arc<dyn TableProvider>> {
    let mut branches = Vec::new();
    for stream in tables.streams() {
        let Some(cold) = tables.cold(&stream) else { continue };
        let names = cold.schema.fields().iter().map(|field| field.name().as_str());
        for name in names.filter(|name| !name.starts_with('_') && ![TS, DEVICE, QUALITY].contains(name)) {
            let Some(scan) = scan(tables, &stream)? else { continue };
            let rows = vec![
                count(lit(1)).alias("rows"),
                min(col(RECEIVED_AT)).alias("first_seen"),
                max(col(RECEIVED_AT)).alias("last_seen"),
            ];
            let with_value = scan.filter(Expr::Column(Column::from_name(name)).is_not_null())?;
            branches.push(with_value.aggregate(vec![col(EDGE)], rows)?.project(vec![
                lit(stream.as_str()).alias("stream"),
                lit(name).alias("name"),
                plain(EDGE, "edge"),
                col("rows"),
                col("first_seen"),
                col("last_seen"),
            ])?);
        }
    }
    let columns = vec![
        ("stream", DataType::Utf8),
        ("name", DataType::Utf8),
        ("edge", DataType::Utf8),
        ("rows", DataType::Int64),
        ("first_seen", timestamp_type()),
        ("last_seen", timestamp_type()),
    ];
    let plan = all(branches, columns)?;
    Ok(Arc::new(ViewTable::new(plan, None)))
}

/// A row for each stream, source and reason of `quarantine`.
pub(super) fn quarantine_reasons(tables: &dyn Tables) -> Result<Arc<dyn TableProvider>> {
    let quarantine: StreamName = QUARANTINE.parse().expect("own names are valid");
    let groups = ["stream", "source", "reason"];
    let plan = match scan(tables, &quarantine)? {
        Some(scan) => {
            let numbers =
                vec![count(lit(1)).alias("rows"), min(col(TS)).alias("first_ts"), max(col(TS)).alias("last_ts")];
            let numbered = scan.aggregate(groups.map(col), numbers)?;
            let columns = groups.into_iter().map(|name| plain(name, name));
            numbered.project(columns.chain(["rows", "first_ts", "last_ts"].map(col)))?.build()?
        }
        None => empty(vec![
            ("stream", DataType::Utf8),
            ("source", DataType::Utf8),
            ("reason", DataType::Utf8),
            ("rows", DataType::Int64),
            ("first_ts", timestamp_type()),
            ("last_ts", timestamp_type()),
        ])?,
    };
    Ok(Arc::new(ViewTable::new(plan, None)))
}

/// A row for each alert that is open: what the last row of `alert_log` about it says.
pub(super) fn alerts(tables: &dyn Tables) -> Result<Arc<dyn TableProvider>> {
    const COLUMNS: [(&str, DataType); 11] = [
        ("rule", DataType::Utf8),
        ("state", DataType::Utf8),
        ("severity", DataType::Utf8),
        ("device", DataType::Utf8),
        ("labels", DataType::Utf8),
        ("message", DataType::Utf8),
        ("topic", DataType::Utf8),
        ("value", DataType::Float64),
        ("quiet", DataType::Utf8),
        ("from_ts", DataType::Null),
        ("sequence", DataType::Int64),
    ];
    let log: StreamName = ALERT_LOG.parse().expect("own names are valid");
    let plan = match scan(tables, &log)? {
        Some(scan) => {
            let by_sequence = || vec![col("sequence").sort(true, false)];
            let last = |name: &str| last_value(col(name), by_sequence()).alias(name);
            let newest = COLUMNS.iter().map(|(name, _)| last(name)).chain([last("to_ts")]);
            let open = col("state").in_list(vec![lit("pending"), lit("firing"), lit("backfill")], false);
            let open = open.and(col("to_ts").is_null());
            let found = scan.filter(col("alert_id").is_not_null())?.aggregate(vec![col("alert_id")], newest)?;
            let columns = std::iter::once("alert_id").chain(COLUMNS.iter().map(|(name, _)| *name));
            found.filter(open)?.project(columns.map(col))?.build()?
        }
        None => {
            let of = |(name, kind): (&'static str, DataType)| {
                (name, if kind == DataType::Null { timestamp_type() } else { kind })
            };
            empty(std::iter::once(("alert_id", DataType::Utf8)).chain(COLUMNS.map(of)).collect())?
        }
    };
    Ok(Arc::new(ViewTable::new(plan, None)))
}
