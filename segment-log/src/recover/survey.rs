//! The pass over all segments, and the verdict on what it found.
//!
//! The pass streams: it keeps ranges and three positions, never records. The verdict is a pure
//! function of it: what is an incident, where the log ends, what behind is a torn tail.

use std::io;
use std::path::Path;

use super::{Candidate, Damage, OpenError, Reason, path_of};
use crate::Position;
use crate::format::MARKER;
use crate::format::identity::CutNote;
use crate::layer::{FileLayer, LayerFile};
use crate::scan::{Scanner, Step};

/// Ranges remembered one by one.
const GAPS_MAX: usize = 4096;

/// What the pass over all segments found.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Ranges without a good record, ascending.
    pub(super) gaps: Vec<Damage>,
    /// The highest `synced_to` of any good record.
    pub(super) synced_to: u64,
    /// Behind the last good record.
    pub(super) end: u64,
    /// Behind the last good record that is not a marker.
    pub(super) content_end: u64,
    /// The last good record is a marker for all before it.
    pub(super) sealed: bool,
}

/// What to keep.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) end: u64,
    pub(super) incidents: Vec<Damage>,
    pub(super) torn_tail: Option<Damage>,
}

pub(super) fn survey<L: FileLayer>(
    layer: &L,
    directory: &Path,
    seed: u32,
    candidates: &[Candidate],
) -> Result<Survey, OpenError> {
    let start = candidates[0].first;
    let mut survey = Survey { end: start, content_end: start, ..Survey::default() };
    for (index, candidate) in candidates.iter().enumerate() {
        let path = path_of(directory, candidate.first);
        let behind = candidates.get(index + 1).map(|next| next.first);
        layer
            .open(&path)
            .and_then(|file| survey.segment(file, seed, candidate, behind))
            .map_err(|source| OpenError::io(&path, source))?;
    }
    Ok(survey)
}

impl Survey {
    fn segment<F: LayerFile>(
        &mut self,
        file: F,
        seed: u32,
        candidate: &Candidate,
        behind: Option<u64>,
    ) -> io::Result<()> {
        let first = candidate.first;
        let limit = behind.unwrap_or(candidate.file_end());
        let mut scanner = Scanner::new(file, seed, first, first, limit);
        loop {
            match scanner.step()? {
                Step::End => return Ok(()),
                Step::Record(found) => {
                    self.synced_to = self.synced_to.max(found.synced_to);
                    self.end = found.next;
                    self.sealed = found.kind == MARKER && found.synced_to == found.position;
                    if found.kind != MARKER {
                        self.content_end = found.next;
                    }
                }
                Step::Bad { from, mut to } => {
                    if behind.is_none() && to == limit {
                        // Blank space behind the last record is not damage.
                        to = scanner.content_end(from)?;
                    }
                    if to > from {
                        let missing = to > candidate.file_end();
                        let reason = if missing { Reason::Missing } else { Reason::Record };
                        self.gap(Damage { from: Position(from), to: Position(to), reason });
                    }
                }
            }
        }
    }

    fn gap(&mut self, gap: Damage) {
        let full = self.gaps.len() == GAPS_MAX;
        match self.gaps.last_mut() {
            Some(last) if full => last.to = gap.to,
            _ => self.gaps.push(gap),
        }
    }
}

/// Where the log ends, what below is an incident, and what behind is a torn tail.
pub(super) fn judge(survey: &mut Survey, note: Option<CutNote>) -> Verdict {
    let seen_end = survey.gaps.last().map_or(survey.end, |gap| survey.end.max(gap.to.0));
    let mut incidents = std::mem::take(&mut survey.gaps);
    let end = match note {
        // An earlier opening has judged, and was interrupted.
        Some(CutNote { at, synced_to }) => {
            survey.synced_to = survey.synced_to.max(synced_to.0).min(at.0);
            if seen_end < at.0 {
                let reason = Reason::Missing;
                incidents.push(Damage { from: Position(seen_end), to: at, reason });
            }
            at.0
        }
        None => {
            let torn = incidents.iter().find(|gap| gap.to.0 > survey.synced_to);
            torn.map_or(survey.end, |gap| gap.from.0.max(survey.synced_to))
        }
    };
    incidents.retain_mut(|gap| {
        gap.to.0 = gap.to.0.min(end);
        gap.from < gap.to
    });
    let torn_tail =
        (seen_end > end).then_some(Damage { from: Position(end), to: Position(seen_end), reason: Reason::Record });
    Verdict { end, incidents, torn_tail }
}
