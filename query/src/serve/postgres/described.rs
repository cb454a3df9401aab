//! `pg_catalog.pg_description`: what is said of tables and columns, as PostgreSQL's clients look for it.
//!
//! The schema is that of `datafusion-pg-catalog` but for this one table, which is a question about `system.streams` and
//! `system.columns`.

use std::sync::{Arc, Weak};

use async_trait::async_trait;
use datafusion::catalog::{SchemaProvider, TableProvider};
use datafusion::common::Result;
use datafusion::datasource::ViewTable;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::prelude::{cast, col};
use parking_lot::RwLock;

const TABLE: &str = "pg_description";
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
        let inner = self.inner.table(name).await?;
        let (Some(empty), TABLE, Some(session)) = (&inner, name, self.session.upgrade()) else { return Ok(inner) };
        let state = session.read().clone();
        let plan = LogicalPlanBuilder::from(state.create_logical_plan(QUESTION).await?);
        let as_before =
            |field: &Arc<arrow_schema::Field>| cast(col(field.name()), field.data_type().clone()).alias(field.name());
        let columns: Vec<_> = empty.schema().fields().iter().map(as_before).collect();
        Ok(Some(Arc::new(ViewTable::new(plan.project(columns)?.build()?, None))))
    }

    fn table_exist(&self, name: &str) -> bool {
        self.inner.table_exist(name)
    }
}
