//! The day: what the sensors of Aarhus said on 2014-08-18, and the accidents that are planted in it by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use chrono::NaiveDateTime;

pub(super) const MINUTE_US: i64 = 60_000_000;
const DAY: &str = "2014-08-18";
/// How often each sensor sends.
pub(super) const STEP_US: i64 = 5 * MINUTE_US;

/// What happens to a sensor, or to all of a district.
#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    /// Nobody is faster than this, km/h, and many pass.
    Speed(f64),
    /// As many minutes at the one speed as at the other, beginning with the first.
    Flaps(f64, f64, i64),
    /// Nothing is sent.
    Silent,
}

/// What an operator is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// One alert of this rule, about whom it happens to.
    Once(&'static str),
    Nothing,
}

/// One line of the plan.
#[derive(Debug)]
pub(super) struct Accident {
    /// A sensor, or a district.
    pub(super) of: &'static str,
    /// Hours and minutes of the day; the second is not part of it.
    pub(super) from: &'static str,
    pub(super) to: &'static str,
    pub(super) what: What,
    pub(super) told: Told,
}

const fn accident(of: &'static str, from: &'static str, to: &'static str, what: What, told: Told) -> Accident {
    Accident { of, from, to, what, told }
}

/// The rules are in [`super::RULES`]: `congestion` holds below 10 km/h for 10 minutes and ends above 25; `slow_district`
/// holds below 15 km/h on the average for 15 minutes, and ends 20 minutes after; `silent` is 90 minutes without a word.
pub(super) const PLAN: &[Accident] = &[
    // Under way when the day begins: the edge knows of it from a reading that the cloud's rule has not seen.
    accident("195658", "05:55", "06:40", What::Speed(4.0), Told::Once("congestion")),
    accident("209986", "07:00", "07:40", What::Speed(6.0), Told::Once("congestion")),
    accident("209986", "10:00", "10:30", What::Speed(7.0), Told::Once("congestion")),
    // Two readings: shorter than `for`.
    accident("158536", "07:30", "07:40", What::Speed(6.0), Told::Nothing),
    // Between the thresholds nothing ends: one alert.
    accident("201615", "08:00", "09:30", What::Flaps(6.0, 18.0, 15), Told::Once("congestion")),
    // Over both each time: it never lasts.
    accident("195552", "08:00", "10:00", What::Flaps(6.0, 40.0, 5), Told::Nothing),
    accident("197977", "08:00", "10:30", What::Silent, Told::Once("silent")),
    accident("190475", "09:00", "10:00", What::Silent, Told::Nothing),
    accident("south", "09:00", "09:40", What::Speed(11.0), Told::Once("slow_district")),
    accident("centre", "10:00", "11:00", What::Flaps(11.0, 60.0, 10), Told::Nothing),
    accident("east", "08:00", "08:25", What::Speed(11.0), Told::Once("slow_district")),
    // Better for ten minutes: it goes on.
    accident("east", "08:35", "09:00", What::Speed(11.0), Told::Nothing),
    // Two windows only.
    accident("north", "07:00", "07:10", What::Speed(11.0), Told::Nothing),
    // Three: from the start of the first to the end of the last it has lasted long enough.
    accident("north", "11:00", "11:15", What::Speed(11.0), Told::Once("slow_district")),
];

/// A reading, as it is sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reading {
    pub(super) device: String,
    /// Event time, µs since 1970, moved to the present.
    pub(super) ts: i64,
    pub(super) speed: f64,
    pub(super) vehicles: i64,
}

/// What comes within one step of the day, in the order of arrival.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// The newest event time so far.
    pub(super) ts: i64,
    pub(super) readings: Vec<Reading>,
}

/// The whole of it.
#[derive(Debug)]
pub(super) struct Day {
    /// The first is the moment before: one reading of each sensor.
    pub(super) steps: Vec<Step>,
    pub(super) districts: BTreeMap<String, &'static str>,
    /// Midnight of the day in the present, µs.
    midnight: i64,
}

impl Day {
    /// The hours `from` to `to`, moved so that they end at `now`.
    pub(super) fn read(file: &Path, sensors: &Path, (from, to): (&str, &str), now: i64) -> Self {
        let districts = districts(sensors);
        let day = midnight_of_old();
        let (first, last) = (day + minutes(from), day + minutes(to));
        let by = (now - last).div_euclid(STEP_US) * STEP_US;
        let mut day = Self { steps: Vec::new(), districts, midnight: day + by };
        // Everybody is heard once before.
        let before = |device: &String| {
            let calm = Reading { device: device.clone(), ts: first - STEP_US + by, speed: 50.0, vehicles: 5 };
            day.happens(calm).expect("nobody is silent yet")
        };
        let before: Vec<_> = day.districts.keys().map(before).collect();
        day.steps.push(Step { ts: first - STEP_US + by, readings: before });
        for (device, ts, speed, vehicles) in rows(file) {
            if ts < first || ts >= last {
                continue;
            }
            let happened = day.happens(Reading { device, ts: ts + by, speed, vehicles });
            let newest = day.steps.last().expect("one is there").ts;
            if ts + by > newest {
                day.steps.push(Step { ts: ts + by, ..Step::default() });
            }
            let step = day.steps.last_mut().expect("one is there");
            step.readings.extend(happened);
        }
        day
    }

    /// A time of the day, in the present.
    pub(super) fn at(&self, time: &str) -> i64 {
        self.midnight + minutes(time)
    }

    /// What becomes of a reading; none when nothing is sent.
    fn happens(&self, mut reading: Reading) -> Option<Reading> {
        let district = self.districts[&reading.device];
        for accident in PLAN.iter().filter(|accident| accident.of == reading.device || accident.of == district) {
            let (from, to) = (self.at(accident.from), self.at(accident.to));
            if reading.ts < from || reading.ts >= to {
                continue;
            }
            let speed = match accident.what {
                What::Silent => return None,
                What::Speed(speed) => speed,
                What::Flaps(one, other, every) => {
                    if (reading.ts - from) / (every * MINUTE_US) % 2 == 0 {
                        one
                    } else {
                        other
                    }
                }
            };
            (reading.speed, reading.vehicles) = (speed, 8);
        }
        Some(reading)
    }

    /// All readings in the order of sending, each (sensor, time) once: the first.
    pub(super) fn distinct(&self) -> Vec<&Reading> {
        let mut known = BTreeSet::new();
        let all = self.steps.iter().flat_map(|step| &step.readings);
        all.filter(|reading| known.insert((&reading.device, reading.ts))).collect()
    }
}

/// Hours and minutes, in µs.
fn minutes(time: &str) -> i64 {
    let (hours, minutes) = time.split_once(':').unwrap();
    (hours.parse::<i64>().unwrap() * 60 + minutes.parse::<i64>().unwrap()) * MINUTE_US
}

fn midnight_of_old() -> i64 {
    let text = format!("{DAY}T00:00:00");
    NaiveDateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M:%S").unwrap().and_utc().timestamp_micros()
}

/// Sensor, time, speed and vehicles of the day.
fn rows(file: &Path) -> Vec<(String, i64, f64, i64)> {
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(file).unwrap()).read_to_string(&mut text).unwrap();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().unwrap().clone();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap();
    let [ts, device, speed, vehicles] = ["TIMESTAMP", "REPORT_ID", "avgSpeed", "vehicleCount"].map(at);
    let records = reader.records().map(|record| record.unwrap());
    let of_the_day = records.filter(|record| record[ts].starts_with(DAY));
    let row = |record: csv::StringRecord| {
        let time = NaiveDateTime::parse_from_str(&record[ts], "%Y-%m-%dT%H:%M:%S").unwrap();
        let time = time.and_utc().timestamp_micros();
        (record[device].to_owned(), time, record[speed].parse().unwrap(), record[vehicles].parse().unwrap())
    };
    of_the_day.map(row).collect()
}

/// Four districts of the city, by postal codes.
fn districts(sensors: &Path) -> BTreeMap<String, &'static str> {
    let mut reader = csv::Reader::from_path(sensors).unwrap();
    let header = reader.headers().unwrap().clone();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap();
    let (device, code) = (at("REPORT_ID"), at("POINT_1_POSTAL_CODE"));
    let district = |code: &str| match code {
        "8000" => "centre",
        "8250" | "8520" | "8541" => "east",
        "8200" | "8210" | "8381" | "8382" => "north",
        _ => "south",
    };
    let records = reader.records().map(|record| record.unwrap());
    records.map(|record| (record[device].to_owned(), district(&record[code]))).collect()
}
