//! What is known of the columns of a join.
//!
//! Two sides that follow streams must equate their windows or their event times: then all source rows of a joined row lie
//! in one window. A side that may be missing keeps nothing. A reference table's history is joined so that a row meets the
//! revision of its own time: `time >= valid_from AND (valid_to IS NULL OR time < valid_to)`.

use datafusion::common::{Column, DFSchema, JoinType, Result, plan_err};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr, Join, Operator};

use super::{Flow, History, check, mentions};
use crate::views::grid::Grid;

const BY_TIME: &str = "a reference table is joined by event time: \
                       ON … AND t.ts >= s.valid_from AND (s.valid_to IS NULL OR t.ts < s.valid_to)";

/// See the module.
pub(super) fn flow(join: &Join, left: Flow, right: Flow) -> Result<Flow> {
    if matches!(join.join_type, JoinType::LeftMark | JoinType::RightMark) {
        return plan_err!("a question within a question has rows of all times: write it as a join on the window");
    }
    let (schema_left, schema_right) = (join.left.schema(), join.right.schema());
    for (of_left, of_right) in &join.on {
        check(of_left, &left, schema_left)?;
        check(of_right, &right, schema_right)?;
    }
    if let Some(filter) = &join.filter {
        let both = schema_left.join(schema_right)?;
        check(filter, &shifted(&left, &right, schema_left), &both)?;
    }
    match (left.history, right.history) {
        (None, None) => streams(join, left, right),
        (None, Some(history)) => match join.join_type {
            JoinType::Inner | JoinType::Left => reference(join, left, history, true),
            _ => plan_err!("a reference table is joined to a stream by JOIN or LEFT JOIN"),
        },
        (Some(history), None) => match join.join_type {
            JoinType::Inner | JoinType::Right => reference(join, right, history, false),
            _ => plan_err!("a reference table is joined to a stream by JOIN or LEFT JOIN"),
        },
        (Some(_), Some(_)) => plan_err!("a view follows a stream: join each reference table to it"),
    }
}

/// What may not be looked at, of both sides behind each other.
fn shifted(left: &Flow, right: &Flow, schema_left: &DFSchema) -> Flow {
    let by = schema_left.fields().len();
    let hidden = left.hidden.iter().copied().chain(right.hidden.iter().map(|index| index + by)).collect();
    Flow { hidden, ..Flow::default() }
}

/// What a join says of its two sides: expressions of the left one with those of the right one that they equal.
fn equated(join: &Join) -> Vec<(&Expr, &Expr)> {
    let mut pairs: Vec<(&Expr, &Expr)> = join.on.iter().map(|(left, right)| (left, right)).collect();
    let of = |expr: &Expr, schema: &DFSchema| {
        let columns = expr.column_refs();
        !columns.is_empty() && columns.iter().all(|column| schema.maybe_index_of_column(column).is_some())
    };
    for condition in join.filter.iter().flat_map(split_conjunction) {
        let Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) = condition else { continue };
        if of(left, join.left.schema()) && of(right, join.right.schema()) {
            pairs.push((left, right));
        } else if of(right, join.left.schema()) && of(left, join.right.schema()) {
            pairs.push((right, left));
        }
    }
    pairs
}

fn streams(join: &Join, left: Flow, right: Flow) -> Result<Flow> {
    let (schema_left, schema_right) = (join.left.schema(), join.right.schema());
    let (mut same_time, mut same_windows) = (false, Vec::<Grid>::new());
    for (of_left, of_right) in equated(join) {
        same_time |= left.is_own_time(of_left, schema_left) && right.is_own_time(of_right, schema_right);
        let windows = (left.window_of(of_left, schema_left), right.window_of(of_right, schema_right));
        if let (Some(of_left), Some(of_right)) = windows
            && of_left == of_right
        {
            same_windows.push(of_left);
        }
    }
    if !same_time && same_windows.is_empty() {
        return plan_err!(
            "this join has rows of all times on both sides: add the window to its conditions, \
             ON a.window = b.window AND …, with windows of one size"
        );
    }
    // With equal times every window of either side holds for both, though each may be in another of those that overlap;
    // otherwise only that which they share.
    let holds = |grid: &Grid| same_time && !grid.overlaps() || same_windows.contains(grid);
    let keep = |flow: Flow| Flow {
        times: if same_time { flow.times } else { Default::default() },
        windows: flow.windows.into_iter().filter(|(_, grid)| holds(grid)).collect(),
        rows: false,
        ..flow
    };
    let (mut left, mut right) = (keep(left), keep(right));
    let by = schema_left.fields().len();
    right.times = right.times.into_iter().map(|index| index + by).collect();
    right.windows.iter_mut().for_each(|(index, _)| *index += by);
    right.hidden = right.hidden.into_iter().map(|index| index + by).collect();
    Ok(match join.join_type {
        JoinType::Inner => {
            left.times.extend(right.times);
            left.windows.extend(right.windows);
            left.hidden.extend(right.hidden);
            left
        }
        JoinType::Left => {
            left.hidden.extend(right.hidden);
            left
        }
        JoinType::Right => {
            right.hidden.extend(left.hidden);
            right
        }
        JoinType::LeftSemi | JoinType::LeftAnti => left,
        JoinType::RightSemi | JoinType::RightAnti => {
            right.times = right.times.into_iter().map(|index| index - by).collect();
            right.windows.iter_mut().for_each(|(index, _)| *index -= by);
            right.hidden = right.hidden.into_iter().map(|index| index - by).collect();
            right
        }
        _ => {
            return plan_err!(
                "either side of a FULL JOIN may lack the window: use UNION ALL of both sides and an aggregate over it"
            );
        }
    })
}

/// A stream with a reference table, which is on the right when `right`.
fn reference(join: &Join, mut stream: Flow, history: History, right: bool) -> Result<Flow> {
    let History { from: Some(from), to: Some(to) } = history else { return plan_err!("{BY_TIME}") };
    let (of_stream, of_history) =
        if right { (join.left.schema(), join.right.schema()) } else { (join.right.schema(), join.left.schema()) };
    let is = |expr: &Expr, index: usize| matches!(expr, Expr::Column(column) if resolves(column, of_history, of_stream) == Some(index));
    let time = |expr: &Expr| match expr {
        Expr::Column(column) => of_stream
            .maybe_index_of_column(column)
            .filter(|index| stream.times.contains(index) || stream.windows.iter().any(|(window, _)| window == index)),
        _ => None,
    };
    let (mut since, mut until) = (None, None);
    for condition in join.filter.iter().flat_map(split_conjunction) {
        if let Some((later, earlier, false)) = ordered(condition)
            && is(earlier, from)
            && let Some(index) = time(later)
        {
            since = Some(index);
            continue;
        }
        // valid_to IS NULL OR time < valid_to, either way round.
        if let Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) = condition {
            let open = |expr: &Expr| matches!(expr, Expr::IsNull(inner) if is(inner, to));
            let within = |expr: &Expr| match ordered(expr) {
                Some((later, earlier, true)) if is(later, to) => time(earlier),
                _ => None,
            };
            let found = if open(left) { within(right) } else { within(left).filter(|_| open(right)) };
            if found.is_some() {
                until = found;
                continue;
            }
        }
        let columns = condition.column_refs();
        if columns.iter().any(|column| resolves(column, of_history, of_stream) == Some(to)) {
            return plan_err!("{BY_TIME}; and nothing else of valid_to");
        }
    }
    let equal_ends =
        join.on.iter().any(|(left, on_right)| mentions(if right { on_right } else { left }, of_history, to));
    if since.is_none() || since != until || equal_ends {
        return plan_err!("{BY_TIME}");
    }
    let (by_stream, by_history) = if right { (0, of_stream.fields().len()) } else { (of_history.fields().len(), 0) };
    stream.times = stream.times.into_iter().map(|index| index + by_stream).collect();
    stream.windows.iter_mut().for_each(|(index, _)| *index += by_stream);
    stream.hidden = stream.hidden.into_iter().map(|index| index + by_stream).collect();
    stream.hidden.insert(to + by_history);
    stream.rows = false;
    Ok(stream)
}

/// The column of a history that a name stands for, unless it is one of the stream.
fn resolves(column: &Column, history: &DFSchema, stream: &DFSchema) -> Option<usize> {
    history.maybe_index_of_column(column).filter(|_| stream.maybe_index_of_column(column).is_none())
}

/// The later and the earlier side of a comparison, and whether it is strict.
fn ordered(expr: &Expr) -> Option<(&Expr, &Expr, bool)> {
    let Expr::BinaryExpr(BinaryExpr { left, op, right }) = expr else { return None };
    match op {
        Operator::GtEq => Some((left, right, false)),
        Operator::LtEq => Some((right, left, false)),
        Operator::Gt => Some((left, right, true)),
        Operator::Lt => Some((right, left, true)),
        _ => None,
    }
}
