//! The memory of one statement: a limit of its own, shared out fairly among its operators, within that of all
//! statements together. An operator that can spill to disk does so when either is reached; one that cannot ends the
//! statement.

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
    peak: AtomicUsize,
}

impl StatementPool {
    /// At most so many bytes of these.
    pub(crate) fn new(bytes_max: usize, all: Arc<dyn MemoryPool>) -> Self {
        Self { own: FairSpillPool::new(bytes_max), all, bytes_max, peak: AtomicUsize::new(0) }
    }

    /// The most that it has had at a time, bytes.
    pub(crate) fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
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
        self.note();
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.own.shrink(reservation, shrink);
        self.all.shrink(reservation, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let name = || reservation.consumer().name().to_owned();
        self.own.try_grow(reservation, additional).map_err(|_| {
            let limit = self.bytes_max;
            DataFusionError::ResourcesExhausted(format!("{} more bytes for {} of {limit}", additional, name()))
        })?;
        if self.all.try_grow(reservation, additional).is_err() {
            self.own.shrink(reservation, additional);
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
        let first = Arc::new(StatementPool::new(100, Arc::clone(&all)));
        let second = Arc::new(StatementPool::new(100, Arc::clone(&all)));
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
}
