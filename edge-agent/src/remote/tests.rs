//! The hand, with a broker that is a socket of the test.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use wire::Command;

use super::*;
use crate::config::{MqttSettings, MqttVersion};

/// What one connection of the broker does: acknowledges as many publications, and then none.
async fn serve(mut socket: TcpStream, acknowledged: usize, got: mpsc::Sender<Bytes>) {
    let mut left = acknowledged;
    loop {
        let Ok(kind) = socket.read_u8().await else { return };
        let (mut length, mut shift) = (0_usize, 0);
        loop {
            let byte = socket.read_u8().await.unwrap();
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut packet = vec![0; length];
        socket.read_exact(&mut packet).await.unwrap();
        match kind >> 4 {
            1 => socket.write_all(&[0x20, 2, 0, 0]).await.unwrap(),
            3 => {
                let topic = usize::from(u16::from_be_bytes([packet[0], packet[1]]));
                let id = [packet[2 + topic], packet[3 + topic]];
                got.send(Bytes::copy_from_slice(&packet[4 + topic..])).await.unwrap();
                if left > 0 {
                    left -= 1;
                    socket.write_all(&[0x40, 2, id[0], id[1]]).await.unwrap();
                }
            }
            _ => {}
        }
    }
}

struct Stage {
    directory: tempfile::TempDir,
    listener: TcpListener,
    status: Shown,
    token: CancellationToken,
}

impl Stage {
    async fn set() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (directory, status) = (tempfile::tempdir().unwrap(), Shown::default());
        Self { directory, listener, status, token: CancellationToken::new() }
    }

    fn memory(&self) -> Memory {
        Memory::open(&self.directory.path().join("commands")).unwrap()
    }

    fn hand<'m>(&self, memory: &'m mut Memory) -> Hand<'m> {
        let url = format!("mqtt://{}", self.listener.local_addr().unwrap()).parse().unwrap();
        let broker = MqttSettings { version: MqttVersion::V311, ..MqttSettings::of_broker(url) };
        let settings =
            toml::from_str("name = \"plan\"\npublish = { topic = \"city/{device}\" }\nrate = \"100/1m\"").unwrap();
        let (actuator, _) = Actuator::start(broker, "c".to_owned(), Arc::clone(&self.status), self.token.clone());
        Hand { allowed: Allowed::new(&[settings], Instant::now()), memory, actuator }
    }
}

fn command(id: &str, within: Duration) -> Fetched {
    let command =
        Command { id: id.to_owned(), name: "plan".to_owned(), device: Some("s1".to_owned()), payload: id.to_owned() };
    Fetched { node: 0, command, until: Instant::now() + within }
}

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_command_is_done_once_however_often_it_comes_and_over_a_restart() {
    let stage = Stage::set().await;
    let (sender, mut got) = mpsc::channel(16);
    let mut memory = stage.memory();
    let mut hand = stage.hand(&mut memory);
    let broker = async {
        let (socket, _) = stage.listener.accept().await.unwrap();
        tokio::spawn(serve(socket, 2, sender.clone()));
    };
    let (reply, ()) = tokio::join!(async { hand.take(&command("1", LONG), &stage.status).await }, broker);
    assert_eq!(reply, CommandReply::done("published on city/s1"));
    assert_eq!(got.recv().await.unwrap(), "1");
    // Its answer was lost on its way.
    assert_eq!(hand.take(&command("1", LONG), &stage.status).await, reply);
    assert!(hand.take(&command("2", LONG), &stage.status).await.ok);
    assert_eq!(got.recv().await.unwrap(), "2");
    // The broker falls silent: what was handed over is not published again, on no other connection.
    let unknown = hand.take(&command("3", SHORT), &stage.status).await;
    assert!(!unknown.ok && unknown.answer.contains("not acknowledged"), "{unknown:?}");
    assert_eq!(got.recv().await.unwrap(), "3");
    let (socket, _) = stage.listener.accept().await.unwrap();
    tokio::spawn(serve(socket, 100, sender.clone()));
    assert_eq!(hand.take(&command("3", LONG), &stage.status).await, unknown);
    // One whose agent was killed while it did it.
    hand.memory.begin("4").await.unwrap();
    drop(hand);
    drop(memory);
    stage.token.cancel();
    let again = Stage { token: CancellationToken::new(), ..stage };
    let mut memory = again.memory();
    let mut hand = again.hand(&mut memory);
    let broker = async {
        let (socket, _) = again.listener.accept().await.unwrap();
        tokio::spawn(serve(socket, 100, sender.clone()));
    };
    let four = async {
        assert_eq!(hand.take(&command("1", LONG), &again.status).await, reply);
        let four = hand.take(&command("4", LONG), &again.status).await;
        assert!(!four.ok && four.answer.contains("nobody knows"), "{four:?}");
        hand.take(&command("5", LONG), &again.status).await
    };
    let (five, ()) = tokio::join!(four, broker);
    assert!(five.ok);
    assert_eq!(got.recv().await.unwrap(), "5");
    assert!(got.try_recv().is_err(), "nothing else was published");
    let status = again.status.lock().clone();
    let counts = (status.received, status.done, status.unknown, status.repeated);
    assert_eq!(counts, (8, 3, 1, 4));
    again.token.cancel();
}

#[tokio::test]
async fn a_command_is_never_done_late() {
    let stage = Stage::set().await;
    let (sender, mut got) = mpsc::channel(16);
    let mut memory = stage.memory();
    let mut hand = stage.hand(&mut memory);
    let over = hand.take(&command("1", Duration::ZERO), &stage.status).await;
    assert!(!over.ok && over.answer.contains("time was over"), "{over:?}");
    // The broker takes no connection in time; then it does.
    let late = hand.take(&command("2", SHORT), &stage.status).await;
    assert!(!late.ok && late.answer.contains("not there in time"), "{late:?}");
    let broker = async {
        let (socket, _) = stage.listener.accept().await.unwrap();
        tokio::spawn(serve(socket, 100, sender.clone()));
    };
    let (three, ()) = tokio::join!(async { hand.take(&command("3", LONG), &stage.status).await }, broker);
    assert!(three.ok, "{three:?}");
    assert_eq!(got.recv().await.unwrap(), "3", "neither 1 nor 2");
    let status = stage.status.lock().clone();
    assert_eq!((status.expired, status.done), (2, 1));
    stage.token.cancel();
}
