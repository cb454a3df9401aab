//! The newest row of each device out of the rows themselves: for a reader with a scope, whose newest row is that of the rows
//! in it, and for a table of the past. The order is that of the cache (`newest`).

use std::sync::Arc;

use datafusion::catalog::TableProvider;
use datafusion::common::{Column, Result, internal_err};
use datafusion::datasource::provider_as_source;
use datafusion::functions_window::expr_fn::row_number;
use datafusion::logical_expr::{Expr, ExprFunctionExt, LogicalPlan, LogicalPlanBuilder, SortExpr, TableScan, lit};
use wire::schema::{DEVICE, RECEIVED_AT, SEQ, SPOOL, TS};

/// What a scan of `latest('…')` becomes over this table.
pub(crate) fn newest(scan: &TableScan, table: Arc<dyn TableProvider>) -> Result<LogicalPlan> {
    if !scan.filters.is_empty() || scan.fetch.is_some() {
        return internal_err!("a plan was optimized before its tables were pinned");
    }
    let column = |name: &str| Expr::Column(Column::new(Some(scan.table_name.clone()), name));
    let schema = table.schema();
    let rest = schema.fields().iter().map(|field| field.name().as_str()).filter(|name| *name != DEVICE);
    let order: Vec<SortExpr> =
        [TS, RECEIVED_AT, SPOOL, SEQ].into_iter().chain(rest).map(|name| column(name).sort(false, false)).collect();
    let place = row_number().partition_by(vec![column(DEVICE)]).order_by(order).build()?;
    let first = Expr::Column(Column::from_name(place.schema_name().to_string())).eq(lit(1_u64));
    let columns = scan.projected_schema.columns().into_iter().map(Expr::Column);
    LogicalPlanBuilder::scan(scan.table_name.clone(), provider_as_source(table), None)?
        .window([place])?
        .filter(first)?
        .project(columns.collect::<Vec<_>>())?
        .build()
}
