use arrow_array::{Float64Array, StringArray, TimestampMicrosecondArray};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::schema::{FieldType, StreamField};

fn schema() -> StreamSchema {
    StreamSchema::new(vec![StreamField { name: "speed".parse().unwrap(), kind: FieldType::Float64 }]).unwrap()
}

fn rows(n: usize) -> RecordBatch {
    let ts =
        TimestampMicrosecondArray::from_iter_values((0..n as i64).map(|i| TS_MIN_US + i * 1_000)).with_timezone("UTC");
    RecordBatch::try_new(
        schema().arrow().clone(),
        vec![
            Arc::new(ts),
            Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("d{}", i % 7)))),
            Arc::new(Float64Array::from_iter((0..n).map(|i| (i % 5 != 0).then_some(i as f64)))),
            Arc::new(StringArray::from_iter_values(std::iter::repeat_n("good", n))),
        ],
    )
    .unwrap()
}

fn cut(n: usize) -> CutBatch {
    CutBatch::seal("traffic".parse().unwrap(), &schema(), &rows(n), NO_WATERMARK, "0.1.0", 7).unwrap()
}

fn sealed(n: usize) -> SealedBatch {
    cut(n).number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(5), 0xdead_beef)
}

#[test]
fn a_batch_comes_back_from_its_bytes() {
    for n in [1, 10, 8_192] {
        let batch = sealed(n);
        let back = SealedBatch::parse(batch.bytes().clone()).unwrap();
        assert_eq!(back, batch);
        assert_eq!(back.decode(&schema()).unwrap(), rows(n));
        assert_eq!(back.header().previous_crc, 0xdead_beef);
    }
}

#[test]
fn numbering_again_gives_the_same_bytes() {
    assert_eq!(sealed(10).bytes(), sealed(10).bytes());
    assert_ne!(sealed(10).crc(), cut(10).number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(5), 1).crc());
}

#[test]
fn a_cut_batch_survives_the_spool() {
    let batch = cut(100);
    let mut bytes = Vec::new();
    batch.write(&mut bytes);
    batch.write(&mut bytes);
    let mut bytes = Bytes::from(bytes);
    assert_eq!(CutBatch::read(&mut bytes).unwrap(), batch);
    assert_eq!(CutBatch::read(&mut bytes).unwrap(), batch);
    assert!(bytes.is_empty());
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let batch = sealed(10);
    let bytes = batch.bytes();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(SealedBatch::parse(damaged.into()).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(SealedBatch::parse(bytes.slice(..len)).is_err(), "{len} bytes");
    }
}

#[test]
fn a_void_batch_keeps_number_and_chain() {
    let batch = sealed(10);
    let void = SealedBatch::void(batch.header().clone(), "the body does not decode", batch.crc());
    let back = SealedBatch::parse(void.bytes().clone()).unwrap();
    assert_eq!((back.header().seq, back.header().previous_crc), (Seq(5), 0xdead_beef));
    assert_eq!(back.header().void.as_ref().unwrap().replaces, batch.crc());
    assert_eq!(back.decode(&schema()).unwrap().num_rows(), 0);
}

/// Hostile bodies with a right checksum: an error, never a panic, never memory beyond the limit.
#[test]
fn a_hostile_body_is_refused() {
    let seed = rand::rng().random::<u64>();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let batch = cut(200);
    std::panic::set_hook(Box::new(|_| {}));
    for _ in 0..3_000 {
        let mut body = batch.body.to_vec();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..body.len());
            body[at] = rng.random();
        }
        let hostile = CutBatch { body: body.into(), ..batch.clone() };
        let hostile = hostile.number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(1), 0);
        if let Ok(rows) = SealedBatch::parse(hostile.bytes().clone()).unwrap().decode(&schema()) {
            assert_eq!(rows.num_rows(), 200);
        }
    }
    drop(std::panic::take_hook());
}

#[test]
fn a_compression_bomb_is_refused_before_it_is_unpacked() {
    let mut body = cut(200).body.to_vec();
    let message_len = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize;
    // The first compressed buffer of the body says how long it gets: claim 8 GiB.
    let at = 4 + message_len;
    let first = body[at..].windows(8).position(|w| i64::from_le_bytes(w.try_into().unwrap()) == 1_600).unwrap();
    body[at + first..at + first + 8].copy_from_slice(&(8_i64 << 30).to_le_bytes());
    let bomb = CutBatch { body: body.into(), ..cut(200) };
    let bomb = bomb.number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(1), 0);
    assert!(matches!(bomb.decode(&schema()), Err(BodyError::TooLarge(_))), "{:?}", bomb.decode(&schema()));
}

/// LZ4 unpacks to its end, whatever the header says.
#[test]
fn a_body_of_another_codec_is_refused() {
    let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::LZ4_FRAME)).unwrap();
    let mut context = IpcWriteContext::default();
    let encoded =
        IpcDataGenerator::default().encode(&rows(200), &mut DictionaryTracker::new(false), &options, &mut context);
    // A build without LZ4 has no way to make one.
    let Ok((_, data)) = encoded else { return };
    let mut body = (data.ipc_message.len() as u32).to_le_bytes().to_vec();
    body.extend_from_slice(&data.ipc_message);
    body.extend_from_slice(&data.arrow_data);
    let lz4 = CutBatch { body: body.into(), ..cut(200) };
    let lz4 = lz4.number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(1), 0);
    assert!(lz4.decode(&schema()).unwrap_err().to_string().contains("Zstandard"));
}

#[test]
fn what_a_batch_unpacks_to_is_told_before() {
    let batch = sealed(8_192);
    let rows = batch.decode(&schema()).unwrap();
    assert!(batch.decoded_bytes() >= 8_192 * 16, "{}", batch.decoded_bytes());
    assert!(batch.decoded_bytes() <= rows.get_array_memory_size());
}

#[test]
fn a_batch_of_too_many_dates_is_not_sealed() {
    let ts = TimestampMicrosecondArray::from_iter_values((0..65).map(|i| TS_MIN_US + i * DAY_US)).with_timezone("UTC");
    let mut columns = rows(65).columns().to_vec();
    columns[0] = Arc::new(ts);
    let rows = RecordBatch::try_new(schema().arrow().clone(), columns).unwrap();
    let sealed = CutBatch::seal("traffic".parse().unwrap(), &schema(), &rows, 0, "0", 0);
    assert!(matches!(sealed, Err(CutError::Body(BodyError::TooManyDates(65)))));
}
