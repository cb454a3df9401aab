//! A process of a test: started with the same arguments again and again, killed with -9, or stopped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// How long a process may take until it answers or ends.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at whether it does.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// A free port. A process that is restarted has to keep its port, so it cannot be 0; it lies below those that the system
/// gives to outgoing connections, which would take it away between two starts.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 12_000 + (std::process::id() % 16_000) as u16;
    loop {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed) % 4_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn owned(variables: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
    variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

/// A program with its arguments, and the child while it runs.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    /// Of the next start, besides.
    variables: Vec<(&'static str, String)>,
    log: PathBuf,
    child: Option<Child>,
}

impl Process {
    /// Not started. What it prints goes to `directory/name.log`.
    pub(crate) fn new(name: &str, program: &Path, arguments: &[&str], directory: &Path) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let log = directory.join(format!("{name}.log"));
        let (name, program) = (name.to_owned(), program.to_owned());
        Self { name, program, arguments, environment: Vec::new(), variables: Vec::new(), log, child: None }
    }

    /// `weir` with these arguments.
    pub(crate) fn weir(name: &str, arguments: &[&str], directory: &Path) -> Self {
        Self::new(name, Path::new(env!("CARGO_BIN_EXE_weir")), arguments, directory)
    }

    /// The variables that are added to its environment from the next start on, in the place of those of before.
    pub(crate) fn set_variables(&mut self, variables: &[(&'static str, &str)]) {
        self.variables = owned(variables);
    }

    /// Whether it has ended by itself; then it may be started again.
    pub(crate) fn has_ended(&mut self) -> bool {
        let ended = self.child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
        if ended {
            self.child = None;
        }
        ended
    }

    /// Waits for its end, whichever; whether it was a good one.
    pub(crate) fn succeeds(&mut self) -> bool {
        self.child.take().expect("it runs").wait().unwrap().success()
    }

    /// With these variables, at every start.
    pub(crate) fn with(mut self, environment: &[(&'static str, &str)]) -> Self {
        self.environment = owned(environment);
        self
    }

    /// Starts it; it must not run.
    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().chain(&self.variables).map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.program.display()));
        self.child = Some(child);
    }

    /// kill -9; it must not have ended by itself.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        assert!(child.try_wait().unwrap().is_none(), "{} ended by itself:\n{}", self.name, self.log_tail());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// A signal by its name, as in `HUP`.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.pid().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success());
    }

    /// SIGTERM, and waits for a good end.
    pub(crate) fn stop(&mut self) {
        self.signal("TERM");
        let mut child = self.child.take().expect("it runs");
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "{} does not stop:\n{}", self.name, self.log_tail());
            std::thread::sleep(POLL);
        };
        assert!(status.success(), "{} ended with {status}:\n{}", self.name, self.log_tail());
    }

    /// Panics with its log when it has ended by itself, or when `since` is too long ago.
    pub(crate) fn check(&mut self, since: Instant, what: &str) {
        let ended = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
        assert!(ended.is_none(), "{} ended with {ended:?}:\n{}", self.name, self.log_tail());
        assert!(since.elapsed() < PATIENCE, "{}: {what}\n{}", self.name, self.log_tail());
    }

    /// Its id, while it runs.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// User and system time since its start.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let id = self.pid();
        let text = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum();
        ticks / 100.0
    }

    pub(crate) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}
