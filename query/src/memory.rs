//! The memory of one statement: a limit of its own, shared out fairly among its operators, within that of all
//! statements together. An operator that can spill to disk does so when either is reached; one that cannot ends the
//! statement.
//!
//! Operators that can spill have half of it between them. The rest is for those that cannot: a sort gives its room for
//! merging back and asks for it anew each time it spills, and would end with an error where another sort had grown into it.
//!
//! Of what all statements have together the last parts are for views and rules alone: a reader's statement is refused more
//! before they are.

use std::fmt::{Display, Formatter, Result as FmtResult};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use datafusion::common::{DataFusionError, Result};
use datafusion::execution::memory_pool::{FairSpillPool, MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation};

/// See the module.
#[derive(Debug)]
pub(crate) struct StatementPool {
    own: FairSpillPool,
    all: Arc<dyn MemoryPool>,
    bytes_max: usize,
    common_bytes_max: usize,
    /// What operators that can spill have.
    spillable: AtomicUsize,
    peak: AtomicUsize,
}

impl StatementPool {
    /// At most so many bytes of these, while all have at most `common_bytes_max`.
    pub(crate) fn new(bytes_max: usize, common_bytes_max: usize, all: Arc<dyn MemoryPool>) -> Self {
        Self {
            own: FairSpillPool::new(bytes_max),
            all,
            bytes_max,
            common_bytes_max,
            spillable: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    /// The most that it has had at a time, bytes.
    pub(crate) fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    /// Takes so much of the share of operators that can spill, if they have it.
    fn take_of_share(&self, additional: usize) -> bool {
        let share = self.bytes_max / 2;
        let taken = |now: usize| now.checked_add(additional).filter(|then| *then <= share);
        self.spillable.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    fn note(&self) {
        self.peak.fetch_max(self.own.reserved(), Ordering::Relaxed);
    }
}

impl Display for StatementPool {
    fn fmt(&self, f: &mut Formatter<'_>) -> FmtResult {
        write!(f, "statement({} of {} bytes)", self.own.reserved(), self.bytes_max)
    }
}

impl MemoryPool for StatementPool {
    fn name(&self) -> &str {
        "statement"
    }

    fn register(&self, consumer: &MemoryConsumer) {
        self.own.register(consumer);
        self.all.register(consumer);
    }

    fn unregister(&self, consumer: &MemoryConsumer) {
        self.own.unregister(consumer);
        self.all.unregister(consumer);
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        self.own.grow(reservation, additional);
        self.all.grow(reservation, additional);
        if reservation.consumer().can_spill() {
            self.spillable.fetch_add(additional, Ordering::Relaxed);
        }
        self.note();
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.own.shrink(reservation, shrink);
        self.all.shrink(reservation, shrink);
        if reservation.consumer().can_spill() {
            self.spillable.fetch_sub(shrink, Ordering::Relaxed);
        }
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let name = || reservation.consumer().name().to_owned();
        let spillable = reservation.consumer().can_spill();
        let full = || {
            let limit = self.bytes_max;
            DataFusionError::ResourcesExhausted(format!("{} more bytes for {} of {limit}", additional, name()))
        };
        if spillable && !self.take_of_share(additional) {
            return Err(full());
        }
        let give_back = || {
            if spillable {
                self.spillable.fetch_sub(additional, Ordering::Relaxed);
            }
        };
        if self.own.try_grow(reservation, additional).is_err() {
            give_back();
            return Err(full());
        }
        let grown = self.all.try_grow(reservation, additional).is_ok();
        let beyond = grown && self.all.reserved() > self.common_bytes_max;
        if beyond {
            self.all.shrink(reservation, additional);
        }
        if !grown || beyond {
            self.own.shrink(reservation, additional);
            give_back();
            let message = format!("{additional} more bytes for {}, and other statements have the rest", name());
            return Err(DataFusionError::ResourcesExhausted(message));
        }
        self.note();
        Ok(())
    }

    fn reserved(&self) -> usize {
        self.own.reserved()
    }

    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use datafusion::execution::memory_pool::GreedyMemoryPool;

    use super::*;

    #[test]
    fn a_statement_has_its_own_limit_and_that_of_all() {
        let all: Arc<dyn MemoryPool> = Arc::new(GreedyMemoryPool::new(150));
        let first = Arc::new(StatementPool::new(100, usize::MAX, Arc::clone(&all)));
        let second = Arc::new(StatementPool::new(100, usize::MAX, Arc::clone(&all)));
        let [a, b] = [&first, &second].map(|pool| {
            let pool: Arc<dyn MemoryPool> = Arc::clone(pool) as _;
            MemoryConsumer::new("sort").register(&pool)
        });
        assert!(a.try_grow(101).unwrap_err().to_string().contains("of 100"));
        a.try_grow(100).unwrap();
        let refused = b.try_grow(51).unwrap_err().to_string();
        assert!(refused.contains("other statements"), "{refused}");
        assert_eq!((second.reserved(), all.reserved()), (0, 100));
        b.try_grow(50).unwrap();
        drop(a);
        b.try_grow(50).unwrap();
        assert_eq!((first.peak(), second.peak(), all.reserved()), (100, 100, 100));
        drop(b);
        assert_eq!(all.reserved(), 0);
    }

    #[test]
    fn readers_leave_room_for_views_and_views_for_rules() {
        let all: Arc<dyn MemoryPool> = Arc::new(GreedyMemoryPool::new(100));
        let [reader, view, rule] = [80, 90, usize::MAX].map(|common_bytes_max| {
            let pool: Arc<dyn MemoryPool> = Arc::new(StatementPool::new(1_000, common_bytes_max, Arc::clone(&all)));
            MemoryConsumer::new("hash").register(&pool)
        });
        reader.try_grow(80).unwrap();
        let refused = reader.try_grow(1).unwrap_err().to_string();
        assert!(refused.contains("other statements"), "{refused}");
        view.try_grow(10).unwrap();
        view.try_grow(1).unwrap_err();
        rule.try_grow(10).unwrap();
        rule.try_grow(1).unwrap_err();
        assert_eq!((reader.size(), view.size(), rule.size(), all.reserved()), (80, 10, 10, 100));
        reader.shrink(50);
        view.try_grow(40).unwrap();
    }

    #[test]
    fn operators_that_spill_leave_room_for_those_that_cannot() {
        let all: Arc<dyn MemoryPool> = Arc::new(GreedyMemoryPool::new(1_000));
        let pool: Arc<dyn MemoryPool> = Arc::new(StatementPool::new(100, usize::MAX, all));
        let sort = MemoryConsumer::new("sort").with_can_spill(true).register(&pool);
        let merge = MemoryConsumer::new("merge").register(&pool);
        sort.try_grow(50).unwrap();
        assert!(sort.try_grow(1).unwrap_err().to_string().contains("of 100"));
        merge.try_grow(50).unwrap();
        sort.shrink(20);
        sort.try_grow(20).unwrap();
        assert_eq!(pool.reserved(), 100);
    }
}
