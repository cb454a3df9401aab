//! The lines of a command's output: the door for every device that Weir does not speak with itself.
//!
//! The program gets no input and runs in a process group of its own. Each line of its output is a message whose topic is
//! the source's name; blank lines are skipped. When it ends it is started again, after waits that double up to
//! `restart_max` and begin anew after a run of that length. What it writes to its error output goes to the log, at most
//! [`LOG_LINES`] lines in [`LOG_EVERY`]; the rest is counted. While the journal is full nothing is read, and the program
//! waits in its write. At the stop the group gets SIGTERM, after `stop_within` SIGKILL; what it has written before is
//! journalled. A kill of the agent loses what stood in the pipe: a program cannot be asked again.

use std::pin::pin;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::Rng;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::SourceState;
use super::lines::{Line, Splitter};
use crate::config::ExecSettings;
use crate::entry::{Entry, Message, Payload};
use crate::journal::{Closed, JournalSender};

/// Lines of the error output that are logged in each span of time.
const LOG_LINES: usize = 10;
const LOG_EVERY: Duration = Duration::from_secs(10);
/// A longer line of the error output is cut off.
const LOG_LINE_BYTES: usize = 1 << 10;
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 16 << 10;
/// The first wait before another start.
const RESTART_MIN: Duration = Duration::from_secs(1);
/// How long output is waited for that a program left behind: what it started may hold the pipe open for ever.
const REST_WITHIN: Duration = Duration::from_millis(200);
/// How long a line waits for a full journal at the stop.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// A subprocess source.
#[derive(Debug)]
pub struct Exec {
    pub settings: ExecSettings,
    pub journal: JournalSender,
    pub state: Arc<SourceState>,
}

/// How a run of the program ended.
enum Ended {
    ByItself(String),
    Stopped,
    Closed,
}

impl Exec {
    /// Runs until the token is cancelled or the journal has ended.
    pub async fn run(mut self, token: CancellationToken) {
        let restart_max = self.settings.restart_max.0;
        let mut failures = 0;
        while !token.is_cancelled() {
            let started = Instant::now();
            let ended = match self.start() {
                Ok(child) => self.read(child, &token).await,
                Err(error) => Ended::ByItself(format!("start {}: {error}", self.settings.command[0])),
            };
            self.state.connected.store(false, Ordering::Relaxed);
            let Ended::ByItself(reason) = ended else { break };
            failures = if started.elapsed() >= restart_max { 0 } else { failures };
            let wait = (RESTART_MIN * 2_u32.pow(failures)).min(restart_max);
            failures = (failures + 1).min(16);
            let wait = wait.mul_f64(rand::rng().random_range(0.5..=1.0));
            tracing::warn!(source = self.settings.name, reason, ?wait, "the command ended; it is started again");
            self.state.error(reason);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = token.cancelled() => {}
            }
        }
    }

    fn start(&self) -> std::io::Result<Child> {
        let (program, arguments) = self.settings.command.split_first().expect("checked when the settings were read");
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        if let Some(directory) = &self.settings.directory {
            command.current_dir(directory);
        }
        command.spawn()
    }

    async fn read(&mut self, mut child: Child, token: &CancellationToken) -> Ended {
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let (Some(mut output), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
            return Ended::ByItself("it has no output".to_owned());
        };
        self.state.connects.fetch_add(1, Ordering::Relaxed);
        self.state.connected.store(true, Ordering::Relaxed);
        let log = tokio::spawn(log(self.settings.name.clone(), errors));
        let mut splitter = Splitter::new(self.settings.max_payload.0 as usize);
        // Nothing here is dropped on its way to the journal: only the wait for output ends early.
        let gone = token.child_token();
        let lines = async {
            let lines = self.lines(&mut output, &mut splitter, gone.cancelled(), token).await;
            gone.cancel();
            lines
        };
        let wait = async {
            tokio::select! {
                _ = child.wait() => gone.cancel(),
                () = gone.cancelled() => {}
            }
        };
        let (lines, ()) = tokio::join!(lines, wait);
        let stopped = token.is_cancelled();
        if let Some(group) = group {
            // The whole group: a script's children would live on.
            if stopped {
                let _ = kill_process_group(group, Signal::TERM);
                if tokio::time::timeout(self.settings.stop_within.0, child.wait()).await.is_err() {
                    tracing::warn!(source = self.settings.name, "the command did not end in time: it is killed");
                }
            }
            let _ = kill_process_group(group, Signal::KILL);
        }
        // What it wrote before it ended is still in the pipe.
        let rest = self.lines(&mut output, &mut splitter, tokio::time::sleep(REST_WITHIN), token).await;
        let last = match splitter.rest() {
            Some(line) => self.take(line, token).await,
            None => Ok(()),
        };
        log.abort();
        if lines.and(rest).and(last).is_err() {
            return Ended::Closed;
        }
        match tokio::time::timeout(REST_WITHIN, child.wait()).await {
            _ if stopped => Ended::Stopped,
            Ok(Ok(status)) => Ended::ByItself(status.to_string()),
            _ => Ended::ByItself("it closed its output".to_owned()),
        }
    }

    /// Takes lines until the output ends, or until `ends` while there is none.
    async fn lines(
        &mut self,
        output: &mut (impl AsyncRead + Unpin),
        splitter: &mut Splitter,
        ends: impl Future<Output = ()>,
        token: &CancellationToken,
    ) -> Result<(), Closed> {
        let mut ends = pin!(ends);
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = tokio::select! {
                count = output.read(&mut chunk) => count.unwrap_or(0),
                () = &mut ends => 0,
            };
            if count == 0 {
                return Ok(());
            }
            let mut bytes = &chunk[..count];
            while !bytes.is_empty() {
                if let Some(line) = splitter.next(&mut bytes) {
                    self.take(line, token).await?;
                }
            }
        }
    }

    async fn take(&mut self, line: Line, token: &CancellationToken) -> Result<(), Closed> {
        if matches!(&line.payload, Payload::Whole(text) if text.iter().all(u8::is_ascii_whitespace)) {
            return Ok(());
        }
        let arrival_us = self.journal.now_us();
        let entry = Entry::Message(Message {
            source: self.settings.name.clone(),
            topic: self.settings.name.clone(),
            payload: line.payload,
            arrival_us,
            delivery: None,
        });
        // At the stop a journal without room is not waited for long.
        let late = async {
            token.cancelled().await;
            tokio::time::sleep(STOP_WITHIN).await;
        };
        let given = tokio::select! {
            ticket = self.journal.append(&entry) => Some(ticket?),
            () = late => None,
        };
        if given.is_some() {
            self.state.received.fetch_add(1, Ordering::Relaxed);
            self.state.last_arrival_us.store(arrival_us, Ordering::Relaxed);
            *self.state.last_error.lock() = None;
        } else {
            tracing::warn!(source = self.settings.name, "the journal has no room at the stop: a line is lost");
        }
        Ok(())
    }
}

/// The error output, at a bounded rate.
async fn log(source: String, mut errors: impl AsyncRead + Unpin) {
    let mut splitter = Splitter::new(LOG_LINE_BYTES);
    let (mut since, mut lines, mut chunk) = (Instant::now(), 0, vec![0; LOG_LINE_BYTES]);
    while let Ok(count @ 1..) = errors.read(&mut chunk).await {
        let mut bytes = &chunk[..count];
        while !bytes.is_empty() {
            let Some(line) = splitter.next(&mut bytes) else { break };
            if since.elapsed() >= LOG_EVERY {
                if lines > LOG_LINES {
                    tracing::warn!(source, left_out = lines - LOG_LINES, "lines of the command's error output");
                }
                (since, lines) = (Instant::now(), 0);
            }
            lines += 1;
            if lines <= LOG_LINES {
                let (Payload::Whole(text) | Payload::Oversized { head: text, .. }) = &line.payload;
                let text = &text[..text.len().min(LOG_LINE_BYTES)];
                tracing::warn!(source, text = %String::from_utf8_lossy(text).escape_debug(), "the command says");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use segment_log::{Disk, Options, Position, Reader};

    use super::*;
    use crate::config::{Settings, SourceSettings};
    use crate::journal::{Journal, OpenJournal};

    fn settings(script: &str) -> ExecSettings {
        let text = format!(
            "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
             [[source]]\nkind = \"exec\"\nname = \"x\"\ncommand = [\"sh\", \"-c\", '''{script}''']\n\
             restart_max = \"10ms\"\nstop_within = \"300ms\"\nmax_payload = \"1KiB\"\n\
             stream = \"s\"\n[source.map]\ndevice = \"topic:0\"\n[stream.s.fields]\nv = {{ type = \"text\" }}\n"
        );
        match Settings::parse(&text).unwrap().source.remove(0) {
            SourceSettings::Exec(exec) => *exec,
            _ => panic!(),
        }
    }

    struct Run {
        _directory: tempfile::TempDir,
        journal: Journal,
        reader: Reader<Disk>,
        state: Arc<SourceState>,
        token: CancellationToken,
        task: tokio::task::JoinHandle<()>,
        lines: Vec<String>,
    }

    impl Run {
        fn start(script: &str, journal_bytes: u64) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let options = Options { segment_bytes: 8 << 10, max_bytes: journal_bytes, reserve_bytes: 64 };
            let open = OpenJournal::open(directory.path().join("journal"), options).unwrap().0;
            let reader = open.reader(Position(0)).unwrap();
            let journal = open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap();
            let (state, token) = (Arc::new(SourceState::default()), CancellationToken::new());
            let exec = Exec { settings: settings(script), journal: journal.sender(), state: Arc::clone(&state) };
            let task = tokio::spawn(exec.run(token.clone()));
            Self { _directory: directory, journal, reader, state, token, task, lines: Vec::new() }
        }

        fn read(&mut self) {
            while let Some(record) = self.reader.next().unwrap() {
                let Entry::Message(message) = Entry::read(Bytes::copy_from_slice(record.payload)).unwrap() else {
                    panic!()
                };
                self.lines.push(match message.payload {
                    Payload::Whole(text) => String::from_utf8(text.to_vec()).unwrap(),
                    Payload::Oversized { len, .. } => format!("{len} bytes"),
                });
            }
        }

        async fn lines(&mut self, count: usize) -> &[String] {
            let mut synced = self.journal.synced();
            loop {
                synced.borrow_and_update();
                self.read();
                if self.lines.len() >= count {
                    return &self.lines;
                }
                synced.changed().await.unwrap();
            }
        }

        async fn stop(&mut self) {
            self.token.cancel();
            (&mut self.task).await.unwrap();
            let journal = &self.journal;
            tokio::task::block_in_place(|| journal.stop());
            self.read();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn lines_come_in_order_and_the_command_is_started_again() {
        let mut run = Run::start("echo one; echo; echo no >&2; printf 'two\\r\\nrest'; exit 3", 1 << 20);
        let lines = run.lines(6).await;
        assert_eq!(lines[..6], ["one", "two", "rest", "one", "two", "rest"]);
        run.stop().await;
        assert!(run.state.connects.load(Ordering::Relaxed) >= 2);
        assert_eq!(run.state.received.load(Ordering::Relaxed), run.lines.len() as u64);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_command_that_is_not_there_is_told() {
        let mut run = Run::start("", 1 << 20);
        run.stop().await;
        let exec = Exec {
            settings: ExecSettings { command: vec!["/no/such/program".into()], ..settings("") },
            journal: run.journal.sender(),
            state: Arc::clone(&run.state),
        };
        let (token, state) = (CancellationToken::new(), Arc::clone(&run.state));
        *state.last_error.lock() = None;
        let task = tokio::spawn(exec.run(token.clone()));
        while state.last_error.lock().is_none() {
            tokio::task::yield_now().await;
        }
        assert!(state.last_error.lock().as_ref().unwrap().starts_with("start /no/such/program"));
        token.cancel();
        task.await.unwrap();
    }

    /// Whether a process of this number runs; a zombie does not.
    fn runs(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_stop_ends_a_stubborn_command_and_its_children() {
        let mut run = Run::start("trap '' TERM; sleep 600 & echo $$; echo $!; while :; do sleep 1; done", 1 << 20);
        let pids = run.lines(2).await.to_vec();
        assert!(pids.iter().all(|pid| runs(pid)), "{pids:?}");
        let started = Instant::now();
        run.stop().await;
        assert!(started.elapsed() < Duration::from_secs(5));
        let until = Instant::now() + Duration::from_secs(5);
        while pids.iter().any(|pid| runs(pid)) {
            assert!(Instant::now() < until, "{pids:?} run on");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_written_on_sigterm_is_journalled() {
        let mut run = Run::start("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done", 1 << 20);
        run.lines(1).await;
        run.stop().await;
        assert_eq!(run.lines, ["ready", "bye"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_full_journal_holds_the_command_and_loses_nothing() {
        let script =
            "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i 012345678901234567890123456789; done; sleep 600";
        let mut run = Run::start(script, 16 << 10);
        while !run.journal.is_full() {
            tokio::task::yield_now().await;
        }
        while run.lines.len() < 3_000 {
            let from = run.reader.position();
            run.read();
            if run.reader.position() != from {
                run.journal.free_before(run.reader.position());
            }
            tokio::task::yield_now().await;
        }
        let numbers = run.lines.iter().map(|line| line.split(' ').next().unwrap().parse::<usize>().unwrap());
        assert!(numbers.eq(1..=3_000));
        run.stop().await;
    }
}
