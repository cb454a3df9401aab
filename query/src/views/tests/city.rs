//! Tables in memory with both halves: hot batches, and Parquet files with the `txn` of what they hold; and a sink that
//! appends to them, or fails as it is told.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{
    ArrayRef, Date32Array, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt32Array,
    new_null_array,
};
use arrow_cast::cast;
use arrow_schema::{DataType, FieldRef, Schema, SchemaRef};
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use async_trait::async_trait;
use datafusion::object_store::memory::InMemory;
use datafusion::object_store::path::Path;
use datafusion::object_store::{ObjectStore, ObjectStoreExt};
use datafusion::parquet::arrow::ArrowWriter;
use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore};
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use url::Url;
use wire::hot::{HotAnswer, HotError, HotRows, HotRun, HotSource};
use wire::ids::OWN_EDGE;
use wire::schema::{DATE, EDGE, RECEIVED_AT, SEQ, SPOOL, TS, table_schema};
use wire::{DAY_US, DataFile, DataFiles, Mark, Seq, SpoolId, StreamField, StreamName, StreamSchema};

use crate::as_of::AsOf;
use crate::catalog::{ColdTable, SpoolFacts, Tables, TablesError};
use crate::sink::{Sink, SinkError};

/// One row of `traffic` or `weather`.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) ts: i64,
    pub(crate) device: String,
    pub(crate) value: Option<f64>,
    pub(crate) text: Option<String>,
}

#[derive(Debug)]
struct Table {
    schema: SchemaRef,
    hot: Vec<(SpoolId, Seq, RecordBatch)>,
    /// What the last commit took; None when the version before cannot be told any more.
    grace: Option<Vec<(SpoolId, Seq, RecordBatch)>>,
    files: DataFiles,
    txn: HashMap<SpoolId, Seq>,
    last: BTreeMap<SpoolId, Seq>,
    facts: BTreeMap<SpoolId, SpoolFacts>,
    version: u64,
    moves: u64,
    log_store: LogStoreRef,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct City {
    tables: Mutex<BTreeMap<StreamName, Table>>,
    store: Arc<InMemory>,
    changed: watch::Sender<u64>,
    state: Mutex<State>,
    /// What arrives while somebody freezes tables: behind the state that was just told.
    meanwhile: Mutex<Vec<Arrival>>,
    /// How often each stream was frozen.
    frozen: Mutex<BTreeMap<StreamName, usize>>,
}

/// Rows of an edge, its watermark, and when they came.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) stream: StreamName,
    pub(crate) edge: u8,
    pub(crate) rows: Vec<Row>,
    pub(crate) watermark: Option<i64>,
    pub(crate) now: i64,
}

#[derive(Debug)]
struct State {
    own_spool: u8,
    received_at: i64,
    files: usize,
    /// Appends until one fails; whether it fails before or after it is there.
    fail_in: usize,
}

impl City {
    pub(crate) fn new() -> Arc<Self> {
        let state = State { own_spool: 100, received_at: 1, files: 0, fail_in: usize::MAX };
        let (tables, state) = (Mutex::default(), Mutex::new(state));
        Arc::new(Self {
            tables,
            store: Arc::default(),
            changed: watch::channel(0).0,
            state,
            meanwhile: Mutex::default(),
            frozen: Mutex::default(),
        })
    }

    /// How often somebody has asked for the rows of a stream.
    pub(super) fn frozen(&self, stream: &StreamName) -> usize {
        self.frozen.lock().get(stream).copied().unwrap_or_default()
    }

    pub(crate) fn create(&self, stream: &StreamName, fields: Vec<StreamField>) {
        let url = Url::parse(&format!("memory:///{stream}/")).unwrap();
        let store: Arc<dyn ObjectStore> = Arc::clone(&self.store) as _;
        let log_store = default_logstore(Arc::clone(&store), store, &url, &StorageConfig::default());
        let table = Table {
            schema: Arc::new(table_schema(&fields)),
            hot: Vec::new(),
            grace: None,
            files: DataFiles::default(),
            txn: HashMap::new(),
            last: BTreeMap::new(),
            facts: BTreeMap::new(),
            version: 0,
            moves: 0,
            log_store,
        };
        self.tables.lock().entry(stream.clone()).or_insert(table);
    }

    pub(crate) fn schema(&self, stream: &StreamName) -> Option<SchemaRef> {
        self.tables.lock().get(stream).map(|table| Arc::clone(&table.schema))
    }

    /// The node starts again: its own rows come from another spool.
    pub(crate) fn restart(&self) {
        self.state.lock().own_spool += 1;
    }

    /// The append after so many fails.
    pub(crate) fn fail_after(&self, appends: usize) {
        self.state.lock().fail_in = appends;
    }

    /// Rows of an edge.
    pub(crate) fn arrive(&self, stream: &StreamName, edge: u8, rows: &[Row], watermark: Option<i64>, now: i64) {
        let schema = self.schema(stream).unwrap();
        let columns: Vec<(&str, ArrayRef)> = vec![
            (
                TS,
                Arc::new(
                    TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| row.ts)).with_timezone("UTC"),
                ),
            ),
            ("device", Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.device)))),
            ("speed", Arc::new(rows.iter().map(|row| row.value).collect::<Float64Array>())),
            ("temperature", Arc::new(rows.iter().map(|row| row.value).collect::<Float64Array>())),
            ("road", Arc::new(rows.iter().map(|row| row.text.as_deref()).collect::<StringArray>())),
        ];
        self.append(
            stream,
            &schema,
            &columns,
            rows.len(),
            (&format!("gw-{edge}"), SpoolId([edge + 1; 16])),
            (watermark, now),
        );
    }

    /// These arrive as soon as a state of some table was told, one each time; and those of before that did not are given back.
    pub(crate) fn arrive_meanwhile(&self, arrivals: Vec<Arrival>) -> Vec<Arrival> {
        std::mem::replace(&mut *self.meanwhile.lock(), arrivals)
    }

    /// A revision of the reference table `sensors`.
    pub(crate) fn revise(&self, device: &str, most: f64, valid_from: Option<i64>) {
        let stream = "sensors_revisions".parse().unwrap();
        let schema = self.schema(&stream).unwrap();
        let from = [valid_from].into_iter().collect::<TimestampMicrosecondArray>().with_timezone("UTC");
        let columns: Vec<(&str, ArrayRef)> = vec![
            (TS, Arc::new(TimestampMicrosecondArray::from(vec![super::START]).with_timezone("UTC"))),
            ("device", Arc::new(StringArray::from(vec![device]))),
            ("valid_from", Arc::new(from)),
            ("most", Arc::new(Float64Array::from(vec![most]))),
        ];
        self.append(&stream, &schema, &columns, 1, ("gw-9", SpoolId([99; 16])), (None, 0));
    }

    /// Tells of every change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn append(
        &self,
        stream: &StreamName,
        schema: &SchemaRef,
        columns: &[(&str, ArrayRef)],
        rows: usize,
        (edge, spool): (&str, SpoolId),
        (watermark, now): (Option<i64>, i64),
    ) {
        let received_at = {
            // Clocks are set back now and then.
            let mut state = self.state.lock();
            state.received_at = (state.received_at * 31) % 1_009;
            state.received_at
        };
        let mut tables = self.tables.lock();
        let table = tables.get_mut(stream).unwrap();
        let seq = table.last.get(&spool).copied().unwrap_or_default().next();
        table.last.insert(spool, seq);
        let ts =
            columns.iter().find(|(name, _)| *name == TS).unwrap().1.as_primitive::<TimestampMicrosecondType>().clone();
        let values =
            schema.fields().iter().map(|field| match field.name().as_str() {
                EDGE => Arc::new(StringArray::from_iter_values(vec![edge; rows])) as ArrayRef,
                SPOOL => Arc::new(StringArray::from_iter_values(vec![spool.to_string(); rows])),
                SEQ => Arc::new(Int64Array::from_value(seq.0 as i64, rows)),
                RECEIVED_AT => Arc::new(TimestampMicrosecondArray::from_value(received_at, rows).with_timezone("UTC")),
                DATE => Arc::new(
                    ts.unary::<_, arrow_array::types::Date32Type>(|us| us.div_euclid(DAY_US) as i32) as Date32Array
                ),
                name => columns.iter().find(|(known, _)| *known == name).map_or_else(
                    || new_null_array(field.data_type(), rows),
                    |(_, column)| cast(column, field.data_type()).unwrap(),
                ),
            });
        let batch = RecordBatch::try_new(Arc::clone(schema), values.collect()).unwrap();
        table.hot.push((spool, seq, batch));
        table.moves += 1;
        let fact = table.facts.entry(spool).or_insert_with(|| SpoolFacts {
            stream: stream.clone(),
            edge: edge.parse().unwrap(),
            spool,
            rows: 0,
            batches: 0,
            received_at_us: now,
            max_ts: None,
            watermark: None,
            durable: seq,
            committed: Seq(0),
            agent: String::new(),
            configuration: 0,
        });
        (fact.rows, fact.batches, fact.received_at_us) = (fact.rows + rows as u64, fact.batches + 1, now);
        fact.max_ts = fact.max_ts.max(arrow::compute::max(&ts));
        fact.watermark = fact.watermark.max(watermark);
        self.changed.send_modify(|count| *count += 1);
    }

    /// All but the last `keep` hot batches of every table become files.
    pub(crate) fn commit(&self, keep: usize) {
        for table in self.tables.lock().values_mut() {
            let count = table.hot.len().saturating_sub(keep);
            let batches: Vec<_> = table.hot.drain(..count).collect();
            if batches.is_empty() {
                continue;
            }
            // A grace time that is over now and then.
            table.grace = (table.version % 3 > 0).then(|| batches.clone());
            for (spool, seq, _) in &batches {
                table.txn.insert(*spool, *seq);
            }
            let rows: Vec<RecordBatch> = batches.into_iter().map(|(_, _, rows)| rows).collect();
            let files = self.write(table, &concat_batches(&table.schema, &rows).unwrap());
            table.files = table.files.with(files, &[]);
            table.version += 1;
            table.moves += 1;
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// The rows of a table are taken away, hot ones and files.
    pub(crate) fn forget(&self, stream: &StreamName) {
        let mut tables = self.tables.lock();
        let table = tables.get_mut(stream).unwrap();
        for (spool, seq, _) in table.hot.drain(..) {
            table.txn.insert(spool, seq);
        }
        let old: Vec<Arc<DataFile>> = table.files.iter().cloned().collect();
        table.files = table.files.with(Vec::new(), &old);
        (table.grace, table.version, table.moves) = (None, table.version + 1, table.moves + 1);
        self.changed.send_modify(|count| *count += 1);
    }

    /// What was committed is no longer told from memory.
    pub(crate) fn lose_grace(&self) {
        self.tables.lock().values_mut().for_each(|table| table.grace = None);
    }

    /// All files of a date become one.
    pub(crate) fn compact(&self) {
        for table in self.tables.lock().values_mut() {
            let old: Vec<Arc<DataFile>> = table.files.iter().cloned().collect();
            if old.len() < 2 {
                continue;
            }
            let rows: Vec<RecordBatch> = old.iter().map(|file| self.read(table, file)).collect();
            let files = self.write(table, &concat_batches(&table.schema, &rows).unwrap());
            table.files = table.files.with(files, &old);
            table.grace = Some(Vec::new());
            table.version += 1;
            table.moves += 1;
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// A column gets another type; what does not fit is null.
    pub(crate) fn retype(&self, stream: &StreamName, column: &str, kind: &DataType) {
        let mut tables = self.tables.lock();
        let table = tables.get_mut(stream).unwrap();
        let field = |field: &FieldRef| match field.name() == column {
            true => Arc::new(field.as_ref().clone().with_data_type(kind.clone())),
            false => Arc::clone(field),
        };
        let schema: SchemaRef = Arc::new(Schema::new(table.schema.fields().iter().map(field).collect::<Vec<_>>()));
        let refit = |rows: &RecordBatch| {
            let columns = rows.columns().iter().zip(schema.fields());
            let columns = columns.map(|(column, field)| cast(column, field.data_type()).unwrap()).collect();
            RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()
        };
        table.hot.iter_mut().for_each(|(_, _, rows)| *rows = refit(rows));
        let old: Vec<Arc<DataFile>> = table.files.iter().cloned().collect();
        let rows: Vec<RecordBatch> = old.iter().map(|file| refit(&self.read(table, file))).collect();
        table.schema = Arc::clone(&schema);
        if !rows.is_empty() {
            let files = self.write(table, &concat_batches(&schema, &rows).unwrap());
            table.files = table.files.with(files, &old);
        }
        (table.grace, table.version, table.moves) = (None, table.version + 1, table.moves + 1);
        self.changed.send_modify(|count| *count += 1);
    }

    fn path(table: &Table, file: &str) -> Path {
        Path::from_url_path(format!("{}{file}", table.log_store.root_url().path())).unwrap()
    }

    /// One file for each date.
    fn write(&self, table: &Table, rows: &RecordBatch) -> Vec<Arc<DataFile>> {
        let ts = rows.column_by_name(TS).unwrap().as_primitive::<TimestampMicrosecondType>().clone();
        let mut dates: BTreeMap<i32, Vec<u32>> = BTreeMap::new();
        for (row, ts) in ts.values().iter().enumerate() {
            dates.entry(ts.div_euclid(DAY_US) as i32).or_default().push(row as u32);
        }
        let stored: Vec<usize> =
            (0..rows.num_columns()).filter(|index| table.schema.field(*index).name() != DATE).collect();
        let write = |(date, own): (i32, Vec<u32>)| {
            let name = {
                let mut state = self.state.lock();
                state.files += 1;
                format!("{}.parquet", state.files)
            };
            let own = take_record_batch(rows, &UInt32Array::from(own)).unwrap().project(&stored).unwrap();
            let mut bytes = Vec::new();
            let mut writer = ArrowWriter::try_new(&mut bytes, own.schema(), None).unwrap();
            writer.write(&own).unwrap();
            writer.close().unwrap();
            let ts = own.column_by_name(TS).unwrap().as_primitive::<TimestampMicrosecondType>().clone();
            let span = arrow::compute::min(&ts).zip(arrow::compute::max(&ts));
            let (rows, size) = (Some(own.num_rows() as u64), bytes.len() as u64);
            let path = Self::path(table, &name);
            let put = self.store.put(&path, bytes.into());
            put.now_or_never().expect("memory does not wait").unwrap();
            Arc::new(DataFile {
                path: name,
                date,
                bytes: size,
                rows,
                modified_ms: 0,
                ts: span,
                device: None,
                device_nulls: None,
                crc: None,
            })
        };
        dates.into_iter().map(write).collect()
    }

    fn read(&self, table: &Table, file: &DataFile) -> RecordBatch {
        let path = Self::path(table, &file.path);
        let get = self.store.get(&path).now_or_never().expect("memory does not wait").unwrap();
        let bytes = get.bytes().now_or_never().expect("memory does not wait").unwrap();
        let reader =
            datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(bytes, 1 << 20).unwrap();
        let rows: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        let rows = concat_batches(&rows[0].schema(), &rows).unwrap();
        let mut columns = rows.columns().to_vec();
        columns.push(Arc::new(Date32Array::from_value(file.date, rows.num_rows())));
        let fields: Vec<_> = table.schema.fields().iter().cloned().collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
    }
}

/// The city as tables and as a sink.
#[derive(Debug, Clone)]
pub(crate) struct Handle(pub(crate) Arc<City>);

#[async_trait]
impl HotSource for Handle {
    async fn hot(&self, stream: &StreamName, at: u64) -> Result<HotAnswer, HotError> {
        *self.0.frozen.lock().entry(stream.clone()).or_default() += 1;
        let told = self.told(stream, at);
        let meanwhile = self.0.meanwhile.lock().pop();
        if let Some(Arrival { stream, edge, rows, watermark, now }) = meanwhile {
            self.0.arrive(&stream, edge, &rows, watermark, now);
        }
        Ok(told)
    }
}

impl Handle {
    fn told(&self, stream: &StreamName, at: u64) -> HotAnswer {
        let tables = self.0.tables.lock();
        let table = &tables[stream];
        let grace = match &table.grace {
            _ if at == table.version => &[][..],
            Some(grace) if at + 1 == table.version => grace,
            _ => return HotAnswer::Stale(table.version),
        };
        let rows = grace.iter().chain(&table.hot).map(|(spool, seq, rows)| {
            HotRows::new(rows.clone(), vec![HotRun { spool: *spool, seq: *seq, start: 0, rows: rows.num_rows() }])
        });
        HotAnswer::Rows(rows.collect())
    }
}

#[async_trait]
impl Tables for Handle {
    fn streams(&self) -> Vec<StreamName> {
        self.0.tables.lock().keys().cloned().collect()
    }

    fn cold(&self, stream: &StreamName) -> Option<ColdTable> {
        self.0.tables.lock().get(stream).map(|table| ColdTable {
            version: table.version,
            log_store: Arc::clone(&table.log_store),
            files: table.files.clone(),
            description: None,
            schema: Arc::clone(&table.schema),
            txn: Arc::new(table.txn.iter().map(|(spool, seq)| (*spool, Mark { seq: *seq, crc: 0 })).collect()),
        })
    }

    async fn reload(&self, stream: &StreamName, _: u64) -> Result<ColdTable, TablesError> {
        Ok(self.cold(stream).unwrap())
    }

    async fn cold_as_of(&self, stream: &StreamName, _: AsOf) -> Result<ColdTable, TablesError> {
        Ok(self.cold(stream).unwrap())
    }

    fn spools(&self) -> Vec<SpoolFacts> {
        self.0.tables.lock().values().flat_map(|table| table.facts.values().cloned()).collect()
    }

    fn hot(&self) -> Arc<dyn HotSource> {
        Arc::new(self.clone())
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    fn moves(&self, stream: &StreamName) -> u64 {
        self.0.tables.lock().get(stream).map_or(0, |table| table.moves)
    }
}

#[async_trait]
impl Sink for Handle {
    async fn append(
        &self,
        stream: &StreamName,
        schema: &Arc<StreamSchema>,
        rows: RecordBatch,
    ) -> Result<(), SinkError> {
        let (fail_in, spool) = {
            let mut state = self.0.state.lock();
            let fail_in = state.fail_in;
            state.fail_in = fail_in.checked_sub(1).filter(|_| fail_in < usize::MAX).unwrap_or(usize::MAX);
            (fail_in, SpoolId([state.own_spool; 16]))
        };
        // Half of those that fail are there all the same: only the answer is lost.
        let is_lost = fail_in == 0 && rows.num_rows().is_multiple_of(2);
        if !is_lost {
            self.0.create(stream, schema.fields().to_vec());
            let table = self.0.schema(stream).unwrap();
            let of_rows = rows.schema();
            let columns: Vec<(&str, ArrayRef)> = of_rows
                .fields()
                .iter()
                .zip(rows.columns())
                .map(|(field, column)| (field.name().as_str(), Arc::clone(column)))
                .collect();
            self.0.append(stream, &table, &columns, rows.num_rows(), (OWN_EDGE, spool), (None, 0));
        }
        if fail_in == 0 {
            Err(SinkError::Later { stream: stream.clone(), detail: "a test says so".to_owned() })
        } else {
            Ok(())
        }
    }
}
