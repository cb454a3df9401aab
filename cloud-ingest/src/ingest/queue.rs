//! What waits for the ingest thread: errands that are back, then alerts, then views, then readings; in each the oldest first.
//!
//! So what goes before waits for nothing but the sync that is under way. The queue has no bound of its own: requests hold a
//! place, of which each class has so many, and errands are at most two for each stream.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Semaphore;

use super::Job;
use crate::class::{ByClass, Class};
use crate::config::Settings;

/// The thread has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stopped;

#[derive(Debug, Default)]
struct Waiting {
    errands: VecDeque<Job>,
    requests: ByClass<VecDeque<Job>>,
    stopped: bool,
}

impl Waiting {
    fn next(&mut self) -> Option<Job> {
        let requests = &mut self.requests;
        self.errands.pop_front().or_else(|| Class::ALL.into_iter().find_map(|class| requests[class].pop_front()))
    }
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

/// Where jobs are put.
#[derive(Clone)]
pub(crate) struct Jobs(Arc<Shared>);

/// Where the thread takes them. Jobs that it leaves are dropped with it, and those who wait for them hear that.
pub(crate) struct Queue(Arc<Shared>);

/// Both ends.
pub(crate) fn queue() -> (Jobs, Queue) {
    let shared = Arc::<Shared>::default();
    (Jobs(Arc::clone(&shared)), Queue(shared))
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl Jobs {
    /// Puts a job behind those of its class.
    pub(crate) fn send(&self, job: Job) -> Result<(), Stopped> {
        let mut waiting = self.0.waiting.lock();
        if waiting.stopped {
            return Err(Stopped);
        }
        match job.class() {
            None => waiting.errands.push_back(job),
            Some(class) => waiting.requests[class].push_back(job),
        }
        drop(waiting);
        self.0.more.notify_one();
        Ok(())
    }
}

impl Queue {
    /// The next job, if one comes within this time.
    pub(crate) fn next_within(&self, longest: Duration) -> Option<Job> {
        let until = Instant::now() + longest;
        let mut waiting = self.0.waiting.lock();
        loop {
            if let Some(job) = waiting.next() {
                return Some(job);
            }
            if self.0.more.wait_until(&mut waiting, until).timed_out() {
                return waiting.next();
            }
        }
    }

    /// The next job that is there.
    pub(crate) fn next(&self) -> Option<Job> {
        self.0.waiting.lock().next()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let left = {
            let mut waiting = self.0.waiting.lock();
            waiting.stopped = true;
            std::mem::take(&mut waiting.requests)
        };
        drop(left);
    }
}

/// Places for requests of each class.
pub(crate) fn places(settings: &Settings) -> ByClass<Arc<Semaphore>> {
    let waiting = requests_waiting(settings);
    ByClass::new(|class| Arc::new(Semaphore::new(waiting[class].min(Semaphore::MAX_PERMITS))))
}

/// How many requests of each class may wait.
pub(super) fn requests_waiting(settings: &Settings) -> ByClass<usize> {
    ByClass::new(|class| match class {
        Class::Alerts => settings.pressure.alerts_waiting,
        Class::Views => settings.pressure.views_waiting,
        Class::Readings => settings.limits.requests_waiting,
    })
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::ingest::Reply;

    fn batches(class: Class) -> (Job, oneshot::Receiver<Result<wire::Acks, wire::RefusedAnswer>>) {
        let (reply, answer): (Reply, _) = oneshot::channel();
        let _place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        (Job::Batches { class, batches: Vec::new(), reply, _place }, answer)
    }

    #[test]
    fn alerts_wait_for_nobody_and_readings_for_all() {
        let (jobs, queue) = queue();
        for class in [Class::Readings, Class::Views, Class::Readings, Class::Alerts, Class::Views] {
            jobs.send(batches(class).0).unwrap();
        }
        jobs.send(Job::Stop).unwrap();
        let order = std::iter::from_fn(|| queue.next_within(Duration::ZERO)).map(|job| job.class()).collect::<Vec<_>>();
        let [alerts, views, readings] = Class::ALL.map(Some);
        assert_eq!(order, [None, alerts, views, views, readings, readings]);
        assert!(queue.next().is_none());
    }

    #[test]
    fn whoever_waits_when_the_thread_stops_hears_of_it() {
        let (jobs, queue) = queue();
        let (job, mut answer) = batches(Class::Alerts);
        jobs.send(job).unwrap();
        drop(queue);
        assert!(matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert_eq!(jobs.send(Job::Stop), Err(Stopped));
    }

    #[test]
    fn a_job_wakes_the_thread() {
        let (jobs, queue) = queue();
        let thread = std::thread::spawn(move || queue.next_within(Duration::from_secs(60)).is_some());
        jobs.send(Job::Stop).unwrap();
        assert!(thread.join().unwrap());
    }
}
