//! Time travel: a table as it was at a version of its own, or at a moment. Cold rows only: what was not committed then
//! is not there.
//!
//! `traffic FOR VERSION AS OF 17` and `traffic FOR SYSTEM_TIME AS OF '2026-05-01T00:00:00Z'` become the table names
//! `"traffic@v17"` and `"traffic@t<µs>"`, which the catalogue knows; the same is done to every stream of a statement
//! that is asked as of something as a whole, in which `latest('traffic')` becomes `"traffic@v17@latest"`. The answer stays
//! the same as long as the table keeps the version's files.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::ops::ControlFlow;

use arrow_cast::parse::string_to_timestamp_nanos;
use datafusion::sql::parser::Statement as Parsed;
use datafusion::sql::sqlparser::ast::{
    Expr, FunctionArg, FunctionArgExpr, Ident, ObjectName, ObjectNamePart, Query, Statement, TableAlias, TableFactor,
    Value, VisitMut, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::Dialect;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer, Word};

use crate::catalog::SCHEMA;
use crate::engine::QueryError;
use crate::functions::over_table;

/// A state of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AsOf {
    /// The table's own version.
    Version(u64),
    /// The last version that was there at this moment, µs since 1970 UTC.
    Time(i64),
}

impl fmt::Display for AsOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(f, "v{version}"),
            Self::Time(us) => write!(f, "t{us}"),
        }
    }
}

impl AsOf {
    /// A whole number is a version, everything else a moment.
    ///
    /// # Errors
    /// What it should have been.
    pub fn parse(text: &str) -> std::result::Result<Self, QueryError> {
        if let Ok(version) = text.trim().parse() {
            return Ok(Self::Version(version));
        }
        string_to_timestamp_nanos(text.trim()).map(|ns| Self::Time(ns.div_euclid(1_000))).map_err(|_| {
            let text: String = text.chars().take(80).collect();
            let message = format!("as of `{text}`: give a version (a number) or a moment such as 2026-05-01T00:00:00Z");
            QueryError::Invalid { message }
        })
    }

    fn of_suffix(suffix: &str) -> Option<Self> {
        match suffix.split_at_checked(1)? {
            ("v", version) => version.parse().ok().map(Self::Version),
            ("t", us) => us.parse().ok().map(Self::Time),
            _ => None,
        }
    }
}

/// The stream of a table's name, and the state of it that the name asks for.
pub(crate) fn parts(table: &str) -> (&str, Option<AsOf>) {
    match table.split_once('@') {
        Some((stream, suffix)) => match AsOf::of_suffix(suffix) {
            Some(as_of) => (stream, Some(as_of)),
            None => (table, None),
        },
        None => (table, None),
    }
}

/// What stands behind the name of a past table whose newest rows are asked for.
const NEWEST: &str = "@latest";

/// A table's name without the mark of its newest rows, and whether it had it.
pub(crate) fn newest(table: &str) -> (&str, bool) {
    match table.strip_suffix(NEWEST) {
        Some(past) => (past, true),
        None => (table, false),
    }
}

/// The statement with `… FOR VERSION AS OF …` made part of the names.
///
/// # Errors
/// When something else than a version or a moment stands there.
pub(crate) fn name<'a>(dialect: &dyn Dialect, sql: &'a str) -> std::result::Result<Cow<'a, str>, QueryError> {
    let holds = |word: &str| sql.as_bytes().windows(word.len()).any(|part| part.eq_ignore_ascii_case(word.as_bytes()));
    if !holds("as") || !holds("of") || !holds("for") {
        return Ok(Cow::Borrowed(sql));
    }
    // What cannot be split into words cannot be parsed either: the parser says why.
    let Ok(mut tokens) = Tokenizer::new(dialect, sql).with_unescape(false).tokenize() else {
        return Ok(Cow::Borrowed(sql));
    };
    let mut changed = false;
    while let Some((name, last, as_of)) = find(&tokens)? {
        let Token::Word(word) = &tokens[name] else { break };
        let stream = if word.quote_style.is_some() { word.value.clone() } else { word.value.to_lowercase() };
        let value = format!("{stream}@{as_of}");
        tokens[name] = Token::Word(Word { value, quote_style: Some('"'), ..word.clone() });
        tokens.drain(name + 1..=last);
        changed = true;
    }
    Ok(if changed { Cow::Owned(tokens.iter().map(ToString::to_string).collect()) } else { Cow::Borrowed(sql) })
}

/// The first name with an AS OF behind it, and where that ends.
fn find(tokens: &[Token]) -> std::result::Result<Option<(usize, usize, AsOf)>, QueryError> {
    let spoken: Vec<usize> =
        (0..tokens.len()).filter(|index| !matches!(tokens[*index], Token::Whitespace(_))).collect();
    let is = |at: usize, words: &[&str]| match spoken.get(at).map(|index| &tokens[*index]) {
        Some(Token::Word(word)) if word.quote_style.is_none() => {
            words.iter().any(|known| word.value.eq_ignore_ascii_case(known))
        }
        _ => false,
    };
    for at in 1..spoken.len() {
        let named = matches!(tokens[spoken[at - 1]], Token::Word(_));
        let asked = is(at, &["for"])
            && is(at + 1, &["version", "system_version", "system_time", "timestamp"])
            && is(at + 2, &["as"])
            && is(at + 3, &["of"]);
        if !named || !asked {
            continue;
        }
        let value = if is(at + 4, &["timestamp"]) { at + 5 } else { at + 4 };
        let text = match spoken.get(value).map(|index| &tokens[*index]) {
            Some(Token::Number(number, _)) => number.as_str(),
            Some(Token::SingleQuotedString(text)) => text.as_str(),
            _ => "",
        };
        return Ok(Some((spoken[at - 1], spoken[value.min(spoken.len() - 1)], AsOf::parse(text)?)));
    }
    Ok(None)
}

/// Lets every table with a state in its name be called by its stream's name; asks the others as of `whole`, if given.
pub(crate) fn apply(statement: &mut Parsed, whole: Option<AsOf>, is_table: &dyn Fn(&str) -> bool) {
    let mut statement = statement;
    loop {
        match statement {
            Parsed::Statement(statement) => return apply_to(statement, whole, is_table),
            Parsed::Explain(explain) => statement = explain.statement.as_mut(),
            _ => return,
        }
    }
}

/// See [`apply`].
pub(crate) fn apply_to(statement: &mut Statement, whole: Option<AsOf>, is_table: &dyn Fn(&str) -> bool) {
    // Nothing breaks off.
    let _ = VisitMut::visit(statement, &mut Travel { whole, is_table, own: HashSet::new() });
}

/// The stream of `latest('stream')`.
fn asks_latest(table: &TableFactor) -> Option<String> {
    let (name, arguments) = match table {
        TableFactor::Table { name, args: Some(arguments), .. } => (name, &arguments.args),
        TableFactor::Function { name, args, .. } => (name, args),
        _ => return None,
    };
    let [FunctionArg::Unnamed(FunctionArgExpr::Expr(Expr::Value(value)))] = &arguments[..] else { return None };
    let Value::SingleQuotedString(stream) = &value.value else { return None };
    name.to_string().eq_ignore_ascii_case("latest").then(|| stream.clone())
}

/// What a word means as a name.
fn called(word: &Ident) -> String {
    if word.quote_style.is_some() { word.value.clone() } else { word.value.to_lowercase() }
}

fn named(name: &str) -> TableAlias {
    TableAlias { explicit: true, name: Ident::with_quote('"', name), columns: Vec::new(), at: None }
}

struct Travel<'a> {
    whole: Option<AsOf>,
    is_table: &'a dyn Fn(&str) -> bool,
    /// Names that the statement itself gives (WITH).
    own: HashSet<String>,
}

impl VisitorMut for Travel<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<()> {
        let given = query.with.iter().flat_map(|with| &with.cte_tables);
        self.own.extend(given.map(|table| table.alias.name.value.to_lowercase()));
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, table: &mut TableFactor) -> ControlFlow<()> {
        if let (Some(whole), Some(stream)) = (self.whole, asks_latest(table))
            && (self.is_table)(&stream)
        {
            let (TableFactor::Table { alias, .. } | TableFactor::Function { alias, .. }) = table else {
                return ControlFlow::Continue(());
            };
            let alias = Some(alias.take().unwrap_or_else(|| named("latest")));
            let name = ObjectName::from(vec![Ident::with_quote('"', format!("{stream}@{whole}{NEWEST}"))]);
            *table = table_named(name, alias);
            return ControlFlow::Continue(());
        }
        if let Some(words) = over_table::table_of(table) {
            if let (Some(whole), [before @ .., last]) = (self.whole, words) {
                let stream = called(last);
                let in_public = before.last().is_none_or(|schema| schema.value.eq_ignore_ascii_case(SCHEMA));
                let is_own = before.is_empty() && self.own.contains(&stream);
                if in_public && !is_own && parts(&stream).1.is_none() && (self.is_table)(&stream) {
                    *last = Ident::with_quote('"', format!("{stream}@{whole}"));
                }
            }
            return ControlFlow::Continue(());
        }
        let (name, alias) = match table {
            TableFactor::Table { name, alias, args: None, .. } => (name, alias),
            _ => return ControlFlow::Continue(()),
        };
        let in_public = match &name.0[..] {
            [_] => true,
            [.., schema, _] => schema.as_ident().is_some_and(|schema| schema.value.eq_ignore_ascii_case(SCHEMA)),
            [] => false,
        };
        let alone = name.0.len() == 1;
        let Some(ObjectNamePart::Identifier(last)) = name.0.last_mut() else {
            return ControlFlow::Continue(());
        };
        let called = called(last);
        let base = match (parts(&called), self.whole) {
            ((stream, Some(_)), _) => stream.to_owned(),
            ((stream, None), Some(whole))
                if in_public && (self.is_table)(stream) && !(alone && self.own.contains(stream)) =>
            {
                last.value = format!("{stream}@{whole}");
                last.quote_style = Some('"');
                stream.to_owned()
            }
            _ => return ControlFlow::Continue(()),
        };
        if alias.is_none() {
            *alias = Some(named(&base));
        }
        ControlFlow::Continue(())
    }
}

/// A table by its name and nothing else, as FROM has it.
pub(crate) fn table_named(name: ObjectName, alias: Option<TableAlias>) -> TableFactor {
    TableFactor::Table {
        name,
        alias,
        args: None,
        with_hints: Vec::new(),
        version: None,
        with_ordinality: false,
        partitions: Vec::new(),
        json_path: None,
        sample: None,
        index_hints: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use datafusion::sql::sqlparser::dialect::{GenericDialect, PostgreSqlDialect};
    use datafusion::sql::sqlparser::parser::Parser;

    use super::*;

    #[test]
    fn a_state_becomes_part_of_the_name() {
        for (sql, expected) in [
            ("SELECT 1", "SELECT 1"),
            ("SELECT 'for version as of' FROM a", "SELECT 'for version as of' FROM a"),
            ("SELECT * FROM a FOR VERSION AS OF 17", "SELECT * FROM \"a@v17\""),
            (
                "SELECT 'it''s' FROM Public.A for version as of 17 WHERE x",
                "SELECT 'it''s' FROM Public.\"a@v17\" WHERE x",
            ),
            ("SELECT * FROM a FOR SYSTEM_TIME AS OF '1970-01-01T00:00:01Z' b", "SELECT * FROM \"a@t1000000\" b"),
            (
                "SELECT * FROM a FOR TIMESTAMP AS OF TIMESTAMP '1970-01-01' JOIN b FOR VERSION AS OF 2 USING (n)",
                "SELECT * FROM \"a@t0\" JOIN \"b@v2\" USING (n)",
            ),
        ] {
            assert_eq!(name(&GenericDialect {}, sql).unwrap(), expected);
            assert_eq!(name(&PostgreSqlDialect {}, sql).unwrap(), expected);
        }
        for wrong in ["FOR VERSION AS OF now", "FOR SYSTEM_TIME AS OF 'yesterday'", "FOR VERSION AS OF"] {
            let error = name(&GenericDialect {}, &format!("SELECT * FROM a {wrong}")).unwrap_err();
            assert!(error.to_string().contains("a version (a number) or a moment"), "{error}");
        }
    }

    #[test]
    fn a_statement_as_of_something_asks_every_stream_of_it() {
        let check = |sql: &str, expected: &str| {
            let mut parsed = Parser::parse_sql(&GenericDialect {}, sql).unwrap().remove(0);
            apply_to(&mut parsed, Some(AsOf::Version(3)), &|name| name == "a");
            assert_eq!(parsed.to_string(), expected);
        };
        check("SELECT * FROM latest('a')", "SELECT * FROM \"a@v3@latest\" AS \"latest\"");
        check("SELECT x.n FROM latest('a') x, a", "SELECT x.n FROM \"a@v3@latest\" x, \"a@v3\" AS \"a\"");
        check("SELECT * FROM latest('b')", "SELECT * FROM latest('b')");
        check("SELECT * FROM other('a')", "SELECT * FROM other('a')");
        check("SELECT a.n FROM a", "SELECT a.n FROM \"a@v3\" AS \"a\"");
        check("SELECT * FROM a AS x, b", "SELECT * FROM \"a@v3\" AS x, b");
        check("SELECT * FROM \"a@v1\"", "SELECT * FROM \"a@v1\" AS \"a\"");
        check("SELECT (SELECT max(n) FROM public.a)", "SELECT (SELECT max(n) FROM public.\"a@v3\" AS \"a\")");
        check("SELECT * FROM system.a", "SELECT * FROM system.a");
        check("SELECT * FROM HOP(a, ts, '1h', '2h') h", "SELECT * FROM HOP(\"a@v3\", ts, '1h', '2h') h");
        check("SELECT * FROM hop(public.a, ts, '1h', '2h')", "SELECT * FROM hop(public.\"a@v3\", ts, '1h', '2h')");
        check("SELECT * FROM hop(b, ts, '1h', '2h')", "SELECT * FROM hop(b, ts, '1h', '2h')");
        check("SELECT * FROM hop((SELECT * FROM b), a)", "SELECT * FROM hop((SELECT * FROM b), a)");
        check("WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a");
    }
}
