//! Rows that were rescued for a table's fields of before, as they are rescued for those of now. Pure.
//!
//! Of a field whose column is new or has another type, each value is looked at again, be it in its column or in
//! `_rescued`: one that fits goes into the column and out of `_rescued`, and its reason out of `quality`; one that does not
//! goes the other way. Nothing else of a row changes. What the agent wrote into `quality` keeps its place in front; reasons
//! of rescue follow in the order of the fields, as when the batch is rescued at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, StringArray, new_null_array};
use serde_json::value::to_raw_value;
use wire::schema::{QUALITY, RESCUED, StreamField};

use super::fit::{Fitting, Given};
use super::{GOOD, NONFINITE, TYPE, Values, object, row_schema, why};

/// The rows in the columns of a table with these fields, without the partition column. They have to be rows of that table:
/// with fewer fields, or with other types, but with no field that it has not.
pub fn refit(rows: &RecordBatch, fields: &[StreamField]) -> RecordBatch {
    let schema = row_schema(fields);
    if rows.schema_ref().fields() == schema.fields() {
        return rows.clone();
    }
    let mut again = Again::of(rows);
    let mut fitted: BTreeMap<&str, ArrayRef> = BTreeMap::new();
    for field in fields {
        let name = field.name.as_str();
        let stored = rows.column_by_name(name);
        if stored.is_none_or(|column| *column.data_type() != field.kind.arrow()) {
            fitted.insert(name, again.fitted(field, stored));
        }
    }
    fitted.insert(QUALITY, again.qualities(rows, fields));
    fitted.insert(RESCUED, again.rescued(rows));
    let columns = schema.fields().iter().map(|field| match fitted.get(field.name().as_str()) {
        Some(column) => Arc::clone(column),
        None => kept_or(rows, field.name(), || new_null_array(field.data_type(), rows.num_rows())),
    });
    let columns = columns.collect();
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    RecordBatch::try_new_with_options(schema, columns, &options).expect("each column was made with its type and length")
}

fn kept_or(rows: &RecordBatch, name: &str, otherwise: impl FnOnce() -> ArrayRef) -> ArrayRef {
    rows.column_by_name(name).map_or_else(otherwise, Arc::clone)
}

/// What is found on the way.
struct Again {
    count: usize,
    /// Of each row that has something rescued, now or before.
    values: BTreeMap<usize, Values>,
    qualities: Option<StringArray>,
    /// (row, field) of what was taken in or put out, and why it is out.
    changes: Vec<(usize, String, Option<&'static str>)>,
}

impl Again {
    fn of(rows: &RecordBatch) -> Self {
        let texts = |name| rows.column_by_name(name).and_then(|column| column.as_string_opt::<i32>()).cloned();
        let mut values = BTreeMap::new();
        if let Some(rescued) = texts(RESCUED).filter(|rescued| rescued.null_count() < rescued.len()) {
            for row in (0..rescued.len()).filter(|row| rescued.is_valid(*row)) {
                let text = rescued.value(row);
                // What is no object was not written here; it is kept as it is.
                let kept = || Values::from([(String::new(), to_raw_value(text).expect("text is JSON"))]);
                values.insert(row, serde_json::from_str(text).unwrap_or_else(|_| kept()));
            }
        }
        Self { count: rows.num_rows(), values, qualities: texts(QUALITY), changes: Vec::new() }
    }

    fn fitted(&mut self, field: &StreamField, stored: Option<&ArrayRef>) -> ArrayRef {
        let name = field.name.as_str();
        if stored.is_none_or(|column| column.null_count() == column.len()) && self.values.is_empty() {
            return new_null_array(&field.kind.arrow(), self.count);
        }
        let mut fitting = Fitting::new(field.kind, self.count);
        for row in 0..self.count {
            let stored = stored.filter(|column| column.is_valid(row)).and_then(|column| Given::of(column, row));
            if let Some(given) = stored {
                if !fitting.take(Some(&given)) {
                    self.values.entry(row).or_default().insert(name.to_owned(), given.json());
                    self.changes.push((row, name.to_owned(), Some(why(&given))));
                }
                continue;
            }
            let waits = self.values.get(&row).and_then(|values| values.get(name));
            // The text that a float is when it is not finite, is not a text that came.
            let given = waits.filter(|_| !self.says(row, NONFINITE, name)).and_then(|raw| Given::of_json(raw));
            let taken = fitting.take(given.as_ref());
            if taken {
                self.changes.push((row, name.to_owned(), None));
                self.values.get_mut(&row).map(|values| values.remove(name));
            } else if given.is_some() {
                self.changes.push((row, name.to_owned(), Some(TYPE)));
            }
        }
        fitting.finish()
    }

    fn says(&self, row: usize, reason: &str, name: &str) -> bool {
        let quality = self.qualities.as_ref().filter(|qualities| qualities.is_valid(row));
        quality.is_some_and(|qualities| qualities.value(row).split(',').any(|part| is_reason(part, reason, name)))
    }

    fn qualities(&mut self, rows: &RecordBatch, fields: &[StreamField]) -> ArrayRef {
        let Some(before) = self.qualities.as_ref().filter(|_| !self.changes.is_empty()) else {
            return kept_or(rows, QUALITY, || new_null_array(&arrow_schema::DataType::Utf8, self.count));
        };
        self.changes.sort_by_key(|(row, ..)| *row);
        let mut changes = self.changes.iter().peekable();
        let qualities = before.iter().enumerate().map(|(row, quality)| {
            let mut of_row = Vec::new();
            while let Some(change) = changes.next_if(|(changed, ..)| *changed == row) {
                of_row.push((change.1.as_str(), change.2));
            }
            if of_row.is_empty() { quality.map(str::to_owned) } else { Some(changed(quality, &of_row, fields)) }
        });
        Arc::new(qualities.collect::<StringArray>())
    }

    fn rescued(&self, rows: &RecordBatch) -> ArrayRef {
        if self.changes.is_empty() {
            return kept_or(rows, RESCUED, || new_null_array(&arrow_schema::DataType::Utf8, self.count));
        }
        let objects = (0..self.count).map(|row| self.values.get(&row).filter(|values| !values.is_empty()).map(object));
        Arc::new(objects.collect::<StringArray>())
    }
}

fn is_reason(part: &str, reason: &str, name: &str) -> bool {
    part.strip_prefix(reason).and_then(|rest| rest.strip_prefix(':')) == Some(name)
}

/// A row's quality after these of its fields were fitted again.
fn changed(quality: Option<&str>, changes: &[(&str, Option<&str>)], fields: &[StreamField]) -> String {
    let parts: Vec<&str> = quality.unwrap_or_default().split(',').filter(|part| !part.is_empty()).collect();
    let is_ours = |part: &str| {
        let of_field =
            |field: &StreamField| [TYPE, NONFINITE].iter().any(|why| is_reason(part, why, field.name.as_str()));
        fields.iter().any(of_field)
    };
    let mut all: Vec<String> =
        parts.iter().filter(|part| **part != GOOD && !is_ours(part)).map(|part| (*part).to_owned()).collect();
    for field in fields {
        let name = field.name.as_str();
        match changes.iter().rev().find(|(changed, _)| *changed == name) {
            Some((_, why)) => all.extend(why.map(|why| format!("{why}:{name}"))),
            None => {
                let before = |part: &&&str| is_reason(part, TYPE, name) || is_reason(part, NONFINITE, name);
                all.extend(parts.iter().find(before).map(|part| (**part).to_owned()));
            }
        }
    }
    if all.is_empty() { GOOD.to_owned() } else { all.join(",") }
}
