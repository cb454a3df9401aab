//! Units of fields, by name, and the conversion between two of one quantity.
//!
//! A value `x` of a unit is `(x + offset) * numerator / denominator` of the quantity's base unit, with whole numbers and
//! fractions that are exact (offsets in hundredths). So a conversion is one multiplication, one addition and one division by
//! whole numbers: 32 °F are 0 °C and 36 km/h are 10 m/s, exactly, and a limit of 0 holds. Libraries of units were looked at:
//! `uom` keeps factors of seven digits (a pound is 0.4535924 kg) and goes by way of the base unit (32 °F become 5.7e-14 °C),
//! and the small ones of run time have no temperatures. `uom` is what a test compares this table with.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// What units of one kind measure. Only units of one quantity are converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantity {
    Temperature,
    Velocity,
    Length,
    Area,
    Volume,
    Mass,
    Pressure,
    Power,
    Energy,
    Flow,
    Time,
    Ratio,
    Potential,
    Current,
    Frequency,
    Angle,
    Concentration,
    ApparentPower,
    ReactivePower,
    Other,
}

/// A row of the table: names (the first is shown), quantity, numerator, denominator, offset in hundredths.
type Row = (&'static [&'static str], Quantity, i64, i64, i64);

use Quantity as Q;

#[rustfmt::skip]
const UNITS: &[Row] = &[
    (&["K"], Q::Temperature, 1, 1, 0),
    (&["°C", "degC", "Cel", "C"], Q::Temperature, 1, 1, 27_315),
    (&["°F", "degF", "F"], Q::Temperature, 5, 9, 45_967),
    (&["m/s"], Q::Velocity, 1, 1, 0),
    (&["km/h", "kph", "kmh"], Q::Velocity, 1_000, 3_600, 0),
    (&["mph", "mi/h"], Q::Velocity, 1_609_344, 3_600_000, 0),
    (&["kn", "knot"], Q::Velocity, 1_852, 3_600, 0),
    (&["ft/s"], Q::Velocity, 3_048, 10_000, 0),
    (&["mm/s"], Q::Velocity, 1, 1_000, 0),
    (&["mm/h"], Q::Velocity, 1, 3_600_000, 0),
    (&["m"], Q::Length, 1, 1, 0),
    (&["km"], Q::Length, 1_000, 1, 0),
    (&["cm"], Q::Length, 1, 100, 0),
    (&["mm"], Q::Length, 1, 1_000, 0),
    (&["µm", "um"], Q::Length, 1, 1_000_000, 0),
    (&["ft"], Q::Length, 3_048, 10_000, 0),
    (&["in"], Q::Length, 254, 10_000, 0),
    (&["yd"], Q::Length, 9_144, 10_000, 0),
    (&["mi"], Q::Length, 1_609_344, 1_000, 0),
    (&["nmi"], Q::Length, 1_852, 1, 0),
    (&["m²", "m2"], Q::Area, 1, 1, 0),
    (&["km²", "km2"], Q::Area, 1_000_000, 1, 0),
    (&["ha"], Q::Area, 10_000, 1, 0),
    (&["m³", "m3"], Q::Volume, 1, 1, 0),
    (&["l", "L"], Q::Volume, 1, 1_000, 0),
    (&["ml", "mL"], Q::Volume, 1, 1_000_000, 0),
    (&["gal"], Q::Volume, 3_785_411_784, 1_000_000_000_000, 0),
    (&["ft³", "ft3"], Q::Volume, 28_316_846_592, 1_000_000_000_000, 0),
    (&["kg"], Q::Mass, 1, 1, 0),
    (&["g"], Q::Mass, 1, 1_000, 0),
    (&["mg"], Q::Mass, 1, 1_000_000, 0),
    (&["t"], Q::Mass, 1_000, 1, 0),
    (&["lb"], Q::Mass, 45_359_237, 100_000_000, 0),
    (&["Pa"], Q::Pressure, 1, 1, 0),
    (&["hPa", "mbar"], Q::Pressure, 100, 1, 0),
    (&["kPa"], Q::Pressure, 1_000, 1, 0),
    (&["MPa"], Q::Pressure, 1_000_000, 1, 0),
    (&["bar"], Q::Pressure, 100_000, 1, 0),
    (&["atm"], Q::Pressure, 101_325, 1, 0),
    (&["psi"], Q::Pressure, 44_482_216_152_605, 6_451_600_000, 0),
    (&["W"], Q::Power, 1, 1, 0),
    (&["mW"], Q::Power, 1, 1_000, 0),
    (&["kW"], Q::Power, 1_000, 1, 0),
    (&["MW"], Q::Power, 1_000_000, 1, 0),
    (&["J"], Q::Energy, 1, 1, 0),
    (&["kJ"], Q::Energy, 1_000, 1, 0),
    (&["MJ"], Q::Energy, 1_000_000, 1, 0),
    (&["Wh"], Q::Energy, 3_600, 1, 0),
    (&["kWh"], Q::Energy, 3_600_000, 1, 0),
    (&["MWh"], Q::Energy, 3_600_000_000, 1, 0),
    (&["m³/s", "m3/s"], Q::Flow, 1, 1, 0),
    (&["m³/h", "m3/h"], Q::Flow, 1, 3_600, 0),
    (&["l/s", "L/s"], Q::Flow, 1, 1_000, 0),
    (&["l/min", "L/min", "lpm"], Q::Flow, 1, 60_000, 0),
    (&["l/h", "L/h"], Q::Flow, 1, 3_600_000, 0),
    (&["s"], Q::Time, 1, 1, 0),
    (&["ms"], Q::Time, 1, 1_000, 0),
    (&["µs", "us"], Q::Time, 1, 1_000_000, 0),
    (&["min"], Q::Time, 60, 1, 0),
    (&["h"], Q::Time, 3_600, 1, 0),
    (&["d"], Q::Time, 86_400, 1, 0),
    (&["1", "ratio"], Q::Ratio, 1, 1, 0),
    (&["%", "%RH"], Q::Ratio, 1, 100, 0),
    (&["‰"], Q::Ratio, 1, 1_000, 0),
    (&["ppm"], Q::Ratio, 1, 1_000_000, 0),
    (&["ppb"], Q::Ratio, 1, 1_000_000_000, 0),
    (&["V"], Q::Potential, 1, 1, 0),
    (&["mV"], Q::Potential, 1, 1_000, 0),
    (&["kV"], Q::Potential, 1_000, 1, 0),
    (&["A"], Q::Current, 1, 1, 0),
    (&["mA"], Q::Current, 1, 1_000, 0),
    (&["Hz"], Q::Frequency, 1, 1, 0),
    (&["kHz"], Q::Frequency, 1_000, 1, 0),
    (&["rpm", "1/min"], Q::Frequency, 1, 60, 0),
    (&["°", "deg"], Q::Angle, 1, 1, 0),
    (&["mg/m³", "mg/m3"], Q::Concentration, 1_000, 1, 0),
    (&["µg/m³", "ug/m3"], Q::Concentration, 1, 1, 0),
    (&["VA"], Q::ApparentPower, 1, 1, 0),
    (&["kVA"], Q::ApparentPower, 1_000, 1, 0),
    (&["var"], Q::ReactivePower, 1, 1, 0),
    (&["kvar"], Q::ReactivePower, 1_000, 1, 0),
    (&["lx"], Q::Other, 1, 1, 0),
    (&["dB"], Q::Other, 1, 1, 0),
    (&["dBm"], Q::Other, 1, 1, 0),
    (&["pH"], Q::Other, 1, 1, 0),
    (&["Ω", "Ohm"], Q::Other, 1, 1, 0),
    (&["count"], Q::Other, 1, 1, 0),
];

/// A unit that has a name here.
#[derive(Debug, Clone, Copy)]
pub struct Unit(&'static Row);

impl PartialEq for Unit {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

/// From one unit to another: `(x * factor + add) / divisor`, each a whole number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conversion {
    factor: f64,
    add: f64,
    divisor: f64,
}

impl Conversion {
    /// The value in the other unit.
    pub fn apply(self, value: f64) -> f64 {
        (value * self.factor + self.add) / self.divisor
    }
}

impl Unit {
    /// How it is written.
    pub fn name(self) -> &'static str {
        self.0.0[0]
    }

    /// How values of this unit become values of `other`.
    ///
    /// # Errors
    /// When they measure different things; the text is for people.
    pub fn to(self, other: Self) -> Result<Conversion, String> {
        let (&(_, quantity, numerator, denominator, offset), &(_, other_quantity, n, d, o)) = (self.0, other.0);
        if self == other {
            return Ok(Conversion { factor: 1.0, add: 0.0, divisor: 1.0 });
        }
        if quantity != other_quantity || quantity == Quantity::Other {
            return Err(format!("{} and {} do not measure the same", self.name(), other.name()));
        }
        // (x + offset/100) * numerator / denominator = (y + o/100) * n / d, times 100 where there are offsets.
        let up = i128::from(numerator) * i128::from(d);
        let down = i128::from(denominator) * i128::from(n);
        let add = i128::from(offset) * up - i128::from(o) * down;
        let whole = if add == 0 { (up, 0, down) } else { (up * 100, add, down * 100) };
        let shared = gcd(gcd(whole.0, whole.1), whole.2);
        let float = |number: i128| (number / shared) as f64;
        Ok(Conversion { factor: float(whole.0), add: float(whole.1), divisor: float(whole.2) })
    }
}

fn gcd(one: i128, other: i128) -> i128 {
    if other == 0 { one.abs() } else { gcd(other, one % other) }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.0[0])
    }
}

impl FromStr for Unit {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(row) = UNITS.iter().find(|row| row.0.contains(&text)) {
            return Ok(Self(row));
        }
        // Of equally near ones the first, which is the one that is shown.
        let names = UNITS.iter().flat_map(|row| row.0).rev();
        let likeness = |name: &str| strsim::jaro_winkler(&text.to_lowercase(), &name.to_lowercase());
        let nearest = names.map(|name| (likeness(name), name)).max_by(|one, other| one.0.total_cmp(&other.0));
        let hint = nearest.map_or(String::new(), |(_, name)| format!("; did you mean `{name}`?"));
        Err(format!("`{text}` is no unit that is known{hint}"))
    }
}

impl<'de> Deserialize<'de> for Unit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use uom::si::f64 as si;

    use super::*;

    fn convert(value: f64, from: &str, to: &str) -> f64 {
        from.parse::<Unit>().unwrap().to(to.parse().unwrap()).unwrap().apply(value)
    }

    #[test]
    fn values_that_people_know_come_out_exact() {
        let check =
            |value, from, to, expected: f64| assert_eq!(convert(value, from, to), expected, "{value} {from} {to}");
        check(32.0, "°F", "°C", 0.0);
        check(212.0, "°F", "°C", 100.0);
        check(-40.0, "°C", "°F", -40.0);
        check(0.0, "°C", "K", 273.15);
        check(273.15, "K", "°C", 0.0);
        check(36.0, "km/h", "m/s", 10.0);
        check(10.0, "m/s", "km/h", 36.0);
        check(100.0, "mph", "km/h", 160.9344);
        check(1_013.25, "hPa", "Pa", 101_325.0);
        check(1.0, "bar", "hPa", 1_000.0);
        check(1.5, "kWh", "Wh", 1_500.0);
        check(3.6, "MJ", "kWh", 1.0);
        check(1.0, "mi", "km", 1.609_344);
        check(60.0, "l/min", "m³/h", 3.6);
        check(55.0, "%", "1", 0.55);
        check(1.0, "dB", "dB", 1.0);
    }

    #[test]
    fn every_pair_converts_forth_and_back() {
        let mut pairs = 0;
        for from in UNITS {
            for to in UNITS.iter().filter(|to| to.1 == from.1 && (to.1 != Quantity::Other || to.0 == from.0)) {
                let (forth, back) = (Unit(from).to(Unit(to)).unwrap(), Unit(to).to(Unit(from)).unwrap());
                for value in [-12.5, 0.0, 1.0, 20.7, 99.9, 12_345.678] {
                    let again = back.apply(forth.apply(value));
                    // An offset of 273.15 takes the digits of small values.
                    let near = if from.1 == Quantity::Temperature { 1e-12 * 500.0 } else { 0.0 };
                    assert!(
                        (again - value).abs() <= near + 4.0 * f64::EPSILON * value.abs(),
                        "{from:?} {to:?} {again}"
                    );
                    pairs += 1;
                }
                assert!(
                    forth.factor < 9e15 && forth.divisor < 9e15 && forth.factor >= 1.0,
                    "{from:?} {to:?} {forth:?}"
                );
            }
            assert!(from.0.iter().all(|name| name.parse::<Unit>().unwrap() == Unit(from)), "{from:?}: a name twice");
        }
        assert!(pairs > 1_500, "{pairs}");
    }

    /// The value 7 of each unit, in the base unit, by the library.
    #[test]
    fn the_table_says_what_the_library_uom_says() {
        macro_rules! check {
            ($quantity:ident, $type:ident, $base:literal: $($name:literal $unit:ident),* $(,)?) => {$({
                let expected = si::$type::new::<uom::si::$quantity::$unit>(7.0).value;
                let is = convert(7.0, $name, $base);
                assert!((is / expected - 1.0).abs() < 1e-6, "{}: {is} {expected}", $name);
            })*};
        }
        check!(thermodynamic_temperature, ThermodynamicTemperature, "K": "°C" degree_celsius, "°F" degree_fahrenheit);
        check!(velocity, Velocity, "m/s": "km/h" kilometer_per_hour, "mph" mile_per_hour, "kn" knot, "ft/s" foot_per_second,
            "mm/s" millimeter_per_second);
        check!(length, Length, "m": "km" kilometer, "cm" centimeter, "mm" millimeter, "µm" micrometer, "ft" foot, "in" inch,
            "yd" yard, "mi" mile, "nmi" nautical_mile);
        check!(area, Area, "m²": "km²" square_kilometer, "ha" hectare);
        check!(volume, Volume, "m³": "l" liter, "ml" milliliter, "gal" gallon, "ft³" cubic_foot);
        check!(mass, Mass, "kg": "g" gram, "mg" milligram, "t" ton, "lb" pound);
        check!(pressure, Pressure, "Pa": "hPa" hectopascal, "kPa" kilopascal, "MPa" megapascal, "bar" bar, "atm" atmosphere,
            "psi" psi);
        check!(power, Power, "W": "mW" milliwatt, "kW" kilowatt, "MW" megawatt);
        check!(energy, Energy, "J": "kJ" kilojoule, "MJ" megajoule, "Wh" watt_hour, "kWh" kilowatt_hour,
            "MWh" megawatt_hour);
        check!(volume_rate, VolumeRate, "m³/s": "m³/h" cubic_meter_per_hour, "l/s" liter_per_second,
            "l/min" liter_per_minute);
        check!(time, Time, "s": "ms" millisecond, "µs" microsecond, "min" minute, "h" hour, "d" day);
        check!(ratio, Ratio, "1": "%" percent, "‰" per_mille, "ppm" part_per_million, "ppb" part_per_billion);
        check!(electric_potential, ElectricPotential, "V": "mV" millivolt, "kV" kilovolt);
        check!(frequency, Frequency, "Hz": "kHz" kilohertz, "rpm" cycle_per_minute);
    }

    #[test]
    fn what_is_no_unit_is_refused_with_the_nearest() {
        let check = |text: &str, nearest: &str| {
            let error = text.parse::<Unit>().unwrap_err();
            assert!(error.contains(&format!("did you mean `{nearest}`?")), "{error}");
        };
        check("kmph", "kmh");
        check("kw", "kW");
        check("celsius", "Cel");
        check("hpa", "hPa");
        check("l/mn", "l/min");
        assert!("m/s".parse::<Unit>().unwrap().to("°C".parse().unwrap()).unwrap_err().contains("the same"));
        assert!("dB".parse::<Unit>().unwrap().to("lx".parse().unwrap()).is_err());
    }
}
