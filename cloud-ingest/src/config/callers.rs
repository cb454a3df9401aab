//! `[[edge]]`: who may write; `[[reader]]`: who may ask.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use wire::EdgeId;
use wire::ids::OWN_EDGE;

/// One edge that may write.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSettings {
    pub id: EdgeId,
    pub token: String,
}

impl fmt::Debug for EdgeSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeSettings").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One who may ask.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReaderSettings {
    pub name: String,
    pub password: String,
    /// The edges whose rows it sees (`*` stands for any characters); all when none are set.
    pub edges: Option<Vec<String>>,
    /// The condition of the rows that it sees, as SQL; all when none is set.
    pub scope: Option<String>,
    /// The lanes that it may use, its own first; `default` when none is set.
    #[serde(default)]
    pub lanes: Vec<String>,
    /// What it may do beside asking.
    #[serde(default)]
    pub rights: Vec<ReaderRight>,
}

/// What a reader may do beside asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReaderRight {
    /// Say what tables and columns are, for everybody to read.
    Comment,
    /// Make and drop views.
    Views,
    /// Change the rules of alerts.
    Rules,
    /// Acknowledge alerts, and silence them.
    Alerts,
    /// Change links.
    Links,
}

impl fmt::Debug for ReaderSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReaderSettings").field("name", &self.name).finish_non_exhaustive()
    }
}

pub(super) fn check(edges: &[EdgeSettings], readers: &[ReaderSettings]) -> Result<(), String> {
    let mut ids = HashSet::new();
    for edge in edges {
        if !ids.insert(&edge.id) {
            return Err(format!("[[edge]] `{}` is there twice", edge.id));
        }
        if edge.id.as_str() == OWN_EDGE {
            return Err(format!("[[edge]] `{OWN_EDGE}` is what the cloud calls itself: choose another id"));
        }
        if edge.token.is_empty() {
            return Err(format!("[[edge]] `{}` has an empty token", edge.id));
        }
    }
    let mut names = HashSet::new();
    if let Some(reader) = readers.iter().find(|reader| !names.insert(&reader.name)) {
        return Err(format!("[[reader]] `{}` is there twice", reader.name));
    }
    if let Some(reader) = readers.iter().find(|reader| reader.password.is_empty()) {
        return Err(format!("[[reader]] `{}` has an empty password", reader.name));
    }
    let limited = |reader: &&ReaderSettings| reader.edges.is_some() || reader.scope.is_some();
    let sees_all = |right: &ReaderRight| *right != ReaderRight::Comment;
    if let Some(reader) = readers.iter().filter(limited).find(|reader| reader.rights.iter().any(sees_all)) {
        return Err(format!(
            "[[reader]] `{}` sees a part of the rows, and views, rules and links are made of all: leave edges and scope out, \
             or every right but \"comment\"",
            reader.name
        ));
    }
    Ok(())
}
