//! `COPY (SELECT …) TO STDOUT`, and `COPY table TO STDOUT`: rows as text, CSV or binary, as PostgreSQL writes them.
//!
//! The rows go out as they come, one message each, as the client takes them. An error in the middle is an error of the
//! statement: what was sent before it is not whole, and the client is told so.

use std::fmt::Debug;

use bytes::{BufMut, Bytes};
use datafusion::sql::sqlparser::ast::{
    CopyLegacyCsvOption, CopyLegacyOption, CopyOption, CopySource, CopyTarget, Query, Statement,
};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::parser::Parser;
use futures::{Sink, SinkExt, StreamExt};
use pgwire::api::portal::Format;
use pgwire::api::results::{QueryResponse, Response, Tag};
use pgwire::error::{PgWireError, PgWireResult};
use pgwire::messages::PgWireBackendMessage;
use pgwire::messages::copy::{CopyData, CopyDone, CopyOutResponse};
use pgwire::messages::data::DataRow;

use super::refusal;

/// How the rows are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Form {
    Text { delimiter: u8, null: String, header: bool },
    Csv { delimiter: u8, null: String, header: bool, quote: u8 },
    Binary,
}

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

impl Form {
    /// The format that the rows have to be encoded in.
    pub(super) fn fields(&self) -> Format {
        if *self == Self::Binary { Format::UnifiedBinary } else { Format::UnifiedText }
    }

    fn header(&self, names: &[String]) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Binary => out.extend(SIGNATURE),
            Self::Text { header: true, .. } | Self::Csv { header: true, .. } => {
                self.line(names.iter().map(|name| Some(name.as_bytes())), &mut out);
            }
            Self::Text { .. } | Self::Csv { .. } => {}
        }
        out
    }

    fn row(&self, row: &DataRow, out: &mut Vec<u8>) {
        if *self == Self::Binary {
            out.put_i16(row.field_count);
            out.extend(&row.data);
            return;
        }
        let mut rest = &row.data[..];
        let fields = std::iter::from_fn(move || {
            let (length, more) = rest.split_first_chunk::<4>()?;
            let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
                rest = more;
                return Some(None);
            };
            let (field, more) = more.split_at_checked(length)?;
            rest = more;
            Some(Some(field))
        });
        self.line(fields, out);
    }

    fn line<'a>(&self, fields: impl Iterator<Item = Option<&'a [u8]>>, out: &mut Vec<u8>) {
        let (delimiter, null) = match self {
            Self::Text { delimiter, null, .. } | Self::Csv { delimiter, null, .. } => (*delimiter, null.as_bytes()),
            Self::Binary => return,
        };
        for (index, field) in fields.enumerate() {
            if index > 0 {
                out.push(delimiter);
            }
            match (field, self) {
                (None, _) => out.extend(null),
                (Some(field), Self::Csv { quote, .. }) => {
                    let special = |byte: &u8| *byte == delimiter || *byte == *quote || matches!(byte, b'\n' | b'\r');
                    // What looks like null and is a text is quoted; so is the end-of-data mark.
                    if field == null || field == br"\." || field.iter().any(special) {
                        out.push(*quote);
                        for byte in field {
                            if byte == quote {
                                out.push(*quote);
                            }
                            out.push(*byte);
                        }
                        out.push(*quote);
                    } else {
                        out.extend(field);
                    }
                }
                (Some(field), _) => {
                    for byte in field {
                        match byte {
                            b'\\' => out.extend(br"\\"),
                            b'\n' => out.extend(br"\n"),
                            b'\r' => out.extend(br"\r"),
                            b'\t' => out.extend(br"\t"),
                            8 => out.extend(br"\b"),
                            11 => out.extend(br"\v"),
                            12 => out.extend(br"\f"),
                            byte if *byte == delimiter => out.extend([b'\\', *byte]),
                            byte => out.push(*byte),
                        }
                    }
                }
            }
        }
        out.push(b'\n');
    }
}

/// The question of a COPY and the form of its answer.
///
/// # Errors
/// For every COPY that would write, or read from somewhere else than the tables.
pub(super) fn understand(statement: Statement) -> PgWireResult<(Statement, Form)> {
    let Statement::Copy { source, to, target, options, legacy_options, .. } = statement else {
        return Err(refusal("ERROR", "XX000", "no COPY"));
    };
    if !to {
        return Err(refusal("ERROR", "25006", "Weir answers questions only: COPY goes TO STDOUT"));
    }
    if target != CopyTarget::Stdout {
        return Err(refusal(
            "ERROR",
            "42501",
            "COPY goes TO STDOUT only: with psql, use \\copy or redirect its output",
        ));
    }
    let form = form(options, legacy_options)?;
    let query = match source {
        CopySource::Query(query) => *query,
        CopySource::Table { table_name, columns } => {
            let columns: Vec<String> = columns.iter().map(ToString::to_string).collect();
            let columns = if columns.is_empty() { "*".to_owned() } else { columns.join(", ") };
            select(&format!("SELECT {columns} FROM {table_name}"))?
        }
    };
    Ok((Statement::Query(Box::new(query)), form))
}

fn select(sql: &str) -> PgWireResult<Query> {
    match Parser::parse_sql(&PostgreSqlDialect {}, sql).map(|mut statements| statements.pop()) {
        Ok(Some(Statement::Query(query))) => Ok(*query),
        _ => Err(refusal("ERROR", "42601", "COPY names no table")),
    }
}

fn form(options: Vec<CopyOption>, legacy: Vec<CopyLegacyOption>) -> PgWireResult<Form> {
    let (mut format, mut header) = ("text".to_owned(), false);
    let (mut delimiter, mut null, mut quote) = (None, None, '"');
    let refused = |what: &str| Err(refusal("ERROR", "0A000", format!("COPY … {what} is not offered")));
    for option in options {
        match option {
            CopyOption::Format(name) => format = name.value.to_lowercase(),
            CopyOption::Header(wanted) => header = wanted,
            CopyOption::Delimiter(character) => delimiter = Some(character),
            CopyOption::Null(text) => null = Some(text),
            CopyOption::Quote(character) => quote = character,
            CopyOption::Encoding(name) if name.to_lowercase().replace('-', "") == "utf8" => {}
            other => return refused(&other.to_string()),
        }
    }
    for option in legacy {
        match option {
            CopyLegacyOption::Binary => format = "binary".to_owned(),
            CopyLegacyOption::Delimiter(character) => delimiter = Some(character),
            CopyLegacyOption::Null(text) => null = Some(text),
            CopyLegacyOption::Header => header = true,
            CopyLegacyOption::Csv(of_csv) => {
                format = "csv".to_owned();
                for option in of_csv {
                    match option {
                        CopyLegacyCsvOption::Header => header = true,
                        CopyLegacyCsvOption::Quote(character) => quote = character,
                        other => return refused(&other.to_string()),
                    }
                }
            }
            other => return refused(&other.to_string()),
        }
    }
    let byte = |character: char| {
        u8::try_from(character).ok().filter(u8::is_ascii).filter(|byte| !matches!(byte, b'\n' | b'\r' | b'\\'))
    };
    let single = |character: char| {
        byte(character)
            .ok_or_else(|| refusal("ERROR", "22023", "COPY delimiter and quote are one ASCII character each"))
    };
    Ok(match format.as_str() {
        "text" => Form::Text {
            delimiter: single(delimiter.unwrap_or('\t'))?,
            null: null.unwrap_or_else(|| r"\N".to_owned()),
            header,
        },
        "csv" => Form::Csv {
            delimiter: single(delimiter.unwrap_or(','))?,
            null: null.unwrap_or_default(),
            header,
            quote: single(quote)?,
        },
        "binary" => Form::Binary,
        other => {
            return Err(refusal("ERROR", "22023", format!("COPY format `{other}` is not known: text, csv, binary")));
        }
    })
}

/// Sends the rows; the tag that ends the statement.
pub(super) async fn send<C>(client: &mut C, form: &Form, rows: QueryResponse) -> PgWireResult<Response>
where
    C: Sink<PgWireBackendMessage> + Unpin,
    C::Error: Debug,
    PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
{
    let names: Vec<String> = rows.row_schema().iter().map(|field| field.name().to_owned()).collect();
    let code = i8::from(*form == Form::Binary);
    let columns = i16::try_from(names.len()).unwrap_or(i16::MAX);
    let opening = CopyOutResponse::new(code, columns, vec![i16::from(code); names.len()]);
    client.send(PgWireBackendMessage::CopyOutResponse(opening)).await?;
    let data = |bytes: Vec<u8>| PgWireBackendMessage::CopyData(CopyData::new(Bytes::from(bytes)));
    // A message has a line, or a row; what begins the binary form stands before its first row, as PostgreSQL sends it.
    let mut out = form.header(&names);
    if *form != Form::Binary && !out.is_empty() {
        client.feed(data(std::mem::take(&mut out))).await?;
    }
    let mut rows = rows.data_rows;
    let mut count = 0;
    while let Some(row) = rows.next().await {
        form.row(&row?, &mut out);
        client.feed(data(std::mem::take(&mut out))).await?;
        count += 1;
    }
    if *form == Form::Binary {
        out.extend((-1_i16).to_be_bytes());
        client.feed(data(out)).await?;
    }
    client.send(PgWireBackendMessage::CopyDone(CopyDone::new())).await?;
    Ok(Response::Execution(Tag::new("COPY").with_rows(count)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(sql: &str) -> PgWireResult<(Statement, Form)> {
        understand(Parser::parse_sql(&PostgreSqlDialect {}, sql).unwrap().remove(0))
    }

    #[test]
    fn the_form_is_as_asked() {
        let text = |delimiter, null: &str, header| Form::Text { delimiter, null: null.to_owned(), header };
        let csv = |delimiter, null: &str, header| Form::Csv { delimiter, null: null.to_owned(), header, quote: b'"' };
        for (sql, question, form) in [
            ("COPY (SELECT 1) TO STDOUT", "SELECT 1", text(b'\t', r"\N", false)),
            ("COPY a (n, m) TO STDOUT", "SELECT n, m FROM a", text(b'\t', r"\N", false)),
            ("COPY public.a TO STDOUT WITH (FORMAT csv, HEADER)", "SELECT * FROM public.a", csv(b',', "", true)),
            ("COPY a TO STDOUT CSV HEADER", "SELECT * FROM a", csv(b',', "", true)),
            ("COPY a TO STDOUT (FORMAT csv, DELIMITER ';', NULL '-')", "SELECT * FROM a", csv(b';', "-", false)),
            ("COPY a TO STDOUT WITH BINARY", "SELECT * FROM a", Form::Binary),
            ("COPY a TO STDOUT (FORMAT binary)", "SELECT * FROM a", Form::Binary),
        ] {
            let (asked, found) = parse(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
            assert_eq!((asked.to_string().as_str(), &found), (question, &form), "{sql}");
        }
        for (sql, words) in [
            ("COPY a TO '/tmp/x'", "STDOUT only"),
            ("COPY a TO PROGRAM 'rm'", "STDOUT only"),
            ("COPY a FROM STDIN", "questions only"),
            ("COPY a TO STDOUT (FORMAT parquet)", "text, csv, binary"),
            (r"COPY a TO STDOUT (DELIMITER '\')", "one ASCII"),
            ("COPY a TO STDOUT (FORCE_QUOTE (n))", "not offered"),
        ] {
            let error = parse(sql).unwrap_err().to_string();
            assert!(error.contains(words), "{sql}: {error}");
        }
    }

    #[test]
    fn fields_are_escaped_as_postgresql_does() {
        let row = |fields: &[Option<&str>]| {
            let mut data = bytes::BytesMut::new();
            for field in fields {
                data.put_i32(field.map_or(-1, |field| field.len() as i32));
                data.extend_from_slice(field.unwrap_or_default().as_bytes());
            }
            DataRow::new(data, fields.len() as i16)
        };
        let check = |form: &Form, fields: &[Option<&str>], expected: &str| {
            let mut out = Vec::new();
            form.row(&row(fields), &mut out);
            assert_eq!(String::from_utf8_lossy(&out), expected);
        };
        let text = Form::Text { delimiter: b'\t', null: r"\N".into(), header: false };
        check(&text, &[Some("a"), None, Some("")], "a\t\\N\t\n");
        check(&text, &[Some("x\ty\nz\\"), Some("æ")], "x\\ty\\nz\\\\\tæ\n");
        let csv = Form::Csv { delimiter: b',', null: String::new(), header: false, quote: b'"' };
        check(&csv, &[Some("a"), None, Some("")], "a,,\"\"\n");
        check(
            &csv,
            &[Some("x,y"), Some("say \"hi\""), Some("two\nlines"), Some("\\.")],
            "\"x,y\",\"say \"\"hi\"\"\",\"two\nlines\",\"\\.\"\n",
        );
        let mut out = Vec::new();
        Form::Binary.row(&row(&[Some("ab"), None]), &mut out);
        assert_eq!(out, b"\0\x02\0\0\0\x02ab\xff\xff\xff\xff");
    }
}
