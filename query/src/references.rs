//! Reference tables: `sensors` is what holds now, `sensors_history` every revision with its time, both from the stream
//! `sensors_revisions` (see [`wire::reference`]).
//!
//! They are views over the live table, which is pinned where a statement runs like any other mention of it: a join of
//! `sensors` and `sensors_history` sees one state. In `_history`, `revision` counts from 1 for each key, and
//! `[valid_from, valid_to)` is when it holds, open at the end while it is the last; so
//! `JOIN sensors_history s ON s.device = t.device AND t.ts >= s.valid_from AND (s.valid_to IS NULL OR t.ts < s.valid_to)`
//! gives each reading what was true then. A stream that has one of these names itself goes before the view.

use std::sync::Arc;

use datafusion::catalog::TableProvider;
use datafusion::common::{Result, ScalarValue};
use datafusion::datasource::{ViewTable, provider_as_source};
use datafusion::functions::expr_fn::{coalesce, now};
use datafusion::functions_window::expr_fn::{lead, row_number};
use datafusion::logical_expr::{Expr, ExprFunctionExt, LogicalPlan, LogicalPlanBuilder, when};
use datafusion::prelude::{col, lit};
use wire::reference::{VALID_FROM, revisions};
use wire::schema::{DATE, DEVICE, QUALITY, RECEIVED_AT, SEQ, TS};
use wire::{StreamName, TS_MIN_US};

use crate::catalog::Tables;
use crate::fused_table::LiveTable;
use crate::views::shape::Known;

const HISTORY: &str = "_history";
const VALID_TO: &str = "valid_to";
const REVISION: &str = "revision";

/// The names of all views that the streams give.
pub(crate) fn names(streams: &[StreamName]) -> Vec<String> {
    let tables = streams.iter().filter_map(|stream| stream.as_str().strip_suffix("_revisions"));
    let views = tables.flat_map(|table| [table.to_owned(), format!("{table}{HISTORY}")]);
    views.filter(|view| !streams.iter().any(|stream| stream.as_str() == view)).collect()
}

/// The view of this name, if there is one.
pub(crate) fn view(tables: &dyn Tables, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
    if let Some(view) = over_revisions(tables, name, false)? {
        return Ok(Some(view));
    }
    match name.strip_suffix(HISTORY) {
        Some(table) => over_revisions(tables, table, true),
        None => Ok(None),
    }
}

/// What a name in FROM is, when the plan under it is that of a reference table: for those who follow its changes.
pub(crate) fn known(tables: &dyn Tables, name: &str, plan: &LogicalPlan) -> Result<Option<Known>> {
    let is = |view: Option<Arc<dyn TableProvider>>| {
        view.is_some_and(|view| view.get_logical_plan().is_some_and(|own| own.as_ref() == plan))
    };
    if is(over_revisions(tables, name, false)?) {
        return Ok(Some(Known::Current));
    }
    let table = name.strip_suffix(HISTORY).and_then(|table| table.parse::<StreamName>().ok());
    let Some(stream) = table.as_ref().and_then(|table| revisions(table).ok()) else { return Ok(None) };
    let table = table.as_ref().map_or("", StreamName::as_str);
    Ok(is(over_revisions(tables, table, true)?).then_some(Known::History(stream)))
}

fn over_revisions(tables: &dyn Tables, name: &str, history: bool) -> Result<Option<Arc<dyn TableProvider>>> {
    let Some(stream) = name.parse::<StreamName>().ok().and_then(|table| revisions(&table).ok()) else {
        return Ok(None);
    };
    let Some(cold) = tables.cold(&stream) else { return Ok(None) };
    // Another stream may happen to be called so.
    if cold.schema.index_of(VALID_FROM).is_err() {
        return Ok(None);
    }
    let own = |name: &str| name.starts_with('_') || [TS, DEVICE, QUALITY, VALID_FROM, DATE].contains(&name);
    let fields: Vec<Expr> =
        cold.schema.fields().iter().map(|field| field.name().as_str()).filter(|name| !own(name)).map(col).collect();
    let live = LiveTable::new(stream.clone(), Arc::clone(&cold.schema));
    let scan = LogicalPlanBuilder::scan(stream.as_str(), provider_as_source(Arc::new(live)), None)?;

    let by_arrival = vec![col(RECEIVED_AT).sort(true, false), col(SEQ).sort(true, false)];
    let number = row_number().partition_by(vec![col(DEVICE)]).order_by(by_arrival).build()?.alias(REVISION);
    let first = lit(ScalarValue::TimestampMicrosecond(Some(TS_MIN_US), Some("UTC".into())));
    let since = when(col(REVISION).eq(lit(1_u64)), first).otherwise(col(RECEIVED_AT))?;
    let mut kept = vec![col(DEVICE)];
    kept.extend(fields.iter().cloned());
    let mut with_from = kept.clone();
    with_from.push(coalesce(vec![col(VALID_FROM), since]).alias(VALID_FROM));
    with_from.push(col(REVISION));
    let next = vec![col(VALID_FROM).sort(true, false), col(REVISION).sort(true, false)];
    let until = lead(col(VALID_FROM), Some(1), None).partition_by(vec![col(DEVICE)]).order_by(next).build()?;
    let mut all = kept.clone();
    all.extend([col(VALID_FROM), col(VALID_TO), col(REVISION)]);
    let plan = scan.window(vec![number])?.project(with_from)?.window(vec![until.alias(VALID_TO)])?.project(all)?;
    let plan = if history {
        plan
    } else {
        let open = col(VALID_TO).is_null().or(col(VALID_TO).gt(now()));
        kept.extend([col(VALID_FROM), col(REVISION)]);
        plan.filter(col(VALID_FROM).lt_eq(now()).and(open))?.project(kept)?
    };
    Ok(Some(Arc::new(ViewTable::new(plan.build()?, None))))
}
