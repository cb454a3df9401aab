//! `time_bucket(width, ts [, zone] [, origin] [, offset])`: the beginning of the bucket that an instant falls into.
//!
//! The width is an INTERVAL or a text such as `'5 minutes'`, and constant like all other arguments but `ts`. What
//! stands after `ts` is known by its kind: a text is a time zone, a timestamp (or a text of one) an origin, an INTERVAL
//! an offset that every beginning is moved by. A `ts` whose type names a zone other than UTC has that zone. The result
//! has the type of `ts`. Where buckets begin is told in [`super::bucket_grid`].
//!
//! The optimizer knows that the order of `ts` is kept, and turns a comparison with a constant into one of `ts` itself,
//! so that `WHERE time_bucket('1 hour', ts) >= …` leaves out files like `WHERE ts >= …`.

use std::sync::Arc;

use arrow::datatypes::{
    ArrowTimestampType, DataType, IntervalUnit, TimeUnit, TimestampMicrosecondType, TimestampMillisecondType,
    TimestampNanosecondType, TimestampSecondType,
};
use arrow_array::cast::AsArray;
use arrow_array::types::IntervalMonthDayNano;
use arrow_array::{Array, ArrayRef, PrimitiveArray};
use arrow_cast::parse::parse_interval_month_day_nano;
use chrono_tz::Tz;
use datafusion::common::{DataFusionError, Result, ScalarValue, exec_datafusion_err, exec_err, plan_err};
use datafusion::logical_expr::interval_arithmetic::Interval;
use datafusion::logical_expr::preimage::PreimageResult;
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::sort_properties::{ExprProperties, SortProperties};
use datafusion::logical_expr::{ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDFImpl, Signature, Volatility};

use wire::schema::timestamp_type;

use super::bucket_grid::{Buckets, Width};

const DAY_US: i64 = 86_400_000_000;
/// After the width and `ts`: a zone, an origin and an offset.
const ARGUMENTS_MAX: usize = 5;

/// The function.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct TimeBucket {
    signature: Signature,
}

impl TimeBucket {
    pub(super) fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for TimeBucket {
    fn name(&self) -> &str {
        "time_bucket"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        Ok(arguments[1].clone())
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        if !(2..=ARGUMENTS_MAX).contains(&arguments.len()) {
            return plan_err!("time_bucket takes a width, a timestamp, and up to a zone, an origin and an offset");
        }
        coerce(arguments)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arguments = arguments.args;
        let constants = arguments
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != 1)
            .map(|(_, argument)| match argument {
                ColumnarValue::Scalar(value) => Ok(value.clone()),
                ColumnarValue::Array(_) => exec_err!("time_bucket: all arguments but the timestamp are constants"),
            })
            .collect::<Result<Vec<ScalarValue>>>()?;
        let kind = arguments[1].data_type();
        if constants[0].is_null() {
            return Ok(ColumnarValue::Scalar(ScalarValue::try_from(&kind)?));
        }
        let mut buckets = buckets(&constants[0], &kind, &constants[1..])?;
        match &arguments[1] {
            ColumnarValue::Array(instants) => Ok(ColumnarValue::Array(starts(&mut buckets, instants)?)),
            ColumnarValue::Scalar(instant) => {
                let starts = starts(&mut buckets, &instant.to_array()?)?;
                Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&starts, 0)?))
            }
        }
    }

    fn output_ordering(&self, inputs: &[ExprProperties]) -> Result<SortProperties> {
        Ok(if constant_but_instant(inputs) { inputs[1].sort_properties } else { SortProperties::Unordered })
    }

    fn preserves_lex_ordering(&self, inputs: &[ExprProperties]) -> Result<bool> {
        Ok(constant_but_instant(inputs))
    }

    fn preimage(&self, arguments: &[Expr], bucket: &Expr, info: &SimplifyContext) -> Result<PreimageResult> {
        let kind = info.get_data_type(&arguments[1])?;
        let Some(bucket) = constant(bucket).and_then(|bucket| bucket.cast_to(&kind).ok()) else {
            return Ok(PreimageResult::None);
        };
        let constants: Option<Vec<ScalarValue>> = arguments
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != 1)
            .map(|(_, argument)| constant(argument))
            .collect();
        let (Some(constants), DataType::Timestamp(unit, zone)) = (constants, &kind) else {
            return Ok(PreimageResult::None);
        };
        let per_us = per_us(*unit);
        let (Ok(mut buckets), Some(at)) = (buckets(&constants[0], &kind, &constants[1..]), micros(&bucket)) else {
            return Ok(PreimageResult::None);
        };
        let Some(next) = buckets.next(at).filter(|_| buckets.start(at) == Some(at)) else {
            return Ok(PreimageResult::None);
        };
        // Coarser units than a microsecond may not be able to say where the next bucket begins.
        let exact = |us: i64| match per_us {
            Scale::Finer(times) => us.checked_mul(times),
            Scale::Coarser(parts) => (us % parts == 0).then_some(us / parts),
        };
        let (Some(lower), Some(upper)) = (exact(at), exact(next)) else {
            return Ok(PreimageResult::None);
        };
        if scalar(*unit, lower, zone.clone()) != bucket {
            return Ok(PreimageResult::None);
        }
        let (lower, upper) = (scalar(*unit, lower, zone.clone()), scalar(*unit, upper, zone.clone()));
        Ok(PreimageResult::Range { expr: arguments[1].clone(), interval: Box::new(Interval::try_new(lower, upper)?) })
    }
}

fn constant_but_instant(inputs: &[ExprProperties]) -> bool {
    inputs.iter().enumerate().all(|(index, input)| index == 1 || input.sort_properties == SortProperties::Singleton)
}

/// The value of a constant expression; None when it is none, or null.
pub(crate) fn constant(expression: &Expr) -> Option<ScalarValue> {
    match expression {
        Expr::Literal(value, _) if !value.is_null() => Some(value.clone()),
        Expr::Cast(cast) => constant(&cast.expr)?.cast_to(cast.field.data_type()).ok(),
        _ => None,
    }
}

/// The types that a width, an instant and their companions are brought to.
pub(super) fn coerce(arguments: &[DataType]) -> Result<Vec<DataType>> {
    use DataType::{Date32, Date64, Interval, LargeUtf8, Null, Timestamp, Utf8, Utf8View};
    let micros = || Timestamp(TimeUnit::Microsecond, None);
    arguments
        .iter()
        .enumerate()
        .map(|(index, argument)| match (index, argument) {
            (1, Timestamp(..)) => Ok(argument.clone()),
            (1, Date32 | Date64) => Ok(micros()),
            (1, Utf8 | LargeUtf8 | Utf8View | Null) => Ok(Timestamp(TimeUnit::Microsecond, Some("UTC".into()))),
            (1, other) => plan_err!("time_bucket: the second argument is a timestamp, not {other}"),
            (_, Interval(_)) => Ok(Interval(IntervalUnit::MonthDayNano)),
            (_, Utf8 | LargeUtf8 | Utf8View | Null) => Ok(Utf8),
            (0, other) => plan_err!("time_bucket: the width is an INTERVAL or a text such as '5 minutes', not {other}"),
            (_, Timestamp(..) | Date32 | Date64) => Ok(argument.clone()),
            (_, other) => {
                plan_err!("time_bucket: after the timestamp come a zone, an origin or an offset, and not {other}")
            }
        })
        .collect()
}

/// The buckets of a call whose second argument is the event time; None when another is not constant, or wrong.
pub(crate) fn grid(arguments: &[Expr]) -> Option<Buckets> {
    let others = arguments.iter().enumerate().filter(|(index, _)| *index != 1);
    let constants = others.map(|(_, argument)| constant_argument(argument)).collect::<Option<Vec<_>>>()?;
    buckets(constants.first()?, &timestamp_type(), &constants[1..]).ok()
}

/// The value of a constant argument in the type that [`buckets`] knows.
pub(super) fn constant_argument(argument: &Expr) -> Option<ScalarValue> {
    let value = constant(argument)?;
    match value.data_type() {
        DataType::Interval(_) => value.cast_to(&DataType::Interval(IntervalUnit::MonthDayNano)).ok(),
        DataType::LargeUtf8 | DataType::Utf8View => value.cast_to(&DataType::Utf8).ok(),
        _ => Some(value),
    }
}

/// The buckets that these arguments tell; `kind` is the type of the instants.
pub(super) fn buckets(width: &ScalarValue, kind: &DataType, more: &[ScalarValue]) -> Result<Buckets> {
    let said = width;
    let width =
        interval(width).and_then(|width| Width::new(width.months, width.days, width.nanoseconds)).ok_or_else(|| {
            exec_datafusion_err!("time_bucket: a width is months, or days and shorter, and positive: {said}")
        })?;
    let mut zone = match kind {
        DataType::Timestamp(_, Some(name)) => name.parse::<Tz>().ok().filter(|zone| !is_utc(*zone)),
        _ => None,
    };
    let (mut origin, mut shift) = (None, (0, 0));
    for argument in more.iter().filter(|argument| !argument.is_null()) {
        match argument {
            ScalarValue::Utf8(Some(text)) => match text.parse::<Tz>() {
                Ok(named) => zone = Some(named),
                Err(_) => origin = Some(instant(argument).ok_or_else(|| neither(text))?),
            },
            ScalarValue::IntervalMonthDayNano(_) => shift = offset(argument)?,
            _ => origin = Some(instant(argument).ok_or_else(|| neither(&argument.to_string()))?),
        }
    }
    Buckets::new(width, zone.filter(|zone| !is_utc(*zone)), origin, shift)
        .ok_or_else(|| exec_datafusion_err!("time_bucket: this origin or offset does not fit the width {said}"))
}

fn is_utc(zone: Tz) -> bool {
    matches!(zone, Tz::UTC | Tz::Etc__UTC | Tz::Etc__GMT | Tz::GMT)
}

fn neither(text: &str) -> DataFusionError {
    exec_datafusion_err!("time_bucket: `{text}` is neither a time zone such as 'Europe/Copenhagen' nor a timestamp")
}

/// The parts of an interval, also of a text that names its units.
pub(crate) fn interval(value: &ScalarValue) -> Option<IntervalMonthDayNano> {
    match value {
        ScalarValue::IntervalMonthDayNano(parts) => *parts,
        ScalarValue::Utf8(Some(text)) if text.contains(char::is_alphabetic) => parse_interval_month_day_nano(text).ok(),
        _ => None,
    }
}

fn offset(value: &ScalarValue) -> Result<(i64, i64)> {
    let parts =
        interval(value).ok_or_else(|| exec_datafusion_err!("time_bucket: the offset {value} is no interval"))?;
    let us = i64::from(parts.days).checked_mul(DAY_US).and_then(|us| us.checked_add(parts.nanoseconds / 1_000));
    match us {
        Some(us) if parts.nanoseconds % 1_000 == 0 => Ok((i64::from(parts.months), us)),
        _ => exec_err!("time_bucket: the offset {value} is out of range"),
    }
}

/// An instant in microseconds, of a timestamp, a date or a text.
pub(crate) fn instant(value: &ScalarValue) -> Option<i64> {
    micros(&value.cast_to(&DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))).ok()?)
}

fn micros(value: &ScalarValue) -> Option<i64> {
    match value {
        ScalarValue::TimestampMicrosecond(us, _) => *us,
        ScalarValue::TimestampNanosecond(ns, _) => ns.map(|ns| ns.div_euclid(1_000)),
        ScalarValue::TimestampMillisecond(ms, _) => ms.and_then(|ms| ms.checked_mul(1_000)),
        ScalarValue::TimestampSecond(s, _) => s.and_then(|s| s.checked_mul(1_000_000)),
        _ => None,
    }
}

/// A unit beside the microsecond.
enum Scale {
    /// So many of it make a microsecond.
    Finer(i64),
    /// It is so many microseconds.
    Coarser(i64),
}

fn per_us(unit: TimeUnit) -> Scale {
    match unit {
        TimeUnit::Nanosecond => Scale::Finer(1_000),
        TimeUnit::Microsecond => Scale::Coarser(1),
        TimeUnit::Millisecond => Scale::Coarser(1_000),
        TimeUnit::Second => Scale::Coarser(1_000_000),
    }
}

fn scalar(unit: TimeUnit, value: i64, zone: Option<Arc<str>>) -> ScalarValue {
    match unit {
        TimeUnit::Nanosecond => ScalarValue::TimestampNanosecond(Some(value), zone),
        TimeUnit::Microsecond => ScalarValue::TimestampMicrosecond(Some(value), zone),
        TimeUnit::Millisecond => ScalarValue::TimestampMillisecond(Some(value), zone),
        TimeUnit::Second => ScalarValue::TimestampSecond(Some(value), zone),
    }
}

fn starts(buckets: &mut Buckets, instants: &ArrayRef) -> Result<ArrayRef> {
    match instants.data_type() {
        DataType::Timestamp(TimeUnit::Nanosecond, _) => of::<TimestampNanosecondType>(buckets, instants),
        DataType::Timestamp(TimeUnit::Microsecond, _) => of::<TimestampMicrosecondType>(buckets, instants),
        DataType::Timestamp(TimeUnit::Millisecond, _) => of::<TimestampMillisecondType>(buckets, instants),
        DataType::Timestamp(TimeUnit::Second, _) => of::<TimestampSecondType>(buckets, instants),
        other => exec_err!("time_bucket: {other} is no timestamp"),
    }
}

fn of<T: ArrowTimestampType>(buckets: &mut Buckets, instants: &ArrayRef) -> Result<ArrayRef> {
    let instants = instants.as_primitive::<T>();
    let mut start = |value: i64| match per_us(T::UNIT) {
        Scale::Finer(times) => buckets.start(value.div_euclid(times))?.checked_mul(times),
        Scale::Coarser(parts) => buckets.start(value.checked_mul(parts)?).map(|us| us.div_euclid(parts)),
    };
    let starts = instants
        .iter()
        .map(|value| {
            let Some(value) = value else {
                return Ok(None);
            };
            start(value).map(Some).ok_or_else(|| exec_datafusion_err!("time_bucket: a timestamp is out of range"))
        })
        .collect::<Result<PrimitiveArray<T>>>()?;
    let zone = match instants.data_type() {
        DataType::Timestamp(_, zone) => zone.clone(),
        _ => None,
    };
    Ok(Arc::new(starts.with_timezone_opt(zone)))
}
