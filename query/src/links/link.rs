//! A link as it is written, and what is made of it.
//!
//! ```toml
//! [[link]]
//! name = "slow_down"
//! from = "alerts/traffic/+/congestion"             # topics of alerts and of other links, with MQTT wildcards
//! when = "transition == 'firing' and labels.district == 'north'"
//! to = { edge = "gw-018", command = "signal_plan", device = "{device}", payload = "{{ severity }}", timeout = "10s" }
//! rate = "10/1m"
//! ```
//! Or `to = { topic = "city/jams/{device}" }`, or `to = { webhook = "a target of the configuration" }`, both with a `payload` or
//! without. The condition is an expression of the language of messages, over the [`WORDS`] of an event; labels are
//! `labels.name`, in topics `{labels.name}`. In a payload texts lose quotes, backslashes and control characters, so that a
//! value is never more than a value where the payload is JSON.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use wire::command::{COMMAND_PAYLOAD_BYTES_MAX, COMMAND_TIMEOUT_MAX};
use wire::rate::{Allowance, Rate};
use wire::written::{Span, with_nearest_key};

use super::event::LinkEvent;
use super::loops::Ends;
use super::{Courier, LINK_BYTES_MAX};
use crate::alerts::rule::check_name;
use crate::alerts::template::{self, MESSAGE_BYTES_MAX, Message, Places as Text, Words};
use crate::alerts::topic::{LEVEL_BYTES_MAX, TOPIC_BYTES_MAX};
use crate::alerts::{Severity, TopicFilter};
use crate::publish::Told;

/// What an event says, beside `labels`.
const WORDS: [&str; 20] = [
    "id",
    "transition",
    "sequence",
    "rule",
    "state",
    "severity",
    "stream",
    "device",
    "labels",
    "message",
    "value",
    "ts",
    "from",
    "to",
    "topic",
    "link",
    "hops",
    "payload",
    "actor",
    "note",
];
/// Links that one alert may come through. Loops are refused before; this is for what nobody has thought of.
const HOPS_MAX: u32 = 8;
/// In the place of a place, where a topic is looked at as a pattern.
const PLACE: char = '\u{E000}';

/// A link as it is written.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LinkSettings {
    #[serde(default)]
    pub(super) name: String,
    pub(super) from: String,
    #[serde(default = "when_it_fires")]
    pub(super) when: String,
    pub(super) to: ToSettings,
    #[serde(default = "rate")]
    pub(super) rate: Rate,
}

/// Where it leads: `edge` with a `command`, `topic`, or `webhook`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ToSettings {
    pub(super) edge: Option<String>,
    pub(super) command: Option<String>,
    /// What the command is for; the device of the alert unless set.
    pub(super) device: Option<String>,
    /// How long it may take until it is done and answered.
    pub(super) timeout: Option<Span>,
    pub(super) topic: Option<String>,
    pub(super) webhook: Option<String>,
    pub(super) payload: Option<String>,
}

fn when_it_fires() -> String {
    "transition == 'firing'".to_owned()
}

fn rate() -> Rate {
    Rate { count: 60, per: Duration::from_secs(60) }
}

/// What a file of links holds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkFile {
    #[serde(default)]
    link: Vec<LinkSettings>,
}

impl LinkSettings {
    /// Reads a file of `[[link]]`.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(super) fn parse_file(text: &str) -> Result<Vec<Self>, String> {
        let file: LinkFile = toml::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?;
        for link in &file.link {
            link.check()?;
        }
        Ok(file.link)
    }

    /// Reads one link, its keys at the top, as TOML or JSON; its name may be left out.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(super) fn parse(name: &str, text: &str) -> Result<Self, String> {
        if text.len() > LINK_BYTES_MAX {
            return Err(format!("a link of more than {LINK_BYTES_MAX} bytes"));
        }
        let mut link: Self = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?
        } else {
            toml::from_str(text).map_err(|error| with_nearest_key(&error.to_string()))?
        };
        if link.name.is_empty() {
            name.clone_into(&mut link.name);
        }
        if link.name != name {
            return Err(format!("the link calls itself `{}`, and its address `{name}`", link.name));
        }
        link.check()?;
        Ok(link)
    }

    fn check(&self) -> Result<(), String> {
        check_name(&self.name)?;
        self.understood().map(drop)
    }

    /// What it listens to, and where it tells.
    pub(super) fn ends(&self) -> Result<Ends, String> {
        let (from, _, to) = self.understood()?;
        Ok(Ends { from, to: if let To::Topic { topic, .. } = &to { Some(pattern(topic)?) } else { None } })
    }

    /// All of it but what only the node knows: edges and webhooks.
    fn understood(&self) -> Result<(TopicFilter, Condition, To), String> {
        let here = |what: &str, error: &str| format!("[[link]] `{}` {what}: {error}", self.name);
        let from = TopicFilter::parse(&self.from).map_err(|error| here("from", &error))?;
        let when = Condition::parse(&self.when).map_err(|error| here("when", &error))?;
        Ok((from, when, self.to.read().map_err(|error| here("to", &error))?))
    }
}

impl ToSettings {
    fn read(&self) -> Result<To, String> {
        let payload = self.payload.as_deref().map(|text| {
            let known = WORDS.map(str::to_owned);
            Message::parse(text, Some(&known)).map_err(|error| error.replacen("message:", "payload:", 1))
        });
        let payload = payload.transpose()?;
        let of_edge = self.command.is_some() || self.device.is_some() || self.timeout.is_some();
        match (&self.edge, &self.topic, &self.webhook) {
            (Some(edge), None, None) => {
                let command = self.command.clone().ok_or("an edge needs a `command`")?;
                let timeout = self.timeout.map_or(Duration::from_secs(10), |timeout| timeout.0);
                if timeout < Duration::from_millis(100) || timeout > COMMAND_TIMEOUT_MAX {
                    return Err(format!("timeout is from 100ms to {} s", COMMAND_TIMEOUT_MAX.as_secs()));
                }
                let device = self.device.as_deref().map(text).transpose()?;
                Ok(To::Edge { edge: edge.clone(), command, device, payload, timeout })
            }
            (None, Some(topic), None) if !of_edge => {
                let read = text(topic)?;
                pattern(&read)?;
                Ok(To::Topic { topic: read, payload })
            }
            (None, None, Some(webhook)) if !of_edge => Ok(To::Webhook { name: webhook.clone(), payload }),
            _ => Err("write `edge` with a `command`, or `topic`, or `webhook`".to_owned()),
        }
    }
}

/// A text whose places are words of an event.
fn text(text: &str) -> Result<Text, String> {
    let read = Text::parse(text, None)?;
    let is_known = |name: &str| WORDS.contains(&name) && name != "labels" || name.starts_with("labels.");
    let unknown = read.names().find(|name| !is_known(name));
    unknown.map_or(Ok(()), |name| Err(format!("`{text}`: {{{name}}} is none of {}, labels.…", WORDS.join(", "))))?;
    Ok(read)
}

/// The topics that a text may become.
fn pattern(topic: &Text) -> Result<TopicFilter, String> {
    let words: Words = topic.names().map(|name| (name.to_owned(), PLACE.to_string().into())).collect();
    let filled = topic.fill_topic(&words);
    let wild = filled.starts_with('$') || filled.contains(['+', '#']) || filled.chars().any(char::is_control);
    if wild || filled.is_empty() {
        return Err(format!("`{filled}` is no topic to tell on"));
    }
    // One that is cut has other levels.
    let places = filled.chars().filter(|letter| *letter == PLACE).count();
    if filled.len() + places * LEVEL_BYTES_MAX > TOPIC_BYTES_MAX {
        return Err(format!("a topic may become longer than {TOPIC_BYTES_MAX} bytes"));
    }
    let level = |level: &str| if level.contains(PLACE) { "+".to_owned() } else { level.to_owned() };
    TopicFilter::parse(&filled.split('/').map(level).collect::<Vec<_>>().join("/"))
}

/// Whether an event is meant.
#[derive(Debug)]
struct Condition(String);

impl Condition {
    fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MESSAGE_BYTES_MAX {
            return Err(format!("more than {MESSAGE_BYTES_MAX} bytes"));
        }
        template::within_bounds(&format!("{{{{ {text} }}}}")).map_err(|error| error.replacen("message: ", "", 1))?;
        let environment = template::environment();
        let expression = environment.compile_expression(text).map_err(|error| error.to_string())?;
        match expression.undeclared_variables(false).into_iter().find(|word| !WORDS.contains(&word.as_str())) {
            Some(word) => {
                let nearest = WORDS.into_iter().min_by_key(|name| strsim::levenshtein(name, &word));
                let hint = nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
                Err(format!("`{word}` is no word of an event{hint} Labels are `labels.name`."))
            }
            None => Ok(Self(text.to_owned())),
        }
    }

    fn holds(&self, words: &Words) -> Result<bool, String> {
        let environment = template::environment();
        let expression = environment.compile_expression(&self.0).map_err(|error| error.to_string())?;
        Ok(expression.eval(words).map_err(|error| error.to_string())?.is_true())
    }
}

/// Where a link leads.
#[derive(Debug)]
enum To {
    Edge { edge: String, command: String, device: Option<Text>, payload: Option<Message>, timeout: Duration },
    Topic { topic: Text, payload: Option<Message> },
    Webhook { name: String, payload: Option<Message> },
}

/// What a node has that links may lead to.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) courier: Arc<dyn Courier>,
    pub(super) webhooks: Vec<String>,
}

/// A link that is understood.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) settings: LinkSettings,
    from: TopicFilter,
    when: Condition,
    to: To,
}

/// One that does not run here.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) settings: LinkSettings,
    pub(super) reason: String,
}

impl Link {
    /// Understands a link.
    ///
    /// # Errors
    /// When it leads to an edge, or a webhook, that is not there.
    pub(super) fn read(settings: LinkSettings, places: &Places) -> Result<Self, Box<Refused>> {
        let read = settings.understood().and_then(|(from, when, to)| {
            let here = format!("[[link]] `{}` to", settings.name);
            match &to {
                To::Edge { edge, .. } if !places.courier.knows(edge) => {
                    Err(format!("{here}: there is no [[edge]] `{edge:.80}`"))
                }
                To::Webhook { name, .. } if !places.webhooks.contains(name) => {
                    Err(format!("{here}: there is no [[alerts.publish]] `{name:.80}` of kind webhook"))
                }
                _ => Ok((from, when, to)),
            }
        });
        match read {
            Ok((from, when, to)) => Ok(Self { settings, from, when, to }),
            Err(reason) => Err(Box::new(Refused { settings, reason })),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    /// What kind of place it leads to, and which.
    pub(super) fn leads_to(&self) -> (&'static str, String) {
        let to = &self.settings.to;
        match &self.to {
            To::Edge { edge, command, .. } => ("edge", format!("{edge}: {command}")),
            To::Topic { .. } => ("topic", to.topic.clone().unwrap_or_default()),
            To::Webhook { name, .. } => ("webhook", name.clone()),
        }
    }

    pub(super) fn allowance(&self, now: Instant) -> Allowance {
        Allowance::new(self.settings.rate, now)
    }

    /// Whether it listens to this topic.
    pub(super) fn hears(&self, topic: &str) -> bool {
        self.from.matches(topic)
    }

    /// What an event brings about; None when the condition does not hold.
    ///
    /// # Errors
    /// When the condition or the payload fails.
    pub(super) fn hop(&self, heard: &Heard<'_>) -> Result<Option<Hop>, String> {
        if !self.when.holds(&heard.words)? {
            return Ok(None);
        }
        let Heard { told, data, words } = heard;
        let written = |payload: &Option<Message>| {
            let text = payload.as_ref().map_or(Ok(String::new()), |payload| payload.whole(&plain(words)));
            text.map_err(|error| format!("payload: {error}"))
        };
        let (to, payload) = match &self.to {
            To::Edge { edge, command, device, payload, timeout } => {
                let usual = || data.get("device").and_then(Value::as_str).map(str::to_owned);
                let device = device.as_ref().map(|device| device.fill(words)).or_else(usual);
                let until = told.at.saturating_add(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX));
                (HopTo::Edge { edge: edge.clone(), command: command.clone(), device, until }, written(payload)?)
            }
            To::Topic { topic, payload } => (HopTo::Topic { topic: topic.fill_topic(words) }, written(payload)?),
            To::Webhook { name, payload } => (HopTo::Webhook { target: name.clone() }, written(payload)?),
        };
        debug_assert!(payload.len() <= COMMAND_PAYLOAD_BYTES_MAX);
        let text = |name: &str| data.get(name).and_then(Value::as_str).map(str::to_owned);
        Ok(Some(Hop {
            id: format!("{}-{:x}-{}", told.sequence, told.at, self.name()),
            link: self.name().to_owned(),
            hops: told.hops + 1,
            from_topic: told.topic.clone(),
            cause: told.sequence,
            at: told.at,
            severity: told.severity,
            device: text("device"),
            to,
            payload,
            data: Map::clone(data),
        }))
    }
}

/// An event, as links look at it.
#[derive(Debug)]
pub(super) struct Heard<'t> {
    told: &'t Told,
    data: Map<String, Value>,
    words: Words,
}

impl<'t> Heard<'t> {
    pub(super) fn new(told: &'t Told) -> Self {
        let mut event: Value = serde_json::from_slice(&told.body).unwrap_or_default();
        let Value::Object(data) = event["data"].take() else {
            return Self { told, data: Map::new(), words: Words::new() };
        };
        let known = WORDS.iter().filter_map(|word| Some(((*word).to_owned(), data.get(*word)?.clone())));
        let mut words: Words = known.collect();
        words.insert("topic".to_owned(), told.topic.clone().into());
        words.insert("hops".to_owned(), told.hops.into());
        if let Some(Value::Object(labels)) = data.get("labels") {
            words.extend(labels.iter().map(|(name, value)| (format!("labels.{name}"), value.clone())));
        }
        Self { told, data, words: template::short(&words) }
    }
}

/// Words of which a text is never more than a text in the middle of JSON.
fn plain(words: &Words) -> Words {
    words.iter().map(|(name, value)| (name.clone(), without_marks(value))).collect()
}

fn without_marks(value: &Value) -> Value {
    match value {
        Value::String(text) => {
            let kept = text.chars().filter(|letter| !matches!(letter, '"' | '\\') && !letter.is_control());
            Value::String(kept.collect())
        }
        Value::Object(all) => {
            all.iter().map(|(name, value)| (name.clone(), without_marks(value))).collect::<Map<_, _>>().into()
        }
        Value::Array(all) => all.iter().map(without_marks).collect::<Vec<_>>().into(),
        other => other.clone(),
    }
}

/// What one event brings about by one link. As JSON in `link_log`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Hop {
    /// The same event by the same link has the same one, also after a crash.
    pub(super) id: String,
    pub(super) link: String,
    pub(super) hops: u32,
    pub(super) from_topic: String,
    /// The sequence of the event.
    pub(super) cause: i64,
    /// When that was decided, µs.
    pub(super) at: i64,
    pub(super) severity: Severity,
    pub(super) device: Option<String>,
    pub(super) to: HopTo,
    pub(super) payload: String,
    /// What the event said.
    pub(super) data: Map<String, Value>,
}

/// Where a hop goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum HopTo {
    /// `until`: it is over then, µs.
    Edge {
        edge: String,
        command: String,
        device: Option<String>,
        until: i64,
    },
    Topic {
        topic: String,
    },
    Webhook {
        target: String,
    },
}

impl Hop {
    /// Whether the alert has come through too many links.
    pub(super) fn is_too_far(&self) -> bool {
        self.hops > HOPS_MAX
    }

    /// What it tells; None for a command.
    pub(super) fn event(&self) -> Option<LinkEvent> {
        let (topic, only) = match &self.to {
            HopTo::Edge { .. } => return None,
            HopTo::Topic { topic } => (topic.clone(), None),
            HopTo::Webhook { target } => (self.from_topic.clone(), Some(target.clone())),
        };
        Some(LinkEvent {
            id: self.id.clone(),
            link: self.link.clone(),
            hops: self.hops,
            topic,
            only,
            severity: self.severity,
            payload: self.payload.clone(),
            data: self.data.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[derive(Debug)]
    struct Nobody;

    #[async_trait::async_trait]
    impl Courier for Nobody {
        fn knows(&self, edge: &str) -> bool {
            edge == "gw-018"
        }

        async fn carry(&self, _: &str, _: wire::Command, _: Duration) -> super::super::Carried {
            unreachable!("nothing is carried here")
        }
    }

    fn link(text: &str) -> Result<Link, String> {
        let places = Places { courier: Arc::new(Nobody), webhooks: vec!["hook".to_owned()] };
        let settings = LinkSettings::parse("l", text)?;
        Link::read(settings, &places).map_err(|refused| refused.reason)
    }

    fn told(data: Value) -> Told {
        let body = Bytes::from(serde_json::json!({ "data": data }).to_string());
        Told {
            sequence: 7,
            topic: "alerts/d1/high".to_owned(),
            severity: Severity::Critical,
            transition: "firing",
            id: "a".to_owned(),
            firing: true,
            hops: 0,
            only: None,
            at: 1_000_000,
            frame: Bytes::new(),
            body,
            pushed: None,
        }
    }

    fn alert() -> Told {
        told(serde_json::json!({
            "id": "a", "transition": "firing", "severity": "critical", "device": "d\"1\\", "value": 12.5,
            "labels": { "district": "north", "road": "a/b" },
        }))
    }

    #[test]
    fn a_hop_is_made_of_what_an_event_says() {
        let text = "from = \"alerts/+/high\"\nwhen = \"severity == 'critical' and labels.district == 'north'\"\n\
                    to = { edge = \"gw-018\", command = \"plan\", device = \"s-{labels.road}\", timeout = \"2s\", \
                    payload = '{\"d\":\"{{ device }}\",\"v\":{{ value | round }}}' }\n";
        let (read, told) = (link(text).unwrap(), alert());
        assert!(read.hears(&told.topic) && !read.hears("alerts/d1/other"));
        let hop = read.hop(&Heard::new(&told)).unwrap().unwrap();
        let edge = HopTo::Edge {
            edge: "gw-018".to_owned(),
            command: "plan".to_owned(),
            device: Some("s-a/b".to_owned()),
            until: 3_000_000,
        };
        assert_eq!((&hop.to, hop.payload.as_str(), hop.hops), (&edge, "{\"d\":\"d1\",\"v\":13.0}", 1));
        assert_eq!(hop.id, "7-f4240-l", "the same event, the same id");
        let kept: Hop = serde_json::from_str(&serde_json::to_string(&hop).unwrap()).unwrap();
        assert_eq!(kept, hop);
        let other = told_of("south");
        assert_eq!(read.hop(&Heard::new(&other)).unwrap(), None);
        let topic = link("from = \"#\"\nto = { topic = \"jams/{labels.road}/x\" }").unwrap();
        let event = topic.hop(&Heard::new(&told)).unwrap().unwrap().event().unwrap();
        assert_eq!((event.topic.as_str(), event.only), ("jams/a_b/x", None));
        let hook = link("from = \"#\"\nto = { webhook = \"hook\" }").unwrap();
        let event = hook.hop(&Heard::new(&told)).unwrap().unwrap().event().unwrap();
        assert_eq!((event.topic.as_str(), event.only.as_deref()), ("alerts/d1/high", Some("hook")));
        let failing =
            link("from = \"#\"\nwhen = \"true\"\nto = { topic = \"x\", payload = \"{{ device / 2 }}\" }").unwrap();
        assert!(failing.hop(&Heard::new(&told)).unwrap_err().contains("payload"));
    }

    fn told_of(district: &str) -> Told {
        told(serde_json::json!({ "severity": "critical", "labels": { "district": district } }))
    }

    #[test]
    fn the_shipped_links_are_right() {
        let shipped = include_str!("../../../configs/links/traffic.toml");
        // Those that are commented out, too.
        let all = shipped.replace("# [[link]]", "[[link]]").replace("\n# ", "\n");
        assert_eq!(LinkSettings::parse_file(shipped).unwrap().len(), 1);
        let all = LinkSettings::parse_file(&all).unwrap();
        assert_eq!(all[1].to.command.as_deref(), Some("signal_plan"));
    }

    #[test]
    fn a_link_that_makes_no_sense_is_refused_with_the_reason() {
        let check = |text: &str, expected: &str| {
            let error = link(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("from = \"a/#/b\"\nto = { topic = \"x\" }", "`#` the whole last one");
        check("from = \"#\"\nto = { }", "write `edge`");
        check("from = \"#\"\nto = { topic = \"x\", webhook = \"hook\" }", "write `edge`");
        check("from = \"#\"\nto = { topic = \"x\", command = \"c\" }", "write `edge`");
        check("from = \"#\"\nto = { edge = \"gw-018\" }", "needs a `command`");
        check("from = \"#\"\nto = { edge = \"gw-019\", command = \"c\" }", "no [[edge]] `gw-019`");
        check("from = \"#\"\nto = { webhook = \"elsewhere\" }", "of kind webhook");
        check("from = \"#\"\nto = { edge = \"gw-018\", command = \"c\", timeout = \"1h\" }", "timeout is from");
        check("from = \"#\"\nto = { topic = \"x/{devise}\" }", "{devise} is none of");
        check("from = \"#\"\nto = { topic = \"x/+\" }", "no topic to tell on");
        check("from = \"#\"\nto = { topic = \"$SYS/x\" }", "no topic to tell on");
        check(&format!("from = \"#\"\nto = {{ topic = \"x{}\" }}", "/{device}".repeat(20)), "longer than");
        check("from = \"#\"\nwhen = \"severty == 'critical'\"\nto = { topic = \"x\" }", "did you mean `severity`?");
        check("from = \"#\"\nwhen = \"message * 100000\"\nto = { topic = \"x\" }", "`*`");
        check("from = \"#\"\nto = { topic = \"x\", payload = \"{{ speed }}\" }", "payload: `speed`");
        check("from = \"#\"\nrate = \"often\"\nto = { topic = \"x\" }", "is no rate");
        check("from = \"#\"\nform = \"#\"\nto = { topic = \"x\" }", "did you mean `from`?");
        let to = |text: &str| pattern(&super::text(text).unwrap()).unwrap().levels().join("/");
        assert_eq!(to("jams/{device}-x/{labels.road}/y"), "jams/+/+/y");
    }
}
