//! What a link tells: an event with a place in the sequence of all that is told, on a topic or for one target.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::alerts::Severity;

/// An event as `alert_log` keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LinkEvent {
    /// That of the hop: what was told before a crash is not told again.
    pub(crate) id: String,
    pub(crate) link: String,
    /// Links that the alert has come through, with this one.
    pub(crate) hops: u32,
    pub(crate) topic: String,
    /// The one target that is told; everyone who listens to the topic when there is none.
    pub(crate) only: Option<String>,
    pub(crate) severity: Severity,
    /// What the link says of it.
    pub(crate) payload: String,
    /// What the link has heard: the alert.
    pub(crate) data: Map<String, Value>,
}

impl LinkEvent {
    /// A CloudEvent. Its data has what the link has heard, and `link`, `hops`, `payload` and the `cause`, a sequence.
    pub(crate) fn body(&self, sequence: i64, time: Option<String>) -> String {
        let mut data = self.data.clone();
        let cause = data.insert("sequence".to_owned(), sequence.into());
        data.insert("cause".to_owned(), cause.unwrap_or_default());
        data.insert("link".to_owned(), self.link.clone().into());
        data.insert("hops".to_owned(), self.hops.into());
        data.insert("payload".to_owned(), self.payload.clone().into());
        let text = json!({
            "specversion": "1.0",
            "id": self.id,
            "source": "weir/links",
            "type": "weir.link.event",
            "subject": self.topic,
            "time": time,
            "datacontenttype": "application/json",
            "data": data,
        });
        text.to_string()
    }
}
