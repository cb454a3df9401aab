//! From registers to a value. Pure.

use serde_json::Value;

use crate::config::{Order, RegisterSettings, RegisterType, Table};

/// A value of as many words as it takes; null when it is absent or no number.
pub(super) fn read(register: &RegisterSettings, words: &[u16]) -> Value {
    let raw = raw(register, words);
    let absent = register.absent.map(i128::from);
    match raw {
        Raw::Int(int) if absent == Some(int) => Value::Null,
        Raw::Float(float) if absent.is_some_and(|absent| absent as f64 == float) => Value::Null,
        Raw::Bool(value) => Value::Bool(value),
        Raw::Int(int) if register.scale.is_none() && register.offset.is_none() => match i64::try_from(int) {
            Ok(int) => int.into(),
            Err(_) => u64::try_from(int).map_or(Value::Null, Value::from),
        },
        Raw::Int(int) => scaled(register, int as f64),
        Raw::Float(float) => scaled(register, float),
    }
}

enum Raw {
    Bool(bool),
    Int(i128),
    Float(f64),
}

/// A float that is not finite is null: JSON has none.
fn scaled(register: &RegisterSettings, value: f64) -> Value {
    (value * register.scale.unwrap_or(1.0) + register.offset.unwrap_or(0.0)).into()
}

fn raw(register: &RegisterSettings, words: &[u16]) -> Raw {
    match register.kind {
        RegisterType::Bits => {
            let word = match register.table {
                // The first coil is the lowest bit.
                Table::Coil | Table::Discrete => words.iter().rev().fold(0, |all, coil| all << 1 | coil),
                _ => ordered(register.order, words) as u16 >> register.bit,
            };
            if register.bits == 1 {
                return Raw::Bool(word & 1 == 1);
            }
            Raw::Int(i128::from(word & (u16::MAX >> (16 - register.bits))))
        }
        RegisterType::U16 | RegisterType::U32 | RegisterType::U64 => Raw::Int(ordered(register.order, words).into()),
        RegisterType::I16 => Raw::Int((ordered(register.order, words) as u16).cast_signed().into()),
        RegisterType::I32 => Raw::Int((ordered(register.order, words) as u32).cast_signed().into()),
        RegisterType::I64 => Raw::Int(ordered(register.order, words).cast_signed().into()),
        RegisterType::F32 => {
            let value = f32::from_bits(ordered(register.order, words) as u32);
            // 0.1 as a device has it is 0.1, not 0.10000000149011612.
            Raw::Float(value.to_string().parse().unwrap_or(f64::NAN))
        }
        RegisterType::F64 => Raw::Float(f64::from_bits(ordered(register.order, words))),
    }
}

/// The words as one number, the highest byte first.
fn ordered(order: Order, words: &[u16]) -> u64 {
    let join = |all: u64, word: u16| all << 16 | u64::from(word);
    let swap = matches!(order, Order::Badc | Order::Dcba);
    let words = words.iter().map(|word| if swap { word.swap_bytes() } else { *word });
    match order {
        Order::Abcd | Order::Badc => words.fold(0, join),
        Order::Cdab | Order::Dcba => words.rev().fold(0, join),
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};
    use serde_json::json;

    use super::*;

    /// The bytes of the words as they come, in the order that the letters say: `A` is the highest of a pair's first word.
    fn plain(order: &str, words: &[u16]) -> Vec<u8> {
        let mut words = words.to_vec();
        if matches!(order, "CDAB" | "DCBA") {
            words.reverse();
        }
        let bytes = |word: &u16| if matches!(order, "BADC" | "DCBA") { word.to_le_bytes() } else { word.to_be_bytes() };
        words.iter().flat_map(bytes).collect()
    }

    /// Whatever registers a device has: a value of the type that is configured, as written out here, or null. Runs as many
    /// as the fuzzing of the decoders (`WEIR_FUZZ_RUNS`).
    #[test]
    fn whatever_a_device_answers_is_a_value_of_its_type_or_null() {
        let seed = rand::rng().random();
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let runs = std::env::var("WEIR_FUZZ_RUNS").ok().map_or(20_000, |runs| runs.parse::<u32>().unwrap());
        let kinds = ["u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "bits"];
        let (mut registers, mut nulls) = (Vec::new(), 0);
        for kind in kinds {
            for order in ["ABCD", "CDAB", "BADC", "DCBA"] {
                for more in ["", "scale = 0.1", "scale = -1e300\noffset = 1e308", "absent = -1", "absent = 65535"] {
                    let more = if kind == "bits" { "bit = 3\nbits = 5" } else { more };
                    let text = format!("field = \"v\"\naddress = 0\ntype = \"{kind}\"\norder = \"{order}\"\n{more}");
                    let register = toml::from_str::<RegisterSettings>(&text).unwrap();
                    registers.push((kind, order, more, register));
                }
            }
        }
        for _ in 0..runs {
            let (kind, order, more, register) = registers.choose(&mut random).unwrap();
            let often = [0, 1, 0x7fff, 0x8000, 0xffff, 0x7f80, 0xff80, 0x7ff0, 0xfff0, 0x7fc0];
            let word = |random: &mut StdRng| match random.random_bool(0.5) {
                true => *often.choose(random).unwrap(),
                false => random.random(),
            };
            let words = (0..register.words()).map(|_| word(&mut random)).collect::<Vec<_>>();
            let bytes = plain(order, &words);
            let integer = match (*kind, bytes.len()) {
                ("f32" | "f64" | "bits", _) => None,
                (kind, 2) if kind.starts_with('i') => {
                    Some(i128::from(i16::from_be_bytes(bytes[..].try_into().unwrap())))
                }
                (kind, 4) if kind.starts_with('i') => {
                    Some(i128::from(i32::from_be_bytes(bytes[..].try_into().unwrap())))
                }
                (kind, 8) if kind.starts_with('i') => {
                    Some(i128::from(i64::from_be_bytes(bytes[..].try_into().unwrap())))
                }
                _ => Some(bytes.iter().fold(0, |all, byte| all << 8 | i128::from(*byte))),
            };
            let float = match *kind {
                "f32" => f64::from(f32::from_be_bytes(bytes[..].try_into().unwrap())),
                "f64" => f64::from_be_bytes(bytes[..].try_into().unwrap()),
                _ => integer.map_or(0.0, |integer| integer as f64),
            };
            let of = format!("{kind} {order} {more} {words:04x?}");
            let value = read(register, &words);
            nulls += u32::from(value.is_null());
            let is_absent = register.absent.is_some_and(|absent| match integer {
                Some(integer) => integer == i128::from(absent),
                None => float == absent as f64,
            });
            if *kind == "bits" {
                let bits = (u16::from_be_bytes([bytes[0], bytes[1]]) >> 3) % 32;
                assert_eq!(value, json!(bits), "{of}");
            } else if is_absent {
                assert_eq!(value, Value::Null, "{of}");
            } else if let (Some(integer), None) = (integer, register.scale) {
                assert_eq!(value.as_i64().map(i128::from).or(value.as_u64().map(i128::from)), Some(integer), "{of}");
            } else {
                let scale = register.scale.unwrap_or(1.0);
                let wanted = float * scale + register.offset.unwrap_or(0.0);
                // A float of 32 bits is read as it is written in decimals.
                let off = scale.abs() * float.abs().mul_add(1e-7, 1e-44) + wanted.abs() * 1e-12;
                match value.as_f64() {
                    Some(value) => {
                        assert!((value - wanted).abs() <= off, "{of}: {value}, not {wanted}")
                    }
                    None => assert!(value.is_null() && !wanted.is_finite(), "{of}: {value}, not {wanted}"),
                }
            }
        }
        assert!(nulls > 0 && nulls < runs / 2, "{nulls} of {runs} are null");
    }

    fn check(settings: &str, words: &[u16], expected: Value) {
        let register = toml::from_str::<RegisterSettings>(&format!("field = \"v\"\naddress = 0\n{settings}")).unwrap();
        assert_eq!(usize::from(register.words()), words.len(), "{settings}");
        assert_eq!(read(&register, words), expected, "{settings}");
    }

    #[test]
    fn registers_become_values() {
        check("", &[65_535], json!(65_535));
        check("order = \"DCBA\"", &[0x1234], json!(0x3412));
        check("type = \"i16\"", &[0xfffe], json!(-2));
        check("type = \"u32\"", &[1, 2], json!(65_538));
        check("type = \"u32\"\norder = \"CDAB\"", &[1, 2], json!(131_073));
        check("type = \"u32\"\norder = \"BADC\"", &[0x0100, 0x0200], json!(65_538));
        check("type = \"u32\"\norder = \"DCBA\"", &[0x0400, 0x0100], json!(0x0001_0004));
        check("type = \"i32\"", &[0xffff, 0xffff], json!(-1));
        check("type = \"u64\"", &[0xffff; 4], json!(u64::MAX));
        check("type = \"i64\"", &[0xffff; 4], json!(-1));
        check("type = \"u64\"\norder = \"CDAB\"", &[4, 3, 2, 1], json!(0x0001_0002_0003_0004_u64));
        check("type = \"f32\"", &[0x3dcc, 0xcccd], json!(0.1));
        check("type = \"f32\"\norder = \"CDAB\"", &[0xcccd, 0x3dcc], json!(0.1));
        check("type = \"f32\"", &[0x7fc0, 0], Value::Null);
        check("type = \"f64\"", &[0x3ff8, 0, 0, 0], json!(1.5));
        check("type = \"i16\"\nscale = 0.5\noffset = -40", &[10], json!(-35.0));
        check("type = \"bits\"\nbit = 15", &[0x8000], json!(true));
        check("type = \"bits\"", &[0x8000], json!(false));
        check("type = \"bits\"\nbit = 4\nbits = 3", &[0b101_0000], json!(5));
        check("type = \"bits\"\nbits = 16", &[0xffff], json!(65_535));
        check("type = \"bits\"\ntable = \"coil\"", &[1], json!(true));
        check("type = \"bits\"\ntable = \"discrete\"\nbits = 3", &[1, 0, 1], json!(5));
    }

    #[test]
    fn a_value_that_a_device_has_not_is_null() {
        check("absent = 32768", &[32_768], Value::Null);
        check("type = \"i16\"\nabsent = -32768\nscale = 0.1", &[32_768], Value::Null);
        check("type = \"f32\"\nabsent = -1", &[0xbf80, 0], Value::Null);
        check("absent = 0", &[1], json!(1));
    }
}
