//! One rule, understood: from its settings and the columns of what it is on.
//!
//! Its hash is the first 16 bytes of the SHA-256 of what decides when an alert begins and ends and which alert it is: name,
//! stream, `when`, `until`, `for` and `absent` in µs, labels, as a JSON array without spaces. Message, topic, command and severity
//! may be changed while alerts fire.

use sha2::{Digest, Sha256};
use wire::FieldType;

use super::Command;
use super::expression::{Columns, Expression};
use super::template::{Filling, Template};
use crate::config::{By, CommandSettings, RuleSettings, Severity};

/// Rules of one configuration.
pub const RULES_MAX: usize = 1_000;

/// The identity of a rule's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleHash(pub [u8; 16]);

/// When an alert begins.
#[derive(Debug)]
pub(super) enum Condition {
    When {
        when: Expression,
        until: Option<Expression>,
    },
    /// Silent for so many µs.
    Absent(i64),
}

/// What an actuator is told.
#[derive(Debug)]
pub(super) struct Told {
    topic: Template,
    firing: Template,
    resolved: Option<Template>,
    every_us: i64,
}

impl Told {
    fn new(settings: &CommandSettings, columns: Option<&Columns>) -> Result<Self, String> {
        can_be_published(&settings.topic)?;
        Ok(Self {
            topic: Template::parse(&settings.topic, columns)?,
            firing: Template::parse(&settings.firing, columns)?,
            resolved: settings.resolved.as_ref().map(|text| Template::parse(text, columns)).transpose()?,
            every_us: settings.every.micros(),
        })
    }

    pub(super) fn fill(&self, with: &Filling<'_>) -> Command {
        Command {
            topic: self.topic.fill_topic(with),
            firing: self.firing.fill_payload(with),
            resolved: self.resolved.as_ref().map(|text| text.fill_payload(with)),
            every_us: self.every_us,
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) hash: RuleHash,
    pub(super) condition: Condition,
    /// µs.
    pub(super) hold: i64,
    pub(super) severity: Severity,
    /// With those that show what windows are grouped by.
    pub(super) labels: Vec<(String, Template)>,
    /// Whether an alert's labels follow from its device or group.
    pub(super) labels_of_the_device: bool,
    pub(super) message: Template,
    pub(super) topic: Option<Template>,
    pub(super) command: Option<Told>,
    pub(super) max_instances: usize,
}

impl Rule {
    /// `by`: what the windows that it is on are grouped by.
    pub(super) fn new(settings: &RuleSettings, columns: &Columns, by: Option<&By>) -> Result<Self, String> {
        let here = format!("[[rule]] `{}`", settings.name);
        let condition = match (&settings.when, settings.absent) {
            (Some(when), None) => {
                let read = |key: &str, text: &str| {
                    let read = Expression::parse(text, columns).map_err(|error| format!("{here} {key}: {error}"))?;
                    if read.kind() == FieldType::Bool {
                        return Ok(read);
                    }
                    Err(format!("{here} {key}: this is {}, and a condition belongs here", read.kind()))
                };
                let until = settings.until.as_ref().map(|until| read("until", until)).transpose()?;
                Condition::When { when: read("when", when)?, until }
            }
            (None, Some(absent)) => {
                if by.is_some() || settings.until.is_some() || !settings.hold.0.is_zero() {
                    return Err(format!("{here}: absent is of readings, and goes without `until` and `for`"));
                }
                if absent.0 < std::time::Duration::from_secs(1) {
                    return Err(format!("{here}: absent is less than 1s"));
                }
                Condition::Absent(absent.micros())
            }
            _ => return Err(format!("{here}: write either `when`, a condition, or `absent`, a duration")),
        };
        let row = matches!(condition, Condition::When { .. }).then_some(columns);
        let template = |key: &str, text: &str, columns| {
            Template::parse(text, columns).map_err(|error| format!("{here} {key}: {error}"))
        };
        let mut labels = Vec::new();
        for (label, text) in &settings.labels {
            let read = template("labels", text, row)?;
            if read.has_id() {
                return Err(format!("{here} labels: {{id}} is made from the labels"));
            }
            labels.push((label.clone(), read));
        }
        let labels_of_the_device = labels.iter().all(|(_, label)| label.is_of_the_device());
        let group = match by {
            Some(By::Fields { fields, .. }) => fields.as_slice(),
            _ => &[],
        };
        for field in group {
            let shown = template("labels", &format!("{{{field}}}"), row)?;
            match labels.iter().find(|(label, _)| label == field.as_str()) {
                None => labels.push((field.to_string(), shown)),
                Some((_, own)) if *own == shown => {}
                Some(_) => {
                    return Err(format!("{here} labels: {field} is what its windows are grouped by, and a label"));
                }
            }
        }
        let topic = settings.topic.as_ref().map(|topic| template("topic", topic, row)).transpose()?;
        if let (Some(topic), Some(text)) = (&topic, &settings.topic) {
            can_be_published(text).map_err(|error| format!("{here} topic: {error}"))?;
            let mut labelled = labels.iter().flat_map(|(_, label)| label.columns());
            let apart = labelled.all(|column| topic.columns().any(|other| other == column));
            let one_device = matches!(by, Some(By::All | By::Fields { device: false, .. }));
            if !(one_device || topic.tells_devices_apart()) || !(apart || topic.has_id()) {
                return Err(format!(
                    "{here} topic: two alerts would share `{text}`; put {{device}}, what the labels show and what windows are \
                     grouped by into it, or {{id}}"
                ));
            }
        }
        let command = settings.command.as_ref().map(|command| Told::new(command, row));
        let command = command.transpose().map_err(|error| format!("{here} command: {error}"))?;
        if settings.max_instances == 0 {
            return Err(format!("{here}: max_instances must be at least 1"));
        }
        Ok(Self {
            name: settings.name.clone(),
            hash: hash(settings),
            condition,
            hold: settings.hold.micros(),
            severity: settings.severity,
            labels_of_the_device,
            labels,
            message: template("message", &settings.message, row)?,
            topic,
            command,
            max_instances: settings.max_instances as usize,
        })
    }

    /// Which columns it wants of the row before.
    pub(super) fn previous(&self) -> impl Iterator<Item = usize> {
        let expressions = match &self.condition {
            Condition::When { when, until } => vec![Some(when), until.as_ref()],
            Condition::Absent(_) => Vec::new(),
        };
        expressions.into_iter().flatten().flat_map(Expression::previous).copied()
    }
}

fn can_be_published(topic: &str) -> Result<(), String> {
    if topic.contains(['+', '#', '\0']) || topic.is_empty() || topic.len() > 1_000 || topic.starts_with('$') {
        return Err(format!("`{topic}` is no topic to publish to"));
    }
    Ok(())
}

fn hash(settings: &RuleSettings) -> RuleHash {
    let absent = settings.absent.map(|absent| absent.micros());
    let text = serde_json::json!([
        settings.name,
        settings.on.as_str(),
        settings.when,
        settings.until,
        settings.hold.micros(),
        absent,
        settings.labels,
    ]);
    let mut hash = [0; 16];
    hash.copy_from_slice(&Sha256::digest(text.to_string().as_bytes())[..16]);
    RuleHash(hash)
}

/// 32 hexadecimal digits.
pub(super) fn hex(bytes: &[u8; 16]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
