use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use segment_log::Position;

use super::*;
use crate::entry::{Entry, Message, Payload};
use crate::journal::OpenJournal;
use crate::pipeline::Pipeline;

fn text(directory: &Path) -> String {
    format!(
        "[edge]\nid = \"e\"\ndata_dir = '{}'\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n[source.map]\n\
         device = \"topic:0\"\nv = \"/v\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n\
         [[lane]]\nname = \"rest\"\nstreams = []\non_full = \"drop_oldest\"\n",
        directory.display()
    )
}

fn settings(directory: &Path) -> Settings {
    Settings::parse(&text(directory)).unwrap()
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
    let journal = open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap();
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
        Ok(Answer { text, failed: None }) => text,
        Ok(Answer { text, failed: Some(failed) }) => format!("{text}\nfailed: {failed}"),
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
    // Position p lies at byte 48 + p of the first segment.
    let named = verified.lines().find(|line| line.starts_with("journal: no readable record from ")).unwrap();
    let (_, rest) = named.split_once("from ").unwrap();
    let (positions, rest) = rest.split_once("; ").unwrap();
    let (file, begin_and_end) = rest.split_once(", bytes ").unwrap();
    assert_eq!(file, journal.display().to_string());
    let numbers = format!("{positions} {begin_and_end}");
    let numbers = numbers.split(|sign: char| !sign.is_ascii_digit()).filter_map(|number| number.parse::<u64>().ok());
    let [from, to, begin, end] = numbers.collect::<Vec<_>>()[..] else { panic!("{named}") };
    assert!(begin <= 3_000 && 3_000 < end && (begin, end) == (from + 48, to + 48), "{named}");
    assert!(verified.contains("failed: damage was found"), "{verified}");
    assert!(
        verified.contains(&format!("damaged segment header from 0 to 0; {}, bytes 0 to 48", lane.display())),
        "{verified}"
    );
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
async fn nothing_is_read_while_an_agent_runs() {
    let (directory, settings) = directory().await;
    let refused = "error: an agent runs with ";
    let open = OpenJournal::open(directory.path().join("journal"), journal_options(&settings)).unwrap();
    for command in [SpoolCommand::Status, SpoolCommand::Verify, SpoolCommand::Repair] {
        let answer = run(&command, &settings);
        assert!(answer.starts_with(refused), "{answer}");
    }
    drop(open);
    let spool = Spool::open(&Disk, &spool_directory(directory.path()), spool_settings(&settings), SpoolId([7; 16]));
    let answer = run(&SpoolCommand::Export { out: directory.path().join("out") }, &settings);
    assert!(answer.starts_with(refused), "{answer}");
    drop(spool);
}

#[tokio::test]
async fn the_rows_that_wait_are_exported() {
    let (directory, settings) = directory().await;
    let out = directory.path().join("out");
    let command = SpoolCommand::Export { out: out.clone() };
    let answer = run(&command, &settings);
    assert!(answer.ends_with("s.parquet: 200 rows"), "{answer}");
    let reader = SerializedFileReader::new(File::open(out.join("s.parquet")).unwrap()).unwrap();
    let mut expected = 0;
    for row in reader.get_row_iter(None).unwrap().map(Result::unwrap) {
        let columns = row.get_column_iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        assert_eq!(columns, ["ts", "device", "v", "quality"]);
        assert_eq!(row.get_long(2).unwrap(), expected);
        assert_eq!(row.get_timestamp_micros(0).unwrap(), 1_700_000_000_000_000 + expected);
        expected += 1;
    }
    assert_eq!(expected, 200);
    let again = run(&command, &settings);
    assert!(again.starts_with("error: ") && again.contains("is there already"), "nothing is overwritten: {again}");
    assert_eq!(Disk.list(&out).unwrap(), ["s.parquet"]);
}

#[tokio::test]
async fn a_stream_whose_schema_grew_is_one_file_and_one_whose_types_changed_two() {
    let (directory, settings) = directory().await;
    let other = |fields: &str, map: &str| {
        let text = fs::read_to_string(directory.path().join("edge.toml")).unwrap();
        let text = text.replace("v = { type = \"int64\" }", fields).replace("v = \"/v\"", map);
        Settings::parse(&text).unwrap()
    };
    fs::write(directory.path().join("edge.toml"), text(directory.path())).unwrap();
    let grown = other("v = { type = \"int64\" }\nw = { type = \"float64\" }", "v = \"/v\"\nw = \"/v\"");
    let changed = other("v = { type = \"text\" }", "v = \"/v\"");
    let mut position = 1_000;
    for settings in [&grown, &changed] {
        let (mut spool, _) =
            Spool::open(&Disk, &spool_directory(directory.path()), spool_settings(settings), SpoolId([7; 16])).unwrap();
        let mut pipeline = Pipeline::new(settings, Position(position), &BTreeMap::new());
        let Entry::Message(mut one) = message(7) else { panic!("a message") };
        if std::ptr::eq(settings, &changed) {
            one.payload = Payload::Whole("{\"v\":\"seven\"}".into());
        }
        pipeline.apply(Position(position), Position(position + 1), &Entry::Message(one));
        position += 1_000;
        let cut = pipeline.cut().unwrap();
        for (index, lane) in cut.lanes.iter().enumerate().filter(|(_, lane)| !lane.batches.is_empty()) {
            spool.append(index, cut.position, &lane.batches, &lane.schemas, 0).unwrap();
        }
        spool.mark().unwrap();
    }
    let out = directory.path().join("out");
    let answer = run(&SpoolCommand::Export { out: out.clone() }, &settings);
    assert!(answer.contains("s.parquet: 201 rows") && answer.contains("s-2.parquet: 1 rows"), "{answer}");
    let rows = |file: &str| SerializedFileReader::new(File::open(out.join(file)).unwrap()).unwrap().into_iter();
    let shown = |row: parquet::record::Row| row.to_string();
    let last = rows("s.parquet").map(Result::unwrap).last().map(shown).unwrap();
    assert!(last.contains("v: 7, w: 7.0, quality:"), "{last}");
    let first = rows("s.parquet").next().unwrap().map(shown).unwrap();
    assert!(first.contains("v: 0, w: null, quality:"), "{first}");
    let second = rows("s-2.parquet").next().unwrap().map(shown).unwrap();
    assert!(second.contains("v: \"seven\""), "{second}");
}
