use std::path::Path;

use bytes::Bytes;
use segment_log::{Disk, Options, Position, Reader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::*;
use crate::config::{MqttVersion, Settings, SourceSettings};
use crate::journal::{Journal, OpenJournal};
use crate::redelivery::Lists;

const CLIENT: &str = "weir-e-s";

fn settings(port: u16, topics: &str) -> MqttSettings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nversion = \"3.1.1\"\nurl = \"mqtt://127.0.0.1:{port}\"\ntopics = [{topics}]\n\
         stream = \"s\"\n[source.map]\ndevice = \"const:d\"\nts = \"arrival\"\n[stream.s.fields]\nv = {{ type = \"text\" }}\n"
    );
    match Settings::parse(&text).unwrap().source.remove(0) {
        SourceSettings::Mqtt(mqtt) => *mqtt,
        _ => panic!(),
    }
}

/// Reads a packet of MQTT 3.1.1: its kind and what is behind the length. None at the end.
async fn packet(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await.ok()? >> 4;
    let (mut len, mut shift) = (0, 0);
    loop {
        let byte = stream.read_u8().await.ok()?;
        len |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            break;
        }
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}

/// A broker for one connection: it tells what is subscribed and unsubscribed, in order. After so many `answers` it does not
/// acknowledge an UNSUBSCRIBE but publishes: when that is acknowledged, all before it has been looked at.
async fn broker(listener: &TcpListener, has_session: bool, answers: usize, told: mpsc::UnboundedSender<String>) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut answered = 0;
    while let Some((kind, body)) = packet(&mut stream).await {
        let filters = |step: usize| {
            let (mut at, mut filters) = (2, Vec::new());
            while at < body.len() {
                let len = usize::from(u16::from_be_bytes([body[at], body[at + 1]]));
                filters.push(String::from_utf8(body[at + 2..at + 2 + len].to_vec()).unwrap());
                at += 2 + len + step;
            }
            filters
        };
        match kind {
            1 => stream.write_all(&[0x20, 2, u8::from(has_session), 0]).await.unwrap(),
            8 => {
                let filters = filters(1);
                let mut answer = vec![0x90, 2 + filters.len() as u8, body[0], body[1]];
                answer.extend(vec![1; filters.len()]);
                stream.write_all(&answer).await.unwrap();
                told.send(format!("subscribe {}", filters.join(" "))).unwrap();
            }
            10 => {
                told.send(format!("unsubscribe {}", filters(0).join(" "))).unwrap();
                if answered < answers {
                    stream.write_all(&[0xb0, 2, body[0], body[1]]).await.unwrap();
                    answered += 1;
                } else {
                    stream.write_all(b"\x32\x07\x00\x01c\x00\x01{}").await.unwrap();
                }
            }
            4 => told.send("acknowledge".to_owned()).unwrap(),
            3 => {
                let (topic, payload) = body[2..].split_at(usize::from(u16::from_be_bytes([body[0], body[1]])));
                told.send(format!("{} {payload:?}", String::from_utf8_lossy(topic))).unwrap();
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_look_at_a_broker_leaves_nothing_there_and_tells_apart_what_was_kept() {
    for (version, connect, suback, publish) in [
        (
            MqttVersion::V311,
            &b"\x20\x02\x00\x00"[..],
            &b"\x90\x03\x00\x01\x01"[..],
            ["\x31\x05\0\x01aAB", "\x30\x05\0\x01bCD"],
        ),
        (
            MqttVersion::V5,
            b"\x20\x03\x00\x00\x00",
            b"\x90\x04\x00\x01\x00\x01",
            ["\x31\x06\0\x01a\0AB", "\x30\x06\0\x01b\0CD"],
        ),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let settings = MqttSettings { version, ..settings(listener.local_addr().unwrap().port(), "\"#\"") };
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (_, asked) = packet(&mut stream).await.unwrap();
            // Behind the protocol's name and version.
            let (flags, rest) = (asked[7], &asked[10..]);
            assert_eq!(flags & 2, 2, "{version:?}: it wants to begin anew");
            if version == MqttVersion::V5 {
                // Properties; 0x11 and four bytes: how long the session is kept.
                let properties = &rest[1..=usize::from(rest[0])];
                let kept =
                    properties.windows(5).find(|window| window[0] == 0x11).map_or(&[0; 4][..], |window| &window[1..]);
                assert_eq!(kept, [0; 4], "{properties:?}");
            }
            stream.write_all(connect).await.unwrap();
            assert_eq!(packet(&mut stream).await.unwrap().0, 8);
            stream.write_all(suback).await.unwrap();
            for publish in publish {
                stream.write_all(publish.as_bytes()).await.unwrap();
            }
            while packet(&mut stream).await.is_some() {}
        };
        let look = probe::hear(&settings, "weir-look", Duration::from_secs(30), 1);
        let (heard, ()) = tokio::join!(look, serve);
        let has = |heard: &[(String, Bytes)]| {
            heard.iter().map(|(topic, payload)| (topic.clone(), payload.to_vec())).collect::<Vec<_>>()
        };
        assert_eq!(has(&heard.messages), [("b".to_owned(), b"CD".to_vec())], "{heard:?}");
        assert_eq!(has(&heard.retained), [("a".to_owned(), b"AB".to_vec())], "{heard:?}");
    }
}

/// What the journal says of the client.
struct Known(Reader<Disk>, Lists);

impl Known {
    fn read(&mut self) -> redelivery::Client {
        while let Some(record) = self.0.next().unwrap() {
            self.1.apply(&Entry::read(Bytes::copy_from_slice(record.payload)).unwrap());
        }
        self.1.0.get(CLIENT).cloned().unwrap_or_default()
    }
}

fn journal(directory: &Path) -> (Journal, Known) {
    let options = Options { segment_bytes: 8 << 10, max_bytes: 1 << 20, reserve_bytes: 64 };
    let open = OpenJournal::open(directory.join("journal"), options).unwrap().0;
    let known = Known(open.reader(Position(0)).unwrap(), Lists::default());
    (open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap(), known)
}

#[tokio::test]
async fn a_topic_that_left_the_configuration_is_unsubscribed_until_the_broker_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, mut known) = journal(directory.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut check = async |topics: &str, session: bool, answers: usize, expected: &[&str], then: &[&str]| {
        let token = CancellationToken::new();
        let connection = Connection {
            settings: settings(port, topics),
            client: CLIENT.to_owned(),
            journal: journal.sender(),
            known: known.read(),
            state: Arc::default(),
            task: Task::Collect,
        };
        let run = tokio::spawn(connection.run(token.clone()));
        let (told, mut heard) = mpsc::unbounded_channel();
        let serve = broker(&listener, session, answers, told);
        let follow = async {
            for expected in expected {
                assert_eq!(heard.recv().await.unwrap(), *expected);
                let filters = settings(port, topics).filters();
                let known = known.read().filters;
                assert!(filters.iter().all(|filter| known.contains(filter)), "{expected}: in the journal before");
            }
            let mut synced = journal.synced();
            while known.read().filters != *then {
                tokio::time::timeout(Duration::from_secs(20), synced.changed()).await.expect("journalled").unwrap();
            }
            token.cancel();
            run.await.unwrap().unwrap();
        };
        tokio::join!(serve, follow);
        assert!(heard.try_recv().is_err(), "{topics}: nothing else");
        assert_eq!(known.read().filters, then, "{topics}");
    };
    let all = ["a/#", "b", "c"];
    check("\"a/#\", \"b\"", false, 9, &["subscribe a/# b"], &all[..2]).await;
    check("\"b\", \"c\"", true, 0, &["subscribe b c", "unsubscribe a/#", "acknowledge"], &all).await;
    let both = ["subscribe c", "unsubscribe a/#", "unsubscribe b", "acknowledge"];
    check("\"c\"", true, 1, &both, &all).await;
    check("\"c\"", true, 2, &both[..3], &["c"]).await;
    check("\"c\"", true, 9, &["subscribe c"], &["c"]).await;
    // A new session has no subscriptions: there is nothing to take back.
    check("\"d\"", false, 9, &["subscribe d"], &["d"]).await;
}

#[tokio::test]
async fn what_a_decoder_asks_for_is_published_when_the_broker_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, mut known) = journal(directory.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (token, state) = (CancellationToken::new(), Arc::new(SourceState::default()));
    let command = |node: &str| crate::decode::Command { topic: format!("spBv1.0/g/NCMD/{node}"), payload: vec![7] };
    // Before it is connected.
    state.command(command("early"));
    let connection = Connection {
        settings: settings(port, "\"spBv1.0/#\""),
        client: CLIENT.to_owned(),
        journal: journal.sender(),
        known: known.read(),
        state: Arc::clone(&state),
        task: Task::Collect,
    };
    let run = tokio::spawn(connection.run(token.clone()));
    let (told, mut heard) = mpsc::unbounded_channel();
    let serve = broker(&listener, false, 9, told);
    let follow = async {
        assert_eq!(heard.recv().await.unwrap(), "subscribe spBv1.0/#");
        assert_eq!(heard.recv().await.unwrap(), "spBv1.0/g/NCMD/early [7]");
        state.command(command("n"));
        assert_eq!(heard.recv().await.unwrap(), "spBv1.0/g/NCMD/n [7]");
        token.cancel();
        run.await.unwrap().unwrap();
    };
    tokio::join!(serve, follow);
    assert_eq!(state.commands_sent.load(Ordering::Relaxed), 2);
}
