use std::fmt;
use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use datafusion::common::{DataFusionError, Result};
use datafusion::datasource::MemTable;
use datafusion::execution::memory_pool::{MemoryPool, MemoryReservation, UnboundedMemoryPool};
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::prelude::{SessionConfig, SessionContext};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Random rows; texts come in runs of random lengths, and are none now and then.
fn rows(random: &mut StdRng, devices: usize, run_max: usize) -> Vec<RecordBatch> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("device", DataType::Utf8, true),
        Field::new("n", DataType::Int64, true),
        Field::new("x", DataType::Float64, true),
    ]));
    let batch = |random: &mut StdRng| {
        let (mut texts, rows) = (Vec::new(), random.random_range(0..3_000));
        while texts.len() < rows {
            // Short ones, long ones, and those between.
            let prefix = "d".repeat([0, 1, 2, 11, 13, 20][random.random_range(0..6)]);
            let text = match random.random_range(0..30) {
                0 => None,
                1 => Some("\0".repeat(random.random_range(0..3))),
                _ => Some(prefix + &random.random_range(0..devices).to_string()),
            };
            let run = random.random_range(1..=run_max).min(rows - texts.len());
            texts.extend(std::iter::repeat_n(text, run));
        }
        let n = (0..rows)
            .map(|_| (!random.random_bool(0.1)).then(|| random.random_range(-1_000..1_000)))
            .collect::<Int64Array>();
        let x = (0..rows)
            .map(|_| (!random.random_bool(0.1)).then(|| f64::from(random.random_range(-999..999))))
            .collect::<Float64Array>();
        let columns: Vec<ArrayRef> =
            vec![Arc::new(texts.into_iter().collect::<StringArray>()), Arc::new(n), Arc::new(x)];
        RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()
    };
    (0..random.random_range(1..12)).map(|_| batch(random)).collect()
}

/// What each question gives, and its plan.
async fn answer(context: &SessionContext, sql: &str) -> (String, String) {
    let text = async |sql: String| {
        let rows = context.sql(&sql).await.unwrap().collect().await.unwrap();
        arrow::util::pretty::pretty_format_batches(&rows).unwrap().to_string()
    };
    (text(sql.to_owned()).await, text(format!("EXPLAIN {sql}")).await)
}

const QUESTIONS: [&str; 6] = [
    "SELECT device, count(*), sum(n), min(n), max(x), avg(x) FROM t GROUP BY device ORDER BY device",
    "SELECT device, count(n) FILTER (WHERE x > 0), avg(n) FILTER (WHERE n < 0) FROM t WHERE n <> 7 GROUP BY device ORDER BY device",
    "SELECT DISTINCT device FROM t ORDER BY device",
    "SELECT device, bool_and(n > 0), bit_xor(n), count(DISTINCT n) FROM t GROUP BY device ORDER BY device",
    "SELECT upper(device) AS d, sum(x) FROM t GROUP BY d ORDER BY d",
    "SELECT max(c) FROM (SELECT device, count(*) AS c FROM t GROUP BY device HAVING count(*) > 3)",
];

/// With and without the rule, over the same rows.
async fn compare(random: &mut StdRng, config: SessionConfig, runtime: Arc<RuntimeEnv>, devices: usize, run_max: usize) {
    let config = config.with_target_partitions(2);
    let partitions = vec![rows(random, devices, run_max), rows(random, devices, run_max)];
    let table = MemTable::try_new(partitions[0][0].schema(), partitions).unwrap();
    let table = Arc::new(table);
    let ours = SessionContext::new_with_state(crate::functions::state(config.clone(), runtime, 1));
    let theirs = SessionContext::new_with_config(config);
    for context in [&ours, &theirs] {
        context.register_table("t", Arc::clone(&table) as _).unwrap();
    }
    for question in QUESTIONS {
        let ((found, plan), (expected, _)) = (answer(&ours, question).await, answer(&theirs, question).await);
        let other = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
        assert_eq!((other, found.len()), (None, expected.len()), "{question}");
        assert!(plan.contains("GroupsExec: mode=Partial") || question.contains("DISTINCT n"), "{question}\n{plan}");
    }
}

#[tokio::test]
async fn groups_by_a_text_are_those_of_datafusion() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..12 {
        let (devices, run_max) = (random.random_range(1..6_000), random.random_range(1..300));
        compare(&mut random, SessionConfig::new(), Arc::default(), devices, run_max).await;
    }
}

#[tokio::test]
async fn rows_that_are_mostly_groups_of_their_own_go_on_as_they_are() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..4 {
        let mut config = SessionConfig::new();
        config.options_mut().execution.skip_partial_aggregation_probe_rows_threshold = 500;
        compare(&mut random, config, Arc::default(), 1_000_000, 1).await;
    }
}

/// Has room for everyone but groups.
#[derive(Debug, Default)]
struct NoRoom(UnboundedMemoryPool);

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl MemoryPool for NoRoom {
    fn name(&self) -> &str {
        "no room"
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        self.0.grow(reservation, additional);
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.0.shrink(reservation, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        if reservation.consumer().name().starts_with("Groups[") && reservation.size() + additional > 50_000 {
            return Err(DataFusionError::ResourcesExhausted("no room".to_owned()));
        }
        self.0.try_grow(reservation, additional)
    }

    fn reserved(&self) -> usize {
        self.0.reserved()
    }
}

#[tokio::test]
async fn groups_that_have_no_room_go_on_early() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..4 {
        let runtime = RuntimeEnvBuilder::new().with_memory_pool(Arc::<NoRoom>::default()).build_arc().unwrap();
        compare(&mut random, SessionConfig::new(), runtime, 3_000, 2).await;
    }
}

/// Two halves of a table, each with partitions of its own: texts that are in both are one group.
#[tokio::test]
async fn halves_of_a_table_are_grouped_apart_and_put_together() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let config = SessionConfig::new().with_target_partitions(3);
    let ours = SessionContext::new_with_state(crate::functions::state(config.clone(), Arc::default(), 1));
    let theirs = SessionContext::new_with_config(config);
    for name in ["one", "two"] {
        let partitions = (0..2).map(|_| rows(&mut random, 50, 20)).collect::<Vec<_>>();
        let table = Arc::new(MemTable::try_new(partitions[0][0].schema(), partitions).unwrap());
        for context in [&ours, &theirs] {
            context.register_table(name, Arc::clone(&table) as _).unwrap();
        }
    }
    let sql = "SELECT device, count(*), avg(x) FROM (SELECT * FROM one UNION ALL SELECT * FROM two) GROUP BY device ORDER BY device";
    let ((found, plan), (expected, _)) = (answer(&ours, sql).await, answer(&theirs, sql).await);
    assert_eq!(found, expected);
    assert_eq!(plan.matches("GroupsExec").count(), 2, "{plan}");
}
