//! What rules find becomes rows of `alerts`, in the order in which it was found, and is handed on to be published.

#[cfg(test)]
mod tests;

use segment_log::Position;
use wire::TS_MIN_US;

use super::output::Cell;
use super::{GOOD, Pipeline};
use crate::decode::{Reading, Value};
use crate::rules::{InputId, Of, RuleStatus, Rules, Transition, When};
use crate::validate::Absence;
use crate::window::WindowRow;

impl Pipeline {
    /// A reading that was accepted, for the rules on its stream.
    pub(super) fn judge_reading(&mut self, position: Position, stream: usize, reading: &Reading) {
        let rules = self.streams[stream].rules;
        self.ask_rules(position, rules, Of::device(&reading.device), (reading.ts, reading.ts), &reading.values);
    }

    /// A device that became absent or came back, for the rules on that. Columns: those of its schema without times.
    pub(super) fn judge_absence(&mut self, position: Position, stream: usize, absence: &Absence, every_s: f64) {
        if let rules @ Some(_) = self.streams[stream].absent_rules {
            let values = [Some(Value::Text(absence.state.to_owned())), Some(Value::Float(every_s))];
            self.ask_rules(position, rules, Of::device(&absence.device), (absence.ts, absence.ts), &values);
        }
    }

    /// Windows that closed, for the rules on them. Columns: count, what they are grouped by, the aggregates, revision.
    pub(super) fn judge_windows(&mut self, position: Position, stream: usize, rows: Vec<WindowRow>) {
        for row in rows {
            let rules @ Some(_) = self.streams[stream].window_rules[row.window] else { continue };
            let mut values = row.values;
            values.insert(0, Some(Value::Int(row.count)));
            values.push(Some(Value::Int(row.revision)));
            let of = Of { device: &row.device, group: row.group.as_deref() };
            self.ask_rules(position, rules, of, (row.start, row.end), &values);
        }
    }

    /// A row of any stream, for the rules on it, if there are any. It came with the entry that is applied.
    fn ask_rules(
        &mut self,
        position: Position,
        rules: Option<InputId>,
        of: Of<'_>,
        (from, to): (i64, i64),
        values: &[Option<Value>],
    ) {
        if let Some(input) = rules {
            let when = When { from, to, arrival: self.rules.now() };
            self.rules.row(input, of, when, values);
            self.write_alerts(position);
        }
    }

    pub(super) fn write_alerts(&mut self, position: Position) {
        for alert in self.rules.take() {
            let output = &mut self.outputs[self.alerts];
            self.counters.stream(&output.stream).rows += 1;
            if position >= output.skip_before {
                let before = output.bytes();
                let cells = [
                    Cell::Text(&alert.rule),
                    Cell::Text(&alert.rule_hash),
                    Cell::Text(&alert.id),
                    Cell::Text(alert.turn.word()),
                    Cell::Text(alert.severity),
                    Cell::Text(&alert.stream),
                    Cell::Text(&alert.labels),
                    Cell::Text(&alert.message),
                    Cell::Time(alert.from.max(TS_MIN_US)),
                    alert.to.map_or(Cell::Null, |to| Cell::Time(to.max(TS_MIN_US))),
                ];
                output.push(alert.ts.max(TS_MIN_US), Some(&alert.device), cells.into_iter(), GOOD);
                self.pending_rows += 1;
                self.pending_bytes += output.bytes() - before;
            }
            if alert.is_told() {
                self.to_publish.push(alert);
            }
        }
    }

    /// What is to be published since it was last asked: after each entry, or it is forgotten at the next.
    pub fn take_alerts(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.to_publish)
    }

    /// What fires, published or not.
    pub fn firing(&self) -> impl Iterator<Item = Transition> {
        self.rules.firing()
    }

    /// What fires and was published.
    pub fn published(&self) -> Vec<Transition> {
        self.firing().filter(Transition::is_told).collect()
    }

    /// The rules as they stand.
    pub fn rules(&self) -> impl Iterator<Item = RuleStatus<'_>> {
        Rules::status(&self.rules)
    }
}
