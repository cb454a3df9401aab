//! The tables of the schema `system` that are questions about tables of `public`: they are pinned, and cut to what the
//! caller may see, like every other question.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::catalog::view::ViewTable;
use datafusion::common::Result;
use datafusion::datasource::provider_as_source;
use datafusion::functions_aggregate::expr_fn::{count, max, min};
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::{col, lit};
use wire::StreamName;
use wire::schema::own::QUARANTINE;
use wire::schema::{EDGE, RECEIVED_AT, SEQ, SPOOL, TS, timestamp_type};

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

fn empty(columns: Vec<(&str, DataType)>) -> Result<LogicalPlan> {
    let fields: Vec<Field> = columns.into_iter().map(|(name, kind)| Field::new(name, kind, true)).collect();
    let schema: SchemaRef = Arc::new(Schema::new(fields));
    let none = Arc::new(datafusion::catalog::MemTable::try_new(schema, vec![Vec::new()])?);
    LogicalPlanBuilder::scan("nothing", provider_as_source(none), None)?.build()
}

/// A row for each batch of each stream: from `_edge`, `_spool` and `_seq` of a row to when it came, with how many.
pub(super) fn batches(tables: &dyn Tables) -> Result<Arc<dyn TableProvider>> {
    let mut all: Option<LogicalPlanBuilder> = None;
    for stream in tables.streams() {
        let Some(scan) = scan(tables, &stream)? else { continue };
        let rows = vec![
            count(lit(1)).alias("rows"),
            min(col(TS)).alias("first_ts"),
            max(col(TS)).alias("last_ts"),
            max(col(RECEIVED_AT)).alias("received_at"),
        ];
        let branch = scan.aggregate(vec![col(EDGE), col(SPOOL), col(SEQ)], rows)?.project(vec![
            lit(stream.as_str()).alias("stream"),
            plain(EDGE, "edge"),
            plain(SPOOL, "spool"),
            plain(SEQ, "seq"),
            col("rows"),
            col("first_ts"),
            col("last_ts"),
            col("received_at"),
        ])?;
        all = Some(match all {
            Some(all) => all.union(branch.build()?)?,
            None => branch,
        });
    }
    let plan = match all {
        Some(all) => all.build()?,
        None => empty(vec![
            ("stream", DataType::Utf8),
            ("edge", DataType::Utf8),
            ("spool", DataType::Utf8),
            ("seq", DataType::Int64),
            ("rows", DataType::Int64),
            ("first_ts", timestamp_type()),
            ("last_ts", timestamp_type()),
            ("received_at", timestamp_type()),
        ])?,
    };
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
