//! From PostgreSQL's words to what DataFusion plans.
//!
//! Questions about the catalogue go through all rewrites of `datafusion-pg-catalog`. Some of them trade a right answer
//! for any answer (a subquery in a SELECT list that looks correlated becomes NULL, or is cut to its first row):
//! good enough for a client that looks around, and wrong for rows. Statements that ask streams pass only through those
//! rewrites that keep the meaning.

use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{ObjectName, Statement, visit_relations};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion_pg_catalog::sql::PostgresCompatibilityParser;
use datafusion_pg_catalog::sql::rules::{
    CurrentUserVariableToSessionUserFunctionCall, FixArrayLiteral, FixVersionColumnName, PrependUnqualifiedPgTableName,
    RewriteArrayAnyAllOperation, RewritePgCatalogOperator, RewriteRegCastToSubquery, SqlStatementRewriteRule,
    StripCallableQualifier, StripCollate,
};

use super::reflection;
use crate::catalog::Tables;

/// The parser of this door.
#[derive(Debug)]
pub(super) struct Dialect {
    tables: Arc<dyn Tables>,
    catalogue: PostgresCompatibilityParser,
    faithful: Vec<Box<dyn SqlStatementRewriteRule>>,
}

impl Dialect {
    pub(super) fn new(tables: Arc<dyn Tables>) -> Self {
        let faithful: Vec<Box<dyn SqlStatementRewriteRule>> = vec![
            Box::new(RewriteArrayAnyAllOperation),
            Box::new(PrependUnqualifiedPgTableName),
            Box::new(StripCallableQualifier),
            Box::new(FixArrayLiteral),
            Box::new(CurrentUserVariableToSessionUserFunctionCall),
            Box::new(StripCollate),
            Box::new(RewritePgCatalogOperator),
            Box::new(RewriteRegCastToSubquery::new()),
            Box::new(FixVersionColumnName),
        ];
        Self { tables, catalogue: PostgresCompatibilityParser::new(), faithful }
    }

    /// Every statement of a text.
    pub(super) fn parse(&self, sql: &str) -> Result<Vec<Statement>, ParserError> {
        // What does not parse as it stands may be one of the texts that the catalogue's parser replaces.
        if let Ok(statements) = Parser::parse_sql(&PostgreSqlDialect {}, sql)
            && statements.iter().any(|statement| self.asks_for_rows(statement))
        {
            return Ok(statements.into_iter().map(|statement| self.rewrite(statement)).collect());
        }
        self.catalogue.parse(sql).map(|statements| statements.into_iter().map(reflection::rewrite).collect())
    }

    fn rewrite(&self, statement: Statement) -> Statement {
        if self.asks_for_rows(&statement) {
            self.faithful.iter().fold(statement, |statement, rule| rule.rewrite(statement))
        } else {
            reflection::rewrite(self.catalogue.rewrite(statement))
        }
    }

    /// Whether a statement names a stream, or names tables and none of the catalogue's.
    fn asks_for_rows(&self, statement: &Statement) -> bool {
        let streams = self.tables.streams();
        let (mut stream, mut catalogue, mut other) = (false, false, false);
        let _ = visit_relations(statement, |name| {
            let (schema, table) = parts(name);
            if schema.as_deref().is_none_or(|schema| schema == "public")
                && streams.iter().any(|stream| stream.as_str() == table)
            {
                stream = true;
            } else if matches!(schema.as_deref(), Some("pg_catalog" | "information_schema"))
                || schema.is_none() && table.starts_with("pg_")
            {
                catalogue = true;
            } else {
                other = true;
            }
            ControlFlow::<()>::Continue(())
        });
        stream || other && !catalogue
    }
}

/// Schema and table of a name, in small letters.
fn parts(name: &ObjectName) -> (Option<String>, String) {
    let mut words = name.0.iter().rev().map(|part| match part.as_ident() {
        Some(word) => word.value.to_lowercase(),
        None => part.to_string().to_lowercase(),
    });
    let table = words.next().unwrap_or_default();
    (words.next(), table)
}
