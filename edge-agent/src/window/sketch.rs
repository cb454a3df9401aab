//! Quantiles of many numbers in little room: a DDSketch (Masson, Rim, Lee, VLDB 2019).
//!
//! A number lies in the bucket of its logarithm, so a quantile is within [`RELATIVE_ERROR`] of the value that has its rank,
//! `floor(q * (n - 1))` in ascending order. Two sketches merge without loss: buckets are added. No bucket is ever collapsed,
//! so the error holds for every quantile; what a sketch takes is bounded with its window. Numbers nearer to zero than
//! [`SMALLEST`] count as zero.

use std::collections::BTreeMap;

/// The stated error.
pub(super) const RELATIVE_ERROR: f64 = 0.01;
const SMALLEST: f64 = 1e-300;

/// Counts by bucket.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sketch {
    /// By the logarithm of the distance from zero.
    pub(super) negative: BTreeMap<i32, u64>,
    pub(super) zero: u64,
    pub(super) positive: BTreeMap<i32, u64>,
}

fn gamma() -> f64 {
    (1.0 + RELATIVE_ERROR) / (1.0 - RELATIVE_ERROR)
}

fn bucket(distance: f64) -> i32 {
    (distance.ln() / gamma().ln()).ceil() as i32
}

/// The value of a bucket that is within the error of all that lie in it.
fn value(bucket: i32) -> f64 {
    (f64::from(bucket) * gamma().ln()).exp() * 2.0 / (gamma() + 1.0)
}

impl Sketch {
    pub(super) fn add(&mut self, number: f64) {
        if number.abs() < SMALLEST {
            self.zero += 1;
        } else if number > 0.0 {
            *self.positive.entry(bucket(number)).or_default() += 1;
        } else {
            *self.negative.entry(bucket(-number)).or_default() += 1;
        }
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.zero += other.zero;
        for (mine, theirs) in [(&mut self.negative, &other.negative), (&mut self.positive, &other.positive)] {
            theirs.iter().for_each(|(bucket, count)| *mine.entry(*bucket).or_default() += count);
        }
    }

    pub(super) fn buckets(&self) -> usize {
        self.negative.len() + self.positive.len()
    }

    /// None of nothing.
    pub(super) fn quantile(&self, q: f64) -> Option<f64> {
        let count = self.zero + self.negative.values().sum::<u64>() + self.positive.values().sum::<u64>();
        let rank = (q * count.checked_sub(1)? as f64).floor() as u64;
        let negative = self.negative.iter().rev().map(|(bucket, count)| (-value(*bucket), *count));
        let positive = self.positive.iter().map(|(bucket, count)| (value(*bucket), *count));
        let mut below = 0;
        for (value, count) in negative.chain([(0.0, self.zero)]).chain(positive) {
            below += count;
            if below > rank {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn a_quantile_is_within_the_stated_error_and_merging_changes_nothing() {
        let seed = rand::rng().random();
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        for round in 0..200 {
            let numbers = (0..random.random_range(1..400)).map(|_| match round % 4 {
                0 => random.random_range(-100.0..100.0),
                1 => f64::from(random.random_range(-3..4)),
                2 => 10_f64.powf(random.random_range(-200.0..200.0)),
                _ => -random.random_range(0.0_f64..1.0).ln(),
            });
            let mut numbers = numbers.collect::<Vec<_>>();
            let (mut whole, mut parts) = (Sketch::default(), [Sketch::default(), Sketch::default()]);
            for (n, number) in numbers.iter().enumerate() {
                whole.add(*number);
                parts[n % 2].add(*number);
            }
            let [mut merged, other] = parts;
            merged.merge(&other);
            assert_eq!(merged, whole);
            numbers.sort_by(f64::total_cmp);
            for q in [0.0, 0.5, 0.95, 0.99, 1.0] {
                let exact = numbers[(q * (numbers.len() - 1) as f64).floor() as usize];
                let shown = whole.quantile(q).unwrap();
                let most = exact.abs() * (RELATIVE_ERROR + 1e-9);
                assert!((shown - exact).abs() <= most, "{q}: {shown} for {exact}");
            }
        }
        assert_eq!(Sketch::default().quantile(0.5), None);
    }
}
