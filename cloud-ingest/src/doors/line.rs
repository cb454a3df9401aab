//! Influx line protocol as rows: a measurement is a stream, a tag names the device, the other tags are fields of text.
//!
//! A good line is a row, a bad one is a row of `quarantine` with its bytes; neither touches its neighbours. A line without
//! a time has that of its arrival. Where a tag and a field have one name, the tag is called `<name>_tag`; of equal names the
//! last counts, as in InfluxDB. Bytes that are not UTF-8 spoil the physical lines they stand in.

use std::borrow::Cow;
use std::collections::HashMap;

use indexmap::IndexMap;
use wire::line::{FieldValue, Lines, Part, Precision};
use wire::{FIELDS_MAX, FieldName, StreamName, named};

use super::rows::{Cell, Gathering, RowsError};
use super::{Origin, Rejected, Told, check_time, reject};
use crate::own_names::{self, OwnNames};

/// Longest name of a device, as at the edge.
const DEVICE_BYTES_MAX: usize = 256;

/// The parts of one line.
#[derive(Debug, Default)]
struct Point<'a> {
    measurement: Cow<'a, str>,
    tags: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    fields: Vec<(Cow<'a, str>, FieldValue<'a>)>,
}

/// Reads a request: rows go into `rows`; what is to be told of it comes back.
pub(crate) fn read(
    body: &[u8],
    precision: Precision,
    devices: &[String],
    origin: Origin<'_>,
    rows: &mut Gathering,
) -> Result<Told, RowsError> {
    let mut reader = Reader { precision, devices, origin, rows, told: Told::default(), names: Names::default() };
    if let Ok(text) = std::str::from_utf8(body) {
        reader.text(text, 0)?;
        return Ok(reader.told);
    }
    // The longest runs of physical lines that are text.
    let (mut from, mut at, mut number, mut first) = (0, 0, 0, 0);
    for line in body.split_inclusive(|byte| *byte == b'\n') {
        if std::str::from_utf8(line).is_err() {
            reader.text(&String::from_utf8_lossy(&body[from..at]), first)?;
            let detail = "the line is not UTF-8";
            let rejected = Rejected { number: number + 1, stream: None, reason: "malformed", detail, payload: line };
            reject(reader.rows, &mut reader.told, origin, &rejected)?;
            (from, first) = (at + line.len(), number + 1);
        }
        at += line.len();
        number += 1;
    }
    reader.text(&String::from_utf8_lossy(&body[from..]), first)?;
    Ok(reader.told)
}

struct Reader<'r, 'o> {
    precision: Precision,
    devices: &'o [String],
    origin: Origin<'o>,
    rows: &'r mut Gathering,
    told: Told,
    names: Names,
}

/// Names that were met, as they are called here.
#[derive(Debug, Default)]
struct Names {
    /// None that is a view's own.
    streams: HashMap<String, StreamName>,
    fields: HashMap<String, FieldName>,
}

impl Names {
    fn stream(&mut self, name: &str, own: &OwnNames, told: &mut Told) -> Result<StreamName, (&'static str, String)> {
        if let Some(known) = self.streams.get(name) {
            return Ok(known.clone());
        }
        let stream = named::stream(name);
        if own.has(&stream) {
            return Err(("reserved", own_names::refusal(&stream)));
        }
        told.rename(name, stream.as_str());
        self.streams.insert(name.to_owned(), stream.clone());
        Ok(stream)
    }

    fn field(&mut self, name: &str, told: &mut Told) -> FieldName {
        if let Some(known) = self.fields.get(name) {
            return known.clone();
        }
        let field = named::field(name);
        told.rename(name, field.as_str());
        self.fields.insert(name.to_owned(), field.clone());
        field
    }
}

impl Reader<'_, '_> {
    /// `first` is the number of lines before it.
    fn text(&mut self, text: &str, first: usize) -> Result<(), RowsError> {
        let mut lines = Lines::new(text, self.precision);
        loop {
            let mut point = Point::default();
            let line = lines.next(|part| match part {
                Part::Measurement(name) => point.measurement = name,
                Part::Tag(name, value) => point.tags.push((name, value)),
                Part::Field(name, value) => point.fields.push((name, value)),
            });
            let Some(line) = line else { return Ok(()) };
            let time = line.time.map_err(|error| ("malformed", error.0));
            let row = time.and_then(|time| self.row(&point, time));
            let (stream, reason, detail) = match row {
                Ok(row) => {
                    self.told.rows += 1;
                    let cells = row.cells.iter().map(|(name, cell)| (name, *cell));
                    self.rows.add(&row.stream, row.ts, Some(&row.device), cells)?;
                    continue;
                }
                Err((reason, detail)) => (named::stream(&point.measurement), reason, detail),
            };
            let stream = (!point.measurement.is_empty()).then_some(stream.as_str());
            let payload = text[line.span].as_bytes();
            let rejected = Rejected { number: first + line.number, stream, reason, detail: &detail, payload };
            reject(self.rows, &mut self.told, self.origin, &rejected)?;
        }
    }

    fn row<'p>(&mut self, point: &'p Point<'_>, time: Option<i64>) -> Result<Row<'p>, (&'static str, String)> {
        let ts = time.unwrap_or(self.origin.arrival_us);
        check_time(ts, self.origin.arrival_us)?;
        if point.tags.len() + point.fields.len() > FIELDS_MAX {
            return Err(("malformed", format!("more than {FIELDS_MAX} tags and fields")));
        }
        let mut cells = IndexMap::with_capacity(point.fields.len() + point.tags.len());
        for (name, value) in &point.fields {
            let cell = match value {
                FieldValue::Bool(value) => Cell::Bool(*value),
                FieldValue::Int(value) => Cell::Int(*value),
                FieldValue::Float(value) => Cell::Float(*value),
                FieldValue::Text(text) => Cell::Text(text),
                FieldValue::Unsigned(value) => {
                    return Err(("type", format!("{name} is {value}, above what an int64 holds")));
                }
            };
            cells.insert(self.names.field(name, &mut self.told), cell);
        }
        let tag = |wanted: &String| point.tags.iter().rfind(|(name, _)| name == wanted);
        let device = self.devices.iter().find_map(tag);
        for (name, value) in point.tags.iter().filter(|(name, _)| device.is_none_or(|(device, _)| device != name)) {
            let mut field = self.names.field(name, &mut self.told);
            if point.fields.iter().any(|(other, _)| self.names.fields.get(&**other) == Some(&field)) {
                field = named::other_field(name, "tag");
                self.told.rename(name, field.as_str());
            }
            cells.insert(field, Cell::Text(value));
        }
        let device = match device {
            Some((_, value)) => Cow::Borrowed(&**value),
            None if point.tags.is_empty() => Cow::Owned(self.origin.edge.to_string()),
            None => Cow::Owned(all_tags(&point.tags)),
        };
        if device.len() > DEVICE_BYTES_MAX {
            return Err(("malformed", format!("its device's name has more than {DEVICE_BYTES_MAX} bytes")));
        }
        let stream = self.names.stream(&point.measurement, self.origin.own_names, &mut self.told)?;
        // Only of rows that are taken: a bad line is the same bad line when it comes again.
        self.told.by_arrival |= time.is_none();
        Ok(Row { stream, ts, device, cells })
    }
}

struct Row<'p> {
    stream: StreamName,
    ts: i64,
    device: Cow<'p, str>,
    cells: IndexMap<FieldName, Cell<'p>>,
}

/// What tells one series from the others, in the order of the names.
fn all_tags(tags: &[(Cow<'_, str>, Cow<'_, str>)]) -> String {
    let mut tags: Vec<String> = tags.iter().map(|(name, value)| format!("{name}={value}")).collect();
    tags.sort();
    tags.join(",")
}

#[cfg(test)]
mod tests {
    use arrow_array::cast::AsArray;
    use wire::TS_MIN_US;

    use super::*;
    use crate::doors::gathering;
    use crate::doors::rows::Gathered;

    const ARRIVAL: i64 = TS_MIN_US + 1_000_000_000;

    fn take(body: &[u8]) -> (Told, Vec<Gathered>) {
        let mut rows = gathering("line", 1 << 20);
        let edge = "gw".parse().unwrap();
        let own_names = &OwnNames::default();
        let origin = Origin { edge: &edge, own_names, source: "line", topic: "db", arrival_us: ARRIVAL };
        let devices = ["device".to_owned(), "host".to_owned()];
        let told = read(body, Precision::Us, &devices, origin, &mut rows).unwrap();
        (told, rows.finish().unwrap())
    }

    fn texts(batch: &Gathered, column: &str) -> Vec<String> {
        let column = batch.rows.column_by_name(column).unwrap().as_string::<i32>();
        column.iter().map(|text| text.unwrap_or("-").to_owned()).collect()
    }

    #[test]
    fn a_line_is_a_row_and_says_which_device() {
        let ts = TS_MIN_US + 5;
        let body = format!(
            "CPU\\ Load,host=a,cpu=0 v=1.5,n=2i {ts}\nCPU\\ Load,cpu=1,zone=z v=2,n=3i {ts}\nCPU\\ Load v=1,n=1i\n\
             CPU\\ Load,device=d,host=a,v=tag v=4,quality=\"x\" {ts}\n"
        );
        let (told, batches) = take(body.as_bytes());
        assert_eq!((told.rows, told.rejected, told.by_arrival), (4, 0, true));
        let expected = [("CPU Load", "cpu_load"), ("quality", "quality_"), ("v", "v_tag")];
        for (from, to) in expected {
            assert!(told.renamed.contains(&(from.to_owned(), to.to_owned())), "{:?}", told.renamed);
        }
        let [batch] = &batches[..] else { panic!("{batches:?}") };
        assert_eq!(batch.cut.stream.as_str(), "cpu_load");
        assert_eq!(texts(batch, "device"), ["a", "cpu=1,zone=z", "gw", "d"]);
        assert_eq!(texts(batch, "cpu"), ["0", "1", "-", "-"]);
        assert_eq!(texts(batch, "v_tag"), ["-", "-", "-", "tag"]);
        assert_eq!(texts(batch, "host"), ["-", "-", "-", "a"]);
    }

    #[test]
    fn a_bad_line_is_a_row_of_quarantine_and_its_neighbours_are_taken() {
        let ts = TS_MIN_US + 5;
        let mut body = format!("m v=1 {ts}\nm v=\nm v=1 5\nm n=18446744073709551615u {ts}\n").into_bytes();
        body.extend(b"m,t=\xff v=1\n");
        body.extend(format!("m v=2 {ts}\n").into_bytes());
        let (told, batches) = take(&body);
        assert_eq!((told.rows, told.rejected, told.by_arrival), (2, 4, false));
        let numbers: Vec<usize> = told.reasons.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [2, 3, 4, 5]);
        let quarantine = batches.iter().find(|batch| batch.cut.stream.as_str() == "quarantine").unwrap();
        assert_eq!(quarantine.schema.canonical(), wire::schema::own::quarantine().canonical());
        assert_eq!(texts(quarantine, "reason"), ["malformed", "before_2000", "type", "malformed"]);
        assert_eq!(texts(quarantine, "stream"), ["m", "m", "m", "-"]);
        assert_eq!(quarantine.rows.column_by_name("payload").unwrap().as_binary::<i32>().value(3), b"m,t=\xff v=1\n");
        let good = batches.iter().find(|batch| batch.cut.stream.as_str() == "m").unwrap();
        assert_eq!(good.rows.num_rows(), 2);
    }

    #[test]
    fn what_a_view_alone_writes_is_a_row_of_quarantine() {
        let own_names = OwnNames::default();
        own_names.set(|stream| stream.as_str() == "calm_5m");
        let mut rows = gathering("line", 1 << 20);
        let edge = "gw".parse().unwrap();
        let origin = Origin { edge: &edge, own_names: &own_names, source: "line", topic: "db", arrival_us: ARRIVAL };
        let body = b"m v=1\nCalm\\ 5m n=1\nm v=2\ncalm_5m n=2\n";
        let told = read(body, Precision::Us, &[], origin, &mut rows).unwrap();
        assert_eq!((told.rows, told.rejected), (2, 2));
        assert_eq!(told.reasons[0], (2, own_names::refusal(&"calm_5m".parse().unwrap())));
        let batches = rows.finish().unwrap();
        let streams: Vec<&str> = batches.iter().map(|batch| batch.cut.stream.as_str()).collect();
        assert_eq!(streams, ["m", "quarantine"]);
        assert_eq!(texts(&batches[1], "stream"), ["calm_5m"; 2]);
        assert_eq!(texts(&batches[1], "reason"), ["reserved"; 2]);
    }

    #[test]
    fn the_same_lines_give_the_same_batches() {
        let body = format!("m,host=a v=1,w=2i {TS_MIN_US}\nm,host=b v=1i {TS_MIN_US}\n");
        let cuts = |(_, batches): (Told, Vec<Gathered>)| batches.into_iter().map(|batch| batch.cut).collect::<Vec<_>>();
        assert_eq!(cuts(take(body.as_bytes())), cuts(take(body.as_bytes())));
    }
}
