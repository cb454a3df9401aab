//! The application transactions of a table.
//!
//! Two per spool: `appId` = the spool's 32 hexadecimal digits, `version` = the last batch's number; and
//! `appId` = the same with `/crc` behind it, `version` = that batch's CRC. Others are not ours and are left alone.

use std::collections::BTreeMap;

use wire::ack::Mark;
use wire::ids::{Seq, SpoolId};

use super::{CommitError, Marks};

/// Ends the `appId` of a CRC.
pub(super) const CRC: &str = "/crc";

/// The transactions of a commit, as `appId` and version; one pair per spool, since readers may take either of two.
pub(super) fn transactions(marks: &[(SpoolId, Seq, Mark)]) -> Vec<(String, i64)> {
    let last_of_spool: BTreeMap<SpoolId, Mark> = marks.iter().map(|(spool, _, last)| (*spool, *last)).collect();
    let pairs = last_of_spool.iter().flat_map(|(spool, last)| {
        [(spool.to_string(), last.seq.0.cast_signed()), (format!("{spool}{CRC}"), i64::from(last.crc))]
    });
    pairs.collect()
}

/// `txn` after a commit of these batches: each must follow what is committed.
pub(super) fn next_marks(txn: &Marks, marks: &[(SpoolId, Seq, Mark)]) -> Result<Marks, CommitError> {
    let mut next = txn.clone();
    for (spool, first, last) in marks {
        let committed = next.get(spool).map_or(Seq(0), |mark| mark.seq);
        if *first <= committed {
            return Err(CommitError::Covered { spool: *spool, committed });
        }
        if *first != committed.next() || last.seq < *first {
            return Err(CommitError::Gap { spool: *spool, committed, got: *first });
        }
        next.insert(*spool, *last);
    }
    Ok(next)
}

/// Takes a transaction of the log.
pub(super) fn apply(marks: &mut Marks, app_id: &str, version: i64) {
    let (id, is_crc) = app_id.strip_suffix(CRC).map_or((app_id, false), |id| (id, true));
    let Ok(spool) = id.parse::<SpoolId>() else { return };
    let mark = marks.entry(spool).or_default();
    if is_crc {
        mark.crc = u32::try_from(version).unwrap_or_default();
    } else {
        mark.seq = Seq(u64::try_from(version).unwrap_or_default());
    }
}
