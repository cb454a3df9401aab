use wire::{Seq, SpoolId};

use super::*;
use crate::functions::bucket_grid::{Buckets, Width};
use crate::functions::hop::Windows;
use crate::functions::session::Silence;

const MINUTE: i64 = 60_000_000;

fn grid() -> Grid {
    Grid::from(Buckets::new(Width::Micros(5 * MINUTE), None, Some(0), (0, 0)).unwrap())
}

fn stream() -> StreamName {
    "s".parse().unwrap()
}

fn position(seq: u64) -> Position {
    let mut position = Position::default();
    position.cover(SpoolId([1; 16]), Seq(seq));
    position
}

fn minutes(intervals: &Intervals) -> Vec<(i64, i64)> {
    intervals.iter().map(|(from, to)| (from / MINUTE, if to == i64::MAX { to } else { to / MINUTE })).collect()
}

/// The windows that rows of these minutes lie in.
fn touched(minutes: &[i64]) -> Intervals {
    let windows = minutes.iter().map(|minute| grid().touched(minute * MINUTE, minute * MINUTE));
    windows.collect::<Vec<_>>().into()
}

fn state(record: Option<Record>) -> State {
    State::new("id".to_owned(), grid(), 2 * MINUTE, record)
}

#[test]
fn windows_are_due_when_they_have_closed_and_lateness_is_over() {
    let mut state = state(None);
    assert!(!state.begun() && state.closing().is_none());
    state.observe(Some(31 * MINUTE));
    state.begin(Some(7 * MINUTE), Positions::from([(stream(), position(1))]));
    // 31 - 2 = 29: the window of 20 to 25 has closed.
    assert_eq!(minutes(state.left().1), [(5, 25)]);
    assert_eq!(minutes(state.left().0), [(25, i64::MAX)]);
    let (live, past) = state.due(Due::Closed);
    assert!(live.is_empty());
    assert_eq!(minutes(&past), [(5, 25)]);
    assert_eq!(state.settled(), Some(5 * MINUTE));
    state.done(&past);
    assert_eq!(state.settled(), Some(25 * MINUTE));
    state.observe(Some(32 * MINUTE));
    assert_eq!(minutes(&state.due(Due::Closed).0), [(25, 30)]);
    assert_eq!(minutes(&state.due(Due::All).0), [(25, i64::MAX)]);
    // Time never goes back.
    state.observe(Some(3 * MINUTE));
    state.observe(None);
    assert_eq!(state.watermark(), Some(32 * MINUTE));
}

#[test]
fn a_late_row_makes_its_window_due_again_and_no_other() {
    let mut state = state(None);
    state.observe(Some(60 * MINUTE));
    state.begin(Some(0), Positions::new());
    state.done(&Intervals::of(i64::MIN, 55 * MINUTE));
    state.saw(&stream(), position(2), &touched(&[11, 12, 58]));
    assert_eq!(minutes(&state.due(Due::Closed).0), [(10, 15)]);
    assert_eq!(state.settled(), Some(10 * MINUTE));
    // A reference table changed from 31 on.
    state.changed_from(&"r".parse().unwrap(), position(3), Some(31 * MINUTE));
    let (live, past) = state.due(Due::Closed);
    assert_eq!((minutes(&live), minutes(&past)), (vec![(10, 15)], vec![(30, 55)]));
}

#[test]
fn a_record_says_all_that_a_restart_needs() {
    let mut state = state(None);
    state.observe(Some(60 * MINUTE));
    state.begin(Some(0), Positions::from([(stream(), position(1))]));
    state.saw(&stream(), position(7), &touched(&[61]));
    state.done(&Intervals::of(i64::MIN, 30 * MINUTE));
    assert!(state.is_ahead());
    let record = state.record();
    state.recorded(record.clone());
    assert!(!state.is_ahead());
    let text = serde_json::to_string(&record).unwrap();
    let again: Record = serde_json::from_str(&text).unwrap();
    assert_eq!(again, record);
    let again = self::state(Some(again));
    assert!(again.begun());
    assert_eq!(again.position(&stream()), Some(&position(7)));
    assert_eq!((again.left(), again.watermark()), (state.left(), state.watermark()));
    // Whoever had told nothing yet has not begun.
    let first = Record { view: "id".to_owned(), round: 1, ..Record::default() };
    assert!(!self::state(Some(first)).begun());
}

#[test]
fn the_past_of_single_rows_is_what_came_between_two_positions() {
    let mut state = state(None);
    let (spool, seqs) = (SpoolId([1; 16]), |state: &State| {
        (1..=9).filter(|seq| state.is_past(&stream(), SpoolId([1; 16]), Seq(*seq))).collect::<Vec<_>>()
    });
    state.catch_up(
        &stream(),
        [Position::default(), position(4)],
        [(7 * MINUTE, 11 * MINUTE), (40 * MINUTE, 40 * MINUTE)],
    );
    assert!(state.begun());
    assert_eq!((minutes(state.left().1), seqs(&state)), (vec![(5, 15), (40, 45)], vec![1, 2, 3, 4]));
    state.read(&stream(), [(spool, Seq(5))]);
    state.done(&Intervals::of(0, 15 * MINUTE));
    assert_eq!((minutes(state.left().1), seqs(&state)), (vec![(40, 45)], vec![1, 2, 3, 4]));
    state.done(&Intervals::of(0, 45 * MINUTE));
    assert_eq!(seqs(&state), Vec::<u64>::new());
    let read = state.position(&stream()).cloned().unwrap();
    assert_eq!(read, position(5));
    state.catch_up(&stream(), [read, position(8)], [(MINUTE, MINUTE)]);
    assert_eq!(seqs(&state), [6, 7, 8]);
    // Nothing came.
    state.done(&Intervals::of(0, 45 * MINUTE));
    state.catch_up(&stream(), [position(8), position(9)], []);
    assert_eq!((seqs(&state), state.position(&stream())), (vec![], Some(&position(9))));
}

#[test]
fn what_is_asked_again_is_everything() {
    let mut state = state(None);
    state.ask_again();
    assert!(!state.begun() && state.left().0.is_empty());
    state.observe(Some(31 * MINUTE));
    state.begin(Some(7 * MINUTE), Positions::from([(stream(), position(1))]));
    state.done(&Intervals::of(0, 25 * MINUTE));
    state.ask_again();
    assert_eq!(state.left(), (&Intervals::of(25 * MINUTE, i64::MAX), &Intervals::of(i64::MIN, 25 * MINUTE)));
}

#[test]
fn windows_that_hop_are_due_when_they_have_ended_and_touched_by_each_of_their_rows() {
    let hops = || {
        let buckets = Buckets::new(Width::Micros(5 * MINUTE), None, Some(0), (0, 0)).unwrap();
        Grid::from(Windows { buckets, hops: 3 })
    };
    let mut state = State::new("id".to_owned(), hops(), 2 * MINUTE, None);
    state.observe(Some(62 * MINUTE));
    state.begin(Some(17 * MINUTE), Positions::from([(stream(), position(1))]));
    // The first window that holds 17 begins at 5; that of 45 to 60 is the last that has ended.
    assert_eq!((minutes(state.left().1), minutes(state.left().0)), (vec![(5, 50)], vec![(50, i64::MAX)]));
    let all = state.due(Due::Closed).1;
    assert_eq!(minutes(&hops().rows(&all)), [(5, 60)]);
    state.done(&all);
    assert_eq!(state.settled(), Some(50 * MINUTE));
    state.observe(Some(66 * MINUTE));
    assert!(state.due(Due::Closed).0.is_empty());
    state.observe(Some(67 * MINUTE));
    let (from, to) = hops().touched(21 * MINUTE, 22 * MINUTE);
    state.saw(&stream(), position(2), &Intervals::of(from, to));
    let (live, _) = state.due(Due::Closed);
    assert_eq!(minutes(&live), [(10, 25), (50, 55)]);
    assert_eq!(minutes(&hops().rows(&live)), [(10, 35), (50, 65)]);
    assert_eq!(hops().until(10 * MINUTE), 25 * MINUTE);
    state.changed_from(&"r".parse().unwrap(), position(3), Some(31 * MINUTE));
    assert_eq!(minutes(&state.due(Due::Closed).1), [(20, 55)]);
}

#[test]
fn sessions_are_due_when_they_have_ended_and_touched_by_rows_before_their_end() {
    // Slots of a minute.
    let sessions = || Grid::from(Silence::new(8 * MINUTE, 60 * MINUTE).unwrap());
    let mut state = State::new("id".to_owned(), sessions(), 2 * MINUTE, None);
    state.observe(Some(62 * MINUTE));
    state.begin(Some(17 * MINUTE), Positions::from([(stream(), position(1))]));
    assert_eq!((minutes(state.left().1), minutes(state.left().0)), (vec![(17, 60)], vec![(60, i64::MAX)]));
    let all = state.due(Due::Closed).1;
    assert_eq!(minutes(&sessions().rows(&all)), [(17 - 136, 60)]);
    state.done(&all);
    assert_eq!(state.settled(), Some(60 * MINUTE));
    // A late row moves what ends from then on, as far as it has closed.
    let (from, to) = sessions().touched(21 * MINUTE + 1, 22 * MINUTE);
    assert_eq!((from, to), (21 * MINUTE, (23 + 136 + 1) * MINUTE));
    state.saw(&stream(), position(2), &Intervals::of(from, to));
    assert_eq!(minutes(&state.due(Due::Closed).0), [(21, 60)]);
    assert_eq!(sessions().held(21 * MINUTE, 52 * MINUTE), (21 * MINUTE, 61 * MINUTE));
    assert_eq!((sessions().until(7), sessions().stands(7), sessions().slots()), (7, true, None));
    let slot = |gap: i64| Grid::from(Silence::new(gap, 60 * MINUTE).unwrap()).slot(0).1;
    assert_eq!([1, 80_000_000, 60 * MINUTE].map(slot), [1_000_000, 10_000_000, MINUTE]);
}
