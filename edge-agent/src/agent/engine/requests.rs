//! What goes to the cloud and what comes back: requests begin here, and their answers free, void or fork the spool.
//!
//! [`Uplink`](crate::uplink::state::Uplink) decides what is due; a request runs as a task and its answer is applied in a
//! later turn, so nothing here waits for the network. The rows of a refused batch are waited for: until they are durable
//! in the journal.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rand::Rng;
use segment_log::Disk;
use wire::{Acks, Refusal, Seq, SpoolId, StreamAck, StreamName};

use super::{
    Answer, Complaint, Engine, EngineError, FORK_RETRY, Of, RETRY, incident, remove_other_spools, spool_directory,
};
use crate::entry::Entry;
use crate::failpoint;
use crate::spool::SpoolError;
use crate::uplink::http::Failed;
use crate::uplink::parcel::Parcel;
use crate::uplink::state::{Action, Candidate, Failure};

/// A request to an address that was left may still be answered within this.
const LEFT_GRACE: Duration = Duration::from_secs(2);

impl Engine {
    /// Starts all requests that are due; returns how long the next is away.
    pub(super) fn send(&mut self) -> Result<Duration, EngineError> {
        if self.forking.is_some() {
            return Ok(RETRY);
        }
        loop {
            let now_ms = self.now_ms();
            let parts = &mut self.parts;
            let mut seen = HashSet::new();
            let waiting = parts.spool.waiting().into_iter();
            let waiting = waiting.map(|(lane, stream)| (lane, stream, parts.spool.head(stream), true));
            let numbered = parts.spool.numbered().map(|(lane, stream, head)| (lane, stream, head, false));
            let candidates = waiting.chain(numbered).filter(|(_, stream, ..)| seen.insert(*stream));
            let candidates = candidates.map(|(lane, stream, head, waiting)| {
                let live = waiting && parts.spool.is_live(lane, stream);
                Candidate { lane, stream, head: head.seq, waiting, live }
            });
            let action = parts.uplink.next(now_ms, candidates);
            match action {
                Action::Wait { until_ms } => return Ok(Duration::from_millis(until_ms.saturating_sub(now_ms).max(1))),
                Action::Positions { url, epoch } => {
                    let (cloud, spool) = (parts.cloud.clone(), parts.spool.id());
                    let of = Of { stream: None, epoch, spool, freed: Seq(0), lane: 0, bytes: 0, probe: false };
                    self.request(of, async move { cloud.positions(url, spool).await });
                }
                Action::Probe { url } => {
                    let (cloud, spool) = (parts.cloud.clone(), parts.spool.id());
                    let of = Of { stream: None, epoch: 0, spool, freed: Seq(0), lane: 0, bytes: 0, probe: true };
                    self.request(of, async move { cloud.positions(url, spool).await });
                }
                Action::Send { url, epoch, stream, from, lane, bytes_max } => {
                    if let Some(parcel) = self.gather(url, lane, &stream, from, bytes_max)? {
                        let cloud = self.parts.cloud.clone();
                        let (spool, freed) = (self.parts.spool.id(), self.parts.spool.freed(&stream).seq);
                        let bytes = parcel.body.len();
                        failpoint::reach("send.begun");
                        self.bytes_sent += bytes as u64;
                        self.parts.uplink.link.sent(lane, bytes);
                        let of = Of { stream: Some(stream), epoch, spool, freed, lane, bytes, probe: false };
                        self.request(of, async move { cloud.send(url, parcel).await });
                    } else {
                        let failure = Failure::PushedBack { retry_after_ms: RETRY.as_millis() as u64 };
                        self.parts.uplink.failed(Some(&stream), epoch, &failure, now_ms, 0.0);
                    }
                }
            }
        }
    }

    /// Runs a request beside the engine. One to an address that was left in the meantime is given up after a moment, so that
    /// a dead connection keeps nothing from going to the next address.
    fn request(&mut self, of: Of, request: impl Future<Output = Result<Acks, Failed>> + Send + 'static) {
        let answers = self.answers.0.clone();
        let mut url = self.url.subscribe();
        let sent_to = *url.borrow_and_update();
        self.in_flight += 1;
        self.runtime.spawn(async move {
            let begun = Instant::now();
            let left = async {
                // When the engine is gone nobody listens to the answer.
                let _ = url.wait_for(|url| *url != sent_to).await;
                tokio::time::sleep(LEFT_GRACE).await;
            };
            let result = tokio::select! {
                result = request => result,
                () = left => Err(Failed { failure: Failure::Link, text: "the address was left".to_owned(), acks: None }),
            };
            let _ = answers.send(Answer { of, elapsed: begun.elapsed(), result }).await;
        });
    }

    /// The batches of a stream from a number on, as a request; None when the spool has no room for new numbers, or for what
    /// takes the place of a batch that rotted.
    fn gather(
        &mut self,
        url: usize,
        lane: usize,
        stream: &StreamName,
        from: Seq,
        bytes_max: usize,
    ) -> Result<Option<Parcel>, EngineError> {
        let spool = &mut self.parts.spool;
        let mut batches = match spool.again(stream, from, bytes_max) {
            Err(SpoolError::Full(_)) => return Ok(None),
            other => other?,
        };
        if batches.is_empty() {
            batches = match spool.number(lane, stream, bytes_max) {
                Err(SpoolError::Full(_)) => return Ok(None),
                other => other?,
            };
        }
        let mut schemas = Vec::new();
        for batch in &batches {
            let id = batch.header().schema;
            let schema = spool.schema(id).map(|text| (id, text));
            schemas.extend(schema.filter(|schema| !schemas.contains(schema)));
        }
        Ok((!batches.is_empty()).then(|| self.parts.cloud.parcel(url, &schemas, &batches)))
    }

    pub(super) fn answered(&mut self, answer: Answer) -> Result<(), EngineError> {
        self.in_flight -= 1;
        failpoint::reach("send.answered");
        let Answer { of: Of { stream, epoch, spool, freed, lane, bytes, probe }, elapsed, result } = answer;
        let (elapsed_ms, taken) = (elapsed.as_secs_f64() * 1e3, result.is_ok());
        if probe {
            let now_ms = self.now_ms();
            self.parts.uplink.probed(taken, now_ms);
            self.note_url();
            return Ok(());
        }
        // An answer about the form says that the link is well.
        let arrived = taken || matches!(&result, Err(Failed { failure: Failure::Form, .. }));
        if stream.is_some() {
            let now_ms = self.now_ms();
            self.parts.uplink.link.landed(lane, bytes, elapsed_ms, arrived, now_ms);
        } else if taken {
            self.parts.uplink.link.answered(elapsed_ms);
        }
        match result {
            Ok(acks) => {
                // That it says where it stands does not tell that it takes what it refused.
                self.last_error.take_if(|complaint| stream.is_some() || !complaint.of_rows);
                self.acked(stream.as_ref(), epoch, &acks, false)
            }
            Err(Failed { failure, text, acks }) => {
                if let Some(acks) = acks {
                    self.acked(stream.as_ref(), epoch, &acks, failure == Failure::Link)?;
                }
                if self.parts.spool.id() != spool {
                    // Of a spool that is no more: only that the request has ended counts.
                    self.parts.uplink.failed(stream.as_ref(), epoch, &Failure::Forked, 0, 0.0);
                    return Ok(());
                }
                self.failed(stream.as_ref(), epoch, failure, text, freed)
            }
        }
    }

    /// Tells requests in flight when their address was left.
    fn note_url(&self) {
        let url = self.parts.uplink.node().1;
        self.url.send_if_modified(|known| std::mem::replace(known, url) != url);
    }

    /// `left`: they came with a failure for which the node is left, and which must go on to count.
    fn acked(&mut self, stream: Option<&StreamName>, epoch: u64, acks: &Acks, left: bool) -> Result<(), EngineError> {
        let ours = self.parts.spool.id();
        for ack in acks.acks.iter().filter(|ack| ack.spool == ours) {
            let known = self.known.entry(ack.stream.clone()).or_default();
            *known = ack.durable.seq.max(*known);
        }
        if let Some(ack) = acks.acks.iter().find(|ack| ack.spool == ours && self.is_foreign(ack)) {
            self.parts.uplink.acked(stream, epoch, &Acks { acks: Vec::new(), ..acks.clone() });
            let text =
                format!("spool {ours} is forked (seen in {}): what is not committed goes on in a new one", ack.stream);
            return self.fork(text, true);
        }
        for refusal in acks.refused.iter().filter(|refusal| refusal.spool == ours) {
            self.refused(refusal)?;
        }
        let uplink = &mut self.parts.uplink;
        let committed = if left { uplink.committed(acks) } else { uplink.acked(stream, epoch, acks) };
        for (stream, mark) in committed.iter().filter(|(_, mark)| mark.seq.0 > 0) {
            self.parts.spool.free(stream, *mark)?;
        }
        Ok(())
    }

    fn failed(
        &mut self,
        stream: Option<&StreamName>,
        epoch: u64,
        failure: Failure,
        text: String,
        freed: Seq,
    ) -> Result<(), EngineError> {
        if failure == Failure::Form {
            self.parts.uplink.failed(stream, epoch, &failure, 0, 0.0);
            return Ok(());
        }
        if self.last_error.as_ref().is_none_or(|last| last.text != text) {
            tracing::warn!(error = %text, "the cloud did not take a request; it is tried again");
        }
        self.last_error = Some(Complaint { text, of_rows: stream.is_some() });
        match (&failure, stream) {
            (Failure::Forked, Some(stream)) => {
                self.parts.uplink.failed(Some(stream), epoch, &failure, 0, 0.0);
                let spool = self.parts.spool.id();
                let text =
                    format!("spool {spool} is forked (seen in {stream}): what is not committed goes on in a new one");
                self.fork(text, true)
            }
            // What the node asks for was gone from here before it was asked, because a node had called it committed.
            (Failure::Gap { expected }, Some(stream)) if *expected <= freed => {
                self.parts.uplink.failed(Some(stream), epoch, &Failure::Forked, 0, 0.0);
                // Of the others of this stream it has none, whatever it said before.
                self.known.insert(stream.clone(), Seq(expected.0.saturating_sub(1)));
                let spool = self.parts.spool.id();
                let text = format!(
                    "the cloud lost batches {expected} to {freed} of {stream}, spool {spool}, which it had called committed: \
                     they are gone from here, too; what is not committed goes on in a new spool"
                );
                self.fork(text, false)
            }
            _ => {
                let now_ms = self.now_ms();
                let jitter = rand::rng().random_range(0.0..=1.0);
                self.parts.uplink.failed(stream, epoch, &failure, now_ms, jitter);
                self.note_url();
                Ok(())
            }
        }
    }

    /// The rows go to the journal, durable, before the batch becomes void: a crash in between repeats both.
    fn refused(&mut self, refusal: &Refusal) -> Result<(), EngineError> {
        let parts = &mut self.parts;
        tracing::error!(stream = %refusal.stream, seq = %refusal.seq, reason = refusal.reason, "the cloud refuses a batch");
        if let Some(batch) = parts.spool.rows_of(&refusal.stream, refusal.seq)? {
            let schema = parts.spool.schema(batch.schema).unwrap_or_default().to_owned();
            let (spool, seq, reason) = (refusal.spool, refusal.seq, refusal.reason.clone());
            let entry = Entry::Refused { spool, seq, reason, schema, batch };
            // No room: the cloud refuses it again, and then there may be.
            let Ok(ticket) = parts.sender.try_append(&entry) else { return Ok(()) };
            let mut durable = parts.sender.durable();
            let durable = self.runtime.block_on(async { durable.wait_for(|durable| *durable >= ticket).await.is_ok() });
            if !durable {
                return Err(EngineError::Journal);
            }
        }
        if self.parts.spool.holds(&refusal.stream, refusal.seq) {
            match self.parts.spool.void(&refusal.stream, refusal.seq, &refusal.reason) {
                // The cloud refuses it again.
                Err(SpoolError::Full(_)) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// The node has more of this spool than was numbered here, or another batch under a number.
    fn is_foreign(&self, ack: &StreamAck) -> bool {
        let spool = &self.parts.spool;
        [ack.durable, ack.committed].into_iter().any(|mark| {
            mark.seq > spool.head(&ack.stream).seq
                || (spool.holds(&ack.stream, mark.seq) && !spool.is_own(&ack.stream, mark))
        })
    }

    /// A copy of this data directory, or an older one that was restored, has used numbers of this spool (rule 8); or the
    /// cloud was restored and waits for what is gone here. `text` is the incident.
    fn fork(&mut self, text: String, copied: bool) -> Result<(), EngineError> {
        if self.forking.is_some() {
            return Ok(());
        }
        self.copied = copied;
        incident(&mut self.parts.incidents, text);
        self.forking = Some(Instant::now());
        self.go_on_forking()
    }

    /// Moves to a new spool when that is due. Without room on the disk the old one stays, nothing is sent, and it is tried
    /// again later.
    pub(super) fn go_on_forking(&mut self) -> Result<(), EngineError> {
        if self.forking.is_none_or(|due| Instant::now() < due) {
            return Ok(());
        }
        if self.copied && self.held.is_empty() {
            // What the other directory may have goes through the old spool first, or it could not be flagged.
            let behind = self.parts.reader.position() < self.found_until || self.forerunner.is_some();
            if behind || !self.parts.pipeline.may_cut() {
                return Ok(());
            }
            self.cut()?;
        }
        let parts = &mut self.parts;
        let (old, fresh) = (parts.spool.id(), SpoolId(rand::rng().random()));
        let directory = spool_directory(&parts.data_dir);
        let heads = parts.spool.numbered().filter(|(_, stream, _)| parts.uplink.is_in_flight(stream));
        let sent = heads.map(|(_, stream, head)| (stream.clone(), head.seq)).collect::<HashMap<_, _>>();
        // What has no answer yet may be there, too.
        let known = |stream: &StreamName| {
            let seq = |seqs: &HashMap<StreamName, Seq>| seqs.get(stream).copied().unwrap_or_default();
            seq(&self.known).max(seq(&sent))
        };
        let known: Option<&dyn Fn(&StreamName) -> Seq> = if self.copied { None } else { Some(&known) };
        match parts.spool.fork(&Disk, &directory, fresh, known) {
            Ok((spool, incidents)) => {
                for damage in incidents {
                    incident(&mut parts.incidents, format!("spool: {damage:?}"));
                }
                tracing::warn!(%old, new = %fresh, "a new spool");
                parts.spool = spool;
                parts.uplink.restart(fresh);
                self.known.clear();
                self.full_lanes.clear();
                self.forking = None;
                // Its logs are still open here; the next start would do it, too.
                remove_other_spools(&directory, fresh);
            }
            Err(error) if error.is_full() => {
                tracing::warn!(%error, "the disk has no room for a new spool: nothing is sent until it has");
                remove_other_spools(&directory, old);
                self.forking = Some(Instant::now() + FORK_RETRY);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}
