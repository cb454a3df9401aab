//! Functions of FROM whose first argument is a table, a name or a SELECT in parentheses, and whose second is its column of
//! event times: HOP and SESSION. How they are written, and what conditions on the columns that they add say of the time.
//!
//! [`nest`] brings a call to a tree that DataFusion's planner takes, and [`call`] finds it there again.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, TimeUnit};
use datafusion::common::{Column, DFSchema, DFSchemaRef, Result, ScalarValue, plan_err};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr, LogicalPlan, Operator};
use datafusion::prelude::lit;
use datafusion::sql::sqlparser::ast::{
    Expr as Sql, FunctionArg, FunctionArgExpr, Ident, Join, JoinConstraint, JoinOperator, ObjectName, TableAlias,
    TableFactor, TableWithJoins,
};

use super::time_bucket::{constant, instant};
use crate::as_of;

/// The columns that they add, behind those of the table.
pub(crate) const WINDOW_START: &str = "window_start";
pub(crate) const WINDOW_END: &str = "window_end";

/// Their names.
const FUNCTIONS: [&str; 2] = ["hop", "session"];

/// Which of them a name is.
fn function(name: &ObjectName) -> Option<&'static str> {
    let [part] = &name.0[..] else { return None };
    let word = part.as_ident()?;
    FUNCTIONS.into_iter().find(|function| word.value.eq_ignore_ascii_case(function))
}

/// The table of a call, when this is one: the words of its name.
pub(crate) fn table_of(factor: &mut TableFactor) -> Option<&mut [Ident]> {
    let TableFactor::Table { name, args: Some(arguments), .. } = factor else { return None };
    function(name)?;
    match arguments.args.first_mut()? {
        FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::Identifier(word))) => Some(std::slice::from_mut(word)),
        FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::CompoundIdentifier(words))) => Some(words),
        _ => None,
    }
}

/// Makes of a call its table and, joined to it in parentheses, the rest: the planner finds tables where tables stand only.
pub(super) fn nest(factor: &mut TableFactor) {
    let TableFactor::Table { name, args: Some(arguments), alias, .. } = factor else { return };
    let Some(function) = function(name) else { return };
    let (relation, called) = match arguments.args.first() {
        Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::Identifier(word)))) => named(vec![word.clone()]),
        Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::CompoundIdentifier(words)))) => named(words.clone()),
        Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(Sql::Subquery(subquery)))) => {
            let called = alias_of(function.to_owned());
            let subquery = subquery.clone();
            let table = TableFactor::Derived { lateral: false, subquery, alias: Some(called.clone()), sample: None };
            (table, Some(called))
        }
        _ => return,
    };
    arguments.args.remove(0);
    let alias = alias.take().or(called);
    let function = std::mem::replace(factor, relation.clone());
    let join = Join { relation: function, global: false, join_operator: JoinOperator::Join(JoinConstraint::None) };
    let table_with_joins = Box::new(TableWithJoins { relation, joins: vec![join] });
    *factor = TableFactor::NestedJoin { table_with_joins, alias };
}

/// A call that was nested.
pub(super) struct Call {
    pub(super) table: TableFactor,
    /// Those behind the table.
    pub(super) arguments: Vec<Sql>,
    pub(super) alias: Option<TableAlias>,
}

/// A relation as a call of this function; as it was when it is none.
///
/// # Errors
/// `usage`, when it is not written as a call is.
pub(super) fn call(
    relation: TableFactor,
    wanted: &str,
    usage: &str,
) -> Result<std::result::Result<Call, Box<TableFactor>>> {
    let is_wanted = |name: &ObjectName| function(name) == Some(wanted);
    let (table_with_joins, alias) = match relation {
        // One without a table was not nested.
        TableFactor::Table { name, args: Some(_), .. } if is_wanted(&name) => return plan_err!("{usage}"),
        TableFactor::NestedJoin { table_with_joins, alias } => (table_with_joins, alias),
        other => return Ok(Err(Box::new(other))),
    };
    let arguments = match &table_with_joins.joins[..] {
        [Join { relation: TableFactor::Table { name, args: Some(arguments), .. }, .. }] if is_wanted(name) => {
            arguments.args.clone()
        }
        _ => return Ok(Err(Box::new(TableFactor::NestedJoin { table_with_joins, alias }))),
    };
    let expression = |argument| match argument {
        FunctionArg::Unnamed(FunctionArgExpr::Expr(argument)) => Ok(argument),
        _ => plan_err!("{usage}"),
    };
    let arguments = arguments.into_iter().map(expression).collect::<Result<_>>()?;
    Ok(Ok(Call { table: table_with_joins.relation, arguments, alias }))
}

/// A table by its name, and what it is called where nothing else is said.
fn named(words: Vec<Ident>) -> (TableFactor, Option<TableAlias>) {
    let called = words.last().map(|word| {
        let name = if word.quote_style.is_some() { word.value.clone() } else { word.value.to_lowercase() };
        alias_of(as_of::parts(&name).0.to_owned())
    });
    (as_of::table_named(ObjectName::from(words), None), called)
}

fn alias_of(name: String) -> TableAlias {
    TableAlias { explicit: true, name: Ident::with_quote('"', name), columns: Vec::new(), at: None }
}

/// Whether a table can have windows by this column.
///
/// # Errors
/// Why not.
pub(super) fn check(input: &DFSchema, time: &Column, function: &str) -> Result<()> {
    let has = |name: &&str| input.fields().iter().any(|field| field.name() == name);
    if let Some(own) = [WINDOW_START, WINDOW_END].iter().find(|name| has(name)) {
        return plan_err!(
            "{function} adds a column {own}, and this table has one: take the columns that you need, \
             {function}((SELECT ts, device FROM …), ts, …)"
        );
    }
    let kind = input.qualified_field_from_column(time)?.1.data_type();
    if !matches!(kind, DataType::Timestamp(..)) {
        return plan_err!("{function}: {} is {kind}, and no timestamp", time.name);
    }
    Ok(())
}

/// The columns of a table, then those of the window, which are of the type of the time.
pub(super) fn schema(input: &LogicalPlan, time: &Column) -> Result<DFSchemaRef> {
    let kind = input.schema().qualified_field_from_column(time)?.1.data_type().clone();
    let own = |name: &str| (None, Arc::new(Field::new(name, kind.clone(), false)));
    let columns = input.schema().iter().map(|(qualifier, field)| (qualifier.cloned(), Arc::clone(field)));
    let fields = columns.chain([own(WINDOW_START), own(WINDOW_END)]).collect();
    Ok(Arc::new(DFSchema::new_with_metadata(fields, input.schema().metadata().clone())?))
}

/// A comparison of a column with a moment of its type: the index of the column, and the moment, µs.
pub(super) fn compared(condition: &Expr, schema: &DFSchema) -> Option<(usize, Operator, i64)> {
    let Expr::BinaryExpr(BinaryExpr { left, op, right }) = condition else { return None };
    let (column, op, value) = match (left.as_ref(), right.as_ref()) {
        (Expr::Column(column), value) => (column, *op, value),
        (value, Expr::Column(column)) => (column, op.swap()?, value),
        _ => return None,
    };
    let index = schema.maybe_index_of_column(column)?;
    let value = constant(value).filter(|value| value.data_type() == *schema.field(index).data_type())?;
    // A part of a microsecond is not told.
    let whole = !matches!(value, ScalarValue::TimestampNanosecond(Some(ns), _) if ns % 1_000 != 0);
    Some((index, op, instant(&value).filter(|_| whole)?))
}

/// That a time lies in `[since, until)`, µs, where its type can say it.
pub(super) fn within(time: &Expr, kind: &DataType, since: Option<i64>, until: Option<i64>) -> Option<Expr> {
    if !matches!(kind, DataType::Timestamp(TimeUnit::Microsecond | TimeUnit::Nanosecond, _)) {
        return None;
    }
    let moment = |us: i64| ScalarValue::TimestampMicrosecond(Some(us), None).cast_to(kind).ok().map(lit);
    let since = since.and_then(moment).map(|since| time.clone().gt_eq(since));
    let until = until.and_then(moment).map(|until| time.clone().lt(until));
    conjunction(since.into_iter().chain(until))
}
