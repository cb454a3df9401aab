//! Registers of devices that speak Modbus, asked for at intervals.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use wire::{FieldName, FieldType, StreamName};

use super::{MapSettings, Place, Pointer, TimePlace};
use crate::config::{Span, StreamSettings};

/// Devices behind one address, over TCP or a serial line.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModbusSettings {
    #[serde(default)]
    pub name: String,
    /// `tcp://host:502` or `rtu:///dev/ttyUSB0`.
    #[serde(deserialize_with = "address")]
    pub url: ModbusAddress,
    /// Of a serial line.
    #[serde(default = "baud")]
    pub baud: u32,
    #[serde(default)]
    pub parity: Parity,
    #[serde(default = "one")]
    pub stop_bits: u8,
    #[serde(default = "every")]
    pub every: Span,
    /// How long a connection or an answer may take.
    #[serde(default = "timeout")]
    pub timeout: Span,
    pub stream: StreamName,
    pub unit: Vec<UnitSettings>,
    pub register: Vec<RegisterSettings>,
}

/// Where the devices are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModbusAddress {
    /// `host:port`
    Tcp(String),
    Rtu(PathBuf),
}

/// The check bit of a serial line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parity {
    #[default]
    None,
    Even,
    Odd,
}

/// One device: its number on the line, and its name in the stream.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitSettings {
    pub id: u8,
    pub device: String,
}

/// One value: where it stands, and how it is read.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterSettings {
    /// The stream's field that gets it.
    pub field: FieldName,
    /// As it is sent, from 0: a manual's 40001 is holding 0, 30001 is input 0.
    pub address: u16,
    #[serde(default)]
    pub table: Table,
    #[serde(rename = "type", default)]
    pub kind: RegisterType,
    #[serde(default)]
    pub order: Order,
    /// With `type = "bits"`: the lowest bit, from 0, and how many. One is true or false, more are a number.
    #[serde(default)]
    pub bit: u8,
    #[serde(default = "one")]
    pub bits: u8,
    /// value = what was read * scale + offset
    #[serde(default)]
    pub scale: Option<f64>,
    #[serde(default)]
    pub offset: Option<f64>,
    /// What the device says when it has no value, before scale and offset: then the field is null.
    #[serde(default)]
    pub absent: Option<i64>,
}

/// Which of a device's four tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Table {
    #[default]
    Holding,
    Input,
    Coil,
    Discrete,
}

/// What registers hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegisterType {
    #[default]
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
    Bits,
}

/// The order of bytes in a value of two registers, A the highest; of four, the same for words and for bytes in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Order {
    #[default]
    #[serde(rename = "ABCD")]
    Abcd,
    #[serde(rename = "CDAB")]
    Cdab,
    #[serde(rename = "BADC")]
    Badc,
    #[serde(rename = "DCBA")]
    Dcba,
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ModbusAddress, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || serde::de::Error::custom(format!("`{text}` is neither tcp://host:502 nor rtu:///dev/ttyUSB0"));
    if let Some(path) = text.strip_prefix("rtu://").filter(|path| path.starts_with('/')) {
        return Ok(ModbusAddress::Rtu(path.into()));
    }
    let host = text.strip_prefix("tcp://").map(|host| host.trim_end_matches('/')).ok_or_else(wrong)?;
    if host.is_empty() || host.contains('/') {
        return Err(wrong());
    }
    // The colons of an IPv6 address stand in brackets.
    let has_port = host.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
    Ok(ModbusAddress::Tcp(if has_port { host.to_owned() } else { format!("{host}:502") }))
}

fn baud() -> u32 {
    9_600
}

fn one() -> u8 {
    1
}

fn every() -> Span {
    Span(Duration::from_secs(10))
}

fn timeout() -> Span {
    Span(Duration::from_secs(1))
}

/// The field, of type text, that says how a device answered.
pub const STATUS: &str = "status";
/// Devices on a serial line, by the standard.
const UNITS_MAX: usize = 247;
const REGISTERS_MAX: usize = 2_000;

impl RegisterSettings {
    /// How many registers, or coils, the value takes.
    pub fn words(&self) -> u16 {
        match self.kind {
            RegisterType::Bits if matches!(self.table, Table::Coil | Table::Discrete) => u16::from(self.bits),
            RegisterType::U16 | RegisterType::I16 | RegisterType::Bits => 1,
            RegisterType::U32 | RegisterType::I32 | RegisterType::F32 => 2,
            RegisterType::U64 | RegisterType::I64 | RegisterType::F64 => 4,
        }
    }

    fn check(&self) -> Result<(), String> {
        let bits = matches!(self.kind, RegisterType::Bits);
        let coil = matches!(self.table, Table::Coil | Table::Discrete);
        if coil && !bits {
            return Err("a coil or a discrete input has type = \"bits\"".to_owned());
        }
        if !bits && (self.bit, self.bits) != (0, 1) {
            return Err("bit and bits are for type = \"bits\"".to_owned());
        }
        if bits && (self.bits == 0 || u16::from(self.bit) + u16::from(self.bits) > 16 || coil && self.bit > 0) {
            return Err("bits are 1 to 16, within one register".to_owned());
        }
        if [self.scale, self.offset].into_iter().flatten().any(|number| !number.is_finite()) {
            return Err("scale and offset must be numbers".to_owned());
        }
        if self.address.checked_add(self.words() - 1).is_none() {
            return Err("the value ends behind register 65535".to_owned());
        }
        Ok(())
    }
}

impl ModbusSettings {
    /// Where the values stand in a message of this source.
    pub fn map(&self) -> MapSettings {
        let place = |name: &str| Place::Reading(Pointer(vec![name.to_owned()]));
        let status = STATUS.parse().expect("a name");
        let fields = self.register.iter().map(|register| &register.field).chain([&status]);
        MapSettings {
            device: Some(place("device")),
            ts: TimePlace::Arrival,
            fields: fields.map(|field| (field.clone(), place(field.as_str()))).collect(),
        }
    }

    pub(super) fn check(&self, stream: Option<&StreamSettings>) -> Result<(), String> {
        if self.unit.is_empty() || self.unit.len() > UNITS_MAX {
            return Err(format!("it needs from 1 to {UNITS_MAX} [[source.unit]]"));
        }
        if self.register.is_empty() || self.register.len() > REGISTERS_MAX {
            return Err(format!("it needs from 1 to {REGISTERS_MAX} [[source.register]]"));
        }
        let (mut devices, mut fields) = (HashSet::new(), HashSet::new());
        if let Some(unit) = self.unit.iter().find(|unit| unit.device.is_empty() || !devices.insert(&unit.device)) {
            return Err(format!("unit {}: every device has a name of its own", unit.id));
        }
        for register in &self.register {
            let wrong = |error| Err(format!("register `{}`: {error}", register.field));
            if register.field.as_str() == STATUS || !fields.insert(&register.field) {
                return wrong("the field is taken".to_owned());
            }
            if let Err(error) = register.check() {
                return wrong(error);
            }
        }
        if !matches!(self.stop_bits, 1 | 2) || self.baud == 0 {
            return Err("stop_bits are 1 or 2, baud is a speed".to_owned());
        }
        if self.every.0 < Duration::from_millis(10) || self.timeout.0.is_zero() {
            return Err("every must be at least 10 ms, timeout more than none".to_owned());
        }
        let status = stream.and_then(|stream| stream.fields.iter().find(|(name, _)| name.as_str() == STATUS));
        match status {
            Some((_, field)) if field.kind != FieldType::Text => Err(format!(
                "[stream.{}.fields] {STATUS}: it says how a device answered, and has type = \"text\"",
                self.stream
            )),
            _ => Ok(()),
        }
    }

    /// Whether the stream wants to hear of devices that do not answer.
    pub fn marks(stream: &StreamSettings) -> bool {
        stream.fields.iter().any(|(name, _)| name.as_str() == STATUS)
    }
}
