//! Distances on the globe: `ST_DistanceSphere(lon, lat, lon, lat)` in metres, and `ST_DWithin`.
//!
//! Longitudes and latitudes are float64 degrees (WGS84), longitude first as in `ST_Point`. Metres are those of the great
//! circle on a sphere of the mean radius 6,371,008.8 m: off by at most 0.6 % from the ellipsoid. A latitude outside
//! [-90, 90] is no place and gives NULL.
//!
//! `ST_DWithin(lon, lat, lon, lat, metres)` compares that distance. `ST_DWithin(geom, geom, d)` is PostGIS's for
//! geometries: `ST_Distance(geom, geom) <= d`, planar and in the units of their coordinates; degrees, for lon and lat.
//! `ST_DistanceSphere(point, point)` takes points made of lon and lat.

use std::sync::Arc;

use arrow::datatypes::{DataType, Float64Type};
use arrow_array::cast::AsArray;
use arrow_array::{BooleanArray, Float64Array};
use datafusion::common::{Result, internal_err, plan_err};
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use geodatafusion::udf::geo::measurement::Distance;
use geodatafusion::udf::native::accessors::{X, Y};

/// Mean radius of the earth, metres (IUGG).
const RADIUS_M: f64 = 6_371_008.8;

/// Great-circle distance in metres (haversine); None for what is no place.
fn distance_m(lon1: f64, lat1: f64, lon2: f64, lat2: f64) -> Option<f64> {
    let place = |lon: f64, lat: f64| lon.is_finite() && (-90.0..=90.0).contains(&lat);
    if !(place(lon1, lat1) && place(lon2, lat2)) {
        return None;
    }
    let (phi1, phi2) = (lat1.to_radians(), lat2.to_radians());
    let half = |degrees: f64| (degrees.to_radians() / 2.0).sin().powi(2);
    let a = half(lat2 - lat1) + phi1.cos() * phi2.cos() * half(lon2 - lon1);
    Some(2.0 * RADIUS_M * a.clamp(0.0, 1.0).sqrt().asin())
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Measure {
    Distance,
    Within,
}

/// A function of two places.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct OnSphere {
    measure: Measure,
    signature: Signature,
}

impl OnSphere {
    pub(super) fn new(measure: Measure) -> Self {
        Self { measure, signature: Signature::user_defined(Volatility::Immutable) }
    }

    /// Numbers when four of them are the places.
    fn numbers(&self) -> usize {
        if self.measure == Measure::Within { 5 } else { 4 }
    }
}

impl ScalarUDFImpl for OnSphere {
    fn name(&self) -> &str {
        match self.measure {
            Measure::Distance => "st_distancesphere",
            Measure::Within => "st_dwithin",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        let count = arguments.len();
        let geometries = self.numbers() - 2;
        if count == self.numbers() {
            if let Some(other) = arguments.iter().find(|kind| !kind.is_numeric() && !kind.is_null()) {
                return plan_err!("{}: {other} is no number of degrees or metres", self.name());
            }
            return Ok(vec![DataType::Float64; count]);
        }
        if count == geometries {
            let mut kinds = arguments.to_vec();
            kinds.iter_mut().skip(2).for_each(|metres| *metres = DataType::Float64);
            return Ok(kinds);
        }
        match self.measure {
            Measure::Distance => plan_err!("st_distancesphere takes (lon, lat, lon, lat) or two points"),
            Measure::Within => {
                plan_err!("st_dwithin takes (lon, lat, lon, lat, metres) or (geometry, geometry, units)")
            }
        }
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(match self.measure {
            Measure::Distance => DataType::Float64,
            Measure::Within => DataType::Boolean,
        })
    }

    fn simplify(&self, mut arguments: Vec<Expr>, _: &SimplifyContext) -> Result<ExprSimplifyResult> {
        if arguments.len() == self.numbers() {
            return Ok(ExprSimplifyResult::Original(arguments));
        }
        let rewritten = match self.measure {
            Measure::Within => {
                let units = arguments.split_off(2).remove(0);
                ScalarUDF::from(Distance).call(arguments).lt_eq(units)
            }
            Measure::Distance => {
                let (x, y) = (ScalarUDF::from(X::default()), ScalarUDF::from(Y::default()));
                let places = arguments.into_iter().flat_map(|point| [x.call(vec![point.clone()]), y.call(vec![point])]);
                ScalarUDF::from(Self::new(Measure::Distance)).call(places.collect())
            }
        };
        Ok(ExprSimplifyResult::Simplified(rewritten))
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        if arguments.args.len() != self.numbers() {
            return internal_err!("{} of geometries was not rewritten", self.name());
        }
        let arrays = ColumnarValue::values_to_arrays(&arguments.args)?;
        let numbers: Vec<&Float64Array> = arrays.iter().map(|array| array.as_primitive::<Float64Type>()).collect();
        let number = |column: usize, row: usize| {
            use arrow_array::Array;
            numbers[column].is_valid(row).then(|| numbers[column].value(row))
        };
        let distance = |row: usize| distance_m(number(0, row)?, number(1, row)?, number(2, row)?, number(3, row)?);
        let rows = 0..numbers[0].len();
        Ok(ColumnarValue::Array(match self.measure {
            Measure::Distance => Arc::new(rows.map(distance).collect::<Float64Array>()),
            Measure::Within => {
                let within = |row: usize| Some(distance(row)? <= number(4, row)?);
                Arc::new(rows.map(within).collect::<BooleanArray>())
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::distance_m;

    #[test]
    fn distances() {
        let check = |from: (f64, f64), to: (f64, f64), expected: f64| {
            let metres = distance_m(from.0, from.1, to.0, to.1).unwrap();
            assert!((metres - expected).abs() <= expected * 1e-4 + 1e-6, "{from:?} {to:?}: {metres}");
        };
        check((10.2, 56.15), (10.2, 56.15), 0.0);
        // A degree of a great circle.
        check((0.0, 0.0), (1.0, 0.0), 111_195.08);
        check((0.0, 89.5), (180.0, 89.5), 111_195.08);
        // Over the date line, and to the other side of the earth.
        check((179.5, 0.0), (-179.5, 0.0), 111_195.08);
        check((0.0, 0.0), (180.0, 0.0), 20_015_114.4);
        for (lon, lat) in [(0.0, 90.1), (f64::NAN, 0.0), (f64::INFINITY, 0.0), (0.0, f64::NAN)] {
            assert_eq!(distance_m(lon, lat, 0.0, 0.0), None);
        }
    }
}
