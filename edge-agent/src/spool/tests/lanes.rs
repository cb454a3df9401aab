//! What the policies of a lane drop, keep and tell; and what is sent first.

use super::*;

const MINUTE_US: i64 = 60_000_000;

fn windows() -> StreamName {
    "traffic_5m".parse().unwrap()
}

fn losses() -> StreamName {
    "losses".parse().unwrap()
}

/// One cut: readings whose value is its number, and now and then a window.
fn cut(spool: &mut Spool<SimLayer>, n: u64, window: bool, now_us: i64) -> Result<(), SpoolError> {
    let mut batches = vec![cut_batch("traffic", n as f64)];
    if window {
        batches.push(cut_batch("traffic_5m", n as f64));
    }
    spool.append(1, Position(n), &batches, &[schema()], now_us)
}

fn value(rows: &RecordBatch) -> f64 {
    rows.column(2).as_primitive::<arrow_array::types::Float64Type>().value(0)
}

/// The values of all batches of a stream that wait, in the order in which they wait.
fn waiting_values(spool: &mut Spool<SimLayer>, stream: &StreamName) -> Vec<f64> {
    let cuts = waiting(spool, stream).into_iter().map(|one| spool.read(one.place).unwrap().expect("it did not rot"));
    cuts.map(|cut| value(&cut.number(&"e".parse().unwrap(), SpoolId([0; 16]), Seq(1), 0).decode(&schema()).unwrap()))
        .collect()
}

/// Rows by reason that the losses which wait tell of.
fn told(spool: &mut Spool<SimLayer>) -> BTreeMap<String, u64> {
    let mut told = BTreeMap::new();
    for Waiting { place, .. } in waiting(spool, &losses()) {
        let cut = spool.read(place).unwrap().unwrap();
        let batch = cut.number(&"e".parse().unwrap(), SpoolId([0; 16]), Seq(1), 0);
        let rows = batch.decode(&super::losses::schema()).unwrap();
        for row in 0..rows.num_rows() {
            let reason = rows.column(4).as_string::<i32>().value(row).to_owned();
            *told.entry(reason).or_default() += rows.column(5).as_primitive::<Int64Type>().value(row) as u64;
        }
    }
    told
}

/// All rows that came are somewhere, and what is lost is told once; `came` without the rows of losses.
#[track_caller]
fn balanced(spool: &mut Spool<SimLayer>, came: u64, of: &str) {
    let counts = spool.rows_counted();
    let placed = counts.freed + counts.spooled + counts.lost + counts.voided;
    assert_eq!(came.wrapping_add_signed(counts.made), placed, "{of}: {counts:?}");
    assert_eq!(told(spool).values().sum::<u64>(), counts.lost, "{of}: {counts:?}");
}

/// An outage begins with batches that are sent and not committed, at the very start of the lane.
#[test]
fn what_is_numbered_does_not_keep_a_full_lane_from_dropping_the_oldest() {
    for on_full in [OnFull::DropOldest, OnFull::Thin] {
        let layer = SimLayer::new();
        let mut spool = open(&layer, on_full);
        (1..=3).for_each(|n| cut(&mut spool, n, false, NOW_US).unwrap());
        let sent = spool.number(1, &traffic(), usize::MAX).unwrap();
        spool.void(&traffic(), Seq(2), "refused").unwrap();
        let again = spool.again(&traffic(), Seq(1), usize::MAX).unwrap();
        let last = 2_000;
        (4..=last).for_each(|n| cut(&mut spool, n, false, NOW_US).unwrap());
        balanced(&mut spool, last, "before");
        let kept = waiting_values(&mut spool, &traffic());
        // Three of the four segments are for cuts; the fourth is for what must move.
        assert!(kept.len() > 100, "{on_full:?}: {} are left", kept.len());
        let first = last - kept.len() as u64 + 1;
        assert_eq!(kept, (first..=last).map(|n| n as f64).collect::<Vec<_>>(), "the newest, in order");
        assert_eq!(spool.again(&traffic(), Seq(1), usize::MAX).unwrap(), again);
        drop(spool);
        let mut spool = open(&layer, on_full);
        balanced(&mut spool, last, "after");
        assert_eq!(waiting_values(&mut spool, &traffic()), kept);
        assert_eq!(spool.again(&traffic(), Seq(1), usize::MAX).unwrap(), again);
        assert!(spool.free(&traffic(), Mark { seq: Seq(3), crc: sent[2].crc() }).unwrap());
        balanced(&mut spool, last, "freed");
    }
}

/// More than the reserve takes: for this a lane that drops keeps a segment free.
#[test]
fn a_segment_full_of_numbered_batches_moves_as_a_whole() {
    let layer = SimLayer::new();
    let mut large = settings(OnFull::DropOldest);
    (large.lanes[1].segment_bytes, large.lanes[1].max_bytes) = (512 << 10, 2 << 20);
    let open = || Spool::open(&layer, Path::new(DIRECTORY), large.clone(), SpoolId([7; 16])).unwrap().0;
    let mut spool = open();
    (1..=300).for_each(|n| cut(&mut spool, n, false, NOW_US).unwrap());
    let sent = spool.number(1, &traffic(), usize::MAX).unwrap();
    (301..=4_000).for_each(|n| cut(&mut spool, n, false, NOW_US).unwrap());
    for _ in 0..2 {
        balanced(&mut spool, 4_000, "moved");
        assert!(spool.rows_counted().lost > 2_000);
        assert_eq!(spool.again(&traffic(), Seq(1), usize::MAX).unwrap(), sent);
        drop(spool);
        spool = open();
    }
}

/// One stream is sent and never committed, and stands at the lane's start; another comes and is committed as it comes. Also in
/// the middle of power cuts.
#[test]
fn a_stream_that_is_not_committed_does_not_fill_the_lane_with_what_others_have_sent() {
    for seed in seeds(60) {
        let on_full = [OnFull::Refuse, OnFull::DropOldest, OnFull::Thin][seed as usize % 3];
        let (layer, mut run) = (SimLayer::new(), Run::new(seed));
        for boot in 0..4 {
            let mut spool = open(&layer, on_full);
            run.check(&mut spool, &format!("{on_full:?}, boot {boot}"));
            assert_eq!(spool.rows_counted().lost, 0, "seed {seed}: nothing must go");
            // The first turns the lane over more than once.
            if boot > 0 {
                layer.fail_after(run.random.below(1_500));
            }
            for step in 0..700 {
                let mut flow = || -> Result<(), SpoolError> {
                    let window = step % 70 == 0;
                    cut(&mut spool, run.cuts + 1, window, NOW_US)?;
                    run.cuts += 1;
                    run.came += 1 + u64::from(window);
                    for stream in [traffic(), windows()] {
                        for batch in spool.number(1, &stream, 1 + run.random.below(8_000) as usize)? {
                            run.sent.insert((stream.clone(), batch.header().seq.0), batch);
                        }
                    }
                    let head = spool.head(&traffic());
                    spool.free(&traffic(), head).map(|_| ())
                };
                if let Err(error) = flow() {
                    assert!(!layer.powered(), "seed {seed}, {on_full:?}, boot {boot}, step {step}: {error}");
                    break;
                }
            }
            assert!(spool.lanes[1].log.bytes_on_disk() <= 512 << 10, "seed {seed}");
            drop(spool);
            layer.power_cut(&mut run.random);
        }
    }
}

#[test]
fn thin_keeps_windows_and_drops_readings() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Thin);
    let last = 3_000;
    (1..=last).for_each(|n| cut(&mut spool, n, n % 40 == 0, NOW_US).unwrap());
    let expected = (1..=last).filter(|n| n % 40 == 0).map(|n| n as f64).collect::<Vec<_>>();
    for restart in [false, true] {
        if restart {
            drop(spool);
            spool = open(&layer, OnFull::Thin);
        }
        balanced(&mut spool, last + last / 40, "thin");
        assert_eq!(waiting_values(&mut spool, &windows()), expected);
        let readings = waiting_values(&mut spool, &traffic());
        let first = last - readings.len() as u64 + 1;
        assert_eq!(readings, (first..=last).map(|n| n as f64).collect::<Vec<_>>());
    }
    // Windows alone fill it at last: then it refuses.
    let mut n = last;
    let full = loop {
        n += 1;
        let window = cut_batch("traffic_5m", n as f64);
        match spool.append(1, Position(n), &[window], &[schema()], NOW_US) {
            Ok(()) => assert!(n < 10_000, "it never refuses"),
            Err(error) => break error,
        }
    };
    assert!(full.is_full() && waiting(&mut spool, &traffic()).len() < 150);
    assert_eq!(waiting_values(&mut spool, &windows()).len() as u64, last / 40 + n - 1 - last);
}

#[test]
fn what_waits_for_too_long_is_dropped_and_told_once_an_hour() {
    let layer = SimLayer::new();
    let mut aged = settings(OnFull::Refuse);
    aged.lanes[1].max_age_us = Some(10 * MINUTE_US);
    let open = || Spool::open(&layer, Path::new(DIRECTORY), aged.clone(), SpoolId([7; 16])).unwrap().0;
    let mut spool = open();
    // Sealed before the clock was right: it has no age.
    cut(&mut spool, 1, false, 5 * MINUTE_US).unwrap();
    let start_us = NOW_US.div_euclid(60 * MINUTE_US) * 60 * MINUTE_US;
    for n in 0..60_u64 {
        let now_us = start_us + n as i64 * MINUTE_US;
        cut(&mut spool, n + 2, true, now_us).unwrap();
        while spool.drop_aged(now_us, &[]).unwrap() {}
        if n == 30 {
            spool.number(1, &traffic(), 1).unwrap();
            drop(spool);
            spool = open();
        }
    }
    balanced(&mut spool, 61 + 60, "aged");
    assert_eq!(waiting_values(&mut spool, &windows()), (51..=61).map(|n| n as f64).collect::<Vec<_>>());
    assert_eq!(waiting_values(&mut spool, &traffic())[..2], [1.0, 51.0]);
    // All within one hour: one row a stream.
    assert_eq!(waiting(&mut spool, &losses()).iter().map(|one| one.rows).collect::<Vec<_>>(), [2]);
    assert!(told(&mut spool).keys().eq(["too_old"]));
}

#[test]
fn what_comes_now_is_sent_before_what_waits() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=20).for_each(|n| append(&mut spool, n, n as f64));
    let values = |batches: Vec<SealedBatch>| {
        let seqs = batches.iter().map(|batch| batch.header().seq.0).collect::<Vec<_>>();
        (seqs, batches.iter().map(|batch| value(&batch.decode(&schema()).unwrap())).collect::<Vec<_>>())
    };
    let two = 2 * waiting(&mut spool, &traffic())[0].bytes;
    assert!(spool.has_live());
    assert_eq!(values(spool.number(1, &traffic(), two).unwrap()), (vec![1, 2], vec![20.0, 1.0]));
    assert!(!spool.has_live(), "what waits is known to wait");
    append(&mut spool, 21, 21.0);
    assert!(spool.has_live());
    assert_eq!(values(spool.number(1, &traffic(), two).unwrap()), (vec![3, 4], vec![21.0, 2.0]));
    (22..=25).for_each(|n| append(&mut spool, n, n as f64));
    assert_eq!(values(spool.number(1, &traffic(), two).unwrap()), (vec![5, 6], vec![24.0, 25.0]));
    drop(spool);
    let mut spool = open(&layer, OnFull::Refuse);
    let again = values(spool.again(&traffic(), Seq(1), usize::MAX).unwrap());
    assert_eq!(again, (vec![1, 2, 3, 4, 5, 6], vec![20.0, 1.0, 21.0, 2.0, 24.0, 25.0]), "the same after a restart");
    let mut rest = (3..=19).map(f64::from).collect::<Vec<_>>();
    rest.extend([22.0, 23.0]);
    assert_eq!(values(spool.number(1, &traffic(), usize::MAX).unwrap()).1, rest, "all of it: as it came");
}

/// What a random run of a lane knows.
struct Run {
    seed: u64,
    random: Random,
    came: u64,
    cuts: u64,
    sent: HashMap<(StreamName, u64), SealedBatch>,
}

impl Run {
    fn new(seed: u64) -> Self {
        Self { seed, random: Random::new(seed), came: 0, cuts: 0, sent: HashMap::new() }
    }

    /// One thing that may happen to a lane; `losses` are never sent, so all of them can be read at the end.
    fn step(&mut self, spool: &mut Spool<SimLayer>) -> Result<(), SpoolError> {
        let stream = if self.random.one_in(3) { windows() } else { traffic() };
        match self.random.below(12) {
            0 => {
                for batch in spool.number(1, &stream, 1 + self.random.below(8_000) as usize)? {
                    self.sent.insert((stream.clone(), batch.header().seq.0), batch);
                }
            }
            1 => {
                let held = spool.sequences.get(&stream).map(|s| s.numbered.iter().map(|n| n.mark).collect::<Vec<_>>());
                let held = held.unwrap_or_default();
                if !held.is_empty() {
                    spool.free(&stream, held[self.random.below(held.len() as u64) as usize])?;
                }
            }
            2 if self.random.one_in(5) => {
                let first = spool.sequences.get(&stream).and_then(|s| s.numbered.front()).map(|n| n.mark.seq);
                if let Some(seq) = first {
                    spool.void(&stream, seq, "refused")?;
                }
            }
            _ => {
                let window = self.random.one_in(8);
                cut(spool, self.cuts + 1, window, NOW_US)?;
                self.cuts += 1;
                self.came += 1 + u64::from(window);
            }
        }
        Ok(())
    }

    /// After a restart: what was accepted is there, and what was sent comes again.
    fn check(&mut self, spool: &mut Spool<SimLayer>, of: &str) {
        let of = format!("{of}, seed {}", self.seed);
        let cut = spool.cut_position(1).0;
        assert!(cut >= self.cuts, "{of}: a cut was forgotten");
        if cut > self.cuts {
            // The last one was written and not told.
            let last = waiting_values(spool, &windows()).last().copied();
            self.came += 1 + u64::from(last == Some(cut as f64));
            self.cuts = cut;
        }
        balanced(spool, self.came, &of);
        for stream in [traffic(), windows()] {
            for batch in spool.again(&stream, Seq(1), usize::MAX).unwrap() {
                let key = (stream.clone(), batch.header().seq.0);
                let known = self.sent.entry(key).or_insert_with(|| batch.clone());
                assert!(*known == batch || batch.header().void.is_some(), "{of}: {:?} differs", batch.header());
                assert_eq!(known.chain_crc(), batch.chain_crc(), "{of}");
            }
            let head = spool.head(&stream).seq.0;
            assert!(self.sent.keys().all(|(of, seq)| *of != stream || *seq <= head), "{of}: a number was forgotten");
        }
    }
}

#[test]
fn drops_survive_power_cuts_and_are_told_exactly_once() {
    for seed in seeds(80) {
        let on_full = if seed % 2 == 0 { OnFull::DropOldest } else { OnFull::Thin };
        let (layer, mut run) = (SimLayer::new(), Run::new(seed));
        let mut lost = 0;
        for boot in 0..5 {
            let mut spool = open(&layer, on_full);
            run.check(&mut spool, "boot");
            lost = spool.rows_counted().lost;
            // The first fills the lane.
            if boot > 0 {
                layer.fail_after(run.random.below(200));
            }
            for _ in 0..1_500 {
                if let Err(error) = run.step(&mut spool) {
                    // What `thin` keeps may fill the lane.
                    let is_kept = error.is_full() && on_full == OnFull::Thin;
                    let raw = if is_kept && layer.powered() { waiting(&mut spool, &traffic()) } else { Vec::new() };
                    let raw_bytes = raw.iter().map(|one| one.bytes).sum::<usize>();
                    assert!(!layer.powered() || (is_kept && raw_bytes < 64 << 10), "seed {seed}: {error}");
                    break;
                }
            }
            drop(spool);
            layer.power_cut(&mut run.random);
        }
        assert!(lost > 0, "seed {seed} dropped nothing");
    }
}

#[test]
fn a_disk_that_is_full_at_any_write_is_a_state_with_each_policy() {
    for on_full in [OnFull::Refuse, OnFull::DropOldest, OnFull::Thin] {
        for growths in 0..13 {
            let (layer, mut run) = (SimLayer::new(), Run::new(growths));
            let mut spool = open(&layer, on_full);
            layer.fill_after(growths);
            let mut refused = 0;
            for step in 0..1_200 {
                if step == 900 {
                    layer.empty();
                }
                match run.step(&mut spool) {
                    Err(error) if error.is_full() => refused += 1,
                    other => other.unwrap(),
                }
            }
            let of = format!("{on_full:?} full after {growths}");
            run.check(&mut spool, &of);
            drop(spool);
            run.check(&mut open(&layer, on_full), &of);
            match on_full {
                OnFull::Refuse => assert!(refused > 0, "{of}: it never was"),
                // What has numbers, or is kept, may fill the room that there is, until something is committed.
                OnFull::DropOldest | OnFull::Thin => {}
            }
        }
    }
}

#[test]
fn a_failed_sync_is_final_with_each_policy() {
    for on_full in [OnFull::Refuse, OnFull::DropOldest, OnFull::Thin] {
        for syncs in 0..150 {
            let (layer, mut run) = (SimLayer::new(), Run::new(syncs));
            let mut spool = open(&layer, on_full);
            layer.fail_sync_after(syncs);
            let mut failed = false;
            for _ in 0..1_000 {
                match run.step(&mut spool) {
                    Err(error) if error.is_full() => {}
                    Err(_) => {
                        failed = true;
                        break;
                    }
                    Ok(()) => assert_eq!(layer.syncs_failed(), 0, "a failed sync was not told"),
                }
            }
            assert!(failed, "{on_full:?}: no sync after {syncs}");
            assert!(
                cut(&mut spool, run.cuts + 1, false, NOW_US).is_err(),
                "{on_full:?}: it goes on after a failed sync"
            );
            drop(spool);
            layer.power_cut(&mut run.random);
            run.check(&mut open(&layer, on_full), "sync");
        }
    }
}

/// Something else fills the disk under a lane in the middle of an outage, which began with batches that are sent and not
/// committed. What may go goes, what must stay stays, also over restarts; with room again nothing is different.
#[test]
fn a_lane_that_drops_goes_on_when_the_disk_itself_is_full() {
    for (on_full, begins) in
        [OnFull::DropOldest, OnFull::Thin].into_iter().flat_map(|on_full| [3, 300, 700].map(|begins| (on_full, begins)))
    {
        let of = format!("{on_full:?}, full from {begins} on");
        let layer = SimLayer::new();
        let mut spool = open(&layer, on_full);
        let mut windows_cut = Vec::new();
        let mut add = |spool: &mut Spool<SimLayer>, n: u64| {
            let window = n.is_multiple_of(400);
            windows_cut.extend(window.then_some(n as f64));
            cut(spool, n, window, NOW_US).map(|()| 1 + u64::from(window))
        };
        let mut came = (1..=3).map(|n| add(&mut spool, n).unwrap()).sum::<u64>();
        let sent = spool.number(1, &traffic(), usize::MAX).unwrap();
        let again = spool.again(&traffic(), Seq(1), usize::MAX).unwrap();
        came += (4..=begins).map(|n| add(&mut spool, n).unwrap()).sum::<u64>();
        layer.set_capacity(layer.bytes());
        let mut last = begins;
        for _ in 0..4 {
            for n in last + 1..=last + 1_500 {
                came += add(&mut spool, n).unwrap_or_else(|error| panic!("{of}, at {n}: {error}"));
            }
            last += 1_500;
            balanced(&mut spool, came, &of);
            let kept = waiting_values(&mut spool, &traffic());
            assert!(kept.len() > 100, "{of}: {} are left", kept.len());
            let first = last - kept.len() as u64 + 1;
            assert_eq!(kept, (first..=last).map(|n| n as f64).collect::<Vec<_>>(), "{of}: the newest, in order");
            assert_eq!(spool.again(&traffic(), Seq(1), usize::MAX).unwrap(), again, "{of}");
            drop(spool);
            spool = open(&layer, on_full);
        }
        layer.set_capacity(u64::MAX);
        came += (last + 1..=last + 1_500).map(|n| add(&mut spool, n).unwrap()).sum::<u64>();
        balanced(&mut spool, came, &of);
        let windows_kept = waiting_values(&mut spool, &windows());
        match on_full {
            OnFull::Thin => assert_eq!(windows_kept, windows_cut, "{of}"),
            _ => assert!(windows_cut.ends_with(&windows_kept), "{of}"),
        }
        assert!(spool.free(&traffic(), Mark { seq: Seq(3), crc: sent[2].crc() }).unwrap(), "{of}");
    }
}
