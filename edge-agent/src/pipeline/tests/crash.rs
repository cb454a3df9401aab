//! Crashes at random moments, against a run without any and against the definitions of what windows hold.

use super::*;

/// What each lane got, and up to which position: the spool without a disk.
#[derive(Clone, Default)]
struct Lanes(Vec<(Position, BTreeMap<String, Vec<String>>)>);

impl Lanes {
    /// Takes a cut; only the first `written` lanes get it before the crash.
    fn take(&mut self, settings: &Settings, cut: &Cut, written: usize) {
        let all = rows(settings, cut);
        for (index, lane) in cut.lanes.iter().enumerate().take(written) {
            if lane.batches.is_empty() {
                continue;
            }
            self.0[index].0 = cut.position;
            for batch in &lane.batches {
                let name = batch.stream.to_string();
                if let Some(rows) = all.get(&name)
                    && lane.batches.iter().position(|other| other.stream == batch.stream)
                        == lane.batches.iter().position(|other| std::ptr::eq(other, batch))
                {
                    self.0[index].1.entry(name).or_default().extend(rows.iter().cloned());
                }
            }
        }
    }

    fn all(&self) -> BTreeMap<String, Vec<String>> {
        let mut all = BTreeMap::<String, Vec<String>>::new();
        for (_, rows) in &self.0 {
            rows.iter().for_each(|(name, rows)| all.entry(name.clone()).or_default().extend(rows.iter().cloned()));
        }
        all
    }
}

/// Event time in seconds, device and value.
type Known = (i64, String, i64);

/// Compares each closed result of the windows of [`judging_in`] with what the definitions say of the rows of `s`: of those
/// that are late none, of those that are made up all or none. Returns how many were compared.
fn recompute(rows: &BTreeMap<String, Vec<String>>, with_made_up: bool) -> usize {
    let of = |stream: &str| {
        let rows = rows.get(stream).into_iter().flatten();
        rows.map(|row| serde_json::from_str::<serde_json::Value>(row).unwrap()).collect::<Vec<_>>()
    };
    let second = |row: &serde_json::Value, column: &str| {
        chrono::DateTime::parse_from_rfc3339(row[column].as_str().unwrap()).unwrap().timestamp()
    };
    let all = of("s");
    let counts = |row: &&serde_json::Value| {
        let words = row["quality"].as_str().unwrap().split(',').collect::<Vec<_>>();
        !words.contains(&LATE) && (with_made_up || !words.contains(&IMPUTED))
    };
    let known = |row: &serde_json::Value| {
        (second(row, "ts"), row["device"].as_str().unwrap().to_owned(), row["v"].as_i64().unwrap())
    };
    let known = all.iter().filter(counts).map(known).collect::<Vec<Known>>();
    let watermark = all.iter().filter(counts).map(|row| second(row, "ts")).max().unwrap_or(i64::MIN) - 3;
    let hops = |size: i64, every: i64, key: &dyn Fn(&Known) -> String| {
        let mut results = BTreeMap::<(i64, String), (i64, Vec<Known>)>::new();
        for row in &known {
            let last = row.0.div_euclid(every) * every;
            let starts = (0..).map(|n| last - n * every).take_while(|start| *start > row.0 - size);
            starts.for_each(|start| {
                results.entry((start, key(row))).or_insert((start + size, Vec::new())).1.push(row.clone())
            });
        }
        results
    };
    let mut visits = BTreeMap::new();
    let mut by_device = BTreeMap::<String, Vec<Known>>::new();
    known.iter().for_each(|row| by_device.entry(row.1.clone()).or_default().push(row.clone()));
    for (device, mut rows) in by_device {
        rows.sort();
        for visit in rows.chunk_by(|one, other| other.0 - one.0 < 3) {
            visits.insert((visit[0].0, device.clone()), (visit[visit.len() - 1].0 + 3, visit.to_vec()));
        }
    }
    let device = |row: &Known| row.1.clone();
    let part = |row: &Known| format!("{} {}", row.1, row.2);
    let expected = [
        ("s_10s", hops(10, 10, &device)),
        ("s_hop", hops(6, 2, &|_| "*".to_owned())),
        ("s_visit", visits),
        ("s_part", hops(8, 8, &part)),
    ];
    let mut compared = 0;
    for (stream, mut expected) in expected {
        let mut last = BTreeMap::<(i64, String), serde_json::Value>::new();
        for row in of(stream) {
            let name = row["device"].as_str().unwrap();
            let group = if stream == "s_part" { format!("{name} {}", row["v"]) } else { name.to_owned() };
            let key = (second(&row, "window_start"), group);
            let newer = |before: &serde_json::Value| row["revision"].as_i64() > before["revision"].as_i64();
            if last.get(&key).is_none_or(newer) {
                last.insert(key, row);
            }
        }
        // A session that was told may have gone on.
        last.retain(|key, row| row["count"] != 0 && expected.get(key).is_none_or(|(end, _)| *end <= watermark));
        expected.retain(|_, (end, _)| *end <= watermark);
        assert_eq!(last.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{stream}");
        for (key, (end, rows)) in expected {
            let row = &last[&key];
            assert_eq!((second(row, "window_end"), &row["count"]), (end, &rows.len().into()), "{stream} {key:?}");
            let mut values = rows.iter().map(|row| row.2).collect::<Vec<_>>();
            values.sort_unstable();
            let near = |column: &str, expected: f64, relative: f64| {
                let Some(shown) = row.get(column).and_then(serde_json::Value::as_f64) else { return };
                let most = relative * expected.abs() + 1e-6;
                assert!((shown - expected).abs() <= most, "{stream} {key:?} {column}: {shown} for {expected}");
            };
            let (n, sum) = (values.len() as f64, values.iter().sum::<i64>() as f64);
            let squares = values.iter().map(|value| (*value as f64 - sum / n).powi(2)).sum::<f64>();
            let rank = |q: f64| values[(q * (n - 1.0)).floor() as usize] as f64;
            near("v_sum", sum, 0.0);
            near("v_stddev", (squares / (n - 1.0)).sqrt(), 1e-9);
            near("v_p50", rank(0.5), 0.0101);
            near("v_p99", rank(0.99), 0.0101);
            compared += 1;
        }
    }
    compared
}

/// Crashes at random moments, between the lanes of a cut too, with streams that move between lanes at a restart: every
/// lane ends with the rows of a run without a crash, and so do the counters.
#[test]
fn a_crash_neither_loses_nor_repeats_a_row_or_a_window() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let moved = "[[lane]]\nname = \"other\"\nstreams = [\"s\", \"quarantine\"]\n";
    let variants = [
        ("", ""),
        ("duplicates = \"first\"\nremember = 4\nin_order = true", "max_step = 300"),
        ("duplicates = \"last\"\nexpected_every = \"2s\"\ndevices_max = 3", "stuck_after = \"4s\""),
        ("expected_every = \"2s\"\nfill = \"linear\"\nfill_in_windows = true", "max_step = 300"),
        ("expected_every = \"1s\"\nfill = \"last\"\nfill_steps = 3\nduplicates = \"first\"", ""),
        ("expected_every = \"2s\"\nexpected_every_of = { \"e\" = \"3s\" }\ndevices_max = 4", ""),
    ];
    let mut compared = 0;
    for round in 0..80 {
        let (stream, field) = variants[round % variants.len()];
        let settings = |more: &str| {
            let field = format!("min = 0, max = 1000, required = true, {field}");
            judging_in(stream, field.trim_end_matches(", "), more)
        };
        let entries = (0..200).map(|n| {
            let back = if random.random_bool(0.2) { random.random_range(0..60) } else { 0 };
            let v = random.random_range(-50..1_000);
            let device = ["a", "b", "c", "d"][random.random_range(0..4)];
            if random.random_bool(0.1) {
                return tick(n);
            }
            let mut entry = reading_of(device, n - 200 - back, v, n);
            if let Entry::Message(message) = &mut entry {
                let packet_id = n as u16 + 1;
                message.delivery =
                    Some(Delivery { client: "c".into(), session: 1, packet_id, dup: false, crc: v as u32 });
            }
            entry
        });
        let entries = entries.collect::<Vec<_>>();
        let plain = settings("");
        let mut calm = start(&plain);
        let mut expected = Lanes(vec![Default::default(); 3]);
        for (n, entry) in entries.iter().enumerate() {
            calm.apply(Position(n as u64), Position(n as u64 + 1), entry);
        }
        expected.take(&plain, &calm.cut().unwrap(), 3);

        let mut lanes = Lanes(vec![Default::default(); 3]);
        let mut snapshot: Option<Vec<u8>> = None;
        // Lane 0 is `first` in both; `other` is an index of its own, by name.
        let index = |settings: &Settings| {
            let names = settings.lanes().iter().map(|lane| lane.name.to_string()).collect::<Vec<_>>();
            names
                .iter()
                .map(|name| ["first", "rest", "other"].iter().position(|n| n == name).unwrap())
                .collect::<Vec<_>>()
        };
        let last = 'runs: loop {
            let settings = if random.random_bool(0.5) { settings(moved) } else { settings("") };
            let places = index(&settings);
            let names = ["first", "rest", "other"].map(str::to_owned);
            let positions = names.into_iter().zip(lanes.0.iter().map(|lane| lane.0)).collect::<BTreeMap<_, _>>();
            let mut pipeline = match &snapshot {
                None => Pipeline::new(&settings, Position(0), &positions),
                Some(bytes) => Pipeline::restore(&settings, &positions, Bytes::from(bytes.clone())).unwrap(),
            };
            snapshot = Some(pipeline.snapshot());
            loop {
                let at = pipeline.position().0;
                let take = random.random_range(1..40).min(200 - at);
                for n in at..at + take {
                    pipeline.apply(Position(n), Position(n + 1), &entries[n as usize]);
                }
                if !pipeline.may_cut() {
                    continue;
                }
                let cut = pipeline.cut().unwrap();
                let finished = pipeline.position().0 == 200;
                let crash = !finished && random.random_bool(0.3);
                let written = if crash { random.random_range(0..=places.len()) } else { places.len() };
                let mut by_place = Lanes(places.iter().map(|place| lanes.0[*place].clone()).collect());
                by_place.take(&settings, &cut, written);
                for (place, lane) in places.iter().zip(by_place.0) {
                    lanes.0[*place] = lane;
                }
                if finished {
                    break 'runs pipeline;
                }
                if crash {
                    continue 'runs;
                }
                if random.random_bool(0.3) {
                    snapshot = Some(pipeline.snapshot());
                }
            }
        };
        let sorted = |mut rows: BTreeMap<String, Vec<String>>| {
            rows.values_mut().for_each(|rows| rows.sort());
            rows
        };
        assert_eq!(sorted(lanes.all()), sorted(expected.all()));
        compared += recompute(&lanes.all(), stream.contains("fill_in_windows"));
        assert_eq!(last.counters(), calm.counters());
        let known = |pipeline: &Pipeline, id| {
            (-50..1_000).any(|v| pipeline.lists().0["c"].list.recognise(id, true, v as u32).is_some())
        };
        let ids = entries.iter().enumerate().filter(|(_, entry)| matches!(entry, Entry::Message(_)));
        let ids = ids.map(|(n, _)| n as u16 + 1).collect::<Vec<_>>();
        assert!(ids.iter().all(|id| known(&last, *id) && known(&calm, *id)), "a delivery was forgotten");
        let totals = last.counters().sources["s"];
        assert_eq!(totals.read, totals.accepted + totals.quarantined + totals.duplicate + totals.waiting);
        let remembered = |pipeline: &Pipeline| {
            let mut bytes = Vec::new();
            pipeline.streams[0].judge.write(&mut bytes);
            pipeline.streams[0].windows.write(&mut bytes);
            bytes
        };
        assert_eq!(remembered(&last), remembered(&calm), "what is remembered");
    }
    assert!(compared > 10_000, "{compared} results of windows");
}

/// A crash between the lanes of a cut, a stream that moves back, and a cut where its lane stands already.
#[test]
fn a_stream_that_moved_is_not_cut_where_its_lane_stood() {
    let (plain, other) = (settings(""), settings("[[lane]]\nname = \"other\"\nstreams = [\"quarantine\"]\n"));
    let stands = |first: u64| {
        [("first", first), ("other", 0), ("rest", 0)].map(|(name, at)| (name.to_owned(), Position(at))).into()
    };
    let restore = |settings: &Settings, bytes: &[u8], first: u64| {
        Pipeline::restore(settings, &stands(first), Bytes::copy_from_slice(bytes)).unwrap()
    };
    let mut bytes = Pipeline::new(&plain, Position(0), &stands(0)).snapshot();
    bytes = restore(&other, &bytes, 0).snapshot();
    // A cut at 4 reached `first` with windows, and not `other` with what is in quarantine.
    let mut pipeline = restore(&plain, &bytes, 4);
    bytes = pipeline.snapshot();
    let apply = |pipeline: &mut Pipeline, n| pipeline.apply(Position(n), Position(n + 1), &message("no JSON"));
    for n in 0..4 {
        apply(&mut pipeline, n);
        assert!(!pipeline.may_cut(), "{n}");
    }
    apply(&mut pipeline, 4);
    assert!(pipeline.may_cut());
    assert_eq!(rows(&plain, &pipeline.cut().unwrap())["quarantine"].len(), 5);
    let mut again = restore(&plain, &bytes, 5);
    (0..5).for_each(|n| apply(&mut again, n));
    assert!(again.may_cut() && again.pending_rows() == 0, "all five are there");
}
