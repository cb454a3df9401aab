//! A condition on values, of rows that are read as pages: bounds of row groups and pages leave out what they can, and each
//! batch is looked at whole. DataFusion's Parquet source reads the columns of a condition first, and of the others what is
//! left, row by row: it costs more than it saves where those are one or two numbers (`BENCHMARKS.md`, congest).

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::cast::AsArray;
use arrow_schema::{Schema, SchemaRef};
use arrow_select::filter::filter_record_batch;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{DataFusionError, Result};
use datafusion::datasource::physical_plan::parquet::{
    PagePruningAccessPlanFilter, ParquetAccessPlan, ParquetFileMetrics, RowGroupAccess, RowGroupAccessPlanFilter,
};
use datafusion::parquet::file::metadata::ParquetMetaData;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{Column, DynamicFilterTracking};
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_expr_common::physical_expr::is_volatile;
use datafusion::physical_optimizer::pruning::{PruningPredicate, PruningPredicateBuilder};
use wire::schema::{DATE, DEVICE, TS};

/// See the module.
#[derive(Debug)]
pub(super) struct Condition {
    /// Of columns of `schema`.
    pub(super) expr: Arc<dyn PhysicalExpr>,
    schema: SchemaRef,
    names: Vec<String>,
    groups: Option<PruningPredicate>,
    pages: PagePruningAccessPlanFilter,
}

impl Condition {
    /// Of a table's condition on rows with these columns; none where DataFusion's source does better: it is on the device or
    /// the time, which files are sorted by, or there is much to read beside its columns.
    pub(super) fn of(table: &Arc<dyn PhysicalExpr>, schema: &SchemaRef) -> Result<Option<Self>> {
        let mut names = collect_columns(table).into_iter().map(|column| column.name().to_owned()).collect::<Vec<_>>();
        names.sort();
        names.dedup();
        let is_of_values =
            |name: &String| ![DEVICE, TS, DATE].contains(&name.as_str()) && schema.index_of(name).is_ok();
        if !names.iter().all(is_of_values)
            || DynamicFilterTracking::classify(table).contains_dynamic_filter()
            || is_volatile(table)
        {
            return Ok(None);
        }
        let mut beside = schema.fields().iter().filter(|field| field.name() != DEVICE && !names.contains(field.name()));
        if beside.clone().count() > names.len() || !beside.all(|field| field.data_type().is_primitive()) {
            return Ok(None);
        }
        let expr = Arc::clone(table).transform(|node| match node.downcast_ref::<Column>() {
            Some(column) => Ok(Transformed::yes(Arc::new(Column::new_with_schema(column.name(), schema)?) as _)),
            None => Ok(Transformed::no(node)),
        });
        let expr = expr.data()?;
        let groups =
            PruningPredicateBuilder::new().with_file_schema(Arc::clone(schema)).try_build(Arc::clone(&expr)).ok();
        let pages = PagePruningAccessPlanFilter::new(&expr, Arc::clone(schema));
        Ok(Some(Self { expr, schema: Arc::clone(schema), names, groups, pages }))
    }

    /// Which of these row groups of a file may have rows for which it holds, and of them, which rows.
    pub(super) fn places(
        &self,
        footer: &ParquetMetaData,
        of_file: &Schema,
        groups: impl IntoIterator<Item = usize>,
        metrics: &ParquetFileMetrics,
    ) -> Vec<RowGroupAccess> {
        let mut all = ParquetAccessPlan::new_none(footer.num_row_groups());
        groups.into_iter().for_each(|group| all.scan(group));
        let kind =
            |schema: &Schema, name: &str| schema.field_with_name(name).ok().map(|field| field.data_type().clone());
        // Bounds of another type are bounds of other values.
        if self.names.iter().any(|name| kind(of_file, name) != kind(&self.schema, name)) {
            return all.into_inner();
        }
        let columns = footer.file_metadata().schema_descr();
        // Bounds of pages say more than those of their group.
        if footer.column_index().is_some() && footer.offset_index().is_some() {
            return self.pages.prune_plan_with_page_index(all, of_file, columns, footer, metrics).into_inner();
        }
        let mut left = RowGroupAccessPlanFilter::new(all);
        if let Some(groups) = &self.groups {
            left.prune_by_statistics(of_file, columns, footer.row_groups(), groups, metrics);
        }
        left.build().into_inner()
    }

    /// The rows for which it holds.
    pub(super) fn filter(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        let holds = self.expr.evaluate(rows)?.into_array(rows.num_rows())?;
        let holds =
            holds.as_boolean_opt().ok_or_else(|| DataFusionError::Internal("a condition holds or not".into()))?;
        Ok(filter_record_batch(rows, holds)?)
    }
}
