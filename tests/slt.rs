//! The suites of `tests/slt` through all three doors, over rows that are hot and rows that are in files: the same question
//! gets the same answer.

use async_trait::async_trait;
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner};

use crate::asking::{Asks, DOORS, Refused, at};
use crate::doors::{stage_cold, stage_open};
use crate::harness::Cloud;

struct Door(Box<dyn Asks>);

#[async_trait]
impl AsyncDB for Door {
    type Error = Refused;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Refused> {
        let rows = self.0.ask(sql).await?;
        let types = vec![DefaultColumnType::Any; rows.first().map_or(0, Vec::len)];
        Ok(DBOutput::Rows { types, rows })
    }

    async fn shutdown(&mut self) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_answers_alike_from_hot_rows() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage_open(directory.path()).await;
    run_suites(&cloud).await;
    assert_eq!(cloud.integer("SELECT hot_rows FROM system.streams").await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_answers_alike_from_files() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage_cold(directory.path()).await;
    run_suites(&cloud).await;
    assert_eq!(cloud.integer("SELECT hot_rows FROM system.streams").await, 0);
}

async fn run_suites(cloud: &Cloud) {
    let suites = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/slt");
    let mut files: Vec<_> = std::fs::read_dir(suites).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 4);
    for door in DOORS {
        for file in &files {
            let mut runner = Runner::new(|| async { Ok::<_, Refused>(Door(at(door, cloud).await)) });
            if let Err(error) = runner.run_file_async(file).await {
                panic!("{door}: {}", error.display(false));
            }
        }
    }
}
