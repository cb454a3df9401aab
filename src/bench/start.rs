//! `weir bench start`: from the start of the agent's process to its first reading in the spool, on disk.
//!
//! The reading stands in a file that the agent follows, and the cloud is away; so that what the agent would wait for to
//! send larger batches is not measured, it cuts at once. The spool's log is looked at every
//! millisecond for a new cut; its layout is that of `segment-log`, its kinds those of the agent's spool.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::Common;
use super::parts::{Directory, Edge, PATIENCE};

const LOOK: Duration = Duration::from_millis(1);
const SEGMENT_HEADER: usize = 48;
const RECORD_HEADER: usize = 25;
/// A cut.
const KIND_GROUP: u8 = 2;

/// Options of `weir bench start`.
#[derive(Debug, clap::Args)]
pub(crate) struct StartBench {
    /// Starts of each kind: in a new data directory, and after a kill -9
    #[arg(long, default_value_t = 10)]
    starts: usize,
    #[command(flatten)]
    common: Common,
}

/// Cuts in the lane of readings; none while there is no log.
fn cuts(data: &Path) -> usize {
    let spool = data.join("spool");
    let Ok(id) = std::fs::read_to_string(spool.join("id")) else { return 0 };
    let Ok(entries) = std::fs::read_dir(spool.join(id.trim()).join("rest")) else { return 0 };
    let segments = entries.filter_map(|entry| std::fs::read(entry.ok()?.path()).ok());
    segments.map(|bytes| cuts_of(&bytes)).sum()
}

fn cuts_of(segment: &[u8]) -> usize {
    let (mut cuts, mut at) = (0, SEGMENT_HEADER);
    while let Some(head) = segment.get(at..at + RECORD_HEADER) {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        cuts += usize::from(head[RECORD_HEADER - 1] == KIND_GROUP);
        if head.iter().all(|byte| *byte == 0) {
            break;
        }
        at += RECORD_HEADER + length;
    }
    cuts
}

impl StartBench {
    pub(super) fn run(&self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let (mut new, mut after_kill) = (Vec::new(), Vec::new());
        for index in 0..self.starts {
            let place = directory.0.join(index.to_string());
            std::fs::create_dir(&place)?;
            new.push(self.first_reading(&place)?);
            after_kill.push(self.first_reading(&place)?);
        }
        Ok(json!({ "new_ms": spread(new), "after_kill_ms": spread(after_kill) }))
    }

    /// Adds a reading to the file, starts the agent, and kills it when the reading is in the spool. Milliseconds.
    fn first_reading(&self, place: &Path) -> anyhow::Result<f64> {
        let file = place.join("readings.ndjson");
        let data = place.join("edge");
        let mut lines = std::fs::File::options().create(true).append(true).open(&file)?;
        writeln!(lines, "{{\"n\":1}}")?;
        let before = cuts(&data);
        let config = format!(
            "[cut]\nseal_max = \"10ms\"\nseal_away = \"10ms\"\n[[source]]\nkind = \"file\"\npath = {:?}\nstream = \"load\"\n[source.map]\ndevice = \"const:d\"\nn = \"/n\"\n\
             [stream.load.fields]\nn = {{ type = \"int64\" }}\n",
            file.to_str().context("a path in UTF-8")?
        );
        let started = Instant::now();
        // Nothing listens at this address.
        let _edge = Edge::spawn(place, &self.common, "http://127.0.0.1:9", &config)?;
        while cuts(&data) == before {
            ensure!(started.elapsed() < PATIENCE, "no reading is in the spool");
            std::thread::sleep(LOOK);
        }
        Ok(started.elapsed().as_secs_f64() * 1_000.0)
    }
}

fn spread(mut times: Vec<f64>) -> Value {
    times.sort_by(f64::total_cmp);
    json!({ "min": times.first(), "p50": times.get(times.len() / 2), "max": times.last(), "count": times.len() })
}
