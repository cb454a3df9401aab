//! `latest('traffic')`: a table of the newest row of each device.
//!
//! Newest is the row with the greatest `ts`, of equal ones that with the greatest `_received_at`, then `_spool`, then
//! `_seq`: a late row does not take the place of a newer one. It is exact: the cold rows at the version that the statement
//! is pinned to, and the hot rows above it, as every other mention of the stream in that statement sees them.
//!
//! The cold half comes from a [`cache::LatestCache`]. A condition `device = …` or `device IN (…)` is looked up in it;
//! other conditions are asked of all devices. For a reader with a scope, and for a table of the past, it is computed from
//! the rows ([`computed`]). A question that asks the same in other words is answered from it, too ([`distinct_on`]).

pub(crate) mod cache;
pub(crate) mod computed;
pub(crate) mod distinct_on;
mod newest;

use std::cmp::Ordering;
use std::sync::Arc;

use arrow::compute::kernels::cmp::eq;
use arrow::compute::{interleave, take_record_batch};
use arrow::datatypes::SchemaRef;
use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, StringArray, UInt32Array};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::{HashMap, HashSet, Result, ScalarValue, plan_err};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Expr, Operator, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::ExecutionPlan;
use wire::StreamName;
use wire::schema::DEVICE;

use self::cache::{Held, LatestCache};
use self::newest::{Age, Ages};
use super::asof::exec::greater;
use super::by_time::known;
use crate::catalog::Tables;
use crate::fused_table::{Frozen, LiveTable, hot_columns};

/// The function.
#[derive(Debug)]
pub(super) struct LatestFunction {
    tables: Arc<dyn Tables>,
    cache: Arc<LatestCache>,
}

impl LatestFunction {
    pub(super) fn new(tables: Arc<dyn Tables>, cache: Arc<LatestCache>) -> Self {
        Self { tables, cache }
    }
}

impl TableFunctionImpl for LatestFunction {
    fn call_with_args(&self, arguments: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        let [Expr::Literal(ScalarValue::Utf8(Some(name)), _)] = arguments.exprs() else {
            return plan_err!("latest takes the name of a stream in quotes: latest('traffic')");
        };
        let cold = name.parse::<StreamName>().ok().and_then(|stream| Some((self.tables.cold(&stream)?, stream)));
        match cold {
            // The words that DataFusion has for it: the engine adds the nearest name.
            None => plan_err!("table '{name}' not found"),
            Some((cold, stream)) => Ok(Arc::new(LiveTable::latest(stream, cold.schema, Arc::clone(&self.cache)))),
        }
    }
}

/// The newest rows of one frozen state.
#[derive(Debug)]
pub(crate) struct PinnedLatest {
    schema: SchemaRef,
    frozen: Arc<Frozen>,
    held: Arc<Held>,
}

impl PinnedLatest {
    pub(crate) fn new(schema: SchemaRef, frozen: Arc<Frozen>, held: Arc<Held>) -> Self {
        Self { schema, frozen, held }
    }
}

#[async_trait]
impl TableProvider for PinnedLatest {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        _: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let wanted: SchemaRef = match projection {
            Some(columns) => Arc::new(self.schema.project(columns)?),
            None => Arc::clone(&self.schema),
        };
        let rows = self.rows(&wanted, asked_devices(filters).as_ref())?;
        Ok(MemorySourceConfig::try_new_exec(&[vec![rows]], wanted, None)?)
    }
}

/// The newest hot row of a device.
struct Hot {
    age: Age,
    batch: usize,
    row: usize,
}

impl PinnedLatest {
    /// The newest rows of these devices, or of all.
    fn rows(&self, wanted: &SchemaRef, devices: Option<&HashSet<String>>) -> Result<RecordBatch> {
        let hot = self.frozen.hot();
        let ages = hot.iter().map(Ages::of).collect::<Result<Vec<_>>>()?;
        let newest = newest_of(hot, &ages, devices)?;
        let cold = &self.held.rows;
        let (mut superseded, mut winners) = (HashSet::new(), vec![Vec::new(); hot.len()]);
        for (device, candidate) in &newest {
            if let Some(row) = cold.devices.get(*device) {
                if !self.newer(candidate, row)? {
                    continue;
                }
                superseded.insert(row);
            }
            winners[candidate.batch].push(candidate.row as u32);
        }
        let stays = |row: &usize| !superseded.contains(row);
        let mut places: Vec<(usize, usize)> = match devices {
            None => (0..cold.devices.len()).filter(stays).map(|row| (0, row)).collect(),
            Some(devices) => {
                let rows = devices.iter().filter_map(|device| cold.devices.get(Some(device)));
                rows.filter(stays).map(|row| (0, row)).collect()
            }
        };
        let of_cold = hot_columns(&cold.rows, wanted)?;
        let all_cold = places.len() == of_cold.num_rows();
        let mut batches = vec![of_cold];
        for (rows, winners) in hot.iter().zip(winners).filter(|(_, winners)| !winners.is_empty()) {
            let taken = hot_columns(&take_record_batch(rows, &UInt32Array::from(winners))?, wanted)?;
            places.extend((0..taken.num_rows()).map(|row| (batches.len(), row)));
            batches.push(taken);
        }
        if all_cold && batches.len() == 1 && devices.is_none() {
            return Ok(batches.swap_remove(0));
        }
        let columns = (0..wanted.fields().len())
            .map(|index| {
                let sources: Vec<&dyn Array> = batches.iter().map(|batch| batch.column(index).as_ref()).collect();
                Ok(interleave(&sources, &places)?)
            })
            .collect::<Result<Vec<ArrayRef>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(places.len()));
        Ok(RecordBatch::try_new_with_options(Arc::clone(wanted), columns, &options)?)
    }

    /// Whether a hot row is newer than this cold one.
    fn newer(&self, hot: &Hot, row: usize) -> Result<bool> {
        let cold = &self.held.rows;
        Ok(match hot.age.cmp(&cold.ages[row]) {
            // It is the same row, committed meanwhile; or one batch told the device twice at one instant.
            Ordering::Equal => {
                let rows = self.frozen.hot()[hot.batch].slice(hot.row, 1);
                greater(&hot_columns(&rows, &cold.rows.schema())?, 0, &cold.rows, row)
            }
            ordering => ordering == Ordering::Greater,
        })
    }
}

fn newest_of<'a>(
    hot: &[RecordBatch],
    ages: &'a [Ages],
    devices: Option<&HashSet<String>>,
) -> Result<HashMap<Option<&'a str>, Hot>> {
    let mut newest: HashMap<Option<&str>, Hot> = HashMap::new();
    for (batch, of_batch) in ages.iter().enumerate() {
        let asked = match devices {
            Some(devices) => Some(rows_of(&of_batch.device, devices)?),
            None => None,
        };
        let all = asked.is_none().then_some(0..of_batch.len());
        for row in all.into_iter().flatten().chain(asked.into_iter().flatten()) {
            let device = of_batch.device(row);
            let better = match newest.get(&device) {
                None => true,
                Some(held) => match of_batch.compare(row, &held.age) {
                    Ordering::Equal => {
                        let schema = hot[held.batch].schema();
                        match hot_columns(&hot[batch].slice(row, 1), &schema) {
                            Ok(this) => greater(&this, 0, &hot[held.batch], held.row),
                            Err(_) => false,
                        }
                    }
                    ordering => ordering == Ordering::Greater,
                },
            };
            if better {
                newest.insert(device, Hot { age: of_batch.age(row), batch, row });
            }
        }
    }
    Ok(newest)
}

/// Rows of these devices: few are compared with the whole column at once, many are looked up.
fn rows_of(column: &StringArray, devices: &HashSet<String>) -> Result<Vec<usize>> {
    const AT_ONCE: usize = 4;
    if devices.len() > AT_ONCE {
        let asked = |row: &usize| column.is_valid(*row) && devices.contains(column.value(*row));
        return Ok((0..column.len()).filter(asked).collect());
    }
    let mut rows = Vec::new();
    for device in devices {
        let equal = eq(column, &StringArray::new_scalar(device.as_str()))?;
        rows.extend(known(&equal).values().set_indices());
    }
    Ok(rows)
}

/// The devices that the conditions let through, when they name them.
fn asked_devices(filters: &[Expr]) -> Option<HashSet<String>> {
    let text = |expression: &Expr| match expression {
        Expr::Literal(ScalarValue::Utf8(Some(text)) | ScalarValue::Utf8View(Some(text)), _) => Some(text.clone()),
        _ => None,
    };
    let is_device = |expression: &Expr| matches!(expression, Expr::Column(column) if column.name == DEVICE);
    filters.iter().flat_map(split_conjunction).find_map(|condition| match condition {
        Expr::BinaryExpr(compared) if compared.op == Operator::Eq => {
            let value = match (is_device(&compared.left), is_device(&compared.right)) {
                (true, false) => text(&compared.right),
                (false, true) => text(&compared.left),
                _ => None,
            };
            value.map(|device| HashSet::from([device]))
        }
        Expr::InList(list) if !list.negated && is_device(&list.expr) => list.list.iter().map(text).collect(),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
