//! A column gets another type beside a node: rows are hot meanwhile, the machine fails, edges go on with the old type.

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_schema::DataType;
use wire::schema::{QUALITY, SEQ};

use super::*;
use crate::compact::{Pace, scan};
use crate::delta::DeltaTable;
use crate::rescue::row_schema;
use crate::retype::retype;

/// Every value of the senders fits these.
const KINDS: [FieldType; 3] = [FieldType::Float64, FieldType::Int64, FieldType::Text];

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap()
}

/// As `weir retype` does it; the machine may fail.
fn by_hand(runtime: &Runtime, layer: &SimLayer, stream: &StreamName, kind: FieldType) -> bool {
    let Ok(store) = sim_store(layer) else { return false };
    runtime.block_on(async {
        let Ok(Some(mut table)) = DeltaTable::open(&store, stream).await else { return false };
        let column = "speed".parse().unwrap();
        retype(&mut table, &column, kind, &mut Pace::new(1.0), &|_| {}).await.is_ok()
    })
}

/// (number of the batch, value) of rows of any type of `speed`, which all are good.
fn take(rows: &RecordBatch, values: &mut Vec<(i64, i64)>) {
    let column = |name| rows.column_by_name(name).unwrap();
    let (seq, speed) = (column(SEQ).as_primitive::<Int64Type>(), column("speed"));
    assert!(column(QUALITY).as_string::<i32>().iter().all(|quality| quality == Some("good")), "{rows:?}");
    for row in 0..rows.num_rows() {
        assert!(speed.is_valid(row), "{rows:?}");
        let value = match speed.data_type() {
            DataType::Int64 => speed.as_primitive::<Int64Type>().value(row),
            DataType::Float64 => speed.as_primitive::<Float64Type>().value(row) as i64,
            _ => speed.as_string::<i32>().value(row).parse().unwrap(),
        };
        values.push((seq.value(row), value));
    }
}

/// Every row that readers of a node see, cold and hot, in the columns that its snapshot says.
fn check_values(runtime: &Runtime, node: &Node, sender: &mut Sender) {
    let state = node.catalogue.state(&sender.stream).unwrap();
    let schema = row_schema(&state.snapshot.fields);
    let mut values = Vec::new();
    let store = state.snapshot.log_store.object_store(None);
    for file in state.snapshot.files.iter() {
        runtime.block_on(scan(&store, &schema, file, &mut |rows| take(rows, &mut values))).unwrap();
    }
    let HotAnswer::Rows(parts) = state.hot.answer(state.snapshot.version, state.snapshot.version) else {
        panic!("the newest version is always answered for");
    };
    for part in parts {
        for field in part.rows.schema().fields() {
            assert_eq!(schema.field_with_name(field.name()).unwrap().data_type(), field.data_type());
        }
        take(&part.rows, &mut values);
    }
    values.sort_unstable();
    let last = node.shown(sender).1;
    let of_batch = |seq: u64| (0..rows_of(seq)).map(move |row| (seq as i64, (seq * 1_000 + row) as i64));
    assert_eq!(values, (1..=last).flat_map(of_batch).collect::<Vec<_>>());
}

#[test]
fn whatever_fails_while_a_column_changes_its_type_every_value_is_there_once() {
    let runtime = runtime();
    let (mut changed, mut alive) = (0, 0);
    for (seed, mut random) in seeds(60) {
        let layer = machine();
        let mut sender = Sender::new(1, "traffic");
        for _ in 0..LIVES {
            layer.fail_after(300 + random.below(2_000));
            let started = sim_store(&layer).ok().and_then(|store| Node::start(&layer, settings("/a"), store).ok());
            if let Some(mut node) = started {
                // Rows stay hot until somebody looks.
                node.ingest.settings.commit.max_age = Span(Duration::from_secs(random.below(2) * 3_600));
                for _ in 0..STEPS {
                    if random.one_in(3) {
                        let kind = KINDS[random.below(3) as usize];
                        changed += u32::from(by_hand(&runtime, &layer, &sender.stream, kind));
                    } else if sender.step(&mut node, &mut random).is_err() {
                        break;
                    }
                    if node.catalogue.state(&sender.stream).is_some() {
                        node.shown(&sender);
                    }
                }
            }
            layer.power_cut(&mut random);
        }
        layer.fail_after(u64::MAX);
        let mut node = Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
        if node.catalogue.state(&sender.stream).is_none() {
            continue;
        }
        check_values(&runtime, &node, &mut sender);
        // Hot rows, and a table that has changed behind the node's back.
        node.ingest.settings.commit.max_age = Span(Duration::from_secs(3_600));
        for _ in 0..3 {
            sender.step(&mut node, &mut random).unwrap();
        }
        let kind = KINDS[random.below(3) as usize];
        assert!(by_hand(&runtime, &layer, &sender.stream, kind), "INGEST_SEED={seed}");
        check_values(&runtime, &node, &mut sender);
        node.ask(|reply, _place| Job::Positions { spools: vec![sender.spool], reply, _place }).unwrap().unwrap();
        let state = node.catalogue.state(&sender.stream).unwrap();
        assert!(state.snapshot.fields.iter().any(|field| field.name.as_str() == "speed" && field.kind == kind));
        check_values(&runtime, &node, &mut sender);
        node.drain();
        check_values(&runtime, &node, &mut sender);
        alive += 1;
    }
    assert!(changed > 20 && alive > 20, "{changed} changes, {alive} tables");
}

/// What a query froze before a column changed it cannot go on with: the types of its hot rows are others now.
#[test]
fn a_version_of_before_is_answered_stale() {
    let (runtime, layer) = (runtime(), machine());
    let mut node = Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
    node.ingest.settings.commit.max_age = Span(Duration::from_secs(3_600));
    let mut sender = Sender::new(1, "traffic");
    let batches = vec![sender.batch(1)];
    sender.heard(node.ask(|reply, _place| Job::Batches { class: Class::Readings, batches, reply, _place }).unwrap());
    let before = node.catalogue.state(&sender.stream).unwrap();
    assert!(by_hand(&runtime, &layer, &sender.stream, FieldType::Text));
    node.ask(|reply, _place| Job::Positions { spools: vec![sender.spool], reply, _place }).unwrap().unwrap();
    let now = node.catalogue.state(&sender.stream).unwrap();
    let (old, new) = (before.snapshot.version, now.snapshot.version);
    assert!(matches!(now.hot.answer(old, new), HotAnswer::Stale(version) if version == new));
    // Its own value still answers for what it is pinned to.
    assert!(matches!(before.hot.answer(old, old), HotAnswer::Rows(_)));
    check_values(&runtime, &node, &mut sender);
    node.drain();
}
