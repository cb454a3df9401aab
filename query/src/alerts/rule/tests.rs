use std::time::Duration;

use super::super::trial;
use super::*;
use crate::engine::tests::engine;

async fn compile(engine: &Engine, text: &str) -> Result<Rule, String> {
    let settings = RuleSettings::parse("r", text)?;
    Rule::compile(engine, settings).await.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_understood_or_refused_with_a_reason() {
    let (engine, _traffic) = engine(6, 0, Duration::from_secs(60)).await;
    for (text, expected) in [
        ("sql = \"SELECT device, vehicle_count FROM traffic WHERE vehicle_count > 3\"", "rows"),
        ("sql = \"SELECT t.device AS d, t.vehicle_count * 2 AS v FROM traffic t\"", "rows"),
        ("on = \"traffic\"\nwhen = \"vehicle_count > 3\"\nuntil = \"vehicle_count < 2\"", "rows"),
        ("sql = \"SELECT device, count(*) AS n FROM traffic GROUP BY device HAVING count(*) > 3\"", "statement"),
        ("sql = \"SELECT device FROM traffic WHERE ts > now() - INTERVAL '1 hour'\"", "statement"),
        ("sql = \"SELECT device FROM traffic LIMIT 3\"", "statement"),
        ("on = \"traffic\"\nabsent = \"15m\"\nby = [\"_edge\"]", "absent"),
    ] {
        let rule = compile(&engine, text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
        let kind = match rule.kind {
            Kind::Rows(_) => "rows",
            Kind::Statement { .. } => "statement",
            Kind::Absent { .. } => "absent",
        };
        assert_eq!(kind, expected, "{text}");
    }
    for (text, expected) in [
        ("sql = \"SELECT device FROM traffic WHERE vehicle_cont > 3\"", "vehicle_cont"),
        ("sql = \"SELECT device FROM trafic\"", "trafic"),
        ("sql = \"SELECT device FROM traffic WHERE random() < 0.5\"", "another answer each time"),
        ("sql = \"DROP TABLE traffic\"", ""),
        ("sql = \"SELECT device FROM traffic; SELECT 1\"", ""),
        ("sql = \"SELECT (\"", ""),
        ("on = \"traffic\"\nwhen = \"true) UNION SELECT * FROM traffic WHERE (true\"", "looks at one row"),
        ("on = \"traffic\"\nwhen = \"vehicle_count > (SELECT max(vehicle_count) FROM traffic)\"", "looks at one row"),
        ("on = \"traffic\"\nwhen = \"vehicle_count\"", ""),
        ("on = \"traffic\"", "write `sql`"),
        ("on = \"traffic\"\nwhen = \"true\"\nsql = \"SELECT 1\"", "write `sql`"),
        ("on = \"traffic\"\nwhen = \"true\"\nmessage = \"{{ vehicle_cont }}\"", "did you mean `vehicle_count`?"),
        ("on = \"traffic\"\nwhen = \"true\"\ntopic = \"a/{lane}\"", "{lane}"),
        ("on = \"traffic\"\nwhen = \"true\"\ntopic = \"a/+/b\"", "no topic"),
        ("on = \"traffic\"\nwhen = \"true\"\nvalue = \"device\"", "no number"),
        ("on = \"traffic\"\nwhen = \"true\"\nfore = \"1m\"", "did you mean `for`?"),
        ("on = \"traffic\"\nwhen = \"true\"\ninhibited_by = [\"r\"]", "inhibits itself"),
        ("on = \"traffic\"\nabsent = \"15m\"\nby = [\"lane\"]", "no column of traffic"),
        ("on = \"traffic\"\nabsent = \"1ms\"", "less than 1s"),
    ] {
        let error = compile(&engine, text).await.map(|_| ()).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
    // Nonsense of every length does no harm.
    for length in 0..2_000_usize {
        let nonsense: String = (0..length % 97).map(|_| rand::random_range(' '..'~')).collect();
        let rule = serde_json::json!({ "sql": format!("SELECT device FROM traffic WHERE {nonsense}") });
        // Whether it is one is not the point.
        drop(compile(&engine, &rule.to_string()).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_over_history_fires_when_it_would_have() {
    let batches = 6;
    let (engine, _traffic) = engine(batches, 0, Duration::from_secs(60)).await;
    let run = async |text: &str| {
        let settings = RuleSettings::parse("r", text).unwrap();
        trial::run(&engine, settings, (0, 4_000_000_000_000_000)).await.unwrap()
    };
    // Ten rows a day, a minute apart, of two devices: each rises above four once a day.
    let found = run("on = \"traffic\"\nwhen = \"vehicle_count % 10 >= 4\"").await;
    assert_eq!((found.rows, found.fired, found.failed), (60, 2 * batches as u64, 0));
    let ended = found.alerts.iter().filter(|alert| alert.to.is_some()).count();
    assert_eq!(ended, 2 * (batches - 1), "the last two still fire");
    assert!(found.alerts.windows(2).all(|two| two[0].fired <= two[1].fired));
    // Rows 4, 6 and 8 hold: two minutes are reached by the second, and four by the third.
    for (hold, after_s) in [("2m", 120), ("4m", 240)] {
        let found = run(&format!("on = \"traffic\"\nwhen = \"vehicle_count % 10 >= 4\"\nfor = \"{hold}\"")).await;
        assert_eq!(found.fired, 2 * batches as u64);
        assert!(found.alerts.iter().all(|alert| alert.fired - alert.from == after_s * 1_000_000));
    }
    let found = run("on = \"traffic\"\nwhen = \"vehicle_count % 10 >= 4\"\nfor = \"5m\"").await;
    assert_eq!(found.fired, 0);
    // A row on which the condition fails says nothing, and its neighbours are judged.
    let found = run("on = \"traffic\"\nwhen = \"10 / (vehicle_count % 10 - 4) >= 2\"").await;
    assert_eq!((found.failed, found.fired), (batches as u64, 2 * batches as u64));
    // With `until`, it goes on in between.
    let found = run("on = \"traffic\"\nwhen = \"vehicle_count % 10 = 4\"\nuntil = \"vehicle_count % 10 = 8\"").await;
    assert_eq!(found.fired, batches as u64);
    let minutes = found.alerts.iter().filter_map(|alert| Some(alert.to? - alert.from)).map(|us| us / 60_000_000);
    assert_eq!(minutes.collect::<Vec<_>>(), vec![4; batches]);
    // What does not hold in between has not lasted, whatever ends it once it fires: as at the edge.
    let found = run(
        "on = \"traffic\"\nwhen = \"vehicle_count % 10 IN (2, 6)\"\nuntil = \"vehicle_count % 10 = 8\"\nfor = \"3m\"",
    )
    .await;
    assert_eq!(found.fired, 0);
}

#[test]
fn the_shipped_rules_are_rules_and_a_hash_is_that_of_the_edge() {
    let rules = RuleSettings::parse_file(include_str!("../../../../configs/rules/traffic.toml")).unwrap();
    assert_eq!(rules.len(), 6);
    // As edge-agent/src/rules/rule.rs has it: the SHA-256 of this text, its first 16 bytes.
    let rule = RuleSettings::parse("r", "on = \"s\"\nwhen = \"v > 1\"\nfor = \"1s\"\nlabels = { a = \"b\" }").unwrap();
    let text = r#"["r","s","v > 1",null,1000000,null,{"a":"b"}]"#;
    let expected: String =
        digest(&SHA256, text.as_bytes()).as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(rule.hash(), expected);
    let louder = RuleSettings { severity: Severity::Critical, message: "other".to_owned(), ..rule.clone() };
    assert_eq!(louder.hash(), rule.hash(), "what it says may change while it fires");
}
