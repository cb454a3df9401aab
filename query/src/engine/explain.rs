//! Errors in the words of the person who asked.

use std::time::Duration;

use datafusion::common::{DataFusionError, SchemaError};
use geoarrow_schema::error::GeoArrowError;

use super::Engine;
use crate::as_of;

/// Why a statement has no answer. The text is meant for the person who asked.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    #[error("{message}")]
    Syntax { message: String },
    #[error("{message}")]
    UnknownTable { message: String, hint: Option<String> },
    #[error("{message}")]
    UnknownColumn { message: String, hint: Option<String> },
    #[error("Weir answers questions only: {message}")]
    ReadOnly { message: String },
    #[error("{message}")]
    Denied { message: String },
    #[error("the statement ran longer than {}", humane(*limit))]
    Timeout { limit: Duration },
    #[error("the statement needs more memory than is set aside: {message}")]
    Memory { message: String },
    #[error("the statement was cancelled")]
    Cancelled,
    #[error("too many statements wait in lane `{lane}`: try again later")]
    Busy { lane: String },
    #[error("{message}")]
    TooMuch { message: String },
    #[error("{message}")]
    Invalid { message: String },
    #[error("{message}")]
    Failed { message: String },
}

impl QueryError {
    /// What to do about it, when that is known.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::UnknownTable { hint, .. } | Self::UnknownColumn { hint, .. } => hint.as_deref(),
            _ => None,
        }
    }

    /// Whether less of the same could be answered.
    pub(crate) fn is_too_much(&self) -> bool {
        matches!(self, Self::TooMuch { .. } | Self::Memory { .. } | Self::Timeout { .. })
    }
}

/// What DataFusion names when statements have spilled as much as they may: an error of the disk, in any of its wrappings.
const SPILLED: &str = "datafusion.runtime.max_temp_directory_size";

fn humane(limit: Duration) -> String {
    if limit.subsec_nanos() == 0 { format!("{} s", limit.as_secs()) } else { format!("{} ms", limit.as_millis()) }
}

impl Engine {
    /// An error in the words of the person who asked, with the nearest name when one is unknown.
    pub fn explain(&self, error: DataFusionError) -> QueryError {
        let place = error
            .diagnostic()
            .and_then(|diagnostic| diagnostic.span)
            .map(|span| format!(" at line {}, column {}", span.start.line, span.start.column))
            .unwrap_or_default();
        let root = error.find_root();
        if root.to_string().contains(SPILLED) {
            let message = "what it spills to disk is more than `[query] spill_bytes` allows for all of them together";
            return QueryError::Memory { message: message.to_owned() };
        }
        match root {
            DataFusionError::SQL(parser, _) => QueryError::Syntax { message: format!("{parser}{place}") },
            DataFusionError::SchemaError(schema, _) => match schema.as_ref() {
                SchemaError::FieldNotFound { field, valid_fields } => {
                    let names: Vec<&str> = valid_fields.iter().map(|column| column.name.as_str()).collect();
                    QueryError::UnknownColumn {
                        message: format!("no column `{}`{place}", field.name),
                        hint: nearest(&field.name, &names).or_else(|| {
                            Some("there are no columns here: name a table after FROM, or put text into 'quotes'".into())
                        }),
                    }
                }
                other => QueryError::Invalid { message: format!("{other}{place}") },
            },
            DataFusionError::ResourcesExhausted(message) => QueryError::Memory { message: message.clone() },
            DataFusionError::Plan(message) => self.explain_plan(message, &place),
            DataFusionError::NotImplemented(message) => {
                QueryError::Invalid { message: format!("not supported: {message}") }
            }
            DataFusionError::External(external) if external.is::<Stopped>() => {
                external.downcast_ref::<Stopped>().map_or(QueryError::Cancelled, Stopped::told)
            }
            DataFusionError::External(external) if external.is::<Changes>() => {
                QueryError::ReadOnly { message: external.to_string() }
            }
            DataFusionError::Execution(message) | DataFusionError::Configuration(message) => {
                QueryError::Invalid { message: message.clone() }
            }
            DataFusionError::ArrowError(arrow, _) => QueryError::Invalid { message: arrow.to_string() },
            DataFusionError::External(external) if external.is::<GeoArrowError>() => {
                QueryError::Invalid { message: external.to_string() }
            }
            other => QueryError::Failed { message: other.strip_backtrace() },
        }
    }

    fn explain_plan(&self, message: &str, place: &str) -> QueryError {
        let quoted = message.split('\'').nth(1);
        match quoted {
            Some(table) if message.contains("not found") && message.starts_with("table ") => {
                let name = as_of::parts(table.rsplit('.').next().unwrap_or(table)).0;
                let streams = self.tables.streams();
                let names: Vec<&str> = streams.iter().map(wire::StreamName::as_str).collect();
                let none = || "there is no table yet: a table appears with its first batch".to_owned();
                QueryError::UnknownTable {
                    message: format!("no table `{name}`{place}"),
                    hint: nearest(name, &names).or_else(|| Some(none())),
                }
            }
            _ => QueryError::Invalid { message: format!("{message}{place}") },
        }
    }
}

/// A plan that would change something.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Changes(pub(super) String);

/// Why a statement ended before its last row.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Stopped {
    #[error("the statement ran too long")]
    Overdue(Duration),
    #[error("the statement was cancelled")]
    Cancelled,
    #[error("{0}")]
    TooMuch(String),
}

impl Stopped {
    pub(super) fn told(&self) -> QueryError {
        match self {
            Self::Overdue(limit) => QueryError::Timeout { limit: *limit },
            Self::Cancelled => QueryError::Cancelled,
            Self::TooMuch(message) => QueryError::TooMuch { message: message.clone() },
        }
    }
}

impl From<Stopped> for DataFusionError {
    fn from(stopped: Stopped) -> Self {
        Self::External(Box::new(stopped))
    }
}

/// "did you mean" for a name, or the names there are, if any.
fn nearest(name: &str, names: &[&str]) -> Option<String> {
    let best = names
        .iter()
        .map(|candidate| (strsim::jaro_winkler(&name.to_lowercase(), candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, candidate)) if likeness > 0.7 => Some(format!("did you mean `{candidate}`?")),
        Some(_) => Some(format!("there are: {}", names.join(", "))),
        None => None,
    }
}
