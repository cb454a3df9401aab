//! H3 cells: hexagons that tile the globe in sixteen sizes, for maps and for grouping by place.
//!
//! A cell is an int64 (H3's 64-bit index, of which the first bit is never set), or its text as `h3_to_string` gives it:
//! functions of a cell take both. What is no cell, place or resolution gives NULL. Angles are degrees.
//! - `h3_cell(lat, lon, resolution)`, resolutions 0 to 15
//! - `h3_to_string(cell)`, `h3_from_string(text)`
//! - `h3_lat(cell)`, `h3_lon(cell)`: of the centre; `h3_boundary(cell)`: WKT, a polygon of (lon lat)
//! - `h3_resolution(cell)`, `h3_parent(cell, resolution)`
//! - `h3_distance(cell, cell)`: in cells of one resolution; NULL when they are too far apart to be told

use std::fmt::Write;
use std::sync::Arc;

use arrow::datatypes::{DataType, Float64Type, Int64Type};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, Float64Array, Int64Array, StringArray};
use datafusion::common::{Result, plan_err};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use h3o::{CellIndex, LatLng, Resolution};

/// One of the functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Cell,
    ToString,
    FromString,
    Lat,
    Lon,
    Boundary,
    Resolution,
    Parent,
    Distance,
}

const KINDS: [Kind; 9] = [
    Kind::Cell,
    Kind::ToString,
    Kind::FromString,
    Kind::Lat,
    Kind::Lon,
    Kind::Boundary,
    Kind::Resolution,
    Kind::Parent,
    Kind::Distance,
];

/// All functions of this file.
pub(super) fn functions() -> impl Iterator<Item = ScalarUDF> {
    KINDS
        .into_iter()
        .map(|kind| ScalarUDF::from(H3 { kind, signature: Signature::user_defined(Volatility::Immutable) }))
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct H3 {
    kind: Kind,
    signature: Signature,
}

impl ScalarUDFImpl for H3 {
    fn name(&self) -> &str {
        match self.kind {
            Kind::Cell => "h3_cell",
            Kind::ToString => "h3_to_string",
            Kind::FromString => "h3_from_string",
            Kind::Lat => "h3_lat",
            Kind::Lon => "h3_lon",
            Kind::Boundary => "h3_boundary",
            Kind::Resolution => "h3_resolution",
            Kind::Parent => "h3_parent",
            Kind::Distance => "h3_distance",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        let cell = |kind: &DataType| match kind {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => Ok(DataType::Utf8),
            kind if kind.is_integer() => Ok(DataType::Int64),
            other => plan_err!("{}: a cell is an integer or a text, and not {other}", self.name()),
        };
        match (self.kind, arguments) {
            (Kind::Cell, [_, _, _]) => Ok(vec![DataType::Float64, DataType::Float64, DataType::Int64]),
            (Kind::Cell, _) => plan_err!("h3_cell takes (lat, lon, resolution)"),
            (Kind::Parent, [of, _]) => Ok(vec![cell(of)?, DataType::Int64]),
            (Kind::Parent, _) => plan_err!("h3_parent takes (cell, resolution)"),
            (Kind::Distance, [from, to]) => Ok(vec![cell(from)?, cell(to)?]),
            (Kind::Distance, _) => plan_err!("h3_distance takes two cells"),
            (_, [of]) => Ok(vec![cell(of)?]),
            _ => plan_err!("{} takes one cell", self.name()),
        }
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(match self.kind {
            Kind::Cell | Kind::FromString | Kind::Resolution | Kind::Parent | Kind::Distance => DataType::Int64,
            Kind::ToString | Kind::Boundary => DataType::Utf8,
            Kind::Lat | Kind::Lon => DataType::Float64,
        })
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&arguments.args)?;
        let rows = 0..arrays[0].len();
        let of = |row: usize| cell(&arrays[0], row);
        let integers =
            |f: &dyn Fn(usize) -> Option<i64>| Arc::new(rows.clone().map(f).collect::<Int64Array>()) as ArrayRef;
        let texts =
            |f: &dyn Fn(usize) -> Option<String>| Arc::new(rows.clone().map(f).collect::<StringArray>()) as ArrayRef;
        let degrees =
            |f: &dyn Fn(usize) -> Option<f64>| Arc::new(rows.clone().map(f).collect::<Float64Array>()) as ArrayRef;
        Ok(ColumnarValue::Array(match self.kind {
            Kind::Cell => integers(&|row| {
                let lat = degree(&arrays[0], row).filter(|lat| (-90.0..=90.0).contains(lat))?;
                let place = LatLng::new(lat, degree(&arrays[1], row)?).ok()?;
                Some(number(place.to_cell(resolution(&arrays[2], row)?)))
            }),
            Kind::FromString => integers(&|row| of(row).map(number)),
            Kind::Resolution => integers(&|row| Some(i64::from(u8::from(of(row)?.resolution())))),
            Kind::Parent => integers(&|row| of(row)?.parent(resolution(&arrays[1], row)?).map(number)),
            Kind::Distance => integers(&|row| of(row)?.grid_distance(cell(&arrays[1], row)?).ok().map(i64::from)),
            Kind::ToString => texts(&|row| of(row).map(|cell| cell.to_string())),
            Kind::Boundary => texts(&|row| of(row).map(boundary)),
            Kind::Lat => degrees(&|row| Some(LatLng::from(of(row)?).lat())),
            Kind::Lon => degrees(&|row| Some(LatLng::from(of(row)?).lng())),
        }))
    }
}

fn number(cell: CellIndex) -> i64 {
    u64::from(cell) as i64
}

fn cell(cells: &ArrayRef, row: usize) -> Option<CellIndex> {
    if cells.is_null(row) {
        return None;
    }
    match cells.as_primitive_opt::<Int64Type>() {
        Some(numbers) => CellIndex::try_from(numbers.value(row) as u64).ok(),
        None => cells.as_string_opt::<i32>()?.value(row).parse().ok(),
    }
}

fn degree(degrees: &ArrayRef, row: usize) -> Option<f64> {
    let degrees = degrees.as_primitive_opt::<Float64Type>()?;
    degrees.is_valid(row).then(|| degrees.value(row))
}

fn resolution(resolutions: &ArrayRef, row: usize) -> Option<Resolution> {
    let resolutions = resolutions.as_primitive_opt::<Int64Type>()?;
    if resolutions.is_null(row) {
        return None;
    }
    u8::try_from(resolutions.value(row)).ok().and_then(|resolution| Resolution::try_from(resolution).ok())
}

/// A ring that ends where it began.
fn boundary(cell: CellIndex) -> String {
    let corners = cell.boundary();
    let mut text = "POLYGON((".to_owned();
    for corner in corners.iter().chain(corners.first()) {
        let separator = if text.ends_with('(') { "" } else { ", " };
        write!(text, "{separator}{} {}", corner.lng(), corner.lat()).expect("a String takes what is written");
    }
    text.push_str("))");
    text
}
