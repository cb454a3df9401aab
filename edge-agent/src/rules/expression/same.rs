//! Several expressions that must have one type: the sides of a comparison, a list, the results of a CASE. int64 beside
//! float64 becomes float64, as DataFusion does.

use super::{Any, Bool, Compare, Float, Int, Relation, Text};

/// Expressions of one type, as many as there were.
pub(super) enum Same {
    Int(Vec<Option<Int>>),
    Float(Vec<Option<Float>>),
    Bool(Vec<Option<Bool>>),
    Text(Vec<Option<Text>>),
}

impl Same {
    /// Of expressions that go together.
    pub(super) fn new(read: Vec<Option<Any>>) -> Self {
        macro_rules! take {
            ($kind:ident) => {
                Self::$kind(
                    read.into_iter()
                        .map(|any| {
                            any.map(|any| if let Any::$kind(node) = any { node } else { unreachable!("checked") })
                        })
                        .collect(),
                )
            };
        }
        if read.iter().flatten().any(|any| matches!(any, Any::Float(_))) {
            return Self::Float(read.into_iter().map(|any| any.map(float)).collect());
        }
        match read.iter().flatten().next() {
            Some(Any::Int(_)) => take!(Int),
            Some(Any::Bool(_)) => take!(Bool),
            _ => take!(Text),
        }
    }
}

pub(super) fn float(any: Any) -> Float {
    match any {
        Any::Float(node) => node,
        Any::Int(Int::Literal(value)) => Float::Literal(value as f64),
        Any::Int(node) => Float::Of(Box::new(node)),
        Any::Bool(_) | Any::Text(_) => unreachable!("only numbers become float64"),
    }
}

/// A comparison of the first with the second.
pub(super) fn compared(same: Same, relation: Relation) -> Bool {
    fn of<N>(pair: Vec<Option<N>>, relation: Relation) -> Box<Compare<N>> {
        let mut pair = pair.into_iter().flatten();
        let (left, right) = pair.next().zip(pair.next()).expect("a comparison has two sides");
        Box::new(Compare { relation, left, right })
    }
    match same {
        Same::Int(pair) => Bool::CompareInt(of(pair, relation)),
        Same::Float(pair) => Bool::CompareFloat(of(pair, relation)),
        Same::Bool(pair) => Bool::CompareTruth(of(pair, relation)),
        Same::Text(pair) => Bool::CompareText(of(pair, relation)),
    }
}

/// From [x, low, high] and [x] the pairs [x, low] and [x, high].
pub(super) fn split(all: Same, again: Same) -> (Same, Same) {
    macro_rules! pairs {
        ($kind:ident, $all:ident, $again:ident) => {{
            let high = $all.pop().expect("three");
            $again.push(high);
            (Same::$kind($all), Same::$kind($again))
        }};
    }
    match (all, again) {
        (Same::Int(mut all), Same::Int(mut again)) => pairs!(Int, all, again),
        (Same::Float(mut all), Same::Float(mut again)) => pairs!(Float, all, again),
        (Same::Bool(mut all), Same::Bool(mut again)) => pairs!(Bool, all, again),
        (Same::Text(mut all), Same::Text(mut again)) => pairs!(Text, all, again),
        _ => unreachable!("the same expression has the same type"),
    }
}

/// From [x, a, b, …] and as many [x] the pairs [x, a], [x, b], …, each with what goes before it.
pub(super) fn split_all(all: Same, again: impl Iterator<Item = (Bool, Same)>) -> Vec<(Bool, Same)> {
    macro_rules! pairs {
        ($kind:ident, $all:ident) => {
            again
                .zip($all.into_iter().skip(1))
                .map(|((before, again), item)| {
                    let Same::$kind(mut pair) = again else { unreachable!("the same expression has the same type") };
                    pair.push(item);
                    (before, Same::$kind(pair))
                })
                .collect()
        };
    }
    match all {
        Same::Int(all) => pairs!(Int, all),
        Same::Float(all) => pairs!(Float, all),
        Same::Bool(all) => pairs!(Bool, all),
        Same::Text(all) => pairs!(Text, all),
    }
}
