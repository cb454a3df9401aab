//! Bytes per reading on the link, by rows in a batch: what Weir sends beside what others would, as a table and as JSON.
//!
//! `cargo run --release -p edge-agent --example link_bytes -- traffic.csv.gz [--json]`. The file is that of the city of Aarhus: rows in
//! order of arrival, of which device, time, speed and count are kept. HTTP and TLS are left out everywhere. The lower part of
//! the table is what was tried for small batches.

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;

use anyhow::{Context, bail};
use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, DictionaryArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};
use chrono::NaiveDateTime;
use edge_agent::uplink::http::body;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use wire::{CutBatch, FieldType, SealedBatch, Seq, SpoolId, StreamField, StreamSchema};

/// Rows of the file that are used.
const ROWS: usize = 50_000;
const SIZES: [usize; 4] = [10, 100, 1_000, 5_000];
/// Batches in one request when a backlog of small ones goes.
const BACKLOG: usize = 50;

struct Reading {
    device: String,
    ts: i64,
    speed: f64,
    count: i64,
}

/// One way to send a batch of rows, or several in one request.
type Way = (&'static str, fn(&[&[Reading]]) -> anyhow::Result<usize>, usize);

#[allow(clippy::print_stdout, reason = "its answer")]
fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).context("name the file of readings")?;
    let readings = read(&path)?;
    let ways: [Way; 17] = [
        ("weir, a request of one batch", weir, 1),
        ("weir, a request of 50 batches", weir, BACKLOG),
        ("JSON", json, 1),
        ("JSON + gzip", |rows| gzip(json_text(rows)), 1),
        ("line protocol + gzip", |rows| gzip(line_text(rows)), 1),
        ("Arrow IPC stream + zstd", ipc_stream, 1),
        ("- weir without the schema", |rows| Ok(sealed(rows)?.iter().map(|batch| batch.bytes().len() + 5).sum()), 1),
        ("- weir's Arrow body alone", |rows| Ok(cuts(rows)?.iter().map(|cut| cut.body.len()).sum()), 1),
        ("- body as one zstd frame, level 3", |rows| frames(rows, 3, false), 1),
        ("- body as one zstd frame, level 19", |rows| frames(rows, 19, false), 1),
        ("- the same, dictionaries whole within", |rows| frames(rows, 3, true), 1),
        ("- zstd with a dictionary over batches", trained, 1),
        ("- request of one batch, gzip", |rows| gzip(&request(rows)?), 1),
        ("- request of one batch, zstd", |rows| Ok(zstd::bulk::compress(&request(rows)?, 3)?.len()), 1),
        ("- request of 50 batches, gzip", |rows| gzip(&request(rows)?), BACKLOG),
        ("- request of 50 batches, zstd", |rows| Ok(zstd::bulk::compress(&request(rows)?, 3)?.len()), BACKLOG),
        ("- plain bodies, 50 batches, zstd", plain_request, BACKLOG),
    ];
    let mut out = Vec::new();
    for (name, way, batches) in ways {
        let mut columns = Vec::new();
        for size in SIZES {
            let all = readings.chunks_exact(size).collect::<Vec<_>>();
            let mut bytes = 0;
            for group in all.chunks(batches) {
                bytes += way(group)?;
            }
            columns.push(bytes as f64 / (all.len() * size) as f64);
        }
        out.push((name, columns));
    }
    if std::env::args().any(|argument| argument == "--json") {
        let rows = out.iter().map(|(name, columns)| {
            let columns = SIZES.iter().zip(columns).map(|(size, bytes)| format!("\"{size}\":{bytes:.2}"));
            format!("\"{name}\":{{{}}}", columns.collect::<Vec<_>>().join(","))
        });
        println!("{{{}}}", rows.collect::<Vec<_>>().join(","));
        return Ok(());
    }
    println!("| bytes per reading, rows in a batch: | {} |", SIZES.map(|size| size.to_string()).join(" | "));
    println!("|---|---:|---:|---:|---:|");
    for (name, columns) in out {
        let columns = columns.iter().map(|bytes| format!("{bytes:.1}")).collect::<Vec<_>>();
        println!("| {name} | {} |", columns.join(" | "));
    }
    Ok(())
}

fn read(path: &str) -> anyhow::Result<Vec<Reading>> {
    let lines = BufReader::new(GzDecoder::new(std::fs::File::open(path).context("open the readings")?)).lines();
    let mut readings = Vec::new();
    for line in lines.skip(1).take(ROWS) {
        let line = line?;
        let cells = line.split(',').collect::<Vec<_>>();
        let [_, _, speed, _, _, ts, count, _, device] = cells[..] else { bail!("a row of nine cells: {line}") };
        let ts = NaiveDateTime::parse_from_str(ts, "%Y-%m-%dT%H:%M:%S")?.and_utc().timestamp_micros();
        readings.push(Reading { device: device.to_owned(), ts, speed: speed.parse()?, count: count.parse()? });
    }
    Ok(readings)
}

fn schema() -> anyhow::Result<StreamSchema> {
    let field = |name: &str, kind| Ok::<_, anyhow::Error>(StreamField { name: name.parse()?, kind });
    let fields = vec![field("avg_speed", FieldType::Float64)?, field("vehicle_count", FieldType::Int64)?];
    Ok(StreamSchema::new(fields)?)
}

fn columns(rows: &[Reading]) -> Vec<ArrayRef> {
    vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| row.ts)).with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.device))),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|row| row.speed))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.count))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "good"))),
    ]
}

fn batch(rows: &[Reading]) -> anyhow::Result<RecordBatch> {
    Ok(RecordBatch::try_new(schema()?.arrow().clone(), columns(rows))?)
}

fn cuts(batches: &[&[Reading]]) -> anyhow::Result<Vec<CutBatch>> {
    let cut = |rows: &&[Reading]| {
        Ok(CutBatch::seal("traffic".parse()?, &schema()?, &batch(rows)?, rows[0].ts, "weir 0.1.0", 0x1234_5678)?)
    };
    batches.iter().map(cut).collect()
}

fn sealed(batches: &[&[Reading]]) -> anyhow::Result<Vec<SealedBatch>> {
    let (edge, mut crc) = ("gw-017".parse()?, 0x5eed_5eed);
    let mut sealed = Vec::new();
    for (n, cut) in cuts(batches)?.into_iter().enumerate() {
        let spool = SpoolId(0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978_u128.to_be_bytes());
        let batch = cut.number(&edge, spool, Seq(100_000 + n as u64), crc);
        crc = batch.crc();
        sealed.push(batch);
    }
    Ok(sealed)
}

fn request(batches: &[&[Reading]]) -> anyhow::Result<Vec<u8>> {
    Ok(body(&[schema()?.canonical()], &sealed(batches)?).to_vec())
}

fn weir(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    Ok(request(batches)?.len())
}

fn json_text(batches: &[&[Reading]]) -> String {
    let row = |row: &Reading| {
        let ts = chrono::DateTime::from_timestamp_micros(row.ts).unwrap_or_default().format("%Y-%m-%dT%H:%M:%SZ");
        let Reading { device, speed, count, .. } = row;
        format!(r#"{{"device":"{device}","ts":"{ts}","avg_speed":{speed},"vehicle_count":{count}}}"#) + "\n"
    };
    batches.iter().copied().flatten().map(row).collect()
}

fn json(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    Ok(json_text(batches).len())
}

fn line_text(batches: &[&[Reading]]) -> String {
    let row = |row: &Reading| {
        let Reading { device, speed, count, ts } = row;
        format!("traffic,device={device} avg_speed={speed},vehicle_count={count}i {}\n", ts / 1_000_000)
    };
    batches.iter().copied().flatten().map(row).collect()
}

fn gzip(bytes: impl AsRef<[u8]>) -> anyhow::Result<usize> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes.as_ref())?;
    Ok(encoder.finish()?.len())
}

fn ipc(batch: &RecordBatch, compression: Option<CompressionType>) -> anyhow::Result<Vec<u8>> {
    let options = IpcWriteOptions::default().try_with_compression(compression)?;
    let mut writer = StreamWriter::try_new_with_options(Vec::new(), &batch.schema(), options)?;
    writer.write(batch)?;
    Ok(writer.into_inner()?)
}

fn ipc_stream(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    batches.iter().map(|rows| Ok(ipc(&batch(rows)?, Some(CompressionType::ZSTD))?.len())).sum()
}

/// A batch's message and data without compression of their own, and without the schema that stands before them.
fn plain(rows: &[Reading], dictionaries: bool) -> anyhow::Result<Vec<u8>> {
    let batch = batch(rows)?;
    let batch = if dictionaries {
        let coded = |column: usize| -> anyhow::Result<ArrayRef> {
            let texts = arrow_array::cast::AsArray::as_string::<i32>(batch.column(column));
            Ok(Arc::new(texts.iter().flatten().collect::<DictionaryArray<Int32Type>>()))
        };
        let mut columns = batch.columns().to_vec();
        (columns[1], columns[4]) = (coded(1)?, coded(4)?);
        let names = ["ts", "device", "avg_speed", "vehicle_count", "quality"];
        RecordBatch::try_from_iter(names.into_iter().zip(columns))?
    } else {
        batch
    };
    let whole = ipc(&batch, None)?;
    // A stream without batches is its schema and an end of eight bytes.
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema())?;
    writer.finish()?;
    let head = writer.into_inner()?.len() - 8;
    Ok(whole[head..].to_vec())
}

fn around(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    Ok(sealed(batches)?.iter().zip(cuts(batches)?).map(|(sealed, cut)| sealed.bytes().len() - cut.body.len() + 5).sum())
}

fn frames(batches: &[&[Reading]], level: i32, dictionaries: bool) -> anyhow::Result<usize> {
    let bodies = batches.iter().map(|rows| Ok(zstd::bulk::compress(&plain(rows, dictionaries)?, level)?.len()));
    Ok(around(batches)? + bodies.sum::<anyhow::Result<usize>>()?)
}

/// What rule 1 rules out: a dictionary that the other end must have. It is made of batches of the same data.
fn trained(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    static DICTIONARY: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let rows = batches.first().context("no batch")?;
    let body = plain(rows, false)?;
    // The body of a batch that went before it is as good as a trained one, and the simplest to have.
    let dictionary = DICTIONARY.get_or_init(|| body.clone());
    let mut compressor = zstd::bulk::Compressor::with_dictionary(3, dictionary)?;
    Ok(around(batches)? + compressor.compress(&body)?.len())
}

/// One frame around bodies without compression of their own: what a request could be if the WAL did not store the same bytes.
fn plain_request(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    let mut request = schema()?.canonical().as_bytes().to_vec();
    for (rows, (sealed, cut)) in batches.iter().zip(sealed(batches)?.iter().zip(cuts(batches)?)) {
        let around = sealed.bytes().len() - cut.body.len();
        request.extend_from_slice(&sealed.bytes()[..around.min(sealed.bytes().len())]);
        request.extend(plain(rows, false)?);
    }
    Ok(zstd::bulk::compress(&request, 3)?.len())
}
