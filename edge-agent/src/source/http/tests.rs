use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use segment_log::{Disk, Options, Position, Reader};

use super::*;
use crate::config::{Settings, SourceSettings};
use crate::journal::{Journal, OpenJournal};

const TOKEN: &str = "a-token";

fn settings(more: &str) -> HttpSettings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"http\"\nname = \"lora\"\nlisten = \"127.0.0.1:0\"\nmax_payload = \"1KiB\"\n{more}\n\
         stream = \"s\"\n[source.map]\ndevice = \"topic:1\"\n[stream.s.fields]\nv = {{ type = \"text\" }}\n"
    );
    match Settings::parse(&text).unwrap().source.remove(0) {
        SourceSettings::Http(http) => *http,
        _ => panic!(),
    }
}

/// A door with its journal, and a client.
struct Door {
    _directory: tempfile::TempDir,
    journal: Journal,
    reader: Reader<Disk>,
    state: Arc<SourceState>,
    token: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    client: reqwest::Client,
    url: String,
}

impl Door {
    async fn open(more: &str, journal_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { segment_bytes: 8 << 10, max_bytes: journal_bytes, reserve_bytes: 64 };
        let open = OpenJournal::open(directory.path().join("journal"), options).unwrap().0;
        let reader = open.reader(Position(0)).unwrap();
        let journal = open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap();
        let (state, token) = (Arc::new(SourceState::default()), CancellationToken::new());
        let settings = settings(more);
        let listen = settings.listen;
        let push = Push { settings, journal: journal.sender(), state: Arc::clone(&state) };
        let door = Arc::new(super::Door::new(Places::default()));
        door.put(push);
        let task = tokio::spawn(door.run(listen, token.clone()));
        while !state.connected.load(Ordering::Relaxed) {
            tokio::task::yield_now().await;
        }
        let url = format!("http://{}/ingest", state.address.lock().unwrap());
        rustls::crypto::ring::default_provider().install_default().ok();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { _directory: directory, journal, reader, state, token, task, client, url }
    }

    fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
        self.client.post(format!("{}/{path}", self.url)).bearer_auth(TOKEN).body(body)
    }

    /// Topic and payload of what is durable and was not read yet.
    fn messages(&mut self) -> Vec<(String, Vec<u8>)> {
        let mut messages = Vec::new();
        while let Some(record) = self.reader.next().unwrap() {
            let Ok(Entry::Message(message)) = Entry::read(Bytes::copy_from_slice(record.payload)) else { panic!() };
            let Payload::Whole(payload) = message.payload else { panic!() };
            assert_eq!(message.source, "lora");
            messages.push((message.topic, payload.to_vec()));
        }
        messages
    }
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn what_is_answered_with_200_is_in_the_journal_and_nothing_else_is() {
    let mut door = Door::open(&format!("token = \"{TOKEN}\""), 1 << 20).await;
    let gzip = |request: reqwest::RequestBuilder| request.header("content-encoding", "gzip");
    let long = vec![b'x'; 1_025];
    let requests = [
        (door.post("lora", "{}"), 200),
        (door.post("lora/17?event=up&place=a%2Fb", "1"), 200),
        (gzip(door.post("lora/gz", packed(&[b'z'; 1_024]))), 200),
        (gzip(door.post("lora", packed(&[b'z'; 1_025]))), 413),
        (gzip(door.post("lora", "plain")), 400),
        (door.post("lora", "br").header("content-encoding", "br"), 415),
        (door.post("lora", long.clone()), 413),
        (door.post("lora", reqwest::Body::wrap_stream(futures::stream::iter([Ok::<_, std::io::Error>(long)]))), 413),
        (door.post("other", "{}"), 404),
        (door.client.post(format!("{}/lora", door.url)).body("{}"), 401),
        (door.client.post(format!("{}/lora", door.url)).bearer_auth("a-tokex").body("{}"), 401),
        (door.client.get(format!("{}/lora", door.url)).bearer_auth(TOKEN), 405),
    ];
    for (request, expected) in requests {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), expected, "{}", response.text().await.unwrap());
    }
    let taken = door.messages();
    let expected = [("lora", b"{}".to_vec()), ("lora/17/up/a%2Fb", b"1".to_vec()), ("lora/gz", vec![b'z'; 1_024])];
    assert_eq!(taken, expected.map(|(topic, body)| (topic.to_owned(), body)));
    assert_eq!(door.state.received.load(Ordering::Relaxed), 3);
    door.token.cancel();
    door.task.await.unwrap();
    assert!(!door.state.connected.load(Ordering::Relaxed));
}

#[tokio::test]
async fn a_full_journal_is_told_to_the_caller_until_it_has_room() {
    let mut door = Door::open("timeout = \"200ms\"", 16 << 10).await;
    let mut stored = 0;
    let refused = loop {
        let response = door.post("lora", vec![b'x'; 1_000]).send().await.unwrap();
        match response.status().as_u16() {
            200 => stored += 1,
            // It was given before the journal was known to be full, and may be stored when there is room.
            503 => {}
            _ => break response,
        }
        assert!(stored < 100);
    };
    assert_eq!(
        (refused.status(), refused.headers()["retry-after"].to_str().unwrap()),
        (StatusCode::TOO_MANY_REQUESTS, "1")
    );
    assert!(door.state.last_error.lock().is_some());
    let taken = door.messages().len();
    assert_eq!(taken, stored);
    door.journal.free_before(door.reader.position());
    while door.journal.is_full() {
        tokio::task::yield_now().await;
    }
    assert_eq!(door.post("lora", "{}").send().await.unwrap().status(), 200);
    assert_eq!(door.messages().last().unwrap().1, b"{}");
    assert!(door.state.last_error.lock().is_none());
}

#[tokio::test]
async fn a_body_that_never_comes_ends_with_its_time() {
    let door = Door::open("timeout = \"50ms\"", 1 << 20).await;
    let never = reqwest::Body::wrap_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    assert_eq!(door.post("lora", never).send().await.unwrap().status(), 408);
}

#[test]
fn a_door_to_the_outside_needs_a_token() {
    let check = |from: &str, to: &str, expected: &str| {
        let text = "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n[[source]]\n\
                    kind = \"http\"\nlisten = \"0.0.0.0:7311\"\ntoken = \"u\"\nstream = \"s\"\n[source.map]\n\
                    device = \"topic:1\"\n[stream.s.fields]\nv = { type = \"text\" }\n";
        assert!(Settings::parse(text).is_ok(), "{:?}", Settings::parse(text));
        let error = Settings::parse(&text.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    check("token = \"u\"", "", "set token");
    check("token = \"u\"", "token = \"\"", "empty");
    check("token = \"u\"", "tokn = \"u\"", "did you mean `token`?");
    check("kind", "name = \"a/b\"\nkind", "plain `name`");
    check("stream = \"s\"", "stream = \"r\"", "no [stream.r]");
    check("topic:1", "topic:one", "names no place");
}
