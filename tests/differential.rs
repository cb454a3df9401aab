//! Generated questions get the answers of DuckDB, while rows come, are committed and compacted. The questions are made and
//! compared in `tests/differential`.

use std::process::Command;

use crate::harness::{Cloud, TOKEN};

/// Rows are hot for some seconds, and small files are merged at once.
const BUSY: &str = "[commit]\nmax_age = \"3s\"\n[compact]\nmin_files = 4\ncpu_share = 1.0\n\
                    [lake]\ncheckpoint_commits = 10\nevery = \"1s\"\n";
const QUESTIONS: &str = "2000";

#[tokio::test(flavor = "multi_thread")]
async fn generated_questions_get_the_answers_of_duckdb() {
    let Ok(python) = std::env::var("WEIR_PYTHON") else {
        println!("left out: WEIR_PYTHON names no Python with duckdb, pyarrow, psycopg and adbc_driver_flightsql");
        return;
    };
    // CI asks the same questions each time; who looks for new ones names no seed.
    let seed = std::env::var("WEIR_QUESTIONS_SEED").unwrap_or_else(|_| rand::random::<u32>().to_string());
    println!("WEIR_QUESTIONS_SEED={seed}");
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", BUSY).await;
    let (flight_sql, postgres) = (cloud.flight_sql.to_string(), cloud.postgres.to_string());
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/differential/run.py");
    let arguments = ["-B", program, &cloud.http, &flight_sql, &postgres, TOKEN, &seed, QUESTIONS];
    let mut command = Command::new(python);
    command.args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}");
    println!("{told}");
    for counter in ["weir_cloud_commits_total", "weir_cloud_compactions_total"] {
        assert!(cloud.counter(counter).await > 3, "{counter}: nothing was tried");
    }
}
