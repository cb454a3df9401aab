//! The application transactions of a table: read all at once when it is opened, then followed commit by commit.
//!
//! Two per spool: `appId` = the spool's 32 hexadecimal digits, `version` = the last batch's number; and
//! `appId` = the same with `/crc` behind it, `version` = that batch's CRC. Others are not ours and are left alone.

use std::collections::{BTreeMap, HashMap};

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch, StructArray};
use buoyant_kernel::actions::LOG_TXN_SCHEMA;
use buoyant_kernel::engine::arrow_data::ArrowEngineData;
use deltalake_core::kernel::{Action, Transaction};
use deltalake_core::logstore::{LogStoreRef, get_actions};
use wire::ack::Mark;
use wire::ids::{Seq, SpoolId, StreamName};

use super::{Marks, TableError};

/// Ends the `appId` of a CRC.
const CRC: &str = "/crc";

/// The transactions of a commit; one pair per spool, since readers may take either of two.
pub(super) fn actions(marks: &[(SpoolId, Seq, Mark)]) -> Vec<Transaction> {
    let now = Some(chrono::Utc::now().timestamp_millis());
    let last_of_spool: BTreeMap<SpoolId, Mark> = marks.iter().map(|(spool, _, last)| (*spool, *last)).collect();
    let pairs = last_of_spool.iter().flat_map(|(spool, last)| {
        let seq = Transaction::new_with_last_update(spool, last.seq.0.cast_signed(), now);
        let crc = Transaction::new_with_last_update(format!("{spool}{CRC}"), i64::from(last.crc), now);
        [seq, crc]
    });
    pairs.collect()
}

/// The transactions of a table at a version: all of its log, newest first, the first of each `appId`.
pub(super) async fn load(stream: &StreamName, log_store: &LogStoreRef, version: u64) -> Result<Marks, TableError> {
    let engine = log_store.engine(None);
    let url = log_store.root_url().clone();
    let read = move || {
        let snapshot = buoyant_kernel::Snapshot::builder_for(url).at_version(version).build(engine.as_ref())?;
        let mut newest = HashMap::new();
        for batch in snapshot.log_segment().read_actions(engine.as_ref(), LOG_TXN_SCHEMA.clone())? {
            let actions = ArrowEngineData::try_from_engine_data(batch?.actions)?;
            read_transactions(actions.record_batch(), &mut newest)
                .ok_or_else(|| buoyant_kernel::Error::generic("transactions have another shape than asked for"))?;
        }
        Ok(newest)
    };
    let transactions: HashMap<String, i64> = tokio::task::spawn_blocking(read)
        .await
        .map_err(|_| TableError::Thread { stream: stream.clone() })?
        .map_err(|source| TableError::Transactions { stream: stream.clone(), source: Box::new(source) })?;
    let mut marks = Marks::new();
    for (app_id, version) in &transactions {
        apply(&mut marks, app_id, *version);
    }
    Ok(marks)
}

/// Adds the transactions of a batch of actions whose `appId` is not there yet. `None` when it has not their columns.
fn read_transactions(actions: &RecordBatch, newest: &mut HashMap<String, i64>) -> Option<()> {
    let txn: &StructArray = actions.column_by_name("txn")?.as_struct_opt()?;
    let ids = txn.column_by_name("appId")?.as_string_opt::<i32>()?;
    let versions = txn.column_by_name("version")?.as_primitive_opt::<Int64Type>()?;
    for row in (0..txn.len()).filter(|row| txn.is_valid(*row) && ids.is_valid(*row)) {
        newest.entry(ids.value(row).to_owned()).or_insert_with(|| versions.value(row));
    }
    Some(())
}

/// `txn` at version `to`, from `txn` at version `from` and the commits in between; `None` when one of them is no
/// longer in the log.
pub(super) async fn follow(
    stream: &StreamName,
    log_store: &LogStoreRef,
    txn: &Marks,
    from: u64,
    to: u64,
) -> Result<Option<Marks>, TableError> {
    let delta = |source| TableError::delta(stream, source);
    let mut marks: HashMap<SpoolId, Mark> = txn.clone();
    for version in from + 1..=to {
        let Some(bytes) = log_store.read_commit_entry(version).await.map_err(delta)? else {
            return Ok(None);
        };
        for action in get_actions(version, &bytes).map_err(delta)? {
            if let Action::Txn(transaction) = action {
                apply(&mut marks, &transaction.app_id, transaction.version);
            }
        }
    }
    Ok(Some(marks))
}

fn apply(marks: &mut Marks, app_id: &str, version: i64) {
    let (id, is_crc) = app_id.strip_suffix(CRC).map_or((app_id, false), |id| (id, true));
    let Ok(spool) = id.parse::<SpoolId>() else { return };
    let mark = marks.entry(spool).or_default();
    if is_crc {
        mark.crc = u32::try_from(version).unwrap_or_default();
    } else {
        mark.seq = Seq(u64::try_from(version).unwrap_or_default());
    }
}
