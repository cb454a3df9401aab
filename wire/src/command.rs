//! Commands for edges, as JSON: they wait in the cloud, and the edge fetches them, because it lets nobody in.
//!
//! `GET /v1/edges/{edge}/commands?run=…&after=…&wait_ms=…` is answered with the commands behind the number `after`, at once or
//! when one comes, and with none after `wait_ms`. Numbers count within one `run` of the node: an edge that names another
//! gets all that wait. `POST /v1/edges/{edge}/commands/{id}` with a [`CommandReply`] says what became of one.
//!
//! Nobody's clock is compared with another's. A command is over at the moment at which the edge began to ask, and `waited_ms` and
//! `left_ms` behind it: not later than in the cloud, however long the answer was on its way.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest time limit of a command.
pub const COMMAND_TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// Bytes of a command's payload.
pub const COMMAND_PAYLOAD_BYTES_MAX: usize = 4_096;
/// Bytes of an id. It has ASCII letters, digits, `_`, `-` and `.`.
pub const COMMAND_ID_BYTES_MAX: usize = 128;
/// Bytes of what is answered.
pub const COMMAND_ANSWER_BYTES_MAX: usize = 1_024;
/// The longest time that an edge may have its question wait.
pub const COMMAND_WAIT_MAX: Duration = Duration::from_secs(30);

/// What an edge is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The same command has the same id, however often it is handed out.
    pub id: String,
    /// Which of the commands that the edge allows.
    pub name: String,
    pub device: Option<String>,
    pub payload: String,
}

/// A command on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handed {
    pub number: u64,
    /// What was left of its time when the answer was written, ms.
    pub left_ms: u64,
    pub command: Command,
}

/// The commands behind a number, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandsAnswer {
    pub run: String,
    /// From the question to this answer, ms.
    pub waited_ms: u64,
    pub commands: Vec<Handed>,
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandReply {
    pub ok: bool,
    pub answer: String,
}

impl CommandReply {
    /// It was done.
    pub fn done(answer: impl Into<String>) -> Self {
        Self { ok: true, answer: clipped(answer.into()) }
    }

    /// It was not, or nobody knows.
    pub fn refused(answer: impl Into<String>) -> Self {
        Self { ok: false, answer: clipped(answer.into()) }
    }
}

fn clipped(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(COMMAND_ANSWER_BYTES_MAX));
    text
}

/// Whether a text may be the id of a command, and so a part of an address.
pub fn is_command_id(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    !id.is_empty() && id.len() <= COMMAND_ID_BYTES_MAX && id.bytes().all(plain) && !id.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_on_the_wire_never_change() {
        let command =
            Command { id: "7-a".into(), name: "plan".into(), device: Some("s1".into()), payload: "{}".into() };
        let handed = Handed { number: 3, left_ms: 900, command };
        let answer = CommandsAnswer { run: "r".into(), waited_ms: 12, commands: vec![handed] };
        let text = r#"{"run":"r","waited_ms":12,"commands":[{"number":3,"left_ms":900,"command":{"id":"7-a","name":"plan","device":"s1","payload":"{}"}}]}"#;
        assert_eq!(serde_json::to_string(&answer).unwrap(), text);
        assert_eq!(serde_json::from_str::<CommandsAnswer>(text).unwrap(), answer);
        let reply = CommandReply::done("é".repeat(1_000));
        assert_eq!(reply.answer.len(), COMMAND_ANSWER_BYTES_MAX);
    }

    #[test]
    fn an_id_is_a_part_of_an_address() {
        for (id, expected) in [("1-a.b_c", true), ("", false), ("a/b", false), ("..", false), ("é", false)] {
            assert_eq!(is_command_id(id), expected, "{id}");
        }
        assert!(!is_command_id(&"a".repeat(COMMAND_ID_BYTES_MAX + 1)));
    }
}
