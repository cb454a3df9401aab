//! Which column of a file is the time, which names the device, and what the others are called.

use std::borrow::Cow;

use anyhow::{Context, anyhow, bail, ensure};
use chrono::format::StrftimeItems;
use chrono_tz::Tz;
use cloud_ingest::doors::rows::Cell;
use edge_agent::config::TimeFormat;
use edge_agent::decode::TimeReader;
use serde_json::json;
use wire::schema::{DEVICE, TS};
use wire::{FieldName, FieldType, StreamField, StreamSchema, TS_MIN_US, named, reference};

use super::file::Input;

/// Columns that are the time, and that name the device, where nothing is said.
const TIMES: [&str; 5] = ["ts", "time", "timestamp", "_time", "datetime"];
const DEVICES: [&str; 5] = ["device", "device_id", "sensor", "sensor_id", "host"];
/// How times are written, where nothing is said.
const WRITTEN: [&str; 4] = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d"];

/// What of the arguments says what the columns are.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct MappingArguments {
    /// NAME=COLUMN: ts=TIMESTAMP, device=REPORT_ID, avg_speed=avgSpeed; columns that are not named keep their names
    #[arg(long = "map", value_name = "NAME=COLUMN")]
    map: Vec<String>,
    /// Leaves a column out
    #[arg(long, value_name = "COLUMN")]
    skip: Vec<String>,
    /// The device of all rows, when no column names it
    #[arg(long)]
    device: Option<String>,
    /// How times are written: epoch_s, epoch_ms, epoch_us, epoch_ns, or as %Y-%m-%d %H:%M:%S
    #[arg(long)]
    time_format: Option<String>,
    /// Zone of times that name none
    #[arg(long, default_value = "UTC")]
    zone: Tz,
}

/// How a row of a file becomes one of a stream.
#[derive(Debug)]
pub(super) struct Mapping {
    ts: Time,
    device: Device,
    /// For each column its field, unless it is none.
    fields: Vec<Option<FieldName>>,
    columns: Vec<(String, FieldType)>,
    /// Fields that no column gives.
    constants: Vec<(FieldName, Cell<'static>)>,
    description: String,
}

#[derive(Debug)]
enum Time {
    Column(usize, Readers),
    /// Rows of a reference table have no event time.
    None,
}

#[derive(Debug)]
enum Device {
    Column(usize),
    Constant(String),
}

/// A row of the stream.
#[derive(Debug)]
pub(super) struct Placed<'m, 'c> {
    pub(super) ts: i64,
    pub(super) device: Option<Cow<'c, str>>,
    pub(super) cells: Vec<(&'m FieldName, Cell<'c>)>,
}

/// Reads times that may be written in several ways.
#[derive(Debug)]
struct Readers {
    texts: Vec<TimeReader>,
    /// Units in a second of a number; by its size when it is not said.
    per_second: Option<i64>,
}

impl Readers {
    fn new(format: Option<&str>, zone: Tz) -> anyhow::Result<Self> {
        let written = |format: &str| {
            let checked = StrftimeItems::new(format).parse();
            ensure!(
                checked.is_ok(),
                "`{format}` is no time format: epoch_s, epoch_ms, epoch_us, epoch_ns, or one with %"
            );
            Ok(TimeReader::new(&TimeFormat::Written { format: format.to_owned(), zone: Some(zone) }))
        };
        let epoch = |per_second| {
            Ok(Self { texts: vec![TimeReader::new(&TimeFormat::Epoch { per_second })], per_second: Some(per_second) })
        };
        match format {
            Some("epoch_s") => epoch(1),
            Some("epoch_ms") => epoch(1_000),
            Some("epoch_us") => epoch(1_000_000),
            Some("epoch_ns") => epoch(1_000_000_000),
            Some(format) => Ok(Self { texts: vec![written(format)?], per_second: None }),
            None => {
                let mut texts = vec![TimeReader::new(&TimeFormat::Rfc3339)];
                for format in WRITTEN {
                    texts.push(written(format)?);
                }
                Ok(Self { texts, per_second: None })
            }
        }
    }

    fn read(&self, cell: Option<Cell<'_>>) -> Result<i64, (&'static str, String)> {
        let bad = |detail: String| ("bad_time", detail);
        match cell {
            None => Err(("no_time", "nothing stands where the time should be".to_owned())),
            Some(Cell::Time(us)) => Ok(us),
            Some(Cell::Int(number)) => {
                let per_second = self.per_second.unwrap_or_else(|| by_size(number));
                i64::try_from(i128::from(number) * 1_000_000 / i128::from(per_second))
                    .map_err(|_| bad(format!("{number} is no time")))
            }
            Some(Cell::Float(number)) => {
                let us = number * (1_000_000.0 / self.per_second.unwrap_or(1) as f64);
                if us.abs() < 9e15 { Ok(us.round() as i64) } else { Err(bad(format!("{number} is no time"))) }
            }
            Some(Cell::Text(text)) => {
                let mut first = None;
                for reader in &self.texts {
                    match reader.text(text) {
                        Ok(us) => return Ok(us),
                        Err(detail) => first = first.or(Some(detail)),
                    }
                }
                Err(bad(first.unwrap_or_default()))
            }
            Some(other) => Err(bad(format!("{other:?} is no time"))),
        }
    }
}

/// Seconds, ms, µs or ns since 1970, whichever is nearest to these years.
fn by_size(number: i64) -> i64 {
    match number.unsigned_abs() {
        0..100_000_000_000 => 1,
        100_000_000_000..100_000_000_000_000 => 1_000,
        100_000_000_000_000..100_000_000_000_000_000 => 1_000_000,
        _ => 1_000_000_000,
    }
}

impl Mapping {
    /// For rows that are readings.
    pub(super) fn of_readings(arguments: &MappingArguments, input: &Input) -> anyhow::Result<Self> {
        let named = Named::read(arguments, input)?;
        let ts = named.special(TS, &TIMES)?;
        let ts = ts
            .with_context(|| format!("which column is the time? Say --map ts=COLUMN; there are {}", named.columns()))?;
        let device = match (&arguments.device, named.special(DEVICE, &DEVICES)?) {
            (Some(device), _) => Device::Constant(device.clone()),
            (None, Some(column)) => Device::Column(column),
            (None, None) => bail!(
                "which column names the device? Say --map device=COLUMN, or --device NAME; there are {}",
                named.columns()
            ),
        };
        let readers = Readers::new(arguments.time_format.as_deref(), arguments.zone)?;
        named.mapping(Time::Column(ts, readers), device, Vec::new(), arguments)
    }

    /// For rows that are things, told apart by `key`.
    pub(super) fn of_reference(
        arguments: &MappingArguments,
        input: &Input,
        key: &str,
        valid_from: Option<&str>,
    ) -> anyhow::Result<Self> {
        let named = Named::read(arguments, input)?;
        let device =
            named.position(key).with_context(|| format!("no column `{key}`; there are {}", named.columns()))?;
        let mut constants = Vec::new();
        if let Some(text) = valid_from {
            let readers = Readers::new(None, arguments.zone)?;
            let us = readers.read(Some(Cell::Text(text))).map_err(|(_, detail)| anyhow!("--valid-from: {detail}"))?;
            constants.push((named::field(reference::VALID_FROM), Cell::Time(us)));
        }
        named.mapping(Time::None, Device::Column(device), constants, arguments)
    }

    /// What makes two loads of the same bytes different ones.
    pub(super) fn describe(&self) -> String {
        self.description.clone()
    }

    pub(super) fn schema(&self) -> anyhow::Result<StreamSchema> {
        let of_columns =
            self.fields.iter().zip(&self.columns).filter_map(|(name, (_, kind))| Some((name.clone()?, *kind)));
        let mut fields: Vec<StreamField> = of_columns.map(|(name, kind)| StreamField { name, kind }).collect();
        if matches!(self.ts, Time::None) {
            fields.push(StreamField { name: named::field(reference::VALID_FROM), kind: FieldType::Timestamp });
        }
        StreamSchema::new(fields)
            .context("make a stream of these columns: rename some with --map, or leave some out with --skip")
    }

    /// A row with its time, which must be at most `ts_max`.
    pub(super) fn place<'m, 'c>(
        &'m self,
        cells: &'c [Option<Cell<'c>>],
        ts_max: i64,
    ) -> Result<Placed<'m, 'c>, (&'static str, String)> {
        let ts = match &self.ts {
            Time::Column(column, readers) => readers.read(cells[*column])?,
            Time::None => TS_MIN_US,
        };
        if ts < TS_MIN_US {
            return Err(("before_2000", format!("its time is {}", shown(ts))));
        }
        if ts > ts_max {
            return Err(("in_future", format!("its time is {}", shown(ts))));
        }
        let device = match &self.device {
            Device::Constant(device) => Some(Cow::Owned(device.clone())),
            Device::Column(column) => cells[*column].map(as_text),
        };
        if device.is_none() {
            return Err(("missing", "nothing says which device it is".to_owned()));
        }
        let of_columns = self.fields.iter().zip(cells).filter_map(|(name, cell)| Some((name.as_ref()?, (*cell)?)));
        let constants = self.constants.iter().map(|(name, cell)| (name, *cell));
        Ok(Placed { ts, device, cells: of_columns.chain(constants).collect() })
    }

    /// A row as it was in the file, more or less.
    pub(super) fn as_json(&self, cells: &[Option<Cell<'_>>]) -> Vec<u8> {
        let value = |cell: &Option<Cell<'_>>| match cell {
            None => serde_json::Value::Null,
            Some(Cell::Bool(value)) => json!(value),
            Some(Cell::Int(value)) => json!(value),
            Some(Cell::Float(value)) => json!(value),
            Some(cell) => json!(as_text(*cell)),
        };
        let values = self.columns.iter().zip(cells).map(|((name, _), cell)| (name.clone(), value(cell)));
        serde_json::Value::Object(values.collect()).to_string().into_bytes()
    }
}

fn shown(us: i64) -> String {
    chrono::DateTime::from_timestamp_micros(us).map_or_else(|| format!("{us} µs"), |time| time.to_rfc3339())
}

fn as_text(cell: Cell<'_>) -> Cow<'_, str> {
    match cell {
        Cell::Text(text) => Cow::Borrowed(text),
        Cell::Bool(value) => Cow::Owned(value.to_string()),
        Cell::Int(value) => Cow::Owned(value.to_string()),
        Cell::Float(value) => Cow::Owned(value.to_string()),
        Cell::Time(us) => Cow::Owned(shown(us)),
        Cell::Bytes(bytes) => Cow::Owned(bytes.iter().map(|byte| format!("{byte:02x}")).collect()),
    }
}

/// The columns with what the arguments call them.
struct Named<'a> {
    input: &'a Input,
    map: Vec<(&'a str, usize)>,
    skip: Vec<usize>,
}

impl<'a> Named<'a> {
    fn read(arguments: &'a MappingArguments, input: &'a Input) -> anyhow::Result<Self> {
        let mut named = Self { input, map: Vec::new(), skip: Vec::new() };
        let position = |named: &Self, column: &str| {
            let found = named.position(column);
            found.with_context(|| format!("no column `{column}`; there are {}", named.columns()))
        };
        for pair in &arguments.map {
            let (name, column) = pair.split_once('=').with_context(|| format!("`{pair}` is not NAME=COLUMN"))?;
            if name != TS && name != DEVICE {
                name.parse::<FieldName>().with_context(|| format!("--map {pair}"))?;
            }
            let column = position(&named, column)?;
            named.map.push((name, column));
        }
        for column in &arguments.skip {
            let column = position(&named, column)?;
            named.skip.push(column);
        }
        Ok(named)
    }

    fn position(&self, column: &str) -> Option<usize> {
        self.input.columns.iter().position(|(name, _)| name == column)
    }

    fn columns(&self) -> String {
        self.input.columns.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// The column that is called `name`, or is likely to be meant.
    fn special(&self, name: &str, usual: &[&str]) -> anyhow::Result<Option<usize>> {
        let mut mapped = self.map.iter().filter(|(known, _)| *known == name);
        let first = mapped.next().map(|(_, column)| *column);
        ensure!(mapped.next().is_none(), "--map {name}=… is there twice");
        let likely = || {
            usual
                .iter()
                .find_map(|usual| self.input.columns.iter().position(|(name, _)| name.eq_ignore_ascii_case(usual)))
        };
        Ok(first.or_else(likely))
    }

    fn mapping(
        self,
        ts: Time,
        device: Device,
        constants: Vec<(FieldName, Cell<'static>)>,
        arguments: &MappingArguments,
    ) -> anyhow::Result<Mapping> {
        let special = |column: usize| {
            matches!(&ts, Time::Column(of_ts, _) if *of_ts == column)
                || matches!(&device, Device::Column(of_device) if *of_device == column)
        };
        let field = |(column, (name, _)): (usize, &(String, FieldType))| {
            let mapped = self.map.iter().find(|(name, of)| *of == column && *name != TS && *name != DEVICE);
            match mapped {
                Some((name, _)) => Some(named::field(name)),
                None if special(column) || self.skip.contains(&column) => None,
                None => Some(named::field(name)),
            }
        };
        let fields: Vec<Option<FieldName>> = self.input.columns.iter().enumerate().map(field).collect();
        let described = json!({
            "fields": fields.iter().map(|name| name.as_ref().map(FieldName::as_str)).collect::<Vec<_>>(),
            "ts": match &ts { Time::Column(column, _) => Some(column), Time::None => None },
            "device": match &device { Device::Column(column) => json!(column), Device::Constant(text) => json!(text) },
            "constants": constants.iter().map(|(name, cell)| format!("{name}={cell:?}")).collect::<Vec<_>>(),
            "time_format": arguments.time_format,
            "zone": arguments.zone.name(),
        });
        let columns = self.input.columns.clone();
        Ok(Mapping { ts, device, fields, columns, constants, description: described.to_string() })
    }
}
