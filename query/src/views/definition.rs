//! The words that make, end and show views: `CREATE MATERIALIZED VIEW v [WITH (…)] AS SELECT …`,
//! `DROP MATERIALIZED VIEW v`, `SHOW MATERIALIZED VIEWS`. Pure: text in, a [`Command`] out.
//!
//! Options: `lateness` (how long after the end of a window its rows may come, `'0s'`), `emit` (`'final'`: a window is told
//! when it has closed; `'update'`: also while it is open), `every` (how often an open window is told, `'1s'`), `idle` (an
//! edge that is silent so long holds no window open, `'1m'`). Times are as in `'30 minutes'` or `'30m'`.

use std::time::Duration;

use datafusion::sql::sqlparser::ast::{
    CreateTableOptions, CreateView, Expr, ObjectName, ObjectType, SelectItem, SetExpr, SqlOption, Statement, Value,
};
use datafusion::sql::sqlparser::dialect::Dialect;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};
use wire::StreamName;
use wire::written::Span;

use super::grid;
use crate::engine::QueryError;

/// What a view does while its windows are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Emit {
    /// Nothing: a window is told when it has closed.
    Final,
    /// What is known is told every so often.
    Update,
}

/// What a statement says of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Definition {
    pub(crate) name: StreamName,
    /// The whole statement, as it was written.
    pub(crate) text: String,
    /// The question.
    pub(crate) select: String,
    pub(crate) lateness_us: i64,
    pub(crate) emit: Emit,
    pub(crate) every_us: i64,
    pub(crate) idle_us: i64,
}

impl Definition {
    /// Tells definitions apart that give other rows: FNV-1a of the question, hexadecimal.
    pub(crate) fn id(&self) -> String {
        let byte = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        format!("{:016x}", self.select.bytes().fold(0xcbf2_9ce4_8422_2325, byte))
    }
}

/// A statement about views.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Create { definition: Box<Definition>, if_not_exists: bool },
    Drop { name: StreamName, if_exists: bool },
    Show,
}

impl Command {
    /// What is answered when it is done.
    pub(crate) fn tag(&self) -> &'static str {
        match self {
            Self::Create { .. } => "CREATE MATERIALIZED VIEW",
            Self::Drop { .. } => "DROP MATERIALIZED VIEW",
            Self::Show => "SHOW",
        }
    }

    /// Reads a statement that begins with the words of one of the three; None for every other statement.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(dialect: &dyn Dialect, sql: &str) -> Result<Option<Self>, QueryError> {
        if !is_command(dialect, sql) {
            return Ok(None);
        }
        let parsed = Parser::parse_sql(dialect, sql);
        let mut statements = parsed.map_err(|error| QueryError::Syntax { message: error.to_string() })?;
        if statements.len() != 1 {
            return Err(invalid("a statement about a view is sent alone".to_owned()));
        }
        match statements.remove(0) {
            Statement::CreateView(view) => create(view, sql).map(Some),
            Statement::Drop { object_type: ObjectType::MaterializedView, if_exists, names, .. } => match &names[..] {
                [one] => Ok(Some(Self::Drop { name: name(one)?, if_exists })),
                _ => Err(invalid("one view is dropped at a time".to_owned())),
            },
            Statement::ShowViews { materialized: true, .. } => Ok(Some(Self::Show)),
            _ => Ok(None),
        }
    }
}

fn invalid(message: String) -> QueryError {
    QueryError::Invalid { message }
}

/// Whether a statement begins with the words of a command, whatever follows.
fn is_command(dialect: &dyn Dialect, sql: &str) -> bool {
    let head: String = sql.chars().take(4_096).collect();
    let Ok(tokens) = Tokenizer::new(dialect, &head).tokenize().or_else(|_| Tokenizer::new(dialect, sql).tokenize())
    else {
        return false;
    };
    let words = tokens.iter().filter(|token| !matches!(token, Token::Whitespace(_)));
    let words: Vec<String> = words.take(5).map(|token| token.to_string().to_lowercase()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    matches!(
        words[..],
        ["create" | "drop", "materialized", "view", ..]
            | ["create", "or", "replace", "materialized", "view"]
            | ["show", "materialized", "views", ..]
    )
}

fn name(name: &ObjectName) -> Result<StreamName, QueryError> {
    let text = name.to_string();
    let text = text.strip_prefix("public.").unwrap_or(&text).trim_matches('"');
    text.parse().map_err(|error: wire::NameError| invalid(format!("the name of a view: {error}")))
}

fn create(view: CreateView, sql: &str) -> Result<Command, QueryError> {
    if view.or_replace || view.or_alter {
        return Err(invalid("a view is not replaced: drop it, and create it under another name".to_owned()));
    }
    if !view.columns.is_empty() || view.to.is_some() || view.temporary {
        return Err(invalid("a view is CREATE MATERIALIZED VIEW name [WITH (…)] AS SELECT …, and nothing else".into()));
    }
    if has_wildcard(&view.query.body) {
        return Err(invalid("name the columns of a view: `*` stands for others when a stream gets a field".to_owned()));
    }
    let mut definition = Definition {
        name: name(&view.name)?,
        text: sql.trim().trim_end_matches(';').to_owned(),
        select: view.query.to_string(),
        lateness_us: 0,
        emit: Emit::Final,
        every_us: 1_000_000,
        idle_us: 60_000_000,
    };
    let options = match view.options {
        CreateTableOptions::None => Vec::new(),
        CreateTableOptions::With(options) => options,
        _ => return Err(invalid("options of a view stand in WITH (…)".to_owned())),
    };
    for option in options {
        let SqlOption::KeyValue { key, value } = option else {
            return Err(invalid(format!("`{option}`: options are written name = 'value'")));
        };
        set(&mut definition, &key.value.to_lowercase(), &value)?;
    }
    Ok(Command::Create { definition: Box::new(definition), if_not_exists: view.if_not_exists })
}

/// Whether the columns of a question are not all named.
fn has_wildcard(body: &SetExpr) -> bool {
    let is_wildcard = |item: &SelectItem| matches!(item, SelectItem::Wildcard(_) | SelectItem::QualifiedWildcard(..));
    match body {
        SetExpr::Select(select) => select.projection.iter().any(is_wildcard),
        SetExpr::Query(query) => has_wildcard(&query.body),
        SetExpr::SetOperation { left, right, .. } => has_wildcard(left) || has_wildcard(right),
        _ => false,
    }
}

fn set(definition: &mut Definition, key: &str, value: &Expr) -> Result<(), QueryError> {
    let text = match value {
        Expr::Value(value) => match &value.value {
            Value::SingleQuotedString(text) => text.clone(),
            other => other.to_string(),
        },
        other => other.to_string(),
    };
    let span = |least: Duration| {
        let written = text.parse::<Span>().ok().map(Span::micros).or_else(|| grid::span_us(&text));
        let least_us = Span(least).micros();
        let short = format!("{key} = '{text}': give a time such as '30 minutes' or '30m', of at least {least:?}");
        written.filter(|us| *us >= least_us).ok_or_else(|| invalid(short))
    };
    match key {
        "lateness" => definition.lateness_us = span(Duration::ZERO)?,
        "every" => definition.every_us = span(Duration::from_millis(100))?,
        "idle" => definition.idle_us = span(Duration::from_secs(1))?,
        "emit" => {
            definition.emit = match text.as_str() {
                "final" => Emit::Final,
                "update" => Emit::Update,
                _ => return Err(invalid(format!("emit = '{text}': it is 'final' or 'update'"))),
            }
        }
        _ => return Err(invalid(format!("no option `{key}`: there are lateness, emit, every and idle"))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use datafusion::sql::sqlparser::dialect::{GenericDialect, PostgreSqlDialect};

    use super::*;

    fn parse(sql: &str) -> Result<Option<Command>, QueryError> {
        let generic = Command::parse(&GenericDialect {}, sql);
        let postgres = Command::parse(&PostgreSqlDialect {}, sql);
        assert_eq!(generic.as_ref().ok(), postgres.as_ref().ok(), "{sql}");
        generic
    }

    #[test]
    fn a_view_is_read_with_its_options() {
        let sql = "CREATE MATERIALIZED VIEW Calm WITH (lateness = '30 minutes', emit = 'update', every = '2s', idle = '5m') \
                   AS SELECT device, time_bucket('5 minutes', ts) AS b, count(*) AS n FROM traffic GROUP BY 1, 2;";
        let error = parse(sql).unwrap_err();
        assert!(error.to_string().contains("is not a name"), "{error}");
        let sql = sql.replace("Calm", "calm");
        let Some(Command::Create { definition, if_not_exists: false }) = parse(&sql).unwrap() else { panic!("{sql}") };
        assert_eq!((definition.name.as_str(), definition.emit), ("calm", Emit::Update));
        assert_eq!(
            (definition.lateness_us, definition.every_us, definition.idle_us),
            (1_800_000_000, 2_000_000, 300_000_000)
        );
        assert!(definition.select.starts_with("SELECT device") && !definition.text.ends_with(';'));
        let plain = "create materialized view if not exists public.v as select 1";
        let Some(Command::Create { definition, if_not_exists: true }) = parse(plain).unwrap() else { panic!() };
        assert_eq!((definition.lateness_us, definition.emit), (0, Emit::Final));
        let drop = Command::Drop { name: "v".parse().unwrap(), if_exists: true };
        assert_eq!(parse("DROP MATERIALIZED VIEW IF EXISTS v").unwrap(), Some(drop));
        assert_eq!(parse("SHOW MATERIALIZED VIEWS").unwrap(), Some(Command::Show));
        for other in ["SELECT 1", "CREATE VIEW v AS SELECT 1", "DROP TABLE v", "SHOW TABLES", "", "'"] {
            assert_eq!(parse(other).unwrap(), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_view_is_refused() {
        for (sql, words) in [
            ("CREATE MATERIALIZED VIEW v WITH (late = '1s') AS SELECT 1", "no option `late`"),
            ("CREATE MATERIALIZED VIEW v WITH (lateness = 'soon') AS SELECT 1", "'30 minutes'"),
            ("CREATE MATERIALIZED VIEW v WITH (lateness = '1 month') AS SELECT 1", "'30 minutes'"),
            ("CREATE MATERIALIZED VIEW v WITH (lateness = '-1 day') AS SELECT 1", "'30 minutes'"),
            ("CREATE MATERIALIZED VIEW v WITH (every = '1ms') AS SELECT 1", "at least 100ms"),
            ("CREATE MATERIALIZED VIEW v WITH (emit = 'often') AS SELECT 1", "'final' or 'update'"),
            ("CREATE OR REPLACE MATERIALIZED VIEW v AS SELECT 1", "not replaced"),
            ("CREATE MATERIALIZED VIEW v (a, b) AS SELECT 1, 2", "nothing else"),
            ("CREATE MATERIALIZED VIEW v AS SELECT * FROM s", "name the columns"),
            ("CREATE MATERIALIZED VIEW v AS SELECT ts FROM s UNION ALL (SELECT s.* FROM s)", "name the columns"),
            ("CREATE MATERIALIZED VIEW v AS SELECT 1; DROP TABLE v", "sent alone"),
            ("CREATE MATERIALIZED VIEW _v AS SELECT 1", "is not a name"),
            ("DROP MATERIALIZED VIEW a, b", "one view"),
        ] {
            let error = parse(sql).expect_err(sql).to_string();
            assert!(error.contains(words), "{sql}: {error}");
        }
    }
}
