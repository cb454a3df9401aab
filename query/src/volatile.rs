//! Functions that do not give the same answer for the same arguments: what runs for ever is made of rows and event times,
//! and refuses them.

use datafusion::logical_expr::{Expr, Volatility, WindowFunctionDefinition};

/// The function of a call that may give another answer for the same arguments, and how soon: `Stable` in another statement
/// (`now()`), `Volatile` each time (`random()`). Looks at the call alone, not at its arguments.
pub(crate) fn call(expr: &Expr) -> Option<(&str, Volatility)> {
    let (name, volatility) = match expr {
        Expr::ScalarFunction(call) => (call.func.name(), call.func.signature().volatility),
        Expr::AggregateFunction(call) => (call.func.name(), call.func.signature().volatility),
        Expr::WindowFunction(call) => match &call.fun {
            WindowFunctionDefinition::AggregateUDF(function) => (function.name(), function.signature().volatility),
            WindowFunctionDefinition::WindowUDF(function) => (function.name(), function.signature().volatility),
        },
        _ => return None,
    };
    (volatility != Volatility::Immutable).then_some((name, volatility))
}
