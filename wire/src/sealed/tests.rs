use std::sync::Arc;

use arrow_array::{Float64Array, StringArray, TimestampMicrosecondArray};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::schema::{FieldType, StreamField};
use crate::{DAY_US, Seq, SpoolId, TS_MIN_US};

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

fn number(cut: &CutBatch) -> SealedBatch {
    cut.number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(5), 0xdead_beef)
}

fn sealed(n: usize) -> SealedBatch {
    number(&cut(n))
}

/// As agents sealed before format 2; none when this build has not the codec.
fn old_cut(n: usize, codec: CompressionType) -> Option<CutBatch> {
    let options = IpcWriteOptions::default().try_with_compression(Some(codec)).unwrap();
    let mut context = IpcWriteContext::default();
    let encoded =
        IpcDataGenerator::default().encode(&rows(n), &mut DictionaryTracker::new(false), &options, &mut context);
    let (_, data) = encoded.ok()?;
    let mut body = (data.ipc_message.len() as u32).to_le_bytes().to_vec();
    body.extend_from_slice(&data.ipc_message);
    body.extend_from_slice(&data.arrow_data);
    Some(CutBatch { format: BodyFormat::Arrow, body: body.into(), ..cut(n) })
}

fn old(n: usize) -> CutBatch {
    old_cut(n, CompressionType::ZSTD).unwrap()
}

fn fixture(name: &str) -> Bytes {
    let path = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    Bytes::from(std::fs::read(path).unwrap())
}

/// What spools and WALs in the field hold: v1 was written by the agent at 89224a5, v2 by the first that had it.
#[test]
fn batches_of_every_version_are_read_and_numbered_as_they_always_were() {
    for (version, format) in [("v1", BodyFormat::Arrow), ("v2", BodyFormat::Columns)] {
        let (cut_bytes, sealed_bytes) =
            (fixture(&format!("{version}/cut.bin")), fixture(&format!("{version}/sealed.bin")));
        let cut = CutBatch::read(&mut cut_bytes.clone()).unwrap();
        assert_eq!(cut.format, format);
        assert_eq!(cut.decode(&schema()).unwrap(), rows(200));
        let mut again = Vec::new();
        cut.write(&mut again);
        assert_eq!(again, cut_bytes);
        assert_eq!(number(&cut).bytes(), &sealed_bytes, "a number of before an update has the same bytes after it");
        let batch = SealedBatch::parse(sealed_bytes).unwrap();
        assert_eq!(batch.decode(&schema()).unwrap(), rows(200));
        assert_eq!(batch.split().is_some(), format == BodyFormat::Columns);
    }
    let (void, batch) = (fixture("v1/void.bin"), SealedBatch::parse(fixture("v1/sealed.bin")).unwrap());
    let again = SealedBatch::void(batch.header().clone(), "the body does not decode", batch.crc());
    assert_eq!(SealedBatch::parse(void).unwrap(), again);
}

#[test]
fn the_origin_of_a_batch_is_that_of_the_next() {
    let (first, second) = (sealed(10), cut(20).number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(6), 7));
    let ((origin, rest), (same, _)) = (first.split().unwrap(), second.split().unwrap());
    assert_eq!(origin, same);
    assert_eq!([origin, rest].concat(), *first.bytes());
    let reload = CutBatch { configuration: 8, ..cut(10) };
    assert_ne!(number(&reload).split().unwrap().0, same);
}

#[test]
fn what_is_before_the_rows_comes_back() {
    for (min_ts, max_ts, watermark) in [
        (1, 2, 3),
        (0, 0, NO_WATERMARK),
        (TS_MIN_US, TS_MIN_US + 1, TS_MIN_US - 5_000_000),
        (i64::MIN, i64::MAX, i64::MAX),
    ] {
        let batch = number(&CutBatch { min_ts, max_ts, watermark, rows: u32::MAX, ..cut(1) });
        let back = SealedBatch::parse(batch.bytes().clone()).unwrap();
        assert_eq!(back, batch);
        assert_eq!((back.header().min_ts, back.header().max_ts, back.header().watermark), (min_ts, max_ts, watermark));
    }
}

#[test]
fn a_batch_comes_back_from_its_bytes() {
    for batch in [1, 10, 8_192].into_iter().flat_map(|n| [sealed(n), number(&old(n))]) {
        let n = batch.header().rows as usize;
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
    let (new, old) = (cut(100), old(100));
    let mut bytes = Vec::new();
    new.write(&mut bytes);
    old.write(&mut bytes);
    new.write(&mut bytes);
    let mut bytes = Bytes::from(bytes);
    for batch in [&new, &old, &new] {
        assert_eq!(CutBatch::read(&mut bytes).unwrap(), *batch);
    }
    assert!(bytes.is_empty());
    assert_eq!(CutBatch::read(&mut Bytes::from_static(&[0x83, 1, 2])), Err(SealedError::Version(3)));
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    for batch in [sealed(10), number(&old(10))] {
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

/// Hostile Arrow bodies with a right checksum: an error, never a panic, never memory beyond the limit.
#[test]
fn a_hostile_body_is_refused() {
    let seed = rand::rng().random::<u64>();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let batch = old(200);
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
    let mut body = old(200).body.to_vec();
    let message_len = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize;
    // The first compressed buffer of the body says how long it gets: claim 8 GiB.
    let at = 4 + message_len;
    let first = body[at..].windows(8).position(|w| i64::from_le_bytes(w.try_into().unwrap()) == 1_600).unwrap();
    body[at + first..at + first + 8].copy_from_slice(&(8_i64 << 30).to_le_bytes());
    let bomb = CutBatch { body: body.into(), ..old(200) };
    let bomb = bomb.number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(1), 0);
    assert!(matches!(bomb.decode(&schema()), Err(BodyError::TooLarge(_))), "{:?}", bomb.decode(&schema()));
}

/// LZ4 unpacks to its end, whatever the header says.
#[test]
fn a_body_of_another_codec_is_refused() {
    // A build without LZ4 has no way to make one.
    let Some(lz4) = old_cut(200, CompressionType::LZ4_FRAME) else { return };
    let lz4 = lz4.number(&"gw-1".parse().unwrap(), SpoolId([3; 16]), Seq(1), 0);
    assert!(lz4.decode(&schema()).unwrap_err().to_string().contains("Zstandard"));
}

#[test]
fn what_a_batch_unpacks_to_is_told_before() {
    for batch in [sealed(8_192), number(&old(8_192))] {
        let rows = batch.decode(&schema()).unwrap();
        assert!(batch.decoded_bytes() >= 8_192 * 16, "{}", batch.decoded_bytes());
        // Texts are there twice while they are decoded.
        assert!(batch.decoded_bytes() <= 2 * rows.get_array_memory_size());
    }
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
