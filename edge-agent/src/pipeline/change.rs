//! From one configuration to the next, at an entry of the journal: all before it goes by the old one, all behind by the new.
//!
//! The caller applies the entry, then calls [`Pipeline::end_for`], which lets go what the new configuration would not go on
//! with; cuts; and goes on with what [`Pipeline::changed`] returns. All of that depends on the journal alone, so it comes out
//! the same again after a crash.
//!
//! And from one pipeline to two, while a lane refuses: [`Pipeline::forerunner`] goes on for the other lanes.

use std::collections::BTreeMap;

use segment_log::Position;

use super::{Pipeline, SnapshotError, streams_of};
use crate::config::Settings;
use crate::window::Windows;

impl Pipeline {
    /// Readings that wait in streams which are not configured any more go on, and windows that do not go on are told as they
    /// are. They are rows of the entry at `position`, which was applied last.
    pub fn end_for(&mut self, position: Position, settings: &Settings) {
        let streams = streams_of(settings);
        for index in 0..self.streams.len() {
            let name = &self.streams[index].name;
            let next = streams.get(name).map(|stream| Windows::new(name, stream));
            if next.is_none() {
                self.release_until(position, index, i64::MAX);
                self.close_windows(position, index);
            }
            let rows = self.streams[index].windows.close_what_ends(next.as_ref());
            self.window_rows(position, index, rows);
        }
    }

    /// Whether rows may be cut at another configuration, also while lanes are ahead and streams have moved: only so can it
    /// change where it changed before a crash. Rows of a stream that moved wait until the cut stands behind its new lane: at
    /// the same position a restart could not tell that they are there.
    pub fn may_cut_to_change(&self) -> bool {
        self.outputs.iter().filter(|output| output.rows() > 0).all(|output| {
            let moved = self.moved.get(&output.stream);
            moved.is_none_or(|moved| output.skip_before <= self.position && moved.shows_at(self.position))
        })
    }

    /// The pipeline that goes on from here by other settings. No row may be pending. `lanes` are as for [`Pipeline::restore`].
    ///
    /// # Errors
    /// None that input brings about.
    pub fn changed(&self, settings: &Settings, lanes: &BTreeMap<String, Position>) -> Result<Self, SnapshotError> {
        let mut changed = Self::restore(settings, lanes, self.snapshot().into())?;
        for stream in &mut changed.streams {
            let before = self.streams.iter().find(|before| before.name == stream.name);
            stream.last_error = before.and_then(|before| before.last_error.clone());
        }
        Ok(changed)
    }

    /// One that goes on from here for all lanes but `full`, whose rows it does not keep; no row may be pending here. `lanes`
    /// are as for [`Pipeline::restore`]. None while a stream moves between lanes.
    ///
    /// # Errors
    /// None that input brings about.
    pub fn forerunner(
        &self,
        settings: &Settings,
        mut lanes: BTreeMap<String, Position>,
        full: impl IntoIterator<Item = usize>,
    ) -> Result<Option<Self>, SnapshotError> {
        if !self.moved.is_empty() {
            return Ok(None);
        }
        for lane in full {
            lanes.insert(self.lane_names[lane].clone(), Position(u64::MAX));
        }
        self.changed(settings, &lanes).map(Some)
    }

    /// The lane has its rows up to `position`, from a forerunner; at the end of all positions it gets none from here.
    pub fn lane_stands(&mut self, lane: usize, position: Position) {
        for output in self.outputs.iter_mut().filter(|output| output.lane == lane) {
            output.skip_before = output.skip_before.max(position);
        }
    }
}
