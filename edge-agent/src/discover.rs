//! `edge-agent discover`: hears a broker for some seconds and writes a configuration to begin with.
//!
//! Topics of one format whose payloads are alike become one source and one stream: a level that differs becomes `+` and
//! names the device, a member that looks like a time becomes `ts`, every other scalar a field (`shape.rs` looks at the
//! payloads). Where such a filter would take other topics, too, a condition tells them apart, or the topics are listed. What
//! is of no known format is told in a comment, and so is what the configuration makes of the messages that were heard. The
//! result is one that `edge-agent check` takes; a person still has to look at it. Pure from the messages on.

mod shape;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use wire::{FieldName, StreamName};

use self::shape::{Format, Shape, Table, look};
use crate::config::{Settings, SourceSettings};
use crate::decode::Decoder;
use crate::source::mqtt::probe::{Heard, hear};
use crate::source::now_us;
use crate::trial::matches;

/// Messages that are looked at.
const MESSAGES_MAX: usize = 20_000;
/// Topics that are shown of what is of no known format.
const OTHERS_MAX: usize = 20;

/// Arguments of `discover`.
#[derive(Debug, clap::Args)]
pub struct DiscoverArguments {
    /// Broker, mqtt://host:1883 or mqtts://host:8883
    #[arg(long)]
    url: String,
    #[arg(long)]
    username: Option<String>,
    #[arg(long)]
    password: Option<String>,
    /// Its first line is the password, which others then do not see among the arguments
    #[arg(long, conflicts_with = "password")]
    password_file: Option<PathBuf>,
    /// Certificates (PEM) to trust for mqtts, when the broker's is not of the web's authorities
    #[arg(long)]
    ca_file: Option<PathBuf>,
    /// This client's own certificate (PEM), when the broker asks for one
    #[arg(long, requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// And its key (PEM)
    #[arg(long, requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// What to hear
    #[arg(long, default_value = "#")]
    topic: String,
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// The configuration as text.
///
/// # Errors
/// When the broker cannot be heard, or nothing came.
pub async fn discover(arguments: &DiscoverArguments) -> anyhow::Result<String> {
    if let Err(error) = arguments.url.parse::<url::Url>() {
        bail!("--url {}: {error}: write mqtt://host:1883 or mqtts://host:8883", arguments.url);
    }
    let broker = broker(arguments);
    let any = format!(
        "{}{broker}topics = [{}]\nstream = \"any\"\n[source.map]\ndevice = \"topic:0\"\n[stream.any.fields]\nv = {{ type = \"text\" }}\n",
        head(),
        quoted(&arguments.topic)
    );
    let mut settings = Settings::parse(&any).map_err(anyhow::Error::msg)?;
    settings.open_secrets()?;
    let Some(SourceSettings::Mqtt(mqtt)) = settings.source.pop() else { bail!("no broker") };
    let client = format!("weir-discover-{}", std::process::id());
    let Heard { mut messages, retained, error, .. } =
        hear(&mqtt, &client, Duration::from_secs(arguments.seconds), MESSAGES_MAX).await;
    // What is kept shows a shape as well.
    messages.extend(retained);
    if let Some(error) = error.filter(|_| messages.is_empty()) {
        bail!("{}: {error}", arguments.url);
    }
    if messages.is_empty() {
        bail!("nothing came on {} within {} s", arguments.topic, arguments.seconds);
    }
    let mut text = write(&broker, &messages);
    let settings = Settings::parse(&text).map_err(anyhow::Error::msg).context("read what was written")?;
    let Tried { readings, rejected, left } = tried(&settings, &messages);
    let _ = writeln!(
        text,
        "# Of the {} messages that were heard it makes {readings} readings; {rejected} would go to quarantine, and {left}\n\
         # messages are not taken. `edge-agent try` shows what becomes of one.",
        messages.len()
    );
    Ok(text)
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn head() -> &'static str {
    "[edge]\nid = \"gw-001\"                   # who this gateway is\ndata_dir = \"/var/lib/weir\"\n\n[cloud]\n\
     urls = [\"http://127.0.0.1:7300\"]\ntoken = \"change-me\"\n\n"
}

/// The beginning of each source.
fn broker(arguments: &DiscoverArguments) -> String {
    let mut text = format!("[[source]]\nkind = \"mqtt\"\nurl = {}\n", quoted(&arguments.url));
    let DiscoverArguments { username, password, password_file, ca_file, cert_file, key_file, .. } = arguments;
    let file = |file: &Option<PathBuf>| file.as_deref().map(Path::to_string_lossy).map(String::from);
    let keys = [
        ("username", username.clone()),
        ("password", password.clone()),
        ("password_file", file(password_file)),
        ("ca_file", file(ca_file)),
        ("cert_file", file(cert_file)),
        ("key_file", file(key_file)),
    ];
    for (key, value) in keys {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{key} = {}", quoted(&value));
        }
    }
    text
}

/// What a configuration makes of messages.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tried {
    readings: u64,
    rejected: u64,
    /// Messages that no source takes, or from which nothing is taken.
    left: u64,
}

fn tried(settings: &Settings, messages: &[(String, Bytes)]) -> Tried {
    let mut tried = Tried::default();
    let mut sources = Vec::new();
    for source in &settings.source {
        if let (SourceSettings::Mqtt(mqtt), Some(decoding)) = (source, source.decoding()) {
            sources.push((&mqtt.topics, Decoder::new(&decoding, &settings.stream[source.stream()])));
        }
    }
    let now_us = now_us();
    for (topic, payload) in messages {
        let mut out = Vec::new();
        for (topics, decoder) in &mut sources {
            if topics.iter().any(|filter| matches(filter, topic)) {
                decoder.decode(topic, payload, now_us, &mut out);
            }
        }
        tried.left += u64::from(out.is_empty());
        let readings = out.iter().filter(|reading| reading.is_ok()).count();
        tried.readings += readings as u64;
        tried.rejected += (out.len() - readings) as u64;
    }
    tried
}

/// Topics that belong together.
struct Group<'a> {
    topics: Vec<&'a str>,
    shape: Shape,
}

fn write(broker: &str, messages: &[(String, Bytes)]) -> String {
    let (mut topics, mut others) = (BTreeMap::<&str, Shape>::new(), BTreeMap::<(&str, &str), u64>::new());
    for (topic, payload) in messages {
        // A topic that begins with $ is the broker's own.
        let found =
            if topic.is_empty() || topic.starts_with('$') { Err("the broker's own") } else { look(topic, payload) };
        let seen = match found {
            Ok(found) if topics.get(topic.as_str()).is_none_or(|known| known.format == found.format) => {
                topics.entry(topic).or_insert_with(|| Shape::of(found.format)).add(found);
                continue;
            }
            Ok(found) => found.format.name(),
            Err(what) => what,
        };
        *others.entry((topic, seen)).or_default() += 1;
    }
    let groups = group(&topics);
    let mut out = head().to_owned();
    let mut streams = BTreeSet::new();
    for (number, group) in groups.iter().enumerate() {
        group.write(broker, number, &groups, &mut streams, &mut out);
    }
    if streams.is_empty() {
        // So that it is a configuration, and one that works.
        out.push_str("[[source]]\nkind = \"host\"\n\n");
    }
    for ((topic, what), count) in others.iter().take(OTHERS_MAX) {
        let _ = writeln!(out, "# {}: {count} messages are left out: {what}", topic.escape_debug());
    }
    if others.len() > OTHERS_MAX {
        let _ = writeln!(out, "# and {} more topics", others.len() - OTHERS_MAX);
    }
    out
}

fn level(topic: &str, index: usize) -> &str {
    topic.split('/').nth(index).unwrap_or_default()
}

fn levels(topic: &str) -> usize {
    topic.split('/').count()
}

fn group<'a>(topics: &BTreeMap<&'a str, Shape>) -> Vec<Group<'a>> {
    let last = |topic: &'a str| level(topic, levels(topic) - 1);
    // Where many topics end with the same few words, the words are quantities, and not devices.
    let mut ends = BTreeMap::<(&str, usize), (BTreeSet<&str>, usize)>::new();
    for topic in topics.keys() {
        let (words, count) = ends.entry((level(topic, 0), levels(topic))).or_default();
        words.insert(last(topic));
        *count += 1;
    }
    let mut groups = Vec::<Group<'a>>::new();
    for (topic, shape) in topics {
        let (words, count) = &ends[&(level(topic, 0), levels(topic))];
        let by_word = words.len() * 2 <= *count;
        let found = groups.iter_mut().find(|group| {
            let other = group.topics[0];
            // Whatever is about a node of Sparkplug goes to one source, which must hear its births.
            let of_sparkplug = shape.format == Format::Sparkplug;
            (of_sparkplug || levels(other) == levels(topic))
                && level(other, 0) == level(topic, 0)
                && (of_sparkplug || !by_word || last(other) == last(topic))
                && group.shape.is_like(shape)
        });
        match found {
            Some(group) => {
                group.topics.push(topic);
                group.shape.join(shape);
            }
            None => groups.push(Group { topics: vec![topic], shape: shape.clone() }),
        }
    }
    groups
}

impl Group<'_> {
    /// The names of each level, as many as it has.
    fn distinct(&self) -> Vec<BTreeSet<&str>> {
        (0..levels(self.topics[0])).map(|index| self.topics.iter().map(|topic| level(topic, index)).collect()).collect()
    }

    /// What to subscribe to, and the condition that a message must satisfy.
    fn filter(&self, groups: &[Group<'_>]) -> (Vec<String>, Option<String>) {
        if self.shape.format == Format::Sparkplug {
            return (vec![format!("{}/#", level(self.topics[0], 0))], None);
        }
        let words = self.distinct();
        let words =
            words.iter().map(|words| if let (Some(word), 1) = (words.first(), words.len()) { word } else { "+" });
        let filter = words.collect::<Vec<_>>().join("/");
        let takes = |other: &&Group<'_>| other.topics.iter().any(|topic| matches(&filter, topic));
        let others = groups.iter().filter(|other| !std::ptr::eq(*other, self)).filter(takes).collect::<Vec<_>>();
        if others.is_empty() {
            return (vec![filter], None);
        }
        let has_none = |member: &str| others.iter().all(|other| !other.shape.has(member));
        let own = self.shape.always().find(|member| has_none(member));
        match own {
            Some(own) if others.iter().all(|other| other.shape.format == self.shape.format) => {
                (vec![filter], Some(shape::pointer(own)))
            }
            _ => (self.topics.iter().map(|topic| (*topic).to_owned()).collect(), None),
        }
    }

    fn write(
        &self,
        broker: &str,
        number: usize,
        groups: &[Group<'_>],
        streams: &mut BTreeSet<String>,
        out: &mut String,
    ) {
        if self.shape.format == Format::Sparkplug && self.shape.fields().next().is_none() {
            let _ = writeln!(out, "# Sparkplug B without a birth: hear it for longer, or have its nodes born again");
            return;
        }
        let words = self.distinct();
        let fixed = words.iter().filter(|words| words.len() == 1).flatten().copied().collect::<Vec<_>>();
        let words_of_all =
            if self.shape.format == Format::Sparkplug { "sparkplug".to_owned() } else { fixed.join("_") };
        let stream = name_of(&words_of_all, "stream", number, |name| {
            let own = matches!(name, "host" | "alerts" | "quarantine" | "losses" | "system");
            !own && name.parse::<StreamName>().is_ok() && !streams.contains(name)
        });
        streams.insert(stream.clone());
        let (topics, condition) = self.filter(groups);
        let topics = topics.iter().map(|topic| quoted(topic)).collect::<Vec<_>>().join(", ");
        let format = self.shape.format.name();
        let (messages, count) = (self.shape.messages, self.topics.len());
        let _ = write!(
            out,
            "# {messages} messages on {count} topics\n{broker}topics = [{topics}]\nstream = \"{stream}\"\n"
        );
        if self.shape.format != Format::Json {
            let _ = writeln!(out, "format = \"{format}\"");
        }
        if let Some(Table { delimiter, header }) = &self.shape.table {
            let header =
                header.as_ref().map(|names| names.iter().map(|name| quoted(name)).collect::<Vec<_>>().join(", "));
            let header = header.map(|names| format!("header = [{names}]"));
            let delimiter = (*delimiter != ',').then(|| format!("delimiter = {}", quoted(&delimiter.to_string())));
            let options = header.into_iter().chain(delimiter).collect::<Vec<_>>().join(", ");
            if !options.is_empty() {
                let _ = writeln!(out, "options = {{ {options} }}");
            }
        }
        if let Some(member) = condition {
            let _ = writeln!(out, "when = {{ at = {}, exists = true }}", quoted(&member));
        }
        // The level with most names is that of the devices.
        let kin = groups.iter().flat_map(|group| &group.topics);
        let kin = kin.filter(|topic| levels(topic) == words.len() && level(topic, 0) == level(self.topics[0], 0));
        let kin = kin.copied().collect::<Vec<_>>();
        let among_kin = (0..words.len()).map(|index| kin.iter().map(|topic| level(topic, index)).collect()).collect();
        let differ: Vec<BTreeSet<&str>> = if self.topics.len() > 1 { words.clone() } else { among_kin };
        let differs = differ.iter().enumerate().filter(|(_, words)| words.len() > 1);
        let differs = differs.max_by_key(|(level, words)| (words.len(), usize::MAX - level));
        let device = match (self.shape.device(), differs) {
            (Some(at), None) => at,
            (Some(at), _)
                if matches!(self.shape.format, Format::Senml | Format::SenmlCbor | Format::Sparkplug | Format::Csv) =>
            {
                at
            }
            (_, Some((level, _))) => format!("topic:{level}"),
            (None, None) => format!("topic:{}", words.len() - 1),
        };
        let _ = writeln!(out, "[source.map]\ndevice = {}", quoted(&device));
        let ts = self.shape.ts();
        match &ts {
            Some((at, Some(format))) => {
                let _ = writeln!(out, "ts = {{ at = {}, {format} }}", quoted(at));
            }
            Some((at, None)) => {
                let _ = writeln!(out, "ts = {}", quoted(at));
            }
            None => out.push_str("ts = \"arrival\"\n"),
        }
        let mut fields = BTreeMap::new();
        for (at, kind) in self.shape.fields() {
            if ts.as_ref().is_some_and(|(ts, _)| ts == at) || *at == device {
                continue;
            }
            let Some(kind) = kind else {
                let _ = writeln!(out, "# {} is now of one type and now of another: left out", at.escape_debug());
                continue;
            };
            let plain = at.strip_prefix("/fields/").or_else(|| at.strip_prefix("/tags/"));
            let plain = plain.filter(|_| self.shape.format == Format::Influx).unwrap_or(at);
            let plain = at.strip_prefix("/metrics/").map_or_else(|| plain.to_owned(), |name| name.replace("~1", "_"));
            let name = name_of(&plain, "field", fields.len(), |name| {
                name.parse::<FieldName>().is_ok() && !fields.contains_key(name) && is_free(name)
            });
            let _ = writeln!(out, "{name} = {}", quoted(at));
            fields.insert(name, kind);
        }
        let _ = writeln!(out, "\n[stream.{stream}.fields]");
        for (name, kind) in &fields {
            let _ = writeln!(out, "{name} = {{ type = \"{kind}\" }}");
        }
        out.push('\n');
    }
}

/// Names that a mapping or a table has already.
fn is_free(name: &str) -> bool {
    !matches!(name, "device" | "ts" | "quality")
}

/// A name as tables have it: small letters, digits and `_`; another word and a number where that is none.
fn name_of(text: &str, otherwise: &str, number: usize, is_good: impl Fn(&str) -> bool) -> String {
    let sign = |sign: char| if sign.is_ascii_alphanumeric() { sign.to_ascii_lowercase() } else { '_' };
    let name = text.trim_matches('/').chars().map(sign).collect::<String>();
    let name = name.trim_matches('_');
    // A window's fields are longer by a suffix.
    let name = &name[..name.len().min(50)];
    let tries = [name.to_owned(), format!("{otherwise}_{name}")];
    let numbered = (number..).map(|number| format!("{otherwise}_{number}"));
    tries.into_iter().chain(numbered).find(|name| is_good(name)).expect("there is always one more number")
}
