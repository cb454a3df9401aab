//! A number as a configuration or a reading has it, with an order that is exact between whole numbers and floats.
//!
//! A limit of 9007199254740993 is not a float; compared as one it would let the number below it pass.

use std::cmp::Ordering;
use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};

/// A number. Its order is that of the numbers themselves; NaN has none.
#[derive(Debug, Clone, Copy)]
pub enum Number {
    Int(i64),
    Float(f64),
}

impl Number {
    /// Whether it is not a number at all.
    pub fn is_nan(self) -> bool {
        matches!(self, Self::Float(value) if value.is_nan())
    }
}

/// A float that is beyond all whole numbers saturates, and stands on the right side of each.
fn int_to_float(int: i64, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    let floor = float.floor();
    match i128::from(int).cmp(&(floor as i128)) {
        Ordering::Equal if floor < float => Some(Ordering::Less),
        order => Some(order),
    }
}

impl PartialOrd for Number {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        match (*self, *other) {
            (Self::Int(one), Self::Int(other)) => Some(one.cmp(&other)),
            (Self::Float(one), Self::Float(other)) => one.partial_cmp(&other),
            (Self::Int(int), Self::Float(float)) => int_to_float(int, float),
            (Self::Float(float), Self::Int(int)) => int_to_float(int, float).map(Ordering::reverse),
        }
    }
}

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        self.partial_cmp(other) == Some(Ordering::Equal)
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;
        impl Visitor<'_> for Written {
            type Value = Number;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Number, E> {
                Ok(Number::Int(value))
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Number, E> {
                i64::try_from(value).map(Number::Int).map_err(|_| E::custom("the number is above what an int64 holds"))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Number, E> {
                Ok(Number::Float(value))
            }
        }
        deserializer.deserialize_any(Written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_exact() {
        use Number::{Float, Int};
        let check = |one: Number, other: Number, expected| {
            assert_eq!(one.partial_cmp(&other), expected, "{one} and {other}");
            assert_eq!(other.partial_cmp(&one), expected.map(Ordering::reverse), "{other} and {one}");
        };
        let (less, equal) = (Some(Ordering::Less), Some(Ordering::Equal));
        check(Int(9_007_199_254_740_992), Int(9_007_199_254_740_993), less);
        check(Float(9_007_199_254_740_992.0), Int(9_007_199_254_740_993), less);
        check(Int(i64::MAX - 1), Int(i64::MAX), less);
        check(Int(i64::MAX), Float(9_223_372_036_854_775_808.0), less);
        check(Int(i64::MIN), Float(-9_223_372_036_854_775_808.0), equal);
        check(Float(-1e300), Int(i64::MIN), less);
        check(Int(i64::MAX), Float(1e300), less);
        check(Int(i64::MAX), Float(f64::INFINITY), less);
        check(Float(f64::NEG_INFINITY), Int(i64::MIN), less);
        check(Int(0), Float(-0.0), equal);
        check(Float(0.0), Float(-0.0), equal);
        check(Int(0), Float(0.5), less);
        check(Float(-0.5), Int(0), less);
        check(Int(-1), Float(-0.5), less);
        check(Int(0), Float(f64::NAN), None);
        check(Float(0.0), Float(f64::NAN), None);
    }
}
