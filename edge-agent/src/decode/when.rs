//! Which readings are meant: those that satisfy all conditions of the source's `when`. The others are counted as filtered.

use super::scalar::{NUMBER_BYTES_MAX, Scalar};
use super::{Found, Origin};
use crate::config::{Constant, Place, Test, When};

/// The conditions of a source.
#[derive(Debug)]
pub(super) struct Filter(Vec<(Origin, Test)>);

impl Filter {
    pub(super) fn new(when: &When, origin: &mut impl FnMut(&Place) -> Origin) -> Self {
        Self(when.0.iter().map(|condition| (origin(&condition.at), condition.test.clone())).collect())
    }

    pub(super) fn passes(&self, found: &Found<'_>) -> bool {
        self.0.iter().all(|(origin, test)| {
            let value = found.at(origin);
            match test {
                Test::Is(constant) => equals(&value, constant),
                Test::IsNot(constant) => !equals(&value, constant),
                Test::AnyOf(constants) => constants.iter().any(|constant| equals(&value, constant)),
                Test::Above(limit) => number(&value).is_some_and(|value| value > *limit),
                Test::Below(limit) => number(&value).is_some_and(|value| value < *limit),
                Test::Exists(expected) => (value != Scalar::Null) == *expected,
            }
        })
    }
}

/// A number that is written as text, as in a topic or in CSV, is one.
fn number(value: &Scalar<'_>) -> Option<f64> {
    match value {
        Scalar::Text(text) if text.len() > NUMBER_BYTES_MAX => None,
        Scalar::Text(text) => text.parse().ok(),
        other => other.number(),
    }
}

fn equals(value: &Scalar<'_>, constant: &Constant) -> bool {
    match (value, constant) {
        (Scalar::Text(text), Constant::Text(constant)) => text == constant,
        (Scalar::Text(text), Constant::Bool(constant)) => text.parse() == Ok(*constant),
        (Scalar::Bool(value), Constant::Bool(constant)) => value == constant,
        (value, Constant::Number(constant)) => number(value) == Some(*constant),
        _ => false,
    }
}
