//! What a client asks about the node and its tables, as Arrow batches.
//!
//! Tables have no keys and nothing can be written, and it says so.

use std::sync::{Arc, LazyLock};

use arrow_array::RecordBatch;
use arrow_flight::error::FlightError;
use arrow_flight::sql::metadata::{SqlInfoData, SqlInfoDataBuilder, XdbcTypeInfoData, XdbcTypeInfoDataBuilder};
use arrow_flight::sql::{
    CommandGetCatalogs, CommandGetDbSchemas, CommandGetSqlInfo, CommandGetTableTypes, CommandGetTables,
    CommandGetXdbcTypeInfo, SqlInfo, SqlSupportedTransaction,
};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use datafusion::common::DataFusionError;
use datafusion::logical_expr::TableType;
use tonic::Status;

use crate::catalog::{CATALOG, SCHEMA, SYSTEM};
use crate::engine::Engine;

const SCHEMAS: [&str; 2] = [SCHEMA, SYSTEM];
const TABLE: &str = "TABLE";
const VIEW: &str = "SYSTEM TABLE";

/// What the node is and can.
static INFO: LazyLock<SqlInfoData> = LazyLock::new(|| {
    let mut info = SqlInfoDataBuilder::new();
    info.append(SqlInfo::FlightSqlServerName, "Weir");
    info.append(SqlInfo::FlightSqlServerVersion, env!("CARGO_PKG_VERSION"));
    info.append(SqlInfo::FlightSqlServerArrowVersion, "1.3");
    info.append(SqlInfo::FlightSqlServerReadOnly, true);
    info.append(SqlInfo::FlightSqlServerSql, true);
    info.append(SqlInfo::FlightSqlServerSubstrait, false);
    info.append(SqlInfo::FlightSqlServerTransaction, SqlSupportedTransaction::None as i32);
    info.append(SqlInfo::FlightSqlServerCancel, true);
    info.append(SqlInfo::SqlIdentifierQuoteChar, "\"");
    info.append(SqlInfo::SqlDdlCatalog, false);
    info.append(SqlInfo::SqlDdlSchema, false);
    info.append(SqlInfo::SqlDdlTable, false);
    info.build().expect("each of these has a value of its type")
});

static TYPES: LazyLock<XdbcTypeInfoData> =
    LazyLock::new(|| XdbcTypeInfoDataBuilder::new().build().expect("no types are a list of types"));

fn failed(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

fn arrow_failed(error: FlightError) -> Status {
    Status::from(error)
}

/// A question about the catalogue, and its answer's columns.
#[derive(Debug)]
pub(super) enum Question {
    Catalogs(CommandGetCatalogs),
    Schemas(CommandGetDbSchemas),
    Tables(CommandGetTables),
    TableTypes(CommandGetTableTypes),
    Info(CommandGetSqlInfo),
    Types(CommandGetXdbcTypeInfo),
    PrimaryKeys,
    ForeignKeys,
}

impl Question {
    /// The answer.
    pub(super) async fn answer(self, engine: &Engine) -> Result<RecordBatch, Status> {
        match self {
            Self::Catalogs(asked) => {
                let mut rows = asked.into_builder();
                rows.append(CATALOG);
                rows.build().map_err(arrow_failed)
            }
            Self::Schemas(asked) => {
                let mut rows = asked.into_builder();
                SCHEMAS.iter().for_each(|schema| rows.append(CATALOG, schema));
                rows.build().map_err(arrow_failed)
            }
            Self::TableTypes(asked) => {
                let mut rows = asked.into_builder();
                [TABLE, VIEW].iter().for_each(|kind| rows.append(kind));
                rows.build().map_err(arrow_failed)
            }
            Self::Tables(asked) => tables(asked, engine).await,
            Self::Info(asked) => asked.into_builder(&INFO).build().map_err(arrow_failed),
            Self::Types(asked) => asked.into_builder(&TYPES).build().map_err(arrow_failed),
            Self::PrimaryKeys => Ok(RecordBatch::new_empty(primary_keys())),
            Self::ForeignKeys => Ok(RecordBatch::new_empty(foreign_keys())),
        }
    }

    /// The columns of the answer.
    pub(super) fn schema(&self) -> SchemaRef {
        match self {
            Self::Catalogs(asked) => asked.into_builder().schema(),
            Self::Schemas(asked) => asked.clone().into_builder().schema(),
            Self::Tables(asked) => asked.clone().into_builder().schema(),
            Self::TableTypes(asked) => asked.into_builder().schema(),
            Self::Info(asked) => asked.clone().into_builder(&INFO).schema(),
            Self::Types(asked) => asked.into_builder(&TYPES).schema(),
            Self::PrimaryKeys => primary_keys(),
            Self::ForeignKeys => foreign_keys(),
        }
    }
}

async fn tables(asked: CommandGetTables, engine: &Engine) -> Result<RecordBatch, Status> {
    let wanted = asked.table_types.clone();
    let mut rows = asked.into_builder();
    let no_catalogue = || failed("the catalogue is gone");
    let catalog = engine.session().catalog(CATALOG).ok_or_else(no_catalogue)?;
    for name in SCHEMAS {
        let schema = catalog.schema(name).ok_or_else(no_catalogue)?;
        for table in schema.table_names() {
            let found = schema.table(&table).await.map_err(|error: DataFusionError| failed(error.strip_backtrace()))?;
            // A table may go between the two questions.
            let Some(found) = found else { continue };
            let kind = if found.table_type() == TableType::Base && name == SCHEMA { TABLE } else { VIEW };
            if wanted.is_empty() || wanted.iter().any(|wanted| wanted == kind) {
                rows.append(CATALOG, name, &table, kind, &found.schema()).map_err(arrow_failed)?;
            }
        }
    }
    rows.build().map_err(arrow_failed)
}

fn primary_keys() -> SchemaRef {
    let text = |name: &str, nullable: bool| Field::new(name, DataType::Utf8, nullable);
    Arc::new(Schema::new(vec![
        text("catalog_name", true),
        text("db_schema_name", true),
        text("table_name", false),
        text("column_name", false),
        text("key_name", true),
        Field::new("key_sequence", DataType::Int32, false),
    ]))
}

fn foreign_keys() -> SchemaRef {
    let text = |name: &str, nullable: bool| Field::new(name, DataType::Utf8, nullable);
    Arc::new(Schema::new(vec![
        text("pk_catalog_name", true),
        text("pk_db_schema_name", true),
        text("pk_table_name", false),
        text("pk_column_name", false),
        text("fk_catalog_name", true),
        text("fk_db_schema_name", true),
        text("fk_table_name", false),
        text("fk_column_name", false),
        Field::new("key_sequence", DataType::Int32, false),
        text("fk_key_name", true),
        text("pk_key_name", true),
        Field::new("update_rule", DataType::UInt8, false),
        Field::new("delete_rule", DataType::UInt8, false),
    ]))
}
