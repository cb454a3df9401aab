//! A simulated city: road sensors with a daily rhythm, and the defects that real ones have, with a known truth.
//!
//! Each sensor reports its mean speed (km/h), vehicle count and occupancy (%) for the last interval, as JSON on
//! `city/traffic/<sensor>`. Defects: silent spells,
//! messages sent twice, readings that come minutes late, speeds out of range, and payloads that are no JSON.
//! [`Truth`] counts what a pipeline that loses nothing must end with.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// The fastest speed that the demo's configuration accepts, km/h.
pub(crate) const SPEED_MAX: f64 = 200.0;
const DAY_S: f64 = 86_400.0;
const SILENT_SHARE: f64 = 0.002;
const TWICE_SHARE: f64 = 0.01;
const LATE_SHARE: f64 = 0.01;
const OUT_OF_RANGE_SHARE: f64 = 0.005;
const NO_JSON_SHARE: f64 = 0.001;

/// One MQTT message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Publication {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
}

/// What was published, and so what must be found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Truth {
    /// Messages published; one reading each.
    pub(crate) messages: u64,
    /// By sensor, those that belong in the table `traffic`.
    pub(crate) sensors: BTreeMap<String, Tally>,
    /// By reason, those that belong in `quarantine`.
    pub(crate) quarantined: BTreeMap<String, u64>,
}

/// Readings of one sensor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tally {
    pub(crate) readings: u64,
    /// Sum of `vehicles` over them.
    pub(crate) vehicles: u64,
}

impl Truth {
    /// Adds what another run published.
    pub(crate) fn add(&mut self, other: &Self) {
        self.messages += other.messages;
        for (sensor, tally) in &other.sensors {
            self.add_readings(sensor, tally.readings, tally.vehicles);
        }
        for (reason, count) in &other.quarantined {
            self.add_quarantined(reason, *count);
        }
    }

    /// Good readings of a sensor, and the sum of their vehicles.
    pub(crate) fn add_readings(&mut self, sensor: &str, readings: u64, vehicles: u64) {
        let tally = self.sensors.entry(sensor.to_owned()).or_default();
        tally.readings += readings;
        tally.vehicles += vehicles;
    }

    /// Readings that are refused for this reason.
    pub(crate) fn add_quarantined(&mut self, reason: &str, count: u64) {
        *self.quarantined.entry(reason.to_owned()).or_default() += count;
    }
}

#[derive(Debug)]
struct Sensor {
    name: String,
    free_flow_kmh: f64,
    rush_hour_shift_s: f64,
    silent_until_us: i64,
    next_us: i64,
}

/// The sensors and what they hold back.
#[derive(Debug)]
pub(crate) struct City {
    random: StdRng,
    sensors: Vec<Sensor>,
    interval_us: i64,
    late: BinaryHeap<Reverse<(i64, String, Vec<u8>)>>,
    truth: Truth,
}

impl City {
    /// A city of `sensors` that each report every `interval_us`, beginning within one interval of `now_us`.
    pub(crate) fn new(seed: u64, sensors: usize, interval_us: i64, now_us: i64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let sensors = (0..sensors)
            .map(|number| Sensor {
                name: format!("road-{number:04}"),
                free_flow_kmh: random.random_range(40.0..110.0),
                rush_hour_shift_s: random.random_range(-2_700.0..2_700.0),
                silent_until_us: 0,
                next_us: now_us + random.random_range(0..interval_us.max(1)),
            })
            .collect();
        Self { random, sensors, interval_us, late: BinaryHeap::new(), truth: Truth::default() }
    }

    /// What was published so far.
    pub(crate) fn truth(&self) -> &Truth {
        &self.truth
    }

    /// Everything that is published up to `now_us`, in order.
    pub(crate) fn step(&mut self, now_us: i64) -> Vec<Publication> {
        let mut out = Vec::new();
        while self.late.peek().is_some_and(|Reverse((due, _, _))| *due <= now_us) {
            if let Some(Reverse((_, topic, payload))) = self.late.pop() {
                out.push(Publication { topic, payload });
            }
        }
        for index in 0..self.sensors.len() {
            while self.sensors[index].next_us <= now_us {
                self.report(index, &mut out);
            }
        }
        self.truth.messages += out.len() as u64;
        out
    }

    /// The held back readings, whatever their time: called once when the city stops, so that the truth is whole.
    pub(crate) fn finish(&mut self) -> Vec<Publication> {
        let mut out: Vec<_> = std::mem::take(&mut self.late).into_sorted_vec();
        out.reverse();
        self.truth.messages += out.len() as u64;
        out.into_iter().map(|Reverse((_, topic, payload))| Publication { topic, payload }).collect()
    }

    fn report(&mut self, index: usize, out: &mut Vec<Publication>) {
        let ts_us = self.sensors[index].next_us;
        self.sensors[index].next_us += self.interval_us;
        if self.random.random_bool(SILENT_SHARE) {
            self.sensors[index].silent_until_us = ts_us + self.interval_us * self.random.random_range(5..60);
        }
        if ts_us < self.sensors[index].silent_until_us {
            return;
        }
        let sensor = &self.sensors[index];
        let load = rush(ts_us as f64 / 1e6 + sensor.rush_hour_shift_s) * self.random.random_range(0.8..1.2);
        let vehicles = (load * 30.0).round().max(0.0) as u64;
        let mut speed =
            (sensor.free_flow_kmh * (1.0 - 0.6 * load.min(1.0)) + self.random.random_range(-4.0..4.0)).max(2.0);
        let topic = format!("city/traffic/{}", sensor.name);
        if self.random.random_bool(NO_JSON_SHARE) {
            self.truth.add_quarantined("malformed", 1);
            out.push(Publication { topic, payload: format!("{{\"ts\":{ts_us},\"speed\":").into_bytes() });
            return;
        }
        let good = !self.random.random_bool(OUT_OF_RANGE_SHARE);
        if !good {
            speed = SPEED_MAX + self.random.random_range(1.0..800.0);
        }
        let payload = format!(
            "{{\"ts\":{ts_us},\"sensor\":\"{}\",\"speed\":{speed:.1},\"vehicles\":{vehicles},\"occupancy\":{:.1}}}",
            sensor.name,
            (load * 40.0).clamp(0.0, 100.0)
        )
        .into_bytes();
        let copies = if self.random.random_bool(TWICE_SHARE) { 2 } else { 1 };
        if good {
            self.truth.add_readings(&sensor.name, copies, copies * vehicles);
        } else {
            self.truth.add_quarantined("above_max", copies);
        }
        let late = self.random.random_bool(LATE_SHARE);
        for _ in 0..copies {
            if late {
                let due = ts_us + self.random.random_range(30_000_000..300_000_000);
                self.late.push(Reverse((due, topic.clone(), payload.clone())));
            } else {
                out.push(Publication { topic: topic.clone(), payload: payload.clone() });
            }
        }
    }
}

/// Load of a road through the day, 0 to about 1: two rush hours over a quiet night.
fn rush(seconds: f64) -> f64 {
    let hour = seconds.rem_euclid(DAY_S) / 3_600.0;
    let peak = |at: f64, width: f64| (-((hour - at) / width).powi(2)).exp();
    0.08 + 0.8 * peak(8.0, 1.3) + 0.9 * peak(16.5, 1.8) + 0.3 * peak(12.5, 2.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_truth_counts_what_is_published() {
        let mut city = City::new(7, 50, 1_000_000, 0);
        let mut messages = Vec::new();
        for second in 0..600 {
            messages.extend(city.step(second * 1_000_000));
        }
        messages.extend(city.finish());
        let truth = city.truth();
        assert_eq!(truth.messages, messages.len() as u64);
        let mut found = Truth { messages: truth.messages, ..Truth::default() };
        for message in &messages {
            match serde_json::from_slice::<serde_json::Value>(&message.payload) {
                Err(_) => found.add_quarantined("malformed", 1),
                Ok(json) if json["speed"].as_f64().unwrap() > SPEED_MAX => found.add_quarantined("above_max", 1),
                Ok(json) => {
                    let sensor = message.topic.rsplit('/').next().unwrap();
                    found.add_readings(sensor, 1, json["vehicles"].as_u64().unwrap());
                }
            }
        }
        assert_eq!(found, *truth);
        assert_eq!((truth.sensors.len(), truth.quarantined.len()), (50, 2));
    }

    #[test]
    fn the_same_seed_gives_the_same_city() {
        let run = || City::new(3, 20, 500_000, 0).step(60_000_000);
        assert_eq!(run(), run());
    }
}
