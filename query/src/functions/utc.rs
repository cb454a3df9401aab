//! `date_trunc` of times in UTC, by arithmetic.
//!
//! DataFusion's own takes every value apart in its zone, which for UTC gives what arithmetic on the instant gives, at a
//! tenth of the speed. All else is its own.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_schema::{DataType, FieldRef, TimeUnit};
use datafusion::common::Result;
use datafusion::functions::datetime;
use datafusion::logical_expr::sort_properties::{ExprProperties, SortProperties};
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
};
use wire::schema::timestamp_type;

/// The function, for a session that has DataFusion's under the same name.
pub(crate) fn date_trunc() -> ScalarUDF {
    ScalarUDF::new_from_impl(DateTrunc(datetime::date_trunc()))
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct DateTrunc(Arc<ScalarUDF>);

impl ScalarUDFImpl for DateTrunc {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn aliases(&self) -> &[String] {
        self.0.aliases()
    }

    fn signature(&self) -> &Signature {
        self.0.signature()
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        self.0.return_type(arguments)
    }

    fn return_field_from_args(&self, arguments: ReturnFieldArgs) -> Result<FieldRef> {
        self.0.return_field_from_args(arguments)
    }

    fn invoke_with_args(&self, mut arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let utc = match &arguments.args[..] {
            [_, ColumnarValue::Array(times)] if *times.data_type() == timestamp_type() => Some(Arc::clone(times)),
            _ => None,
        };
        let Some(times) = utc else { return self.0.invoke_with_args(arguments) };
        let without_zone = times.as_primitive::<TimestampMicrosecondType>().clone().with_timezone_opt(None::<&str>);
        let zoneless = DataType::Timestamp(TimeUnit::Microsecond, None);
        arguments.args[1] = ColumnarValue::Array(Arc::new(without_zone));
        arguments.arg_fields[1] = Arc::new(arguments.arg_fields[1].as_ref().clone().with_data_type(zoneless.clone()));
        arguments.return_field = Arc::new(arguments.return_field.as_ref().clone().with_data_type(zoneless));
        match self.0.invoke_with_args(arguments)? {
            ColumnarValue::Array(cut) => {
                let cut = cut.as_primitive::<TimestampMicrosecondType>().clone();
                Ok(ColumnarValue::Array(Arc::new(cut.with_data_type(timestamp_type()))))
            }
            ColumnarValue::Scalar(cut) => Ok(ColumnarValue::Scalar(cut.cast_to(&timestamp_type())?)),
        }
    }

    fn output_ordering(&self, input: &[ExprProperties]) -> Result<SortProperties> {
        self.0.output_ordering(input)
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.0.documentation()
    }
}

#[cfg(test)]
mod tests {
    use datafusion::prelude::SessionContext;

    use super::*;

    #[tokio::test]
    async fn it_cuts_as_the_library_does() {
        let ours = SessionContext::new();
        ours.register_udf(date_trunc());
        let (theirs, mut found) = (SessionContext::new(), Vec::new());
        for part in ["year", "quarter", "month", "week", "day", "hour", "minute", "second", "millisecond"] {
            let sql = format!(
                "SELECT v, date_trunc('{part}', arrow_cast(v, 'Timestamp(Microsecond, Some(\"UTC\"))')) AS cut \
                 FROM (VALUES (-1), (0), (NULL), (1409999999999999), (-99999999999999), (951782400000001)) AS t(v)"
            );
            let rows = async |context: &SessionContext| context.sql(&sql).await.unwrap().collect().await.unwrap();
            let cut = rows(&ours).await;
            assert_eq!(cut, rows(&theirs).await, "{part}");
            assert_eq!(*cut[0].column(1).data_type(), timestamp_type());
            found.push(cut);
        }
        assert!(found.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
