//! Names of streams that this node's views fill, beside those that the cloud always does (`is_cloud_stream`): whoever has a token
//! could else write what a view says, and raise the alerts that rules make of it.
//!
//! What a batch of an edge may be refused for is told from its bytes alone, and which views there are is not: such a batch is
//! pushed back, and the edge holds it, until the view or the stream is called otherwise. A row of the doors goes to `quarantine`.

use std::fmt;
use std::sync::{Arc, OnceLock};

use wire::StreamName;

type Own = Box<dyn Fn(&StreamName) -> bool + Send + Sync>;

/// See the module. Copies know the same names.
#[derive(Clone, Default)]
pub struct OwnNames(Arc<OnceLock<Own>>);

impl fmt::Debug for OwnNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnNames")
    }
}

impl OwnNames {
    /// Says which they are. To be said once, before anybody writes.
    pub fn set(&self, own: impl Fn(&StreamName) -> bool + Send + Sync + 'static) {
        drop(self.0.set(Box::new(own)));
    }

    /// Whether nobody else may write there.
    pub(crate) fn has(&self, stream: &StreamName) -> bool {
        self.0.get().is_some_and(|own| own(stream))
    }
}

/// Why nobody else may.
pub(crate) fn refusal(stream: &StreamName) -> String {
    format!("{stream} is what the cloud alone writes: give the stream another name")
}
