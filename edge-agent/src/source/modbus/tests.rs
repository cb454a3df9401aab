use std::collections::BTreeMap;
use std::future::{Ready, ready};
use std::os::fd::OwnedFd;

use arrow_cast::display::array_value_to_string;
use bytes::Bytes;
use segment_log::{Disk, Options, Position, Reader};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_modbus::server::tcp::{Server, accept_tcp_connection};
use tokio_modbus::{ExceptionCode, Request as Asked, Response, SlaveRequest};

use super::*;
use crate::config::{Settings, SourceSettings};
use crate::entry::{Entry, Payload};
use crate::journal::{Journal, OpenJournal};
use crate::pipeline::Pipeline;

fn settings(url: &str, registers: &str) -> ModbusSettings {
    modbus(&configured(url, registers))
}

fn modbus(settings: &Settings) -> ModbusSettings {
    match &settings.source[0] {
        SourceSettings::Modbus(modbus) => ModbusSettings::clone(modbus),
        _ => panic!(),
    }
}

fn configured(url: &str, registers: &str) -> Settings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"modbus\"\nurl = \"{url}\"\nevery = \"10ms\"\ntimeout = \"200ms\"\n\
         stream = \"s\"\n[[source.unit]]\nid = 1\ndevice = \"one\"\n[[source.unit]]\nid = 2\ndevice = \"two\"\n{registers}\n\
         [stream.s.fields]\nstatus = {{ type = \"text\" }}\na = {{ type = \"float64\" }}\nb = {{ type = \"int64\" }}\n\
         c = {{ type = \"bool\" }}\n"
    );
    Settings::parse(&text).unwrap()
}

const REGISTERS: &str = "[[source.register]]\nfield = \"a\"\naddress = 10\ntype = \"f32\"\n\
    [[source.register]]\nfield = \"b\"\naddress = 7\ntable = \"input\"\n\
    [[source.register]]\nfield = \"c\"\naddress = 3\ntable = \"coil\"\ntype = \"bits\"\n";

/// Unit 1 has no input registers, unit 2 answers when `all` is set.
struct Device {
    all: Arc<std::sync::atomic::AtomicBool>,
}

impl tokio_modbus::server::Service for Device {
    type Request = SlaveRequest<'static>;
    type Response = Option<Response>;
    type Exception = ExceptionCode;
    type Future = Ready<Result<Option<Response>, ExceptionCode>>;

    fn call(&self, asked: SlaveRequest<'static>) -> Self::Future {
        let all = self.all.load(Ordering::Relaxed);
        ready(match (asked.slave, asked.request) {
            (2, _) if !all => Ok(None),
            (_, Asked::ReadHoldingRegisters(10, 2)) => Ok(Some(Response::ReadHoldingRegisters(vec![0x41a4, 0]))),
            (2, Asked::ReadInputRegisters(7, 1)) => Ok(Some(Response::ReadInputRegisters(vec![9]))),
            (_, Asked::ReadCoils(3, 1)) => Ok(Some(Response::ReadCoils(vec![true]))),
            _ => Err(ExceptionCode::IllegalDataAddress),
        })
    }
}

struct Run {
    _directory: tempfile::TempDir,
    _journal: Journal,
    reader: Reader<Disk>,
    synced: tokio::sync::watch::Receiver<Position>,
    state: Arc<SourceState>,
    token: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Run {
    fn start(settings: ModbusSettings, marks: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { segment_bytes: 8 << 10, max_bytes: 1 << 20, reserve_bytes: 64 };
        let open = OpenJournal::open(directory.path().join("journal"), options).unwrap().0;
        let reader = open.reader(Position(0)).unwrap();
        let journal = open.run(Duration::from_millis(1), std::sync::Arc::default()).unwrap();
        let (state, token) = (Arc::new(SourceState::default()), CancellationToken::new());
        let poll = Poll { settings, marks, journal: journal.sender(), state: Arc::clone(&state) };
        let task = tokio::spawn(poll.run(token.clone()));
        let synced = journal.synced();
        Self { _directory: directory, _journal: journal, reader, synced, state, token, task }
    }

    /// The next message.
    async fn next(&mut self) -> Value {
        loop {
            if let Some(record) = self.reader.next().unwrap() {
                let entry = Entry::read(Bytes::copy_from_slice(record.payload)).unwrap();
                let Payload::Whole(payload) = &entry.message().unwrap().payload else { panic!() };
                return serde_json::from_slice(payload).unwrap();
            }
            self.synced.changed().await.unwrap();
        }
    }

    /// Device, status and `a` of what the first message becomes.
    fn rows(&self, settings: &Settings) -> Vec<String> {
        let mut reader = self.reader.another(Position(0)).unwrap();
        let mut pipeline = Pipeline::new(settings, Position(0), &BTreeMap::new());
        let record = reader.next().unwrap().unwrap();
        pipeline.apply(record.position, record.next, &Entry::read(Bytes::copy_from_slice(record.payload)).unwrap());
        let cut = pipeline.cut().unwrap();
        let lane = cut.lanes.iter().find(|lane| lane.batches.iter().any(|batch| batch.stream.as_str() == "s")).unwrap();
        let rows = lane.batches[0].decode(&lane.schemas[0]).unwrap();
        let column = |name: &str| rows.column_by_name(name).unwrap();
        let text = |name: &str, row| array_value_to_string(column(name), row).unwrap();
        (0..rows.num_rows()).map(|row| ["device", "status", "a"].map(|name| text(name, row)).join(" ")).collect()
    }

    async fn stop(self) {
        self.token.cancel();
        self.task.await.unwrap();
        assert!(!self.state.connected.load(Ordering::Relaxed));
    }
}

#[tokio::test]
async fn a_device_that_does_not_answer_is_marked_and_the_others_are_read() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let all = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let devices = Arc::clone(&all);
    let server = tokio::spawn(async move {
        let service = |_| Ok(Some(Device { all: Arc::clone(&devices) }));
        let connected = |stream, address| {
            let accepted = accept_tcp_connection(stream, address, service);
            async move { accepted }
        };
        Server::new(listener).serve(&connected, |_| {}).await
    });
    let mut run = Run::start(settings(&format!("tcp://{address}"), REGISTERS), true);
    let one = json!({"device": "one", "status": "input 7: illegal data address", "a": 20.5, "c": true});
    assert_eq!(run.next().await, json!([one, {"device": "two", "status": "no answer"}]));
    assert_eq!(run.next().await, json!([one, {"device": "two", "status": "no answer"}]));
    assert_eq!(run.state.last_error.lock().as_deref(), Some("two: no answer; one: input 7: illegal data address"));
    assert!(run.state.connected.load(Ordering::Relaxed));
    all.store(true, Ordering::Relaxed);
    let both = json!([one, {"device": "two", "status": "ok", "a": 20.5, "b": 9, "c": true}]);
    while run.next().await != both {}
    run.next().await;
    assert_eq!(run.state.last_error.lock().as_deref(), Some("one: input 7: illegal data address"));
    // The whole line goes: both are marked, and nothing ends.
    server.abort();
    let _ = server.await;
    while run.next().await[0]["status"] == one["status"] {}
    assert!(!run.task.is_finished());
    run.stop().await;
}

#[tokio::test]
async fn nobody_is_marked_in_a_stream_without_a_status() {
    let mut run = Run::start(settings("tcp://127.0.0.1:1", REGISTERS), false);
    while run.state.last_error.lock().is_none() {
        tokio::task::yield_now().await;
    }
    assert!(run.reader.next().unwrap().is_none());
    run.stop().await;
}

/// CRC-16 of Modbus.
fn crc(bytes: &[u8]) -> [u8; 2] {
    let step = |crc: u16| if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 };
    let crc = bytes.iter().fold(0xffff, |crc, byte| (0..8).fold(crc ^ u16::from(*byte), |crc, _| step(crc)));
    crc.to_le_bytes()
}

#[tokio::test]
async fn a_serial_line_is_read() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    // Without parity: a pseudo terminal has none.
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    // As long as somebody has it open the other side does not hang up.
    let kept = std::fs::File::open(&path).unwrap();
    let register = "[[source.register]]\nfield = \"a\"\naddress = 10\ntype = \"f32\"\n";
    let parsed = configured(&format!("rtu://{path}\"\nbaud = 19200\nname = \"m"), register);
    let device = tokio::spawn(serve(master));
    let mut run = Run::start(modbus(&parsed), true);
    let one = json!({"device": "one", "status": "ok", "a": 20.5});
    assert_eq!(run.next().await, json!([one, {"device": "two", "status": "no answer"}]));
    assert_eq!(run.next().await[0], one, "after the line was opened again");
    assert_eq!(run.rows(&parsed), ["one ok 20.5", "two no answer "], "what the pipeline makes of it");
    run.stop().await;
    drop(kept);
    device.await.unwrap();
}

/// Unit 1 on a serial line: 20.5 in whatever two registers.
async fn serve(master: OwnedFd) {
    let mut line = tokio::fs::File::from_std(master.into());
    let mut request = [0; 8];
    while line.read_exact(&mut request).await.is_ok() {
        assert_eq!(request[6..], crc(&request[..6]));
        if request[0] == 1 {
            let mut answer = vec![1, request[1], 4, 0x41, 0xa4, 0, 0];
            answer.extend(crc(&answer));
            line.write_all(&answer).await.unwrap();
            line.flush().await.unwrap();
        }
    }
}

#[test]
fn values_side_by_side_are_asked_for_together() {
    let register = |table: &str, address: u16, kind: &str| {
        let text = format!("field = \"v\"\ntable = \"{table}\"\naddress = {address}\ntype = \"{kind}\"");
        toml::from_str::<RegisterSettings>(&text).unwrap()
    };
    let registers = [
        register("holding", 4, "u16"),
        register("holding", 0, "u64"),
        register("input", 5, "u16"),
        register("holding", 6, "u32"),
        register("holding", 3, "u16"),
        register("coil", 0, "bits"),
    ];
    let asked = requests(&registers);
    let asked = asked.iter().map(|request| (request.table, request.address, request.count)).collect::<Vec<_>>();
    let expected = [(Table::Holding, 0, 5), (Table::Holding, 6, 2), (Table::Input, 5, 1), (Table::Coil, 0, 1)];
    assert_eq!(asked, expected);
    let many = (0..200).map(|address| register("input", address, "u16")).collect::<Vec<_>>();
    assert_eq!(requests(&many).iter().map(|request| request.count).collect::<Vec<_>>(), [125, 75]);
}
