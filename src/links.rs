//! Brings the commands of links to the edges of the node in the same process.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cloud_ingest::Commands;
use cloud_ingest::commands::Ended;
use query::links::{Carried, Courier};
use wire::Command;

/// The commands that wait in this process.
#[derive(Debug)]
pub(crate) struct NodeCourier(pub(crate) Arc<Commands>);

#[async_trait]
impl Courier for NodeCourier {
    fn knows(&self, edge: &str) -> bool {
        self.0.knows(edge)
    }

    async fn carry(&self, edge: &str, command: Command, within: Duration) -> Carried {
        match self.0.ask(edge, command, within).await {
            Ended::Answered(reply) => Carried::Answered(reply),
            Ended::TimedOut { fetched } => Carried::TimedOut { fetched },
            Ended::Refused(reason) => Carried::Refused(reason),
        }
    }
}
