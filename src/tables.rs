//! The tables that `query` asks for, from the catalogue of the node in the same process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use cloud_ingest::class::Class;
use cloud_ingest::delta::{Note, TableSnapshot};
use cloud_ingest::ledger::Entry;
use cloud_ingest::metrics::{ClassMetrics, Metrics};
use cloud_ingest::remarks::Remarks;
use cloud_ingest::{Catalogue, Moment};
use query::{AsOf, ClassFacts, ColdTable, ColumnNote, Remark, SpoolFacts, Tables, TablesError};
use tokio::sync::watch;
use wire::hot::HotSource;
use wire::schema::own::BATCH_ORIGINS;
use wire::{Seq, StreamName};

/// The catalogue of this process, how something is said of its tables, and what it counts.
#[derive(Debug)]
pub(crate) struct NodeTables(pub(crate) Arc<Catalogue>, pub(crate) Remarks, pub(crate) Arc<Metrics>);

fn cold(snapshot: &TableSnapshot) -> ColdTable {
    ColdTable {
        version: snapshot.version,
        log_store: Arc::clone(&snapshot.log_store),
        files: snapshot.files.clone(),
        txn: Arc::clone(&snapshot.txn),
        description: snapshot.description().map(str::to_owned),
        schema: Arc::clone(&snapshot.schema),
    }
}

impl NodeTables {
    fn facts(&self, entry: Entry) -> SpoolFacts {
        let state = self.0.state(&entry.stream);
        let committed = state.and_then(|state| Some(state.snapshot.txn.get(&entry.spool)?.seq)).unwrap_or(Seq(0));
        SpoolFacts {
            stream: entry.stream,
            edge: entry.edge,
            spool: entry.spool,
            rows: entry.rows,
            batches: entry.batches,
            received_at_us: entry.received_at_us,
            max_ts: entry.max_ts,
            watermark: entry.watermark,
            durable: entry.durable.max(committed),
            committed,
            agent: entry.agent,
            configuration: entry.configuration,
        }
    }
}

#[async_trait]
impl Tables for NodeTables {
    /// All but that which `system.batches` shows.
    fn streams(&self) -> Vec<StreamName> {
        self.0.streams().into_iter().filter(|stream| stream.as_str() != BATCH_ORIGINS).collect()
    }

    fn cold(&self, stream: &StreamName) -> Option<ColdTable> {
        self.0.state(stream).map(|state| cold(&state.snapshot))
    }

    /// The catalogue's snapshot is as new as its hot rows: whoever was told `Stale` finds it here.
    async fn reload(&self, stream: &StreamName, at_least: u64) -> Result<ColdTable, TablesError> {
        let failed = |detail: String| TablesError { stream: stream.clone(), detail };
        let state = self.0.state(stream).ok_or_else(|| failed("it is gone".to_owned()))?;
        if state.snapshot.version < at_least {
            return Err(failed(format!("version {at_least} is not known here")));
        }
        Ok(cold(&state.snapshot))
    }

    async fn cold_as_of(&self, stream: &StreamName, as_of: AsOf) -> Result<ColdTable, TablesError> {
        let failed = |detail: String| TablesError { stream: stream.clone(), detail };
        let state = self.0.state(stream).ok_or_else(|| failed("it is gone".to_owned()))?;
        let moment = match as_of {
            AsOf::Version(version) => Moment::Version(version),
            AsOf::Time(us) => Moment::Time(us),
        };
        let past = state.snapshot.past(stream, moment).await.map_err(|error| failed(error.to_string()))?;
        Ok(cold(&past))
    }

    fn spools(&self) -> Vec<SpoolFacts> {
        self.0.ledger().entries().into_iter().map(|entry| self.facts(entry)).collect()
    }

    fn spools_of(&self, streams: &BTreeSet<StreamName>) -> Vec<SpoolFacts> {
        streams.iter().flat_map(|stream| self.0.ledger().entries_of(stream)).map(|entry| self.facts(entry)).collect()
    }

    fn classes(&self) -> Vec<ClassFacts> {
        let facts = |(class, of): (Class, &ClassMetrics)| ClassFacts {
            class: class.name(),
            received: of.received.get(),
            durable: of.durable.get(),
            duplicate: of.duplicate.get(),
            refused: of.refused.get(),
            pushed_back: of.pushed_back.get(),
            committed: of.committed.get(),
            hot_rows: of.hot_rows.get(),
            hot_bytes: of.hot_bytes.get(),
            hot_kept_bytes: of.hot_kept_bytes.get(),
            hot_free_bytes: of.hot_free_bytes.get(),
            wal_bytes: of.wal_bytes.get(),
            wal_free_bytes: of.wal_free_bytes.get(),
        };
        self.2.classes.iter().map(facts).collect()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed()
    }

    fn moves(&self, stream: &StreamName) -> u64 {
        self.0.moves(stream)
    }

    fn notes(&self, stream: &StreamName) -> BTreeMap<String, ColumnNote> {
        let notes = self.0.state(stream).map(|state| state.snapshot.notes()).unwrap_or_default();
        let note = |(name, Note { comment, since_us })| (name, ColumnNote { description: comment, since_us });
        notes.into_iter().map(note).collect()
    }

    async fn say(&self, remark: &Remark) -> Result<(), TablesError> {
        let Remark { stream, column, text } = remark;
        let said = self.1.say(stream, column.as_deref(), text.as_deref()).await;
        said.map_err(|detail| TablesError { stream: stream.clone(), detail })
    }

    fn hot(&self) -> Arc<dyn HotSource> {
        Arc::clone(&self.0) as Arc<dyn HotSource>
    }
}
