//! Listens to server-sent events as a browser does: it comes back with the last id that it has.

use std::time::Instant;

use futures::StreamExt;
use serde_json::Value;

use crate::process::{PATIENCE, POLL};

/// See the module.
pub(crate) struct Listener {
    url: String,
    pub(crate) last: Option<String>,
    stream: Option<futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>>,
    buffer: String,
}

impl Listener {
    /// Of this stream; not connected.
    pub(crate) fn new(url: String) -> Self {
        Self { url, last: None, stream: None, buffer: String::new() }
    }

    /// Waits until it is taken.
    pub(crate) async fn connect(&mut self) {
        let begun = Instant::now();
        loop {
            let mut get = reqwest::Client::new().get(&self.url);
            if let Some(last) = &self.last {
                get = get.header("last-event-id", last);
            }
            match get.send().await {
                Ok(answer) if answer.status().is_success() => {
                    (self.stream, self.buffer) =
                        (Some(answer.bytes_stream().map(|bytes| bytes.map(Into::into)).boxed()), String::new());
                    return;
                }
                other => {
                    assert!(begun.elapsed() < PATIENCE, "{other:?}");
                    tokio::time::sleep(POLL).await;
                }
            }
        }
    }

    /// The data of the next event, over as many connections as it takes. Ids that are numbers grow.
    pub(crate) async fn next(&mut self) -> Value {
        let next = async {
            loop {
                if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                    let line = |key: &str| {
                        event.lines().find_map(|line| line.strip_prefix(key)).map(|text| text.trim().to_owned())
                    };
                    let (id, data) = (line("id:"), line("data:"));
                    self.buffer = rest.to_owned();
                    let (Some(id), Some(data)) = (id, data) else { continue };
                    if let (Ok(id), Some(Ok(last))) = (id.parse::<i64>(), self.last.as_deref().map(str::parse::<i64>)) {
                        assert!(last < id, "{id} behind {last}");
                    }
                    self.last = Some(id);
                    return serde_json::from_str(&data).unwrap();
                }
                match self.stream.as_mut() {
                    None => self.connect().await,
                    Some(stream) => match stream.next().await {
                        Some(Ok(bytes)) => self.buffer.push_str(std::str::from_utf8(&bytes).unwrap()),
                        _ => self.stream = None,
                    },
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("an event comes")
    }
}
