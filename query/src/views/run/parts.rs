//! Windows that are asked more than once, while they are open or because of late rows: only what is new of them is computed.

use std::sync::Arc;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_select::concat::concat_batches;
use arrow_select::filter::filter_record_batch;
use datafusion::common::exec_err;
use wire::StreamName;

use super::{Runner, Seen, ViewError, times};
use crate::engine::{Parts, Question};
use crate::follow::{self, Position};
use crate::fused_table::gap::Filling;
use crate::views::intervals::Intervals;

/// Windows of one piece that are computed so, and that new rows come to at a time: of more, the rows are read together.
const WINDOWS_MAX: usize = 64;
/// Of what new rows are joined with; of more it is not computed so.
const SIDES_BYTES_MAX: usize = 16 << 20;

/// The rows of what new rows are joined with.
pub(super) type Sides = Arc<Vec<Vec<RecordBatch>>>;

impl Runner {
    /// What is new of a stream comes to the windows that are held. Those that it cannot come to are held no longer.
    pub(super) async fn take_in(
        &mut self,
        seen: &Seen,
        stream: &StreamName,
        before: &Position,
        touched: &Intervals,
    ) -> Result<(), ViewError> {
        let (held, view) = (self.partials.held(touched), Arc::clone(&self.view));
        let (Some(parts), Some(frozen), false) = (&view.parts, seen.states.get(stream), held.is_empty()) else {
            return Ok(());
        };
        let Some(sides) = self.sides(parts, seen).await? else {
            held.into_iter().for_each(|start| self.partials.forget(start));
            return Ok(());
        };
        let mut unread = None;
        if held.len() <= WINDOWS_MAX {
            let rows = follow::in_memory(&self.engine, stream, frozen, before, parts.columns()).await;
            let rows = rows.map_err(|error| self.engine.explain(error))?;
            unread = rows.map(|rows| rows.into_iter().map(|unread| unread.rows).collect::<Vec<_>>());
        }
        for start in held {
            let Some(unread) = &unread else {
                self.partials.forget(start);
                continue;
            };
            let until = self.state.grid().until(start);
            let Some(rows) = between(unread, start, until)? else { continue };
            let states = {
                let (parts, sides) = (parts.clone(), Arc::clone(&sides));
                Question::Ready(Box::new(move |_| parts.states(&Filling::Rows(&rows), start, &sides)))
            };
            match self.asked(states, seen).await {
                Ok(states) => {
                    if self.partials.add(start, states) {
                        self.merge(parts, start, seen).await?;
                    }
                }
                Err(ViewError::Query(error)) if error.is_too_much() => self.partials.forget(start),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What new rows are joined with, as long as the reference tables stay as they are; None when that is too much.
    async fn sides(&mut self, parts: &Parts, seen: &Seen) -> Result<Option<Sides>, ViewError> {
        let at = |stream| seen.states.get(stream).map(|frozen| frozen.position().clone());
        let positions: Vec<Option<Position>> = self.view.shape.references.iter().map(at).collect();
        if self.sides.as_ref().is_none_or(|(known, _)| *known != positions) {
            let mut sides = Vec::with_capacity(parts.sides());
            for index in 0..parts.sides() {
                let parts = parts.clone();
                match self.asked(Question::Ready(Box::new(move |states| parts.side(index, states))), seen).await {
                    Ok(rows) => sides.push(rows),
                    Err(ViewError::Query(error)) if error.is_too_much() => break,
                    Err(error) => return Err(error),
                }
            }
            let is_all = sides.len() == parts.sides() && bytes(&sides) <= SIDES_BYTES_MAX;
            self.sides = Some((positions, is_all.then(|| Arc::new(sides))));
        }
        Ok(self.sides.as_ref().and_then(|(_, sides)| sides.clone()))
    }

    /// What was computed of windows that a reference table says something else about, from this time on.
    pub(super) fn changed_from(&mut self, from: i64) {
        for start in self.partials.held(&Intervals::of(i64::MIN, i64::MAX)) {
            if self.state.grid().until(start) > from {
                self.partials.forget(start);
            }
        }
    }

    async fn merge(&mut self, parts: &Parts, start: i64, seen: &Seen) -> Result<(), ViewError> {
        let Some(states) = self.partials.states(start).map(<[_]>::to_vec) else { return Ok(()) };
        let parts = parts.clone();
        let merged = self.asked(Question::Ready(Box::new(move |_| parts.merged(&states))), seen).await?;
        self.partials.hold(start, merged);
        Ok(())
    }

    /// The answer for those windows of a piece that are asked more than once, and what is left of the piece.
    pub(super) async fn by_parts(
        &mut self,
        piece: &Intervals,
        seen: &Seen,
    ) -> Result<(Vec<RecordBatch>, Intervals), ViewError> {
        let view = Arc::clone(&self.view);
        let mut rest = piece.clone();
        let (Some(parts), Some(stream)) = (&view.parts, view.shape.streams.first()) else {
            return Ok((Vec::new(), rest));
        };
        let again = self.again(piece);
        if again.is_empty() {
            return Ok((Vec::new(), rest));
        }
        let Some(sides) = self.sides(parts, seen).await? else { return Ok((Vec::new(), rest)) };
        let mut all = Vec::new();
        for (from, to) in again {
            if self.partials.states(from).is_none() {
                let times = self.state.grid().rows(&Intervals::of(from, to));
                let (parts, stream, sides) = (parts.clone(), stream.clone(), Arc::clone(&sides));
                let states = Question::Ready(Box::new(move |states| match states.get(&stream) {
                    Some(frozen) => parts.states(&Filling::Part(frozen, &times), from, &sides),
                    None => exec_err!("{stream} was not frozen"),
                }));
                let states = self.asked(states, seen).await?;
                self.partials.hold(from, states);
            }
            if let Some(states) = self.partials.states(from) {
                all.extend_from_slice(states);
                rest.remove(from, to);
            }
        }
        if all.is_empty() {
            return Ok((Vec::new(), rest));
        }
        let parts = parts.clone();
        let answer = self.asked(Question::Ready(Box::new(move |states| parts.answer(&all, states))), seen).await?;
        Ok((answer, rest))
    }

    /// The slots of a piece that are open, or were told before; the first so many. What is past is asked once.
    fn again(&mut self, piece: &Intervals) -> Vec<(i64, i64)> {
        let closing = self.state.closing().unwrap_or(i64::MIN);
        let mut again = Vec::new();
        for (from, to) in piece.iter() {
            let mut at = from;
            while at < to && again.len() < WINDOWS_MAX {
                let slot = self.state.grid().slot(at);
                let is_open = slot.1 > closing;
                if (is_open || self.emitted.has(slot.0)) && !self.state.left().1.contains(slot.0) {
                    again.push(slot);
                }
                at = slot.1;
            }
        }
        again
    }
}

/// The rows of these batches with times in `[from, to)`, if there are any.
fn between(batches: &[RecordBatch], from: i64, to: i64) -> Result<Option<RecordBatch>, ViewError> {
    let mut parts = Vec::new();
    for rows in batches {
        let among: BooleanArray = times(rows).map(|at| Some((from..to).contains(&at))).collect();
        let part = filter_record_batch(rows, &among).map_err(ViewError::table)?;
        parts.extend((part.num_rows() > 0).then_some(part));
    }
    let Some(first) = parts.first() else { return Ok(None) };
    concat_batches(&first.schema(), &parts).map(Some).map_err(ViewError::table)
}

pub(super) fn bytes(sides: &[Vec<RecordBatch>]) -> usize {
    sides.iter().flatten().map(RecordBatch::get_array_memory_size).sum()
}
