//! Registers of devices that speak Modbus over TCP or a serial line, asked for at intervals.
//!
//! Every `every` one message: an array with a reading for each unit, `{"device", "status", <field>…}`, stamped by its
//! arrival. Registers that lie side by side are asked for together. A value that the device refuses, that is its
//! `absent`, or that is no number is null; `status` is `ok` or what the device said. A unit that does not answer is
//! marked: its reading has only a `status`, when the stream has that field; without it the unit is just silent, and the
//! source's error names it. Neither ends anything: the line is opened again, and the next unit is asked.
//! Polls cannot wait for a full journal: they are counted (`missed.rs`).

#[cfg(test)]
mod tests;
mod value;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Map, Value};
use serial2_tokio::{SerialPort, StopBits};
use tokio::net::TcpStream;
use tokio_modbus::client::{Context, Reader as _, rtu, tcp};
use tokio_modbus::slave::{Slave, SlaveContext as _};
use tokio_util::sync::CancellationToken;

use super::SourceState;
use super::missed::Giver;
use crate::config::{ModbusAddress, ModbusSettings, Parity, RegisterSettings, STATUS, Table};
use crate::journal::JournalSender;

/// Registers, and coils, in one request, by the standard.
const REGISTERS_MAX: u16 = 125;
const COILS_MAX: u16 = 2_000;

/// A Modbus source.
#[derive(Debug)]
pub struct Poll {
    pub settings: ModbusSettings,
    /// Whether a unit that does not answer gives a reading.
    pub marks: bool,
    pub journal: JournalSender,
    pub state: Arc<SourceState>,
}

/// Values that are asked for together.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    table: Table,
    address: u16,
    count: u16,
    /// Their indices in the settings.
    registers: Vec<usize>,
}

/// What a device answered to one request: words, or coils as words of 0 and 1.
type Answer = Result<Vec<u16>, String>;

impl Poll {
    /// Runs until the token is cancelled or the journal has ended.
    pub async fn run(self, token: CancellationToken) {
        let Self { settings, marks, journal, state } = self;
        let mut giver = Giver::new(settings.name.clone(), journal);
        let requests = requests(&settings.register);
        let mut line = None;
        let mut ticks = tokio::time::interval(settings.every.0);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut told = false;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = token.cancelled() => break,
            }
            let Polled { readings, silent, refused } = tokio::select! {
                polled = poll(&settings, &requests, &mut line, marks, &state) => polled,
                () = token.cancelled() => break,
            };
            state.connected.store(silent.len() < settings.unit.len(), Ordering::Relaxed);
            let wrong = [silent, refused].concat().join("; ");
            if wrong.is_empty() {
                *state.last_error.lock() = None;
            } else {
                if !told {
                    tracing::warn!(source = settings.name, wrong, "devices do not answer, or refuse registers");
                }
                state.error(wrong.clone());
            }
            told = !wrong.is_empty();
            if !readings.is_empty() && giver.give(Value::Array(readings).to_string().into(), &state).is_err() {
                break;
            }
        }
        giver.finish().await;
        state.connected.store(false, Ordering::Relaxed);
    }
}

/// What became of asking every unit once.
#[derive(Default)]
struct Polled {
    readings: Vec<Value>,
    /// Who did not answer, and why.
    silent: Vec<String>,
    /// Who answered, but refused registers, and why.
    refused: Vec<String>,
}

/// Asks every unit once.
async fn poll(
    settings: &ModbusSettings,
    requests: &[Request],
    line: &mut Option<Context>,
    marks: bool,
    state: &SourceState,
) -> Polled {
    let mut polled = Polled::default();
    for unit in &settings.unit {
        let mut reading = Map::new();
        reading.insert("device".to_owned(), Value::from(unit.device.as_str()));
        let mut status = "ok".to_owned();
        let asked = ask(settings, requests, line, unit.id, state).await;
        match asked {
            Ok(answers) => {
                for (request, answer) in requests.iter().zip(answers) {
                    match answer {
                        Ok(words) => {
                            for register in &request.registers {
                                let register = &settings.register[*register];
                                let at = usize::from(register.address - request.address);
                                let words = words.get(at..at + usize::from(register.words()));
                                let value = words.map_or(Value::Null, |words| value::read(register, words));
                                reading.insert(register.field.to_string(), value);
                            }
                        }
                        Err(refusal) => {
                            polled.refused.push(format!("{}: {refusal}", unit.device));
                            status = refusal;
                        }
                    }
                }
            }
            Err(error) => {
                polled.silent.push(format!("{}: {error}", unit.device));
                // Half an answer may still be on its way.
                *line = None;
                if !marks {
                    continue;
                }
                status = error.to_string();
            }
        }
        reading.insert(STATUS.to_owned(), Value::from(status));
        polled.readings.push(Value::Object(reading));
    }
    polled
}

/// All requests to one unit.
async fn ask(
    settings: &ModbusSettings,
    requests: &[Request],
    line: &mut Option<Context>,
    unit: u8,
    state: &SourceState,
) -> io::Result<Vec<Answer>> {
    let within = settings.timeout.0;
    let context = match line {
        Some(context) => context,
        None => {
            let context = line.insert(timed(within, open(settings)).await?);
            state.connects.fetch_add(1, Ordering::Relaxed);
            context
        }
    };
    context.set_slave(Slave(unit));
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        answers.push(timed(within, read(context, request)).await?);
    }
    Ok(answers)
}

async fn timed<T>(within: Duration, future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(within, future).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
    }
}

async fn open(settings: &ModbusSettings) -> io::Result<Context> {
    match &settings.url {
        ModbusAddress::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(tcp::attach_slave(stream, Slave(0)))
        }
        ModbusAddress::Rtu(path) => {
            let line = SerialPort::open(path, |mut line: serial2_tokio::Settings| {
                line.set_raw();
                line.set_baud_rate(settings.baud)?;
                line.set_parity(match settings.parity {
                    Parity::None => serial2_tokio::Parity::None,
                    Parity::Even => serial2_tokio::Parity::Even,
                    Parity::Odd => serial2_tokio::Parity::Odd,
                });
                line.set_stop_bits(if settings.stop_bits == 2 { StopBits::Two } else { StopBits::One });
                Ok(line)
            })?;
            // What came before is no answer to what will be asked.
            line.discard_input_buffer()?;
            Ok(rtu::attach_slave(line, Slave(0)))
        }
    }
}

async fn read(context: &mut Context, request: &Request) -> io::Result<Answer> {
    let Request { table, address, count, .. } = *request;
    let coils = |coils: Vec<bool>| coils.into_iter().map(u16::from).collect();
    let result = match table {
        Table::Holding => context.read_holding_registers(address, count).await,
        Table::Input => context.read_input_registers(address, count).await,
        Table::Coil => context.read_coils(address, count).await.map(|answer| answer.map(coils)),
        Table::Discrete => context.read_discrete_inputs(address, count).await.map(|answer| answer.map(coils)),
    };
    match result {
        Ok(Ok(words)) => Ok(Ok(words)),
        Ok(Err(exception)) => Ok(Err(format!("{table:?} {address}: {exception}").to_lowercase())),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// Values side by side are one request; those with a gap between them are not, because a device may refuse the gap.
fn requests(registers: &[RegisterSettings]) -> Vec<Request> {
    let mut order = (0..registers.len()).collect::<Vec<_>>();
    order.sort_by_key(|index| (registers[*index].table, registers[*index].address));
    let mut requests = Vec::<Request>::new();
    for index in order {
        let register = &registers[index];
        let (table, address, words) = (register.table, register.address, register.words());
        let max = if matches!(table, Table::Coil | Table::Discrete) { COILS_MAX } else { REGISTERS_MAX };
        if let Some(last) = requests.last_mut()
            && last.table == table
            && address - last.address <= last.count
            && address - last.address + words <= max
        {
            last.count = last.count.max(address - last.address + words);
            last.registers.push(index);
        } else {
            requests.push(Request { table, address, count: words, registers: vec![index] });
        }
    }
    requests
}
