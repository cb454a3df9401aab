//! Clocks that are wrong, and what is made of them.

use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::config::TrustSettings;

pub(crate) const S: i64 = 1_000_000;
/// 2026-11-21, and a little.
pub(crate) const TRUE_US: i64 = 1_795_230_000 * S + 123_456;

/// A machine whose clocks go as a test says.
#[derive(Debug, Clone)]
pub(crate) struct Made(Arc<Mutex<Inside>>);

#[derive(Debug)]
struct Inside {
    boot: u8,
    monotonic_us: i64,
    wall_us: i64,
    is_synchronised: bool,
}

impl Made {
    pub(crate) fn new(wall_us: i64) -> Self {
        Self(Arc::new(Mutex::new(Inside { boot: 1, monotonic_us: 10 * S, wall_us, is_synchronised: false })))
    }

    pub(crate) fn pass(&self, us: i64) {
        let mut inside = self.0.lock();
        inside.monotonic_us += us;
        inside.wall_us += us;
    }

    pub(crate) fn set(&self, wall_us: i64) {
        self.0.lock().wall_us = wall_us;
    }

    pub(crate) fn wall(&self) -> i64 {
        self.0.lock().wall_us
    }

    pub(crate) fn synchronise(&self, is_synchronised: bool) {
        self.0.lock().is_synchronised = is_synchronised;
    }

    pub(crate) fn reboot(&self, wall_us: i64) {
        let boot = self.0.lock().boot + 1;
        *self.0.lock() = Inside { boot, monotonic_us: 3 * S, wall_us, is_synchronised: false };
    }
}

impl Time for Made {
    fn monotonic_us(&self) -> i64 {
        self.0.lock().monotonic_us
    }

    fn wall_us(&self) -> i64 {
        self.0.lock().wall_us
    }

    fn is_synchronised(&self) -> Option<bool> {
        Some(self.0.lock().is_synchronised)
    }

    fn boot(&self) -> BootId {
        [self.0.lock().boot; 16]
    }
}

fn settings(trust: TrustSettings) -> ClockSettings {
    ClockSettings { trust, ..ClockSettings::default() }
}

/// A run behind a journal, with what it wrote to it.
struct Run {
    made: Made,
    clock: Clock,
    marks: Vec<Mark>,
}

impl Run {
    fn begin(made: &Made, trust: TrustSettings, told: &Told) -> Self {
        let (clock, mark) = Clock::begin(Box::new(made.clone()), settings(trust), told);
        Self { made: made.clone(), clock, marks: vec![mark] }
    }

    /// Time passes, and it looks.
    fn pass(&mut self, us: i64) -> Trust {
        self.made.pass(us);
        self.marks.extend(self.clock.look());
        self.marks.last().unwrap().trust
    }

    /// The cloud answers within 20 ms, by the true time.
    fn hear(&self, true_us: i64) {
        let now = self.clock.monotonic_us();
        self.clock.heard(true_us.div_euclid(S), now - S / 100, now + S / 100);
    }

    fn off_us(&self, true_us: i64) -> i64 {
        (self.clock.best_us() - true_us).abs()
    }
}

fn follow(told: &mut Told, marks: &[Mark]) {
    for mark in marks {
        assert_eq!(told.follow(&Entry::Clock(*mark)), None);
    }
}

#[test]
fn a_clock_of_1970_waits_and_then_goes_on_from_what_was_known_last() {
    let made = Made::new(12 * S);
    let mut run = Run::begin(&made, TrustSettings::Any, &Told::default());
    assert_eq!(run.marks[0].trust, Trust::Waiting);
    assert_eq!(run.pass(29 * S), Trust::Waiting);
    assert!((run.clock.status().waits_s.unwrap() - 1.0).abs() < 0.01);
    assert_eq!(run.pass(S), Trust::Nobody, "nobody came within 30 s");
    assert_eq!(run.clock.best_us(), EARLIEST_US + 30 * S);
    // Later than what was seen of the time before, which is then the better guess.
    let mut told = Told::default();
    let (mark, us) = (Mark { trust: Trust::Ntp, ..run.marks[0] }, TRUE_US);
    follow(&mut told, &[Mark { boot: [9; 16], correction_us: 0, ..mark }]);
    told.follow(&Entry::Tick { now_us: us });
    let run = Run::begin(&made, TrustSettings::Any, &told);
    assert_eq!(run.clock.best_us(), TRUE_US);
    made.set(TRUE_US + 50 * S);
    let run = Run::begin(&made, TrustSettings::Any, &told);
    assert_eq!((run.marks[0].trust, run.clock.best_us()), (Trust::Waiting, TRUE_US + 50 * S), "it may be right");
}

#[test]
fn the_first_who_says_what_time_it_is_is_believed() {
    let made = Made::new(12 * S);
    let mut run = Run::begin(&made, TrustSettings::Any, &Told::default());
    run.hear(TRUE_US);
    assert_eq!(run.pass(0), Trust::Cloud);
    assert!(run.off_us(TRUE_US) <= 520_000, "{}", run.off_us(TRUE_US));
    assert!((run.clock.status().machine_ahead_s + (TRUE_US / S) as f64).abs() < 20.0);
    // NTP knows it better.
    made.set(TRUE_US + 10 * S);
    made.synchronise(true);
    run.pass(0);
    let known = run.clock.status();
    assert_eq!((known.by, known.machine_ahead_s), (Some(Trust::Ntp), 0.0));
    // The machine's clock agrees with the cloud: it is believed, as it is smoother.
    let made = Made::new(TRUE_US + 2 * S);
    let mut run = Run::begin(&made, TrustSettings::Any, &Told::default());
    run.hear(TRUE_US);
    assert_eq!((run.pass(0), run.off_us(TRUE_US)), (Trust::Cloud, 2 * S));
    let made = Made::new(TRUE_US);
    made.synchronise(true);
    assert_eq!(Run::begin(&made, TrustSettings::Any, &Told::default()).marks[0].trust, Trust::Ntp, "at once");
    made.set(12 * S);
    assert_eq!(Run::begin(&made, TrustSettings::Any, &Told::default()).marks[0].trust, Trust::Waiting, "1970");
}

#[test]
fn only_who_is_asked_is_believed() {
    let check = |trust, synchronised, heard, expected| {
        let made = Made::new(TRUE_US);
        made.synchronise(synchronised);
        let mut run = Run::begin(&made, trust, &Told::default());
        if heard {
            run.hear(TRUE_US);
        }
        assert_eq!(run.pass(S), expected, "{trust:?} {synchronised} {heard}");
    };
    check(TrustSettings::Ntp, false, true, Trust::Waiting);
    check(TrustSettings::Ntp, true, false, Trust::Ntp);
    check(TrustSettings::Cloud, true, false, Trust::Waiting);
    check(TrustSettings::Cloud, false, true, Trust::Cloud);
    check(TrustSettings::Any, false, false, Trust::Waiting);
    check(TrustSettings::Always, false, false, Trust::Always);
}

#[test]
fn a_clock_that_is_set_while_it_runs_counts_when_somebody_says_the_same() {
    let made = Made::new(TRUE_US);
    made.synchronise(true);
    let mut run = Run::begin(&made, TrustSettings::Any, &Told::default());
    let arrival = run.clock.now_us();
    // Ten years forth, and an hour back; the kernel knows that this was nobody who knows.
    made.synchronise(false);
    for set in [TRUE_US + 3_650 * 86_400 * S, TRUE_US - 3_600 * S] {
        made.set(set);
        assert_eq!(run.pass(0), Trust::Ntp);
        assert_eq!((run.clock.now_us(), run.off_us(TRUE_US)), (arrival, 0), "it goes on");
    }
    assert_eq!(run.marks.len(), 1);
    assert!((run.clock.status().machine_ahead_s + 3_600.0).abs() < 0.1);
    // NTP says so: the known time steps, what arrivals carry never does.
    made.synchronise(true);
    run.pass(0);
    assert_eq!((run.marks.len(), run.clock.now_us(), run.off_us(TRUE_US - 3_600 * S)), (2, arrival, 0));
    made.set(TRUE_US);
    run.pass(0);
    made.pass(S / 10);
    made.set(TRUE_US);
    run.pass(0);
    assert_eq!(run.marks.len(), 3, "a tenth of a second is no news");
    let mut told = Told::default();
    follow(&mut told, &run.marks);
    assert_eq!(told.steps(), [Step { before_us: TRUE_US - 3_600 * S, by_us: 3_600 * S }], "ages count forward steps");
}

#[test]
fn skew_is_told_once_when_it_comes_and_once_when_it_goes() {
    let made = Made::new(TRUE_US - 60 * S);
    made.synchronise(true);
    let mut run = Run::begin(&made, TrustSettings::Any, &Told::default());
    assert_eq!(run.clock.status().skew_s, None);
    run.hear(TRUE_US);
    assert_eq!(run.pass(0), Trust::Ntp, "NTP is believed all the same");
    let status = run.clock.status();
    assert!((status.skew_s.unwrap() + 60.0).abs() <= status.skew_error_s.unwrap() && status.is_off, "{status:?}");
    made.set(TRUE_US);
    run.pass(0);
    assert!(!run.clock.status().is_off);
}

#[test]
fn a_restart_of_the_agent_in_the_same_boot_goes_on_with_what_was_known() {
    let made = Made::new(12 * S);
    let mut run = Run::begin(&made, TrustSettings::Any, &Told::default());
    run.pass(20 * S);
    let mut told = Told::default();
    follow(&mut told, &run.marks);
    // It waits as long in all, not anew.
    let mut second = Run::begin(&made, TrustSettings::Any, &told);
    assert_eq!((second.marks[0].trust, second.pass(9 * S)), (Trust::Waiting, Trust::Waiting));
    assert_eq!(second.clock.now_us(), run.clock.now_us());
    assert_eq!(second.pass(S), Trust::Nobody);
    follow(&mut told, &second.marks);
    let mut third = Run::begin(&made, TrustSettings::Any, &told);
    assert_eq!(third.marks[0].trust, Trust::Nobody);
    third.hear(TRUE_US);
    third.pass(0);
    follow(&mut told, &third.marks);
    let fourth = Run::begin(&made, TrustSettings::Any, &told);
    assert_eq!(fourth.clock.best_us(), third.clock.best_us());
    assert!(fourth.marks[0].trust.is_known());
    made.reboot(5 * S);
    assert_eq!(Run::begin(&made, TrustSettings::Any, &told).marks[0].trust, Trust::Waiting, "another boot");
}

/// Whatever happens to the machine, from each boot in which the time came to be known all arrivals get their time, within
/// what the cloud can say.
#[test]
fn random_machines_get_their_times_from_the_journal_alone() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    for round in 0..300 {
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(round));
        let random = &mut random;
        let (mut true_us, mut told) = (TRUE_US, Told::default());
        let made = Made::new(random.random_range(0..2 * TRUE_US));
        // Entries, with the true time of those that have one.
        let mut journal = Vec::<(Entry, i64)>::new();
        let mut run = Run::begin(&made, TrustSettings::Any, &told);
        journal.push((Entry::Clock(run.marks[0]), 0));
        for _ in 0..random.random_range(1..60) {
            let us = random.random_range(0..10 * S);
            made.pass(us);
            true_us += us;
            match random.random_range(0..10) {
                0 => made.set(random.random_range(0..2 * TRUE_US)),
                1 => {
                    made.set(true_us);
                    made.synchronise(true);
                }
                2 => run.hear(true_us),
                kind @ (3 | 4) => {
                    if kind == 4 {
                        made.reboot(random.random_range(0..2 * TRUE_US));
                    }
                    told = journal.iter().fold(Told::default(), |mut told, (entry, _)| {
                        told.follow(entry);
                        told
                    });
                    run = Run::begin(&made, TrustSettings::Any, &told);
                    journal.push((Entry::Clock(run.marks[0]), 0));
                }
                _ => journal.push((Entry::Tick { now_us: run.clock.now_us() }, true_us)),
            }
            // A clock that is set by hand is no longer synchronised.
            if made.wall_us() != true_us {
                made.synchronise(false);
            }
            journal.extend(run.clock.look().map(|mark| (Entry::Clock(mark), 0)));
        }
        let mut told = Told::default();
        for (at, (entry, true_us)) in journal.iter().enumerate() {
            if told.waits() {
                let later = journal[at..].iter().find_map(|(entry, _)| match entry {
                    Entry::Clock(mark) if told.resolves(mark) => Some(*mark),
                    _ => None,
                });
                let Some(later) = later else { break };
                told.resolve(&later);
            }
            if let Some(now_us) = told.follow(entry).filter(|_| !told.is_guess()) {
                // The machine's clock may be max_skew off and agree, which the dates' whole seconds add to.
                assert!((now_us - true_us).abs() <= 7 * S, "round {round}, entry {at}: {now_us} for {true_us}");
            }
        }
    }
}
