//! What can be set of views that run for ever: where their definitions are, how many, what they may take, and who is told.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use url::Url;
use wire::StreamName;
use wire::written::{Size, Span};

use super::alerts::{PublishKind, Way, attempts, check_names, timeout, url, way};

/// Limits of all views of a node, and of the lane that they ask in.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ViewsSettings {
    /// A directory of `.sql` files, a view each.
    pub directory: Option<PathBuf>,
    pub max: usize,
    /// Bytes of one definition.
    pub definition_bytes: Size,
    /// Shortest time between two looks at what is new.
    pub pause: Span,
    /// Rows and bytes of one answer; a piece of history that has more is asked in smaller ones.
    pub answer_rows: usize,
    pub answer_bytes: Size,
    /// Windows of each view whose last word is remembered.
    pub windows: usize,
    /// How often a view that has nothing to say writes down how far it has read.
    pub record_every: Span,
    /// Of the lane: questions at a time, and of each its time and memory; and the lane's threads.
    pub running: usize,
    pub timeout: Span,
    pub statement_bytes: Size,
    pub threads: usize,
    /// Who is told of what views say.
    pub publish: Vec<ViewPublishSettings>,
}

/// One who is told of what a view says.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewPublishSettings {
    /// Names its place in what the view says: another name begins anew.
    pub name: String,
    pub view: StreamName,
    pub kind: PublishKind,
    #[serde(deserialize_with = "url")]
    pub url: Url,
    /// Of MQTT; `views/<view>` unless set.
    pub topic: Option<String>,
    /// Of a webhook: the key of its signature.
    pub secret: Option<String>,
    /// Of one request.
    #[serde(default = "timeout")]
    pub timeout: Span,
    /// Then it is given up. Of MQTT: connections that were lost over one message.
    #[serde(default = "attempts")]
    pub attempts: u32,
    pub client_id: Option<String>,
    pub username: Option<String>,
    pub password: Option<String>,
    /// Certificates (PEM) to trust for mqtts; those of the system unless set.
    pub ca_file: Option<PathBuf>,
    /// The node's own certificate and key (PEM), both or none.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

impl fmt::Debug for ViewPublishSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ViewPublishSettings")
            .field("name", &self.name)
            .field("view", &self.view)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl ViewPublishSettings {
    /// How it is reached.
    pub fn way(&self) -> Way<'_> {
        way!(self)
    }

    fn check(&self) -> Result<(), String> {
        let here = format!("[[views.publish]] `{}`", self.name);
        if self.kind == PublishKind::Alertmanager {
            return Err(format!("{here}: Alertmanager is told of alerts: kind is webhook or mqtt"));
        }
        if let Some(topic) = &self.topic
            && (self.kind != PublishKind::Mqtt
                || topic.is_empty()
                || topic.len() > 1_024
                || topic.contains(['+', '#', '\0']))
        {
            return Err(format!("{here}: topic is of mqtt, has from 1 to 1024 bytes, and no wildcards"));
        }
        self.way().check(&here)
    }
}

impl Default for ViewsSettings {
    fn default() -> Self {
        Self {
            directory: None,
            max: 64,
            definition_bytes: Size(64 << 10),
            pause: Span(Duration::from_millis(50)),
            answer_rows: 1_000_000,
            answer_bytes: Size(256 << 20),
            windows: 100_000,
            record_every: Span(Duration::from_secs(60)),
            running: 2,
            timeout: Span(Duration::from_secs(60)),
            statement_bytes: Size(256 << 20),
            threads: 1,
            publish: Vec::new(),
        }
    }
}

impl ViewsSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.running == 0 || self.threads == 0 {
            return Err("[views] running and threads must be at least 1".to_owned());
        }
        if self.pause.0 < Duration::from_millis(1) {
            return Err("[views] pause must be at least 1ms".to_owned());
        }
        if self.answer_rows < 1_000 {
            return Err("[views] answer_rows must be at least 1000".to_owned());
        }
        check_names("views.publish", self.publish.iter().map(|target| target.name.as_str()))?;
        self.publish.iter().try_for_each(ViewPublishSettings::check)
    }
}
