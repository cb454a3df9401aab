use super::*;
use crate::decode::tests::sparkplug::{Is, metric, payload};

/// A source of Sparkplug, `bus`, beside the one of the other tests.
fn with_sparkplug() -> Settings {
    settings(
        "[[source]]\nkind = \"mqtt\"\nname = \"bus\"\nurl = \"mqtt://h\"\ntopics = [\"spBv1.0/#\"]\nstream = \"bus\"\n\
         format = \"sparkplug\"\n[source.map]\ndevice = \"/id\"\nts = \"/time\"\nv = \"/metrics/v\"\n\
         [stream.bus.fields]\nv = { type = \"int64\" }\n",
    )
}

fn of_bus(topic: &str, payload: Vec<u8>) -> Entry {
    Entry::Message(Message {
        source: "bus".into(),
        topic: format!("spBv1.0/{topic}"),
        payload: Payload::Whole(payload.into()),
        arrival_us: ARRIVAL,
        delivery: None,
    })
}

fn balanced(counters: &Counters) {
    for (source, totals) in &counters.sources {
        let decided = totals.accepted + totals.quarantined + totals.duplicate + totals.waiting + totals.filtered;
        assert_eq!(totals.read, decided, "{source}: {totals:?}");
    }
}

#[test]
fn aliases_are_the_same_after_a_restart_anywhere() {
    let settings = with_sparkplug();
    let birth = |seq, alias| payload(Some(seq), &[metric("v", alias, 3, Is::Int(0))]);
    let data = |seq, alias, value| payload(Some(seq), &[metric("", alias, 0, Is::Int(value))]);
    let messages = [
        ("g/NDATA/n", data(9, 7, 1)),
        ("g/NBIRTH/n", birth(0, 7)),
        ("g/NDATA/n", data(1, 7, 2)),
        ("g/DBIRTH/n/d", birth(2, 8)),
        ("g/DDATA/n/d", data(3, 8, 3)),
        ("g/NDATA/n", data(5, 7, 4)),
        ("g/NBIRTH/n", birth(0, 70)),
        ("g/NDATA/n", data(1, 7, 5)),
        ("g/NDATA/n", data(2, 70, 6)),
        ("g/NDATA/n", b"\xff".to_vec()),
        ("g/NDEATH/n", payload(None, &[])),
        ("g/NDATA/n", data(3, 70, 7)),
    ];
    let run = |restart_before: usize| {
        let mut pipeline = start(&settings);
        let mut all = BTreeMap::<String, Vec<String>>::new();
        for (index, (topic, payload)) in messages.iter().enumerate() {
            if index == restart_before {
                let bytes = pipeline.snapshot();
                let stands = settings.lanes().iter().map(|lane| (lane.name.to_string(), pipeline.position())).collect();
                pipeline = Pipeline::restore(&settings, &stands, Bytes::from(bytes)).unwrap();
            }
            let position = Position(index as u64);
            pipeline.apply(position, Position(position.0 + 1), &of_bus(topic, payload.clone()));
            for (stream, mut texts) in rows(&settings, &pipeline.cut().unwrap()) {
                all.entry(stream).or_default().append(&mut texts);
            }
        }
        balanced(pipeline.counters());
        (all, pipeline.snapshot())
    };
    let never = run(usize::MAX);
    // 1 and 5 and 7 have aliases that are not known, and one payload is none.
    assert_eq!((never.0["bus"].len(), never.0["quarantine"].len()), (7, 4), "{:#?}", never.0);
    for restart_before in 0..messages.len() {
        assert_eq!(run(restart_before), never, "{restart_before}");
    }
}

#[test]
fn requests_for_births_are_handed_out_with_their_source() {
    let settings = with_sparkplug();
    let mut pipeline = start(&settings);
    pipeline.apply(Position(0), Position(1), &of_bus("g/NDATA/n", payload(Some(3), &[])));
    let commands = pipeline.take_commands();
    assert_eq!(
        commands.iter().map(|(source, command)| (source.as_str(), command.topic.as_str())).collect::<Vec<_>>(),
        [("bus", "spBv1.0/g/NCMD/n"),]
    );
    assert!(pipeline.take_commands().is_empty());
}

#[test]
fn what_is_filtered_is_counted_and_nothing_else() {
    let mut settings = settings("");
    let SourceSettings::Mqtt(mqtt) = &mut settings.source[0] else { panic!() };
    mqtt.when =
        toml::from_str::<BTreeMap<String, crate::config::When>>("when = { at = \"/v\", above = 5 }").unwrap()["when"]
            .clone();
    let mut pipeline = start(&settings);
    let second = ARRIVAL / 1_000_000;
    let json = format!("[{{\"ts\":{second},\"v\":5}},{{\"ts\":{second},\"v\":6}},{{\"ts\":{second},\"v\":6000}}]");
    pipeline.apply(Position(0), Position(1), &message(json));
    pipeline.apply(Position(1), Position(2), &message("{\"v\":1}"));
    let cut = rows(&settings, &pipeline.cut().unwrap());
    assert_eq!((cut["s"].len(), cut["quarantine"].len()), (1, 1));
    let totals = pipeline.counters().sources["s"];
    assert_eq!((totals.read, totals.accepted, totals.quarantined, totals.filtered), (4, 1, 1, 2));
    balanced(pipeline.counters());
}

#[test]
fn a_snapshot_of_before_the_formats_is_read() {
    let settings = settings("");
    let mut pipeline = start(&settings);
    pipeline.apply(Position(0), Position(1), &message(format!("{{\"ts\":{},\"v\":7}}", ARRIVAL / 1_000_000)));
    pipeline.cut().unwrap();
    let bytes = pipeline.snapshot();
    let len = u32::from_le_bytes(bytes[1..5].try_into().unwrap()) as usize;
    let mut meta: serde_json::Value = serde_json::from_slice(&bytes[5..5 + len]).unwrap();
    assert!(meta.as_object_mut().unwrap().remove("births").is_some());
    assert!(meta["counters"]["sources"]["s"].as_object_mut().unwrap().remove("filtered").is_some());
    let meta = serde_json::to_vec(&meta).unwrap();
    let old = [&bytes[..1], &(meta.len() as u32).to_le_bytes(), &meta, &bytes[5 + len..]].concat();
    let stands = settings.lanes().iter().map(|lane| (lane.name.to_string(), Position(1))).collect();
    assert_eq!(Pipeline::restore(&settings, &stands, Bytes::from(old)).unwrap().snapshot(), bytes);
}
