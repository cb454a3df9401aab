use arrow_array::{ArrayRef, RecordBatch, StringArray, TimestampMicrosecondArray};
use wire::request::{KIND_BATCH, KIND_SCHEMA, OriginId, pack, push_frame, push_rest};
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, Mark, Refusal, Seq, TS_MIN_US};

use super::*;

fn checked(seq: u64) -> Checked {
    let schema = StreamSchema::new(Vec::new()).unwrap();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_value(TS_MIN_US, 1_000).with_timezone("UTC")),
        Arc::new(StringArray::from(vec!["d"; 1_000])),
        Arc::new(StringArray::from(vec!["good"; 1_000])),
    ];
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
    let cut = CutBatch::seal("traffic".parse().unwrap(), &schema, &rows, NO_WATERMARK, "test", 1).unwrap();
    (cut.number(&"gw".parse().unwrap(), SpoolId([1; 16]), Seq(seq), 0), Arc::new(schema))
}

#[test]
fn a_request_is_taken_in_parts_by_what_it_unpacks_to() {
    let one = checked(1).0.decoded_bytes();
    assert!(one > checked(1).0.bytes().len(), "rows that repeat");
    let sizes = |bytes_max| {
        let parts = parts((1..=7).map(checked).collect(), bytes_max);
        assert!(parts.iter().all(|(bytes, part)| *bytes == one * part.len()));
        let seqs = parts.iter().flat_map(|(_, part)| part).map(|(batch, _)| batch.header().seq.0);
        assert!(seqs.eq(1..=7), "in order");
        parts.into_iter().map(|(_, part)| part.len()).collect::<Vec<_>>()
    };
    assert_eq!(sizes(3 * one), [3, 3, 1]);
    assert_eq!(sizes(7 * one), [7]);
    assert_eq!(sizes(0), [1; 7], "a batch that is too large for a part is one");
}

#[test]
fn the_answer_of_the_last_part_counts_for_each_sequence() {
    let ack = |stream: &str, seq| {
        let durable = Mark { seq: Seq(seq), crc: 0 };
        StreamAck { spool: SpoolId([1; 16]), stream: stream.parse().unwrap(), durable, committed: Mark::default() }
    };
    let refusal =
        |seq| Refusal { spool: SpoolId([1; 16]), stream: "a".parse().unwrap(), seq: Seq(seq), reason: String::new() };
    let mut all = Acks { node: "n".into(), acks: vec![ack("a", 1), ack("b", 2)], refused: vec![refusal(1)] };
    merge(&mut all, Acks { node: "n".into(), acks: vec![ack("a", 3)], refused: vec![refusal(4)] });
    assert_eq!(all.acks, [ack("b", 2), ack("a", 3)]);
    assert_eq!(all.refused, [refusal(1), refusal(4)]);
}

const REQUEST_BYTES_MAX: usize = 64 << 10;
pub(super) const EDGE: &str = "gw";

/// A door behind which all is taken, and the numbers of what was.
pub(super) fn door() -> (Arc<Door>, Arc<parking_lot::Mutex<Vec<u64>>>) {
    let (jobs, asked) = crate::ingest::queue::queue();
    let taken = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let seen = Arc::clone(&taken);
    std::thread::spawn(move || {
        while let Some(Job::Batches { batches, reply, .. }) = asked.next_within(Duration::from_secs(60)) {
            for Arrived { batch, rows, .. } in batches {
                assert_eq!(rows.unwrap().num_rows(), 1_000);
                seen.lock().push(batch.header().seq.0);
            }
            reply.send(Ok(Acks::default())).unwrap();
        }
    });
    let door = Door {
        edges: [(EDGE, "t"), ("other", "o")]
            .map(|(id, token)| EdgeSettings { id: id.parse().unwrap(), token: token.to_owned() })
            .into(),
        commands: Arc::new(Commands::new([EDGE.parse().unwrap(), "other".parse().unwrap()], 8)),
        write: WriteSettings::default(),
        request_bytes_max: REQUEST_BYTES_MAX,
        room: room_of(4 * REQUEST_BYTES_MAX),
        decoded: room_of(2 * BATCH_DECODED_BYTES_MAX),
        places: ByClass::new(|_| Arc::new(Semaphore::new(8))),
        reading: Arc::new(Semaphore::new(2)),
        jobs,
        metrics: Arc::default(),
        own_names: OwnNames::default(),
        ready: AtomicBool::new(true),
        schemas: RwLock::default(),
        origins: RwLock::default(),
    };
    (Arc::new(door), taken)
}

async fn send(door: &Arc<Door>, encoding: Option<&str>, body: impl Into<Body>) -> Result<(), RefusedRequest> {
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer t"));
    if let Some(encoding) = encoding {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_str(encoding).unwrap());
    }
    let answer = take_batches(door, EDGE, &headers, body.into()).await;
    assert_eq!(door.room.available_permits(), 4 * REQUEST_BYTES_MAX / ROOM_UNIT, "room is given back");
    answer.map(drop).map_err(|answer| answer.refused)
}

fn whole(seqs: std::ops::Range<u64>) -> Vec<u8> {
    let mut body = Vec::new();
    for (batch, schema) in seqs.map(checked) {
        push_frame(&mut body, KIND_SCHEMA, schema.canonical().as_bytes());
        push_frame(&mut body, KIND_BATCH, batch.bytes());
    }
    body
}

fn rest(seq: u64) -> Vec<u8> {
    let (origin, rest) = checked(seq).0.split().unwrap();
    let mut body = Vec::new();
    push_rest(&mut body, OriginId::of(&origin), &rest);
    body
}

#[tokio::test]
async fn a_packed_request_is_unpacked_within_its_room() {
    let (door, taken) = door();
    let packed = pack(&whole(1..20)).unwrap();
    send(&door, Some("zstd"), packed.clone()).await.unwrap();
    send(&door, Some("identity"), whole(20..22)).await.unwrap();
    assert!(taken.lock().iter().copied().eq(1..22));
    // It would unpack to more than a request may have: nothing is unpacked.
    let bomb = pack(&vec![0; REQUEST_BYTES_MAX + 1]).unwrap();
    assert!(bomb.len() < 100);
    let refused = send(&door, Some("zstd"), bomb).await.unwrap_err();
    assert_eq!((refused.status(), refused.kind()), (413, "too_large"));
    for damaged in [packed.slice(..packed.len() - 1), packed.slice(1..), Bytes::new(), Bytes::from(whole(1..2))] {
        assert_eq!(send(&door, Some("zstd"), damaged).await.unwrap_err().status(), 400);
    }
    for encoding in ["gzip", "br", "zstd, zstd"] {
        let refused = send(&door, Some(encoding), whole(1..2)).await.unwrap_err();
        assert_eq!((refused.status(), refused.kind()), (415, "encoding_unknown"), "{encoding}");
    }
    assert_eq!(taken.lock().len(), 21);
}

#[tokio::test]
async fn a_batch_without_its_origin_is_taken_by_a_node_that_has_it() {
    let (door, taken) = door();
    let unknown = |refused: RefusedRequest| (refused.status(), refused.kind());
    assert_eq!(unknown(send(&door, None, rest(2)).await.unwrap_err()), (412, "origin_unknown"));
    send(&door, None, [whole(1..2), rest(2)].concat()).await.unwrap();
    send(&door, None, rest(3)).await.unwrap();
    assert_eq!(*taken.lock(), [1, 2, 3]);
    // One of the same name that is another: the checksum says so.
    let (origin, rest) = checked(4).0.split().unwrap();
    let other = checked(4).0.split().unwrap().0.iter().rev().copied().collect::<Vec<_>>();
    let mut body = Vec::new();
    push_rest(&mut body, OriginId::of(&origin), &[&rest[..], &other[..1]].concat());
    assert_eq!(unknown(send(&door, None, body).await.unwrap_err()), (412, "origin_unknown"));
    // What another edge has sent is not to be stood on.
    let foreign = door.origins.read().whole(&"other".parse().unwrap(), OriginId::of(&origin), &rest);
    assert_eq!(foreign, None);
    assert_eq!(*taken.lock(), [1, 2, 3]);
}
