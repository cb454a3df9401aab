//! From the ways to write ASOF JOIN to one tree.
//!
//! The parser knows Snowflake's form. DuckDB's, without MATCH_CONDITION or with LEFT, is given to it under another word
//! that it takes before a join and that nothing else here uses: GLOBAL ([`words`]). DataFusion's planner meets neither: an
//! ASOF join becomes the last join of a pair of parentheses ([`nest`]), which a planner of relations is asked for.

use std::ops::ControlFlow;

use datafusion::sql::parser::Statement as Parsed;
use datafusion::sql::sqlparser::ast::{
    Join, JoinOperator, Select, Statement, TableFactor, TableWithJoins, VisitMut, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::Dialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Location, Token, Tokenizer};

use crate::functions::over_table;

/// Whether this join is one.
pub(super) fn is_asof(join: &Join) -> bool {
    join.global || matches!(join.join_operator, JoinOperator::AsOf { .. })
}

/// The statement in words that the parser takes; None when it is as it was.
pub(crate) fn words(dialect: &dyn Dialect, sql: &str) -> Option<String> {
    if !sql.as_bytes().windows(4).any(|word| word.eq_ignore_ascii_case(b"asof")) {
        return None;
    }
    // What is no list of words is told by the parser.
    let tokens = Tokenizer::new(dialect, sql).tokenize_with_location().ok()?;
    let tokens: Vec<_> = tokens.into_iter().filter(|token| !matches!(token.token, Token::Whitespace(_))).collect();
    let keyword = |index: usize| match tokens.get(index).map(|token| &token.token) {
        Some(Token::Word(word)) if word.quote_style.is_none() => word.keyword,
        _ => Keyword::NoKeyword,
    };
    let has_match_condition = |from: usize| {
        let mut depth = 0_i64;
        for (index, token) in tokens.iter().enumerate().skip(from) {
            match (&token.token, keyword(index)) {
                (Token::LParen, _) => depth += 1,
                (Token::RParen, _) => depth -= 1,
                (_, Keyword::MATCH_CONDITION) if depth == 0 => return true,
                (_, Keyword::ON | Keyword::USING) if depth == 0 => return false,
                _ => {}
            }
            if depth < 0 {
                break;
            }
        }
        // Neither: the parser misses MATCH_CONDITION, and says so.
        true
    };
    let mut replaced: Vec<Location> = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        let duck = match (keyword(index), keyword(index + 1)) {
            (Keyword::ASOF, Keyword::LEFT | Keyword::INNER) => true,
            (Keyword::ASOF, Keyword::JOIN) => !has_match_condition(index + 2),
            _ => false,
        };
        if duck {
            replaced.push(token.span.start);
        }
    }
    if replaced.is_empty() {
        return None;
    }
    let mut text = String::with_capacity(sql.len() + 2 * replaced.len());
    let (mut line, mut column, mut skip) = (1, 1, 0);
    for letter in sql.chars() {
        if replaced.iter().any(|start| start.line == line && start.column == column) {
            text.push_str("GLOBAL");
            skip = "ASOF".len();
        }
        if skip > 0 {
            skip -= 1;
        } else {
            text.push(letter);
        }
        if letter == '\n' {
            (line, column) = (line + 1, 1);
        } else {
            column += 1;
        }
    }
    Some(text)
}

/// Puts every ASOF join of a statement, and what is joined before it, into parentheses of its own; and every HOP and SESSION.
pub(crate) fn nest(statement: &mut Parsed) {
    match statement {
        Parsed::Statement(statement) => nest_sql(statement),
        Parsed::Explain(explain) => nest(&mut explain.statement),
        _ => {}
    }
}

fn nest_sql(statement: &mut Statement) {
    // Nothing breaks off.
    let _ = statement.visit(&mut Nest);
}

struct Nest;

// After what is within: parentheses that were put around a join are not looked at again.
impl VisitorMut for Nest {
    type Break = ();

    fn post_visit_select(&mut self, select: &mut Select) -> ControlFlow<()> {
        select.from.iter_mut().for_each(parenthesise);
        ControlFlow::Continue(())
    }

    fn post_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<()> {
        if let TableFactor::NestedJoin { table_with_joins, .. } = factor {
            parenthesise(table_with_joins);
        }
        over_table::nest(factor);
        ControlFlow::Continue(())
    }
}

fn parenthesise(tables: &mut TableWithJoins) {
    if !tables.joins.iter().any(is_asof) {
        return;
    }
    let mut outer = Vec::new();
    for join in std::mem::take(&mut tables.joins) {
        let asof = is_asof(&join);
        outer.push(join);
        if asof {
            let inner = TableWithJoins { relation: tables.relation.clone(), joins: std::mem::take(&mut outer) };
            tables.relation = TableFactor::NestedJoin { table_with_joins: Box::new(inner), alias: None };
        }
    }
    tables.joins = outer;
}

#[cfg(test)]
mod tests {
    use datafusion::sql::sqlparser::dialect::{GenericDialect, PostgreSqlDialect};

    use super::words;

    #[test]
    fn only_what_the_parser_cannot_take_is_replaced() {
        let check = |sql: &str, expected: Option<&str>| {
            assert_eq!(words(&GenericDialect {}, sql).as_deref(), expected, "{sql}");
            assert_eq!(words(&PostgreSqlDialect {}, sql).as_deref(), expected, "{sql}");
        };
        check("SELECT 1", None);
        check("SELECT 'a ASOF JOIN b'", None);
        check("SELECT \"asof\" FROM t", None);
        check("SELECT * FROM a ASOF JOIN b MATCH_CONDITION (a.ts >= b.ts)", None);
        check("SELECT * FROM a asof join b USING (ts)", Some("SELECT * FROM a GLOBAL join b USING (ts)"));
        check(
            "SELECT 'é\nASOF'\nFROM a\n  ASOF LEFT JOIN b ON a.ts >= b.ts",
            Some("SELECT 'é\nASOF'\nFROM a\n  GLOBAL LEFT JOIN b ON a.ts >= b.ts"),
        );
        check("SELECT * FROM a ASOF JOIN (SELECT * FROM c JOIN d ON true) b MATCH_CONDITION (a.ts >= b.ts)", None);
        check(
            "SELECT * FROM a ASOF JOIN b ON a.t > b.t ASOF JOIN c MATCH_CONDITION (a.t > c.t)",
            Some("SELECT * FROM a GLOBAL JOIN b ON a.t > b.t ASOF JOIN c MATCH_CONDITION (a.t > c.t)"),
        );
    }
}
