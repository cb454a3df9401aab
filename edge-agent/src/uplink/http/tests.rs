use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::*;
use crate::config::Settings;

const SOURCE: &str = r#"
[[source]]
kind = "mqtt"
url = "mqtt://127.0.0.1:1"
topics = ["t/+"]
stream = "s"
format = "json"
[source.map]
device = "topic:1"
v = "/v"
[stream.s.fields]
v = { type = "int64" }
"#;
const ANSWER: &str = r#"{"node":"n","acks":[],"refused":[]}"#;

/// A client of a server that does with each connection what `serve` says.
async fn client<F: Future<Output = ()> + Send + 'static>(
    timeout: &str,
    serve: impl Fn(TcpStream) -> F + Send + 'static,
) -> CloudClient {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(8).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    let text = format!(
        "[edge]\nid = \"gw\"\ndata_dir = \"unused\"\n[cloud]\nurls = [\"http://{address}\"]\ntoken = \"t\"\ntimeout = \"{timeout}\"\n{SOURCE}"
    );
    let settings = Settings::parse(&text).unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    CloudClient::new(&settings.cloud, &"gw".parse().unwrap()).unwrap()
}

/// Reads a request's head; returns how long its body is, and how much of that came with the head.
async fn head(stream: &mut TcpStream) -> (usize, usize) {
    let mut bytes = Vec::new();
    loop {
        let mut part = [0; 4096];
        let count = stream.read(&mut part).await.unwrap();
        bytes.extend_from_slice(&part[..count]);
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("it has a length");
            return (length.parse().unwrap(), bytes.len() - end - 4);
        }
    }
}

/// 4 MiB: by its length alone it would be waited for more than eight minutes.
#[tokio::test]
async fn an_answer_that_never_comes_is_given_up_soon_after_the_bytes_have_gone() {
    let client = client("300ms", |mut stream| async move {
        let (length, mut have) = head(&mut stream).await;
        let mut buffer = vec![0; 64 << 10];
        while have < length {
            have += stream.read(&mut buffer).await.unwrap();
        }
        std::future::pending::<()>().await;
    })
    .await;
    let sent = client.send(0, Parcel::plain(vec![7; 4 << 20]));
    let failed = tokio::time::timeout(Duration::from_secs(20), sent).await.expect("it was given up").unwrap_err();
    assert_eq!(failed.failure, Failure::Link);
    assert!(failed.text.contains("no answer"), "{}", failed.text);
}

/// More than the timeout in all, and never a moment of that length without progress. The last of it goes at once: what is in
/// the kernel's buffers on a machine of its own is more than on a link.
#[tokio::test]
async fn a_slow_link_that_goes_on_is_not_cut() {
    let client = client("2s", |mut stream| async move {
        let (length, mut have) = head(&mut stream).await;
        let mut buffer = vec![0; 256 << 10];
        while have < length {
            if have < 16 << 20 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            have += stream.read(&mut buffer).await.unwrap();
        }
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{ANSWER}", ANSWER.len());
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let begun = std::time::Instant::now();
    let acks = client.send(0, Parcel::plain(vec![7; 24 << 20])).await.unwrap();
    assert_eq!(acks.node, "n");
    assert!(begun.elapsed() > Duration::from_millis(2_500), "it was not slow: {:?}", begun.elapsed());
}
