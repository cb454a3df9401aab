//! Power cuts at random points, on the simulated disk: what was synced is there, in order and equal;
//! nothing is invented; and the log goes on to work, through many cuts of one image, some of them
//! in the middle of recovery. `POWER_CUT_SEEDS=100000` tries more seeds, `POWER_CUT_SEED=17` only one.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use segment_log::sim::{Random, SimLayer};
use segment_log::{AppendError, Opening, Options, Position, SegmentLog};

const SEEDS: u64 = 2_000;
const CYCLES: u64 = 8;
const STEPS: u64 = 40;
const SEGMENTS_MAX: u64 = 5;

type Entry = (Position, u8, Vec<u8>);

/// A log on a simulated disk, and what its owner knows about it.
struct Machine {
    layer: SimLayer,
    options: Options,
    random: Random,
    /// All records that were acknowledged and not surely freed, in order.
    synced: Vec<Entry>,
    /// Appended since the last sync.
    unsynced: Vec<Entry>,
    /// Acknowledged: the log ends here or later.
    end: Position,
    /// Freed up to here: what is below may be gone.
    freed: Position,
    /// Records are as long as a number of markers.
    even: bool,
    /// The log keeps a segment ready.
    spare: bool,
    /// Makes each payload unlike any other.
    numbers: u64,
    log: Option<SegmentLog<SimLayer>>,
}

impl Machine {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let segment_bytes = 1024 + 512 * random.below(8);
        let options =
            Options { segment_bytes, max_bytes: SEGMENTS_MAX * segment_bytes, reserve_bytes: random.below(200) };
        Self {
            layer: SimLayer::new(),
            options,
            random,
            synced: Vec::new(),
            unsynced: Vec::new(),
            end: Position(0),
            freed: Position(0),
            even: seed % 2 == 1,
            spare: seed.is_multiple_of(3),
            numbers: 0,
            log: None,
        }
    }

    /// Opens the log and checks everything that it shows. False if the power went meanwhile.
    fn open(&mut self) -> bool {
        self.log = None;
        loop {
            let failed = self.layer.syncs_failed();
            match SegmentLog::open(self.layer.clone(), "/data/log", self.options) {
                Ok((mut log, opening)) => {
                    self.check(&log, &opening);
                    if self.spare && log.keep_spare().is_err() {
                        assert!(!self.layer.powered());
                        return false;
                    }
                    self.log = Some(log);
                    return true;
                }
                Err(_) if !self.layer.powered() => return false,
                // A failed sync stops the process, and it starts again.
                Err(error) => {
                    assert!(self.layer.syncs_failed() > failed, "opening failed with the power on: {error:?}");
                }
            }
        }
    }

    fn check(&mut self, log: &SegmentLog<SimLayer>, opening: &Opening) {
        assert_eq!(opening.incidents, [], "a power cut is not corruption");
        assert_eq!((opening.start, opening.end), (log.start(), log.end()));
        assert!(log.end() >= self.end, "the log ends before what was acknowledged");
        assert!(log.start() <= self.freed, "more was freed than asked for");
        let mut reader = log.reader(log.start()).unwrap();
        let mut found: Vec<Entry> = Vec::new();
        while let Some(record) = reader.next().expect("no record is damaged") {
            found.push((record.position, record.kind, record.payload.to_vec()));
        }
        let kept: Vec<Entry> = self.synced.iter().filter(|entry| entry.0 >= log.start()).cloned().collect();
        assert!(found.len() >= kept.len(), "acknowledged records are gone");
        let (old, new) = found.split_at(kept.len());
        assert!(old == kept, "acknowledged records differ");
        assert!(self.unsynced.starts_with(new), "the rest is not a beginning of what was appended");
        // What an owner has been shown must stay, whatever it was before.
        self.synced = found;
        self.unsynced.clear();
        self.end = log.end();
    }

    /// One thing that an owner may do. False when the log has failed.
    fn step(&mut self) -> bool {
        let choice = self.random.below(16);
        let log = self.log.as_mut().expect("an open log");
        match choice {
            0..8 => return self.append(),
            8 => return (0..self.random.below(20)).all(|_| self.append()),
            9..13 => {
                let Ok(synced) = log.sync() else { return false };
                self.acknowledge(synced);
            }
            13 => {
                if log.mark().is_err() {
                    return false;
                }
                let synced = log.synced();
                self.acknowledge(synced);
            }
            14 => return self.free(),
            _ if self.spare && self.random.one_in(2) => return log.start_segment_in_spare().is_ok(),
            _ => {
                if log.start_segment().is_err_and(|error| !matches!(error, AppendError::Full)) {
                    return false;
                }
            }
        }
        true
    }

    fn append(&mut self) -> bool {
        let log = self.log.as_mut().expect("an open log");
        self.numbers += 1;
        let room = self.options.payload_bytes_max() as u64;
        let length = match self.even {
            // With even lengths, records from before a cut lie where later ones end.
            true => 25 * self.random.below(8),
            false if self.random.one_in(6) => self.random.below(room + 1),
            false => self.random.below(120),
        };
        let mut payload = vec![self.random.bits() as u8; length as usize];
        for (byte, mark) in payload.iter_mut().zip(self.numbers.to_le_bytes()) {
            *byte = mark;
        }
        let kind = 1 + self.random.below(255) as u8;
        let control = self.random.one_in(8);
        match if control { log.append_control(kind, &payload) } else { log.append(kind, &payload) } {
            Ok(appended) => self.unsynced.push((appended.position, kind, payload)),
            Err(AppendError::Full) => return self.free(),
            Err(_) => return false,
        }
        true
    }

    fn acknowledge(&mut self, synced: Position) {
        self.synced.append(&mut self.unsynced);
        self.end = synced;
    }

    fn free(&mut self) -> bool {
        let log = self.log.as_mut().expect("an open log");
        let position = match self.synced.len() as u64 {
            0 => Position(0),
            _ if self.random.one_in(4) => log.synced(),
            count => self.synced[self.random.below(count) as usize].0,
        };
        self.freed = self.freed.max(position);
        log.free_before(position).is_ok()
    }
}

fn run(seed: u64) {
    let mut machine = Machine::new(seed);
    for _ in 0..CYCLES {
        // Some cuts come during recovery, some a few steps later, some never before the end.
        let changes = match machine.random.below(4) {
            0 => machine.random.below(12),
            1 => machine.random.below(40),
            _ => machine.random.below(120),
        };
        machine.layer.fail_after(changes);
        if machine.random.one_in(5) {
            machine.layer.fail_sync_after(machine.random.below(20));
        }
        let full = machine.random.one_in(6);
        if machine.open() {
            for _ in 0..machine.random.below(STEPS) {
                // A real disk may be full long before the cap.
                let segments = if full { machine.random.below(4) } else { 2 * SEGMENTS_MAX };
                machine.layer.set_capacity(8192 + segments * machine.options.segment_bytes);
                if !machine.step() {
                    break;
                }
            }
            machine.layer.set_capacity(u64::MAX);
        }
        machine.log = None;
        // Without a cut it is a killed process: what was written stays readable, synced or not.
        if !machine.layer.powered() || !machine.random.one_in(3) {
            machine.layer.power_cut(&mut machine.random);
        }
    }
    machine.layer.power_cut(&mut machine.random);
    assert!(machine.open());
}

#[test]
fn what_was_synced_survives_power_cuts_and_nothing_is_invented() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seeds = match number("POWER_CUT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("POWER_CUT_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("failed with POWER_CUT_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
