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
    use serde_json::json;

    use super::*;

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
