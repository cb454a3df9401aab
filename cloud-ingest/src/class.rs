//! Whose rows go on longest when room gets short: alerts, then views, then readings (decision 0019).
//!
//! The class of a batch is told from who wrote it and into which stream, and from nothing else, so it is the same at the door, in
//! the queue, in the log and after a restart. An alert that an edge has found is an alert; which agent sealed what is about
//! readings. Pure.

use std::ops::{Index, IndexMut};

use wire::ids::OWN_EDGE;
use wire::schema::own;
use wire::{EdgeId, StreamName};

/// In the order in which they go; the last waits first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Alerts, links, what people say of them, and who was told.
    Alerts,
    /// Results of views.
    Views,
    /// What edges and other senders bring.
    Readings,
}

impl Class {
    pub const ALL: [Self; 3] = [Self::Alerts, Self::Views, Self::Readings];

    /// The class of what this edge, or the node itself, writes into a stream.
    pub fn of(edge: &EdgeId, stream: &StreamName) -> Self {
        match (edge.as_str() == OWN_EDGE, stream.as_str()) {
            (true, own::ALERT_LOG | own::ALERT_DELIVERIES | own::LINK_LOG) | (false, own::ALERTS) => Self::Alerts,
            (true, own::BATCH_ORIGINS) | (false, _) => Self::Readings,
            (true, _) => Self::Views,
        }
    }

    /// In metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alerts => "alerts",
            Self::Views => "views",
            Self::Readings => "readings",
        }
    }

    /// Those that go before it.
    pub fn before(self) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().take_while(move |other| *other < self)
    }
}

/// One of something for each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ByClass<T>([T; 3]);

impl<T> ByClass<T> {
    pub fn new(of: impl FnMut(Class) -> T) -> Self {
        Self(Class::ALL.map(of))
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = (Class, &T)> {
        Class::ALL.into_iter().zip(&self.0)
    }
}

impl<T> Index<Class> for ByClass<T> {
    type Output = T;
    fn index(&self, class: Class) -> &T {
        &self.0[class as usize]
    }
}

impl<T> IndexMut<Class> for ByClass<T> {
    fn index_mut(&mut self, class: Class) -> &mut T {
        &mut self.0[class as usize]
    }
}

/// Bytes that all classes share, of which some are kept.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    bytes_max: usize,
    /// Kept for a class and those before it. Nothing is kept for the last: what is left is its.
    kept: ByClass<usize>,
}

impl Budget {
    /// `kept` says which part of all is kept for each class.
    pub fn new(bytes_max: usize, kept: ByClass<f64>) -> Self {
        Self { bytes_max, kept: ByClass::new(|class| (bytes_max as f64 * kept[class]) as usize) }
    }

    /// What is kept for a class.
    pub fn kept(&self, class: Class) -> usize {
        self.kept[class]
    }

    /// What is kept from a class, used or not.
    pub fn kept_from(&self, class: Class) -> usize {
        class.before().map(|before| self.kept[before]).sum()
    }

    /// Bytes that a class may still take, when so many are taken. Never less for one that goes before it; and as long as
    /// nobody takes more than this, each class finds what is kept for it, less what it has itself and what those before it
    /// had to take of that.
    pub fn free(&self, class: Class, taken: &ByClass<usize>) -> usize {
        let all: usize = taken.0.iter().sum();
        // What is kept from it and not taken yet. What a class has above its own lies in that of the next.
        let (mut untaken, mut above) = (0, 0_usize);
        for before in class.before() {
            let lies_here = taken[before] + above;
            untaken += self.kept[before].saturating_sub(lies_here);
            above = lies_here.saturating_sub(self.kept[before]);
        }
        self.bytes_max.saturating_sub(all).saturating_sub(untaken)
    }
}

#[cfg(test)]
mod tests {
    use segment_log::sim::Random;

    use super::*;

    #[test]
    fn who_writes_what_into_which_stream_has_a_class() {
        let check = |edge: &str, stream: &str, expected| {
            assert_eq!(Class::of(&edge.parse().unwrap(), &stream.parse().unwrap()), expected, "{edge} {stream}");
        };
        check(OWN_EDGE, "alert_log", Class::Alerts);
        check(OWN_EDGE, "link_log", Class::Alerts);
        check(OWN_EDGE, "alert_deliveries", Class::Alerts);
        check("gw", "alerts", Class::Alerts);
        check(OWN_EDGE, "by_minute_changes", Class::Views);
        check(OWN_EDGE, "view_deliveries", Class::Views);
        check("gw", "by_minute_changes", Class::Readings);
        check(OWN_EDGE, "batch_origins", Class::Readings);
        check("gw", "traffic", Class::Readings);
        // It is refused, and counts as what it is.
        check("gw", "alert_log", Class::Readings);
    }

    #[test]
    fn what_is_kept_is_kept_from_those_behind_and_lent_to_those_before() {
        let kept = ByClass([0.1, 0.2, 0.0]);
        let budget = Budget::new(1_000, kept);
        let free = |alerts, views, readings| {
            let taken = ByClass([alerts, views, readings]);
            Class::ALL.map(|class| budget.free(class, &taken))
        };
        assert_eq!(free(0, 0, 0), [1_000, 900, 700]);
        assert_eq!(free(0, 0, 700), [300, 200, 0]);
        // Within what is kept for them nobody else has less.
        assert_eq!(free(100, 200, 0), [700, 700, 700]);
        assert_eq!(free(50, 0, 0), [950, 900, 700]);
        // Above it alerts take of that of views, then of all.
        assert_eq!(free(150, 0, 0), [850, 850, 700]);
        assert_eq!(free(150, 150, 0), [700, 700, 700]);
        assert_eq!(free(300, 0, 700), [0, 0, 0]);
        assert_eq!(free(0, 200, 700), [100, 0, 0]);
    }

    #[test]
    fn nobody_takes_what_is_kept_for_those_before() {
        let seed = std::env::var("CLASS_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
        for seed in seed.map_or(1..=300, |seed| seed..=seed) {
            println!("CLASS_SEED={seed}");
            let mut random = Random::new(seed);
            let shares = [random.below(30) as f64 / 100.0, random.below(30) as f64 / 100.0, 0.0];
            let budget = Budget::new(10_000, ByClass(shares));
            let mut taken = ByClass::<usize>::default();
            for _ in 0..300 {
                let class = Class::ALL[random.below(3) as usize];
                if random.one_in(4) {
                    taken[class] -= random.below(taken[class] as u64 + 1) as usize;
                } else {
                    let bytes = random.below(1_500) as usize;
                    if bytes <= budget.free(class, &taken) {
                        taken[class] += bytes;
                    }
                }
                let all: usize = taken.iter().map(|(_, bytes)| bytes).sum();
                assert!(all <= 10_000, "{taken:?}");
                let [alerts, views, readings] = Class::ALL.map(|class| budget.free(class, &taken));
                assert!(alerts >= views && views >= readings, "{taken:?}: {alerts} {views} {readings}");
                let own = budget.kept(Class::Alerts).saturating_sub(taken[Class::Alerts]);
                let lent = taken[Class::Alerts].saturating_sub(budget.kept(Class::Alerts));
                let of_views = budget.kept(Class::Views).saturating_sub(taken[Class::Views] + lent);
                assert!(alerts >= own + of_views && views >= of_views, "{taken:?}: {alerts} {views}");
            }
        }
    }
}
