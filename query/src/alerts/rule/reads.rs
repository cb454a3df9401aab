//! What a rule's SELECT reads: whether it looks at single rows of one stream, and that it does not read what it writes.

use std::collections::{BTreeMap, BTreeSet};

use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::{Expr, LogicalPlan, Volatility};
use wire::StreamName;
use wire::schema::own;

use super::{RuleError, caller};
use crate::engine::Engine;
use crate::fused_table::LiveTable;
use crate::statements::State;
use crate::views::changes;
use crate::volatile;

/// Views below a rule.
const VIEWS_MAX: usize = 1_000;

fn hinted(error: &crate::QueryError) -> String {
    let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
    format!("{error}{hint}")
}

/// The plan of a SELECT, not pinned.
pub(super) async fn plan(engine: &Engine, sql: &str) -> Result<LogicalPlan, RuleError> {
    let refused = |error: crate::QueryError| match error {
        crate::QueryError::UnknownTable { .. } => RuleError::Waits(hinted(&error)),
        crate::QueryError::Timeout { .. }
        | crate::QueryError::Memory { .. }
        | crate::QueryError::Cancelled
        | crate::QueryError::Busy { .. }
        | crate::QueryError::Failed { .. } => RuleError::Busy(error.to_string()),
        error => RuleError::Refused(hinted(&error)),
    };
    let caller = caller();
    let place = engine.enter(&caller).await.map_err(refused)?;
    let running = engine.begin(&caller, &place, sql);
    let prepared = engine.prepare(&running, sql, None).await.map_err(refused)?;
    running.ended(State::Done);
    Ok(prepared.plan().clone())
}

/// The views that a plan reads, those that they read among them, each with the id of its definition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Below(BTreeMap<StreamName, String>);

impl Below {
    /// Of a SELECT.
    ///
    /// # Errors
    /// When it reads what comes of alerts, through views too; when a view below cannot be planned now.
    pub(super) async fn of(engine: &Engine, plan: &LogicalPlan, here: &str) -> Result<Self, RuleError> {
        Self::walk(engine, streams(plan)?, here).await
    }

    /// Of all of a stream.
    ///
    /// # Errors
    /// As of a SELECT.
    pub(super) async fn of_stream(engine: &Engine, stream: &StreamName, here: &str) -> Result<Self, RuleError> {
        Self::walk(engine, BTreeSet::from([stream.clone()]), here).await
    }

    async fn walk(engine: &Engine, streams_of_rule: BTreeSet<StreamName>, here: &str) -> Result<Self, RuleError> {
        let views = engine.views().all();
        let (mut below, mut seen) = (Self::default(), BTreeSet::new());
        let mut next: Vec<(StreamName, Vec<String>)> =
            streams_of_rule.into_iter().map(|stream| (stream, Vec::new())).collect();
        while let Some((stream, through)) = next.pop() {
            if let Some(own) = feeds_itself(&stream) {
                let through = match &through[..] {
                    [] => String::new(),
                    views => format!(" (it reads {stream} through {})", views.join(", ")),
                };
                let reason = format!("{here}: a rule about {own} would feed itself{through}");
                return Err(RuleError::Refused(reason));
            }
            if !seen.insert(stream.clone()) {
                continue;
            }
            let of_view = views.iter().find(|view| changes(&view.definition.name).is_ok_and(|own| own == stream));
            let Some(definition) = of_view.map(|view| &view.definition) else { continue };
            if below.0.len() >= VIEWS_MAX {
                return Err(RuleError::Refused(format!("{here}: more than {VIEWS_MAX} views are below it")));
            }
            below.0.insert(definition.name.clone(), definition.id());
            let read = streams(&plan(engine, &definition.select).await?)?;
            let name = format!("the view {}", definition.name);
            next.extend(read.into_iter().map(|stream| (stream, [&through[..], std::slice::from_ref(&name)].concat())));
        }
        Ok(below)
    }

    /// Whether the views are still what they were.
    pub(crate) fn holds(&self, engine: &Engine) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let views = engine.views().all();
        let now = |name: &StreamName| views.iter().find(|view| view.definition.name == *name);
        self.0.iter().all(|(name, id)| now(name).is_some_and(|view| view.definition.id() == *id))
    }
}

/// What a rule is about that reads what comes of alerts: those of links are alerts and commands again.
fn feeds_itself(stream: &StreamName) -> Option<&'static str> {
    match stream.as_str() {
        own::ALERT_LOG | own::ALERT_DELIVERIES => Some("the alerts' own log"),
        own::LINK_LOG => Some("what links do"),
        _ => None,
    }
}

/// The streams that a plan scans.
fn streams(plan: &LogicalPlan) -> Result<BTreeSet<StreamName>, RuleError> {
    let mut streams = BTreeSet::new();
    let looked = plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node
            && let Ok(provider) = datafusion::datasource::source_as_provider(&scan.source)
            && let Some(live) = provider.downcast_ref::<LiveTable>()
        {
            streams.extend(live.reads().cloned());
            if live.shows_links() {
                streams.insert(own::LINK_LOG.parse().expect("own names are valid"));
            }
        }
        Ok(TreeNodeRecursion::Continue)
    });
    looked.map_err(|error| RuleError::Refused(error.strip_backtrace()))?;
    Ok(streams)
}

/// What would give another answer each time it is asked, and does not belong into a rule.
pub(super) fn check_functions(plan: &LogicalPlan) -> Result<(), String> {
    let mut found = None;
    let looked = plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            expr.apply(|part| {
                if matches!(volatile::call(part), Some((_, Volatility::Volatile))) {
                    found.get_or_insert_with(|| part.to_string());
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    });
    looked.map_err(|error| error.strip_backtrace())?;
    match found {
        Some(found) => Err(format!("`{found:.200}` gives another answer each time")),
        None => Ok(()),
    }
}

/// What filters and projections over one stream consist of: the stream, the plan below, the condition, the columns.
pub(crate) type RowsOnly = (StreamName, LogicalPlan, Option<Expr>, Vec<Expr>);

/// The parts of a SELECT that is nothing else.
pub(super) fn rows_only(plan: &LogicalPlan) -> Option<RowsOnly> {
    let LogicalPlan::Projection(projection) = plan else { return None };
    let (predicate, below) = match projection.input.as_ref() {
        LogicalPlan::Filter(filter) => (Some(filter.predicate.clone()), filter.input.as_ref()),
        other => (None, other),
    };
    let mut scanned = below;
    while let LogicalPlan::SubqueryAlias(alias) = scanned {
        scanned = alias.input.as_ref();
    }
    let LogicalPlan::TableScan(scan) = scanned else { return None };
    if scan.projection.is_some() || !scan.filters.is_empty() || scan.fetch.is_some() {
        return None;
    }
    let provider = datafusion::datasource::source_as_provider(&scan.source).ok()?;
    let stream = provider.downcast_ref::<LiveTable>()?.stream()?.clone();
    let asks_more = |expr: &Expr| {
        expr.exists(|part| {
            Ok(match part {
                Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_) | Expr::OuterReferenceColumn(..) => {
                    true
                }
                Expr::Placeholder(_) | Expr::Unnest(_) => true,
                // `now()` is of the moment of a question, and rows are not asked about.
                call => volatile::call(call).is_some(),
            })
        })
        .unwrap_or(true)
    };
    if predicate.iter().chain(&projection.expr).any(asks_more) {
        return None;
    }
    Some((stream, below.clone(), predicate, projection.expr.clone()))
}
