//! Rules as they are written, and what is made of them.
//!
//! ```toml
//! [[rule]]
//! name = "congestion"
//! on = "traffic_5m"                                # words of the edge: the same rule there has the same hash
//! when = "avg_speed_avg < 20"
//! for = "10m"
//! message = "{{ device }}: {{ avg_speed_avg | round(1) }} km/h"
//! topic = "alerts/traffic/{device}/congestion"
//! ```
//! Instead of `on` and `when`: `sql = "SELECT …"`, each row of which is an alert whose labels are its text columns; or `on` and
//! `absent = "15m"`, with `by = ["_edge"]` for something else than devices. What a rule is on decides how it is evaluated
//! ([`Kind`], `rule/reads.rs`): filters and projections over one stream row by row, everything else by asking every `every`.

mod reads;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ring::digest::{SHA256, digest};
use serde::Deserialize;
use wire::StreamName;
use wire::written::{Span, with_nearest_key};

pub(crate) use self::reads::RowsOnly;
use self::reads::{Below, check_functions, plan, rows_only};
use super::episode::{Policy, Severity};
use super::episodes::USUAL_TOPIC;
use super::rows::{LABELS_MAX, RowRule, Shape};
use super::template::{Message, Places};
use crate::caller::{Caller, Door};
use crate::engine::Engine;

/// Rules at a time.
pub const RULES_MAX: usize = 10_000;
/// Longest text of one rule.
pub const RULE_BYTES_MAX: usize = 64 << 10;
/// The lane in which rules ask.
pub const LANE: &str = "alerts";
const NAME_BYTES_MAX: usize = 63;
const INSTANCES_MAX: u32 = 100_000;

/// A rule as it is written.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSettings {
    #[serde(default)]
    pub name: String,
    /// A SELECT that returns a row for each alert.
    pub sql: Option<String>,
    /// Or a stream, with a condition, or a silence.
    pub on: Option<StreamName>,
    pub when: Option<String>,
    /// The alert ends when it is true and `when` is not; without it, when `when` is false.
    pub until: Option<String>,
    pub absent: Option<Span>,
    /// What is absent: these columns together. A device, unless said otherwise.
    #[serde(default)]
    pub by: Vec<String>,
    /// How long it must hold, in event time, before the alert fires.
    #[serde(rename = "for", default = "nothing")]
    pub hold: Span,
    /// How long it must not hold before the alert ends.
    #[serde(default = "nothing")]
    pub keep_firing_for: Span,
    #[serde(default)]
    pub severity: Severity,
    /// Texts with places; alerts that differ in these are alerts of their own.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default = "usual_message")]
    pub message: String,
    pub topic: Option<String>,
    /// Told again so often while it fires and nobody has acknowledged it.
    pub repeat_every: Option<Span>,
    /// Nobody is told while one of these fires and no label of it says something else.
    #[serde(default)]
    pub inhibited_by: Vec<String>,
    /// The column that says how bad it is, and by how much more is worse.
    pub value: Option<String>,
    pub worse_by: Option<f64>,
    /// How late an edge's alert may be to be the same as the cloud's.
    #[serde(default = "nothing")]
    pub lateness: Span,
    /// How often a SELECT is asked that cannot be followed row by row.
    #[serde(default = "every")]
    pub every: Span,
    #[serde(default = "instances_max")]
    pub max_instances: u32,
}

fn nothing() -> Span {
    Span(Duration::ZERO)
}

fn usual_message() -> String {
    "{{ rule }}: {{ device }}".to_owned()
}

fn every() -> Span {
    Span(Duration::from_secs(10))
}

fn instances_max() -> u32 {
    10_000
}

/// What a file of rules holds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    #[serde(default)]
    rule: Vec<RuleSettings>,
}

impl RuleSettings {
    /// Reads a file of `[[rule]]`.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn parse_file(text: &str) -> Result<Vec<Self>, String> {
        let file: RuleFile = toml::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?;
        for rule in &file.rule {
            rule.check()?;
        }
        Ok(file.rule)
    }

    /// Reads one rule, its keys at the top, as TOML or JSON; its name may be left out.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        if text.len() > RULE_BYTES_MAX {
            return Err(format!("a rule of more than {RULE_BYTES_MAX} bytes"));
        }
        let mut rule: Self = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?
        } else {
            toml::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?
        };
        if rule.name.is_empty() {
            name.clone_into(&mut rule.name);
        }
        if rule.name != name {
            return Err(format!("the rule calls itself `{}`, and its address `{name}`", rule.name));
        }
        rule.check()?;
        Ok(rule)
    }

    /// What can be said without tables.
    fn check(&self) -> Result<(), String> {
        check_name(&self.name)?;
        let here = format!("[[rule]] `{}`", self.name);
        let forms = (&self.sql, &self.on, &self.when, &self.absent);
        match forms {
            (Some(_), None, None, None) | (None, Some(_), Some(_), None) | (None, Some(_), None, Some(_)) => {}
            _ => {
                return Err(format!(
                    "{here}: write `sql`, a SELECT; or `on`, a stream, with `when`, a condition, or `absent`, a duration"
                ));
            }
        }
        if self.until.is_some() && self.when.is_none() {
            return Err(format!("{here}: `until` goes with `when`"));
        }
        if !self.by.is_empty() && self.absent.is_none() {
            return Err(format!("{here}: `by` goes with `absent`"));
        }
        if self.absent.is_some_and(|absent| absent.0 < Duration::from_secs(1)) {
            return Err(format!("{here}: absent is less than 1s"));
        }
        if self.every.0 < Duration::from_secs(1) {
            return Err(format!("{here}: every is less than 1s"));
        }
        if self.repeat_every.is_some_and(|every| every.0 < Duration::from_secs(10)) {
            return Err(format!("{here}: repeat_every is less than 10s"));
        }
        if !(1..=INSTANCES_MAX).contains(&self.max_instances) {
            return Err(format!("{here}: max_instances is from 1 to {INSTANCES_MAX}"));
        }
        if self.labels.len() > LABELS_MAX {
            return Err(format!("{here}: more than {LABELS_MAX} labels"));
        }
        if self.worse_by.is_some_and(|by| !by.is_finite() || by == 0.0) {
            return Err(format!("{here}: worse_by must be a number that is not 0"));
        }
        if self.inhibited_by.contains(&self.name) {
            return Err(format!("{here}: it inhibits itself"));
        }
        if let Some(topic) = &self.topic
            && (topic.is_empty()
                || topic.contains(['+', '#'])
                || topic.chars().any(char::is_control)
                || topic.starts_with('$'))
        {
            return Err(format!("{here} topic: `{topic}` is no topic to publish to"));
        }
        Message::parse(&self.message, None).map_err(|error| format!("{here} {error}"))?;
        Ok(())
    }

    /// Changes with what decides when an alert begins and ends, and which it is. Of a rule in the words of the edge it is the
    /// edge's own (`edge-agent/src/rules/rule.rs`).
    pub fn hash(&self) -> String {
        let absent = self.absent.map(Span::micros);
        let text = match (&self.sql, &self.on) {
            (None, Some(on)) if self.by.is_empty() => serde_json::json!([
                self.name,
                on.as_str(),
                self.when,
                self.until,
                self.hold.micros(),
                absent,
                self.labels,
            ]),
            (sql, on) => serde_json::json!([
                self.name,
                sql,
                on.as_ref().map(StreamName::as_str),
                self.hold.micros(),
                absent,
                self.by,
                self.labels,
            ]),
        };
        digest(&SHA256, text.to_string().as_bytes()).as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A name that may be a file's.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(plain) || name.starts_with('.') {
        return Err(format!(
            "`{:.80}` is no name: letters, digits, `_`, `-` and `.`, at most 63",
            name.escape_default()
        ));
    }
    Ok(())
}

/// How a rule finds what it is about.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Filters and projections over one stream: compiled once, evaluated over its new rows.
    Rows(RowRule),
    /// Asked every so often, in a lane of its own.
    Statement { sql: String, every: Duration },
    /// As a statement, over the newest rows of a stream; µs.
    Absent { stream: StreamName, by: Vec<String>, absent: i64, every: Duration },
}

/// A rule that is understood.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) settings: RuleSettings,
    pub(crate) policy: Arc<Policy>,
    pub(crate) kind: Kind,
    pub(crate) labels: Vec<(String, Places)>,
    /// The views that it looks at, as they were.
    pub(crate) below: Below,
}

/// Why a rule does not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RuleError {
    /// Perhaps later: what it is on is not there yet.
    #[error("{0}")]
    Waits(String),
    /// It could not be understood for now: the node has much to do.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Refused(String),
}

/// On whose behalf rules ask: they see everything, in their own lane.
pub(crate) fn caller() -> Caller {
    Caller::new("weir", Door::Node, None, Arc::new([LANE.to_owned()]))
}

impl Rule {
    /// Understands a rule.
    ///
    /// # Errors
    /// Why it cannot run, or not yet.
    pub(crate) async fn compile(engine: &Engine, settings: RuleSettings) -> Result<Self, RuleError> {
        let here = format!("[[rule]] `{}`", settings.name);
        let refused = |message: String| RuleError::Refused(format!("{here}: {message}"));
        if let (Some(stream), Some(absent)) = (&settings.on, settings.absent) {
            let by = if settings.by.is_empty() { vec!["device".to_owned()] } else { settings.by.clone() };
            let Some(cold) = engine.tables().cold(stream) else {
                return Err(RuleError::Waits(format!("there is no stream `{stream}` yet")));
            };
            if let Some(unknown) = by.iter().find(|name| cold.schema.index_of(name).is_err()) {
                return Err(refused(format!("by: `{unknown}` is no column of {stream}")));
            }
            let (stream, absent, every) = (stream.clone(), absent.micros(), settings.every.0);
            let known: Vec<String> = by.iter().cloned().chain(["last_ts".to_owned()]).collect();
            let below = Below::of_stream(engine, &stream, &here).await?;
            let kind = Kind::Absent { stream: stream.clone(), by, absent, every };
            return Self::with(settings, stream.as_str(), (kind, below), &known);
        }
        let (sql, until) = match (&settings.sql, &settings.on, &settings.when) {
            (Some(sql), _, _) => (sql.clone(), None),
            (None, Some(on), Some(when)) => {
                let select = |condition: &str| format!("SELECT * FROM {on} WHERE ({condition}\n)");
                (select(when), settings.until.as_deref().map(select))
            }
            _ => return Err(refused("it says nothing".to_owned())),
        };
        let whole = plan(engine, &sql).await?;
        check_functions(&whole).map_err(refused)?;
        let below = Below::of(engine, &whole, &here).await?;
        let columns: Vec<String> = whole.schema().fields().iter().map(|field| field.name().clone()).collect();
        if columns.iter().enumerate().any(|(index, name)| columns[..index].contains(name)) {
            return Err(refused("two of its columns have one name".to_owned()));
        }
        let of_one_stream = settings.on.is_some();
        let shape = Shape::new(whole.schema().as_arrow(), of_one_stream, settings.value.as_deref()).map_err(refused)?;
        let Some(found) = rows_only(&whole) else {
            if of_one_stream {
                return Err(refused("`when` looks at one row: for more write `sql`".to_owned()));
            }
            let kind = Kind::Statement { sql, every: settings.every.0 };
            return Self::with(settings, "", (kind, below), &columns);
        };
        let stream = found.0.clone();
        if settings.on.as_ref().is_some_and(|on| *on != stream) {
            return Err(refused("`when` is about another stream than `on`".to_owned()));
        }
        let until = match until {
            None => None,
            Some(sql) => {
                let plan = plan(engine, &sql).await?;
                check_functions(&plan).map_err(refused)?;
                let parts = rows_only(&plan).filter(|parts| parts.0 == stream);
                parts.ok_or_else(|| refused("`until` looks at one row of the stream".to_owned()))?.2
            }
        };
        let places: Vec<Places> = settings.labels.values().filter_map(|text| Places::parse(text, None).ok()).collect();
        let named: Vec<&str> = places.iter().flat_map(Places::names).collect();
        let rows = RowRule::new(&engine.session().state(), found, until, (shape, &columns, &named));
        let rows = rows.map_err(|error| refused(error.strip_backtrace()))?;
        Self::with(settings, stream.as_str(), (Kind::Rows(rows), below), &columns)
    }

    fn with(
        settings: RuleSettings,
        stream: &str,
        (kind, below): (Kind, Below),
        columns: &[String],
    ) -> Result<Self, RuleError> {
        let here = format!("[[rule]] `{}`", settings.name);
        let refused = |message: String| RuleError::Refused(format!("{here} {message}"));
        let own = ["device", "rule", "stream", "severity", "id", "labels"].map(str::to_owned);
        let known: Vec<String> = columns.iter().cloned().chain(own).collect();
        let mut labels = Vec::new();
        for (name, text) in &settings.labels {
            let places = Places::parse(text, Some(columns)).map_err(|error| refused(format!("labels: {error}")))?;
            labels.push((name.clone(), places));
        }
        let with_labels: Vec<String> = known.iter().cloned().chain(settings.labels.keys().cloned()).collect();
        let topic = settings.topic.as_deref().unwrap_or(USUAL_TOPIC);
        let topic = Places::parse(topic, Some(&with_labels)).map_err(|error| refused(format!("topic: {error}")))?;
        let message = Message::parse(&settings.message, Some(&with_labels)).map_err(refused)?;
        let policy = Policy {
            name: settings.name.clone(),
            hash: settings.hash(),
            stream: stream.to_owned(),
            hold: settings.hold.micros(),
            keep: settings.keep_firing_for.micros(),
            slack: settings.hold.micros().saturating_add(settings.lateness.micros()),
            severity: settings.severity,
            repeat_every: settings.repeat_every.map(Span::micros),
            inhibited_by: settings.inhibited_by.clone(),
            worse_by: settings.worse_by,
            instances_max: settings.max_instances as usize,
            by_clock: !matches!(kind, Kind::Rows(_)),
            message,
            topic,
        };
        Ok(Self { policy: Arc::new(policy), kind, labels, below, settings })
    }
}

/// Whether some rule is inhibited by itself through others; its name then.
pub(crate) fn inhibits_itself<'r>(rules: impl Iterator<Item = &'r RuleSettings> + Clone) -> Option<String> {
    let by: BTreeMap<&str, &[String]> = rules.clone().map(|rule| (&*rule.name, &*rule.inhibited_by)).collect();
    for rule in rules {
        let (mut next, mut seen) = (rule.inhibited_by.iter().map(String::as_str).collect::<Vec<_>>(), Vec::new());
        while let Some(name) = next.pop() {
            if name == rule.name {
                return Some(rule.name.clone());
            }
            if !seen.contains(&name) {
                seen.push(name);
                next.extend(by.get(name).into_iter().flat_map(|names| names.iter().map(String::as_str)));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests;
