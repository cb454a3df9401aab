//! Errands: everything that the ingest thread wants of the store. It never waits for one; each comes back as a job.
//!
//! A *look* makes or opens the table of a stream, reads what others committed, and adds the fields that are missing.
//! One look at a subject runs at a time; those who ask meanwhile share the next one, so that what they learn is never
//! older than their question. A *commit* runs beside looks: both compare and swap, and the newer table wins. So many
//! errands run at a time ([`at_once_max`] of each kind), and each for so long ([`LOOK_MAX`], [`COMMIT_MAX`]): one that the
//! store never answers has failed, and if it comes through all the same, the next one finds its commit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow_array::RecordBatch;
use segment_log::FileLayer;
use tokio::sync::Semaphore;
use wire::StreamName;
use wire::schema::StreamField;

use super::stream::Stream;
use super::{Fault, Ingest, Job};
use crate::class::Class;
use crate::delta::{CommitError, DeltaTable, TableError};
use crate::errors::chain;
use crate::hot::Taking;
use crate::rescue::refit;
use crate::store::{Store, list_streams};

/// Looks, and commits, of a class that run at a time: those that hang hold up none of another class.
pub(super) fn at_once_max(class: Class) -> usize {
    match class {
        Class::Alerts => 4,
        Class::Views => 8,
        Class::Readings => 16,
    }
}
/// The longest look.
pub(super) const LOOK_MAX: Duration = Duration::from_secs(60);
/// The longest commit.
pub(super) const COMMIT_MAX: Duration = Duration::from_secs(600);

/// What is looked at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    /// The list of tables: those that other nodes made appear.
    All,
    Stream(StreamName),
}

/// A look that is over when as many at its subject are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) subject: Subject,
    number: u64,
}

#[derive(Debug, Default)]
struct Looks {
    started: u64,
    finished: u64,
    /// What the look after the running one is asked for.
    next: Option<Vec<StreamField>>,
    /// Why the last one failed.
    failure: Option<String>,
}

/// All looks, running and asked for.
#[derive(Debug, Default)]
pub(super) struct LookBook(BTreeMap<Subject, Looks>);

impl LookBook {
    /// Asks for a look that begins now or later, with these fields. With the second value it is to be started.
    pub(super) fn ask(&mut self, subject: Subject, fields: &[StreamField]) -> (Ticket, Option<Vec<StreamField>>) {
        let looks = self.0.entry(subject.clone()).or_default();
        if looks.started == looks.finished {
            looks.started += 1;
            return (Ticket { subject, number: looks.started }, Some(fields.to_vec()));
        }
        looks.next.get_or_insert_default().extend_from_slice(fields);
        (Ticket { subject, number: looks.started + 1 }, None)
    }

    /// The running look is over. What is returned is to be started.
    pub(super) fn finish(&mut self, subject: &Subject, failure: Option<String>) -> Option<Vec<StreamField>> {
        let looks = self.0.get_mut(subject)?;
        looks.finished = looks.started;
        looks.failure = failure;
        let next = looks.next.take()?;
        looks.started += 1;
        Some(next)
    }

    /// How the look ended; none while it runs.
    pub(super) fn outcome(&self, ticket: &Ticket) -> Option<Result<(), String>> {
        let looks = self.0.get(&ticket.subject)?;
        (looks.finished >= ticket.number).then(|| looks.failure.clone().map_or(Ok(()), Err))
    }
}

/// How a commit ended.
#[derive(Debug)]
pub(crate) enum CommitEnd {
    Made {
        rows: u64,
    },
    /// Somebody else was faster: what they left is committed with the next one.
    Moved,
    Failed {
        reason: String,
    },
}

/// An errand that is back.
#[derive(Debug)]
pub(crate) enum Done {
    /// With the table as it is now.
    Looked {
        stream: StreamName,
        outcome: Result<DeltaTable, TableError>,
    },
    /// With the tables that were not known.
    Listed {
        outcome: Result<Listed, TableError>,
    },
    Committed {
        stream: StreamName,
        table: DeltaTable,
        end: CommitEnd,
    },
    /// Maintenance has changed files of it.
    Maintained {
        stream: StreamName,
        table: DeltaTable,
    },
}

/// One bad table is no reason to leave out the others.
pub(crate) type Listed = Vec<(StreamName, Result<DeltaTable, TableError>)>;

impl<L: FileLayer> Ingest<L> {
    /// Asks for a look at the store.
    pub(super) fn ask(&mut self, class: Class, subject: Subject, fields: &[StreamField]) -> Ticket {
        let (ticket, start) = self.looks.ask(subject.clone(), fields);
        if let Some(fields) = start {
            self.start_look(class, subject, fields);
        }
        ticket
    }

    fn start_look(&self, class: Class, subject: Subject, fields: Vec<StreamField>) {
        let at_once = &self.looks_at_once[class];
        let store = self.store.clone();
        match subject {
            Subject::All => {
                let known = self.streams.keys().cloned().collect();
                let died = Done::Listed { outcome: Err(TableError::Unanswered) };
                let listing = async move { Done::Listed { outcome: list(&store, &known).await } };
                self.send(at_once, LOOK_MAX, died, listing);
            }
            Subject::Stream(stream) => {
                let table = self.streams.get(&stream).map(|stream| stream.table.clone());
                let died = Done::Looked { stream: stream.clone(), outcome: Err(TableError::Unanswered) };
                self.send(at_once, LOOK_MAX, died, async move {
                    let outcome = look(&store, &stream, table, &fields).await;
                    Done::Looked { stream, outcome }
                });
            }
        }
    }

    /// Sends an errand off; `died` is what is said of one that panics or takes too long.
    pub(super) fn send(
        &self,
        at_once: &Arc<Semaphore>,
        longest: Duration,
        died: Done,
        errand: impl Future<Output = Done> + Send + 'static,
    ) {
        let (sender, at_once) = (self.sender.clone(), Arc::clone(at_once));
        self.runtime.spawn(async move {
            let _turn = at_once.acquire_owned().await;
            let task = tokio::spawn(errand);
            let stop = task.abort_handle();
            let done = match tokio::time::timeout(longest, task).await {
                Ok(done) => done.unwrap_or(died),
                Err(_) => {
                    stop.abort();
                    died
                }
            };
            // Nobody listens any more when the process ends; the WAL has the rows.
            sender.send(Job::Done(Box::new(done))).ok();
        });
    }

    pub(super) fn done(&mut self, done: Done) -> Result<(), Fault> {
        let looked = match done {
            Done::Looked { stream, outcome } => {
                let failure = outcome.map(|table| self.adopt(&stream, table)).err();
                Some((Subject::Stream(stream), failure))
            }
            Done::Listed { outcome } => {
                let failure = outcome.map(|tables| self.adopt_all(tables)).err();
                Some((Subject::All, failure))
            }
            Done::Committed { stream, table, end } => {
                self.committed(&stream, table, end);
                None
            }
            Done::Maintained { stream, table } => {
                self.adopt(&stream, table);
                None
            }
        };
        if let Some((subject, failure)) = looked {
            let failure = failure.map(|error| chain(&error));
            if let Some(fields) = self.looks.finish(&subject, failure) {
                self.start_look(self.class_of(&subject), subject, fields);
            }
        }
        if let Some(fault) = self.store.sync_failure() {
            return Err(Fault::Store(fault.to_owned()));
        }
        self.free()
    }

    /// The class of a look that several may have asked for.
    pub(super) fn class_of(&self, subject: &Subject) -> Class {
        match subject {
            Subject::All => Class::Readings,
            Subject::Stream(name) => self.streams.get(name).map_or(Class::Readings, |stream| stream.class),
        }
    }

    pub(super) fn adopt_all(&mut self, tables: Listed) {
        for (name, opened) in tables {
            match opened {
                Ok(table) => self.adopt(&name, table),
                Err(error) => {
                    let reason = chain(&error);
                    if self.unopened.get(&name) != Some(&reason) {
                        tracing::error!(stream = %name, reason, "its table cannot be opened");
                        self.unopened.insert(name, reason);
                    }
                }
            }
        }
    }

    /// The table as it is now: ours to show from here on, unless a newer one is.
    pub(super) fn adopt(&mut self, name: &StreamName, table: DeltaTable) {
        match self.streams.get_mut(name) {
            Some(stream) => stream.apply(table, self.settings.hot.grace.0),
            None => {
                tracing::info!(stream = %name, "table appears");
                self.unopened.remove(name);
                let aliases = self.aliases(name).cloned().unwrap_or_default();
                self.streams.insert(name.clone(), Stream::new(name.clone(), table, aliases));
            }
        }
        self.publish(name);
    }
}

/// Opens a table, or makes it when fields are wanted; reads it anew; adds the fields it lacks. A void batch wants none.
pub(super) async fn look(
    store: &Store,
    stream: &StreamName,
    table: Option<DeltaTable>,
    fields: &[StreamField],
) -> Result<DeltaTable, TableError> {
    let mut table = match table {
        None => DeltaTable::create(store, stream, fields).await?,
        Some(mut table) => {
            table.reload().await?;
            table
        }
    };
    // Another node may add others at the same moment, or commit.
    for _ in 0..FIELDS_TRIES_MAX {
        match table.add_fields(fields).await {
            Ok(_) => return Ok(table),
            Err(CommitError::Store(error)) => return Err(error),
            Err(error) => {
                tracing::debug!(%stream, %error, "fields not added yet");
                table.reload().await?;
            }
        }
    }
    let detail = "its fields could not be added: others commit all the time, or the store refuses".to_owned();
    Err(TableError::Busy { stream: stream.clone(), detail })
}

/// How often fields are tried again within one look.
const FIELDS_TRIES_MAX: usize = 5;

/// The tables that are in the store and not known here, and why those that cannot be opened are not.
pub(super) async fn list(store: &Store, known: &BTreeSet<StreamName>) -> Result<Listed, TableError> {
    let mut tables = Vec::new();
    for name in list_streams(store).await? {
        if !known.contains(&name)
            && let Some(opened) = DeltaTable::open(store, &name).await.transpose()
        {
            tables.push((name, opened));
        }
    }
    Ok(tables)
}

/// Commits what was taken; after any failure reads the table again, so that what is there counts.
pub(super) async fn commit(table: &mut DeltaTable, taking: Taking) -> CommitEnd {
    // They became hot before the table got its newest fields.
    let fields = table.snapshot().fields;
    let rows: Vec<RecordBatch> = taking.rows.iter().map(|rows| refit(rows, &fields)).collect();
    let count = rows.iter().map(|rows| rows.num_rows() as u64).sum();
    let error = match table.commit(&rows, &taking.marks).await {
        Ok(_) => return CommitEnd::Made { rows: count },
        Err(error) => error,
    };
    match (table.reload().await, &error) {
        (Ok(_), CommitError::Moved { .. } | CommitError::Covered { .. }) => CommitEnd::Moved,
        (Ok(_), _) => CommitEnd::Failed { reason: chain(&error) },
        (Err(again), _) => CommitEnd::Failed { reason: format!("{}; {}", chain(&error), chain(&again)) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_while_a_look_runs_learns_from_the_next_one() {
        let mut book = LookBook::default();
        let subject = Subject::Stream("traffic".parse().unwrap());
        let (first, start) = book.ask(subject.clone(), &[]);
        assert!(start.is_some());
        let (second, start) = book.ask(subject.clone(), &[]);
        assert!(start.is_none());
        let (third, _) = book.ask(subject.clone(), &[]);
        assert_eq!(second, third);
        assert_eq!(book.outcome(&first), None);
        assert!(book.finish(&subject, None).is_some(), "the second look is asked for");
        assert_eq!((book.outcome(&first), book.outcome(&second)), (Some(Ok(())), None));
        assert!(book.finish(&subject, Some("away".to_owned())).is_none());
        assert_eq!(book.outcome(&second), Some(Err("away".to_owned())));
    }
}
