//! Whether a question can be kept: what it reads, and a proof that each of its rows depends only on rows of its own
//! window. Pure, over the plan as SQL gives it, before anything is optimized.
//!
//! The proof goes from the scans up. Each node has a [`Flow`]: which of its columns hold the event time of the source rows
//! that a row comes from, and which the beginning of a window that all of them lie in. A scan has its `ts`. A function of
//! [`Grid`] over an event time makes a window. An aggregate, a window function or a DISTINCT keeps what it groups by, and
//! must group by one of the two; a join keeps what it equates. At the end a column must be left that holds the window: then
//! the rows of a window can be asked from the source rows of that window alone, and a row that comes in changes that window
//! and no other. A row comes once in each window of a `HOP`, and goes on as several rows. In a `SESSION` it depends on rows
//! around it, and `window_end` is all that is left of event time. Or each row comes from one row of one stream: then new rows
//! give new rows, and nothing ever changes.
//!
//! A reference table may be joined by event time (`join.rs`): a revision that holds from x changes nothing before x. What
//! it shows as the end of an older revision changes all the same, so that nothing but the join may look at `valid_to`.

use std::collections::{BTreeMap, BTreeSet};

use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{DFSchema, DataFusionError, Result, plan_err};
use datafusion::datasource::source_as_provider;
use datafusion::logical_expr::{Aggregate, Distinct, Expr, LogicalPlan, Union, Window};
use wire::StreamName;
use wire::schema::TS;

use super::grid::Grid;
use crate::functions::hop::Hop;
use crate::functions::session::Sessions;
use crate::fused_table::LiveTable;
use crate::volatile;

mod join;

/// Aggregates whose answer depends on the order that rows come in, unless they are told one.
const ORDERED: [&str; 5] = ["array_agg", "string_agg", "first_value", "last_value", "nth_value"];

/// What a name in FROM stands for, beside a stream.
#[derive(Debug, Clone)]
pub(crate) enum Known {
    /// What holds now of a reference table.
    Current,
    /// `_history` of a reference table, over this stream of revisions.
    History(StreamName),
    /// Another view.
    View(ViewSource),
}

/// A view as a source of another.
#[derive(Debug, Clone)]
pub(crate) struct ViewSource {
    pub(crate) name: StreamName,
    pub(crate) changes: StreamName,
    pub(crate) kept: Kept,
}

/// Says what the plan under a name in FROM is, when it is the plan of a view of any kind.
pub(crate) type Look<'a> = &'a (dyn Fn(&str, &LogicalPlan) -> Result<Option<Known>> + Send + Sync);

/// What a question reads and how it is kept.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    /// Streams whose new rows it follows: a view's results among them.
    pub(crate) streams: BTreeSet<StreamName>,
    /// Of these, the views, by the stream of their results.
    pub(crate) views: BTreeMap<StreamName, StreamName>,
    /// Streams of revisions of the reference tables that it joins.
    pub(crate) references: BTreeSet<StreamName>,
    pub(crate) kept: Kept,
}

/// How a view is kept.
#[derive(Debug, Clone)]
pub(crate) enum Kept {
    /// Window by window; the column of the question that holds where the window begins.
    Windows { column: usize, grid: Grid },
    /// Row by row; the column that holds the event time.
    Rows { column: usize },
}

/// What is known of the columns of a node, by index.
#[derive(Debug, Clone, Default)]
struct Flow {
    /// Hold the event time of every source row that a row depends on; or, with `only`, one that lies in their window.
    times: BTreeSet<usize>,
    /// Rows depend on all rows of their window of this grid: a window function went over them. Shorter windows of
    /// `times` say nothing any more.
    only: Option<Grid>,
    /// Hold the beginning of the window, in this grid, of every source row that a row depends on.
    windows: Vec<(usize, Grid)>,
    /// May not be looked at any more.
    hidden: BTreeSet<usize>,
    /// Each row comes from one row of one stream that only grows.
    rows: bool,
    /// Set for a reference table's history that is not joined yet.
    history: Option<History>,
}

/// The columns of a history that say when a revision holds.
#[derive(Debug, Clone, Copy, Default)]
struct History {
    from: Option<usize>,
    to: Option<usize>,
}

/// Looks at the plan of a question.
///
/// # Errors
/// Why it cannot be kept, and what could.
pub(crate) fn of(plan: &LogicalPlan, look: Look<'_>) -> Result<Shape> {
    let mut found = Found { look, shape: Sources::default() };
    let flow = found.flow(plan)?;
    let Sources { streams, views, references } = found.shape;
    if flow.history.is_some() || streams.is_empty() {
        return plan_err!("a view follows a stream: name one after FROM");
    }
    let kept = if flow.rows {
        let ts = plan.schema().index_of_column_by_name(None, TS).filter(|index| flow.times.contains(index));
        let Some(column) = ts else {
            return plan_err!("a view of single rows shows when they were measured: add `ts` to its columns");
        };
        Kept::Rows { column }
    } else {
        let window = flow.windows.into_iter().min_by_key(|(index, grid)| (grid.overlaps(), *index));
        let Some((column, grid)) = window else {
            return plan_err!(
                "the columns of a view must tell the window that a row belongs to: add time_bucket('5 minutes', ts), \
                 window_start of HOP, window_end of SESSION, or whatever it groups by, to its columns"
            );
        };
        Kept::Windows { column, grid }
    };
    Ok(Shape { streams, views, references, kept })
}

#[derive(Default)]
struct Sources {
    streams: BTreeSet<StreamName>,
    views: BTreeMap<StreamName, StreamName>,
    references: BTreeSet<StreamName>,
}

struct Found<'a> {
    look: Look<'a>,
    shape: Sources,
}

impl Found<'_> {
    fn flow(&mut self, plan: &LogicalPlan) -> Result<Flow> {
        match plan {
            LogicalPlan::TableScan(_) => self.scan(plan),
            LogicalPlan::SubqueryAlias(alias) => match (self.look)(alias.alias.table(), &alias.input)? {
                Some(known) => self.known(alias.alias.table(), known, &alias.input),
                None => self.flow(&alias.input),
            },
            LogicalPlan::Filter(filter) => {
                let (flow, schema) = (self.flow(&filter.input)?, filter.input.schema());
                check(&filter.predicate, &flow, schema)?;
                let to = flow.history.and_then(|history| history.to);
                if to.is_some_and(|to| mentions(&filter.predicate, schema, to)) {
                    return plan_err!("valid_to of a reference table changes afterwards: use it in the join only");
                }
                Ok(flow)
            }
            LogicalPlan::Projection(projection) => {
                let flow = self.flow(&projection.input)?;
                flow.through(&projection.expr, projection.input.schema())
            }
            LogicalPlan::Aggregate(aggregate) => {
                let flow = self.flow(&aggregate.input)?;
                flow.aggregated(aggregate)
            }
            LogicalPlan::Window(window) => {
                let flow = self.flow(&window.input)?;
                flow.windowed(window)
            }
            LogicalPlan::Distinct(Distinct::All(input)) => {
                let flow = self.flow(input)?;
                flow.grouped("DISTINCT")
            }
            LogicalPlan::Distinct(Distinct::On(_)) => {
                plan_err!("DISTINCT ON takes whichever row comes first: use first(column, ts) or last(column, ts)")
            }
            LogicalPlan::Join(join) => {
                let (left, right) = (self.flow(&join.left)?, self.flow(&join.right)?);
                join::flow(join, left, right)
            }
            LogicalPlan::Union(union) => self.union(union),
            LogicalPlan::Sort(_) => {
                plan_err!("a view has no order: leave out ORDER BY, and say it where you ask the view")
            }
            LogicalPlan::Limit(_) => {
                plan_err!("a view has no LIMIT: which rows are first changes with every row that comes")
            }
            LogicalPlan::EmptyRelation(_) | LogicalPlan::Values(_) => {
                plan_err!(
                    "a view follows a stream: constants in place of a table are not joined; write them as conditions"
                )
            }
            LogicalPlan::Extension(extension) => {
                if let Some(hop) = extension.node.as_any().downcast_ref::<Hop>() {
                    return self.flow(&hop.input)?.hopped(hop);
                }
                if let Some(sessions) = extension.node.as_any().downcast_ref::<Sessions>() {
                    return self.flow(&sessions.input)?.in_sessions(sessions);
                }
                let name = extension.node.name();
                plan_err!("{name} looks beyond the window of a row: a view joins reference tables by their _history")
            }
            other => plan_err!("a view cannot keep this: {}", other.display()),
        }
    }

    fn scan(&mut self, plan: &LogicalPlan) -> Result<Flow> {
        let LogicalPlan::TableScan(scan) = plan else { return plan_err!("no table") };
        let name = scan.table_name.table();
        let provider = source_as_provider(&scan.source)?;
        let Some(stream) = provider.downcast_ref::<LiveTable>().and_then(LiveTable::stream) else {
            return plan_err!(
                "{name} cannot be followed: a view reads streams, other views, and reference tables by their _history"
            );
        };
        self.shape.streams.insert(stream.clone());
        let ts = scan.projected_schema.index_of_column_by_name(None, TS);
        Ok(Flow { times: ts.into_iter().collect(), rows: true, ..Flow::default() })
    }

    fn known(&mut self, name: &str, known: Known, plan: &LogicalPlan) -> Result<Flow> {
        match known {
            Known::Current => plan_err!(
                "{name} is what holds now, and changes by itself: join {name}_history by event time: \
                 ON … AND t.ts >= s.valid_from AND (s.valid_to IS NULL OR t.ts < s.valid_to)"
            ),
            Known::History(stream) => {
                self.shape.references.insert(stream);
                let column = |name: &str| plan.schema().index_of_column_by_name(None, name);
                let history = History { from: column("valid_from"), to: column("valid_to") };
                Ok(Flow { history: Some(history), ..Flow::default() })
            }
            Known::View(view) => {
                self.shape.streams.insert(view.changes.clone());
                self.shape.views.insert(view.changes, view.name);
                // Its rows stand where their windows begin, however long these are, or where sessions end.
                let (column, windows, rows) = match view.kept {
                    Kept::Windows { column, grid } => (column, grid.slots(), false),
                    Kept::Rows { column } => (column, None, true),
                };
                let windows = windows.into_iter().map(|slots| (column, slots)).collect();
                Ok(Flow { times: BTreeSet::from([column]), windows, rows, ..Flow::default() })
            }
        }
    }

    fn union(&mut self, union: &Union) -> Result<Flow> {
        let mut all: Option<Flow> = None;
        for input in &union.inputs {
            let mut flow = self.flow(input)?;
            if flow.history.is_some() {
                return plan_err!("a reference table is joined by event time, and not part of a UNION");
            }
            flow.rows = false;
            all = Some(match all {
                None => flow,
                Some(mut all) => {
                    if all.only.is_some() && flow.only.is_some() && all.only != flow.only {
                        all.times.clear();
                    }
                    all.only = all.only.or(flow.only);
                    all.times.retain(|index| flow.times.contains(index));
                    all.windows.retain(|window| flow.windows.contains(window));
                    all.hidden.extend(flow.hidden);
                    all
                }
            });
        }
        all.map_or_else(|| plan_err!("a UNION of nothing"), Ok)
    }
}

impl Flow {
    /// The window that an expression is the beginning of.
    fn window_of(&self, expr: &Expr, schema: &DFSchema) -> Option<Grid> {
        match expr {
            Expr::Alias(alias) => self.window_of(&alias.expr, schema),
            Expr::Column(column) => {
                let index = schema.maybe_index_of_column(column)?;
                self.windows.iter().find(|(known, _)| *known == index).map(|(_, grid)| grid.clone())
            }
            Expr::ScalarFunction(function) => {
                let grid = Grid::of(function)?;
                let is_time = self.is_time(Grid::time(function)?, schema);
                (is_time && self.only.as_ref().is_none_or(|only| *only == grid)).then_some(grid)
            }
            _ => None,
        }
    }

    /// Whether an expression is one of the columns of event times.
    fn is_time(&self, expr: &Expr, schema: &DFSchema) -> bool {
        column_of(expr, schema).is_some_and(|index| self.times.contains(&index))
    }

    /// Whether an expression is the event time of all source rows.
    fn is_own_time(&self, expr: &Expr, schema: &DFSchema) -> bool {
        self.only.is_none() && self.is_time(expr, schema)
    }

    /// What is known of columns that are computed so.
    fn through(&self, columns: &[Expr], schema: &DFSchema) -> Result<Self> {
        let mut next = Self { rows: self.rows, only: self.only.clone(), ..Self::default() };
        if let Some(history) = self.history {
            let at = |wanted: Option<usize>| {
                let is = |expr: &Expr| column_of(expr, schema).is_some_and(|index| Some(index) == wanted);
                wanted.and_then(|_| columns.iter().position(is))
            };
            next.history = Some(History { from: at(history.from), to: at(history.to) });
            let to = next.history.and_then(|history| history.to);
            for (index, expr) in columns.iter().enumerate().filter(|(index, _)| Some(*index) != to) {
                check(expr, self, schema)?;
                if history.to.is_some_and(|to| mentions(expr, schema, to)) {
                    return plan_err!(
                        "valid_to of a reference table changes afterwards: use it in the join only, column {index}"
                    );
                }
            }
            return Ok(next);
        }
        for (index, expr) in columns.iter().enumerate() {
            check(expr, self, schema)?;
            if let Some(grid) = self.window_of(expr, schema) {
                next.windows.push((index, grid));
            }
            if self.is_time(expr, schema) {
                next.times.insert(index);
            }
        }
        Ok(next)
    }

    /// Each row in every window of these that its time lies in.
    fn hopped(mut self, hop: &Hop) -> Result<Self> {
        if self.history.is_some() {
            return plan_err!("a view follows a stream: HOP takes its event time");
        }
        // Of two columns of such windows, which of them a row depends on could not be told by their grid alone.
        if !self.is_own_time(&hop.time, hop.input.schema()) || self.windows.iter().any(|(_, grid)| grid.overlaps()) {
            return plan_err!("HOP takes the event time of a stream, once: HOP(traffic, ts, …)");
        }
        self.windows.push((hop.input.schema().fields().len(), Grid::from(hop.windows.clone())));
        Ok(Self { rows: false, ..self })
    }

    /// Each row in its session: it depends on others of its key, and with all of them on none that ends at another moment.
    fn in_sessions(self, sessions: &Sessions) -> Result<Self> {
        let schema = sessions.input.schema();
        if self.history.is_some() {
            return plan_err!("a view follows a stream: SESSION takes its event time");
        }
        if !self.is_own_time(&sessions.time, schema) {
            return plan_err!("SESSION takes the event time of a stream: SESSION(traffic, ts, …)");
        }
        for key in &sessions.keys {
            check(key, &self, schema)?;
        }
        let windows = vec![(sessions.end(), Grid::from(sessions.silence))];
        Ok(Self { windows, hidden: self.hidden, ..Self::default() })
    }

    fn aggregated(&self, aggregate: &Aggregate) -> Result<Self> {
        let schema = aggregate.input.schema();
        if self.history.is_some() {
            return plan_err!("a reference table is joined by event time before anything is counted of it");
        }
        if aggregate.group_expr.iter().any(|expr| matches!(expr, Expr::GroupingSet(_))) {
            return plan_err!(
                "ROLLUP, CUBE and GROUPING SETS have rows without a window: make a view for each of them"
            );
        }
        for expr in &aggregate.aggr_expr {
            check(expr, self, schema)?;
        }
        let next = self.through(&aggregate.group_expr, schema)?;
        next.grouped("an aggregate")
    }

    fn windowed(&self, window: &Window) -> Result<Self> {
        let schema = window.input.schema();
        if self.history.is_some() {
            return plan_err!("a reference table is joined by event time before anything is counted of it");
        }
        let mut only = self.only.clone();
        for expr in &window.window_expr {
            check(expr, self, schema)?;
            let mut inner = expr;
            while let Expr::Alias(alias) = inner {
                inner = &alias.expr;
            }
            let Expr::WindowFunction(function) = inner else {
                return plan_err!("a window function of an unknown kind: {expr}");
            };
            let partition = &function.params.partition_by;
            if partition.iter().any(|expr| self.is_own_time(expr, schema)) {
                continue;
            }
            let grid = partition.iter().find_map(|expr| self.window_of(expr, schema));
            if only.is_some() && only != grid {
                return plan_err!("window functions of one question have PARTITION BY windows of one size");
            }
            let Some(grid) = grid else {
                return plan_err!(
                    "{} goes over rows of all times: add PARTITION BY time_bucket('5 minutes', ts)",
                    function.fun.name()
                );
            };
            only = Some(grid);
        }
        // A row depends on all rows of the window now: shorter windows, which it lies in too, do not hold them.
        let windows = self.windows.iter().filter(|(_, grid)| only.as_ref().is_none_or(|only| only == grid));
        Ok(Self { rows: false, windows: windows.cloned().collect(), only, ..self.clone() })
    }

    /// What is left when rows become one that agree in all columns that are known.
    fn grouped(self, what: &str) -> Result<Self> {
        if self.windows.is_empty() && self.times.is_empty() {
            if self.only.is_some() {
                return plan_err!("{what} over a window function must be by the window that this is partitioned by");
            }
            return plan_err!(
                "{what} goes over rows of all times: add time_bucket('5 minutes', ts), or window_end of SESSION, to GROUP BY"
            );
        }
        Ok(Self { rows: false, ..self })
    }
}

/// The column that an expression is, whatever it is called.
fn column_of(expr: &Expr, schema: &DFSchema) -> Option<usize> {
    match expr {
        Expr::Alias(alias) => column_of(&alias.expr, schema),
        Expr::Column(column) => schema.maybe_index_of_column(column),
        _ => None,
    }
}

fn mentions(expr: &Expr, schema: &DFSchema, index: usize) -> bool {
    expr.column_refs().iter().any(|column| schema.maybe_index_of_column(column) == Some(index))
}

/// Refuses what has another answer each time it is asked, and what asks other tables.
fn check(expr: &Expr, flow: &Flow, schema: &DFSchema) -> Result<()> {
    if let Some(index) = flow.hidden.iter().find(|index| mentions(expr, schema, **index)) {
        return plan_err!(
            "{} changes afterwards, when a later revision comes: use it in the join of the reference table only",
            schema.field(*index).name()
        );
    }
    expr.apply(|expr| {
        match expr {
            Expr::AggregateFunction(function) => {
                let name = function.func.name();
                if ORDERED.contains(&name) && function.params.order_by.is_empty() {
                    return plan_err!("{name} depends on the order of rows: write {name}(… ORDER BY ts)");
                }
            }
            Expr::ScalarSubquery(_) | Expr::Exists(_) | Expr::InSubquery(_) | Expr::SetComparison(_) => {
                return plan_err!(
                    "a question within a question has rows of all times: write it as a join on the window"
                );
            }
            Expr::OuterReferenceColumn(..) => {
                return plan_err!("a LATERAL join has rows of all times: write it as a join on the window");
            }
            Expr::Placeholder(_) => return plan_err!("a view has no parameters"),
            _ => {}
        }
        if let Some((name, _)) = volatile::call(expr) {
            return plan_err!("{name}() has another answer each time it is asked: a view is made of event times");
        }
        Ok::<_, DataFusionError>(TreeNodeRecursion::Continue)
    })?;
    Ok(())
}
