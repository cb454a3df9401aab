use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use segment_log::Position;

use super::*;
use crate::entry::{Message, Payload};
use crate::journal::OpenJournal;
use crate::pipeline::Pipeline;

fn settings(directory: &Path) -> Settings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = '{}'\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n[source.map]\n\
         device = \"topic:0\"\nv = \"/v\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n",
        directory.display()
    );
    Settings::parse(&text).unwrap()
}

fn message(number: i64) -> Entry {
    Entry::Message(Message {
        source: "s".into(),
        topic: "dev".into(),
        payload: Payload::Whole(format!("{{\"v\":{number}}}").into()),
        arrival_us: 1_700_000_000_000_000 + number,
        delivery: None,
    })
}

/// A stopped agent's directory: 200 messages in the journal, and as many rows in the spool.
async fn directory() -> (tempfile::TempDir, Settings) {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(directory.path());
    let (open, _) = OpenJournal::open(directory.path().join("journal"), journal_options(&settings)).unwrap();
    let journal = open.run(Duration::from_millis(1)).unwrap();
    let mut sender = journal.sender();
    let (mut spool, _) =
        Spool::open(&Disk, &spool_directory(directory.path()), spool_settings(&settings), SpoolId([7; 16])).unwrap();
    let mut pipeline = Pipeline::new(&settings, Position(0), &BTreeMap::new());
    for number in 0..200 {
        let ticket = sender.append(&message(number)).await.unwrap();
        sender.durable().wait_for(|durable| *durable >= ticket).await.unwrap();
        let at = Position(number.cast_unsigned());
        pipeline.apply(at, Position(at.0 + 1), &message(number));
        if number % 50 == 49 {
            let cut = pipeline.cut().unwrap();
            for (index, lane) in cut.lanes.iter().enumerate().filter(|(_, lane)| !lane.batches.is_empty()) {
                spool.append(index, cut.position, &lane.batches, &lane.schemas, 0).unwrap();
            }
        }
    }
    tokio::task::spawn_blocking(move || journal.stop()).await.unwrap();
    spool.mark().unwrap();
    (directory, settings)
}

/// All files with their bytes.
fn bytes(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => left.push(entry.path()),
                false => drop(all.insert(entry.path(), fs::read(entry.path()).unwrap())),
            }
        }
    }
    all
}

fn run(command: &SpoolCommand, settings: &Settings) -> String {
    match execute(command, settings) {
        Ok(text) => text,
        Err(error) => format!("error: {error:#}"),
    }
}

fn damage(file: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    FileExt::read_exact_at(&file, &mut byte, at).unwrap();
    FileExt::write_all_at(&file, &[byte[0] ^ 0xff], at).unwrap();
}

fn segment(log: &Path) -> PathBuf {
    let files = fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ending| ending == "seg")).min().unwrap()
}

#[tokio::test]
async fn a_whole_directory_is_read_and_not_touched() {
    let (directory, settings) = directory().await;
    let before = bytes(directory.path());
    let status = run(&SpoolCommand::Status, &settings);
    assert!(status.contains("journal: whole; 200 records"), "{status}");
    assert!(status.contains("200 rows wait for the cloud's commit"), "{status}");
    assert!(status.contains("stream s: 200 rows in 4 batches, 2023-11-14T22:13:20Z to"), "{status}");
    assert!(run(&SpoolCommand::Verify, &settings).contains("lane rest: whole"));
    let repaired = run(&SpoolCommand::Repair, &settings);
    assert!(repaired.contains("journal: whole, not touched"), "{repaired}");
    assert!(bytes(directory.path()) == before, "something was written");
}

#[tokio::test]
async fn damage_is_named_and_repaired_without_losing_what_can_be_read() {
    let (directory, settings) = directory().await;
    let journal = segment(&directory.path().join("journal"));
    let lane = segment(&spool_directory(directory.path()).join(SpoolId([7; 16]).to_string()).join("rest"));
    // A record in the middle, the header of the other log, and the spool's name.
    damage(&journal, 3_000);
    damage(&lane, 20);
    fs::write(spool_directory(directory.path()).join("id"), "?").unwrap();
    let verified = run(&SpoolCommand::Verify, &settings);
    assert!(verified.contains("journal: damaged; 199 records"), "{verified}");
    assert!(verified.contains("journal: no readable record from 2"), "{verified}");
    assert!(verified.contains("lane rest: damaged segment header from 0"), "{verified}");
    let repaired = run(&SpoolCommand::Repair, &settings);
    assert!(repaired.contains("was written anew"), "{repaired}");
    assert!(repaired.contains("all 199 records that could be read still can"), "{repaired}");
    assert!(repaired.contains("lane rest: repaired"), "{repaired}");
    assert!(repaired.contains("lane first: whole, not touched"), "{repaired}");
    let status = run(&SpoolCommand::Status, &settings);
    assert!(status.contains("stream s: 200 rows in 4 batches"), "{status}");
    assert!(!run(&SpoolCommand::Verify, &settings).contains("lane rest: damaged"));
}

#[tokio::test]
async fn the_rows_that_wait_are_exported() {
    let (directory, settings) = directory().await;
    let out = directory.path().join("out");
    let command = SpoolCommand::Export { out: out.clone() };
    assert!(run(&command, &settings).ends_with("s.arrow: 200 rows"));
    let reader = arrow_ipc::reader::FileReader::try_new(File::open(out.join("s.arrow")).unwrap(), None).unwrap();
    assert_eq!(reader.map(|rows| rows.unwrap().num_rows()).sum::<usize>(), 200);
    assert!(run(&command, &settings).starts_with("error: make"), "nothing is overwritten");
}

#[tokio::test]
async fn nothing_is_read_while_an_agent_runs() {
    let (directory, settings) = directory().await;
    let open = OpenJournal::open(directory.path().join("journal"), journal_options(&settings)).unwrap();
    let refused = run(&SpoolCommand::Status, &settings);
    assert!(refused.starts_with("error: stop the agent first"), "{refused}");
    drop(open);
}
