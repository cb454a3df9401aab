//! The schema `system`: tables about the node itself, filled anew each time a statement is executed.
//!
//! | table | a row for each |
//! |---|---|
//! | `streams` | stream: columns, rows and bytes in files, hot rows, first and last event time |
//! | `columns` | column of a stream: type, unit, what it is, since when |
//! | `files` | Parquet file of a stream's newest version |
//! | `edges` | edge that has ever sent this node something: rows, last batch, agent |
//! | `ingest` | stream and spool that has: rows, last batch, what is durable and committed |
//! | `pressure` | class of those who write: what became of their rows, and how much room they have |
//! | `queries` | statement that runs, and of the last ones that ran |
//! | `views` | view: what it does, how far it is, what it costs |
//! | `links` | link: where it leads, and what came of it since the node started |
//! | `batches` | batch that a stream's rows came in (read from the rows themselves), and which agent sealed it |
//! | `sources` | column of a stream and edge that fills it: rows, when the first and the last came (read from the rows) |
//! | `quarantine_reasons` | reason why readings are in `quarantine`, by stream and source |
//! | `alerts` | alert that is pending or fires, as `alert_log` last says |
//!
//! The last four are questions about tables of `public` and see what the caller may see there. Of the others a caller
//! with a scope sees what is told of edges that are wholly its own, its own statements, and of streams that they exist.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{MemTable, SchemaProvider, TableProvider};
use datafusion::common::Result;
use wire::schema::timestamp_type;

use crate::catalog::Tables;
use crate::fused_table::{LiveTable, View};

mod rows;
mod views;

/// The tables that are filled when they are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Streams,
    Columns,
    Files,
    Edges,
    Ingest,
    Pressure,
    Queries,
    Views,
    Links,
}

const KINDS: [Kind; 9] = [
    Kind::Streams,
    Kind::Columns,
    Kind::Files,
    Kind::Edges,
    Kind::Ingest,
    Kind::Pressure,
    Kind::Queries,
    Kind::Views,
    Kind::Links,
];
/// The tables that are questions.
const VIEWS: [&str; 4] = ["alerts", "batches", "quarantine_reasons", "sources"];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Streams => "streams",
            Self::Columns => "columns",
            Self::Files => "files",
            Self::Edges => "edges",
            Self::Ingest => "ingest",
            Self::Pressure => "pressure",
            Self::Queries => "queries",
            Self::Views => "views",
            Self::Links => "links",
        }
    }

    pub(crate) fn schema(self) -> SchemaRef {
        use DataType::{Date32, Float64, Int64, Utf8};
        let columns: Vec<(&str, DataType)> = match self {
            Self::Streams => vec![
                ("name", Utf8),
                ("description", Utf8),
                ("columns", Int64),
                ("rows", Int64),
                ("bytes", Int64),
                ("files", Int64),
                ("hot_rows", Int64),
                ("first_ts", timestamp_type()),
                ("last_ts", timestamp_type()),
                ("version", Int64),
            ],
            Self::Columns => vec![
                ("stream", Utf8),
                ("name", Utf8),
                ("position", Int64),
                ("type", Utf8),
                ("unit", Utf8),
                ("description", Utf8),
                ("since", timestamp_type()),
            ],
            Self::Files => vec![
                ("stream", Utf8),
                ("path", Utf8),
                ("date", Date32),
                ("rows", Int64),
                ("bytes", Int64),
                ("modified_at", timestamp_type()),
                ("first_ts", timestamp_type()),
                ("last_ts", timestamp_type()),
            ],
            Self::Edges => vec![
                ("edge", Utf8),
                ("streams", Int64),
                ("spools", Int64),
                ("rows", Int64),
                ("batches", Int64),
                ("last_batch_at", timestamp_type()),
                ("agent", Utf8),
                ("configuration", Int64),
            ],
            Self::Ingest => vec![
                ("edge", Utf8),
                ("stream", Utf8),
                ("spool", Utf8),
                ("rows", Int64),
                ("batches", Int64),
                ("last_batch_at", timestamp_type()),
                ("last_ts", timestamp_type()),
                ("lag_s", Float64),
                ("durable", Int64),
                ("committed", Int64),
                ("agent", Utf8),
                ("configuration", Int64),
            ],
            Self::Pressure => vec![
                ("place", Int64),
                ("class", Utf8),
                ("received", Int64),
                ("durable", Int64),
                ("duplicate", Int64),
                ("refused", Int64),
                ("pushed_back", Int64),
                ("committed", Int64),
                ("hot_rows", Int64),
                ("hot_bytes", Int64),
                ("hot_kept_bytes", Int64),
                ("hot_free_bytes", Int64),
                ("wal_bytes", Int64),
                ("wal_free_bytes", Int64),
            ],
            Self::Queries => vec![
                ("id", Int64),
                ("state", Utf8),
                ("text", Utf8),
                ("reader", Utf8),
                ("door", Utf8),
                ("lane", Utf8),
                ("started_at", timestamp_type()),
                ("ms", Float64),
                ("rows", Int64),
                ("bytes", Int64),
                ("memory_bytes", Int64),
            ],
            Self::Views => vec![
                ("name", Utf8),
                ("definition", Utf8),
                ("state", Utf8),
                ("reason", Utf8),
                ("watermark", timestamp_type()),
                ("lag_s", Float64),
                ("held_by", Utf8),
                ("dirty_windows", Int64),
                ("backfill_from", timestamp_type()),
                ("backfill_to", timestamp_type()),
                ("rows_in", Int64),
                ("rows_per_second", Float64),
                ("rows_out", Int64),
                ("revisions", Int64),
                ("memory_bytes", Int64),
                ("computed_s", Float64),
            ],
            Self::Links => vec![
                ("name", Utf8),
                ("state", Utf8),
                ("reason", Utf8),
                ("from_topic", Utf8),
                ("condition", Utf8),
                ("to_kind", Utf8),
                ("to_name", Utf8),
                ("open", Int64),
                ("told", Int64),
                ("answered", Int64),
                ("refused", Int64),
                ("timed_out", Int64),
                ("rate_limited", Int64),
                ("failed", Int64),
                ("last_at", timestamp_type()),
                ("last_outcome", Utf8),
                ("last_answer", Utf8),
                ("last_error", Utf8),
            ],
        };
        Arc::new(Schema::new(columns.into_iter().map(|(name, kind)| Field::new(name, kind, true)).collect::<Vec<_>>()))
    }
}

/// The schema itself.
#[derive(Debug)]
pub(crate) struct SystemSchema {
    pub(crate) tables: Arc<dyn Tables>,
}

#[async_trait]
impl SchemaProvider for SystemSchema {
    fn table_names(&self) -> Vec<String> {
        let mut names: Vec<&str> = KINDS.into_iter().map(Kind::name).chain(VIEWS).collect();
        names.sort_unstable();
        names.into_iter().map(str::to_owned).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        if let Some(kind) = KINDS.into_iter().find(|kind| kind.name() == name) {
            return Ok(Some(Arc::new(LiveTable::system(kind))));
        }
        match name {
            "alerts" => views::alerts(self.tables.as_ref()).map(Some),
            "batches" => views::batches(self.tables.as_ref()).map(Some),
            "quarantine_reasons" => views::quarantine_reasons(self.tables.as_ref()).map(Some),
            "sources" => views::sources(self.tables.as_ref()).map(Some),
            _ => Ok(None),
        }
    }

    fn table_exist(&self, name: &str) -> bool {
        KINDS.iter().any(|kind| kind.name() == name) || VIEWS.contains(&name)
    }
}

/// The table with the rows that the caller may see now.
pub(crate) async fn pinned(kind: Kind, view: View<'_>) -> Result<Arc<dyn TableProvider>> {
    let columns = match kind {
        Kind::Streams => rows::streams(view).await?,
        Kind::Columns => rows::columns(view),
        Kind::Files => rows::files(view)?,
        Kind::Edges => rows::edges(view),
        Kind::Ingest => rows::ingest(view),
        Kind::Pressure => rows::pressure(view),
        Kind::Queries => rows::queries(view),
        Kind::Views => rows::views(view),
        Kind::Links => rows::links(view),
    };
    let schema = kind.schema();
    let rows = RecordBatch::try_new(Arc::clone(&schema), columns)?;
    Ok(Arc::new(MemTable::try_new(schema, vec![vec![rows]])?))
}
