//! `weir rules check FILE…` and `weir rules test FILE --from … --to …`: what a running Weir says of rules, before they run.

use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::Value;

/// What may be asked of rules.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum RulesCommand {
    /// Whether the rules of files can run on the tables that are there
    Check {
        /// TOML files of rules
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        server: Server,
    },
    /// When the rules of a file would have fired over history, how often, and how long
    Test {
        /// A TOML file of rules
        file: PathBuf,
        /// Event time: 2026-01-31, or 2026-01-31T12:00:00Z
        #[arg(long)]
        from: String,
        /// Event time, not included
        #[arg(long)]
        to: String,
        /// As JSON, with every alert
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: Server,
    },
}

/// Which Weir, and who asks.
#[derive(Debug, clap::Args)]
pub(crate) struct Server {
    /// Where Weir answers
    #[arg(long, default_value = "http://127.0.0.1:7300")]
    url: String,
    /// Reader's name, when readers are set
    #[arg(long)]
    user: Option<String>,
    /// File that holds the reader's password
    #[arg(long)]
    password_file: Option<PathBuf>,
}

impl Server {
    async fn ask(&self, path: &str, query: &[(&str, &str)], body: String) -> anyhow::Result<Value> {
        let mut url = reqwest::Url::parse(&self.url).with_context(|| format!("read {}", self.url))?;
        url.set_path(path);
        url.query_pairs_mut().extend_pairs(query);
        let mut request = reqwest::Client::new().post(url).body(body);
        if let Some(user) = &self.user {
            let path = self.password_file.as_ref().context("--user needs --password-file")?;
            let password = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            request = request.basic_auth(user, Some(password.trim_end()));
        }
        let response = request.send().await.with_context(|| {
            format!("ask {}: is Weir running there? `weir cloud --config FILE` starts it", self.url)
        })?;
        let (status, text) = (response.status(), response.text().await.context("read the answer")?);
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        if !status.is_success() {
            bail!("{}", answer["error"].as_str().map_or(format!("it answered {status}"), str::to_owned));
        }
        Ok(answer)
    }
}

/// Asks, and prints what was said; an error when a rule is refused.
#[allow(clippy::print_stdout, reason = "the answer")]
pub(crate) async fn rules(command: RulesCommand) -> anyhow::Result<()> {
    match command {
        RulesCommand::Check { files, server } => {
            let mut refused = 0;
            for file in &files {
                let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
                let answer = server.ask("/v1/rules/check", &[], text).await;
                let answer = answer.with_context(|| file.display().to_string())?;
                for rule in answer.as_array().into_iter().flatten() {
                    let name = rule["name"].as_str().unwrap_or_default();
                    match rule["error"].as_str() {
                        Some(error) => {
                            refused += 1;
                            println!("{}: {name}: {error}", file.display());
                        }
                        None => println!(
                            "{}: {name}: {}",
                            file.display(),
                            rule["rule"]["kind"].as_str().unwrap_or_default()
                        ),
                    }
                }
            }
            if refused > 0 {
                bail!("{} cannot run", counted(refused, "rule"));
            }
            Ok(())
        }
        RulesCommand::Test { file, from, to, json, server } => {
            let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            let answer = server.ask("/v1/rules/test", &[("from", &from), ("to", &to)], text).await?;
            if json {
                println!("{}", serde_json::to_string_pretty(&answer)?);
                return Ok(());
            }
            for rule in answer.as_array().into_iter().flatten() {
                println!("{}", summary(rule));
            }
            Ok(())
        }
    }
}

/// What a rule found, in lines.
fn summary(rule: &Value) -> String {
    let name = rule["name"].as_str().unwrap_or_default();
    if let Some(error) = rule["error"].as_str() {
        return format!("{name}: {error}");
    }
    let found = &rule["found"];
    let mut text = format!(
        "{name}: {}, fired {}, {} in all",
        counted(found["rows"].as_u64().unwrap_or_default(), "row"),
        counted(found["fired"].as_u64().unwrap_or_default(), "time"),
        duration(found["firing_s"].as_f64().unwrap_or_default()),
    );
    let failed = found["failed"].as_u64().unwrap_or_default();
    if failed > 0 {
        text.push_str(&format!(", failed on {}", counted(failed, "row")));
    }
    for alert in found["alerts"].as_array().into_iter().flatten() {
        let time = |key: &str| {
            let time = alert[key].as_i64().and_then(chrono::DateTime::from_timestamp_micros);
            time.map_or("…".to_owned(), |time| time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
        };
        let message = alert["message"].as_str().unwrap_or_default();
        text.push_str(&format!("\n  {} to {}  {message}", time("fired"), time("to")));
    }
    text
}

fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 60.0 => format!("{seconds:.1} s"),
        seconds if seconds < 3_600.0 => format!("{:.1} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3_600.0),
    }
}
