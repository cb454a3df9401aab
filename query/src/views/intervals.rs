//! Sets of event times as disjoint half-open intervals `[from, to)`, microseconds since 1970. Pure.
//!
//! `i64::MIN` and `i64::MAX` stand for no end on that side. As JSON: a list of pairs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// See the module. Intervals of it neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(i64, i64)>", into = "Vec<(i64, i64)>")]
pub(crate) struct Intervals(BTreeMap<i64, i64>);

impl From<Vec<(i64, i64)>> for Intervals {
    fn from(pairs: Vec<(i64, i64)>) -> Self {
        let mut all = Self::default();
        pairs.into_iter().for_each(|(from, to)| all.insert(from, to));
        all
    }
}

impl From<Intervals> for Vec<(i64, i64)> {
    fn from(intervals: Intervals) -> Self {
        intervals.0.into_iter().collect()
    }
}

impl Intervals {
    /// One interval; none when it is empty.
    pub(crate) fn of(from: i64, to: i64) -> Self {
        let mut one = Self::default();
        one.insert(from, to);
        one
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (i64, i64)> {
        self.0.iter().map(|(from, to)| (*from, *to))
    }

    /// The first interval.
    pub(crate) fn first(&self) -> Option<(i64, i64)> {
        self.iter().next()
    }

    pub(crate) fn contains(&self, at: i64) -> bool {
        self.0.range(..=at).next_back().is_some_and(|(_, to)| at < *to)
    }

    /// Whether all from `first` to `last`, which is included, is in one of them.
    pub(crate) fn covers(&self, first: i64, last: i64) -> bool {
        self.0.range(..=first).next_back().is_some_and(|(_, to)| last < *to)
    }

    /// Whether some of what lies from `first` to `last`, which is included, is in one of them.
    pub(crate) fn meets(&self, first: i64, last: i64) -> bool {
        self.0.range(..=last).next_back().is_some_and(|(_, to)| first < *to)
    }

    /// Adds `[from, to)`.
    pub(crate) fn insert(&mut self, mut from: i64, mut to: i64) {
        if from >= to {
            return;
        }
        // Those that it overlaps or touches become part of it.
        while let Some((start, end)) = self.0.range(..=to).next_back().map(|(start, end)| (*start, *end)) {
            if end < from {
                break;
            }
            (from, to) = (from.min(start), to.max(end));
            self.0.remove(&start);
        }
        self.0.insert(from, to);
    }

    /// Adds all of these.
    pub(crate) fn add(&mut self, others: &Self) {
        others.iter().for_each(|(from, to)| self.insert(from, to));
    }

    /// Takes `[from, to)` out.
    pub(crate) fn remove(&mut self, from: i64, to: i64) {
        if from >= to {
            return;
        }
        while let Some((start, end)) = self.0.range(..to).next_back().map(|(start, end)| (*start, *end)) {
            if end <= from {
                break;
            }
            self.0.remove(&start);
            if end > to {
                self.0.insert(to, end);
            }
            if start < from {
                self.0.insert(start, from);
            }
        }
    }

    /// What of it is not in these.
    #[must_use]
    pub(crate) fn without(&self, others: &Self) -> Self {
        let mut rest = self.clone();
        others.iter().for_each(|(from, to)| rest.remove(from, to));
        rest
    }

    /// What of it lies in `[from, to)`.
    #[must_use]
    pub(crate) fn within(&self, from: i64, to: i64) -> Self {
        let mut part = Self::default();
        for (start, end) in self.iter() {
            part.insert(start.max(from), end.min(to));
        }
        part
    }

    /// Forgets the first ones beyond this number: it becomes smaller.
    pub(crate) fn keep_last(&mut self, count_max: usize) {
        while self.0.len() > count_max {
            self.0.pop_first();
        }
    }

    /// Closes the smallest gaps until there are at most so many intervals: it becomes larger, never smaller.
    pub(crate) fn merge_to(&mut self, count_max: usize) {
        let count_max = count_max.max(1);
        if self.0.len() <= count_max {
            return;
        }
        let pairs: Vec<(i64, i64)> = self.iter().collect();
        let mut gaps: Vec<(u64, i64, i64)> =
            pairs.windows(2).map(|pair| (pair[1].0.abs_diff(pair[0].1), pair[0].1, pair[1].0)).collect();
        gaps.sort_unstable();
        for (_, from, to) in gaps.into_iter().take(pairs.len() - count_max) {
            self.insert(from, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn points(set: &Intervals) -> BTreeSet<i64> {
        set.iter().flat_map(|(from, to)| from..to).collect()
    }

    #[test]
    fn they_are_sets() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        for _ in 0..500 {
            let (mut set, mut model) = (Intervals::default(), BTreeSet::new());
            for _ in 0..20 {
                let from = random.random_range(0..60);
                let to = from + random.random_range(-1..12);
                if random.random_bool(0.6) {
                    set.insert(from, to);
                    model.extend(from..to);
                } else {
                    set.remove(from, to);
                    model.retain(|at| !(from..to).contains(at));
                }
                assert_eq!(points(&set), model);
                let pairs: Vec<_> = set.iter().collect();
                assert!(pairs.windows(2).all(|pair| pair[0].1 < pair[1].0), "they touch: {pairs:?}");
            }
            assert!((0..80).all(|at| set.contains(at) == model.contains(&at)));
            let (first, length) = (random.random_range(-5..70), random.random_range(0..9));
            let (last, mut part) = (first + length, first..=first + length);
            assert_eq!(set.meets(first, last), part.clone().any(|at| model.contains(&at)));
            assert_eq!(set.covers(first, last), part.all(|at| model.contains(&at)));
            assert_eq!(points(&set.within(10, 30)), model.range(10..30).copied().collect());
            let other = Intervals::of(20, 40);
            assert_eq!(points(&set.without(&other)), model.iter().copied().filter(|at| !other.contains(*at)).collect());
            let mut merged = set.clone();
            merged.merge_to(2);
            assert!(merged.iter().count() <= 2 && set.without(&merged).is_empty());
            let text = serde_json::to_string(&set).unwrap();
            assert_eq!(serde_json::from_str::<Intervals>(&text).unwrap(), set);
        }
    }

    #[test]
    fn they_may_have_no_end() {
        let mut all = Intervals::of(i64::MIN, i64::MAX);
        all.remove(0, 10);
        assert_eq!(Vec::from(all.clone()), [(i64::MIN, 0), (10, i64::MAX)]);
        assert!(all.contains(i64::MIN) && !all.contains(5));
        assert_eq!(all.within(-5, 20), Intervals::from(vec![(-5, 0), (10, 20)]));
    }
}
