//! The link of `weir load` to a node: numbers batches, sends what the node does not have, waits until it is durable.
//!
//! A node that is busy, starts or is away is asked again, for [`PATIENCE`] without any progress at most.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cloud_ingest::doors::rows::Gathered;
use rand::Rng;
use reqwest::StatusCode;
use tokio::sync::mpsc::Receiver;
use wire::request::{ENCODING, KIND_BATCH, KIND_SCHEMA, pack, push_frame};
use wire::schema::own;
use wire::{Acks, EdgeId, Mark, RefusedRequest, SealedBatch, SpoolId, StreamName, StreamSchema};

/// How long a node may be away.
const PATIENCE: Duration = Duration::from_secs(120);
const REQUEST_MAX: Duration = Duration::from_secs(60);
const BACKOFF: std::ops::Range<u64> = 200..1_500;
/// Bytes of batches in one request.
const REQUEST_BYTES: usize = 8 << 20;

/// What became of the rows of a file.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Sent {
    /// Sent now, and durable.
    pub(super) rows: u64,
    /// Durable before.
    pub(super) known: u64,
    /// Of both, those in `quarantine`.
    pub(super) quarantined: u64,
}

/// A node.
#[derive(Debug)]
pub(super) struct Link {
    client: reqwest::Client,
    url: String,
    edge: EdgeId,
    token: String,
}

/// A batch that is numbered and not there yet.
struct Waiting {
    batch: SealedBatch,
    schema: Arc<StreamSchema>,
}

impl Link {
    pub(super) fn new(url: &str, edge: &EdgeId, token: String) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().timeout(REQUEST_MAX).build().context("make an HTTP client")?;
        Ok(Self { client, url: url.trim_end_matches('/').to_owned(), edge: edge.clone(), token })
    }

    /// How far the node is in each sequence of a spool.
    pub(super) async fn positions(&self, spool: SpoolId) -> anyhow::Result<HashMap<StreamName, Mark>> {
        let url = format!("{}/v1/edges/{}/positions?spool={spool}", self.url, self.edge);
        let acks = self.ask(|| self.client.get(&url)).await?;
        Ok(acks.acks.into_iter().map(|ack| (ack.stream, ack.durable)).collect())
    }

    /// Sends all batches of a spool that the node does not have.
    pub(super) async fn send_all(
        &self,
        spool: SpoolId,
        known: HashMap<StreamName, Mark>,
        mut batches: Receiver<Gathered>,
    ) -> anyhow::Result<Sent> {
        let (mut sent, mut last) = (Sent::default(), HashMap::<StreamName, Mark>::new());
        let (mut waiting, mut bytes) = (Vec::<Waiting>::new(), 0);
        while let Some(Gathered { cut, schema, .. }) = batches.recv().await {
            let rows = u64::from(cut.rows);
            if cut.stream.as_str() == own::QUARANTINE {
                sent.quarantined += rows;
            }
            let before = last.entry(cut.stream.clone()).or_default();
            let batch = cut.number(&self.edge, spool, before.seq.next(), before.crc);
            *before = Mark { seq: batch.header().seq, crc: batch.crc() };
            let durable = known.get(&cut.stream).copied().unwrap_or_default();
            if before.seq <= durable.seq {
                let same = before.seq != durable.seq || before.crc == durable.crc;
                ensure!(
                    same,
                    "the node has this file with other rows: another version of Weir loaded it, or other rows were sent as it"
                );
                sent.known += rows;
                continue;
            }
            sent.rows += rows;
            bytes += batch.bytes().len();
            waiting.push(Waiting { batch, schema });
            if bytes >= REQUEST_BYTES {
                self.send(&waiting).await?;
                waiting.clear();
                bytes = 0;
            }
        }
        if !waiting.is_empty() {
            self.send(&waiting).await?;
        }
        Ok(sent)
    }

    /// Sends batches until all of them are durable. What is sent twice is taken once.
    async fn send(&self, batches: &[Waiting]) -> anyhow::Result<()> {
        let mut body = Vec::new();
        let mut schemas = Vec::new();
        let mut wanted = HashMap::new();
        for Waiting { batch, schema } in batches {
            if !schemas.contains(&schema.id()) {
                schemas.push(schema.id());
                push_frame(&mut body, KIND_SCHEMA, schema.canonical().as_bytes());
            }
            push_frame(&mut body, KIND_BATCH, batch.bytes());
            wanted.insert(&batch.header().stream, Mark { seq: batch.header().seq, crc: batch.crc() });
        }
        let url = format!("{}/v1/edges/{}/batches", self.url, self.edge);
        let packed = pack(&body);
        let is_packed = packed.is_some();
        let body = packed.unwrap_or_else(|| body.into());
        let acks = self
            .ask(|| {
                let request = self.client.post(&url).body(body.clone());
                if is_packed { request.header("content-encoding", ENCODING) } else { request }
            })
            .await?;
        if let Some(refusal) = acks.refused.first() {
            bail!("the node refuses batch {} of {}: {}", refusal.seq, refusal.stream, refusal.reason);
        }
        for (stream, mark) in wanted {
            let durable = acks.acks.iter().find(|ack| ack.stream == *stream).map(|ack| ack.durable);
            ensure!(
                durable == Some(mark),
                "the node answered, and has not batch {} of {stream}: {durable:?}",
                mark.seq
            );
        }
        Ok(())
    }

    async fn ask(&self, request: impl Fn() -> reqwest::RequestBuilder) -> anyhow::Result<Acks> {
        let started = Instant::now();
        loop {
            let why = match request().bearer_auth(&self.token).send().await {
                Ok(response) => {
                    let status = response.status();
                    let text = response.text().await.unwrap_or_default();
                    if status.is_success() {
                        return serde_json::from_str(&text).context("read the node's answer: is it Weir's port?");
                    }
                    if status != StatusCode::TOO_MANY_REQUESTS && !status.is_server_error() {
                        let refused = serde_json::from_str::<RefusedRequest>(&text).map(|refused| refused.to_string());
                        let hint = match status {
                            StatusCode::UNAUTHORIZED => {
                                "; add an [[edge]] with this id and token to Weir's configuration"
                            }
                            _ => "",
                        };
                        bail!("{}{hint}", refused.unwrap_or(format!("{status} {text}")));
                    }
                    format!("{status} {text}")
                }
                Err(error) => {
                    anyhow::Error::from(error).chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")
                }
            };
            if started.elapsed() > PATIENCE {
                bail!("{} does not take it: {why}; the same command goes on from here", self.url);
            }
            let wait = Duration::from_millis(rand::rng().random_range(BACKOFF));
            tokio::time::sleep(wait).await;
        }
    }
}
