//! What a request carries: no schema and no origin that its node has taken before, and as one Zstandard frame when that pays.
//!
//! A node that was restarted, or another one behind the same address, has nothing of it and says so; then all is sent again.
//! One that does not know the encoding gets requests as they are from then on.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use wire::request::{KIND_BATCH, KIND_SCHEMA, OriginId, pack, push_frame, push_rest};
use wire::{SchemaId, SealedBatch};

/// Larger batches are packed themselves, and nothing is left to find in a request of them.
const PACK_BATCH_BYTES_MAX: usize = 4 << 10;
/// What is kept of a node; above it all is sent again.
const KNOWN_MAX: usize = 4_096;

/// A request, ready to go.
#[derive(Debug, Clone)]
pub struct Parcel {
    pub body: Bytes,
    /// `body` is one Zstandard frame.
    pub packed: bool,
    /// It stands on nothing that it does not carry.
    pub whole: bool,
    /// What the node has when it has taken it.
    brings: Vec<Known>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Known {
    Schema(SchemaId),
    Origin(OriginId),
}

/// What each node has, by the index of its address.
#[derive(Debug, Default)]
pub struct Nodes(HashMap<usize, Node>);

#[derive(Debug, Default)]
struct Node {
    has: HashSet<Known>,
    /// It does not know the encoding.
    plain: bool,
}

impl Nodes {
    /// Batches and their schemas (canonical texts), as a request to a node.
    pub fn parcel(&self, url: usize, schemas: &[(SchemaId, &str)], batches: &[SealedBatch]) -> Parcel {
        let nothing = Node::default();
        let node = self.0.get(&url).unwrap_or(&nothing);
        let bytes = batches.iter().map(|batch| batch.bytes().len() + 5).sum::<usize>();
        let mut body = Vec::with_capacity(bytes + 1_024);
        let (mut whole, mut brings) = (true, Vec::new());
        for (id, text) in schemas {
            if node.has.contains(&Known::Schema(*id)) {
                whole = false;
            } else {
                push_frame(&mut body, KIND_SCHEMA, text.as_bytes());
                brings.push(Known::Schema(*id));
            }
        }
        for batch in batches {
            let Some((origin, rest)) = batch.split() else {
                push_frame(&mut body, KIND_BATCH, batch.bytes());
                continue;
            };
            let origin = OriginId::of(&origin);
            let known = Known::Origin(origin);
            let brought = brings.contains(&known);
            if brought || node.has.contains(&known) {
                push_rest(&mut body, origin, &rest);
                whole &= brought;
            } else {
                push_frame(&mut body, KIND_BATCH, batch.bytes());
                brings.push(known);
            }
        }
        let pays = !node.plain && bytes <= batches.len() * PACK_BATCH_BYTES_MAX;
        let packed = if pays { pack(&body) } else { None };
        Parcel { packed: packed.is_some(), body: packed.unwrap_or_else(|| body.into()), whole, brings }
    }

    /// The node has taken it.
    pub fn taken(&mut self, url: usize, parcel: &Parcel) {
        let has = &mut self.0.entry(url).or_default().has;
        if has.len() >= KNOWN_MAX {
            has.clear();
        }
        has.extend(&parcel.brings);
    }

    /// The node does not have what it was thought to have. Returns whether it is to be sent again.
    pub fn unknown(&mut self, url: usize, parcel: &Parcel) -> bool {
        self.0.entry(url).or_default().has.clear();
        !parcel.whole
    }

    /// The node does not know the encoding. Returns whether it is to be sent again.
    pub fn unreadable(&mut self, url: usize, parcel: &Parcel) -> bool {
        self.0.entry(url).or_default().plain = true;
        parcel.packed
    }
}

#[cfg(test)]
impl Parcel {
    /// Of any bytes.
    pub(super) fn plain(body: Vec<u8>) -> Self {
        Self { body: body.into(), packed: false, whole: true, brings: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, RecordBatch, StringArray, TimestampMicrosecondArray};
    use wire::request::{Frame, frames, unpack, unpacked_len};
    use wire::{CutBatch, Seq, SpoolId, StreamSchema, TS_MIN_US};

    use super::*;

    fn batches(count: u64, rows: usize) -> Vec<SealedBatch> {
        let schema = StreamSchema::new(Vec::new()).unwrap();
        let sealed = |seq| {
            let devices = (0..rows).map(|row| format!("{:x}", (seq as usize * 7_919 + row * 104_729) % 1_000_003));
            let columns: Vec<ArrayRef> = vec![
                Arc::new(TimestampMicrosecondArray::from(vec![TS_MIN_US + seq as i64; rows]).with_timezone("UTC")),
                Arc::new(StringArray::from_iter_values(devices)),
                Arc::new(StringArray::from(vec!["good"; rows])),
            ];
            let rows = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
            let cut = CutBatch::seal("s".parse().unwrap(), &schema, &rows, TS_MIN_US, "agent", 1).unwrap();
            cut.number(&"gw".parse().unwrap(), SpoolId([5; 16]), Seq(seq), 0)
        };
        (1..=count).map(sealed).collect()
    }

    fn kinds(parcel: &Parcel) -> String {
        let body = match parcel.packed {
            true => unpack(&parcel.body, unpacked_len(&parcel.body).unwrap() as usize).unwrap(),
            false => parcel.body.clone(),
        };
        let kind = |frame: &Frame| match frame {
            Frame::Schema(_) => 's',
            Frame::Batch(_) => 'b',
            Frame::Rest(..) => 'r',
        };
        frames(body).unwrap().iter().map(kind).collect()
    }

    #[test]
    fn a_node_gets_schemas_and_origins_once_and_again_when_it_has_lost_them() {
        let schema = StreamSchema::new(Vec::new()).unwrap();
        let schemas = [(schema.id(), schema.canonical())];
        let mut nodes = Nodes::default();
        let first = nodes.parcel(0, &schemas, &batches(3, 1));
        assert_eq!((kinds(&first).as_str(), first.whole), ("sbrr", true));
        assert_eq!(kinds(&nodes.parcel(0, &schemas, &batches(3, 1))), "sbrr", "it was not taken");
        nodes.taken(0, &first);
        let second = nodes.parcel(0, &schemas, &batches(2, 1));
        assert_eq!((kinds(&second).as_str(), second.whole), ("rr", false));
        assert_eq!(kinds(&nodes.parcel(1, &schemas, &batches(1, 1))), "sb", "another address");
        assert!(nodes.unknown(0, &second), "it goes again");
        let third = nodes.parcel(0, &schemas, &batches(2, 1));
        assert_eq!(kinds(&third), "sbr");
        assert!(!nodes.unknown(0, &third), "a node that has all and does not know it is not well");
    }

    #[test]
    fn a_request_is_packed_when_that_pays_and_the_node_can_read_it() {
        let mut nodes = Nodes::default();
        let small = nodes.parcel(0, &[], &batches(50, 10));
        assert!(
            small.packed
                && small.body.len() < 9 * batches(50, 10).iter().map(|one| one.bytes().len()).sum::<usize>() / 10
        );
        let large = nodes.parcel(0, &[], &batches(1, 20_000));
        assert!(!large.packed && large.body.len() > PACK_BATCH_BYTES_MAX);
        assert!(nodes.unreadable(0, &small), "it goes again");
        let plain = nodes.parcel(0, &[], &batches(50, 10));
        assert!(!plain.packed && kinds(&plain).len() == 50);
        assert!(!nodes.unreadable(0, &plain));
    }
}
