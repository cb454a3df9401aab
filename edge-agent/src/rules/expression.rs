//! SQL expressions over one row: what `when` and `until` of a rule say, with the meaning that DataFusion gives the words.
//!
//! [`Expression::parse`] reads a text against the columns of a stream (`expression/parse.rs`) and refuses what it does not
//! know, with the place. What is left has types, so a row is evaluated without looking at any: one enum for each type of
//! result. Row by row and not with Arrow's kernels: a rule sees one reading at a time, and building one-row arrays costs
//! more than the whole expression (`examples/rules_cost.rs`: below 0.1 µs, where a single kernel call takes as long).
//!
//! The meaning, held to DataFusion's by `tests/rules.rs`: NULL as in SQL (AND and OR stop at the first operand that
//! decides); int64 wraps around, and `/` and `%` by zero, `/` and `abs` beyond int64 fail the row; int64 beside float64
//! becomes float64; floats are ordered as IEEE 754's totalOrder (NaN is equal to itself and above all) but for -0, which is 0.
//! IN and CASE x WHEN compare as `=` does (DataFusion's IN tells -0 from 0 in a list of more than three).

mod parse;
mod refusal;
mod same;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;

use wire::FieldType;

pub use self::parse::{Columns, DEPTH_MAX, NODES_MAX, TEXT_BYTES_MAX};
pub use self::refusal::{NESTING_MAX, Refusal};
use crate::decode::Value;

/// A row, as an expression sees it.
#[derive(Debug, Clone, Copy)]
pub struct Row<'r> {
    pub device: &'r str,
    /// In the order of the columns.
    pub values: &'r [Option<Value>],
    /// Those of the device's row before; empty when there was none.
    pub previous: &'r [Option<Value>],
}

/// Why a row has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    #[error("a division by zero")]
    DivideByZero,
    #[error("a number beyond what an int64 holds")]
    Overflow,
}

/// A result: None is NULL.
pub type Answer<T> = Result<Option<T>, Failed>;

/// A text that was understood.
#[derive(Debug)]
pub struct Expression {
    root: Any,
    previous: Vec<usize>,
}

impl Expression {
    /// Reads a text.
    ///
    /// # Errors
    /// What is not understood, and where.
    pub fn parse(text: &str, columns: &Columns) -> Result<Self, Refusal> {
        parse::parse(text, columns)
    }

    /// The type of its result.
    pub fn kind(&self) -> FieldType {
        match self.root {
            Any::Int(_) => FieldType::Int64,
            Any::Float(_) => FieldType::Float64,
            Any::Bool(_) => FieldType::Bool,
            Any::Text(_) => FieldType::Text,
        }
    }

    /// Which columns it wants of the row before.
    pub fn previous(&self) -> &[usize] {
        &self.previous
    }

    /// Whether a row fits; an expression that is no condition fits none.
    ///
    /// # Errors
    /// When the row makes it fail.
    pub fn test(&self, row: &Row<'_>) -> Answer<bool> {
        match &self.root {
            Any::Bool(node) => node.value(row),
            _ => Ok(None),
        }
    }

    /// The result for a row.
    ///
    /// # Errors
    /// When the row makes it fail.
    pub fn value(&self, row: &Row<'_>) -> Answer<Value> {
        Ok(match &self.root {
            Any::Int(node) => node.value(row)?.map(Value::Int),
            Any::Float(node) => node.value(row)?.map(Value::Float),
            Any::Bool(node) => node.value(row)?.map(Value::Bool),
            Any::Text(node) => node.value(row)?.map(|text| Value::Text(text.to_owned())),
        })
    }
}

/// An expression of any type.
#[derive(Debug)]
enum Any {
    Int(Int),
    Float(Float),
    Bool(Bool),
    Text(Text),
}

/// What gives a value of one type for a row.
trait Node {
    type Value<'r>: Ranked
    where
        Self: 'r;
    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<Self::Value<'r>>;
}

/// An order of values.
trait Ranked: Copy {
    fn rank(self, other: Self) -> Ordering;
}

impl Ranked for i64 {
    fn rank(self, other: Self) -> Ordering {
        self.cmp(&other)
    }
}

impl Ranked for bool {
    fn rank(self, other: Self) -> Ordering {
        self.cmp(&other)
    }
}

impl Ranked for &str {
    fn rank(self, other: Self) -> Ordering {
        self.cmp(other)
    }
}

impl Ranked for f64 {
    /// Adding 0 makes -0 a 0 and leaves all else.
    fn rank(self, other: Self) -> Ordering {
        (self + 0.0).total_cmp(&(other + 0.0))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Relation {
    fn holds(self, order: Ordering) -> bool {
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

/// A column of this row or of the one before.
#[derive(Debug, Clone, Copy)]
enum Place {
    Now(usize),
    Before(usize),
}

impl Place {
    fn get<'r>(self, row: &Row<'r>) -> Option<&'r Value> {
        match self {
            Self::Now(index) => row.values.get(index),
            Self::Before(index) => row.previous.get(index),
        }
        .and_then(Option::as_ref)
    }
}

#[derive(Debug)]
struct Compare<N> {
    relation: Relation,
    left: N,
    right: N,
}

#[derive(Debug)]
struct In<N> {
    needle: N,
    list: Vec<N>,
    negated: bool,
}

/// The first branch whose condition is true; a branch without a result is NULL.
#[derive(Debug)]
struct Case<N> {
    branches: Vec<(Bool, Option<N>)>,
    otherwise: Option<N>,
}

#[derive(Debug)]
enum Int {
    Literal(i64),
    Column(Place),
    Arithmetic(Operation, Box<(Int, Int)>),
    Negative(Box<Int>),
    Absolute(Box<Int>),
    Case(Box<Case<Int>>),
}

#[derive(Debug)]
enum Float {
    Literal(f64),
    Column(Place),
    Of(Box<Int>),
    Arithmetic(Operation, Box<(Float, Float)>),
    Negative(Box<Float>),
    Absolute(Box<Float>),
    Case(Box<Case<Float>>),
}

#[derive(Debug)]
enum Text {
    Literal(String),
    Device,
    Column(Place),
    Case(Box<Case<Text>>),
}

#[derive(Debug)]
enum Bool {
    Literal(bool),
    Column(Place),
    Not(Box<Bool>),
    All(Vec<Bool>),
    AnyOf(Vec<Bool>),
    CompareInt(Box<Compare<Int>>),
    CompareFloat(Box<Compare<Float>>),
    CompareText(Box<Compare<Text>>),
    CompareTruth(Box<Compare<Bool>>),
    InInt(Box<In<Int>>),
    InFloat(Box<In<Float>>),
    InText(Box<In<Text>>),
    InTruth(Box<In<Bool>>),
    IsNull(Box<Any>, bool),
    /// IS TRUE, IS FALSE, IS UNKNOWN, and their negations.
    Is(Box<Bool>, Option<bool>, bool),
    Case(Box<Case<Bool>>),
}

impl Node for Int {
    type Value<'r> = i64;

    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<i64> {
        Ok(match self {
            Self::Literal(value) => Some(*value),
            Self::Column(place) => match place.get(row) {
                Some(Value::Int(value)) => Some(*value),
                _ => None,
            },
            Self::Arithmetic(operation, sides) => {
                let (Some(left), Some(right)) = (sides.0.value(row)?, sides.1.value(row)?) else { return Ok(None) };
                Some(match operation {
                    Operation::Add => left.wrapping_add(right),
                    Operation::Subtract => left.wrapping_sub(right),
                    Operation::Multiply => left.wrapping_mul(right),
                    Operation::Divide | Operation::Remainder if right == 0 => return Err(Failed::DivideByZero),
                    Operation::Divide => left.checked_div(right).ok_or(Failed::Overflow)?,
                    Operation::Remainder => left.wrapping_rem(right),
                })
            }
            Self::Negative(of) => of.value(row)?.map(i64::wrapping_neg),
            Self::Absolute(of) => match of.value(row)? {
                Some(value) => Some(value.checked_abs().ok_or(Failed::Overflow)?),
                None => None,
            },
            Self::Case(case) => return case.value(row),
        })
    }
}

impl Node for Float {
    type Value<'r> = f64;

    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<f64> {
        Ok(match self {
            Self::Literal(value) => Some(*value),
            Self::Column(place) => match place.get(row) {
                Some(Value::Float(value)) => Some(*value),
                _ => None,
            },
            Self::Of(int) => int.value(row)?.map(|value| value as f64),
            Self::Arithmetic(operation, sides) => {
                let (Some(left), Some(right)) = (sides.0.value(row)?, sides.1.value(row)?) else { return Ok(None) };
                Some(match operation {
                    Operation::Add => left + right,
                    Operation::Subtract => left - right,
                    Operation::Multiply => left * right,
                    Operation::Divide => left / right,
                    Operation::Remainder => left % right,
                })
            }
            Self::Negative(of) => of.value(row)?.map(|value| -value),
            Self::Absolute(of) => of.value(row)?.map(f64::abs),
            Self::Case(case) => return case.value(row),
        })
    }
}

impl Node for Text {
    type Value<'r> = &'r str;

    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<&'r str> {
        Ok(match self {
            Self::Literal(text) => Some(text),
            Self::Device => Some(row.device),
            Self::Column(place) => match place.get(row) {
                Some(Value::Text(text)) => Some(text),
                _ => None,
            },
            Self::Case(case) => return case.value(row),
        })
    }
}

impl Node for Bool {
    type Value<'r> = bool;

    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<bool> {
        Ok(match self {
            Self::Literal(value) => Some(*value),
            Self::Column(place) => match place.get(row) {
                Some(Value::Bool(value)) => Some(*value),
                _ => None,
            },
            Self::Not(of) => of.value(row)?.map(|value| !value),
            Self::All(parts) => return decided(parts, false, row),
            Self::AnyOf(parts) => return decided(parts, true, row),
            Self::CompareInt(compare) => return compare.value(row),
            Self::CompareFloat(compare) => return compare.value(row),
            Self::CompareText(compare) => return compare.value(row),
            Self::CompareTruth(compare) => return compare.value(row),
            Self::InInt(of) => return of.value(row),
            Self::InFloat(of) => return of.value(row),
            Self::InText(of) => return of.value(row),
            Self::InTruth(of) => return of.value(row),
            Self::IsNull(of, negated) => {
                let null = match &**of {
                    Any::Int(node) => node.value(row)?.is_none(),
                    Any::Float(node) => node.value(row)?.is_none(),
                    Any::Bool(node) => node.value(row)?.is_none(),
                    Any::Text(node) => node.value(row)?.is_none(),
                };
                Some(null != *negated)
            }
            Self::Is(of, wanted, negated) => Some((of.value(row)? == *wanted) != *negated),
            Self::Case(case) => return case.value(row),
        })
    }
}

/// AND (decided by false) and OR (decided by true): NULL when none decides and one is NULL.
fn decided<'r>(parts: &'r [Bool], by: bool, row: &Row<'r>) -> Answer<bool> {
    let mut result = Some(!by);
    for part in parts {
        match part.value(row)? {
            Some(value) if value == by => return Ok(Some(by)),
            Some(_) => {}
            None => result = None,
        }
    }
    Ok(result)
}

impl<N: Node> Compare<N> {
    #[inline]
    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<bool> {
        let (left, right) = (self.left.value(row)?, self.right.value(row)?);
        Ok(left.zip(right).map(|(left, right)| self.relation.holds(left.rank(right))))
    }
}

impl<N: Node> In<N> {
    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<bool> {
        let needle = self.needle.value(row)?;
        let mut result = Some(self.negated);
        for item in &self.list {
            // Also when it cannot be found any more: an item may fail.
            match needle.zip(item.value(row)?) {
                Some((needle, item)) if item.rank(needle).is_eq() => return Ok(Some(!self.negated)),
                Some(_) => {}
                None => result = None,
            }
        }
        Ok(result)
    }
}

impl<N: Node> Case<N> {
    fn value<'r>(&'r self, row: &Row<'r>) -> Answer<N::Value<'r>> {
        for (condition, result) in &self.branches {
            if condition.value(row)? == Some(true) {
                return result.as_ref().map_or(Ok(None), |result| result.value(row));
            }
        }
        self.otherwise.as_ref().map_or(Ok(None), |otherwise| otherwise.value(row))
    }
}
