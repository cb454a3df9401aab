use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use segment_log::{Disk, Options, Position};

use super::*;
use crate::config::{Settings, SourceSettings};
use crate::journal::{Journal, OpenJournal};
use crate::places::Places;

fn settings(path: &Path, more: &str) -> FileSettings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"file\"\nname = \"f\"\npath = '{}'\npoll = \"10ms\"\nmax_payload = \"1KiB\"\n{more}\n\
         stream = \"s\"\n[source.map]\ndevice = \"topic:0\"\n[stream.s.fields]\nv = {{ type = \"text\" }}\n",
        path.display()
    );
    match Settings::parse(&text).unwrap().source.remove(0) {
        SourceSettings::File(file) => *file,
        _ => panic!(),
    }
}

fn append(path: &Path, text: &str) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// A file and a journal that outlive the source.
struct Place {
    directory: tempfile::TempDir,
    path: PathBuf,
    more: &'static str,
}

/// One run of the source; a run that is dropped ends as by a kill: nothing is told.
struct Run {
    journal: Journal,
    reader: segment_log::Reader<Disk>,
    state: Arc<SourceState>,
    token: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Place {
    fn new(name: &str, more: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        Self { directory, path, more }
    }

    /// Starts as the agent does: the place is what the journal says.
    fn start(&self) -> Run {
        let options = Options { segment_bytes: 8 << 10, max_bytes: 1 << 20, reserve_bytes: 64 };
        // The thread of the run before may still be ending: it has the lock until then.
        let open = loop {
            match OpenJournal::open(self.directory.path().join("journal"), options) {
                Err(error) if format!("{error:?}").contains("Locked") => std::thread::yield_now(),
                opened => break opened.unwrap().0,
            }
        };
        let mut places = Places::default();
        let mut scan = open.reader(Position(0)).unwrap();
        while let Some(record) = scan.next().unwrap() {
            places.apply(&Entry::read(Bytes::copy_from_slice(record.payload)).unwrap());
        }
        let reader = open.reader(Position(0)).unwrap();
        let journal = open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap();
        let (state, token) = (Arc::new(SourceState::default()), CancellationToken::new());
        let place = places.0.get("f").copied();
        let settings = settings(&self.path, self.more);
        let follow = Follow { settings, journal: journal.sender(), state: Arc::clone(&state), place };
        let task = tokio::spawn(follow.run(token.clone()));
        Run { journal, reader, state, token, task }
    }
}

impl Run {
    /// All durable lines, as soon as there are so many.
    async fn lines(&mut self, lines: &mut Vec<String>, count: usize) {
        let mut synced = self.journal.synced();
        loop {
            synced.borrow_and_update();
            while let Some(record) = self.reader.next().unwrap() {
                let entry = Entry::read(Bytes::copy_from_slice(record.payload)).unwrap();
                lines.push(match &entry.message().unwrap().payload {
                    Payload::Whole(text) => String::from_utf8(text.to_vec()).unwrap(),
                    Payload::Oversized { len, .. } => format!("{len} bytes"),
                });
            }
            if lines.len() >= count {
                return;
            }
            synced.changed().await.unwrap();
        }
    }

    async fn stop(self) {
        self.token.cancel();
        self.task.await.unwrap();
        tokio::task::spawn_blocking(move || self.journal.stop()).await.unwrap();
    }
}

/// A step, and the lines that it brings.
type Step<'a> = (&'a dyn Fn(&Path), &'a [&'a str]);

/// Steps, each followed by the lines that must then be there, with a restart or without one.
async fn check(name: &str, more: &'static str, restart: bool, steps: &[Step<'_>]) {
    let place = Place::new(name, more);
    let mut run = None;
    let (mut lines, mut expected) = (Vec::new(), Vec::new());
    for (number, (step, then)) in steps.iter().enumerate() {
        step(&place.path);
        expected.extend(then.iter().map(|line| (*line).to_owned()));
        if restart && let Some(run) = run.take() {
            Run::stop(run).await;
            lines.clear();
        }
        let run = run.get_or_insert_with(|| place.start());
        run.lines(&mut lines, expected.len()).await;
        assert_eq!(lines, expected, "after step {number}, restart {restart}");
    }
    // Nothing more comes, also not after one more look.
    run.unwrap().stop().await;
    let mut run = place.start();
    append(&place.path, "the end\n");
    lines.clear();
    run.lines(&mut lines, expected.len() + 1).await;
    assert_eq!(lines.len(), expected.len() + 1, "{lines:?}");
    run.stop().await;
}

#[tokio::test]
async fn lines_are_journalled_once_as_the_file_grows_and_is_rotated() {
    let rename = |path: &Path, ending: &str| fs::rename(path, format!("{}{ending}", path.display())).unwrap();
    for restart in [false, true] {
        check(
            "a.ndjson",
            "",
            restart,
            &[
                (&|path| append(path, "1\n2\n"), &["1", "2"]),
                (&|path| append(path, "half"), &[]),
                (&|path| append(path, " a line\r\n\n \n3\n"), &["half a line", "3"]),
                (&|path| append(path, &format!("{}\n4\n", "x".repeat(2_000))), &["2000 bytes", "4"]),
                // Written to, moved away, and a new one: the old one's last line has no end.
                (
                    &|path| {
                        append(path, "5\nlast");
                        rename(path, ".1");
                        append(path, "new\n");
                    },
                    &["5", "last", "new"],
                ),
            ],
        )
        .await;
    }
    // Several rotations at one time, on a disk that tells times apart by seconds only.
    let now = SystemTime::now();
    let written = |path: &Path, text: &str| {
        append(path, text);
        OpenOptions::new().write(true).open(path).unwrap().set_modified(now).unwrap();
    };
    let all = |ending: [&'static str; 3]| {
        move |path: &Path| {
            for (text, ending) in ["2\n", "3\n", "4\n"].into_iter().zip(ending) {
                written(path, text);
                rename(path, ending);
            }
            written(path, "5\n");
        }
    };
    for endings in [[".10", ".9", ".1"], ["-20261120", "-20261121", "-20261122"]] {
        let rotate = all(endings);
        let steps: [Step<'_>; 2] = [(&|path| written(path, "1\n"), &["1"]), (&rotate, &["2", "3", "4", "5"])];
        check("a.ndjson", "", true, &steps).await;
    }
    // Two rotations while nothing looks.
    check(
        "a.ndjson",
        "",
        true,
        &[
            (&|path| append(path, "1\n"), &["1"]),
            (
                &|path| {
                    // The file system tells times apart by some milliseconds.
                    let now = SystemTime::now();
                    let written = |text: &str, before: u64| {
                        append(path, text);
                        let file = OpenOptions::new().write(true).open(path).unwrap();
                        file.set_modified(now - Duration::from_secs(before)).unwrap();
                    };
                    written("2\n", 2);
                    rename(path, ".2");
                    written("3\n", 1);
                    rename(path, ".1");
                    written("4\n", 0);
                    fs::write(format!("{}.bak", path.display()), "not this\n").unwrap();
                },
                &["2", "3", "4"],
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_file_that_is_cut_off_begins_anew() {
    for restart in [false, true] {
        check(
            "a.ndjson",
            "",
            restart,
            &[
                (&|path| append(path, "1\n2\n"), &["1", "2"]),
                (&|path| fs::write(path, "3\n").unwrap(), &["3"]),
                // Longer than it was, but not the same.
                (&|path| fs::write(path, "other\nlines\n").unwrap(), &["other", "lines"]),
            ],
        )
        .await;
    }
}

#[tokio::test]
async fn a_copy_of_what_was_read_is_not_read_again() {
    check(
        "a.ndjson",
        "",
        true,
        &[
            (&|path| append(path, "1\n2\n"), &["1", "2"]),
            (
                &|path| {
                    fs::copy(path, path.with_extension("new")).unwrap();
                    fs::rename(path.with_extension("new"), path).unwrap();
                    append(path, "3\n");
                },
                &["3"],
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_header_stands_before_each_line_of_a_csv() {
    for restart in [false, true] {
        check(
            "a.csv",
            "",
            restart,
            &[
                (&|path| append(path, "\u{feff}a,b\r\n1,2\n"), &["a,b\n1,2"]),
                (&|path| append(path, "3,4\n"), &["a,b\n3,4"]),
                (
                    &|path| {
                        fs::rename(path, path.with_extension("csv.1")).unwrap();
                        append(path, "b,a\n5,6\n");
                    },
                    &["b,a\n5,6"],
                ),
            ],
        )
        .await;
    }
}

#[tokio::test]
async fn a_file_that_is_read_once_ends_with_its_last_line() {
    let place = Place::new("a.csv", "follow = false\nheader = false");
    append(&place.path, "a\nb\nc");
    for _ in 0..2 {
        let mut run = place.start();
        let mut lines = Vec::new();
        run.lines(&mut lines, 3).await;
        (&mut run.task).await.unwrap();
        assert_eq!(lines, ["a", "b", "c"]);
        assert!(run.state.connected.load(Ordering::Relaxed) && run.state.last_error.lock().is_none());
        run.stop_journal().await;
    }
}

#[tokio::test]
async fn a_file_that_is_not_there_is_waited_for() {
    let place = Place::new("a.ndjson", "");
    let mut run = place.start();
    while run.state.last_error.lock().is_none() {
        tokio::task::yield_now().await;
    }
    assert!(!run.state.connected.load(Ordering::Relaxed));
    append(&place.path, "1\n");
    let mut lines = Vec::new();
    run.lines(&mut lines, 1).await;
    assert!(run.state.connected.load(Ordering::Relaxed) && run.state.last_error.lock().is_none());
    run.stop().await;
}

impl Run {
    async fn stop_journal(self) {
        tokio::task::spawn_blocking(move || self.journal.stop()).await.unwrap();
    }
}
