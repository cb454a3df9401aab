use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const MINUTE_US: i64 = 60_000_000;
const HOUR_US: i64 = 60 * MINUTE_US;

fn at(text: &str) -> i64 {
    DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros()
}

fn text(us: i64) -> String {
    DateTime::from_timestamp_micros(us).unwrap().format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn check(width: Width, zone: Option<&str>, ts: &str, expected: &str) {
    let zone = zone.map(|zone| zone.parse().unwrap());
    let mut buckets = Buckets::new(width, zone, None, (0, 0)).unwrap();
    assert_eq!(text(buckets.start(at(ts)).unwrap()), expected, "{width:?} {zone:?} {ts}");
}

#[test]
fn buckets_begin_where_timescale_has_them() {
    let (hours, days) = (|n| Width::Micros(n * HOUR_US), |n| Width::Micros(n * DAY_US));
    check(Width::Micros(5 * MINUTE_US), None, "2024-03-10T12:34:56Z", "2024-03-10T12:30:00Z");
    check(hours(1), None, "1969-12-31T23:59:59Z", "1969-12-31T23:00:00Z");
    // Weeks begin on Monday.
    check(days(7), None, "2024-03-10T12:00:00Z", "2024-03-04T00:00:00Z");
    check(days(7), None, "2024-03-11T00:00:00Z", "2024-03-11T00:00:00Z");
    check(Width::Months(1), None, "2024-02-29T23:59:59Z", "2024-02-01T00:00:00Z");
    check(Width::Months(3), None, "2024-06-30T00:00:00Z", "2024-04-01T00:00:00Z");
    check(Width::Months(12), None, "1999-06-30T00:00:00Z", "1999-01-01T00:00:00Z");
}

#[test]
fn a_zone_moves_days_and_months() {
    let berlin = Some("Europe/Berlin");
    let day = Width::Micros(DAY_US);
    check(day, berlin, "2024-01-10T22:59:00Z", "2024-01-09T23:00:00Z");
    check(day, berlin, "2024-07-10T22:00:00Z", "2024-07-10T22:00:00Z");
    // 23 and 25 hours.
    check(day, berlin, "2024-03-31T21:59:59Z", "2024-03-30T23:00:00Z");
    check(day, berlin, "2024-03-31T22:00:00Z", "2024-03-31T22:00:00Z");
    check(day, berlin, "2024-10-27T22:59:59Z", "2024-10-26T22:00:00Z");
    check(Width::Months(1), berlin, "2024-03-31T21:59:59Z", "2024-02-29T23:00:00Z");
    check(Width::Months(1), berlin, "2024-03-31T22:00:00Z", "2024-03-31T22:00:00Z");
    // Asuncion's clock had no midnight on 2024-10-06: the day began at one.
    check(day, Some("America/Asuncion"), "2024-10-06T12:00:00Z", "2024-10-06T04:00:00Z");
}

#[test]
fn hours_when_the_clock_changes() {
    let berlin = Some("Europe/Berlin");
    let minutes = |n| Width::Micros(n * MINUTE_US);
    // Back from 03:00 to 02:00 at 01:00Z: the hour after two has two buckets.
    check(minutes(60), berlin, "2024-10-27T00:30:00Z", "2024-10-27T00:00:00Z");
    check(minutes(60), berlin, "2024-10-27T01:30:00Z", "2024-10-27T01:00:00Z");
    check(minutes(45), berlin, "2024-10-27T01:10:00Z", "2024-10-27T00:15:00Z");
    check(minutes(45), berlin, "2024-10-27T01:20:00Z", "2024-10-27T01:15:00Z");
    // Two hours from two o'clock are three.
    check(minutes(120), berlin, "2024-10-27T01:30:00Z", "2024-10-27T00:00:00Z");
    check(minutes(120), berlin, "2024-10-27T03:00:00Z", "2024-10-27T03:00:00Z");
    check(minutes(90), berlin, "2024-10-27T01:10:00Z", "2024-10-26T23:30:00Z");
    // Forward from 02:00 to 03:00 at 01:00Z.
    check(minutes(60), berlin, "2024-03-31T01:30:00Z", "2024-03-31T01:00:00Z");
    check(minutes(120), berlin, "2024-03-31T01:30:00Z", "2024-03-31T01:00:00Z");
    check(minutes(240), berlin, "2024-03-31T01:30:00Z", "2024-03-30T23:00:00Z");
}

#[test]
fn origin_and_offset_move_the_grid() {
    let day = Width::Micros(DAY_US);
    let mut from_six = Buckets::new(day, None, Some(at("2024-01-01T06:00:00Z")), (0, 0)).unwrap();
    assert_eq!(text(from_six.start(at("2024-03-10T05:00:00Z")).unwrap()), "2024-03-09T06:00:00Z");
    let mut shifted = Buckets::new(day, None, None, (0, 6 * HOUR_US)).unwrap();
    assert_eq!(text(shifted.start(at("2024-03-10T05:00:00Z")).unwrap()), "2024-03-09T06:00:00Z");
    let mut quarters = Buckets::new(Width::Months(3), None, Some(at("2024-02-01T00:00:00Z")), (0, 0)).unwrap();
    assert_eq!(text(quarters.start(at("2024-04-30T00:00:00Z")).unwrap()), "2024-02-01T00:00:00Z");
    assert!(Buckets::new(day, None, None, (1, 0)).is_none());
}

#[test]
fn widths() {
    assert_eq!(Width::new(0, 1, 1_000), Some(Width::Micros(DAY_US + 1)));
    assert_eq!(Width::new(14, 0, 0), Some(Width::Months(14)));
    for bad in [(0, 0, 0), (0, -1, 0), (1, 1, 0), (1, 0, 1_000), (-1, 0, 0), (0, 0, 1), (0, 1, -86_400_000_000_000)] {
        assert_eq!(Width::new(bad.0, bad.1, bad.2), None, "{bad:?}");
    }
}

#[test]
fn buckets_tile_the_time_line() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let zones = [
        "Europe/Copenhagen",
        "America/New_York",
        "Australia/Lord_Howe",
        "Africa/Casablanca",
        "Asia/Kolkata",
        "Pacific/Apia",
        "America/Asuncion",
        "America/St_Johns",
    ];
    for round in 0..400 {
        let zone: Option<Tz> =
            random.random_bool(0.8).then(|| zones[random.random_range(0..zones.len())].parse().unwrap());
        let width = match random.random_range(0..4) {
            0 => Width::Months(random.random_range(1..30)),
            1 => Width::Micros(random.random_range(1..40) * DAY_US),
            2 => Width::Micros(random.random_range(1..3_000) * MINUTE_US),
            _ => Width::Micros(random.random_range(1..100_000_000_000)),
        };
        let origin = random.random_bool(0.3).then(|| random.random_range(0..1_700_000_000_000_000));
        let mut buckets = Buckets::new(width, zone, origin, (0, 0)).unwrap();
        // Around a change of the clock, or anywhere.
        let around = if random.random_bool(0.7) {
            let year = random.random_range(2000..2027);
            at(&format!("{year}-{:02}-25T00:00:00Z", [3, 10, 11][random.random_range(0..3)]))
        } else {
            random.random_range(946_684_800_000_000..1_800_000_000_000_000)
        };
        let mut instants: Vec<i64> = (0..60).map(|_| around + random.random_range(-8 * DAY_US..8 * DAY_US)).collect();
        instants.sort_unstable();
        let mut before = i64::MIN;
        for ts in instants {
            let start = buckets.start(ts).unwrap();
            let told = format!("round {round}, seed {seed}: {width:?} {zone:?} {}", text(ts));
            assert!(start <= ts && start >= before, "{told}: {} after {}", text(start), before);
            assert_eq!(buckets.start(start), Some(start), "{told}");
            let next = buckets.next(start).unwrap();
            assert!(next > ts, "{told}: the next begins {}", text(next));
            assert_eq!(buckets.start(next), Some(next), "{told}");
            assert_eq!(buckets.start(next - 1), Some(start), "{told}");
            let many = random.random_range(0..20);
            let far = (0..many).try_fold(start, |at, _| buckets.next(at));
            assert_eq!(buckets.after(start, many), far, "{told}: {many} behind");
            assert_eq!(buckets.before(far.unwrap(), many), Some(start), "{told}: {many} before");
            before = start;
        }
    }
}
