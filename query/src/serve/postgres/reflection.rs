//! What catalogue questions of psql and SQLAlchemy ask that DataFusion cannot plan, answered by what is known: tables have no
//! indexes, no constraints, no defaults, no sequences and no collations of their own.
//!
//! `col_description` and `obj_description` become questions to `pg_description`, and `pg_table_size` one to `system.streams`.
//! `array(SELECT …)`, by which psql asks for policies, memberships and options, is null: there is none. `LIKE … ESCAPE 'c'`
//! becomes one with a backslash. Lists of options and of privileges have no words. Where the parts of an index are unfolded, or
//! PostgreSQL's own functions and types listed, no row comes out.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    Expr, Function, FunctionArguments, SelectItem, SetExpr, Statement, Value, ValueWithSpan, VisitMut, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::parser::Parser;

/// What has no row here, or is not told: sequences, defaults, and collations, of which there is one.
const EMPTY: [&str; 4] = ["pg_sequence", "pg_attrdef", "pg_collation", "typcollation"];

/// The question in words that can be planned.
pub(super) fn rewrite(mut statement: Statement) -> Statement {
    if let Some(nothing) = nothing(&statement) {
        return nothing;
    }
    let _ = VisitMut::visit(&mut statement, &mut Rewrites);
    statement
}

/// Words of a question that has no rows here: columns of indexes, and the functions, types and tablespaces of PostgreSQL.
const ROWLESS: [&str; 4] =
    ["unnest(pg_catalog.pg_index.indkey)", "pg_function_is_visible(", "pg_type_is_visible(", "pg_tablespace_location("];

/// For a question without rows: its columns.
fn nothing(statement: &Statement) -> Option<Statement> {
    let Statement::Query(query) = statement else { return None };
    let SetExpr::Select(select) = query.body.as_ref() else { return None };
    let text = statement.to_string().to_lowercase();
    if !ROWLESS.iter().any(|words| text.contains(words)) {
        return None;
    }
    let columns: Option<Vec<String>> = select
        .projection
        .iter()
        .map(|item| {
            let name = match item {
                SelectItem::ExprWithAlias { alias, .. } => alias.value.clone(),
                SelectItem::UnnamedExpr(Expr::Identifier(name)) => name.value.clone(),
                SelectItem::UnnamedExpr(Expr::CompoundIdentifier(names)) => names.last()?.value.clone(),
                _ => return None,
            };
            Some(format!("CAST(NULL AS TEXT) AS \"{}\"", name.replace('"', "\"\"")))
        })
        .collect();
    let sql = format!("SELECT {} WHERE false", columns?.join(", "));
    Parser::parse_sql(&PostgreSqlDialect {}, &sql).ok()?.pop()
}

/// What is said of a table (`obj_description(oid, 'pg_class')`) or a column (`col_description(oid, number)`), the bytes of its
/// files, or what an array of rows holds: nothing.
fn answer(function: &Function) -> Option<Expr> {
    let name = function.name.0.last()?.as_ident()?.value.to_lowercase();
    let list = match &function.args {
        FunctionArguments::List(list) => list,
        FunctionArguments::Subquery(_) if name == "array" => return Some(null()),
        _ => return None,
    };
    let arguments = list.args.iter().map(ToString::to_string).collect::<Vec<_>>();
    let described = |object: &str, part: &str| {
        format!(
            "(SELECT max(d.description) FROM pg_catalog.pg_description d WHERE d.objoid = {object} AND d.objsubid = {part})"
        )
    };
    let question = match (name.as_str(), &arguments[..]) {
        ("col_description", [object, part]) => described(object, part),
        ("obj_description", [object] | [object, _]) => described(object, "0"),
        ("array_to_string", [list, ..])
            if ["acl", "reloptions", "array(select"].iter().any(|none| list.to_lowercase().contains(none)) =>
        {
            return Some(null());
        }
        ("shobj_description", [_, _]) => return Some(null()),
        ("pg_database_size", [_]) => "(SELECT sum(s.bytes) FROM system.streams s)".to_owned(),
        ("pg_table_size" | "pg_total_relation_size", [object]) => format!(
            "(SELECT max(s.bytes) FROM system.streams s JOIN pg_catalog.pg_class q ON q.relname = s.name \
             WHERE q.oid = {object})"
        ),
        _ => return None,
    };
    Parser::new(&PostgreSqlDialect {}).try_with_sql(&question).ok()?.parse_expr().ok()
}

fn null() -> Expr {
    Expr::Value(ValueWithSpan::from(Value::Null))
}

struct Rewrites;

impl VisitorMut for Rewrites {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        match expr {
            Expr::Like { pattern, escape_char, .. } | Expr::ILike { pattern, escape_char, .. } => {
                let escape = escape_char.take().and_then(|escape| escape.value.into_string());
                if let Some(escape) = escape.filter(|escape| escape != "\\") {
                    let call = format!("replace({pattern}, '{}', '\\')", escape.replace('\'', "''"));
                    let parser = Parser::new(&PostgreSqlDialect {}).try_with_sql(&call);
                    if let Ok(call) = parser.and_then(|mut parser| parser.parse_expr()) {
                        **pattern = call;
                    }
                }
            }
            Expr::Function(function) => {
                if let Some(answer) = answer(function) {
                    *expr = answer;
                }
            }
            Expr::Subquery(query) => {
                let text = query.to_string();
                if EMPTY.iter().any(|table| text.contains(table)) {
                    *expr = null();
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sql: &str, expected: &str) {
        let statement = Parser::parse_sql(&PostgreSqlDialect {}, sql).unwrap().remove(0);
        assert_eq!(rewrite(statement).to_string(), expected);
    }

    #[test]
    fn descriptions_are_looked_up() {
        check(
            "SELECT pg_catalog.col_description(a.attrelid, a.attnum), obj_description(c.oid, 'pg_class') FROM t",
            "SELECT (SELECT max(d.description) FROM pg_catalog.pg_description d WHERE d.objoid = a.attrelid AND \
             d.objsubid = a.attnum), (SELECT max(d.description) FROM pg_catalog.pg_description d WHERE \
             d.objoid = c.oid AND d.objsubid = 0) FROM t",
        );
    }

    #[test]
    fn what_psql_asks_of_sizes_and_arrays() {
        check(
            "SELECT pg_catalog.pg_size_pretty(pg_catalog.pg_table_size(c.oid)) FROM pg_catalog.pg_class c",
            "SELECT pg_catalog.pg_size_pretty((SELECT max(s.bytes) FROM system.streams s JOIN pg_catalog.pg_class q ON \
             q.relname = s.name WHERE q.oid = c.oid)) FROM pg_catalog.pg_class c",
        );
        check(
            "SELECT pg_catalog.array_to_string(c.relacl, E'\\n') AS a FROM pg_catalog.pg_class c",
            "SELECT NULL AS a FROM pg_catalog.pg_class c",
        );
        check("SELECT ARRAY(SELECT b.r FROM b WHERE b.m = r.oid) AS m FROM r", "SELECT NULL AS m FROM r");
        check(
            "SELECT p.proname AS \"Name\" FROM pg_catalog.pg_proc p WHERE pg_catalog.pg_function_is_visible(p.oid)",
            "SELECT CAST(NULL AS TEXT) AS \"Name\" WHERE false",
        );
    }

    #[test]
    fn questions_about_what_there_is_not_have_no_rows() {
        check(
            "SELECT a FROM t WHERE a NOT LIKE $1 || '%' ESCAPE '/'",
            "SELECT a FROM t WHERE a NOT LIKE replace($1 || '%', '/', '\\')",
        );
        check("SELECT a FROM t WHERE a LIKE 'x\\_%' ESCAPE '\\'", "SELECT a FROM t WHERE a LIKE 'x\\_%'");
        check(
            "SELECT CASE WHEN a THEN (SELECT b FROM pg_catalog.pg_attrdef) END AS c FROM t",
            "SELECT CASE WHEN a THEN NULL END AS c FROM t",
        );
        check(
            "SELECT CASE WHEN a <> (SELECT pg_type.typcollation FROM pg_type) THEN (SELECT json_build_object('c', pg_collation.collname) FROM pg_collation) END FROM t",
            "SELECT CASE WHEN a <> NULL THEN NULL END FROM t",
        );
        check(
            "SELECT i.a, min(i.b) AS c FROM (SELECT unnest(pg_catalog.pg_index.indkey) AS a FROM pg_catalog.pg_index) i",
            "SELECT CAST(NULL AS TEXT) AS \"a\", CAST(NULL AS TEXT) AS \"c\" WHERE false",
        );
    }
}
