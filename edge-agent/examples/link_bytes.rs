//! Bytes per reading on the link, by rows in a batch: what Weir sends beside what others would, as a table and as JSON.
//!
//! `cargo run --release -p edge-agent --example link_bytes -- traffic.csv.gz [--json]`. The file is that of the city of Aarhus: rows in
//! order of arrival, of which device, time, speed and count are kept. HTTP and TLS are left out everywhere. Every
//! sealed batch is decoded and compared first.

use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};
use chrono::NaiveDateTime;
use edge_agent::uplink::parcel::{Nodes, Parcel};
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
    let ways: [Way; 10] = [
        ("weir, a request of one batch", weir, 1),
        ("weir, 50 batches in a request", weir, BACKLOG),
        ("weir, the first request to a node", |rows| Ok(parcel(&Nodes::default(), rows)?.body.len()), 1),
        ("JSON", json, 1),
        ("JSON + gzip", |rows| gzip(json_text(rows)), 1),
        ("line protocol + gzip", |rows| gzip(line_text(rows)), 1),
        ("line protocol + gzip, 50 batches in a request", |rows| gzip(line_text(rows)), BACKLOG),
        ("Arrow IPC stream + zstd", ipc_stream, 1),
        ("- weir's sealed batch", |rows| Ok(sealed(rows)?.iter().map(|batch| batch.bytes().len()).sum()), 1),
        ("- weir's body alone", |rows| Ok(cuts(rows)?.iter().map(|cut| cut.body.len()).sum()), 1),
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
        ensure!(batch.decode(&schema()?)? == self::batch(batches[n])?, "what was sealed does not come back");
        sealed.push(batch);
    }
    Ok(sealed)
}

fn parcel(nodes: &Nodes, batches: &[&[Reading]]) -> anyhow::Result<Parcel> {
    let schema = schema()?;
    Ok(nodes.parcel(0, &[(schema.id(), schema.canonical())], &sealed(batches)?))
}

/// To a node that has taken a batch of this stream before.
fn weir(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    let mut nodes = Nodes::default();
    nodes.taken(0, &parcel(&nodes, batches)?);
    Ok(parcel(&nodes, batches)?.body.len())
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

fn ipc(batch: &RecordBatch) -> anyhow::Result<Vec<u8>> {
    let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD))?;
    let mut writer = StreamWriter::try_new_with_options(Vec::new(), &batch.schema(), options)?;
    writer.write(batch)?;
    Ok(writer.into_inner()?)
}

fn ipc_stream(batches: &[&[Reading]]) -> anyhow::Result<usize> {
    batches.iter().map(|rows| Ok(ipc(&batch(rows)?)?.len())).sum()
}
