//! A question through each of the three doors, by a client that knows no more than the protocol.

use std::any::Any;

use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use arrow_flight::sql::client::FlightSqlServiceClient;
use async_trait::async_trait;
use futures::TryStreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::harness::Cloud;

pub(crate) const DOORS: [&str; 3] = ["http", "flight_sql", "postgres"];

/// A new connection to a door.
pub(crate) async fn at(door: &str, cloud: &Cloud) -> Box<dyn Asks> {
    match door {
        "http" => Box::new(Http(cloud.http.clone())),
        "postgres" => Box::new(Postgres::connect(cloud.postgres).await),
        _ => {
            let address = format!("http://127.0.0.1:{}", cloud.flight_sql);
            let channel = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
            Box::new(Flight(FlightSqlServiceClient::new(channel)))
        }
    }
}

/// An error as the door tells it.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) String);

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
pub(crate) type Rows = Vec<Vec<String>>;

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
pub(crate) trait Asks: Send {
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused>;

    /// Asks, and reads nothing of the answer, which is under way until this is dropped.
    async fn stall(self: Box<Self>, sql: &str) -> Box<dyn Any + Send>;
}

struct Http(String);

#[async_trait]
impl Asks for Http {
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused> {
        let request = reqwest::Client::new().post(format!("{}/v1/sql", self.0));
        let request = request.header("accept", "application/vnd.apache.arrow.stream").body(sql.to_owned());
        let answer = request.send().await.map_err(refused)?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(refused)?;
        if !status.is_success() {
            return Err(Refused(format!("{} {}", status.as_u16(), String::from_utf8_lossy(&body))));
        }
        let reader = arrow::ipc::reader::StreamReader::try_new(std::io::Cursor::new(body), None).map_err(refused)?;
        texts(&reader.collect::<Result<Vec<_>, _>>().map_err(refused)?)
    }

    async fn stall(self: Box<Self>, sql: &str) -> Box<dyn Any + Send> {
        let request = reqwest::Client::new().post(format!("{}/v1/sql", self.0));
        Box::new(request.header("accept", "application/x-ndjson").body(sql.to_owned()).send().await.unwrap())
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

    async fn stall(mut self: Box<Self>, sql: &str) -> Box<dyn Any + Send> {
        let info = self.0.execute(sql.to_owned(), None).await.unwrap();
        let rows = self.0.do_get(info.endpoint[0].ticket.clone().unwrap()).await.unwrap();
        Box::new((self, rows))
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

    async fn write(&mut self, sql: &str) -> std::io::Result<()> {
        let length = (sql.len() as u32 + 5).to_be_bytes();
        self.0.write_all(&[b"Q", &length[..], sql.as_bytes(), b"\0"].concat()).await
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
    /// Who has been hung up on before all was written may still read why.
    async fn ask(&mut self, sql: &str) -> Result<Rows, Refused> {
        let written = self.write(sql).await;
        let answer = self.answer().await;
        written.map_err(refused).and(answer)
    }

    async fn stall(mut self: Box<Self>, sql: &str) -> Box<dyn Any + Send> {
        self.write(sql).await.unwrap();
        self
    }
}
