//! Who waits when memory is full and no table takes a commit: readings first, then views, alerts last; and nobody loses a row.

use wire::ids::OWN_EDGE;

use super::*;
use crate::doors::rows::Gathered;
use crate::ingest::write::Writing;

/// The node's own streams, written as `query` writes them.
#[derive(Default)]
struct Own {
    rows: BTreeMap<&'static str, u64>,
}

impl Own {
    /// Writes a batch; whether it was taken.
    fn write(&mut self, node: &mut Node, stream: &'static str) -> bool {
        self.write_rows(node, stream, |_| 200)
    }

    fn write_rows(&mut self, node: &mut Node, stream: &'static str, rows: fn(u64) -> u64) -> bool {
        let mut answered = put(node, stream, rows);
        loop {
            node.ingest.turn().unwrap();
            match answered.try_recv() {
                Ok(Ok(written)) => {
                    *self.rows.entry(stream).or_default() += written.rows;
                    return true;
                }
                Ok(Err(RefusedRequest::PushedBack { .. })) => return false,
                Ok(Err(other)) => panic!("{other}"),
                Err(_) => {}
            }
        }
    }
}

type Answer = oneshot::Receiver<Result<crate::ingest::write::Written, RefusedRequest>>;

/// Puts a batch of a stream of the node's own into the queue.
fn put(node: &Node, stream: &str, rows: fn(u64) -> u64) -> Answer {
    let mut sender = Sender { rows, ..Sender::new(9, stream) };
    let Arrived { schema, rows, .. } = sender.batch(WIDER_FROM);
    let rows = rows.unwrap();
    let cut = CutBatch::seal(stream.parse().unwrap(), &schema, &rows, NO_WATERMARK, "test", 0).unwrap();
    let (reply, answered) = oneshot::channel();
    let _place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
    let batches = vec![(None, Gathered { cut, schema, rows })];
    let writing = Box::new(Writing::new(OWN_EDGE.parse().unwrap(), batches, reply));
    node.jobs.send(Job::Write { writing, _place }).unwrap();
    answered
}

fn send(sender: &mut Sender, node: &mut Node) -> bool {
    let batches = vec![sender.batch(sender.durable + 1)];
    let (class, before) = (Class::of(&"gw".parse().unwrap(), &sender.stream), sender.durable);
    let answer = node.ask(|reply, _place| Job::Batches { class, batches, reply, _place }).unwrap();
    sender.heard(answer);
    sender.durable > before
}

const VIEW: &str = "by_minute_changes";

#[test]
fn readings_wait_first_then_views_then_alerts_and_all_is_there_in_the_end() {
    let layer = machine();
    let gate = Gate { inner: layer.clone(), below: "/tables", shut: Arc::default() };
    let mut settings = settings("/a");
    settings.commit.max_age = Span(Duration::from_secs(3_600));
    (settings.hot.max_bytes, settings.wal.max_bytes) = (Size(1 << 20), Size(64 << 20));
    (settings.pressure.alerts, settings.pressure.views) = (0.2, 0.2);
    let mut node = Node::start(&layer, settings, sim_store_through(gate.clone(), &layer).unwrap()).unwrap();
    let mut traffic = [Sender::new(1, "traffic"), Sender::new(1, "noise"), Sender::new(1, "weather")];
    let mut claims = Sender { rows: |_| 200, ..Sender::new(1, "alerts") };
    let mut own = Own::default();
    // Every table is there, with all of its fields.
    for sender in &mut traffic {
        sender.rows = |_| 200;
        while sender.durable < WIDER_FROM {
            assert!(send(sender, &mut node));
        }
    }
    while claims.durable < WIDER_FROM {
        assert!(send(&mut claims, &mut node));
    }
    for stream in [VIEW, "alert_log"] {
        assert!(own.write(&mut node, stream));
    }
    gate.shut.store(true, Ordering::Relaxed);
    let mut taken = [0; 3];
    // However much the others send: each of the three is stuck at its share, and together they have what is theirs.
    let all_stuck = |senders: &mut [Sender; 3], node: &mut Node| {
        let mut count = 0;
        while senders.iter_mut().any(|sender| send(sender, node)) {
            count += 1;
            assert!(count < 10_000, "readings are never pushed back");
        }
    };
    all_stuck(&mut traffic, &mut node);
    let free = |node: &Node, class| {
        let mut hot = ByClass::<usize>::default();
        node.ingest.streams.values().for_each(|stream| hot[stream.class] += stream.hot.bytes());
        (node.ingest.hot_budget().free(class, &hot), hot)
    };
    let (of_views, hot) = free(&node, Class::Views);
    assert!(of_views >= (1 << 20) / 5 - hot[Class::Views], "{of_views} left for views: {hot:?}");
    while own.write(&mut node, VIEW) {
        taken[0] += 1;
        assert!(taken[0] < 10_000, "views are never pushed back");
        assert!(traffic.iter_mut().all(|sender| !send(sender, &mut node)), "a reading is taken before a view");
    }
    while send(&mut claims, &mut node) {
        taken[1] += 1;
        assert!(taken[1] < 10_000, "alerts of edges are never pushed back");
    }
    // A flood of alerts of edges leaves room for the record.
    while own.write(&mut node, "alert_log") {
        taken[2] += 1;
        assert!(taken[2] < 10_000, "alerts are never pushed back");
        assert!(!own.write(&mut node, VIEW), "a view is taken before an alert");
    }
    println!("taken under pressure: views {}, alerts of edges {}, alerts {}", taken[0], taken[1], taken[2]);
    assert!(taken.iter().all(|count| *count > 0), "{taken:?}");
    let (_, hot) = free(&node, Class::Alerts);
    assert!(hot.iter().map(|(_, bytes)| bytes).sum::<usize>() <= 1 << 20, "{hot:?}");
    for class in Class::ALL {
        assert!(node.ingest.metrics.classes[class].pushed_back.get() > 0, "{class:?}");
    }
    // The store is back.
    gate.shut.store(false, Ordering::Relaxed);
    node.drain();
    let rows = |stream: &str| {
        let name = stream.parse().unwrap();
        let state = node.catalogue.state(&name).unwrap();
        rows_on_disk(&layer, &name, &state.snapshot).unwrap()
    };
    for sender in traffic.iter().chain([&claims]) {
        assert_eq!(rows(sender.stream.as_str()), sender.rows_up_to(sender.durable), "{}", sender.stream);
    }
    for (stream, written) in &own.rows {
        assert_eq!(rows(stream), *written, "{stream}");
    }
    let metrics = &node.ingest.metrics;
    for (class, of) in metrics.classes.iter() {
        let outcomes = [&of.durable, &of.duplicate, &of.refused, &of.pushed_back];
        assert_eq!(of.received.get(), outcomes.iter().map(|count| count.get()).sum::<u64>(), "{class:?}");
        assert_eq!((of.durable.get(), of.hot_rows.get()), (of.committed.get(), 0), "{class:?}");
    }
    // What came through doors is a part of it, and balances alone.
    assert_eq!(metrics.rows_durable.get(), metrics.rows_committed.get());
    let through_doors: u64 = traffic.iter().chain([&claims]).map(|sender| sender.rows_up_to(sender.durable)).sum();
    assert_eq!(metrics.rows_durable.get(), through_doors);
}

#[test]
fn an_alert_passes_the_readings_that_wait() {
    let layer = machine();
    let mut settings = settings("/a");
    (settings.wal.segment_bytes, settings.wal.max_bytes) = (Size(1 << 20), Size(64 << 20));
    let mut node = Node::start(&layer, settings, sim_store(&layer).unwrap()).unwrap();
    let mut traffic = Sender { rows: |_| 8_000, ..Sender::new(1, "traffic") };
    let mut own = Own::default();
    assert!(own.write(&mut node, "alert_log") && send(&mut traffic, &mut node));
    // Requests that are more than goes along with an alert wait before it; none for a new column.
    let mut answers = Vec::new();
    for seq in 2..WIDER_FROM {
        let batches = vec![traffic.batch(seq)];
        let (reply, answered) = oneshot::channel();
        let _place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        node.jobs.send(Job::Batches { class: Class::Readings, batches, reply, _place }).unwrap();
        answers.push(answered);
    }
    let mut alert = put(&node, "alert_log", |_| 200);
    node.ingest.turn().unwrap();
    assert!(matches!(alert.try_recv(), Ok(Ok(_))), "it waits for readings");
    let left = answers.iter_mut().filter_map(|answer| answer.try_recv().err()).count();
    assert!(left > 0, "all readings share its sync");
}

#[test]
fn what_found_no_room_finds_it_before_more_readings_do() {
    let layer = machine();
    let gate = Gate { inner: layer.clone(), below: "/tables", shut: Arc::default() };
    let mut settings = settings("/a");
    settings.hot.max_bytes = Size(1 << 20);
    (settings.wal.segment_bytes, settings.wal.max_bytes) = (Size(1 << 20), Size(64 << 20));
    (settings.pressure.alerts, settings.pressure.views) = (0.1, 0.1);
    let mut node = Node::start(&layer, settings, sim_store_through(gate.clone(), &layer).unwrap()).unwrap();
    let mut traffic = Sender { rows: |_| 200, ..Sender::new(1, "traffic") };
    let mut noise = Sender { rows: |_| 200, ..Sender::new(1, "noise") };
    let mut own = Own::default();
    while noise.durable < WIDER_FROM {
        assert!(send(&mut traffic, &mut node) && send(&mut noise, &mut node));
    }
    assert!(own.write(&mut node, VIEW));
    gate.shut.store(true, Ordering::Relaxed);
    while send(&mut traffic, &mut node) || send(&mut noise, &mut node) {}
    // More than what is left for views.
    let large = |_| 4_000;
    assert!(!own.write_rows(&mut node, VIEW, large), "it has room");
    gate.shut.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    while node.ingest.streams.values().any(|stream| !stream.hot.is_empty()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing is committed");
        node.ingest.turn().unwrap();
    }
    assert!(begun.elapsed() < super::admit::HUNGRY, "it came too late to see");
    assert!(!send(&mut traffic, &mut node), "a reading is taken while a view waits");
    assert!(own.write_rows(&mut node, VIEW, large));
    assert!(send(&mut traffic, &mut node));
    node.drain();
}
