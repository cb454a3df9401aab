//! What is decided: a row of `alert_log`.

use super::super::episode::Episode;
use super::super::silence::Silence;
use crate::links::event::LinkEvent;

/// What became of an alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Transition {
    Pending,
    /// It ended before it fired.
    Dropped,
    Firing,
    Resolved,
    /// A row no longer holds, and the alert is kept firing; and a row that holds again.
    Clearing,
    Held,
    Repeated,
    Worse,
    /// Another origin raised it too, or no longer does.
    Merged,
    /// None of the edges that raise it was heard for long; and one of them was again.
    Stale,
    Heard,
    Acknowledged,
    Assigned,
    Commented,
    Silence,
    Unsilence,
    /// A link tells something.
    Event,
    /// Only how far the streams were read.
    Position,
}

impl Transition {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Dropped => "dropped",
            Self::Firing => "firing",
            Self::Resolved => "resolved",
            Self::Clearing => "clearing",
            Self::Held => "held",
            Self::Repeated => "repeated",
            Self::Worse => "worse",
            Self::Merged => "merged",
            Self::Stale => "stale",
            Self::Heard => "heard",
            Self::Acknowledged => "acknowledged",
            Self::Assigned => "assigned",
            Self::Commented => "commented",
            Self::Silence => "silence",
            Self::Unsilence => "unsilence",
            Self::Event => "event",
            Self::Position => "position",
        }
    }
}

/// What a change is about.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Subject {
    Alert(Box<Episode>),
    Silence(Silence),
    Event(Box<LinkEvent>),
    Position,
}

/// A row of `alert_log`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Change {
    pub(crate) sequence: i64,
    pub(crate) transition: Transition,
    /// Event time, and when it was decided, µs.
    pub(crate) ts: i64,
    pub(crate) at: i64,
    pub(crate) told: bool,
    pub(crate) actor: Option<String>,
    pub(crate) note: Option<String>,
    pub(crate) subject: Subject,
}
