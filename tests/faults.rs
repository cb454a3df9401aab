//! Lost acks, duplicates, gaps, forks, wrong tokens, damage, kill -9, and two nodes: no row twice, none missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, RecordBatch};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::request::{KIND_BATCH, KIND_SCHEMA, push_frame};
use wire::{FieldType, RefusedRequest, SealedBatch, Seq, StreamField, StreamSchema};

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::process::PATIENCE;

/// Every row `0..rows` of `load` is there once, cold and hot together.
async fn whole(cloud: &Cloud, rows: i64) {
    let found = cloud.sql("SELECT count(*) AS c, count(distinct n) AS d, min(n) AS a, max(n) AS z FROM load").await;
    let found = found.unwrap();
    let expected = serde_json::json!([{ "c": rows, "d": rows, "a": 0, "z": rows - 1 }]);
    assert_eq!(serde_json::Value::Array(found), expected);
}

/// `rows` in batches of ten.
fn batches(chain: &mut Chain, rows: std::ops::Range<i64>) -> Vec<SealedBatch> {
    rows.step_by(10).map(|first| chain.seal(&load_rows(first, 10))).collect()
}

/// Sends until a node has them all, whatever happens on the way, as an uplink does.
async fn send_until_durable(sender: &Sender, chain: &Chain, batches: &[SealedBatch]) {
    let started = Instant::now();
    let last = batches.last().unwrap().header().seq;
    let mut next = 0;
    loop {
        assert!(started.elapsed() < PATIENCE, "not durable in time");
        match sender.send(&chain.schema, &batches[next..]).await {
            Answer::Acks(acks) if acks.acks.iter().any(|ack| ack.durable.seq >= last) => return,
            Answer::Refused(RefusedRequest::Gap { expected, .. }) => {
                let first = batches[0].header().seq;
                next = expected.0.checked_sub(first.0).expect("the node has what it acknowledged") as usize;
            }
            Answer::Refused(RefusedRequest::Forked { at, .. }) => panic!("forked at {at}"),
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_ack_and_a_repeated_request_store_nothing_twice() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "").await;
    let sender = Sender::to(&cloud);
    let mut chain = Chain::new("load", load_schema());
    let sent = batches(&mut chain, 0..100);
    for _ in 0..3 {
        assert_eq!(sender.send(&chain.schema, &sent).await.marks().0, Seq(10));
    }
    // Overlapping: the known ones are dropped, the new ones taken.
    let more = batches(&mut chain, 100..150);
    let overlapping: Vec<_> = sent[5..].iter().chain(&more).cloned().collect();
    assert_eq!(sender.send(&chain.schema, &overlapping).await.marks().0, Seq(15));
    whole(&cloud, 150).await;
    let received = cloud.counter("weir_cloud_rows_received_total").await;
    let durable = cloud.counter("weir_cloud_rows_durable_total").await;
    let duplicate = cloud.counter("weir_cloud_rows_duplicate_total").await;
    assert_eq!((received, durable, duplicate), (400, 150, 250));
    cloud.stop();
    cloud.run();
    cloud.wait().await;
    // Committed by the clean stop: known from the table alone.
    let (durable, committed) = sender.positions(chain.spool).await.marks();
    assert_eq!((durable, committed), (Seq(15), Seq(15)));
    assert_eq!(sender.send(&chain.schema, &sent).await.marks(), (Seq(15), Seq(15)));
    whole(&cloud, 150).await;
}

/// Waits until a statement answers so.
async fn until(cloud: &Cloud, statement: &str, expected: &[serde_json::Value]) {
    let started = Instant::now();
    loop {
        let found = cloud.sql(statement).await.unwrap();
        if found == expected {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{found:?} in place of {expected:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// From a row to its batch, and from there to the agent and its configuration: through restarts, when the table is all that
/// is left, and when the WAL is.
#[tokio::test(flavor = "multi_thread")]
async fn which_agent_sealed_a_batch_is_known_after_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "").await;
    let mut chain = Chain::new("load", load_schema());
    let mut expected = Vec::new();
    for (agent, configuration, ends) in [
        ("0.1.0", 7, None),
        ("0.1.1", 7, None),
        ("0.1.1", 8, Some(true)),
        ("0.1.1", 8, None),
        ("0.1.0", 7, Some(false)),
    ] {
        chain.sealed_by = (agent, configuration);
        let first = 10 * expected.len() as i64;
        for _ in 0..2 {
            expected
                .push(serde_json::json!({"seq": expected.len() + 1, "agent": agent, "configuration": configuration}));
        }
        let sent = batches(&mut chain, first..first + 20);
        assert_eq!(Sender::to(&cloud).send(&chain.schema, &sent).await.marks().0, Seq(expected.len() as u64));
        let told = "SELECT b.seq, b.agent, b.configuration FROM system.batches b JOIN (SELECT DISTINCT _spool, _seq FROM load) r \
                    ON r._spool = b.spool AND r._seq = b.seq WHERE b.stream = 'load' ORDER BY 1";
        until(&cloud, told, &expected).await;
        match ends {
            Some(true) => cloud.stop(),
            Some(false) => cloud.kill(),
            None => continue,
        }
        cloud.run();
        cloud.wait().await;
        until(&cloud, told, &expected).await;
        let rows = 10 * expected.len();
        let counted = format!(
            "SELECT count(*) FROM system.ingest i JOIN system.edges e ON e.edge = i.edge WHERE i.stream = 'load' AND i.rows = {rows} AND e.rows >= {rows}"
        );
        assert_eq!(cloud.integer(&counted).await, 1, "what came before a restart counts, and once");
    }
    let sources = "SELECT rows FROM system.sources WHERE stream = 'load' AND name = 'n' AND edge = 'gw-test' AND first_seen < last_seen";
    assert_eq!(cloud.integer(sources).await, 100, "which edge fills a column is known, too");
    let listed = "SELECT count(*) FROM information_schema.tables WHERE table_name = 'batch_origins'";
    assert_eq!(cloud.integer(listed).await, 0, "it stands behind system.batches");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_a_fork_damage_and_a_wrong_token_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", "").await;
    let sender = Sender::to(&cloud);
    let mut chain = Chain::new("load", load_schema());
    let sent = batches(&mut chain, 0..100);
    sender.send(&chain.schema, &sent[..5]).await;
    // A gap.
    let gap = sender.send(&chain.schema, &sent[7..]).await;
    assert!(matches!(gap, Answer::Refused(RefusedRequest::Gap { expected: Seq(6), got: Seq(8), .. })), "{gap:?}");
    // A copied data directory that went its own way from batch 4 on.
    let mut copy = Chain { last: wire::Mark { seq: Seq(3), crc: sent[2].crc() }, ..chain.clone() };
    let other = copy.seal(&load_rows(5_000, 10));
    let fork = sender.send(&chain.schema, &[other]).await;
    assert!(matches!(fork, Answer::Refused(RefusedRequest::Forked { at: Seq(4), .. })), "{fork:?}");
    // One restored from earlier that goes on behind what is known, with another predecessor.
    copy.last = wire::Mark { seq: Seq(5), crc: 0xbad };
    let fork = sender.send(&chain.schema, &[copy.seal(&load_rows(6_000, 10))]).await;
    assert!(matches!(fork, Answer::Refused(RefusedRequest::Forked { at: Seq(6), .. })), "{fork:?}");
    // An unknown spool that does not begin with 1.
    let stranger = Chain { last: wire::Mark { seq: Seq(8), crc: 1 }, ..Chain::new("load", load_schema()) };
    let gap = sender.send(&chain.schema, &[stranger.clone().seal(&load_rows(7_000, 10))]).await;
    assert!(matches!(gap, Answer::Refused(RefusedRequest::Gap { expected: Seq(1), .. })), "{gap:?}");
    // Damage on the way: every request with a flipped byte is refused as damaged.
    for at in (0..sent[5].bytes().len()).step_by(17) {
        let mut body = Vec::new();
        push_frame(&mut body, KIND_SCHEMA, chain.schema.canonical().as_bytes());
        let mut bytes = sent[5].bytes().to_vec();
        bytes[at] ^= 0x10;
        push_frame(&mut body, KIND_BATCH, &bytes);
        let answer = sender.send_body(body).await;
        assert!(matches!(answer, Answer::Refused(RefusedRequest::Damaged { .. })), "byte {at}: {answer:?}");
    }
    // A schema that was never sent.
    let mut other = Chain::new("other", Arc::new(StreamSchema::new(vec![]).unwrap()));
    let mut body = Vec::new();
    let bare = load_rows(0, 1).project(&[0, 1, 3]).unwrap();
    push_frame(&mut body, KIND_BATCH, other.seal(&bare).bytes());
    let answer = sender.send_body(body).await;
    assert!(matches!(answer, Answer::Refused(RefusedRequest::SchemaUnknown { .. })), "{answer:?}");
    // A wrong token for a while.
    let stranger = Sender { token: "guess".into(), ..sender.clone() };
    for _ in 0..3 {
        let answer = stranger.send(&chain.schema, &sent[5..]).await;
        assert!(matches!(answer, Answer::Refused(RefusedRequest::Unauthorized { .. })), "{answer:?}");
        let answer = stranger.positions(chain.spool).await;
        assert!(matches!(answer, Answer::Refused(RefusedRequest::Unauthorized { .. })), "{answer:?}");
    }
    whole(&cloud, 50).await;
    assert_eq!(sender.send(&chain.schema, &sent[5..]).await.marks().0, Seq(10));
    whole(&cloud, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_itself_at_fault_is_refused_by_name_and_hurts_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", "").await;
    let sender = Sender::to(&cloud);
    let (mut good, mut bad) = (Chain::new("load", load_schema()), Chain::new("load", load_schema()));
    // An undamaged batch whose body has other columns than its schema.
    let float = StreamField { name: "n".parse().unwrap(), kind: FieldType::Text };
    bad.schema = Arc::new(StreamSchema::new(vec![float]).unwrap());
    let lying = bad.seal(&load_rows(0, 10));
    let mut body = Vec::new();
    for schema in [&good.schema, &bad.schema] {
        push_frame(&mut body, KIND_SCHEMA, schema.canonical().as_bytes());
    }
    push_frame(&mut body, KIND_BATCH, lying.bytes());
    push_frame(&mut body, KIND_BATCH, good.seal(&load_rows(0, 10)).bytes());
    let answer = sender.send_body(body).await;
    let Answer::Acks(acks) = answer else { panic!("{answer:?}") };
    assert_eq!(acks.refused.len(), 1, "{acks:?}");
    assert_eq!((acks.refused[0].spool, acks.refused[0].seq), (bad.spool, Seq(1)));
    // The edge replaces it by a void batch, and goes on.
    let void = SealedBatch::void(lying.header().clone(), &acks.refused[0].reason, lying.crc());
    // The chain goes on from what it stands for, and the one it replaces is known from now on.
    bad.last = wire::Mark { seq: Seq(1), crc: lying.crc() };
    bad.schema = load_schema();
    let next = bad.seal(&load_rows(10, 10));
    let mut body = Vec::new();
    push_frame(&mut body, KIND_SCHEMA, bad.schema.canonical().as_bytes());
    push_frame(&mut body, KIND_BATCH, void.bytes());
    push_frame(&mut body, KIND_BATCH, next.bytes());
    assert_eq!(sender.send_body(body).await.marks().0, Seq(2));
    whole(&cloud, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_fields_are_added_and_other_types_are_rescued() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "").await;
    let sender = Sender::to(&cloud);
    let mut old = Chain::new("load", load_schema());
    sender.send(&old.schema.clone(), &[old.seal(&load_rows(0, 10))]).await.marks();
    // A newer edge: `n` became a float, `extra` is new.
    let fields = [("n", FieldType::Float64), ("extra", FieldType::Float64)]
        .map(|(name, kind)| StreamField { name: name.parse().unwrap(), kind });
    let mut new = Chain::new("load", Arc::new(StreamSchema::new(fields.to_vec()).unwrap()));
    let rows = load_rows(10, 2);
    let floats: ArrayRef = Arc::new(Float64Array::from(vec![1.5, f64::NAN]));
    let columns = vec![rows.column(0).clone(), rows.column(1).clone(), floats.clone(), floats, rows.column(3).clone()];
    let rows = RecordBatch::try_new(new.schema.arrow().clone(), columns).unwrap();
    sender.send(&new.schema.clone(), &[new.seal(&rows)]).await.marks();
    sender.send(&old.schema.clone(), &[old.seal(&load_rows(10, 10))]).await.marks();
    for _ in 0..2 {
        let rows = cloud.sql("SELECT n, extra, quality, _rescued FROM load WHERE n IS NULL ORDER BY ts").await.unwrap();
        let expected = serde_json::json!([
            { "n": null, "extra": 1.5, "quality": "type:n", "_rescued": "{\"n\":1.5}" },
            { "n": null, "extra": null, "quality": "nonfinite:n,nonfinite:extra", "_rescued": "{\"extra\":\"NaN\",\"n\":\"NaN\"}" },
        ]);
        assert_eq!(serde_json::Value::Array(rows), expected);
        assert_eq!(cloud.integer("SELECT count(n) FROM load").await, 20);
        assert_eq!(cloud.integer("SELECT count(*) FROM load WHERE extra IS NULL").await, 21);
        // Once hot, once cold: the same.
        cloud.stop();
        cloud.run();
        cloud.wait().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_moves_between_nodes_is_stored_once() {
    let directory = tempfile::tempdir().unwrap();
    let a = Cloud::start(directory.path(), "a", "").await;
    let mut b = Cloud::start(directory.path(), "b", "").await;
    let mut chain = Chain::new("load", load_schema());
    let sent = batches(&mut chain, 0..300);
    // A has 1..10 durable, none committed; the edge moves to B and sends from what is committed.
    assert_eq!(Sender::to(&a).send(&chain.schema, &sent[..10]).await.marks(), (Seq(10), Seq(0)));
    assert_eq!(Sender::to(&b).send(&chain.schema, &sent[..20]).await.marks(), (Seq(20), Seq(0)));
    b.stop();
    // A comes back: it finds out what B committed before it says no.
    assert_eq!(Sender::to(&a).send(&chain.schema, &sent[20..25]).await.marks(), (Seq(25), Seq(20)));
    whole(&a, 250).await;
    // B again, ahead of A, and A commits what B has committed already.
    b.run();
    b.wait().await;
    let mut a = a;
    send_until_durable(&Sender::to(&b), &chain, &sent[20..]).await;
    b.stop();
    a.stop();
    a.run();
    a.wait().await;
    let (durable, committed) = Sender::to(&a).positions(chain.spool).await.marks();
    assert_eq!((durable, committed), (Seq(30), Seq(30)));
    whole(&a, 300).await;
}

/// How often the cloud is killed in one test; more on demand.
fn kills() -> u32 {
    std::env::var("WEIR_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20)
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_moment_loses_and_doubles_nothing() {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("WEIR_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    // Commits all the time, so that kills hit them, too.
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"150ms\"\n").await;
    let sender = Sender::to(&cloud);
    let stop = Arc::new(AtomicBool::new(false));
    let durable = Arc::new(AtomicI64::new(0));
    let load = tokio::spawn({
        let (stop, durable) = (Arc::clone(&stop), Arc::clone(&durable));
        async move {
            let mut chain = Chain::new("load", load_schema());
            let mut first = 0;
            while !stop.load(Ordering::Relaxed) {
                let sent = batches(&mut chain, first..first + 50);
                send_until_durable(&sender, &chain, &sent).await;
                first += 50;
                durable.store(first, Ordering::SeqCst);
            }
            first
        }
    });
    for _ in 0..kills() {
        // The moment of the kill is what is random here; nothing is waited for.
        tokio::time::sleep(Duration::from_millis(random.random_range(20..600))).await;
        cloud.kill();
        cloud.run();
        cloud.wait().await;
        // Acknowledged before the kill is visible after it.
        let acknowledged = durable.load(Ordering::SeqCst);
        if acknowledged > 0 {
            let found = cloud.integer("SELECT count(*) FROM load").await;
            assert!(found >= acknowledged, "{acknowledged} were acknowledged, {found} are there");
        }
    }
    stop.store(true, Ordering::Relaxed);
    let sent = load.await.unwrap();
    assert!(sent > 1_000, "the load got through: {sent}");
    whole(&cloud, sent).await;
    cloud.stop();
    cloud.run();
    cloud.wait().await;
    whole(&cloud, sent).await;
}
