//! The functions through SQL: over rows in memory, spread over several partitions, with 1, 2 and 7 threads' worth of plans.

mod aggregates;
mod asof;
mod examples;
mod gapfill;
mod hop;
mod places;
mod session;
mod time_bucket;

use std::sync::Arc;

use arrow::util::display::{ArrayFormatter, FormatOptions};
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow_schema::{DataType, Field, Schema};
use async_trait::async_trait;
use datafusion::catalog::MemTable;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::logical_expr::LogicalPlan;
use datafusion::sql::sqlparser::dialect::GenericDialect;
use wire::StreamName;
use wire::hot::{HotAnswer, HotError, HotSource};

use super::*;
use crate::as_of::AsOf;
use crate::catalog::{ColdTable, SpoolFacts, TablesError};

/// No stream has a table.
#[derive(Debug)]
struct NoTables;

#[async_trait]
impl HotSource for NoTables {
    async fn hot(&self, _: &StreamName, _: u64) -> Result<HotAnswer, HotError> {
        Ok(HotAnswer::Rows(Vec::new()))
    }
}

#[async_trait]
impl Tables for NoTables {
    fn streams(&self) -> Vec<StreamName> {
        Vec::new()
    }

    fn cold(&self, _: &StreamName) -> Option<ColdTable> {
        None
    }

    async fn reload(&self, stream: &StreamName, _: u64) -> Result<ColdTable, TablesError> {
        Err(TablesError { stream: stream.clone(), detail: "there is none".to_owned() })
    }

    async fn cold_as_of(&self, stream: &StreamName, _: AsOf) -> std::result::Result<ColdTable, TablesError> {
        self.reload(stream, 0).await
    }

    fn spools(&self) -> Vec<SpoolFacts> {
        Vec::new()
    }

    fn changed(&self) -> tokio::sync::watch::Receiver<u64> {
        tokio::sync::watch::channel(0).1
    }

    fn hot(&self) -> Arc<dyn HotSource> {
        Arc::new(Self)
    }
}

const GAPFILL_ROWS_MAX: usize = 10_000;

/// A session with the functions, small batches, and plans of so many partitions.
fn session(partitions: usize) -> SessionContext {
    let mut config = SessionConfig::new().with_target_partitions(partitions).with_batch_size(64);
    config.options_mut().sql_parser.map_string_types_to_utf8view = false;
    // Every row a group of its own before they meet: the way that many groups take.
    if partitions > 2 {
        config.options_mut().execution.skip_partial_aggregation_probe_rows_threshold = 1;
        config.options_mut().execution.skip_partial_aggregation_probe_ratio_threshold = 0.0;
    }
    let session = SessionContext::new_with_state(state(config, Arc::new(RuntimeEnv::default()), GAPFILL_ROWS_MAX));
    let tables: Arc<dyn Tables> = Arc::new(NoTables);
    register(&session, &tables, &Arc::new(LatestCache::new(1 << 20))).unwrap();
    session
}

/// As a statement that comes in is planned.
async fn plan(session: &SessionContext, sql: &str) -> Result<LogicalPlan> {
    let words = crate::functions::asof::syntax::words(&GenericDialect {}, sql);
    let state = session.state();
    let dialect = state.config().options().sql_parser.dialect;
    let statement = state.sql_to_statement(words.as_deref().unwrap_or(sql), &dialect)?;
    crate::names::plan(&state, statement).await
}

async fn batches(session: &SessionContext, sql: &str) -> Result<Vec<RecordBatch>> {
    let plan = plan(session, sql).await?;
    session.execute_logical_plan(plan).await?.collect().await
}

/// Rows as text: values with a bar between.
async fn rows_in(session: &SessionContext, sql: &str) -> Vec<String> {
    let batches = batches(session, sql).await.unwrap_or_else(|error| panic!("{sql}\n{error}"));
    let options = FormatOptions::default().with_null("NULL");
    let mut rows = Vec::new();
    for batch in batches {
        let columns: Vec<_> =
            batch.columns().iter().map(|column| ArrayFormatter::try_new(column, &options).unwrap()).collect();
        for row in 0..batch.num_rows() {
            let values: Vec<String> = columns.iter().map(|column| column.value(row).to_string()).collect();
            rows.push(values.join("|"));
        }
    }
    rows
}

async fn check(sql: &str, expected: &[&str]) {
    for partitions in [1, 2, 7] {
        assert_eq!(rows_in(&session(partitions), sql).await, expected, "{sql}\nwith {partitions} partitions");
    }
}

async fn refused(sql: &str, word: &str) {
    match batches(&session(2), sql).await {
        Ok(rows) => panic!("{sql}\nanswered {rows:?}"),
        Err(error) => assert!(error.to_string().contains(word), "{sql}\n{error}"),
    }
}

/// A row of the table that [`readings`] makes.
#[derive(Debug, Clone)]
struct Reading {
    device: Option<&'static str>,
    /// Seconds since 2024-01-01.
    second: Option<i64>,
    value: Option<f64>,
    number: Option<i64>,
}

const START_US: i64 = 1_704_067_200_000_000;

/// Makes a table (device, ts, v, n) of rows that are dealt out to batches and partitions one by one.
fn readings(session: &SessionContext, name: &str, rows: &[Reading], partitions: usize) {
    let kind = wire::schema::timestamp_type();
    let schema = Arc::new(Schema::new(vec![
        Field::new("device", DataType::Utf8, true),
        Field::new("ts", kind, true),
        Field::new("v", DataType::Float64, true),
        Field::new("n", DataType::Int64, true),
    ]));
    let parts = (0..partitions).map(|part| {
        let of_part: Vec<&Reading> = rows.iter().skip(part).step_by(partitions).collect();
        let batches = of_part.chunks(50).map(|rows| {
            let ts = rows.iter().map(|row| row.second.map(|second| START_US + second * 1_000_000));
            let columns: Vec<ArrayRef> = vec![
                Arc::new(rows.iter().map(|row| row.device).collect::<StringArray>()),
                Arc::new(ts.collect::<TimestampMicrosecondArray>().with_timezone("UTC")),
                Arc::new(rows.iter().map(|row| row.value).collect::<Float64Array>()),
                Arc::new(rows.iter().map(|row| row.number).collect::<Int64Array>()),
            ];
            RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()
        });
        batches.collect()
    });
    let table = MemTable::try_new(Arc::clone(&schema), parts.collect()).unwrap();
    session.register_table(name, Arc::new(table)).unwrap();
}
