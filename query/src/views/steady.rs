//! Appends that come to their end when nobody waits for them any more: a view that is dropped, and made again at once, must
//! find in its stream what it was about to write.

use std::sync::Arc;

use arrow_array::RecordBatch;
use async_trait::async_trait;
use tokio::sync::Mutex;
use wire::{StreamName, StreamSchema};

use crate::sink::{Sink, SinkError};

/// See the module. Of one view, which writes one append at a time.
#[derive(Debug)]
pub(super) struct Steady {
    sink: Arc<dyn Sink>,
    under_way: Arc<Mutex<()>>,
}

impl Steady {
    pub(super) fn new(sink: Arc<dyn Sink>) -> Self {
        Self { sink, under_way: Arc::default() }
    }

    /// Waits until no append is under way.
    pub(super) async fn idle(&self) {
        drop(self.under_way.lock().await);
    }
}

#[async_trait]
impl Sink for Steady {
    async fn append(
        &self,
        stream: &StreamName,
        schema: &Arc<StreamSchema>,
        rows: RecordBatch,
    ) -> Result<(), SinkError> {
        let held = Arc::clone(&self.under_way).lock_owned().await;
        let (sink, stream, schema) = (Arc::clone(&self.sink), stream.clone(), Arc::clone(schema));
        let name = stream.clone();
        let done = tokio::spawn(async move {
            let done = sink.append(&stream, &schema, rows).await;
            drop(held);
            done
        });
        done.await.unwrap_or_else(|error| Err(SinkError::Later { stream: name, detail: error.to_string() }))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;

    use super::*;

    /// Appends when it is told to.
    #[derive(Debug, Default)]
    struct Slow {
        begun: Notify,
        go_on: Notify,
        appended: Mutex<usize>,
    }

    #[async_trait]
    impl Sink for Slow {
        async fn append(&self, _: &StreamName, _: &Arc<StreamSchema>, rows: RecordBatch) -> Result<(), SinkError> {
            self.begun.notify_one();
            self.go_on.notified().await;
            *self.appended.lock().await += rows.num_rows() + 1;
            Ok(())
        }
    }

    #[tokio::test]
    async fn an_append_is_finished_though_nobody_waits_for_it() {
        let slow = Arc::new(Slow::default());
        let steady = Arc::new(Steady::new(Arc::clone(&slow) as _));
        let schema = Arc::new(StreamSchema::new(Vec::new()).unwrap());
        let of_view = Arc::clone(&steady);
        let view = tokio::spawn(async move {
            let rows = RecordBatch::new_empty(Arc::clone(schema.arrow()));
            of_view.append(&"s".parse().unwrap(), &schema, rows).await
        });
        slow.begun.notified().await;
        view.abort();
        assert!(view.await.unwrap_err().is_cancelled());
        slow.go_on.notify_one();
        steady.idle().await;
        assert_eq!(*slow.appended.lock().await, 1);
    }
}
