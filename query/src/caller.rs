//! Who asks: the reader, the door it came through, what it may see, and which lane its statements run in.
//!
//! Every statement has a caller, so that none runs without somebody's rights. A door makes it from a proven name
//! (`serve::Readers`); the node itself asks as [`Caller::node`].

use std::fmt;
use std::sync::Arc;

use crate::scope::Scope;

/// The lane of a reader for whom the configuration names none.
pub const DEFAULT_LANE: &str = "default";

/// Where a statement came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Http,
    FlightSql,
    Postgres,
    /// The node itself.
    Node,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::FlightSql => "flight_sql",
            Self::Postgres => "postgres",
            Self::Node => "node",
        })
    }
}

/// What one may do beside asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Say what tables and columns are, for everybody to read.
    Comment,
    /// Make and drop views.
    Views,
    /// Change the rules of alerts.
    Rules,
    /// Speak about alerts, and silence them.
    Alerts,
    /// Change links.
    Links,
}

impl Right {
    /// Every one of them.
    pub const ALL: [Self; 5] = [Self::Comment, Self::Views, Self::Rules, Self::Alerts, Self::Links];
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Comment => "comment",
            Self::Views => "views",
            Self::Rules => "rules",
            Self::Alerts => "alerts",
            Self::Links => "links",
        })
    }
}

/// One who asks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Caller {
    name: Arc<str>,
    door: Door,
    scope: Option<Arc<Scope>>,
    lane: Arc<str>,
    lanes: Arc<[String]>,
    rights: Arc<[Right]>,
}

impl Caller {
    /// A reader at a door. It runs in the first of its lanes; without a scope it sees every row.
    pub fn new(name: &str, door: Door, scope: Option<Arc<Scope>>, lanes: Arc<[String]>) -> Self {
        let lane = lanes.first().map_or(DEFAULT_LANE, String::as_str).into();
        Self { name: name.into(), door, scope, lane, lanes, rights: Arc::new([]) }
    }

    /// The same caller, who may do this beside asking.
    #[must_use]
    pub fn with_rights(self, rights: Arc<[Right]>) -> Self {
        Self { rights, ..self }
    }

    /// The node itself: sees everything.
    pub fn node() -> Self {
        Self::new("weir", Door::Node, None, Arc::new([]))
    }

    /// The reader's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it came in.
    pub fn door(&self) -> Door {
        self.door
    }

    /// What it may see; everything when there is none.
    pub(crate) fn scope(&self) -> Option<&Arc<Scope>> {
        self.scope.as_ref()
    }

    /// The lane that its statements run in.
    pub fn lane(&self) -> &str {
        &self.lane
    }

    /// The same caller in another lane that it may use.
    ///
    /// # Errors
    /// The lanes that it may use, in words.
    pub fn in_lane(&self, lane: &str) -> Result<Self, String> {
        let own = |name: &str| self.lanes.iter().any(|own| own == name);
        if own(lane) || self.lanes.is_empty() && lane == DEFAULT_LANE {
            return Ok(Self { lane: lane.into(), ..self.clone() });
        }
        let names = if self.lanes.is_empty() { DEFAULT_LANE.to_owned() } else { self.lanes.join(", ") };
        Err(format!("`{}` may not run in lane `{lane}`; there are: {names}", self.name))
    }

    /// Whether it may do this.
    pub(crate) fn may(&self, right: Right) -> bool {
        self.rights.contains(&right)
    }

    /// Whether it may see and end the statements of this reader.
    pub(crate) fn may_manage(&self, name: &str) -> bool {
        self.scope.is_none() || self.name() == name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_chosen_among_ones_own() {
        let lanes: Arc<[String]> = Arc::new(["dashboard".to_owned(), "reports".to_owned()]);
        let caller = Caller::new("a", Door::Http, None, lanes);
        assert_eq!(caller.lane(), "dashboard");
        assert_eq!(caller.in_lane("reports").unwrap().lane(), "reports");
        assert!(caller.in_lane("default").unwrap_err().contains("dashboard, reports"));
        let plain = Caller::new("b", Door::Http, None, Arc::new([]));
        assert_eq!(plain.in_lane("default").unwrap().lane(), "default");
        assert!(plain.in_lane("reports").is_err());
    }
}
