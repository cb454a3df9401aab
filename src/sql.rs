//! `weir sql`: one statement to a running Weir over HTTP, printed as a table, CSV or JSON.
//!
//! Rows are fetched as an Arrow stream, so that a table shows types as the server has them.

use std::io::{Cursor, Write};

use anyhow::{Context, bail};
use arrow::ipc::reader::StreamReader;
use arrow::util::pretty::pretty_format_batches;
use serde_json::{Map, Value};

/// Arguments of `weir sql`.
#[derive(Debug, clap::Args)]
pub(crate) struct SqlArguments {
    /// The statement
    statement: String,
    /// Where Weir answers
    #[arg(long, default_value = "http://127.0.0.1:7300")]
    url: String,
    /// How rows are printed
    #[arg(long, value_parser = ["table", "csv", "json"], default_value = "table")]
    format: String,
    /// Reader's name, when readers are set
    #[arg(long)]
    user: Option<String>,
    /// File that holds the reader's password
    #[arg(long)]
    password_file: Option<std::path::PathBuf>,
}

/// Runs the statement and prints its rows.
pub(crate) async fn sql(arguments: SqlArguments) -> anyhow::Result<()> {
    let accept = match arguments.format.as_str() {
        "csv" => "text/csv",
        "json" => "application/json",
        _ => "application/vnd.apache.arrow.stream",
    };
    let client = reqwest::Client::builder().build().context("make an HTTP client")?;
    let mut request = client
        .post(format!("{}/v1/sql", arguments.url.trim_end_matches('/')))
        .header("accept", accept)
        .header("content-type", "text/plain")
        .body(arguments.statement);
    if let Some(user) = &arguments.user {
        let password = match &arguments.password_file {
            Some(path) => std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?,
            None => bail!("--user needs --password-file"),
        };
        request = request.basic_auth(user, Some(password.trim_end()));
    }
    let response = request.send().await.with_context(|| {
        format!("ask {}: is Weir running there? `weir demo` or `weir cloud --config FILE` starts it", arguments.url)
    })?;
    let status = response.status();
    let body = response.bytes().await.context("read the answer")?;
    if !status.is_success() {
        bail!("{}", refusal(&body));
    }
    let mut out = std::io::stdout().lock();
    if arguments.format == "table" {
        let reader = StreamReader::try_new(Cursor::new(body), None).context("read the answer as Arrow")?;
        let batches = reader.collect::<Result<Vec<_>, _>>().context("read the rows")?;
        let rows: usize = batches.iter().map(|batch| batch.num_rows()).sum();
        writeln!(out, "{}\n{rows} row{}", pretty_format_batches(&batches)?, if rows == 1 { "" } else { "s" })?;
    } else {
        out.write_all(&body)?;
        if !body.ends_with(b"\n") {
            writeln!(out)?;
        }
    }
    Ok(())
}

/// The server's own words, with its hint on a line of its own.
fn refusal(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        Ok(json) => {
            let error = json["error"].as_str().unwrap_or("the statement was refused").to_owned();
            json["hint"].as_str().map_or(error.clone(), |hint| format!("{error}\nhint: {hint}"))
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    }
}

/// The one number that a statement gives.
pub(crate) async fn integer(url: &str, statement: &str) -> anyhow::Result<u64> {
    let rows = rows(url, statement).await?;
    let number = rows.first().and_then(|row| row.values().next()).and_then(Value::as_u64);
    number.with_context(|| format!("no number: {rows:?}"))
}

/// The rows that a statement gives, by name of column.
pub(crate) async fn rows(url: &str, statement: &str) -> anyhow::Result<Vec<Map<String, Value>>> {
    let client = reqwest::Client::new();
    let request = client.post(format!("{url}/v1/sql")).header("accept", "application/json").body(statement.to_owned());
    let response = request.send().await?;
    if !response.status().is_success() {
        bail!("{}", refusal(&response.bytes().await?));
    }
    serde_json::from_slice(&response.bytes().await?).with_context(|| format!("read the rows of {statement}"))
}
