//! The columns of a table: fields are added, change their type, and are spoken of.
//!
//! Each is one entry of the log with the table's metadata in it, made by compare-and-swap like every other, after which
//! everybody reads the table anew. Notes stand in the metadata: what a table is (`description`), and beside each column what
//! it is (`comment`, as Spark has it) and since when the table has it (`weir.since`, RFC 3339). They stay when columns change,
//! those of others, too.

use std::collections::BTreeMap;
use std::sync::Arc;

use buoyant_kernel::schema::StructType;
use deltalake_core::DeltaTableError;
use deltalake_core::kernel::{Action, Metadata};
use serde_json::{Value, json};
use wire::schema::{StreamField, table_schema};
use wire::{DataFile, DataFiles, FIELDS_MAX};

use super::entry::{Lines, shared};
use super::log::PutError;
use super::{CommitError, DeltaTable, REBASES_MAX, TableSnapshot, kernel_schema};

/// Beside a column: what it is.
const COMMENT: &str = "comment";
/// Beside a column: since when the table has it.
const SINCE: &str = "weir.since";

/// What is known of a column beside its type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Note {
    pub comment: Option<String>,
    /// µs since 1970 UTC.
    pub since_us: Option<i64>,
}

impl DeltaTable {
    /// Adds those of the fields whose names the table does not have, as nullable columns, in one commit. Fields that
    /// it has are left as they are, with their type; those above the limit of a stream are left out, and their
    /// values are rescued.
    ///
    /// # Errors
    /// [`CommitError::Moved`] when somebody else committed: reload and try again.
    pub async fn add_fields(&mut self, fields: &[StreamField]) -> Result<TableSnapshot, CommitError> {
        let mut all = self.snapshot.fields.to_vec();
        for field in fields {
            if all.len() < FIELDS_MAX && !all.iter().any(|known| known.name == field.name) {
                all.push(field.clone());
            }
        }
        if all.len() == self.snapshot.fields.len() {
            return Ok(self.snapshot());
        }
        let metadata = self.metadata_with(&all)?;
        let lines = self.table_entry("ADD COLUMNS", json!({}), &metadata)?;
        self.put_table(lines).await?;
        let old = &self.snapshot;
        self.snapshot = TableSnapshot::load(&self.stream, &old.log_store, None).await?;
        Ok(self.snapshot())
    }

    /// Gives the table these fields, which have its names and other types: `added` hold all its rows in the new columns
    /// and take the place of all its files. Transactions stay as they are. It is tried once: who is told
    /// [`CommitError::Moved`] has to see what came meanwhile.
    ///
    /// # Errors
    /// See [`CommitError`]; only after `Unknown` and `Store` may the commit be there.
    pub(crate) async fn retype(
        &mut self,
        fields: &[StreamField],
        added: Vec<DataFile>,
    ) -> Result<TableSnapshot, CommitError> {
        let metadata = self.metadata_with(fields)?;
        let now_ms = chrono::Utc::now().timestamp_millis();
        let (before, added) = (Arc::clone(&self.snapshot.fields), shared(added));
        let changed = fields.iter().filter(|field| !before.contains(field));
        let changed: serde_json::Map<String, Value> =
            changed.map(|field| (field.name.to_string(), field.kind.to_string().into())).collect();
        let mut lines =
            self.table_entry("CHANGE COLUMN", json!({ "columns": Value::Object(changed).to_string() }), &metadata)?;
        // Readers that follow the table see other rows than before.
        self.snapshot.files.iter().for_each(|file| lines.remove(file, true, now_ms));
        added.iter().for_each(|file| lines.add(file, true));
        self.put_table(lines).await?;
        let old = &self.snapshot;
        let files = DataFiles::default().with(added, &[]);
        self.snapshot = TableSnapshot {
            schema: Arc::new(table_schema(fields)),
            fields: fields.into(),
            metadata: Arc::new(metadata),
            ..old.after(old.version + 1, files, Arc::clone(&old.txn))
        };
        Ok(self.snapshot())
    }

    /// Says what the table is, or one of its columns; without a text, takes it away.
    ///
    /// # Errors
    /// See [`CommitError`]; after `Unknown` and `Store` it may be said or not.
    pub async fn say(&mut self, column: Option<&str>, text: Option<&str>) -> Result<TableSnapshot, CommitError> {
        for _ in 0..REBASES_MAX {
            let metadata = self.metadata_saying(column, text)?;
            if metadata == *self.snapshot.metadata {
                return Ok(self.snapshot());
            }
            let operation = if column.is_some() { "CHANGE COLUMN" } else { "SET TBLPROPERTIES" };
            let said = json!({ "column": column.unwrap_or_default(), "comment": text.unwrap_or_default() });
            let lines = self.table_entry(operation, said, &metadata)?;
            match self.put_table(lines).await {
                Ok(()) => {
                    let old = &self.snapshot;
                    let next = old.after(old.version + 1, old.files.clone(), Arc::clone(&old.txn));
                    self.snapshot = TableSnapshot { metadata: Arc::new(metadata), ..next };
                    return Ok(self.snapshot());
                }
                Err(CommitError::Moved { .. }) => drop(self.reload().await?),
                Err(error) => return Err(error),
            }
        }
        Err(self.moved())
    }

    fn metadata_saying(&self, column: Option<&str>, text: Option<&str>) -> Result<Metadata, CommitError> {
        let saying = || -> Result<Metadata, DeltaTableError> {
            let mut metadata = serde_json::to_value(self.snapshot.metadata.as_ref())?;
            let Some(column) = column else {
                metadata["description"] = text.into();
                return Ok(serde_json::from_value(metadata)?);
            };
            let mut schema: Value = serde_json::from_str(metadata["schemaString"].as_str().unwrap_or_default())?;
            for field in schema["fields"].as_array_mut().into_iter().flatten().filter(|field| field["name"] == column) {
                match (text, field["metadata"].as_object_mut()) {
                    (Some(text), Some(notes)) => drop(notes.insert(COMMENT.to_owned(), text.into())),
                    (None, Some(notes)) => drop(notes.remove(COMMENT)),
                    (_, None) => field["metadata"] = json!({ COMMENT: text }),
                }
            }
            metadata["schemaString"] = schema.to_string().into();
            Ok(serde_json::from_value(metadata)?)
        };
        saying().map_err(|source| self.rows(source.into()))
    }

    /// The table's metadata with these fields.
    fn metadata_with(&self, fields: &[StreamField]) -> Result<Metadata, CommitError> {
        let with_fields = || -> Result<Metadata, DeltaTableError> {
            let mut metadata = serde_json::to_value(self.snapshot.metadata.as_ref())?;
            let before = metadata["schemaString"].as_str().unwrap_or_default();
            let schema = noted(fields, &serde_json::from_str(before)?)?;
            metadata["schemaString"] = schema.to_string().into();
            Ok(serde_json::from_value(metadata)?)
        };
        with_fields().map_err(|source| self.rows(source.into()))
    }

    /// An entry that changes the table itself.
    fn table_entry(&self, operation: &str, parameters: Value, metadata: &Metadata) -> Result<Lines, CommitError> {
        let now_ms = chrono::Utc::now().timestamp_millis();
        let mut lines = Lines::of(operation, parameters, false, now_ms, self.snapshot.version);
        let line = serde_json::to_value(Action::Metadata(metadata.clone()));
        lines.push(&line.map_err(|source| self.rows(DeltaTableError::from(source).into()))?);
        Ok(lines)
    }

    async fn put_table(&mut self, lines: Lines) -> Result<(), CommitError> {
        match self.put_next(lines.into_bytes()).await? {
            Ok(()) => Ok(()),
            Err(PutError::Taken) => Err(self.moved()),
            Err(PutError::Unknown(source)) => Err(self.unknown(source)),
        }
    }
}

impl TableSnapshot {
    /// What is known of the columns beside their types, by name.
    pub fn notes(&self) -> BTreeMap<String, Note> {
        // What cannot be read is not known.
        let metadata = serde_json::to_value(self.metadata.as_ref()).unwrap_or_default();
        let schema = metadata["schemaString"].as_str().unwrap_or_default();
        let schema: Value = serde_json::from_str(schema).unwrap_or_default();
        let note = |column: &Value| {
            let beside = |name: &str| column["metadata"][name].as_str();
            let since = beside(SINCE).and_then(|since| chrono::DateTime::parse_from_rfc3339(since).ok());
            let since_us = since.map(|since| since.timestamp_micros());
            Some((column["name"].as_str()?.to_owned(), Note { comment: beside(COMMENT).map(str::to_owned), since_us }))
        };
        schema["fields"].as_array().into_iter().flatten().filter_map(note).collect()
    }
}

/// The columns of a new table with these fields.
pub(super) fn new_columns(fields: &[StreamField]) -> Result<StructType, DeltaTableError> {
    Ok(serde_json::from_value(noted(fields, &Value::Null)?)?)
}

/// The columns of a table with these fields: beside each what stood there before, or since when it is there.
fn noted(fields: &[StreamField], before: &Value) -> Result<Value, DeltaTableError> {
    let mut schema = serde_json::to_value(kernel_schema(&table_schema(fields))?)?;
    let since = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
    let notes_of = |name: &Value| {
        let columns = before["fields"].as_array()?;
        columns.iter().find(|column| column["name"] == *name).map(|column| column["metadata"].clone())
    };
    for column in schema["fields"].as_array_mut().into_iter().flatten() {
        column["metadata"] = notes_of(&column["name"]).unwrap_or_else(|| json!({ SINCE: since }));
    }
    Ok(schema)
}
