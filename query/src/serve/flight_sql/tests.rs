//! The door as a client meets it: `arrow-flight`'s own Flight SQL client over a real socket.

use std::net::Ipv4Addr;
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Int64Array, RecordBatch};
use arrow_flight::error::FlightError;
use arrow_flight::sql::CommandGetTables;
use arrow_flight::sql::client::FlightSqlServiceClient;
use arrow_flight::{Action, CancelFlightInfoRequest, FlightInfo};
use arrow_schema::{DataType, Field, Schema};
use async_trait::async_trait;
use futures::TryStreamExt;
use prost::Message;
use tonic::transport::{Channel, Endpoint};
use wire::{StreamName, StreamSchema};

use super::*;
use crate::caller::Right;
use crate::engine::Engine;
use crate::engine::tests::{Traffic, engine};
use crate::scope::Scope;
use crate::serve::{Reader, Readers};
use crate::sink::{Sink, SinkError};
use crate::views::ViewSettings;

const MINUTE: Duration = Duration::from_secs(60);

async fn open(readers: Vec<Reader>, timeout: Duration) -> (FlightSqlServiceClient<Channel>, Channel, Arc<Traffic>) {
    let (engine, traffic) = engine(10, 0, timeout).await;
    let (client, channel) = door(engine, readers).await;
    (client, channel, traffic)
}

async fn door(engine: Arc<Engine>, readers: Vec<Reader>) -> (FlightSqlServiceClient<Channel>, Channel) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let house = House { engine, readers: Readers::new(readers, Vec::new()), tls: None, connections_max: 256 };
    tokio::spawn(async move { serve(listener, house, CancellationToken::new()).await.unwrap() });
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    (FlightSqlServiceClient::new(channel.clone()), channel)
}

/// The code of a status, and its words.
fn told(error: FlightError) -> String {
    match error {
        FlightError::Tonic(status) => format!("{:?}: {}", status.code(), status.message()),
        other => other.to_string(),
    }
}

async fn fetch(client: &mut FlightSqlServiceClient<Channel>, info: &FlightInfo) -> Result<Vec<RecordBatch>, String> {
    let ticket = info.endpoint[0].ticket.clone().unwrap();
    let rows = client.do_get(ticket).await.map_err(told)?;
    let rows: Vec<RecordBatch> = rows.try_collect().await.map_err(told)?;
    let announced = info.clone().try_decode_schema().unwrap();
    rows.iter().for_each(|batch| assert_eq!(batch.schema().as_ref(), &announced, "another schema than announced"));
    Ok(rows)
}

async fn ask(client: &mut FlightSqlServiceClient<Channel>, sql: &str) -> Result<Vec<RecordBatch>, String> {
    let info = client.execute(sql.to_owned(), None).await.map_err(told)?;
    fetch(client, &info).await
}

fn integer(rows: &[RecordBatch]) -> i64 {
    rows.iter().find(|batch| batch.num_rows() > 0).unwrap().column(0).as_primitive::<Int64Type>().value(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_are_answered_and_errors_have_their_status() {
    let (mut client, _, _traffic) = open(Vec::new(), MINUTE).await;
    assert_eq!(integer(&ask(&mut client, "SELECT count(*) FROM traffic").await.unwrap()), 100);
    let rows = ask(&mut client, "SELECT * FROM traffic WHERE vehicle_count < 0").await.unwrap();
    assert_eq!(rows.iter().map(RecordBatch::num_rows).sum::<usize>(), 0);
    for (sql, code, words) in [
        ("SELECT * FROM trafic", "NotFound", "did you mean `traffic`?"),
        ("SELEC 1", "InvalidArgument", "SELEC"),
        ("DROP TABLE traffic", "PermissionDenied", "questions only"),
        ("SELECT 1 / 0", "InvalidArgument", "ivide"),
    ] {
        let error = ask(&mut client, sql).await.unwrap_err();
        assert!(error.starts_with(code) && error.contains(words), "{sql}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_statement_takes_parameters_and_sees_fresh_rows() {
    let (mut client, _, traffic) = open(Vec::new(), MINUTE).await;
    let sql = "SELECT count(*) FROM traffic WHERE vehicle_count >= $1 AND device = $2".to_owned();
    let mut statement = client.prepare(sql, None).await.unwrap();
    let names: Vec<&str> = statement.parameter_schema().unwrap().fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names, ["$1", "$2"]);
    let info = statement.execute().await.unwrap();
    let refused = fetch(&mut client, &info).await.unwrap_err();
    assert!(refused.contains("has 2 parameters"), "{refused}");
    for (least, expected) in [(0, 50), (90, 5), (5_000_000_000, 0)] {
        let schema = Arc::new(Schema::new(vec![
            Field::new("1", DataType::Int64, false),
            Field::new("2", DataType::LargeUtf8, false),
        ]));
        let device = arrow_array::LargeStringArray::from(vec!["d1"]);
        let row =
            RecordBatch::try_new(schema, vec![Arc::new(Int64Array::from(vec![least])), Arc::new(device)]).unwrap();
        statement.set_parameters(row).unwrap();
        let info = statement.execute().await.unwrap();
        assert_eq!(integer(&fetch(&mut client, &info).await.unwrap()), expected, "from {least}");
    }
    let mut counting = client.prepare("SELECT count(*) FROM traffic".to_owned(), None).await.unwrap();
    for arrived in 10..13 {
        let info = counting.execute().await.unwrap();
        assert_eq!(integer(&fetch(&mut client, &info).await.unwrap()), arrived * 10);
        traffic.arrive(1);
    }
    let info = counting.execute().await.unwrap();
    counting.close().await.unwrap();
    let closed = fetch(&mut client, &info).await.unwrap_err();
    assert!(closed.contains("prepare it again"), "{closed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalogue_is_told() {
    let (mut client, _, _traffic) = open(Vec::new(), MINUTE).await;
    let asked = CommandGetTables {
        catalog: None,
        db_schema_filter_pattern: Some("public".to_owned()),
        table_name_filter_pattern: Some("tra%".to_owned()),
        table_types: Vec::new(),
        include_schema: true,
    };
    let info = client.get_tables(asked).await.unwrap();
    let rows = fetch(&mut client, &info).await.unwrap();
    assert_eq!(rows[0].column(2).as_string::<i32>().value(0), "traffic");
    assert_eq!(rows[0].column(3).as_string::<i32>().value(0), "TABLE");
    assert!(rows[0].column(4).as_binary::<i32>().value(0).len() > 100);
    let catalogs = client.get_catalogs().await.unwrap();
    assert_eq!(fetch(&mut client, &catalogs).await.unwrap()[0].column(0).as_string::<i32>().value(0), "weir");
    let types = client.get_table_types().await.unwrap();
    assert_eq!(fetch(&mut client, &types).await.unwrap()[0].num_rows(), 2);
    let info = client.get_sql_info(Vec::new()).await.unwrap();
    assert!(fetch(&mut client, &info).await.unwrap()[0].num_rows() > 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_proves_itself_and_sees_its_scope() {
    let scope = Scope::new(Some(vec!["gw-*".to_owned()]), None).unwrap();
    let reader = |name: &str, scope: Option<Scope>| Reader {
        rights: Arc::new([]),
        name: name.to_owned(),
        password: "right".to_owned(),
        scope: scope.map(Arc::new),
        lanes: Arc::new([]),
    };
    let (mut client, channel, _traffic) = open(vec![reader("north", Some(scope)), reader("all", None)], MINUTE).await;
    let count = "SELECT count(*) FROM traffic";
    assert!(ask(&mut client, count).await.unwrap_err().starts_with("Unauthenticated"));
    let refused = client.handshake("north", "wrong").await.unwrap_err();
    assert!(refused.to_string().contains("authenticat") || told(refused).starts_with("Unauthenticated"));
    client.handshake("north", "right").await.unwrap();
    assert_eq!(integer(&ask(&mut client, count).await.unwrap()), 50);
    let mut statement = client.prepare(count.to_owned(), None).await.unwrap();
    let info = statement.execute().await.unwrap();
    assert_eq!(integer(&fetch(&mut client, &info).await.unwrap()), 50);
    // A handle is its reader's alone, and a token that nobody gave is none.
    let mut other = FlightSqlServiceClient::new(channel);
    other.handshake("all", "right").await.unwrap();
    assert_eq!(integer(&ask(&mut other, count).await.unwrap()), 100);
    assert!(fetch(&mut other, &info).await.unwrap_err().contains("prepare it again"));
    other.set_token("0".repeat(64));
    assert!(ask(&mut other, count).await.unwrap_err().starts_with("Unauthenticated"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_ends_when_it_is_cancelled_and_when_its_time_is_over() {
    let (mut client, channel, _traffic) = open(Vec::new(), MINUTE).await;
    let heavy = "SELECT sum(a.v) FROM generate_series(1, 100000) AS a(v), generate_series(1, 100000) AS b(w) WHERE a.v + b.w = -1";
    let info = client.execute(heavy.to_owned(), None).await.unwrap();
    let mut canceller = FlightSqlServiceClient::new(channel);
    let (asked, of) = (CancelFlightInfoRequest { info: Some(info.clone()) }.encode_to_vec(), info.clone());
    let ending = tokio::spawn(async move {
        // Not before it runs: until then there is nothing to cancel.
        while canceller.inner_mut().do_action(Action::new("CancelFlightInfo", asked.clone())).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(of);
    });
    let error = fetch(&mut client, &info).await.unwrap_err();
    ending.await.unwrap();
    assert!(error.contains("cancelled"), "{error}");
    assert_eq!(integer(&ask(&mut client, "SELECT count(*) FROM traffic").await.unwrap()), 100);
    let (mut hurried, _, _traffic) = open(Vec::new(), Duration::from_millis(300)).await;
    let error = ask(&mut hurried, heavy).await.unwrap_err();
    assert!(error.contains("ran longer than"), "{error}");
}

/// Takes every row, and keeps none.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl Sink for Nowhere {
    async fn append(&self, _: &StreamName, _: &Arc<StreamSchema>, _: RecordBatch) -> Result<(), SinkError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn views_are_made_and_dropped_by_an_update() {
    let (engine, _traffic) = engine(10, 0, MINUTE).await;
    let directory = std::env::temp_dir().join(format!("weir-kept-{:032x}", rand::random::<u128>()));
    engine.keep_views(Arc::new(Nowhere), ViewSettings::in_directory(&directory), CancellationToken::new()).unwrap();
    let reader = |name: &str, rights: &[Right]| Reader {
        rights: rights.into(),
        name: name.to_owned(),
        password: "right".to_owned(),
        scope: None,
        lanes: Arc::new([]),
    };
    let (mut client, channel) = door(engine, vec![reader("makes", &[Right::Views]), reader("asks", &[])]).await;
    client.handshake("makes", "right").await.unwrap();
    let mut other = FlightSqlServiceClient::new(channel);
    other.handshake("asks", "right").await.unwrap();
    let create = "CREATE MATERIALIZED VIEW v AS SELECT ts, vehicle_count FROM traffic";
    assert_eq!(client.execute_update(create.to_owned(), None).await.unwrap(), 0);
    let drop = "DROP MATERIALIZED VIEW v";
    let refused = told(other.execute_update(drop.to_owned(), None).await.unwrap_err());
    assert!(refused.starts_with("PermissionDenied") && refused.contains("rights = ["), "{refused}");
    let shown = async |client: &mut _| {
        let rows = ask(client, "SHOW MATERIALIZED VIEWS").await.unwrap();
        rows.iter().map(RecordBatch::num_rows).sum::<usize>()
    };
    assert_eq!(shown(&mut other).await, 1);
    let mut prepared = client.prepare(drop.to_owned(), None).await.unwrap();
    assert_eq!(prepared.execute_update().await.unwrap(), 0);
    assert_eq!(shown(&mut other).await, 0);
    let refused = told(client.execute_update("SELECT 1".to_owned(), None).await.unwrap_err());
    assert!(refused.starts_with("PermissionDenied") && refused.contains("questions only"), "{refused}");
    std::fs::remove_dir_all(&directory).unwrap();
}
