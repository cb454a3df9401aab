//! The schema `pg_catalog`: that of `datafusion-pg-catalog` but for two tables.
//!
//! `pg_description`, what is said of tables and columns, is a question about `system.streams` and `system.columns`. `pg_class`
//! has two more columns that clients ask for, `reloptions` and `relacl`: no table has any.

use std::sync::{Arc, Weak};

use async_trait::async_trait;
use datafusion::catalog::{SchemaProvider, TableProvider};
use datafusion::common::{Result, ScalarValue};
use datafusion::datasource::{ViewTable, provider_as_source};
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::prelude::{cast, col, ident, lit};
use parking_lot::RwLock;

/// 1259 is `pg_class`, in every PostgreSQL.
const QUESTION: &str = "SELECT c.oid AS objoid, 1259 AS classoid, d.position AS objsubid, d.description AS description \
                        FROM pg_catalog.pg_class c JOIN system.columns d ON d.stream = c.relname \
                        WHERE d.description IS NOT NULL \
                        UNION ALL SELECT c.oid, 1259, 0, s.description \
                        FROM pg_catalog.pg_class c JOIN system.streams s ON s.name = c.relname \
                        WHERE s.description IS NOT NULL";

/// The schema `pg_catalog`.
#[derive(Debug)]
pub(super) struct Described {
    inner: Arc<dyn SchemaProvider>,
    /// The session that this schema is part of.
    session: Weak<RwLock<SessionState>>,
}

impl Described {
    pub(super) fn new(inner: Arc<dyn SchemaProvider>, session: Weak<RwLock<SessionState>>) -> Self {
        Self { inner, session }
    }
}

#[async_trait]
impl SchemaProvider for Described {
    fn table_names(&self) -> Vec<String> {
        self.inner.table_names()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        let Some(inner) = self.inner.table(name).await? else { return Ok(None) };
        let session = self.session.upgrade();
        Ok(Some(match (name, session) {
            ("pg_description", Some(session)) => {
                let state = session.read().clone();
                descriptions(&state, inner.as_ref()).await?
            }
            ("pg_class", _) => classes(inner)?,
            _ => inner,
        }))
    }

    fn table_exist(&self, name: &str) -> bool {
        self.inner.table_exist(name)
    }
}

/// What is said, in the columns of the table that it stands for.
async fn descriptions(state: &SessionState, empty: &dyn TableProvider) -> Result<Arc<dyn TableProvider>> {
    let plan = LogicalPlanBuilder::from(state.create_logical_plan(QUESTION).await?);
    let as_before =
        |field: &Arc<arrow_schema::Field>| cast(col(field.name()), field.data_type().clone()).alias(field.name());
    let columns: Vec<_> = empty.schema().fields().iter().map(as_before).collect();
    Ok(Arc::new(ViewTable::new(plan.project(columns)?.build()?, None)))
}

/// The tables, without options.
fn classes(inner: Arc<dyn TableProvider>) -> Result<Arc<dyn TableProvider>> {
    let fields = inner.schema();
    let none = ["reloptions", "relacl"].map(|name| lit(ScalarValue::Utf8(None)).alias(name));
    let columns = fields.fields().iter().map(|field| ident(field.name())).chain(none);
    let plan = LogicalPlanBuilder::scan("pg_class", provider_as_source(inner), None)?.project(columns)?.build()?;
    Ok(Arc::new(ViewTable::new(plan, None)))
}
