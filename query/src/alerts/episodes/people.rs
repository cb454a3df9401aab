//! What people do: they take an alert on, give it to somebody, say something, and want to be left alone.

use std::collections::HashMap;

use super::super::episode::{Acknowledged, Episode};
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
        let episode = open.chain(self.ended.values_mut()).find(|episode| episode.is_called(id));
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
