//! `COMMENT ON TABLE t IS '…'` and `COMMENT ON COLUMN t.c IS '…'`: the only statement that changes something.
//!
//! What is said stands in the table itself, beside its columns, where other readers of the table find it, too. It is planned
//! like every statement, and done when it is executed, by a caller who may (`[[reader]] comment`); it gives no rows. A unit
//! stands at the end in brackets: `'mean speed of vehicles [km/h]'`. `IS NULL` takes the words away.

use datafusion::common::{Result, plan_err};
use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder};
use datafusion::sql::parser::Statement as Parsed;
use datafusion::sql::sqlparser::ast::{CommentObject, Ident, ObjectName, Statement};
use wire::StreamName;

use crate::catalog::{CATALOG, SCHEMA, Tables};

/// Longest words.
const BYTES_MAX: usize = 4_096;

/// What is to be said of a table, or of one of its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    pub stream: StreamName,
    pub column: Option<String>,
    pub text: Option<String>,
}

/// What is known of a column beside its type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ColumnNote {
    /// In somebody's words.
    pub description: Option<String>,
    /// Since when the table has it, µs since 1970 UTC.
    pub since_us: Option<i64>,
}

impl ColumnNote {
    /// The unit, when the description ends with one in brackets.
    pub fn unit(&self) -> Option<&str> {
        let (_, unit) = self.description.as_deref()?.trim_end().strip_suffix(']')?.rsplit_once('[')?;
        Some(unit.trim()).filter(|unit| !unit.is_empty())
    }
}

/// The plan of a statement that says something.
pub(crate) fn plan() -> Result<LogicalPlan> {
    LogicalPlanBuilder::empty(false).build()
}

/// What a statement says; none when it is of another kind.
pub(crate) fn of(statement: &Parsed, tables: &dyn Tables) -> Result<Option<Remark>> {
    let Parsed::Statement(statement) = statement else { return Ok(None) };
    let Statement::Comment { object_type, object_name, comment, .. } = statement.as_ref() else { return Ok(None) };
    let mut words = names(object_name)?;
    let column = match object_type {
        CommentObject::Table => None,
        CommentObject::Column if words.len() > 1 => words.pop(),
        CommentObject::Column => return plan_err!("COMMENT ON COLUMN names a table and a column: table.column"),
        other => return plan_err!("COMMENT is ON TABLE or ON COLUMN, not on {other}"),
    };
    let table = match &words[..] {
        [table] => table,
        [schema, table] if schema == SCHEMA => table,
        [catalog, schema, table] if catalog == CATALOG && schema == SCHEMA => table,
        _ => return plan_err!("COMMENT is on a table of schema {SCHEMA}"),
    };
    let found = table.parse::<StreamName>().ok().and_then(|stream| Some((tables.cold(&stream)?, stream)));
    let Some((cold, stream)) = found else { return plan_err!("table 'weir.public.{table}' not found") };
    if let Some(column) = &column
        && cold.schema.field_with_name(column).is_err()
    {
        return plan_err!("table {table} has no column {column}");
    }
    if comment.as_ref().is_some_and(|text| text.len() > BYTES_MAX) {
        return plan_err!("a comment has at most {BYTES_MAX} bytes");
    }
    let text = comment.clone().filter(|text| !text.is_empty());
    Ok(Some(Remark { stream, column, text }))
}

/// The parts of a name; those without quotes in small letters.
fn names(name: &ObjectName) -> Result<Vec<String>> {
    let word = |word: &Ident| match word.quote_style {
        Some(_) => word.value.clone(),
        None => word.value.to_lowercase(),
    };
    match name.0.iter().map(|part| part.as_ident().map(word)).collect::<Option<Vec<_>>>() {
        Some(words) => Ok(words),
        None => plan_err!("{name} is no name of a table"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_stands_in_brackets_at_the_end() {
        let check = |text: &str, unit: Option<&str>| {
            let note = ColumnNote { description: Some(text.to_owned()), since_us: None };
            assert_eq!(note.unit(), unit, "{text}");
        };
        check("mean speed [km/h]", Some("km/h"));
        check("[ µg/m³ ]  ", Some("µg/m³"));
        check("of [a] and [b]", Some("b"));
        check("[km/h] mean speed", None);
        check("nothing []", None);
        check("nothing", None);
        assert_eq!(ColumnNote::default().unit(), None);
    }
}
