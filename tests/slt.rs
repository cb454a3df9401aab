//! The suites of `tests/slt` through all three doors: the same question gets the same answer.

use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use arrow_flight::sql::client::FlightSqlServiceClient;
use async_trait::async_trait;
use futures::TryStreamExt;
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::doors::stage_open;

/// An error as the door tells it.
#[derive(Debug)]
struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

fn refused(error: impl std::fmt::Display) -> Refused {
    Refused(error.to_string())
}

/// Rows of texts.
type Rows = Vec<Vec<String>>;

fn texts(batches: &[RecordBatch]) -> Result<Rows, Refused> {
    let options = FormatOptions::default().with_null("NULL");
    let mut rows = Vec::new();
    for batch in batches {
        let columns: Vec<ArrayFormatter<'_>> = batch
            .columns()
            .iter()
            .map(|column| ArrayFormatter::try_new(column.as_ref(), &options))
            .collect::<Result<_, _>>()
            .map_err(refused)?;
        rows.extend(
            (0..batch.num_rows()).map(|row| columns.iter().map(|column| column.value(row).to_string()).collect()),
        );
    }
    Ok(rows)
}

#[async_trait]
trait Asks: Send {
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused>;
}

struct Http(String);

#[async_trait]
impl Asks for Http {
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused> {
        let request = reqwest::Client::new().post(format!("{}/v1/sql", self.0));
        let request = request.header("accept", "application/vnd.apache.arrow.stream").body(sql.to_owned());
        let answer = request.send().await.map_err(refused)?;
        let good = answer.status().is_success();
        let body = answer.bytes().await.map_err(refused)?;
        if !good {
            return Err(Refused(String::from_utf8_lossy(&body).into_owned()));
        }
        let reader = arrow::ipc::reader::StreamReader::try_new(std::io::Cursor::new(body), None).map_err(refused)?;
        texts(&reader.collect::<Result<Vec<_>, _>>().map_err(refused)?)
    }
}

struct Flight(FlightSqlServiceClient<Channel>);

#[async_trait]
impl Asks for Flight {
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused> {
        let info = self.0.execute(sql.to_owned(), None).await.map_err(refused)?;
        let ticket = info.endpoint[0].ticket.clone().unwrap();
        let rows = self.0.do_get(ticket).await.map_err(refused)?;
        texts(&rows.try_collect::<Vec<_>>().await.map_err(refused)?)
    }
}

/// The simple protocol by hand.
struct Postgres(TcpStream);

impl Postgres {
    async fn connect(port: u16) -> Self {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let startup = b"\0\x03\0\0user\0reader\0database\0weir\0\0";
        socket.write_all(&[&(startup.len() as u32 + 4).to_be_bytes()[..], startup].concat()).await.unwrap();
        let mut client = Self(socket);
        client.answer().await.unwrap();
        client
    }

    async fn answer(&mut self) -> Result<Rows, Refused> {
        let mut answer = Ok(Vec::new());
        loop {
            let kind = self.0.read_u8().await.map_err(refused)?;
            let mut body = vec![0; self.0.read_u32().await.map_err(refused)? as usize - 4];
            self.0.read_exact(&mut body).await.map_err(refused)?;
            match (kind, &mut answer) {
                (b'D', Ok(rows)) => rows.push(fields(&body)),
                (b'E', _) => answer = Err(Refused(String::from_utf8_lossy(&body).replace('\0', " "))),
                (b'Z', _) => return answer,
                _ => {}
            }
        }
    }
}

fn fields(row: &[u8]) -> Vec<String> {
    let mut rest = &row[2..];
    let mut fields = Vec::new();
    while let Some((length, more)) = rest.split_first_chunk() {
        let length = usize::try_from(i32::from_be_bytes(*length));
        let (field, more) = more.split_at(*length.as_ref().unwrap_or(&0));
        fields.push(if length.is_ok() { String::from_utf8(field.to_vec()).unwrap() } else { "NULL".to_owned() });
        rest = more;
    }
    fields
}

#[async_trait]
impl Asks for Postgres {
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused> {
        let length = (sql.len() as u32 + 5).to_be_bytes();
        self.0.write_all(&[b"Q", &length[..], sql.as_bytes(), b"\0"].concat()).await.map_err(refused)?;
        self.answer().await
    }
}

struct Door(Box<dyn Asks>);

#[async_trait]
impl AsyncDB for Door {
    type Error = Refused;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Refused> {
        let rows = self.0.ask(sql).await?;
        let types = vec![DefaultColumnType::Any; rows.first().map_or(0, Vec::len)];
        Ok(DBOutput::Rows { types, rows })
    }

    async fn shutdown(&mut self) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_answers_alike() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage_open(directory.path()).await;
    let suites = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/slt");
    let mut files: Vec<_> = std::fs::read_dir(suites).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 3);
    for door in ["http", "flight_sql", "postgres"] {
        for file in &files {
            let mut runner = Runner::new(|| async {
                Ok(Door(match door {
                    "http" => Box::new(Http(cloud.http.clone())),
                    "postgres" => Box::new(Postgres::connect(cloud.postgres).await),
                    _ => {
                        let address = format!("http://127.0.0.1:{}", cloud.flight_sql);
                        let channel = Endpoint::from_shared(address).unwrap().connect().await.map_err(refused)?;
                        Box::new(Flight(FlightSqlServiceClient::new(channel)))
                    }
                }))
            });
            if let Err(error) = runner.run_file_async(file).await {
                panic!("{door}: {}", error.display(false));
            }
        }
    }
}
