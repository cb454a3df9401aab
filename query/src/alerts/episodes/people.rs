//! What people do: they take an alert on, give it to somebody, say something, and want to be left alone.

use std::collections::HashMap;

use super::super::episode::{Acknowledged, Episode, Phase};
use super::super::silence::Silence;
use super::{Episodes, Subject, Transition};

/// Silences at a time.
const SILENCES_MAX: usize = 1_000;

/// Why something that a person asked for is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unknown {
    #[error("there is no alert `{0}` that fires, or ended lately")]
    Alert(String),
    #[error("there is no silence `{0}`")]
    Silence(String),
    #[error("there are {SILENCES_MAX} silences: delete some")]
    Silences,
}

impl Episodes {
    /// Somebody takes it on: it is not repeated, and told again only when it gets worse.
    pub(crate) fn acknowledge(&mut self, id: &str, by: &str, note: &str, now: i64) -> Result<(), Unknown> {
        self.by_hand(id, Transition::Acknowledged, by, note, now, |episode| {
            episode.acknowledged = Some(Acknowledged {
                by: by.to_owned(),
                note: note.to_owned(),
                at: now,
                severity: episode.severity,
                value: episode.value,
            });
        })
    }

    /// It is somebody's.
    pub(crate) fn assign(&mut self, id: &str, to: &str, by: &str, note: &str, now: i64) -> Result<(), Unknown> {
        self.by_hand(id, Transition::Assigned, by, note, now, |episode| episode.assigned = Some(to.to_owned()))
    }

    /// Something is said about it.
    pub(crate) fn comment(&mut self, id: &str, by: &str, note: &str, now: i64) -> Result<(), Unknown> {
        self.by_hand(id, Transition::Commented, by, note, now, |_| {})
    }

    /// It has ended: whoever raised it is gone, or was wrong. What still raises it afterwards begins another alert, but for an edge
    /// that says of this very one, later, that it fires: that opens it again.
    pub(crate) fn resolve(&mut self, id: &str, by: &str, note: &str, now: i64) -> Result<(), Unknown> {
        let is_meant = |episode: &&Episode| episode.is_called(id) && episode.phase != Phase::Pending;
        let found =
            self.open.iter().find_map(|(key, open)| Some((key.clone(), open.values().find(is_meant)?.labels.clone())));
        let unknown = || Unknown::Alert(id.to_owned());
        let (key, labels) = found.ok_or_else(unknown)?;
        let episode = self.open.get_mut(&key).and_then(|open| open.remove(&labels));
        let mut episode = episode.ok_or_else(unknown)?;
        for raised in episode.raised.values_mut() {
            raised.to.get_or_insert(now.max(raised.from));
        }
        episode.watch = episode.watch.take().filter(|watch| !watch.firing);
        let told = episode.told && episode.phase == Phase::Firing;
        (episode.phase, episode.to, episode.ended_by_hand) = (Phase::Resolved, Some(now), Some(now));
        (episode.unsettled_at, episode.lingers, episode.stale) = (None, None, false);
        episode.is_told_as();
        let subject = self.as_recorded(&episode, now);
        self.push(Transition::Resolved, now, now, told, subject, Some(by.to_owned()), Some(note.to_owned()));
        self.keep_ended(key, episode);
        Ok(())
    }

    fn by_hand(
        &mut self,
        id: &str,
        transition: Transition,
        by: &str,
        note: &str,
        now: i64,
        change: impl FnOnce(&mut Episode),
    ) -> Result<(), Unknown> {
        let open = self.open.values_mut().flat_map(HashMap::values_mut);
        let episode = open.chain(self.ended.values_mut().flatten()).find(|episode| episode.is_called(id));
        let episode = episode.ok_or_else(|| Unknown::Alert(id.to_owned()))?;
        change(episode);
        let episode = episode.clone();
        let (told, subject) = (episode.told, self.as_recorded(&episode, now));
        self.push(transition, now, now, told, subject, Some(by.to_owned()), Some(note.to_owned()));
        Ok(())
    }

    /// Nobody is told of these from now on, or from its beginning.
    pub(crate) fn silence(&mut self, silence: Silence, now: i64) -> Result<(), Unknown> {
        if self.silences.len() >= SILENCES_MAX {
            return Err(Unknown::Silences);
        }
        self.silences.insert(silence.id.clone(), silence.clone());
        let (by, note) = (Some(silence.by.clone()), Some(silence.note.clone()));
        self.push(Transition::Silence, now, now, false, Subject::Silence(silence), by, note);
        Ok(())
    }

    /// A silence ends before its time.
    pub(crate) fn unsilence(&mut self, id: &str, by: &str, now: i64) -> Result<(), Unknown> {
        let silence = self.silences.remove(id).ok_or_else(|| Unknown::Silence(id.to_owned()))?;
        self.push(Transition::Unsilence, now, now, false, Subject::Silence(silence), Some(by.to_owned()), None);
        Ok(())
    }
}
