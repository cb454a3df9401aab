//! Names of result columns. DataFusion refuses a SELECT list in which two columns have one name; PostgreSQL does not.
//!
//! Such a list is planned once more with other names for the later ones: `count(*)`, `count(*)_2`. Only the outermost
//! SELECT is treated so: a subquery's columns are named to be spoken of, and two of one name could not be.
//! A cast has the name of the column that it casts: where that column is sorted by, too, the cast is called as it is written.
//!
//! A subquery in FROM that has no name keeps, in DataFusion, the names of the tables in it, so that it cannot be joined with
//! one of them. Such a statement is planned once more with names for those subqueries.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{Schema, SchemaRef};
use datafusion::common::{DataFusionError, Result, SchemaError};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::sql::parser::Statement as Parsed;
use datafusion::sql::sqlparser::ast::{
    Expr as SqlExpr, Ident, Query, Select, SelectItem, SetExpr, Statement, TableAlias, TableFactor, VisitMut,
    VisitorMut,
};
use futures::StreamExt;

use crate::functions::asof::syntax::nest;

/// Plans a statement; columns of one name get names of their own.
pub(crate) async fn plan(state: &SessionState, mut statement: Parsed) -> Result<LogicalPlan> {
    nest(&mut statement);
    let mut planned = state.statement_to_plan(statement.clone()).await;
    if planned.as_ref().is_err_and(is_of_tables) {
        name_subqueries(&mut statement);
        planned = state.statement_to_plan(statement.clone()).await;
    }
    let refused = match planned {
        Err(error) if is_of_names(&error) => error,
        planned => return planned,
    };
    match with_own_names(state, statement).await? {
        Some(statement) => state.statement_to_plan(statement).await,
        None => Err(refused),
    }
}

/// DataFusion has no other mark for it than these words.
fn is_of_names(error: &DataFusionError) -> bool {
    matches!(error.find_root(), DataFusionError::Plan(message) if message.contains("require unique expression names"))
}

/// Whether two columns of one table and name met.
fn is_of_tables(error: &DataFusionError) -> bool {
    let DataFusionError::SchemaError(error, _) = error.find_root() else { return false };
    matches!(error.as_ref(), SchemaError::DuplicateQualifiedField { .. })
}

fn name_subqueries(statement: &mut Parsed) {
    match statement {
        // Nothing breaks off.
        Parsed::Statement(statement) => drop(statement.visit(&mut Unnamed(0))),
        Parsed::Explain(explain) => name_subqueries(&mut explain.statement),
        _ => {}
    }
}

/// How many subqueries without a name there were.
struct Unnamed(usize);

impl VisitorMut for Unnamed {
    type Break = ();

    fn pre_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<()> {
        if let TableFactor::Derived { alias: alias @ None, .. } = factor {
            self.0 += 1;
            let name = Ident::with_quote('"', format!("subquery {}", self.0));
            *alias = Some(TableAlias { explicit: true, name, columns: Vec::new(), at: None });
        }
        ControlFlow::Continue(())
    }
}

/// The statement with an alias for every column whose name was taken before it; None when it is no SELECT.
async fn with_own_names(state: &SessionState, mut statement: Parsed) -> Result<Option<Parsed>> {
    let Some(select) = outermost(&mut statement) else {
        return Ok(None);
    };
    let mut taken = HashSet::new();
    for item in &mut select.projection {
        if let SelectItem::ExprWithAlias { alias, .. } = item {
            alias.value = own(&alias.value, &mut taken);
        }
    }
    // What the others are called shows when they are planned under names that nobody else has.
    let mut renamed = statement.clone();
    let Some(query) = query(&mut renamed) else {
        return Ok(None);
    };
    query.order_by = None;
    let Some(select) = selection(query) else {
        return Ok(None);
    };
    for (index, item) in select.projection.iter_mut().enumerate() {
        alias(item, stand_in(index));
    }
    let count = select.projection.len();
    let trial = state.statement_to_plan(renamed).await?;
    let stand_ins: Vec<String> = (0..count).map(stand_in).collect();
    let fields = trial.schema().fields();
    taken.extend(fields.iter().map(|field| field.name().clone()).filter(|name| !stand_ins.contains(name)));
    let Some(select) = outermost(&mut statement) else {
        return Ok(None);
    };
    let mut is_known = false;
    for (item, stand_in) in select.projection.iter_mut().zip(&stand_ins) {
        let Some(name) = stood_for(&trial, stand_in) else {
            continue;
        };
        let own = own(&name, &mut taken);
        if own != name {
            alias(item, own);
            is_known = true;
        }
    }
    if !is_known {
        for item in &mut select.projection {
            if let SelectItem::UnnamedExpr(expr @ SqlExpr::Cast { .. }) = item {
                let name = own(&expr.to_string(), &mut taken);
                alias(item, name);
            }
        }
    }
    Ok(Some(statement))
}

fn outermost(statement: &mut Parsed) -> Option<&mut Select> {
    selection(query(statement)?)
}

fn query(statement: &mut Parsed) -> Option<&mut Query> {
    match statement {
        Parsed::Statement(statement) => match statement.as_mut() {
            Statement::Query(query) => Some(query),
            _ => None,
        },
        _ => None,
    }
}

fn selection(query: &mut Query) -> Option<&mut Select> {
    match query.body.as_mut() {
        SetExpr::Select(select) => Some(select),
        _ => None,
    }
}

fn stand_in(index: usize) -> String {
    format!("stand-in {index}")
}

/// Gives a name to a column that has none.
fn alias(item: &mut SelectItem, name: String) {
    if let SelectItem::UnnamedExpr(expr) = item {
        *item = SelectItem::ExprWithAlias { expr: expr.clone(), alias: Ident::with_quote('"', name) };
    }
}

/// The name that the column behind this alias has without it.
fn stood_for(plan: &LogicalPlan, stand_in: &str) -> Option<String> {
    if let LogicalPlan::Projection(projection) = plan {
        let found = projection.expr.iter().find_map(|expr| match expr {
            Expr::Alias(alias) if alias.name == stand_in => Some(alias.expr.qualified_name().1),
            _ => None,
        });
        if found.is_some() {
            return found;
        }
    }
    match plan.inputs()[..] {
        [input] => stood_for(input, stand_in),
        _ => None,
    }
}

/// The name, or with the first number that makes it one of its own.
fn own(name: &str, taken: &mut HashSet<String>) -> String {
    let mut own = name.to_owned();
    let mut number = 2;
    while !taken.insert(own.clone()) {
        own = format!("{name}_{number}");
        number += 1;
    }
    own
}

/// Rows whose columns all have names of their own, for a format that knows columns by name alone: `a.n` and `b.n` are
/// both `n` otherwise.
pub(crate) fn unique(rows: SendableRecordBatchStream) -> SendableRecordBatchStream {
    let schema = rows.schema();
    let mut taken = HashSet::new();
    let fields: Vec<_> = schema
        .fields()
        .iter()
        .map(|field| match own(field.name(), &mut taken) {
            name if name == *field.name() => Arc::clone(field),
            name => Arc::new(field.as_ref().clone().with_name(name)),
        })
        .collect();
    let unique: SchemaRef = Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()));
    if unique == schema {
        return rows;
    }
    let of_rows = Arc::clone(&unique);
    let rows = rows.map(move |batch| {
        let batch = batch?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        Ok(RecordBatch::try_new_with_options(Arc::clone(&of_rows), batch.columns().to_vec(), &options)?)
    });
    Box::pin(RecordBatchStreamAdapter::new(unique, rows))
}
