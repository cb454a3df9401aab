//! What a reader may see: rows of some edges, rows that fulfil a condition, or both at once.
//!
//! A scope is a filter under every scan, below everything that the reader wrote, and nothing is moved past it
//! ([`hidden`]): neither an error of the reader's own expression, nor a statistic, nor a plan tells of other rows. A
//! table that lacks a column of the condition has no row for the reader: what cannot be judged is denied.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_schema::SchemaRef;
use datafusion::common::{DFSchema, Result};
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr};
use datafusion::prelude::{col, lit};
use datafusion::sql::sqlparser::ast::{Expr as SqlExpr, Visit, Visitor};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::Token;
use std::ops::ControlFlow;
use wire::schema::EDGE;

pub(crate) mod hidden;

/// The rows that a reader may see.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Ids of edges; `*` stands for any characters. None: every edge.
    edges: Option<Vec<String>>,
    /// A condition over the columns of a table, as SQL.
    condition: Option<String>,
}

impl Scope {
    /// A scope of these edges and this condition; both must hold for a row.
    ///
    /// # Errors
    /// When the condition is no SQL expression, or asks a table of its own.
    pub fn new(edges: Option<Vec<String>>, condition: Option<String>) -> std::result::Result<Self, String> {
        if let Some(condition) = &condition {
            check_condition(condition)?;
        }
        Ok(Self { edges, condition })
    }

    /// Whether numbers about an edge as a whole may be seen: only when all of its rows may.
    pub(crate) fn admits_edge(&self, edge: &str) -> bool {
        self.condition.is_none() && self.edges.iter().flatten().any(|pattern| matches(pattern, edge))
    }

    /// The filter for a table with these columns.
    pub(crate) fn filter(&self, state: &SessionState, schema: &SchemaRef) -> Result<Expr> {
        let mut filter = lit(true);
        if let Some(edges) = &self.edges {
            let known = schema.index_of(EDGE).is_ok();
            let any = edges.iter().map(|pattern| edge_filter(pattern)).reduce(Expr::or);
            filter = any.filter(|_| known).unwrap_or_else(|| lit(false));
        }
        if let Some(condition) = &self.condition {
            let columns = DFSchema::try_from(Arc::clone(schema))?;
            // What names a column that is not there judges no row of this table.
            let condition = state.create_logical_expr(condition, &columns).unwrap_or_else(|_| lit(false));
            filter = filter.and(condition);
        }
        Ok(filter)
    }
}

fn edge_filter(pattern: &str) -> Expr {
    if !pattern.contains('*') {
        return col(EDGE).eq(lit(pattern));
    }
    let mut like = String::with_capacity(pattern.len() + 4);
    for character in pattern.chars() {
        match character {
            '*' => like.push('%'),
            '%' | '_' | '\\' => like.extend(['\\', character]),
            other => like.push(other),
        }
    }
    col(EDGE).like(lit(like))
}

/// Whether a text fits a pattern in which `*` stands for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        if let Some(middle) = last.replace(part) {
            let Some(at) = rest.find(middle) else { return false };
            rest = &rest[at + middle.len()..];
        }
    }
    last.map_or(rest.is_empty(), |last| rest.ends_with(last))
}

/// A question of its own would see rows that are not the reader's.
struct Questions;

impl Visitor for Questions {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &SqlExpr) -> ControlFlow<()> {
        match expr {
            SqlExpr::Subquery(_) | SqlExpr::InSubquery { .. } | SqlExpr::Exists { .. } => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

fn check_condition(condition: &str) -> std::result::Result<(), String> {
    let wrong = |error: String| format!("scope `{condition}` is no condition: {error}");
    let mut parser =
        Parser::new(&GenericDialect {}).try_with_sql(condition).map_err(|error| wrong(error.to_string()))?;
    let expr = parser.parse_expr().map_err(|error| wrong(error.to_string()))?;
    let next = parser.peek_token();
    if next.token != Token::EOF {
        return Err(wrong(format!("`{}` follows its end", next.token)));
    }
    if expr.visit(&mut Questions).is_break() {
        return Err(wrong("it may not ask other tables".to_owned()));
    }
    Ok(())
}

/// Those of a reader's filters that may be used below its scope, to leave out files: comparisons of a column with a
/// constant of its type cannot fail, whatever rows they meet.
pub(crate) fn harmless(filters: &[Expr]) -> Vec<Expr> {
    let parts = filters.iter().flat_map(split_conjunction);
    parts.filter(|part| cannot_fail(part)).cloned().collect()
}

fn cannot_fail(filter: &Expr) -> bool {
    match filter {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            op.supports_propagation()
                && matches!(
                    (left.as_ref(), right.as_ref()),
                    (Expr::Column(_), Expr::Literal(..)) | (Expr::Literal(..), Expr::Column(_))
                )
        }
        Expr::InList(list) => {
            matches!(list.expr.as_ref(), Expr::Column(_))
                && list.list.iter().all(|item| matches!(item, Expr::Literal(..)))
        }
        Expr::IsNull(inner) | Expr::IsNotNull(inner) => matches!(inner.as_ref(), Expr::Column(_)),
        _ => false,
    }
}

/// The columns of a table that a scan must read: those that are wanted, and behind them those of the filter alone.
pub(crate) fn with_columns_of(wanted: &SchemaRef, filter: &Expr, table: &SchemaRef) -> Result<SchemaRef> {
    let known: HashSet<&str> = wanted.fields().iter().map(|field| field.name().as_str()).collect();
    let mut fields = wanted.fields().to_vec();
    let mut more: Vec<&str> = filter.column_refs().iter().map(|column| column.name.as_str()).collect();
    more.sort_unstable();
    more.dedup();
    for name in more.into_iter().filter(|name| !known.contains(name)) {
        fields.push(Arc::clone(&table.fields()[table.index_of(name)?]));
    }
    Ok(Arc::new(arrow_schema::Schema::new(fields)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, text, expected) in [
            ("gw-1", "gw-1", true),
            ("gw-1", "gw-12", false),
            ("gw-*", "gw-12", true),
            ("gw-*", "xgw-12", false),
            ("*-north", "gw-north", true),
            ("gw-*-north", "gw-1-north", true),
            ("gw-*-north", "gw-north", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("a*a", "a", false),
            ("*", "", true),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_condition_is_one_expression_without_questions() {
        Scope::new(None, Some("site IN ('a', 'b') AND n > 3".into())).unwrap();
        for (wrong, words) in [
            ("site =", "no condition"),
            ("site = 'a'; DROP TABLE x", "follows its end"),
            ("site IN (SELECT site FROM other)", "may not ask"),
            ("EXISTS (SELECT 1)", "may not ask"),
            ("n > (SELECT 1)", "may not ask"),
        ] {
            let error = Scope::new(None, Some(wrong.into())).unwrap_err();
            assert!(error.contains(words), "{wrong}: {error}");
        }
    }

    #[test]
    fn an_edge_as_a_whole_is_seen_only_when_every_row_of_it_may_be() {
        let edges = Some(vec!["gw-*".to_owned()]);
        assert!(Scope::new(edges.clone(), None).unwrap().admits_edge("gw-1"));
        assert!(!Scope::new(edges.clone(), None).unwrap().admits_edge("other"));
        assert!(!Scope::new(edges, Some("true".into())).unwrap().admits_edge("gw-1"));
        assert!(!Scope::new(None, Some("true".into())).unwrap().admits_edge("gw-1"));
        assert!(!Scope::new(Some(Vec::new()), None).unwrap().admits_edge("gw-1"));
    }
}
