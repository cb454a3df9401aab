//! Which commands are done: those of the configuration, for its devices, and not too often. Pure.
//!
//! A device never makes other levels of a topic, nor a wildcard: such a command is refused, not done to another device. In a
//! payload that is made here, texts lose quotes, backslashes and control characters; a payload that the link has written is
//! published as it is.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use wire::command::COMMAND_PAYLOAD_BYTES_MAX;
use wire::{Allowance, Command, Rate};

use crate::config::RemoteSettings;

/// Of all commands together: what an agent remembers (`memory::IDS_MAX`) is more than can come while one of them may come
/// again.
pub(super) const ALL: Rate = Rate { count: 600, per: Duration::from_secs(60) };
const TOPIC_BYTES_MAX: usize = 1_000;
const PLACES: [&str; 4] = ["device", "name", "payload", "id"];

/// What the local broker is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Publication {
    pub(super) topic: String,
    pub(super) payload: Bytes,
    pub(super) retain: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Allowed {
    commands: BTreeMap<String, (RemoteSettings, Allowance)>,
    all: Allowance,
}

impl Allowed {
    pub(super) fn new(settings: &[RemoteSettings], now: Instant) -> Self {
        let now = now.into_std();
        let command =
            |command: &RemoteSettings| (command.name.clone(), (command.clone(), Allowance::new(command.rate, now)));
        Self { commands: settings.iter().map(command).collect(), all: Allowance::new(ALL, now) }
    }

    /// What is published for a command.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn judge(&mut self, command: &Command, now: Instant) -> Result<Publication, String> {
        let Some((settings, allowance)) = self.commands.get_mut(&command.name) else {
            return Err(format!("the edge allows no [[command]] `{:.80}`", command.name));
        };
        if command.payload.len() > COMMAND_PAYLOAD_BYTES_MAX {
            return Err(format!("a payload of more than {COMMAND_PAYLOAD_BYTES_MAX} bytes"));
        }
        let device = command.device.as_deref();
        if device.is_some_and(|device| {
            device.is_empty() || device.contains(['/', '+', '#']) || device.contains(char::is_control)
        }) {
            return Err("its device is no level of a topic".to_owned());
        }
        let is_meant = |pattern: &String| device.is_some_and(|device| matches(pattern, device));
        if !settings.devices.is_empty() && !settings.devices.iter().any(is_meant) {
            return Err(format!("the edge does not allow `{}` for this device", command.name));
        }
        let words = |place: &str| match place {
            "device" => device,
            "name" => Some(command.name.as_str()),
            "payload" => Some(command.payload.as_str()),
            _ => Some(command.id.as_str()),
        };
        let publish = &settings.publish;
        let topic = fill(&publish.topic, |place| words(place).map(str::to_owned))?;
        if topic.len() > TOPIC_BYTES_MAX {
            return Err("its topic is too long".to_owned());
        }
        let plain = |text: &str| -> String {
            text.chars().filter(|letter| !matches!(letter, '"' | '\\') && !letter.is_control()).collect()
        };
        let payload = match &publish.payload {
            None => command.payload.clone(),
            Some(text) => fill(text, |place| words(place).map(plain))?,
        };
        let now = now.into_std();
        if !allowance.take(now) || !self.all.take(now) {
            return Err(format!("`{}` came too often", command.name));
        }
        Ok(Publication { topic, payload: payload.into(), retain: publish.retain })
    }
}

/// Whether the settings are ones that can be gone by.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn check(settings: &[RemoteSettings]) -> Result<(), String> {
    let mut names = std::collections::HashSet::new();
    for command in settings {
        let here = format!("[[command]] `{}`", command.name);
        if command.name.is_empty() || command.name.len() > 63 || !names.insert(&command.name) {
            return Err(format!("{here}: a name has from 1 to 63 bytes and is there once"));
        }
        let topic = &command.publish.topic;
        let plain = fill(topic, |place| matches!(place, "device" | "name").then(|| "x".to_owned()));
        let plain = plain.map_err(|error| format!("{here} publish.topic: {error}"))?;
        if plain.is_empty()
            || plain.starts_with('$')
            || plain.contains(['+', '#'])
            || plain.contains(char::is_control)
            || plain.len() > TOPIC_BYTES_MAX
        {
            return Err(format!("{here} publish.topic: `{topic}` is no topic to publish to"));
        }
        if command.name.contains(['/', '+', '#']) && topic.contains("{name}") {
            return Err(format!("{here}: its name is no level of a topic"));
        }
        if let Some(payload) = &command.publish.payload {
            fill(payload, |place| PLACES.contains(&place).then(String::new))
                .map_err(|error| format!("{here} publish.payload: {error}"))?;
        }
    }
    Ok(())
}

/// A text with its places filled; `{{` and `}}` are braces.
fn fill(text: &str, word: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..];
        if brace.starts_with("{{") || brace.starts_with("}}") {
            out.push_str(&brace[..1]);
            rest = &brace[2..];
            continue;
        }
        let Some((name, after)) = brace.strip_prefix('{').and_then(|inner| inner.split_once('}')) else {
            return Err(format!("`{text}`: a place is written {{name}}, and a brace {{{{ or }}}}"));
        };
        out.push_str(&word(name).ok_or_else(|| format!("`{text}`: there is nothing for {{{name:.40}}}"))?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// `*` stands for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(start) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return left.ends_with(part);
        }
        match left.find(part) {
            Some(at) => left = &left[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> RemoteSettings {
        toml::from_str(text).unwrap()
    }

    fn command(name: &str, device: Option<&str>, payload: &str) -> Command {
        Command { id: "1-a".into(), name: name.into(), device: device.map(str::to_owned), payload: payload.into() }
    }

    #[test]
    fn only_what_the_configuration_names_is_done() {
        let plan = settings(
            "name = \"plan\"\npublish = { topic = \"city/{device}/plan\" }\ndevices = [\"s-*\"]\nrate = \"3/1m\"",
        );
        let siren = settings(
            "name = \"siren\"\npublish = { topic = \"siren\", payload = '{{\"on\":\"{payload}\"}}', retain = true }",
        );
        check(&[plan.clone(), siren.clone()]).unwrap();
        let now = Instant::now();
        let mut allowed = Allowed::new(&[plan, siren], now);
        let done = allowed.judge(&command("plan", Some("s-7"), "{\"n\":2}"), now).unwrap();
        assert_eq!((done.topic.as_str(), &done.payload[..], done.retain), ("city/s-7/plan", &b"{\"n\":2}"[..], false));
        let siren = allowed.judge(&command("siren", None, "a\"b\\\n"), now).unwrap();
        assert_eq!((siren.topic.as_str(), &siren.payload[..], siren.retain), ("siren", &b"{\"on\":\"ab\"}"[..], true));
        let mut refused = |name: &str, device: Option<&str>, payload: &str, expected: &str| {
            let error = allowed.judge(&command(name, device, payload), now).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        refused("reboot", None, "", "no [[command]] `reboot`");
        refused("plan", Some("t-7"), "", "for this device");
        refused("plan", None, "", "for this device");
        refused("plan", Some("s-7/../x"), "", "no level of a topic");
        refused("plan", Some("s-#"), "", "no level of a topic");
        refused("siren", None, &"x".repeat(4_097), "more than 4096 bytes");
        // What was refused has not been counted; what was done has.
        for _ in 0..2 {
            allowed.judge(&command("plan", Some("s-7"), ""), now).unwrap();
        }
        let often = allowed.judge(&command("plan", Some("s-7"), ""), now).unwrap_err();
        assert!(often.contains("too often"), "{often}");
        allowed.judge(&command("plan", Some("s-7"), ""), now + Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn settings_that_cannot_be_gone_by_are_refused() {
        let wrong = |text: &str, expected: &str| {
            let error = check(&[settings(text)]).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        wrong("name = \"a\"\npublish = { topic = \"x/{divice}\" }", "nothing for {divice}");
        wrong("name = \"a\"\npublish = { topic = \"x/#\" }", "no topic to publish to");
        wrong("name = \"a\"\npublish = { topic = \"x/{payload}\" }", "nothing for {payload}");
        wrong("name = \"a\"\npublish = { topic = \"x\", payload = \"{\" }", "a place is written");
        wrong("name = \"\"\npublish = { topic = \"x\" }", "from 1 to 63");
        wrong("name = \"a/b\"\npublish = { topic = \"x/{name}\" }", "no level");
        let one = settings("name = \"a\"\npublish = { topic = \"x\" }");
        assert!(check(&[one.clone(), one]).unwrap_err().contains("is there once"));
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("s-*", "s-7", true),
            ("s-*", "t-7", false),
            ("*-7", "s-7", true),
            ("a*b*c", "axxbyc", true),
            ("a*b*c", "axxcyb", false),
            ("ab*b", "ab", false),
            ("a", "a", true),
            ("a", "ab", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
